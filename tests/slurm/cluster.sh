#!/usr/bin/env bash
# Runs a private Slurm cluster on one machine, as root and without systemd.
# Usage: cluster.sh start DIR [NODES] | node DIR (restarts slurmd of n1) | stop DIR
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=$2 nodes=${3:-1}
export SLURM_CONF=$dir/slurm.conf

# end PIDFILE NAME: ends the process of a pid file if it is still the named program.
end() {
    local pid
    pid=$(cat "$1" 2> /dev/null) || return 0
    [[ "$(cat "/proc/$pid/comm" 2> /dev/null)" == "$2"* ]] || return 0
    kill "$pid"
    for _ in {1..100}; do kill -0 "$pid" 2> /dev/null || return 0; sleep 0.1; done
    kill -9 "$pid"
}

case $1 in
start)
    mkdir -p "$dir"/{state,munge}
    chmod 755 "$dir" "$dir/munge"
    (umask 077; head -c 1024 /dev/urandom > "$dir/munge/munge.key")
    munged --socket="$dir/munge/munge.socket" --key-file="$dir/munge/munge.key" --pid-file="$dir/munge/munged.pid" \
        --log-file="$dir/munge/munged.log" --seed-file="$dir/munge/munged.seed" --num-threads=2
    sed -e "s|@DIR@|$dir|g; s|@HOST@|$(hostname -s)|g" \
        -e "s|@NODES@|n[1-$nodes]|; s|@PORTS@|[16918-$((16917 + nodes))]|" "$here/slurm.conf.in" > "$SLURM_CONF"
    slurmctld -f "$SLURM_CONF"
    for ((i = 1; i <= nodes; i++)); do slurmd -N "n$i" -f "$SLURM_CONF"; done
    until [ "$SECONDS" -gt 120 ]; do
        [ "$(timeout 10 sinfo -h -N -o %T 2> /dev/null | grep -c '^idle$')" != "$nodes" ] || exit 0
        sleep 0.1
    done
    echo "cluster: not all nodes have started" >&2
    tail -n 20 "$dir"/*.log >&2
    exit 1
    ;;
node) slurmd -N n1 -f "$SLURM_CONF" ;;
stop)
    timeout 10 scancel -u "$(id -un)" 2> /dev/null || true
    for _ in {1..100}; do [ -n "$(timeout 5 squeue -h 2> /dev/null)" ] || break; sleep 0.2; done
    for pid in "$dir"/slurmd-*.pid; do end "$pid" slurmd; done
    end "$dir/slurmctld.pid" slurmctld
    end "$dir/munge/munged.pid" munged
    ;;
esac
