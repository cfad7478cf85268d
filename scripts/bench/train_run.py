"""Steps of the real program, as `bench_train` reports them: one JSON object of tokens per step, seconds
of each step and peak memory of rank 0.

    python3 train_run.py --program target/release/cpift-train --model DIR --shape 1x4096 --steps 6 --ranks 2
        --device cuda [-- --offload all …]

The shape is that of one rank. Rows are longer than its tokens and are cut; the job is ended after the
steps, before it writes anything.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def environments(ranks):
    """The variables of each rank; none for one process."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    for rank in range(ranks):
        shared = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        yield os.environ | ({name: str(value) for name, value in shared.items()} if ranks > 1 else {})


def command(args, work):
    rows, tokens = map(int, args.shape.split("x"))
    turn = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "1 2 3 4 5 6 7 8 9 " * (tokens // 4)}]
    (work / "rows.jsonl").write_text((json.dumps({"messages": turn}) + "\n") * (4 * rows * args.ranks))
    (work / "tasks.toml").write_text('[[task]]\nname = "rows"\ntrain = "rows.jsonl"\neval = "rows.jsonl"\n')
    fixed = ["run", "--model", args.model, "--tasks", work / "tasks.toml", "--out", work / "out", "--steps", 10 * args.steps,
             "--batch-size", rows * args.ranks, "--max-length", tokens, "--lr", "1e-5", "--log-every", 1, "--device",
             args.device, "--compute-dtype", args.compute_dtype, "--gradient-checkpointing", *args.more]
    if args.device == "cpu" and "--offload" in args.more:
        fixed += ["--offload-dir", work]
    return [str(part) for part in [args.program, *fixed]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, required=True, metavar="FILE", help="cpift-train")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--shape", default="1x4096", metavar="BxS", help="rows and tokens of a rank's batch")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--compute-dtype", choices=["f32", "bf16"], default="bf16")
    parser.add_argument("more", nargs="*", help="after --: arguments of cpift-train run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        metrics, lines, children = work / "out.checkpoints/metrics.jsonl", [], []
        for rank, env in enumerate(environments(args.ranks)):
            log = (work / f"log.{rank}").open("w")
            children.append(subprocess.Popen(command(args, work), env=env, stdout=log, stderr=log))
        try:
            while len(lines) < args.steps:
                time.sleep(0.02)
                text = metrics.read_text() if metrics.exists() else ""
                lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
                if any(child.poll() is not None for child in children):
                    errors = [line for rank in range(args.ranks) for line in (work / f"log.{rank}").read_text().splitlines()]
                    sys.exit(next((line for line in errors if "error: " in line), "the program ended early"))
        finally:
            for child in children:
                child.send_signal(signal.SIGKILL)
            for child in children:
                child.wait()
    rows, tokens = map(int, args.shape.split("x"))
    per_step = rows * tokens * args.ranks
    print(json.dumps({"tokens_per_step": per_step, "ranks": args.ranks, "peak_memory_mib": lines[-1]["memory_mib"],
                      "wall_seconds": [per_step / line["tokens_per_second"] for line in lines[:args.steps]],
                      "losses": [line["loss"] for line in lines[:args.steps]]}))


if __name__ == "__main__":
    main()
