//! A stage of training: what it trains on, its number of steps, and its batches, which a thread of
//! their own makes.

use std::panic::resume_unwind;
use std::sync::mpsc::Receiver;
use std::thread::ScopedJoinHandle;

use anyhow::{Result, anyhow};
use cpift_data::Example;
use serde::{Deserialize, Serialize};

use super::isolation::Isolation;
use crate::args::Budget;
use crate::data::{FeedConfig, Feeder, Part};

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
