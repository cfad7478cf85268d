#!/usr/bin/env python3
"""summary.py: what a run of the pipeline with the methods of the paper came to: similarity of the
cores, groups, budgets, the table, the files. Reads RUN and the budgets from the environment, as
scripts/pipeline.mk does."""
import json
import os
from pathlib import Path


def main():
    run = Path(os.environ["RUN"])
    tokens = lambda name: json.loads((run / name / "cpift.json").read_text())["facts"]["tokens"]
    probe, backbone, final = (int(os.environ[f"{part}_TOKENS"]) for part in ("PROBE", "BACKBONE", "FINAL"))
    probes = [tokens(f"probes/{folder.name}") for folder in sorted((run / "probes").iterdir()) if folder.is_dir()]
    count, spent = len(probes), sum(probes)
    seen = [f"{name} {tokens(name)}" for name in ("full-sft", "multi-stage")]
    isolated = [name for name in ("cpi-ft-group", "cpi-ft") if (run / name / "cpift.json").exists()]
    seen += [f"{name} {spent + tokens('backbone') + tokens(name)}" for name in isolated]
    print()
    print((run / "logs/groups.log").read_text(), end="")
    print()
    print(f"Budget of every method: {count * probe + backbone + final} tokens "
          f"({count} probes x {probe} + backbone {backbone} + final {final}).")
    print(f"Seen, to the end of a batch: {', '.join(seen)} (probes {spent}, backbone {tokens('backbone')}).")
    print()
    print((run / "table.md").read_text())
    files = {"report": "report.html", "finished model": "cpi-ft", "fused model": "fused", "baselines": "full-sft, multi-stage",
             "groups, heat map": "groups.json, groups.svg", "masks": "masks", "scores": "scores", "logs": "logs"}
    for name, paths in files.items():
        print(f"{name:<22}{', '.join(f'{run}/{path}' for path in paths.split(', '))}")


if __name__ == "__main__":
    main()
