"""`scripts/bench/train.sh`: compares training steps with transformers' in tokens per CPU second of
one thread.

All see the same token ids and start from the same checkpoint, so their losses must agree, or there
is nothing to compare and the exit status is 1. Each round runs ours, the peers (transformers as a user
writes it, under torch.compile, with its linear layers through oneDNN) and the floor, one after another;
every process drops its first step.
"""

import argparse
import datetime
import os
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from runs import FLOOR, HERE, PEER, Failed, cpu_model, run_json

SHAPES = ["1x512", "4x256"]
TARGET = 1.2
LIMIT_S = 1800
# The peers beside `peer`: name and arguments of train_peer.py.
VARIANTS = {"torch.compile": ["--compile"], "oneDNN": ["--onednn"]}
# f32 losses agree at every step. In bf16 other roundings turn the signs of AdamW's first updates:
# only the first loss is judged.
AGREE_F32, AGREE_BF16 = 1e-4, 0.02


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the checkpoint")
    parser.add_argument("--ours", type=Path, required=True, metavar="FILE", help="the program bench_train")
    parser.add_argument("--shape", action="append", metavar="BxS", help="rows and tokens of a batch; may be repeated")
    parser.add_argument("--steps", type=int, default=5, help="of each process; the first is dropped")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compute-dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: results/train-cpu.md, named after the options")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first is dropped")
    return args


def forms(args):
    """The options beyond the plain form, as both programs take them."""
    bf16 = ["--compute-dtype", "bf16"] if args.compute_dtype == "bf16" else []
    return bf16 + (["--gradient-checkpointing"] if args.gradient_checkpointing else [])


def measure(args, shape):
    """The reports of all rounds: ours, the peers', and the floor."""
    training = ["--model", args.model, "--shape", shape, "--steps", args.steps, "--threads", 1, *forms(args)]
    commands = {"ours": [args.ours, *training, "--json"], "peer": [sys.executable, PEER, *training],
                **{name: [sys.executable, PEER, *training, *more] for name, more in VARIANTS.items()},
                "floor": [sys.executable, FLOOR, "--model", args.model, "--shape", shape, "--compute-dtype",
                          args.compute_dtype, "--threads", 1]}
    reports = {who: [] for who in commands}
    for number in range(args.rounds):
        for who, command in commands.items():
            print(f"{shape}, round {number + 1} of {args.rounds}: {who} …", file=sys.stderr, flush=True)
            reports[who].append(run_json(command, LIMIT_S, threads=1))
    return reports


def disagreement(args, reports):
    """Says where the two loss curves part; None where they agree."""
    for name in ["peer", *VARIANTS]:
        pairs = list(zip(reports["ours"][0]["losses"], reports[name][0]["losses"], strict=True))
        allowed, judged = (AGREE_F32, pairs) if args.compute_dtype == "f32" else (AGREE_BF16, pairs[:1])
        for step, (ours, peer) in enumerate(judged):
            if not abs(ours - peer) <= allowed:
                return f"the losses of step {step} differ: ours {ours:.6f}, {name} {peer:.6f} (allowed: {allowed})"
    return None


def rate(reports):
    """Tokens per CPU second at the median step, and the rates of the single rounds."""
    kept = [report["cpu_seconds"][1:] for report in reports]
    tokens = reports[0]["tokens_per_step"]
    return tokens / statistics.median(sum(kept, [])), [tokens / statistics.median(steps) for steps in kept]


def row(args, shape, reports):
    rates = {name: rate(reports[name]) for name in ["ours", "peer", *VARIANTS]}
    (ours, our_rounds), (peer, peer_rounds) = rates["ours"], rates["peer"]
    # The fastest round: other load makes a floor too slow, never too fast.
    floor = min(reports["floor"], key=lambda report: report["seconds"])
    limit = reports["ours"][0]["tokens_per_step"] / floor["seconds"]
    plain = not forms(args)
    memory = [max(report["peak_memory_mib"] for report in reports[who]) for who in ("ours", "peer")]
    cells = [shape, f"{ours:.1f}", f"{peer:.1f}", *(f"{rates[name][0]:.1f}" for name in VARIANTS), f"{ours / peer:.2f} ×",
             f"≥ {TARGET} ×" if plain else "-", ("yes" if ours >= TARGET * peer else "NO") if plain else "-",
             f"{limit:.1f}", f"{100 * ours / limit:.0f} %", f"{100 * peer / limit:.0f} %", f"{memory[0]:.0f}", f"{memory[1]:.0f}"]
    rounds = " · ".join(f"{a:.1f} / {b:.1f}" for a, b in zip(our_rounds, peer_rounds))
    libraries = ", ".join(f"{count} by {name}" for name, count in sorted(floor["libraries"].items()))
    note = (f"{shape}: rounds, ours / transformers: {rounds} tokens per CPU second; floor: {floor['products_seconds']:.2f} s of"
            f" products at {floor['gflops']:.0f} GFLOP/s ({libraries}), {floor['attention_seconds']:.2f} s of attention")
    return cells, note


HEADINGS = ["shape", "ours, tokens/CPU s", "transformers", *(f"with {name}" for name in VARIANTS), "ratio", "target", "met",
            "floor", "ours, share of floor", "its share", "ours, peak MiB", "its peak MiB"]


def commit():
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def page(args, rows, notes, versions):
    form = " ".join(forms(args)) or "f32"
    agreed = f"all steps agree to {AGREE_F32}" if args.compute_dtype == "f32" else f"the first step agree to {AGREE_BF16}"
    shapes = [part for shape in args.shape or [] for part in ("--shape", shape)]
    command = ["scripts/bench/train.sh", "--rounds", args.rounds, "--steps", args.steps, *shapes, *forms(args)]
    facts = [f"machine: one thread of {cpu_model()} ({os.cpu_count()} cores), Linux {platform.release()}",
             f"versions: ours {commit()}; torch {versions['torch']}, transformers {versions['transformers']}",
             f"model: {args.model.name}, form: {form}; {datetime.date.today()}",
             f"command: `{shlex.join(map(str, command))}`",
             "transformers: sdpa attention, loss by `labels`, clip_grad_norm_ at 1.0, torch.optim.AdamW(fused=True); "
             "bf16 is autocast over f32 weights",
             f"losses: those of {agreed}",
             "floor: the model's matrix products and attention alone, each by the fastest library of PyTorch (floor.py)"]
    table = [HEADINGS, ["---"] * len(HEADINGS), *rows]
    lines = ["# Training steps on the CPU", "",
             "Written by `scripts/bench/train.sh`: the median step of all rounds, which are interleaved.", "",
             *(f"- {fact}" for fact in facts + notes), "",
             *("| " + " | ".join(cells) + " |" for cells in table)]
    return "\n".join(lines) + "\n"


def main():
    args = parse()
    parts = ["train-cpu", *(part.strip("-") for part in forms(args) if part != "--compute-dtype")]
    out = args.out or HERE / "results" / ("-".join(parts) + ".md")
    rows, notes, versions = [], [], None
    for shape in args.shape or SHAPES:
        try:
            reports = measure(args, shape)
        except Failed as error:
            sys.exit(f"bench-train: {shape}: {error}")
        if apart := disagreement(args, reports):
            sys.exit(f"bench-train: {shape}: {apart}; no figures, for these are not the same steps")
        cells, note = row(args, shape, reports)
        rows.append(cells)
        notes.append(note)
        versions = reports["peer"][0]["versions"]
    text = page(args, rows, notes, versions)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    print(text)
    print(f"written: {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
