#!/usr/bin/env python3
"""Writes fixtures/golden/tokenizer_files.json: small tokenizer folders whose files declare tokens
in different places, and what transformers reads from them.

Layout: `tokenizer` is the content of tokenizer.json, to which a variant's `merged` is added key by
key; `variants` NAME -> `merged`, `files` (the other files by name), `special` (transformers'
special_tokens_map), `ids` (of the named tokens), `text` and its token `encoded` without special
tokens around it, and `decoded`, the text of these ids less special tokens.
"""
import argparse
import json
import tempfile
from pathlib import Path

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXT = "<s>hi <|a|>there <|b|> <tool>e</s> <pad><mask><|c|>"


def entry(content: str, **flags: bool) -> dict:
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True} | flags


def typed(content: str, **flags: bool) -> dict:
    return {"__type": "AddedToken"} | entry(content, **flags)


def mapped(content: str, **flags: bool) -> dict:
    return {key: value for key, value in entry(content, **flags).items() if key != "special"}


def config(**keys: object) -> dict:
    return {"tokenizer_config.json": keys}


def special_map(**keys: object) -> dict:
    return {"special_tokens_map.json": keys}


FIXED = {"strategy": {"Fixed": 70}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 3, "pad_type_id": 0,
         "pad_token": "<pad>"}
SHORT = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}

# NAME: (files, merged into tokenizer.json)
VARIANTS = {
    "no_other_file": ({}, {}),
    "named_in_the_config": (config(bos_token="<s>", eos_token="</s>", unk_token="<unk>"), {}),
    "decoder": (config(eos_token="<|a|>", added_tokens_decoder={"1": entry("<s>"), "300": entry("<|a|>"), "99": entry("<|b|>")}), {}),
    "decoder_not_special": (config(added_tokens_decoder={"200": entry("<tool>", special=False),
                                                         "201": entry("<|a|>", special=False, normalized=True)}), {}),
    "decoder_makes_eos_special": (config(eos_token="<tool>", added_tokens_decoder={"200": entry("<tool>", special=False)}), {}),
    "decoder_strips": (config(added_tokens_decoder={"200": entry("<|a|>", lstrip=True), "201": entry("<|b|>", rstrip=True),
                                                    "202": entry("<tool>", single_word=True)}), {}),
    "decoder_with_other_flags": (config(eos_token="</s>", added_tokens_decoder={"2": entry("</s>", rstrip=True),
                                                                                "3": entry("<pad>", special=False)}), {}),
    "decoder_and_map": (config(bos_token=None, eos_token="</s>", added_tokens_decoder={"2": entry("</s>")})
                        | special_map(bos_token="<s>", eos_token="<pad>", pad_token="<pad>"), {}),
    "empty_decoder_and_map": (config(eos_token="</s>", added_tokens_decoder={}) | special_map(bos_token="<s>", eos_token="<pad>"), {}),
    "eos_is_new": (config(eos_token="<|a|>"), {}),
    "eos_is_a_word": (config(eos_token="e"), {}),
    "eos_as_object": (config(eos_token=typed("<|a|>", lstrip=True), bos_token=typed("<s>")), {}),
    "all_named_new": (config(pad_token="<mask>", mask_token="<|a|>", cls_token="<|b|>", sep_token="<tool>", bos_token="<|c|>"), {}),
    "additional": (config(additional_special_tokens=["<|b|>", "<|a|>"], eos_token="<|c|>"), {}),
    "additional_as_objects": (config(additional_special_tokens=[typed("<|b|>", rstrip=True), "<s>"]), {}),
    "extra": (config(extra_special_tokens=["<tool>", "<|a|>"]), {}),
    "extra_named": (config(extra_special_tokens={"image_token": "<|a|>", "tool_token": "<tool>"}), {}),
    "extra_and_additional": (config(extra_special_tokens=["<|a|>"], additional_special_tokens=["<|b|>"]), {}),
    "empty_extra_and_additional": (config(extra_special_tokens=[], additional_special_tokens=["<|b|>"]), {}),
    "own_token_keys": (config(image_token="<|a|>", boi_token="<s>", eos_token="</s>", add_bos_token=True), {}),
    "map_wins": (config(bos_token="<s>", eos_token="<s>", pad_token="<pad>")
                 | special_map(eos_token="</s>", pad_token=mapped("<|a|>")), {}),
    "map_null_wins": (config(bos_token="<s>", eos_token="</s>") | special_map(bos_token=None, unk_token="<unk>"), {}),
    "map_only": (special_map(bos_token=mapped("<s>"), eos_token=mapped("<|a|>", rstrip=True), pad_token="<pad>"), {}),
    "map_additional": (config(eos_token="</s>") | special_map(additional_special_tokens=["<|b|>", "<|a|>"]), {}),
    "map_and_config_additional": (config(additional_special_tokens=["<|a|>"]) | special_map(additional_special_tokens=["<|b|>"]), {}),
    "map_and_config_extra": (config(extra_special_tokens=["<|a|>"]) | special_map(extra_special_tokens=["<|b|>", mapped("<tool>")]), {}),
    "map_own_token_keys": (config(eos_token="</s>") | special_map(image_token="<|a|>", extra_special_tokens={"tool_token": "<tool>"}), {}),
    "added_tokens": (config(eos_token="<|a|>", extra_special_tokens=["<|c|>"])
                     | {"added_tokens.json": {"<|b|>": 500, "<|a|>": 400, "<|c|>": 401}}, {}),
    "added_tokens_and_decoder": (config(added_tokens_decoder={"1": entry("<s>")}) | {"added_tokens.json": {"<|b|>": 400}}, {}),
    "padding_names_pad": (config(eos_token="</s>"), {"padding": FIXED, "truncation": SHORT}),
    "padding_and_null_pad": (config(pad_token=None), {"padding": FIXED}),
    "padding_and_another_pad": (config(pad_token="<mask>"), {"padding": FIXED}),
    "split_special": (config(eos_token="</s>", split_special_tokens=True), {}),
}


def base() -> Tokenizer:
    letters = sorted({*map(chr, range(33, 127)), "Ġ"})
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<unk>", *letters])}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>", "<pad>")])
    return tokenizer


def variant(tokenizer: dict, files: dict, merged: dict) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in ({"tokenizer.json": tokenizer | merged} | files).items():
            Path(folder, name).write_text(json.dumps(content), encoding="utf-8")
        read = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = read(TEXT, add_special_tokens=False)["input_ids"]
    named = {key: read.convert_tokens_to_ids(token) for key, token in read.special_tokens_map.items()}
    return {"merged": merged, "files": files, "special": read.special_tokens_map, "ids": named, "text": TEXT, "encoded": ids,
            "decoded": read.decode(ids, skip_special_tokens=True)}


def main() -> None:
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=root / "fixtures/golden/tokenizer_files.json")
    out = parser.parse_args().out
    tokenizer = json.loads(base().to_str())
    variants = {name: variant(tokenizer, files, merged) for name, (files, merged) in VARIANTS.items()}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in variants.items())
    out.write_text(f'{{"transformers": {json.dumps(transformers.__version__)},\n"tokenizer": {json.dumps(tokenizer, ensure_ascii=False)},\n'
                   f'"variants": {{\n{lines}\n}}}}\n', encoding="utf-8")
    print(f"{out}: {len(variants)} variants")


if __name__ == "__main__":
    main()
