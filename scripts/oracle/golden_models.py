#!/usr/bin/env python3
"""Writes fixtures/golden/models: tiny random checkpoints of every model family with the logits,
loss, gradients and AdamW training curve that transformers and PyTorch compute for them. Each folder
holds

    config.json, model.safetensors    the checkpoint, f32
    golden.safetensors                two documents of unequal length, nothing padded: ids_I,
                                      labels_I [s] (I64; -100 carries no loss) and logits_I [s,
                                      vocab] for I in 0, 1; loss, the mean over the positions of
                                      both whose NEXT token has a label; grad.NAME of that loss for
                                      every parameter, a tied one once
    adamw.json                        hyperparameters, then losses, lrs and grad_norms (before
                                      clipping) of ten steps, every one on both documents,
                                      final_param_norms, and the versions that made it all

Experts, which transformers keeps in one tensor per layer, have the names and gradients of the
checkpoint. A model that adds the load-balancing loss of its routers runs both documents in one
padded batch, since that loss is one of a batch.

A case also lists what it covers, with a way to turn each off; a feature that does not move the
logits by FELT is an error, for no test could see it missing. So is a curve that other roundings
(f64 outside the norms) move by STABLE, and a token that other experts compute in bf16."""
import argparse
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import torch
import transformers
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from golden_llama import train

LENGTHS = (24, 17)
TINY = dict(vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=None,
            tie_word_embeddings=False)
ADAMW = dict(steps=10, warmup_steps=0, lr=5e-3, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.1, max_grad_norm=1.0)
WEIGHT_STD, VECTOR_STD = 0.2, 0.3
FELT, STABLE = 2e-2, 2e-6
SEEDS = 4000  # of these, every curve is stable

SLIDING, FULL = "sliding_attention", "full_attention"
Model = torch.nn.Module


@dataclass
class Case:
    """A configuration and, for each feature, fields of the configuration or a change of the model
    that lose it."""

    family: str
    fields: dict
    off: dict[str, dict | Callable[[Model], None]]
    # Fields of config.json in another spelling than save_pretrained's; None removes one.
    spelled: dict = field(default_factory=dict)
    # Another seed, where the case's own gives a curve that is not stable.
    reseed: int = 0


def without_modules(*suffixes: str) -> Callable[[Model], None]:
    """Replaces the modules whose names end so by the identity."""
    def change(model: Model) -> None:
        for name, _ in list(model.named_modules()):
            if name.endswith(suffixes):
                model.set_submodule(name, torch.nn.Identity())
    return change


def shifted(suffix: str, by: float | None) -> Callable[[Model], None]:
    """Adds `by` to the parameters whose names end so; None zeroes them."""
    def change(model: Model) -> None:
        for name, weight in model.named_parameters():
            if name.endswith(suffix):
                weight.data = torch.zeros_like(weight) if by is None else weight.data + by
    return change


def unscaled_embedding(model: Model) -> None:
    model.model.embed_tokens.embed_scale.fill_(1.0)


WINDOW = {"window": {"sliding_window": 64}, "window one shorter": {"sliding_window": 7},
          "window one longer": {"sliding_window": 9}}
EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
LAYERS = {"full layers": {"layer_types": [SLIDING] * 3}, "sliding layers": {"layer_types": [FULL] * 3}}
BIASES = {f"{name} bias": shifted(f"{name}_proj.bias", None) for name in "qkv"}



def rope(theta: float, **more) -> dict:
    return {"rope_type": "default", "rope_theta": theta} | more


GEMMA3_ROPE = {SLIDING: rope(1e4), FULL: rope(1e6, rope_type="linear", factor=8.0)}
SHORT = [1.0, 1.05, 1.2, 1.6, 2.1, 3.0]


def longrope(**changes) -> dict:
    """The settings of phi4_mini with `changes`."""
    return {"rope_parameters": rope(1e4, rope_type="longrope", partial_rotary_factor=0.75, short_factor=SHORT,
                                    long_factor=[8.0] * 6, original_max_position_embeddings=48) | changes}


CASES = {
    # head_dim 16 with theta 500 spreads the wavelengths from 6 to 1400 positions, across the three
    # bands.
    "llama3_rope": Case("llama", dict(
        head_dim=16, num_hidden_layers=2, tie_word_embeddings=True, rope_parameters={
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}),
        {"scaling": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}}),
    "mistral_window": Case("mistral", dict(sliding_window=8), WINDOW),
    "mistral_full": Case("mistral", dict(sliding_window=None, head_dim=12), {"no window": {"sliding_window": 8}}),
    "ministral": Case("ministral", dict(sliding_window=8, head_dim=12, layer_types=[SLIDING, FULL, SLIDING]), WINDOW | LAYERS),
    # As Qwen publishes it: no layer_types, and a window that use_sliding_window switches off.
    "qwen2": Case("qwen2", dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}), BIASES | {
        "no window": {"layer_types": [SLIDING] * 3, "sliding_window": 8},
        "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}},
                  spelled={"layer_types": None, "rope_parameters": None, "rope_theta": 1e6, "rope_scaling": None,
                           "use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}),
    "qwen2_window": Case("qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1), WINDOW | LAYERS),
    "qwen3": Case("qwen3", dict(head_dim=16, num_hidden_layers=2),
                  {"q norm": without_modules("q_norm"), "k norm": without_modules("k_norm")}),
    "gemma2": Case("gemma2", dict(
        head_dim=12, query_pre_attn_scalar=20, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, sliding_window=8,
        hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=True), WINDOW | LAYERS | {
            "query scale": {"query_pre_attn_scalar": 12},
            "softcap of scores": {"attn_logit_softcapping": None},
            "softcap of logits": {"final_logit_softcapping": None},
            "GeGLU": {"hidden_activation": "silu"},
            "scaled embedding": unscaled_embedding,
            "norms centred at one": shifted("norm.weight", -1.0),
            "norms after attention": without_modules("post_attention_layernorm"),
            "norms after MLP": without_modules("post_feedforward_layernorm")}),
    # As microsoft publishes Phi-3-mini-4k: a window in every layer, no scaling.
    "phi3": Case("phi3", dict(sliding_window=8, rope_parameters=rope(1e4)), WINDOW | {
        "theta": {"rope_parameters": rope(1e3)}},
                 spelled={"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": None, "attention_bias": False}),
    # As it publishes Phi-4-mini: three quarters of each head rotated by longrope, whose long factors
    # are for longer documents than these.
    "phi4_mini": Case("phi3", dict(
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, sliding_window=262144, rope_parameters=rope(
            1e4, rope_type="longrope", partial_rotary_factor=0.75, short_factor=SHORT, long_factor=[8.0] * 6,
            original_max_position_embeddings=48), original_max_position_embeddings=48), {
                "factors": longrope(short_factor=[1.0] * 6),
                "partial rotation": longrope(partial_rotary_factor=1.0, short_factor=SHORT + [1.5, 1.5], long_factor=[8.0] * 8),
                "attention factor": longrope(attention_factor=1.0)},
                      spelled={"rope_parameters": None, "rope_theta": 1e4, "partial_rotary_factor": 0.75,
                               "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": [8.0] * 6},
                               "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False,
                               "attention_bias": False}),
    "olmo2": Case("olmo2", dict(rope_parameters=rope(5e5), rms_norm_eps=1e-6), reseed=1, off={
        "q norm": without_modules("q_norm"), "k norm": without_modules("k_norm"),
        "norms after attention": without_modules("post_attention_layernorm"),
        "norms after MLP": without_modules("post_feedforward_layernorm")},
                  spelled={"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": None}),
    # Multipliers apart from their defaults and from each other, and biases.
    "granite": Case("granite", dict(
        attention_bias=True, mlp_bias=True, tie_word_embeddings=True, embedding_multiplier=3.0, attention_multiplier=0.2,
        residual_multiplier=0.6, logits_scaling=2.0, rope_parameters=rope(1e4)), {
            f"{name} multiplier": {name: 1.0} for name in
            ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")} | {
            f"{name} bias": shifted(f"{name}_proj.bias", None) for name in ("o", "down")},
                    spelled={"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": None}),
    # Layers 0 and 2 rotate, as layers 0 to 2 of 4 do in the published model.
    "smollm3": Case("smollm3", dict(
        tie_word_embeddings=True, no_rope_layers=[1, 0, 1], no_rope_layer_interval=4, rope_parameters=rope(5e6)), {
            "layers with RoPE": {"no_rope_layers": [0, 0, 0]}, "layers without": {"no_rope_layers": [1, 1, 1]},
            "which": {"no_rope_layers": [1, 1, 0]}},
                    spelled={"rope_parameters": None, "rope_theta": 5e6, "rope_scaling": None, "max_window_layers": 28,
                             "pretraining_tp": 2}),
    # As Google publishes it: a pattern and no layer_types, a θ for each kind of layer, and scaling
    # where there is no window. Scores are scaled apart from the head size.
    "gemma3": Case("gemma3_text", dict(
        head_dim=12, query_pre_attn_scalar=20, sliding_window=8, sliding_window_pattern=3, tie_word_embeddings=True,
        rope_parameters=GEMMA3_ROPE), WINDOW | LAYERS | {
            "query scale": {"query_pre_attn_scalar": 12},
            "scaled embedding": unscaled_embedding,
            "norms centred at one": shifted("norm.weight", -1.0),
            "q norm": without_modules("q_norm"), "k norm": without_modules("k_norm"),
            "local theta": {"rope_parameters": GEMMA3_ROPE | {SLIDING: rope(1e3)}},
            "global theta": {"rope_parameters": GEMMA3_ROPE | {FULL: rope(1e4, rope_type="linear", factor=8.0)}},
            "scaling": {"rope_parameters": GEMMA3_ROPE | {FULL: rope(1e6)}}},
                   spelled={"layer_types": None, "rope_parameters": None, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
                            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window_pattern": 3,
                            "_sliding_window_pattern": None}),
    # As Qwen publishes Qwen3-30B-A3B: experts in every layer, no load-balancing loss.
    "qwen3_moe": Case("qwen3_moe", EXPERTS | dict(
        head_dim=16, num_hidden_layers=2, moe_intermediate_size=16, norm_topk_prob=True, rope_parameters=rope(1e6)), {
            "normalised weights": {"norm_topk_prob": False}, "second expert": {"num_experts_per_tok": 1},
            "router": shifted("mlp.gate.weight", None), "q norm": without_modules("q_norm")}, reseed=2,
                      spelled={"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": None, "num_local_experts": None,
                               "num_experts": 4, "max_window_layers": 2, "attention_bias": False}),
    # Experts in layers 1 and 5, the load-balancing loss over both, and a window in all layers.
    "qwen3_moe_aux": Case("qwen3_moe", EXPERTS | dict(
        hidden_size=24, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=1, head_dim=12,
        moe_intermediate_size=8, decoder_sparse_step=2, mlp_only_layers=[3], output_router_logits=True,
        router_aux_loss_coef=0.5, use_sliding_window=True, sliding_window=8), WINDOW | {
            "plain weights": {"norm_topk_prob": True}, "second expert": {"num_experts_per_tok": 1}}, reseed=6),
}


def fill(model: Model, rng: torch.Generator) -> None:
    """Random weights; norms lie around the identity, which is 0 where a norm multiplies by 1 +
    weight."""
    centre = 0.0 if model.config.model_type.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=rng)
            weight.copy_(WEIGHT_STD * noise if weight.ndim > 1 else VECTOR_STD * noise + centre * ("norm" in name))


def save_model(folder: Path, case: Case, rng: torch.Generator) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.family, **TINY | case.fields), dtype=torch.float32)
    fill(model, rng)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    path = folder / "config.json"
    config = json.loads(path.read_text()) | case.spelled
    removed = [key for key, value in case.spelled.items() if value is None]
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in removed}, indent=2, sort_keys=True) + "\n")


def load(folder: Path, **changes) -> Model:
    """The saved model in f32 with eager attention and experts; `changes` are fields of its
    configuration."""
    config = AutoConfig.from_pretrained(folder, **changes)
    eager = dict(attn_implementation="eager") | (dict(experts_implementation="eager") if hasattr(config, "num_experts") else {})
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32, **eager)
    model.config.use_cache = False
    return model.train()


def documents(rng: torch.Generator) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels; some positions, among them a whole beginning and a whole end, carry no
    label."""
    found = []
    for length in LENGTHS:
        ids = torch.randint(3, TINY["vocab_size"], (length,), generator=rng)
        labels = ids.clone()
        labels[torch.rand(length, generator=rng) < 0.25] = -100
        found.append((ids, labels))
    found[0][1][:5] = -100
    found[1][1][-4:] = -100
    return found


def backward(model: Model, docs: list) -> tuple[float, list[torch.Tensor]]:
    """Accumulates the gradients of the mean loss over all targets; that loss and each document's
    logits."""
    targets = sum(int((labels[1:] != -100).sum()) for _, labels in docs)
    loss, logits = 0.0, []
    if getattr(model.config, "output_router_logits", False):
        ids, labels, seen = (pad_sequence(rows, batch_first=True, padding_value=fill) for rows, fill in (
            ([d[0] for d in docs], 0), ([d[1] for d in docs], -100), ([torch.ones_like(d[0]) for d in docs], 0)))
        out = model(input_ids=ids, labels=labels, attention_mask=seen, num_items_in_batch=targets)
        out.loss.backward()
        return out.loss.item(), [rows[:len(d[0])].contiguous() for rows, d in zip(out.logits.detach(), docs)]
    for ids, labels in docs:
        out = model(input_ids=ids[None], labels=labels[None], num_items_in_batch=targets)
        out.loss.backward()
        loss += out.loss.item()
        logits.append(out.logits.detach()[0].contiguous())
    return loss, logits


def golden(model: Model, docs: list) -> dict[str, torch.Tensor]:
    loss, logits = backward(model, docs)
    tensors = {"loss": torch.tensor(loss)}
    for i, ((ids, labels), values) in enumerate(zip(docs, logits)):
        tensors |= {f"ids_{i}": ids, f"labels_{i}": labels, f"logits_{i}": values}
    for name, weight in model.named_parameters():
        tensors |= {f"grad.{part}": grad for part, grad in split(name, weight.grad)}
    return tensors


def split(name: str, grad: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The gradient of a parameter by the names of the checkpoint."""
    base, _, last = name.rpartition(".experts.")
    if not base:
        return [(name, grad)]
    parts = {"down_proj": grad} if last == "down_proj" else dict(zip(("gate_proj", "up_proj"), grad.chunk(2, dim=1)))
    return [(f"{base}.experts.{x}.{part}.weight", own.contiguous()) for part, all_ in parts.items() for x, own in enumerate(all_)]


def routes(model: Model, docs: list) -> list[torch.Tensor]:
    """The experts of every token, layer by layer."""
    found, hooks = [], []
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            hooks.append(module.register_forward_hook(lambda _, __, out: found.append(out[2].sort(-1).values)))
    with torch.no_grad():
        for ids, _ in docs:
            model(input_ids=ids[None])
    for hook in hooks:
        hook.remove()
    return found


def moved(case: Case, folder: Path, ids: torch.Tensor, logits: torch.Tensor) -> dict[str, float]:
    """How far each feature, turned off, moves the logits."""
    found = {}
    for name, off in case.off.items():
        model = load(folder, **off) if isinstance(off, dict) else load(folder)
        with torch.no_grad():
            if callable(off):
                off(model)
            found[name] = float((model(input_ids=ids[None]).logits[0] - logits).abs().max())
    return found


def curve(folder: Path, docs: list) -> dict:
    """Ten AdamW steps, and the same with other roundings to know that the losses are a property of
    the arithmetic."""
    step = lambda model, _: backward(model, docs)[0]
    report = train(load(folder), ADAMW, step)
    other = train(load(folder).double(), ADAMW, step)
    off = max(abs(a - b) for a, b in zip(report["losses"], other["losses"]))
    assert off < STABLE, f"{folder.name}: other roundings move the losses by {off:.1e}"
    report["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    return report


def make(folder: Path, case: Case, seed: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(SEEDS + seed + 100 * case.reseed)
    save_model(folder, case, rng)
    docs = documents(rng)
    tensors = golden(load(folder), docs)
    felt = moved(case, folder, docs[0][0], tensors["logits_0"])
    unfelt = {name: by for name, by in felt.items() if by < FELT}
    assert not unfelt, f"{folder.name}: turned off, these hardly change the logits: {unfelt}"
    routed = [routes(load(folder).to(dtype), docs) for dtype in (torch.float32, torch.bfloat16)]
    assert all(torch.equal(a, b) for a, b in zip(*routed)), f"{folder.name}: bf16 routes tokens to other experts"
    if case.fields.get("output_router_logits"):
        plain = backward(load(folder, output_router_logits=False), docs)[0]
        assert abs(plain - tensors["loss"]) > FELT, f"{folder.name}: the load-balancing loss is not felt"
    report = curve(folder, docs)
    save_file(tensors, folder / "golden.safetensors")
    (folder / "adamw.json").write_text(json.dumps(report, indent=2) + "\n")
    for path in folder.iterdir():
        path.chmod(0o644)
    least = min(felt, key=felt.get)
    print(f"{folder.name}: loss {report['losses'][0]:.6f} to {report['losses'][-1]:.6f}; "
          f"{len(felt)} features, of which '{least}' moves the logits least, by {felt[least]:.3f}")


def main() -> None:
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=root / "fixtures/golden/models")
    out = parser.parse_args().out
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the order of summation, and with it the last bit, depends on the thread count
    for seed, (name, case) in enumerate(CASES.items()):
        make(out / name, case, seed)


if __name__ == "__main__":
    main()
