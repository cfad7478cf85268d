#!/usr/bin/env bash
# A job of `cpift-pipeline slurm`: job.sh 'NAME…' …, one argument per element of an array. It makes the
# artifacts of its own element with scripts/pipeline.mk and nothing else. Training that stops with
# its state saved (75) is requeued. In a job of several tasks, cpift-pipeline starts the programs that
# share their work on all of them, by srun.
set -euo pipefail
# Element 0 has the array's own id: by that, all elements would be requeued.
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
say() { echo "$(date '+%F %T') $*"; }
# Before the time limit RUNNING, or SIGNALING while the warning is on its way; COMPLETING or PENDING
# in a job that was cancelled or that Slurm itself requeues.
state() { scontrol show job -o "$job" | sed -n 's/.* JobState=\([A-Z]*\).*/\1/p'; }
# Slurm warns only this shell. The warning goes on to make, cpift-pipeline and the program. If a job of
# several tasks is cancelled or requeued, Slurm signals the tasks as well: they are not told twice,
# which would end them at once, and make is told by SIGHUP to begin nothing more.
tasks=$((${SLURM_JOB_NUM_NODES:-1} * ${SLURM_NTASKS_PER_NODE:-1}))
make='' warned='' found='' signal=TERM
# shellcheck disable=SC2317
pass_on() { [ -z "$make" ] || kill "-$signal" "$make" 2> /dev/null || true; }
# shellcheck disable=SC2317
warn() {
    warned=1
    if [ "$tasks" = 1 ]; then pass_on; fi
    found=${found:-$(state || true)}
    if [ "$tasks" -gt 1 ]; then
        [[ "$found" =~ ^(RUNNING|SIGNALING)?$ ]] || signal=HUP
        pass_on
    fi
}
trap warn TERM
cd "$SLURM_SUBMIT_DIR"
# shellcheck source=scripts/slurm/cluster.env
source "$CLUSTER"
read -ra names <<< "${@:${SLURM_ARRAY_TASK_ID:-0}+1:1}"
say "$SLURM_JOB_NAME, job $job on $(hostname), start $((${SLURM_RESTART_COUNT:-0} + 1)): ${names[*]}"

eval "${SETUP:-}"
export THREADS=${THREADS:-${SLURM_CPUS_PER_TASK:-1}} STAGE_CODE=$RUN/slurm/.code-$SLURM_JOB_ID
rm -f "$STAGE_CODE"
before=${CONTAINER:-}
if [ "$tasks" -gt 1 ]; then
    export LAUNCH="srun --kill-on-bad-exit=1 --cpus-per-task=${SLURM_CPUS_PER_TASK:-1} ${CONTAINER:-}"
    # Where Slurm tracks processes by their groups, its signals would reach srun.
    before=setsid
fi
# shellcheck disable=SC2086
$before make --no-print-directory -f scripts/pipeline.mk ONLY="${names[*]}" "${names[@]}" &
make=$!
[ -z "$warned" ] || pass_on
# A warning interrupts `wait`.
while kill -0 "$make" 2> /dev/null; do wait "$make" || true; done
code=0; wait "$make" || code=$?
stage=$(cat "$STAGE_CODE" 2> /dev/null || true)
rm -f "$STAGE_CODE"
[ "$code" != 0 ] || exit 0
saved='the state is saved'
# Warned before make had begun a stage, or before its program listened.
if [ -n "$warned" ] && [ "$SECONDS" -lt 20 ] && [[ "$stage" =~ ^(138|143)?$ ]]; then
    stage=75 saved='nothing was begun'
fi
if [ "$stage" != 75 ]; then
    [ -z "$warned" ] || say "the time limit ($CLUSTER: TIME) was near, and this stage cannot be resumed" >&2
    say "failed: ${names[*]} (see $RUN/logs)" >&2
    exit "$code"
fi
if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_RESTARTS:-100}" ]; then
    say "$saved, but the job has been requeued $SLURM_RESTART_COUNT times (MAX_RESTARTS in $CLUSTER)" >&2
    exit 1
fi
found=${found:-$(state)}
if [[ "$found" =~ ^(RUNNING|SIGNALING)$ ]]; then
    say "$saved: the job is queued again"
    scontrol requeue "$job"
else
    say "$saved (the job is $found)"
fi
exit 75
