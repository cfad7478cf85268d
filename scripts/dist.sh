#!/usr/bin/env bash
# `make dist`: dist/cpift-VERSION-x86_64-linux.tar.gz, a directory that works wherever it is
# unpacked: the programs, their libtorch (CPU, or CUDA after `make setup CUDA=1`), the demo and its
# pipeline. Beside it the list of what it was built from (SPDX) and SHA-256 sums.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${BIN:?}"
version=$("$BIN/cpift-merge" --version | cut -d' ' -f2)
name=cpift-$version-x86_64-linux
[ ! -e .libtorch/lib/libtorch_cuda.so ] || name+=-cuda
work=$(mktemp -d dist.tmp.XXXXXX)
trap 'rm -rf "$work"' EXIT
share=$work/$name/share/cpift
mkdir -p dist "$share/fixtures"
PREFIX=$PWD/$work/$name scripts/install.sh > /dev/null
find "$work/$name" -type f \( -name 'cpift-*' -o -name '*.so*' \) -exec strip --strip-unneeded {} +
cp -r scripts "$share/"
rm -rf "$share/scripts/oracle" "$share/scripts/bench" "$share/scripts/experiments/results"
find "$share" -name __pycache__ -prune -exec rm -rf {} +
cp -r fixtures/demo "$share/fixtures/"
cp README.md CHANGELOG.md LICENSE-APACHE LICENSE-MIT "$work/$name/"
cat > "$work/$name/bin/cpift-demo" <<'DEMO'
#!/usr/bin/env bash
# cpift-demo [DIR]: the whole pipeline on a tiny model, into DIR (default: cpift-demo). Needs make
# and python3.
set -euo pipefail
home=$(dirname "$(dirname "$(readlink -f "$0")")")
export BIN=$home/bin RUN=${RUN:-$(realpath -m "${1:-cpift-demo}")}
exec "$home/share/cpift/scripts/demo.sh"
DEMO
chmod +x "$work/$name/bin/cpift-demo"
if command -v cargo-sbom > /dev/null || [ -x .cache/bin/cargo-sbom ]; then
    PATH="$PATH:$PWD/.cache/bin" cargo sbom > "dist/$name.spdx.json"
else
    echo "dist: no list of packages (cargo install cargo-sbom)" >&2
fi
# The same bytes for the same files.
tar --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$(git log -1 --format=%ct)" -C "$work" -cf - "$name" |
    gzip -6n > "$work/tar.gz"
mv "$work/tar.gz" "dist/$name.tar.gz"
(cd dist && sha256sum "$name".* > SHA256SUMS)
ls -l dist
