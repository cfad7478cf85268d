"""The peer of `bench_train`: the same training steps as a user of transformers writes them, the
same options and JSON.

    python3 train_peer.py --model DIR --shape 1x512 --steps 4 --threads 1

Needs torch 2.11 and transformers.

sdpa attention, loss by the model's `labels`, clip_grad_norm_, torch.optim.AdamW(fused=True) at a
constant rate without decay. bf16 is autocast over f32 weights, or bf16 weights, moments and all
with `--master bf16`. `--compile` trains the model under torch.compile; `--onednn` sends the products of
linear layers through oneDNN, as ours does, where PyTorch would call MKL.
"""

import argparse
import contextlib
import json
import platform
import resource
import sys
import time
from pathlib import Path

try:
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM
except ImportError as error:
    sys.exit(f"train_peer: {error} (hint: scripts/oracle/setup.sh makes a Python with torch 2.11 and transformers)")

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
LEARNING_RATE = 1e-5


def token_ids(vocab, steps, rows, length):
    """Batches of a 64-bit LCG that starts at 1: every id is the upper 31 bits of the NEXT state,
    modulo the vocabulary."""
    state, ids = 1, []
    for _ in range(steps * rows * length):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        ids.append((state >> 33) % vocab)
    return torch.tensor(ids).view(steps, rows, length)


class OneDnnLinear(torch.autograd.Function):
    """x·wᵀ and its gradients by oneDNN, over f32 matrices."""

    @staticmethod
    def product(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return OneDnnLinear.product(x.reshape(-1, w.shape[1]), w).view(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        grad = grad.reshape(-1, w.shape[0])
        by_w = OneDnnLinear.product(grad.t(), x.reshape(-1, w.shape[1]).t())
        return OneDnnLinear.product(grad, w.t()).view(x.shape), by_w


def linear_by_onednn(module, x):
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return torch.nn.functional.linear(x, module.weight, module.bias)
    y = OneDnnLinear.apply(x, module.weight)
    return y if module.bias is None else y + module.bias


def open_model(args):
    dtype = DTYPES[args.master]
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa").to(args.device)
    else:
        torch.manual_seed(0)
        with torch.device(args.device):
            config = AutoConfig.from_pretrained(args.config)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if args.onednn:
        torch.nn.Linear.forward = linear_by_onednn
    model.train()
    return torch.compile(model) if args.compile else model


class Clock:
    """CPU and wall seconds of one step, after the device has finished it."""

    def __init__(self, device):
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def __enter__(self):
        self.wait()
        self.start = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_):
        self.wait()
        self.cpu, self.wall = time.process_time() - self.start[0], time.perf_counter() - self.start[1]


def train(args):
    """A list of each step's loss, CPU seconds and wall seconds, and the number of parameters."""
    model = open_model(args)
    rows, length = map(int, args.shape.split("x"))
    batches = token_ids(model.config.vocab_size, args.steps, rows, length).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    mixed = args.compute_dtype == "bf16" and args.master == "f32"
    autocast = torch.autocast(args.device, torch.bfloat16) if mixed else contextlib.nullcontext()
    seen = []
    for ids in batches:
        with Clock(args.device) as clock:
            with autocast:
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            if args.max_grad_norm > 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            value = loss.item()
        seen.append((value, clock.cpu, clock.wall))
    return seen, sum(p.numel() for p in model.parameters())


def peak_memory(device):
    """MiB: of the device's allocator, or of the process's resident set."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint")
    model.add_argument("--config", type=Path, metavar="FILE", help="a config.json; the weights are random")
    parser.add_argument("--shape", default="1x512", metavar="BxS", help="rows and tokens of a batch")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compute-dtype", choices=DTYPES, default="f32")
    parser.add_argument("--master", choices=DTYPES, default="f32")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--onednn", action="store_true", help="f32 on the CPU")
    parser.add_argument("--max-grad-norm", type=float, default=1.0, help="0 turns clipping off")
    return parser.parse_args()


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    rows, length = map(int, args.shape.split("x"))
    seen, parameters = train(args)
    losses, cpu, wall = zip(*seen)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    print(json.dumps({"tokens_per_step": rows * length, "steps": args.steps, "parameters": parameters, "cpu_seconds": cpu,
                      "wall_seconds": wall, "losses": losses, "peak_memory_mib": peak_memory(args.device),
                      "versions": versions}))


if __name__ == "__main__":
    main()
