//! Run-time support of the programs: command line, progress bars, signals, and address space under
//! `ulimit -v`. At a signal unfinished outputs are removed, and a stage that can save its state is
//! asked to stop first.

pub mod cli;
mod config;

use std::fs::File;
use std::io::Read;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, Signal};
use signal_hook::consts::{SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use crate::files::staging;
pub use crate::progress;

/// Current [`Phase`] of the stage; 0 outside any phase.
static PHASE: AtomicU8 = AtomicU8::new(0);
/// Signal that asked the stage to stop; 0 for none.
static STOP_SIGNAL: AtomicI32 = AtomicI32::new(0);

/// The same signal within this time of the first is a duplicate: Slurm signals all processes of a
/// job, and the scripts that started the stage forward the signal too.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(2);

/// Phase of a stage, which decides how signals are handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// Training steps: the stage checks [`stop_asked`] after each step, and then saves its state.
    Steps = 1,
    /// The state is being saved.
    State = 2,
    /// All work is done and the output is being written.
    Output = 3,
    /// The state is saved, and the stage ends with exit code 75. Lasts until the end of the
    /// process.
    Saved = 4,
}

/// Reaction to a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// Remove unfinished outputs and exit.
    End,
    /// Record the signal, log this text and continue.
    Wait(&'static str),
}

/// Starts the thread that handles signals. By default a signal removes the unfinished outputs and
/// ends the program with exit code 128 + its number, as shells report it. There are three
/// exceptions while a [`SignalScope`] is active:
///
/// - During [`Phase::Steps`], the first SIGTERM or SIGUSR1 (Slurm's warnings) only asks the stage
///   to stop.
/// - SIGTERM and SIGUSR1 never interrupt the writing of a state or of the output. Nor do they
///   change the exit code after [`Phase::Saved`]: `srun --kill-on-bad-exit` ends the other ranks by
///   SIGTERM when the first has ended.
/// - The first signal of any kind does not interrupt the writing of the output.
///
/// Only this thread receives signals: they are blocked in all threads started after this call. A
/// handler that ran on a thread inside a matrix product of libtorch has been seen to corrupt its
/// heap.
///
/// # Errors
/// If the handlers cannot be set.
fn listen() -> Result<()> {
    const HANDLED: [Signal; 4] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGUSR1];
    let handled: SigSet = HANDLED.into_iter().collect();
    let mut signals = Signals::new(HANDLED.map(|s| s as i32)).context("listening for signals")?;
    handled.thread_block().context("blocking signals")?;
    let handle = move || {
        if let Err(error) = handled.thread_unblock() {
            log::warn!("signals cannot be received: {error}");
        }
        let mut warned: Option<(i32, Instant)> = None;
        for signal in signals.forever() {
            if warned.is_some_and(|(before, at)| before == signal && at.elapsed() < DUPLICATE_WINDOW) {
                continue;
            }
            let first = STOP_SIGNAL.load(Ordering::SeqCst) == 0;
            match answer(signal, PHASE.load(Ordering::SeqCst), first) {
                Answer::Wait(what) => {
                    if is_warning(signal) {
                        warned.get_or_insert_with(|| (signal, Instant::now()));
                    }
                    let _ = STOP_SIGNAL.compare_exchange(0, signal, Ordering::SeqCst, Ordering::SeqCst);
                    log::info!("{}: {what}", name(signal));
                }
                // Exit without destructors, because other threads still use what they would
                // destroy.
                Answer::End => staging::discard_unfinished(|| signal_hook::low_level::exit(128 + signal)),
            }
        }
    };
    std::thread::Builder::new().spawn(handle).map(drop).context("starting the signal thread")
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
        w if w == Phase::Saved as u8 && warning => Answer::Wait("stopping, the state is saved"),
        w if w == Phase::Output as u8 && (warning || first) => {
            Answer::Wait("training is done, the output is being written first; another SIGINT stops at once")
        }
        _ => Answer::End,
    }
}

/// Sets the [`Phase`] while it is alive, and restores the previous one when dropped, but for
/// [`Phase::Saved`].
pub struct SignalScope(u8);

impl SignalScope {
    /// Sets the phase to `work`.
    pub fn begin(work: Phase) -> Self {
        Self(PHASE.swap(work as u8, Ordering::SeqCst))
    }
}

impl Drop for SignalScope {
    fn drop(&mut self) {
        let restore = |phase| (phase != Phase::Saved as u8).then_some(self.0);
        let _ = PHASE.fetch_update(Ordering::SeqCst, Ordering::SeqCst, restore);
    }
}

/// Returns the name of the signal that asked the stage to stop, if any.
pub fn stop_asked() -> Option<&'static str> {
    match STOP_SIGNAL.load(Ordering::SeqCst) {
        0 => None,
        signal => Some(name(signal)),
    }
}

fn name(signal: i32) -> &'static str {
    signal_hook::low_level::signal_name(signal).unwrap_or("a signal")
}

/// Stack of a thread, the default of Rust.
const STACK: u64 = 2 << 20;
/// Address space a program needs beside its threads until its inputs are mapped.
const SPARE: u64 = 32 << 20;

/// Address space in bytes that `ulimit -v` leaves to the program; none without a limit.
pub fn left_by_ulimit() -> Option<u64> {
    let limit = first_number("/proc/self/limits", "Max address space")?;
    let taken = 1024 * first_number("/proc/self/status", "VmSize:")?;
    Some(limit.saturating_sub(taken))
}

/// Refuses to start `threads` threads if `ulimit -v` leaves too little address space: a thread that
/// fails to allocate ends the program without an error message.
///
/// # Errors
/// The bytes left and the bytes needed.
fn check_threads(threads: usize) -> Result<()> {
    let needed = threads as u64 * STACK + SPARE;
    match left_by_ulimit() {
        Some(left) if left < needed => bail!(
            "out of memory: ulimit -v leaves {} MiB of address space, and {threads} threads need about {} MiB",
            left >> 20,
            needed >> 20
        ),
        _ => Ok(()),
    }
}

/// Under `ulimit -v`, limits glibc to one arena: by default it reserves 64 to 128 MiB for each
/// thread, which may leave nothing for the stack of the next. Returns false if so little is left
/// that an error could not be reported. Called before anything else; allocates nothing.
#[allow(unsafe_code)]
fn prepare() -> bool {
    let Some(left) = left_by_ulimit() else { return true };
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt may be called at any time, and there is one thread yet.
    unsafe {
        nix::libc::mallopt(nix::libc::M_ARENA_MAX, 1);
    }
    left >= SPARE
}

/// First number after `label` in the first 4 KiB of a file of /proc; none for `unlimited`.
/// Allocates nothing.
pub fn first_number(path: &str, label: &str) -> Option<u64> {
    let mut buffer = [0; 4096];
    let read = File::open(path).ok()?.read(&mut buffer).ok()?;
    // A cut may be inside a character.
    let text = buffer[..read].utf8_chunks().next()?.valid();
    let line = text.lines().find_map(|line| line.strip_prefix(label))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use signal_hook::consts::{SIGHUP, SIGINT};

    use super::*;

    #[test]
    fn warnings_do_not_interrupt_writing() {
        let ends = |signal, work, first| answer(signal, work, first) == Answer::End;
        let [steps, state, output, saved] = [Phase::Steps, Phase::State, Phase::Output, Phase::Saved].map(|w| w as u8);
        for warning in [SIGTERM, SIGUSR1] {
            assert!(ends(warning, 0, true), "outside any phase");
            assert!(!ends(warning, steps, true) && ends(warning, steps, false));
            for first in [true, false] {
                assert!(!ends(warning, state, first) && !ends(warning, output, first));
                assert!(!ends(warning, saved, first));
            }
        }
        for other in [SIGINT, SIGHUP] {
            assert!(ends(other, steps, true) && ends(other, state, true) && ends(other, saved, false));
            assert!(!ends(other, output, true) && ends(other, output, false));
        }
    }
    #[test]
    fn a_saved_stage_stays_saved() {
        {
            let _steps = SignalScope::begin(Phase::Steps);
            drop(SignalScope::begin(Phase::State));
            assert_eq!(PHASE.load(Ordering::SeqCst), Phase::Steps as u8);
            drop(SignalScope::begin(Phase::Saved));
        }
        assert_eq!(PHASE.load(Ordering::SeqCst), Phase::Saved as u8);
    }
}
