//! The LLaMA family (`LlamaForCausalLM`): RmsNorm, Attention, Mlp, Block, CausalLM.
//!
//! Suffixes: b batch, s sequence (queries), t keys, h query heads, k key-value heads, d head width, e embedding, v vocabulary.

use std::path::Path;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::config::ModelConfig;
use super::rope::{Rope, rotate};
use crate::weights::{Parameters, check_all_taken, take};

/// Takes named tensors, with the path for messages and the list of what was taken.
struct Loader<'a> {
    parameters: &'a Parameters,
    path: &'a Path,
    taken: Vec<String>,
}

impl Loader<'_> {
    fn get(&mut self, name: &str, shape: &[i64]) -> Result<Tensor> {
        self.taken.push(name.to_owned());
        take(self.parameters, self.path, name, shape)
    }

    fn linear(&mut self, name: &str, shape: [i64; 2], bias: bool) -> Result<Linear> {
        let weight = self.get(&format!("{name}.weight"), &shape)?;
        let bias = if bias { Some(self.get(&format!("{name}.bias"), &shape[..1])?) } else { None };
        Ok(Linear { weight, bias })
    }
}

/// y = x·Wᵀ + b, computed in the dtype of x: master weights are cast on the way.
struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    fn forward(&self, x: &Tensor) -> Tensor {
        let kind = x.kind();
        x.linear(&self.weight.to_kind(kind), self.bias.as_ref().map(|b| b.to_kind(kind)))
    }
}

/// x / rms(x) · weight, normalised in f32 as transformers does.
struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    fn forward(&self, x_bse: &Tensor) -> Tensor {
        let kind = x_bse.kind();
        let wide = x_bse.to_kind(Kind::Float);
        let mean_square = wide.square().mean_dim([-1i64].as_slice(), true, Kind::Float);
        let normed = wide * (mean_square + self.eps).rsqrt();
        self.weight.to_kind(kind) * normed.to_kind(kind)
    }
}

/// What every block needs to attend: rotary factors and who may see whom.
pub struct Attended {
    cos: Tensor,
    sin: Tensor,
    pattern: Pattern,
}

/// Who may see whom.
enum Pattern {
    /// Documents one after another in a single row, each causal in itself and closed to the others; their lengths.
    Documents(Vec<i64>),
    /// Boolean, [b, 1, s, t]: whether a query sees a key.
    Mask(Tensor),
}

/// Keys and values of the tokens seen so far, [b, k, t, d] for each block.
#[derive(Default)]
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
}

struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
}

impl Attention {
    fn load(loader: &mut Loader<'_>, prefix: &str, c: &ModelConfig) -> Result<Self> {
        let (q, kv, e) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim, c.hidden_size);
        Ok(Self {
            q_proj: loader.linear(&format!("{prefix}.q_proj"), [q, e], c.attention_bias)?,
            k_proj: loader.linear(&format!("{prefix}.k_proj"), [kv, e], c.attention_bias)?,
            v_proj: loader.linear(&format!("{prefix}.v_proj"), [kv, e], c.attention_bias)?,
            o_proj: loader.linear(&format!("{prefix}.o_proj"), [e, q], c.attention_bias)?,
            heads: c.num_attention_heads,
            kv_heads: c.num_key_value_heads,
            head_dim: c.head_dim,
        })
    }

    fn forward(&self, x_bse: &Tensor, attended: &Attended, cache: Option<(&mut KvCache, usize)>) -> Tensor {
        let (b, s, _) = x_bse.size3().expect("hidden states are [b, s, e]");
        let split = |t: Tensor, heads: i64| t.view([b, s, heads, self.head_dim]).transpose(1, 2);
        let (cos, sin) = (attended.cos.to_kind(x_bse.kind()), attended.sin.to_kind(x_bse.kind()));
        let q_bhsd = rotate(&split(self.q_proj.forward(x_bse), self.heads), &cos, &sin);
        let mut k_bktd = rotate(&split(self.k_proj.forward(x_bse), self.kv_heads), &cos, &sin);
        let mut v_bktd = split(self.v_proj.forward(x_bse), self.kv_heads);
        if let Some((cache, layer)) = cache {
            (k_bktd, v_bktd) = cache.extend(layer, k_bktd, v_bktd);
        }
        let out_bhsd = match &attended.pattern {
            Pattern::Mask(mask) => attend(&q_bhsd, &k_bktd, &v_bktd, Some(mask)),
            Pattern::Documents(lengths) => by_document(&q_bhsd, &k_bktd, &v_bktd, lengths),
        };
        self.o_proj.forward(&out_bhsd.transpose(1, 2).reshape([b, s, self.heads * self.head_dim]))
    }
}

/// Attention under a mask, or plain causal.
fn attend(q_bhsd: &Tensor, k_bktd: &Tensor, v_bktd: &Tensor, mask: Option<&Tensor>) -> Tensor {
    let gqa = q_bhsd.size()[1] != k_bktd.size()[1];
    Tensor::scaled_dot_product_attention(q_bhsd, k_bktd, v_bktd, mask, 0.0, mask.is_none(), None::<f64>, gqa)
}

/// Causal attention inside each document of a row; no cost for the pairs between documents.
fn by_document(q: &Tensor, k: &Tensor, v: &Tensor, lengths: &[i64]) -> Tensor {
    if let [_] = lengths {
        return attend(q, k, v, None);
    }
    let mut start = 0;
    let parts: Vec<Tensor> = lengths
        .iter()
        .map(|&length| {
            let cut = |t: &Tensor| t.narrow(2, start, length);
            let part = attend(&cut(q), &cut(k), &cut(v), None);
            start += length;
            part
        })
        .collect();
    Tensor::cat(&parts, 2)
}

impl KvCache {
    /// Appends a block's new keys and values and returns all of them.
    fn extend(&mut self, layer: usize, k: Tensor, v: Tensor) -> (Tensor, Tensor) {
        if layer == self.layers.len() {
            self.layers.push((k, v));
        } else {
            let (old_k, old_v) = &self.layers[layer];
            self.layers[layer] = (Tensor::cat(&[old_k, &k], 2), Tensor::cat(&[old_v, &v], 2));
        }
        let (k, v) = &self.layers[layer];
        (k.shallow_clone(), v.shallow_clone())
    }

    /// Keeps only the batch rows `rows` (int64), in that order.
    pub fn keep_rows(&mut self, rows: &Tensor) {
        for (k, v) in &mut self.layers {
            *k = k.index_select(0, rows);
            *v = v.index_select(0, rows);
        }
    }
}

struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl Mlp {
    fn load(loader: &mut Loader<'_>, prefix: &str, c: &ModelConfig) -> Result<Self> {
        let (e, f) = (c.hidden_size, c.intermediate_size);
        Ok(Self {
            gate_proj: loader.linear(&format!("{prefix}.gate_proj"), [f, e], c.mlp_bias)?,
            up_proj: loader.linear(&format!("{prefix}.up_proj"), [f, e], c.mlp_bias)?,
            down_proj: loader.linear(&format!("{prefix}.down_proj"), [e, f], c.mlp_bias)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        self.down_proj.forward(&(self.gate_proj.forward(x).silu() * self.up_proj.forward(x)))
    }
}

/// One decoder block; the trainer calls them one at a time.
pub struct Block {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
    layer: usize,
}

impl Block {
    fn load(loader: &mut Loader<'_>, layer: usize, c: &ModelConfig) -> Result<Self> {
        let prefix = format!("model.layers.{layer}");
        let mut norm = |name: &str| -> Result<RmsNorm> {
            let weight = loader.get(&format!("{prefix}.{name}.weight"), &[c.hidden_size])?;
            Ok(RmsNorm { weight, eps: c.rms_norm_eps })
        };
        let (input_layernorm, post_attention_layernorm) = (norm("input_layernorm")?, norm("post_attention_layernorm")?);
        Ok(Self {
            input_layernorm,
            self_attn: Attention::load(loader, &format!("{prefix}.self_attn"), c)?,
            post_attention_layernorm,
            mlp: Mlp::load(loader, &format!("{prefix}.mlp"), c)?,
            layer,
        })
    }

    /// Hidden states [b, s, e] to hidden states [b, s, e]; with a cache, keys and values are appended to it.
    pub fn forward(&self, x_bse: &Tensor, attended: &Attended, cache: Option<&mut KvCache>) -> Tensor {
        let cache = cache.map(|c| (c, self.layer));
        let x_bse = x_bse + self.self_attn.forward(&self.input_layernorm.forward(x_bse), attended, cache);
        &x_bse + self.mlp.forward(&self.post_attention_layernorm.forward(&x_bse))
    }
}

/// A LLaMA with its parameters; the tensors share storage with the [`Parameters`] it was made from.
pub struct CausalLM {
    /// Its numbers.
    pub config: ModelConfig,
    /// The decoder blocks in order.
    pub blocks: Vec<Block>,
    embed_tokens: Tensor,
    norm: RmsNorm,
    lm_head: Tensor,
    rope: Rope,
    compute: Kind,
}

impl CausalLM {
    /// Builds the model over `parameters`; blocks compute in `compute`. `path` is the checkpoint's, for messages.
    ///
    /// # Errors
    /// [`cpift_core::BadInput`] for a tensor that is missing, of another shape, or not part of the model.
    pub fn new(config: ModelConfig, parameters: &Parameters, path: &Path, compute: Kind) -> Result<Self> {
        let mut loader = Loader { parameters, path, taken: Vec::new() };
        let table = [config.vocab_size, config.hidden_size];
        let embed_tokens = loader.get("model.embed_tokens.weight", &table)?;
        let lm_head = if config.tie_word_embeddings {
            embed_tokens.shallow_clone()
        } else {
            loader.get("lm_head.weight", &table)?
        };
        let norm =
            RmsNorm { weight: loader.get("model.norm.weight", &[config.hidden_size])?, eps: config.rms_norm_eps };
        let blocks: Result<Vec<_>> =
            (0..config.num_hidden_layers as usize).map(|i| Block::load(&mut loader, i, &config)).collect();
        let blocks = blocks?;
        check_all_taken(parameters, path, &loader.taken)?;
        let rope = Rope { head_dim: config.head_dim, theta: config.rope_theta, scaling: config.rope_scaling.clone() };
        Ok(Self { config, blocks, embed_tokens, norm, lm_head, rope, compute })
    }

    /// The device of the parameters.
    pub fn device(&self) -> Device {
        self.embed_tokens.device()
    }

    /// Token ids [b, s] to hidden states [b, s, e].
    pub fn embed(&self, ids_bs: &Tensor) -> Tensor {
        Tensor::embedding(&self.embed_tokens, ids_bs, -1, false, false).to_kind(self.compute)
    }

    /// Documents one after another in a single row, [1, Σ lengths]: causal inside each, positions from 0 in each.
    pub fn documents(&self, lengths: &[i64]) -> Attended {
        let options = (Kind::Int64, self.device());
        let positions: Vec<Tensor> = lengths.iter().map(|&n| Tensor::arange(n, options)).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let (cos, sin) = self.rope.cos_sin(&Tensor::cat(&positions, 0).unsqueeze(0), longest);
        Attended { cos, sin, pattern: Pattern::Documents(lengths.to_vec()) }
    }

    /// Attention with explicit positions [b, s] and boolean mask [b, 1, s, t].
    pub fn masked(&self, positions_bs: &Tensor, mask: Tensor) -> Attended {
        let length = mask.size()[3];
        let (cos, sin) = self.rope.cos_sin(positions_bs, length);
        Attended { cos, sin, pattern: Pattern::Mask(mask) }
    }

    /// Hidden states [.., e] to f32 logits [.., v].
    pub fn logits(&self, x: &Tensor) -> Tensor {
        let normed = self.norm.forward(x);
        normed.linear(&self.lm_head.to_kind(normed.kind()), None::<&Tensor>).to_kind(Kind::Float)
    }

    /// Token ids [b, s] through all blocks to hidden states [b, s, e].
    pub fn hidden(&self, ids_bs: &Tensor, attended: &Attended, mut cache: Option<&mut KvCache>) -> Tensor {
        let mut x_bse = self.embed(ids_bs);
        for block in &self.blocks {
            x_bse = block.forward(&x_bse, attended, cache.as_deref_mut());
        }
        x_bse
    }
}
