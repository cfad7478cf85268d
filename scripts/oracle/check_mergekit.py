#!/usr/bin/env python3
"""Runs the same recipes through mergekit 0.1.5 and cpift-merge on tiny checkpoints and compares
every element.

    scripts/oracle/mergekit.sh && .cache/mergekit-venv/bin/python scripts/oracle/check_mergekit.py
    target/release/cpift-merge

Prints a table and exits 1 where an element differs by more than one bf16 ulp. Two kinds of elements
are counted and judged apart: of TIES, those whose magnitude equals the one at the trim cut-off,
because which of them stay is the sort's whim; and those whose terms cancel, where the result is
smaller than the rounding errors of mergekit's f32 arithmetic: there the difference must be below
CANCELLED f32 roundings of the largest input. As at a TIES cut, elements at the cuts of Breadcrumbs,
SCE and Arcee Fusion are counted apart; those of the last within FUSION_DOUBT of the threshold,
because mergekit's divergences are differences of f32 sums. Where f32 and ours differ by more,
mergekit in f64 decides. DARE and DELLA are compared by their statistics. Not judged are merges that
mergekit computes in bf16.
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

from mergekit_cases import DARE, FUSION_DOUBT, MODELS, RECIPES, load, make_models, recipe, run_mergekit

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


def not_decided(text: str, name: str, layers: int, fusion_doubt: float = FUSION_DOUBT) -> torch.Tensor | None:
    """Elements of this tensor that a cut goes through: as large as the smallest kept, some kept and
    some not; or so near to the threshold that f32 arithmetic decides."""
    config = yaml.safe_load(text)
    method = config["merge_method"]
    if method not in ("ties", "breadcrumbs", "breadcrumbs_ties", "sce", "arcee_fusion") or "slices" in config:
        return None
    parts = name.split(".")
    layer = int(parts[2]) if parts[1] == "layers" else None
    base = load(Path("base"))[name].float()
    deltas = {m["model"]: load(Path(m["model"]))[name].float() - base for m in config["models"]}
    doubt = torch.zeros_like(base, dtype=torch.bool)
    if method == "arcee_fusion":
        tuned = load(Path(config["models"][0]["model"]))[name].double()
        p, q = tuned.softmax(-1) + 1e-8, base.double().softmax(-1) + 1e-8
        importance = (tuned - base).abs() * (p * (p / q).log()).sum(-1, keepdim=True)
        ranks = importance.flatten().sort().values
        low, middle, high = (ranks[int(share * (ranks.numel() - 1))] for share in (0.25, 0.5, 0.75))
        threshold = middle + 1.5 * (high - low)
        doubt = (importance - threshold).abs() < fusion_doubt * threshold
    elif method == "sce":
        share = config.get("parameters", {}).get("select_topk", 1)
        spread = torch.stack(list(deltas.values())).double().var(0, unbiased=False)
        k = int(int((spread != 0).sum()) * share)
        if share < 1 and 0 < k < spread.numel():
            cut = spread.flatten().sort(descending=True).values[k - 1]
            near = (spread - cut).abs() <= 1e-6 * cut
            doubt = near if int(near.sum()) > 1 else doubt
    else:
        for model in config["models"]:
            scopes = (model.get("parameters", {}), config.get("parameters", {}))
            value = lambda key, default: gradient(next((s[key] for s in scopes if key in s), default), layer, layers)
            size = deltas[model["model"]].abs()
            density, n = value("density", 1), size.numel()
            if density >= 1:
                continue
            sizes = size.flatten().sort(descending=True).values
            if method == "ties":
                ends = [max(1, int(density * n))]
            else:
                kept = int(density * n)
                dropped = min(int(value("gamma", 0.01) * n), n - kept)
                ends = [k for k in (dropped, dropped + kept) if 0 < k < n]
            for k in ends:
                if int((size >= sizes[k - 1]).sum()) > k:
                    doubt |= size == sizes[k - 1]
    return doubt if bool(doubt.any()) else None


def ours(program: Path, text: str, out: Path) -> None:
    Path("recipe.yml").write_text(text)
    run = subprocess.run([program, "recipe", "recipe.yml", "--out", out, "--quiet"], capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{text}\ncpift-merge failed: {run.stderr}")


def originals(name: str, model: dict[str, torch.Tensor]) -> list[str]:
    """The tensor of this name, or in an output with other layers those of all layers."""
    parts = name.split(".")
    if parts[1] != "layers":
        return [name]
    return [n for n in model if n.split(".")[:2] == parts[:2] and n.split(".")[3:] == parts[3:]]


def compare(text: str, theirs: Path, mine: Path) -> dict[str, float]:
    """Elements in all, left out at a cut, different; those over one ulp, their distance in f32
    roundings, and the largest distance of the others in ulps."""
    a, b, inputs = load(theirs), load(mine), [load(Path(m)) for m in MODELS]
    assert a.keys() == b.keys(), f"tensors differ: {a.keys() ^ b.keys()}"
    found = dict(elements=0, cut=0, differ=0, cancelled=0, roundings=0.0, ulps=0)
    for name in a:
        # mergekit's arcee_fusion gives f32 where bf16 is asked for.
        a[name] = a[name].bfloat16() if "out_dtype" not in text else a[name]
        assert a[name].dtype == b[name].dtype == torch.bfloat16, name
        distance = (ordered(a[name]) - ordered(b[name])).abs()
        tied = not_decided(text, name, SIZES[3])
        if tied is not None:
            found["cut"] += int(tied.sum())
            distance[tied] = 0
        sources = [model[n].double().abs() for model in inputs for n in originals(name, model)]
        largest = torch.stack(sources).amax(0)
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
        # Of bf16 and f16 checkpoints many differences are equal at a cut, which not_decided does not find in slices.
        for name in (n for n in RECIPES if dtype_name == "f32" or n != "ties_slices"):
            for label, dtypes in (("float32", "dtype: float32\nout_dtype: bfloat16\n"), ("bfloat16", "dtype: bfloat16\n")):
                text = recipe(name, SIZES[3], dtypes)
                theirs, mine = (Path(f"{who}-{name}-{label}") for who in ("mergekit", "cpift"))
                run_mergekit(text, theirs)
                ours(program, text, mine)
                found = compare(text, theirs, mine)
                judged = label == "float32"
                wrong, exact = judged and found["ulps"] > 1, False
                if wrong:
                    # The rounding of mergekit's f32 arithmetic, if its f64 arithmetic agrees.
                    wide = text.replace("dtype: float32", "dtype: float64", 1)
                    run_mergekit(wide, Path(f"{theirs}-wide"))
                    exact = compare(wide, Path(f"{theirs}-wide"), mine)["ulps"] <= 1
                    wrong = not exact
                good &= not wrong
                note = "  WRONG" if wrong else "  within one ulp of mergekit in f64" if exact else "" if judged else "  not judged"
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
    print(f"\n{'DARE, DELLA':20}{'program':10}{'share kept, sigmas':>20}{'sum of deltas, sigmas':>23}{'L1 / L1 before':>16}")
    good, dtypes = True, "dtype: float32\n"
    for method in ("dare_linear", "dare_ties", "della_linear", "della"):
        for density in (0.1, 0.5, 0.9):
            della = method.startswith("della")
            extra = f", normalize: false, epsilon: {min(density, 1 - density) * 0.9}" if della else ""
            one = DARE.replace("METHOD", method).replace("DENSITY", str(density)).replace("EXTRA", extra) + dtypes
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
                # DELLA's sum is not that of the whole task vector: it keeps more of the large elements.
                fine = share < 5 and (della or total < 5) and max(abs(x - 1) for x in l1) < 1e-3
                good &= fine
                label = f"{method} {density}"
                print(f"{label:20}{who:10}{share:20.2f}{total:23.2f}{min(l1):9.5f}-{max(l1):.5f}{'' if fine else '  WRONG'}")
                run(three, Path(f"{out}-three"))
                merged = load(Path(f"{out}-three"))
                changed[who] = [(int((merged[n] != b).sum()), b.numel()) for n, b in base.items()]
            good &= not della or ranks_agree(base, tuned, method, density)
            worst = 0.0
            for (x, n), (y, _) in zip(changed["mergekit"], changed["cpift"]):
                p = (x + y) / (2 * n)
                worst = max(worst, sigmas(x / n, y / n, math.sqrt(2 * p * (1 - p) / n)))
            good &= worst < 5
            print(f"{label:20}{'both':10}three models: shares of elements changed at most {worst:.2f} sigmas apart")
    return good


def ranks_agree(base, tuned, method: str, density: float) -> bool:
    """Share kept of each tenth of the ranks in a row, over all matrices, in both programs' merges of one model."""
    epsilon, shares, size = min(density, 1 - density) * 0.9, {}, 0
    for who in ("mergekit", "cpift"):
        merged, kept = load(Path(f"{who}-{method}-{density}")), torch.zeros(10)
        size = torch.zeros(10)
        for name, b in base.items():
            if b.dim() < 2:
                continue
            delta = (tuned[name] - b).abs()
            tenth = (delta.argsort(1).argsort(1) / (delta.shape[1] - 1) * 9.999).long()
            moved = (merged[name] != b).float()
            kept += torch.zeros(10).scatter_add_(0, tenth.flatten(), moved.flatten())
            size += torch.zeros(10).scatter_add_(0, tenth.flatten(), torch.ones_like(moved.flatten()))
        shares[who] = kept / size
    worst = max(sigmas(float(shares["mergekit"][i]), float(shares["cpift"][i]), math.sqrt(0.5 / float(size[i]))) for i in range(10))
    slope = float(shares["cpift"][9] - shares["cpift"][0])
    fine = worst < 5 and abs(slope - 2 * epsilon * 0.9) < 0.1
    print(f"{method} {density}: shares kept by tenth of the ranks at most {worst:.2f} sigmas apart, slope {slope:.3f}{'' if fine else '  WRONG'}")
    return fine


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
