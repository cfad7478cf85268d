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
use crate::model::{Attended, CausalLM, Routed};
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

/// Factors of the two sums that are the loss of a batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Factors {
    /// Of the cross entropy summed over the targets.
    pub targets: f64,
    /// Of the load-balancing loss of the routers; 0 leaves it out.
    pub balance: f64,
}

impl Factors {
    /// The mean over `targets` targets, without the load-balancing loss.
    pub fn mean(targets: usize) -> Self {
        Self { targets: 1.0 / targets as f64, balance: 0.0 }
    }

    /// The same with the load-balancing loss as the model's configuration asks for it, as a mean
    /// over `batches` batches.
    pub fn with_balance(self, model: &CausalLM, batches: usize) -> Self {
        let coef = model.config.experts.as_ref().map_or(0.0, |experts| experts.aux_loss_coef);
        Self { balance: coef / batches as f64, ..self }
    }
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
    loss: Tensor,
    /// Gradient of the loss by the sums of the routers' probabilities of each block.
    balance_grad: Option<Tensor>,
    /// Weights of the head, and those of the embedding if the output matrix is tied to it.
    _head_weights: (Lent, Option<Lent>),
}

/// A block's forward pass.
struct BlockPass {
    input: Tensor,
    /// Output with its graph, if the graph is kept.
    output: Option<Output>,
    /// Weights that were lent, if they or a graph that needs them are kept.
    weights: Option<Parked>,
}

/// Output of a block with its graph.
struct Output {
    hidden: Tensor,
    /// Sums of the router's probabilities, if the load-balancing loss is added.
    probability_sums: Option<Tensor>,
}

/// The load-balancing loss (Switch Transformer, [arXiv 2101.03961](https://arxiv.org/abs/2101.03961),
/// equations 4 to 6) over the tokens of all blocks together, as transformers computes it.
struct Balance {
    tokens: i64,
    /// Number of tokens of each expert, and sums of its probabilities, f64.
    counts_x: Tensor,
    sums_x: Tensor,
}

impl Balance {
    fn new(model: &CausalLM) -> Option<Self> {
        let experts = model.config.experts.as_ref()?;
        let zeros = || Tensor::zeros([experts.count], (Kind::Double, model.device()));
        Some(Self { tokens: 0, counts_x: zeros(), sums_x: zeros() })
    }

    fn add(&mut self, routed: &Routed, sums_x: &Tensor) {
        self.tokens += routed.tokens();
        self.counts_x += &routed.counts_x;
        self.sums_x += sums_x.detach();
    }

    /// x · Σ (share of the tokens · mean probability), and its gradient by each sum of
    /// probabilities, both times `factor`.
    fn loss(&self, factor: f64) -> (Tensor, Tensor) {
        let tokens = self.tokens as f64;
        let slope_x = &self.counts_x * (factor * self.counts_x.numel() as f64 / (tokens * tokens));
        ((&slope_x * &self.sums_x).sum(Kind::Double), slope_x.to_kind(Kind::Float))
    }
}

impl BlockPass {
    /// Starts to bring the weights of the last of `blocks` to the device, for its backward pass.
    fn ask_last(blocks: &mut [Self], home: &Home) -> Result<Option<(Asked, Option<Output>)>> {
        let unit = blocks.len();
        let Some(block) = blocks.last_mut() else { return Ok(None) };
        let asked = block.weights.take().map_or_else(|| home.ask(unit), Parked::ask)?;
        Ok(Some((asked, block.output.take())))
    }
}

impl<'a> Forward<'a> {
    /// Runs `batch` forward; `factors` say what the loss is whose gradients are computed.
    ///
    /// # Errors
    /// A failed collective.
    pub fn run(
        model: &'a CausalLM,
        units: &'a ParamGroups,
        batch: &Batch,
        factors: Factors,
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
        let mut balance = Balance::new(model).filter(|_| factors.balance > 0.0);
        for (layer, block) in model.blocks.iter().enumerate() {
            let weights = next.lend()?;
            next = home.ask(layer + 2)?;
            let mut run = |input: &Tensor| {
                let (hidden, routed) = block.forward_routed(input, &attended, None);
                let probability_sums = balance.as_mut().zip(routed).map(|(balance, routed)| {
                    let sums = routed.probability_sums();
                    no_grad(|| balance.add(&routed, &sums));
                    sums
                });
                Output { hidden, probability_sums }
            };
            // Without a trained embedding, the first block's input needs no gradient.
            let input = x_bse.set_requires_grad(layer > 0 || units.embedding());
            let (output, weights) = if config.checkpointing {
                x_bse = no_grad(|| run(&input)).hidden;
                (None, (!config.reshard_after_forward).then(|| weights.keep()))
            } else {
                let output = run(&input);
                x_bse = output.hidden.detach();
                let weights = if config.reshard_after_forward { weights.park()? } else { weights.keep() };
                (Some(output), Some(weights))
            };
            blocks.push(BlockPass { input, output, weights });
        }
        let weights = next.lend()?;
        let last = x_bse.set_requires_grad(true);
        let normed = model.final_norm(&last.squeeze_dim(0).index_select(0, &batch.places_n));
        let train_matrix = if tied { units.embedding() } else { units.final_norm().is_some() };
        let chunk = config.loss_chunk;
        let head = loss::backward(model, &normed.detach(), &batch.labels_n, factors.targets, chunk, train_matrix);
        let mut loss = &head.sum * factors.targets;
        let balance_grad = balance.map(|balance| {
            let (value, by_sums) = no_grad(|| balance.loss(factors.balance));
            loss += value;
            by_sums
        });
        let _head_weights = (weights, table);
        Ok(Self { model, units, attended, embedded, blocks, last, normed, head, loss, balance_grad, _head_weights })
    }

    /// The loss: one f64 element.
    pub fn loss(&self) -> &Tensor {
        &self.loss
    }

    /// Passes the gradients of each unit to `sink`, last unit first, with the unit's index, in the
    /// order of its trainable parameters; the unit's activations are freed before.
    ///
    /// # Errors
    /// Errors of `sink` and of libtorch; a failed collective.
    pub fn backward(self, mut sink: impl FnMut(usize, Vec<Tensor>) -> Result<()>) -> Result<()> {
        let Self {
            model,
            units,
            attended,
            embedded,
            mut blocks,
            last,
            normed,
            head,
            loss: _,
            balance_grad,
            _head_weights,
        } = self;
        let head_unit = units.places.len() - 1;
        let mut tied = None;
        let mut x_grad = {
            // The graph of the final norm; the matrix has its gradient already.
            let inputs: Vec<&Tensor> = units.final_norm().into_iter().chain([&last]).collect();
            let mut grads = grad(&[(&normed, &head.grad_hidden)], &inputs)?;
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
            let output = kept.unwrap_or_else(|| {
                let (hidden, routed) = model.blocks[layer].forward_routed(&input, &attended, None);
                let probability_sums = balance_grad.as_ref().and(routed).map(|routed| routed.probability_sums());
                Output { hidden, probability_sums }
            });
            let mut inputs = units.tensors(layer + 1);
            if input.requires_grad() {
                inputs.push(&input);
            }
            let mut outputs = vec![(&output.hidden, &x_grad)];
            // Without a graph if neither the router nor anything before it is trained.
            let sums = output.probability_sums.as_ref().filter(|sums| sums.requires_grad());
            outputs.extend(sums.zip(balance_grad.as_ref()));
            // The first blocks of a model with few adapters may have none.
            let mut grads = if inputs.is_empty() { Vec::new() } else { grad(&outputs, &inputs)? };
            if input.requires_grad() {
                x_grad = grads.pop().expect("the input's gradient is last");
            }
            drop((output, input, weights));
            sink(layer + 1, grads)?;
        }
        if units.embedding() {
            // Only the shape of the table counts here.
            let mut grads = grad(&[(&embedded, &x_grad)], &units.tensors(0))?;
            if let Some(matrix) = tied {
                grads[0] = no_grad(|| matrix + &grads[0].to_kind(Kind::Float));
            }
            sink(0, grads)?;
        }
        Ok(())
    }
}

/// Mean loss of `batch` over its targets, in nats, with the load-balancing loss that config.json
/// asks for, and its gradients by every parameter.
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
    let factors = Factors::mean(batch.targets()).with_balance(model, 1);
    let forward = Forward::run(model, &units, batch, factors, config)?;
    let loss = forward.loss().double_value(&[]);
    let mut all = Parameters::new();
    forward.backward(|unit, grads| {
        all.extend(units.places[unit].iter().map(|&i| units.list[i].0.clone()).zip(grads));
        Ok(())
    })?;
    Ok((loss, all))
}
