#!/usr/bin/env python3
"""Writes fixtures/golden/schedules.json: the learning rate of every step by transformers'
get_scheduler, for each schedule that --lr-scheduler names, with and without warm-up and with the
parameters of warmup_stable_decay and cosine_with_min_lr."""
import json
from pathlib import Path

import torch
from transformers import get_scheduler

OUT = Path(__file__).resolve().parents[2] / "fixtures/golden/schedules.json"
LENGTHS = [(0, 1), (0, 7), (1, 7), (3, 20), (19, 20), (30, 1000)]
STABLE = [
    {"num_decay_steps": 4},
    {"num_decay_steps": 5, "min_lr_ratio": 0.1},
    {"num_decay_steps": 6, "warmup_type": "cosine", "decay_type": "linear"},
    {"num_decay_steps": 6, "warmup_type": "1-sqrt", "decay_type": "1-sqrt", "min_lr_ratio": 0.25},
    {"num_decay_steps": 1, "warmup_type": "linear", "decay_type": "cosine"},
]


def rates(name, peak, warmup, total, more):
    """The rates of steps 0 to total - 1, as a training loop sees them."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=more)
    found = []
    for _ in range(total):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def cases():
    for name in ["cosine", "linear", "constant_with_warmup"]:
        for warmup, total in LENGTHS:
            yield name, 2e-5, warmup, total, {}
    yield "constant", 3e-4, 0, 7, {}
    for warmup, total in LENGTHS[2:]:
        yield "cosine_with_min_lr", 1e-3, warmup, total, {"min_lr_rate": 0.1}
    for more in STABLE:
        for warmup, total in [(0, 12), (3, 20), (14, 20)]:
            if warmup + more["num_decay_steps"] <= total:
                yield "warmup_stable_decay", 2e-5, warmup, total, more


def main():
    found = []
    for name, peak, warmup, total, more in cases():
        lrs = rates(name, peak, warmup, total, dict(more))
        found.append({"name": name, "peak": peak, "warmup_steps": warmup, "steps": total, "parameters": more, "lrs": lrs})
    lines = ",\n".join(json.dumps(case) for case in found)
    OUT.write_text(f"[\n{lines}\n]\n")


main()
