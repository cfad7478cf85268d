#!/usr/bin/env bash
# Installs Debian's Slurm and munge where they are missing; fails where that, or running them, is not possible.
set -euo pipefail
[ "$(id -u)" = 0 ] || { echo "slurm: a private cluster is started by root only" >&2; exit 1; }
command -v sbatch slurmd slurmctld munged > /dev/null && exit 0
{ apt-get update && apt-get install -y --no-install-recommends slurm-wlm munge; } > /dev/null 2>&1 ||
    { echo "slurm: slurm-wlm and munge cannot be installed" >&2; exit 1; }
