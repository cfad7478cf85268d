#!/usr/bin/env bash
# Makes the oracle environment: Python with PyTorch and transformers, the reference our numbers are
# checked against.
#
#   scripts/oracle/setup.sh [VENV]      default: .cache/oracle-venv
#   ORACLE_TORCH=small (default)        the PyPI wheel alone with stand-ins for its CUDA libraries;
#       1 GB, CPU only, needs gcc
#   ORACLE_TORCH=full                   plain `pip install torch`, for a machine with a GPU or room
#       for 5 GB
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${1:-.cache/oracle-venv}
kind=${ORACLE_TORCH:-small}
torch=torch==2.11.0
die() { printf 'oracle/setup: %s\n' "$*" >&2; exit 1; }
imports() { "$venv/bin/python" -c 'import torch, transformers, gguf, jinja2; torch.ones(2).sum()' >/dev/null 2>&1; }

command -v python3 >/dev/null || die "python3 is needed"
case $kind in small | full) ;; *) die "ORACLE_TORCH=$kind: expected small or full" ;; esac
if imports; then echo "oracle: $venv is ready"; exit; fi

[ -x "$venv/bin/python" ] || python3 -m venv "$venv" || die "cannot make $venv (hint: install python3-venv)"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
if [ "$kind" = full ] || [ "$(uname -sm)" != "Linux x86_64" ]; then
    pip install -q "$torch"    # elsewhere the wheel of PyPI is a CPU build already
else
    [ ! -e /dev/nvidia0 ] || die "this machine has a GPU: use ORACLE_TORCH=full"
    for tool in gcc nm readelf; do command -v $tool >/dev/null || die "$tool is needed (hint: install gcc and binutils, or ORACLE_TORCH=full)"; done
    pip install -q --no-deps "$torch" nvidia-cuda-cupti==13.0.85 nvidia-cuda-runtime==13.0.96
    pip install -q setuptools typing_extensions sympy networkx jinja2 filelock fsspec    # what torch imports itself
fi
pip install -q -r scripts/oracle/requirements.txt
imports || { [ "$kind" = small ] && "$venv/bin/python" scripts/oracle/stub_cuda.py "$venv"; }
"$venv/bin/python" -c 'import torch, transformers
print(f"oracle: torch {torch.__version__}, transformers {transformers.__version__}")'
