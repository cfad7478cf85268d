#!/usr/bin/env bash
# install.sh: programs into PREFIX/bin. The three that use libtorch go to PREFIX/lib/cpift/bin,
# where their rpath ($ORIGIN/../../.libtorch/lib) finds PREFIX/lib/.libtorch, and get a link in
# PREFIX/bin.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${PREFIX:?}" "${BIN:?}"
install -d "$PREFIX/bin" "$PREFIX/lib/cpift/bin"
for name in mask group merge pipeline; do install -m 755 "$BIN/cpift-$name" "$PREFIX/bin/"; done
for name in probe train eval; do
    install -m 755 "$BIN/cpift-$name" "$PREFIX/lib/cpift/bin/"
    ln -sf "../lib/cpift/bin/cpift-$name" "$PREFIX/bin/cpift-$name"
done
rm -rf "$PREFIX/lib/.libtorch"
mkdir "$PREFIX/lib/.libtorch"
cp -rL .libtorch/lib "$PREFIX/lib/.libtorch/lib"
echo "installed into $PREFIX/bin"
