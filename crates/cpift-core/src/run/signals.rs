//! Signals: what is staged goes, and a stage that can stop in an orderly way is asked to first.

use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};
use signal_hook::consts::{SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use crate::files::staging;

/// What the stage is at, as a [`Phase`].
static PHASE: AtomicU8 = AtomicU8::new(0);
/// The signal that asked it to stop; 0 for none.
static ASKED: AtomicI32 = AtomicI32::new(0);

/// Warnings within this time of the first are the same one: a cluster warns all processes of a job, and those that started the stage
/// pass it on.
const ECHO: Duration = Duration::from_secs(2);

/// What a signal meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// Steps that can stop after any of them: the stage asks [`stop_asked`] and saves its state.
    Steps = 1,
    /// A state that is being saved.
    State = 2,
    /// The output that is being written, when all the work is done.
    Output = 3,
}

/// What a signal leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// What is staged goes, and the program ends.
    End,
    /// It is noted, and this said.
    Wait(&'static str),
}

/// Listens for signals from here on. Each removes what is staged and ends the program with 128 + its number, as a shell reports it;
/// except that while an [`SignalScope`] lives the first SIGTERM or SIGUSR1 (Slurm's warnings) is only noted, that none of these two cuts
/// short the writing of a state or of the output, and that the first signal of any kind does not cut short the output.
///
/// Signals come to the listening thread alone: the threads started from here on inherit that they are blocked. A handler that runs
/// upon a thread in the midst of a matrix product of libtorch has been seen to spoil its heap.
///
/// # Errors
/// When the handlers cannot be set.
pub(crate) fn listen() -> Result<()> {
    const HEARD: [Signal; 4] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGUSR1];
    let heard: SigSet = HEARD.into_iter().collect();
    let mut signals = Signals::new(HEARD.map(|s| s as i32)).context("listening for signals")?;
    heard.thread_block().context("blocking signals")?;
    let hear = move || {
        if let Err(error) = heard.thread_unblock() {
            log::warn!("signals are not heard: {error}");
        }
        let mut warned: Option<(i32, Instant)> = None;
        for signal in signals.forever() {
            if warned.is_some_and(|(before, at)| before == signal && at.elapsed() < ECHO) {
                continue;
            }
            let first = ASKED.load(Ordering::SeqCst) == 0;
            match answer(signal, PHASE.load(Ordering::SeqCst), first) {
                Answer::Wait(what) => {
                    if is_warning(signal) {
                        warned.get_or_insert_with(|| (signal, Instant::now()));
                    }
                    let _ = ASKED.compare_exchange(0, signal, Ordering::SeqCst, Ordering::SeqCst);
                    log::info!("{}: {what}", name(signal));
                }
                // Without destructors: other threads are still at work with what they would destroy.
                Answer::End => staging::discard_unfinished(|| signal_hook::low_level::exit(128 + signal)),
            }
        }
    };
    std::thread::Builder::new().spawn(hear).map(drop).context("starting the thread that hears signals")
}

fn is_warning(signal: i32) -> bool {
    matches!(signal, SIGTERM | SIGUSR1)
}

fn answer(signal: i32, work: u8, first: bool) -> Answer {
    let warning = is_warning(signal);
    match work {
        w if w == Phase::Steps as u8 && warning && first => {
            Answer::Wait("saving and stopping after this step; a second signal stops at once")
        }
        w if w == Phase::State as u8 && warning => Answer::Wait("stopping when the state is saved"),
        w if w == Phase::Output as u8 && (warning || first) => {
            Answer::Wait("training is done, the output is being written first; another SIGINT stops at once")
        }
        _ => Answer::End,
    }
}

/// While it lives, signals meet the work it was begun for; then what they met before.
pub struct SignalScope(u8);

impl SignalScope {
    /// From here on signals meet `work`.
    pub fn begin(work: Phase) -> Self {
        Self(PHASE.swap(work as u8, Ordering::SeqCst))
    }
}

impl Drop for SignalScope {
    fn drop(&mut self) {
        PHASE.store(self.0, Ordering::SeqCst);
    }
}

/// The name of the signal that has asked the stage to stop.
pub fn stop_asked() -> Option<&'static str> {
    match ASKED.load(Ordering::SeqCst) {
        0 => None,
        signal => Some(name(signal)),
    }
}

fn name(signal: i32) -> &'static str {
    signal_hook::low_level::signal_name(signal).unwrap_or("a signal")
}

#[cfg(test)]
mod tests {
    use signal_hook::consts::{SIGHUP, SIGINT};

    use super::*;

    #[test]
    fn what_is_being_written_is_not_cut_short_by_a_warning() {
        let ends = |signal, work, first| answer(signal, work, first) == Answer::End;
        let [steps, state, output] = [Phase::Steps, Phase::State, Phase::Output].map(|w| w as u8);
        for warning in [SIGTERM, SIGUSR1] {
            assert!(ends(warning, 0, true), "no orderly stage");
            assert!(!ends(warning, steps, true) && ends(warning, steps, false));
            for first in [true, false] {
                assert!(!ends(warning, state, first) && !ends(warning, output, first));
            }
        }
        for other in [SIGINT, SIGHUP] {
            assert!(ends(other, steps, true) && ends(other, state, true));
            assert!(!ends(other, output, true) && ends(other, output, false));
        }
    }
}
