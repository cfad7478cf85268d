//! Scoring given text: negative log-likelihood of targets, and of alternative continuations of one prompt.

use anyhow::Result;
use tch::{Device, Kind, Tensor, no_grad};

use crate::data::{Batch, Example};
use crate::generate::Prefilled;
use crate::model::CausalLM;
use crate::train::target_losses;

/// Targets whose logits exist at a time.
const LOSS_CHUNK: usize = 1024;

/// Summed loss and number of targets of one example.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExampleLoss {
    /// Sum of the negative log-likelihoods, in nats.
    pub nll: f64,
    /// Number of target tokens.
    pub targets: usize,
}

/// The loss of every example, in order; batches are made of examples of similar length.
pub fn losses(model: &CausalLM, examples: &[Example], batch_size: usize, mut tick: impl FnMut()) -> Vec<ExampleLoss> {
    let mut order: Vec<usize> = (0..examples.len()).collect();
    order.sort_by_key(|&i| (examples[i].ids.len(), i));
    let mut out = vec![ExampleLoss { nll: 0.0, targets: 0 }; examples.len()];
    for chunk in order.chunks(batch_size) {
        let rows: Vec<&Example> = chunk.iter().map(|&i| &examples[i]).collect();
        let batch = Batch::new(&rows).to_device(model.device());
        let sums = no_grad(|| document_losses(model, &batch));
        for (&i, nll) in chunk.iter().zip(sums) {
            out[i] = ExampleLoss { nll, targets: examples[i].target.iter().filter(|t| **t).count() };
            tick();
        }
    }
    out
}

/// Summed negative log-likelihood of each example of a batch.
fn document_losses(model: &CausalLM, batch: &Batch) -> Vec<f64> {
    let x_bse = model.hidden(&batch.ids_bs, &model.documents(&batch.lengths), None);
    let normed = model.final_norm(&x_bse.squeeze_dim(0).index_select(0, &batch.places_n));
    let each = target_losses(model, &normed, &batch.labels_n, LOSS_CHUNK).to_kind(Kind::Double);
    // The example that each target belongs to.
    let ends: Vec<i64> = batch.lengths.iter().scan(0, |end, n| Some((*end += n, *end).1)).collect();
    let owner = batch.places_n.bucketize(&Tensor::from_slice(&ends).to_device(model.device()), false, true);
    let sums = Tensor::zeros([batch.lengths.len() as i64], (Kind::Double, model.device())).index_add(0, &owner, &each);
    Vec::try_from(sums.to_device(Device::Cpu)).expect("a one-dimensional tensor of doubles")
}

/// A context and the texts that may follow it, as token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alternatives {
    /// What they follow.
    pub context: Vec<i64>,
    /// Each of at least one token.
    pub continuations: Vec<Vec<i64>>,
}

/// Log-likelihoods, in nats, of each continuation after its context. A context runs through the model once, whatever follows it;
/// batches are made of contexts of similar length, and `tick` is called for each that is done.
///
/// # Errors
/// When a context or a continuation is empty.
pub fn alternatives(
    model: &CausalLM,
    items: &[Alternatives],
    batch_size: usize,
    mut tick: impl FnMut(),
) -> Result<Vec<Vec<f64>>> {
    let whole = |item: &Alternatives| !item.context.is_empty() && item.continuations.iter().all(|c| !c.is_empty());
    anyhow::ensure!(items.iter().all(whole), "a context or continuation without tokens cannot be scored");
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(items[i].context.len()), i));
    let mut out = vec![Vec::new(); items.len()];
    for chunk in order.chunks(batch_size.max(1)) {
        let batch: Vec<&Alternatives> = chunk.iter().map(|&i| &items[i]).collect();
        for (&i, scores) in chunk.iter().zip(no_grad(|| batch_alternatives(model, &batch))) {
            out[i] = scores;
            tick();
        }
    }
    Ok(out)
}

/// The first continuation of every context, then the second, each over the same cache.
fn batch_alternatives(model: &CausalLM, batch: &[&Alternatives]) -> Vec<Vec<f64>> {
    let contexts: Vec<&[i64]> = batch.iter().map(|item| item.context.as_slice()).collect();
    let longest = batch.iter().flat_map(|item| &item.continuations).map(Vec::len).max().unwrap_or(1);
    let mut state = Prefilled::new(model, &contexts, longest - 1);
    let context_length = state.cache.length();
    let first_bv = state.logits_bv.log_softmax(-1, Kind::Float);
    let most = batch.iter().map(|item| item.continuations.len()).max().unwrap_or(0);
    let mut out = vec![Vec::new(); batch.len()];
    for which in 0..most {
        // A row that has no such continuation goes along with one token that is not counted.
        let ids: Vec<&[i64]> =
            batch.iter().map(|item| item.continuations.get(which).map_or(&[0][..], Vec::as_slice)).collect();
        state.cache.truncate(context_length);
        let scores = continuation_scores(model, &mut state, &first_bv, &ids);
        for ((item, out), score) in batch.iter().zip(&mut out).zip(scores) {
            if which < item.continuations.len() {
                out.push(score);
            }
        }
    }
    out
}

/// Summed log-likelihoods of one continuation for each row; `first_bv` are the log-probabilities after the contexts.
fn continuation_scores(model: &CausalLM, state: &mut Prefilled, first_bv: &Tensor, ids: &[&[i64]]) -> Vec<f64> {
    let (b, longest) = (ids.len() as i64, ids.iter().map(|ids| ids.len()).max().unwrap_or(1));
    let padded = ids.iter().flat_map(|ids| ids.iter().copied().chain(std::iter::repeat_n(0, longest - ids.len())));
    let counted = ids.iter().flat_map(|ids| (0..longest).map(|i| i < ids.len()));
    let on_device = |tensor: Tensor| tensor.view([b, longest as i64]).to_device(model.device());
    let ids_bs = on_device(Tensor::from_slice(&padded.collect::<Vec<i64>>()));
    let counted_bs = on_device(Tensor::from_slice(&counted.collect::<Vec<bool>>()));
    let mut each_bs = first_bv.gather(1, &ids_bs.narrow(1, 0, 1), false);
    let s = longest as i64 - 1;
    if s > 0 {
        let attended = state.attended(model, s);
        let x_bse = model.hidden(&ids_bs.narrow(1, 0, s), &attended, Some(&mut state.cache));
        let log_probs_bsv = model.logits(&x_bse).log_softmax(-1, Kind::Float);
        let rest_bs = log_probs_bsv.gather(2, &ids_bs.narrow(1, 1, s).unsqueeze(-1), false).squeeze_dim(-1);
        each_bs = Tensor::cat(&[each_bs, rest_bs], 1);
    }
    let sums_b = (each_bs.to_kind(Kind::Double) * counted_bs).sum_dim_intlist([1i64].as_slice(), false, Kind::Double);
    Vec::try_from(sums_b.to_device(Device::Cpu)).expect("one sum for each row")
}
