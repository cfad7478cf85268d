"""The peer of several ranks: transformers under FSDP2, the same shape and JSON as train_peer.py.

    torchrun --nproc-per-node 2 fsdp_peer.py --model DIR --shape 1x4096 --steps 6 --device cuda

Each block is a unit (`fully_shard`), f32 masters, bf16 compute and gradients reduced in f32, gradient
checkpointing, fused AdamW without clipping. The shape is that of one rank. Needs torch 2.11 and
transformers.
"""

import argparse
import json
import os
import time

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM

from train_peer import LEARNING_RATE, peak_memory, token_ids


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--shape", default="1x4096", metavar="BxS", help="rows and tokens of a rank's batch")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    args = parser.parse_args()
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device(args.device, local) if args.device == "cuda" else torch.device("cpu")
    if args.device == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    rows, length = map(int, args.shape.split("x"))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa").train()
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    mesh = dist.device_mesh.init_device_mesh(args.device, (world,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    batches = token_ids(model.config.vocab_size, args.steps, world * rows, length)
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    seconds, losses = [], []
    for ids in batches:
        own = ids[rank * rows:(rank + 1) * rows].to(device)
        wait()
        start = time.perf_counter()
        loss = model(input_ids=own, labels=own).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        wait()
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        print(json.dumps({"tokens_per_step": world * rows * length, "ranks": world, "wall_seconds": seconds, "losses": losses,
                          "peak_memory_mib": peak_memory(args.device)}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
