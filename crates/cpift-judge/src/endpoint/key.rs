//! The key of an endpoint: where it comes from, and that it goes nowhere else.

use anyhow::Result;
use cpift_core::error::usage;
use serde_json::json;

/// What stands for the key in whatever an endpoint sends back.
const REDACTED: &str = "(key)";
/// From this length on a key is told from an ordinary word: local endpoints are given keys such as `none`.
const SECRET: usize = 16;

/// A secret that is sent and otherwise goes nowhere: it has no `Debug` and no `Display`.
pub struct Key(String);

impl Key {
    /// Reads the key from the variable called `name`, or from OPENAI_API_KEY where that is set.
    ///
    /// # Errors
    /// [`cpift_core::Usage`], which never repeats `name`: the key itself may stand there by mistake.
    pub fn from_env(name: Option<&str>) -> Result<Option<Self>> {
        let variable = name.unwrap_or("OPENAI_API_KEY");
        let named = variable.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') && !variable.is_empty();
        let value = if named { std::env::var(variable).unwrap_or_default() } else { String::new() };
        match value.trim() {
            "" if name.is_some() => Err(usage(
                "--key-env takes the NAME of an environment variable that holds the key; there is none of this name",
            )),
            "" => Ok(None),
            key => Self::new(key).map(Some),
        }
    }

    /// A key given by the caller.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] for what cannot be a key.
    pub fn new(key: &str) -> Result<Self> {
        // Shorter ones could not be told from ordinary text when they are taken out of messages.
        if key.len() < 4 || !key.chars().all(|c| c.is_ascii_graphic()) {
            return Err(usage(
                "the key in the environment cannot be one: expected 4 or more printable ASCII characters",
            ));
        }
        Ok(Self(key.to_owned()))
    }

    /// The value of the header that carries it.
    pub(super) fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }

    /// Whether `text` holds it.
    pub(super) fn is_in(&self, text: &str) -> bool {
        text.contains(&self.0)
    }

    /// Refuses a command line that holds the key: it would be recorded.
    ///
    /// # Errors
    /// [`cpift_core::Usage`], which does not repeat it.
    pub fn check_arguments(&self, arguments: &[String]) -> Result<()> {
        if self.0.len() >= SECRET && arguments.iter().any(|argument| self.is_in(argument)) {
            return Err(usage("the key stands in an argument, which would be recorded: it comes from the environment"));
        }
        Ok(())
    }

    /// `text` without the key, as it is and as JSON writes it.
    pub(super) fn redact(&self, text: &str) -> String {
        let quoted = json!(self.0).to_string();
        text.replace(&self.0, REDACTED).replace(&quoted[1..quoted.len() - 1], REDACTED)
    }
}
