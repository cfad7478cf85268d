//! Parameter isolation: which elements may change in a stage. All of them; all but the cores of
//! earlier tasks; only the own cores; or all but those that currently matter most to earlier tasks.

use anyhow::Result;
use cpift_core::format::mask::Mask;
use cpift_core::format::names::{layer, role};
use cpift_data::Example;
use tch::{Kind, Tensor, no_grad};

use super::importance::{IMPORTANCE, Importance, Positions, jaccard};
use super::step::{StepInput, Trainer};
use crate::data::{FeedConfig, Feeder, StepShare};
use crate::freeze::Freeze;
use crate::pieces::{Piece, Pieces};

/// Batches of earlier tasks' rows per update of the mask.
const REFRESH_BATCHES: usize = 4;
/// Suffix of the first mask in a saved state.
const FIRST: &str = ".first";

/// The elements of a stage that may change.
pub enum Isolation<'a> {
    /// All elements.
    None,
    /// All but the core regions of earlier tasks (CPI-FT).
    Static(Vec<&'a Mask>),
    /// All but the elements of these masks, the embedding table and the first blocks.
    Protected {
        /// Masks of elements.
        masks: Vec<&'a Mask>,
        /// Number of blocks; with 0 the embedding table may change too.
        layers: u32,
    },
    /// The group's own core regions, without those of earlier tasks (TRACE).
    Cores {
        /// Masks of the group's tasks.
        own: Vec<&'a Mask>,
        /// Masks of earlier tasks.
        earlier: Vec<&'a Mask>,
    },
    /// All but the elements most important to earlier tasks, updated during training (EPI).
    Dynamic(DynamicConfig<'a>),
}

/// Settings of the dynamic mask.
pub struct DynamicConfig<'a> {
    /// Examples of earlier tasks, on whose loss importance is measured.
    pub examples: &'a [Example],
    /// Share of the trainable elements that is frozen, in percent.
    pub percent: f64,
    /// β of the moving average.
    pub decay: f64,
    /// Steps between updates of the mask.
    pub interval: usize,
}

impl Isolation<'_> {
    /// Elements frozen throughout the stage.
    pub(crate) fn freeze(&self, pieces: &Pieces) -> Result<Option<Freeze>> {
        Ok(match self {
            Self::None | Self::Dynamic(_) => None,
            Self::Static(masks) => Some(Freeze::new(pieces, masks)?),
            Self::Protected { masks, layers } => {
                let bottom = |name: &str| layer(name).map_or(role(name) == "embed", |(_, n)| n < *layers);
                Some(Freeze::new(pieces, masks)?.and_whole(pieces, |name| *layers > 0 && bottom(name)))
            }
            Self::Cores { own, earlier } => Some(Freeze::all_but(pieces, own, earlier)?),
        })
    }
}

/// The dynamic mask of a stage.
pub(crate) struct DynamicMask<'a> {
    config: &'a DynamicConfig<'a>,
    importance: Importance,
    /// The first mask of the stage; empty until it is computed.
    first: Positions,
    feeder: Feeder,
    /// Tokens that importance was measured on.
    pub tokens: usize,
}

/// Drift of the mask.
pub(crate) struct Drift {
    /// Number of protected elements.
    pub protected: u64,
    /// Jaccard similarity with the stage's first mask.
    pub jaccard: f64,
}

impl<'a> DynamicMask<'a> {
    /// A mask whose importance is measured on batches of a step's size.
    pub fn new(config: &'a DynamicConfig<'a>, trainer: &Trainer<'_>, feed: FeedConfig, seed: u64) -> Self {
        Self {
            config,
            importance: Importance::new(trainer.trainable(), config.decay, trainer.placement()),
            first: Positions::new(),
            feeder: Feeder::new(config.examples, feed.unpacked(), seed),
            tokens: 0,
        }
    }

    /// Returns true if the mask is updated before step `step`, counted from 0.
    pub fn is_due(&self, step: usize) -> bool {
        step.is_multiple_of(self.config.interval)
    }

    /// Measures importance at the current weights and freezes the top elements; others may change
    /// again.
    pub fn renew(&mut self, trainer: &mut Trainer<'_>) -> Result<Drift> {
        let placement = trainer.placement().clone();
        for _ in 0..REFRESH_BATCHES {
            let share =
                StepShare::new(self.config.examples, self.feeder.next_step(), placement.rank(), placement.world());
            self.tokens += share.tokens;
            let batches = share.on(placement.device);
            let input = StepInput::of(&share, &batches, false);
            let gradients = trainer.gradients(&input)?;
            self.importance.update(gradients.iter().map(|(name, grad)| (*name, grad)));
        }
        let now = self.freeze(trainer)?;
        if self.first.is_empty() {
            self.first = now.iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect();
        }
        let protected = placement.total_count(trainer.freeze.as_ref().map_or(0, Freeze::len))?;
        Ok(Drift { protected, jaccard: jaccard(&self.first, &now, &placement)? })
    }

    fn freeze(&self, trainer: &mut Trainer<'_>) -> Result<Positions> {
        let now = self.importance.top(self.config.percent)?;
        trainer.freeze = Some(Freeze::at(trainer.pieces(), &now));
        Ok(now)
    }

    /// Pieces for a saved state, by name: averages, and the first mask as zeros and ones.
    pub fn state(&self, pieces: &Pieces) -> Pieces {
        let mut state = self.blank(pieces);
        for (name, index) in &self.first {
            let bits = &mut state.get_mut(&format!("{name}{FIRST}")).expect("blank has every parameter").tensor;
            let _ = no_grad(|| bits.index_fill_(0, index, 1.0));
        }
        state
    }

    /// As [`DynamicMask::state`] with an empty first mask, to load a saved state into.
    pub fn blank(&self, pieces: &Pieces) -> Pieces {
        let averages = self.importance.state();
        let tracked = |name: &str| averages.contains_key(&format!("{name}{IMPORTANCE}"));
        let first = |(name, p): (&String, &Piece)| {
            let device = self.importance.device();
            (format!("{name}{FIRST}"), p.with(Tensor::zeros([p.len()], (Kind::Float, device))))
        };
        let firsts: Vec<_> = pieces.iter().filter(|(name, _)| tracked(name)).map(first).collect();
        averages.into_iter().chain(firsts).collect()
    }

    /// Restores the mask after `steps` steps from the tensors of a saved state (see
    /// [`DynamicMask::blank`]).
    ///
    /// # Errors
    /// A failed collective.
    pub fn restore(&mut self, restored: &Pieces, steps: usize, tokens: usize, trainer: &mut Trainer<'_>) -> Result<()> {
        let renewed = steps.div_ceil(self.config.interval);
        if renewed == 0 {
            return Ok(());
        }
        self.importance.restored();
        self.feeder.skip(renewed * REFRESH_BATCHES);
        self.tokens = tokens;
        let first = |(name, bits): (&String, &Piece)| {
            let index = bits.tensor.nonzero().squeeze_dim(1);
            Some((name.strip_suffix(FIRST)?.to_owned(), index)).filter(|(_, index)| index.numel() > 0)
        };
        self.first = restored.iter().filter_map(first).collect();
        self.freeze(trainer).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Batch;
    use crate::session::{Precision, Session};
    use crate::train::step::StepConfig;
    use crate::weights::Parameters;
    use cpift_testkit::model::write_tiny_model;
    use tch::Device;

    fn examples(seed: i64) -> Vec<Example> {
        let ids = |i: i64| (0..8).map(|j| (seed + 17 * i + 5 * j * j) % 250).collect::<Vec<i64>>();
        (0..12).map(|i| Example { ids: ids(i), target: vec![true; 8], ..Example::default() }).collect()
    }

    /// Flat copies of all parameters.
    fn values(parameters: &Parameters) -> Vec<(String, Vec<f32>)> {
        parameters.iter().map(|(name, t)| (name.clone(), Vec::try_from(t.flatten(0, -1)).unwrap())).collect()
    }

    #[test]
    fn protected_elements_keep_their_bits_until_the_next_mask_and_the_mask_moves() {
        let dir = tempfile::tempdir().unwrap();
        let folder = write_tiny_model(&dir.path().join("m"), 3);
        let session = Session::open(&folder, None, Device::Cpu, Precision::F32).unwrap();
        let parameters = &session.parameters;
        let (earlier, own) = (examples(3), examples(101));
        let config = DynamicConfig { examples: &earlier, percent: 10.0, decay: 0.5, interval: 3 };
        let mut trainer = Trainer::new(&session.model, parameters, None, StepConfig::default()).unwrap();
        let feed = FeedConfig { batch_size: 4, grad_accum: 1, ranks: 1, row: None };
        let mut mask = DynamicMask::new(&config, &trainer, feed, 1);
        let total: usize = parameters.values().map(Tensor::numel).sum();
        let batch = Batch::new(&own.iter().collect::<Vec<_>>());
        let (mut similarities, mut kept) = (Vec::new(), Vec::new());
        for step in 0..9 {
            if mask.is_due(step) {
                let drift = mask.renew(&mut trainer).unwrap();
                assert_eq!(drift.protected, (total as u64) / 10);
                similarities.push(drift.jaccard);
                kept = values(parameters);
            }
            trainer.step(&StepInput::alone(std::slice::from_ref(&batch)), 2e-2, 0).unwrap();
            let same: usize = values(parameters)
                .iter()
                .zip(&kept)
                .map(|((_, a), (_, b))| a.iter().zip(b).filter(|(a, b)| a.to_bits() == b.to_bits()).count())
                .sum();
            // All but the protected elements change: without weight decay, those that have ever had
            // a gradient.
            let frozen = mask.importance.top(10.0).unwrap();
            for (name, index) in &frozen {
                let (now, then) = (&parameters[name].flatten(0, -1), kept.iter().find(|(n, _)| n == name).unwrap());
                let then = Tensor::from_slice(&then.1);
                assert!(now.index_select(0, index).equal(&then.index_select(0, index)), "{name} after step {step}");
            }
            assert!(same < total / 2, "{same} of {total} did not move");
        }
        assert_eq!(similarities[0], 1.0);
        assert!(similarities[1..].iter().all(|s| *s < 1.0), "{similarities:?}");
        // A batch of 4 of 8 tokens, 4 of them a mask, three masks.
        assert_eq!(mask.tokens, 3 * REFRESH_BATCHES * 4 * 8);
    }
}
