//! The batches of a stage: how many steps a budget makes, and those that a thread of their own makes.

use std::panic::resume_unwind;
use std::sync::mpsc::Receiver;
use std::thread::ScopedJoinHandle;

use anyhow::{Result, anyhow};

use super::run::Stage;
use crate::args::Budget;
use crate::data::{Batch, FeedConfig, Feeder};
use cpift_data::Example;

/// What the thread `maker` has sent next; where it has panicked, its panic.
pub(crate) fn made<T>(batches: &Receiver<T>, maker: &mut Option<ScopedJoinHandle<'_, ()>>) -> Result<T> {
    batches.recv().or_else(|_| match maker.take().map(ScopedJoinHandle::join) {
        Some(Err(panic)) => resume_unwind(panic),
        _ => Err(anyhow!("the thread that makes batches has ended")),
    })
}

/// The batch of the examples at `places`.
pub(crate) fn join(examples: &[Example], places: &[usize]) -> Batch {
    Batch::new(&places.iter().map(|&i| &examples[i]).collect::<Vec<_>>())
}

/// The number of steps of a stage. A budget in tokens is walked through with the stage's own feeder, so that the schedule knows
/// its length before the first step.
pub(crate) fn plan_steps(stage: &Stage<'_>, config: FeedConfig) -> usize {
    match stage.budget {
        Budget::Steps(n) => n,
        Budget::Tokens(budget) => {
            let mut feeder = Feeder::new(stage.examples, config, stage.seed);
            let (mut seen, mut steps) = (0, 0);
            while seen < budget {
                seen += feeder.next_step().concat().into_iter().map(|i| stage.examples[i].ids.len()).sum::<usize>();
                steps += 1;
            }
            steps
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
                assert_eq!(made(&batches, &mut maker)?, 1);
                made(&batches, &mut maker)
            })
        });
        assert_eq!(failed.unwrap_err().to_string(), "a row that cannot be joined");
    }
}
