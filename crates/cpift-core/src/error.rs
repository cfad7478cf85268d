//! The errors a stage reports, and the exit code each one means.

use std::fmt;
use std::path::{Path, PathBuf};

/// Failed: disk full, out of memory, non-finite loss and the like.
pub(crate) const EXIT_FAILED: u8 = 1;
/// Usage: an argument that cannot be parsed or is out of range.
pub(crate) const EXIT_USAGE: u8 = 2;
/// Bad input: a file, shape, format or content that cannot be used.
pub(crate) const EXIT_BAD_INPUT: u8 = 3;
/// Stopped when asked to, with the state saved: run again to go on (EX_TEMPFAIL of sysexits.h).
pub(crate) const EXIT_STOPPED: u8 = 75;

/// A file that cannot be used: which, where in it, what was expected, what was found, and how to mend it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadInput {
    path: PathBuf,
    message: String,
    tensor: Option<String>,
    expected: Option<String>,
    found: Option<String>,
    hint: Option<String>,
}

impl BadInput {
    /// A problem with the file or folder at `path`.
    pub fn new(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Self {
            path: path.as_ref().to_owned(),
            message: message.into(),
            tensor: None,
            expected: None,
            found: None,
            hint: None,
        }
    }

    /// Names the tensor the problem lies in.
    #[must_use]
    pub fn tensor(mut self, name: impl Into<String>) -> Self {
        self.tensor = Some(name.into());
        self
    }

    /// Says what should have been there.
    #[must_use]
    pub fn expected(mut self, what: impl Into<String>) -> Self {
        self.expected = Some(what.into());
        self
    }

    /// Says what was there.
    #[must_use]
    pub fn found(mut self, what: impl Into<String>) -> Self {
        self.found = Some(what.into());
        self
    }

    /// Says what the user can do about it.
    #[must_use]
    pub fn hint(mut self, what: impl Into<String>) -> Self {
        self.hint = Some(what.into());
        self
    }
}

impl fmt::Display for BadInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.message)?;
        let details =
            [("tensor", &self.tensor), ("expected", &self.expected), ("found", &self.found), ("hint", &self.hint)];
        for (label, value) in details {
            if let Some(value) = value {
                write!(f, "\n  {label}: {value}")?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for BadInput {}

/// An argument, or a combination of arguments, that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage(pub String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// A run that was asked to stop and has saved its state; says where and how to go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stopped(pub String);

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Stopped {}

/// Shorthand for an [`anyhow::Error`] that holds a [`Usage`].
pub fn usage(message: impl Into<String>) -> anyhow::Error {
    Usage(message.into()).into()
}

/// The exit code that `error` means.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if error.downcast_ref::<Usage>().is_some() {
        EXIT_USAGE
    } else if error.downcast_ref::<BadInput>().is_some() {
        EXIT_BAD_INPUT
    } else if error.downcast_ref::<Stopped>().is_some() {
        EXIT_STOPPED
    } else {
        EXIT_FAILED
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn display_lists_every_detail_on_its_own_line() {
        let error = BadInput::new("m.safetensors", "shapes differ")
            .tensor("w")
            .expected("[2, 3]")
            .found("[3, 2]")
            .hint("use the base the probe was made from");
        assert_eq!(
            error.to_string(),
            "m.safetensors: shapes differ\n  tensor: w\n  expected: [2, 3]\n  found: [3, 2]\n  \
             hint: use the base the probe was made from"
        );
    }

    #[test]
    fn exit_codes_survive_added_context() {
        let bad: anyhow::Result<()> = Err(BadInput::new("x", "bad").into());
        assert_eq!(exit_code(&bad.context("while reading").unwrap_err()), EXIT_BAD_INPUT);
        assert_eq!(exit_code(&usage("p out of range")), EXIT_USAGE);
        assert_eq!(exit_code(&anyhow::anyhow!("disk full")), EXIT_FAILED);
    }
}
