#!/usr/bin/env python3
"""cpift-eval beside lm-evaluation-harness 0.4.13: the same checkpoint, the same rows of GSM8K and
LogiQA, 0-shot, f32, greedy.

DATA has gsm8k/eval.jsonl and logiqa/eval.jsonl with `messages` (GSM8K: question and worked
solution; LogiQA: passage, question and lettered options in the user's turn; `choices`, `answer`).
The harness reads them through its own task files, dataset aside.

Demanded: the same extracted answers on at least 99 of 100 rows, log-likelihoods within 1e-3 nats,
the same acc and acc_norm; where all answers are the same, the same means and standard errors of
GSM8K.
"""
import argparse
import hashlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

TASKS = Path(__file__).with_name("lm_eval_tasks.toml")
SAME_ANSWERS, LOG_LIKELIHOOD = 0.99, 1e-3


def rows(path, limit):
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(limit))]


def as_harness(name, row, split):
    """A row in the columns of the harness's own data set."""
    user, assistant = (message["content"] for message in row["messages"])
    if name == "gsm8k":
        return {"question": user, "answer": assistant}
    parts = re.search(split, user)
    return {"context": parts["passage"], "question": parts["question"], "options": row["choices"], "label": "abcd"[row["answer"]]}


def harness_task(name, work, count):
    """The harness's own task over local rows; few-shot sources are not needed."""
    import lm_eval
    own = next((Path(lm_eval.__file__).parent / "tasks" / name).glob(f"{name}.yaml"))
    (work / f"{name}.yaml").write_text(
        f"include: {own}\ntask: local_{name}\ndataset_path: json\ndataset_name: null\ndataset_kwargs:\n  data_files:\n"
        f"    test: {work / name}.jsonl\ntraining_split: null\nvalidation_split: null\nfewshot_split: null\nnum_fewshot: 0\n")
    return f"local_{name}"


def inputs(args):
    """What the harness's part depends on: weights (by path, size and time), the rows themselves,
    how many, and the task list."""
    weights = sorted(args.model.resolve().glob("*.safetensors"))
    text = "".join(json.dumps(rows(args.data / name / "eval.jsonl", args.limit)) for name in ("gsm8k", "logiqa"))
    return {"model": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in weights], "limit": args.limit,
            "data": hashlib.sha256(text.encode()).hexdigest(), "tasks": hashlib.sha256(TASKS.read_bytes()).hexdigest()}


def run_harness(args):
    """One list of samples a task, kept in the work folder: what the harness takes minutes for is
    not asked twice of the same inputs."""
    kept, asked = args.work / "harness.json", inputs(args)
    if kept.is_file():
        found = json.loads(kept.read_text())
        if found.get("inputs") == asked:
            return found
        print(f"{kept} is of another model, other rows or another limit: the harness runs again")
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    torch.set_num_threads(args.threads)
    splits = {task["name"]: task.get("split") for task in tomllib.loads(TASKS.read_text())["task"]}
    names = []
    for name, split in splits.items():
        data = [as_harness(name, row, split) for row in rows(args.data / name / "eval.jsonl", args.limit)]
        (args.work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
        names.append(harness_task(name, args.work, args.limit))
    found = simple_evaluate(model="hf", model_args={"pretrained": str(args.model), "dtype": "float32"}, tasks=names, num_fewshot=0,
                            device="cpu", batch_size=args.batch_size, task_manager=TaskManager(include_path=str(args.work)))
    gsm8k, logiqa = (found["samples"][name] for name in names)
    result = {
        "inputs": asked,
        "gsm8k": [{"row": s["doc_id"] + 1, "filter": s["filter"], "extracted": s["filtered_resps"][0] if
                   isinstance(s["filtered_resps"], list) else s["filtered_resps"], "output": s["resps"][0][0],
                   "score": s["exact_match"]} for s in gsm8k],
        "logiqa": [{"row": s["doc_id"] + 1, "log_likelihoods": [r[0][0] for r in s["resps"]], "acc": s["acc"],
                    "acc_norm": s["acc_norm"]} for s in logiqa],
        "results": {name.removeprefix("local_"): found["results"][name] for name in names},
    }
    kept.write_text(json.dumps(result, indent=1, default=str))
    return result


def run_ours(args):
    """outputs.jsonl by task, and scores.json."""
    out = args.work / "ours"
    tasks = args.work / "tasks.toml"
    tasks.write_text(TASKS.read_text().replace("DATA/", f"{args.data.resolve()}/"))
    subprocess.run([args.ours, "run", "--model", args.model, "--tasks", tasks, "--out", out, "--force", "--prompt", "harness",
                    "--limit", str(args.limit), "--batch-size", str(args.batch_size), "--device", "cpu",
                    "--threads", str(args.threads)], check=True)
    outputs = [json.loads(line) for line in (out / "outputs.jsonl").read_text().splitlines()]
    by_task = {name: [o for o in outputs if o["task"] == name] for name in ("gsm8k", "logiqa")}
    return by_task, {task["task"]: task for task in json.loads((out / "scores.json").read_text())["tasks"]}


def compare_gsm8k(harness, ours):
    """Rows whose extracted answers agree, by filter, and whose whole outputs do: whether enough do,
    and the filters where all do."""
    fields = {"strict-match": "extracted", "flexible-extract": "flexible_extract"}
    ok, alike = True, set()
    by_row = {o["row"]: o for o in ours}
    for name, field in fields.items():
        samples = [s for s in harness if s["filter"] == name]
        same = sum(s["extracted"] == by_row[s["row"]][field] for s in samples)
        outputs = sum(s["output"] == by_row[s["row"]]["output"] for s in samples)
        print(f"gsm8k {name}: {same} of {len(samples)} extracted answers the same; {outputs} outputs the same byte for byte")
        ok &= same >= SAME_ANSWERS * len(samples)
        if same == len(samples):
            alike.add(name)
    return ok, alike


def compare_logiqa(harness, ours):
    """The largest difference of log-likelihoods, and whether every row is judged alike."""
    by_row = {o["row"]: o for o in ours}
    pairs = [(s, by_row[s["row"]]) for s in harness]
    apart = max(abs(a - b) for s, o in pairs for a, b in zip(s["log_likelihoods"], o["log_likelihoods"], strict=True))
    judged = sum((s["acc"], s["acc_norm"]) == (o["acc"], o["acc_norm"]) for s, o in pairs)
    print(f"logiqa: log-likelihoods apart by at most {apart:.2e} nats (allowed {LOG_LIKELIHOOD}); {judged} of {len(pairs)} rows alike")
    return apart <= LOG_LIKELIHOOD and judged == len(pairs)


def compare_means(harness, scores, alike):
    """acc, acc_norm, GSM8K's exact_match and their standard errors, as both report them; GSM8K's by
    the filters in `alike` must agree."""
    figure = lambda task, name: task["metric"] if task["metric"]["name"] == name else task["also"][name]
    pairs = [("logiqa", f"{name},none", name, True) for name in ("acc", "acc_norm")]
    pairs += [("gsm8k", "exact_match,strict-match", "exact_match", "strict-match" in alike),
              ("gsm8k", "exact_match,flexible-extract", "exact_match_flexible", "flexible-extract" in alike)]
    ok = True
    for task, theirs, name, demanded in pairs:
        ours = figure(scores[task], name)
        mean, stderr = harness[task][theirs], harness[task][theirs.replace(",", "_stderr,")]
        # Of one row there is none: "N/A" there, null here.
        number = lambda x: x if isinstance(x, float) and x == x else None
        errors = [number(stderr), number(ours["stderr"])]
        shown = ["none" if error is None else f"{error:.4f}" for error in errors]
        print(f"{task} {name}: harness {mean:.4f} ± {shown[0]}, ours {ours['value']:.4f} ± {shown[1]}")
        same = errors == [None, None] or None not in errors and abs(errors[0] - errors[1]) < 1e-9
        ok &= not demanded or (abs(mean - ours["value"]) < 1e-9 and same)
    return ok


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the checkpoint")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="holds gsm8k/ and logiqa/")
    parser.add_argument("--ours", type=Path, metavar="FILE", help="the program cpift-eval; without it only the harness runs")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="what both wrote; the harness's part is kept")
    parser.add_argument("--limit", type=int, default=100, help="rows of each task")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    harness = run_harness(args)
    if args.ours is None:
        return 0
    outputs, scores = run_ours(args)
    enough, alike = compare_gsm8k(harness["gsm8k"], outputs["gsm8k"])
    checks = [enough, compare_logiqa(harness["logiqa"], outputs["logiqa"]), compare_means(harness["results"], scores, alike)]
    print("the same" if all(checks) else "NOT the same")
    return 0 if all(checks) else 1


if __name__ == "__main__":
    sys.exit(main())
