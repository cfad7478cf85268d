"""A pair of checkpoints at the shapes of real models, the same bytes every time: base ~ N(0, 0.02),
tuned = base + a small step.

    python3 checkpoints.py 1.1b FOLDER        needs numpy

Values come from one block of random numbers, read from another place for every piece, so that 7 B
parameters take minutes.
"""

import json
import os
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SIZES = {
    "tiny": dict(layers=2, hidden=256, inner=704, heads=8, kv=2, vocab=2000, shards=2),
    "1.1b": dict(layers=22, hidden=2048, inner=5632, heads=32, kv=4, vocab=32000, shards=2),
    "3b": dict(layers=23, hidden=3200, inner=8640, heads=32, kv=32, vocab=32000, shards=2),
    "7b": dict(layers=32, hidden=4096, inner=11008, heads=32, kv=32, vocab=32000, shards=3),
}
# One layer of each, for methods that take minutes with all of them.
SIZES |= {f"{name}-layer": size | dict(layers=1, vocab=2000, shards=1) for name, size in SIZES.items()}
PIECE = 1 << 21
POOL = 1 << 24
SCALE = 0.02
# A short fine-tune with AdamW moves a weight by about its learning rate times a root of the number
# of steps.
STEP = 1e-4


def shapes(layers, hidden, inner, heads, kv, vocab, **_):
    narrow = hidden // heads * kv
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(layers):
        for name, shape in [
            ("input_layernorm", (hidden,)),
            ("mlp.down_proj", (hidden, inner)),
            ("mlp.gate_proj", (inner, hidden)),
            ("mlp.up_proj", (inner, hidden)),
            ("post_attention_layernorm", (hidden,)),
            ("self_attn.k_proj", (narrow, hidden)),
            ("self_attn.o_proj", (hidden, hidden)),
            ("self_attn.q_proj", (hidden, hidden)),
            ("self_attn.v_proj", (narrow, hidden)),
        ]:
            yield f"model.layers.{i}.{name}.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def parameters(size):
    return sum(int(np.prod(shape)) for _, shape in shapes(**SIZES[size]))


def to_bf16(values):
    """Rounds f32 to bf16, ties to even."""
    bits = values.view(np.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits >> 16).astype(np.uint16)


def from_bf16(halves):
    return (halves.astype(np.uint32) << 16).view(np.float32)


class Pool:
    """Standard normal numbers; a piece is a run of them from a place that its number decides."""

    def __init__(self):
        numbers = np.random.Generator(np.random.PCG64(20250821))
        self.values = numbers.standard_normal(POOL + PIECE, dtype=np.float32)

    def run(self, piece, stream, count):
        at = (piece * 2_654_435_761 + stream * 40_503_001) % POOL
        return self.values[at : at + count]


def split(tensors, shards):
    total = sum(2 * int(np.prod(shape)) for _, shape in tensors)
    parts, filled = [[]], 0
    for name, shape in tensors:
        size = 2 * int(np.prod(shape))
        if filled and filled + size > -(-total // shards) and len(parts) < shards:
            parts.append([])
            filled = 0
        parts[-1].append((name, shape))
        filled += size
    return parts, total


def create(path, tensors):
    """Writes the header; returns the open file and where each tensor begins."""
    header, at, starts = {"__metadata__": {"format": "pt"}}, 0, []
    for name, shape in tensors:
        end = at + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        starts.append(at)
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    os.truncate(file, 8 + len(text) + at)
    os.pwrite(file, struct.pack("<Q", len(text)) + text, 0)
    return file, [8 + len(text) + start for start in starts]


def fill(pool, number, files, start, count, is_norm):
    """One piece of one tensor in the checkpoints."""
    values = pool.run(number, 0, count) * np.float32(SCALE)
    if is_norm:
        values += 1
    base = to_bf16(values)
    tuned = to_bf16(from_bf16(base) + pool.run(number, 1, count) * np.float32(STEP))
    for file, halves in zip(files, (base, tuned)):
        os.pwrite(file, halves.tobytes(), start)


def side_files(folder, size):
    model = SIZES[size]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": model["hidden"],
        "intermediate_size": model["inner"], "num_hidden_layers": model["layers"], "num_attention_heads": model["heads"],
        "num_key_value_heads": model["kv"], "vocab_size": model["vocab"], "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>"] + [chr(c) for c in range(33, 127)])}
    added = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for t, i in list(vocab.items())[:3]]
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
                 "pre_tokenizer": None, "post_processor": None, "decoder": None,
                 "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                           "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                           "merges": []}}
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for name, value in [("config.json", config), ("tokenizer.json", tokenizer), ("special_tokens_map.json", special),
                        ("tokenizer_config.json", special | {"tokenizer_class": "PreTrainedTokenizerFast"})]:
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")


def make(size, work, names=("base", "tuned")):
    """Writes work/base and work/tuned, or the first of them, unless they are there."""
    folders = [work / name for name in names]
    if all((folder / "complete").exists() for folder in folders):
        return
    parts, total = split(list(shapes(**SIZES[size])), SIZES[size]["shards"])
    pool, jobs, opened = Pool(), [], []
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    index = {"metadata": {"total_size": total}, "weight_map": {}}
    for i, part in enumerate(parts):
        name = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
        index["weight_map"].update({tensor: name for tensor, _ in part})
        created = [create(folder / name, part) for folder in folders]
        files, starts = [file for file, _ in created], created[0][1]
        opened += files
        for (tensor, shape), start in zip(part, starts):
            numel = int(np.prod(shape))
            for at in range(0, numel, PIECE):
                jobs.append((files, start + 2 * at, min(PIECE, numel - at), "norm" in tensor))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(lambda job: fill(pool, job[0], *job[1]), enumerate(jobs)))
    for file in opened:
        os.fsync(file)
        os.close(file)
    for folder in folders:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        side_files(folder, size)
        (folder / "complete").touch()


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
