#!/usr/bin/env python3
"""Writes fixtures/golden/gsm8k_filters.json: made-up answers, what lm-evaluation-harness 0.4.13's
filters extract from them, and its exact match. Needs the environment of check_lm_eval.sh."""
import json
from pathlib import Path

import lm_eval
import yaml
from lm_eval.filters.extraction import RegexFilter
from lm_eval.tasks import TaskManager  # noqa: F401  (registers filters and metrics)
from lm_eval.api.metrics import exact_match_fn

OUT = Path(__file__).parents[2] / "fixtures/golden/gsm8k_filters.json"
TASK = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text())
CASES = [
    ("7 + 5 = 12\n#### 12", "7 + 5 = 12\n#### 12"),
    ("#### 1,250", "#### 1250"),
    ("#### 12.", "#### 12"),
    ("#### 12.0", "#### 12"),
    ("#### 7\nor\n#### 9", "#### 7"),
    ("It costs $42.50.", "#### 42.50"),
    ("It costs $42.", "#### 42"),
    ("That makes 30%.", "#### 30"),
    ("I think it is 8. But who knows...", "#### 8"),
    ("####12", "#### 12"),
    ("#### -4", "#### -4"),
    ("minus four, -4", "#### -4"),
    ("no number at all", "#### 3"),
    ("", "#### 3"),
    ("#### 5 apples and 6 pears", "#### 5"),
    ("#### x\nso 1,2,3", "#### 123"),
    ("The total is 15.\n", "#### 15.\n"),
    ("3/4 of 100 is 75", "75"),
]


def filters():
    """The regular expression filters by name, made as the task file says."""
    for entry in TASK["filter_list"]:
        options = {k: v for k, v in entry["filter"][0].items() if k != "function"}
        yield entry["name"], RegexFilter(**options)


def main():
    metric = {k: v for k, v in TASK["metric_list"][0].items() if k not in ("metric", "aggregation", "higher_is_better")}
    by_name = dict(filters())
    cases = []
    for resp, gold in CASES:
        case = {"resp": resp, "gold": gold}
        for key, name in (("strict", "strict-match"), ("flex", "flexible-extract")):
            case[key] = by_name[name].apply([[resp]], [{}])[0][0]
            case[f"{key}_em"] = float(exact_match_fn(predictions=[case[key]], references=[gold], **metric)["exact_match"])
        cases.append(case)
    OUT.write_text(json.dumps(cases, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
