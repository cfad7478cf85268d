//! The API key: read from the environment, sent to the endpoint, and removed from all output.

use anyhow::Result;
use cpift_core::error::usage;
use serde_json::json;

/// Replacement for the key in anything the endpoint sends back.
const REDACTED: &str = "(key)";
/// Shorter keys may be ordinary words: local endpoints are given keys such as `none`.
const SECRET: usize = 16;

/// A secret without `Debug` and `Display`, so that it cannot be printed by accident.
pub(crate) struct Key(String);

impl Key {
    /// Reads the key from the environment variable `name`, or from OPENAI_API_KEY by default.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] if `name` is not the name of a variable that is set. The message does
    /// not repeat `name`, which may be the key itself, given by mistake.
    pub(crate) fn from_env(name: Option<&str>) -> Result<Option<Self>> {
        let variable = name.unwrap_or("OPENAI_API_KEY");
        let named = variable.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') && !variable.is_empty();
        let value = if named { std::env::var(variable).unwrap_or_default() } else { String::new() };
        match value.trim() {
            "" if name.is_some() => Err(usage(
                "--key-env takes the NAME of an environment variable that holds the key; no variable of this name is set",
            )),
            "" => Ok(None),
            key => Self::new(key).map(Some),
        }
    }

    /// Checks the characters and length of a key.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] for text that cannot be a key.
    pub(crate) fn new(key: &str) -> Result<Self> {
        // A shorter key could not be told from ordinary text when it is removed from messages.
        if key.len() < 4 || !key.chars().all(|c| c.is_ascii_graphic()) {
            return Err(usage(
                "the key in the environment is not valid: expected 4 or more printable ASCII characters",
            ));
        }
        Ok(Self(key.to_owned()))
    }

    /// Value of the authorization header.
    pub(crate) fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }

    /// Returns true if `text` contains the key.
    pub(crate) fn is_in(&self, text: &str) -> bool {
        text.contains(&self.0)
    }

    /// Refuses a command line that contains the key, because the command line is recorded.
    ///
    /// # Errors
    /// [`cpift_core::Usage`], without the key.
    pub(crate) fn check_arguments(&self, arguments: &[String]) -> Result<()> {
        if self.0.len() >= SECRET && arguments.iter().any(|argument| self.is_in(argument)) {
            return Err(usage("an argument contains the key and would be recorded: set the key in the environment"));
        }
        Ok(())
    }

    /// Removes the key from `text`, both plain and as JSON escapes it.
    pub(crate) fn redact(&self, text: &str) -> String {
        let quoted = json!(self.0).to_string();
        text.replace(&self.0, REDACTED).replace(&quoted[1..quoted.len() - 1], REDACTED)
    }
}
