#!/usr/bin/env python3
"""Converts a LLaMA-architecture GGUF file with a byte-level BPE tokenizer to a Hugging Face folder.

Needs the packages gguf, numpy and tokenizers; no PyTorch. The folder is written beside its final
name and renamed when complete.
"""
import argparse
import json
import os
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
DTYPES = {"bfloat16": "BF16", "float32": "F32"}
CONTROL, USER_DEFINED = 3, 4  # token types of the GGUF vocabulary
# GGUF's names for "each digit on its own, then the split of GPT-2".
DIGIT_SPLITS = {"smollm", "starcoder", "refact", "command-r"}


class Refused(Exception):
    """The file is not one this converter understands."""


class Gguf:
    """The metadata of a GGUF file, with the architecture's prefix taken off its keys."""

    def __init__(self, path: Path):
        self.reader = GGUFReader(path)
        if (found := self.get("general.architecture")) != "llama":
            raise Refused(f"general.architecture is {found!r}, expected 'llama'")
        if self.get("llama.rope.scaling.type", "none") != "none" or self.get("llama.expert_count", 0):
            raise Refused("rope scaling and mixtures of experts are not converted")

    def get(self, key: str, *default: Any) -> Any:
        field = self.reader.fields.get(key)
        if field is not None:
            return field.contents()
        if default:
            return default[0]
        raise Refused(f"metadata key {key} is missing")

    def real(self, key: str, *default: float) -> float:
        """The shortest decimal of a float32 entry: 1e-05, not 9.999999747378752e-06."""
        return float(str(np.float32(self.get(key, *default))))


def model_config(gguf: Gguf, vocab: int, tied: bool, dtype: str) -> dict:
    hidden, heads = gguf.get("llama.embedding_length"), gguf.get("llama.attention.head_count")
    rotated = gguf.get("llama.rope.dimension_count", hidden // heads)
    head_dim = gguf.get("llama.attention.key_length", rotated)
    if rotated != head_dim:
        raise Refused(f"{rotated} of {head_dim} head dimensions are rotated, expected all")
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": vocab, "hidden_size": hidden, "head_dim": head_dim,
        "intermediate_size": gguf.get("llama.feed_forward_length"),
        "num_hidden_layers": gguf.get("llama.block_count"), "num_attention_heads": heads,
        "num_key_value_heads": gguf.get("llama.attention.head_count_kv", heads),
        "max_position_embeddings": gguf.get("llama.context_length"),
        "rms_norm_eps": gguf.real("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": gguf.real("llama.rope.freq_base", 10000.0), "rope_scaling": None,
        "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False,
        "tie_word_embeddings": tied, "initializer_range": round(hidden ** -0.5, 6),
        "pretraining_tp": 1, "use_cache": True, "torch_dtype": dtype, **token_ids(gguf),
    }


def token_ids(gguf: Gguf) -> dict[str, int]:
    found = {f"{ours}_token_id": gguf.get(f"tokenizer.ggml.{theirs}_token_id", None)
             for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    return {key: value for key, value in found.items() if value is not None}


def hf_name(name: str) -> str:
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in GLOBAL_NAMES:
        return f"{GLOBAL_NAMES[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    raise Refused(f"tensor {name} has no place in a LLaMA checkpoint")


def rotary_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes GGUF's row order in q and k.

    GGUF keeps the two rows that one rotation turns side by side (2i, 2i+1); Hugging Face keeps them
    half a head apart (i, i + head_dim/2).
    """
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def read_tensors(gguf: Gguf) -> dict[str, np.ndarray]:
    heads = gguf.get("llama.attention.head_count")
    kv_heads = gguf.get("llama.attention.head_count_kv", heads)
    tensors = {}
    for entry in gguf.reader.tensors:
        shape = [int(n) for n in reversed(entry.shape)]  # GGUF writes the innermost dimension first
        weight = dequantize(entry.data, entry.tensor_type).astype(np.float32).reshape(shape)
        if ".attn_q." in entry.name:
            weight = rotary_halves(weight, heads)
        elif ".attn_k." in entry.name:
            weight = rotary_halves(weight, kv_heads)
        if not np.isfinite(weight).all():
            raise Refused(f"tensor {entry.name} has values that are not finite")
        tensors[hf_name(entry.name)] = weight
    expected = 2 + 9 * gguf.get("llama.block_count") + ("lm_head.weight" in tensors)
    if len(tensors) != expected:
        raise Refused(f"{len(tensors)} tensors, expected {expected}")
    return tensors


def stored(weight: np.ndarray, code: str) -> np.ndarray:
    if code == "F32":
        return np.ascontiguousarray(weight, "<f4")
    bits = np.ascontiguousarray(weight, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")  # nearest, ties to even


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], code: str) -> None:
    """NumPy has no bfloat16, so the container is written here: header length, JSON header, data."""
    data = {name: stored(tensors[name], code) for name in sorted(tensors)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in data.items():
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in data.values():
            file.write(array.tobytes())


def build_tokenizer(gguf: Gguf) -> Tokenizer:
    tokens, types = gguf.get("tokenizer.ggml.tokens"), gguf.get("tokenizer.ggml.token_type")
    if (kind := gguf.get("tokenizer.ggml.model")) != "gpt2":
        raise Refused(f"tokenizer.ggml.model is {kind!r}, expected 'gpt2' (byte-level BPE)")
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in gguf.get("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))

    prefix = bool(gguf.get("tokenizer.ggml.add_space_prefix", False))
    bytes_split = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=True)
    split = gguf.get("tokenizer.ggml.pre", "default")
    if split in DIGIT_SPLITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_split])
    elif split in ("default", "gpt-2"):
        tokenizer.pre_tokenizer = bytes_split
    else:
        raise Refused(f"tokenizer.ggml.pre {split!r} is not known")
    tokenizer.decoder = decoders.ByteLevel()
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [AddedToken(t, special=special, normalized=False) for t, k in zip(tokens, types) if k == kind]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    if tokenizer.get_vocab_size() != len(tokens):
        raise Refused(f"{tokenizer.get_vocab_size()} distinct tokens, expected {len(tokens)}")
    return tokenizer


def tokenizer_files(gguf: Gguf, context: int) -> dict[str, dict]:
    """The contents of tokenizer_config.json and special_tokens_map.json."""
    tokens, types = gguf.get("tokenizer.ggml.tokens"), gguf.get("tokenizer.ggml.token_type")

    def described(token: str) -> dict:
        return {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}

    ids = token_ids(gguf) | {"unk_token_id": gguf.get("tokenizer.ggml.unknown_token_id", None)}
    named = {key.removesuffix("_id"): tokens[i] for key, i in ids.items() if i is not None}
    turns = [token for token in ("<|im_start|>", "<|im_end|>") if token in tokens]
    added = {str(i): described(token) | {"special": True}
             for i, (token, kind) in enumerate(zip(tokens, types)) if kind == CONTROL}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context,
              "add_prefix_space": bool(gguf.get("tokenizer.ggml.add_space_prefix", False)),
              "clean_up_tokenization_spaces": False, "added_tokens_decoder": added,
              "additional_special_tokens": turns, **named}
    if template := gguf.get("tokenizer.chat_template", None):
        config["chat_template"] = template
    special = {"additional_special_tokens": turns} | {key: described(token) for key, token in named.items()}
    return {"tokenizer_config.json": config, "special_tokens_map.json": special}


def convert(source: Path, out: Path, dtype: str) -> str:
    gguf = Gguf(source)
    tensors = read_tensors(gguf)
    vocab = len(tensors["model.embed_tokens.weight"])
    tied = "lm_head.weight" not in tensors
    tokenizer = build_tokenizer(gguf)
    if tokenizer.get_vocab_size() != vocab:
        raise Refused(f"{tokenizer.get_vocab_size()} tokens for {vocab} embedding rows")
    config = model_config(gguf, vocab, tied, dtype)
    files = {"config.json": config,
             "generation_config.json": {"_from_model_config": True, **token_ids(gguf)},
             **tokenizer_files(gguf, config["max_position_embeddings"])}

    partial = out.with_name(f".{out.name}.partial.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        write_safetensors(partial / "model.safetensors", tensors, DTYPES[dtype])
        tokenizer.save(str(partial / "tokenizer.json"))
        for name, content in files.items():
            (partial / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    count = sum(weight.size for weight in tensors.values())
    return f"{out}: {len(tensors)} tensors, {count:,} parameters in {dtype}, {vocab} tokens"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("out", type=Path, help="folder to make; must not exist or be empty")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        print(f"gguf_to_hf: {args.out} exists and is not empty (hint: remove it)", file=sys.stderr)
        return 3
    try:
        print(convert(args.gguf, args.out, args.dtype))
    except (Refused, OSError, ValueError) as error:
        print(f"gguf_to_hf: {args.gguf}: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
