#!/usr/bin/env bash
# Sourced by the tests: a directory for a private cluster and two runs of the pipeline, of which one
# is quiet and one is rough.
tests/slurm/install.sh
export BIN=${BIN:-target/release} BASE=fixtures/demo/base TASKS=fixtures/demo/tasks.toml
export P=1 SEED=0 THREADS=1 EVAL_FLAGS='--batch-size 50 --device cpu --limit 10'
export TRAIN_FLAGS='--batch-size 8 --lr 1e-3 --device cpu --save-every 10'
unset MAKEFLAGS MFLAGS MAKELEVEL
dir=$(mktemp -d "${TMPDIR:-/tmp}/cpift-slurm.XXXXXX")
export SLURM_CONF=$dir/slurm.conf CLUSTER=$dir/cluster.env
# shellcheck disable=SC2317
finish() {
    local code=$?
    tests/slurm/cluster.sh stop "$dir"
    [ "$code" != 0 ] || rm -rf "$dir"
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM
quiet=$dir/quiet rough=$dir/rough
begin=$SECONDS

fail() {
    echo "test-slurm: FAILED: $*" >&2
    for run in "$quiet" "$rough"; do "$BIN/cpift-pipeline" status RUN="$run" >&2 || true; done
    squeue >&2; tail -n 5 "$quiet"/slurm/*.out "$rough"/slurm/*.out >&2 || true
    echo "test-slurm: the files are in $dir" >&2
    exit 1
}
ok() { echo "test-slurm: $((SECONDS - begin)) s: $*"; }
# wait_for WHAT COMMAND…: waits until the command succeeds, at most ten minutes.
wait_for() {
    local what=$1 end=$((SECONDS + 600))
    shift
    until "$@"; do [ "$SECONDS" -lt "$end" ] || fail "timed out waiting for $what"; sleep 0.05; done
}
has() { grep -qE -- "$2" <<< "$1" || fail "'$2' is not in: $1"; }
job_of() { awk -v name="$2" '$1 == name { id = $2 } END { print id }' "$1/slurm/jobs"; }
idle() { local jobs; jobs=$(squeue -h -o %j) && ! grep -q "^${1##*/}\." <<< "$jobs"; }
is() { [ "$("$BIN/cpift-pipeline" status RUN="$rough" | awk -v name="$1" '$1 == name { print $2 }')" = "$2" ]; }
# PID of the running command of a stage (from its state file), and a test for its number of steps.
program() { awk '$1 == "running" { print $3 }' "$rough/logs/$1.state" 2> /dev/null; }
steps() { [ -n "$(program "$1")" ] && [ "$(wc -l < "$rough/$2.checkpoints/metrics.jsonl")" -ge "$3" ]; } 2> /dev/null
resumed() {
    local out
    out=$(cat "$rough/slurm/"*"${2}"*.out)
    has "$out" "job $2 .*start 2"
    has "$(cat "$rough/logs/$1.log")" "going on|resum"
}
# All outputs of both runs have the same bytes.
same_bytes() {
    local file count=0
    for file in $(cd "$quiet" && find . -name '*.safetensors' -o -name groups.json -o -name scores.json -o -name outputs.jsonl -o -name table.md); do
        # Scores contain the path of their model.
        cmp "$quiet/$file" <(LC_ALL=C sed "s|$rough/|$quiet/|g" "$rough/$file") || fail "$file differs"
        count=$((count + 1))
    done
    ok "$count files have the same bytes in both runs"
}
