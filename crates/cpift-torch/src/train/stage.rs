//! A stage of training: the examples of its tasks, those to train on and those held out to measure
//! the loss on; its number of steps; and its batches, which a thread of their own makes.

use std::panic::resume_unwind;
use std::sync::mpsc::Receiver;
use std::thread::ScopedJoinHandle;

use anyhow::{Result, anyhow};
use cpift_core::format::tasks::Task;
use cpift_data as data;
use cpift_data::{Encoded, Example, Layout, Overlong};
use serde::{Deserialize, Serialize};
use tch::no_grad;

use super::isolation::Isolation;
use crate::args::{Budget, TrainingArgs};
use crate::data::{FeedConfig, Feeder, Part};
use crate::score;
use crate::session::{ModelInfo, Session};

/// A stage of training.
pub struct Stage<'a> {
    /// Name in logs and metrics.
    pub label: String,
    /// Examples to train on.
    pub examples: &'a [Example],
    /// Number of examples of each part in an epoch; empty if each comes once.
    pub mixture: &'a [Part],
    /// Elements that may change.
    pub isolation: Isolation<'a>,
    /// Epochs, steps or tokens.
    pub budget: Budget,
    /// Seed of the shuffle.
    pub seed: u64,
    /// Peak learning rate.
    pub lr: f64,
}

/// Results of a stage.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct StageReport {
    /// Optimizer steps.
    pub steps: usize,
    /// Tokens seen, padding not counted.
    pub tokens: usize,
    /// Loss of the first step.
    pub first_loss: f64,
    /// Mean loss of the last tenth of the steps.
    pub final_loss: f64,
    /// Number of frozen elements; of the last mask if it is dynamic.
    pub frozen: u64,
    /// Tokens that importance was measured on, not counted in `tokens`.
    #[serde(default)]
    pub importance_tokens: usize,
}

/// Receives the next batches from the thread `maker`; resumes its panic if it has panicked.
pub(crate) fn receive<T>(batches: &Receiver<T>, maker: &mut Option<ScopedJoinHandle<'_, ()>>) -> Result<T> {
    batches.recv().or_else(|_| match maker.take().map(ScopedJoinHandle::join) {
        Some(Err(panic)) => resume_unwind(panic),
        _ => Err(anyhow!("the thread that makes batches has ended")),
    })
}

/// Number of steps of a stage. A budget in tokens or epochs is counted with the stage's own feeder,
/// so that the schedule knows its length before the first step. An epoch ends with the step that
/// draws its last row; a batch may hold rows of two epochs.
pub(crate) fn plan_steps(stage: &Stage<'_>, config: FeedConfig) -> usize {
    let until = |budget: usize, count: fn(&Example) -> usize| {
        let mut feeder = Feeder::mixed(stage.examples, stage.mixture, config, stage.seed);
        let (mut seen, mut steps) = (0, 0);
        while seen < budget {
            seen += feeder.next_step().concat().into_iter().map(|i| count(&stage.examples[i])).sum::<usize>();
            steps += 1;
        }
        steps
    };
    match stage.budget {
        Budget::Steps(n) => n,
        Budget::Tokens(budget) => until(budget, |example| example.ids.len()),
        Budget::Epochs(epochs) => {
            // A product that is off by a rounding error is not one row more.
            let epoch = match stage.mixture {
                [] => stage.examples.len(),
                parts => parts.iter().map(|part| part.drawn).sum(),
            };
            let rows = epochs * epoch as f64 * (1.0 - 1e-12);
            until((rows.ceil() as usize).max(1), |_| 1)
        }
    }
}

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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;
    use std::thread;

    use super::*;
    use crate::oom;

    #[test]
    fn the_panic_of_the_thread_that_makes_batches_is_what_the_user_sees() {
        let failed = oom::explain(String::new, || {
            thread::scope(|scope| {
                let (sender, batches) = sync_channel(2);
                let maker = scope.spawn(move || {
                    sender.send(1).unwrap();
                    panic!("a row that cannot be joined");
                });
                let mut maker = Some(maker);
                assert_eq!(receive(&batches, &mut maker)?, 1);
                receive(&batches, &mut maker)
            })
        });
        assert_eq!(failed.unwrap_err().to_string(), "a row that cannot be joined");
    }
}
