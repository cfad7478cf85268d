#!/usr/bin/env bash
# run.sh PROGRAM ARGS…: runs a program of this workspace on a CUDA device that computes nothing (README.md).
set -euo pipefail
made=$(cd "$(dirname "$0")/../.." && pwd)/.cache/fake-cuda
export LD_LIBRARY_PATH=$made/fake:$made/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
LD_PRELOAD="$made/fake/libdevice.so $made/fake/libcuda.so.1 $made/fake/libmath.so" exec "$@"
