#!/usr/bin/env python3
"""Writes fixtures/golden/parquet: a few invented rows as JSONL, and the same rows as pyarrow writes
them in Parquet, Snappy and Zstandard, which is what the hub's exports are made with, two rows per
row group; and binary.parquet, whose columns are bytes without the annotation of text, as Impala and
older Spark write them.

    golden_parquet.py [OUT]
"""
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

TURN = pa.struct([("content", pa.string()), ("role", pa.string()), ("tool_calls", pa.list_(pa.string()))])
SCHEMA = pa.schema([
    ("messages", pa.list_(TURN)), ("answer", pa.string()), ("level", pa.int64()), ("score", pa.float64()), ("checked", pa.bool_()),
    ("choices", pa.list_(pa.string())), ("meta", pa.struct([("source", pa.string()), ("split", pa.large_string())])),
])


def turns(*texts: str, system: str | None = None) -> list[dict]:
    said = [("user", "assistant")[i % 2] for i in range(len(texts))]
    turns = [{"content": text, "role": role, "tool_calls": None} for role, text in zip(said, texts)]
    return [{"content": system, "role": "system", "tool_calls": None}] * (system is not None) + turns


ROWS = [
    {"messages": turns("What is 2 + 2?", "4"), "answer": "4", "level": 1, "score": 0.5, "checked": True, "choices": ["3", "4"],
     "meta": {"source": "sums", "split": "train"}},
    {"messages": turns("Sag Grüezi 🙂\nin zwei Zeilen", "Grüezi\n🙂", "Nochmals", "Grüezi", system="Sei kurz."), "answer": None,
     "level": -9007199254740993, "score": None, "checked": False, "choices": [], "meta": None},
    {"messages": turns("Name a colour.", "Red"), "answer": "Red", "level": None, "score": 1e-3, "checked": None, "choices": None,
     "meta": {"source": None, "split": "train"}},
]

BINARY = pa.schema([
    ("question", pa.binary()), ("answer", pa.binary()), ("id", pa.binary(4)), ("score", pa.float32()), ("tags", pa.list_(pa.binary())),
])
BINARY_ROWS = [
    {"question": "où ?".encode(), "answer": "là".encode(), "id": b"\xff\xfe\x00\x80", "score": float("nan"), "tags": [b"t", b"\x80"]},
    {"question": b"q", "answer": b"a", "id": b"abcd", "score": 0.5, "tags": []},
]


def main() -> None:
    default = Path(__file__).resolve().parents[2] / "fixtures/golden/parquet"
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    (out / "rows.jsonl").write_text(lines, encoding="utf-8")
    table = pa.Table.from_pylist(ROWS, schema=SCHEMA)
    for codec in ("snappy", "zstd"):
        pq.write_table(table, out / f"{codec}.parquet", compression=codec, row_group_size=2)
    pq.write_table(pa.Table.from_pylist(BINARY_ROWS, schema=BINARY), out / "binary.parquet")


if __name__ == "__main__":
    main()
