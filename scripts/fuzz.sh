#!/usr/bin/env bash
# `make fuzz`: runs fuzz targets of tests/fuzz one after another, SECONDS each, from valid files and what was found before as seeds. Of what
# is found, the shortest inputs that together reach as much are packed into tests/fuzz/corpora, which the tests replay. What ends a target is
# left in tests/fuzz/driver/artifacts; the others run all the same.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=$1
shift
command -v cargo-fuzz >/dev/null || { echo "fuzz: cargo-fuzz is missing: cargo install cargo-fuzz" >&2; exit 1; }
driver=tests/fuzz/driver
# The sanitizer's switches are unstable; the compiler is the one of every other build.
RUSTC_BOOTSTRAP=1 cargo fuzz build --fuzz-dir $driver
programs=$driver/target/$(rustc -vV | sed -n 's/^host: //p')/release
export LD_LIBRARY_PATH=${LIBTORCH:-$PWD/.libtorch}/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} ASAN_OPTIONS=detect_odr_violation=0
FUZZ_FOLDER=$(mktemp -d -p "$([ -d /dev/shm ] && echo /dev/shm || echo /tmp)")
export FUZZ_FOLDER
trap 'rm -rf "$FUZZ_FOLDER"' EXIT
failed=
for target in "$@"; do
    echo "== $target, $seconds s"
    work=$driver/work/$target
    rm -rf "$work"
    mkdir -p "$work"/{seeds,corpus,merged} $driver/artifacts/"$target"
    python3 tests/fuzz/seeds.py "$work/all"
    cp "$work/all/$target"/* "$work/seeds"
    python3 tests/fuzz/pack.py --unpack "$target" "$work/corpus"
    "$programs/$target" "$work/corpus" "$work/seeds" -dict=$driver/words.dict -max_total_time="$seconds" -max_len=6144 -rss_limit_mb=1024 \
        -timeout=5 -artifact_prefix=$driver/artifacts/"$target"/ || failed+=" $target"
    "$programs/$target" -merge=1 "$work/merged" "$work/seeds" "$work/corpus" -timeout=5 -artifact_prefix=$driver/artifacts/"$target"/ ||
        failed+=" $target"
    python3 tests/fuzz/pack.py "$target" "$work/seeds" "$work/merged"
    rm -rf "$work"
done
[ -z "$failed" ] || { echo "fuzz: ended by what is in $driver/artifacts:$failed" >&2; exit 1; }
