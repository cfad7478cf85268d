//! What to change so that a job fits.

use super::{Job, gib};
use cpift_core::Dtype;

/// Which options make a job fit.
#[derive(Debug, Clone, PartialEq)]
pub struct Advice {
    /// Each option alone, in the order of what it costs, and the total with it.
    pub alone: Vec<(String, u64)>,
    /// The cheapest options that together fit, and the total with them.
    pub fits: Option<(String, u64)>,
    /// The memory there is.
    limit: u64,
}

/// Whether `job` fits into `limit` bytes (none: not known), and if not what would make it fit.
pub fn verdict(job: &Job, limit: Option<u64>) -> String {
    let (peak, total) = (job.peak().name, job.peak().total());
    match limit {
        None => "how much memory the device has is not known: name it with --device-memory GIB\n".to_owned(),
        Some(limit) if total <= limit => {
            // What an allocator loses to fragmentation is not in the sum.
            let tight = if total > limit / 20 * 19 { ", but only just: allocators need some room" } else { "" };
            format!("fits: {:.2} of {:.2} GiB (peak: {peak}){tight}\n", gib(total), gib(limit))
        }
        Some(limit) => {
            let advice = advice(job, limit);
            format!("does not fit: {:.2} of {:.2} GiB (peak: {peak})\n{advice}\n", gib(total), gib(limit))
        }
    }
}

/// The table of a job that ran out of memory, and what would take less: less than there is, and less than this.
pub fn after_failure(job: &Job, limit: Option<u64>) -> String {
    let total = job.peak().total();
    let limit = limit.unwrap_or(total).min(total - total / 20);
    format!("{}{}", job.table(), advice(job, limit))
}

type Change = fn(&Job, u64) -> Option<(Job, String)>;

/// In the order of what they cost: a third more work; conditions on the step; more steps of less work each; moments, then weights, that
/// are rounded.
const CHANGES: [Change; 5] = [checkpointing, in_backward, smaller_batch, moments, master];

/// The options that make `job` fit into `limit` bytes: of all combinations the one whose most expensive option is the cheapest.
pub fn advice(job: &Job, limit: u64) -> Advice {
    let now = job.peak().total();
    let alone = CHANGES.iter().filter_map(|change| change(job, limit)).map(|(j, text)| (text, j.peak().total()));
    // What saves less than a hundredth is no way out.
    let alone = alone.filter(|(_, total)| *total < now - now / 100);
    let together = (1..1u32 << CHANGES.len()).filter_map(|set| apply(job, set, limit));
    let fits = together.map(|(j, text)| (text, j.peak().total())).find(|(_, total)| *total <= limit);
    Advice { alone: alone.collect(), fits, limit }
}

/// `job` with the changes whose bits are set; none where one of them cannot be made.
fn apply(job: &Job, set: u32, limit: u64) -> Option<(Job, String)> {
    let mut texts = Vec::new();
    let mut changed = job.clone();
    // The batch last: how small it must be depends on the others.
    for i in [0, 1, 3, 4, 2] {
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

/// Without sums over batches and without clipping: both need all gradients.
fn in_backward(job: &Job, _: u64) -> Option<(Job, String)> {
    let mut job = job.clone();
    let possible = !job.args.optimizer_in_backward && job.args.grad_accum == 1;
    job.args.optimizer_in_backward = true;
    let clips = std::mem::replace(&mut job.args.max_grad_norm, 0.0) > 0.0;
    let text = if clips { "--optimizer-in-backward --max-grad-norm 0" } else { "--optimizer-in-backward" };
    possible.then(|| (job, text.to_owned()))
}

/// The largest batch that fits, by halves, and as many more of them a step; where none does, one example.
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
    let before = std::mem::replace(&mut job.args.optim_state, Dtype::BF16);
    (before != Dtype::BF16).then(|| (job, "--optim-state bf16".to_owned()))
}

fn master(job: &Job, _: u64) -> Option<(Job, String)> {
    let mut job = job.clone();
    let before = std::mem::replace(&mut job.args.master, Dtype::BF16);
    (before != Dtype::BF16).then(|| (job, "--master bf16".to_owned()))
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
                "  hint: no option makes it fit into {:.2} GiB: take a smaller model or --max-length, or a larger device",
                gib(self.limit)
            ),
        }
    }
}
