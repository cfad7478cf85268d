//! How much memory there is to train in.

use std::fs;

use anyhow::{Result, bail};
use tch::Device;

use super::{PROGRAM, gib};
use crate::ffi;

/// Bytes of `device`: of the card, or for the CPU of the machine, within the limits on this process (its control group's, as Slurm
/// sets it, and `ulimit -v`). None where the system does not say.
pub fn available(device: Device) -> Option<u64> {
    match device {
        Device::Cuda(index) => ffi::cuda_total(index),
        _ => [machine(), control_group(), address_space()].into_iter().flatten().min(),
    }
}

fn machine() -> Option<u64> {
    Some(1024 * first_number("/proc/meminfo", "MemTotal:")?)
}

/// Version 2 of control groups, the process's own and those above it.
fn control_group() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = groups.lines().find_map(|l| l.strip_prefix("0::/"))?;
    let limit = |dir: &std::path::Path| {
        fs::read_to_string(std::path::Path::new("/sys/fs/cgroup").join(dir).join("memory.max"))
            .ok()?
            .trim()
            .parse()
            .ok()
    };
    std::path::Path::new(own).ancestors().filter_map(limit).min()
}

/// As [`left_by_ulimit`], less what is reserved, so that what fits passes [`check_address_space`] in another run; the program's resident part
/// is counted with the job.
fn address_space() -> Option<u64> {
    Some(left_by_ulimit()?.saturating_sub(RESERVED + VARIES) + PROGRAM)
}

/// What `ulimit -v` leaves beside the address space that the program takes already; none where there is no limit.
pub(super) fn left_by_ulimit() -> Option<u64> {
    let limit = first_number("/proc/self/limits", "Max address space")?;
    let taken = 1024 * first_number("/proc/self/status", "VmSize:")?;
    Some(limit.saturating_sub(taken))
}

/// Stacks of threads and what allocators reserve: addresses rather than memory.
const RESERVED: u64 = 384 << 20;
/// What one run has taken at its start and another has not: two arenas of glibc's.
const VARIES: u64 = 128 << 20;

/// Refuses work on the CPU that takes `bytes` where `ulimit -v` leaves less: a library that gets no memory may end the program without
/// a word.
///
/// # Errors
/// How much there is and how much is needed.
pub fn check_address_space(bytes: u64) -> Result<()> {
    let needed = bytes + RESERVED;
    match left_by_ulimit() {
        Some(left) if left < needed => bail!(
            "out of memory: ulimit -v leaves {:.2} GiB of addresses, and about {:.2} GiB are needed",
            gib(left),
            gib(needed)
        ),
        _ => Ok(()),
    }
}

/// The first number after `label` in a file of /proc; none for `unlimited`.
fn first_number(path: &str, label: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(label))?;
    line.split_whitespace().next()?.parse().ok()
}
