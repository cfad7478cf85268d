#!/usr/bin/env bash
# cpift-eval beside lm-evaluation-harness 0.4.13: extracted answers, log-likelihoods, acc and
# acc_norm of the same rows.
#
#   DATA=DIR scripts/oracle/check_lm_eval.sh [--limit N] [--threads N]
#   DATA=DIR     with gsm8k/eval.jsonl and logiqa/eval.jsonl
#   MODEL=DIR    the checkpoint [.cache/smollm2-135m]
#   VENV=DIR [.cache/lm-eval-venv], ORACLE_VENV=DIR [.cache/oracle-venv]
#   WORK=DIR     what both wrote; the harness's part is kept [.cache/lm-eval]
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${VENV:-.cache/lm-eval-venv} oracle=${ORACLE_VENV:-.cache/oracle-venv}
model=${MODEL:-.cache/smollm2-135m} data=${DATA:?names the folder with gsm8k/ and logiqa/}

scripts/oracle/setup.sh "$oracle" >&2
scripts/smollm2/fetch.sh "$model" "$oracle" >&2
if ! "$venv/bin/python" -c 'import lm_eval.models.huggingface' >/dev/null 2>&1; then
    "$oracle/bin/python" -m venv "$venv"
    site() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
    # torch and transformers are the oracle's.
    site "$oracle" > "$(site "$venv")/oracle.pth"
    "$venv/bin/python" -m pip --disable-pip-version-check install -q 'lm_eval[hf]==0.4.13'
fi
cargo build --release -p cpift-eval
HF_HUB_OFFLINE=1 exec "$venv/bin/python" scripts/oracle/check_lm_eval.py --model "$model" --data "$data" \
    --work "${WORK:-.cache/lm-eval}" --ours target/release/cpift-eval "$@"
