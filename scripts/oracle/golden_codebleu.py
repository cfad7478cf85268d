#!/usr/bin/env python3
"""Writes fixtures/golden/codebleu.json: our pairs of codebleu_cases.py with the figures of the PyPI
package codebleu.

Run in the environment of codebleu.sh. The package's figure may hang on Python's hash seed, so every
pair is scored under several, and those that vary are left out and named."""
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

from codebleu import calc_codebleu

from codebleu_cases import pairs

SEEDS = range(8)
NAMES = {
    "ngram": "ngram_match_score",
    "weighted": "weighted_ngram_match_score",
    "syntax": "syntax_match_score",
    "dataflow": "dataflow_match_score",
    "codebleu": "codebleu",
}


def figures():
    logging.disable()
    for lang, name, reference, prediction in pairs():
        score = calc_codebleu([reference], [prediction], lang)
        yield {"lang": lang, "name": name, "reference": reference, "prediction": prediction} | {
            ours: float(score[theirs]) for ours, theirs in NAMES.items()
        }


def main():
    if len(sys.argv) > 1:
        return print(json.dumps(list(figures())))
    runs = []
    for seed in SEEDS:
        command = [sys.executable, __file__, "figures"]
        env = os.environ | {"PYTHONHASHSEED": str(seed)}
        runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, env=env).stdout))
    kept = [rows[0] for rows in zip(*runs) if all(row == rows[0] for row in rows)]
    left_out = [f"{row['lang']}: {row['name']}" for row in runs[0] if row not in kept]
    out = Path(__file__).parents[2] / "fixtures/golden/codebleu.json"
    out.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in kept) + "\n]\n", encoding="utf-8")
    print(f"{out.name}: {len(kept)} pairs, the same under {len(runs)} hash seeds; left out: {'; '.join(left_out) or 'none'}")


main()
