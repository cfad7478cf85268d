#!/usr/bin/env bash
# Lays out libtorch 2.11.0 in .libtorch/{lib,include}, where the build and the binaries' rpath look
# for it.
#
#   LIBTORCH=DIR              use that libtorch (a link is made)
#   LIBTORCH_USE_PYTORCH=1    use the libtorch of python3's installed PyTorch (a link is made)
#   CUDA=1                    fetch the CUDA half too (several GB)
#   otherwise                 unpack the CPU half of the PyPI wheel (about 500 MB)
set -euo pipefail
cd "$(dirname "$0")/.."
version=2.11.0
dest=.libtorch
die() { printf 'setup-libtorch: %s\n' "$*" >&2; exit 1; }

link_to() {
    [ -e "$1/lib/libtorch_cpu.so" ] || die "$1/lib/libtorch_cpu.so not found: $2 does not name a libtorch"
    local found=""
    if [ -f "$1/build-version" ]; then
        found=$(cut -d+ -f1 <"$1/build-version")
    elif [ -f "$1/version.py" ]; then
        found=$(sed -n "s/^__version__ = '\([0-9.]*\).*/\1/p" "$1/version.py")
    fi
    [ -z "$found" ] || [ "$found" = "$version" ] || die "$1 is libtorch $found, expected $version (hint: tch 0.24 needs $version)"
    rm -rf "$dest"; ln -s "$1" "$dest"
    echo "libtorch: $dest -> $1"
}

if [ -n "${LIBTORCH:-}" ] && [ "$(realpath -ms "$LIBTORCH")" != "$PWD/$dest" ]; then
    link_to "$(readlink -m "$LIBTORCH")" LIBTORCH; exit
fi
# What an earlier call laid out or linked stays, unless the CUDA half is asked for and missing.
want=$version${CUDA:+ cuda}
have=$(cat "$dest/layout" 2>/dev/null || true)
linked() { [ -L "$dest" ] && [ -e "$dest/lib/libtorch_cpu.so" ] && { [ -z "${CUDA:-}" ] || [ -e "$dest/lib/libtorch_cuda.so" ]; }; }
if [ -z "${LIBTORCH_USE_PYTORCH:-}" ] && { [ "$have" = "$want" ] || [ "$have" = "$version cuda" ] || linked; }; then
    echo "libtorch: $dest is there"; exit
fi
python=$(command -v python3 || true)
[ -n "$python" ] || die "python3 with pip is needed to fetch libtorch (hint: install python3-pip, or set LIBTORCH to an unpacked libtorch $version)"
if [ -n "${LIBTORCH_USE_PYTORCH:-}" ]; then
    link_to "$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))')" LIBTORCH_USE_PYTORCH; exit
fi
"$python" -m pip --version >/dev/null 2>&1 || die "python3 has no pip (hint: install python3-pip, or set LIBTORCH)"

tmp=$(mktemp -d "$PWD/.libtorch.tmp.XXXXXX"); trap 'rm -rf "$tmp"' EXIT
echo "libtorch: fetching the torch $version wheel from PyPI"
# libtorch_cpu.so itself needs libcudart and libcupti, even where there is no GPU.
packages=(torch==$version nvidia-cuda-cupti==13.0.85 nvidia-cuda-runtime==13.0.96)
deps=(--no-deps); [ -z "${CUDA:-}" ] || { deps=(); packages=(torch==$version); }
"$python" -m pip download -q --disable-pip-version-check "${deps[@]}" --only-binary=:all: \
    --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_25_x86_64 \
    --platform manylinux_2_18_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --platform manylinux1_x86_64 --platform linux_x86_64 --platform any -d "$tmp/wheels" "${packages[@]}"
"$python" - "$tmp" "${CUDA:-}" <<'PY'
"""Unpacks the shared libraries and headers of the downloaded wheels into out/{lib,include}."""
import glob, os, shutil, sys, zipfile
tmp, cuda = sys.argv[1], bool(sys.argv[2])
cpu_libs = {"libc10.so", "libtorch.so", "libtorch_cpu.so", "libgomp.so.1", "libcudart.so.13", "libcupti.so.13"}
for wheel in glob.glob(os.path.join(tmp, "wheels", "*.whl")):
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            name, base = entry.filename, os.path.basename(entry.filename)
            is_lib = "/lib/" in name and ".so" in base and "python" not in base
            if is_lib and (cuda or base in cpu_libs):
                path = os.path.join(tmp, "out", "lib", base)
            elif name.startswith("torch/include/") and not name.endswith("/"):
                path = os.path.join(tmp, "out", name[len("torch/"):])
            else:
                continue
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with archive.open(entry) as source, open(path, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
PY
printf %s "$version" >"$tmp/out/build-version"
printf %s "$want" >"$tmp/out/layout"
rm -rf "$dest"; mv "$tmp/out" "$dest"
echo "libtorch: $want laid out in $dest ($(du -sh "$dest" | cut -f1))"
