//! One rank of a job that checks the values of all collectives over NCCL: torchrun's variables say
//! which. It makes and compares values on the host, because tests/fake-cuda runs it on a device
//! that computes nothing.

use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use cpift_torch::dist::{Backend, Group, Place};
use cpift_torch::placement::DeviceChoice;
use tch::{Device, Kind, Tensor};

/// Elements of a part: more than one chunk of the transport, and not a round number.
const N: usize = 2_300_017;

fn main() -> Result<()> {
    let Some(place) = Place::from_env()? else { bail!("RANK and WORLD_SIZE say which rank this is") };
    let Device::Cuda(_) = DeviceChoice::Cuda(0).open(Some(1))? else { bail!("no CUDA device") };
    let group = Group::join(Backend::Nccl, place, Duration::from_secs(60))?;
    let checked = [Kind::Float, Kind::BFloat16, Kind::Double]
        .into_iter()
        .try_for_each(|kind| check(&group, kind).with_context(|| format!("{kind:?}")));
    if let Err(error) = &checked {
        group.fail(error);
        return checked;
    }
    group.leave()
}

/// Element `i` of what rank `rank` has for part `part`: small integers, which bf16 and all sums
/// represent exactly.
fn value(rank: usize, part: usize, i: usize) -> f64 {
    (7 * rank + 3 * part + i % 11) as f64
}

fn check(group: &Rc<Group>, kind: Kind) -> Result<()> {
    let (rank, world) = (group.rank(), group.world());
    let device = Device::Cuda(group.local_rank());
    // Values are made on the host: the device may compute nothing.
    let tensor = |of: &dyn Fn(usize) -> f64, n: usize| {
        Tensor::from_slice(&(0..n).map(of).collect::<Vec<f64>>()).to_kind(kind).to_device(device)
    };
    let holds = |what: &str, found: &Tensor, expected: &dyn Fn(usize) -> f64| -> Result<()> {
        let found: Vec<f64> = found.to_device(Device::Cpu).to_kind(Kind::Double).try_into()?;
        let wrong = found.iter().enumerate().find(|(i, v)| **v != expected(*i));
        ensure!(wrong.is_none(), "{what}: rank {rank} found {wrong:?}");
        Ok(())
    };
    let empty = |n: usize| tensor(&|_| -1.0, n);
    let parts = tensor(&|i| value(rank, i / N, i % N), world * N);

    let gathered = empty(world * N);
    group.all_gather(&gathered, &parts.narrow(0, 0, N as i64))?.wait()?;
    holds("all-gather", &gathered, &|i| value(i / N, 0, i % N))?;

    let received = empty(world * N);
    group.all_to_all(&received, &parts)?.wait()?;
    holds("all-to-all", &received, &|i| value(i / N, rank, i % N))?;

    let sum = |part: usize, i: usize| (0..world).map(|r| value(r, part, i)).sum::<f64>();
    let reduced = empty(N);
    group.reduce_scatter(&reduced, &parts)?.wait()?;
    holds("reduce-scatter", &reduced, &|i| sum(rank, i))?;

    group.all_reduce(&parts)?;
    holds("all-reduce", &parts, &|i| sum(i / N, i % N))?;

    for root in 0..world {
        let sent = tensor(&|i| value(rank, 0, i), N);
        group.broadcast(&sent, root)?;
        holds("broadcast", &sent, &|i| value(root, 0, i))?;
    }
    group.barrier()
}
