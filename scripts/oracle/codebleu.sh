#!/usr/bin/env bash
# Makes an environment with the PyPI package codebleu 0.7.0 and the grammars that cpift-codebleu
# has. Python 3.11 or older: the package strips comments by Python's tokenizer, which 3.12 rewrote.
#
#   scripts/oracle/codebleu.sh [VENV]      default: .cache/codebleu-venv
#   PYTHON=python3.11                      names another python
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${1:-.cache/codebleu-venv}
python=${PYTHON:-python3}
die() { printf 'oracle/codebleu: %s\n' "$*" >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info >= (3, 12))' || die "$python is newer than 3.11 (hint: PYTHON=python3.11)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || die "cannot make $venv (hint: install python3-venv)"
# The package asks for tree-sitter 0.22, which cannot load the grammars of today.
"$venv/bin/python" -m pip --disable-pip-version-check install -q --no-deps codebleu==0.7.0 tree-sitter==0.25.2 \
    tree-sitter-python==0.25.0 tree-sitter-java==0.23.5 tree-sitter-javascript==0.25.0 tree-sitter-c==0.24.2 tree-sitter-cpp==0.23.4
"$venv/bin/python" -c 'import codebleu, importlib.metadata as m; print("oracle: codebleu", m.version("codebleu"))'
