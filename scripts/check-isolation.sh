#!/usr/bin/env bash
# check-isolation.sh RUN: fails unless the run's grouping is not trivial and its last stage froze something.
set -euo pipefail
run=$1
grep -q '"trivial": false' "$run/groups.json" || {
    echo "check-isolation: $run/groups.json: the grouping is trivial: nothing was isolated (hint: another TAU)" >&2; exit 1; }
grep -qE '"frozen_elements": [1-9]' "$run/cpi-ft/cpift.json" || {
    echo "check-isolation: $run/cpi-ft/cpift.json: no stage froze anything" >&2; exit 1; }
