#!/usr/bin/env python3
"""pipeline.py COMMAND [NAME=VALUE…]: what can be done with a run of scripts/pipeline.mk, RUN=DIR.

    run             Makes what is not up to date.
    status          Prints every artifact and its state: done, running, queued, stopped (its state
                    is saved), failed, stale or missing (with the reason), deleted (and not needed).
    slurm           Submits to Slurm what is neither up to date nor queued. DRY_RUN=1 prints the
                    sbatch lines.
    clean-probes    Deletes the probes, but for their records (cpift.json), once everything made
                    from them is up to date. The pipeline remakes a probe only for an artifact that
                    is due and reads its weights.

Settings of the pipeline are arguments or environment variables; for `status` and `clean-probes`
the others are those that the run was started with. CONFIG=FILE.toml has settings as well, by their
names in lower case (base = "org/name", probe_tokens = 30000, methods = ["full-sft"]); arguments and
environment variables win over it. Paths are relative to the repository. With `slurm`, the nodes must see it and RUN, and CLUSTER=FILE says what the jobs request
[default: scripts/slurm/cluster.env].
"""
import difflib
import getpass
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

MAKE = ["make", "-s", "--no-print-directory", "-f", "scripts/pipeline.mk"]
MAKEFLAGS = os.environ.get("MAKEFLAGS", "")
# Jobs of which no program shares its work over ranks.
ONE_RANK_JOBS = ("groups", "fused", "report")


class Artifact:
    """A target of the pipeline, from its line of `cpift-mask up-to-date`."""

    def __init__(self, line):
        self.name, self.state, self.reason, reads, surveys = line.split("\t")
        # Names of the artifacts it is made from, and of those in a directory that it is about.
        self.reads, self.surveys = reads.split(), surveys.split()
        self.due = self.state in ("missing", "stale")
        # The job that makes it, and the element of the job's array (or -) in which it is.
        kind, _, rest = self.name.partition("-")
        if kind in ("probe", "mask", "score"):
            self.job, self.element = "score" if kind == "score" else "probe", rest
        else:
            self.job, self.element = "report" if kind in ("scores", "table") else self.name, "-"


def stop(message):
    print(f"pipeline: {message}", file=sys.stderr)
    sys.exit(2)


def output_of(command, text=None):
    """Output of a command; exits with its code if it fails."""
    found = subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=False)
    return sys.exit(found.returncode) if found.returncode else found.stdout


def text_of(path):
    return path.read_text(errors="replace") if path.exists() else ""


def read_config(path):
    """Settings of a TOML file, by the names that make has for them."""
    # Only here: Python has it from 3.11 on, and the other commands work with older ones.
    import tomllib
    try:
        config = tomllib.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        stop(f"{path}: {error}")
    defined = re.search(r"^SETTINGS := ((?:.*\\\n)*.*)$", Path("scripts/pipeline.mk").read_text(), re.M)
    known = [name.lower() for name in defined[1].replace("\\", " ").split()]
    known += ["run", "methods", "threads", "cluster"]
    settings = {}
    for key, value in config.items():
        if key not in known:
            nearest = difflib.get_close_matches(key, known, 1, 0) or known
            stop(f"{path}: unknown setting {key} (hint: {nearest[0]}?)")
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            value = shlex.join(value)
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            stop(f"{path}: {key} is no text, number or list of texts")
        settings[key.upper()] = str(value)
    return settings


def run_all(_run):
    os.environ["MAKEFLAGS"] = MAKEFLAGS
    os.execvp("make", ["make", "--no-print-directory", "-f", "scripts/pipeline.mk", "all"])


def read_artifacts():
    """All artifacts, in the order in which they can be made."""
    graph = output_of([*MAKE, "-n", "GRAPH=1", "all"])
    program = Path(os.environ.get("BIN", "target/release")) / "cpift-mask"
    return [Artifact(line) for line in output_of([program, "up-to-date"], graph).splitlines()]


def queued_jobs(run):
    """Jobs of a run in the queue: artifact -> (id, title, state, reason)."""
    submitted = [line.split() for line in text_of(run / "slurm/jobs").splitlines()]
    if not submitted:
        return {}
    squeue = ["squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%i\t%j\t%T\t%r"]
    shown = subprocess.run(squeue, stdout=subprocess.PIPE, text=True, check=True).stdout
    rows = [line.split("\t") for line in shown.splitlines()]
    queue = {tuple(row[:2]): row for row in rows}
    return {name: queue[job, title] for name, job, title in submitted if (job, title) in queue}


def at_work(run, name, queue):
    """State of a command that has been started, and what is known about it; or none."""
    word, *words = text_of(run / f"logs/{name}.state").split() or [""]
    lines = [line.strip() for line in text_of(run / f"logs/{name}.log").splitlines()]
    lines = [line for line in lines if line and not line.startswith("hint:")] or [""]
    last = next((line for line in lines if line.startswith("error:")), lines[-1])
    job, _, state, why = queue.get(name, [""] * 4)
    if word == "running":
        host, process, own_job = words
        here = host == socket.gethostname()
        if os.path.exists(f"/proc/{process}") if here else state == "RUNNING" or own_job == "-":
            return "running", f"{host}, {'job ' + job if job else 'process ' + process}: {last}"
    if state not in ("", "RUNNING"):
        return "queued", f"job {job} ({why})"
    if word == "running":
        return "failed", f"ended without an exit code on {host}; last line: {last}"
    if word == "exit" and words[0] == "75":
        return "stopped", last
    if word == "exit" and words[0] != "0":
        return "failed", f"exit code {words[0]}: {last}"
    return None


def status(run):
    artifacts, queue, counts = read_artifacts(), {}, Counter()
    try:
        queue = queued_jobs(run)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"status: jobs are not shown, squeue failed: {error}", file=sys.stderr)
    width = max(len(artifact.name) for artifact in artifacts) + 2
    for artifact in artifacts:
        known = at_work(run, artifact.name, queue) if artifact.due else None
        state, more = known or (artifact.state, artifact.reason)
        counts[state] += 1
        print(f"{artifact.name:<{width}}{state:<10}{more}".rstrip())
    print(", ".join(f"{count} {state}" for state, count in counts.items()))


def clean_probes(run):
    if not (os.environ.get("BASE") and os.environ.get("TASKS")):
        stop(f"{run} has no settings: run make pipeline first")
    artifacts = read_artifacts()
    probes = {artifact.name for artifact in artifacts if artifact.name.startswith("probe-")}
    for artifact in artifacts:
        needed = sorted(probes.intersection(artifact.reads))
        if needed and artifact.due:
            reason = f" ({artifact.reason})" if artifact.reason else ""
            stop(f"{artifact.name} is {artifact.state}{reason}: {', '.join(needed)} is still "
                 "needed; run make pipeline first")
    freed = 0
    for record in (run / f"probes/{name.removeprefix('probe-')}/cpift.json" for name in probes):
        # Backwards, so that a directory comes after its content.
        content = sorted(record.parent.rglob("*"), reverse=True) if record.is_file() else []
        for path in content:
            if path.is_dir():
                path.rmdir()
            elif path != record:
                freed += path.stat().st_size
                path.unlink()
    print(f"clean-probes: {freed / 1e9:.1f} GB freed")


def cluster_settings():
    """The variables that CLUSTER, which is Bash, sets."""
    path = os.environ.setdefault("CLUSTER", "scripts/slurm/cluster.env")
    text = output_of(["bash", "-c", 'set -ea; source "$1"; env -0', "-", path])
    return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)


def jobs_of(artifacts):
    """Job -> element -> artifacts; a job comes after those whose artifacts it reads."""
    jobs = {}
    for artifact in artifacts:
        # To the end: all that its last artifact reads has been made by the jobs before it.
        jobs[artifact.job] = elements = jobs.pop(artifact.job, {})
        elements.setdefault(artifact.element, []).append(artifact)
    return jobs


def sbatch(run, name, elements, due, after, cluster):
    """The command that submits the elements `due` of a job."""
    def setting(key):
        return cluster.get(f"{key}_{name.replace('-', '_')}", cluster.get(key, ""))

    def count(key, default):
        value = setting(key) or str(default)
        if not value.isdecimal() or int(value) == 0:
            stop(f"{os.environ['CLUSTER']}: {key} of {name} is not a number from 1: {value}")
        return int(value)

    gpus = setting("GPUS") if setting("GPUS") not in ("", "0") else ""
    nodes = ranks = 1
    if name not in ONE_RANK_JOBS:
        # The number of GPUS may follow their type, as in a100:4.
        nodes, ranks = count("NODES", 1), count("RANKS", gpus.rpartition(":")[2] or 1)
    indices = [str(i) for i, element in enumerate(elements) if element in due]
    limit = cluster.get("ARRAY_LIMIT", "")
    options = {
        "job-name": f"{run.name}.{name}",
        "signal": f"B:TERM@{cluster['WARN']}",
        "open-mode": "append",
        "output": f"{run}/slurm/{name}-{'%j' if '-' in elements else '%A_%a'}.out",
        "array": "" if "-" in elements else ",".join(indices) + (f"%{limit}" if limit else ""),
        "dependency": f"afterok:{':'.join(after)}" if after else "",
        "kill-on-invalid-dep": "yes" if after else "",
        "partition": setting("PARTITION"), "account": setting("ACCOUNT"), "time": setting("TIME"),
        "nodes": nodes if nodes * ranks > 1 else "",
        "ntasks-per-node": ranks if nodes * ranks > 1 else "",
        "cpus-per-task": setting("CPUS"), "mem": setting("MEM"),
        "gres": f"gpu:{gpus}" if gpus else "",
    }
    given = [f"--{option}={value}" for option, value in options.items() if value]
    names = [" ".join(artifact.name for artifact in artifacts) for artifacts in elements.values()]
    return ["sbatch", "--parsable", "--requeue", *given, *shlex.split(setting("OPTIONS")),
            "scripts/slurm/job.sh", *names]


def keep_settings(run, queued):
    """Writes the settings that the jobs are for; stops if jobs with other ones are queued."""
    before = text_of(run / "pipeline.env")
    output_of([*MAKE, "settings"])
    if queued and text_of(run / "pipeline.env") != before:
        (run / "pipeline.env").write_text(before)
        ids = sorted({job.partition("_")[0] for job, *_ in queued.values()}, key=int)
        stop(f"the settings have changed and jobs of {run} with the old ones are queued:"
             f" scancel {' '.join(ids)}")
    (run / "slurm").mkdir(exist_ok=True)
    lines = [f"{name} {job} {title}\n" for name, (job, title, *_) in queued.items()]
    (run / "slurm/jobs").write_text("".join(lines))


def slurm(run):
    dry_run = bool(os.environ.get("DRY_RUN"))
    if not (os.environ.get("BASE") and os.environ.get("TASKS")):
        stop("name the inputs: make slurm RUN=DIR BASE=DIR TASKS=FILE")
    cluster, artifacts = cluster_settings(), read_artifacts()
    try:
        queued = queued_jobs(run)
    except (OSError, subprocess.CalledProcessError) as error:
        stop(f"the queue cannot be read: {error}")
    if not dry_run:
        keep_settings(run, queued)
    job_of = {artifact.name: artifact.job for artifact in artifacts}
    ids = {}  # Of each job: what those after it wait for.
    for name, elements in jobs_of(artifacts).items():
        own = [artifact for element in elements.values() for artifact in element]
        reads = dict.fromkeys(job_of[other] for a in own for other in a.reads + a.surveys)
        needs = {need: ids[need] for need in reads if need != name and ids[need]}
        ids[name] = list(dict.fromkeys(queued[a.name][0] for a in own if a.name in queued))
        due = [element for element, made in elements.items()
               if any(a.due for a in made) and not any(a.name in queued for a in made)]
        if not due:
            state = f"queued already: {numbers(ids[name])}" if ids[name] else "complete"
            print(f"{name:<16}{state}")
            continue
        command = sbatch(run, name, elements, due, sum(needs.values(), []), cluster)
        if dry_run:
            print(shlex.join(command))
            ids[name].append(f"JOB_{name}")
            continue
        job = output_of(command).strip().partition(";")[0]
        ids[name].append(job)
        indexed = {element: f"{job}_{index}" for index, element in enumerate(elements)} | {"-": job}
        with (run / "slurm/jobs").open("a") as file:
            for artifact in (a for element in due for a in elements[element]):
                file.write(f"{artifact.name} {indexed[artifact.element]} {run.name}.{name}\n")
        shown = " ".join(due) if len(due) <= 8 else f"{len(due)}: {due[0]} … {due[-1]}"
        after = ", ".join(f"{need} {numbers(jobs)}" for need, jobs in needs.items())
        made = "" if due == ["-"] else f" ({shown})"
        print(f"{name:<16}job {job}{made}{after and f' after {after}'}")
    if not dry_run:
        print(f"make status RUN={run} shows how far it is.")


def numbers(jobs):
    """Ids of jobs without the elements of arrays."""
    return " ".join(dict.fromkeys(job.partition("_")[0] for job in jobs))


def main():
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    commands = {"run": run_all, "status": status, "slurm": slurm, "clean-probes": clean_probes}
    command, *settings = sys.argv[1:] or [""]
    if command not in commands or not all("=" in setting for setting in settings):
        print(__doc__)
        sys.exit(0 if command in ("-h", "--help") else 2)
    os.environ.update(setting.split("=", 1) for setting in settings)
    # Not for the make of this script and of the jobs.
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"):
        os.environ.pop(name, None)
    os.chdir(Path(__file__).resolve().parent.parent)
    if os.environ.get("CONFIG"):
        for name, value in read_config(os.environ["CONFIG"]).items():
            os.environ.setdefault(name, value)
    if not os.environ.get("RUN"):
        stop(f"name the run: make {command} RUN=DIR")
    # Without a slash at its end.
    run = Path(os.environ["RUN"])
    os.environ["RUN"] = str(run)
    if command not in ("slurm", "run"):
        if not run.is_dir():
            stop(f"{run}: no such directory (hint: make {command} RUN=DIR)")
        for line in text_of(run / "pipeline.env").splitlines():
            os.environ.setdefault(*line.split("=", 1))
    commands[command](run)


if __name__ == "__main__":
    main()
