"""What the training benchmarks share: one run of a program that prints a JSON object, and facts
about the machine."""

import json
import os
import platform
import signal
import socket
import subprocess
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PEER, DEVICE, FLOOR = HERE / "train_peer.py", HERE / "device.py", HERE / "floor.py"


class Failed(Exception):
    """A program did not succeed: why, in one line, and the JSON object it may have printed all the
    same."""

    def __init__(self, why, report=None):
        super().__init__(why)
        self.report = report


def run_json(command, seconds, threads=None):
    """Runs a program, ended with its children after `seconds`; the JSON object on the last line of
    its output."""
    env = dict(os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {}))
    command = [str(part) for part in command]
    try:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
                                 start_new_session=True)
    except OSError as error:
        raise Failed(str(error)) from None
    with child:
        try:
            out, err = child.communicate(timeout=seconds)
        except BaseException as error:
            os.killpg(child.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise Failed(f"not done after {seconds} s") from None
            raise
    report = parsed(last_line(out))
    if child.returncode != 0:
        raise Failed(f"exit status {child.returncode}: {last_line(err)}", report)
    if report is None:
        raise Failed(f"no JSON object on the last line of output: {last_line(out)[:200]!r}")
    return report


def parsed(line):
    try:
        return json.loads(line)
    except ValueError:
        return None


def last_line(text):
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def rank_environment(rank, world, port):
    """torchrun's variables for a rank on this machine; none for one process."""
    if world == 1:
        return {}
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port)}


def wait_for_steps(children, metrics, steps, seconds):
    """Lines of metrics.jsonl whenever there may be more, until there are `steps`. Kills all `children`
    at the end; Failed if one ends or `seconds` pass before."""
    clock = time.monotonic()
    try:
        lines = []
        while len(lines) < steps:
            time.sleep(0.05)
            text = metrics.read_text() if metrics.exists() else ""
            # The last line may not be whole yet.
            lines = text[: text.rfind("\n") + 1].splitlines()
            if len(lines) < steps and any(child.poll() is not None for child in children):
                raise Failed(f"a process ended before {steps} steps")
            if time.monotonic() - clock > seconds:
                raise Failed(f"no {steps} steps within {seconds} s")
            yield lines
    finally:
        for child in children:
            child.kill()
        for child in children:
            child.wait()
        metrics.unlink(missing_ok=True)


def cpu_model():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
