#!/usr/bin/env bash
# A job that is warned before its time limit, at any moment from its start on, is requeued and
# leaves no process running. A stub of scontrol that logs its arguments stands in for Slurm.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cat > "$dir/scontrol" << 'E2'
#!/bin/sh
case $1 in show) echo "JobId=1 JobName=x JobState=RUNNING Reason=None" ;; *) echo "$@" >> "${0%/*}/asked" ;; esac
E2
chmod +x "$dir/scontrol"
echo MAX_RESTARTS=5 > "$dir/cluster.env"
export RUN=$dir/run CLUSTER=$dir/cluster.env SLURM_SUBMIT_DIR=$PWD SLURM_JOB_ID=1 SLURM_JOB_NAME=probe PATH=$dir:$PATH
export PROBE_TOKENS=10000000
mkdir -p "$RUN/slurm"
for delay in 0 0.03 0.06 0.1 0.2 0.4 0.8 1.6 3; do
    rm -f "$dir/asked"
    code=0
    bash scripts/slurm/job.sh probe-logic > "$dir/said" 2>&1 &
    job=$!
    until [ -s "$dir/said" ]; do sleep 0.01; done
    sleep "$delay"
    kill -TERM "$job"
    wait "$job" || code=$?
    asked=$(cat "$dir/asked" 2> /dev/null || true)
    if [ "$code" != 75 ] || [ "$asked" != "requeue 1" ] || pgrep -f "cpift-probe .*$dir" > /dev/null; then
        echo "test-slurm: FAILED: warned after $delay s: exit code $code, scontrol was asked: ${asked:-nothing}" >&2
        cat "$dir/said" >&2
        exit 1
    fi
done
