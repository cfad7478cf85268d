#!/usr/bin/env bash
# `make test-dist`: unpacks the tarball of `make dist` in a fresh Debian without Rust and without
# libtorch, and runs the demo there, as root with debootstrap. Nothing is left behind.
set -euo pipefail
cd "$(dirname "$0")/.."
tarball=$(ls dist/cpift-*-x86_64-linux*.tar.gz | head -1)
(cd dist && sha256sum --quiet -c SHA256SUMS)
command -v debootstrap > /dev/null || { apt-get update && apt-get install -y --no-install-recommends debootstrap; } > /dev/null
root=$(mktemp -d)
trap 'umount "$root/proc" 2> /dev/null || true; rm -rf "$root"' EXIT
debootstrap --variant=minbase --include=make,python3 bookworm "$root" "${MIRROR:-http://deb.debian.org/debian}" \
    > "$root.log" 2>&1 || { tail -20 "$root.log" >&2; exit 1; }
rm -f "$root.log"
mount -t proc proc "$root/proc"
mkdir -p "$root/opt/elsewhere"
tar -xzf "$tarball" -C "$root/opt/elsewhere"
home="/opt/elsewhere/$(basename "$tarball" .tar.gz)"
inside() { chroot "$root" env -i HOME=/root PATH=/usr/bin:/bin LC_ALL=C.UTF-8 "$@"; }
inside sh -c '! command -v cargo && ! command -v rustc'
for name in probe mask group merge train eval pipeline; do inside "$home/bin/cpift-$name" --version; done
inside "$home/bin/cpift-demo" /root/demo
test -s "$root/root/demo/report.html" -a -s "$root/root/demo/table.md"
echo "dist: the demo ran in $(sed -n 's/^PRETTY_NAME="\(.*\)"/\1/p' "$root/etc/os-release") without Rust"
