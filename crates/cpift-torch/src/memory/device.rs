//! How much memory there is to train in.

use std::fs;

use tch::Device;

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

/// What `ulimit -v` leaves beside the address space that the program takes already.
fn address_space() -> Option<u64> {
    let limit = first_number("/proc/self/limits", "Max address space")?;
    let taken = 1024 * first_number("/proc/self/status", "VmSize:")?;
    Some(limit.saturating_sub(taken))
}

/// The first number after `label` in a file of /proc; none for `unlimited`.
fn first_number(path: &str, label: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(label))?;
    line.split_whitespace().next()?.parse().ok()
}
