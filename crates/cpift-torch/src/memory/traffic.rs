//! Bytes of a job outside its memory: those that a training step moves between ranks, and between
//! host and device, computed from the configuration like the memory; and the disk space of a whole
//! pipeline.

use cpift_core::Dtype;
use serde_json::{Value, json};

use super::job::{Job, Sizes};
use crate::args::Offload;

/// Bytes of one rank and one optimizer step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    /// Received from other ranks: whole weights for each forward and backward pass, and gradients.
    /// As many are sent.
    pub ranks: u64,
    /// Part of [`Traffic::ranks`] that comes from other nodes.
    pub nodes: u64,
    /// Copied between host and device.
    pub host_link: u64,
    /// Host memory of weights and moments that are offloaded.
    pub host_memory: u64,
}

impl Traffic {
    /// The traffic of `job`, with `per_node` ranks on each node.
    pub fn of(job: &Job, per_node: u64) -> Self {
        let s = Sizes::of(&job.config);
        let (world, passes) = (job.world, job.args.grad_accum as u64);
        let (weight, state) = (job.weight_bytes(), job.args.optim_state_dtype.size() as u64);
        let blocks = s.all_blocks;
        let rest = s.total() - blocks;
        let trained = job.trained(&s);
        // The blocks' weights once more for the backward pass, unless they stay.
        let lends = if job.args.reshard_after_forward { 2 } else { 1 };
        let gathered = lends * blocks * job.wire_bytes() + rest * weight;
        let head_and_table = trained - blocks.min(trained);
        let reduced = match &job.lora {
            // Every rank receives the gradients of all others.
            Some(_) => world * trained * 4,
            None => blocks * job.wire_bytes() + head_and_table * 4,
        };
        let whole = if world > 1 { passes * (gathered + reduced) } else { 0 };
        let from = |others: u64| (u128::from(whole) * u128::from(others) / u128::from(world)) as u64;
        let share = |bytes: u64| bytes.div_ceil(world);
        let (weights_away, moments_away) = match job.args.offload {
            Offload::None => (false, false),
            Offload::Optimizer => (false, true),
            Offload::All => (true, true),
        };
        let lent = passes * (lends * blocks + rest) * weight;
        // Each state is read and written by an update.
        let updated = |bytes: u64| 2 * bytes * trained;
        let host_link =
            u64::from(weights_away) * (lent + updated(weight)) + u64::from(moments_away) * updated(2 * state);
        let host_memory = u64::from(weights_away) * s.total() * weight + u64::from(moments_away) * 2 * trained * state;
        Self {
            ranks: from(world - 1),
            nodes: from(world.saturating_sub(per_node)),
            host_link: if job.cuda { share(host_link) } else { 0 },
            host_memory: share(host_memory),
        }
    }

    /// Lines for a person; `link` is a rate in bytes per second.
    pub fn text(&self, link: Option<f64>) -> String {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        let at = |bytes: u64| match link {
            Some(rate) => format!(", {:.2} s at {:.0} GB/s", bytes as f64 / rate, rate / 1e9),
            None => String::new(),
        };
        let mut text = String::new();
        if self.ranks > 0 {
            let (what, bytes) = match self.nodes {
                0 => ("between ranks", self.ranks),
                nodes => ("between nodes", nodes),
            };
            text += &format!("each rank receives {:.2} GB per step {what}{}\n", gb(bytes), at(bytes));
        }
        if self.host_memory > 0 {
            let copied = match self.host_link {
                0 => String::new(),
                bytes => format!("; {:.2} GB between host and device per step{}", gb(bytes), at(bytes)),
            };
            text += &format!("offloaded: {:.2} GB per rank{copied}\n", gb(self.host_memory));
        }
        text
    }

    /// The same as JSON; times in seconds.
    pub fn to_json(&self, link: Option<f64>) -> Value {
        let at = |bytes: u64| link.map(|rate| bytes as f64 / rate);
        json!({"ranks": self.ranks, "nodes": self.nodes, "host_link": self.host_link, "host_memory": self.host_memory,
            "ranks_seconds": at(if self.nodes > 0 { self.nodes } else { self.ranks }), "host_seconds": at(self.host_link)})
    }
}

/// Sizes of the outputs of a pipeline, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    /// Number of tasks; each has a probe and a mask.
    pub tasks: u64,
    /// A checkpoint in --save-dtype.
    pub checkpoint: u64,
    /// The mask of a task: one bit per element.
    pub mask: u64,
    /// A saved training state: weights and both moments in their dtypes.
    pub state: u64,
    /// Saved states that exist while one more is being saved; 0 without --save-every.
    pub states: u64,
    save_dtype: Dtype,
}

impl Disk {
    /// The disk space of `job` for `tasks` tasks.
    pub fn of(job: &Job, tasks: u64) -> Self {
        let s = Sizes::of(&job.config);
        let weight = job.args.master_dtype.size() as u64;
        Self {
            tasks,
            checkpoint: s.total() * job.args.save_dtype.size() as u64,
            mask: s.total().div_ceil(8),
            state: job.moment_bytes() + if job.lora.is_some() { 4 * job.trained(&s) } else { s.total() * weight },
            // The new state is complete before the oldest is removed.
            states: job.args.save_every.map_or(0, |_| {
                // Those of --average-last stay, the last of which is the output itself.
                job.args.save_total_limit.max(job.args.average_last.unwrap_or(1) - 1) as u64 + 1
            }),
            save_dtype: job.args.save_dtype,
        }
    }

    /// Name and size of each kind of output.
    pub fn rows(&self) -> Vec<(String, u64)> {
        let dtype = self.save_dtype.name().to_lowercase();
        let mut rows = vec![
            (format!("probes, {} x {dtype}", self.tasks), self.tasks * self.checkpoint),
            (format!("masks, {} x 1 bit", self.tasks), self.tasks * self.mask),
            ("backbone".to_owned(), self.checkpoint),
            ("merged".to_owned(), self.checkpoint),
            ("final".to_owned(), self.checkpoint),
            ("baselines, 2".to_owned(), 2 * self.checkpoint),
        ];
        if self.states > 0 {
            rows.push((format!("states, {} at a time", self.states), self.states * self.state));
        }
        rows
    }

    /// Total bytes.
    pub fn total(&self) -> u64 {
        self.rows().iter().map(|(_, bytes)| bytes).sum()
    }

    /// Table in GB (10⁹ bytes, as in `df -H`).
    pub fn table(&self) -> String {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        let rows = self.rows().into_iter().chain([("total".to_owned(), self.total())]);
        let lines: String = rows.map(|(name, bytes)| format!("{name:24}{:10.1}\n", gb(bytes))).collect();
        let mut text = format!(
            "GB on disk, computed, for CPI-FT, its baselines and {} tasks (make pipeline)\n{lines}",
            self.tasks
        );
        text.push_str(&format!(
            "  hint: make clean-probes RUN=DIR frees {:.1} GB once masks and merge are made\n",
            gb(self.tasks * self.checkpoint)
        ));
        if self.save_dtype.size() > 2 {
            text.push_str(
                "  hint: --save-dtype bf16 halves the checkpoints, but loses most of the small updates that masks rank\n",
            );
        }
        if self.states == 0 {
            text.push_str(&format!(
                "  a signal saves one state to resume from, {:.1} GB, until the run has ended\n",
                gb(self.state)
            ));
        }
        text
    }
}
