"""Writes a GGUF with f32 weights for llama.cpp: `llama_gguf.py SOURCE OUT`.

SOURCE is the GGUF of which scripts/smollm2/fetch.sh makes the checkpoint. Its tensors are
dequantised and rounded to bf16, as those of the checkpoint are, so that both have the same weights.
"""

import sys
from pathlib import Path

import gguf
import numpy as np


def rounded(values):
    """f32 values at the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def main():
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), kind, inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, rounded(values).reshape(values.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
