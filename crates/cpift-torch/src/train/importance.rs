//! Importance of each parameter to earlier tasks, tracked during training (Evolving Parameter
//! Isolation, [arXiv 2604.14010](https://arxiv.org/abs/2604.14010)).
//!
//! Importance is an exponential moving average of squared gradients of the earlier tasks' loss at
//! the current weights: `v ← β·v + (1 − β)·g²` (the first time `v = g²`). To compare layers, the
//! values of each layer are divided by their mean; the parameters outside the layers count as one
//! layer. The top p % of all parameters are protected.

use std::collections::BTreeMap;

use anyhow::Result;
use cpift_core::format::names::layer;
use tch::{Kind, Tensor, no_grad};

use crate::weights::Parameters;

/// Flat indices of elements by parameter, int64 and ascending; parameters without any are left out.
pub type Positions = BTreeMap<String, Tensor>;

/// Suffix of an average in a saved state.
const SUFFIX: &str = ".importance";

/// Moving averages of squared gradients.
pub struct Importance {
    decay: f64,
    averages: BTreeMap<String, Tensor>,
    updates: u64,
}

impl Importance {
    /// Averages for `parameters`, without any gradient yet.
    pub fn new<'a>(parameters: impl Iterator<Item = &'a (String, Tensor)>, decay: f64) -> Self {
        let zero = |(name, p): &(String, Tensor)| (name.clone(), Tensor::zeros(p.size(), (Kind::Float, p.device())));
        Self { decay, averages: no_grad(|| parameters.map(zero).collect()), updates: 0 }
    }

    /// Updates the averages with a gradient of every parameter.
    pub fn update<'a>(&mut self, gradients: impl Iterator<Item = (&'a str, &'a Tensor)>) {
        let old = if self.updates == 0 { 0.0 } else { self.decay };
        no_grad(|| {
            for (name, gradient) in gradients {
                let average = self.averages.get_mut(name).expect("a gradient of a tracked parameter");
                let square = gradient.to_kind(Kind::Float).square();
                let _ = average.g_mul_scalar_(old).g_add_(&(square * (1.0 - old)));
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
    pub fn top(&self, percent: f64) -> Positions {
        no_grad(|| {
            let scores = self.normalised();
            let total: u64 = scores.values().map(|t| t.numel() as u64).sum();
            let count = (percent * total as f64 / 100.0).floor() as i64;
            if count == 0 { Positions::new() } else { largest(&scores, count) }
        })
    }

    /// The averages divided by their layer's mean; a layer of zeros stays zero.
    fn normalised(&self) -> BTreeMap<String, Tensor> {
        let of = |name: &str| layer(name).map(|(prefix, _)| prefix.to_owned());
        let mut sums: BTreeMap<Option<String>, (f64, f64)> = BTreeMap::new();
        for (name, average) in &self.averages {
            let (sum, count) = sums.entry(of(name)).or_default();
            *sum += average.sum(Kind::Double).double_value(&[]);
            *count += average.numel() as f64;
        }
        let divided = |(name, average): (&String, &Tensor)| {
            let (sum, count) = sums[&of(name)];
            let mean = if sum > 0.0 { sum / count } else { 1.0 };
            (name.clone(), (average / mean).flatten(0, -1))
        };
        self.averages.iter().map(divided).collect()
    }

    /// The averages by name for a saved state; they share storage.
    pub fn state(&self) -> Parameters {
        self.averages.iter().map(|(name, t)| (format!("{name}{SUFFIX}"), t.shallow_clone())).collect()
    }

    /// Marks the averages as restored from a saved state.
    pub fn restored(&mut self) {
        self.updates = 1;
    }
}

/// Indices of the `count` largest of `scores`, none of which is negative.
fn largest(scores: &BTreeMap<String, Tensor>, count: i64) -> Positions {
    let at_least = |threshold: i64| -> i64 {
        scores.values().map(|t| t.view_dtype(Kind::Int).ge(threshold).sum(Kind::Int64).int64_value(&[])).sum()
    };
    // The bits of nonnegative floats are ordered like their values: search the largest threshold
    // that enough elements reach.
    let (mut low, mut high) = (0i64, i64::from(f32::INFINITY.to_bits()) + 1);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if at_least(middle) >= count { low = middle } else { high = middle }
    }
    let mut ties = count - at_least(low + 1);
    let mut chosen = Positions::new();
    for (name, score) in scores {
        let bits = score.view_dtype(Kind::Int);
        let equal = bits.eq(low);
        // Of the elements equal to the threshold, take as many as are still needed.
        let wanted = equal.logical_and(&equal.cumsum(0, Kind::Int64).le(ties));
        ties -= wanted.sum(Kind::Int64).int64_value(&[]);
        let positions = bits.gt(low).logical_or(&wanted).nonzero().squeeze_dim(1);
        if positions.numel() > 0 {
            chosen.insert(name.clone(), positions);
        }
    }
    chosen
}

/// Jaccard similarity of two sets of elements.
///
/// # Errors
/// An error of libtorch.
pub fn jaccard(a: &Positions, b: &Positions) -> Result<f64> {
    let size = |p: &Positions| p.values().map(|t| t.numel() as f64).sum::<f64>();
    let mut common = 0.0;
    for (name, positions) in a {
        if let Some(other) = b.get(name) {
            common += Tensor::f_isin(positions, other, true, false)?.sum(Kind::Int64).f_double_value(&[])?;
        }
    }
    let union = size(a) + size(b) - common;
    Ok(if union == 0.0 { 1.0 } else { common / union })
}
