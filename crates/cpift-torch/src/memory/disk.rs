//! Disk space of a whole pipeline.

use cpift_core::Dtype;

use super::job::{Job, Sizes};

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
