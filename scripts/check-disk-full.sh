#!/usr/bin/env bash
# Every stage onto a disk with a random part of the room that its output takes; masks and merges
# also onto one that becomes full while they write, and one that is read-only: a small tmpfs, in a
# mount namespace of its own. Each must end with exit code 1 or 3, say what it could not write, and
# leave nothing (training its states and figures, for --resume). Needs root, or user namespaces.
# SEED= names the random sizes.
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-target/release}

if [ -z "${CHECK_DISK_FULL:-}" ]; then
    flags=-m
    [ "$(id -u)" = 0 ] || flags=-Urm
    unshare $flags true 2>/dev/null || { echo "check-disk-full: no mount namespace can be made: run it as root" >&2; exit 1; }
    CHECK_DISK_FULL=1 exec unshare $flags bash "$0" "$@"
fi

work=$(mktemp -d)
full=$work/full
trap 'umount "$full" 2>/dev/null || true; rm -rf "$work"' EXIT
mkdir "$full"

# A checkpoint of one bf16 tensor of zeros, a sparse file.
make_checkpoint() { # FOLDER ELEMENTS
    local header
    mkdir -p "$1"
    printf '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}' >"$1/config.json"
    header=$(printf '{"w":{"dtype":"BF16","shape":[%d],"data_offsets":[0,%d]}}' "$2" "$((2 * $2))")
    # The length fits two bytes.
    printf "\\x$(printf %x $((${#header} % 256)))\\x$(printf %x $((${#header} / 256)))\\0\\0\\0\\0\\0\\0%s" "$header" \
        >"$1/model.safetensors"
    truncate -s $((8 + ${#header} + 2 * $2)) "$1/model.safetensors"
}

fail() { echo "check-disk-full: $1" >&2; cat "$work/said" >&2; exit 1; }

judge() { # WHAT CODE: the run's exit code, what it said, and what is left
    [ "$2" = 1 ] || [ "$2" = 3 ] || fail "$1: exit code $2"
    grep -q "$full/.*out" "$work/said" || fail "$1: the message does not name the output"
    rm -f "$full/filler"
    [ -z "$(ls -A "$full")" ] || fail "$1: left $(ls -A "$full")"
    echo "ok  $1: exit code $2: $(grep -m1 error: "$work/said" | sed "s|$work|…|g")"
}

# What cannot be written from the start.
check_small() { # WHAT COMMAND...
    local code=0
    "${@:2}" --out "$full/out" --threads 2 2>"$work/said" || code=$?
    judge "$1" "$code"
}

# Room enough at the start; the run is stopped once it has begun its output, the rest of the disk
# filled, and the run continued.
check_filled() { # WHAT COMMAND...
    local code=0 pid
    "${@:2}" --out "$full/out" --threads 1 2>"$work/said" &
    pid=$!
    while kill -0 $pid 2>/dev/null && [ -z "$(ls -A "$full")" ]; do :; done
    kill -STOP $pid
    dd if=/dev/zero of="$full/filler" bs=64k 2>/dev/null || true
    kill -CONT $pid
    wait $pid || code=$?
    judge "$1, filled up midway" "$code"
}

elements=$((64 << 20))
for name in a b; do make_checkpoint "$work/$name" $elements; done
mask=("$BIN/cpift-mask" extract --quiet --base "$work/a" --tuned "$work/b" --percent 100)
slerp=("$BIN/cpift-merge" slerp --quiet --model "$work/a" --model "$work/b")
linear=("$BIN/cpift-merge" linear --quiet --model "$work/a" --model "$work/b" --dtype f32)

mount -t tmpfs -o size=4m tmpfs "$full"
check_small "mask, too little room" "${mask[@]}"
check_small "merge slerp, too little room" "${slerp[@]}"
check_small "merge linear, too little room" "${linear[@]}"
umount "$full"
mount -t tmpfs -o size=16m tmpfs "$full"
check_filled "mask" "${mask[@]}"
umount "$full"
mount -t tmpfs -o size=400m tmpfs "$full"
check_filled "merge slerp" "${slerp[@]}"
check_filled "merge linear" "${linear[@]}"

# Root, too, cannot write there, which permissions alone do not bring about.
mount -o remount,ro "$full"
check_small "mask, read-only" "${mask[@]}"
check_small "merge slerp, read-only" "${slerp[@]}"
check_small "merge linear, read-only" "${linear[@]}"
umount "$full"

# The six stages on the demo's model: so many KiB less than what the output takes.
base=fixtures/demo/base tasks=$work/tasks.toml run=$work/run
for task in code logic; do
    printf '[[task]]\nname = "%s"\ntrain = "%s/train.jsonl"\neval = "%s/eval.jsonl"\n' "$task" {,}"$PWD/fixtures/demo/data/$task"
done >"$tasks"
seed=${SEED:-$(date +%s)}
RANDOM=$seed
echo "random sizes: SEED=$seed"
train=(--tasks "$tasks" --steps 3 --save-every 1 --batch-size 4 --device cpu --threads 1 --force --resume)
stage() { # WHAT OUTPUT COMMAND...: once with room enough, into run/OUTPUT; then with less, ROUNDS times
    local what=$1 out=$run/$2 size code round said=none
    shift 2
    mkdir -p "${out%/*}"
    "$@" --out "$out" 2>"$work/said" || fail "$what: does not run"
    size=$(du -ck "$out"* | tail -n 1 | cut -f 1)
    for ((round = 0; round < ${ROUNDS:-5}; round++)); do
        mount -t tmpfs -o size=$((4 + RANDOM % size))k tmpfs "$full"
        code=0
        "$@" --out "$full/out" 2>"$work/said" || code=$?
        [ "$code" = 0 ] || [ "$code" = 1 ] || fail "$what: exit code $code"
        [ "$code" = 0 ] || grep -q "$full/.*out" "$work/said" || fail "$what: the message does not name the output"
        [ "$code" = 0 ] || grep -qE "os error 28|not enough room" "$work/said" || fail "$what: the message does not say that the disk is full"
        [ "$code" = 0 ] || [ -z "$(find "$full" -mindepth 1 -maxdepth 1 ! -name out.checkpoints)" ] || fail "$what: left $(ls -A "$full")"
        full_disks=$((full_disks + (code == 1)))
        [ "$code" = 0 ] || said=$(grep -m1 error: "$work/said" | sed "s|$work|…|g")
        umount "$full"
    done
    echo "ok  $what: $full_disks disks were too small so far: $said"
}
full_disks=0
for task in code logic; do
    stage "probe $task" "probes/$task" "$BIN/cpift-probe" --base $base --task $task "${train[@]}"
    stage "mask $task" "masks/$task" "$BIN/cpift-mask" extract --base $base --tuned "$run/probes/$task" --force
done
masks=(--mask "code=$run/masks/code" --mask "logic=$run/masks/logic")
stage group groups.json "$BIN/cpift-group" "${masks[@]}" --tau 1.1 --force
stage merge fused "$BIN/cpift-merge" cpi --base $base --groups "$run/groups.json" --task "code=$run/probes/code" \
    --task "logic=$run/probes/logic" "${masks[@]}" --force
stage train final "$BIN/cpift-train" run --model "$run/fused" --base $base --groups "$run/groups.json" "${masks[@]}" \
    "${train[@]}"
stage eval scores "$BIN/cpift-eval" run --model "$run/final" --tasks "$tasks" --limit 3 --device cpu --threads 1 --force

# Two ranks: every one ends with the same exit code and names the directory.
check_ranks() { # WHAT CODE TMPFS_SIZE COMMAND...
    local what=$1 expected=$2 size=$3 port=$((20000 + RANDOM % 9000)) pids=() rank code
    shift 3
    mount -t tmpfs -o size="$size" tmpfs "$full"
    for rank in 0 1; do
        RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port timeout 60 "$@" 2>"$work/said.$rank" &
        pids+=($!)
    done
    for rank in 0 1; do
        code=0
        wait "${pids[$rank]}" || code=$?
        cp "$work/said.$rank" "$work/said"
        [ "$code" = "$expected" ] || fail "$what, rank $rank: exit code $code"
        grep -q "$full" "$work/said" || fail "$what, rank $rank: the message does not name the directory"
        grep -qE "os error 28|not enough room" "$work/said" || fail "$what, rank $rank: the message does not say that the disk is full"
    done
    [ -z "$(find "$full" -mindepth 1 -maxdepth 1 ! -name out.checkpoints)" ] || fail "$what: left $(ls -A "$full")"
    [ ! -e "$work/out" ] || fail "$what: left $work/out"
    umount "$full"
    echo "ok  $what: exit code $expected: $(grep -m1 error: "$work/said" | sed "s|$work|…|g")"
}
ranks=("$BIN/cpift-train" run --model $base --tasks "$tasks" --steps 3 --batch-size 4 --device cpu --threads 1)
check_ranks "2 ranks, weights and moments onto a small disk" 3 2m "${ranks[@]}" --out "$work/out" --offload all --offload-dir "$full"
check_ranks "2 ranks, moments onto a small disk" 3 3m "${ranks[@]}" --out "$work/out" --offload optimizer --offload-dir "$full"
check_ranks "2 ranks, states onto a small disk" 1 2m "${ranks[@]}" --out "$full/out" --save-every 1
check_ranks "2 ranks, the output onto a small disk" 1 2m "${ranks[@]}" --out "$full/out"

[ "$full_disks" -ge 20 ] || fail "only $full_disks disks were too small"
