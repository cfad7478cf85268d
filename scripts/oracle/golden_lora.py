#!/usr/bin/env python3
"""Writes fixtures/golden/lora: PEFT's low-rank adapters after ten AdamW steps on tiny checkpoints of
fixtures/golden/models, as save_pretrained writes them; and fixtures/golden/lora.json: settings,
losses and gradient norms of the steps, and the norm of every weight after merging. Needs peft
beside the oracle's packages (pip install --no-deps peft accelerate psutil).

The adapters' A is drawn as ours is: uniform within ±1/√inputs, from torch's generator seeded by the
name of the weight."""
import json
import math
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from transformers.utils import logging

from golden_models import ADAMW, backward, load

GOLDEN = Path(__file__).resolve().parents[2] / "fixtures/golden"
# The second model has biases beside its adapters and few of them; the third caps its scores; the
# fourth has experts.
CASES = {
    "all_linear": dict(model="models/llama3_rope", target_modules="all-linear", use_rslora=False),
    "some_rslora": dict(model="models/qwen2", target_modules=["q_proj", "v_proj", "mlp.down_proj"], use_rslora=True),
    "attention_only": dict(model="models/gemma2", target_modules=["q_proj", "k_proj", "o_proj"], use_rslora=False),
    "experts": dict(model="models/qwen3_moe_aux", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], use_rslora=False),
}
RANK, ALPHA, SEED, MASK = 4, 12.0, 7, 2**64 - 1


def mix(a, b):
    """SplitMix64 of two numbers, as crates/cpift-torch/src/seed.rs makes seeds."""
    z = (a + (b + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def seed_of(name):
    seed = mix(SEED, MASK - 1 - len(name))
    for byte in name.encode():
        seed = mix(seed, byte)
    return seed - 2**64 if seed >= 2**63 else seed


def adapted(case):
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=case["target_modules"], use_rslora=case["use_rslora"],
                             lora_dropout=0.0, bias="none", task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(GOLDEN / case["model"]), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_A." in name:
                own = name.removeprefix("base_model.model.").split(".lora_A.")[0] + ".weight"
                torch.manual_seed(seed_of(own))
                bound = 1 / math.sqrt(weight.shape[1])
                weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound))
    return model


def curve(name, case):
    tensors = load_file(GOLDEN / case["model"] / "golden.safetensors")
    docs = [(tensors[f"ids_{i}"], tensors[f"labels_{i}"]) for i in (0, 1)]
    model = adapted(case)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=ADAMW["lr"], betas=ADAMW["betas"], eps=ADAMW["eps"], weight_decay=ADAMW["weight_decay"])
    losses, norms = [], []
    for _ in range(ADAMW["steps"]):
        losses.append(backward(model, docs)[0])
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, ADAMW["max_grad_norm"])))
        optimizer.step()
        optimizer.zero_grad()
    model.peft_config["default"].base_model_name_or_path = case["model"]
    model.save_pretrained(GOLDEN / "lora" / name)
    (GOLDEN / "lora" / name / "README.md").unlink(missing_ok=True)
    (GOLDEN / "lora" / name / "adapter_model.safetensors").chmod(0o644)
    path = GOLDEN / "lora" / name / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"].sort()    # a set, in random order
    path.write_text(json.dumps(config, indent=1) + "\n")
    merged = {name: float(p.double().norm()) for name, p in model.merge_and_unload().named_parameters()}
    return case | {"losses": losses, "grad_norms": norms, "merged_norms": merged}


def main():
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    hyper = {key: ADAMW[key] for key in ("lr", "betas", "eps", "weight_decay", "max_grad_norm")}
    cases = {name: curve(name, case) for name, case in CASES.items()}
    report = {"rank": RANK, "alpha": ALPHA, "seed": SEED, "adamw": hyper, "versions": {"torch": torch.__version__, "peft": peft.__version__},
              "cases": cases}
    (GOLDEN / "lora.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
