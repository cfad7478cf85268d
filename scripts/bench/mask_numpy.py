"""The peer of `cpift-mask extract`: what a careful person writes with NumPy, and PyTorch for the
bf16 differences.

    python3 mask_numpy.py BASE TUNED PERCENT OUT      needs numpy, torch, safetensors
    python3 mask_numpy.py --same MASK OUT             exit status 0 if both choose the same elements but for ties

Streams both checkpoints through memory maps, three times: a histogram of the upper 16 bits of |Δ|,
one of the lower 16 bits within the bin of the threshold, and the bits, ties by position.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

PIECE = 1 << 22


def open_all(folder):
    """Every tensor by name, mapped."""
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        shard = safe_open(path, framework="pt")
        tensors.update({name: shard.get_tensor(name) for name in shard.keys()})
    return tensors


def distances(base, tuned):
    """|Δ| in f32, piece by piece, in order of position."""
    for name in sorted(base):
        b, t = base[name].flatten(), tuned[name].flatten()
        for at in range(0, b.numel(), PIECE):
            yield name, (t[at : at + PIECE].float() - b[at : at + PIECE].float()).abs_().numpy()


def histogram(base, tuned, prefix=None):
    """Counts of the upper 16 bits of all distances, or of the lower 16 bits of those with the upper
    bits `prefix`."""
    bins = np.zeros(1 << 16, np.int64)
    for _, values in distances(base, tuned):
        bits = values.view(np.uint32)
        if prefix is None:
            digits = (bits >> 16).astype(np.uint16)
        else:
            digits = bits[(bits >> 16) == prefix].astype(np.uint16)
        bins += np.bincount(digits, minlength=1 << 16)
    return bins


def descend(bins, k):
    """The bin in which the k-th largest lies, and how many of its elements are wanted."""
    above = np.cumsum(bins[::-1])
    place = int(np.searchsorted(above, k))
    return len(bins) - 1 - place, k - int(above[place] - bins[::-1][place])


def main(base, tuned, percent, out):
    base, tuned = open_all(base), open_all(tuned)
    k = int(sum(t.numel() for t in base.values()) * float(percent) // 100)
    upper, k_left = descend(histogram(base, tuned), k)
    lower, ties = descend(histogram(base, tuned, upper), k_left)
    threshold = np.uint32(upper << 16 | lower).view(np.float32)
    write(base, tuned, k, threshold, ties, out)


def write(base, tuned, k, threshold, ties, out):
    """Writes the bits of what is above the threshold and of the first `ties` equal to it."""
    packed = {name: [] for name in base}
    for name, values in distances(base, tuned):
        chosen = values > threshold
        if ties:
            equal = np.flatnonzero(values == threshold)[:ties]
            chosen[equal] = True
            ties -= len(equal)
        packed[name].append(np.packbits(chosen, bitorder="little"))
    packed = {name: np.concatenate(parts) for name, parts in packed.items()}
    save_file(packed, out)
    print(json.dumps({"selected": k}))


def same(mask, other):
    """True if `other` has as many elements as `mask`, and all but those that `mask` chose among equals."""
    mask, other = safe_open(mask, framework="np"), safe_open(other, framework="np")
    names = sorted(set(mask.keys()) - {"cpift.ties"})
    bits = [(name, np.flatnonzero(np.unpackbits(mask.get_tensor(name), bitorder="little"))) for name in names]
    selected = sum(len(chosen) for _, chosen in bits)
    tied = np.zeros(selected, bool)
    if "cpift.ties" in mask.keys():
        tied = np.unpackbits(mask.get_tensor("cpift.ties"), bitorder="little", count=selected) == 1
    count, at = 0, 0
    for name, chosen in bits:
        theirs = np.unpackbits(other.get_tensor(name), bitorder="little")
        if not theirs[chosen[~tied[at : at + len(chosen)]]].all():
            return False
        count, at = count + int(theirs.sum()), at + len(chosen)
    return count == selected and names == sorted(other.keys())


if __name__ == "__main__":
    if sys.argv[1] == "--same":
        sys.exit(not same(*sys.argv[2:]))
    main(*sys.argv[1:])
