#!/usr/bin/env bash
# Compares training steps with those of transformers on one thread of the CPU, side by side;
# scripts/bench/train.py has the options.
#
#   scripts/bench/train.sh [--rounds N] [--steps N] [--shape BxS …] [--compute-dtype bf16]
#       [--gradient-checkpointing]
#   VENV=DIR     Python with torch 2.11 and transformers; made where missing [.cache/oracle-venv]
#   MODEL=DIR    the checkpoint; fetched where missing [.cache/smollm2-135m]
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${VENV:-.cache/oracle-venv}
model=${MODEL:-.cache/smollm2-135m}

scripts/oracle/setup.sh "$venv" >&2
scripts/smollm2/fetch.sh "$model" "$venv" >&2
cargo build --release -p cpift-torch --example bench_train
exec "$venv/bin/python" scripts/bench/train.py --model "$model" --ours target/release/examples/bench_train "$@"
