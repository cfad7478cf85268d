#!/usr/bin/env bash
# `make smollm2`: checks the converted SmolLM2-135M-Instruct, then runs the whole pipeline on it
# with real data.
#   DATA, MODEL, RUN, BIN    the data folder, the model folder, where to write, the programs
#   SEQ, LIMIT, STEPS, TAU, P, LR, BATCH, THREADS, JOBS    sizes and settings
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${DATA:?}" "${MODEL:?}" "${RUN:?}" "${BIN:?}" "${SEQ:?}" "${LIMIT:?}"
for task in gsm8k codealpaca logiqa alpaca ultrachat; do
    [ -f "$DATA/$task/train.jsonl" ] || {
        echo "smollm2: $DATA/$task/train.jsonl is missing (hint: scripts/fetch-data.sh $DATA fetches the public data)" >&2; exit 3; }
done
mkdir -p "$RUN"
# Written only when it changes: the file is an input of every stage.
sed -e "s|@DATA@|$(realpath "$DATA")|; s|@SEQ@|$SEQ|" scripts/smollm2/tasks.toml.in >"$RUN/tasks.toml.new"
cmp -s "$RUN/tasks.toml.new" "$RUN/tasks.toml" && rm "$RUN/tasks.toml.new" || mv "$RUN/tasks.toml.new" "$RUN/tasks.toml"

echo "Checking the model: loss on a paragraph, a greedy answer, token ids of 200 rows"
cargo run --quiet --release -p cpift-torch --example check_smollm2 -- "$MODEL" "$DATA"

# STEPS counts batches of a probe; a token budget keeps the methods equal whatever their rows'
# lengths.
BATCH=${BATCH:-4}
STEPS=${STEPS:-8}
export BIN BASE=$MODEL TASKS=$RUN/tasks.toml RUN
export METHODS='full-sft multi-stage cpi-ft'
export PROBE_TOKENS=${PROBE_TOKENS:-$((STEPS * BATCH * SEQ * 3 / 4))}
export BACKBONE_TOKENS=${BACKBONE_TOKENS:-$((2 * PROBE_TOKENS))} FINAL_TOKENS=${FINAL_TOKENS:-$((2 * PROBE_TOKENS))}
export TAU=${TAU:-auto} P=${P:-1} ORDER=${ORDER:-random} SEED=${SEED:-0} THREADS=${THREADS:-1}
export TRAIN_FLAGS="--batch-size $BATCH --lr ${LR:-5e-5} --warmup-ratio 0.1 ${TRAIN_FLAGS:-}"
export EVAL_FLAGS="--batch-size 8 --limit $LIMIT ${EVAL_FLAGS:-}"
start=$SECONDS
make --no-print-directory -j"${JOBS:-2}" -f scripts/pipeline.mk all
python3 scripts/summary.py
echo "Took $((SECONDS - start)) s."
