//! Scoring of given text: negative log-likelihood of targets, and of alternative continuations of a
//! prompt.

use anyhow::Result;
use cpift_data::Example;
use tch::{Device, Kind, Tensor, no_grad};

use crate::data::Batch;
use crate::dist::in_batches;
use crate::loss::{target_divergences, target_losses};
use crate::model::{CachedRows, CausalLM};

/// Targets per chunk of the loss: the logits of one chunk exist at a time.
const LOSS_CHUNK: usize = 1024;

/// Summed loss and number of targets of an example.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExampleLoss {
    /// Sum of the negative log-likelihoods, in nats.
    pub nll: f64,
    /// Number of target tokens.
    pub targets: usize,
}

/// The loss of every example, in order. Batches consist of examples of similar length, the longest
/// first; ranks share them.
///
/// # Errors
/// A failed rank.
pub fn losses(
    model: &CausalLM,
    examples: &[Example],
    batch_size: usize,
    tick: impl FnMut(),
) -> Result<Vec<ExampleLoss>> {
    let order = longest_first(examples.iter().map(|example| example.ids.len()));
    let each = |chunk: &[usize]| {
        let rows: Vec<&Example> = chunk.iter().map(|&i| &examples[i]).collect();
        let batch = Batch::new(&rows).to_device(model.device());
        // As bits: JSON has no infinity.
        Ok(no_grad(|| document_losses(model, &batch)).into_iter().map(f64::to_bits).collect())
    };
    let mut out = vec![ExampleLoss { nll: 0.0, targets: 0 }; examples.len()];
    for (i, nll) in in_batches(model.row_sharers.as_ref(), model.device(), &order, batch_size, each, tick)? {
        let targets = examples[i].target.iter().filter(|t| **t).count();
        out[i] = ExampleLoss { nll: f64::from_bits(nll), targets };
    }
    Ok(out)
}

/// Indices by descending length: a batch that does not fit in memory fails at once.
fn longest_first(lengths: impl Iterator<Item = usize>) -> Vec<usize> {
    let lengths: Vec<usize> = lengths.collect();
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(lengths[i]), i));
    order
}

/// Summed negative log-likelihood of each example of a batch.
fn document_losses(model: &CausalLM, batch: &Batch) -> Vec<f64> {
    let normed = target_states(model, batch);
    let _head = model.lend_head();
    let each = target_losses(model, &normed, &batch.labels_n, LOSS_CHUNK).to_kind(Kind::Double);
    Vec::try_from(sum_by_document(batch, &each).to_device(Device::Cpu)).expect("a one-dimensional tensor of doubles")
}

/// The normed hidden states that predict the targets [n, e].
fn target_states(model: &CausalLM, batch: &Batch) -> Tensor {
    let x_bse = model.hidden(&batch.ids_bs, &model.documents(&batch.lengths), None);
    let _head = model.lend_head();
    model.final_norm(&x_bse.squeeze_dim(0).index_select(0, &batch.places_n))
}

/// Sums of a value of each target, by example.
fn sum_by_document(batch: &Batch, each: &Tensor) -> Tensor {
    // Index of the example that each target belongs to.
    let ends: Vec<i64> = batch.lengths.iter().scan(0, |end, n| Some((*end += n, *end).1)).collect();
    let owner = batch.places_n.bucketize(&Tensor::from_slice(&ends).to_device(each.device()), false, true);
    Tensor::zeros([batch.lengths.len() as i64], (Kind::Double, each.device())).index_add(0, &owner, each)
}

/// For every example, in order, the Kullback-Leibler divergence KL(`reference` || `model`) of the
/// predictions of its target tokens: the mean over the targets, in nats.
///
/// # Errors
/// A failed rank.
pub fn divergences(
    reference: &CausalLM,
    model: &CausalLM,
    examples: &[Example],
    batch_size: usize,
    tick: impl FnMut(),
) -> Result<Vec<f64>> {
    let order = longest_first(examples.iter().map(|example| example.ids.len()));
    let each = |chunk: &[usize]| {
        let rows: Vec<&Example> = chunk.iter().map(|&i| &examples[i]).collect();
        let batch = Batch::new(&rows).to_device(model.device());
        // As bits: JSON has no infinity.
        Ok(no_grad(|| document_divergences(reference, model, &batch)).into_iter().map(f64::to_bits).collect())
    };
    let mut out = vec![0.0; examples.len()];
    for (i, bits) in in_batches(model.row_sharers.as_ref(), model.device(), &order, batch_size, each, tick)? {
        out[i] = f64::from_bits(bits);
    }
    Ok(out)
}

/// The divergence of each example of a batch.
fn document_divergences(reference: &CausalLM, model: &CausalLM, batch: &Batch) -> Vec<f64> {
    let [from, to] = [reference, model].map(|model| target_states(model, batch));
    let each = target_divergences((reference, &from), (model, &to), LOSS_CHUNK).to_kind(Kind::Double);
    let sums = sum_by_document(batch, &each);
    let counts = sum_by_document(batch, &each.ones_like());
    Vec::try_from((sums / counts).to_device(Device::Cpu)).expect("a one-dimensional tensor of doubles")
}

/// A context and its alternative continuations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alternatives {
    /// Token ids before each continuation.
    pub context: Vec<i64>,
    /// Token ids of each continuation, at least one.
    pub continuations: Vec<Vec<i64>>,
}

/// Log-likelihood of each continuation given its context, in nats. A context runs through the model
/// once for all its continuations. Batches consist of contexts of similar length; `tick` is called
/// for each context done.
///
/// # Errors
/// A context or a continuation is empty.
pub fn alternatives(
    model: &CausalLM,
    items: &[Alternatives],
    batch_size: usize,
    tick: impl FnMut(),
) -> Result<Vec<Vec<f64>>> {
    let whole = |item: &Alternatives| !item.context.is_empty() && item.continuations.iter().all(|c| !c.is_empty());
    anyhow::ensure!(items.iter().all(whole), "a context or continuation without tokens cannot be scored");
    let order = longest_first(items.iter().map(|item| item.context.len()));
    let each = |chunk: &[usize]| {
        let batch: Vec<&Alternatives> = chunk.iter().map(|&i| &items[i]).collect();
        let bits = |scores: Vec<f64>| scores.into_iter().map(f64::to_bits).collect::<Vec<u64>>();
        Ok(no_grad(|| batch_alternatives(model, &batch)).into_iter().map(bits).collect())
    };
    let mut out = vec![Vec::new(); items.len()];
    for (i, scores) in in_batches(model.row_sharers.as_ref(), model.device(), &order, batch_size, each, tick)? {
        out[i] = scores.into_iter().map(f64::from_bits).collect();
    }
    Ok(out)
}

/// Scores the first continuation of every context, then the second, and so on, over one cache.
fn batch_alternatives(model: &CausalLM, batch: &[&Alternatives]) -> Vec<Vec<f64>> {
    let contexts: Vec<&[i64]> = batch.iter().map(|item| item.context.as_slice()).collect();
    let longest = batch.iter().flat_map(|item| &item.continuations).map(Vec::len).max().unwrap_or(1);
    let (mut state, last_b1e) = CachedRows::new(model, &contexts, longest as i64 - 1);
    let context_length = state.cache.length();
    let first_bv = model.logits(&last_b1e).squeeze_dim(1).log_softmax(-1, Kind::Float);
    let most = batch.iter().map(|item| item.continuations.len()).max().unwrap_or(0);
    let mut out = vec![Vec::new(); batch.len()];
    for index in 0..most {
        // A row without such a continuation runs with one token that is not counted.
        let ids: Vec<&[i64]> =
            batch.iter().map(|item| item.continuations.get(index).map_or(&[0][..], Vec::as_slice)).collect();
        state.cache.truncate(context_length);
        let scores = continuation_scores(model, &mut state, &first_bv, &ids);
        for ((item, out), score) in batch.iter().zip(&mut out).zip(scores) {
            if index < item.continuations.len() {
                out.push(score);
            }
        }
    }
    out
}

/// Summed log-likelihoods of one continuation per row; `first_bv` are the log-probabilities after
/// the contexts.
fn continuation_scores(model: &CausalLM, state: &mut CachedRows, first_bv: &Tensor, ids: &[&[i64]]) -> Vec<f64> {
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
        // Positions of all rows as one list, so that chunks of it have logits at a time.
        let normed_ne = model.final_norm(&x_bse).flatten(0, 1);
        let rest_n = -target_losses(model, &normed_ne, &ids_bs.narrow(1, 1, s).flatten(0, 1), LOSS_CHUNK);
        each_bs = Tensor::cat(&[each_bs, rest_n.view([b, s])], 1);
    }
    let sums_b = (each_bs.to_kind(Kind::Double) * counted_bs).sum_dim_intlist([1i64].as_slice(), false, Kind::Double);
    Vec::try_from(sums_b.to_device(Device::Cpu)).expect("one sum for each row")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::{Precision, Session};

    #[test]
    fn the_longest_go_first_and_equal_ones_in_order() {
        assert_eq!(longest_first([3, 9, 3, 12].into_iter()), [3, 1, 0, 2]);
    }

    #[test]
    fn more_positions_than_have_logits_at_a_time_score_as_one_context_alone() {
        let dir = tempfile::tempdir().unwrap();
        let folder = cpift_testkit::model::write_tiny_model(dir.path(), 7);
        let model = Session::open(&folder, None, Device::Cpu, Precision::F32).unwrap().model;
        // 24 rows of up to 99 positions after the first token.
        let text = |i: i64, n: i64| -> Vec<i64> { (0..n).map(|j| (17 * i + 5 * j * j) % 250).collect() };
        let items: Vec<Alternatives> =
            (0..24).map(|i| Alternatives { context: text(i, 20), continuations: vec![text(i + 9, 100 - i)] }).collect();
        const { assert!(24 * 99 > 2 * LOSS_CHUNK) };
        let all = alternatives(&model, &items, 24, || ()).unwrap();
        for (item, found) in items.iter().zip(all) {
            let ids: Vec<i64> = item.context.iter().chain(&item.continuations[0]).copied().collect();
            let target = (0..ids.len()).map(|i| i >= item.context.len()).collect();
            let alone = losses(&model, &[Example { ids, target, ..Example::default() }], 1, || ()).unwrap()[0].nll;
            // Sums of up to a hundred log-likelihoods in f32.
            assert!((found[0] + alone).abs() < 1e-6 * alone, "{found:?} {alone}");
        }
    }

    #[test]
    fn divergences_are_those_of_the_definition_in_f64() {
        let dir = tempfile::tempdir().unwrap();
        let open = |seed: u64| {
            let folder = cpift_testkit::model::write_tiny_model(&dir.path().join(seed.to_string()), seed);
            Session::open(&folder, None, Device::Cpu, Precision::F32).unwrap().model
        };
        let (reference, model) = (open(3), open(4));
        let example = |i: i64| Example {
            ids: (0..30 + i).map(|j| (17 * i + 5 * j * j) % 250).collect(),
            target: (0..30 + i).map(|j| j % 3 == i % 3).collect(),
            ..Example::default()
        };
        let examples: Vec<Example> = (0..5).map(example).collect();
        let found = divergences(&reference, &model, &examples, 2, || ()).unwrap();
        for (example, found) in examples.iter().zip(found) {
            let log_probs = |model: &CausalLM| {
                let ids = Tensor::from_slice(&example.ids).unsqueeze(0);
                let hidden = model.hidden(&ids, &model.documents(&[ids.size()[1]]), None);
                let logits = no_grad(|| model.logits(&hidden)).squeeze_dim(0).to_kind(Kind::Double);
                logits.log_softmax(-1, Kind::Double)
            };
            let (p, q) = (log_probs(&reference), log_probs(&model));
            let each = (p.exp() * (&p - q)).sum_dim_intlist(-1, false, Kind::Double);
            let each: Vec<f64> = Vec::try_from(each).unwrap();
            let targets: Vec<f64> =
                (1..example.ids.len()).filter(|&i| example.target[i]).map(|i| each[i - 1]).collect();
            let expected = targets.iter().sum::<f64>() / targets.len() as f64;
            assert!((found - expected).abs() < 1e-5 * expected.max(1.0), "{found} {expected}");
        }
    }
}
