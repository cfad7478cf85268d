#!/usr/bin/env python3
"""clean_probes.py RUN: deletes the probes of a run, but for their records (cpift.json), once everything made from them is up to
date. The pipeline remakes a probe only when it must remake an artifact that reads its weights."""
import os
import sys
from pathlib import Path

import graph


def stop(message):
    print(f"clean-probes: {message}", file=sys.stderr)
    sys.exit(2)


def main():
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "")
    if run == Path():
        stop("name the run: make clean-probes RUN=DIR")
    run = run.resolve() if not (graph.ROOT / run).is_dir() else run
    os.chdir(graph.ROOT)
    if not (run / "probes").is_dir():
        stop(f"{run}/probes does not exist")
    os.environ["RUN"] = str(run)
    graph.use_settings(run)
    if not (os.environ.get("BASE") and os.environ.get("TASKS")):
        stop(f"{run} has no settings: run make pipeline first")
    artifacts = graph.artifacts()
    probes = {a.name for a in artifacts if a.name.startswith("probe-")}
    for artifact in artifacts:
        needed = sorted(probes.intersection(artifact.reads))
        if needed and artifact.due:
            reason = f" ({artifact.reason})" if artifact.reason else ""
            stop(f"{artifact.name} is {artifact.state}{reason}: {', '.join(needed)} is still needed; run make pipeline first")
    freed = 0
    folders = [run / "probes" / name.removeprefix("probe-") for name in sorted(probes)]
    for folder in (f for f in folders if (f / "cpift.json").is_file()):
        files = [f for f in folder.rglob("*") if f.is_file() and f != folder / "cpift.json"]
        freed += sum(file.stat().st_size for file in files)
        for file in files:
            file.unlink()
        for inner in sorted((d for d in folder.rglob("*") if d.is_dir()), reverse=True):
            inner.rmdir()
    print(f"clean-probes: {freed / 1e9:.1f} GB freed")


if __name__ == "__main__":
    main()
