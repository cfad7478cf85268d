#!/usr/bin/env bash
# `make test-slurm`: `make slurm` on a private one-machine cluster. Compares an undisturbed run of the
# demo with a disturbed one, in which an array element fails, a running probe is requeued, a job
# reaches its time limit and a node dies. Both must give the same bytes.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/slurm/common.sh
export METHODS='full-sft multi-stage cpi-ft' TAU=auto ORDER=overlap
export PROBE_TOKENS=12000 BACKBONE_TOKENS=12000 FINAL_TOKENS=12000
printf '%s\n' TIME=30 CPUS=1 GPUS=0 WARN=15 MAX_RESTARTS=5 > "$CLUSTER"
lost() { [[ "$(sinfo -h -o %t)" == down* ]]; }
# Bit 14 of the pending signals is SIGTERM.
warned() { (($((16#$(awk '$1 == "ShdPnd:" { print $2 }' "/proc/$1/status"))) >> 14 & 1)); }

tests/slurm/warned.sh || exit 1
ok "a job that is warned at any moment is requeued"
tests/slurm/cluster.sh start "$dir"
ok "the cluster is up"

# A dry run writes nothing. Queued jobs are not submitted again.
lines=$("$BIN/cpift-pipeline" slurm DRY_RUN=1 RUN="$quiet")
[ "$(grep -c '^sbatch ' <<< "$lines")" = 9 ] || fail "dry run: $lines"
[ ! -e "$quiet" ] || fail "a dry run has written something"
said=$("$BIN/cpift-pipeline" slurm RUN="$quiet")
echo "$said"
has "$said" '^probe .* \(arithmetic code logic format recall\)$'
has "$said" '^groups .* after probe'
said=$("$BIN/cpift-pipeline" slurm RUN="$quiet")
! grep -E ' job [0-9]' <<< "$said" || fail "submitted twice: $said"

# One array element fails: --force does not replace a directory that another program made.
mkdir -p "$rough/probes/logic"
echo mine > "$rough/probes/logic/notes.txt"
"$BIN/cpift-pipeline" slurm RUN="$rough" > /dev/null
# A cancelled job saves its state and is not requeued.
wait_for "full-sft at work" steps full-sft full-sft 5
scancel "$(job_of "$rough" full-sft)"
wait_for "the end of the failed graph" idle "$rough"
status=$("$BIN/cpift-pipeline" status RUN="$rough")
has "$status" '^probe-logic +failed +exit code 3: error: .*CPI-FT did not write'
has "$status" '^probe-recall +done'
has "$status" '^groups +missing +waits for mask-logic'
has "$status" '^full-sft +stopped'
ok "a failed element stopped everything that depends on it: $(grep '^probe-logic' <<< "$status" | tr -s ' ')"

wait_for "the end of the quiet run" idle "$quiet"
has "$("$BIN/cpift-pipeline" status RUN="$quiet")" '^42 done$'
made=$(make -s --no-print-directory -f scripts/pipeline.mk RUN="$quiet" all)
[ -z "$made" ] || fail "make would remake: $made"
has "$(P=2 "$BIN/cpift-pipeline" status RUN="$quiet")" '^mask-code +stale +argument: --percent 1, now --percent 2$'
ok "the quiet run is complete, and make has nothing to do"

# A new submission contains only what is missing.
rm -r "$rough/probes/logic"
# One minute is Slurm's shortest limit. Slurm checks limits every 30 s and warns at the last check
# in time: 15 to 45 s after the start.
echo TIME_backbone=1 >> "$CLUSTER"
said=$("$BIN/cpift-pipeline" slurm RUN="$rough")
echo "$said"
has "$said" '^probe .* \(logic\)$'
has "$said" '^full-sft +job'
has "$said" '^score .* \(20: base.arithmetic … cpi-ft.recall\)'

# A running job is requeued.
wait_for "probe-logic at work" steps probe-logic probes/logic 5
job=$(job_of "$rough" probe-logic)
kill -STOP "$(program probe-logic)"
is probe-logic running || fail "the status of probe-logic is not running"
scontrol requeue "$job"
wait_for "probe-logic a second time" test -e "$rough/probes/logic/cpift.json"
resumed probe-logic "$job"
ok "probe-logic (job $job) was requeued and resumed"

# Time limit: the program is paused so that the limit is reached on a machine of any speed.
wait_for "backbone at work" steps backbone backbone 5
job=$(job_of "$rough" backbone)
held=$(program backbone)
kill -STOP "$held"
wait_for "the warning before the limit" warned "$held"
kill -CONT "$held"
wait_for "backbone a second time" test -e "$rough/backbone/cpift.json"
has "$(cat "$rough/slurm/backbone-$job.out")" 'the state is saved: the job is queued again'
resumed backbone "$job"
ok "backbone (job $job) was warned before its limit, saved its state, was requeued and resumed"

# A node dies with everything that runs on it, and comes back.
wait_for "cpi-ft at work" steps cpi-ft cpi-ft 12
job=$(job_of "$rough" cpi-ft)
pid=$(program cpi-ft)
kill -STOP "$pid"
kill -KILL "$(cat "$dir/slurmd-n1.pid")"
# Kill parents first, because a parent whose child dies would exit by itself.
dead=()
until [[ "$(cat "/proc/$pid/comm")" == slurmstepd* ]]; do dead=("$pid" "${dead[@]}"); pid=$(awk '$1 == "PPid:" { print $2 }' "/proc/$pid/status"); done
kill -KILL "$pid" "${dead[@]}" 2> /dev/null || true
wait_for "the status failed of cpi-ft" is cpi-ft failed
wait_for "the loss of the node" lost
tests/slurm/cluster.sh node "$dir"
wait_for "cpi-ft a second time" test -e "$rough/cpi-ft/cpift.json"
resumed cpi-ft "$job"
ok "cpi-ft (job $job) resumed after its node had died"

wait_for "the end of the rough run" idle "$rough"
has "$("$BIN/cpift-pipeline" status RUN="$rough")" '^42 done$'
same_bytes
[ "$("$BIN/cpift-pipeline" slurm RUN="$rough" | grep -c ' complete$')" = 9 ] || fail "the run is complete but was submitted again"
# The scores of one model on one task are one array element.
rm -r "$rough/task-scores/cpi-ft/recall"
lines=$("$BIN/cpift-pipeline" slurm DRY_RUN=1 RUN="$rough" | grep '^sbatch')
[ "$(wc -l <<< "$lines")" = 2 ] || fail "one score is missing: $lines"
has "$lines" '^sbatch .*rough\.score .*--array=19 '
has "$lines" '^sbatch .*rough\.report '
ok "passed"
