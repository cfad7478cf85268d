//! The optimizer step: gradients of one or more batches, zeroed at frozen elements and clipped; the
//! update; frozen elements restored.

use anyhow::Result;
use tch::{Kind, Tensor, no_grad};

use super::lora::{Adapters, LoraConfig};
use super::pass::{Forward, ParamGroups, PassConfig};
use crate::data::Batch;
use crate::freeze::Freeze;
use crate::model::CausalLM;
use crate::optim::{AdamW, AdamWConfig, Guard, Update};
use crate::weights::Parameters;

/// Settings of the steps.
#[derive(Debug, Clone, Copy)]
pub struct StepConfig {
    /// Hyperparameters of the optimizer.
    pub optimizer: AdamWConfig,
    /// Gradients are clipped to this global norm; 0 turns clipping off.
    pub max_grad_norm: f64,
    /// Recomputation, and chunks of the loss.
    pub pass: PassConfig,
    /// Updates each unit as soon as its gradients are computed.
    pub optimizer_in_backward: bool,
    /// Trains the embedding table.
    pub train_embeddings: bool,
    /// Trains only low-rank adapters of the linear layers; not with updates in the backward pass.
    pub lora: Option<LoraConfig>,
}

impl Default for StepConfig {
    fn default() -> Self {
        Self {
            optimizer: AdamWConfig::default(),
            max_grad_norm: 1.0,
            pass: PassConfig { checkpointing: false, loss_chunk: 1024 },
            optimizer_in_backward: false,
            train_embeddings: true,
            lora: None,
        }
    }
}

/// A model in training: its parameters, the optimizer, the frozen elements.
pub struct Trainer<'a> {
    model: &'a CausalLM,
    units: ParamGroups,
    /// Elements that are frozen now.
    pub freeze: Option<Freeze>,
    adapters: Option<Adapters>,
    /// The optimizer with its state.
    pub optimizer: AdamW,
    config: StepConfig,
    guard: Guard,
}

/// Loss and norm of a step, still on the device: reading them waits for the step.
pub struct StepOutcome {
    /// Mean loss in nats over the step's target tokens, before the update; one f64 element.
    loss: Tensor,
    /// Global gradient norm before clipping, frozen elements not counted.
    grad_norm: Tensor,
}

impl StepOutcome {
    /// Returns loss and gradient norm.
    pub fn read(&self) -> (f64, f64) {
        (self.loss.double_value(&[]), self.grad_norm.double_value(&[]))
    }
}

impl<'a> Trainer<'a> {
    /// A trainer with a new optimizer.
    pub fn new(model: &'a CausalLM, parameters: &'a Parameters, freeze: Option<Freeze>, config: StepConfig) -> Self {
        let units = ParamGroups::new(model, parameters, config.train_embeddings);
        let adapters = config.lora.map(|lora| Adapters::new(&units, lora));
        let adapted = adapters.as_ref().map(Adapters::tensors);
        let trained = adapted.as_ref().unwrap_or(&units.list);
        let optimizer = AdamW::new(trained.iter().map(|(name, tensor)| (name, tensor)), config.optimizer);
        Self { model, units, freeze, adapters, optimizer, config, guard: Guard::new(model.device()) }
    }

    /// Device of the model.
    pub(crate) fn device(&self) -> tch::Device {
        self.model.device()
    }

    /// The parameters that have gradients.
    pub(crate) fn trainable(&self) -> &[(String, Tensor)] {
        &self.units.list
    }

    /// The low-rank adapters by name; they share storage with those in training.
    pub(crate) fn adapters(&self) -> Parameters {
        self.adapters.iter().flat_map(Adapters::tensors).collect()
    }

    /// Tensors that a saved state stores for `parameters`.
    pub(crate) fn stored(&self, parameters: &Parameters) -> Parameters {
        match &self.adapters {
            Some(adapters) => adapters.without(parameters),
            None => parameters.iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect(),
        }
    }

    /// Merges adapters that were restored from a saved state into the weights.
    pub(crate) fn merge(&self) {
        if let Some(adapters) = &self.adapters {
            adapters.merge();
        }
    }

    /// Gradients of `batch` by every trainable parameter, by name, without an update.
    ///
    /// # Errors
    /// An error of libtorch.
    pub(crate) fn gradients(&self, batch: &Batch) -> Result<Vec<(&str, Tensor)>> {
        let scale = 1.0 / batch.targets() as f64;
        let mut all = Vec::new();
        Forward::run(self.model, &self.units, batch, scale, self.config.pass).backward(|places, grads| {
            all.extend(places.iter().map(|&i| self.units.list[i].0.as_str()).zip(grads));
            Ok(())
        })?;
        Ok(all)
    }

    /// Makes an optimizer step over `batches`, whose gradients are those of one large batch. From
    /// the first loss or norm on that is not finite, nothing is updated; the caller notices when it
    /// reads the outcome. `seed` is that of the step's stochastic rounding.
    ///
    /// # Errors
    /// An error of libtorch.
    pub fn step(&mut self, batches: &[Batch], lr: f64, seed: u64) -> Result<StepOutcome> {
        let targets: usize = batches.iter().map(Batch::targets).sum();
        let scale = 1.0 / targets as f64;
        if self.config.optimizer_in_backward {
            assert_eq!(batches.len(), 1, "an update in the backward pass is that of a single batch");
            return self.step_in_backward(&batches[0], scale, lr, seed);
        }
        let (loss, mut grads) = self.accumulate(batches, scale)?;
        for ((name, _), grad) in self.units.list.iter().zip(&mut grads) {
            self.zero_frozen_grads(name, grad);
        }
        if let Some(adapters) = &self.adapters {
            grads = adapters.gradients(&grads);
        }
        self.guard.require_finite(&loss);
        let max_norm = Some(self.config.max_grad_norm).filter(|max| *max > 0.0);
        let grad_norm = self.guard.watch(&grads, max_norm);
        let all: Vec<usize> = (0..grads.len()).collect();
        self.optimizer.step(&all, &grads, Update { lr, seed, guard: &self.guard })?;
        match &self.adapters {
            Some(adapters) => adapters.merge(),
            None => self.restore_frozen(self.units.list.iter()),
        }
        Ok(StepOutcome { loss, grad_norm })
    }

    /// Loss and gradients of `batches`, summed and scaled by `scale`. Sums over batches are f32
    /// whatever the dtype of the weights.
    fn accumulate(&self, batches: &[Batch], scale: f64) -> Result<(Tensor, Vec<Tensor>)> {
        let mut loss = Tensor::zeros([], (Kind::Double, self.model.device()));
        let mut sums: Vec<Option<Tensor>> = self.units.list.iter().map(|_| None).collect();
        for batch in batches {
            let forward = Forward::run(self.model, &self.units, batch, scale, self.config.pass);
            loss += forward.loss() * scale;
            forward.backward(|places, grads| {
                for (&i, grad) in places.iter().zip(grads) {
                    match &mut sums[i] {
                        Some(sum) => drop(sum.g_add_(&grad)),
                        empty if batches.len() > 1 => *empty = Some(grad.to_kind(Kind::Float)),
                        empty => *empty = Some(grad),
                    }
                }
                Ok(())
            })?;
        }
        let grads = sums.into_iter().map(|sum| sum.expect("the backward pass visits every unit"));
        Ok((loss, grads.collect()))
    }

    /// Makes a step that updates each unit in the backward pass, as soon as its gradients are
    /// computed.
    fn step_in_backward(&mut self, batch: &Batch, scale: f64, lr: f64, seed: u64) -> Result<StepOutcome> {
        // The pass borrows the units while the sink borrows self mutably.
        let units = std::mem::replace(&mut self.units, ParamGroups::none());
        let forward = Forward::run(self.model, &units, batch, scale, self.config.pass);
        let loss = forward.loss() * scale;
        self.guard.require_finite(&loss);
        let mut norms = Vec::new();
        let done = forward.backward(|places, mut grads| {
            for (&i, grad) in places.iter().zip(&mut grads) {
                self.zero_frozen_grads(&units.list[i].0, grad);
            }
            norms.push(self.guard.watch(&grads, None));
            self.optimizer.step(places, &grads, Update { lr, seed, guard: &self.guard })?;
            self.restore_frozen(places.iter().map(|&i| &units.list[i]));
            Ok(())
        });
        self.units = units;
        done?;
        Ok(StepOutcome { loss, grad_norm: Tensor::stack(&norms, 0).norm() })
    }

    fn zero_frozen_grads(&self, name: &str, grad: &mut Tensor) {
        if let Some(freeze) = &self.freeze {
            freeze.zero_frozen_grads(name, grad);
        }
    }

    fn restore_frozen<'b>(&self, parameters: impl Iterator<Item = &'b (String, Tensor)>) {
        if let Some(freeze) = &self.freeze {
            no_grad(|| parameters.for_each(|(name, tensor)| freeze.restore(name, tensor)));
        }
    }
}
