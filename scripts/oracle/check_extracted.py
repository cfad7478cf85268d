#!/usr/bin/env python3
"""Checks that PEFT loads an adapter of `cpift-train run --lora-output adapter` or of `cpift-merge
extract-lora` or `merge-adapters`, that it has the logits of MERGED, and that PEFT merges it to the
same weights.

    python scripts/oracle/check_extracted.py BASE ADAPTER MERGED [TOLERANCE]

MERGED is a checkpoint with the expected weights: of a run with --lora-output merged, or the output
of `cpift-merge linear --model BASE+ADAPTER --model BASE+ADAPTER`.
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
    ids = torch.randint(3, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    adapted = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        logits = adapted(input_ids=ids).logits
        with adapted.disable_adapter():
            moved = float((logits - adapted(input_ids=ids).logits).abs().max())
        whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
        off = float((logits - whole(input_ids=ids).logits).abs().max())
    found = adapted.merge_and_unload().state_dict()
    expected = load_file(f"{merged}/model.safetensors")
    worst = max(float((found[name].float() - tensor.float()).abs().max()) for name, tensor in expected.items())
    changed = sum(not torch.equal(found[name], before[name]) for name in before)
    print(f"{changed} tensors changed, largest difference {worst:.3g}; "
          f"logits: moved by {moved:.3g}, largest difference {off:.3g}")
    sys.exit(worst > tolerance or off > 10 * tolerance or changed == 0 or moved == 0)


if __name__ == "__main__":
    main()
