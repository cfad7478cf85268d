#!/usr/bin/env python3
"""Tries what mergekit 0.1.5 lets pass in silence, in mergekit and in cpift-merge, and prints what
each did.

    scripts/oracle/mergekit.sh
    .cache/mergekit-venv/bin/python scripts/oracle/mergekit_silent.py target/release/cpift-merge

Exits 1 where cpift-merge does anything but refuse the case or what EXPECTED says of it.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from mergekit_cases import load, make_models, save

SIZES = (8, 12, 17, 2)
HEAD = "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n  - {model: b, parameters: {weight: 1}}\n"
F32 = "dtype: float32\n"


class Case:
    """A recipe for a folder of its own that `prepare` has altered. `expected` is part of what is
    printed of ours; by default an error, exit code 3."""

    def __init__(self, name, text=HEAD + F32, prepare=None, expected="exit 3"):
        self.name, self.text, self.prepare, self.expected = name, text, prepare, expected


def edit(model: str, change) -> None:
    """Rewrites a model: `change` gets its tensors and its config.json to alter."""
    tensors, settings = load(Path(model)), json.loads(Path(model, "config.json").read_text())
    change(tensors, settings)
    save(Path(model), tensors, settings)


def put(value: float):
    def change(tensors, _):
        tensors["model.norm.weight"][3] = value
    return lambda: edit("b", change)


def extra():
    edit("b", lambda tensors, _: tensors.update({"model.layers.0.mlp.extra.weight": torch.ones(4)}))


def missing():
    edit("b", lambda tensors, _: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def shape():
    edit("b", lambda tensors, _: tensors.update({"model.norm.weight": torch.ones(1)}))


def vocabulary():
    def change(tensors, settings):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
        settings["vocab_size"] += 1
    edit("b", change)


def mixed():
    def change(tensors, settings):
        for name in tensors:
            tensors[name] = tensors[name].bfloat16()
        settings["torch_dtype"] = "bfloat16"
    edit("a", change)


def tied():
    def change(tensors, settings):
        tensors.pop("lm_head.weight")
        settings["tie_word_embeddings"] = True
    edit("a", change)


def stale():
    for who in ("ours", "mergekit"):
        Path(f"out-{who}").mkdir(exist_ok=True)
        for i in (1, 2):
            Path(f"out-{who}/model-0000{i}-of-00007.safetensors").write_text("stale")
        Path(f"out-{who}/model.safetensors.index.json").write_text('{"weight_map": {}}')


def tokenizer_elsewhere():
    Path("b/tokenizer.json").write_text('{"model": {"vocab": {}}}')


def tokenizer_broken():
    Path("a/tokenizer_config.json").write_text("{}")


SLERP = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: VALUE}\n" + F32
TIES = "merge_method: ties\nbase_model: base\nmodels: [{model: a, parameters: {PARAMETERS}}]\n" + F32
CRUMBS = TIES.replace("ties", "breadcrumbs")
SCE = "merge_method: sce\nbase_model: base\nmodels: [{model: a}, {model: b}]\nparameters: {select_topk: TOP}\n" + F32
CASES = [
    Case("misspelled key of a model", TIES.replace("PARAMETERS", "weight: 1, densty: 0.5")),
    Case("misspelled key of the recipe", HEAD + F32 + "tokenizer_sorce: base\n"),
    Case("misspelled parameter of the recipe", HEAD + F32 + "parameters: {normalise: false}\n"),
    Case("misspelled key of a filter", SLERP.replace("VALUE", "[{fliter: mlp, value: 1}, {value: 0}]")),
    Case("filter that fits no tensor", SLERP.replace("VALUE", "[{filter: mpl, value: 1}, {value: 0}]"), expected="fits no tensor"),
    Case("key written twice", HEAD + "dtype: bfloat16\ndtype: float32\n"),
    Case("parameter of another method", HEAD.replace("weight: 1}", "weight: 1, density: 0.5}", 1) + F32, expected="has no effect"),
    Case("parameter of the merge under a model", TIES.replace("PARAMETERS", "weight: 1, normalize: false"), expected="has no effect"),
    Case("misspelled parameter of a method", CRUMBS.replace("PARAMETERS", "weight: 1, density: 0.9, gama: 0.05")),
    Case("select_topk above 1", SCE.replace("TOP", "15")),
    Case("t above 1", SLERP.replace("VALUE", "1.5")),
    Case("t below 0", SLERP.replace("VALUE", "[0.5, -0.5]")),
    Case("t is NaN", SLERP.replace("VALUE", ".nan")),
    Case("density above 1", TIES.replace("PARAMETERS", "weight: 1, density: 50")),
    Case("weights that sum to 0", HEAD.replace("weight: 1", "weight: -1", 1) + F32, expected="sum to 0"),
    Case("NaN in an input", prepare=put(float("nan"))),
    Case("Inf in an input", prepare=put(float("inf"))),
    Case("extra tensor", prepare=extra),
    Case("missing tensor", prepare=missing),
    Case("shape [1] for [8]", prepare=shape),
    Case("another vocabulary", prepare=vocabulary),
    Case("mixed dtypes, no dtype", HEAD, prepare=mixed),
    Case("mixed dtypes, with dtype", prepare=mixed, expected="config says float32, tensors F32"),
    Case("tied in one, untied in the other", prepare=tied),
    Case("stale shards and index in the output", prepare=stale, expected="exists already"),
    Case("tokenizer only in the second model", prepare=tokenizer_elsewhere),
    Case("tokenizer that cannot be read", prepare=tokenizer_broken, expected="none of the inputs has a tokenizer"),
    Case("out of range of out_dtype", HEAD.replace("weight: 1}", "weight: 1000000}", 1)
         + "parameters: {normalize: false}\nout_dtype: float16\n" + F32),
]


def effect(out: Path) -> str:
    """What is in an output folder, in few words."""
    if not out.exists():
        return "nothing written"
    files = sorted(f.name for f in out.iterdir())
    stale = [f for f in files if "of-00007" in f or (f.endswith("index.json") and "model.safetensors" in files)]
    if "config.json" not in files or not any(f.endswith(".safetensors") for f in files):
        return f"left behind: {', '.join(files)}"
    settings = json.loads((out / "config.json").read_text())
    try:
        tensors = load(out)
    except Exception as error:  # stale shards do not load
        return f"does not load ({type(error).__name__}); {len(stale)} stale files"
    dtypes = "/".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))
    short = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
    notes = [f"config says {settings.get('torch_dtype', settings.get('dtype'))}, tensors {short.get(dtypes, dtypes)}"]
    bad = sum(int((~torch.isfinite(t)).sum()) for t in tensors.values())
    notes += [f"{bad} NaN or Inf"] if bad else []
    notes += ["has an lm_head although tied"] if settings.get("tie_word_embeddings") and "lm_head.weight" in tensors else []
    notes += [f"{len(stale)} stale files"] if stale else []
    notes += [] if any(f.startswith("tokenizer") for f in files) else ["no tokenizer"]
    return "; ".join(notes)


def said(stderr: str, python: bool) -> str:
    """The line that matters: the error, else the warnings."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and "it/s" not in line]
    if python:
        return lines[-1][:150] if lines else ""
    errors = [line for line in lines if line.startswith("error:")]
    return " ".join(errors or [line for line in lines if line.startswith("warn")])[:200]


def run(command: list, out: Path, python: bool) -> tuple[str, str, str]:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRANSFORMERS_VERBOSITY": "error"})
    text = said(done.stderr, python) if done.returncode or not python else ""
    return f"exit {done.returncode}", text, effect(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="cpift-merge")
    program = parser.parse_args().program.resolve()
    mergekit = Path(sys.executable).with_name("mergekit-yaml")
    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        make_models(Path("models"), torch.float32, SIZES)
        for i, case in enumerate(CASES):
            shutil.copytree("models", f"case-{i}")
            os.chdir(f"case-{i}")
            if case.prepare:
                case.prepare()
            Path("recipe.yml").write_text(case.text)
            theirs = run([mergekit, "recipe.yml", "out-mergekit", "--no-write-model-card"], Path("out-mergekit"), True)
            mine = run([program, "recipe", "recipe.yml", "--out", "out-ours"], Path("out-ours"), False)
            print(f"\n{case.name}\n  mergekit: {'; '.join(filter(None, theirs))}\n  ours:     {'; '.join(filter(None, mine))}", flush=True)
            seen = " ".join(mine)
            left = mine[0] != "exit 0" and mine[2] != "nothing written" and case.prepare is not stale
            if case.expected not in seen or left:
                wrong.append(case.name)
                print("  WRONG: expected", case.expected)
            os.chdir("..")
        os.chdir("/")
    print(f"\n{len(CASES)} cases, {len(wrong)} not as expected{': ' if wrong else ''}{', '.join(wrong)}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
