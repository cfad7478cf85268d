#!/usr/bin/env python3
"""Writes fixtures/golden/merge: tiny checkpoints (f32), recipes, and what mergekit 0.1.5 makes of
them (bf16).

    scripts/oracle/mergekit.sh && .cache/mergekit-venv/bin/python scripts/oracle/golden_mergekit.py
"""
import os
import shutil
import tempfile
from pathlib import Path

import torch

from check_mergekit import not_decided
from mergekit_cases import RECIPES, load, make_models, recipe, run_mergekit, save_file

SIZES = (8, 12, 17, 3)
OUT = Path(__file__).resolve().parents[2] / "fixtures/golden/merge"


def main() -> None:
    torch.set_num_threads(1)
    shutil.rmtree(OUT, ignore_errors=True)
    make_models(OUT, torch.float32, SIZES, seed=1)
    os.chdir(OUT)
    for name in RECIPES:
        text = recipe(name, SIZES[3])
        Path(f"{name}.yml").write_text(text)
        with tempfile.TemporaryDirectory() as out:
            run_mergekit(text, Path(out))
            tensors = load(Path(out))
        assert all(not_decided(text, n, SIZES[3], fusion_doubt=0.0003) is None for n in tensors), f"{name}: take another seed"
        save_file(dict(sorted(tensors.items())), f"{name}.safetensors")
    print(f"{OUT}: {sum(f.stat().st_size for f in OUT.rglob('*') if f.is_file())} bytes")


if __name__ == "__main__":
    main()
