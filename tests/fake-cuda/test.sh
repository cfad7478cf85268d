#!/usr/bin/env bash
# `make test-fake-cuda`: whole runs of every program that computes with --device cuda, on a device that
# computes nothing (README.md). Losses are 0; wrong devices and dtypes, operators that refuse, missing
# symbols and waits of the host show. BIN= and EXAMPLES= name the binaries' folders.
set -euo pipefail
export FAKE_CUDA_COPIES=0
here=$(cd "$(dirname "$0")" && pwd); cd "$here/../.."
bin=${BIN:-target/debug} examples=${EXAMPLES:-$bin/examples}
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
base=fixtures/demo/base tasks=fixtures/demo/tasks.toml
failed=0

# What is on standard error must not hold a warning of libtorch.
check() { # check NAME LOG CODE
    if [ "$3" != 0 ] || grep -q '^\[W' "$2"; then
        failed=$((failed + 1)); echo "FAILED (exit $3): $1"; tail -n 12 "$2" | cut -c1-400
    else
        echo "ok: $1"
    fi
}
one() { # one NAME PROGRAM ARGS…
    local name=$1 code=0; shift
    FAKE_CUDA_STATS=$work/stats "$here/run.sh" "$bin/$1" "${@:2}" >"$work/log" 2>&1 || code=$?
    check "$name" "$work/log" $code
}
ranks() { # ranks N NAME PROGRAM ARGS…
    local n=$1 name=$2 pids=() code=0 port=$((20000 + RANDOM % 9000)); shift 2
    for ((r = 0; r < n; r++)); do
        RANK=$r LOCAL_RANK=$r WORLD_SIZE=$n MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
            timeout -s KILL 300 "$here/run.sh" "$1" "${@:2}" >"$work/log.$r" 2>&1 &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
    for ((r = 0; r < n; r++)); do sed "s/^/rank $r: /" "$work/log.$r"; done >"$work/log"
    # A warning of any rank.
    sed -i 's/^rank [0-9]*: \[W/[W/' "$work/log"
    check "$name" "$work/log" $code
}
size=(--batch-size 4 --lr 1e-3 --device cuda)
train() { # train NAME ARGS…
    local steps=(--steps 3); [[ " $* " == *" --steps "* ]] && steps=()
    one "train: $1" cpift-train run --model "$base" --tasks $tasks --out "$work/out" --force "${size[@]}" "${steps[@]}" "${@:2}"
}

for n in 2 3; do
    FAKE_CUDA_COPIES=100000000000 ranks $n "collectives of $n ranks over NCCL" "$examples/check_nccl"
done

train plain
train "recomputation" --gradient-checkpointing
train "update in backward" --optimizer-in-backward --max-grad-norm 0
train "bf16 state" --master-dtype bf16 --optim-state-dtype bf16
train "bf16 state, update in backward, recomputation" --master-dtype bf16 --optim-state-dtype bf16 \
    --optimizer-in-backward --max-grad-norm 0 --gradient-checkpointing
train "f32" --compute-dtype f32
train "packing" --packing --max-length 256
train "accumulation" --grad-accum 2
train "held-out losses, saved states" --eval-every 2 --eval-rows 4 --save-every 1
train "a frozen embedding" --freeze-embeddings
train "LoRA" --lora-rank 4
train "moments in 8 bits" --optim adamw_8bit
for offload in optimizer all; do
    train "--offload $offload" --offload $offload --save-every 2
    train "--offload $offload, bf16 state, update in backward" --offload $offload --master-dtype bf16 \
        --optim-state-dtype bf16 --optimizer-in-backward --max-grad-norm 0
    train "--offload $offload, recomputation, packing" --offload $offload --gradient-checkpointing --packing
done

one "probe with Fisher" cpift-probe --base $base --tasks $tasks --task logic --out "$work/probe" "${size[@]}" --steps 3 --save-fisher
one "eval with generation" cpift-eval run --model $base --tasks $tasks --out "$work/scores.json" --limit 4 --device cuda

# Masks must come from weights that moved: of probes on the CPU.
masks=()
for task in format recall; do
    "$bin/cpift-probe" --base $base --tasks $tasks --task $task --out "$work/probe-$task" --batch-size 4 --lr 1e-3 --steps 3 \
        --device cpu --quiet
    "$bin/cpift-mask" extract --base $base --tuned "$work/probe-$task" --percent 1 --out "$work/$task.safetensors" --quiet
    masks+=(--mask "$task=$work/$task.safetensors")
done
"$bin/cpift-group" "${masks[@]}" --tau 1 --out "$work/groups.json" --quiet
groups=(--groups "$work/groups.json" "${masks[@]}" --steps 4)
for offload in none optimizer all; do
    train "static masks, --offload $offload" "${groups[@]}" --offload $offload
    train "a moving mask, --offload $offload" --groups "$work/groups.json" --steps 4 --isolation dynamic \
        --mask-interval 1 --offload $offload
done
train "core regions only" "${groups[@]}" --trainable cores

for offload in none optimizer all; do
    ranks 2 "train: 2 ranks, --offload $offload" "$bin/cpift-train" run --model $base --tasks $tasks \
        --out "$work/out-2-$offload" --steps 3 "${size[@]}" --offload $offload --save-every 2
done
ranks 2 "train: 2 ranks, LoRA" "$bin/cpift-train" run --model $base --tasks $tasks --out "$work/out-2-lora" --steps 3 \
    "${size[@]}" --lora-rank 4 --save-every 2
ranks 2 "train: 2 ranks, moments in 8 bits" "$bin/cpift-train" run --model $base --tasks $tasks --out "$work/out-2-8bit" \
    --steps 3 "${size[@]}" --optim adamw_8bit --save-every 2

# The families, each with the kernels its layers need. Not Qwen3-MoE: its layers read from the device
# how many tokens each expert has, and here that is none.
for family in llama3_rope mistral_window qwen2_window qwen3 gemma2 gemma3 phi3 phi4_mini olmo2 granite smollm3; do
    base=$work/$family
    python3 "$here/family.py" fixtures/golden/models/$family fixtures/demo/base "$base"
    train "$family" --eval-every 2 --eval-rows 4
    train "$family: packing, recomputation, accumulation" --packing --max-length 256 --gradient-checkpointing --grad-accum 2
    train "$family: bf16 state, update in backward" --master-dtype bf16 --optim-state-dtype bf16 \
        --optimizer-in-backward --max-grad-norm 0
    train "$family: LoRA" --lora-rank 4
    train "$family: --offload all" --offload all
    one "$family: probe with Fisher" cpift-probe --base "$base" --tasks $tasks --task logic --out "$work/probe" --force \
        "${size[@]}" --steps 3 --save-fisher
    one "$family: eval with generation" cpift-eval run --model "$base" --tasks $tasks --out "$work/scores.json" --force \
        --limit 4 --device cuda
    ranks 2 "$family: 2 ranks" "$bin/cpift-train" run --model "$base" --tasks $tasks --out "$work/out-$family" --steps 3 \
        "${size[@]}"
done

[ $failed = 0 ] || { echo "$failed failed"; exit 1; }
