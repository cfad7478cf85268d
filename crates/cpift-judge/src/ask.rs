//! Asks many questions concurrently, with retries, and passes on every reply as it arrives.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Error, Result};
use log::warn;

use crate::endpoint::{Endpoint, Failure, Reply};
use crate::question::Question;

/// Wait before the first retry, without jitter.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// Longest wait before a retry, even if the endpoint asks for more.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Consecutive failed questions that end the run: the endpoint is down, not the question at fault.
const GIVE_UP_AFTER: usize = 10;

/// Limits on the requests.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Requests in flight.
    pub(crate) concurrency: usize,
    /// Retries per question.
    pub(crate) retries: u32,
}

/// Asks all `questions` and calls `answered` with each question and reply in the order of arrival.
/// Returns the errors of the failed questions.
///
/// # Errors
/// Stops early if the endpoint refuses the key or does not exist, after ten consecutive failures,
/// and if `answered` fails. Requests in flight are then abandoned.
pub(crate) fn ask_all(
    endpoint: &Arc<Endpoint>,
    questions: Vec<Question>,
    limits: Limits,
    mut answered: impl FnMut(&Question, Reply) -> Result<()>,
) -> Result<Vec<Error>> {
    let queue =
        Arc::new(Queue { questions, next: AtomicUsize::new(0), stopped: Mutex::new(false), wake: Condvar::new() });
    // Stops the threads however this function returns.
    let _stop = StopOnDrop(Arc::clone(&queue));
    // Capacity 0: no thread asks more than one question after an outcome that ends the run.
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
                    return Err(error.context(format!("{GIVE_UP_AFTER} questions in a row failed; the last error")));
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
    /// Asks questions until none are left or the run has ended.
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
                    warn!("{error:#}\n  retrying in {:.1} s", wait.as_secs_f64());
                    if self.stopped_within(wait) {
                        return Err(Failure::Passing { error, retry_after });
                    }
                    attempt += 1;
                }
                outcome => return outcome,
            }
        }
    }

    /// Waits until the run ends, at most `wait`. Returns true if it has ended.
    fn stopped_within(&self, wait: Duration) -> bool {
        let stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.wake.wait_timeout_while(stopped, wait, |stopped| !*stopped);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Exponential backoff with jitter (50 to 100 %), at least the wait the endpoint asks for and at
/// most a minute. The jitter depends on question and attempt only.
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
