#!/usr/bin/env python3
"""Compares cpift-codebleu with the PyPI package codebleu, component by component, to 1e-6.

    cargo build --release -p cpift-codebleu --example codebleu VENV/bin/python
    scripts/oracle/check_codebleu.py target/release/examples/codebleu [PAIRS.json] [--mutations N]
    [--seed S]

PAIRS.json is a list of objects with `lang`, `reference` and `prediction`. Beside it, or alone, go N
mutations of our own snippets: lines and characters are dropped, doubled, swapped and brought in
from other snippets. The package takes several sources of a variable in the order of a hash set;
here it is given sets that keep the order of the code, as cpift-codebleu has it."""
import argparse
import json
import logging
import random
import subprocess
import sys
from collections import Counter

import codebleu.dataflow_match
import codebleu.parser.DFG
from codebleu import calc_codebleu

from codebleu_cases import SNIPPETS, pairs

NAMES = {
    "ngram": "ngram_match_score",
    "weighted": "weighted_ngram_match_score",
    "syntax": "syntax_match_score",
    "dataflow": "dataflow_match_score",
    "codebleu": "codebleu",
}


class OrderedSet(dict):
    def __init__(self, items=()):
        super().__init__(dict.fromkeys(items))

    def add(self, item):
        self[item] = None


codebleu.dataflow_match.set = OrderedSet
codebleu.parser.DFG.set = OrderedSet


def mutated(rng, code, others):
    for _ in range(rng.randint(1, 4)):
        kind = rng.randrange(7)
        lines = code.split("\n")
        at = rng.randrange(len(lines))
        place = rng.randrange(len(code) + 1)
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(at, lines[rng.randrange(len(lines))])
        elif kind == 2:
            lines.insert(at, rng.choice(rng.choice(others).split("\n")))
        elif kind == 3:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        if kind < 4:
            code = "\n".join(lines)
        elif kind == 4:
            code = code[:place] + code[place + rng.randint(1, 3) :]
        elif kind == 5:
            code = code[:place] + rng.choice("()[]{}'\"\\#/*:;,=+-.!?@ \t\n\r\f\x1cé漢🎉x1_\u00a0") + code[place:]
        else:
            code = code[:place] + rng.choice(['"""', "'''", "/*", "*/", "//", "\\\n", "\r\n", "if", "else", "for", "0b'", "rb\""]) + code[place:]
    return code


def mutations(count, seed):
    rng = random.Random(seed)
    for _ in range(count):
        lang = rng.choice(list(SNIPPETS))
        snippets = list(SNIPPETS[lang].values())
        reference = rng.choice(snippets)
        if rng.random() < 0.5:
            reference = mutated(rng, reference, snippets)
        yield {"lang": lang, "reference": reference, "prediction": mutated(rng, rng.choice([reference, rng.choice(snippets)]), snippets)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("pairs", nargs="?")
    parser.add_argument("--mutations", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    logging.disable()
    if args.pairs:
        with open(args.pairs, encoding="utf-8") as file:
            rows = json.load(file)
    else:
        rows = [{"lang": l, "reference": r, "prediction": p} for l, _, r, p in pairs()]
    rows += mutations(args.mutations, args.seed)
    lines = "\n".join(json.dumps({k: row[k] for k in ("lang", "reference", "prediction")}) for row in rows)
    ours = subprocess.run([args.program], input=lines, check=True, capture_output=True, text=True).stdout.splitlines()
    worst, differing = Counter(), 0
    for row, line in zip(rows, map(json.loads, ours), strict=True):
        theirs = calc_codebleu([row["reference"]], [row["prediction"]], row["lang"])
        differences = {name: abs(line[name] - float(theirs[their])) for name, their in NAMES.items()}
        for name, difference in differences.items():
            worst[name] = max(worst[name], difference)
        if max(differences.values()) > 1e-6:
            differing += 1
            if differing <= 5:
                print(f"differs: {differences}\n{json.dumps(row, ensure_ascii=False)}")
    print(f"{len(rows)} pairs ({dict(Counter(row['lang'] for row in rows))}), {differing} differ; largest differences {dict(worst)}")
    sys.exit(differing > 0)


main()
