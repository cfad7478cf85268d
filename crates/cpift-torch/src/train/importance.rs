//! Importance of parameters by squared gradients: of earlier tasks' loss, tracked during training,
//! and of a task's own loss after training.
//!
//! The first is Evolving Parameter Isolation ([arXiv
//! 2604.14010](https://arxiv.org/abs/2604.14010)): an exponential moving average of squared
//! gradients of the earlier tasks' loss at the current weights, `v ← β·v + (1 − β)·g²` (the first
//! time `v = g²`). To compare layers, the values of each layer are divided by their mean; the
//! parameters outside the layers count as one layer. The top p % of all parameters are protected.
//!
//! The second is the diagonal of the empirical Fisher information, as in TRACE ([arXiv
//! 2605.31025](https://arxiv.org/abs/2605.31025)): squared gradients of the loss of batches.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use cpift_core::Dtype;
use cpift_core::format::names::layer;
use cpift_data::Example;
use log::info;
use tch::{Device, Kind, Tensor, no_grad};

use super::pass::{Factors, Forward, ParamGroups, PassConfig};
use super::step::sum_over_ranks;
use crate::data::{FeedConfig, Feeder, StepShare};
use crate::placement::{Piece, Pieces, Placement};
use crate::session::Session;

/// Flat indices of elements within this process's piece of each parameter, int64 and ascending;
/// parameters without any are left out.
pub type Positions = BTreeMap<String, Tensor>;

/// Suffix of an average in a saved state.
pub(super) const IMPORTANCE: &str = ".importance";

/// Moving averages of squared gradients.
pub struct Importance {
    decay: f64,
    averages: Pieces,
    placement: Placement,
    updates: u64,
}

impl Importance {
    /// Averages for `pieces`, without any gradient yet.
    pub fn new<'a>(pieces: impl Iterator<Item = (&'a String, &'a Piece)>, decay: f64, placement: &Placement) -> Self {
        let device = placement.device;
        let zero = |(name, p): (&String, &Piece)| {
            (name.clone(), p.with(Tensor::zeros(p.tensor.size(), (Kind::Float, device))))
        };
        Self { decay, averages: no_grad(|| pieces.map(zero).collect()), placement: placement.clone(), updates: 0 }
    }

    /// Updates the averages with a gradient of every parameter.
    pub fn update<'a>(&mut self, gradients: impl Iterator<Item = (&'a str, &'a Tensor)>) {
        let old = if self.updates == 0 { 0.0 } else { self.decay };
        no_grad(|| {
            for (name, gradient) in gradients {
                let average = self.averages.get_mut(name).expect("a gradient of a tracked parameter");
                let square = gradient.to_kind(Kind::Float).square();
                let _ = average.tensor.g_mul_scalar_(old).g_add_(&(square * (1.0 - old)));
            }
        });
        self.updates += 1;
    }

    /// Returns true if no gradient has been seen.
    pub fn is_empty(&self) -> bool {
        self.updates == 0
    }

    /// The ⌊p·D/100⌋ most important elements after normalisation; ties go to the first in bytewise
    /// name order, then by index.
    ///
    /// # Errors
    /// A failed collective.
    pub fn top(&self, percent: f64) -> Result<Positions> {
        no_grad(|| {
            let scores = self.normalised()?;
            let total: i64 = self.averages.values().map(Piece::whole_len).sum();
            let count = (percent * total as f64 / 100.0).floor() as i64;
            if count == 0 { Ok(Positions::new()) } else { largest(&scores, count, &self.placement) }
        })
    }

    /// The averages divided by their layer's mean; a layer of zeros stays zero.
    fn normalised(&self) -> Result<BTreeMap<String, Tensor>> {
        let of = |name: &str| layer(name).map(|(prefix, _)| prefix.to_owned());
        let sums = self.averages.values().map(|p| p.tensor.sum(Kind::Double)).collect::<Vec<_>>();
        let sums = self.placement.total(&Tensor::stack(&sums, 0))?;
        let mut layers: BTreeMap<Option<String>, (f64, f64)> = BTreeMap::new();
        for ((name, average), sum) in self.averages.iter().zip(values(&sums)) {
            let (total, count) = layers.entry(of(name)).or_default();
            *total += sum;
            *count += average.whole_len() as f64;
        }
        let divided = |(name, average): (&String, &Piece)| {
            let (sum, count) = layers[&of(name)];
            let mean = if sum > 0.0 { sum / count } else { 1.0 };
            (name.clone(), (&average.tensor / mean).flatten(0, -1))
        };
        Ok(self.averages.iter().map(divided).collect())
    }

    /// The averages by name for a saved state; they share storage.
    pub fn state(&self) -> Pieces {
        let share = |(name, p): (&String, &Piece)| (format!("{name}{IMPORTANCE}"), p.with(p.tensor.shallow_clone()));
        self.averages.iter().map(share).collect()
    }

    /// Device of the averages.
    pub(super) fn device(&self) -> Device {
        self.placement.device
    }

    /// Marks the averages as restored from a saved state.
    pub fn restored(&mut self) {
        self.updates = 1;
    }
}

/// The elements of a one-dimensional f64 tensor.
fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_device(Device::Cpu)).expect("a one-dimensional tensor of doubles")
}

/// Indices of the `count` largest of all ranks' `scores`, none of which is negative.
fn largest(scores: &BTreeMap<String, Tensor>, count: i64, placement: &Placement) -> Result<Positions> {
    let at_least = |threshold: i64| -> Result<i64> {
        let own: i64 =
            scores.values().map(|t| t.view_dtype(Kind::Int).ge(threshold).sum(Kind::Int64).int64_value(&[])).sum();
        Ok(placement.total_count(own as u64)? as i64)
    };
    // The bits of nonnegative floats are ordered like their values: search the largest threshold
    // that enough elements reach.
    let (mut low, mut high) = (0i64, i64::from(f32::INFINITY.to_bits()) + 1);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if at_least(middle)? >= count { low = middle } else { high = middle }
    }
    let ties = count - at_least(low + 1)?;
    let first = ties_before(scores, low, placement)?;
    let mut chosen = Positions::new();
    for ((name, score), before) in scores.iter().zip(first) {
        let bits = score.view_dtype(Kind::Int);
        let equal = bits.eq(low);
        // Of the elements equal to the threshold, take as many as are still needed.
        let wanted = equal.logical_and(&equal.cumsum(0, Kind::Int64).le(ties - before));
        let positions = bits.gt(low).logical_or(&wanted).nonzero().squeeze_dim(1);
        if positions.numel() > 0 {
            chosen.insert(name.clone(), positions);
        }
    }
    Ok(chosen)
}

/// For this process's piece of each parameter, the number of elements of the value `bits` that come
/// before it: those of parameters earlier in name order, and those of lower ranks in the same.
fn ties_before(scores: &BTreeMap<String, Tensor>, bits: i64, placement: &Placement) -> Result<Vec<i64>> {
    let own: Vec<i64> =
        scores.values().map(|t| t.view_dtype(Kind::Int).eq(bits).sum(Kind::Int64).int64_value(&[])).collect();
    let (world, rank) = (placement.world(), placement.rank());
    let mut counts = vec![0.0; own.len() * world];
    own.iter().enumerate().for_each(|(i, n)| counts[i * world + rank] = *n as f64);
    let all = values(&placement.total(&Tensor::from_slice(&counts).to_device(placement.device))?);
    let sums: Vec<i64> = all
        .iter()
        .scan(0, |sum, n| {
            let before = *sum;
            *sum += *n as i64;
            Some(before)
        })
        .collect();
    Ok((0..own.len()).map(|i| sums[i * world + rank]).collect())
}

/// Jaccard similarity of two sets of elements over all ranks.
///
/// # Errors
/// An error of libtorch; a failed collective.
pub fn jaccard(a: &Positions, b: &Positions, placement: &Placement) -> Result<f64> {
    let size = |p: &Positions| p.values().map(|t| t.numel() as f64).sum::<f64>();
    let mut common = 0.0;
    for (name, positions) in a {
        if let Some(other) = b.get(name) {
            common += Tensor::f_isin(positions, other, true, false)?.sum(Kind::Int64).f_double_value(&[])?;
        }
    }
    let counts = Tensor::from_slice(&[common, size(a) + size(b)]).to_device(placement.device);
    let counts = values(&placement.total(&counts)?);
    let union = counts[1] - counts[0];
    Ok(if union == 0.0 { 1.0 } else { counts[0] / union })
}

/// Subdirectory of a probe with its sums of squared gradients, stored as the weights of a
/// checkpoint.
pub const FISHER: &str = "fisher";

/// Settings of [`squared_gradients`].
#[derive(Debug, Clone, Copy)]
pub struct FisherConfig {
    /// Number of batches summed over.
    pub batches: usize,
    /// Rows per batch.
    pub batch_size: usize,
    /// Seed of the order of the rows.
    pub seed: u64,
}

/// Sums the squared gradients of the mean loss over batches, by parameter and in f32; returns the
/// sums of this process's pieces and the number of tokens.
///
/// # Errors
/// An error of libtorch; a failed collective.
pub fn squared_gradients(
    session: &Session,
    examples: &[Example],
    config: FisherConfig,
    pass: PassConfig,
) -> Result<(Pieces, usize)> {
    let (placement, model) = (&session.placement, &session.model);
    let zero = |(name, p): (String, Piece)| {
        let zeros = Tensor::zeros(p.tensor.size(), (Kind::Float, placement.device));
        (name, p.with(zeros))
    };
    let mut sums: Pieces = session.pieces().into_iter().map(zero).collect();
    let feed = FeedConfig { batch_size: config.batch_size, grad_accum: 1, ranks: placement.world(), row: None };
    let (mut feeder, mut tokens) = (Feeder::new(examples, feed, config.seed), 0);
    let units = ParamGroups::new(model, &session.parameters, true);
    for _ in 0..config.batches {
        let share = StepShare::new(examples, feeder.next_step(), placement.rank(), placement.world());
        let batch = &share.on(placement.device)[0];
        let mut add = |unit: usize, grads: Vec<Tensor>| {
            for (&i, gradient) in units.places[unit].iter().zip(grads) {
                let sum = &mut sums.get_mut(&units.list[i].0).expect("a gradient of a parameter").tensor;
                let _ = no_grad(|| sum.g_add_(&gradient.to_kind(Kind::Float).square()));
            }
            Ok(())
        };
        // Only one unit's gradients exist at a time.
        let forward = Forward::run(model, &units, batch, Factors::mean(share.targets), pass)?;
        match model.unit_home() {
            None => forward.backward(add)?,
            Some(home) => sum_over_ranks(model, forward, &mut home.no_sums(), |unit, shared| {
                add(unit, home.gradients(unit, shared))?;
                home.clear(unit, shared);
                Ok(())
            })?,
        }
        tokens += share.tokens;
    }
    Ok((sums, tokens))
}

/// Writes the sums into the subdirectory [`FISHER`] of `staged`, on rank 0; returns the number of
/// tokens.
pub(crate) fn save(
    session: &Session,
    examples: &[Example],
    config: FisherConfig,
    pass: PassConfig,
    staged: Option<&Path>,
) -> Result<usize> {
    info!("squared gradients of {} batches of {} rows", config.batches, config.batch_size);
    let (sums, tokens) = squared_gradients(session, examples, config, pass)?;
    let folder = staged.map(|staged| staged.join(FISHER));
    if let Some(folder) = &folder {
        fs::create_dir(folder).with_context(|| format!("creating {}", folder.display()))?;
    }
    session.save_pieces(&sums, folder.as_deref(), Dtype::F32)?;
    Ok(tokens)
}
