//! Rows of unequal length that run through the model together, over one key-value cache.
//!
//! Shape suffixes: b batch, s sequence, t keys, e embedding.

use tch::{Kind, Tensor};

use crate::model::{Attended, CausalLM, KvCache};

/// Rows with their keys and values, aligned at their newest tokens: padded on the left.
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
