#!/usr/bin/env bash
# `make fuzz`: runs fuzz targets of tests/fuzz, SECONDS each and JOBS at a time (default: the
# processors), from valid files and what was found before as seeds. Of what is found, the shortest
# inputs that together reach as much are packed into tests/fuzz/corpora, which the tests replay.
# Inputs that crash a target are left in tests/fuzz/driver/artifacts, its output in
# driver/work/TARGET.log; the other targets still run.
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
inputs=$(mktemp -d -p "$([ -d /dev/shm ] && echo /dev/shm || echo /tmp)")
trap 'rm -rf "$inputs"' EXIT
# Each target is a process group of its own, which is ended whole.
set -m
stop() { for job in $(jobs -p); do kill -TERM -- "-$job" 2> /dev/null || true; done; exit "$1"; }
trap 'stop 130' INT
trap 'stop 143' TERM

# Fuzzes one target and packs what was found. `set -e` is off in it: it is asked how it went.
fuzz() {
    local target=$1 work=$driver/work/$1 code=0
    export FUZZ_FOLDER=$inputs/$target
    rm -rf "$work"
    mkdir -p "$work"/{seeds,corpus,merged} $driver/artifacts/"$target" && python3 tests/fuzz/seeds.py "$work/all" &&
        cp "$work/all/$target"/* "$work/seeds" && python3 tests/fuzz/pack.py --unpack "$target" "$work/corpus" || return 1
    "$programs/$target" "$work/corpus" "$work/seeds" -dict=$driver/words.dict -max_total_time="$seconds" -max_len=6144 -rss_limit_mb=1024 \
        -timeout=5 -artifact_prefix=$driver/artifacts/"$target"/ || code=1
    "$programs/$target" -merge=1 "$work/merged" "$work/seeds" "$work/corpus" -timeout=5 -artifact_prefix=$driver/artifacts/"$target"/ || code=1
    # What was found stays where it cannot be packed.
    python3 tests/fuzz/pack.py "$target" "$work/seeds" "$work/merged" && rm -rf "$work" || return 1
    return $code
}

mkdir -p $driver/work
for target in "$@"; do
    while [ "$(jobs -pr | wc -l)" -ge "${JOBS:-$(nproc)}" ]; do wait -n || true; done
    {
        log=$driver/work/$target.log
        if fuzz "$target" > "$log" 2>&1; then
            touch "$inputs/.ok-$target"
        else
            tail -n 20 "$log" >&2
        fi
        runs=$(grep -aoE '^Done [0-9]+ runs in [0-9]+' "$log" | head -n 1 || true)
        echo "$target: ${runs:-ended before its time}${runs:+ s}"
    } &
done
wait
failed=
for target in "$@"; do [ -e "$inputs/.ok-$target" ] || failed+=" $target"; done
[ -z "$failed" ] || { echo "fuzz: failed:$failed (see $driver/work/TARGET.log, and $driver/artifacts for the inputs)" >&2; exit 1; }
