#!/usr/bin/env bash
# `make test-slurm`: scripts/slurm/submit.py on a private cluster of one machine. A quiet run of the demo's graph, and a rough one that ends
# in the same bytes: an element of the array fails, a probe is queued again in mid-run, a job meets its time limit, a node dies.
set -euo pipefail
cd "$(dirname "$0")/../.."
tests/slurm/install.sh
export BIN=${BIN:-target/release} BASE=fixtures/demo/base TASKS=fixtures/demo/tasks.toml
export METHODS='full-sft multi-stage cpi-ft' PROBE_TOKENS=12000 BACKBONE_TOKENS=12000 FINAL_TOKENS=12000 TAU=auto ORDER=overlap P=1 SEED=0 THREADS=1
export TRAIN_FLAGS='--batch-size 8 --lr 1e-3 --device cpu --save-every 10' EVAL_FLAGS='--batch-size 50 --device cpu --limit 10'
unset MAKEFLAGS MFLAGS MAKELEVEL
dir=$(mktemp -d "${TMPDIR:-/tmp}/cpift-slurm.XXXXXX")
export SLURM_CONF=$dir/slurm.conf CLUSTER=$dir/cluster.env
finish() {
    local code=$?
    tests/slurm/cluster.sh stop "$dir"
    [ "$code" != 0 ] || rm -rf "$dir"
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM
printf '%s\n' TIME=30 CPUS=1 GPUS=0 WARN=15 MAX_RESTARTS=5 > "$CLUSTER"
quiet=$dir/quiet rough=$dir/rough
begin=$SECONDS

fail() {
    echo "test-slurm: FAILED: $*" >&2
    for run in "$quiet" "$rough"; do scripts/status.py "$run" >&2 || true; done
    squeue >&2; tail -n 5 "$quiet"/slurm/*.out "$rough"/slurm/*.out >&2 || true
    echo "test-slurm: what there is lies in $dir" >&2
    exit 1
}
ok() { echo "test-slurm: $((SECONDS - begin)) s: $*"; }
# wait_for WHAT COMMAND…: until the command succeeds, ten minutes at most.
wait_for() {
    local what=$1 end=$((SECONDS + 600))
    shift
    until "$@"; do [ "$SECONDS" -lt "$end" ] || fail "$what does not come"; sleep 0.05; done
}
has() { grep -qE -- "$2" <<< "$1" || fail "'$2' is not in: $1"; }
job_of() { awk -v name="$2" '$1 == name { id = $2 } END { print id }' "$1/slurm/jobs"; }
idle() { local jobs; jobs=$(squeue -h -o %j) && ! grep -q "^${1##*/}\." <<< "$jobs"; }
is() { [ "$(scripts/status.py "$rough" | awk -v name="$1" '$1 == name { print $2 }')" = "$2" ]; }
lost() { [[ "$(sinfo -h -o %t)" == down* ]]; }
# The program of a stage that is running (its state file), once it has made some steps.
program() { awk '$1 == "running" { print $3 }' "$rough/logs/$1.state" 2> /dev/null; }
steps() { [ -n "$(program "$1")" ] && [ "$(wc -l < "$rough/$2.checkpoints/metrics.jsonl")" -ge "$3" ]; } 2> /dev/null
# Bit 14 of the pending signals is SIGTERM.
warned() { (($((16#$(awk '$1 == "ShdPnd:" { print $2 }' "/proc/$1/status"))) >> 14 & 1)); }
resumed() {
    local out
    out=$(cat "$rough/slurm/"*"${2}"*.out)
    has "$out" "job $2 .*start 2"
    has "$(cat "$rough/logs/$1.log")" "going on|resum"
}

tests/slurm/warned.sh || exit 1
ok "a job that is warned at any moment is queued again"
tests/slurm/cluster.sh start "$dir"
ok "the cluster is up"

# Nothing is written by a dry run; what is queued is not submitted again.
lines=$(scripts/slurm/submit.py --dry-run "$quiet")
[ "$(grep -c '^sbatch ' <<< "$lines")" = 9 ] || fail "dry run: $lines"
[ ! -e "$quiet" ] || fail "a dry run has written something"
said=$(scripts/slurm/submit.py "$quiet")
echo "$said"
has "$said" '^probe .* \(arithmetic code logic format recall\)$'
has "$said" '^groups .* after probe'
said=$(scripts/slurm/submit.py "$quiet")
! grep -E ' job [0-9]' <<< "$said" || fail "submitted twice: $said"

# One element of the array fails: what another program made is not replaced, even by --force.
mkdir -p "$rough/probes/logic"
echo mine > "$rough/probes/logic/notes.txt"
scripts/slurm/submit.py "$rough" > /dev/null
# What is cancelled saves its state and is not queued again.
wait_for "full-sft at work" steps full-sft full-sft 5
scancel "$(job_of "$rough" full-sft)"
wait_for "the end of the failed graph" idle "$rough"
status=$(scripts/status.py "$rough")
has "$status" '^probe-logic +failed +exit code 3: error: .*no program of ours made'
has "$status" '^probe-recall +done'
has "$status" '^groups +missing +waits for mask-logic'
has "$status" '^full-sft +stopped'
ok "a failing element stopped what depends on it: $(grep '^probe-logic' <<< "$status" | tr -s ' ')"

wait_for "the end of the quiet run" idle "$quiet"
has "$(scripts/status.py "$quiet")" '^42 done$'
made=$(make -s --no-print-directory -f scripts/pipeline.mk RUN="$quiet" all)
[ -z "$made" ] || fail "make would make again: $made"
has "$(P=2 scripts/status.py "$quiet")" '^mask-code +stale +argument: --percent 1, now --percent 2$'
ok "the quiet run is at its end, and make has nothing left to do"

# Submitted again, only the rest.
rm -r "$rough/probes/logic"
# One minute is Slurm's shortest limit. Slurm looks at limits every 30 s and warns at the last look in time: 15 to 45 s after the start.
echo TIME_backbone=1 >> "$CLUSTER"
said=$(scripts/slurm/submit.py "$rough")
echo "$said"
has "$said" '^probe .* \(logic\)$'
has "$said" '^full-sft +job'
has "$said" '^score .* \(20: base.arithmetic … cpi-ft.recall\)'

# Queued again in mid-run.
wait_for "probe-logic at work" steps probe-logic probes/logic 5
job=$(job_of "$rough" probe-logic)
kill -STOP "$(program probe-logic)"
is probe-logic running || fail "probe-logic is not said to be running"
scontrol requeue "$job"
wait_for "probe-logic a second time" test -e "$rough/probes/logic/cpift.json"
resumed probe-logic "$job"
ok "probe-logic (job $job) was queued again and went on"

# The time limit: held up, so that it is reached whatever the machine's speed.
wait_for "backbone at work" steps backbone backbone 5
job=$(job_of "$rough" backbone)
held=$(program backbone)
kill -STOP "$held"
wait_for "the warning before the limit" warned "$held"
kill -CONT "$held"
wait_for "backbone a second time" test -e "$rough/backbone/cpift.json"
has "$(cat "$rough/slurm/backbone-$job.out")" 'the state is saved: the job is queued again'
resumed backbone "$job"
ok "backbone (job $job) was warned before its limit, saved, was queued again and went on"

# A node dies with all that runs on it, and comes back.
wait_for "cpi-ft at work" steps cpi-ft cpi-ft 12
job=$(job_of "$rough" cpi-ft)
pid=$(program cpi-ft)
kill -STOP "$pid"
kill -KILL "$(cat "$dir/slurmd-n1.pid")"
# Parents first: one whose child dies would end by itself.
dead=()
until [[ "$(cat "/proc/$pid/comm")" == slurmstepd* ]]; do dead=("$pid" "${dead[@]}"); pid=$(awk '$1 == "PPid:" { print $2 }' "/proc/$pid/status"); done
kill -KILL "$pid" "${dead[@]}"
wait_for "the news of a dead cpi-ft" is cpi-ft failed
wait_for "the loss of the node" lost
tests/slurm/cluster.sh node "$dir"
wait_for "cpi-ft a second time" test -e "$rough/cpi-ft/cpift.json"
resumed cpi-ft "$job"
ok "cpi-ft (job $job) came back after its node had died"

wait_for "the end of the rough run" idle "$rough"
has "$(scripts/status.py "$rough")" '^42 done$'
count=0
for file in $(cd "$quiet" && find . -name '*.safetensors' -o -name groups.json -o -name scores.json -o -name outputs.jsonl -o -name table.md); do
    # Scores name their model's folder.
    cmp "$quiet/$file" <(LC_ALL=C sed "s|$rough/|$quiet/|g" "$rough/$file") || fail "$file differs"
    count=$((count + 1))
done
ok "$count files are the same bytes in both runs"
[ "$(scripts/slurm/submit.py "$rough" | grep -c ' complete$')" = 9 ] || fail "complete, and submitted again"
# The scores on one task of one model are an element of their own.
rm -r "$rough/task-scores/cpi-ft/recall"
lines=$(scripts/slurm/submit.py --dry-run "$rough" | grep '^sbatch')
[ "$(wc -l <<< "$lines")" = 2 ] || fail "one score is missing: $lines"
has "$lines" '^sbatch .*rough\.score .*--array=19 '
has "$lines" '^sbatch .*rough\.report '
ok "passed"
