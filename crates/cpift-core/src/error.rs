//! Errors of the stages, their exit codes, and the known word that a misspelled one means.

use std::fmt;
use std::path::{Path, PathBuf};

/// Failed: full disk, out of memory, non-finite loss and the like.
pub const EXIT_FAILED: u8 = 1;
/// Usage: an argument that cannot be parsed or is out of range.
pub(crate) const EXIT_USAGE: u8 = 2;
/// Bad input: a file, shape, format or content that cannot be used.
pub(crate) const EXIT_BAD_INPUT: u8 = 3;
/// Stopped by a signal with the state saved; running again resumes (EX_TEMPFAIL of sysexits.h).
pub(crate) const EXIT_STOPPED: u8 = 75;

/// A file that cannot be used: its path, the tensor if any, expected, found, and a hint for the
/// fix.
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
    /// A problem with the file or directory at `path`.
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

    /// Names the tensor with the problem.
    #[must_use]
    pub fn tensor(mut self, name: impl Into<String>) -> Self {
        self.tensor = Some(name.into());
        self
    }

    /// Returns true for an error that names a tensor, without values that were expected and found:
    /// one checkpoint has a tensor that another does not have.
    pub fn is_about_a_missing_tensor(&self) -> bool {
        self.tensor.is_some() && self.expected.is_none() && self.found.is_none()
    }

    /// States the expected value.
    #[must_use]
    pub fn expected(mut self, what: impl Into<String>) -> Self {
        self.expected = Some(what.into());
        self
    }

    /// States the value found.
    #[must_use]
    pub fn found(mut self, what: impl Into<String>) -> Self {
        self.found = Some(what.into());
        self
    }

    /// Tells the user how to fix it.
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

/// An invalid argument or combination of arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage(pub String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// A run that stopped on request with its state saved; the text says where and how to resume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stopped(pub String);

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Stopped {}

/// The failure of another process of this job, which ends this one with the same exit code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerFailed {
    /// The text to print, with the error of that process.
    pub text: String,
    /// Exit code of that process.
    pub code: u8,
}

impl fmt::Display for PeerFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for PeerFailed {}

/// Returns a [`Usage`] error.
pub fn usage(message: impl Into<String>) -> anyhow::Error {
    Usage(message.into()).into()
}

/// Returns the exit code for `error`.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if error.downcast_ref::<Usage>().is_some() {
        EXIT_USAGE
    } else if error.downcast_ref::<BadInput>().is_some() {
        EXIT_BAD_INPUT
    } else if error.downcast_ref::<Stopped>().is_some() {
        EXIT_STOPPED
    } else {
        error.downcast_ref::<PeerFailed>().map_or(EXIT_FAILED, |peer| peer.code)
    }
}

/// The entry of `known` of which `word` may be a misspelling: at most two edits away and mostly the
/// same.
pub fn closest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let near = known.iter().map(|k| (distance(word, k), *k)).min()?;
    (near.0 <= 2 && near.0 * 2 < near.1.len()).then_some(near.1)
}

/// Number of letters to change, add, drop or swap with their neighbour to get from `a` to `b`; 3 if
/// the lengths differ by more than 2.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(64).collect(), b.chars().collect());
    if a.len().abs_diff(b.len()) > 2 {
        return 3;
    }
    let mut rows = vec![(0..=b.len()).collect::<Vec<usize>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let same = usize::from(a[i - 1] != b[j - 1]);
            let mut best = (rows[i - 1][j - 1] + same).min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

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
        let peer: anyhow::Result<()> = Err(PeerFailed { text: "rank 1: x: bad".into(), code: EXIT_BAD_INPUT }.into());
        assert_eq!(exit_code(&peer.context("rank 0").unwrap_err()), EXIT_BAD_INPUT);
    }

    #[test]
    fn misspellings_are_recognised_and_other_words_are_not() {
        let known = ["weight", "density", "t", "normalize"];
        for (slip, word) in [("wieght", "weight"), ("densty", "density"), ("normalise", "normalize")] {
            assert_eq!(closest(slip, &known), Some(word));
        }
        for word in ["", "x", "gamma", "weight_by_layer", "epsilon"] {
            assert_eq!(closest(word, &known), None, "{word}");
        }
        assert_eq!((distance("ab", "ba"), distance("abc", "abd"), distance("", "ab")), (1, 1, 2));
    }
}
