"""Two ranks on one machine over Gloo beside one process with two micro-batches: CPU seconds of a step.

    python3 scripts/bench/ranks.py --bin target/release --model DIR [--batch 8x256 …] [--rounds 3]

Both train the same rows to the same bytes, one thread per process. The seconds are user and system time
of all processes from the end of the first step to the end of the last, by /proc/PID/stat; a round runs
both in turn. Writes results/ranks-cpu.md; the exit status is 1 if the target is missed at the first batch.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from runs import HERE, Failed, cpu_model, free_port, rank_environment, wait_for_steps

TARGET = 1.15
LIMIT_S = 1800


def rows(folder, count):
    turn = [{"role": "user", "content": "count"}, {"role": "assistant", "content": " ".join(map(str, range(3000)))}]
    (folder / "rows.jsonl").write_text((json.dumps({"messages": turn}) + "\n") * count)
    (folder / "tasks.toml").write_text('[[task]]\nname = "rows"\ntrain = "rows.jsonl"\neval = "rows.jsonl"\n')
    return folder / "tasks.toml"


def cpu_seconds(children):
    ticks = 0
    for child in children:
        fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(args, work, batch, world):
    """CPU seconds of a step, and the losses."""
    rows, tokens = map(int, batch.split("x"))
    micro, port = 2 // world, free_port()
    metrics = work / "out.checkpoints/metrics.jsonl"
    metrics.unlink(missing_ok=True)
    command = [args.bin / "cpift-train", "run", "--model", args.model, "--tasks", work / "tasks.toml", "--out", work / "out",
               "--steps", args.steps + 1000, "--batch-size", rows // micro, "--grad-accum", micro, "--max-length", tokens,
               "--lr", "1e-5", "--device", "cpu", "--threads", 1, "--force", *args.more]
    children = [subprocess.Popen([str(part) for part in command], stderr=subprocess.DEVNULL,
                                 env=os.environ | rank_environment(rank, world, port)) for rank in range(world)]
    first = None
    for lines in wait_for_steps(children, metrics, args.steps, LIMIT_S):
        if lines and first is None:
            first, done = cpu_seconds(children), len(lines)
        if len(lines) >= args.steps:
            seconds = (cpu_seconds(children) - first) / (len(lines) - done)
    return seconds, [json.loads(line)["loss"] for line in lines[:args.steps]]


def row(args, work, batch):
    """Cells of the table, the single rounds, and whether the target is met."""
    found, losses = {1: [], 2: []}, {}
    for number in range(args.rounds):
        for world in found:
            print(f"{batch}, round {number + 1} of {args.rounds}: {world} …", file=sys.stderr, flush=True)
            seconds, losses[world] = measure(args, work, batch, world)
            found[world].append(seconds)
    if losses[1] != losses[2]:
        sys.exit(f"ranks: {batch}: the losses differ, so these are not the same steps: {losses}")
    one, two = (statistics.median(found[world]) for world in (1, 2))
    met = two <= TARGET * one
    rounds = " · ".join(f"{a:.2f} / {b:.2f}" for a, b in zip(found[2], found[1]))
    cells = [batch, f"{two:.2f}", f"{one:.2f}", f"{two / one:.3f} ×", f"≤ {TARGET} ×", "yes" if met else "NO"]
    return cells, f"{batch}, rounds, two ranks / one process: {rounds}", met


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, required=True, metavar="DIR", help="the folder of cpift-train")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the checkpoint")
    parser.add_argument("--batch", action="append", metavar="BxS", help="rows and tokens of a step; may be repeated [8x256]")
    parser.add_argument("--steps", type=int, default=4, help="the first is dropped")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results/ranks-cpu.md", metavar="FILE")
    parser.add_argument("more", nargs="*", help="after --: arguments of cpift-train run")
    args = parser.parse_args()
    batches = args.batch or ["8x256"]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows(work, 64)
        found = [row(args, work, batch) for batch in batches]
    shown = ["scripts/bench/ranks.py", *(word for batch in batches for word in ("--batch", batch)), "--steps", str(args.steps),
             "--rounds", str(args.rounds), *(["--", *args.more] if args.more else [])]
    headings = ["batch", "two ranks, CPU s per step", "one process, two micro-batches", "ratio", "target", "met"]
    table = [headings, ["---"] + ["---:"] * 3 + ["---"] * 2, *(cells for cells, _, _ in found)]
    text = "\n".join([
        "# Two ranks on one machine", "",
        "Written by `scripts/bench/ranks.py`: CPU seconds (user and system, all processes) of a step, the median of",
        "interleaved rounds. Both make the same steps: the losses are equal.", "",
        f"- machine: {cpu_model()} ({os.cpu_count()} cores), Linux {platform.release()}; {datetime.date.today()}",
        f"- model: {args.model.name}, f32; one thread per process, over Gloo",
        f"- command: `{shlex.join(shown)}`",
        *(f"- {rounds}" for _, rounds, _ in found), "",
        *("| " + " | ".join(cells) + " |" for cells in table), "",
    ])
    args.out.write_text(text)
    print(text)
    sys.exit(not found[0][2])


if __name__ == "__main__":
    try:
        main()
    except Failed as error:
        sys.exit(f"ranks: {error}")
