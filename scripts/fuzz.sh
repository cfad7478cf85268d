#!/usr/bin/env bash
# `make fuzz`: runs fuzz targets of tests/fuzz, SECONDS each and as many at a time as there are processors (JOBS), from valid files and what was
# found before as seeds. Of what is found, the shortest inputs that together reach as much are packed into tests/fuzz/corpora, which the tests
# replay. What ends a target is left in tests/fuzz/driver/artifacts, its last words in work/TARGET.log beside it; the others run all the same.
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
# All of this process group: the targets at work as well.
trap 'trap "" TERM; kill 0; exit 130' INT TERM

# Fuzzes one target and packs what was found; what libFuzzer says is in its log.
fuzz() {
    local target=$1 work=$driver/work/$1 code=0
    export FUZZ_FOLDER=$inputs/$target
    rm -rf "$work"
    mkdir -p "$work"/{seeds,corpus,merged} $driver/artifacts/"$target"
    python3 tests/fuzz/seeds.py "$work/all"
    cp "$work/all/$target"/* "$work/seeds"
    python3 tests/fuzz/pack.py --unpack "$target" "$work/corpus"
    "$programs/$target" "$work/corpus" "$work/seeds" -dict=$driver/words.dict -max_total_time="$seconds" -max_len=6144 -rss_limit_mb=1024 \
        -timeout=5 -artifact_prefix=$driver/artifacts/"$target"/ || code=1
    "$programs/$target" -merge=1 "$work/merged" "$work/seeds" "$work/corpus" -timeout=5 -artifact_prefix=$driver/artifacts/"$target"/ || code=1
    python3 tests/fuzz/pack.py "$target" "$work/seeds" "$work/merged"
    rm -rf "$work"
    return $code
}

mkdir -p $driver/work
for target in "$@"; do
    while [ "$(jobs -pr | wc -l)" -ge "${JOBS:-$(nproc)}" ]; do wait -n || true; done
    log=$driver/work/$target.log
    {
        code=0
        fuzz "$target" > "$log" 2>&1 || code=1
        # What libFuzzer did in all.
        runs=$(grep -aoE '^Done [0-9]+ runs in [0-9]+ second' "$log" | head -n 1 || true)
        echo "$target: ${runs:-ended before its time}"
        [ "$code" = 0 ] || { tail -n 20 "$log" >&2; touch "$inputs/.failed-$target"; }
    } &
done
wait
failed=$(find "$inputs" -maxdepth 1 -name '.failed-*' -printf '%f ' | sed 's/\.failed-//g')
[ -z "$failed" ] || { echo "fuzz: ended by what is in $driver/artifacts: $failed" >&2; exit 1; }
