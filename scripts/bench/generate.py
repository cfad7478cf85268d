"""`scripts/bench/generate.sh`: compares greedy generation with transformers' in new tokens per CPU
second of one thread.

Both continue the same made-up prompts of unequal length from the same checkpoint, without an ending
id, so that every row writes all its tokens. The ids must be the same but where two logits tie
within rounding: fewer than 9 of 10 rows alike, and there is nothing to compare and the exit status
is 1. Rounds are interleaved; a process's first repetition is dropped.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from runs import HERE, Failed, cpu_model, run_json

PEER = HERE / "generate_peer.py"
TARGET, ALIKE = 1.5, 0.9
LIMIT_S = 1800
FIRST_LENGTH, LAST_LENGTH = 24, 96


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the checkpoint")
    parser.add_argument("--ours", type=Path, required=True, metavar="FILE", help="the program bench_generate")
    parser.add_argument("--batch-size", action="append", type=int, metavar="N", help="may be repeated [16]")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results/generate-cpu.md", metavar="FILE")
    return parser.parse_args()


def prompts(count, vocab):
    """Ids of a 64-bit LCG; lengths rise evenly."""
    state, rows = 1, []
    for row in range(count):
        length = FIRST_LENGTH + (LAST_LENGTH - FIRST_LENGTH) * row // max(count - 1, 1)
        ids = []
        for _ in range(length):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            ids.append((state >> 33) % vocab)
        rows.append(ids)
    return rows


def measure(args, size, file):
    vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
    file.write_text(json.dumps(prompts(size, vocab)))
    options = ["--model", args.model, "--prompts", file, "--batch-size", size, "--new-tokens", args.new_tokens,
               "--repeat", 2, "--threads", 1]
    commands = {"ours": [args.ours, *options], "peer": [sys.executable, PEER, *options]}
    reports = {who: [] for who in commands}
    for number in range(args.rounds):
        for who, command in commands.items():
            print(f"batch {size}, round {number + 1} of {args.rounds}: {who} …", file=sys.stderr, flush=True)
            reports[who].append(run_json(command, LIMIT_S, threads=1))
    return reports


def rate(args, size, reports):
    """New tokens per CPU second: the median, and the single rounds."""
    seconds = [report["cpu_seconds"][-1] for report in reports]
    tokens = size * args.new_tokens
    return tokens / statistics.median(seconds), [tokens / s for s in seconds]


def row(args, size, reports):
    pairs = list(zip(reports["ours"][0]["ids"], reports["peer"][0]["ids"], strict=True))
    alike = sum(ours == peer for ours, peer in pairs)
    if alike < ALIKE * len(pairs):
        sys.exit(f"bench-generate: batch {size}: only {alike} of {len(pairs)} rows alike; no figures, for this is not the same work")
    (ours, our_rounds), (peer, peer_rounds) = rate(args, size, reports["ours"]), rate(args, size, reports["peer"])
    met = "yes" if ours >= TARGET * peer else "NO"
    note = " · ".join(f"{a:.1f} / {b:.1f}" for a, b in zip(our_rounds, peer_rounds))
    cells = [str(size), f"{ours:.1f}", f"{peer:.1f}", f"{ours / peer:.2f} ×", f"≥ {TARGET} ×", met, f"{alike} of {len(pairs)}"]
    return cells, f"batch {size}: rounds, ours / transformers: {note} new tokens per CPU second"


def main():
    args = parse()
    rows, notes, versions = [], [], None
    with tempfile.TemporaryDirectory() as folder:
        for size in args.batch_size or [16]:
            try:
                reports = measure(args, size, Path(folder) / "prompts.json")
            except Failed as error:
                sys.exit(f"bench-generate: batch {size}: {error}")
            cells, note = row(args, size, reports)
            rows.append(cells)
            notes.append(note)
            versions = reports["peer"][0]["versions"]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True).stdout.strip()
    sizes = "".join(f" --batch-size {size}" for size in args.batch_size or [])
    facts = [f"machine: one thread of {cpu_model()} ({os.cpu_count()} cores), Linux {platform.release()}",
             f"versions: ours {commit or 'unknown'}; torch {versions['torch']}, transformers {versions['transformers']}",
             f"model: {args.model.name}, f32, greedy, {args.new_tokens} new tokens a row, prompts of {FIRST_LENGTH} to {LAST_LENGTH} tokens; "
             f"{datetime.date.today()}",
             f"command: `scripts/bench/generate.sh --rounds {args.rounds} --new-tokens {args.new_tokens}{sizes}`",
             "transformers: sdpa attention, `generate(do_sample=False)`; prefill included on both sides"]
    headings = ["batch", "ours, new tokens/CPU s", "transformers", "ratio", "target", "met", "rows alike"]
    lines = ["# Generation on the CPU", "", "Written by `scripts/bench/generate.sh`: the median of interleaved rounds.", "",
             *(f"- {fact}" for fact in facts + notes), "",
             *("| " + " | ".join(cells) + " |" for cells in [headings, ["---"] * len(headings), *rows])]
    text = "\n".join(lines) + "\n"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)
    print(text)
    print(f"written: {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
