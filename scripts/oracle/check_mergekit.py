#!/usr/bin/env python3
"""Runs the same recipes through mergekit 0.1.5 and cpift-merge on tiny checkpoints and compares
every element.

    scripts/oracle/mergekit.sh && .cache/mergekit-venv/bin/python scripts/oracle/check_mergekit.py
    target/release/cpift-merge

Prints a table and exits 1 where an element differs by more than one bf16 ulp. Two kinds of elements
are counted and judged apart: of TIES, those whose magnitude equals the one at the trim cut-off,
because which of them stay is the sort's whim; and those whose terms cancel, where the result is
smaller than the rounding errors of mergekit's f32 arithmetic: there the difference must be below
CANCELLED f32 roundings of the largest input. DARE is compared by its statistics. Not judged are
merges that mergekit computes in bf16, and its spherical mean where it stops early, at its default
tol.
"""
import argparse
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

from mergekit_cases import DARE, MODELS, RECIPES, load, make_models, recipe, run_mergekit

SIZES = (67, 131, 211, 3)
# Rounding errors of f32, 2^-24 of the largest input, that a sum of a few terms may be off by.
CANCELLED = 4
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def ordered(t: torch.Tensor) -> torch.Tensor:
    """bf16 numbers as integers in their order, so that neighbours differ by 1."""
    bits = t.contiguous().view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def gradient(setting, layer: int | None, layers: int) -> float:
    values = setting if isinstance(setting, list) else [setting]
    at = 0 if layer is None else layer / (layers - 1) * (len(values) - 1)
    i = int(at)
    return values[i] + (at - i) * (values[min(i + 1, len(values) - 1)] - values[i])


def at_the_cut(text: str, name: str, layers: int) -> torch.Tensor | None:
    """Elements that a model's cut-off goes through in this tensor: as large as the smallest kept,
    some kept and some not."""
    config = yaml.safe_load(text)
    if config["merge_method"] != "ties":
        return None
    parts = name.split(".")
    layer = int(parts[2]) if parts[1] == "layers" else None
    base, tied = load(Path("base"))[name].float(), None
    for model in config["models"]:
        scopes = (model.get("parameters", {}), config.get("parameters", {}))
        density = gradient(next(s["density"] for s in scopes if "density" in s), layer, layers)
        size = (load(Path(model["model"]))[name].float() - base).abs()
        k = max(1, int(density * size.numel()))
        cut = size.flatten().sort(descending=True).values[k - 1]
        if density < 1 and int((size >= cut).sum()) > k:
            tied = (size == cut) | (tied if tied is not None else False)
    return tied


def ours(program: Path, text: str, out: Path) -> None:
    Path("recipe.yml").write_text(text)
    run = subprocess.run([program, "recipe", "recipe.yml", "--out", out, "--quiet"], capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{text}\ncpift-merge failed: {run.stderr}")


def compare(text: str, theirs: Path, mine: Path) -> dict[str, float]:
    """Elements in all, left out at a cut, different; those over one ulp, their distance in f32
    roundings, and the largest distance of the others in ulps."""
    a, b, inputs = load(theirs), load(mine), [load(Path(m)) for m in MODELS]
    assert a.keys() == b.keys(), f"tensors differ: {a.keys() ^ b.keys()}"
    found = dict(elements=0, cut=0, differ=0, cancelled=0, roundings=0.0, ulps=0)
    for name in a:
        assert a[name].dtype == b[name].dtype == torch.bfloat16, name
        distance = (ordered(a[name]) - ordered(b[name])).abs()
        tied = at_the_cut(text, name, SIZES[3])
        if tied is not None:
            found["cut"] += int(tied.sum())
            distance[tied] = 0
        largest = torch.stack([model[name].double().abs() for model in inputs]).amax(0)
        roundings = (a[name].double() - b[name].double()).abs() / largest.clamp(min=1e-300) * 2**24
        far = distance > 1
        cancelled = far & (roundings <= CANCELLED)
        found["elements"] += distance.numel()
        found["differ"] += int((distance > 0).sum())
        found["cancelled"] += int(cancelled.sum())
        if far.any():
            found["roundings"] = max(found["roundings"], float(roundings[far].max()))
        found["ulps"] = max(found["ulps"], int(distance[~cancelled].max()))
    return found


def elementwise(program: Path, scratch: Path) -> bool:
    columns = ("elements", "at a cut", "differ", "cancelled", "roundings", "ulps")
    print(f"{'recipe':27}{'inputs':8}{'dtype':9}" + "".join(f"{c:>10}" for c in columns))
    good = True
    for dtype_name in DTYPES:
        os.chdir(scratch / dtype_name)
        for name in RECIPES:
            for label, dtypes in (("float32", "dtype: float32\nout_dtype: bfloat16\n"), ("bfloat16", "dtype: bfloat16\n")):
                text = recipe(name, SIZES[3], dtypes)
                theirs, mine = (Path(f"{who}-{name}-{label}") for who in ("mergekit", "cpift"))
                run_mergekit(text, theirs)
                ours(program, text, mine)
                found = compare(text, theirs, mine)
                judged = label == "float32" and name != "karcher_stopped"
                wrong = judged and found["ulps"] > 1
                good &= not wrong
                note = "  WRONG" if wrong else "" if judged else "  not judged"
                numbers = "".join(f"{x:10.1f}" if isinstance(x, float) else f"{x:10}" for x in found.values())
                print(f"{name:27}{dtype_name:8}{label:9}{numbers}{note}", flush=True)
    return good


def sigmas(found: float, expected: float, deviation: float) -> float:
    return abs(found - expected) / deviation if deviation > 0 else (0.0 if found == expected else math.inf)


def dare(program: Path, scratch: Path) -> bool:
    """One model: share kept, mean and L1 norm of what is added. Three: share of elements that
    change, both programs'."""
    os.chdir(scratch / "f32")
    base, tuned = load(Path("base")), load(Path("b"))
    print(f"\n{'DARE':20}{'program':10}{'share kept, sigmas':>20}{'sum of deltas, sigmas':>23}{'L1 / L1 before':>16}")
    good, dtypes = True, "dtype: float32\n"
    for method in ("dare_linear", "dare_ties"):
        for density in (0.1, 0.5, 0.9):
            one = DARE.replace("METHOD", method).replace("DENSITY", str(density)) + dtypes
            three = one.replace("MODELS", "[{model: a}, {model: b}, {model: c}]")
            one = one.replace("MODELS", "[{model: b}]")
            changed = {}
            for who, run in (("mergekit", run_mergekit), ("cpift", lambda text, out: ours(program, text, out))):
                out = Path(f"{who}-{method}-{density}")
                run(one, out)
                merged, share, total, l1 = load(out), 0.0, 0.0, []
                for name, b in base.items():
                    delta, moved = (tuned[name] - b).double(), (merged[name] - b).double()
                    real = delta != 0
                    n, kept = int(real.sum()), int((moved[real] != 0).sum())
                    share = max(share, sigmas(kept, n * density, math.sqrt(n * density * (1 - density))))
                    spread = math.sqrt(float((delta**2).sum()) * (1 - density) / density)
                    total = max(total, sigmas(float(moved.sum()), float(delta.sum()), spread))
                    l1.append(float(moved.abs().sum() / delta.abs().sum()))
                # The L1 norm is restored exactly but for the rounding of base + delta.
                fine = share < 5 and total < 5 and max(abs(x - 1) for x in l1) < 1e-3
                good &= fine
                label = f"{method} {density}"
                print(f"{label:20}{who:10}{share:20.2f}{total:23.2f}{min(l1):9.5f}-{max(l1):.5f}{'' if fine else '  WRONG'}")
                run(three, Path(f"{out}-three"))
                merged = load(Path(f"{out}-three"))
                changed[who] = [(int((merged[n] != b).sum()), b.numel()) for n, b in base.items()]
            worst = 0.0
            for (x, n), (y, _) in zip(changed["mergekit"], changed["cpift"]):
                p = (x + y) / (2 * n)
                worst = max(worst, sigmas(x / n, y / n, math.sqrt(2 * p * (1 - p) / n)))
            good &= worst < 5
            print(f"{label:20}{'both':10}three models: shares of elements changed at most {worst:.2f} sigmas apart")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="cpift-merge")
    program = parser.parse_args().program.resolve()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        for name, dtype in DTYPES.items():
            make_models(Path(scratch) / name, dtype, SIZES)
        good = elementwise(program, Path(scratch))
        good &= dare(program, Path(scratch))
        os.chdir("/")
    print("\nall within one bf16 ulp" if good else "\nNOT all within one bf16 ulp")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
