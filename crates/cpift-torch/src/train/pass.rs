//! Forward and backward pass, unit by unit: embedding, each block, head. Each unit has an autograd
//! graph of its own, so that gradients come one unit at a time, last unit first, and activations
//! can be recomputed instead of kept.

use anyhow::Result;
use tch::{Kind, Tensor, no_grad};

use crate::data::Batch;
use crate::ffi::grad;
use crate::loss::{self, HeadLoss};
use crate::model::{Attended, CausalLM, EMBEDDING};
use crate::weights::Parameters;

/// Settings that trade work for memory.
#[derive(Debug, Clone, Copy)]
pub struct PassConfig {
    /// Keeps only the input of each block and recomputes its activations in the backward pass.
    pub checkpointing: bool,
    /// Targets per chunk of the loss: the logits of one chunk exist at a time.
    pub loss_chunk: usize,
}

/// The trainable parameters of each unit.
pub(crate) struct ParamGroups {
    /// Name and tensor of every trainable parameter, unit by unit.
    pub list: Vec<(String, Tensor)>,
    /// Indices into the list of each unit's parameters, embedding first and head last.
    places: Vec<Vec<usize>>,
}

impl ParamGroups {
    /// All parameters of `model`; the embedding table (and a head tied to it) only with
    /// `embeddings`.
    pub fn new(model: &CausalLM, parameters: &Parameters, embeddings: bool) -> Self {
        let (mut list, mut places) = (Vec::new(), Vec::new());
        for unit in &model.units {
            let start = list.len();
            let trained = unit.iter().filter(|name| embeddings || *name != EMBEDDING);
            list.extend(trained.map(|name| (name.clone(), parameters[name].shallow_clone())));
            places.push((start..list.len()).collect());
        }
        Self { list, places }
    }

    /// An empty set of parameters.
    pub fn none() -> Self {
        Self { list: Vec::new(), places: Vec::new() }
    }

    fn tensors(&self, unit: usize) -> Vec<&Tensor> {
        self.places[unit].iter().map(|&i| &self.list[i].1).collect()
    }

    /// Returns true if the embedding table is trained.
    fn embedding(&self) -> bool {
        !self.places[0].is_empty()
    }
}

/// A forward pass with its loss, ready for its backward pass.
pub(crate) struct Forward<'a> {
    model: &'a CausalLM,
    units: &'a ParamGroups,
    attended: Attended,
    embedded: Tensor,
    /// Input of each block, and its output with the graph if that is kept.
    blocks: Vec<(Tensor, Option<Tensor>)>,
    /// Input of the head.
    last: Tensor,
    normed: Tensor,
    head: HeadLoss,
}

impl<'a> Forward<'a> {
    /// Runs `batch` forward; the gradients will be those of `scale` · the summed loss.
    pub fn run(model: &'a CausalLM, units: &'a ParamGroups, batch: &Batch, scale: f64, config: PassConfig) -> Self {
        let attended = model.documents(&batch.lengths);
        let embedded = model.embed(&batch.ids_bs);
        let mut x_bse = embedded.detach();
        let mut blocks = Vec::new();
        for (layer, block) in model.blocks.iter().enumerate() {
            // Without a trained embedding, the first block's input needs no gradient.
            let input = x_bse.set_requires_grad(layer > 0 || units.embedding());
            if config.checkpointing {
                x_bse = no_grad(|| block.forward(&input, &attended, None));
                blocks.push((input, None));
            } else {
                let output = block.forward(&input, &attended, None);
                x_bse = output.detach();
                blocks.push((input, Some(output)));
            }
        }
        let last = x_bse.set_requires_grad(true);
        let normed = model.final_norm(&last.squeeze_dim(0).index_select(0, &batch.places_n));
        let train_matrix = if model.config.tie_word_embeddings { units.embedding() } else { true };
        let head = loss::backward(model, &normed.detach(), &batch.labels_n, scale, config.loss_chunk, train_matrix);
        Self { model, units, attended, embedded, blocks, last, normed, head }
    }

    /// Loss summed over the targets, not scaled: one f64 element.
    pub fn loss(&self) -> &Tensor {
        &self.head.sum
    }

    /// Passes the gradients of each unit to `sink`, last unit first, with their indices in the list
    /// of trainable parameters; the unit's activations are freed before.
    ///
    /// # Errors
    /// Errors of `sink` and of libtorch.
    pub fn backward(self, mut sink: impl FnMut(&[usize], Vec<Tensor>) -> Result<()>) -> Result<()> {
        let Self { model, units, attended, embedded, mut blocks, last, normed, head } = self;
        let head_unit = units.places.len() - 1;
        let mut tied = None;
        let mut x_grad = {
            // The graph of the final norm; the matrix has its gradient already.
            let norm = units.list[units.places[head_unit][0]].1.shallow_clone();
            let mut grads = grad(&normed, Some(&head.grad_hidden), &[&norm, &last])?;
            let x_grad = grads.pop().expect("two inputs, two gradients");
            if model.config.tie_word_embeddings {
                tied = head.grad_matrix;
            } else {
                grads.extend(head.grad_matrix);
            }
            drop((normed, last, head.grad_hidden));
            sink(&units.places[head_unit], grads)?;
            x_grad
        };
        while let Some((input, kept)) = blocks.pop() {
            let layer = blocks.len();
            let output = kept.unwrap_or_else(|| model.blocks[layer].forward(&input, &attended, None));
            let mut inputs = units.tensors(layer + 1);
            if input.requires_grad() {
                inputs.push(&input);
            }
            let mut grads = grad(&output, Some(&x_grad), &inputs)?;
            if input.requires_grad() {
                x_grad = grads.pop().expect("the input's gradient is last");
            }
            drop((output, input));
            sink(&units.places[layer + 1], grads)?;
        }
        if units.embedding() {
            let mut grads = grad(&embedded, Some(&x_grad), &units.tensors(0))?;
            if let Some(matrix) = tied {
                grads[0] = no_grad(|| matrix + &grads[0].to_kind(Kind::Float));
            }
            sink(&units.places[0], grads)?;
        }
        Ok(())
    }
}

/// Mean loss of `batch` over its targets, in nats, and its gradients by every parameter.
///
/// # Errors
/// An error of libtorch.
pub fn loss_and_gradients(
    model: &CausalLM,
    parameters: &Parameters,
    batch: &Batch,
    config: PassConfig,
) -> Result<(f64, Parameters)> {
    let units = ParamGroups::new(model, parameters, true);
    let scale = 1.0 / batch.targets() as f64;
    let forward = Forward::run(model, &units, batch, scale, config);
    let loss = forward.loss().double_value(&[]) * scale;
    let mut all = Parameters::new();
    forward.backward(|places, grads| {
        all.extend(places.iter().map(|&i| units.list[i].0.clone()).zip(grads));
        Ok(())
    })?;
    Ok((loss, all))
}
