//! Warnings that are worth saying once per process, however often their cause is met.

use std::collections::HashSet;
use std::sync::Mutex;

static SAID: Mutex<Option<HashSet<String>>> = Mutex::new(None);

/// Logs `message` as a warning unless the same message was logged before.
pub fn warn_once(message: String) {
    let mut said = SAID.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let said = said.get_or_insert_default();
    if !said.contains(&message) {
        log::warn!("{message}");
        said.insert(message);
    }
}
