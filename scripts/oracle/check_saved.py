#!/usr/bin/env python3
"""Loads a saved checkpoint folder in transformers and fails where keys are missing, unexpected or
of another shape, or where the tokenizer does not load. Prints what was loaded."""
import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--no-tokenizer", action="store_true", help="the folder holds a model only")
    args = parser.parse_args()
    logging.disable_progress_bar()

    model, info = AutoModelForCausalLM.from_pretrained(args.folder, dtype="auto", output_loading_info=True,
                                                       ignore_mismatched_sizes=True)  # listed below instead
    found = {problem: sorted(map(str, info.get(problem) or ())) for problem in PROBLEMS}
    bad = {problem: keys for problem, keys in found.items() if keys}
    for problem, keys in bad.items():
        print(f"check_saved: {args.folder}: {problem}: {', '.join(keys)}", file=sys.stderr)

    weights = dict(model.named_parameters())  # a tied tensor counts once
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()})
    line = f"{args.folder}: {type(model).__name__}, {sum(w.numel() for w in weights.values()):,} parameters, {', '.join(dtypes)}"
    if not all(torch.isfinite(weight).all() for weight in weights.values()):
        bad["values"] = ["not finite"]
        print(f"check_saved: {args.folder}: weights are not all finite", file=sys.stderr)
    if not args.no_tokenizer:
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.folder)
        except (OSError, ValueError, KeyError) as error:
            print(f"check_saved: {args.folder}: the tokenizer does not load: {error}", file=sys.stderr)
            return 1
        line += f", {len(tokenizer)} tokens, chat template {'yes' if tokenizer.chat_template else 'no'}"
        if len(tokenizer) > model.config.get_text_config().vocab_size:
            bad["vocabulary"] = ["too small"]
            print(f"check_saved: {args.folder}: {len(tokenizer)} tokens for vocab_size {model.config.get_text_config().vocab_size}", file=sys.stderr)
    print(line)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
