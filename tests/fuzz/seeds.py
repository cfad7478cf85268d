"""Writes valid inputs for every target to FOLDER/TARGET: python3 seeds.py FOLDER. Uses only the
standard library."""

import json
import struct
import sys
from pathlib import Path

ROOT, HERE = Path(sys.argv[1]), Path(__file__).parent
DIGEST = "0" * 64


def compact(value):
    return json.dumps(value, separators=(",", ":")).encode()


def tensors(*rows, metadata=None):
    """Returns a header with contiguous tensors and the size of the data. A row is (name, dtype,
    bytes per element, shape)."""
    header, at = ({"__metadata__": metadata} if metadata else {}), 0
    for name, dtype, size, shape in rows:
        end = at + size
        for n in shape:
            end = at + (end - at) * n
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    return compact(header), at


def whole(header, size):
    return struct.pack("<Q", len(header)) + header + bytes(size)


def put(target, name, data):
    folder = ROOT / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def headers():
    plain = tensors(("a", "F32", 4, [2, 3]), ("b", "BF16", 2, [4]), ("s", "F64", 8, []), metadata={"format": "pt"})
    every = tensors(*[(d.lower(), d, s, [2]) for d, s in [("F64", 8), ("I64", 8), ("U64", 8), ("F32", 4), ("I32", 4),
                    ("U32", 4), ("F16", 2), ("BF16", 2), ("I16", 2), ("U16", 2), ("I8", 1), ("U8", 1), ("BOOL", 1)]])
    empty = tensors(("e", "F32", 4, [0, 7]), ("w", "F8_E4M3", 1, [3]))
    for name, (header, size) in {"plain": plain, "every": every, "empty": empty}.items():
        put("header", name, whole(header, size))
        put("header", name + "-framed", b"h" + header)


def folders():
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    a, _ = tensors(("model.embed_tokens.weight", "F32", 4, [2, 3]), ("model.layers.0.mlp.up_proj.weight", "BF16", 2, [3, 2]))
    b, _ = tensors(("lm_head.weight", "F32", 4, [2, 3]), ("x.rotary_emb.inv_freq", "F32", 4, [2]), ("n", "I64", 8, [1]))
    index = {"metadata": {"total_size": 1}, "weight_map": {}}
    for header, file in [(a, first), (b, second)]:
        index["weight_map"].update({name: file for name in json.loads(header)})
    config = {"model_type": "llama", "tie_word_embeddings": True, "torch_dtype": "float32"}
    record = {"format_version": 1, "stage": "cpift-merge", "version": "0.1.0", "arguments": ["slerp"], "seed": 1,
              "inputs": {"base": {"path": "b", "digest": DIGEST}}, "facts": {"D": 1},
              "output": {"blake3": DIGEST, "files": [{"name": "config.json", "size": 1, "mtime_ns": 1}]},
              "host": "h", "started_unix": 1, "seconds": 0.5}
    parts = [compact(index), compact(config), compact(record), a, b]
    put("index", "two-shards", b"\0".join(parts))
    put("index", "no-record", b"\0".join(parts[:2] + [b""] + parts[3:]))


def masks():
    own = {"format_version": 2, "percent": 1.0, "scope": "global", "metric": "magnitude", "D": 20, "selected": 3,
           "ties": {"at_threshold": 1, "chosen": 1, "decided_by_hash": 0}, "excluded": ["norms"], "base": DIGEST,
           "tuned": DIGEST, "numel": {"w": 20}}
    bits = bytes([0b101, 0, 0b1000])
    header, _ = tensors(("w", "U8", 1, [3]), metadata={"cpift": compact(own).decode()})
    put("mask", "own", b"m" + compact(own) + b"\0" + bits)
    put("mask", "framed", b"h" + header + b"\0" + bits)
    put("mask", "whole", whole(header, 0) + bits)
    tied = dict(own, rule="2:4", ties={"at_threshold": 2, "chosen": 1, "decided_by_hash": 1})
    header, _ = tensors(("w", "U8", 1, [3]), ("cpift.ties", "U8", 1, [1]), metadata={"cpift": compact(tied).decode()})
    put("mask", "tied", b"h" + header + b"\0" + bits + bytes([0b100]))
    layers = dict(own, scope="layer", numel={"model.layers.0.self_attn.q_proj.weight": 5, "model.norm.weight": 9},
                  selected=0)
    header, size = tensors(("model.layers.0.self_attn.q_proj.weight", "U8", 1, [1]), ("model.norm.weight", "U8", 1, [2]),
                           metadata={"cpift": compact(layers).decode()})
    put("mask", "layers", whole(header, size))


def groups():
    square = [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]]
    value = {"format_version": 1, "tau": 0.1, "tau_mode": "fixed", "tasks": ["a", "b", "c"], "jaccard": square,
             "chance": square, "excluded": ["embeddings"], "groups": [["c"], ["a", "b"]],
             "order": {"method": "overlap", "scores": [0.0, 1.0]}, "trivial": False, "base": DIGEST,
             "masks": {"a": DIGEST, "b": DIGEST, "c": DIGEST}}
    put("groups", "two", compact(value))
    put("groups", "random", json.dumps(dict(value, tau_mode="auto", order={"method": "random", "seed": 7})).encode())


def recipes():
    pair = "models: [{model: a}, {model: b}]\n"
    put("recipe", "linear", f"merge_method: linear\nparameters: {{weight: 1}}\n{pair}dtype: bfloat16\n".encode())
    put("recipe", "slices", b"""slices:
  - sources:
      - {model: a, layer_range: [0, 4]}
      - {model: b, layer_range: [0, 4]}
merge_method: slerp
base_model: a
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 1]}
    - value: 0.5 # all others
dtype: float16
tokenizer_source: base
""")
    put("recipe", "ties", b"""models:
  - model: base
  - model: "org/math"
    parameters: &p {density: [1, 0.7, 0.1], weight: 1.0}
  - model: code
    parameters: *p
merge_method: ties
base_model: base
parameters: {normalize: true, lambda: 0.5, int8_mask: yes}
out_dtype: float32
tokenizer: {source: code}
""")
    put("recipe", "dare", f"""merge_method: dare_ties
base_model: base
{pair}parameters: {{density: 0.5, weight: 0.3, rescale: false}}
cpift: {{seed: 7, protect: m.safetensors}}
""".encode())
    put("recipe", "karcher", b"""merge_method: karcher
models:
  - {model: a, cpift: {mask: a.mask, weight: 2}}
  - {model: b}
cpift: {space: delta, base: z, epsilon: 0.1}
""")


def models():
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 32,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 259,
             "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
             "hidden_act": "silu", "torch_dtype": "float32"}
    put("config", "llama", compact(llama))
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 64}
    put("config", "llama3", compact(llama | {"rope_scaling": scaled}))
    put("config", "yarn", compact(llama | {"rope_scaling": {"type": "yarn", "factor": 4.0}}))
    put("config", "linear", compact(llama | {"rope_scaling": {"type": "linear", "factor": 2}}))
    put("config", "mistral", compact(llama | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 16}))
    put("config", "qwen2", compact(llama | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": True,
                                            "sliding_window": 16, "max_window_layers": 1}))
    put("config", "qwen3", compact(llama | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}))
    put("config", "qwen3_moe", compact(llama | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4,
                                                "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True,
                                                "mlp_only_layers": [0], "decoder_sparse_step": 1, "output_router_logits": True}))
    put("config", "phi3", compact(llama | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "partial_rotary_factor": 0.5,
                                           "original_max_position_embeddings": 64, "rope_scaling": {
                                               "type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}))
    put("config", "olmo2", compact(llama | {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}))
    put("config", "granite", compact(llama | {"architectures": ["GraniteForCausalLM"], "model_type": "granite", "logits_scaling": 8.0,
                                              "embedding_multiplier": 12.0, "attention_multiplier": 0.02, "residual_multiplier": 0.2}))
    put("config", "smollm3", compact(llama | {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "no_rope_layers": [1, 0]}))
    put("config", "gemma3", compact({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "vision_config": {},
                                     "text_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                                                     "sliding_window": 16, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}}))
    put("config", "gemma2", compact(llama | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2",
                                             "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 4, "sliding_window": 16,
                                             "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}))


TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def tokenizers():
    vocab = {c: i for i, c in enumerate("abcdefgh \u0120\u010a")}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": 12, "content": "<|im_end|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
           "special": True}
    bpe = {"type": "BPE", "vocab": vocab | {"ab": 11}, "merges": [["a", "b"]], "unk_token": None}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": {"type": "NFC"},
             "pre_tokenizer": level, "post_processor": None, "decoder": level, "model": bpe}
    config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    put("tokenizer", "bpe", b"\0".join([compact(whole), compact(config), b"abc abba"]))
    split = {"type": "Split", "pattern": {"Regex": "\\s+|[a-d]+"}, "behavior": "Isolated", "invert": False}
    parts = {"type": "Sequence", "pretokenizers": [split, level]}
    put("tokenizer", "sequence", b"\0".join([compact(whole | {"pre_tokenizer": parts}), b"{}", b"a\n  bcd"]))
    pieces = dict(bpe, byte_fallback=True, fuse_unk=True, unk_token="a", vocab=vocab | {"<0x0A>": 11, "\u2581": 12})
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    put("tokenizer", "pieces", b"\0".join([compact(whole | {"pre_tokenizer": None, "normalizer": spaces, "decoder": back, "model": pieces,
                                                            "added_tokens": []}), b"{}", b"x b"]))


def tasks():
    put("tasks", "two", b"""[[task]]
name = "gsm8k"
train = "a.jsonl"
eval = "a.jsonl"
format = "gsm8k"
metric = "gsm8k"
kind = "reasoning"
few_shot = 2
max_new_tokens = 64
max_length = 128
sample = 50
template = "chatml"

[[task]]
name = "own"
train = "a.jsonl"
eval = "a.jsonl"
prompt = "{{ question | trim }}"
completion = "{% if answer %}{{ answer }}{% endif %}"
system = "Work step by step."
metric = "choice"
split = "(?s)(?P<passage>.*)\\\\n(?P<question>.*)"
language = "python"
""")


def rows():
    chat = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}], "answer": "b"}
    every = [chat, {"instruction": "i", "input": "n", "output": "o", "system": "s", "history": [["q", "a"]]},
             {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
             {"prompt": "p", "completion": "c"}, {"prompt": chat["messages"][:1], "completion": chat["messages"][1:]},
             {"question": "q", "answer": "a #### 1"}, {"data": ["q", "a", "q", "a"], "id": 1.5}]
    put("data", "lines", b"l" + b"\n".join(map(compact, every)))
    put("data", "list", b"j" + compact(every))
    put("data", "template", b"t{% for k in data %}{{ loop.index }} {{ k | upper }}{% endfor %}{{ id }}\0" + compact(every[-1]))
    for name in ("snappy", "zstd"):
        put("data", name, b"p" + (HERE / "../../fixtures/golden/parquet" / f"{name}.parquet").read_bytes())


def scores():
    figure = {"name": "nll", "value": 1.5, "stderr": 0.25, "n": 3}
    task = {"task": "gsm8k", "eval_digest": DIGEST, "metric": dict(figure, name="exact_match", value=0.5), "nll": figure,
            "also": {"flexible": figure}, "settings": {"limit": None, "metric": "gsm8k", "filters": ["strict", 1, 2.5]}}
    plain = dict(task, task="alpaca", metric=None, settings={})
    del plain["also"]
    value = {"format_version": 1, "model": "runs/a", "model_digest": DIGEST, "tasks": [task, plain]}
    put("scores", "two", compact(value))
    put("scores", "pretty", json.dumps(value, indent=2).encode())
    put("scores", "other-version", compact(dict(value, format_version=2)))


def states():
    header, _ = tensors(("model.norm.weight", "F32", 4, [4]))
    stage = {"steps": 2, "tokens": 10, "first_loss": 1.5, "final_loss": 0.5, "frozen": 0}
    value = {"format_version": 4, "files": {"metrics.jsonl": DIGEST, "rank-0-of-2.safetensors": DIGEST}, "own": DIGEST,
             "run": {"seed": 0, "arguments": {"--lr": 1e-3}},
             "position": {"finished": [], "step": 1, "tokens": 5, "losses": [1.5, 0.25], "importance_tokens": 0}}
    for name, finished in {"first": [], "second": [stage]}.items():
        position = dict(value["position"], finished=finished)
        put("state", name, b"\0".join([compact(dict(value, position=position)), b'{"step":1}\n', header, header]))


def adapters():
    model, _ = tensors(("model.layers.0.q_proj.weight", "BF16", 2, [4, 3]), ("model.embed_tokens.weight", "F32", 4, [5, 3]),
                       ("norm.weight", "F32", 4, [3]))
    q = "base_model.model.model.layers.0.q_proj"
    pair = [(f"{q}.lora_A.weight", "F32", 4, [2, 3]), (f"{q}.lora_B.weight", "F16", 2, [4, 2])]
    embed = "base_model.model.model.embed_tokens"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "fan_in_fan_out": False, "bias": "none",
              "rank_pattern": {}, "alpha_pattern": {"layers.0.*q_proj": 3}, "init_lora_weights": True}
    k = "lora_unet_layers_0_q_proj"
    d = "unet.layers.0.q_proj"
    for name, settings, rows in [
        ("plain", config, pair),
        ("rslora", dict(config, use_rslora=True), pair),
        ("dora", config, pair + [(f"{q}.lora_magnitude_vector", "F32", 4, [4])]),
        ("embedding", config, [(f"{embed}.lora_embedding_A", "F32", 4, [2, 5]), (f"{embed}.lora_embedding_B", "F32", 4, [3, 2])]),
        ("saved", config, pair + [("base_model.model.norm.weight", "F32", 4, [3])]),
        ("ranks", dict(config, r=1, rank_pattern={"q_proj": 2}), pair),
        ("kohya", None, [(f"{k}.lora_down.weight", "F32", 4, [2, 3]), (f"{k}.lora_up.weight", "F32", 4, [4, 2]), (f"{k}.alpha", "F32", 4, [])]),
        ("diffusers", None, [(f"{d}.lora_A.weight", "F32", 4, [2, 3]), (f"{d}.lora_B.weight", "F32", 4, [4, 2])]),
        ("older", None, [(f"{d}.lora.down.weight", "F32", 4, [2, 3]), (f"{d}.lora.up.weight", "F32", 4, [4, 2])]),
        ("kind", dict(config, peft_type="IA3"), pair),
        ("start", dict(config, init_lora_weights="pissa"), pair),
        ("half", config, pair[:1]),
        ("rank", config, [pair[0], (f"{q}.lora_B.weight", "F16", 2, [4, 3])]),
        ("shape", config, [(f"{q}.lora_A.weight", "F32", 4, [2, 9]), pair[1]]),
        ("other", config, [(name.replace("0", "7"), *rest) for name, *rest in pair]),
        ("empty", config, [(f"{q}.lora_A.weight", "F32", 4, [4611686018427387904, 0]), pair[1]]),
        ("integers", config, [(f"{q}.lora_A.weight", "I8", 1, [2, 3]), pair[1]]),
        ("loha", None, [(f"{k}.hada_w1_a", "F32", 4, [2, 2])]),
        ("vectors", config, [(f"{q}.lora_A.weight", "F32", 4, [6]), pair[1]]),
        ("bias", config, pair + [(f"{q}.lora_B.bias", "F32", 4, [4])]),
    ]:
        header, _ = tensors(*rows)
        put("adapter", name, b"\0".join([compact(settings) if settings else b"", header, model]))


def vocabularies():
    bpe = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
           "added_tokens": [{"id": 3, "content": "<s>", "special": True}]}
    put("vocabulary", "bpe", compact(bpe))
    put("vocabulary", "pretty", json.dumps(bpe, indent=1).encode())
    put("vocabulary", "unigram", compact({"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["x", -1.5]]}}))
    for i, id in enumerate([0, 1, -1, 1.5, "2", None, 18446744073709551615, 18446744073709551616]):
        put("vocabulary", f"id-{i}", compact({"model": {"vocab": {"a": 0, "b": id}}}))
        put("vocabulary", f"added-{i}", compact(dict(bpe, added_tokens=[{"id": id, "content": "c"}])))
    for i, model in enumerate([None, [], {"vocab": 1}, {"vocab": [1, [], ["x"], [2, 3]]}, {"vocab": {}}]):
        put("vocabulary", f"model-{i}", compact({"model": model}))


for write in (adapters, vocabularies, headers, folders, masks, groups, recipes, models, tokenizers, tasks, rows, scores, states):
    write()
