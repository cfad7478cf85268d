//! A target of cpift-fuzz as a program of libFuzzer's.

use std::panic::{AssertUnwindSafe, catch_unwind, set_hook};
use std::process::abort;
use std::sync::Mutex;

pub use libfuzzer_sys::fuzz_target;

/// What the last panic of a library said.
static LAST: Mutex<String> = Mutex::new(String::new());

/// The program of the target called `$name`.
#[macro_export]
macro_rules! fuzz {
    ($name:literal) => {
        $crate::fuzz_target!(
            init: {
                $crate::let_callers_catch();
            },
            |data: &[u8]| $crate::run($name, data)
        );
    };
}

/// A panic of a library that its caller catches is no finding; one of ours ends the program at
/// once, with its stack.
pub fn let_callers_catch() {
    set_hook(Box::new(|info| {
        if info.location().is_some_and(|at| at.file().contains("/registry/")) {
            *LAST.lock().unwrap() = info.to_string();
        } else {
            eprintln!("{info}");
            abort();
        }
    }));
}

/// Runs the target called `name`; a library's panic that nobody caught ends the program.
pub fn run(name: &str, data: &[u8]) {
    if catch_unwind(AssertUnwindSafe(|| cpift_fuzz::target(name)(data))).is_err() {
        eprintln!("{}", LAST.lock().unwrap());
        abort();
    }
}
