"""The graph of scripts/pipeline.mk and what of it is up to date, for status.py and slurm/submit.py."""
import getpass
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# In a run: the settings it was started with.
SETTINGS = "pipeline.env"


@dataclass
class Artifact:
    """One target of the pipeline."""

    name: str
    state: str  # done, deleted, missing or stale
    reason: str
    reads: list  # names of the artifacts it is made from
    surveys: list  # names of the artifacts in a directory that it is about

    @property
    def due(self):
        return self.state in ("missing", "stale")


def output_of(command, text=None):
    """Output of a command; exits with its code if it fails."""
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")}
    found = subprocess.run(command, input=text, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        sys.exit(found.returncode)
    return found.stdout


def artifacts():
    """All artifacts of the pipeline whose settings are in the environment, in the order in which they can be made."""
    graph = output_of(["make", "-sn", "--no-print-directory", "-f", "scripts/pipeline.mk", "GRAPH=1", "all"])
    program = Path(os.environ.get("BIN", "target/release")) / "cpift-mask"
    lines = output_of([program, "up-to-date"], graph).splitlines()
    fields = [line.split("\t") for line in lines]
    return [Artifact(name, state, reason, reads.split(), surveys.split()) for name, state, reason, reads, surveys in fields]


def settings(run):
    """The settings that a run was started with, as text."""
    path = run / SETTINGS
    return path.read_text() if path.exists() else ""


def use_settings(run):
    """Puts the settings of a run into the environment, where they do not stand in it."""
    for line in settings(run).splitlines():
        key, _, value = line.strip().partition("=")
        if key:
            os.environ.setdefault(key, value)


def squeue():
    """State and reason of every job or array element of this user in the queue, by (id, name)."""
    command = ["squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%i\t%j\t%T\t%r"]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {tuple(line.split("\t")[:2]): line.split("\t")[2:] for line in found.stdout.splitlines()}


def jobs(run):
    """Jobs in the queue that submit.py has started for a run: artifact -> (id, state, reason). OSError or CalledProcessError if the
    queue cannot be read."""
    path = run / "slurm/jobs"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    queue = squeue() if lines else {}
    return {name: (job, *queue[job, stage]) for name, job, stage in lines if (job, stage) in queue}
