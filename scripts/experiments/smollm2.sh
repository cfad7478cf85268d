#!/usr/bin/env bash
# smollm2.sh [EXPERIMENT…]: the experiments (default: reproduce) on SmolLM2-135M-Instruct and the
# five tasks of DATA. On CUDA at full size, on the CPU at a reduced one. Needs the programs and
# python3, no Rust.
#   LOSSES=1    losses alone, over more rows
#   TWICE=1     on the CPU: twice the tokens
#   DATA, MODEL, RUN, BIN, DEVICE=cpu|cuda, SEQ    the data, the model, where to write, the
#       programs, the longest example
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${DATA:?names the folder of the five tasks}"
MODEL=${MODEL:-.cache/smollm2-135m} BIN=${BIN:-target/release} DEVICE=${DEVICE:-cpu} SEQ=${SEQ:-256}
RUN=${RUN:-runs/smollm2-$([ -z "${LOSSES:-}" ] && echo suite || echo losses)${TWICE:+-twice}}
[ -f "$MODEL/model.safetensors" ] || scripts/smollm2/fetch.sh "$MODEL"
mkdir -p "$RUN"
# Here code is scored as well. The rows do not say their language; most are Python.
code='metric = "codebleu"\nlanguage = "python"\nmax_new_tokens = 128'
sed -e "s|@DATA@|$(realpath "$DATA")|; s|@SEQ@|$SEQ|; /^name = \"codealpaca\"/a $code" scripts/smollm2/tasks.toml.in > "$RUN/tasks.toml"
[ $# -gt 0 ] || set -- reproduce
parts=()
[ "$DEVICE" = cuda ] || parts+=(--with small ${TWICE:+--with twice})
if [ -n "${LOSSES:-}" ]; then
    parts+=(--with losses)
    sed -i '/^\(metric\|language\|max_new_tokens\) = /d' "$RUN/tasks.toml"
fi
exec "${PYTHON:-python3}" scripts/experiments/run.py "$@" --suite scripts/experiments/smollm2.toml --base "$MODEL" --tasks "$RUN/tasks.toml" \
    --run "$RUN" --bin "$BIN" "${parts[@]}" --tidy ${SEEDS:+--seeds "$SEEDS"}
