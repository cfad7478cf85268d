#!/usr/bin/env bash
# stage.sh RUN/logs/NAME PROGRAM [ARGUMENT…]: runs one command for scripts/pipeline.mk. Its output goes to NAME.log; NAME.state says
# whether it is running (host, process, Slurm job) or how it ended (exit code, time). SIGTERM and SIGINT are passed on, so that training
# saves its state.
#
# Prints a line when the command ends: how many of DUE (the artifacts that this call of make makes) are done since STARTED, and the
# seconds this one took. Until then it prints the step and the loss of running training: on a terminal one line for all, rewritten
# every second; in a log a line now and then, at growing intervals (the first after PROGRESS=10 seconds, none if that is 0).
set -uo pipefail
path=$1
shift
name=${path##*/}
logs=${path%/*}
DUE=${DUE:-$name} STARTED=${STARTED:-0} PROGRESS=${PROGRESS:-10}
mkdir -p "$logs"
# Renamed into place: a reader never sees half a line.
state() { printf '%s\n' "$*" > "$path.state.$$" && mv "$path.state.$$" "$path.state"; }
now() { date +%s.%N; }
begun=$(now)
seconds() { LC_ALL=C awk -v a="$begun" -v b="$1" 'BEGIN { printf b - a < 100 ? "%.1f" : "%.0f", b - a }'; }

# Names of what this call of make has made, in order: appending is atomic, so each has a number of its own.
made=$logs/.made-$STARTED
done_so_far() { if [ -e "$made" ]; then wc -l < "$made"; else echo 0; fi; }
# Names of what is running.
running() { local n; for n in $DUE; do [[ "$(cat "$logs/$n.state" 2> /dev/null)" != running* ]] || echo "$n"; done; }
# Stage, step and loss of the last step that a log has, or nothing.
last_step() { grep -oE '^(stage [0-9]+/[0-9]+|[^ ]+).* step [0-9]+/[0-9]+ loss [^ ]+' "$1" 2> /dev/null | tail -n 1 | sed -E 's/ \([^)]*\) step/ step/'; }

# All that runs, on one line.
live() {
    local n line all='' width
    for n in $(running); do
        line=$(last_step "$logs/$n.log")
        all+="; $n${line:+ ${line#"$n" }}"
    done
    line="[$(done_so_far)/$(wc -w <<< "$DUE")] ${all:2}"
    width=$(stty size 2> /dev/null < /dev/tty | cut -d ' ' -f 2)
    printf '\r\033[K%s' "${line:0:$((${width:-80} - 1))}"
}
# Until the process $1 has ended; sleep holds no output open.
report() {
    local next=$PROGRESS said='' line
    local begun=$SECONDS
    while sleep 1 < /dev/null > /dev/null 2>&1 && kill -0 "$1" 2> /dev/null; do
        if [ -t 1 ]; then
            live
        elif [ $((SECONDS - begun)) -ge "$next" ]; then
            line=$(last_step "$path.log")
            [ -z "$line" ] || [ "$line" = "$said" ] || printf '        %-24s%s\n' "$name" "$line"
            said=$line next=$(((SECONDS - begun) * 3 / 2))
        fi
    done
}

# The log of the attempt before this one is kept.
[ ! -e "$path.log" ] || mv -f "$path.log" "$path.before.log"
child='' told=''
trap 'told=1; [ -z "$child" ] || kill -TERM "$child" 2> /dev/null' TERM INT
"$@" > "$path.log" 2>&1 &
child=$!
[ -z "$told" ] || kill -TERM "$child"
state running "$(hostname)" "$child" "${SLURM_JOB_ID:--}"
reporter=
[ "$PROGRESS" = 0 ] || { report "$child" & reporter=$!; disown; }
# `wait` also returns when a signal has been passed on; of a child that has ended it gives the code again.
while kill -0 "$child" 2> /dev/null; do wait "$child"; done
wait "$child"
code=$?
ended=$(now)
state exit "$code" "$ended"
[ -z "$reporter" ] || kill "$reporter" 2> /dev/null
[ -z "${STAGE_CODE:-}" ] || echo "$code" > "$STAGE_CODE"
# A command that found its output up to date leaves the log of the one that made it.
if [ "$code" = 0 ] && [ -e "$path.before.log" ] && [[ "$(tail -n 1 "$path.log")" == *": up to date" ]]; then
    mv -f "$path.before.log" "$path.log"
fi
clear=
[ ! -t 1 ] || clear=$'\r\033[K'
if [ "$code" = 0 ]; then
    total=$(wc -w <<< "$DUE")
    echo "$name" >> "$made"
    number=$(grep -n -x -m 1 -e "$name" "$made" | cut -d : -f 1)
    printf '%s[%*d/%d] %-24s%6s s\n' "$clear" "${#total}" "$number" "$total" "$name" "$(seconds "$ended")"
    find "$logs" -maxdepth 1 -name '.made-*' -mtime +1 -delete
else
    printf '%s%s: exit code %d after %s s\n' "$clear" "$name" "$code" "$(seconds "$ended")"
    tail -n 20 "$path.log" >&2
fi
exit "$code"
