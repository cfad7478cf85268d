"""`make bench-files`: the three file stages against the floor (`cat`, `cp`) and their peers, on
checkpoints made on the spot.

Each row runs A B A B …, with the page cache warm, and gives medians. CPU time is that of the
process and its children; anonymous memory is the largest RssAnon seen, because the resident set
counts mapped files.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path

try:
    import checkpoints
except ImportError as error:
    sys.exit(f"bench-files: {error}\n  hint: PYTHON=path/to/python3 names a Python that has numpy")

HERE = Path(__file__).resolve().parent
SAMPLE_SECONDS = 0.003
MASKS = [["--percent", "1"], ["--percent", "1", "--scope", "layer"], ["--percent", "1", "--scope", "tensor"],
         ["--percent", "2"], ["--percent", "0.5"]]


class Run:
    """One process that has ended: wall and CPU seconds, largest anonymous memory in bytes."""

    def __init__(self, command, env=None):
        with open(os.devnull, "wb") as null:
            start = time.perf_counter()
            child = subprocess.Popen(command, stdout=null, stderr=subprocess.PIPE, env=env, start_new_session=True)
            self.anonymous = 0
            while True:
                pid, status, usage = os.wait4(child.pid, os.WNOHANG)
                if pid:
                    break
                self.anonymous = max(self.anonymous, anonymous_bytes(child.pid))
                time.sleep(SAMPLE_SECONDS)
        self.wall = time.perf_counter() - start
        self.cpu = usage.ru_utime + usage.ru_stime
        said = child.stderr.read().decode(errors="replace")
        child.returncode = 0
        if status != 0:
            sys.exit(f"bench-files: {shlex.join(map(str, command))}\n{said}\nended with status {status}")


def anonymous_bytes(pid):
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


class Side:
    """One side of a comparison: a command, what to do before it (untimed), and its runs."""

    def __init__(self, label, command, before=lambda: None):
        self.label, self.command, self.before, self.runs = label, command, before, []

    def run(self):
        self.before()
        self.runs.append(Run(self.command))

    def median(self, field):
        return statistics.median(getattr(run, field) for run in self.runs)

    def peak(self):
        return max(run.anonymous for run in self.runs)


class Row:
    """A comparison with its target: `most` is the largest ratio ours/other, `least` the smallest
    ratio other/ours."""

    def __init__(self, name, ours, other, most=None, least=None, memory=None, faster=False):
        self.name, self.ours, self.other = name, ours, other
        self.most, self.least, self.memory, self.faster = most, least, memory, faster or least is not None

    def run(self, rounds):
        print(f"{self.name} against {self.other.label} …", file=sys.stderr, flush=True)
        for _ in range(rounds):
            self.ours.run()
            self.other.run()
        return self

    def cells(self):
        ours, other = self.ours.median("wall"), self.other.median("wall")
        met, target = [], []
        if self.faster:
            ratio = f"{other / ours:.1f} × faster"
            if self.least:
                target.append(f"≥ {self.least} × faster")
                met.append(other / ours >= self.least)
        else:
            ratio = f"{ours / other:.2f} ×"
            if self.most:
                target.append(f"≤ {self.most} ×")
                met.append(ours / other <= self.most)
        peak = self.ours.peak() / 2**20
        if self.memory:
            target.append(f"≤ {self.memory} MiB")
            met.append(peak <= self.memory)
        verdict = ("yes" if all(met) else "NO") if met else "-"
        return [self.name, self.other.label, f"{ours:.2f}", f"{other:.2f}", ratio, ", ".join(target) or "-", verdict,
                f"{self.ours.median('cpu'):.2f}", f"{self.other.median('cpu'):.2f}", f"{peak:.0f}",
                f"{self.other.peak() / 2**20:.0f}"]


HEADINGS = ["stage", "against", "wall s", "its wall s", "ratio", "target", "met", "CPU s", "its CPU s", "anon MiB",
            "its anon MiB"]


def shell(text):
    return ["bash", "-c", text]


def cat(paths):
    return "cat " + " ".join(shlex.quote(str(path)) for path in paths) + " >/dev/null"


def weights(folder):
    return sorted(folder.glob("*.safetensors"))


def remove(*paths):
    """Removes outputs, and lets the disk finish what it was writing, so that no run pays for
    another."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()
    os.sync()


class Bench:
    def __init__(self, args):
        self.args = args
        self.work = Path(args.work) / args.size
        self.base, self.tuned = self.work / "base", self.work / "tuned"
        self.mask, self.merged = self.work / "mask.safetensors", self.work / "merged"
        self.rows, self.notes = [], []

    def program(self, name):
        path = Path(self.args.bin) / name
        if not path.exists():
            sys.exit(f"bench-files: {path} is missing\n  hint: make build-files")
        return str(path)

    # Inputs.

    def make_inputs(self):
        need = 2 * 2 * checkpoints.parameters(self.args.size)
        made = all((folder / "complete").exists() for folder in (self.base, self.tuned))
        # The merged model and a copy of it take as much again as the inputs.
        need = need if made else 2 * need
        self.work.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.work).free
        if free < need:
            print(f"bench-files: skipped: {self.work} has {free / 1e9:.0f} GB free, SIZE={self.args.size} needs "
                  f"{need / 1e9:.0f} GB\n  hint: WORK=FOLDER names one on a larger disk")
            sys.exit(0)
        checkpoints.make(self.args.size, self.work)

    def inputs(self):
        return weights(self.base) + weights(self.tuned)

    def warm(self):
        size = sum(path.stat().st_size for path in self.inputs())
        available = next(int(line.split()[1]) << 10 for line in Path("/proc/meminfo").read_text().splitlines()
                         if line.startswith("MemAvailable"))
        fits = size * 3 / 2 < available
        self.notes.append("page cache: " + ("warm" if fits else "too small for the inputs, so every run reads the disk"))
        subprocess.run(shell(cat(self.inputs())), check=True)

    def record_digests(self, recorded):
        """Writes or removes cpift.json with the digests of the inputs, as the stages leave it in
        their outputs."""
        for role, folder in [("base", self.base), ("tuned", self.tuned)]:
            path = folder / "cpift.json"
            path.unlink(missing_ok=True)
            if recorded:
                stamps = [{"name": p.name, "size": p.stat().st_size, "mtime_ns": p.stat().st_mtime_ns}
                          for p in sorted(folder.iterdir()) if p.name != "complete"]
                path.write_text(json.dumps({
                    "format_version": 1, "stage": "bench", "version": "0", "arguments": [], "inputs": {}, "host": "",
                    "output": {"blake3": self.digests[role], "files": stamps}, "started_unix": 0, "seconds": 0.0}))

    def learn_digests(self):
        """Extracts once, which makes the mask, warms the programs up and tells the digests of the
        inputs."""
        self.record_digests(False)
        remove(self.mask)
        Run(self.extract())
        with open(self.mask, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        own = json.loads(header["__metadata__"]["cpift"])
        self.digests = {role: own[role] for role in ("base", "tuned")}
        self.record_digests(True)
        start = time.perf_counter()
        Run(self.extract())
        print(f"a mask takes {time.perf_counter() - start:.2f} s", file=sys.stderr)

    # Commands.

    def extract(self, out=None, more=()):
        return [self.program("cpift-mask"), "extract", "--base", self.base, "--tuned", self.tuned, "--out",
                out or self.mask, "--force", "--quiet", *more]

    def mask_side(self, label, recorded):
        def before():
            self.record_digests(recorded)
            remove(self.mask, Path(f"{self.mask}.cpift.json"))
        return Side(label, self.extract(), before)

    def merge_side(self):
        def before():
            self.record_digests(True)
            remove(self.merged)
        return Side("cpift-merge slerp", [self.program("cpift-merge"), "slerp", "--model", self.base, "--model",
                                          self.tuned, "--t", "0.5", "--out", self.merged, "--quiet"], before)

    def add(self, row, rounds):
        self.rows.append(row.run(rounds).cells())

    # Rows.

    def bench_mask(self):
        floor = cat(self.inputs())
        rounds = self.args.rounds
        self.add(Row("mask, digests recorded", self.mask_side("", True), Side("cat of both inputs", shell(floor)), most=2,
                     memory=512), rounds)
        self.add(Row("mask, inputs hashed for the first time", self.mask_side("", False),
                     Side("cat of both inputs", shell(floor)), memory=512), rounds)
        python = self.args.peer_python
        peer = subprocess.run([python, "-c", "import numpy, torch, safetensors"], capture_output=True)
        if peer.returncode != 0:
            return self.not_run("mask, digests recorded", "NumPy/PyTorch histogram", "PEER_PYTHON= with numpy, torch "
                                "and safetensors is not given")
        other = self.work / "mask-numpy.safetensors"
        for label, script, least in [("NumPy/PyTorch histogram, as written first", "mask_histogram.py", 30),
                                     ("NumPy/PyTorch histogram, made fast", "mask_numpy.py", None)]:
            side = Side(label, [python, HERE / script, self.base, self.tuned, "1", other])
            self.add(Row("mask, digests recorded", self.mask_side("", True), side, least=least, faster=True),
                     self.args.peer_rounds)
            same = subprocess.run([python, HERE / "mask_numpy.py", "--same", self.mask, other]).returncode == 0
            self.notes.append(f"{script}: its mask is {'the same but for ties' if same else 'DIFFERENT'}")
            remove(other)

    def bench_merge(self):
        copy = self.work / "copy"
        floor = cat(self.inputs()) + f"; cp -r --reflink=never {shlex.quote(str(self.merged))} {shlex.quote(str(copy))}"
        self.merge_side().run()
        def gone():
            remove(copy)
        # The copy is of the output, so the merge runs first in every round.
        self.add(Row("merge slerp", self.merge_side(), Side("cat of the inputs + cp of the output", shell(floor), gone),
                     most=2, memory=512), self.args.rounds)
        durable = floor + f"; sync -f {shlex.quote(str(copy))}"
        self.add(Row("merge slerp", self.merge_side(), Side("the same + sync, as a merge does", shell(durable), gone)),
                 self.args.peer_rounds)
        remove(copy)
        if not self.args.mergekit:
            return self.not_run("merge slerp", "mergekit", "MERGEKIT=path/to/mergekit-yaml is not given")
        best, flags = self.mergekit_side()
        self.notes.append(f"mergekit's flags: {flags}")
        self.add(Row("merge slerp", self.merge_side(), best, least=8, memory=512), self.args.peer_rounds)
        remove(self.work / "mergekit")

    def mergekit_side(self):
        """mergekit with the flags that were the fastest of those that could be, one run each."""
        recipe, out = self.work / "slerp.yaml", self.work / "mergekit"
        recipe.write_text(f"merge_method: slerp\nbase_model: {self.base}\nmodels:\n  - model: {self.base}\n"
                          f"  - model: {self.tuned}\nparameters:\n  t: 0.5\ndtype: bfloat16\n")
        def side(flags):
            command = [self.args.mergekit, recipe, out, "--copy-tokenizer", "--quiet", *flags.split()]
            return Side("mergekit 0.1.5", command, lambda: remove(out))
        tried = {}
        for flags in ["", "--lazy-unpickle", f"--lazy-unpickle -j {os.cpu_count()}",
                      "--lazy-unpickle --async-write --write-threads 2", "--lazy-unpickle --low-cpu-memory"]:
            one = side(flags)
            one.run()
            tried[flags] = one.median("wall")
            print(f"mergekit {flags}: {tried[flags]:.1f} s", file=sys.stderr, flush=True)
        flags = min(tried, key=tried.get)
        seconds = ", ".join(f"`{f or '(none)'}` {s:.1f} s" for f, s in tried.items())
        return side(flags), f"`{flags or '(none)'}` (one run each: {seconds})"

    def bench_methods(self):
        """The other methods: one tuned model, or a second one made of the first two by linear extrapolation."""
        third, out, copy = self.work / "third", self.work / "method", self.work / "copy"
        self.record_digests(True)
        if not third.exists():
            Run([self.program("cpift-merge"), "linear", "--model", self.base, "--model", self.tuned, "--weight", "1.5",
                 "--weight=-0.5", "--out", third, "--quiet"])
        one, two = ["--model", self.tuned], ["--model", self.tuned, "--model", third]
        base = ["--base", self.base]
        trim = ["--density", "0.2"]
        methods = [
            ("passthrough", [self.tuned], one, 1.3),
            ("linear", [self.tuned, third], two, 1.3),
            ("task-arithmetic", [self.base, self.tuned, third], base + two, 1.3),
            ("model-stock", [self.base, self.tuned, third], base + two, 1.3),
            ("multislerp", [self.tuned, third], two, 1.3),
            ("nuslerp", [self.tuned, third], two, 1.3),
            ("nearswap", [self.base, self.tuned], base + one + ["--t", "0.0001"], None),
            ("ram", [self.base, self.tuned, third], base + two, None),
            ("sce", [self.base, self.tuned, third], base + two + ["--select-topk", "0.5"], None),
            ("arcee-fusion", [self.base, self.tuned], base + one, None),
            ("ties", [self.base, self.tuned, third], base + two + trim, 2),
            ("dare", [self.base, self.tuned, third], base + two + trim, 2),
            ("della", [self.base, self.tuned, third], base + two + ["--density", "0.2", "--epsilon", "0.1"], 2),
            ("breadcrumbs", [self.base, self.tuned, third], base + two + trim, 2),
            ("spherical-mean", [self.tuned, third], two, 3),
        ]
        for name, folders, words, most in methods:
            command = [self.program("cpift-merge"), name, *words, "--out", out, "--quiet"]
            inputs = [path for folder in folders for path in weights(folder)]
            floor = cat(inputs) + f"; cp -r --reflink=never {shlex.quote(str(out))} {shlex.quote(str(copy))}"
            ours = Side(name, command, lambda: remove(out))
            other = Side("cat of the inputs + cp of the output", shell(floor), lambda: remove(copy))
            self.add(Row(f"merge {name}, {len(folders)} inputs", ours, other, most=most, memory=512),
                     self.args.peer_rounds)
        remove(out, copy, third)

    def bench_spectral(self):
        """Methods by singular vectors, at one layer of this size."""
        work, out, other = self.work / "layer", self.work / "method", self.work / "spectral-numpy.safetensors"
        python = self.args.peer_python
        if subprocess.run([python, "-c", "import numpy, torch, safetensors"], capture_output=True).returncode != 0:
            return self.not_run("merge by singular vectors", "NumPy", "PEER_PYTHON= with numpy, torch and safetensors is "
                                "not given")
        work.mkdir(exist_ok=True)
        checkpoints.make(f"{self.args.size}-layer", work)
        base, tuned, third = work / "base", work / "tuned", work / "third"
        remove(third)
        Run([self.program("cpift-merge"), "linear", "--model", base, "--model", tuned, "--weight", "1.5",
             "--weight=-0.5", "--out", third, "--quiet"])
        for name in ["tsv-m", "iso-c", "wudi"]:
            command = [self.program("cpift-merge"), name, "--base", base, "--model", tuned, "--model", third, "--out", out,
                       "--quiet"]
            peer = [python, HERE / "spectral_numpy.py", name.replace("-", "_"), base, tuned, third, other]
            self.add(Row(f"merge {name}, one layer, 3 inputs", Side("", command, lambda: remove(out)),
                         Side("NumPy, LAPACK in f64", peer), least=5), self.args.peer_rounds)
        remove(out, other, work)

    def bench_group(self):
        self.record_digests(True)
        masks = []
        for i, more in enumerate(MASKS):
            path = self.work / f"mask-{i}.safetensors"
            remove(path)
            Run(self.extract(path, more))
            masks.append(path)
        out = self.work / "groups.json"
        command = [self.program("cpift-group"), "--out", out, "--quiet", "--force"]
        for i, path in enumerate(masks):
            command += ["--mask", f"t{i}={path}"]
        self.add(Row("group, 5 masks", Side("", command), Side("cat of the masks", shell(cat(masks))), most=1.5),
                 2 * self.args.rounds)
        remove(*masks)

    def not_run(self, name, other, why):
        self.rows.append([name, other, "-", "-", "not run", "-", why, "-", "-", "-", "-"])

    # Results.

    def facts(self):
        model = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                      if line.startswith("model name")), platform.processor())
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        return [f"checkpoints: {checkpoints.parameters(self.args.size):,} parameters in bf16, "
                f"{len(weights(self.base))} shards",
                f"machine: {os.cpu_count()} cores of {model}, {memory:.0f} GiB, Linux {platform.release()}",
                f"disk: writes {self.disk_speed():.2f} GB/s with fsync"]

    def disk_speed(self):
        path = self.work / "disk"
        block = os.urandom(1 << 24)
        start = time.perf_counter()
        with open(path, "wb") as file:
            for _ in range(64):
                file.write(block)
            os.fsync(file.fileno())
        speed = 64 * len(block) / 1e9 / (time.perf_counter() - start)
        remove(path)
        return speed

    def report(self):
        table = [HEADINGS, ["---"] * len(HEADINGS), *self.rows]
        lines = ["| " + " | ".join(row) + " |" for row in table]
        text = [f"# File stages at {self.args.size} shapes", "", "Written by `make bench-files"
                + ("" if self.args.size == "1.1b" else f" SIZE={self.args.size}") + "`: medians of "
                f"{self.args.rounds} rounds ({self.args.peer_rounds} against mergekit and NumPy), A B A B, the same files.",
                "", *[f"- {fact}" for fact in self.facts() + self.notes], "", *lines, ""]
        text = "\n".join(text)
        print(text)
        if self.args.results:
            path = Path(self.args.results)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def run(self):
        self.make_inputs()
        self.warm()
        self.learn_digests()
        for name in self.args.only.split(","):
            getattr(self, f"bench_{name}")()
        self.report()
        self.record_digests(False)
        remove(self.mask, Path(f"{self.mask}.cpift.json"), self.merged)


def main():
    root = HERE.parent.parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1.1b", choices=["tiny", "1.1b", "3b", "7b"])
    parser.add_argument("--work", default=root / ".cache/bench")
    parser.add_argument("--bin", default=root / "target/release")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-rounds", type=int, default=3)
    parser.add_argument("--only", default="mask,merge,methods,spectral,group",
                        help="comma-separated: mask, merge, methods, spectral, group")
    parser.add_argument("--mergekit", default="", help="mergekit-yaml of 0.1.5; its row is left out otherwise")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python with numpy, torch and safetensors")
    parser.add_argument("--results", default="", help="file to write the table to")
    Bench(parser.parse_args()).run()


if __name__ == "__main__":
    main()
