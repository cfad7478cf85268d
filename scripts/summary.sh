#!/usr/bin/env bash
# What a pipeline run came to: similarity of the cores, groups, budgets, the table, the files. Reads RUN and the budgets
# from the environment, as scripts/pipeline.mk does.
set -euo pipefail
count=$("$BIN/cpift-probe" --tasks "$TASKS" --list | wc -l)
total=$((count * PROBE_TOKENS + BACKBONE_TOKENS + FINAL_TOKENS))
tokens() { grep -m1 -oE '"tokens": [0-9]+' "$RUN/$1/cpift.json" | grep -oE '[0-9]+'; }
probes=0
for probe in "$RUN"/probes/*/; do
    [ -d "$probe" ] || continue
    n=$(tokens "probes/$(basename "$probe")"); probes=$((probes + n))
done
echo
cat "$RUN/logs/groups.log"
echo
echo "Budget of every method: $total tokens ($count probes x $PROBE_TOKENS + backbone $BACKBONE_TOKENS + final $FINAL_TOKENS)."
seen="Seen, to the end of a batch: full-sft $(tokens full-sft), multi-stage $(tokens multi-stage)"
for method in cpi-ft-group cpi-ft; do
    [ ! -f "$RUN/$method/cpift.json" ] || seen+=", $method $((probes + $(tokens backbone) + $(tokens $method)))"
done
echo "$seen (probes $probes, backbone $(tokens backbone))."
echo
cat "$RUN/table.md"
echo
printf '%-22s%s\n' \
    "report" "$RUN/report.html" "finished model" "$RUN/cpi-ft" "fused model" "$RUN/fused" "baselines" "$RUN/full-sft, $RUN/multi-stage" \
    "groups, heat map" "$RUN/groups.json, $RUN/groups.svg" "masks" "$RUN/masks" "scores" "$RUN/scores" "logs" "$RUN/logs"
