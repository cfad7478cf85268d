#!/usr/bin/env python3
"""Reads a folder of event files with TensorBoard's own reader and compares it with the run's
metrics.jsonl: every figure under its tag and step, and no step twice, also where a resumed run
wrote steps again. Needs `pip install tensorboard`."""
import argparse
import json
import struct
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FIGURES = ("loss", "lr", "grad_norm", "tokens_per_second")


def f32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def expected(metrics: Path) -> dict[str, list[float]]:
    """The figures of metrics.jsonl by tag, in the order of the run's steps."""
    curves: dict[str, list[float]] = {}
    for line in map(json.loads, metrics.read_text().splitlines()):
        if "eval_loss" in line:
            figures = {f"eval/{task}/loss": loss for task, loss in line["eval_loss"].items()}
        else:
            # Steps that were read together with later ones have no rate.
            figures = {f"train/{name}": line[name] for name in FIGURES if name in line}
        for tag, value in figures.items():
            curves.setdefault(tag, []).append(f32(value))
    return curves


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what --tensorboard named")
    parser.add_argument("metrics", type=Path, help="metrics.jsonl of the same run")
    args = parser.parse_args()
    reader = EventAccumulator(str(args.folder), size_guidance={"scalars": 0})
    reader.Reload()
    wanted, failed = expected(args.metrics), False
    tags = set(reader.Tags()["scalars"])
    for tag in sorted(tags | wanted.keys()):
        events = reader.Scalars(tag) if tag in tags else []
        steps, values = [e.step for e in events], [e.value for e in events]
        same = values == wanted.get(tag)
        rising = all(a < b for a, b in zip(steps, steps[1:]))
        failed |= not (same and rising)
        verdict = "as in metrics.jsonl" if same and rising else "DIFFERS"
        print(f"{tag}: {len(values)} values, steps {steps[:1]} to {steps[-1:]}: {verdict}")
    return 1 if failed or not tags else 0


if __name__ == "__main__":
    sys.exit(main())
