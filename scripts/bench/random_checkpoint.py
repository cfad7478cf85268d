"""A Hugging Face folder of a model at random weights, for benchmarks: `random_checkpoint.py
CONFIG.json TOKENIZER_DIR OUT`.

bf16; the tokenizer is copied from a folder that has a smaller one than the model's embedding.
Prints one JSON object.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def main():
    config, tokenizer, out = map(Path, sys.argv[1:])
    torch.manual_seed(0)
    fields = json.loads(config.read_text())
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.bfloat16)
    model.save_pretrained(out)
    for file in tokenizer.glob("*token*.json"):
        shutil.copy(file, out)
    print(json.dumps({"parameters": model.num_parameters()}))


if __name__ == "__main__":
    main()
