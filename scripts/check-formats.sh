#!/usr/bin/env bash
# check-formats.sh DATA: loads every file of DATA/raw, each in the layout its source publishes, with
# `cpift-train preview`, and prints what it was taken for and what became of its rows. Rows that use
# tools must be refused. Fails at the first surprise.
#
# BIN    folder of the programs                            (target/release)
# MODEL  checkpoint whose tokenizer and template are used  (fixtures/demo/base)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
[ $# = 1 ] && [ -d "$1/raw" ] || { echo "usage: check-formats.sh DATA (a folder with raw/)" >&2; exit 2; }
data=$(cd "$1" && pwd)
BIN=${BIN:-$root/target/release}
MODEL=${MODEL:-$root/fixtures/demo/base}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Whole rows are wanted whatever context the model has: no weights are loaded, so a longer one costs
# nothing.
mkdir "$work/model"
cp "$MODEL"/*token* "$MODEL"/*.jinja "$work/model/" 2>/dev/null || true
sed -E 's/("max_position_embeddings": *)[0-9]+/\11000000/' "$MODEL/config.json" > "$work/model/config.json"

# preview FILE [KEYS]: the file as a task of its own, with further keys of tasks.toml.
preview() {
    printf '[[task]]\nname = "raw"\ntrain = "%s"\neval = "%s"\nmax_length = 1000000\n%s\n' "$1" "$1" "${2:-}" > "$work/tasks.toml"
    "$BIN/cpift-train" preview --model "$work/model" --tasks "$work/tasks.toml" --rows 1 --color never \
        > "$work/shown" 2> "$work/log"
}

# LogiQA 2.0 has its own columns: templates say how they make a conversation.
logiqa='prompt = """{{ text }}

{{ question }}{% for option in options %}
{{ "ABCD"[loop.index0] }}. {{ option }}{% endfor %}"""
completion = "{{ \"ABCD\"[answer] }}"'

files=0
for file in "$data"/raw/*; do
    name=$(basename "$file")
    files=$((files + 1))
    echo "$name"
    case $name in
        *toolcall*)
            if preview "$file"; then echo "check-formats: $name: rows that use tools were taken" >&2; exit 1; fi
            grep -q 'tool turns are not supported' "$work/log" || { cat "$work/log" >&2; exit 1; }
            sed "s|$data/raw/||; s/^/    /" "$work/log"
            continue ;;
        logiqa*.txt)
            # The first release is not a table: the project's converter reads it.
            PYTHONPATH=$root/scripts python3 -B -c 'import convert_data, json, pathlib, sys
for row in convert_data.logiqa(pathlib.Path(sys.argv[1])): print(json.dumps(row))' "$file" > "$work/converted.jsonl"
            ok=0; preview "$work/converted.jsonl" || ok=$? ;;
        logiqa2*) ok=0; preview "$file" "$logiqa" || ok=$? ;;
        *) ok=0; preview "$file" || ok=$? ;;
    esac
    [ "$ok" = 0 ] || { cat "$work/log" >&2; exit 1; }
    grep -q '«' "$work/shown" || { echo "check-formats: $name: the first example shows no target" >&2; exit 1; }
    sed -E "s|^[^:]*/||; s/^/    /" "$work/log"
done
echo "check-formats: $files files of $data/raw as they should be"
