#!/usr/bin/env bash
# check-needs.sh: names everything that building needs and this machine lacks, with the commands
# that install it. `make setup` begins with it; it takes less than a second.
set -euo pipefail
cd "$(dirname "$0")/.."
missing=() packages=() commands=()
lacks() { missing+=("$1"); [ -z "${2:-}" ] || packages+=("$2"); }
has() { command -v "$1" > /dev/null; }

toolchain=$(sed -n 's/^channel = "\(.*\)"/\1/p' rust-toolchain.toml)
if has rustup; then
    rustup toolchain list 2> /dev/null | grep -q "^$toolchain" || {
        missing+=("Rust $toolchain (rust-toolchain.toml)")
        commands+=("rustup toolchain install $toolchain --component rustfmt --component clippy")
    }
elif ! has cargo; then
    missing+=("cargo, Rust $toolchain")
    commands+=("curl https://sh.rustup.rs -sSf | sh -s -- -y --default-toolchain $toolchain")
elif ! cargo --version | grep -qF " $toolchain "; then
    missing+=("Rust $toolchain ($(cargo --version) is another version, and there is no rustup)")
    commands+=("curl https://sh.rustup.rs -sSf | sh -s -- -y --default-toolchain $toolchain")
fi
has c++ || lacks "a C++ compiler (c++)" g++
has make || lacks make make
if has python3; then
    # Not where another libtorch is named: only its download needs pip.
    [ -n "${LIBTORCH:-}${LIBTORCH_USE_PYTORCH:-}" ] || [ -e .libtorch/lib ] ||
        python3 -m pip --version > /dev/null 2>&1 || lacks "pip of python3" python3-pip
else
    lacks "python3 with pip" "python3 python3-pip"
fi
free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
[ "$free" -ge "${NEED_DISK:-8}" ] || [ -d target ] ||
    missing+=("disk space: $free GiB free here, a build takes up to ${NEED_DISK:-8} GiB")
memory=$(awk '/^MemTotal/ { print int($2 / 1048576 + 0.5) }' /proc/meminfo)
[ "$memory" -ge "${NEED_MEMORY:-4}" ] ||
    missing+=("memory: this machine has $memory GiB, a build takes ${NEED_MEMORY:-4} GiB")

[ "${#missing[@]}" -gt 0 ] || exit 0
{
    echo "missing:"
    printf '  %s\n' "${missing[@]}"
    if [ "${#packages[@]}" -gt 0 ]; then
        if has dnf; then
            commands=("sudo dnf install ${packages[*]/#g++/gcc-c++}" "${commands[@]}")
        else
            commands=("sudo apt-get install ${packages[*]}" "${commands[@]}")
        fi
    fi
    [ "${#commands[@]}" -eq 0 ] || { echo "to install:"; printf '  %s\n' "${commands[@]}"; }
} >&2
exit 1
