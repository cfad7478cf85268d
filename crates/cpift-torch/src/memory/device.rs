//! Memory available on the device.

use std::fs;

use anyhow::{Result, bail};
use cpift_core::run::{first_number, left_by_ulimit};
use tch::Device;

use super::job::{PROGRAM, gib};
use crate::ffi;

/// Memory of `device` in bytes: of the GPU, or for the CPU that of the machine within the limits on
/// this process (its cgroup's, as Slurm sets it, and `ulimit -v`). None if the system does not
/// report it.
pub fn available(device: Device) -> Option<u64> {
    match device {
        Device::Cuda(index) => ffi::cuda_total(index),
        _ => [machine(), control_group(), address_space()].into_iter().flatten().min(),
    }
}

fn machine() -> Option<u64> {
    Some(1024 * first_number("/proc/meminfo", "MemTotal:")?)
}

/// Limit of the process's cgroup (version 2) and those above it.
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

/// The value of [`left_by_ulimit`] less the reserve, so that a job that fits passes
/// [`check_address_space`] in another run. The program's resident memory is counted with the job.
fn address_space() -> Option<u64> {
    Some(left_by_ulimit()?.saturating_sub(RESERVED + VARIES) + PROGRAM)
}

/// Address space of thread stacks and allocators, which is reserved but not used.
const RESERVED: u64 = 384 << 20;
/// Margin for what differs between runs in the address space at start.
const VARIES: u64 = 128 << 20;

/// Refuses work on the CPU that takes `bytes` if `ulimit -v` leaves less: a library that fails to
/// allocate may end the program without an error message.
///
/// # Errors
/// The bytes left and the bytes needed.
pub fn check_address_space(bytes: u64) -> Result<()> {
    let needed = bytes + RESERVED;
    match left_by_ulimit() {
        Some(left) if left < needed => bail!(
            "out of memory: ulimit -v leaves {:.2} GiB of address space, and about {:.2} GiB are needed",
            gib(left),
            gib(needed)
        ),
        _ => Ok(()),
    }
}
