#!/usr/bin/env python3
"""Writes what transformers makes of real rows, to compare another tokenizer and template engine
with: for each row the SHA-256 of the token ids (as "1,2,3") of the first user text, of the whole
chat, and of the prompt before the answer. The rows themselves are not ours to hand on; their
digests are."""
import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

TASKS = ("gsm8k", "codealpaca", "logiqa", "alpaca", "ultrachat")


def spread_rows(path: Path, count: int) -> Iterator[tuple[int, dict]]:
    """Rows at even distances over the whole file, with their line index from 0."""
    lines = path.read_text(encoding="utf-8").split("\n")
    lines = lines[:-1] if lines[-1] == "" else lines
    for i in range(min(count, len(lines))):
        row = i * len(lines) // min(count, len(lines))
        yield row, json.loads(lines[row])


def digest(ids: list[int]) -> str:
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()


def source(messages: list[dict]) -> str:
    """What tells a row, whatever file and line it stands in."""
    return hashlib.sha256("".join(f"{m['role']}\0{m['content']}\0" for m in messages).encode()).hexdigest()


def describe(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> dict:
    chat = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=True, return_dict=False, add_generation_prompt=True)
    text = tokenizer(messages[0]["content"], add_special_tokens=False).input_ids
    return {"source": source(messages), "text": digest(text), "chat": digest(chat), "prompt": digest(prompt)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="Hugging Face folder with tokenizer and chat template")
    parser.add_argument("data", type=Path, help="folder with TASK/train.jsonl")
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--rows", type=int, default=40, help="rows of each task (default 40)")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--file", default="train.jsonl", help="file in each task's folder (default train.jsonl)")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    written = []
    for task in args.tasks.split(","):
        for row, example in spread_rows(args.data / task / args.file, args.rows):
            written.append({"task": task, "row": row, **describe(tokenizer, example["messages"])})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    text = ",\n".join(json.dumps(line) for line in written)
    args.out.write_text(f"[\n{text}\n]\n", encoding="utf-8")
    print(f"{args.out}: {len(written)} rows")


if __name__ == "__main__":
    main()
