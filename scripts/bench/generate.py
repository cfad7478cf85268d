"""`scripts/bench/generate.sh`: compares greedy generation with that of others in new tokens per CPU
second of one thread.

All continue the same prompts with the same weights in f32. Without `--gsm8k` the prompts are made
up, of unequal length, and no id ends an answer, so that every row writes all its tokens. With it
they are questions by the model's chat template, and answers end where the model ends them: rows
have unequal lengths, the others' batches as well as ours. The ids must be the same as those of
transformers but where two logits tie within rounding: fewer than 9 of 10 rows alike, and there is
nothing to compare and the exit status is 1. Rounds are interleaved; with made-up prompts a
process's first repetition is dropped.
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

from runs import HERE, ROOT, Failed, cpu_model, run_json

sys.path.insert(0, str(ROOT / "scripts/oracle"))

from check_generate import chat_prompts  # noqa: E402

PEER, LLAMA = HERE / "generate_peer.py", HERE / "generate_llama.py"
ALIKE = 0.9
# Ratios to reach with made-up prompts, and with GSM8K.
TARGETS = {"transformers": (1.5, 2.5), "before": (None, 1.5)}
LIMIT_S = 3600
FIRST_LENGTH, LAST_LENGTH = 24, 96


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the checkpoint")
    parser.add_argument("--ours", type=Path, required=True, metavar="FILE", help="the program bench_generate")
    parser.add_argument("--batch-size", action="append", type=int, metavar="N", help="may be repeated [16]")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--gsm8k", type=Path, metavar="DIR", help="data directory with gsm8k/eval.jsonl, instead of made-up prompts")
    parser.add_argument("--rows", type=int, default=200, help="of --gsm8k [200]")
    parser.add_argument("--before", type=Path, metavar="FILE", help="bench_generate of another version")
    parser.add_argument("--llama", nargs=2, type=Path, metavar=("DIR", "PYTHON"), help="folder with model.gguf; Python with xllamacpp")
    parser.add_argument("--without-transformers", action="store_true")
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


def workload(args, size):
    """The prompts, and the options of every side."""
    if args.gsm8k:
        return chat_prompts(args.model, args.gsm8k, args.rows), ["--eos", "--repeat", 1]
    vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
    return prompts(size, vocab), ["--repeat", 2]


def measure(args, size, file):
    rows, options = workload(args, size)
    file.write_text(json.dumps(rows))
    options += ["--prompts", file, "--batch-size", size, "--new-tokens", args.new_tokens, "--threads", 1]
    model = ["--model", args.model, *options]
    commands = {"ours": [args.ours, *model]}
    if args.before:
        commands["before"] = [args.before, *model]
    if not args.without_transformers:
        commands["transformers"] = [sys.executable, PEER, *model]
    if args.llama:
        folder, python = args.llama
        commands["llama.cpp"] = [python, LLAMA, "--model", folder, *options]
    reports = {who: [] for who in commands}
    for number in range(args.rounds):
        for who, command in commands.items():
            print(f"batch {size}, round {number + 1} of {args.rounds}: {who} …", file=sys.stderr, flush=True)
            reports[who].append(run_json(command, LIMIT_S, threads=1))
    return reports


def rates(reports):
    """New tokens per CPU second in each round."""
    return [sum(map(len, report["ids"])) / report["cpu_seconds"][-1] for report in reports]


def table_rows(args, size, reports):
    """A row for ours and one for each other side, and the single rounds."""
    work = f"GSM8K, {args.rows} rows" if args.gsm8k else "made up"
    speeds = {who: rates(of_side) for who, of_side in reports.items()}
    ours = statistics.median(speeds["ours"])
    rows = [[work, str(size), "ours", f"{ours:.1f}", "", "", "", ""]]
    for who in list(reports)[1:]:
        pairs = list(zip(reports["ours"][0]["ids"], reports[who][0]["ids"], strict=True))
        alike = sum(a == b for a, b in pairs)
        if who == "transformers" and alike < ALIKE * len(pairs):
            sys.exit(f"bench-generate: batch {size}: only {alike} of {len(pairs)} rows alike; no figures, for this is not the same work")
        speed = statistics.median(speeds[who])
        target = TARGETS.get(who, (None, None))[bool(args.gsm8k)]
        met = "" if target is None else "yes" if ours >= target * speed else "NO"
        rows.append([work, str(size), who, f"{speed:.1f}", f"{ours / speed:.2f} ×", f"≥ {target} ×" if target else "", met,
                     f"{alike} of {len(pairs)}"])
    notes = [f"batch {size}, {who}: {' · '.join(f'{speed:.1f}' for speed in of_side)} new tokens per CPU second"
             for who, of_side in speeds.items()]
    lengths = sorted(map(len, reports["ours"][0]["ids"]))
    notes.append(f"batch {size}: answers of {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}, "
                 f"mean {statistics.mean(lengths):.0f}")
    return rows, notes


def main():
    args = parse()
    rows, notes, versions = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        for size in args.batch_size or [16]:
            try:
                reports = measure(args, size, Path(folder) / "prompts.json")
            except Failed as error:
                sys.exit(f"bench-generate: batch {size}: {error}")
            of_size, of_rounds = table_rows(args, size, reports)
            rows += of_size
            notes += of_rounds
            for of_side in reports.values():
                versions.update(of_side[0].get("versions", {}))
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True).stdout.strip()
    facts = [f"machine: one thread of {cpu_model()} ({os.cpu_count()} cores), Linux {platform.release()}",
             f"versions: ours {commit or 'unknown'}; {', '.join(f'{name} {version}' for name, version in versions.items())}",
             f"model: {args.model.name}, f32, greedy, up to {args.new_tokens} new tokens a row; {datetime.date.today()}",
             f"command: `scripts/bench/generate.sh {os.environ.get('TYPED', '')}`",
             "transformers: sdpa attention, `generate(do_sample=False)`; prefill included on all sides"]
    headings = ["prompts", "batch", "side", "new tokens/CPU s", "ours to this", "target", "met", "rows alike"]
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
