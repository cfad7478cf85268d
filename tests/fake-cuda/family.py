"""Makes a model of a family out of one of fixtures/golden/models, with the tokenizer and the
vocabulary of the demo's model: its layers, and embeddings of zeros, since nothing is computed.

usage: family.py GOLDEN TOKENIZER OUT
"""
import json
import math
import shutil
import struct
import sys
from pathlib import Path

golden, tokenizer, out = map(Path, sys.argv[1:4])
out.mkdir(parents=True)
for file in tokenizer.glob("*token*.json"):
    shutil.copy(file, out)
vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
config = json.loads((golden / "config.json").read_text()) | {"vocab_size": vocabulary, "max_position_embeddings": 4096}
(out / "config.json").write_text(json.dumps(config, indent=1))

data = (golden / "model.safetensors").read_bytes()
(size,) = struct.unpack("<Q", data[:8])
header, data = json.loads(data[8 : 8 + size]), data[8 + size :]
tensors, end = [], 0
for name, entry in header.items():
    if name == "__metadata__":
        continue
    begin, stop = entry["data_offsets"]
    values = data[begin:stop]
    if "embed_tokens" in name or "lm_head" in name:
        entry["shape"][0] = vocabulary
        values = bytes(4 * math.prod(entry["shape"]))
    entry["data_offsets"] = [end, end + len(values)]
    end += len(values)
    tensors.append(values)
head = json.dumps(header).encode()
(out / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + b"".join(tensors))
