"""What the training benchmarks share: one run of a program that prints a JSON object, and facts about the machine."""

import json
import os
import platform
import signal
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEER, DEVICE = HERE / "train_peer.py", HERE / "device.py"


class Failed(Exception):
    """A program did not give its figures: why, in one line."""


def run_json(command, seconds, threads=None):
    """Runs a program, its children ended with it after `seconds`; the JSON object on the last line of its output."""
    env = dict(os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {}))
    command = [str(part) for part in command]
    try:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
                                 start_new_session=True)
    except OSError as error:
        raise Failed(str(error)) from None
    try:
        out, err = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise Failed(f"not done after {seconds} s") from None
    if child.returncode != 0:
        raise Failed(f"exit status {child.returncode}: {last_line(err) or last_line(out)}")
    try:
        return json.loads(last_line(out))
    except ValueError:
        raise Failed(f"no JSON object on the last line of output: {last_line(out)[:200]!r}") from None


def last_line(text):
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def cpu_model():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
