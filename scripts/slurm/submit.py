#!/usr/bin/env python3
"""submit.py RUN [--dry-run] [NAME=VALUE…]: submits to Slurm what of scripts/pipeline.mk is not up to date and not queued yet.

BASE, TASKS and the pipeline's other settings come from the environment or from NAME=VALUE, the cluster's from scripts/slurm/cluster.env
(CLUSTER=FILE). Paths are relative to the repository, which the nodes must see, as they must RUN. --dry-run prints the sbatch lines."""
import os
import shlex
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import graph  # noqa: E402


def stop(message):
    print(f"submit: {message}", file=sys.stderr)
    sys.exit(2)


def place(name):
    """The job that makes an artifact, and the element of the job's array (or -) in which it is."""
    kind, _, rest = name.partition("-")
    if kind in ("probe", "mask"):
        return "probe", rest
    if kind == "score":
        return "score", rest
    return ("report", "-") if kind in ("scores", "table", "report") else (name, "-")


def cluster_settings(path):
    """The variables that a cluster.env, which is Bash, sets."""
    script = 'set -ea; source "$1"; env -0'
    found = subprocess.run(["bash", "-c", script, "-", path], stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        stop(f"{path} cannot be read")
    return dict(entry.split("=", 1) for entry in found.stdout.split("\0") if "=" in entry)


class Stage:
    """One job or array: its elements, each with the artifacts it makes."""

    def __init__(self, name):
        self.name, self.elements, self.needs = name, {}, []
        self.waits_for = []  # ids of jobs, for dependents

    def sbatch(self, cluster, run, indices, after):
        setting = lambda key: cluster.get(f"{key}_{self.name.replace('-', '_')}", cluster.get(key, ""))
        command = ["sbatch", "--parsable", f"--job-name={run.name}.{self.name}", "--requeue",
                   f"--signal=B:TERM@{cluster['WARN']}", "--open-mode=append"]
        if list(self.elements) == ["-"]:
            command.append(f"--output={run}/slurm/{self.name}-%j.out")
        else:
            limit = cluster.get("ARRAY_LIMIT", "")
            command += [f"--output={run}/slurm/{self.name}-%A_%a.out",
                        f"--array={','.join(map(str, indices))}{'%' + limit if limit else ''}"]
        if after:
            command += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
        options = {"PARTITION": "partition", "ACCOUNT": "account", "TIME": "time", "CPUS": "cpus-per-task", "MEM": "mem"}
        command += [f"--{option}={setting(key)}" for key, option in options.items() if setting(key)]
        if setting("GPUS") not in ("", "0"):
            command.append(f"--gres=gpu:{setting('GPUS')}")
        arguments = [" ".join(a.name for a in artifacts) for artifacts in self.elements.values()]
        return command + shlex.split(setting("OPTIONS")) + ["scripts/slurm/job.sh", *arguments]


def stages_of(artifacts):
    """The jobs of a graph, in the order in which they can be submitted."""
    stages = {}
    for artifact in artifacts:
        name, element = place(artifact.name)
        stage = stages.setdefault(name, Stage(name))
        stage.elements.setdefault(element, []).append(artifact)
        for need in (place(need)[0] for need in artifact.reads + artifact.surveys):
            if need != name and need not in stage.needs:
                stage.needs.append(need)
    ordered = {}

    def add(name):
        if name not in ordered:
            for need in stages[name].needs:
                add(need)
            ordered[name] = stages[name]

    for name in stages:
        add(name)
    return ordered


def submit(stage, stages, queued, cluster, run, dry_run):
    """Submits what is due of a stage, and prints a line about it."""
    needed = [(need, stages[need].waits_for) for need in stage.needs if stages[need].waits_for]
    after = [job for _, jobs in needed for job in jobs]
    due = []
    for index, (element, artifacts) in enumerate(stage.elements.items()):
        jobs = [queued[a.name][0] for a in artifacts if a.name in queued]
        if jobs:
            stage.waits_for += [job for job in jobs[-1:] if job not in stage.waits_for]
        elif any(a.due for a in artifacts):
            due.append((index, element))
    numbers = lambda jobs: " ".join(dict.fromkeys(job.partition("_")[0] for job in jobs))
    if not due:
        print(f"{stage.name:<16}" + (f"queued already: {numbers(stage.waits_for)}" if stage.waits_for else "complete"))
        return
    command = stage.sbatch(cluster, run, [index for index, _ in due], after)
    if dry_run:
        print(shlex.join(command))
        stage.waits_for.append(f"JOB_{stage.name}")
        return
    job = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip().partition(";")[0]
    with (run / "slurm/jobs").open("a") as file:
        for index, element in due:
            for artifact in stage.elements[element]:
                file.write(f"{artifact.name} {job}{'' if element == '-' else f'_{index}'} {run.name}.{stage.name}\n")
    stage.waits_for.append(job)
    picked = [element for _, element in due]
    shown = " ".join(picked) if len(picked) <= 8 else f"{len(picked)}: {picked[0]} … {picked[-1]}"
    why = ", ".join(f"{need} {numbers(jobs)}" for need, jobs in needed)
    print(f"{stage.name:<16}job {job}{'' if picked[0] == '-' else f' ({shown})'}{' after ' + why if why else ''}")


def main():
    dry_run = False
    for argument in sys.argv[1:]:
        if argument in ("-h", "--help"):
            print(__doc__)
            return
        if argument == "--dry-run":
            dry_run = True
        elif argument.startswith("-"):
            stop(f"unknown argument {argument}")
        elif "=" in argument:
            key, _, value = argument.partition("=")
            os.environ[key] = value
        else:
            os.environ["RUN"] = argument
    os.chdir(graph.ROOT)
    if not all(os.environ.get(key) for key in ("RUN", "BASE", "TASKS")):
        stop("name the inputs: BASE=DIR TASKS=FILE scripts/slurm/submit.py RUN")
    os.environ["RUN"] = os.environ["RUN"].rstrip("/")
    os.environ.setdefault("CLUSTER", "scripts/slurm/cluster.env")
    # Not for the make of a job.
    for key in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"):
        os.environ.pop(key, None)
    run, cluster = Path(os.environ["RUN"]), cluster_settings(os.environ["CLUSTER"])
    artifacts, before = graph.artifacts(), graph.settings(run)
    try:
        queued = graph.jobs(run)
    except (OSError, subprocess.CalledProcessError) as error:
        stop(f"the queue cannot be read: {error}")
    if not dry_run:
        (run / "slurm").mkdir(parents=True, exist_ok=True)
        # Writes the settings that the jobs are for.
        graph.output_of(["make", "-s", "--no-print-directory", "-f", "scripts/pipeline.mk", "settings"])
        if queued and graph.settings(run) != before:
            (run / graph.SETTINGS).write_text(before)
            ids = sorted({job.partition("_")[0] for job, *_ in queued.values()}, key=int)
            stop(f"the settings have changed and jobs of {run} with the old ones are queued: scancel {' '.join(ids)}")
        lines = [f"{name} {job} {run.name}.{place(name)[0]}\n" for name, (job, *_) in queued.items()]
        (run / "slurm/jobs").write_text("".join(lines))
    stages = stages_of(artifacts)
    for stage in stages.values():
        submit(stage, stages, queued, cluster, run, dry_run)
    if not dry_run:
        print(f"make status RUN={run} shows how far it is.")


if __name__ == "__main__":
    main()
