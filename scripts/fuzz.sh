#!/usr/bin/env bash
# `make fuzz`: runs fuzz targets of tests/fuzz one after another, SECONDS each, from valid files as seeds.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=$1
shift
command -v cargo-fuzz >/dev/null || { echo "fuzz: cargo-fuzz is missing: cargo install cargo-fuzz" >&2; exit 1; }
# The sanitizer's switches are unstable; the compiler is the one of every other build.
export RUSTC_BOOTSTRAP=1
python3 tests/fuzz/seeds.py
for target in "$@"; do
    echo "== $target, $seconds s"
    cargo fuzz run --fuzz-dir tests/fuzz "$target" -- -dict=tests/fuzz/json.dict -max_total_time="$seconds" \
        -max_len=4096 -rss_limit_mb=1024 -timeout=20
done
