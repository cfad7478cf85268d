//! Text generation by a continuous batch: a row that ends leaves its slot to the next prompt, so a
//! slow row keeps nothing waiting. Greedy, or sampled by temperature and nucleus (top-p).
//!
//! Shape suffixes: b batch, n new tokens, v vocabulary.

use anyhow::Result;
use cpift_data::ChatText;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor, no_grad};

use crate::dist::in_shares;
use crate::model::{CachedRows, CausalLM};

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
    /// Rows that are answered at a time.
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

/// Generates answers to `prompts` (token ids), in order. The longest prompts go first; ranks share
/// the prompts. `tick` is called for each prompt done. An answer does not depend on the rows beside
/// it but for rounding, a sampled one on the seed and the prompt's index.
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
    // Longest first: what does not fit in memory fails early, and rows that enter together have
    // little padding.
    order.sort_by_key(|&i| (std::cmp::Reverse(prompts[i].len()), i));
    let share = |own: &[usize], tick: &mut dyn FnMut()| {
        no_grad(|| Batch { model, text, prompts, options, rows: Vec::new() }.answer(own, tick))
    };
    let mut answers = vec![Generated::default(); prompts.len()];
    for (i, ids) in in_shares(model.row_sharers.as_ref(), model.device(), &order, share, tick)? {
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

/// A prompt that is being answered.
struct Row {
    /// Index of the prompt.
    place: usize,
    /// Number of its tokens in the cache.
    cached: i64,
    /// Ids generated so far.
    ids: Vec<i64>,
    /// Random numbers of a sampled answer.
    draws: Option<Draws>,
}

/// The rows that are answered together.
struct Batch<'a> {
    model: &'a CausalLM,
    text: &'a ChatText,
    prompts: &'a [Vec<i64>],
    options: &'a GenerationOptions<'a>,
    /// The row of each slot.
    rows: Vec<Row>,
}

/// The tensors of a batch, by slot.
struct State {
    /// All tokens of the rows but the newest.
    cached: CachedRows,
    /// The newest token of each row, [b, 1].
    newest_b1: Tensor,
}

impl Batch<'_> {
    /// Answers the prompts with indices `order`; returns each index with the ids of its answer.
    fn answer(mut self, order: &[usize], tick: &mut dyn FnMut()) -> Result<Vec<(usize, Vec<i64>)>> {
        let mut waiting = order.iter().copied();
        let mut answers = Vec::new();
        let first: Vec<usize> = waiting.by_ref().take(self.options.batch_size.max(1)).collect();
        if first.is_empty() {
            return Ok(answers);
        }
        self.rows = first.iter().map(|&place| self.row(place)).collect();
        let mut state = self.prefill(&first);
        loop {
            let new: Vec<Tensor> = (0..self.steps()).map(|_| self.step(&mut state)).collect();
            let ended = self.read(&new)?;
            ended.iter().for_each(|_| tick());
            let entering: Vec<usize> = waiting.by_ref().take(ended.len()).collect();
            let (refilled, vacant) = ended.split_at(entering.len());
            for (&slot, &place) in refilled.iter().zip(&entering) {
                let new = self.row(place);
                let row = std::mem::replace(&mut self.rows[slot], new);
                answers.push((row.place, row.ids));
            }
            if !entering.is_empty() {
                state.replace_rows(&self.index(refilled), &self.prefill(&entering));
            }
            if !vacant.is_empty() {
                let (left, kept) = self.leave(vacant);
                answers.extend(left.into_iter().map(|row| (row.place, row.ids)));
                if kept.is_empty() {
                    return Ok(answers);
                }
                state.keep_rows(&self.index(&kept));
            }
        }
    }

    /// A row that starts to answer the prompt `place`.
    fn row(&self, place: usize) -> Row {
        let cached = self.prompts[place].len().saturating_sub(1) as i64;
        let draws = self.options.sampling.as_ref().map(|sampling| Draws::new(sampling, place));
        Row { place, cached, ids: Vec::new(), draws }
    }

    /// Runs the prompts `places` through the model. Their last tokens go through with the first
    /// step.
    fn prefill(&self, places: &[usize]) -> State {
        // An empty prompt is answered as one token of padding would be.
        let parts =
            |&place: &usize| self.prompts[place].split_last().map_or((0, &[][..]), |(last, rest)| (*last, rest));
        let (newest, prompts): (Vec<i64>, Vec<&[i64]>) = places.iter().map(parts).unzip();
        let newest_b1 = Tensor::from_slice(&newest).unsqueeze(1).to_device(self.model.device());
        State { cached: CachedRows::new(self.model, &prompts, 0).0, newest_b1 }
    }

    /// Number of steps before the next read: no row exceeds its limit meanwhile.
    fn steps(&self) -> usize {
        let most = if self.model.device().is_cuda() { CUDA_READ_EVERY } else { 1 };
        let left = self.rows.iter().map(|row| self.options.max_new_tokens.saturating_sub(row.ids.len())).min();
        left.unwrap_or(1).clamp(1, most)
    }

    /// Generates one token for each row, [b].
    fn step(&mut self, state: &mut State) -> Tensor {
        let longest = self.rows.iter().map(|row| row.cached).max().unwrap_or(0);
        state.cached.cache.keep_newest(longest);
        let logits_bv = self.model.logits(&state.cached.advance(self.model, &state.newest_b1)).squeeze_dim(1);
        let next_b = match &self.options.sampling {
            None => logits_bv.argmax(-1, false),
            Some(sampling) => {
                let draws: Vec<f32> = self.rows.iter_mut().flat_map(|row| &mut row.draws).map(Draws::next).collect();
                sampling.choose(&logits_bv, &draws)
            }
        };
        self.rows.iter_mut().for_each(|row| row.cached += 1);
        state.newest_b1 = next_b.unsqueeze(1);
        next_b
    }

    /// Appends the new tokens, one tensor [b] per step, to the rows; returns the slots of those
    /// that end.
    fn read(&mut self, new: &[Tensor]) -> Result<Vec<usize>> {
        let new_bn: Vec<i64> = Vec::try_from(Tensor::stack(new, 1).reshape([-1])).expect("ids in one dimension");
        let mut ended = Vec::new();
        for (slot, ids) in new_bn.chunks(new.len()).enumerate() {
            let mut answer = std::mem::take(&mut self.rows[slot].ids);
            if self.append(&mut answer, ids)? {
                ended.push(slot);
            }
            self.rows[slot].ids = answer;
        }
        Ok(ended)
    }

    /// Appends ids up to the end of the answer; returns true if it has ended.
    fn append(&self, answer: &mut Vec<i64>, ids: &[i64]) -> Result<bool> {
        for &id in ids {
            if self.options.eos_ids.contains(&id) || answer.len() >= self.options.max_new_tokens {
                return Ok(true);
            }
            answer.push(id);
            if self.stops(answer)? {
                return Ok(true);
            }
        }
        Ok(answer.len() >= self.options.max_new_tokens)
    }

    /// Returns true if the end of the answer contains a stop string. Every token but special ones
    /// is at least one byte of text.
    fn stops(&self, answer: &[i64]) -> Result<bool> {
        let Some(longest) = self.options.stop.iter().map(String::len).max() else { return Ok(false) };
        let tail = self.text.decode(&answer[answer.len().saturating_sub(longest + 8)..])?;
        Ok(self.options.stop.iter().any(|stop| !stop.is_empty() && tail.contains(stop.as_str())))
    }

    /// Removes the rows of the slots `vacant`; returns them and the slots that are kept.
    fn leave(&mut self, vacant: &[usize]) -> (Vec<Row>, Vec<usize>) {
        let (mut left, mut kept) = (Vec::new(), Vec::new());
        let slots = std::mem::take(&mut self.rows);
        for (slot, row) in slots.into_iter().enumerate() {
            if vacant.contains(&slot) {
                left.push(row);
            } else {
                kept.push(slot);
                self.rows.push(row);
            }
        }
        (left, kept)
    }

    /// Slots as an index tensor.
    fn index(&self, slots: &[usize]) -> Tensor {
        let slots: Vec<i64> = slots.iter().map(|&slot| slot as i64).collect();
        Tensor::from_slice(&slots).to_device(self.model.device())
    }
}

impl State {
    /// Keeps only the slots `rows` (int64), in that order.
    fn keep_rows(&mut self, rows: &Tensor) {
        self.newest_b1 = self.newest_b1.index_select(0, rows);
        self.cached.keep_rows(rows);
    }

    /// Replaces the slots `rows` (int64) by those of `new`.
    fn replace_rows(&mut self, rows: &Tensor, new: &Self) {
        let _ = self.newest_b1.index_copy_(0, rows, &new.newest_b1);
        self.cached.replace_rows(rows, &new.cached);
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

/// The random numbers of one answer. Each answer has a stream of its own, so that it does not
/// depend on the rows beside it.
struct Draws(ChaCha8Rng);

impl Draws {
    /// The stream of the prompt with index `place`.
    fn new(sampling: &Sampling, place: usize) -> Self {
        let mut generator = ChaCha8Rng::seed_from_u64(sampling.seed);
        generator.set_stream(place as u64);
        Self(generator)
    }

    /// The next number, in [0, 1).
    fn next(&mut self) -> f32 {
        self.0.random()
    }
}

impl Sampling {
    /// Chooses one id for each row of `logits_bv` by the row's entry of `draws`, [b].
    fn choose(&self, logits_bv: &Tensor, draws: &[f32]) -> Tensor {
        let draws_b1 = Tensor::from_slice(draws).unsqueeze(1).to_device(logits_bv.device());
        let probabilities_bv = (logits_bv / self.temperature).softmax(-1, Kind::Float);
        if self.top_p >= 1.0 {
            return invert(&probabilities_bv, &draws_b1);
        }
        // A stable sort: of equal probabilities the smaller id comes first, on every device.
        let (sorted_bv, ids_bv) = probabilities_bv.sort_stable(true, -1, true);
        // A token is in the nucleus if the tokens before it do not reach top_p; the first always
        // is.
        let before_bv = sorted_bv.cumsum(-1, Kind::Float) - &sorted_bv;
        let nucleus_bv = sorted_bv.masked_fill(&before_bv.ge(self.top_p), 0.0);
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
        let sampling = Sampling { temperature, top_p, seed: 1 };
        let draws: Vec<f32> = (0..rows as usize).map(|place| Draws::new(&sampling, place).next()).collect();
        let ids = sampling.choose(&logits_bv, &draws);
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
