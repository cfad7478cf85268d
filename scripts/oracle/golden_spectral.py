#!/usr/bin/env python3
"""Writes fixtures/golden/spectral: TSV-M, Iso-C and WUDI of the checkpoints in fixtures/golden/merge, by NumPy in float64.

    scripts/oracle/setup.sh VENV && VENV/bin/python scripts/oracle/golden_spectral.py

The first two follow the programs of the papers' authors: TSV-M (arXiv 2412.00081) keeps the share 1/k of each task
vector's singular vectors and replaces the joined vectors by the nearest orthogonal ones; Iso-C (arXiv 2502.04959) sums the
task vectors and sets all singular values to their mean. WUDI (arXiv 2503.08099) minimizes sum |(T - d) d'|^2 / |d|^2 by
steps of Adam from the sum of the task vectors d; here each row of T is the solution of a least-squares problem. Tensors
that are not matrices get the mean of the task vectors.
"""
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures/golden"
TASKS = ("a", "b", "c")


def polar(matrix: np.ndarray) -> np.ndarray:
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


def tsv_m(deltas: list[np.ndarray]) -> np.ndarray:
    kept = int(min(deltas[0].shape) * (1 / len(deltas)))
    parts = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
    left = polar(np.hstack([u[:, :kept] for u, _, _ in parts]))
    right = polar(np.vstack([v[:kept] for _, _, v in parts]))
    return left @ np.diag(np.concatenate([s[:kept] for _, s, _ in parts])) @ right


def iso_c(deltas: list[np.ndarray]) -> np.ndarray:
    left, values, right = np.linalg.svd(sum(deltas), full_matrices=False)
    return values.mean() * (left @ right)


def wudi(deltas: list[np.ndarray]) -> np.ndarray:
    start = sum(deltas)
    factors = np.vstack([delta / np.linalg.norm(delta) for delta in deltas])
    wanted = np.hstack([(delta - start) @ delta.T / np.linalg.norm(delta) for delta in deltas])
    # The row x of the change with the least |factors x - wanted|, and of those the shortest.
    return start + np.linalg.lstsq(factors, wanted.T, rcond=1e-5)[0].T


def main() -> None:
    models = {name: load_file(FIXTURES / "merge" / name / "model.safetensors") for name in ("base", *TASKS)}
    (FIXTURES / "spectral").mkdir(exist_ok=True)
    for name, merge in (("tsv_m", tsv_m), ("iso_c", iso_c), ("wudi", wudi)):
        merged = {}
        for tensor, base in models["base"].items():
            deltas = [models[task][tensor].astype(np.float64) - base for task in TASKS]
            change = merge(deltas) if base.ndim == 2 else sum(deltas) / len(deltas)
            merged[tensor] = (base + change).astype(np.float32)
        save_file(merged, FIXTURES / "spectral" / f"{name}.safetensors")


if __name__ == "__main__":
    main()
