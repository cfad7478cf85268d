//! Forward and backward pass, unit by unit: embedding, each block, head. Each unit has an autograd
//! graph of its own, so that gradients come one unit at a time, last unit first, and activations
//! can be recomputed instead of kept. A unit's weights are lent to the model ([`crate::home`])
//! while it computes, and those of the next unit are on their way meanwhile.

use anyhow::Result;
use tch::{Kind, Tensor, no_grad};

use super::lora;
use crate::data::Batch;
use crate::ffi::grad;
use crate::home::{Asked, Home, Lent, Parked};
use crate::loss::{self, HeadLoss};
use crate::model::{Attended, CausalLM};
use crate::weights::Parameters;

/// Settings that trade work for memory.
#[derive(Debug, Clone, Copy)]
pub struct PassConfig {
    /// Keeps only the input of each block and recomputes its activations in the backward pass.
    pub checkpointing: bool,
    /// Targets per chunk of the loss: the logits of one chunk exist at a time.
    pub loss_chunk: usize,
    /// Takes a block's weights back after its forward pass, where they are lent; otherwise they
    /// stay for its backward pass.
    pub reshard_after_forward: bool,
}

/// The trainable parameters of each unit.
pub(crate) struct ParamGroups {
    /// Name and tensor of every trainable parameter, unit by unit.
    pub list: Vec<(String, Tensor)>,
    /// Indices into the list of each unit's parameters, embedding first and head last.
    pub places: Vec<Vec<usize>>,
}

impl ParamGroups {
    /// All parameters of `model`; the embedding table (and a head tied to it) only with
    /// `embeddings`. Of a model with adapters, these only.
    pub fn new(model: &CausalLM, parameters: &Parameters, embeddings: bool) -> Self {
        let (mut list, mut places) = (Vec::new(), Vec::new());
        let adapted = model.adapter_slots().any(|(_, slot)| slot.get().is_some());
        for (index, unit) in model.units.iter().enumerate() {
            let start = list.len();
            if adapted {
                list.extend(unit.iter().filter_map(|name| lora::factors(model, name)).flatten());
            } else {
                // The first unit is the embedding table.
                let trained = unit.iter().filter(|_| embeddings || index > 0);
                list.extend(trained.map(|name| (name.clone(), parameters[name].shallow_clone())));
            }
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

    /// The weight of the final norm, if it is trained; the output matrix then is too unless it is
    /// tied.
    fn final_norm(&self) -> Option<&Tensor> {
        let head = self.places.last().expect("a model has units");
        head.first().map(|&i| &self.list[i].1)
    }
}

/// A forward pass with its loss, ready for its backward pass.
pub(crate) struct Forward<'a> {
    model: &'a CausalLM,
    units: &'a ParamGroups,
    attended: Attended,
    embedded: Tensor,
    blocks: Vec<BlockPass>,
    /// Input of the head.
    last: Tensor,
    normed: Tensor,
    head: HeadLoss,
    /// Weights of the head, and those of the embedding if the output matrix is tied to it.
    _head_weights: (Lent, Option<Lent>),
}

/// A block's forward pass.
struct BlockPass {
    input: Tensor,
    /// Output with its graph, if the graph is kept.
    output: Option<Tensor>,
    /// Weights that were lent, if they or a graph that needs them are kept.
    weights: Option<Parked>,
}

impl BlockPass {
    /// Starts to bring the weights of the last of `blocks` to the device, for its backward pass.
    fn ask_last(blocks: &mut [Self], home: &Home) -> Result<Option<(Asked, Option<Tensor>)>> {
        let unit = blocks.len();
        let Some(block) = blocks.last_mut() else { return Ok(None) };
        let asked = block.weights.take().map_or_else(|| home.ask(unit), Parked::ask)?;
        Ok(Some((asked, block.output.take())))
    }
}

impl<'a> Forward<'a> {
    /// Runs `batch` forward; the gradients will be those of `scale` · the summed loss.
    ///
    /// # Errors
    /// A failed collective.
    pub fn run(
        model: &'a CausalLM,
        units: &'a ParamGroups,
        batch: &Batch,
        scale: f64,
        config: PassConfig,
    ) -> Result<Self> {
        let (home, tied) = (&model.home, model.config.tie_word_embeddings);
        let attended = model.documents(&batch.lengths);
        let table = home.ask(0)?.lend()?;
        let mut next = home.ask(1)?;
        let embedded = model.embed(&batch.ids_bs);
        let table = tied.then_some(table);
        let mut x_bse = embedded.detach();
        let mut blocks = Vec::new();
        for (layer, block) in model.blocks.iter().enumerate() {
            let weights = next.lend()?;
            next = home.ask(layer + 2)?;
            // Without a trained embedding, the first block's input needs no gradient.
            let input = x_bse.set_requires_grad(layer > 0 || units.embedding());
            let (output, weights) = if config.checkpointing {
                x_bse = no_grad(|| block.forward(&input, &attended, None));
                (None, (!config.reshard_after_forward).then(|| weights.keep()))
            } else {
                let output = block.forward(&input, &attended, None);
                x_bse = output.detach();
                let weights = if config.reshard_after_forward { weights.park()? } else { weights.keep() };
                (Some(output), Some(weights))
            };
            blocks.push(BlockPass { input, output, weights });
        }
        let weights = next.lend()?;
        let last = x_bse.set_requires_grad(true);
        let normed = model.final_norm(&last.squeeze_dim(0).index_select(0, &batch.places_n));
        let train_matrix = if tied { units.embedding() } else { units.final_norm().is_some() };
        let head = loss::backward(model, &normed.detach(), &batch.labels_n, scale, config.loss_chunk, train_matrix);
        Ok(Self { model, units, attended, embedded, blocks, last, normed, head, _head_weights: (weights, table) })
    }

    /// Loss summed over the targets, not scaled: one f64 element.
    pub fn loss(&self) -> &Tensor {
        &self.head.sum
    }

    /// Passes the gradients of each unit to `sink`, last unit first, with the unit's index, in the
    /// order of its trainable parameters; the unit's activations are freed before.
    ///
    /// # Errors
    /// Errors of `sink` and of libtorch; a failed collective.
    pub fn backward(self, mut sink: impl FnMut(usize, Vec<Tensor>) -> Result<()>) -> Result<()> {
        let Self { model, units, attended, embedded, mut blocks, last, normed, head, _head_weights } = self;
        let head_unit = units.places.len() - 1;
        let mut tied = None;
        let mut x_grad = {
            // The graph of the final norm; the matrix has its gradient already.
            let inputs: Vec<&Tensor> = units.final_norm().into_iter().chain([&last]).collect();
            let mut grads = grad(&normed, Some(&head.grad_hidden), &inputs)?;
            let x_grad = grads.pop().expect("the input's gradient is last");
            if model.config.tie_word_embeddings {
                tied = head.grad_matrix;
            } else {
                grads.extend(head.grad_matrix);
            }
            drop((normed, last, head.grad_hidden, _head_weights));
            sink(head_unit, grads)?;
            x_grad
        };
        let mut next = BlockPass::ask_last(&mut blocks, &model.home)?;
        while let Some(BlockPass { input, .. }) = blocks.pop() {
            let layer = blocks.len();
            let (asked, kept) = next.take().expect("asked for before");
            let weights = asked.lend()?;
            next = BlockPass::ask_last(&mut blocks, &model.home)?;
            let output = kept.unwrap_or_else(|| model.blocks[layer].forward(&input, &attended, None));
            let mut inputs = units.tensors(layer + 1);
            if input.requires_grad() {
                inputs.push(&input);
            }
            let mut grads = grad(&output, Some(&x_grad), &inputs)?;
            if input.requires_grad() {
                x_grad = grads.pop().expect("the input's gradient is last");
            }
            drop((output, input, weights));
            sink(layer + 1, grads)?;
        }
        if units.embedding() {
            // Only the shape of the table counts here.
            let mut grads = grad(&embedded, Some(&x_grad), &units.tensors(0))?;
            if let Some(matrix) = tied {
                grads[0] = no_grad(|| matrix + &grads[0].to_kind(Kind::Float));
            }
            sink(0, grads)?;
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
    let forward = Forward::run(model, &units, batch, scale, config)?;
    let loss = forward.loss().double_value(&[]) * scale;
    let mut all = Parameters::new();
    forward.backward(|unit, grads| {
        all.extend(units.places[unit].iter().map(|&i| units.list[i].0.clone()).zip(grads));
        Ok(())
    })?;
    Ok((loss, all))
}
