//! The root of the model: Block and CausalLM, and rows of unequal length that run through it
//! together, over one key-value cache.
//!
//! Shape suffixes: b batch, s sequence (queries), t keys, e embedding, v vocabulary.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::rc::Rc;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::attention::{Attended, Attention, Documents, KvCache, Pattern, causal_window};
use super::config::{ModelConfig, rotated, text_base};
use super::experts::{Experts, Routed};
use super::layers::{AdapterSlot, Loader, LowRank, Mlp, RmsNorm, Rope, check_all_taken, distinct_ropes};
use crate::dist::Group;
use crate::ffi;
use crate::home::{Home, Lent, UnitHome};
use crate::placement::to_device;
use crate::weights::Parameters;

/// A decoder block; the trainer calls the blocks one at a time.
pub struct Block {
    /// Norms before attention, after it, before the MLP and after it.
    norms: [Option<RmsNorm>; 4],
    self_attn: Attention,
    mlp: MlpPart,
    residual_scale: Option<f64>,
}

enum MlpPart {
    Dense(Mlp),
    Sparse(Experts),
}

impl Block {
    fn load(loader: &mut Loader<'_>, prefix: &str, layer: usize, c: &ModelConfig) -> Result<Self> {
        let mut norms = [const { None }; 4];
        for (norm, name) in norms.iter_mut().zip(c.block_norms.names()) {
            *norm = name.map(|name| loader.norm(&format!("{prefix}.{name}"), c.hidden_size, c)).transpose()?;
        }
        Ok(Self {
            norms,
            self_attn: Attention::load(loader, &format!("{prefix}.self_attn"), layer, c)?,
            mlp: match c.experts_of(layer) {
                None => MlpPart::Dense(Mlp::load(loader, &format!("{prefix}.mlp"), c.intermediate_size, c)?),
                Some(experts) => MlpPart::Sparse(Experts::load(loader, &format!("{prefix}.mlp"), experts, c)?),
            },
            residual_scale: c.residual_scale,
        })
    }

    /// Maps hidden states [b, s, e] to hidden states [b, s, e]; a cache is extended by the new keys
    /// and values.
    pub fn forward(&self, x_bse: &Tensor, attended: &Attended, cache: Option<&KvCache>) -> Tensor {
        self.forward_routed(x_bse, attended, cache).0
    }

    /// As [`Block::forward`], and the routing if the block has experts.
    pub(crate) fn forward_routed(
        &self,
        x_bse: &Tensor,
        attended: &Attended,
        cache: Option<&KvCache>,
    ) -> (Tensor, Option<Routed>) {
        let [before_attention, after_attention, before_mlp, after_mlp] = &self.norms;
        let normed =
            |norm: &Option<RmsNorm>, x: &Tensor| norm.as_ref().map_or_else(|| x.shallow_clone(), |n| n.forward(x));
        let scaled = |x: Tensor| match self.residual_scale {
            None => x,
            Some(scale) => x * scale,
        };
        let mixed = self.self_attn.forward(&normed(before_attention, x_bse), attended, cache);
        let x_bse = x_bse + scaled(normed(after_attention, &mixed));
        let normed_bse = normed(before_mlp, &x_bse);
        let (mixed, routed) = match &self.mlp {
            MlpPart::Dense(mlp) => (mlp.forward(&normed_bse), None),
            MlpPart::Sparse(experts) => {
                let (mixed, routed) = experts.forward(&normed_bse);
                (mixed, Some(routed))
            }
        };
        (&x_bse + scaled(normed(after_mlp, &mixed)), routed)
    }
}

/// A decoder-only language model; its tensors share storage with the [`Parameters`] it was built
/// from.
pub struct CausalLM {
    /// Model configuration.
    pub config: ModelConfig,
    /// The decoder blocks in order.
    pub blocks: Vec<Block>,
    /// Parameter names of each unit: the embedding, each block, the head (final norm and, unless
    /// tied, output matrix).
    pub units: Vec<Vec<String>>,
    /// Home of the weights.
    pub home: Home,
    /// Ranks that share the batches of an evaluation.
    pub row_sharers: Option<Rc<Group>>,
    slots: BTreeMap<String, AdapterSlot>,
    embed_tokens: Tensor,
    norm: RmsNorm,
    lm_head: Tensor,
    /// Distinct rotary settings, in the order in which blocks first use them.
    ropes: Vec<Rope>,
    compute: Kind,
    /// True if the device has variable-length flash attention for this model.
    varlen: bool,
}

impl CausalLM {
    /// Builds the model over `parameters`; blocks compute in `compute`. `path` names the checkpoint
    /// in errors.
    ///
    /// # Errors
    /// [`cpift_core::BadInput`] for a tensor that is missing, has another shape, or is not part of
    /// the model.
    pub fn new(mut config: ModelConfig, parameters: &Parameters, path: &Path, compute: Kind) -> Result<Self> {
        if config.rounds_embedding_scale {
            config.embedding_scale = config.embedding_scale.map(|s| Tensor::from(s).to_kind(compute).double_value(&[]));
        }
        let mut loader = Loader { parameters, path, taken: Vec::new(), slots: BTreeMap::new(), adapters: true };
        let table = [config.vocab_size, config.hidden_size];
        let base = if config.nested { text_base(parameters.keys().map(String::as_str)) } else { "model." };
        let embed_tokens = loader.get(&format!("{base}embed_tokens.weight"), &table)?;
        let (mut units, mut blocks) = (vec![std::mem::take(&mut loader.taken)], Vec::new());
        for layer in 0..config.num_hidden_layers as usize {
            blocks.push(Block::load(&mut loader, &format!("{base}layers.{layer}"), layer, &config)?);
            units.push(std::mem::take(&mut loader.taken));
        }
        let norm = loader.norm(&format!("{base}norm"), config.hidden_size, &config)?;
        let lm_head = if config.tie_word_embeddings {
            embed_tokens.shallow_clone()
        } else {
            let head = if base == "language_model.model." { "language_model.lm_head.weight" } else { "lm_head.weight" };
            loader.get(head, &table)?
        };
        units.push(loader.taken);
        check_all_taken(parameters, path, &units.concat())?;
        let distinct = distinct_ropes(&config.ropes).into_iter();
        let ropes = distinct.map(|p| Rope { dim: rotated(config.head_dim, p), parameters: p.clone() }).collect();
        let varlen = embed_tokens.device().is_cuda()
            && compute == Kind::BFloat16
            && config.attention_softcap.is_none()
            && ffi::has_flash_varlen(
                embed_tokens.device(),
                [config.num_attention_heads, config.num_key_value_heads, config.head_dim],
                config.windows.iter().copied().collect::<BTreeSet<_>>(),
            );
        Ok(Self {
            config,
            blocks,
            units,
            home: Home::Whole,
            row_sharers: None,
            slots: loader.slots,
            embed_tokens,
            norm,
            lm_head,
            ropes,
            compute,
            varlen,
        })
    }

    /// Dtype in which the parameter `name` can be lent to a block without changing a result: that
    /// of the computation for the matrices of linear layers, which cast them to it; else its own.
    pub(crate) fn wire_kind(&self, name: &str, parameter: &Tensor) -> Kind {
        let outside = [0, self.units.len() - 1].into_iter().flat_map(|unit| &self.units[unit]).any(|n| n == name);
        if !outside && parameter.dim() == 2 { self.compute } else { parameter.kind() }
    }

    /// Brings the weights of unit `unit` to the device until the result is dropped; the rest of the
    /// model may be computed then. Does nothing if they are there.
    ///
    /// # Panics
    /// If a rank has failed.
    fn lend(&self, unit: usize) -> Lent {
        self.home.ask(unit).and_then(crate::home::Asked::lend).unwrap_or_else(|e| panic!("{e:#}"))
    }

    /// Weights of the final norm and the output matrix, for [`CausalLM::final_norm`] and
    /// [`CausalLM::logits`], until dropped.
    pub(crate) fn lend_head(&self) -> (Lent, Option<Lent>) {
        let table = self.config.tie_word_embeddings.then(|| self.lend(0));
        (self.lend(self.units.len() - 1), table)
    }

    /// The parts of the units, if they are lent.
    pub(crate) fn unit_home(&self) -> Option<&Rc<UnitHome>> {
        match &self.home {
            Home::Whole => None,
            Home::Units(home) => Some(home),
        }
    }

    /// Places for adapters of the linear layers, by the name of the weight.
    pub(crate) fn adapter_slots(&self) -> impl Iterator<Item = (&String, &AdapterSlot)> {
        self.slots.iter()
    }

    /// The adapter of the weight `name`, if it has one.
    pub fn adapter(&self, name: &str) -> Option<LowRank> {
        self.slots.get(name).and_then(AdapterSlot::get)
    }

    /// The device of the parameters.
    pub fn device(&self) -> Device {
        self.embed_tokens.device()
    }

    /// Describes how the documents of a row are attended, for logs.
    pub fn attention(&self) -> &'static str {
        match (self.config.attention_softcap, self.varlen) {
            (Some(_), _) => "attention document by document, scores in full for the soft cap",
            (None, true) => "variable-length flash attention",
            (None, false) => "attention document by document",
        }
    }

    /// Maps token ids [b, s] to hidden states [b, s, e].
    pub fn embed(&self, ids_bs: &Tensor) -> Tensor {
        let x_bse = Tensor::embedding(&self.embed_tokens, ids_bs, -1, false, false).to_kind(self.compute);
        match self.config.embedding_scale {
            None => x_bse,
            Some(scale) => x_bse * scale,
        }
    }

    /// Sliding window of the blocks that have one.
    fn window(&self) -> Option<i64> {
        self.config.windows.iter().copied().flatten().next()
    }

    /// Attention for documents concatenated in a single row, [1, Σ lengths]: causal within each
    /// document, positions from 0 in each.
    pub fn documents(&self, lengths: &[i64]) -> Attended {
        let device = self.device();
        let positions: Vec<i64> = lengths.iter().flat_map(|&n| 0..n).collect();
        let positions = to_device(&Tensor::from_slice(&positions), device);
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let rotary = self.rotary(&positions.unsqueeze(0), longest);
        let ends = self.varlen.then(|| {
            let sums = lengths.iter().scan(0, |sum, &n| {
                *sum += n as i32;
                Some(*sum)
            });
            to_device(&Tensor::from_slice(&std::iter::once(0).chain(sums).collect::<Vec<i32>>()), device)
        });
        // The flash kernel implements windows itself.
        let window = if ends.is_some() { None } else { self.window() };
        Attended { rotary, pattern: Pattern::Documents(Documents::new(lengths, window, ends, device)) }
    }

    /// Attention with explicit positions [b, s] and a boolean mask [b, 1, s, t]; the queries are
    /// the last s of the t tokens.
    pub fn masked(&self, positions_bs: &Tensor, mask: &Tensor) -> Attended {
        let (s, t) = (positions_bs.size()[1], mask.size()[3]);
        let rotary = self.rotary(positions_bs, t);
        let windowed =
            self.window().filter(|w| t > *w).map(|w| mask.logical_and(&causal_window(s, t, w, self.device())));
        let form = |mask: &Tensor| {
            if self.config.attention_softcap.is_some() {
                return mask.shallow_clone();
            }
            Tensor::zeros(mask.size(), (self.compute, self.device()))
                .masked_fill(&mask.logical_not(), f64::NEG_INFINITY)
        };
        Attended { rotary, pattern: Pattern::Mask { full: form(mask), windowed: windowed.as_ref().map(form) } }
    }

    /// cos and sin for each rotary setting.
    fn rotary(&self, positions_bs: &Tensor, longest: i64) -> Vec<(Tensor, Tensor)> {
        let cos_sin = |rope: &Rope| {
            let (cos, sin) = rope.cos_sin(positions_bs, longest);
            (cos.to_kind(self.compute), sin.to_kind(self.compute))
        };
        self.ropes.iter().map(cos_sin).collect()
    }

    /// An empty cache for `b` rows of up to `capacity` tokens.
    pub fn cache(&self, b: i64, capacity: i64) -> KvCache {
        KvCache::new(&self.config, b, capacity, (self.compute, self.device()))
    }

    /// Final norm, before the output matrix.
    pub fn final_norm(&self, x: &Tensor) -> Tensor {
        self.norm.forward(x)
    }

    /// The output matrix [v, e] as `kind`.
    pub(crate) fn matrix(&self, kind: Kind) -> Tensor {
        self.lm_head.to_kind(kind)
    }

    /// Products of the output matrix to logits, but for the soft cap.
    pub(crate) fn divided(&self, logits: Tensor) -> Tensor {
        match self.config.logit_divisor {
            None => logits,
            Some(divisor) => logits / divisor,
        }
    }

    /// Hidden states [.., e] to f32 logits [.., v].
    pub fn logits(&self, x: &Tensor) -> Tensor {
        let normed = self.final_norm(x);
        let logits = ffi::linear(&normed, &self.matrix(normed.kind()), None);
        let logits = self.divided(logits);
        let logits = match self.config.logit_softcap {
            None => logits,
            Some(cap) => (logits / cap).tanh() * cap,
        };
        logits.to_kind(Kind::Float)
    }

    /// Runs token ids [b, s] through all blocks to hidden states [b, s, e].
    pub fn hidden(&self, ids_bs: &Tensor, attended: &Attended, mut cache: Option<&mut KvCache>) -> Tensor {
        let table = self.lend(0);
        let mut x_bse = self.embed(ids_bs);
        drop(table);
        for (layer, block) in self.blocks.iter().enumerate() {
            let _weights = self.lend(layer + 1);
            x_bse = block.forward(&x_bse, attended, cache.as_deref());
        }
        if let Some(cache) = &mut cache {
            cache.advance(ids_bs.size()[1]);
        }
        x_bse
    }
}

/// Rows of unequal length with their keys and values, aligned at their newest tokens: padded on the
/// left.
pub(crate) struct CachedRows {
    /// Keys and values of the rows.
    pub cache: KvCache,
    /// Number of tokens of each row, [b, 1].
    lengths_b1: Tensor,
}

impl CachedRows {
    /// Runs `prompts` through the model and reserves `room` more tokens in the cache. Returns the
    /// rows and the hidden states of their last tokens, [b, 1, e].
    pub fn new(model: &CausalLM, prompts: &[&[i64]], room: i64) -> (Self, Tensor) {
        let device = model.device();
        // A column of padding if all prompts are empty.
        let (b, s) = (prompts.len() as i64, prompts.iter().map(|p| p.len()).max().unwrap_or(0).max(1));
        // Any id serves as padding: no token attends to it.
        let padded = prompts.iter().flat_map(|p| std::iter::repeat_n(0, s - p.len()).chain(p.iter().copied()));
        let ids_bs = Tensor::from_slice(&padded.collect::<Vec<i64>>()).view([b, s as i64]).to_device(device);
        let lengths: Vec<i64> = prompts.iter().map(|p| p.len() as i64).collect();
        let lengths_b1 = Tensor::from_slice(&lengths).view([b, 1]).to_device(device);
        let s = s as i64;
        // Number of tokens from a column to the end of the row.
        let rest_s = s - Tensor::arange(s, (Kind::Int64, device));
        let positions_bs = (&lengths_b1 - &rest_s).clamp_min(0);
        let seen_bs = rest_s.le_tensor(&lengths_b1);
        let causal = Tensor::ones([s, s], (Kind::Bool, device)).tril(0);
        // A padding token attends to itself: a row in which all keys are masked would become NaN
        // and spread.
        let itself = Tensor::eye(s, (Kind::Int64, device)).to_kind(Kind::Bool);
        let mask = causal.logical_and(&seen_bs.view([b, 1, 1, s])).logical_or(&itself);
        let mut cache = model.cache(b, s + room);
        let x_bse = model.hidden(&ids_bs, &model.masked(&positions_bs, &mask), Some(&mut cache));
        (Self { cache, lengths_b1 }, x_bse.narrow(1, s - 1, 1))
    }

    /// Attention of the next `s` tokens after the cache: to all tokens before, and causal among
    /// themselves.
    pub fn attended(&self, model: &CausalLM, s: i64) -> Attended {
        let options = (Kind::Int64, model.device());
        let (b, t) = (self.lengths_b1.size()[0], self.cache.length() + s);
        let rest_t = t - s - Tensor::arange(t, options);
        let mut mask = rest_t.le_tensor(&self.lengths_b1).view([b, 1, 1, t]);
        if s > 1 {
            mask = mask.logical_and(&Tensor::ones([s, t], (Kind::Bool, model.device())).tril(t - s));
        }
        model.masked(&(&self.lengths_b1 + Tensor::arange(s, options)), &mask)
    }

    /// Runs one more token of each row through the model; returns the hidden states, [b, 1, e].
    pub fn advance(&mut self, model: &CausalLM, ids_b1: &Tensor) -> Tensor {
        self.cache.reserve();
        let x_b1e = model.hidden(ids_b1, &self.attended(model, 1), Some(&mut self.cache));
        self.lengths_b1 += 1;
        x_b1e
    }

    /// Keeps only the batch rows `rows` (int64), in that order.
    pub fn keep_rows(&mut self, rows: &Tensor) {
        self.lengths_b1 = self.lengths_b1.index_select(0, rows);
        self.cache.keep_rows(rows);
    }

    /// Replaces the batch rows `rows` (int64) by those of `new`.
    pub fn replace_rows(&mut self, rows: &Tensor, new: &Self) {
        let _ = self.lengths_b1.index_copy_(0, rows, &new.lengths_b1);
        self.cache.replace_rows(rows, &new.cache);
    }
}
