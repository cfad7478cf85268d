//! Loss on rows that are not trained on.

use anyhow::Result;
use cpift_core::format::tasks::Task;
use tch::no_grad;

use crate::model::CausalLM;
use crate::score;
use cpift_data::{self as data, ChatText, Example, Layout, MaxLength, Overlong};

/// A task's held-out examples.
pub struct HeldOut {
    /// The task.
    pub task: String,
    /// Its examples.
    pub examples: Vec<Example>,
}

impl HeldOut {
    /// The first `rows` rows of the task's evaluation file, cut to `max_length` tokens.
    ///
    /// # Errors
    /// As [`data::encode_rows`].
    pub fn read(task: &Task, rows: usize, text: &ChatText, max_length: MaxLength) -> Result<Self> {
        let mut all = data::read_rows(&task.eval, &Layout::of(task)?)?;
        all.truncate(rows);
        let encoded =
            data::encode_rows(&task.eval, &all, text.with(&task.template_args), max_length, Overlong::Truncate)?;
        Ok(Self { task: task.name.clone(), examples: encoded.examples })
    }
}

/// Each task's mean loss in nats over its target tokens; batches of `batch_size` examples.
pub(crate) fn losses(model: &CausalLM, sets: &[HeldOut], batch_size: usize) -> Vec<(String, f64)> {
    no_grad(|| sets.iter().map(|set| (set.task.clone(), mean(model, &set.examples, batch_size))).collect())
}

fn mean(model: &CausalLM, examples: &[Example], batch_size: usize) -> f64 {
    let losses = score::losses(model, examples, batch_size, || ());
    losses.iter().map(|l| l.nll).sum::<f64>() / losses.iter().map(|l| l.targets as f64).sum::<f64>()
}
