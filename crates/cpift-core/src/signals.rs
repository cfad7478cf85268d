//! Signals: what is staged goes, and a stage that can stop in an orderly way is asked to first.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use crate::files;

/// Whether the stage saves its state when asked to stop.
static ORDERLY: AtomicBool = AtomicBool::new(false);
/// The signal that asked it to; 0 for none.
static ASKED: AtomicI32 = AtomicI32::new(0);

/// Listens for signals from here on. Each removes what is staged and ends the program with 128 + its number, as a shell reports it;
/// except that while an [`Orderly`] lives the first SIGTERM or SIGUSR1 (Slurm's warnings) is only noted.
///
/// # Errors
/// When the handlers cannot be set.
pub(crate) fn listen() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGUSR1]).context("listening for signals")?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            let first = matches!(signal, SIGTERM | SIGUSR1)
                && ORDERLY.load(Ordering::SeqCst)
                && ASKED.compare_exchange(0, signal, Ordering::SeqCst, Ordering::SeqCst).is_ok();
            if first {
                log::info!("{}: saving and stopping after this step; a second signal stops at once", name(signal));
            } else {
                files::discard_unfinished(|| std::process::exit(128 + signal));
            }
        }
    });
    Ok(())
}

/// While it lives, the stage asks [`stop_asked`] after every step and saves its state when it must stop.
pub struct Orderly(());

impl Orderly {
    /// From here on a first SIGTERM or SIGUSR1 does not end the program.
    pub fn begin() -> Self {
        ORDERLY.store(true, Ordering::SeqCst);
        Self(())
    }
}

impl Drop for Orderly {
    fn drop(&mut self) {
        ORDERLY.store(false, Ordering::SeqCst);
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
