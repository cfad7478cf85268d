//! Examples of a task: those to train on, and those held out to measure the loss on.

use anyhow::Result;
use cpift_core::format::tasks::Task;
use cpift_data::{self as data, Encoded, Example, Layout, Overlong};
use tch::no_grad;

use crate::args::TrainingArgs;
use crate::score;
use crate::session::{ModelInfo, Session};

/// Encodes the training file of `task`, and logs the numbers of examples, truncated and dropped
/// rows.
///
/// # Errors
/// [`cpift_core::BadInput`] naming the first row that cannot be used.
pub fn read_examples(task: &Task, model: &ModelInfo, args: &TrainingArgs) -> Result<Encoded> {
    let rows = data::read_rows(&task.train, &Layout::of(task)?)?;
    let max_length = model.context_of(task, args.max_length);
    let chat = model.text.with(&task.template_args);
    let encoded = data::encode_rows(&task.train, &rows, chat, max_length, args.overlong())?;
    data::report(&task.name, &encoded, max_length);
    Ok(encoded)
}

/// Held-out examples of a task.
pub struct HeldOut {
    /// Name of the task.
    pub task: String,
    /// Examples that are not trained on.
    pub examples: Vec<Example>,
}

impl HeldOut {
    /// Reads the first `--eval-rows` rows of the evaluation file of each of `tasks`, truncated to
    /// the context; none without `--eval-every`.
    ///
    /// # Errors
    /// [`cpift_core::BadInput`] naming the first row that cannot be used.
    pub fn read(tasks: &[Task], model: &ModelInfo, args: &TrainingArgs) -> Result<Vec<Self>> {
        let read = |task: &Task| {
            let mut rows = data::read_rows(&task.eval, &Layout::of(task)?)?;
            rows.truncate(args.eval_rows);
            let max_length = model.context_of(task, args.max_length);
            let chat = model.text.with(&task.template_args);
            let encoded = data::encode_rows(&task.eval, &rows, chat, max_length, Overlong::Truncate)?;
            Ok(Self { task: task.name.clone(), examples: encoded.examples })
        };
        if args.eval_every.is_none() { Ok(Vec::new()) } else { tasks.iter().map(read).collect() }
    }
}

/// Mean loss of each task in nats per target token, in batches of `batch_size` examples, which the
/// ranks share.
///
/// # Errors
/// A failed collective.
pub(crate) fn held_out_losses(session: &Session, sets: &[HeldOut], batch_size: usize) -> Result<Vec<(String, f64)>> {
    let mean = |set: &HeldOut| -> Result<(String, f64)> {
        let losses = score::losses(&session.model, &set.examples, batch_size, || ())?;
        let mean = losses.iter().map(|l| l.nll).sum::<f64>() / losses.iter().map(|l| l.targets as f64).sum::<f64>();
        Ok((set.task.clone(), mean))
    };
    no_grad(|| sets.iter().map(mean).collect())
}
