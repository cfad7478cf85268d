//! Messages that are logged once per process. A run opens the same checkpoint several times, and
//! its warnings should not repeat.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

static LOGGED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Logs a warning unless the same text has been logged before.
pub fn warn(message: String) {
    log(log::Level::Warn, message);
}

/// Logs an informational line unless the same text has been logged before.
pub fn info(message: String) {
    log(log::Level::Info, message);
}

fn log(level: log::Level, message: String) {
    if first_time(&message) {
        log::log!(level, "{message}");
    }
}

fn first_time(message: &str) -> bool {
    let mut logged = LOGGED.lock().unwrap_or_else(PoisonError::into_inner);
    logged.insert(message.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_logged_once() {
        assert!(first_time("a"));
        assert!(!first_time("a"));
        assert!(first_time("b"));
    }
}
