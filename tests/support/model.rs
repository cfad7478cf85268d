//! A generated tiny LLaMA with a byte-level tokenizer and a chat template, and tasks to train it
//! on.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::{Numbers, Tensor, Tensors, write_safetensors};

const HIDDEN: usize = 16;
const LAYERS: usize = 2;
const SPECIAL: [&str; 3] = ["<|im_start|>", "<|im_end|>", "<|pad|>"];

/// ChatML chat template, as in many models.
pub const TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + \
                            message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ \
                            '<|im_start|>assistant\n' }}{% endif %}";

/// Weights of the tiny model, drawn from `seed`.
pub fn tiny_weights(seed: u64) -> Tensors {
    let mut numbers = Numbers(seed);
    let mut tensors = Tensors::new();
    let vocab = 256 + SPECIAL.len();
    let mut add = |name: String, shape: &[usize]| {
        let n = shape.iter().product();
        let values = if shape.len() == 1 { vec![1.0; n] } else { numbers.units(n).iter().map(|v| 0.2 * v).collect() };
        tensors.insert(name, Tensor::f32(shape, &values));
    };
    add("model.embed_tokens.weight".into(), &[vocab, HIDDEN]);
    add("model.norm.weight".into(), &[HIDDEN]);
    for layer in 0..LAYERS {
        let shapes: [(&str, &[usize]); 9] = [
            ("input_layernorm", &[HIDDEN]),
            ("post_attention_layernorm", &[HIDDEN]),
            ("self_attn.q_proj", &[HIDDEN, HIDDEN]),
            ("self_attn.k_proj", &[HIDDEN / 2, HIDDEN]),
            ("self_attn.v_proj", &[HIDDEN / 2, HIDDEN]),
            ("self_attn.o_proj", &[HIDDEN, HIDDEN]),
            ("mlp.gate_proj", &[2 * HIDDEN, HIDDEN]),
            ("mlp.up_proj", &[2 * HIDDEN, HIDDEN]),
            ("mlp.down_proj", &[HIDDEN, 2 * HIDDEN]),
        ];
        for (name, shape) in shapes {
            add(format!("model.layers.{layer}.{name}.weight"), shape);
        }
    }
    tensors
}

/// Writes the tiny model as a Hugging Face directory: tied embeddings, GQA, 259 tokens, 128
/// positions.
///
/// # Panics
/// On I/O errors.
pub fn write_tiny_model(folder: &Path, seed: u64) -> PathBuf {
    fs::create_dir_all(folder).unwrap();
    write_safetensors(&folder.join("model.safetensors"), &tiny_weights(seed));
    let config = json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 256 + SPECIAL.len(), "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "hidden_act": "silu",
        "torch_dtype": "float32"});
    write_json(&folder.join("config.json"), &config);
    write_json(&folder.join("tokenizer.json"), &tokenizer());
    let tokens = json!({"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "chat_template": TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast"});
    write_json(&folder.join("tokenizer_config.json"), &tokens);
    folder.to_owned()
}

/// Weights of the tiny model with four experts in its second block in place of the MLP, two of
/// which compute a token.
pub fn tiny_expert_weights(seed: u64) -> Tensors {
    let mut tensors = tiny_weights(seed);
    tensors.retain(|name, _| !name.starts_with("model.layers.1.mlp."));
    let mut numbers = Numbers(seed + 1);
    let mut add = |name: &str, rows: usize, columns: usize| {
        let values: Vec<f32> = numbers.units(rows * columns).iter().map(|v| 0.3 * v).collect();
        tensors.insert(format!("model.layers.1.{name}.weight"), Tensor::f32(&[rows, columns], &values));
    };
    add("mlp.gate", 4, HIDDEN);
    for x in 0..4 {
        add(&format!("mlp.experts.{x}.gate_proj"), HIDDEN / 2, HIDDEN);
        add(&format!("mlp.experts.{x}.up_proj"), HIDDEN / 2, HIDDEN);
        add(&format!("mlp.experts.{x}.down_proj"), HIDDEN, HIDDEN / 2);
    }
    for layer in 0..LAYERS {
        for name in ["q_norm", "k_norm"] {
            tensors.insert(format!("model.layers.{layer}.self_attn.{name}.weight"), Tensor::f32(&[4], &[1.0; 4]));
        }
    }
    tensors
}

/// Fields of config.json by which the tiny model is the one of [`tiny_expert_weights`].
pub fn tiny_expert_fields() -> Value {
    json!({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN / 2, "norm_topk_prob": true, "mlp_only_layers": [0]})
}

/// Writes `value` to `path`.
///
/// # Panics
/// On I/O errors.
pub fn write_json(path: &Path, value: &Value) {
    fs::write(path, value.to_string()).unwrap();
}

/// Byte-level BPE without merges: one token per byte, in GPT-2's printable alphabet.
fn tokenizer() -> Value {
    let mut vocab = Map::new();
    let mut next = 256;
    for byte in 0..=255u32 {
        let printable = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let code = if printable {
            byte
        } else {
            next += 1;
            next - 1
        };
        vocab.insert(char::from_u32(code).unwrap().to_string(), byte.into());
    }
    let mut added = Vec::new();
    for (i, token) in SPECIAL.iter().enumerate() {
        vocab.insert((*token).into(), (256 + i).into());
        added.push(json!({"id": 256 + i, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}));
    }
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}})
}

/// Row of a data file.
pub fn row(question: &str, answer: &str) -> Value {
    json!({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "answer": answer})
}

/// Writes rows as JSONL.
///
/// # Panics
/// On I/O errors.
pub fn write_rows(path: &Path, rows: &[Value]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    fs::write(path, lines).unwrap();
}

/// Writes tasks.toml and data for the tasks `copy`, `count` and `pick` (multiple choice) into
/// `folder`. Returns the path of tasks.toml.
///
/// # Panics
/// On I/O errors.
pub fn write_tasks(folder: &Path) -> PathBuf {
    let mut toml = String::new();
    for (name, metric) in [("copy", "exact-match"), ("count", "gsm8k"), ("pick", "choice")] {
        for (file, first, rows) in [("train", 0, 12), ("eval", 100, 4)] {
            let rows: Vec<Value> = (first..first + rows).map(|i| task_row(name, i)).collect();
            write_rows(&folder.join(name).join(format!("{file}.jsonl")), &rows);
        }
        toml.push_str(&format!(
            "[[task]]\nname = \"{name}\"\ntrain = \"{name}/train.jsonl\"\neval = \"{name}/eval.jsonl\"\n\
             metric = \"{metric}\"\nmax_length = 96\nmax_new_tokens = 4\n"
        ));
    }
    let path = folder.join("tasks.toml");
    fs::write(&path, toml).unwrap();
    path
}

fn task_row(task: &str, i: usize) -> Value {
    match task {
        "copy" => row(&format!("say w{i}"), &format!("w{i}")),
        "count" => row(&format!("{i} + 1 ="), &format!("#### {}", i + 1)),
        _ => {
            let mut row = row(&format!("pick {}", i % 2), ["A", "B"][i % 2]);
            row["choices"] = json!(["zero", "one"]);
            row["answer"] = json!(i % 2);
            row
        }
    }
}
