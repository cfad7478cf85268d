#!/usr/bin/env python3
"""The allocator's peak on the device that computes nothing beside what `cpift-train plan` says, at
LLaMA-2-7B's shapes: `tests/fake-cuda/peaks.py --bin target/debug [--layers 32]`, as a Markdown table.

Each case is a job of `cpift-train run` that is killed after two steps. The checkpoint is a sparse
file of zeros, whose pages take no disk. The exit status is 1 if a peak is more than 10 % from the plan.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "scripts/bench"))
from runs import Failed, free_port, rank_environment, wait_for_steps
CONFIG, TOKENIZER = ROOT / "scripts/paper/llama-2-7b.json", ROOT / "fixtures/demo/base"
ALLOWED = 0.10
CONTEXT = 1 << 30
DEVICE_PEAK = 6
LIMIT_S = 900
SAVE = ["--gradient-checkpointing", "--optimizer-in-backward", "--max-grad-norm", "0"]
BF16 = ["--master-dtype", "bf16", "--optim-state-dtype", "bf16"]
EIGHT_BITS = ["--optim", "adamw_8bit"]
LORA = ["--gradient-checkpointing", "--lora-rank", "16"]
CASES = [
    ("f32", 1, "none", 4096, SAVE),
    ("bf16 and stochastic rounding", 1, "none", 4096, SAVE + BF16),
    ("f32", 1, "optimizer", 4096, SAVE),
    ("f32", 1, "all", 2048, SAVE),
    ("bf16 and stochastic rounding", 1, "all", 2048, SAVE + BF16),
    ("f32", 2, "none", 4096, SAVE),
    ("f32, clipped", 2, "none", 4096, SAVE[:1]),
    ("f32", 2, "optimizer", 4096, SAVE),
    ("f32", 2, "all", 4096, SAVE),
    ("f32", 4, "none", 4096, SAVE),
    ("f32, clipped", 4, "none", 4096, SAVE[:1]),
    ("bf16 and stochastic rounding", 4, "none", 4096, SAVE + BF16),
    ("f32", 4, "optimizer", 4096, SAVE),
    ("f32", 4, "all", 4096, SAVE),
    ("f32, clipped", 8, "none", 4096, SAVE[:1]),
    ("f32, moments in 8 bits", 1, "none", 4096, SAVE + EIGHT_BITS),
    ("f32, moments in 8 bits", 2, "none", 4096, SAVE + EIGHT_BITS),
    ("LoRA of rank 16", 1, "none", 4096, LORA),
    ("LoRA of rank 16", 2, "none", 4096, LORA),
    ("LoRA of rank 16", 4, "none", 4096, LORA),
]


def shapes(config):
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", [vocab, hidden]
    for layer in range(config["num_hidden_layers"]):
        of = {"self_attn.q_proj": [hidden, hidden], "self_attn.k_proj": [hidden, hidden],
              "self_attn.v_proj": [hidden, hidden], "self_attn.o_proj": [hidden, hidden],
              "mlp.gate_proj": [inner, hidden], "mlp.up_proj": [inner, hidden], "mlp.down_proj": [hidden, inner],
              "input_layernorm": [hidden], "post_attention_layernorm": [hidden]}
        for name, shape in of.items():
            yield f"model.layers.{layer}.{name}.weight", shape
    yield "model.norm.weight", [hidden]
    yield "lm_head.weight", [vocab, hidden]


def make_checkpoint(folder, config):
    folder.mkdir()
    header, at = {}, 0
    for name, shape in shapes(config):
        size = 2
        for n in shape:
            size *= n
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]:
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())


def make_rows(folder):
    turn = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "1 2 3 4 5 6 7 8 9 " * 600}]
    (folder / "rows.jsonl").write_text((json.dumps({"messages": turn}) + "\n") * 16)
    (folder / "tasks.toml").write_text('[[task]]\nname = "rows"\ntrain = "rows.jsonl"\neval = "rows.jsonl"\n')


def arguments(case):
    _, world, offload, tokens, more = case
    return ["--batch-size", str(world), "--max-length", str(tokens), "--offload", offload, "--device", "cuda", *more]


def planned(binary, work, case):
    world = case[1]
    command = [binary, "plan", "--model-config", work / "base/config.json", "--world", str(world), "--device-memory", "200", "--json", "--quiet",
               *arguments(case)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["memory"]["peak"] - CONTEXT


def measured(binary, work, case):
    """Peak of rank 0's tensors, and of what its allocator reserves, in bytes."""
    world, out, port = case[1], work / "out", free_port()
    metrics, stats = work / "out.checkpoints/metrics.jsonl", work / "stats"
    stats.unlink(missing_ok=True)
    command = [HERE / "run.sh", binary, "run", "--model", work / "base", "--tasks", work / "tasks.toml", "--out", out,
               "--force", "--steps", "50", "--lr", "1e-5", "--log-every", "1", *arguments(case)]
    ranks = []
    for rank in range(world):
        own = rank_environment(rank, world, port)
        own |= {"FAKE_CUDA_COPIES": "0", "FAKE_CUDA_MEMORY": str(200 << 30)}
        own |= {"FAKE_CUDA_STATS": str(stats)} if rank == 0 else {}
        with open(work / f"log.{rank}", "w") as log:
            ranks.append(subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log))
    try:
        for lines in wait_for_steps(ranks, metrics, 2, LIMIT_S):
            if len(lines) >= 2:
                found = json.loads(lines[1])["memory_mib"] << 20, struct.unpack("9Q", stats.read_bytes())[DEVICE_PEAK]
    except Failed as error:
        logs = "\n".join((work / f"log.{rank}").read_text()[-2000:] for rank in range(world))
        sys.exit(f"peaks: {case[:4]}: {error}\n{logs}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, default=ROOT / "target/debug", metavar="DIR")
    parser.add_argument("--only", type=int, action="append", metavar="N", help="a case by its number, from 0")
    parser.add_argument("--layers", type=int, default=32, help="blocks of the model")
    args = parser.parse_args()
    binary, off = args.bin / "cpift-train", 0
    print("| weights and moments | ranks | `--offload` | tokens per rank | plan, GiB | tensors, GiB | difference |"
          " reserved, GiB |\n| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_checkpoint(work / "base", json.loads(CONFIG.read_text()) | {"num_hidden_layers": args.layers})
        make_rows(work)
        for number, case in enumerate(CASES):
            if args.only and number not in args.only:
                continue
            name, world, offload, tokens, _ = case
            plan, (peak, reserved) = planned(binary, work, case), measured(binary, work, case)
            off += abs(peak / plan - 1) > ALLOWED
            print(f"| {name} | {world} | {offload} | {tokens} | {plan / 2**30:.2f} | {peak / 2**30:.2f} |"
                  f" {100 * (peak / plan - 1):+.1f} % | {reserved / 2**30:.2f} |", flush=True)
    sys.exit(f"peaks: {off} more than {100 * ALLOWED:.0f} % from the plan" if off else 0)


if __name__ == "__main__":
    main()
