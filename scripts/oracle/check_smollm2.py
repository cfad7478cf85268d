#!/usr/bin/env python3
"""Checks a converted SmolLM2-135M-Instruct folder with transformers: the next-token loss on a fixed
paragraph and one greedy answer. A wrong row order in q and k alone raises the loss to 4.65."""
import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

PARAGRAPH = (Path(__file__).parents[1] / "smollm2/paragraph.txt").read_text(encoding="utf-8")
LOSS, TOLERANCE = 3.3588, 0.002
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    folder = parser.parse_args().model
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    ids = tokenizer(PARAGRAPH, return_tensors="pt", add_special_tokens=False).input_ids
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True,
                                           return_tensors="pt", return_dict=True)
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
        written = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1]:]
    answer = tokenizer.decode(written, skip_special_tokens=True)
    print(f"{ids.shape[1]} tokens, loss {loss:.4f} (expected {LOSS} +- {TOLERANCE}), answer {answer!r}")
    right = abs(loss - LOSS) <= TOLERANCE and answer == ANSWER and tokenizer.decode(ids[0]) == PARAGRAPH
    if not right:
        print(f"check_smollm2: {folder}: loss, answer or text round trip is wrong", file=sys.stderr)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
