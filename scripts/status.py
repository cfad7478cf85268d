#!/usr/bin/env python3
"""status.py RUN: every artifact of a run of scripts/pipeline.mk and its state: done, running, queued, stopped (its state is saved),
failed, stale or missing (with the reason), deleted (and not needed)."""
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import graph


def at_work(run, name, queue):
    """State of a command that has been started, by its state file: (state, more), or None."""
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
        return "failed", f"ended without an exit code on {words[1]}; last line: {last}"
    if words[:1] == ["exit"] and words[1] == "75":
        return "stopped", last
    if words[:1] == ["exit"] and words[1] != "0":
        return "failed", f"exit code {words[1]}: {last}"
    return None


def main():
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    run = Path(os.environ.get("RUN") or (sys.argv[1] if len(sys.argv) > 1 else ""))
    os.environ["RUN"] = str(run)
    os.chdir(graph.ROOT)
    if run == Path() or not run.is_dir():
        sys.exit(f"status: {run}: no such directory (hint: make status RUN=DIR)")
    graph.use_settings(run)
    artifacts, queue, counts = graph.artifacts(), {}, Counter()
    try:
        queue = graph.jobs(run)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"status: jobs are not shown, squeue failed: {error}", file=sys.stderr)
    width = max(len(artifact.name) for artifact in artifacts) + 2
    for artifact in artifacts:
        known = at_work(run, artifact.name, queue) if artifact.due else None
        state, more = known or (artifact.state, artifact.reason)
        counts[state] += 1
        print(f"{artifact.name:<{width}}{state:<10}{more}".rstrip())
    print(", ".join(f"{count} {state}" for state, count in counts.items()))


if __name__ == "__main__":
    main()
