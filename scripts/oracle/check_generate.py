#!/usr/bin/env python3
"""Compares greedy answers with those of transformers.generate, token for token: the questions of
DATA/gsm8k/eval.jsonl as chat prompts, at several batch sizes, on the CPU in f32. Exit status 1 if a
row differs."""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

PEER = Path(__file__).parents[1] / "bench/generate_peer.py"


def chat_prompts(model, data, count):
    """Token ids of the first questions, by the model's chat template with the generation prompt."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    with (data / "gsm8k/eval.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line)["messages"][:1] for line, _ in zip(lines, range(count))]
    texts = [tokenizer.apply_chat_template(row, tokenize=False, add_generation_prompt=True) for row in rows]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def run(command):
    found = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout.splitlines()[-1])["ids"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="holds gsm8k/eval.jsonl")
    parser.add_argument("--ours", type=Path, required=True, metavar="FILE", help="the program bench_generate")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", action="append", type=int, help="may be repeated [1 and 8]")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    ok = True
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.json"
        file.write_text(json.dumps(chat_prompts(args.model, args.data, args.prompts)))
        for size in args.batch_size or [1, 8]:
            options = ["--model", args.model, "--prompts", file, "--batch-size", size, "--new-tokens", args.new_tokens, "--eos",
                       "--threads", args.threads]
            pairs = list(zip(run([args.ours, *options]), run([sys.executable, PEER, *options]), strict=True))
            same = sum(ours == peer for ours, peer in pairs)
            tokens = sum(len(peer) for _, peer in pairs)
            print(f"batch {size}: {same} of {len(pairs)} answers the same, {tokens} tokens", flush=True)
            for row, (ours, peer) in enumerate(pairs):
                if ours != peer:
                    at = next((i for i, (a, b) in enumerate(zip(ours, peer)) if a != b), min(len(ours), len(peer)))
                    print(f"  row {row + 1} differs from token {at + 1} on")
            ok &= same == len(pairs)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
