#!/usr/bin/env bash
# Makes .cache/fake-cuda: libtorch 2.11.0 with its CUDA half (lib/), and the libraries of this folder that
# stand in for the driver, the runtime and the libraries of CUDA (fake/). From PyPI come the torch wheel
# (530 MB, 0.6 GB of it are kept) and the headers of the CUDA runtime; no library of NVIDIA is used.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd); cd "$here/../.."
torch=2.11.0
made=.cache/fake-cuda
lib=$made/lib fake=$made/fake

if [ "$(cat "$made/version" 2>/dev/null || true)" != "$torch" ]; then
    mkdir -p .cache; tmp=$(mktemp -d "$PWD/.cache/fake-cuda.tmp.XXXXXX")
    trap 'rm -rf "$tmp"' EXIT
    echo "fake-cuda: fetching the torch $torch wheel and the headers of the CUDA runtime from PyPI"
    python3 -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
        -d "$tmp/wheels" torch==$torch nvidia-cuda-runtime==13.0.96 nvidia-cuda-crt==13.0.88
    python3 - "$tmp" <<'PY'
"""Unpacks the libraries of libtorch and the headers of the runtime."""
import glob, os, shutil, sys, zipfile
tmp = sys.argv[1]
for wheel in glob.glob(os.path.join(tmp, "wheels", "*.whl")):
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            name, base = entry.filename, os.path.basename(entry.filename)
            if name.startswith("torch/lib/lib") and ".so" in base and "python" not in base:
                path = os.path.join("lib", base)
            elif "/include/" in name and name.startswith("nvidia/") and not name.endswith("/"):
                path = os.path.join("include", name.split("/include/", 1)[1])
            elif "cuda_runtime" in wheel and base.startswith("libcudart.so"):
                path = os.path.join("lib", base)
            else:
                continue
            path = os.path.join(tmp, "out", path)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with archive.open(entry) as source, open(path, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
PY
    # The CPU half is in .libtorch already, if that is laid out from the same wheel.
    for name in libtorch_cpu.so libc10.so libtorch.so libgomp.so.1 libcudart.so.13 libcupti.so.13; do
        own=.libtorch/lib/$name
        if [ -e "$own" ] && { [ ! -e "$tmp/out/lib/$name" ] || cmp -s "$own" "$tmp/out/lib/$name"; }; then
            ln -sf "$(readlink -f "$own")" "$tmp/out/lib/$name"
        fi
    done
    echo $torch >"$tmp/out/version"
    rm -rf "$made"; mv "$tmp/out" "$made"
    echo "fake-cuda: $made has $(du -sh "$made" | cut -f1)"
fi

if [ -e "$fake/made" ] && [ -z "$(find "$here" -newer "$fake/made" -type f)" ]; then exit; fi
rm -rf "$fake"; mkdir -p "$fake"
g++ -std=c++17 -O1 -fPIC -shared -Wall -I "$made/include" -Wno-unused-function \
    "$here/device.cpp" "$here/nccl.cpp" -o "$fake/libdevice.so" -lpthread -ldl

undefined() { nm -D --undefined-only "$@" | awk '$1 == "U" { sub(/@.*/, "", $2); print $2 }' | sort -u; }
defined() { nm -D --defined-only "$1" | awk '{ sub(/@.*/, "", $3); print $3 }' | sort -u; }
cuda=("$lib"/libtorch_cuda.so "$lib"/libc10_cuda.so "$lib"/libtorch_cuda_linalg.so "$lib"/libtorch_nvshmem.so)

# The driver, of which libtorch asks little more than whether a device is in use.
{
    for f in $(undefined "$lib/libcaffe2_nvrtc.so" | grep '^cu[A-Z]'); do
        case $f in cuDevicePrimaryCtxGetState | cuCtxGetCurrent) ;; *) echo "int $f(void) { return 0; }" ;; esac
    done
    echo 'int cuCtxGetCurrent(void **c) { static int x; *c = &x; return 0; }'
    echo 'int cuDevicePrimaryCtxGetState(int d, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }'
} | gcc -w -x c -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$fake/libcuda.so.1" -
# The libraries of mathematics: every call succeeds and does nothing. The rest must not be called.
{
    echo '#include <stdio.h>'
    echo '#include <stdlib.h>'
    for f in $(undefined "${cuda[@]}" | grep -E '^(cublas|cusparse|cusolver|cudnn|curand|cufft)'); do
        case $f in
            cublasCreate_v2 | cublasLtCreate | cusparseCreate | cusolverDnCreate | cudnnCreate)
                echo "int $f(void **h) { static int x; *h = &x; return 0; }" ;;
            cublasLtMatmulAlgoGetHeuristic)
                echo "int $f(void *a, void *b, void *c, void *d, void *e, void *f, void *g, int n, void *r, int *count) {"
                echo '    *count = 1; return 0; }' ;;
            *) echo "int $f(void) { return 0; }" ;;
        esac
    done
    for f in $(undefined "${cuda[@]}" "$lib/libcaffe2_nvrtc.so" | grep -E '^(nccl|cuFile|nvrtc|nvshmem)' |
        comm -23 - <(defined "$fake/libdevice.so")); do
        echo "int $f(void) { fprintf(stderr, \"fake-cuda: $f is not there\\n\"); abort(); }"
    done
} | gcc -w -x c -shared -fPIC -o "$fake/libmath.so" -
# Empty libraries of the names and versions that the loader looks for.
needing=("${cuda[@]}" "$lib/libcaffe2_nvrtc.so")
needed=$(for l in "${needing[@]}"; do readelf -dW "$l"; done |
    sed -n 's/.*NEEDED.*\[\(lib\(cu\|nv\|nccl\)[^]]*\)\].*/\1/p' | sort -u)
for soname in $needed; do
    if [ -e "$lib/$soname" ] || [ -e "$fake/$soname" ]; then continue; fi
    for l in "${needing[@]}"; do readelf -VW "$l"; done | awk -v file="$soname" '
        / File: / { of = $0 ~ " File: " file "( |$)" }
        / Name: / && of { sub(/.* Name: /, ""); if (!seen[$1]++) print $1 " { };" }
        END { if (!length(seen)) print "{ };" }' >"$fake/versions"
    gcc -x c -shared -fPIC -Wl,-soname,"$soname" -Wl,--version-script="$fake/versions" -o "$fake/$soname" /dev/null
done
rm "$fake/versions"
touch "$fake/made"
echo "fake-cuda: the device is in $fake"
