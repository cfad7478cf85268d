"""Writes a few valid inputs of every target into corpus/TARGET: python3 seeds.py [FOLDER]. Standard library only."""

import json
import struct
import sys
from pathlib import Path

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "corpus")
DIGEST = "0" * 64


def compact(value):
    return json.dumps(value, separators=(",", ":")).encode()


def tensors(*rows, metadata=None):
    """A header whose tensors follow one another; a row is (name, dtype, bytes of an element, shape)."""
    header, at = ({"__metadata__": metadata} if metadata else {}), 0
    for name, dtype, size, shape in rows:
        end = at + size
        for n in shape:
            end = at + (end - at) * n
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    return compact(header), at


def whole(header, size):
    return struct.pack("<Q", len(header)) + header + bytes(size)


def put(target, name, data):
    folder = ROOT / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def headers():
    plain = tensors(("a", "F32", 4, [2, 3]), ("b", "BF16", 2, [4]), ("s", "F64", 8, []), metadata={"format": "pt"})
    every = tensors(*[(d.lower(), d, s, [2]) for d, s in [("F64", 8), ("I64", 8), ("U64", 8), ("F32", 4), ("I32", 4),
                    ("U32", 4), ("F16", 2), ("BF16", 2), ("I16", 2), ("U16", 2), ("I8", 1), ("U8", 1), ("BOOL", 1)]])
    empty = tensors(("e", "F32", 4, [0, 7]), ("w", "F8_E4M3", 1, [3]))
    for name, (header, size) in {"plain": plain, "every": every, "empty": empty}.items():
        put("header", name, whole(header, size))
        put("header", name + "-framed", b"h" + header)


def folders():
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    a, _ = tensors(("model.embed_tokens.weight", "F32", 4, [2, 3]), ("model.layers.0.mlp.up_proj.weight", "BF16", 2, [3, 2]))
    b, _ = tensors(("lm_head.weight", "F32", 4, [2, 3]), ("x.rotary_emb.inv_freq", "F32", 4, [2]), ("n", "I64", 8, [1]))
    index = {"metadata": {"total_size": 1}, "weight_map": {}}
    for header, file in [(a, first), (b, second)]:
        index["weight_map"].update({name: file for name in json.loads(header)})
    config = {"model_type": "llama", "tie_word_embeddings": True, "torch_dtype": "float32"}
    record = {"format_version": 1, "stage": "cpift-merge", "version": "0.1.0", "arguments": ["slerp"], "seed": 1,
              "inputs": {"base": {"path": "b", "digest": DIGEST}}, "facts": {"D": 1},
              "output": {"blake3": DIGEST, "files": [{"name": "config.json", "size": 1, "mtime_ns": 1}]},
              "host": "h", "started_unix": 1, "seconds": 0.5}
    parts = [compact(index), compact(config), compact(record), a, b]
    put("index", "two-shards", b"\0".join(parts))
    put("index", "no-record", b"\0".join(parts[:2] + [b""] + parts[3:]))


def masks():
    own = {"format_version": 1, "percent": 1.0, "scope": "global", "metric": "magnitude", "D": 20, "selected": 3,
           "ties": {"at_threshold": 2, "chosen": 1, "decided_by_position": 1}, "excluded": ["norms"], "base": DIGEST,
           "tuned": DIGEST, "numel": {"w": 20}}
    bits = bytes([0b101, 0, 0b1000])
    header, _ = tensors(("w", "U8", 1, [3]), metadata={"cpift": compact(own).decode()})
    put("mask", "own", b"m" + compact(own) + b"\0" + bits)
    put("mask", "framed", b"h" + header + b"\0" + bits)
    put("mask", "whole", whole(header, 0) + bits)
    layers = dict(own, scope="layer", numel={"model.layers.0.self_attn.q_proj.weight": 5, "model.norm.weight": 9},
                  selected=0)
    header, size = tensors(("model.layers.0.self_attn.q_proj.weight", "U8", 1, [1]), ("model.norm.weight", "U8", 1, [2]),
                           metadata={"cpift": compact(layers).decode()})
    put("mask", "layers", whole(header, size))


def groups():
    square = [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]]
    value = {"format_version": 1, "tau": 0.1, "tau_mode": "fixed", "tasks": ["a", "b", "c"], "jaccard": square,
             "chance": square, "excluded": ["embeddings"], "groups": [["c"], ["a", "b"]],
             "order": {"method": "overlap", "scores": [0.0, 1.0]}, "trivial": False, "base": DIGEST,
             "masks": {"a": DIGEST, "b": DIGEST, "c": DIGEST}}
    put("groups", "two", compact(value))
    put("groups", "random", json.dumps(dict(value, tau_mode="auto", order={"method": "random", "seed": 7})).encode())


headers()
folders()
masks()
groups()
