#!/usr/bin/env bash
# stage.sh RUN/logs/NAME PROGRAM [ARGUMENT…]: runs one stage for scripts/pipeline.mk. NAME.log gets what it says, NAME.state
# whether it is running (host, process, Slurm job) or how it ended. A warning (SIGTERM, SIGINT) is passed on, so that training saves its state.
set -uo pipefail
path=$1
shift
name=${path##*/}
mkdir -p "${path%/*}"
# Renamed into place: a reader never sees half a line.
state() { printf '%s\n' "$*" > "$path.state.$$" && mv "$path.state.$$" "$path.state"; }

echo "$name"
# What an interrupted or failed attempt said is kept.
[ "$(cat "$path.state" 2> /dev/null)" = "exit 0" ] || [ ! -e "$path.log" ] || mv -f "$path.log" "$path.before.log"
child='' told=''
trap 'told=1; [ -z "$child" ] || kill -TERM "$child" 2> /dev/null' TERM INT
"$@" > "$path.log" 2>&1 &
child=$!
[ -z "$told" ] || kill -TERM "$child"
state running "$(hostname)" "$child" "${SLURM_JOB_ID:--}"
# `wait` also returns when a signal has been passed on; of a child that has ended it gives the code again.
while kill -0 "$child" 2> /dev/null; do wait "$child"; done
wait "$child"
code=$?
state exit "$code"
[ -z "${STAGE_CODE:-}" ] || echo "$code" > "$STAGE_CODE"
[ "$code" = 0 ] || tail -n 20 "$path.log" >&2
exit "$code"
