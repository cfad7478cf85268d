"""What the mergekit scripts share: tiny LLaMA-shaped checkpoints, the recipes compared, and running
one in mergekit."""
import json
import logging
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

MODELS = ("base", "a", "b", "c")
# Fine-tunes near the base, one far from it, and d, a multiple of a.
DELTAS = {"a": 0.003, "b": 0.02, "c": 0.08}

RECIPES = {
    "linear": """
merge_method: linear
models:
  - {model: a, parameters: {weight: 1.5}}
  - {model: b, parameters: {weight: 0.25}}
  - {model: c, parameters: {weight: 1}}
""",
    "linear_sum": """
merge_method: linear
models:
  - {model: a, parameters: {weight: [0.9, 0.4]}}
  - {model: b, parameters: {weight: [{filter: mlp, value: [0.1, 0.2, 0.7]}, {filter: "*", value: 0.3}]}}
parameters: {normalize: false}
""",
    "linear_base": """
merge_method: linear
base_model: base
models: [{model: a}, {model: b, parameters: {weight: 2}}]
parameters: {weight: 1}
""",
    "slerp": """
merge_method: slerp
base_model: b
models: [{model: a}, {model: b}]
parameters: {t: 0.3}
""",
    "slerp_gradients": """
merge_method: slerp
base_model: a
slices:
  - sources:
      - {model: a, layer_range: [0, LAYERS]}
      - {model: c, layer_range: [0, LAYERS]}
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
""",
    "slerp_collinear": """
merge_method: slerp
base_model: a
models: [{model: d}]
parameters: {t: [0.25, 0.75]}
""",
    "task_arithmetic": """
merge_method: task_arithmetic
base_model: base
models:
  - {model: a, parameters: {weight: 0.7}}
  - {model: b, parameters: {weight: -0.3}}
  - {model: c, parameters: {weight: [0.1, 0.5]}}
parameters: {lambda: 0.8}
""",
    "task_arithmetic_normalize": """
merge_method: task_arithmetic
base_model: base
models: [{model: base}, {model: a, parameters: {weight: 3}}, {model: c}]
parameters: {weight: 1, normalize: true}
""",
    "ties": """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {density: 0.5, weight: 1}}
  - {model: b, parameters: {density: 0.33, weight: 0.5}}
  - {model: c, parameters: {density: [1, 0.1], weight: 0.25}}
""",
    "ties_sum": """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: [0.5, 1]}}
  - {model: b, parameters: {weight: [{filter: mlp, value: 0.75}, {value: 0.5}]}}
  - {model: c, parameters: {weight: 0.3}}
parameters: {density: 0.4, normalize: false, lambda: 1.25, int8_mask: true}
""",
    "ties_rescale": """
merge_method: ties
base_model: base
models: [{model: a}, {model: b}]
parameters: {density: 0.2, weight: 0.5, rescale: true}
""",
    "karcher": """
merge_method: karcher
models: [{model: a}, {model: b}, {model: c}]
parameters: {max_iter: 100, tol: 1.0e-7}
""",
    "karcher_base": """
merge_method: karcher
base_model: base
models: [{model: a}, {model: c}]
parameters: {max_iter: 100, tol: 1.0e-7}
""",
    "karcher_few": """
merge_method: karcher
models: [{model: a}, {model: b}, {model: c}]
parameters: {max_iter: 1, tol: 1.0e-9}
""",
    "passthrough_slices": """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources:
      - model: b
        layer_range: [1, LAYERS]
        parameters:
          scale:
            - {filter: o_proj, value: 0.5}
            - {filter: down_proj, value: [0, 1]}
            - {value: 1}
  - sources: [{model: c, layer_range: [1, 2]}]
""",
    "slerp_slices": """
merge_method: slerp
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: c, layer_range: [1, LAYERS]}]
    parameters: {t: [{filter: mlp, value: [0.2, 0.9]}, {filter: layers.0., value: 0.6}, {value: 0.4}]}
  - sources: [{model: c, layer_range: [0, LAYERS]}, {model: a, layer_range: [0, LAYERS]}]
parameters: {t: [0, 1]}
""",
    "ties_slices": """
merge_method: ties
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [1, 2]}
      - {model: a, layer_range: [0, 1], parameters: {weight: [{filter: layers.0., value: 0.7}, {value: 0.2}]}}
      - {model: b, layer_range: [2, 3], parameters: {density: 0.6}}
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: b, layer_range: [0, 2]}
      - {model: c, layer_range: [1, 3]}
    parameters: {weight: 0.3, normalize: false}
parameters: {density: 0.5, weight: 1}
""",
    "model_stock": """
merge_method: model_stock
base_model: base
models: [{model: a}, {model: b}, {model: c}]
""",
    "model_stock_filter_wise": """
merge_method: model_stock
base_model: base
models: [{model: b}, {model: d}, {model: a}]
parameters: {filter_wise: true}
""",
    "nuslerp": """
merge_method: nuslerp
models:
  - {model: a, parameters: {weight: 0.3}}
  - {model: c, parameters: {weight: [0.7, 0.2]}}
""",
    "nuslerp_base_rows": """
merge_method: nuslerp
base_model: base
models:
  - {model: b, parameters: {weight: 0.6}}
  - {model: c, parameters: {weight: 0.9}}
parameters: {nuslerp_flatten: false}
""",
    "nuslerp_columns": """
merge_method: nuslerp
models:
  - {model: b, parameters: {weight: 2}}
  - {model: c, parameters: {weight: 1}}
parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
""",
    "multislerp": """
merge_method: multislerp
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.2}}
  - {model: c, parameters: {weight: [0.1, 0.9]}}
""",
    "multislerp_base": """
merge_method: multislerp
base_model: base
models: [{model: a}, {model: b}, {model: c}]
parameters: {weight: 0.4, normalize_weights: false}
""",
    "nearswap": """
merge_method: nearswap
base_model: a
models: [{model: c}]
parameters: {t: [0.01, 0.05]}
""",
    "sce": """
merge_method: sce
base_model: base
models: [{model: a}, {model: b}, {model: c}]
parameters: {select_topk: 0.4}
""",
    "sce_all": """
merge_method: sce
base_model: base
models: [{model: a}, {model: b}]
parameters: {int8_mask: true}
""",
    "arcee_fusion": """
merge_method: arcee_fusion
base_model: base
models: [{model: c}]
""",
    "ram": """
merge_method: ram
base_model: base
models: [{model: a}, {model: b}, {model: c}]
parameters: {epsilon: 0.003}
""",
    "ramplus_tl": """
merge_method: ramplus_tl
base_model: base
models: [{model: a}, {model: b}, {model: c}]
parameters: {epsilon: 0.01, r: 0.5, alpha: 0.6}
""",
    "breadcrumbs": """
merge_method: breadcrumbs
base_model: base
models:
  - {model: a, parameters: {weight: 0.8, density: 0.7, gamma: 0.1}}
  - {model: b, parameters: {weight: [0.3, 1], density: 0.95, gamma: 0.2}}
  - {model: c, parameters: {weight: 0.1, density: 0.3}}
parameters: {lambda: 0.9}
""",
    "breadcrumbs_ties": """
merge_method: breadcrumbs_ties
base_model: base
models: [{model: a}, {model: b}, {model: c}]
parameters: {weight: 0.5, density: 0.6, gamma: 0.05, rescale: true, normalize: true}
""",
    "dare_all": """
merge_method: dare_ties
base_model: base
models: [{model: a}, {model: b}]
parameters: {weight: 0.5, density: 1}
""",
    "della_all": """
merge_method: della
base_model: base
models: [{model: a}, {model: b, parameters: {density: 0}}, {model: c}]
parameters: {weight: 0.5, density: 1}
""",
    "karcher_stopped": """
merge_method: karcher
models: [{model: a}, {model: b}, {model: c}]
""",
}

DARE = """
merge_method: METHOD
base_model: base
models: MODELS
parameters: {density: DENSITY, weight: 1EXTRA}
"""
# How far mergekit's f32 arithmetic may be off where its result depends on differences of sums: its divergences of rows in
# arcee_fusion, relative to the threshold of importance.
FUSION_DOUBT = 0.03


def shapes(hidden: int, inner: int, vocabulary: int, layers: int) -> dict[str, tuple[int, ...]]:
    result = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        for name in ("q", "k", "v", "o"):
            result[f"{layer}self_attn.{name}_proj.weight"] = (hidden, hidden)
        for name in ("gate", "up"):
            result[f"{layer}mlp.{name}_proj.weight"] = (inner, hidden)
        result[f"{layer}mlp.down_proj.weight"] = (hidden, inner)
        for name in ("input", "post_attention"):
            result[f"{layer}{name}_layernorm.weight"] = (hidden,)
    return result | {"model.norm.weight": (hidden,)}


def config(hidden: int, inner: int, vocabulary: int, layers: int, dtype: torch.dtype) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inner, "vocab_size": vocabulary, "num_hidden_layers": layers, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 2, "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def save(folder: Path, tensors: dict[str, torch.Tensor], settings: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")


def make_models(folder: Path, dtype: torch.dtype, sizes: tuple[int, int, int, int], seed: int = 0) -> None:
    """base, a, b, c and d = 1.02 a under `folder`, the same for every run."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda shape: torch.randn(shape, generator=generator)
    base = {name: 0.05 * normal(s) + (len(s) == 1) for name, s in shapes(*sizes).items()}
    tensors = {"base": base}
    for model, size in DELTAS.items():
        tensors[model] = {name: t + size * normal(t.shape) for name, t in base.items()}
    tensors["d"] = {name: 1.02 * t for name, t in tensors["a"].items()}
    for model, values in tensors.items():
        save(folder / model, {name: t.to(dtype) for name, t in values.items()}, config(*sizes, dtype))


def recipe(name: str, layers: int, dtypes: str = "dtype: float32\nout_dtype: bfloat16\n") -> str:
    return RECIPES[name].lstrip().replace("LAYERS", str(layers)) + dtypes


def run_mergekit(text: str, out: Path) -> None:
    """Merges in the current folder."""
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    logging.disable(logging.WARNING)
    LoaderCache().loaders.clear()
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, random_seed=0)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), options=options, config_source=text)


def load(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
