//! Advice: options that make a job fit in memory.

use cpift_core::Dtype;

use super::job::{Job, gib};
use crate::args::{Offload, Optimizer};

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

/// The table of a job that ran out of memory, and options that take less than the limit and less
/// than the estimate.
pub(super) fn after_failure(job: &Job, limit: Option<u64>) -> String {
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
    let alone = job.world == 1 && job.args.offload == Offload::None && job.args.optim_state_dtype == Dtype::F32;
    (before == Optimizer::Adamw && alone).then(|| (job, "--optim adamw_8bit".to_owned()))
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
