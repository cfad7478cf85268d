#!/usr/bin/env python3
"""The paper's experiments and those beyond it, as pipelines over the six programs. `make reproduce` and its fellows call this.

    run.py EXPERIMENT… --suite scripts/experiments/interference.toml --run runs/suite [--seeds 5] [--jobs 2]

Every experiment writes RUN/experiments/NAME.json, prints its table, and RUN/report.html shows all of them. What was made before, by
this experiment or another, is used again.
"""

import argparse
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import experiments
from store import Failed, Store
from tasks import TaskList

ROOT = Path(__file__).resolve().parents[2]


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="+", choices=sorted(experiments.ALL), metavar="EXPERIMENT",
                        help=", ".join(experiments.ALL))
    parser.add_argument("--suite", type=Path, default=ROOT / "scripts/experiments/interference.toml", metavar="FILE",
                        help="base, tasks, budgets and arguments")
    parser.add_argument("--run", type=Path, default=ROOT / "runs/suite", metavar="DIR", help="where everything goes")
    parser.add_argument("--bin", type=Path, default=ROOT / "target/release", metavar="DIR", help="where the programs are")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N-1 [default: the suite's]")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="programs at a time")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of each program")
    parser.add_argument("--dev", action="store_true", help="score on the rows to tune on, not on the evaluation rows")
    parser.add_argument("--pair", action="append", metavar="A,B", help="forgetting: this ordered pair only; may be repeated")
    return parser.parse_args()


def relative(step, run):
    return os.path.relpath(step.path, run)


def show(args, file):
    command = [args.bin / "cpift-eval", "experiment", file]
    subprocess.run(command, check=True)


def report(args):
    command = [args.bin / "cpift-eval", "report", args.run, "--out", args.run / "report.html", "--force", "--quiet"]
    subprocess.run(command, check=True)
    print(f"report: {args.run / 'report.html'}", file=sys.stderr)


def main():
    args = parse()
    suite = tomllib.loads(args.suite.read_text())
    suite["base"] = str(ROOT / suite["base"])
    tasks = TaskList(ROOT / suite["dev" if args.dev else "tasks"])
    store = Store(args.run / "store", args.bin, args.jobs, args.threads)
    seeds = range(args.seeds or suite["seeds"])
    folder = args.run / "experiments"
    folder.mkdir(parents=True, exist_ok=True)
    for name in args.experiment:
        experiment = experiments.ALL[name](experiments.Setting(store, suite, tasks, list(seeds), args))
        store.make(experiment.steps())
        file = folder / f"{name}.json"
        file.write_text(json.dumps(experiment.json(name, lambda step: relative(step, args.run)), indent=1, ensure_ascii=False) + "\n",
                        encoding="utf-8")
        show(args, file)
    report(args)


if __name__ == "__main__":
    try:
        main()
    except Failed as error:
        sys.exit(f"experiments: {error}")
