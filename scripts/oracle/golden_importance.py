#!/usr/bin/env python3
"""Writes fixtures/golden/importance.json: moving averages of squared gradients, divided by their
layer's mean, and the elements on top, as NumPy finds them; for cpift-torch's dynamic isolation.
Values repeat, so that ties at the threshold occur."""
import json
from pathlib import Path

import numpy as np

SHAPES = {"model.embed_tokens.weight": (6, 4), "model.layers.0.mlp.up_proj.weight": (5, 4), "model.layers.0.input_layernorm.weight": (4,),
          "model.layers.1.mlp.up_proj.weight": (5, 4), "model.norm.weight": (4,)}
DECAY, UPDATES, PERCENTS = 0.8, 4, [0.5, 5, 12.5, 40, 100]


def layer(name):
    return ".".join(name.split(".")[:3]) if ".layers." in name else None


def top(averages, percent):
    groups = {}
    for name, value in averages.items():
        groups.setdefault(layer(name), []).append(value.ravel())
    means = {key: np.concatenate(parts).astype(np.float64).mean() for key, parts in groups.items()}
    names = sorted(averages)
    scores = np.concatenate([(averages[n].ravel() / np.float32(means[layer(n)])).astype(np.float32) for n in names])
    count = int(np.floor(percent * len(scores) / 100))
    # A stable sort: of equal scores the earlier position first.
    chosen, found, start = np.sort(np.argsort(-scores, kind="stable")[:count]), {}, 0
    for n in names:
        end = start + averages[n].size
        own = chosen[(chosen >= start) & (chosen < end)] - start
        if len(own):
            found[n] = own.tolist()
        start = end
    return found


def main():
    rng = np.random.default_rng(3)
    gradients, averages = [], {}
    for step in range(UPDATES):
        grads = {n: rng.choice([-2, -1, -0.5, 0, 0.25, 1, 3], size=s).astype(np.float32) for n, s in SHAPES.items()}
        # One layer's gradients are of another size, which the normalisation takes away.
        grads = {n: g * np.float32(64 if ".layers.1." in n else 1) for n, g in grads.items()}
        gradients.append({n: g.ravel().tolist() for n, g in grads.items()})
        for n, g in grads.items():
            old = np.float32(0 if step == 0 else DECAY)
            averages[n] = (averages.get(n, np.zeros_like(g)) * old + g * g * (np.float32(1) - old)).astype(np.float32)
    report = {"decay": DECAY, "shapes": SHAPES, "gradients": gradients, "top": {str(p): top(averages, p) for p in PERCENTS}}
    out = Path(__file__).resolve().parents[2] / "fixtures/golden/importance.json"
    out.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
