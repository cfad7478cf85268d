#!/usr/bin/env bash
# check-demo.sh RUN: what the demo shows on any machine, with margins of more than 20 points, on the task that is trained on first: stages
# (multi-stage) forget it, a mixture of all tasks (full-sft) does not, and the mixed last stage of cpi-ft brings more than half of it back.
# Prints that task's scores and fails unless this holds.
set -euo pipefail
exec python3 - "$1" << 'PYTHON'
import json, sys
from pathlib import Path

MARGIN = 20
METHODS = ["base", "full-sft", "multi-stage", "cpi-ft"]
run = Path(sys.argv[1])
first = json.loads((run / "groups.json").read_text())["groups"][0]

def score(method):
    """Mean of the first group's tasks, in percent."""
    tasks = json.loads((run / "scores" / method / "scores.json").read_text())["tasks"]
    return 100 * sum(t["metric"]["value"] for t in tasks if t["task"] in first) / len(first)

scores = {method: score(method) for method in METHODS}
print(f"Trained on first: {', '.join(first)}. There, in %: " + ", ".join(f"{m} {s:.0f}" for m, s in scores.items()) + ".")
failed = 0

def ahead(high, low):
    global failed
    if scores[high] - scores[low] <= MARGIN:
        print(f"check-demo: {high} ({scores[high]:.0f} %) is not more than {MARGIN} points ahead of {low} ({scores[low]:.0f} %)", file=sys.stderr)
        failed = 1

for high in ("full-sft", "cpi-ft"):
    for low in ("base", "multi-stage"):
        ahead(high, low)
if scores["cpi-ft"] <= scores["full-sft"] / 2:
    print(f"check-demo: cpi-ft ({scores['cpi-ft']:.0f} %) has less than half of full-sft ({scores['full-sft']:.0f} %)", file=sys.stderr)
    failed = 1
sys.exit(failed)
PYTHON
