#!/usr/bin/env python3
"""Writes fixtures/golden/generate.json: greedy answers that transformers.generate gives the tiny
checkpoints of fixtures/golden for prompts of unequal length, padded on the left in one batch; eager
attention, f32."""
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

GOLDEN = Path(__file__).parents[2] / "fixtures/golden"
CASES = ["llama/gqa_tied", "models/mistral_window", "models/qwen2", "models/qwen3", "models/gemma2",
         "models/phi3", "models/phi4_mini", "models/olmo2", "models/granite", "models/smollm3", "models/gemma3",
         "models/qwen3_moe"]
LENGTHS, NEW_TOKENS, PAD = [3, 19, 8, 12], 16, 0


def prompts(vocab):
    return [[(7 * row + 11 * i * i + i) % (vocab - 3) + 3 for i in range(length)] for row, length in enumerate(LENGTHS)]


def answers(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    given = prompts(model.config.vocab_size)
    longest = max(LENGTHS)
    ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in given])
    seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in given])
    with torch.inference_mode():
        found = model.generate(ids, attention_mask=seen, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=PAD)
    return {"prompts": given, "answers": found[:, longest:].tolist()}


def main():
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    text = json.dumps({case: answers(GOLDEN / case) for case in CASES}, indent=None, separators=(", ", ": "))
    (GOLDEN / "generate.json").write_text(text.replace('"models', '\n"models').replace("}}", "}\n}") + "\n")


if __name__ == "__main__":
    main()
