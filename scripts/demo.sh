#!/usr/bin/env bash
# `make demo`: the whole pipeline on fixtures/demo (a tiny LLaMA and five synthetic tasks), and what
# came of it.
set -euo pipefail
cd "$(dirname "$0")/.."
export BIN=${BIN:-target/release}
export BASE=fixtures/demo/base TASKS=fixtures/demo/tasks.toml RUN=${RUN:-runs/demo}
# The method as published, and its baselines.
export METHODS='full-sft multi-stage cpi-ft'
export PROBE_TOKENS=${PROBE_TOKENS:-50000} BACKBONE_TOKENS=${BACKBONE_TOKENS:-30000} FINAL_TOKENS=${FINAL_TOKENS:-270000}
# auto: the τ whose partition is the most stable, so that the demo does not hang on one threshold.
export TAU=${TAU:-auto} P=${P:-1} ORDER=${ORDER:-overlap} SEED=${SEED:-0} THREADS=${THREADS:-1}
# Held-out losses show in the report what each stage cost the tasks before it, seldom enough to cost
# little time.
export TRAIN_FLAGS=${TRAIN_FLAGS:---batch-size 16 --lr 1e-3 --weight-decay 0.01 --eval-every 200 --eval-rows 16 --device cpu}
export EVAL_FLAGS=${EVAL_FLAGS:---batch-size 50 --device cpu}
start=$SECONDS
make --no-print-directory -j"${JOBS:-2}" -f scripts/pipeline.mk all
python3 scripts/summary.py
echo
python3 scripts/check_demo.py "$RUN" "$TASKS"
echo "Took $((SECONDS - start)) s. The files are in $RUN; open $RUN/report.html in a browser."
