#!/usr/bin/env python3
"""add_task.py MODEL=DIR TASKS=FILE NEW=NAME[,NAME…] RUN=DIR [NAME=VALUE…]: adds tasks to a tuned
model with safeguards for what it can do already, and shows what each old task lost.

TASKS lists the new tasks and, as far as there are rows of them, the old ones. Steps, each of which
is skipped while its output is up to date: rows to replay, a mask, one stage of training, models
between the old and the new one, their scores on the first DEV_ROWS evaluation rows, the choice of
one of them (RUN/model), and the scores before and after on the other rows (RUN/table.md,
RUN/add-task.json, RUN/report.html).

    TOKENS=200000       tokens of the stage
    REPLAY=rows|self|none  what is replayed: training rows of the old tasks in TASKS; what MODEL
                        answers to their prompts, or whole conversations where TASKS has no old
                        task; nothing [default: rows if TASKS lists old tasks, else self]
    REPLAY_SHARE=0.05   share of the stage's tokens
    REPLAY_ROWS=200     rows of each old task (or conversations) that MODEL writes
    PROTECT=dynamic|change|layers|none  what keeps its bits: the elements that matter most to the
                        replayed rows, found again during the stage (EPI); the PERCENT=20 of the
                        weights that tuning moved most from BASE=DIR to MODEL; the LAYERS=N bottom
                        blocks; nothing [default: dynamic, or none without replay]
    ALPHAS="0.5 0.6 0.7 0.8 0.9"  models MODEL + alpha (stage - MODEL) to choose from, beside 1
    DEV_ROWS=50         evaluation rows of each task that alpha is chosen on
    KL_BUDGET=0.05      largest divergence from MODEL on the new rows, in nats per token, where TASKS
                        has no old task
    MAX_LOSS=POINTS     fail if an old task loses more
    DTYPE=f32           of the models between
    TRAIN_FLAGS, MASK_FLAGS, SAMPLE_FLAGS, EVAL_FLAGS, SEED, THREADS, BIN  as for the pipeline

alpha is the one with the largest mean over the old tasks among those that keep the new tasks' mean
within a point of alpha = 1; without old tasks the largest within KL_BUDGET. A task counts with its
metric in percent, a task without one with 100 exp(-nll), the mean probability of a token.
"""
import json
import math
import os
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path

DEFAULTS = {
    "TOKENS": "200000", "REPLAY_SHARE": "0.05", "REPLAY_ROWS": "200", "PERCENT": "20",
    "ALPHAS": "0.5 0.6 0.7 0.8 0.9", "DEV_ROWS": "50", "KL_BUDGET": "0.05", "DTYPE": "f32", "SEED": "0",
    "THREADS": "1", "BIN": "target/release",
}
KNOWN = {*DEFAULTS, "MODEL", "TASKS", "NEW", "RUN", "BASE", "REPLAY", "PROTECT", "LAYERS", "MAX_LOSS", "TRAIN_FLAGS",
         "MASK_FLAGS", "SAMPLE_FLAGS", "EVAL_FLAGS"}
FORMAT_VERSION = 1


def stop(message, code=2):
    print(f"add-task: {message}", file=sys.stderr)
    sys.exit(code)


def read_settings(arguments):
    """Settings of the command line, else of the environment, else the defaults."""
    settings = DEFAULTS | {name: os.environ[name] for name in KNOWN if os.environ.get(name)}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name not in KNOWN or not equals:
            stop(f"{argument}: no such setting; known are {', '.join(sorted(KNOWN))}")
        settings[name] = value
    missing = [name for name in ("MODEL", "TASKS", "NEW", "RUN") if not settings.get(name)]
    if missing:
        stop(f"name {' '.join(missing)}: make add-task MODEL=DIR TASKS=FILE NEW=NAME RUN=DIR")
    return settings


def number(text):
    """The finite number that `text` is, or none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


class Adding:
    """One run: its settings, tasks and the steps still to come."""

    def __init__(self, settings):
        self.settings = settings
        self.run = Path(settings["RUN"])
        self.model = settings["MODEL"]
        self.new = settings["NEW"].split(",")
        self.old = self.old_tasks()
        self.replay = settings.get("REPLAY") or ("rows" if self.old else "self")
        self.protect = settings.get("PROTECT") or ("none" if self.replay == "none" else "dynamic")
        self.check()
        self.alphas = [alpha for alpha in settings["ALPHAS"].split() if float(alpha) != 1]
        self.started = str(time.time())

    def old_tasks(self):
        path = Path(self.settings["TASKS"])
        try:
            names = [task["name"] for task in tomllib.loads(path.read_text())["task"]]
        except (OSError, KeyError, TypeError, tomllib.TOMLDecodeError) as error:
            stop(f"{path} cannot be read as a task list: {error}", 3)
        unknown = [name for name in self.new if name not in names]
        if unknown:
            stop(f"{path} has no task {', '.join(unknown)}; it has {', '.join(names)}", 3)
        return [name for name in names if name not in self.new]

    def check(self):
        settings = self.settings
        for name, values in (("REPLAY", ("rows", "self", "none")), ("PROTECT", ("none", "change", "dynamic", "layers"))):
            value = getattr(self, name.lower())
            if value not in values:
                stop(f"{name}={value}: expected one of {', '.join(values)}")
        if self.replay == "rows" and not self.old:
            stop(f"REPLAY=rows: {settings['TASKS']} lists no old task; REPLAY=self lets the model write rows")
        if self.protect == "change" and not settings.get("BASE"):
            stop("PROTECT=change needs BASE=DIR, the checkpoint that MODEL was tuned from")
        if self.protect == "layers" and not settings.get("LAYERS"):
            stop("PROTECT=layers needs LAYERS=N, the number of bottom blocks")
        if self.protect == "dynamic" and self.replay == "none":
            stop("PROTECT=dynamic measures importance on replayed rows: choose another REPLAY")
        for name in ("REPLAY_SHARE", "KL_BUDGET", "MAX_LOSS"):
            if name in settings and number(settings[name]) is None:
                stop(f"{name}={settings[name]}: expected a number")
        for name, least in (("TOKENS", 1), ("DEV_ROWS", 1), ("REPLAY_ROWS", 1), ("SEED", 0)):
            if not settings[name].isdecimal() or int(settings[name]) < least:
                stop(f"{name}={settings[name]}: expected a whole number, at least {least}")
        if not all(0 < (number(alpha) or 0) <= 1 for alpha in settings["ALPHAS"].split()):
            stop(f"ALPHAS={settings['ALPHAS']}: expected numbers above 0 and at most 1")

    def flags(self, *names):
        return [word for name in names for word in shlex.split(self.settings.get(name, ""))]

    def device_flags(self):
        """Those of EVAL_FLAGS that say how a model runs, not what is scored."""
        kept, known, words = [], ("--device", "--compute-dtype", "--batch-size"), iter(self.flags("EVAL_FLAGS"))
        for word in words:
            if word in known:
                kept += [word, next(words, "")]
            elif word.partition("=")[0] in known or word == "--strict-config":
                kept.append(word)
        return kept

    def steps(self):
        """Name and command of every step before the choice, in order."""
        s, run, tasks = self.settings, self.run, ["--tasks", self.settings["TASKS"]]
        # First, because it fails where there are too few rows.
        steps = [("scores-before", self.scoring(self.model, "scores/before", "--skip", s["DEV_ROWS"]))]
        replayed, stage = [], []
        if self.replay == "self":
            for name in self.old or ["conversations"]:
                own = [*tasks, "--only", name] if self.old else []
                replayed.append(run / f"replay/{name}.jsonl")
                steps.append((f"replay-{name}", ["cpift-eval", "sample", "--model", self.model, *own, "--out", replayed[-1],
                                                 "--rows", s["REPLAY_ROWS"], "--seed", s["SEED"], *self.flags("SAMPLE_FLAGS")]))
        if self.replay != "none":
            stage += ["--replay-share", s["REPLAY_SHARE"], *(word for path in replayed for word in ("--replay-from", path))]
        if self.protect == "change":
            mask = run / "mask.safetensors"
            steps.append(("mask", ["cpift-mask", "extract", "--base", s["BASE"], "--tuned", self.model,
                                   "--percent", s["PERCENT"], "--out", mask, *self.flags("MASK_FLAGS")]))
            stage += ["--protect", mask, "--base", s["BASE"]]
        elif self.protect == "dynamic":
            stage += ["--isolation", "dynamic"]
        elif self.protect == "layers":
            stage += ["--freeze-layers", s["LAYERS"]]
        steps.append(("stage", ["cpift-train", "run", "--model", self.model, *tasks, "--add", s["NEW"],
                                "--out", run / "stage", "--tokens", s["TOKENS"], "--seed", s["SEED"], "--resume", *stage,
                                *self.flags("TRAIN_FLAGS")]))
        for alpha in self.alphas:
            steps.append((f"alpha-{alpha}", ["cpift-merge", "task-arithmetic", "--base", self.model, "--model", run / "stage",
                                             "--lambda", alpha, "--dtype", s["DTYPE"], "--out", self.between(alpha)]))
        for alpha in [*self.alphas, "1"]:
            steps.append((f"dev-{alpha}", self.scoring(self.between(alpha), f"dev/{alpha}", "--limit", s["DEV_ROWS"])))
            steps.append((f"divergence-{alpha}", [
                "cpift-eval", "divergence", "--model", self.between(alpha), "--reference", self.model, *tasks, "--only",
                s["NEW"], "--limit", s["DEV_ROWS"], "--out", run / f"divergence/{alpha}.json", *self.device_flags()]))
        return steps

    def between(self, alpha):
        return self.run / ("stage" if float(alpha) == 1 else f"alpha/{alpha}")

    def scoring(self, model, out, *rows):
        return ["cpift-eval", "run", "--model", model, "--tasks", self.settings["TASKS"], *rows, "--out", self.run / out,
                *self.flags("EVAL_FLAGS")]

    def make(self, steps, due):
        for name, command in steps:
            program, *arguments = map(str, command)
            whole = [f"{self.settings['BIN']}/{program}", "--threads", self.settings["THREADS"], "--skip-up-to-date"]
            stage = [f"{self.settings['BIN']}/cpift-pipeline", "stage", self.run / "logs" / name]
            environment = os.environ | {"DUE": " ".join(due), "STARTED": self.started}
            code = subprocess.run([*stage, *whole, *arguments], env=environment, check=False).returncode
            if code:
                sys.exit(code)

    def curve(self):
        """Scores and divergence of every alpha on the rows to choose on."""
        return [{"alpha": float(alpha), "tasks": scores(self.run / "dev" / alpha), "kl": divergence(self.run, alpha)}
                for alpha in [*self.alphas, "1"]]

    def record(self, curve, alpha, rule):
        """Content of add-task.json: the choice, what every task had before and after, the safeguards and
        their tokens."""
        facts = json.loads((self.run / "stage/cpift.json").read_text())["facts"]
        stage = facts["stages"][0]
        before, final = scores(self.run / "scores/before"), scores(self.run / "scores/after")
        tasks = [{"task": name, "new": name in self.new, "before": before[name], "after": final[name]}
                 for name in [*self.old, *self.new]]
        return {
            "format_version": FORMAT_VERSION, "new": self.new, "old": self.old, "alpha": alpha, "rule": rule,
            "dev_rows": int(self.settings["DEV_ROWS"]), "curve": curve, "tasks": tasks,
            "safeguards": {
                "replay": self.replay, "replayed_rows": stage["replayed_examples"], "replayed_share": stage["replayed_share"],
                "protect": self.protect, "frozen_elements": stage["frozen_elements"],
            },
            "tokens": {"stage": stage["tokens"], "replay": round(stage["tokens"] * stage["replayed_share"]),
                       "importance": stage["importance_tokens"]},
        }

    def choose(self, curve):
        """The alpha to take, and the rule by which it is chosen."""
        if not self.old:
            budget = float(self.settings["KL_BUDGET"])
            within = [point for point in curve if point["kl"] <= budget]
            rule = f"the largest whose divergence from the old model on the new rows is at most {budget} nats per token"
            if not within:
                stop(f"no alpha of ALPHAS keeps the divergence within KL_BUDGET={budget}; the smallest has "
                     f"{min(point['kl'] for point in curve):.4f}", 1)
            return max(within, key=lambda point: point["alpha"])["alpha"], rule
        new, old = mean(self.new), mean(self.old)
        enough = [point for point in curve if new(point) >= new(curve[-1]) - 1]
        rule = "the largest mean over the old tasks, with the new tasks within a point of alpha = 1"
        return max(enough, key=lambda point: (old(point), point["alpha"]))["alpha"], rule


def shown_value(score):
    """A task's score in percent, with its standard error."""
    metric, nll = score["metric"], score["nll"]
    if metric:
        return {"name": metric["name"], "value": 100 * metric["value"], "stderr": scaled(100, metric["stderr"]), "n": metric["n"]}
    likelihood = 100 * 2.718281828459045 ** -nll["value"]
    return {"name": "exp(-nll)", "value": likelihood, "stderr": scaled(likelihood, nll["stderr"]), "n": nll["n"]}


def scaled(factor, stderr):
    return None if stderr is None else factor * stderr


def scores(folder):
    return {score["task"]: shown_value(score) for score in json.loads((folder / "scores.json").read_text())["tasks"]}


def divergence(run, alpha):
    tasks = json.loads((run / f"divergence/{alpha}.json").read_text())["tasks"]
    return sum(task["kl"]["value"] for task in tasks) / len(tasks)


def mean(names):
    return lambda point: sum(point["tasks"][name]["value"] for name in names) / len(names)


def link(run, target):
    """RUN/model names the chosen model."""
    new = run / f".model.{os.getpid()}"
    new.symlink_to(target.relative_to(run))
    new.replace(run / "model")


def main():
    adding = Adding(read_settings(sys.argv[1:]))
    s, run = adding.settings, adding.run
    steps = adding.steps()
    due = [name for name, _ in steps] + ["scores-stage", "scores-after", "table", "report"]
    adding.make(steps, due)
    curve = adding.curve()
    alpha, rule = adding.choose(curve)
    chosen = next(run / "stage" if float(a) == 1 else run / f"alpha/{a}" for a in [*adding.alphas, "1"] if float(a) == alpha)
    link(run, chosen)
    models = {"before": adding.model, "stage": run / "stage", "after": chosen}
    adding.make([(f"scores-{name}", adding.scoring(model, f"scores/{name}", "--skip", s["DEV_ROWS"]))
                 for name, model in models.items() if name != "before"], due)
    record = adding.record(curve, alpha, rule)
    text = json.dumps(record, indent=1) + "\n"
    if not (run / "add-task.json").exists() or (run / "add-task.json").read_text() != text:
        (run / ".add-task.json").write_text(text)
        (run / ".add-task.json").replace(run / "add-task.json")
    compared = [f"{name}={run}/scores/{name}" for name in models]
    adding.make([("table", ["cpift-eval", "compare", "--format", "markdown", *compared, "--baseline", "before", "--out",
                            run / "table.md"]),
                 ("report", ["cpift-eval", "report", run, "--out", run / "report.html"])], due)
    print(f"\n{(run / 'table.md').read_text()}\nalpha {alpha}: {rule}\nmodel: {run}/model, report: {run}/report.html")
    refuse_losses(s.get("MAX_LOSS"), record["tasks"])


def refuse_losses(limit, tasks):
    if limit is None:
        return
    lost = [(task["task"], task["before"]["value"] - task["after"]["value"]) for task in tasks if not task["new"]]
    beyond = [f"{name} lost {points:.1f} points" for name, points in lost if points > float(limit)]
    if beyond:
        stop(f"{', '.join(beyond)}, more than MAX_LOSS={limit}", 1)


if __name__ == "__main__":
    main()
