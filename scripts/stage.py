#!/usr/bin/env python3
"""stage.py RUN/logs/NAME PROGRAM [ARGUMENT…]: runs one command for scripts/pipeline.mk.

Its output goes to NAME.log. NAME.state says whether it is running (host, process, Slurm job) or how
it ended (exit code, time). SIGTERM and SIGINT are passed on, so that training saves its state.

LAUNCH is a command (srun) that starts a program on every rank of a job. Programs that share their
work over ranks run behind it and get SIGUSR1 instead of SIGTERM, at which srun would kill them.

Prints a line when the command ends: how many of DUE (the artifacts that this call of make makes)
are done since STARTED, and the seconds this one took. Until then it prints the step and the loss of
running training: on a terminal one line for all, rewritten every second; in a log a line now and
then, at growing intervals (the first after PROGRESS=10 seconds, none if that is 0).
"""
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

STEP = re.compile(r"^(?:stage \d+/\d+|\S+).* step \d+/\d+ loss \S+", re.MULTILINE)
CLEAR = "\r\033[K" if sys.stdout.isatty() else ""
logs, name = Path(sys.argv[1]).parent, Path(sys.argv[1]).name
log, log_before = logs / f"{name}.log", logs / f"{name}.before.log"
due = os.environ.get("DUE", name).split()
# Has a byte for every artifact that this call of make has made.
made = logs / f".made-{os.environ.get('STARTED', 0)}"
pause = float(os.environ.get("PROGRESS", 10))
SHARED = re.compile(r"cpift-probe|cpift-(train|eval) run")


def text_of(path):
    return path.read_text(errors="replace") if path.exists() else ""


def say(line):
    # In one write: programs of `make -j` share the output.
    os.write(1, f"{line}\n".encode())


def set_state(*words):
    # Renamed into place, so that no reader sees half a line.
    new = logs / f"{name}.state.{os.getpid()}"
    new.write_text(" ".join(map(str, words)) + "\n")
    new.rename(logs / f"{name}.state")


def last_step(name):
    """Stage, step and loss of the last step in a log, or nothing."""
    steps = STEP.findall(text_of(logs / f"{name}.log"))
    return re.sub(r" \([^)]*\) step", " step", steps[-1]) if steps else ""


def show_all():
    running = [n for n in due if text_of(logs / f"{n}.state").startswith("running")]
    steps = "; ".join(f"{n} {last_step(n).removeprefix(n + ' ')}".strip() for n in running)
    line = f"[{len(text_of(made))}/{len(due)}] {steps}"
    print(CLEAR + line[: shutil.get_terminal_size().columns - 1], end="", flush=True)


def wait(child):
    """Exit code of the command; reports its steps until it has ended."""
    begun, next_report, shown = time.monotonic(), pause, ""
    while True:
        try:
            code = child.wait(timeout=1 if pause else None)
            return code if code >= 0 else 128 - code
        except subprocess.TimeoutExpired:
            seconds = time.monotonic() - begun
        if CLEAR:
            show_all()
        elif seconds >= next_report:
            step, next_report = last_step(name), 1.5 * seconds
            if step not in ("", shown):
                say(f"        {name:<24}{step}")
            shown = step


def run(command):
    """Exit code of the command and the time it took."""
    launch, warning = shlex.split(os.environ.get("LAUNCH", "")), signal.SIGTERM
    if launch and SHARED.match(" ".join([Path(command[0]).name, *command[1:2]])):
        command, warning = launch + command, signal.SIGUSR1
    signals = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: signals.append(child and child.send_signal(warning)))
    child, begun = None, time.time()
    with log.open("wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    if signals:
        child.send_signal(warning)
    set_state("running", socket.gethostname(), child.pid, os.environ.get("SLURM_JOB_ID", "-"))
    code, ended = wait(child), time.time()
    set_state("exit", code, ended)
    if "STAGE_CODE" in os.environ:
        Path(os.environ["STAGE_CODE"]).write_text(str(code))
    return code, ended - begun


logs.mkdir(parents=True, exist_ok=True)
if log.exists():
    log.rename(log_before)
code, seconds = run(sys.argv[2:])
took = f"{seconds:.{seconds < 100:d}f}"
if code:
    say(f"{CLEAR}{name}: exit code {code} after {took} s")
    print(*text_of(log).splitlines()[-20:], sep="\n", file=sys.stderr)
    sys.exit(code)
# A command that found its output up to date leaves the log of the one that made it.
if log_before.exists() and text_of(log).rstrip().endswith(": up to date"):
    log_before.rename(log)
with made.open("ab", buffering=0) as file:
    # Appending is atomic, so no other artifact gets the same number.
    file.write(b".")
    number = f"{file.tell():>{len(str(len(due)))}}"
say(f"{CLEAR}[{number}/{len(due)}] {name:<24}{took:>6} s")
for old in logs.glob(".made-*"):
    if time.time() - old.stat().st_mtime > 86400:
        old.unlink(missing_ok=True)
