//! One optimizer step: gradients of one or more batches, frozen elements muted, the norm kept, the update, frozen elements put back.

use anyhow::Result;
use tch::{Kind, Tensor, no_grad};

use super::lora::{Adapters, LoraConfig};
use super::pass::{Forward, ParamGroups, PassConfig};
use crate::data::Batch;
use crate::freeze::Freeze;
use crate::model::CausalLM;
use crate::optim::{AdamW, AdamWConfig, Guard, Update};
use crate::weights::Parameters;

/// How steps are made.
#[derive(Debug, Clone, Copy)]
pub struct StepConfig {
    /// The optimizer's numbers.
    pub optimizer: AdamWConfig,
    /// The global gradient norm to keep within; 0: none.
    pub max_grad_norm: f64,
    /// Recomputation and the cutting of the loss.
    pub pass: PassConfig,
    /// Update each unit as soon as its gradients are there.
    pub optimizer_in_backward: bool,
    /// Whether the embedding table is trained.
    pub train_embeddings: bool,
    /// Train low-rank adapters of the linear layers, and nothing else; with all gradients kept.
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

/// A model in training: its parameters, the optimizer's state, what is frozen.
pub struct Trainer<'a> {
    model: &'a CausalLM,
    units: ParamGroups,
    /// What must not move now.
    pub freeze: Option<Freeze>,
    adapters: Option<Adapters>,
    /// The optimizer's state.
    pub optimizer: AdamW,
    config: StepConfig,
    guard: Guard,
}

/// What one step did, still on the device: reading it waits for the step.
pub struct StepOutcome {
    /// Mean loss in nats over the step's target tokens, before the update; one f64 element.
    loss: Tensor,
    /// Global gradient norm before clipping, frozen elements not counted.
    grad_norm: Tensor,
}

impl StepOutcome {
    /// Loss and gradient norm.
    pub fn read(&self) -> (f64, f64) {
        (self.loss.double_value(&[]), self.grad_norm.double_value(&[]))
    }
}

impl<'a> Trainer<'a> {
    /// A trainer with a fresh optimizer state.
    pub fn new(model: &'a CausalLM, parameters: &'a Parameters, freeze: Option<Freeze>, config: StepConfig) -> Self {
        let units = ParamGroups::new(model, parameters, config.train_embeddings);
        let adapters = config.lora.map(|lora| Adapters::new(&units, lora));
        let adapted = adapters.as_ref().map(Adapters::tensors);
        let trained = adapted.as_ref().unwrap_or(&units.list);
        let optimizer = AdamW::new(trained.iter().map(|(name, tensor)| (name, tensor)), config.optimizer);
        Self { model, units, freeze, adapters, optimizer, config, guard: Guard::new(model.device()) }
    }

    /// Where it trains.
    pub(crate) fn device(&self) -> tch::Device {
        self.model.device()
    }

    /// The parameters that get gradients.
    pub(crate) fn trainable(&self) -> &[(String, Tensor)] {
        &self.units.list
    }

    /// The low-rank adapters by name; they share storage with those in training.
    pub(crate) fn adapters(&self) -> Parameters {
        self.adapters.iter().flat_map(Adapters::tensors).collect()
    }

    /// What a saved state holds for `parameters`.
    pub(crate) fn stored(&self, parameters: &Parameters) -> Parameters {
        match &self.adapters {
            Some(adapters) => adapters.without(parameters),
            None => parameters.iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect(),
        }
    }

    /// Says that adapters were restored from a saved state.
    pub(crate) fn merge(&self) {
        if let Some(adapters) = &self.adapters {
            adapters.merge();
        }
    }

    /// Gradients of `batch` by every trainable parameter, by name; nothing moves.
    ///
    /// # Errors
    /// What libtorch reports.
    pub(crate) fn gradients(&self, batch: &Batch) -> Result<Vec<(&str, Tensor)>> {
        let scale = 1.0 / batch.targets() as f64;
        let mut all = Vec::new();
        Forward::run(self.model, &self.units, batch, scale, self.config.pass).backward(|places, grads| {
            all.extend(places.iter().map(|&i| self.units.list[i].0.as_str()).zip(grads));
            Ok(())
        })?;
        Ok(all)
    }

    /// One optimizer step over `batches`, whose gradients are those of one big batch. From the first loss or norm that is not
    /// finite on, nothing moves any more; the caller learns of it when it reads the outcome. `seed` is that of the step's
    /// stochastic rounding.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn step(&mut self, batches: &[Batch], lr: f64, seed: u64) -> Result<StepOutcome> {
        let targets: usize = batches.iter().map(Batch::targets).sum();
        let scale = 1.0 / targets as f64;
        if self.config.optimizer_in_backward {
            assert_eq!(batches.len(), 1, "an update in the backward pass is that of a single batch");
            return self.step_in_backward(&batches[0], scale, lr, seed);
        }
        let mut loss = Tensor::zeros([], (Kind::Double, self.model.device()));
        let mut sums: Vec<Option<Tensor>> = self.units.list.iter().map(|_| None).collect();
        for batch in batches {
            let forward = Forward::run(self.model, &self.units, batch, scale, self.config.pass);
            loss += forward.loss() * scale;
            forward.backward(|places, grads| {
                for (&i, fresh) in places.iter().zip(grads) {
                    match &mut sums[i] {
                        Some(sum) => drop(sum.g_add_(&fresh)),
                        // Sums over batches are f32 whatever the dtype of the weights.
                        empty if batches.len() > 1 => *empty = Some(fresh.to_kind(Kind::Float)),
                        empty => *empty = Some(fresh),
                    }
                }
                Ok(())
            })?;
        }
        let mut grads: Vec<Tensor> = sums.into_iter().map(|g| g.expect("every unit has given its gradients")).collect();
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
        self.update(&all, &grads, lr, seed)?;
        Ok(StepOutcome { loss, grad_norm })
    }

    fn step_in_backward(&mut self, batch: &Batch, scale: f64, lr: f64, seed: u64) -> Result<StepOutcome> {
        // The units are lent to the pass while the sink updates the rest of self.
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
            self.restore(places.iter().map(|&i| &units.list[i]));
            Ok(())
        });
        self.units = units;
        done?;
        Ok(StepOutcome { loss, grad_norm: Tensor::stack(&norms, 0).norm() })
    }

    fn update(&mut self, places: &[usize], grads: &[Tensor], lr: f64, seed: u64) -> Result<()> {
        self.optimizer.step(places, grads, Update { lr, seed, guard: &self.guard })?;
        if self.adapters.is_some() {
            self.merge();
            return Ok(());
        }
        self.restore(places.iter().map(|&i| &self.units.list[i]));
        Ok(())
    }

    fn zero_frozen_grads(&self, name: &str, grad: &mut Tensor) {
        if let Some(freeze) = &self.freeze {
            freeze.zero_frozen_grads(name, grad);
        }
    }

    fn restore<'b>(&self, parameters: impl Iterator<Item = &'b (String, Tensor)>) {
        if let Some(freeze) = &self.freeze {
            no_grad(|| parameters.for_each(|(name, tensor)| freeze.restore(name, tensor)));
        }
    }
}
