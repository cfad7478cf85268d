"""A task list as experiments see it."""

import tomllib
from pathlib import Path

from store import Source


class TaskList(Source):
    """A tasks.toml and the files it names."""

    def __init__(self, path):
        super().__init__(path)
        self.entries = {entry["name"]: entry for entry in tomllib.loads(self.path.read_text())["task"]}
        self.names = list(self.entries)

    def file(self, name, column):
        return self.path.parent / self.entries[name][column]

    def with_rows(self, folder, rows):
        """The same tasks with the first rows[name] rows of each training file, written to `folder`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.names:
            lines = self.file(name, "train").read_text(encoding="utf-8").splitlines(keepends=True)
            (folder / f"{name}.jsonl").write_text("".join(lines[:rows.get(name, len(lines))]), encoding="utf-8")
        return self.written(folder, {name: f"{name}.jsonl" for name in self.names})

    def only(self, folder, names):
        """The tasks `names`, in that order, in a list that is written to `folder`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        return self.written(Path(folder), {name: str(self.file(name, "train").resolve()) for name in names})

    def written(self, folder, train):
        """The tasks of `train` with these training files."""
        text = []
        for name, file in train.items():
            changed = self.entries[name] | {"train": file, "eval": str(self.file(name, "eval").resolve())}
            text.append("[[task]]\n" + "".join(f"{k} = {toml(v)}\n" for k, v in changed.items()))
        (folder / "tasks.toml").write_text("\n".join(text), encoding="utf-8")
        return TaskList(folder / "tasks.toml")


def toml(value):
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    return str(value).lower() if isinstance(value, bool) else str(value)
