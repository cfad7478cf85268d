"""A task list as experiments see it: what a step depends on is the tasks it trains on or scores, not the whole file."""

import hashlib
import tomllib
from pathlib import Path

from store import digest


class View:
    """A task list as the input of one step."""

    def __init__(self, path, key):
        self.path, self.key = path, key


class TaskList:
    """A tasks.toml and the files it names."""

    def __init__(self, path):
        self.path = Path(path)
        self.entries = {entry["name"]: entry for entry in tomllib.loads(self.path.read_text())["task"]}
        self.names = list(self.entries)

    def file(self, name, column):
        return self.path.parent / self.entries[name][column]

    def part(self, column, names=None):
        """For training on (`train`) or scoring (`eval`) the tasks `names`."""
        parts = []
        for name in names or self.names:
            entry = {k: v for k, v in self.entries[name].items() if k not in ("train", "eval")}
            parts.append(f"{sorted(entry.items())} {hashlib.sha256(self.file(name, column).read_bytes()).hexdigest()}")
        return View(self.path, digest("\n".join(parts)))

    def kinds(self):
        return View(self.path, digest(str([(n, e.get("kind")) for n, e in self.entries.items()])))

    def with_rows(self, folder, rows):
        """The same tasks with the first rows[name] rows of each training file, written to `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = []
        for name, entry in self.entries.items():
            lines = self.file(name, "train").read_text(encoding="utf-8").splitlines(keepends=True)
            (folder / f"{name}.jsonl").write_text("".join(lines[:rows.get(name, len(lines))]), encoding="utf-8")
            changed = entry | {"train": f"{name}.jsonl", "eval": str(self.file(name, "eval").resolve())}
            text.append("[[task]]\n" + "".join(f"{k} = {toml(v)}\n" for k, v in changed.items()))
        (folder / "tasks.toml").write_text("\n".join(text), encoding="utf-8")
        return TaskList(folder / "tasks.toml")


def toml(value):
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    return str(value).lower() if isinstance(value, bool) else str(value)
