//! Text generation for batches of prompts of unequal length, padded on the left, over a
//! preallocated key-value cache; greedy, or sampled by temperature and nucleus (top-p).
//!
//! Shape suffixes: b batch, s sequence, t keys, n new tokens, v vocabulary.

use anyhow::Result;
use cpift_data::ChatText;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor, no_grad};

use crate::dist::in_batches;
use crate::model::{Attended, CausalLM, KvCache};

/// Steps between two reads of the generated tokens on a CUDA device, each of which synchronises.
/// Tokens after a row's end are dropped.
const CUDA_READ_EVERY: usize = 8;

/// Options of [`generate`].
#[derive(Debug, Clone)]
pub struct GenerationOptions<'a> {
    /// Token ids that end an answer and are not part of it.
    pub eos_ids: &'a [i64],
    /// Stop strings: an answer is cut before the first of them.
    pub stop: &'a [String],
    /// Maximum number of tokens of an answer.
    pub max_new_tokens: usize,
    /// Prompts per batch.
    pub batch_size: usize,
    /// Sampling; `None` is greedy decoding.
    pub sampling: Option<Sampling>,
}

/// An answer to a prompt.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Generated {
    /// Token ids, including those of a stop string, without the id that ends the answer.
    pub ids: Vec<i64>,
    /// The decoded text without special tokens, cut before a stop string.
    pub text: String,
}

/// Generates answers to `prompts` (token ids), in order. Prompts are batched by length to keep
/// padding low; ranks share the batches. `tick` is called for each prompt done. A sampled answer
/// depends on the seed and the prompt's index, not on its batch.
///
/// # Errors
/// An error of the tokenizer while decoding; a failed rank.
pub fn generate(
    model: &CausalLM,
    text: &ChatText,
    prompts: &[Vec<i64>],
    options: &GenerationOptions<'_>,
    tick: impl FnMut(),
) -> Result<Vec<Generated>> {
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    // Longest first: a batch that does not fit in memory fails at once.
    order.sort_by_key(|&i| (std::cmp::Reverse(prompts[i].len()), i));
    let each = |chunk: &[usize]| {
        let batch: Vec<&[i64]> = chunk.iter().map(|&i| prompts[i].as_slice()).collect();
        no_grad(|| Batch { model, text, options }.answer(&batch, chunk))
    };
    let sharers = model.row_sharers.as_ref();
    let mut answers = vec![Generated::default(); prompts.len()];
    for (i, ids) in in_batches(sharers, model.device(), &order, options.batch_size, each, tick)? {
        let text = cut_before_stop(text.decode(&ids)?, options.stop);
        answers[i] = Generated { ids, text };
    }
    Ok(answers)
}

/// Cuts `text` before the earliest stop string.
fn cut_before_stop(mut text: String, stop: &[String]) -> String {
    let first = stop.iter().filter(|s| !s.is_empty()).filter_map(|s| text.find(s.as_str())).min();
    text.truncate(first.unwrap_or(text.len()));
    text
}

/// Prompts padded on the left to one length, with their key-value cache.
pub(crate) struct Prefilled {
    /// Keys and values of the prompts, with room for new tokens.
    pub cache: KvCache,
    /// True for keys that are not padding, [b, capacity].
    pub seen_bt: Tensor,
    /// Position of each row's last token, [b, 1].
    pub position_b1: Tensor,
    /// Logits after the prompts, [b, v] in f32.
    pub logits_bv: Tensor,
}

impl Prefilled {
    /// Runs `prompts` through the model and reserves `room` more tokens in the cache.
    pub fn new(model: &CausalLM, prompts: &[&[i64]], room: usize) -> Self {
        let device = model.device();
        let (b, longest) = (prompts.len() as i64, prompts.iter().map(|p| p.len()).max().unwrap_or(0));
        let (mut ids, mut seen) = (Vec::new(), Vec::new());
        for prompt in prompts {
            let padding = longest - prompt.len();
            // Any id serves as padding: no token attends to it.
            ids.extend(std::iter::repeat_n(0, padding).chain(prompt.iter().copied()));
            seen.extend((0..longest + room).map(|t| t >= padding));
        }
        let (s, capacity) = (longest as i64, (longest + room) as i64);
        let ids_bs = Tensor::from_slice(&ids).view([b, s]).to_device(device);
        let seen_bt = Tensor::from_slice(&seen).view([b, capacity]).to_device(device);
        let seen_bs = seen_bt.narrow(1, 0, s);
        let positions_bs = (seen_bs.cumsum(1, Kind::Int64) - 1).clamp_min(0);
        let causal = Tensor::ones([s, s], (Kind::Bool, device)).tril(0);
        // A padding token attends to itself: a row in which all keys are masked would become NaN
        // and spread.
        let itself = Tensor::eye(s, (Kind::Int64, device)).to_kind(Kind::Bool);
        let mask = causal.logical_and(&seen_bs.view([b, 1, 1, s])).logical_or(&itself);
        let mut cache = model.cache(b, capacity);
        let x_bse = model.hidden(&ids_bs, &model.masked(&positions_bs, &mask), Some(&mut cache));
        let logits_bv = model.logits(&x_bse.narrow(1, s - 1, 1)).squeeze_dim(1);
        let position_b1 = positions_bs.narrow(1, s - 1, 1);
        Self { cache, seen_bt, position_b1, logits_bv }
    }

    /// Attention of the next `s` tokens after the cache: to all tokens before, and causal among
    /// themselves.
    pub fn attended(&self, model: &CausalLM, s: i64) -> Attended {
        let (b, t) = (self.seen_bt.size()[0], self.cache.length() + s);
        let mut mask = self.seen_bt.narrow(1, 0, t).reshape([b, 1, 1, t]);
        let offsets = Tensor::arange_start(1, s + 1, (Kind::Int64, model.device()));
        if s > 1 {
            mask = mask.logical_and(&Tensor::ones([s, t], (Kind::Bool, model.device())).tril(t - s));
        }
        model.masked(&(&self.position_b1 + offsets), &mask)
    }
}

/// A batch of prompts to answer.
struct Batch<'a> {
    model: &'a CausalLM,
    text: &'a ChatText,
    options: &'a GenerationOptions<'a>,
}

impl Batch<'_> {
    /// Returns the ids generated after each of `prompts`, whose indices in the caller's list are
    /// `places`.
    fn answer(&self, prompts: &[&[i64]], places: &[usize]) -> Result<Vec<Vec<i64>>> {
        let most = self.options.max_new_tokens;
        let mut state = Prefilled::new(self.model, prompts, most);
        let mut sampler = self.options.sampling.as_ref().map(|sampling| Sampler::new(sampling, places));
        let mut answers = vec![Vec::new(); prompts.len()];
        // The prompt of each row still in the batch.
        let mut rows: Vec<usize> = (0..prompts.len()).collect();
        let read_every = if self.model.device().is_cuda() { CUDA_READ_EVERY } else { 1 };
        let mut unread: Vec<Tensor> = Vec::new();
        for step in 1..=most {
            let next_b = match &mut sampler {
                None => state.logits_bv.argmax(-1, false),
                Some(sampler) => sampler.choose(&state.logits_bv, &rows),
            };
            unread.push(next_b.shallow_clone());
            let mut next_b1 = next_b.unsqueeze(1);
            if step % read_every == 0 || step == most {
                let keep = self.read(&mut answers, &rows, &std::mem::take(&mut unread))?;
                if keep.is_empty() || step == most {
                    break;
                }
                if keep.len() < rows.len() {
                    rows = keep.iter().map(|&r| rows[r as usize]).collect();
                    let index = Tensor::from_slice(&keep).to_device(self.model.device());
                    state.keep_rows(&index);
                    next_b1 = next_b1.index_select(0, &index);
                }
            }
            state.advance(self.model, &next_b1);
        }
        Ok(answers)
    }

    /// Appends the new tokens, one tensor [b] per step, to the answers of `rows`; returns the rows
    /// that continue.
    fn read(&self, answers: &mut [Vec<i64>], rows: &[usize], new: &[Tensor]) -> Result<Vec<i64>> {
        let new_bn: Vec<i64> = Vec::try_from(Tensor::stack(new, 1).reshape([-1])).expect("ids in one dimension");
        let mut keep = Vec::new();
        for (r, (&row, ids)) in rows.iter().zip(new_bn.chunks(new.len())).enumerate() {
            if !self.append(&mut answers[row], ids)? {
                keep.push(r as i64);
            }
        }
        Ok(keep)
    }

    /// Appends ids up to one that ends the answer; returns true if the answer has ended.
    fn append(&self, answer: &mut Vec<i64>, ids: &[i64]) -> Result<bool> {
        for &id in ids {
            if self.options.eos_ids.contains(&id) {
                return Ok(true);
            }
            answer.push(id);
            if self.stops(answer)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Returns true if the end of the answer contains a stop string. Every token but special ones
    /// is at least one byte of text.
    fn stops(&self, answer: &[i64]) -> Result<bool> {
        let Some(longest) = self.options.stop.iter().map(String::len).max() else { return Ok(false) };
        let tail = self.text.decode(&answer[answer.len().saturating_sub(longest + 8)..])?;
        Ok(self.options.stop.iter().any(|stop| !stop.is_empty() && tail.contains(stop.as_str())))
    }
}

impl Prefilled {
    fn keep_rows(&mut self, index: &Tensor) {
        self.seen_bt = self.seen_bt.index_select(0, index);
        self.position_b1 = self.position_b1.index_select(0, index);
        self.cache.keep_rows(index);
    }

    /// Runs each row's newest token through the model.
    fn advance(&mut self, model: &CausalLM, ids_b1: &Tensor) {
        let attended = self.attended(model, 1);
        let x_bse = model.hidden(ids_b1, &attended, Some(&mut self.cache));
        self.logits_bv = model.logits(&x_bse).squeeze_dim(1);
        self.position_b1 = &self.position_b1 + 1;
    }
}

/// Sampling parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divisor of the logits; positive.
    pub temperature: f64,
    /// Nucleus sampling (arXiv 1904.09751): the smallest set of likeliest tokens whose probability
    /// reaches this; 1 keeps all tokens.
    pub top_p: f64,
    /// Random seed.
    pub seed: u64,
}

/// The sampler of a batch. Each row has a generator of its own, so that its answer does not depend
/// on its batch.
struct Sampler {
    sampling: Sampling,
    generators: Vec<ChaCha8Rng>,
}

impl Sampler {
    /// A sampler for the prompts with indices `places`.
    fn new(sampling: &Sampling, places: &[usize]) -> Self {
        let generator = |&place: &usize| {
            let mut generator = ChaCha8Rng::seed_from_u64(sampling.seed);
            generator.set_stream(place as u64);
            generator
        };
        Self { sampling: *sampling, generators: places.iter().map(generator).collect() }
    }

    /// Draws one id for each row of `logits_bv`; `rows` are the indices of the generators.
    fn choose(&mut self, logits_bv: &Tensor, rows: &[usize]) -> Tensor {
        let draws: Vec<f32> = rows.iter().map(|&row| self.generators[row].random()).collect();
        let draws_b1 = Tensor::from_slice(&draws).unsqueeze(1).to_device(logits_bv.device());
        let probabilities_bv = (logits_bv / self.sampling.temperature).softmax(-1, Kind::Float);
        if self.sampling.top_p >= 1.0 {
            return invert(&probabilities_bv, &draws_b1);
        }
        // A stable sort: of equal probabilities the smaller id comes first, on every device.
        let (sorted_bv, ids_bv) = probabilities_bv.sort_stable(true, -1, true);
        // A token is in the nucleus if the tokens before it do not reach top_p; the first always
        // is.
        let before_bv = sorted_bv.cumsum(-1, Kind::Float) - &sorted_bv;
        let nucleus_bv = sorted_bv.masked_fill(&before_bv.ge(self.sampling.top_p), 0.0);
        let places_b = invert(&nucleus_bv, &draws_b1);
        ids_bv.gather(1, &places_b.unsqueeze(1), false).squeeze_dim(1)
    }
}

/// Inverts the cumulative distribution: the first index whose cumulative weight exceeds the draw's
/// share, [b].
fn invert(weights_bv: &Tensor, draws_b1: &Tensor) -> Tensor {
    let cumulative_bv = weights_bv.cumsum(-1, Kind::Double);
    let total_b1 = cumulative_bv.narrow(1, -1, 1);
    let reached_bv = cumulative_bv.gt_tensor(&(draws_b1.to_kind(Kind::Double) * total_b1));
    reached_bv.to_kind(Kind::Int8).argmax(-1, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(top_p: f64, temperature: f64) -> Vec<f64> {
        let logits: Vec<f32> = [0.4f32, 0.3, 0.15, 0.1, 0.05].iter().map(|p| p.ln()).collect();
        let rows = 20_000;
        let logits_bv = Tensor::from_slice(&logits).unsqueeze(0).expand([rows, 5], true);
        let places: Vec<usize> = (0..rows as usize).collect();
        let mut sampler = Sampler::new(&Sampling { temperature, top_p, seed: 1 }, &places);
        let ids = sampler.choose(&logits_bv, &places);
        (0..5).map(|v| ids.eq(v).sum(Kind::Double).double_value(&[]) / rows as f64).collect()
    }

    #[test]
    fn draws_follow_the_distribution_within_the_nucleus() {
        // numpy: p = [.4 .3 .15 .1 .05]; the nucleus of 0.7 is the first two; of 0.71 the first
        // three.
        for (top_p, temperature, expected) in [
            (1.0, 1.0, [0.4, 0.3, 0.15, 0.1, 0.05]),
            (0.69, 1.0, [4.0 / 7.0, 3.0 / 7.0, 0.0, 0.0, 0.0]),
            (0.71, 1.0, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0.0, 0.0]),
            (0.01, 1.0, [1.0, 0.0, 0.0, 0.0, 0.0]),
            // p^2 / sum p^2
            (1.0, 0.5, [0.16 / 0.285, 0.09 / 0.285, 0.0225 / 0.285, 0.01 / 0.285, 0.0025 / 0.285]),
        ] {
            let found = counts(top_p, temperature);
            for (found, expected) in found.iter().zip(expected) {
                // Four standard deviations of a share of 20,000 draws.
                let allowed = 4.0 * (expected * (1.0 - expected) / 20_000.0f64).sqrt();
                assert!((found - expected).abs() <= allowed, "top_p {top_p}: {found} where {expected} is due");
            }
        }
    }
}
