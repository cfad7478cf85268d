"""Weights and moments in files, on the CPU: two steps of a random LLaMA with `--offload all`, and the
largest anonymous memory of the program meanwhile.

    python3 scripts/bench/offload.py --bin target/release --work DIR [--size 3b]      needs numpy

DIR is on a disk with room for the checkpoint, masters, moments and the output, all in bf16: 10 bytes
per parameter, deleted at the end; 18 with `--master-dtype f32`, whose moments are f32 too. `RssAnon` of
/proc/PID/status is read ten times a second. It is what the program holds besides files; its state's
pages are those of files, which the system can write back whenever it needs the memory. Writes
results/offload-cpu.md.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import checkpoints
from runs import HERE, cpu_model

LIMIT_GIB = 8
TOKENS, STEPS = 128, 2
FIELDS = ["RssAnon", "RssFile", "RssShmem"]


def rows(folder):
    """tasks.toml with rows of at least TOKENS tokens: the tokenizer has one for each character."""
    text = "".join(chr(33 + i * 7 % 94) for i in range(TOKENS))
    row = json.dumps({"messages": [{"role": "user", "content": "copy"}, {"role": "assistant", "content": text}]})
    (folder / "rows.jsonl").write_text((row + "\n") * 4)
    (folder / "tasks.toml").write_text('[[task]]\nname = "rows"\ntrain = "rows.jsonl"\neval = "rows.jsonl"\n'
                                       f'template = "chatml"\nmax_length = {TOKENS}\n')
    return folder / "tasks.toml"


def memory(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.split(":")[0] in FIELDS}
    return [found.get(name, 0) for name in FIELDS]


def watched(command):
    """Runs a program; the largest of each of FIELDS, its CPU seconds, its wall seconds."""
    start, most = time.monotonic(), [0] * len(FIELDS)
    child = subprocess.Popen(command)
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        try:
            most = [max(pair) for pair in zip(most, memory(child.pid))]
        except (OSError, IndexError):
            pass
        time.sleep(0.1)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"offload: {command[0]} ended with {child.returncode}")
    return most, usage.ru_utime + usage.ru_stime, time.monotonic() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, required=True, metavar="DIR", help="the folder of cpift-train")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="is made, and deleted at the end")
    parser.add_argument("--size", choices=checkpoints.SIZES, default="3b")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--master-dtype", choices=["bf16", "f32"], default="bf16", help="of weights and moments")
    parser.add_argument("--out", type=Path, default=HERE / "results/offload-cpu.md", metavar="FILE")
    args = parser.parse_args()
    parameters = checkpoints.parameters(args.size)
    args.work.mkdir(parents=True)
    try:
        checkpoints.make(args.size, args.work, ["base"])
        (args.work / "state").mkdir()
        command = [args.bin / "cpift-train", "run", "--model", args.work / "base", "--tasks", rows(args.work), "--out",
                   args.work / "out", "--steps", STEPS, "--batch-size", 1, "--max-length", TOKENS, "--offload", "all",
                   "--offload-dir", args.work / "state", "--master-dtype", args.master_dtype, "--optim-state-dtype",
                   args.master_dtype, "--save-dtype", "bf16", "--gradient-checkpointing", "--optimizer-in-backward",
                   "--max-grad-norm", 0, "--device", "cpu", "--threads", args.threads]
        command = [str(part) for part in command]
        most, cpu, wall = watched(command)
        lines = (args.work / "out/metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
    finally:
        shutil.rmtree(args.work)
    gib = [bytes / 2**30 for bytes in most]
    shown = " ".join(command).replace(str(args.work), "DIR").replace(str(args.bin), "BIN")
    state = 3 * (2 if args.master_dtype == "bf16" else 4) * parameters / 2**30
    text = "\n".join([
        "# Training with weights and moments in files, on the CPU", "",
        "Written by `scripts/bench/offload.py`: the largest values of /proc/PID/status over the whole run, loading",
        "and saving included.", "",
        f"- machine: {cpu_model()} ({os.cpu_count()} cores), Linux {platform.release()}; {datetime.date.today()}",
        f"- model: random LLaMA, {parameters / 1e9:.2f} B parameters; weights and moments in {args.master_dtype}, {state:.1f} GiB in files",
        f"- programs: {args.bin}; command: `{shown}`",
        f"- losses: {', '.join(f'{loss:.4f}' for loss in losses)}", "",
        "| figure | value | target |", "| --- | ---: | ---: |",
        f"| anonymous memory (RssAnon), GiB | {gib[0]:.2f} | ≤ {LIMIT_GIB} |",
        f"| mapped files in memory (RssFile), GiB | {gib[1]:.2f} | - |",
        f"| shared memory (RssShmem), GiB | {gib[2]:.2f} | - |",
        f"| CPU seconds, user and system | {cpu:.0f} | - |",
        f"| wall seconds, other load on the machine | {wall:.0f} | - |", "",
    ])
    args.out.write_text(text)
    print(text)
    sys.exit(gib[0] > LIMIT_GIB)


if __name__ == "__main__":
    main()
