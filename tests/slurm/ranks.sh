#!/usr/bin/env bash
# Training on several nodes: two simulated nodes with two tasks each, over Gloo. Compares an
# undisturbed run with one in which a rank is killed, a job is cancelled and a job is warned before
# its time limit.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/slurm/common.sh
export METHODS=multi-stage PROBE_TOKENS=3000 BACKBONE_TOKENS=6000 FINAL_TOKENS=6000
# The names of simulated nodes do not resolve.
cat > "$CLUSTER" << 'EOF'
TIME=30 CPUS=1 GPUS=0 WARN=15 MAX_RESTARTS=5 RANKS=2
NODES_multi_stage=2
RANKS_score=1
SETUP='export MASTER_ADDR=127.0.0.1'
EOF
# Two tasks are enough.
mkdir "$dir/tasks"
awk '/^\[\[task\]\]/ { n++ } n <= 2' fixtures/demo/tasks.toml > "$dir/tasks/tasks.toml"
ln -s "$PWD/fixtures/demo/data" "$dir/tasks/data"
export TASKS=$dir/tasks/tasks.toml

# PID of a rank of a job's step.
rank() {
    local pid
    for pid in $(pgrep -x cpift-train); do
        ! tr '\0' '\n' < "/proc/$pid/environ" | grep -cE "^(SLURM_JOB_ID=$1|SLURM_PROCID=$2)$" | grep -q 2 || echo "$pid"
    done
}
# Submits the rough run again and waits until multi-stage has done new steps on four ranks.
submit() {
    local before
    before=$({ wc -l < "$rough/multi-stage.checkpoints/metrics.jsonl"; } 2> /dev/null || echo 9)
    "$BIN/cpift-pipeline" slurm RUN="$rough" > /dev/null
    wait_for "multi-stage at work" steps multi-stage multi-stage $((before + 3))
    job=$(job_of "$rough" multi-stage) ranks=()
    for i in 0 1 2 3; do ranks+=("$(rank "$job" "$i")"); done
    [ "$(printf '%s\n' "${ranks[@]}" | grep . | sort -u | wc -l)" = 4 ] || fail "ranks: ${ranks[*]}"
}
saved() { find "$rough/multi-stage.checkpoints" -name 'step-*' -printf '%f\n' | sort | tail -n 1; }
# The newest state has a part of each of four ranks.
whole() { [ "$(find "$rough/multi-stage.checkpoints/$(saved)" -name 'rank-?-of-4.safetensors' | wc -l)" = 4 ] || fail "parts of $(saved)"; }

tests/slurm/cluster.sh start "$dir" 2
ok "two nodes are up"
lines=$("$BIN/cpift-pipeline" slurm DRY_RUN=1 RUN="$quiet")
has "$lines" 'quiet\.probe .*--nodes=1 --ntasks-per-node=2 --cpus-per-task=1 '
has "$lines" 'quiet\.multi-stage .*--nodes=2 --ntasks-per-node=2 '
! grep -E 'quiet\.(groups|score|report) .*--n(odes|tasks)' <<< "$lines" || fail "more than one task: $lines"
"$BIN/cpift-pipeline" slurm RUN="$quiet"
wait_for "the end of the quiet run" idle "$quiet"
! "$BIN/cpift-pipeline" status RUN="$quiet" | grep -vE ' done *$|^[0-9]+ done$' || fail "the quiet run is not complete"
has "$(cat "$quiet/logs/probe-code.log")" '2 ranks over Gloo'
has "$(cat "$quiet/logs/multi-stage.log")" '4 ranks over Gloo'
ok "probes on two ranks and training on four ranks of two nodes are complete"

# A killed rank: the other ranks end, and the job fails.
submit
kill -KILL "${ranks[3]}"
wait_for "the end of the killed step" idle "$rough"
status=$("$BIN/cpift-pipeline" status RUN="$rough")
has "$status" '^multi-stage +failed +exit code 137: error: stage .*: rank 3 \('
has "$(cat "$rough/logs/multi-stage.log")" 'task 3: Killed'
has "$(cat "$rough/slurm/multi-stage-$job.out")" 'failed: multi-stage'
[ ! -e "$rough/multi-stage" ] || fail "a failed job has an output"
[ -z "$(pgrep -f "cpift-train run .*$rough")" ] || fail "a rank still runs"
ok "a killed rank ended its job: $(grep '^multi-stage' <<< "$status" | tr -s ' ')"

# A cancelled job saves its state on all ranks, and is not requeued.
submit
scancel "$job"
wait_for "the end of the cancelled job" idle "$rough"
has "$("$BIN/cpift-pipeline" status RUN="$rough")" '^multi-stage +stopped'
has "$(cat "$rough/slurm/multi-stage-$job.out")" 'the state is saved \(the job is'
whole
ok "a cancelled job has saved $(saved) on all ranks"

# Time limit, as in test.sh: all ranks are paused until the warning has come.
echo TIME_multi_stage=1 >> "$CLUSTER"
submit
kill -STOP "${ranks[@]}"
# Bit 9 of the pending signals is SIGUSR1.
warned() { (($((16#$(awk '$1 == "ShdPnd:" { print $2 }' "/proc/$1/status"))) >> 9 & 1)); }
for pid in "${ranks[@]}"; do wait_for "the warning before the limit" warned "$pid"; done
kill -CONT "${ranks[@]}"
again() { grep -q 'the state is saved: the job is queued again' "$rough/slurm/multi-stage-$job.out"; }
wait_for "the saved state" again
whole
before=$(saved)
# One warning is enough.
scontrol update "JobId=$job" TimeLimit=30
wait_for "multi-stage a second time" test -e "$rough/multi-stage/cpift.json"
resumed multi-stage "$job"
has "$(cat "$rough/logs/multi-stage.log")" "resuming from .*/$before$"
ok "all ranks of multi-stage (job $job) were warned before its limit, saved $before and resumed"
wait_for "the end of the rough run" idle "$rough"
same_bytes
ok "passed with several ranks"
