//! Many questions: so many at a time, each with its retries, every reply handed over as it comes.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Error, Result};
use log::warn;

use crate::endpoint::{Endpoint, Failure, Reply};
use crate::prompt::Message;

/// The wait before the first retry, without jitter.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// The longest wait before a retry, whatever the endpoint asks for.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// So many questions that fail one after another end the run: the endpoint is down, not the question at fault.
const GIVE_UP_AFTER: usize = 10;

/// A question to the judge.
#[derive(Debug, Clone)]
pub struct Question {
    /// What it is known by; it also seeds the jitter.
    pub key: String,
    /// The task that the graded answer is to.
    pub task: String,
    /// The task's row, where the answer says.
    pub row: Option<u64>,
    /// The messages to send.
    pub messages: Vec<Message>,
}

/// How to ask.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Requests at a time.
    pub concurrency: usize,
    /// Retries of each question.
    pub retries: u32,
}

/// Asks all `questions` and hands each reply over with its question, in the order of arrival. Returns the errors of those that failed.
///
/// # Errors
/// At once, when the endpoint refuses the key or is not there, after ten failures in a row, and when `answered` fails. Requests under way
/// are abandoned then.
pub fn ask_all(
    endpoint: &Arc<Endpoint>,
    questions: Vec<Question>,
    limits: Limits,
    mut answered: impl FnMut(&Question, Reply) -> Result<()>,
) -> Result<Vec<Error>> {
    let queue =
        Arc::new(Queue { questions, next: AtomicUsize::new(0), stopped: Mutex::new(false), wake: Condvar::new() });
    // However this function ends, the threads end with it.
    let _stop = StopOnDrop(Arc::clone(&queue));
    // Handed over, not queued: no thread asks more than one question beyond an outcome that ends the run.
    let (sender, outcomes) = sync_channel(0);
    for _ in 0..limits.concurrency.min(queue.questions.len()) {
        let (endpoint, queue, sender) = (Arc::clone(endpoint), Arc::clone(&queue), sender.clone());
        thread::spawn(move || queue.work(&endpoint, limits.retries, &sender));
    }
    drop(sender);
    let (mut failed, mut in_a_row) = (Vec::new(), 0);
    for (i, outcome) in outcomes {
        match outcome {
            Ok(reply) => {
                answered(&queue.questions[i], reply)?;
                in_a_row = 0;
            }
            Err(Failure::Fatal(error)) => return Err(error),
            Err(Failure::Passing { error, .. } | Failure::Lasting(error)) => {
                in_a_row += 1;
                if in_a_row == GIVE_UP_AFTER {
                    return Err(
                        error.context(format!("{GIVE_UP_AFTER} questions in a row have failed, the last one so"))
                    );
                }
                failed.push(error);
            }
        }
    }
    Ok(failed)
}

struct Queue {
    questions: Vec<Question>,
    next: AtomicUsize,
    stopped: Mutex<bool>,
    wake: Condvar,
}

struct StopOnDrop(Arc<Queue>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        *self.0.stopped.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.wake.notify_all();
    }
}

impl Queue {
    /// Takes question after question until there are none, or nobody wants the outcome.
    fn work(&self, endpoint: &Endpoint, retries: u32, outcomes: &SyncSender<(usize, Result<Reply, Failure>)>) {
        while !self.stopped_within(Duration::ZERO) {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(question) = self.questions.get(i) else { return };
            if outcomes.send((i, self.ask(endpoint, question, retries))).is_err() {
                return;
            }
        }
    }

    fn ask(&self, endpoint: &Endpoint, question: &Question, retries: u32) -> Result<Reply, Failure> {
        let mut attempt = 0;
        loop {
            match endpoint.ask(&question.messages) {
                Err(Failure::Passing { error, retry_after }) if attempt < retries => {
                    let wait = wait_before_retry(&question.key, attempt, retry_after);
                    warn!("{error:#}\n  asked again in {:.1} s", wait.as_secs_f64());
                    if self.stopped_within(wait) {
                        return Err(Failure::Passing { error, retry_after });
                    }
                    attempt += 1;
                }
                outcome => return outcome,
            }
        }
    }

    /// Waits, but not on once the run has ended; whether it has.
    fn stopped_within(&self, wait: Duration) -> bool {
        let stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.wake.wait_timeout_while(stopped, wait, |stopped| !*stopped);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Twice as long each time, between a half and all of it so that requests refused together do not come back together; at least as long as
/// the endpoint asks for, and never longer than a minute. The jitter is the same for the same question and attempt.
fn wait_before_retry(key: &str, attempt: u32, retry_after: Option<Duration>) -> Duration {
    let hash = blake3::hash(format!("{key} {attempt}").as_bytes());
    let share = 0.5 + f64::from(hash.as_bytes()[0]) / 510.0;
    let backoff = FIRST_WAIT.saturating_mul(1 << attempt.min(16)).min(LONGEST_WAIT).mul_f64(share);
    backoff.max(retry_after.unwrap_or_default()).min(LONGEST_WAIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_with_jitter_and_are_bounded() {
        for attempt in 0..40 {
            let whole = (0.5 * 2f64.powi(attempt as i32)).min(60.0);
            let wait = wait_before_retry("k", attempt, None).as_secs_f64();
            assert!((whole / 2.0..=whole).contains(&wait), "{attempt}: {wait}");
        }
        let first: Vec<Duration> = (0..20).map(|i| wait_before_retry(&i.to_string(), 0, None)).collect();
        assert!(first.iter().any(|wait| *wait != first[0]), "no jitter");
        assert_eq!(first[0], wait_before_retry("0", 0, None));
    }

    #[test]
    fn the_endpoints_wish_is_followed_up_to_a_minute() {
        assert_eq!(wait_before_retry("k", 0, Some(Duration::from_secs(7))), Duration::from_secs(7));
        assert_eq!(wait_before_retry("k", 0, Some(Duration::from_secs(86_400))), LONGEST_WAIT);
        assert!(wait_before_retry("k", 3, Some(Duration::ZERO)) >= Duration::from_secs(2));
    }
}
