#!/usr/bin/env python3
"""Makes fixtures/golden/adapters: tiny models, LoRA adapters in every kind that MODEL+ADAPTER reads, and the
weights after PEFT's merge_and_unload, in float32. extract.json has the relative errors of the best approximations of
rank 1, 2 and 3 of one case's differences, by NumPy.

    python scripts/oracle/golden_adapters.py        # torch, transformers and peft 0.21.2, as for golden_lora.py
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

OUT = Path(__file__).resolve().parents[2] / "fixtures/golden/adapters"

QKV = ["q_proj", "k_proj", "v_proj"]
CASES = {
    "plain": ("llama", dict(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"])),
    "rslora": ("llama", dict(r=4, lora_alpha=6, use_rslora=True, target_modules=QKV)),
    "dora": ("llama", dict(r=2, lora_alpha=4, use_dora=True, target_modules=["o_proj", "up_proj"])),
    "patterns": ("llama", dict(r=2, lora_alpha=4, target_modules=QKV, rank_pattern={"layers.0.self_attn.q_proj": 5, "v_proj": 1},
                               alpha_pattern={"layers.1.self_attn.k_proj": 7, ".*v_proj": 9})),
    "embedding": ("llama", dict(r=2, lora_alpha=3, target_modules=["embed_tokens", "q_proj"])),
    "saved": ("llama", dict(r=2, lora_alpha=2, target_modules=["gate_proj"], modules_to_save=["lm_head", "norm"])),
    "transposed": ("gpt2", dict(r=3, lora_alpha=6, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
}


def save(model, folder):
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()
               if not (name == "lm_head.weight" and model.config.tie_word_embeddings)},
              folder / "model.safetensors", metadata={"format": "pt"})
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_") and k != "transformers_version"}
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def fill(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    torch.manual_seed(7)
    llama = LlamaConfig(vocab_size=23, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
                        num_key_value_heads=1, tie_word_embeddings=False, initializer_range=0.3)
    gpt2 = GPT2Config(vocab_size=19, n_embd=8, n_layer=1, n_head=2, n_positions=10, tie_word_embeddings=True)
    bases = {"llama": LlamaForCausalLM(llama), "gpt2": GPT2LMHeadModel(gpt2)}
    for name, model in bases.items():
        save(model, OUT / name)
    for seed, (case, (base, settings)) in enumerate(CASES.items()):
        folder = OUT / case
        model = AutoModelForCausalLM.from_pretrained(OUT / base, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        fill(model, seed)
        model.save_pretrained(folder)
        (folder / "README.md").unlink()
        # Read back, so that the files alone decide.
        model = AutoModelForCausalLM.from_pretrained(OUT / base, dtype=torch.float32)
        merged = PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
        before = load_file(OUT / base / "model.safetensors")
        changed = {name: merged[name].contiguous().clone() for name in before if not torch.equal(before[name], merged[name])}
        assert len(changed) >= 2, case
        save_file(changed, folder / "merged.safetensors", metadata={"base": base})
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        config["base_model_name_or_path"] = base
        for key in ("target_modules", "modules_to_save"):
            config[key] = sorted(config[key]) if config[key] else config[key]
        path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        if case == "rslora":
            errors = {}
            for name, tensor in changed.items():
                values = np.linalg.svd((tensor.double() - before[name].double()).numpy(), compute_uv=False)
                errors[name] = [float(np.sqrt((values[rank:] ** 2).sum() / (values ** 2).sum())) for rank in (1, 2, 3)]
            (OUT / "extract.json").write_text(json.dumps(errors, indent=1, sort_keys=True) + "\n")
        print(case, len(changed))


if __name__ == "__main__":
    main()
