//! Greedy generation for batches of prompts of unequal length, padded on the left, with a key-value cache.
//!
//! Suffixes: b batch, s sequence, t keys.

use tch::{Device, Kind, Tensor, no_grad};

use crate::model::{CausalLM, KvCache};

/// How to generate.
#[derive(Debug, Clone)]
pub struct GreedyOptions<'a> {
    /// Ids that end an answer.
    pub eos_ids: &'a [i64],
    /// The id that pads prompts.
    pub pad_id: i64,
    /// Most tokens of an answer.
    pub max_new_tokens: usize,
    /// Prompts in a batch.
    pub batch_size: usize,
}

/// The answers to `prompts` (token ids), in order, without the ending id. Prompts are taken by length, so that little is
/// padded. `tick` is called for each prompt done.
pub fn greedy(
    model: &CausalLM,
    prompts: &[Vec<i64>],
    options: &GreedyOptions<'_>,
    mut tick: impl FnMut(),
) -> Vec<Vec<i64>> {
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    order.sort_by_key(|&i| (prompts[i].len(), i));
    let mut answers = vec![Vec::new(); prompts.len()];
    for chunk in order.chunks(options.batch_size) {
        let batch: Vec<&[i64]> = chunk.iter().map(|&i| prompts[i].as_slice()).collect();
        let outputs = no_grad(|| generate_batch(model, &batch, options));
        for (&i, output) in chunk.iter().zip(outputs) {
            answers[i] = output;
            tick();
        }
    }
    answers
}

/// A batch under way; rows that have ended leave it.
struct Running {
    /// Which prompt each row is.
    rows: Vec<usize>,
    /// Whether each key is a real token, [b, t].
    seen_bt: Tensor,
    /// Position of each row's newest token, [b, 1].
    position_b1: Tensor,
    cache: KvCache,
}

fn generate_batch(model: &CausalLM, prompts: &[&[i64]], options: &GreedyOptions<'_>) -> Vec<Vec<i64>> {
    let device = model.device();
    let mut answers = vec![Vec::new(); prompts.len()];
    let (mut running, logits) = prefill(model, prompts, options.pad_id, device);
    let mut next = newest(&logits);
    for _ in 0..options.max_new_tokens {
        let keep: Vec<i64> =
            (0..next.len()).filter(|&r| !options.eos_ids.contains(&next[r])).map(|r| r as i64).collect();
        if keep.len() < next.len() {
            running.keep(&keep, device);
            next = keep.iter().map(|&r| next[r as usize]).collect();
        }
        if next.is_empty() {
            break;
        }
        running.rows.iter().zip(&next).for_each(|(&row, &id)| answers[row].push(id));
        if answers[running.rows[0]].len() == options.max_new_tokens {
            break;
        }
        next = newest(&running.advance(model, &next, device));
    }
    answers
}

/// Runs the prompts through the model; logits of the last token, [b, 1, v].
fn prefill(model: &CausalLM, prompts: &[&[i64]], pad_id: i64, device: Device) -> (Running, Tensor) {
    let (b, s) = (prompts.len() as i64, prompts.iter().map(|p| p.len()).max().unwrap_or(0));
    let (mut ids, mut seen) = (Vec::new(), Vec::new());
    for prompt in prompts {
        let padding = s - prompt.len();
        ids.extend(std::iter::repeat_n(pad_id, padding).chain(prompt.iter().copied()));
        seen.extend((0..s).map(|i| i >= padding));
    }
    let s = s as i64;
    let ids_bs = Tensor::from_slice(&ids).view([b, s]).to_device(device);
    let seen_bt = Tensor::from_slice(&seen).view([b, s]).to_device(device);
    let positions_bs = (seen_bt.cumsum(1, Kind::Int64) - 1).clamp_min(0);
    let causal = Tensor::ones([s, s], (Kind::Bool, device)).tril(0);
    // A padding token sees itself: a row of nothing but masked keys would turn into NaN and spread.
    let itself = Tensor::eye(s, (Kind::Int64, device)).to_kind(Kind::Bool);
    let mask = causal.logical_and(&seen_bt.view([b, 1, 1, s])).logical_or(&itself);
    let mut cache = KvCache::default();
    let attended = model.masked(&positions_bs, mask);
    let x_bse = model.hidden(&ids_bs, &attended, Some(&mut cache));
    let logits = model.logits(&x_bse.narrow(1, s - 1, 1));
    let position_b1 = positions_bs.narrow(1, s - 1, 1);
    (Running { rows: (0..prompts.len()).collect(), seen_bt, position_b1, cache }, logits)
}

impl Running {
    fn keep(&mut self, keep: &[i64], device: Device) {
        let index = Tensor::from_slice(keep).to_device(device);
        self.rows = keep.iter().map(|&r| self.rows[r as usize]).collect();
        self.seen_bt = self.seen_bt.index_select(0, &index);
        self.position_b1 = self.position_b1.index_select(0, &index);
        self.cache.keep_rows(&index);
    }

    /// Feeds each row's newest token; logits of the next, [b, 1, v].
    fn advance(&mut self, model: &CausalLM, newest: &[i64], device: Device) -> Tensor {
        let b = newest.len() as i64;
        let ids_b1 = Tensor::from_slice(newest).view([b, 1]).to_device(device);
        self.position_b1 = &self.position_b1 + 1;
        self.seen_bt = Tensor::cat(&[&self.seen_bt, &Tensor::ones([b, 1], (Kind::Bool, device))], 1);
        let t = self.seen_bt.size()[1];
        let attended = model.masked(&self.position_b1, self.seen_bt.view([b, 1, 1, t]));
        let x_bse = model.hidden(&ids_b1, &attended, Some(&mut self.cache));
        model.logits(&x_bse)
    }
}

/// The likeliest id of each row.
fn newest(logits_b1v: &Tensor) -> Vec<i64> {
    Vec::try_from(logits_b1v.squeeze_dim(1).argmax(-1, false)).expect("one id for each row")
}
