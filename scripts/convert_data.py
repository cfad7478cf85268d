#!/usr/bin/env python3
"""Turns the downloads of fetch-data.sh into OUT/TASK/{train,eval}.jsonl (standard library only).

Every row has `messages` (user and assistant in turn); gsm8k adds `answer`, codealpaca `reference`
and, where it can be told, `language`; logiqa adds `choices` and `answer` (0 to 3). Rows are chosen
by a seeded hash of their first user text, so the choice does not depend on the order of the
source. No user text of eval stands in train, compared without case and white space.
"""
import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

LETTERS = "ABCD"
NO_INPUT = re.compile(r"<?\s*(no[ _]?input|none|n/a)\s*>?\.?", re.IGNORECASE)
LANGUAGES = {
    "python": r"python|django|flask|pandas|numpy", "javascript": r"javascript|\bjs\b|node\.?js|react|jquery",
    "java": r"\bjava\b", "cpp": r"\bc\+\+", "csharp": r"\bc#", "c": r"\bc (program|code|function)\b|\bin c\b(?![+#])",
    "sql": r"\bsql\b|mysql|sqlite|postgres", "html": r"\bhtml5?\b", "css": r"\bcss\b", "bash": r"\bbash\b|shell script",
    "php": r"\bphp\b", "ruby": r"\bruby\b", "go": r"\bgolang\b|\bin go\b", "rust": r"\brust\b", "swift": r"\bswift\b",
    "r": r"\bin r\b|\br (script|code|program)\b", "typescript": r"typescript", "kotlin": r"kotlin",
}
Row = dict


def turns(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def gsm8k(path: Path) -> Iterable[Row]:
    for row in json_lines(path):
        answer = row["answer"].rsplit("####", 1)[-1].strip().replace(",", "")
        yield {"messages": turns(row["question"], row["answer"]), "answer": answer}


def instructions(path: Path) -> Iterable[Row]:
    for row in json.loads(path.read_text(encoding="utf-8")):
        given = "" if NO_INPUT.fullmatch(row["input"].strip()) else row["input"]
        if row["output"].strip() and not NO_INPUT.fullmatch(row["output"].strip()):
            prompt = f"{row['instruction']}\n\n{given}" if given.strip() else row["instruction"]
            yield {"messages": turns(prompt, row["output"])}


def codealpaca(path: Path) -> Iterable[Row]:
    for row in instructions(path):
        prompt, answer = (message["content"] for message in row["messages"])
        named = [language for language, signs in LANGUAGES.items() if re.search(signs, prompt, re.IGNORECASE)]
        yield {**row, "reference": answer, **({"language": named[0]} if len(named) == 1 else {})}


def logiqa(path: Path) -> Iterable[Row]:
    """Blocks of eight lines: blank, letter, context, question, four options; damaged blocks are
    left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    for start in range(0, len(lines) - 7, 8):
        blank, letter, context, question, *options = (line.strip() for line in lines[start:start + 8])
        marked = [re.match(rf"{mark}\s*[.、．:：)]?\s*(\S.*)", option) for mark, option in zip(LETTERS, options)]
        if blank or letter.upper() not in set(LETTERS) or not (letter and context and question and all(marked)):
            continue
        choices = [match[1] for match in marked]
        listed = "\n".join(f"{mark}. {choice}" for mark, choice in zip(LETTERS, choices))
        prompt = "\n\n".join((context, question, listed, "Answer with the letter of the correct choice."))
        yield {"messages": turns(prompt, letter.upper()), "choices": choices, "answer": LETTERS.index(letter.upper())}


def ultrachat(path: Path) -> Iterable[Row]:
    """Pages of the rows service; dialogues that do not alternate from user to assistant are left
    out."""
    for entry in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        messages = [{"role": m["role"], "content": m["content"]} for m in entry["row"]["messages"]]
        if len(messages) % 2:
            messages.pop()
        expected = turns(*(m["content"] for m in messages))
        if messages and messages == expected and all(m["content"].strip() for m in messages):
            yield {"messages": messages}


def key(row: Row) -> str:
    return "".join(row["messages"][0]["content"].casefold().split())


def chosen(rows: Iterable[Row], count: int, seed: int, max_chars: int, taken: set[str]) -> list[Row]:
    """At most `count` rows without repeats, without those whose key is in `taken`, in hash order.
    """
    pool: dict[str, Row] = {}
    for row in rows:
        if key(row) not in taken and sum(len(m["content"]) for m in row["messages"]) <= max_chars:
            pool.setdefault(key(row), row)
    order = sorted(pool, key=lambda k: hashlib.sha256(f"{seed}:{k}".encode()).digest())
    return [pool[k] for k in order[:count]]


# task: (reader, files of train, files of eval); the same file twice means one pool for both
TASKS: dict[str, tuple[Callable[[Path], Iterable[Row]], str, str]] = {
    "gsm8k": (gsm8k, "gsm8k_train.jsonl", "gsm8k_test.jsonl"),
    "codealpaca": (codealpaca, "codealpaca.json", "codealpaca.json"),
    "logiqa": (logiqa, "logiqa_train.txt", "logiqa_test.txt"),
    "alpaca": (instructions, "alpaca.json", "alpaca.json"),
    "ultrachat": (ultrachat, "ultrachat_train_*.json", "ultrachat_test_*.json"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, help="folder with the downloads")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--train-rows", type=int, default=4000)
    parser.add_argument("--eval-rows", type=int, default=300)
    parser.add_argument("--max-chars", type=int, default=6000, help="leave out longer rows (default 6000, all messages together)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for task in args.tasks.split(","):
        if task not in TASKS:
            print(f"convert_data: unknown task {task} (known: {', '.join(TASKS)})", file=sys.stderr)
            return 2
        reader, *patterns = TASKS[task]
        files = [sorted(args.raw.glob(pattern)) for pattern in patterns]
        if not all(files):
            print(f"convert_data: {args.raw}: {' or '.join(patterns)} not found (hint: scripts/fetch-data.sh)", file=sys.stderr)
            return 3
        train, held_out = ((row for path in paths for row in reader(path)) for paths in files)
        evaluated = chosen(held_out, args.eval_rows, args.seed, args.max_chars, set())
        trained = chosen(train, args.train_rows, args.seed, args.max_chars, {key(row) for row in evaluated})
        (args.out / task).mkdir(parents=True, exist_ok=True)
        for name, rows in (("train", trained), ("eval", evaluated)):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            partial = args.out / task / f".{name}.jsonl.partial"
            partial.write_text(text, encoding="utf-8")
            partial.replace(args.out / task / f"{name}.jsonl")
        print(f"{task}: {len(trained)} train rows, {len(evaluated)} eval rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
