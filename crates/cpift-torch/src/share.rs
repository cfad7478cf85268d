//! Rows of an evaluation, shared by the ranks of a job.

use std::rc::Rc;

use anyhow::{Context, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tch::{Device, Kind, Tensor};

use crate::dist::Group;

/// Runs `each` on batches of up to `batch_size` of the indices `order` and returns its results with
/// their indices. Ranks take the batches in turn, and all return all results, which do not depend
/// on their number. `tick` is called for each index done.
///
/// # Errors
/// An error of `each`; a failed rank.
pub(crate) fn in_batches<T: Serialize + DeserializeOwned>(
    group: Option<&Rc<Group>>,
    device: Device,
    order: &[usize],
    batch_size: usize,
    mut each: impl FnMut(&[usize]) -> Result<Vec<T>>,
    mut tick: impl FnMut(),
) -> Result<Vec<(usize, T)>> {
    let (rank, world) = group.map_or((0, 1), |group| (group.rank(), group.world()));
    let chunks: Vec<&[usize]> = order.chunks(batch_size.max(1)).collect();
    let mut own = Vec::new();
    for round in chunks.chunks(world) {
        // A rank without a batch of its own runs the last one too: where the weights are shared,
        // all ranks lend the same units.
        let chunk = round[rank.min(round.len() - 1)];
        let results = each(chunk)?;
        if rank < round.len() {
            own.extend(chunk.iter().copied().zip(results));
        }
        round.iter().flat_map(|chunk| *chunk).for_each(|_| tick());
    }
    from_all(group, device, own)
}

/// Deals the indices `order` to the ranks in turn, runs `each` once on every rank's own and returns
/// the results of all ranks. `tick` is called for each index: this rank counts its own and takes
/// the others to be as fast.
///
/// # Errors
/// An error of `each`; a failed rank.
pub(crate) fn in_shares<T: Serialize + DeserializeOwned>(
    group: Option<&Rc<Group>>,
    device: Device,
    order: &[usize],
    each: impl FnOnce(&[usize], &mut dyn FnMut()) -> Result<Vec<(usize, T)>>,
    mut tick: impl FnMut(),
) -> Result<Vec<(usize, T)>> {
    let (rank, world) = group.map_or((0, 1), |group| (group.rank(), group.world()));
    let own: Vec<usize> = order.iter().skip(rank).step_by(world).copied().collect();
    let (mut done, mut ticked) = (0, 0);
    let mut one_done = || {
        done += 1;
        let all = order.len() * done / own.len();
        (ticked..all).for_each(|_| tick());
        ticked = all;
    };
    let results = each(&own, &mut one_done)?;
    from_all(group, device, results)
}

/// The results of all ranks.
fn from_all<T: Serialize + DeserializeOwned>(
    group: Option<&Rc<Group>>,
    device: Device,
    own: Vec<(usize, T)>,
) -> Result<Vec<(usize, T)>> {
    let Some(group) = group else { return Ok(own) };
    let mut all = Vec::new();
    for bytes in gather(group, device, &serde_json::to_vec(&own)?)? {
        all.extend(serde_json::from_slice::<Vec<(usize, T)>>(&bytes).context("results of another rank")?);
    }
    Ok(all)
}

/// The bytes of every rank, by rank.
fn gather(group: &Rc<Group>, device: Device, own: &[u8]) -> Result<Vec<Vec<u8>>> {
    let world = group.world() as i64;
    let sizes = Tensor::zeros([world], (Kind::Int64, device));
    group.all_gather(&sizes, &Tensor::from_slice(&[own.len() as i64]).to_device(device))?.wait()?;
    let sizes = Vec::<i64>::try_from(sizes.to_device(Device::Cpu)).context("sizes of results")?;
    let most = sizes.iter().copied().max().unwrap_or(0).max(1);
    let mut padded = own.to_vec();
    padded.resize(most as usize, 0);
    let all = Tensor::zeros([world * most], (Kind::Uint8, device));
    group.all_gather(&all, &Tensor::from_slice(&padded).to_device(device))?.wait()?;
    let all = Vec::<u8>::try_from(all.to_device(Device::Cpu)).context("results")?;
    let of = |(bytes, size): (&[u8], &i64)| bytes[..*size as usize].to_vec();
    Ok(all.chunks(most as usize).zip(&sizes).map(of).collect())
}
