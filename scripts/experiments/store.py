"""A store of what the programs make, by what it is made from: a step that was run before, for any experiment, is not run again.

A [`Step`] is one call of one program that makes one file or folder. Its key is a digest of the program, its version, its arguments and
the keys of its inputs; a file that no step makes counts by its content. The output lies at STORE/NAME-KEY and is there whole or not
at all, as every output of the programs is.
"""

import concurrent.futures as futures
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path


# In a folder whose weights were removed once nothing needed them.
EMPTIED = "emptied"


class Failed(Exception):
    """A program ended with an error; the message has the end of its log."""


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Source:
    """A file or folder that no step makes."""

    def __init__(self, path):
        self.path = Path(path)
        files = sorted(p for p in self.path.rglob("*") if p.is_file()) if self.path.is_dir() else [self.path]
        parts = [f"{f.relative_to(self.path.parent)} {hashlib.sha256(f.read_bytes()).hexdigest()}" for f in files]
        self.key = digest("\n".join(parts))

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
    """A file or folder in the output of a step."""

    def __init__(self, step, name):
        self.step, self.key, self.path = step, f"{step.key}/{name}", step.path / name


class Step:
    """One call of a program. `arguments` are texts, inputs, and [`Named`] inputs; `suffix` is that of a file, empty for a folder."""

    def __init__(self, store, name, program, *arguments, suffix="", out="--out"):
        self.store, self.name, self.program, self.out = store, name, program, out
        self.arguments = [a for a in arguments if a is not None]
        self.key = digest(json.dumps([program, store.version(program), [self.code(a) for a in self.arguments]]))
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
        return [self.program, *map(self.text, self.arguments), self.out, str(self.path)]

    def done(self):
        return self.path.exists() and not (self.path / EMPTIED).exists()

    def empty(self):
        """Removes the weights; what was written about them stays."""
        weights = list(self.path.rglob("*.safetensors")) if self.path.is_dir() and self.program else []
        if weights:
            (self.path / EMPTIED).touch()
        for file in weights:
            file.unlink()

    def facts(self):
        """What the program wrote of the run, from cpift.json."""
        beside = self.path / "cpift.json" if self.path.is_dir() else self.path.with_name(self.path.name + ".cpift.json")
        return json.loads(beside.read_text())["facts"]


class Gathered(Step):
    """A folder in which the outputs of steps lie under names."""

    def __init__(self, store, name, parts):
        self.store, self.name, self.program, self.arguments, self.parts = store, name, None, [], parts
        self.key = digest(json.dumps({n: step.key for n, step in parts.items()}))
        self.path = store.folder / f"{name}-{self.key}"

    def inputs(self):
        return list(self.parts.values())

    def gather(self):
        staged = self.path.with_name(self.path.name + ".part")
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        for name, step in self.parts.items():
            (staged / name).symlink_to(step.path.resolve())
        staged.rename(self.path)


class Store:
    """Where outputs lie, and how programs are run."""

    def __init__(self, folder, bin_folder, jobs=2, threads=1, tidy=False):
        self.folder, self.bin, self.jobs, self.threads, self.tidy = Path(folder), Path(bin_folder), jobs, threads, tidy
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        self.versions = {}

    def version(self, program):
        if program not in self.versions:
            found = subprocess.run([self.bin / program, "--version"], capture_output=True, text=True, check=False)
            if found.returncode != 0:
                raise Failed(f"{self.bin / program}: does not start: {found.stderr.strip()}")
            self.versions[program] = found.stdout.strip()
        return self.versions[program]

    def make(self, steps):
        """Runs what is missing of `steps` and of what they need, `jobs` at a time."""
        wanted, order = {}, []

        def visit(step):
            if step.key not in wanted and not step.done():
                wanted[step.key] = step
                for other in step.inputs():
                    visit(other)
                order.append(step)

        for step in steps:
            visit(step)
        if order:
            print(f"{len(order)} steps to run, {self.jobs} at a time", file=sys.stderr, flush=True)
        self.run_all(order, wanted)

    def run_all(self, order, wanted):
        waiting, running, count = list(order), {}, 0
        with futures.ThreadPoolExecutor(self.jobs) as pool:
            while waiting or running:
                ready = [s for s in waiting if not any(i.key in wanted for i in s.inputs())]
                for step in ready[:max(0, self.jobs - len(running))]:
                    waiting.remove(step)
                    running[pool.submit(self.run, step)] = step
                for future in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
                    step, seconds = running.pop(future), future.result()
                    del wanted[step.key]
                    for used in step.inputs() if self.tidy else []:
                        if not any(used.key == other.key for left in wanted.values() for other in left.inputs()):
                            used.empty()
                    count += 1
                    print(f"[{count}/{len(order)}] {step.path.name}  {seconds:.0f} s", file=sys.stderr, flush=True)

    def run(self, step):
        if (step.path / EMPTIED).exists():
            shutil.rmtree(step.path)
        if isinstance(step, Gathered):
            step.gather()
            return 0
        start, log = time.monotonic(), self.folder / "logs" / f"{step.path.name}.log"
        command = [str(self.bin / step.program), *step.command()[1:], "--threads", str(self.threads)]
        with log.open("w", encoding="utf-8") as out:
            out.write(" ".join(command) + "\n")
            out.flush()
            code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ, check=False).returncode
        if code != 0:
            tail = "".join(log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-15:])
            raise Failed(f"{step.path.name}: exit status {code}; {log}:\n{tail}")
        return time.monotonic() - start
