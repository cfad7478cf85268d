//! Bytes that a training step moves between ranks, and between host and device, computed from the
//! configuration like the memory.

use serde_json::{Value, json};

use super::job::{Job, Sizes};
use crate::args::Offload;

/// Bytes of one rank and one optimizer step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    /// Received from other ranks: whole weights for each forward and backward pass, and summed
    /// gradients. As many are sent.
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
        let (weight, state) = (job.args.master_dtype.size() as u64, job.args.optim_state_dtype.size() as u64);
        let blocks = s.all_blocks;
        let rest = s.total() - blocks;
        let trained = job.trained(&s);
        // The blocks' weights once more for the backward pass, unless they stay.
        let lends = if job.args.reshard_after_forward { 2 } else { 1 };
        let gathered = lends * blocks * job.wire_bytes() + rest * weight;
        let head_and_table = trained - blocks.min(trained);
        let reduced = blocks * job.wire_bytes() + head_and_table * 4;
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
