//! Placement of a model: the ranks that share it, the device that computes, and the memory of its
//! state.

use std::rc::Rc;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use crate::dist::Group;
use crate::offload::Storage;

/// Sum of gradients over ranks.
#[derive(clap::ValueEnum, serde::Serialize, Debug, Clone, Copy, PartialEq, Eq, Default)]
#[serde(rename_all = "lowercase")]
pub enum Reduce {
    /// In rank order, with sums in f32: the same bits as micro-batches added by one process.
    #[default]
    Ordered,
    /// By the backend's reduce-scatter, in its order and in f32: less memory with many ranks.
    Native,
}

impl Reduce {
    /// Returns true for the sum in rank order.
    pub(crate) fn is_ordered(&self) -> bool {
        *self == Self::Ordered
    }
}

/// Placement of a model: who shares it, and where its parts lie.
#[derive(Clone)]
pub struct Placement {
    /// The ranks; none in one process.
    pub group: Option<Rc<Group>>,
    /// Device that computes.
    pub device: Device,
    /// Memory of the weights.
    pub weights: Storage,
    /// Memory of the optimizer's moments.
    pub moments: Storage,
    /// Sum of the gradients.
    pub reduce: Reduce,
}

impl Placement {
    /// All on `device`, in one process.
    pub fn on(device: Device) -> Self {
        Self {
            group: None,
            device,
            weights: Storage::On(device),
            moments: Storage::On(device),
            reduce: Reduce::default(),
        }
    }

    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.group.as_ref().map_or(1, |g| g.world())
    }

    /// This process's rank.
    pub fn rank(&self) -> usize {
        self.group.as_ref().map_or(0, |g| g.rank())
    }

    /// Returns true if units must be lent: the weights are shared or lie elsewhere than the device
    /// that computes.
    pub(crate) fn lends(&self) -> bool {
        self.group.is_some() || self.weights.device() != self.device
    }

    /// Sums one or more f64 values over the ranks, in rank order.
    ///
    /// # Errors
    /// A failed collective.
    pub(crate) fn total(&self, values: &Tensor) -> Result<Tensor> {
        let Some(group) = &self.group else { return Ok(values.shallow_clone()) };
        let (n, world) = (values.numel() as i64, group.world() as i64);
        let all = Tensor::empty([world * n], (Kind::Double, values.device()));
        group.all_gather(&all, &values.flatten(0, -1))?.wait()?;
        let all = all.view([world, n]);
        let sum = (1..world).fold(all.get(0).copy(), |mut sum, r| sum.g_add_(&all.get(r)));
        Ok(sum.view(values.size().as_slice()))
    }

    /// Rank 0's decision, for all ranks.
    ///
    /// # Errors
    /// The error of `decide` on rank 0; a failed rank.
    pub(crate) fn decide(&self, what: &str, decide: impl FnOnce() -> Result<bool>) -> Result<bool> {
        let Some(group) = &self.group else { return decide() };
        let own = (group.rank() == 0).then(decide).transpose()?;
        let text = group.share(what, own.map(|yes| if yes { "yes" } else { "no" }))?;
        Ok(text == "yes")
    }

    /// Sums a count over the ranks.
    ///
    /// # Errors
    /// A failed collective.
    pub(crate) fn total_count(&self, count: u64) -> Result<u64> {
        if self.group.is_none() {
            return Ok(count);
        }
        let counts = Tensor::from_slice(&[count as f64]).to_device(self.device);
        Ok(self.total(&counts)?.double_value(&[0]) as u64)
    }
}
