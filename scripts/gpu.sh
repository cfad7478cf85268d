#!/usr/bin/env bash
# All there is to measure on a GPU, in one run: parity with the goldens, training steps and
# generation of a 7 B model, the same of transformers. Writes one JSON file. Where there is no CUDA
# it runs all of it at tiny size on the CPU and leaves the figures null.
#
#   scripts/gpu.sh [--only STEP …] [--out FILE] [--steps N] [--limit SECONDS]
#   scripts/gpu.sh --help               lists the steps
#   BIN=DIR         cpift-train, check_parity, bench_train and bench_generate
#       [target/release/examples, then target/release]
#   PYTHON=python3  with torch 2.11, whose libtorch the programs load; the peer needs transformers
#       too
# Needed beside the programs: this script, scripts/bench and fixtures/golden. No Rust.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
lib=$("$python" -c 'import os, torch; print(os.path.join(os.path.dirname(torch.__file__), "lib"))') \
    || { echo "gpu: $python has no torch (hint: PYTHON= names one with torch 2.11)" >&2; exit 1; }
bins=target/release/examples:target/release
export LD_LIBRARY_PATH="$lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
exec "$python" scripts/bench/gpu.py --bin "${BIN:-$bins}" "$@"
