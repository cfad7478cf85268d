#!/usr/bin/env bash
# clean-probes.sh RUN: deletes the probes of a run, and only when what is made of them is there and not older: every probe's mask, and, of a
# run with CPI-FT, the merged model. What another program keeps in RUN/probes stays.
set -euo pipefail
run=${1:-}
stop() { echo "clean-probes: $1" >&2; exit 2; }
[ -n "$run" ] || stop "name the run: make clean-probes RUN=DIR"
[ -d "$run/probes" ] || stop "$run/probes is not there"
# A run without CPI-FT (METHODS) merges nothing.
merges=1
methods=$(grep -E '^ *METHODS=' "$run/settings/variables" 2> /dev/null || true)
[ -z "$methods" ] || grep -qE '[= ]cpi-ft(-group)?( |$)' <<< "$methods" || merges=
[ -z "$merges" ] || [ -f "$run/fused/cpift.json" ] || stop "$run/fused is not there yet: the probes are still needed"
shopt -s nullglob
probes=("$run"/probes/*/cpift.json)
for probe in "${probes[@]}"; do
    name=${probe%/cpift.json}
    name=${name##*/}
    mask=$run/masks/$name.safetensors
    [ -f "$mask" ] || stop "$mask is not there yet: the probe $name is still needed"
    [ ! "$probe" -nt "$mask" ] || stop "$mask is older than its probe: run make pipeline first"
    [ -z "$merges" ] || [ ! "$probe" -nt "$run/fused/cpift.json" ] || stop "$run/fused is older than the probe $name: run make pipeline first"
done
for probe in "${probes[@]}"; do
    rm -rf -- "${probe%/cpift.json}"
done
rmdir -- "$run/probes" 2>/dev/null || true
echo "clean-probes: ${#probes[@]} probes deleted"
