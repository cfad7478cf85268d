#!/usr/bin/env bash
# A job of scripts/slurm/submit.py: job.sh 'NAME…' …, one argument per element of an array. It makes the artifacts of its own element
# with scripts/pipeline.mk and nothing else; training that stops with its state saved (75) is requeued.
set -euo pipefail
job=$SLURM_JOB_ID
# The first element of an array has the array's own number: named by it, all elements would be queued again.
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
# RUNNING, or SIGNALING while the warning is still on its way, where the time limit comes near; in a job that was cancelled, or that Slurm
# is queueing again by itself, COMPLETING or PENDING.
state() { scontrol show job -o "$job" | sed -n 's/.* JobState=\([A-Z]*\).*/\1/p'; }
# Before the time limit Slurm signals only this shell, which signals make; make signals stage.sh, and stage.sh the program.
make='' warned='' told=''
# shellcheck disable=SC2317
stop() {
    warned=1
    [ -z "$make" ] || kill -TERM "$make" 2> /dev/null || true
    told=${told:-$(state || true)}
}
trap stop TERM
cd "$SLURM_SUBMIT_DIR"
# shellcheck source=scripts/slurm/cluster.env
source "$CLUSTER"
read -ra names <<< "${@:${SLURM_ARRAY_TASK_ID:-0}+1:1}"
echo "$(date '+%F %T') $SLURM_JOB_NAME, job $job on $(hostname), start $((${SLURM_RESTART_COUNT:-0} + 1)): ${names[*]}"

eval "${SETUP:-}"
export THREADS=${THREADS:-${SLURM_CPUS_PER_TASK:-1}} STAGE_CODE=$RUN/slurm/.code-$SLURM_JOB_ID
rm -f "$STAGE_CODE"
# shellcheck disable=SC2086
${CONTAINER:-} make --no-print-directory -f scripts/pipeline.mk ONLY="${names[*]}" "${names[@]}" &
make=$!
[ -z "$warned" ] || kill -TERM "$make" 2> /dev/null || true
while kill -0 "$make" 2> /dev/null; do wait "$make" || true; done
code=0; wait "$make" || code=$?
stage=$(cat "$STAGE_CODE" 2> /dev/null || true)
rm -f "$STAGE_CODE"
[ "$code" != 0 ] || exit 0
done='the state is saved'
# Warned before make had begun a stage, or before its program listened.
if [ -n "$warned" ] && [ "$SECONDS" -lt 20 ]; then
    case $stage in '' | 143) stage=75 done='nothing was begun' ;; esac
fi
if [ "$stage" = 75 ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_RESTARTS:-100}" ]; then
        echo "$done, but the job has been queued again $SLURM_RESTART_COUNT times (MAX_RESTARTS in $CLUSTER)" >&2
        exit 1
    fi
    told=${told:-$(state)}
    if [ "$told" != RUNNING ] && [ "$told" != SIGNALING ]; then
        echo "$(date '+%F %T') $done (the job is $told)"
    else
        echo "$(date '+%F %T') $done: the job is queued again"
        scontrol requeue "$job"
    fi
    exit 75
fi
[ -z "$warned" ] || echo "$(date '+%F %T') the time limit ($CLUSTER: TIME) was near, and this stage cannot go on from where it was" >&2
echo "$(date '+%F %T') failed: ${names[*]} (see $RUN/logs)" >&2
exit "$code"
