#!/usr/bin/env bash
# check-probes.sh RUN TASKS: scores every probe of a finished run on its own task beside the base; fails unless each one
# lifts its task's metric by at least 30 points. Each score is one line; the scores are kept in RUN/probe-scores.
set -euo pipefail
run=$1 tasks=$2
BIN=${BIN:-target/release}
metric() { grep -oE '"value": ?[0-9.e-]+' | head -n 1 | grep -oE '[0-9.e-]+$'; }
failed=0
echo "Each probe on its own task (%):"
while IFS=$'\t' read -r _ name _ _; do
    before=$(grep -A4 "\"task\": \"$name\"" "$run/scores/base/scores.json" | metric)
    after=$("$BIN/cpift-eval" run --model "$run/probes/$name" --tasks "$tasks" --only "$name" --quiet --json --force \
        --threads 2 --device cpu --batch-size 50 --out "$run/probe-scores/$name" | metric)
    awk -v n="$name" -v b="$before" -v a="$after" \
        'BEGIN { printf "  %-12s %5.1f -> %5.1f\n", n, 100 * b, 100 * a; exit (a - b < 0.3) }' || failed=1
done < <("$BIN/cpift-probe" --tasks "$tasks" --list)
[ "$failed" = 0 ] || { echo "check-probes: a probe gained less than 30 points" >&2; exit 1; }
