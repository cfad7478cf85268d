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
import subprocess
import sys
import tempfile
from pathlib import Path

from runs import Failed, free_port, rank_environment, wait_for_steps

LIMIT_S = 1800


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
        metrics, children, port = work / "out.checkpoints/metrics.jsonl", [], free_port()
        for rank in range(args.ranks):
            with (work / f"log.{rank}").open("w") as log:
                env = os.environ | rank_environment(rank, args.ranks, port)
                children.append(subprocess.Popen(command(args, work), env=env, stdout=log, stderr=log))
        try:
            for text in wait_for_steps(children, metrics, args.steps, LIMIT_S):
                lines = [json.loads(line) for line in text]
        except Failed as error:
            errors = [line for rank in range(args.ranks) for line in (work / f"log.{rank}").read_text().splitlines()]
            sys.exit(next((line for line in errors if "error: " in line), str(error)))
    rows, tokens = map(int, args.shape.split("x"))
    per_step = rows * tokens * args.ranks
    print(json.dumps({"tokens_per_step": per_step, "ranks": args.ranks, "peak_memory_mib": lines[-1]["memory_mib"],
                      "wall_seconds": [per_step / line["tokens_per_second"] for line in lines[:args.steps]],
                      "losses": [line["loss"] for line in lines[:args.steps]]}))


if __name__ == "__main__":
    main()
