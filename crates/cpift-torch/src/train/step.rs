//! The optimizer step: gradients of one or more batches, zeroed at frozen elements and clipped; the
//! update; frozen elements restored.

use std::rc::Rc;

use anyhow::Result;
use tch::{Kind, Tensor, no_grad};

use super::lora;
use super::pass::{Factors, Forward, ParamGroups, PassConfig};
use crate::data::{Batch, StepShare};
use crate::dist::Group;
use crate::freeze::Freeze;
use crate::home::{GradientSums, Reduction};
use crate::model::CausalLM;
use crate::optim::{AdamW, AdamWConfig, Guard, Update, sum_of_squares};
use crate::placement::{Piece, Pieces, Placement, whole_pieces};
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
}

impl Default for StepConfig {
    fn default() -> Self {
        Self {
            optimizer: AdamWConfig::default(),
            max_grad_norm: 1.0,
            pass: PassConfig { checkpointing: false, loss_chunk: 1024, reshard_after_forward: true },
            optimizer_in_backward: false,
            train_embeddings: true,
        }
    }
}

/// A model in training: this process's pieces of its parameters, the optimizer, the frozen
/// elements.
pub struct Trainer<'a> {
    model: &'a CausalLM,
    placement: Placement,
    units: ParamGroups,
    /// Elements that are frozen now.
    pub freeze: Option<Freeze>,
    /// The optimizer with its state.
    pub optimizer: AdamW,
    /// This process's pieces of all parameters, or the adapters of a model that has some.
    pieces: Pieces,
    /// Adapters are trained, not the parameters.
    adapters: bool,
    config: StepConfig,
    guard: Guard,
}

/// Loss and norm of a step, still on the device: reading them waits for the step.
pub struct StepOutcome {
    /// Mean loss in nats over the step's target tokens, before the update; one f64 element.
    loss: Tensor,
    /// Global gradient norm before clipping, frozen elements not counted.
    grad_norm: Tensor,
    /// Number of ranks that were asked to stop before the step.
    stops: Tensor,
}

impl StepOutcome {
    /// Returns loss and gradient norm.
    pub fn read(&self) -> (f64, f64) {
        (self.loss.double_value(&[]), self.grad_norm.double_value(&[]))
    }

    /// Returns true if a rank was asked to stop before the step. All ranks read the same.
    pub(crate) fn stop_asked(&self) -> bool {
        self.stops.double_value(&[]) > 0.0
    }
}

/// Work of a step on this process: its micro-batches, and what all ranks together have.
pub struct StepInput<'a> {
    /// This process's micro-batches.
    pub batches: &'a [Batch],
    /// Target tokens of all micro-batches of all ranks.
    pub targets: usize,
    /// Number of micro-batches of all ranks.
    pub micro_batches: usize,
    /// This process was asked to stop.
    pub stop: bool,
}

impl<'a> StepInput<'a> {
    /// The work of `share`, whose micro-batches are `batches`.
    pub(crate) fn of(share: &StepShare, batches: &'a [Batch], stop: bool) -> Self {
        Self { batches, targets: share.targets, micro_batches: share.micro_batches, stop }
    }

    /// The whole step in one process.
    pub fn alone(batches: &'a [Batch]) -> Self {
        let targets = batches.iter().map(Batch::targets).sum();
        Self { batches, targets, micro_batches: batches.len(), stop: false }
    }

    /// The loss that is trained: the mean over all targets, and the mean over all micro-batches of
    /// the load-balancing loss.
    fn factors(&self, model: &CausalLM) -> Factors {
        Factors::mean(self.targets).with_balance(model, self.micro_batches)
    }
}

impl<'a> Trainer<'a> {
    /// A trainer with a new optimizer.
    ///
    /// # Errors
    /// No room for the optimizer's moments.
    pub fn new(
        model: &'a CausalLM,
        parameters: &Parameters,
        freeze: Option<Freeze>,
        config: StepConfig,
    ) -> Result<Self> {
        Self::placed(model, parameters, freeze, config, &Placement::on(model.device()))
    }

    /// A trainer of the parameters at `placement`.
    ///
    /// # Errors
    /// As [`Trainer::new`].
    pub fn placed(
        model: &'a CausalLM,
        parameters: &Parameters,
        freeze: Option<Freeze>,
        config: StepConfig,
        placement: &Placement,
    ) -> Result<Self> {
        let units = ParamGroups::new(model, parameters, config.train_embeddings);
        let adapted = lora::pieces(model);
        let adapters = !adapted.is_empty();
        let pieces = match model.unit_home() {
            _ if adapters => adapted,
            Some(home) => home.pieces(),
            None => whole_pieces(parameters),
        };
        let trained = units.list.iter().map(|(name, _)| (name, &pieces[name]));
        let optimizer = AdamW::new(trained, config.optimizer, placement)?;
        let guard = Guard::new(model.device());
        Ok(Self { model, placement: placement.clone(), units, freeze, optimizer, pieces, adapters, config, guard })
    }

    /// Placement of the model.
    pub(crate) fn placement(&self) -> &Placement {
        &self.placement
    }

    /// This process's pieces of all parameters, or the adapters.
    pub(crate) fn pieces(&self) -> &Pieces {
        &self.pieces
    }

    /// Name and piece of each parameter that has gradients.
    pub(crate) fn trainable(&self) -> impl Iterator<Item = (&String, &Piece)> {
        self.units.list.iter().map(|(name, _)| (name, &self.pieces[name]))
    }

    /// Weights and moments that this process stores in a saved state. Of adapters, which every rank
    /// has, rank 0 stores all.
    pub(crate) fn stored(&self) -> (Pieces, Pieces) {
        if self.adapters_on_ranks().is_some_and(|group| group.rank() > 0) {
            return (Pieces::new(), Pieces::new());
        }
        let weights = self.pieces.iter().map(|(name, p)| (name.clone(), p.with(p.tensor.shallow_clone())));
        (weights.collect(), self.optimizer.moments())
    }

    /// The ranks, if there are several and they train adapters, which each of them has whole.
    fn adapters_on_ranks(&self) -> Option<&Rc<Group>> {
        self.placement.group.as_ref().filter(|_| self.adapters)
    }

    /// Gradients of this process's pieces of every trainable parameter, by name, without an update.
    ///
    /// # Errors
    /// An error of libtorch; a failed collective.
    pub(crate) fn gradients(&self, input: &StepInput<'_>) -> Result<Vec<(&str, Tensor)>> {
        let (_, grads) = self.accumulate(input, Factors::mean(input.targets))?;
        Ok(self.units.list.iter().map(|(name, _)| name.as_str()).zip(grads).collect())
    }

    /// Makes an optimizer step over the micro-batches of all ranks, whose gradients are those of
    /// one large batch. From the first loss or norm on that is not finite, nothing is updated; the
    /// caller notices when it reads the outcome. `seed` is that of the step's stochastic rounding.
    ///
    /// # Errors
    /// An error of libtorch; a failed collective.
    pub fn step(&mut self, input: &StepInput<'_>, lr: f64, seed: u64) -> Result<StepOutcome> {
        if self.config.optimizer_in_backward {
            assert_eq!(input.batches.len(), 1, "an update in the backward pass is that of a single batch");
            return self.step_in_backward(input, lr, seed);
        }
        let (loss, mut grads) = self.accumulate(input, input.factors(self.model))?;
        for ((name, _), grad) in self.units.list.iter().zip(&mut grads) {
            self.zero_frozen_grads(name, grad);
        }
        let outcome = self.outcome(&loss, sum_of_squares(&grads, self.model.device()), input.stop)?;
        self.guard.require_finite(&outcome.loss);
        self.guard.require_finite(&outcome.grad_norm);
        if self.config.max_grad_norm > 0.0 {
            self.guard.clip(&outcome.grad_norm, self.config.max_grad_norm);
        }
        let all: Vec<usize> = (0..grads.len()).collect();
        self.optimizer.step(&all, &grads, Update { lr, seed, guard: &self.guard })?;
        self.restore_frozen(0..self.units.list.len());
        Ok(outcome)
    }

    /// Sums what all ranks must know alike: the loss, the squared norm, requests to stop.
    fn outcome(&self, loss: &Tensor, squares: Tensor, stop: bool) -> Result<StepOutcome> {
        // All ranks have the same gradients of adapters: they count once.
        let counted = self.adapters_on_ranks().is_none_or(|group| group.rank() == 0);
        let squares = if counted { squares } else { squares.zeros_like() };
        let stops = Tensor::full([], f64::from(u8::from(stop)), (Kind::Double, self.model.device()));
        let figures = self.placement.total(&Tensor::stack(&[loss, &squares, &stops], 0))?;
        Ok(StepOutcome { loss: figures.get(0), grad_norm: figures.get(1).sqrt(), stops: figures.get(2) })
    }

    /// This process's loss, and the gradients of its pieces summed over the micro-batches of all
    /// ranks and scaled. Sums over micro-batches are f32 whatever the dtype of the weights.
    fn accumulate(&self, input: &StepInput<'_>, factors: Factors) -> Result<(Tensor, Vec<Tensor>)> {
        let mut loss = Tensor::zeros([], (Kind::Double, self.model.device()));
        let count = self.units.list.len();
        let mut sums: Vec<Option<Tensor>> = (0..count).map(|_| None).collect();
        let mut shared = self.model.unit_home().filter(|_| !self.adapters).map(|home| home.no_sums());
        for batch in input.batches {
            let forward = Forward::run(self.model, &self.units, batch, factors, self.config.pass)?;
            loss += forward.loss();
            match (&mut shared, self.adapters_on_ranks()) {
                (Some(shared), _) => sum_over_ranks(self.model, forward, shared, |_, _| Ok(()))?,
                (None, Some(group)) => {
                    let mut units = Vec::new();
                    forward.backward(|_, grads| {
                        units.push(grads);
                        Ok(())
                    })?;
                    // From the first unit on, as the adapters are listed.
                    let own: Vec<Tensor> = units.into_iter().rev().flatten().collect();
                    lora::add_of_all_ranks(group, &own, &mut sums)?;
                }
                (None, None) => forward.backward(|unit, grads| {
                    for (&i, grad) in self.units.places[unit].iter().zip(grads) {
                        match &mut sums[i] {
                            Some(sum) => drop(sum.g_add_(&grad)),
                            empty if input.batches.len() > 1 => *empty = Some(grad.to_kind(Kind::Float)),
                            empty => *empty = Some(grad),
                        }
                    }
                    Ok(())
                })?,
            }
        }
        if let (Some(shared), Some(home)) = (&shared, self.model.unit_home()) {
            for (unit, places) in self.units.places.iter().enumerate().filter(|(_, places)| !places.is_empty()) {
                for (&i, grad) in places.iter().zip(home.gradients(unit, shared)) {
                    sums[i] = Some(grad);
                }
            }
        }
        let grads = sums.into_iter().map(|sum| sum.expect("the backward pass visits every unit"));
        Ok((loss, grads.collect()))
    }

    /// Makes a step that updates each unit in the backward pass, as soon as its gradients are
    /// computed.
    fn step_in_backward(&mut self, input: &StepInput<'_>, lr: f64, seed: u64) -> Result<StepOutcome> {
        let factors = input.factors(self.model);
        // The pass borrows the units while the update borrows self mutably.
        let units = std::mem::replace(&mut self.units, ParamGroups::none());
        let squares = self.update_units(&units, &input.batches[0], factors, lr, seed);
        self.units = units;
        let (loss, squares) = squares?;
        self.outcome(&loss, squares, input.stop)
    }

    fn update_units(
        &mut self,
        units: &ParamGroups,
        batch: &Batch,
        factors: Factors,
        lr: f64,
        seed: u64,
    ) -> Result<(Tensor, Tensor)> {
        let forward = Forward::run(self.model, units, batch, factors, self.config.pass)?;
        let loss = forward.loss().shallow_clone();
        self.guard.require_finite(&loss);
        let mut squares = Tensor::zeros([], (Kind::Double, self.model.device()));
        let (model, group) = (self.model, self.adapters_on_ranks().cloned());
        let mut update = |unit: usize, mut grads: Vec<Tensor>| -> Result<()> {
            let places = &units.places[unit];
            for (&i, grad) in places.iter().zip(&mut grads) {
                self.zero_frozen_grads(&units.list[i].0, grad);
            }
            let square = sum_of_squares(&grads, model.device());
            self.guard.require_finite(&square);
            squares += square;
            self.optimizer.step(places, &grads, Update { lr, seed, guard: &self.guard })?;
            if let Some(freeze) = &self.freeze {
                for &i in places {
                    let name = &units.list[i].0;
                    freeze.restore(name, &self.pieces[name].tensor);
                }
            }
            Ok(())
        };
        match (model.unit_home(), group) {
            (None, _) => forward.backward(update)?,
            (_, Some(group)) => forward.backward(|unit, grads| {
                let mut sums: Vec<Option<Tensor>> = grads.iter().map(|_| None).collect();
                if !grads.is_empty() {
                    lora::add_of_all_ranks(&group, &grads, &mut sums)?;
                }
                update(unit, sums.into_iter().flatten().collect())
            })?,
            (Some(home), None) => sum_over_ranks(model, forward, &mut home.no_sums(), |unit, sums| {
                update(unit, home.gradients(unit, sums))?;
                home.clear(unit, sums);
                Ok(())
            })?,
        }
        Ok((loss, squares))
    }

    fn zero_frozen_grads(&self, name: &str, grad: &mut Tensor) {
        if let Some(freeze) = &self.freeze {
            freeze.zero_frozen_grads(name, grad);
        }
    }

    fn restore_frozen(&self, places: impl Iterator<Item = usize>) {
        if let Some(freeze) = &self.freeze {
            no_grad(|| {
                for name in places.map(|i| &self.units.list[i].0) {
                    freeze.restore(name, &self.pieces[name].tensor);
                }
            });
        }
    }
}

/// Runs the backward pass and adds the gradients of all ranks to `sums`; `done` is called with a
/// unit when its sum is complete. The sum of a unit goes on while the next one computes.
pub(super) fn sum_over_ranks(
    model: &CausalLM,
    forward: Forward<'_>,
    sums: &mut GradientSums,
    mut done: impl FnMut(usize, &mut GradientSums) -> Result<()>,
) -> Result<()> {
    let home = model.unit_home().expect("the weights are in parts");
    let mut before = None;
    let mut finish = |before: Option<(usize, Reduction)>, sums: &mut GradientSums| match before {
        Some((unit, reduction)) => home.finish(reduction, sums).and_then(|()| done(unit, sums)),
        None => Ok(()),
    };
    forward.backward(|unit, grads| {
        finish(before.take(), sums)?;
        before = Some((unit, home.start_sum(unit, grads)?));
        Ok(())
    })?;
    finish(before, sums)
}
