//! The diagonal of the empirical Fisher information, as in TRACE ([arXiv
//! 2605.31025](https://arxiv.org/abs/2605.31025)): squared gradients of the loss of batches at the
//! weights after training.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use cpift_core::Dtype;
use cpift_data::Example;
use log::info;
use tch::{Kind, Tensor, no_grad};

use super::pass::{Factors, Forward, ParamGroups, PassConfig};
use super::step::sum_over_ranks;
use crate::data::{FeedConfig, Feeder, StepShare};
use crate::pieces::{Piece, Pieces};
use crate::session::Session;

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
