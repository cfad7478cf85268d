"""Seconds of a training step of LLaMA-2-7B on 1 to 64 GPUs: computed, not measured.

    python3 scripts/bench/gpu_model.py --bin target/release            prints a Markdown table

    compute = tokens per rank / RATE
    links   = bytes from ranks of the node / NVLINK + bytes from other nodes / NETWORK
    step    = max(compute, links) + first

The bytes are those of `cpift-train plan`; `first` is the time of the links for one block, which nothing
hides. RATE is published for one H200 with torchtitan's kind of step (bf16, full checkpointing, 4 k
tokens): 10,471 tokens/s. NVLINK and NETWORK are 80 % of nominal rates per GPU and direction: 450 GB/s,
and 400 Gbit/s. --rate, --nvlink and --network are others.
"""

import argparse
import json
import subprocess
from pathlib import Path

CONFIG = Path(__file__).resolve().parents[1] / "paper/llama-2-7b.json"
LAYERS = json.loads(CONFIG.read_text())["num_hidden_layers"]
PER_NODE, LENGTH = 8, 4096


def plan(binary, world, rows):
    """Bytes a rank receives per step, those of them from other nodes, and its memory."""
    command = [binary, "plan", "--model-config", CONFIG, "--world", world, "--per-node", PER_NODE, "--max-length", LENGTH,
               "--batch-size", world * rows, "--gradient-checkpointing", "--device", "cuda", "--device-memory", 141, "--json",
               "--quiet"]
    found = json.loads(subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout)
    return found["traffic"]["ranks"], found["traffic"]["nodes"], found["memory"]["peak"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, required=True, metavar="DIR", help="the folder of cpift-train")
    parser.add_argument("--rate", type=float, default=10_471, help="tokens per second of one GPU")
    parser.add_argument("--nvlink", type=float, default=360, metavar="GB/s")
    parser.add_argument("--network", type=float, default=40, metavar="GB/s")
    args = parser.parse_args()
    print("| GPUs | rows of 4,096 tokens per rank | GiB per rank | compute, s | links, s | step, s | tokens/s per GPU | of one GPU |\n"
          "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for rows in [1, 4]:
        for world in [1, 2, 4, 8, 16, 32, 64]:
            ranks, nodes, memory = plan(args.bin / "cpift-train", world, rows)
            compute = rows * LENGTH / args.rate
            links = (ranks - nodes) / args.nvlink / 1e9 + nodes / args.network / 1e9
            step = max(compute, links) + links / (3 * LAYERS)
            rate = rows * LENGTH / step
            print(f"| {world} | {rows} | {memory / 2**30:.1f} | {compute:.2f} | {links:.2f} | {step:.2f} | {rate:,.0f} |"
                  f" {100 * rate / args.rate:.0f} % |")


if __name__ == "__main__":
    main()
