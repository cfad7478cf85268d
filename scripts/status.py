#!/usr/bin/env python3
"""status.py RUN: every artifact of a run of scripts/pipeline.mk and how it is: done, running, queued, stopped (its state is saved), failed,
stale, missing. What make would do is asked of make; whether an input or an argument has changed is told by the records in cpift.json."""
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = {"--threads": 1, "--force": 0, "--resume": 0, "--if-stale": 0}  # arguments (and how many values they have) that change no result


def graph(*more):
    """What make would make, as (name, file, inputs, command)."""
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    command = ["make", "-sn", *more, "--no-print-directory", "-f", "scripts/pipeline.mk", "GRAPH=1", "all"]
    found = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if found.returncode:
        sys.exit(found.returncode)
    return [line.split("\t") for line in found.stdout.splitlines() if line.count("\t") == 3]


def record(path):
    """The cpift.json of an output: inside its folder, or beside the file."""
    path = Path(path)
    inside, beside = (path if path.is_dir() else path.parent) / "cpift.json", path.with_name(path.name + ".cpift.json")
    if path.name in ("cpift.json", "scores.json") or path.is_dir():
        beside = inside
    try:
        return json.loads(beside.read_text())
    except (OSError, ValueError):
        return None


def digest(path, since):
    """The digest of what is at `path` now, or None where it cannot have changed `since` or cannot be told."""
    made = record(path)
    if made and made.get("output"):
        return made["output"]["blake3"]
    path = Path(path)
    files = [f for f in path.iterdir() if f.is_file()] if path.is_dir() else [path]
    if max(f.stat().st_mtime for f in files) < since:
        return None
    program = Path(os.environ.get("BIN", "target/release")) / "cpift-merge"
    told = subprocess.run([program, "digest", path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return told.stdout.split()[0] if told.returncode == 0 and told.stdout else "unknown"


def arguments(typed):
    """Arguments with those left out that change no result, and paths in one form."""
    out, skip = [], 0
    for word in typed:
        if skip:
            skip -= 1
        elif word in LEFT_OUT:
            skip = LEFT_OUT[word]
        else:
            key, sign, value = word.rpartition("=")
            out.append(key + sign + (os.path.realpath(value) if os.path.exists(value) else value))
    return out


def changed(made, command):
    """What differs between a record and now: an argument, or an input."""
    was, now = arguments(made["arguments"]), arguments(shlex.split(command)[1:])
    if was != now:
        at = next((i for i, (a, b) in enumerate(zip(was, now)) if a != b), min(len(was), len(now)))
        # A value is told together with its argument's name.
        named = at - (not any(word.startswith("--") for word in was[at:at + 1] + now[at:at + 1]))
        old, new = (" ".join(words[max(named, 0):at + 1]) or "none" for words in (was, now))
        return f"argument: {old}, now {new}"
    for role, given in made["inputs"].items():
        if os.path.exists(given["path"]) and digest(given["path"], made["started_unix"]) not in (None, given["digest"]):
            return f"input {role} has changed: {given['path']}"
    return None


def squeue(run):
    """Artifact -> state of its job, for the jobs that submit.sh wrote down."""
    try:
        jobs = [line.split() for line in (run / "slurm/jobs").read_text().splitlines()]
        told = subprocess.run(["squeue", "-h", "-r", "-o", "%i\t%j\t%T\t%r"], stdout=subprocess.PIPE, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    now = {tuple(line.split("\t")[:2]): line.split("\t")[2:] for line in told.stdout.splitlines()}
    return {name: (job, *now[job, stage]) for name, job, stage in jobs if (job, stage) in now}


def at_work(run, name, queue):
    """How a stage that has been started is, by its state file: (state, more), or None."""
    path = run / "logs" / f"{name}.state"
    words = path.read_text().split() if path.exists() else []
    log = run / "logs" / f"{name}.log"
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    said = [line.strip() for line in lines if line.strip() and not line.strip().startswith("hint:")]
    last = next((line for line in said if line.startswith("error:")), said[-1] if said else "")
    job, state, why = queue.get(name, ("", "", ""))
    if words[:1] == ["running"]:
        here = words[1] == socket.gethostname()
        alive = os.path.exists(f"/proc/{words[2]}") if here else state == "RUNNING" or words[3] == "-"
        if alive:
            return "running", f"{words[1]}, {'job ' + job if job else 'process ' + words[2]}: {last}"
    if state and state != "RUNNING":
        return "queued", f"job {job} ({why})"
    if words[:1] == ["running"]:
        return "failed", f"ended without a word on {words[1]}; the last was: {last}"
    if words[:1] == ["exit"] and words[1] == "75":
        return "stopped", last
    if words[:1] == ["exit"] and words[1] != "0":
        return "failed", f"exit code {words[1]}: {last}"
    return None


def main():
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    run = Path(os.environ.setdefault("RUN", sys.argv[1] if len(sys.argv) > 1 else ""))
    os.chdir(ROOT)
    if not os.environ["RUN"] or not run.is_dir():
        sys.exit(f"status: {run} is no run's folder (hint: make status RUN=DIR)")
    for line in (run / "settings/variables").read_text().splitlines() if (run / "settings/variables").exists() else []:
        key, _, value = line.strip().partition("=")
        if key:
            os.environ.setdefault(key, value)
    due = {name for name, *_ in graph()}
    queue, states, makers, counts = squeue(run), {}, {}, {}
    artifacts = graph("-B")
    width = max(len(name) for name, *_ in artifacts) + 2
    for name, file, inputs, command in artifacts:
        makers[file] = name
        first = [makers[i] for i in inputs.split() if i in makers]
        made, there = record(file), os.path.exists(file)
        open_ones = [n for n in first if states[n] not in ("done", "deleted")]
        known = at_work(run, name, queue) if name in due or not there else None
        reason = changed(made, command) if there and made else None
        if known:
            state, more = known
        elif not there and name not in due:
            state, more = "deleted", "what is made of it is there"
        elif not there:
            state, more = "missing", f"waits for {', '.join(open_ones)}" if open_ones else ""
        elif reason or (open_ones and name in due):
            state, more = "stale", reason or f"first again: {', '.join(open_ones)}"
        elif name in due and not made:
            state, more = "stale", "older than what it is made of"
        else:
            state, more = "done", "what it is made of is newer but the same; make would make it again" if name in due else ""
        states[name] = state
        counts[state] = counts.get(state, 0) + 1
        print(f"{name:<{width}}{state:<10}{more}".rstrip())
    print(", ".join(f"{count} {state}" for state, count in counts.items()))


if __name__ == "__main__":
    main()
