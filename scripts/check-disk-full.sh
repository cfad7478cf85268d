#!/usr/bin/env bash
# Masks and merges onto a disk that is full, becomes so while they are written, or is read-only: a small tmpfs, in a mount namespace of
# its own. Each must end with exit code 1 or 3, say what it could not write, and leave nothing. Needs root, or user namespaces.
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

# Room enough at the start; the run is stopped once it has begun its output, the rest of the disk filled, and the run continued.
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
