#!/usr/bin/env bash
# Downloads the five public data sets of the paper and writes them to OUT as
# TASK/{train,eval}.jsonl.
#
#   scripts/fetch-data.sh OUT           RAW=DIR keeps the downloads there (default OUT/raw); files
#       already in it are used
#   TRAIN_ROWS=4000 EVAL_ROWS=300       rows of each task; SEED=0 chooses them
#
# The licences differ, and the data are not ours to give:
#   gsm8k       openai/grade-school-math          MIT
#   codealpaca  sahil2801/CodeAlpaca-20k          CC BY-NC 4.0, written by an OpenAI model
#   logiqa      lgw863/LogiQA-dataset             none stated: treat as for research only
#   alpaca      tatsu-lab/stanford_alpaca         CC BY-NC 4.0, written by an OpenAI model
#   ultrachat   HuggingFaceH4/ultrachat_200k      MIT, written by an OpenAI model
set -euo pipefail
die() { printf 'fetch-data: %s\n' "$*" >&2; exit 1; }
[ $# -eq 1 ] || { echo "usage: scripts/fetch-data.sh OUT" >&2; exit 2; }
out=$1
raw=${RAW:-$out/raw}
train_rows=${TRAIN_ROWS:-4000}
eval_rows=${EVAL_ROWS:-300}
here=$(cd "$(dirname "$0")" && pwd)
for tool in curl python3; do command -v $tool >/dev/null || die "$tool is needed"; done
mkdir -p "$raw"

fetch() { # NAME URL
    [ ! -s "$raw/$1" ] || return 0
    echo "fetch-data: $1"
    curl -fsSL --retry 5 --retry-all-errors --retry-delay 3 -o "$raw/.$1.part" "$2" || die "cannot download $2"
    mv "$raw/.$1.part" "$raw/$1"
}

# The set itself is in Parquet; the rows service of its host gives the same rows as JSON, 100 at a
# time.
fetch_ultrachat() { # SPLIT ROWS
    local offset
    for ((offset = 0; offset < $2; offset += 100)); do
        fetch "ultrachat_$1_$(printf %06d $offset).json" \
            "https://datasets-server.huggingface.co/rows?dataset=HuggingFaceH4%2Fultrachat_200k&config=default&split=$1_sft&offset=$offset&length=100"
    done
}

github=https://raw.githubusercontent.com
for split in train test; do fetch gsm8k_$split.jsonl $github/openai/grade-school-math/master/grade_school_math/data/$split.jsonl; done
for split in Train Test; do fetch "logiqa_${split,,}.txt" $github/lgw863/LogiQA-dataset/master/$split.txt; done
fetch alpaca.json $github/tatsu-lab/stanford_alpaca/main/alpaca_data.json
fetch codealpaca.json https://huggingface.co/datasets/sahil2801/CodeAlpaca-20k/resolve/main/code_alpaca_20k.json
fetch_ultrachat train $((train_rows * 2))    # long dialogues are left out later
fetch_ultrachat test $((eval_rows * 2))
python3 "$here/convert_data.py" "$raw" "$out" --train-rows "$train_rows" --eval-rows "$eval_rows" --seed "${SEED:-0}"
