#!/usr/bin/env python3
"""Writes fixtures/golden/slerp.json: a float64 reference for spherical interpolation of flattened
tensors, its branches, the fold of several tasks with a core left out, and the N-way spherical mean.

Inputs are f32 values written exactly; sums go through math.fsum, so the file does not depend on a
BLAS.
"""
import argparse
import json
import math
from pathlib import Path

import numpy as np

COLLINEAR = 0.9995
OMEGAS = (0.0, 0.25, 0.5, 1.0)
SIZE = 40


def dot(a: np.ndarray, b: np.ndarray) -> float:
    return math.fsum(a * b)


def norm(a: np.ndarray) -> float:
    return math.sqrt(dot(a, a))


def cosine(a: np.ndarray, b: np.ndarray) -> float | None:
    """None where an angle is undefined because a vector is zero."""
    lengths = norm(a) * norm(b)
    return None if lengths == 0.0 else min(1.0, max(-1.0, dot(a, b) / lengths))


def branch_of(cos: float | None) -> str:
    if cos is None:
        return "zero"
    if cos > COLLINEAR:
        return "collinear"
    return "opposite" if cos < -COLLINEAR else "slerp"


def slerp(base: np.ndarray, task: np.ndarray, omega: float, where: np.ndarray | None = None) -> tuple[np.ndarray, str]:
    """Interpolates from base (omega 0) to task (omega 1); the angle is taken over `where` only."""
    cos = cosine(base, task) if where is None else cosine(base[where], task[where])
    branch = branch_of(cos)
    if branch != "slerp":
        return omega * task + (1.0 - omega) * base, branch
    angle = math.acos(cos)
    return (math.sin((1.0 - omega) * angle) * base + math.sin(omega * angle) * task) / math.sin(angle), branch


def fold(backbone: np.ndarray, tasks: list[np.ndarray], core: np.ndarray, origin: np.ndarray | None) -> dict:
    """Folds the tasks one after another with omega_i = 1/(i+1); in space delta all vectors are less
    `origin`."""
    shift = np.zeros_like(backbone) if origin is None else origin
    fused, branches, angles = backbone - shift, [], []
    for i, task in enumerate(tasks, start=1):
        cos = cosine(fused[~core], (task - shift)[~core])
        angles.append(None if cos is None else math.acos(cos))
        fused, branch = slerp(fused, task - shift, 1.0 / (i + 1), ~core)
        branches.append(branch)
    expected = fused + shift
    return {"branches": branches, "angles": angles,
            "expected": [None if c else float(x) for c, x in zip(core, expected)]}


def spherical_mean(vectors: list[np.ndarray], weights: list[float]) -> dict:
    """Karcher mean of the directions (fixed point of the log/exp maps), times the weighted mean
    norm."""
    units = [v / norm(v) for v in vectors]
    mean = sum(w * u for w, u in zip(weights, units))
    mean /= norm(mean)
    for iterations in range(1, 1001):
        step = np.zeros_like(mean)
        for weight, unit in zip(weights, units):
            cos = min(1.0, max(-1.0, dot(mean, unit)))
            tangent = unit - cos * mean
            length = norm(tangent)
            if length > 0.0:
                step += weight * math.atan2(length, cos) / length * tangent
        size = norm(step)
        if size < 1e-15:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * step
        mean /= norm(mean)
    scale = math.fsum(w * norm(v) for w, v in zip(weights, vectors))
    return {"iterations": iterations, "scale": scale, "expected": (scale * mean).tolist()}


def f32(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).astype(np.float64)


def at_cosine(a: np.ndarray, noise: np.ndarray, cos: float, scale: float) -> np.ndarray:
    """A vector that has the given cosine with a."""
    unit = a / norm(a)
    across = noise - dot(noise, unit) * unit
    return scale * (cos * unit + math.sqrt(1.0 - cos * cos) * across / norm(across))


def pair_cases(rng: np.random.Generator) -> list[dict]:
    a, noise = f32(rng.standard_normal(SIZE)), rng.standard_normal(SIZE)
    zero = np.zeros(SIZE)
    pairs = {
        "independent": (a, f32(noise)),
        "acute": (a, f32(at_cosine(a, noise, 0.8, 3.0))),
        "obtuse": (a, f32(at_cosine(a, noise, -0.6, 0.5))),
        "just_slerp": (a, f32(at_cosine(a, noise, 0.9994, 5.0))),
        "just_collinear": (a, f32(at_cosine(a, noise, 0.9996, 5.0))),
        "fine_tuned": (a, f32(a + 1e-4 * noise)),
        "same": (a, a),
        "just_not_opposite": (a, f32(at_cosine(a, noise, -0.9994, 5.0))),
        "just_opposite": (a, f32(at_cosine(a, noise, -0.9996, 5.0))),
        "negated": (a, -a),
        "zero_base": (zero, a),
        "zero_task": (a, zero),
        "both_zero": (zero, zero),
        "small_and_large": (f32(1e-12 * a), f32(1e12 * noise)),
    }
    cases = []
    for name, (base, task) in pairs.items():
        results = [{"omega": omega, "expected": slerp(base, task, omega)[0].tolist()} for omega in OMEGAS]
        cases.append({"name": name, "base": base.tolist(), "task": task.tolist(), "cos": cosine(base, task),
                      "branch": branch_of(cosine(base, task)), "results": results})
    return cases


def fold_cases(rng: np.random.Generator) -> list[dict]:
    origin = f32(rng.standard_normal(SIZE))
    core = rng.random(SIZE) < 0.2
    wide = [f32(rng.standard_normal(SIZE)) for _ in range(4)]
    # Elements of the core are moved far, so that an angle taken over them as well gives other
    # numbers.
    near = [f32(origin + 0.01 * rng.standard_normal(SIZE) + np.where(core, 5.0 * (k + 1), 0.0)) for k in range(4)]
    cases = []
    for name, (backbone, *tasks) in {"wide": wide, "near": near, "backbone_is_base": [origin, *near[1:]]}.items():
        for space, shift in (("weights", None), ("delta", origin)):
            cases.append({"name": name, "space": space, "base": origin.tolist(), "backbone": backbone.tolist(),
                          "tasks": [t.tolist() for t in tasks], "core": core.tolist(),
                          "omegas": [1.0 / (i + 1) for i in range(1, len(tasks) + 1)],
                          **fold(backbone, tasks, core, shift)})
    return cases


def mean_cases(rng: np.random.Generator) -> list[dict]:
    common = rng.standard_normal(SIZE)
    spread = [f32(scale * (common + rng.standard_normal(SIZE))) for scale in (1.0, 2.0, 0.5)]
    tight = [f32(common + 1e-3 * rng.standard_normal(SIZE)) for _ in range(3)]
    cases = []
    for name, vectors, weights in (("spread", spread, [1 / 3] * 3), ("tight", tight, [1 / 3] * 3),
                                   ("weighted", spread, [0.5, 0.3, 0.2])):
        cases.append({"name": name, "vectors": [v.tolist() for v in vectors], "weights": weights,
                      **spherical_mean(vectors, weights)})
    return cases


def main() -> None:
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=root / "fixtures/golden/slerp.json")
    out = parser.parse_args().out
    rng = np.random.default_rng(20250821)
    golden = {"threshold": COLLINEAR, "pairs": pair_cases(rng), "folds": fold_cases(rng),
              "spherical_means": mean_cases(rng)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(golden, indent=1) + "\n")
    for case in golden["pairs"]:
        print(f"pair {case['name']}: cos {case['cos']}, {case['branch']}")
    for case in golden["folds"]:
        print(f"fold {case['name']}, {case['space']}: {case['branches']}")
    for case in golden["spherical_means"]:
        print(f"spherical mean {case['name']}: {case['iterations']} iterations")


if __name__ == "__main__":
    main()
