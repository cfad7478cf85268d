"""The least CPU time of a training step on this machine, as a JSON object: the model's matrix products
and its attention alone, at its shapes and dtype, each by the fastest library of PyTorch.

    python3 floor.py --model DIR --shape 1x512 --compute-dtype f32 --threads 1        needs torch

A linear layer is three products: forward, gradient of the input, gradient of the weight. Each is timed
by `torch.mm` (MKL in f32) and by oneDNN; the fastest of all repetitions counts. Attention is the fused kernel, forward and backward. Work repeated by
gradient checkpointing is not counted: a step need not repeat it.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
REPEATS, LEAST_SECONDS = 3, 0.05


def fastest(work):
    """CPU seconds of one call; after a call that is not timed."""
    work()
    best, spent, count = float("inf"), 0.0, 0
    while count < REPEATS or spent < LEAST_SECONDS:
        start = time.process_time()
        work()
        took = time.process_time() - start
        best, spent, count = min(best, took), spent + took, count + 1
    return best


def by_onednn(a, b):
    """a · b."""
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


def product(a, b):
    """Seconds of a · b by the fastest library, and its name."""
    ways = {"torch.mm": lambda: a @ b, "oneDNN": lambda: by_onednn(a, b)}
    times = {}
    for name, work in ways.items():
        try:
            times[name] = fastest(work)
        except RuntimeError as error:
            print(f"floor: without {name}: {error}", file=sys.stderr)
    name = min(times, key=times.get)
    return times[name], name


def layer(n, inner, outer, dtype):
    """Seconds of the three products of a linear layer over n rows, and the library of each."""
    x, w, grad = torch.randn(n, inner, dtype=dtype), torch.randn(outer, inner, dtype=dtype), torch.randn(n, outer, dtype=dtype)
    found = [product(x, w.t()), product(grad, w), product(grad.t(), x)]
    return sum(seconds for seconds, _ in found), [name for _, name in found]


def attention(rows, length, heads, width, dtype):
    q, k, v = (torch.randn(rows, heads, length, width, dtype=dtype, requires_grad=True) for _ in range(3))
    grad = torch.randn(rows, heads, length, width, dtype=dtype)

    def work():
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(out, (q, k, v), grad)

    return fastest(work)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a folder with config.json")
    parser.add_argument("--shape", default="1x512", metavar="BxS", help="rows and tokens of a batch")
    parser.add_argument("--compute-dtype", choices=DTYPES, default="f32")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows, length = map(int, args.shape.split("x"))
    dtype, c = DTYPES[args.compute_dtype], json.loads((args.model / "config.json").read_text())
    hidden, inner, heads, layers = (c[key] for key in ["hidden_size", "intermediate_size", "num_attention_heads",
                                                      "num_hidden_layers"])
    keys, width = c.get("num_key_value_heads", heads), c.get("head_dim") or hidden // heads
    n = rows * length
    # Queries; keys and values; output; gate and up; down; logits of the targets, which are all
    # tokens of a row but the first.
    linears = [((n, hidden, heads * width), layers), ((n, hidden, keys * width), 2 * layers),
               ((n, heads * width, hidden), layers), ((n, hidden, inner), 2 * layers), ((n, inner, hidden), layers),
               ((rows * (length - 1), hidden, c["vocab_size"]), 1)]
    shapes = {}
    for shape, count in linears:
        shapes[shape] = shapes.get(shape, 0) + count
    products, flops, libraries = 0.0, 0, {}
    for (m, i, o), count in shapes.items():
        seconds, names = layer(m, i, o, dtype)
        products, flops = products + count * seconds, flops + count * 6 * m * i * o
        for name in names:
            libraries[name] = libraries.get(name, 0) + count
    attended = layers * attention(rows, length, heads, width, dtype)
    print(json.dumps({"seconds": products + attended, "products_seconds": products, "attention_seconds": attended,
                      "gflops": flops / products / 1e9, "libraries": libraries, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
