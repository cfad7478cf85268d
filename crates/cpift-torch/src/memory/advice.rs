//! Limits of the machine, and advice: options that make a job fit in memory.

use std::fs;

use anyhow::{Result, bail};
use cpift_core::Dtype;
use cpift_core::run::{first_number, left_by_ulimit};
use tch::Device;

use super::job::{Job, PROGRAM, gib};
use crate::args::{Offload, Optimizer, TrainingArgs};
use crate::dist::Place;
use crate::ffi;

/// Options that make a job fit.
#[derive(Debug, Clone, PartialEq)]
pub struct Advice {
    /// Each option alone, cheapest first, and the total with it.
    pub alone: Vec<(String, u64)>,
    /// The cheapest combination that fits, and the total with it.
    pub fits: Option<(String, u64)>,
    /// Available bytes.
    limit: u64,
}

/// Reports if `job` fits in `limit` bytes (none: not known), and if not, what would make it fit.
pub fn verdict(job: &Job, limit: Option<u64>) -> String {
    let (peak, total) = (job.peak().name, job.peak().total());
    match limit {
        None => "the memory of the device is not known: give it with --device-memory GIB\n".to_owned(),
        Some(limit) if total <= limit => {
            // The sum leaves out what an allocator loses to fragmentation.
            let tight = if total > limit / 20 * 19 { ", but only just: allocators need some room" } else { "" };
            format!("fits: {:.2} of {:.2} GiB (peak: {peak}){tight}\n", gib(total), gib(limit))
        }
        Some(limit) => {
            let advice = advice(job, limit);
            format!("does not fit: {:.2} of {:.2} GiB (peak: {peak})\n{advice}\n", gib(total), gib(limit))
        }
    }
}

/// The estimate for the job of a run with `frozen` elements, and options that take less, for
/// [`crate::oom::explain`].
pub fn of_failed_run(job: Result<Job>, args: &TrainingArgs, frozen: u64) -> String {
    let world = Place::from_env().ok().flatten().map_or(1, |place| place.world as u64);
    let job = job.map(|job| Job { frozen, ..job }.shared_by(world));
    let device = args.device.open(None);
    match job {
        Ok(job) => after_failure(&job, device.ok().and_then(available)),
        Err(error) => format!("  the memory of the run cannot be computed: {error:#}"),
    }
}

/// The table of a job that ran out of memory, and options that take less than the limit and less
/// than the estimate.
fn after_failure(job: &Job, limit: Option<u64>) -> String {
    let total = job.peak().total();
    let limit = limit.unwrap_or(total).min(total - total / 20);
    format!("{}{}", job.table(), advice(job, limit))
}

type Change = fn(&Job, u64) -> Option<(Job, String)>;

/// Changes, cheapest first: a third more work; conditions on the step; more, smaller batches;
/// rounded moments; rounded weights; moments in 8 bits; moments, then weights too, in host memory.
const CHANGES: [Change; 8] =
    [checkpointing, in_backward, smaller_batch, moments, master, eight_bits, offload_moments, offload_all];
/// Place of `smaller_batch` in [`CHANGES`].
const BATCH: usize = 2;

/// Finds the options that make `job` fit in `limit` bytes: the combination whose most expensive
/// option is cheapest.
pub fn advice(job: &Job, limit: u64) -> Advice {
    let now = job.peak().total();
    let alone = CHANGES.iter().filter_map(|change| change(job, limit)).map(|(j, text)| (text, j.peak().total()));
    // An option that saves less than 1 % is not worth listing.
    let alone = alone.filter(|(_, total)| *total < now - now / 100);
    let together = (1..1u32 << CHANGES.len()).filter_map(|set| apply(job, set, limit));
    let fits = together.map(|(j, text)| (text, j.peak().total())).find(|(_, total)| *total <= limit);
    Advice { alone: alone.collect(), fits, limit }
}

/// Applies the changes whose bits are set; none if one of them is not possible.
fn apply(job: &Job, set: u32, limit: u64) -> Option<(Job, String)> {
    let mut texts = Vec::new();
    let mut changed = job.clone();
    // The batch last: the size that fits depends on the other changes.
    for i in (0..CHANGES.len()).filter(|i| *i != BATCH).chain([BATCH]) {
        if set & (1 << i) != 0 {
            let text;
            (changed, text) = CHANGES[i](&changed, limit)?;
            texts.push(text);
        }
    }
    Some((changed, texts.join(" ")))
}

fn checkpointing(job: &Job, _: u64) -> Option<(Job, String)> {
    let mut job = job.clone();
    let done = std::mem::replace(&mut job.args.gradient_checkpointing, true);
    (!done).then(|| (job, "--gradient-checkpointing".to_owned()))
}

/// Updates in the backward pass, without clipping and without gradient accumulation: both need all
/// gradients.
fn in_backward(job: &Job, _: u64) -> Option<(Job, String)> {
    let mut job = job.clone();
    let possible = !job.args.optimizer_in_backward && job.args.grad_accum == 1;
    job.args.optimizer_in_backward = true;
    let clips = std::mem::replace(&mut job.args.max_grad_norm, 0.0) > 0.0;
    let text = if clips { "--optimizer-in-backward --max-grad-norm 0" } else { "--optimizer-in-backward" };
    possible.then(|| (job, text.to_owned()))
}

/// Halves the batch until it fits (down to one example) and accumulates as many more.
fn smaller_batch(job: &Job, limit: u64) -> Option<(Job, String)> {
    if job.args.batch_size == 1 || job.args.optimizer_in_backward {
        return None;
    }
    let halves = std::iter::successors(Some(job.args.batch_size.div_ceil(2)), |n| (*n > 1).then(|| n.div_ceil(2)));
    let smaller = |size: usize| {
        let mut smaller = job.with_batch(size);
        smaller.args.grad_accum = job.args.grad_accum * job.args.batch_size.div_ceil(size);
        smaller
    };
    let sizes: Vec<usize> = halves.collect();
    let size = sizes.iter().copied().find(|n| smaller(*n).peak().total() <= limit).or(sizes.last().copied())?;
    let job = smaller(size);
    let text = format!("--batch-size {size} --grad-accum {}", job.args.grad_accum);
    Some((job, text))
}

fn moments(job: &Job, _: u64) -> Option<(Job, String)> {
    let mut job = job.clone();
    let before = std::mem::replace(&mut job.args.optim_state_dtype, Dtype::BF16);
    let possible = before != Dtype::BF16 && job.args.optim == Optimizer::Adamw;
    possible.then(|| (job, "--optim-state-dtype bf16".to_owned()))
}

fn master(job: &Job, _: u64) -> Option<(Job, String)> {
    let mut job = job.clone();
    let before = std::mem::replace(&mut job.args.master_dtype, Dtype::BF16);
    (before != Dtype::BF16 && job.lora.is_none()).then(|| (job, "--master-dtype bf16".to_owned()))
}

fn eight_bits(job: &Job, _: u64) -> Option<(Job, String)> {
    let mut job = job.clone();
    let before = std::mem::replace(&mut job.args.optim, Optimizer::Adamw8bit);
    let possible = job.args.offload == Offload::None && job.args.optim_state_dtype == Dtype::F32;
    (before == Optimizer::Adamw && possible).then(|| (job, "--optim adamw_8bit".to_owned()))
}

fn offload_moments(job: &Job, _: u64) -> Option<(Job, String)> {
    offload(job, Offload::Optimizer, "--offload optimizer")
}

fn offload_all(job: &Job, _: u64) -> Option<(Job, String)> {
    offload(job, Offload::All, "--offload all")
}

/// State in host memory; on the CPU it would be files, which the estimate has no room for either.
fn offload(job: &Job, what: Offload, text: &str) -> Option<(Job, String)> {
    let possible = job.cuda && job.args.offload == Offload::None && job.lora.is_none();
    let possible = possible && job.args.optim == Optimizer::Adamw;
    let mut job = job.clone();
    job.args.offload = what;
    possible.then(|| (job, text.to_owned()))
}

impl std::fmt::Display for Advice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (option, total) in &self.alone {
            writeln!(f, "  with {option}: {:.2} GiB", gib(*total))?;
        }
        match &self.fits {
            Some((options, total)) => {
                write!(f, "  hint: {options} fits: {:.2} of {:.2} GiB", gib(*total), gib(self.limit))
            }
            None => write!(
                f,
                "  hint: no option makes it fit in {:.2} GiB: use a smaller model, a smaller --max-length or a larger device",
                gib(self.limit)
            ),
        }
    }
}

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

/// Refuses a job on `world` ranks if `ulimit -v` leaves less memory than the estimate. Does nothing
/// if there is no estimate.
///
/// # Errors
/// Errors of [`check_address_space`].
pub fn check_run(job: impl FnOnce() -> Result<Job>, world: usize) -> Result<()> {
    if left_by_ulimit().is_none() {
        return Ok(());
    }
    match job() {
        Ok(job) if !job.cuda => check_address_space(job.shared_by(world as u64).peak().total() - PROGRAM),
        _ => Ok(()),
    }
}
