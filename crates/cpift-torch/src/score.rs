//! Scoring given text: negative log-likelihood of targets, and of alternative continuations of one prompt.

use anyhow::Result;
use tch::{Device, Kind, Tensor, no_grad};

use crate::data::{Batch, Example};
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

/// Log-likelihoods, in nats, of each of `continuations` after `prompt`. Continuations of a single token share one pass.
///
/// # Errors
/// When a continuation is empty.
pub fn continuations(model: &CausalLM, prompt: &[i64], continuations: &[Vec<i64>]) -> Result<Vec<f64>> {
    anyhow::ensure!(continuations.iter().all(|c| !c.is_empty()), "a continuation without tokens cannot be scored");
    if continuations.iter().all(|c| c.len() == 1) {
        return Ok(no_grad(|| {
            let ids = Tensor::from_slice(prompt).unsqueeze(0).to_device(model.device());
            let s = prompt.len() as i64;
            let last = model.hidden(&ids, &model.documents(&[s]), None).narrow(1, s - 1, 1);
            let log_probs = model.logits(&last).view([-1]).log_softmax(-1, Kind::Float);
            continuations.iter().map(|c| log_probs.double_value(&[c[0]])).collect()
        }));
    }
    let examples: Vec<Example> = continuations
        .iter()
        .map(|c| Example {
            ids: prompt.iter().chain(c).copied().collect(),
            target: (0..prompt.len() + c.len()).map(|i| i >= prompt.len()).collect(),
            ..Example::default()
        })
        .collect();
    Ok(losses(model, &examples, examples.len(), || ()).iter().map(|loss| -loss.nll).collect())
}
