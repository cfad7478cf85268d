//! Address space under `ulimit -v`.

use std::fs::File;
use std::io::Read;

use anyhow::{Result, bail};

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
pub(super) fn check_threads(threads: usize) -> Result<()> {
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
pub(super) fn prepare() -> bool {
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
