"""The peer of `bench_generate`: greedy generation as a user of transformers writes it, the same
options and JSON.

    python3 generate_peer.py --model DIR --prompts FILE --batch-size 16 --new-tokens 128 --threads 1

sdpa attention, `model.generate(do_sample=False)` over prompts padded on the left, longest first.
"""

import argparse
import json
import sys
import time

try:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging
except ImportError as error:
    sys.exit(f"generate_peer: {error} (hint: scripts/oracle/setup.sh makes a Python with torch 2.11 and transformers)")

PAD = 0
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--eos", action="store_true", help="end answers at the model's EOS")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compute-dtype", choices=list(DTYPES), default="f32")
    return parser.parse_args()


def answer_batch(model, prompts, args, eos):
    """The ids that follow each prompt, the ending id and what comes after it left out."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts], device=model.device)
    seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    found = model.generate(ids, attention_mask=seen, do_sample=False, max_new_tokens=args.new_tokens,
                           eos_token_id=eos or None, pad_token_id=PAD)
    answers = found[:, longest:].tolist()
    ends = [next((i for i, token in enumerate(a) if token in eos), len(a)) for a in answers]
    return [a[:end] for a, end in zip(answers, ends)]


def answer(model, prompts, args, eos):
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    answers = [None] * len(prompts)
    for start in range(0, len(order), args.batch_size):
        chunk = order[start:start + args.batch_size]
        for i, ids in zip(chunk, answer_batch(model, [prompts[i] for i in chunk], args, eos)):
            answers[i] = ids
    return answers


def main():
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = DTYPES[args.compute_dtype]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa").to(args.device).eval()
    configured = model.generation_config.eos_token_id
    eos = ([] if configured is None else configured if isinstance(configured, list) else [configured]) if args.eos else []
    # None in generate() falls back on the configuration.
    model.generation_config.eos_token_id = None
    with open(args.prompts, encoding="utf-8") as file:
        prompts = json.load(file)
    cpu, wall, ids = [], [], []
    for _ in range(args.repeat):
        start, clock = time.process_time(), time.perf_counter()
        with torch.inference_mode():
            ids = answer(model, prompts, args, eos)
        cpu.append(time.process_time() - start)
        wall.append(time.perf_counter() - clock)
    print(json.dumps({"ids": ids, "cpu_seconds": cpu, "wall_seconds": wall,
                      "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}))


if __name__ == "__main__":
    main()
