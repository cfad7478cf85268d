"""`scripts/gpu.sh`: checks and benchmarks on one GPU, into one JSON file.

`figures` has every value beside its target, null where it was not measured; `machine` what it ran
on; `steps` each program's own report, or the error it ended with.

The file is written after every step; a step that fails or runs out of time is recorded and the rest
goes on. `--only STEP` runs single steps again, or those that are missing, and keeps the rest.
Without a GPU the same programs run at tiny size on the CPU, to show that the script works: their
reports are kept, and no figure is made of them.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from generate import prompts
from runs import DEVICE, HERE, PEER, ROOT, Failed, run_json

LLAMA = ROOT / "scripts/paper/llama-2-7b.json"
# SmolLM2's kind of model, small enough for seconds on one core.
TINY = dict(json.loads(LLAMA.read_text()), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=2, vocab_size=2048, max_position_embeddings=256, tie_word_embeddings=True)
WHAT = ("LLaMA-2-7B at random weights, 1 x 4096 tokens; a step is forward, backward with gradient checkpointing, and update. "
        "MFU is 6 x parameters x tokens per second over the rate of a square bf16 product in the same run. No gradient is "
        "clipped: ours updates in the backward pass, before their norm is known. Generation: 16 "
        "prompts of 24 to 96 tokens, 128 new ones each, bf16. Targets are those for one H200.")
NO_GPU = "No CUDA device: all ran at tiny size on the CPU, to show that it runs. Nothing here is a figure of a GPU."
DEVICE_LIMIT_S = 300
F32_MASTER = ["--master", "f32", "--optim-state", "f32"]
BF16_MASTER = ["--master", "bf16", "--optim-state", "bf16"]
# What the reports must hold.
PARITY = {"passed", "max_logits_difference", "max_loss_difference"}
TRAINING = {"tokens_per_step", "wall_seconds", "peak_memory_mib"}
GENERATION = {"ids", "wall_seconds"}
BATCH, NEW_TOKENS = 16, 128


class Plan:
    """What runs where: the commands of all steps for this device."""

    def __init__(self, args, machine, tiny, scratch):
        device = machine["device"]
        self.args, self.device, self.gpus, self.scratch = args, device, machine.get("gpus", 1), scratch
        self.config, self.shape = (LLAMA, "1x4096") if device == "cuda" else (tiny, "2x64")

    def program(self, name):
        found = shutil.which(name, path=self.args.bin)
        if not found:
            raise Failed(f"{name} is not in {self.args.bin} (hint: BIN=DIR names the folder)")
        return found

    def where(self):
        return ["--device", self.device, "--compute-dtype", "bf16" if self.device == "cuda" else "f32"]

    def common(self):
        return ["--config", self.config, "--shape", self.shape, "--steps", self.args.steps, *self.where(),
                "--gradient-checkpointing"]

    def parity(self):
        return [self.program("check_parity"), "--device", self.device, ROOT / "fixtures/golden", "--json"]

    def ours(self, *options):
        return [self.program("bench_train"), *self.common(), "--random", "--optimizer-in-backward", *options, "--json"]

    def peer(self, master):
        return [sys.executable, PEER, *self.common(), "--master", master, "--max-grad-norm", 0]

    def checkpoint(self):
        """The folder of the model at random weights, made once."""
        model = self.scratch / "model"
        if not model.exists():
            maker = [sys.executable, HERE / "random_checkpoint.py", self.config, ROOT / "fixtures/demo/base", model]
            run_json(maker, self.args.limit)
        return model

    def job(self, ranks, *options):
        """The real program on so many GPUs; on the CPU on one process or two."""
        more = [*options, "--optimizer-in-backward", "--max-grad-norm", 0]
        return [sys.executable, HERE / "train_run.py", "--program", self.program("cpift-train"), "--model", self.checkpoint(),
                "--shape", self.shape, "--steps", self.args.steps, "--ranks", ranks, *self.where(), "--", *more]

    def several(self):
        """The number of GPUs, of which there must be several."""
        count = self.gpus if self.device == "cuda" else 2
        if count < 2:
            raise Failed("one GPU: nothing to share")
        return count

    def fsdp(self):
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", self.several(),
                HERE / "fsdp_peer.py", "--model", self.checkpoint(), "--shape", self.shape, "--steps", self.args.steps,
                "--device", self.device]

    def generation(self, *program):
        """The command of a program that continues the prompts; the first call makes the prompts."""
        model, file = self.checkpoint(), self.scratch / "prompts.json"
        if not file.exists():
            file.write_text(json.dumps(prompts(BATCH, json.loads(self.config.read_text())["vocab_size"])))
        return [*program, "--model", model, "--prompts", file, "--batch-size", BATCH, "--new-tokens", NEW_TOKENS,
                "--repeat", 2, *self.where()]


STEPS = {
    "parity": Plan.parity,
    "train_f32": lambda plan: plan.ours(*F32_MASTER),
    "train_f32_frozen": lambda plan: plan.ours(*F32_MASTER, "--frozen-percent", 5),
    "train_bf16": lambda plan: plan.ours(*BF16_MASTER),
    "train_bf16_frozen": lambda plan: plan.ours(*BF16_MASTER, "--frozen-percent", 5),
    "job": lambda plan: plan.job(1),
    "job_offload_optimizer": lambda plan: plan.job(1, "--offload", "optimizer"),
    "job_offload_all": lambda plan: plan.job(1, "--offload", "all"),
    "job_ranks": lambda plan: plan.job(plan.several()),
    "peer_ranks": Plan.fsdp,
    "peer_f32": lambda plan: plan.peer("f32"),
    "peer_bf16": lambda plan: plan.peer("bf16"),
    "generate": lambda plan: plan.generation(plan.program("bench_generate")),
    "peer_generate": lambda plan: plan.generation(sys.executable, HERE / "generate_peer.py"),
}


def run_step(name, plan):
    """The step's record: its command, how it ended, seconds, and the program's report or the error.
    """
    record, start = {"state": "failed", "command": None, "report": None, "error": None}, time.monotonic()
    try:
        command = STEPS[name](plan)
        record["command"] = " ".join(map(str, command)).replace(sys.executable, "python3").replace(f"{ROOT}/", "")
        record["report"] = report = run_json(command, plan.args.limit)
        needed = PARITY if name == "parity" else GENERATION if name.endswith("generate") else TRAINING
        if missing := needed - report.keys():
            raise Failed(f"the report lacks {', '.join(sorted(missing))}", report)
        # Ids of random weights say nothing, and are many.
        report.pop("ids", None)
        record["state"] = "done"
    except Failed as error:
        record["error"], record["report"] = str(error), error.report
    return record | {"seconds": round(time.monotonic() - start, 1)}


# Figures.

def parameters(config):
    """Parameters of a LLaMA, by its config.json."""
    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    attention = 2 * hidden * hidden * (1 + config["num_key_value_heads"] / heads)
    layer = attention + 3 * hidden * config["intermediate_size"] + 2 * hidden
    embeddings = (1 if config["tie_word_embeddings"] else 2) * config["vocab_size"] * hidden
    return int(layers * layer + embeddings + hidden)


class Reports:
    """What the figures are computed from; None wherever a report is missing, or a machine is not a
    GPU."""

    def __init__(self, results):
        self.on_gpu = results["machine"]["device"] == "cuda"
        self.steps, self.matmul = results["steps"], results["machine"]["matmul_flops"]

    def of(self, step):
        record = self.steps.get(step)
        return record["report"] if self.on_gpu and record and record["state"] == "done" else None

    def parity(self, key):
        """Also of a check that failed, as long as it reported."""
        report = (self.steps.get("parity") or {}).get("report") or {}
        return report.get(key) if self.on_gpu else None

    def rate(self, step):
        """Tokens per second at the median step; the first is warm-up."""
        report = self.of(step)
        return report and report["tokens_per_step"] / statistics.median(report["wall_seconds"][1:])

    def memory(self, step):
        report = self.of(step)
        return report and report["peak_memory_mib"] * 2**20 / 1e9

    def utilisation(self, step):
        rate = self.rate(step)
        return rate and 100 * 6 * parameters(json.loads(LLAMA.read_text())) * rate / self.matmul

    def ratio(self, step, other):
        a, b = self.rate(step), self.rate(other)
        return a / b if a and b else None

    def per_rank(self, step):
        rate = self.rate(step)
        return rate and rate / self.of(step)["ranks"]

    def share(self, step, other):
        """Rate per GPU of a step in % of another one's."""
        a, b = self.per_rank(step), self.per_rank(other)
        return a and b and 100 * a / b

    def generation(self, step):
        """New tokens per second; the first repetition is warm-up."""
        report = self.of(step)
        return report and BATCH * NEW_TOKENS / report["wall_seconds"][-1]

    def frozen_cost(self, step):
        ratio = self.ratio(step, f"{step}_frozen")
        return ratio and 100 * (ratio - 1)


def figure(name, unit, value, at_least=None, at_most=None):
    judged = value is not None and (at_least is not None or at_most is not None)
    met = (at_least is None or value >= at_least) and (at_most is None or value <= at_most) if judged else None
    return {"name": name, "unit": unit, "value": value, "at_least": at_least, "at_most": at_most, "met": met}


def figures(results):
    """Every figure, null where it was not measured."""
    got = Reports(results)
    passed = got.parity("passed")
    passed = passed if passed is None else int(passed)
    rows = [figure("parity with the goldens, 1 = within the tolerance of bf16", "", passed, at_least=1),
            figure("parity: largest difference of a logit", "", got.parity("max_logits_difference")),
            figure("parity: largest difference of a loss", "", got.parity("max_loss_difference")),
            figure("rate of a square bf16 matrix product", "TFLOP/s", got.matmul / 1e12 if got.on_gpu else None)]
    for kind, label, use, memory in [("f32", "f32 master and moments", 50, 141), ("bf16", "bf16 master and moments", None, 60)]:
        ours, peer = f"train_{kind}", f"peer_{kind}"
        peer_label = "transformers, " + ("bf16 autocast over f32" if kind == "f32" else "all bf16")
        rows += [figure(f"{label}: tokens per second", "tokens/s", got.rate(ours)),
                 figure(f"{label}: MFU", "%", got.utilisation(ours), at_least=use),
                 figure(f"{label}: peak memory", "GB", got.memory(ours), at_most=memory),
                 figure(f"{label}: cost of 5 % frozen in time", "%", got.frozen_cost(ours), at_most=2),
                 figure(f"{peer_label}: tokens per second", "tokens/s", got.rate(peer)),
                 figure(f"{peer_label}: MFU", "%", got.utilisation(peer)),
                 figure(f"{peer_label}: peak memory", "GB", got.memory(peer)),
                 figure(f"{label}: ours over transformers", "x", got.ratio(ours, peer), at_least=1.3 if kind == "f32" else None)]
    rows += [figure("cpift-train, 1 GPU: tokens per second", "tokens/s", got.rate("job")),
             figure("cpift-train, 1 GPU: peak memory", "GB", got.memory("job"))]
    for mode, most in [("optimizer", None), ("all", 24)]:
        step = f"job_offload_{mode}"
        rows += [figure(f"--offload {mode}: tokens per second", "tokens/s", got.rate(step)),
                 figure(f"--offload {mode}: rate of that without", "%", got.share(step, "job"), at_least=80),
                 figure(f"--offload {mode}: peak memory", "GB", got.memory(step), at_most=most)]
    count = (got.of("job_ranks") or {}).get("ranks")
    rows += [figure("all GPUs: their number", "", count),
             figure("all GPUs: tokens per second of each", "tokens/s", got.per_rank("job_ranks")),
             figure("all GPUs: rate of each, of that of 1 GPU", "%", got.share("job_ranks", "job"), at_least=94),
             figure("all GPUs: peak memory of each", "GB", got.memory("job_ranks")),
             figure("transformers + FSDP2: tokens per second of each", "tokens/s", got.per_rank("peer_ranks")),
             figure("transformers + FSDP2: peak memory of each", "GB", got.memory("peer_ranks")),
             figure("all GPUs: ours over FSDP2", "x", got.ratio("job_ranks", "peer_ranks"))]
    ours, peer = got.generation("generate"), got.generation("peer_generate")
    rows += [figure("greedy generation: new tokens per second", "tokens/s", ours),
             figure("transformers.generate: new tokens per second", "tokens/s", peer),
             figure("generation: ours over transformers", "x", ours and peer and ours / peer, at_least=3)]
    return rows


# The results file.

def earlier(out, machine):
    """The steps of an earlier run on the same device."""
    if not out.exists():
        return {}
    results = json.loads(out.read_text())
    then, now = (m.get("gpu", "the CPU") for m in (results["machine"], machine))
    if then != now:
        sys.exit(f"gpu: {out} holds results of {then}, and this is {now}\n  hint: --out FILE names another file")
    return results["steps"]


def write(out, results):
    results["figures"] = figures(results)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps(results, indent=2) + "\n")
    part.replace(out)


def show(results):
    for row in results["figures"]:
        least, most = row["at_least"], row["at_most"]
        target = f"target ≥ {least}" if least is not None else f"target ≤ {most}" if most is not None else ""
        value = "not measured" if row["value"] is None else f"{row['value']:.5g} {row['unit']}"
        verdict = {None: "", True: "met", False: "MISSED"}[row["met"]]
        print(f"{row['name']:<62} {value:>16}   {target:<14}{verdict}".rstrip())


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", required=True, metavar="DIR[:DIR]",
                        help="where cpift-train, check_parity, bench_train and bench_generate are")
    parser.add_argument("--only", action="append", choices=STEPS, metavar="STEP", help=f"any of {', '.join(STEPS)}")
    parser.add_argument("--steps", type=int, default=6, help="training steps of a run; the first is warm-up")
    parser.add_argument("--limit", type=int, default=600, metavar="SECONDS", help="the most that a step may take")
    parser.add_argument("--out", type=Path, default=HERE / "results/gpu.json", metavar="FILE")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first is warm-up")
    return args


def main():
    args = parse()
    try:
        machine = run_json([sys.executable, DEVICE], DEVICE_LIMIT_S)
    except Failed as error:
        sys.exit(f"gpu: {error}")
    note = WHAT if machine["device"] == "cuda" else NO_GPU
    print(f"gpu: {machine.get('gpu', note)}", file=sys.stderr)
    results = {"figures": [], "note": note, "machine": machine, "steps": earlier(args.out, machine)}
    with tempfile.TemporaryDirectory() as scratch:
        tiny = Path(scratch) / "config.json"
        tiny.write_text(json.dumps(TINY))
        plan = Plan(args, machine, tiny, Path(scratch))
        for name in args.only or STEPS:
            print(f"gpu: {name} …", file=sys.stderr, flush=True)
            record = results["steps"][name] = run_step(name, plan)
            write(args.out, results)
            print(f"gpu: {name}: {record['error'] or 'done'}, {record['seconds']} s", file=sys.stderr)
    show(results)
    print(f"written: {args.out}", file=sys.stderr)
    sys.exit(any(results["steps"][name]["state"] == "failed" for name in args.only or STEPS))


if __name__ == "__main__":
    main()
