#!/usr/bin/env python3
"""Makes fixtures/golden/vocabulary: three tiny models whose tokenizers have different tokens, recipes with a
`tokenizer` block, and mergekit's outputs in float32 with the token of each row.

    python scripts/oracle/golden_vocabulary.py      # mergekit 0.1.5, transformers and tokenizers, as mergekit.sh sets up
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUT = Path(__file__).resolve().parents[2] / "fixtures/golden/vocabulary"

TOKENS = {
    "base": (["a", "b", "c", "d", "e", "<unk>"], ["<s>"], 8),        # one row of padding
    "one": (["b", "a", "c", "d", "e", "<unk>", "f"], ["<s>", "<x>"], 9),
    "two": (["<unk>", "g", "a", "f", "e"], ["<s>", "<y>"], 7),
}
RECIPES = {
    "base": {"source": "base"},
    "union": {"source": "union"},
    "path": {"source": "two"},
    "padded": {"source": "union", "pad_to_multiple_of": 8},
    "rules": {"source": "union", "tokens": {
        "f": {"source": "two"},
        "a": {"source": {"kind": "zero"}, "force": True},
        "<x>": {"source": {"kind": "model_token", "model": "base", "token": "e"}},
        "<y>": {"source": {"kind": "model_token", "model": "one", "token_id": 2}, "force": True},
        "<new>": {"source": {"kind": "model_token", "model": "base", "token": "b"}},
    }},
}


def write_model(name, seed):
    words, added, rows = TOKENS[name]
    folder = OUT / name
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    for token in added:
        fast.add_tokens(token, special_tokens=token == "<s>")
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=rows, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
                         num_key_value_heads=1, tie_word_embeddings=False, initializer_range=0.5)
    model = LlamaForCausalLM(config)
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, folder / "model.safetensors", metadata={"format": "pt"})
    values = {k: v for k, v in config.to_dict().items() if not k.startswith("_") and k != "transformers_version"}
    values["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    for seed, name in enumerate(TOKENS):
        write_model(name, seed)
    for name, block in RECIPES.items():
        recipe = {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": [{"model": "one", "parameters": {"weight": 0.5}}, {"model": "two", "parameters": {"weight": 0.25}}],
            "dtype": "float32",
            "tokenizer": block,
        }
        (OUT / f"{name}.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        text = json.dumps(recipe)
        for model in TOKENS:
            text = text.replace(f'"{model}"', json.dumps(str(OUT / model)))
        if block["source"] == "base":
            text = text.replace(json.dumps({"source": str(OUT / "base")}), '{"source": "base"}')
        with tempfile.TemporaryDirectory() as out:
            config = MergeConfiguration.model_validate(json.loads(text))
            run_merge(config, out, MergeOptions(copy_tokenizer=True, cuda=False, quiet=True))
            vocab = AutoTokenizer.from_pretrained(out).get_vocab()
            tensors = load_file(f"{out}/model.safetensors")
            kept = {k: tensors[k].float() for k in ("model.embed_tokens.weight", "lm_head.weight")}
            save_file(kept, OUT / f"{name}.safetensors", metadata={"vocab": json.dumps(dict(sorted(vocab.items())))})
            print(name, len(vocab), tuple(kept["lm_head.weight"].shape))


if __name__ == "__main__":
    main()
