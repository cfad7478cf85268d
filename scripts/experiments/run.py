#!/usr/bin/env python3
"""The paper's experiments and those beyond it, as pipelines over the six programs. `make reproduce`
and its fellows call this.

    run.py EXPERIMENT… --suite scripts/experiments/interference.toml --run runs/suite [--seeds 5]
    [--jobs 2]

Every experiment writes RUN/experiments/NAME.json, prints its table, and RUN/report.html shows all
of them. What was made before, by this experiment or another, is used again.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import experiments
from store import Failed, Source, Step, Store
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
    parser.add_argument("--base", type=Path, metavar="DIR", help="another base than the suite's")
    parser.add_argument("--tasks", type=Path, metavar="FILE", help="another task list than the suite's")
    parser.add_argument("--with", action="append", dest="parts", default=[], metavar="NAME",
                        help="take [NAME] of the suite over the rest, as [small] on a CPU; may be repeated")
    parser.add_argument("--dev", action="store_true", help="score on the rows to tune on, not on the evaluation rows")
    parser.add_argument("--tidy", action="store_true",
                        help="remove weights once everything made of them is there: less disk; another experiment makes them again")
    parser.add_argument("--dry-run", action="store_true", help="print the steps that are not up to date, and run none")
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


class BadInput(Exception):
    """What was given cannot be used; the message names it."""


NEEDED = "seeds p tau order own_p taus train eval fisher lora plus budget".split()


def read_suite(args):
    """The suite, and its tasks."""
    try:
        suite = tomllib.loads(args.suite.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{args.suite}: cannot be read as TOML: {error}") from error
    for part in args.parts:
        if not isinstance(suite.get(part), dict):
            raise BadInput(f"{args.suite}: has no [{part}] for --with {part}")
        suite |= suite[part]
    given = {"base": args.base, "dev" if args.dev else "tasks": args.tasks}
    if missing := [key for key in NEEDED if key not in suite] + [key for key, path in given.items() if not path and key not in suite]:
        raise BadInput(f"{args.suite}: lacks {', '.join(missing)}")
    base, tasks = (path or ROOT / suite[key] for key, path in given.items())
    for program in ("probe", "mask", "group", "merge", "train", "eval"):
        if not (args.bin / f"cpift-{program}").is_file():
            raise BadInput(f"{args.bin / f'cpift-{program}'}: no such program; hint: make build, or name the folder with --bin")
    if not args.tasks and "generator" in suite:
        folder = args.run / "tasks"
        subprocess.run([sys.executable, ROOT / suite["generator"], "--out", folder], check=True)
        tasks = folder / suite["dev" if args.dev else "tasks"]
    suite["base"], tasks = Source(base), TaskList(tasks)
    for pair in args.pair or []:
        names = pair.split(",")
        if len(set(names)) != 2 or not set(names) <= set(tasks.names):
            raise BadInput(f"--pair {pair}: expected two of {', '.join(tasks.names)}, as A,B")
    return suite, tasks


def show_in_report(lab, table, run):
    """Names, in `run`, for what the report shows of one seed: masks, groups, models and scores,
    where the pipeline has them."""
    masks = lab.masks()
    parts = {"groups.json": lab.groups(masks)}
    parts |= {f"masks/{task}.safetensors": mask for task, mask in masks.items()}
    parts |= {f"probes/{task}": lab.probe(task) for task in masks}
    for name, models, scores, _ in table.rows:
        slug = re.sub(r"[^a-z0-9.+]+", "-", name.lower())
        parts |= {f"scores/{slug}": scores[0]} | ({slug: models[0][1]} if isinstance(models[0][1], Step) else {})
    for name, step in parts.items():
        for end in ("", ".cpift.json"):
            path, target = run / (name + end), step.path.with_name(step.path.name + end)
            if target.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
                path.symlink_to(os.path.relpath(target, path.parent))


def main():
    args = parse()
    suite, tasks = read_suite(args)
    store = Store(args.run / "store", args.bin, args.jobs, args.threads, args.tidy)
    seeds = range(args.seeds or suite["seeds"])
    folder = args.run / "experiments"
    folder.mkdir(parents=True, exist_ok=True)
    for name in args.experiment:
        setting = experiments.Setting(store, suite, tasks, list(seeds), args)
        experiment = experiments.ALL[name](setting)
        if args.dry_run:
            print("\n".join(step.path.name for step in store.due(store.ordered(experiment.steps()))))
            continue
        store.make(experiment.steps())
        file = folder / f"{name}.json"
        text = json.dumps(experiment.json(name, lambda step: relative(step, args.run)), indent=1, ensure_ascii=False)
        part = folder / f".{name}.part"
        part.write_text(text + "\n", encoding="utf-8")
        part.rename(file)
        show(args, file)
        if name == "reproduce":
            show_in_report(setting.labs()[0], experiment, args.run)
    if not args.dry_run:
        report(args)


if __name__ == "__main__":
    try:
        main()
    except Failed as error:
        sys.exit(f"experiments: {error}")
    except (BadInput, FileNotFoundError) as error:
        what = f"{error.filename}: no such file or folder" if isinstance(error, FileNotFoundError) else error
        print(f"experiments: {what}", file=sys.stderr)
        sys.exit(3)
