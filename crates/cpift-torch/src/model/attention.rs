//! Attention: masks, the scores of each family, and the key-value cache of a batch whose rows come
//! and go.
//!
//! In the cache all rows write into the same column, one column per token, so the tokens of each
//! row end at the newest column. Attention masks what a row has not written; keys carry their
//! positions, so a column may move.
//!
//! Shape suffixes: b batch, s sequence (queries), t keys, h query heads, k key-value heads, d head
//! width, e embedding.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::config::ModelConfig;
use super::families::QkNorm;
use super::layers::{Linear, Loader, RmsNorm, distinct_ropes, rotate};
use crate::ffi;

/// Inputs of attention that all blocks share: rotary factors in the dtype of the blocks, and the
/// attention pattern.
pub struct Attended {
    /// cos and sin for each of the model's rotary settings.
    pub(super) rotary: Vec<(Tensor, Tensor)>,
    pub(super) pattern: Pattern,
}

/// The attention pattern.
pub(super) enum Pattern {
    /// Documents concatenated in a single row: causal attention within each, none between them.
    Documents(Documents),
    /// A mask [b, 1, s, t], and one restricted to the sliding window for the blocks that have one.
    /// Additive (0 or −∞) for fused kernels, boolean if scores are soft-capped.
    Mask { full: Tensor, windowed: Option<Tensor> },
}

/// The documents of a row.
pub(super) struct Documents {
    /// Number of tokens of each document.
    lengths: Vec<i64>,
    /// Sliding-window mask [len, len] of each document longer than the window.
    windowed: Vec<Option<Tensor>>,
    /// Cumulative lengths from 0, int32, if the device has variable-length flash attention.
    ends: Option<Tensor>,
}

impl Documents {
    pub(super) fn new(lengths: &[i64], window: Option<i64>, ends: Option<Tensor>, device: Device) -> Self {
        let mask = |&n: &i64| window.filter(|w| n > *w).map(|w| causal_window(n, n, w, device));
        Self { lengths: lengths.to_vec(), windowed: lengths.iter().map(mask).collect(), ends }
    }
}

/// Boolean [s, t]: each of the last `s` of `t` tokens attends to itself and the `window` − 1 tokens
/// before.
pub(super) fn causal_window(s: i64, t: i64, window: i64, device: Device) -> Tensor {
    let all = Tensor::ones([s, t], (Kind::Bool, device));
    all.tril(t - s).logical_and(&all.triu(t - s - window + 1))
}

/// Multi-head attention with grouped keys and values.
pub(super) struct Attention {
    inputs: Inputs,
    o_proj: Linear,
    /// Norms of q and k.
    norms: Option<(QkNorm, RmsNorm, RmsNorm)>,
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
    layer: usize,
    /// Index into the model's rotary settings; none without rotary embeddings.
    rope: Option<usize>,
    scores: Scores,
}

enum Inputs {
    Apart {
        q_proj: Linear,
        k_proj: Linear,
        v_proj: Linear,
    },
    /// Rows of q above those of k and v.
    Fused {
        qkv_proj: Linear,
    },
}

/// Scaling, soft cap and window of the scores q·k.
#[derive(Clone, Copy)]
struct Scores {
    scale: f64,
    softcap: Option<f64>,
    window: Option<i64>,
}

impl Attention {
    pub(super) fn load(loader: &mut Loader<'_>, prefix: &str, layer: usize, c: &ModelConfig) -> Result<Self> {
        let (q, kv, e) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim, c.hidden_size);
        let mut linear = |name: &str, shape, bias| loader.linear(&format!("{prefix}.{name}"), shape, bias);
        let inputs = if c.fused {
            Inputs::Fused { qkv_proj: linear("qkv_proj", [q + 2 * kv, e], c.qkv_bias)? }
        } else {
            Inputs::Apart {
                q_proj: linear("q_proj", [q, e], c.qkv_bias)?,
                k_proj: linear("k_proj", [kv, e], c.qkv_bias)?,
                v_proj: linear("v_proj", [kv, e], c.qkv_bias)?,
            }
        };
        let o_proj = linear("o_proj", [e, q], c.o_bias)?;
        let mut norm = |name: &str, width| loader.norm(&format!("{prefix}.{name}"), width, c);
        let norms = match c.qk_norm.zip(c.qk_norm_widths()) {
            Some((kind, [q, k])) => Some((kind, norm("q_norm", q)?, norm("k_norm", k)?)),
            None => None,
        };
        Ok(Self {
            inputs,
            o_proj,
            norms,
            heads: c.num_attention_heads,
            kv_heads: c.num_key_value_heads,
            head_dim: c.head_dim,
            layer,
            rope: c
                .ropes
                .get(layer)
                .and_then(Option::as_ref)
                .and_then(|own| distinct_ropes(&c.ropes).iter().position(|p| *p == own)),
            scores: Scores {
                scale: c.attention_scale,
                softcap: c.attention_softcap,
                window: c.windows.get(layer).copied().flatten(),
            },
        })
    }

    /// Queries, keys and values, all heads in one dimension.
    fn inputs(&self, x_bse: &Tensor) -> (Tensor, Tensor, Tensor) {
        match &self.inputs {
            Inputs::Apart { q_proj, k_proj, v_proj } => {
                (q_proj.forward(x_bse), k_proj.forward(x_bse), v_proj.forward(x_bse))
            }
            Inputs::Fused { qkv_proj } => {
                let all = qkv_proj.forward(x_bse);
                let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
                (all.narrow(2, 0, q), all.narrow(2, q, kv), all.narrow(2, q + kv, kv))
            }
        }
    }

    pub(super) fn forward(&self, x_bse: &Tensor, attended: &Attended, cache: Option<&KvCache>) -> Tensor {
        let (b, s, _) = x_bse.size3().expect("hidden states are [b, s, e]");
        let split = |t: Tensor, heads: i64| t.unflatten(-1, [heads, self.head_dim]);
        let (mut q, mut k, v) = self.inputs(x_bse);
        if let Some((QkNorm::Projection, q_norm, k_norm)) = &self.norms {
            (q, k) = (q_norm.forward(&q), k_norm.forward(&k));
        }
        let (mut q_bshd, mut k_bskd) = (split(q, self.heads), split(k, self.kv_heads));
        if let Some((QkNorm::Head, q_norm, k_norm)) = &self.norms {
            (q_bshd, k_bskd) = (q_norm.forward(&q_bshd), k_norm.forward(&k_bskd));
        }
        let (mut q_bhsd, mut k_bktd) = (q_bshd.transpose(1, 2), k_bskd.transpose(1, 2));
        if let Some((cos, sin)) = self.rope.map(|rope| &attended.rotary[rope]) {
            (q_bhsd, k_bktd) = (rotate(&q_bhsd, cos, sin), rotate(&k_bktd, cos, sin));
        }
        let mut v_bktd = split(v, self.kv_heads).transpose(1, 2);
        if let Some(cache) = cache {
            (k_bktd, v_bktd) = cache.extend(self.layer, &k_bktd, &v_bktd);
        }
        let out_bhsd = match &attended.pattern {
            Pattern::Mask { full, windowed } => {
                let mask = windowed.as_ref().filter(|_| self.scores.window.is_some()).unwrap_or(full);
                self.scores.attend(&q_bhsd, &k_bktd, &v_bktd, Some(mask))
            }
            Pattern::Documents(documents) => self.scores.by_document(&q_bhsd, &k_bktd, &v_bktd, documents),
        };
        self.o_proj.forward(&out_bhsd.transpose(1, 2).reshape([b, s, self.heads * self.head_dim]))
    }
}

impl Scores {
    /// Attention with a mask, or causal without one.
    fn attend(&self, q_bhsd: &Tensor, k_bktd: &Tensor, v_bktd: &Tensor, mask: Option<&Tensor>) -> Tensor {
        if let Some(cap) = self.softcap {
            return capped(q_bhsd, k_bktd, v_bktd, mask, self.scale, cap);
        }
        let (b, h, s, d) = q_bhsd.size4().expect("queries are [b, h, s, d]");
        let k = k_bktd.size()[1];
        if let Some(mask) = mask.filter(|_| s == 1 && h != k) {
            // With one query, the heads that share a key head take the place of queries: no key is
            // repeated.
            let grouped = q_bhsd.reshape([b, k, h / k, d]);
            let mask = mask.expand([b, 1, h / k, mask.size()[3]], true);
            let out = Tensor::scaled_dot_product_attention(
                &grouped,
                k_bktd,
                v_bktd,
                Some(mask),
                0.0,
                false,
                self.scale,
                false,
            );
            return out.reshape([b, h, 1, d]);
        }
        let gqa = h != k;
        Tensor::scaled_dot_product_attention(q_bhsd, k_bktd, v_bktd, mask, 0.0, mask.is_none(), self.scale, gqa)
    }

    /// Causal attention within each document of a row; pairs between documents are never computed.
    fn by_document(&self, q: &Tensor, k: &Tensor, v: &Tensor, documents: &Documents) -> Tensor {
        if let Some(ends) = documents.ends.as_ref().filter(|_| self.softcap.is_none()) {
            let longest = documents.lengths.iter().copied().max().unwrap_or(0);
            let flat = |t: &Tensor| t.transpose(1, 2).squeeze_dim(0);
            let out = ffi::flash_varlen((&flat(q), &flat(k), &flat(v)), ends, longest, self.scale, self.window)
                .expect("the kernel ran when the model was opened");
            return out.unsqueeze(0).transpose(1, 2);
        }
        let mask = |i: usize| documents.windowed[i].as_ref().filter(|_| self.window.is_some());
        if let [_] = documents.lengths[..] {
            return self.attend(q, k, v, mask(0));
        }
        let mut start = 0;
        let part = |(i, &length): (usize, &i64)| {
            let cut = |t: &Tensor| t.narrow(2, start, length);
            let part = self.attend(&cut(q), &cut(k), &cut(v), mask(i));
            start += length;
            part
        };
        let parts: Vec<Tensor> = documents.lengths.iter().enumerate().map(part).collect();
        Tensor::cat(&parts, 2)
    }
}

/// Attention with soft-capped scores (Gemma-2). No fused kernel implements the cap, so the scores
/// of a document, [b, h, s, t], are materialised. Softmax in f32, as in transformers' eager
/// attention.
fn capped(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, scale: f64, cap: f64) -> Tensor {
    let groups = q.size()[1] / k.size()[1];
    let (k, v) = (k.repeat_interleave_self_int(groups, 1, None), v.repeat_interleave_self_int(groups, 1, None));
    let scores = ((q.matmul(&k.transpose(2, 3)) * scale) / cap).tanh() * cap;
    let (s, t) = (q.size()[2], k.size()[2]);
    let causal = || Tensor::ones([s, t], (Kind::Bool, q.device())).tril(t - s);
    let hidden = mask.map_or_else(causal, Tensor::shallow_clone).logical_not();
    let weights = scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, Kind::Float).to_kind(q.kind());
    weights.matmul(&v)
}

/// Columns by which a full key-value cache grows.
const GROWTH: i64 = 64;

/// Key-value cache: [b, k, capacity, d] for each block. Columns from `first` to `end` are those of
/// the longest row. A shorter row has finite values in columns that it has not written: masked
/// scores would be NaN otherwise.
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
    first: i64,
    end: i64,
}

impl KvCache {
    /// An empty cache for `b` rows of up to `capacity` tokens.
    pub(super) fn new(c: &ModelConfig, b: i64, capacity: i64, options: (Kind, Device)) -> Self {
        let shape = [b, c.num_key_value_heads, capacity, c.head_dim];
        let layer = |_| (Tensor::empty(shape, options), Tensor::empty(shape, options));
        Self { layers: (0..c.num_hidden_layers).map(layer).collect(), first: 0, end: 0 }
    }

    /// Number of tokens of the longest row.
    pub fn length(&self) -> i64 {
        self.end - self.first
    }

    /// Number of tokens for which there is memory.
    pub fn capacity(&self) -> i64 {
        self.layers.first().map_or(0, |(k, _)| k.size()[2])
    }

    /// Drops all tokens but the first `length`.
    pub fn truncate(&mut self, length: i64) {
        self.end = self.end.min(self.first + length);
    }

    /// Drops columns before the last `length`: no row is longer.
    pub fn keep_newest(&mut self, length: i64) {
        self.first = self.first.max(self.end - length);
    }

    /// Makes room for one more token. A full cache moves its columns to the left, over those that
    /// no row uses any more, block by block.
    pub fn reserve(&mut self) {
        if self.end < self.capacity() {
            return;
        }
        let length = self.length();
        for tensor in self.layers.iter_mut().flat_map(|(k, v)| [k, v]) {
            let (b, k, _, d) = tensor.size4().expect("a cache has four dimensions");
            let moved = Tensor::empty([b, k, length + GROWTH, d], (tensor.kind(), tensor.device()));
            moved.narrow(2, 0, length).copy_(&tensor.narrow(2, self.first, length));
            *tensor = moved;
        }
        (self.first, self.end) = (0, length);
    }

    /// Appends a block's new keys and values and returns all of them.
    pub(super) fn extend(&self, layer: usize, k: &Tensor, v: &Tensor) -> (Tensor, Tensor) {
        let s = k.size()[2];
        let write = |all: &Tensor, new: &Tensor| {
            all.narrow(2, self.end, s).copy_(new);
            all.narrow(2, self.first, self.length() + s)
        };
        let (all_k, all_v) = &self.layers[layer];
        (write(all_k, k), write(all_v, v))
    }

    /// Advances by `s` tokens, which every block has written.
    pub(super) fn advance(&mut self, s: i64) {
        self.end += s;
    }

    /// Keeps only the batch rows `rows` (int64), in that order.
    pub fn keep_rows(&mut self, rows: &Tensor) {
        for tensor in self.layers.iter_mut().flat_map(|(k, v)| [k, v]) {
            *tensor = tensor.index_select(0, rows);
        }
    }

    /// Replaces the batch rows `rows` (int64) by those of `new`.
    ///
    /// # Panics
    /// If a new row is longer than the rows have been since the cache last moved.
    pub fn replace_rows(&mut self, rows: &Tensor, new: &Self) {
        let length = new.length();
        assert!(length <= self.end, "{length} new columns, {} before the newest", self.end);
        let replace = |all: &Tensor, new_rows: &Tensor| {
            // An old value that is not finite would spread from under the mask.
            let _ = all.narrow(2, 0, self.end).index_fill_(0, rows, 0.0);
            let newest = new_rows.narrow(2, new.first, length);
            let _ = all.narrow(2, self.end - length, length).index_copy_(0, rows, &newest);
        };
        for ((k, v), (new_k, new_v)) in self.layers.iter().zip(&new.layers) {
            replace(k, new_k);
            replace(v, new_v);
        }
        self.first = self.first.min(self.end - length);
    }
}
