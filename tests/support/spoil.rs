//! Files with one corrupted byte: a reader may accept or refuse them, but must not panic, hang or
//! allocate much memory.

use std::alloc::System;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use cap::Cap;

use crate::Numbers;

/// Number of corruptions per file.
pub const TIMES: usize = 1_000;
/// Longest time that a reader may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Half of the corrupted bytes are among this many first bytes, the header of a large file.
const BEGINNING: usize = 4 << 10;

/// Allows one reader at a time, because the limit of the allocator applies to all threads.
static ONE: Mutex<()> = Mutex::new(());

/// Memory bounds of a reader.
pub struct Spoiler {
    /// Allocator of the test program.
    pub allocator: &'static Cap<System>,
    /// Bytes that the reader may allocate per byte of the file.
    pub per_byte: usize,
    /// Bytes that it may allocate in addition.
    pub constant: usize,
}

impl Spoiler {
    /// Corrupts `file` [`TIMES`] times, one byte at a time, and calls `read`, which returns true if
    /// the file was accepted. Returns the number of accepted files. The file is restored
    /// afterwards.
    ///
    /// # Panics
    /// If the reader panics or refuses the original file. A reader that hangs or exceeds its memory
    /// bounds aborts the program.
    pub fn each(&self, file: &Path, read: impl Fn() -> bool) -> usize {
        let _one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // The panic message needs memory of its own.
        let (allocator, hook) = (self.allocator, take_hook());
        set_hook(Box::new(move |info| {
            let _ = allocator.set_limit(usize::MAX);
            hook(info);
        }));
        let (whole, mut numbers, mut well) = (fs::read(file).unwrap(), Numbers(file.as_os_str().len() as u64), 0);
        assert!(read(), "{}", file.display());
        for i in 0..TIMES {
            let end = if i % 2 == 0 { whole.len() } else { whole.len().min(BEGINNING) };
            let (at, change) = (numbers.bits() as usize % end, 1 + (numbers.bits() % 255) as u8);
            let mut bytes = whole.clone();
            bytes[at] ^= change;
            fs::write(file, &bytes).unwrap();
            let place = format!("{}, byte {at} {:#04x} instead of {:#04x}", file.display(), bytes[at], whole[at]);
            let (start, _watch) = (Instant::now(), Watch::start(&place));
            self.allocator.set_limit(self.allocator.allocated() + self.constant + self.per_byte * whole.len()).unwrap();
            let ended = catch_unwind(AssertUnwindSafe(&read));
            self.allocator.set_limit(usize::MAX).unwrap();
            assert!(start.elapsed() < PATIENCE, "{place}: {:?}", start.elapsed());
            well += usize::from(ended.unwrap_or_else(|_| panic!("{place}: the reader panicked")));
        }
        fs::write(file, whole).unwrap();
        well
    }
}

/// Aborts the program if it is not dropped in time.
struct Watch(std::sync::mpsc::Sender<()>);

impl Watch {
    fn start(place: &str) -> Self {
        let ((sender, receiver), place) = (std::sync::mpsc::channel(), place.to_owned());
        std::thread::spawn(move || {
            if receiver.recv_timeout(2 * PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                eprintln!("{place}: the reader hangs");
                std::process::abort();
            }
        });
        Self(sender)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.0.send(());
    }
}
