#!/usr/bin/env bash
# plan.sh [TFLOPS]: what the recipe beside this file takes for each base, computed by cpift-train
# plan, as two Markdown tables: on one device, and on several or with offload. TFLOPS is what the
# device does in training (default 300).
set -euo pipefail
cd "$(dirname "$0")/../.."
BIN=${BIN:-target/release}
rate=${1:-300}
PROBE_TOKENS=${PROBE_TOKENS:-2000000} BACKBONE_TOKENS=${BACKBONE_TOKENS:-10000000} FINAL_TOKENS=${FINAL_TOKENS:-4000000}
save=(--gradient-checkpointing --optimizer-in-backward --max-grad-norm 0)
plan() { # CONFIG ARGUMENTS… : the plan as JSON
    any "$1" --batch-size 4 "${save[@]}" "${@:2}"
}
any() { # CONFIG ARGUMENTS… : the plan as JSON, whatever the batch
    "$BIN/cpift-train" plan --model-config "$1" --max-length 2048 --packing --device cuda --device-memory 131 --tflops "$rate" --json \
        --quiet "${@:2}"
}
value() { python3 -c "import json, sys; d = json.load(sys.stdin); print($1)"; }
echo "| base | parameters | GiB, f32 | GiB, bf16 | minutes, a probe | hours, each method | disk, GB | after clean-probes |"
echo "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
total=$((5 * PROBE_TOKENS + BACKBONE_TOKENS + FINAL_TOKENS))
for base in llama-2-7b mistral-7b ministral-8b qwen1.5-7b gemma-2-9b; do
    config=scripts/paper/$base.json
    probe=$(plan "$config" --tokens "$PROBE_TOKENS" --save-every 500 --save-total-limit 1)
    narrow=$(plan "$config" --tokens "$PROBE_TOKENS" --master-dtype bf16 --optim-state-dtype bf16)
    hours=$(plan "$config" --tokens "$total" | value 'f"""{d["time"]["hours"]:.1f}"""')
    rest='f"""{(d["disk"]["total"] - next(v for k, v in d["disk"]["parts"].items() if k.startswith("probes"))) / 1e9:.0f}"""'
    echo "| $base | $(value 'f"""{d["memory"]["parameters"] / 1e9:.2f} B"""' <<<"$probe") |" \
        "$(value 'f"""{d["memory"]["peak"] / 2**30:.1f}"""' <<<"$probe") |" \
        "$(value 'f"""{d["memory"]["peak"] / 2**30:.1f}"""' <<<"$narrow") |" \
        "$(value 'f"""{d["time"]["hours"] * 60:.0f}"""' <<<"$probe") | $hours |" \
        "$(value 'f"""{d["disk"]["total"] / 1e9:.0f}"""' <<<"$probe") | $(value "$rest" <<<"$probe") |"
done
echo
echo "| base | GiB, 2 ranks | 4 ranks | 8 ranks | GB per step, 8 ranks | GiB, offload | host GB | GB per step | s at 25 GB/s |"
echo "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
gib='f"""{d["memory"]["peak"] / 2**30:.1f}"""'
gb() { value "f\"\"\"{d['traffic']['$1'] / 1e9:.0f}\"\"\""; }
for base in llama-2-7b mistral-7b ministral-8b qwen1.5-7b gemma-2-9b; do
    config=scripts/paper/$base.json
    row="| $base |"
    for world in 2 4 8; do
        shared=$(any "$config" --gradient-checkpointing --world $world --batch-size $((world < 4 ? 4 : world)))
        row+=" $(value "$gib" <<<"$shared") |"
    done
    away=$(plan "$config" --offload all --link 25)
    echo "$row $(gb ranks <<<"$shared") | $(value "$gib" <<<"$away") | $(gb host_memory <<<"$away") | $(gb host_link <<<"$away") |" \
        "$(value 'f"""{d["traffic"]["host_seconds"]:.0f}"""' <<<"$away") |"
done
