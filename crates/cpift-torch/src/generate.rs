//! Text generation for batches of prompts of unequal length, padded on the left, over a preallocated key-value cache.
//!
//! Suffixes: b batch, s sequence, t keys, n new tokens, v vocabulary.

mod sample;

use anyhow::Result;
use tch::{Kind, Tensor, no_grad};

use sample::Sampler;
pub use sample::Sampling;

use crate::model::{Attended, CausalLM, KvCache};
use cpift_data::ChatText;

/// Steps between two looks at the tokens on a CUDA device: each look waits for it. What a row writes after its end is dropped.
const CUDA_LOOK: usize = 8;

/// How to generate.
#[derive(Debug, Clone)]
pub struct GenerationOptions<'a> {
    /// Ids that end an answer; they are not part of it.
    pub eos_ids: &'a [i64],
    /// Texts that end an answer; it is cut before the first of them.
    pub stop: &'a [String],
    /// Most tokens of an answer.
    pub max_new_tokens: usize,
    /// Prompts in a batch.
    pub batch_size: usize,
    /// How a token is chosen; `None`: the likeliest.
    pub sampling: Option<Sampling>,
}

/// What the model wrote after a prompt.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Generated {
    /// Token ids, those of a stop text included, the ending id not.
    pub ids: Vec<i64>,
    /// The ids as text, special tokens left out, cut before a stop text.
    pub text: String,
}

/// Answers to `prompts` (token ids), in order. Prompts are taken by length, so that little is padded. `tick` is called for each
/// prompt done. A sampled answer depends on the seed and the prompt's place in the list, not on its batch.
///
/// # Errors
/// What the tokenizer reports when it decodes.
pub fn generate(
    model: &CausalLM,
    text: &ChatText,
    prompts: &[Vec<i64>],
    options: &GenerationOptions<'_>,
    mut tick: impl FnMut(),
) -> Result<Vec<Generated>> {
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    // Longest first: a batch that does not fit fails at once.
    order.sort_by_key(|&i| (std::cmp::Reverse(prompts[i].len()), i));
    let mut answers = vec![Generated::default(); prompts.len()];
    for chunk in order.chunks(options.batch_size.max(1)) {
        let batch: Vec<&[i64]> = chunk.iter().map(|&i| prompts[i].as_slice()).collect();
        let written = no_grad(|| Batch { model, text, options }.answer(&batch, chunk))?;
        for (&i, ids) in chunk.iter().zip(written) {
            let text = cut_before_stop(text.decode(&ids)?, options.stop);
            answers[i] = Generated { ids, text };
            tick();
        }
    }
    Ok(answers)
}

/// `text` up to the earliest of the stop texts.
fn cut_before_stop(mut text: String, stop: &[String]) -> String {
    let first = stop.iter().filter(|s| !s.is_empty()).filter_map(|s| text.find(s.as_str())).min();
    text.truncate(first.unwrap_or(text.len()));
    text
}

/// Prompts padded on the left to one length, and the cache behind them.
pub(crate) struct Prefilled {
    /// Keys and values of the prompts, with room for what follows.
    pub cache: KvCache,
    /// Whether each key is a real token, [b, capacity]; those after the prompts are.
    pub seen_bt: Tensor,
    /// Position of each row's last token, [b, 1].
    pub position_b1: Tensor,
    /// Logits after the prompts, [b, v] in f32.
    pub logits_bv: Tensor,
}

impl Prefilled {
    /// Runs `prompts` through the model, leaving room for `room` tokens more.
    pub fn new(model: &CausalLM, prompts: &[&[i64]], room: usize) -> Self {
        let device = model.device();
        let (b, longest) = (prompts.len() as i64, prompts.iter().map(|p| p.len()).max().unwrap_or(0));
        let (mut ids, mut seen) = (Vec::new(), Vec::new());
        for prompt in prompts {
            let padding = longest - prompt.len();
            // Any id will do as padding: nothing sees it.
            ids.extend(std::iter::repeat_n(0, padding).chain(prompt.iter().copied()));
            seen.extend((0..longest + room).map(|t| t >= padding));
        }
        let (s, capacity) = (longest as i64, (longest + room) as i64);
        let ids_bs = Tensor::from_slice(&ids).view([b, s]).to_device(device);
        let seen_bt = Tensor::from_slice(&seen).view([b, capacity]).to_device(device);
        let seen_bs = seen_bt.narrow(1, 0, s);
        let positions_bs = (seen_bs.cumsum(1, Kind::Int64) - 1).clamp_min(0);
        let causal = Tensor::ones([s, s], (Kind::Bool, device)).tril(0);
        // A padding token sees itself: a row of nothing but masked keys would turn into NaN and spread.
        let itself = Tensor::eye(s, (Kind::Int64, device)).to_kind(Kind::Bool);
        let mask = causal.logical_and(&seen_bs.view([b, 1, 1, s])).logical_or(&itself);
        let mut cache = model.cache(b, capacity);
        let x_bse = model.hidden(&ids_bs, &model.masked(&positions_bs, &mask), Some(&mut cache));
        let logits_bv = model.logits(&x_bse.narrow(1, s - 1, 1)).squeeze_dim(1);
        let position_b1 = positions_bs.narrow(1, s - 1, 1);
        Self { cache, seen_bt, position_b1, logits_bv }
    }

    /// What `s` tokens after the cache's may see: all tokens before, and those of the `s` up to themselves.
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

/// A batch to be answered.
struct Batch<'a> {
    model: &'a CausalLM,
    text: &'a ChatText,
    options: &'a GenerationOptions<'a>,
}

impl Batch<'_> {
    /// The ids written after each of `prompts`, which are the ones numbered `places` in the caller's list.
    fn answer(&self, prompts: &[&[i64]], places: &[usize]) -> Result<Vec<Vec<i64>>> {
        let most = self.options.max_new_tokens;
        let mut state = Prefilled::new(self.model, prompts, most);
        let mut sampler = self.options.sampling.as_ref().map(|sampling| Sampler::new(sampling, places));
        let mut answers = vec![Vec::new(); prompts.len()];
        // Which prompt each row still in the batch is.
        let mut rows: Vec<usize> = (0..prompts.len()).collect();
        let look = if self.model.device().is_cuda() { CUDA_LOOK } else { 1 };
        let mut unseen: Vec<Tensor> = Vec::new();
        for step in 1..=most {
            let next_b = match &mut sampler {
                None => state.logits_bv.argmax(-1, false),
                Some(sampler) => sampler.choose(&state.logits_bv, &rows),
            };
            unseen.push(next_b.shallow_clone());
            let mut next_b1 = next_b.unsqueeze(1);
            if step % look == 0 || step == most {
                let keep = self.look(&mut answers, &rows, &std::mem::take(&mut unseen))?;
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

    /// Appends the new tokens, a tensor [b] each, to the answers of `rows`; which of the rows go on.
    fn look(&self, answers: &mut [Vec<i64>], rows: &[usize], new: &[Tensor]) -> Result<Vec<i64>> {
        let new_bn: Vec<i64> = Vec::try_from(Tensor::stack(new, 1).reshape([-1])).expect("ids in one dimension");
        let mut keep = Vec::new();
        for (r, (&row, ids)) in rows.iter().zip(new_bn.chunks(new.len())).enumerate() {
            if !self.append(&mut answers[row], ids)? {
                keep.push(r as i64);
            }
        }
        Ok(keep)
    }

    /// Appends ids up to one that ends the answer; whether it has ended.
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

    /// Whether the end of the answer holds a stop text. Every token but special ones writes a byte at least.
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

    /// Feeds each row's newest token.
    fn advance(&mut self, model: &CausalLM, ids_b1: &Tensor) {
        let attended = self.attended(model, 1);
        let x_bse = model.hidden(ids_b1, &attended, Some(&mut self.cache));
        self.logits_bv = model.logits(&x_bse).squeeze_dim(1);
        self.position_b1 = &self.position_b1 + 1;
    }
}
