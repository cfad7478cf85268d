#!/usr/bin/env python3
"""Writes the tasks of the conflict suite: rows, tasks.toml, and tasks.dev.toml with rows to tune on.

    conflict_tasks.py --out DIR [--seed 1]

- forward, backward: the same prompts, told apart by a tag; one wants the words in the order given,
  the other in reverse;
- noisy: 30 % of the training rows name a wrong choice; the rows that are scored do not;
- long: rows of about ten times as many words as those of the other tasks;
- large, small: 4000 and 40 training rows.

For large, noisy and small the scored rows are those of the interference suite, which its base has
not seen. Standard library only; the same seed gives the same bytes.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fixtures"))
import make_tasks as suite

EVAL_ROWS, DEV_ROWS = 200, 200
NOISE = 0.3
FACTS = 18


def tagged(tag, words):
    """The words in their order after the tag A, in reverse after B."""
    shown = words if tag == "A" else words[::-1]
    return suite.row(f"{tag} give {' and '.join(words)}", " - ".join(shown))


def triples(rng, count):
    """Different triples of words."""
    found = {}
    while len(found) < count:
        found[tuple(rng.sample(suite.NOUNS, 3))] = True
    return [list(triple) for triple in found]


def long(rng):
    """Facts over many turns; the answer repeats the one that is asked for."""
    told = []
    for noun in rng.sample(suite.NOUNS, FACTS):
        name, food = rng.choice(suite.NAMES), rng.choice(suite.FOODS)
        told.append(rng.choice([(f"{noun} is called {name}", f"what is my {noun} called ?"),
                                (f"{noun} likes {food}", f"what does my {noun} like ?")]))
    fact, question = rng.choice(told)
    turns = [text for told_fact, _ in told for text in (f"my {told_fact}", "ok")]
    return suite.row(*turns, question, f"your {fact}")


def mislabelled(made, rng):
    """The row with another choice than the right one."""
    wrong = rng.choice([i for i in range(len(made["choices"])) if i != made["answer"]])
    return suite.choice_row(made["messages"][0]["content"], made["choices"], wrong)


def split(maker, rows, rng):
    """Rows to score, to tune on and to train on, with different prompts."""
    seen = set()
    return [suite.distinct_rows(maker, count, rng, seen) for count in (EVAL_ROWS, DEV_ROWS, rows)]


def as_in_the_suite(name, maker, rows, rng):
    """The interference suite's rows to score and to tune on, which its base has not seen, and other
    rows to train on."""
    own, seen = random.Random(f"1:suite:{name}"), set()
    scored = [suite.distinct_rows(maker, count, own, seen) for count in (suite.SUITE_EVAL_ROWS, suite.SUITE_DEV_ROWS)]
    return [*scored, suite.distinct_rows(maker, rows, rng, seen)]


def tasks(seed):
    """Name, kind, metric, new tokens, longest row; rows to score, to tune on, to train on."""
    def rng(what):
        return random.Random(f"{seed}:conflict:{what}")

    words = triples(rng("words"), EVAL_ROWS + DEV_ROWS + 800)
    cuts = [words[:EVAL_ROWS], words[EVAL_ROWS:EVAL_ROWS + DEV_ROWS], words[EVAL_ROWS + DEV_ROWS:]]
    for name, tag in (("forward", "A"), ("backward", "B")):
        yield name, "tag", "exact-match", 8, 96, [[tagged(tag, triple) for triple in cut] for cut in cuts]
    noise = rng("noise")
    *scored, train = as_in_the_suite("logic", suite.logic, 800, rng("noisy"))
    wrong = set(noise.sample(range(len(train)), round(NOISE * len(train))))
    train = [mislabelled(made, noise) if i in wrong else made for i, made in enumerate(train)]
    yield "noisy", "reasoning", "choice", 2, 96, [*scored, train]
    yield "long", "dialogue", "exact-match", 8, 256, split(long, 200, rng("long"))
    yield "large", "reasoning", "exact-match", 8, 96, as_in_the_suite("arithmetic", suite.arithmetic, 4000, rng("large"))
    yield "small", "instruction", "exact-match", 8, 96, as_in_the_suite("format", suite.format_, 40, rng("small"))


def write(path, text):
    """Files that are right already keep their times."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the rows and the two task lists")
    parser.add_argument("--seed", type=int, default=1, help="another seed gives other rows (default 1)")
    args = parser.parse_args()
    lists = {"eval": [], "dev": []}
    for name, kind, metric, new_tokens, longest, rows in tasks(args.seed):
        for file, made in zip(("eval", "dev", "train"), rows):
            write(args.out / name / f"{file}.jsonl", "".join(json.dumps(row) + "\n" for row in made))
        for file, entries in lists.items():
            entries.append(f'[[task]]\nname = "{name}"\ntrain = "{name}/train.jsonl"\neval = "{name}/{file}.jsonl"\n'
                           f'format = "messages"\nmetric = "{metric}"\nkind = "{kind}"\n'
                           f"max_new_tokens = {new_tokens}\nmax_length = {longest}\n")
    for file, entries in (("tasks.toml", lists["eval"]), ("tasks.dev.toml", lists["dev"])):
        write(args.out / file, "\n".join(entries))


if __name__ == "__main__":
    main()
