#!/usr/bin/env python3
"""check_demo.py RUN TASKS: fails unless the demo shows, on any machine, what the README reads from
its table: cores were isolated; each probe lifts its own task by 30 points or more; and on the tasks
of the first group, with margins of over 20 points, stages (multi-stage) forget, a mixture of all
tasks (full-sft) does not, and the mixed last stage of cpi-ft recovers more than half."""
import json
import os
import subprocess
import sys
from pathlib import Path

MARGIN, PROBE_GAIN = 20, 30
METHODS = ["base", "full-sft", "multi-stage", "cpi-ft"]
failures = []


def require(condition, message):
    if not condition:
        print(f"check-demo: {message}", file=sys.stderr)
        failures.append(message)


def scores(path):
    """Task -> metric in percent."""
    return {t["task"]: 100 * t["metric"]["value"] for t in json.loads(path.read_text())["tasks"]}


def check_isolation(run):
    groups = json.loads((run / "groups.json").read_text())
    require(not groups["trivial"], f"{run}/groups.json: the grouping is trivial: nothing was isolated (hint: another TAU)")
    stages = json.loads((run / "cpi-ft/cpift.json").read_text())["facts"]["stages"]
    require(any(stage["frozen_elements"] for stage in stages), f"{run}/cpi-ft/cpift.json: no stage froze anything")
    return groups["groups"][0]


def check_probes(run, tasks):
    before = scores(run / "scores/base/scores.json")
    print("Each probe on its own task (%):")
    for name in before:
        out = run / "probe-scores" / name
        command = [Path(os.environ.get("BIN", "target/release")) / "cpift-eval", "run", "--model", run / "probes" / name, "--tasks", tasks,
                   "--only", name, "--quiet", "--skip-up-to-date", "--threads", "2", "--device", "cpu", "--batch-size", "50", "--out", out]
        subprocess.run(command, check=True)
        after = scores(out / "scores.json")[name]
        print(f"  {name:<12} {before[name]:5.1f} -> {after:5.1f}")
        require(after - before[name] >= PROBE_GAIN, f"the probe {name} gained less than {PROBE_GAIN} points")


def check_order(run, first):
    by_task = {method: scores(run / "scores" / method / "scores.json") for method in METHODS}
    mean = {method: sum(found[task] for task in first) / len(first) for method, found in by_task.items()}
    print(f"Trained on first: {', '.join(first)}. There, in %: " + ", ".join(f"{m} {s:.0f}" for m, s in mean.items()) + ".")
    for high in ("full-sft", "cpi-ft"):
        for low in ("base", "multi-stage"):
            require(mean[high] - mean[low] > MARGIN,
                    f"{high} ({mean[high]:.0f} %) is not more than {MARGIN} points ahead of {low} ({mean[low]:.0f} %)")
    require(mean["cpi-ft"] > mean["full-sft"] / 2,
            f"cpi-ft ({mean['cpi-ft']:.0f} %) has less than half of full-sft ({mean['full-sft']:.0f} %)")


def main():
    run, tasks = Path(sys.argv[1]), sys.argv[2]
    first = check_isolation(run)
    check_probes(run, tasks)
    check_order(run, first)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
