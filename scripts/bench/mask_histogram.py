"""The plain peer of `cpift-mask extract`: a histogram script as one writes it first, with
`numpy.histogram`.

    python3 mask_histogram.py BASE TUNED PERCENT OUT      needs numpy, torch, safetensors

One pass finds the largest |Δ|, one makes a histogram of 65,536 bins, one sorts what lies in the bin
of the threshold, and one writes the bits, ties by position. mask_numpy.py is the same work made
fast.
"""

import sys

import numpy as np

from mask_numpy import distances, open_all, write


def main(base, tuned, percent, out):
    base, tuned = open_all(base), open_all(tuned)
    k = int(sum(t.numel() for t in base.values()) * float(percent) // 100)
    largest = max(float(values.max(initial=0)) for _, values in distances(base, tuned))
    counts, edges = np.zeros(1 << 16, np.int64), None
    for _, values in distances(base, tuned):
        more, edges = np.histogram(values, bins=1 << 16, range=(0, largest))
        counts += more
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, k))
    low, high = edges[len(counts) - 1 - place], edges[len(counts) - place]
    # A little to both sides, because the edges are rounded.
    low, high = low - (high - low), high + (high - low)
    over, inside = 0, []
    for _, values in distances(base, tuned):
        over += int((values > high).sum())
        inside.append(values[(values >= low) & (values <= high)])
    inside = np.sort(np.concatenate(inside))[::-1]
    threshold = inside[k - over - 1]
    ties = k - over - int((inside > threshold).sum())
    write(base, tuned, k, threshold, ties, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
