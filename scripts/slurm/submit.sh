#!/usr/bin/env bash
# submit.sh RUN [--dry-run] [NAME=VALUE…]: submits the graph of scripts/pipeline.mk to Slurm: what is not made and not queued yet. BASE, TASKS
# and the pipeline's other settings come from the environment or from NAME=VALUE, the cluster's from scripts/slurm/cluster.env
# (CLUSTER=FILE). Paths are relative to the repository, which the nodes must see, as they must RUN. --dry-run prints the sbatch lines.
set -euo pipefail
cd "$(dirname "$0")/../.."
stop() { echo "submit: $1" >&2; exit 2; }
dry=
for argument in "$@"; do
    case $argument in
    --dry-run) dry=1 ;;
    -h | --help) sed -n '2,4s/^# //p' scripts/slurm/submit.sh; exit ;;
    -*) stop "unknown argument $argument" ;;
    *=*) export "${argument?}" ;;
    *) RUN=$argument ;;
    esac
done
[[ -n "${RUN:-}" && -n "${BASE:-}" && -n "${TASKS:-}" ]] || stop "name the inputs: BASE=DIR TASKS=FILE scripts/slurm/submit.sh RUN"
RUN=${RUN%/}
export RUN BASE TASKS CLUSTER=${CLUSTER:-scripts/slurm/cluster.env}
unset MAKEFLAGS MFLAGS MAKELEVEL MAKEOVERRIDES
# shellcheck source=scripts/slurm/cluster.env
source "$CLUSTER"
pipeline() { make -sn --no-print-directory -f scripts/pipeline.mk "$@" all; }

# The value of a variable of cluster.env for a stage: its own, or that of all.
setting() { local own=$1_${2//-/_}; echo "${!own-${!1-}}"; }

# Which job makes an artifact, and as which element of it.
stage_of() { case $1 in probe-* | mask-*) echo probe ;; score-*) echo score ;; scores-* | table | report) echo report ;; *) echo "$1" ;; esac; }
element_of() { case $1 in probe-* | mask-* | score-*) echo "${1#*-}" ;; *) echo - ;; esac; }

# What is queued or running already: artifact -> job.
declare -A live
jobs=$RUN/slurm/jobs
if [ -s "$jobs" ]; then
    declare -A queue
    queued=$(squeue -h -r -u "$(id -un)" -o '%i %j')
    while read -r id name; do [ -z "$id" ] || queue[$id]=$name; done <<< "$queued"
    while read -r artifact id name; do
        [ "${queue[$id]:-}" != "$name" ] || live[$artifact]=$id
    done < "$jobs"
fi

declare -A owner elements files needs todo names
stages=()
plan=$(pipeline GRAPH=1)
[ -z "${live[*]}" ] || ! grep -q -w changed-settings <<< "$plan" ||
    stop "the settings have changed and jobs of $RUN with the old ones are queued: scancel $(printf '%s\n' "${live[@]%_*}" | sort -un | xargs)"
declare -A unmade
while IFS=$'\t' read -r name _; do [ -z "$name" ] || unmade[$name]=1; done <<< "$plan"
all=$(pipeline -B GRAPH=1)
while IFS=$'\t' read -r name file inputs _; do
    stage=$(stage_of "$name"); element=$(element_of "$name"); owner[$file]=$stage
    [ -n "${elements[$stage]:-}" ] || stages+=("$stage")
    [[ " ${elements[$stage]:-} " == *" $element "* ]] || elements[$stage]+="${elements[$stage]:+ }$element"
    files[$stage/$element]+="${files[$stage/$element]:+ }$file"
    names[$stage/$element]+=" $name"
    [ -z "${unmade[$name]:-}" ] || todo[$stage/$element]=1
    for input in $inputs; do
        from=${owner[$input]:-$stage}
        [ "$from" = "$stage" ] || [[ " ${needs[$stage]:-} " == *" $from "* ]] || needs[$stage]+=" $from"
    done
done <<< "$all"

# The jobs that these, a colon before each, are or are elements of.
numbers() {
    local id known=''
    for id in ${1//:/ }; do id=${id%_[0-9]*}; [[ "$known " == *" $id "* ]] || known+=" $id"; done
    echo "$known"
}

declare -A submitted waits
# Submits a stage after those it needs. `waits` gets the jobs that a dependent waits for.
submit() {
    local stage=$1 need element index=0 list=() pick=() arguments=() after='' why='' value name id
    [ -z "${submitted[$stage]:-}" ] || return 0
    submitted[$stage]=1
    for need in ${needs[$stage]:-}; do
        submit "$need"
        [ -z "${waits[$need]:-}" ] || { after+=${waits[$need]}; why+=", $need$(numbers "${waits[$need]}")"; }
    done
    for element in ${elements[$stage]}; do
        arguments+=("${files[$stage/$element]}")
        id=
        for name in ${names[$stage/$element]}; do id=${live[$name]:-$id}; done
        if [ -n "$id" ]; then
            [[ "${waits[$stage]:-}:" == *":$id:"* ]] || waits[$stage]+=:$id
        elif [ -n "${todo[$stage/$element]:-}" ]; then
            list+=("$index"); pick+=("$element")
        fi
        index=$((index + 1))
    done
    if [ ${#list[@]} = 0 ]; then
        printf '%-16s%s\n' "$stage" "$([ -n "${waits[$stage]:-}" ] && echo "queued already:$(numbers "${waits[$stage]}")" || echo "complete")"
        return
    fi
    local what job=${RUN##*/}.$stage
    local command=(sbatch --parsable --job-name="$job" --requeue --signal="B:TERM@$WARN" --open-mode=append)
    if [ "${elements[$stage]}" = - ]; then
        command+=(--output="$RUN/slurm/$stage-%j.out")
    else
        command+=(--output="$RUN/slurm/$stage-%A_%a.out" --array="$(IFS=,; echo "${list[*]}")${ARRAY_LIMIT:+%$ARRAY_LIMIT}")
    fi
    [ -z "$after" ] || command+=(--dependency="afterok$after" --kill-on-invalid-dep=yes)
    for option in PARTITION:partition ACCOUNT:account TIME:time CPUS:cpus-per-task MEM:mem; do
        value=$(setting "${option%:*}" "$stage")
        [ -z "$value" ] || command+=("--${option#*:}=$value")
    done
    value=$(setting GPUS "$stage"); [ "${value:-0}" = 0 ] || command+=(--gres="gpu:$value")
    # shellcheck disable=SC2207
    command+=($(setting OPTIONS "$stage") scripts/slurm/job.sh "${arguments[@]}")
    if [ -n "$dry" ]; then
        printf '%q ' "${command[@]}"; echo
        waits[$stage]+=":JOB_$stage"
        return
    fi
    id=$("${command[@]}"); id=${id%%;*}
    for index in "${!list[@]}"; do
        for name in ${names[$stage/${pick[index]}]}; do
            echo "$name $id$([ "${pick[index]}" = - ] || echo "_${list[index]}") $job" >> "$jobs"
        done
    done
    waits[$stage]+=:$id
    what=" (${pick[*]})"
    [ "${pick[0]}" != - ] || what=
    [ ${#pick[@]} -le 8 ] || what=" (${#pick[@]}: ${pick[0]} … ${pick[-1]})"
    printf '%-16sjob %s%s%s\n' "$stage" "$id" "$what" "${why:+ after${why#,}}"
}

if [ -z "$dry" ]; then
    mkdir -p "$RUN/slurm"
    for artifact in "${!live[@]}"; do grep -m1 "^$artifact ${live[$artifact]} " "$jobs"; done > "$jobs.new"
    mv "$jobs.new" "$jobs"
    # Writes down the settings that the jobs are for.
    pipeline > /dev/null
fi
for stage in "${stages[@]}"; do submit "$stage"; done
[ -n "$dry" ] || echo "make status RUN=$RUN shows how far it is."
