"""The peer of the methods by singular vectors: the definitions by NumPy's LAPACK in float64, tensor by tensor.

    python3 spectral_numpy.py tsv_m|iso_c|wudi BASE TUNED… OUT      needs numpy, torch, safetensors
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from mask_numpy import open_all

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "oracle"))
import golden_spectral  # noqa: E402


def main():
    method, base, *tuned, out = sys.argv[1:]
    merge, base, tuned = getattr(golden_spectral, method), open_all(base), [open_all(folder) for folder in tuned]
    merged = {}
    for name, start in base.items():
        start = start.double().numpy()
        deltas = [model[name].double().numpy() - start for model in tuned]
        change = merge(deltas) if start.ndim == 2 else sum(deltas) / len(deltas)
        merged[name] = torch.from_numpy(start + change).bfloat16()
    save_file(merged, out)


if __name__ == "__main__":
    main()
