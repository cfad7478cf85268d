//! What a pass keeps for its backward pass, in bytes, derived from the layers as they are written in `model/` and `train/`.
//!
//! Suffixes as there: e embedding, f MLP width, h query heads, k key heads, d head width, v vocabulary, n tokens. What autograd saves: the
//! input of a linear layer, both factors of a product, the f32 copy that a norm squares; not the terms of a sum.

use super::Job;
use super::size::dimensions;
use crate::model::ModelConfig;

/// Bytes of f32.
pub(super) const F32: u64 = 4;

/// Activations of one decoder block.
pub(super) struct Block {
    /// Its input, all that recomputation keeps.
    pub input: u64,
    /// What else it saves for its backward pass.
    pub saved: u64,
    /// Gradients of activations that exist besides at the worst moment of its backward pass.
    pub transient: u64,
    /// Who sees whom within a window, in the dtype of the scores, which a block with a window saves besides.
    pub window: u64,
}

impl Block {
    pub(super) fn of(job: &Job) -> Self {
        let c = &job.config;
        let [e, f, d, h, k, _] = dimensions(c);
        let (n, b) = (job.tokens, job.compute_bytes());
        let head_norms = if c.qk_norm { norm(c, b, (h + k) * d, true) } else { 0 };
        let norms = norm(c, b, e, false) + norm(c, b, e, true) * if c.gemma_norms { 3 } else { 1 };
        let mlp = 4 * f * b;
        let fixed = norms + head_norms + 2 * e * b + mlp;
        let scores = scores(job);
        Self {
            input: n * e * b,
            saved: n * (fixed + attention(job)) + scores.saved,
            // In the MLP's part twice its width besides what is freed; in the attention's part the MLP has been freed already.
            transient: 2 * n * e * b + (2 * n * f * b).max(scores.transient.saturating_sub(n * mlp)),
            window: if c.attention_softcap.is_some() { 0 } else { windows(job) * b },
        }
    }
}

/// What a norm over `width` saves for a token: its f32 input (`own`: saved by nothing else where that is no copy), and the normed
/// values before the weight.
fn norm(c: &ModelConfig, bytes: u64, width: u64, own: bool) -> u64 {
    let input = if bytes != F32 || own { F32 } else { 0 };
    let normed = if c.gemma_norms { F32 } else { bytes };
    width * (input + normed)
}

/// Queries, keys, values and result of the attention for a token, without scores.
fn attention(job: &Job) -> u64 {
    let c = &job.config;
    let [_, _, d, h, k, _] = dimensions(c);
    let b = job.compute_bytes();
    if c.attention_softcap.is_some() {
        // Keys and values are repeated for every query head.
        return 4 * h * d * b;
    }
    // Attention document by document joins the results in a copy.
    let results = if job.flash_varlen() || job.longest >= job.tokens { 1 } else { 2 };
    (h + 2 * k + results * h) * d * b + h * F32
}

/// Pairs of tokens that windows tell apart: all of each document longer than the window, s × s, where no flash kernel has windows of its
/// own. A mask of one byte a pair is made once for a batch.
pub(super) fn windows(job: &Job) -> u64 {
    let longest = job.longest.min(job.tokens);
    let window = job.config.windows.iter().copied().flatten().next();
    let masked = window.is_some_and(|window| longest > window as u64) && !job.flash_varlen();
    if masked { longest * job.tokens } else { 0 }
}

struct Scores {
    saved: u64,
    transient: u64,
}

/// The scores of each document, h × s × s: only soft-capped attention has them, as no fused kernel knows the cap.
fn scores(job: &Job) -> Scores {
    if job.config.attention_softcap.is_none() {
        return Scores { saved: 0, transient: 0 };
    }
    let heads = job.config.num_attention_heads as u64;
    let longest = job.longest.min(job.tokens).max(1);
    let one = heads * longest * longest;
    let all = heads * longest * job.tokens;
    // Saved: tanh, its softmax in f32, and where hidden states are not f32 its cast; the mask, a byte for every head.
    let b = job.compute_bytes();
    let cast = if b == F32 { 0 } else { b };
    Scores { saved: all * (b + F32 + cast) + all / heads, transient: one * (2 * F32 + b) }
}

/// The end of the forward pass: final norm and loss with its own backward pass.
pub(super) struct Head {
    /// Hidden states and their gradient, of the targets.
    pub hidden: u64,
    /// Logits and log-probabilities of one chunk.
    pub chunk: u64,
}

impl Head {
    pub(super) fn of(job: &Job) -> Self {
        let c = &job.config;
        let [e, _, _, _, _, v] = dimensions(c);
        let b = job.compute_bytes();
        let chunk = job.tokens.min(job.args.loss_chunk as u64) * v;
        let cast = if b == F32 { 0 } else { F32 };
        // Logits, the cast that log_softmax makes, log-probabilities; the cap keeps its value, its slope and the capped logits.
        let capped = if c.logit_softcap.is_some() { 2 * b + F32 } else { 0 };
        let forward = chunk * (b + cast + F32 + capped);
        // Its gradient as f32 and cast; the product for the matrix, and where it must be widened that too, before it is added.
        let slope = if c.logit_softcap.is_some() { F32 } else { 0 };
        let cast_gradient = if b == F32 { 0 } else { b };
        let product = v * e * (b + cast);
        let backward = chunk * (F32 + slope + cast_gradient) + product;
        Self { hidden: job.tokens * (norm(c, b, e, true) + 2 * e * b), chunk: forward.max(backward) }
    }
}
