#!/usr/bin/env python3
"""Checks that PEFT loads an adapter of `cpift-merge extract-lora` or `merge-adapters` and merges it to the same
weights.

    python scripts/oracle/check_extracted.py BASE ADAPTER MERGED [TOLERANCE]

MERGED is a checkpoint with the expected weights, such as the output of
`cpift-merge linear --model BASE+ADAPTER --model BASE+ADAPTER`.
"""

import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main():
    base, adapter, merged = sys.argv[1:4]
    tolerance = float(sys.argv[4]) if len(sys.argv) > 4 else 1e-5
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    expected = load_file(f"{merged}/model.safetensors")
    worst = max(float((found[name].float() - tensor.float()).abs().max()) for name, tensor in expected.items())
    changed = sum(not torch.equal(found[name], before[name]) for name in before)
    print(f"{changed} tensors changed, largest difference {worst:.3g}")
    sys.exit(worst > tolerance or changed == 0)


if __name__ == "__main__":
    main()
