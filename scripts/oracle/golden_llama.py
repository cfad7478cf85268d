#!/usr/bin/env python3
"""Writes fixtures/golden/llama: tiny random LLaMA checkpoints with the logits, loss, gradients and
AdamW training curve that transformers and PyTorch compute for them."""
import argparse
import json
import shutil
from pathlib import Path
from typing import Callable

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup
from transformers.utils import logging

VOCAB, BATCH = 96, 2
TINY = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.02,
            bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
# head_dim 16 with theta 500 spreads the wavelengths from 6 to 1400 positions, across every branch
# of llama3 and yarn.
WIDE = dict(head_dim=16)

# name: (config fields, rope fields as written in config.json, sequence length, with training curve)
CASES: dict[str, tuple[dict, dict, int, bool]] = {
    "gqa_untied": ({"num_hidden_layers": 3}, {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}, 24, True),
    "gqa_tied": ({"tie_word_embeddings": True}, {"rope_theta": 10000.0, "rope_scaling": None}, 24, True),
    # The spelling of transformers 4: rope_theta beside rope_scaling, as in the published Llama-3
    # checkpoints.
    "rope_llama3": (WIDE, {"rope_theta": 500.0, "rope_scaling": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}}, 48, False),
    # Older still: "type" for "rope_type".
    "rope_linear": (WIDE, {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.5}}, 48, False),
    "rope_yarn": ({**WIDE, "max_position_embeddings": 128}, {"rope_parameters": {
        "rope_theta": 500.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}, 48, False),
    "rope_dynamic": ({**WIDE, "max_position_embeddings": 20}, {"rope_parameters": {
        "rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0}}, 48, False),
    "mha_bias": ({"num_key_value_heads": 4, "head_dim": 12, "attention_bias": True, "mlp_bias": True},
                 {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}, 24, False),
}
ADAMW = dict(steps=10, warmup_steps=2, lr=1e-3, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.1, max_grad_norm=1.0)


def fill(model: LlamaForCausalLM, rng: torch.Generator) -> None:
    """Random weights under which activations and gradients keep a moderate size."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=rng)
            if "norm" in name:
                weight.copy_(1.0 + 0.1 * noise)
            elif weight.ndim == 1:
                weight.copy_(0.1 * noise)
            else:
                weight.copy_(noise * weight.shape[-1] ** -0.5)


def batch(rng: torch.Generator, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels; some positions, among them whole ends of a row, carry no label (-100).
    """
    ids = torch.randint(3, VOCAB, (BATCH, length), generator=rng)
    labels = ids.clone()
    labels[torch.rand(BATCH, length, generator=rng) < 0.25] = -100
    labels[0, :5] = -100
    labels[1, -4:] = -100
    return ids, labels


def save_model(folder: Path, config: dict, rope: dict, rng: torch.Generator) -> None:
    model = LlamaForCausalLM(LlamaConfig(**TINY | config))
    fill(model, rng)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    written = json.loads((folder / "config.json").read_text())
    del written["rope_parameters"]
    written.update(rope)
    (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


def load(folder: Path) -> LlamaForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.config.use_cache = False
    return model.train()


def golden(folder: Path, length: int, rng: torch.Generator, curve: bool) -> dict[str, torch.Tensor]:
    """Logits, loss and gradients of one batch, and the batches of the training curve."""
    model = load(folder)
    ids, labels = batch(rng, length)
    out = model(input_ids=ids, labels=labels)
    out.loss.backward()
    tensors = {"input_ids": ids, "labels": labels, "logits": out.logits.detach(), "loss": out.loss.detach()}
    tensors |= {f"grad.{name}": weight.grad for name, weight in model.named_parameters()}
    if curve:
        batches = [batch(rng, length) for _ in range(3)]
        tensors["train.input_ids"] = torch.stack([ids for ids, _ in batches])
        tensors["train.labels"] = torch.stack([labels for _, labels in batches])
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def train(model: torch.nn.Module, hyper: dict, backward: Callable[[torch.nn.Module, int], float]) -> dict:
    """AdamW steps with decay on matrices only, clipping and the cosine schedule. `backward` runs
    one step's forward and backward pass and gives its loss; loss and norm are those before the
    step's update."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": hyper["weight_decay"]},
                                   {"params": others, "weight_decay": 0.0}],
                                  lr=hyper["lr"], betas=tuple(hyper["betas"]), eps=hyper["eps"])
    schedule = get_cosine_schedule_with_warmup(optimizer, hyper["warmup_steps"], hyper["steps"])
    losses, rates, norms = [], [], []
    for step in range(hyper["steps"]):
        optimizer.zero_grad()
        losses.append(backward(model, step))
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), hyper["max_grad_norm"]).item())
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    final = {name: p.detach().double().norm().item() for name, p in model.named_parameters()}
    return {"hyperparameters": hyper, "losses": losses, "lrs": rates, "grad_norms": norms, "final_param_norms": final}


def curve_of(folder: Path, batches: torch.Tensor, labels: torch.Tensor) -> dict:
    """Ten steps; step k uses batch k modulo 3."""
    def backward(model: torch.nn.Module, step: int) -> float:
        k = step % len(batches)
        loss = model(input_ids=batches[k], labels=labels[k]).loss
        loss.backward()
        return loss.item()
    return train(load(folder), ADAMW, backward)


def main() -> None:
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=root / "fixtures/golden/llama")
    out = parser.parse_args().out
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the order of summation, and with it the last bit, depends on the thread count
    for seed, (name, (config, rope, length, curve)) in enumerate(CASES.items()):
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        torch.manual_seed(seed)
        rng = torch.Generator().manual_seed(1000 + seed)
        save_model(folder, config, rope, rng)
        tensors = golden(folder, length, rng, curve)
        save_file(tensors, folder / "golden.safetensors")
        if curve:
            report = curve_of(folder, tensors["train.input_ids"], tensors["train.labels"])
            (folder / "adamw.json").write_text(json.dumps(report, indent=2) + "\n")
        for path in folder.iterdir():
            path.chmod(0o644)
        grads = [t.abs().max().item() for key, t in tensors.items() if key.startswith("grad.")]
        print(f"{name}: loss {tensors['loss'].item():.6f}, largest gradient per tensor {min(grads):.1e} to {max(grads):.1e}")


if __name__ == "__main__":
    main()
