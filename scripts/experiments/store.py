"""A store of what the programs make: experiments share steps, and a step runs only if `cpift-STAGE
up-to-date` says so.

A [`Step`] is one call of one program that makes one file or directory, at STORE/NAME-KEY. The key
is a digest of the program, its arguments and the keys of its inputs, so that different calls do not
share a place; the record in the output (cpift.json) says whether it is up to date. Outputs are
there whole or not at all, as every output of the programs is.
"""

import concurrent.futures as futures
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path


class Failed(Exception):
    """A program ended with an error; the message has the end of its log."""


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Source:
    """A file or directory that no step makes."""

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(2, "no such file", str(self.path))
        self.key = digest(str(self.path.resolve()))

    def inputs(self):
        return []


class Written:
    """A small file that the experiment itself writes."""

    def __init__(self, store, name, text):
        self.path, self.key = store.folder / name, digest(text)
        if not self.path.exists() or self.path.read_text(encoding="utf-8") != text:
            self.path.write_text(text, encoding="utf-8")


class Named:
    """The argument NAME=PATH of an input."""

    def __init__(self, name, value):
        self.name, self.value = name, value


class Inside:
    """A file or directory in the output of a step."""

    def __init__(self, step, name):
        self.step, self.key, self.path = step, f"{step.key}/{name}", step.path / name


class Step:
    """One call of a program. `arguments` are texts, inputs, and [`Named`] inputs; `suffix` is that
    of a file, empty for a directory."""

    def __init__(self, store, name, program, *arguments, suffix=""):
        self.store, self.name, self.program = store, name, program
        self.arguments = [a for a in arguments if a is not None]
        self.key = digest(json.dumps([program, [self.code(a) for a in self.arguments]]))
        self.path = store.folder / f"{name}-{self.key}{suffix}"

    @staticmethod
    def code(argument):
        if isinstance(argument, Named):
            return f"{argument.name}={Step.code(argument.value)}"
        return f"@{argument.key}" if hasattr(argument, "key") else str(argument)

    @staticmethod
    def text(argument):
        if isinstance(argument, Named):
            return f"{argument.name}={Step.text(argument.value)}"
        return str(argument.path if hasattr(argument, "key") else argument)

    def inputs(self):
        values = [a.value if isinstance(a, Named) else a for a in self.arguments]
        values = [v.step if isinstance(v, Inside) else v for v in values]
        return [v for v in values if isinstance(v, Step)]

    def command(self):
        return [str(self.store.bin / self.program), *map(self.text, self.arguments), "--out", str(self.path)]

    def empty(self):
        """Removes the weights; their record stays."""
        for file in self.path.rglob("*.safetensors") if self.path.is_dir() and self.program else []:
            file.unlink()

    def record(self):
        """The record of the run, cpift.json."""
        beside = self.path / "cpift.json" if self.path.is_dir() else self.path.with_name(self.path.name + ".cpift.json")
        return json.loads(beside.read_text())

    def facts(self):
        return self.record()["facts"]


class Gathered(Step):
    """A directory in which the outputs of steps lie under names."""

    def __init__(self, store, name, parts):
        self.store, self.name, self.program, self.arguments, self.parts = store, name, None, [], parts
        self.key = digest(json.dumps({n: step.key for n, step in parts.items()}))
        self.path = store.folder / f"{name}-{self.key}"

    def inputs(self):
        return list(self.parts.values())

    def gather(self):
        if not self.path.exists():
            staged = self.path.with_name(self.path.name + ".part")
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir()
            for name, step in self.parts.items():
                (staged / name).symlink_to(step.path.resolve())
            staged.rename(self.path)


class Store:
    """Where outputs lie, and how programs run."""

    def __init__(self, folder, bin_folder, jobs=2, threads=1, tidy=False):
        self.folder, self.bin, self.jobs, self.threads, self.tidy = Path(folder), Path(bin_folder), jobs, threads, tidy
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)

    def due(self, steps):
        """Those of `steps` (each after its inputs) that must run, by the rule that all programs
        share."""
        lines = []
        for step in (s for s in steps if s.program):
            gathered = [part for made in step.inputs() if not made.program for part in made.inputs()]
            lines.append("\t".join([step.key, shlex.join(step.command()), *(str(part.path) for part in gathered)]))
        found = subprocess.run([self.bin / "cpift-mask", "up-to-date", "--due"], input="\n".join(lines), capture_output=True, text=True,
                               check=False)
        if found.returncode != 0:
            raise Failed(f"{self.bin / 'cpift-mask'}: {found.stderr.strip()}")
        keys = set(found.stdout.split())
        return [step for step in steps if step.key in keys]

    @staticmethod
    def ordered(steps):
        """`steps` and all they need, each after its inputs."""
        order = {}

        def visit(step):
            if step.key not in order:
                for other in step.inputs():
                    visit(other)
                order[step.key] = step

        for step in steps:
            visit(step)
        return list(order.values())

    def make(self, steps):
        """Runs what is due of `steps` and of what they need, `jobs` at a time."""
        order = self.ordered(steps)
        for step in order:
            if isinstance(step, Gathered):
                step.gather()
        due = self.due(order)
        if due:
            print(f"{len(due)} steps to run, {self.jobs} at a time", file=sys.stderr, flush=True)
        self.run_all(due)

    def run_all(self, due):
        open_keys = {step.key for step in due}

        def waits(step):
            made = step.inputs()
            made = made + [part for other in made if not other.program for part in other.inputs()]
            return any(other.key in open_keys for other in made)

        waiting, running, count = list(due), {}, 0
        with futures.ThreadPoolExecutor(self.jobs) as pool:
            while waiting or running:
                ready = [s for s in waiting if not waits(s)]
                for step in ready[:max(0, self.jobs - len(running))]:
                    waiting.remove(step)
                    running[pool.submit(self.run, step)] = step
                for future in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
                    step, seconds = running.pop(future), future.result()
                    open_keys.discard(step.key)
                    for used in step.inputs() if self.tidy else []:
                        if not any(used.key == other.key for left in due if left.key in open_keys for other in left.inputs()):
                            used.empty()
                    count += 1
                    print(f"[{count}/{len(due)}] {step.path.name}  {seconds:.0f} s", file=sys.stderr, flush=True)

    def run(self, step):
        start, log = time.monotonic(), self.folder / "logs" / f"{step.path.name}.log"
        command = [*step.command(), "--threads", str(self.threads), "--skip-up-to-date"]
        # A training that was stopped has saved its state.
        command += ["--resume"] if step.program in ("cpift-probe", "cpift-train") else []
        with log.open("w", encoding="utf-8") as out:
            out.write(shlex.join(command) + "\n")
            out.flush()
            code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ, check=False).returncode
        if code != 0:
            tail = "".join(log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-15:])
            raise Failed(f"{step.path.name}: exit status {code}; {log}:\n{tail}")
        return time.monotonic() - start
