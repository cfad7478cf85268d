#!/usr/bin/env bash
# Installs Debian's Slurm and munge if they are missing. Fails if they cannot be installed or run.
set -euo pipefail
[ "$(id -u)" = 0 ] || { echo "slurm: only root can start a private cluster" >&2; exit 1; }
command -v sbatch slurmd slurmctld munged > /dev/null && exit 0
{ apt-get update && apt-get install -y --no-install-recommends slurm-wlm munge; } > /dev/null 2>&1 ||
    { echo "slurm: slurm-wlm and munge cannot be installed" >&2; exit 1; }
