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

use super::pass::{Forward, ParamGroups, PassConfig};
use crate::data::{Batch, FeedConfig, Feeder};
use crate::session::Session;
use crate::weights::{self, Parameters};

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
/// sums and the number of tokens.
///
/// # Errors
/// An error of libtorch.
pub fn squared_gradients(
    session: &Session,
    examples: &[Example],
    config: FisherConfig,
    pass: PassConfig,
) -> Result<(Parameters, usize)> {
    let zero = |(name, p): (&String, &Tensor)| (name.clone(), Tensor::zeros(p.size(), (Kind::Float, p.device())));
    let mut sums: Parameters = session.parameters.iter().map(zero).collect();
    let feed = FeedConfig { batch_size: config.batch_size, grad_accum: 1, row: None };
    let (mut feeder, mut tokens) = (Feeder::new(examples, feed, config.seed), 0);
    let units = ParamGroups::new(&session.model, &session.parameters, true);
    for _ in 0..config.batches {
        let batch = Batch::at(examples, &feeder.next_step().concat()).to_device(session.model.device());
        let scale = 1.0 / batch.targets() as f64;
        // Only one unit's gradients exist at a time.
        Forward::run(&session.model, &units, &batch, scale, pass).backward(|places, gradients| {
            for (&i, gradient) in places.iter().zip(gradients) {
                let sum = sums.get_mut(&units.list[i].0).expect("a gradient of a parameter");
                let _ = no_grad(|| sum.g_add_(&gradient.to_kind(Kind::Float).square()));
            }
            Ok(())
        })?;
        tokens += batch.tokens();
    }
    Ok((sums, tokens))
}

/// Writes the sums into the subdirectory [`FISHER`] of `staged`; returns the number of tokens.
pub(crate) fn save(
    session: &Session,
    examples: &[Example],
    config: FisherConfig,
    pass: PassConfig,
    staged: &Path,
) -> Result<usize> {
    info!("squared gradients of {} batches of {} rows", config.batches, config.batch_size);
    let (sums, tokens) = squared_gradients(session, examples, config, pass)?;
    let folder = staged.join(FISHER);
    fs::create_dir(&folder).with_context(|| format!("creating {}", folder.display()))?;
    weights::save(&sums, &folder, Dtype::F32)?;
    Ok(tokens)
}
