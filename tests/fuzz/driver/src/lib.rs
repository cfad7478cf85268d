//! libFuzzer programs for the targets of cpift-fuzz.

use std::panic::{AssertUnwindSafe, catch_unwind, set_hook};
use std::process::abort;
use std::sync::Mutex;

pub use libfuzzer_sys::fuzz_target;

/// Message of the last panic in a library.
static LAST: Mutex<String> = Mutex::new(String::new());

/// Defines the libFuzzer program of the target `$name`.
#[macro_export]
macro_rules! fuzz {
    ($name:literal) => {
        $crate::fuzz_target!(
            init: {
                $crate::install_panic_hook();
            },
            |data: &[u8]| $crate::run($name, data)
        );
    };
}

/// Installs the panic hook. A panic in a library may be caught by its caller and is only recorded;
/// a panic in our code aborts at once, so that the stack is reported.
pub fn install_panic_hook() {
    set_hook(Box::new(|info| {
        if info.location().is_some_and(|at| at.file().contains("/registry/")) {
            *LAST.lock().unwrap() = info.to_string();
        } else {
            eprintln!("{info}");
            abort();
        }
    }));
}

/// Runs the target `name`, and aborts on a library panic that nobody caught.
pub fn run(name: &str, data: &[u8]) {
    if catch_unwind(AssertUnwindSafe(|| cpift_fuzz::target(name)(data))).is_err() {
        eprintln!("{}", LAST.lock().unwrap());
        abort();
    }
}
