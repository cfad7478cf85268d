//! Where in a data file something stands.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// A row of a data file, for messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file; every row of it shares the name.
    pub file: Arc<Path>,
    /// The row, from 1. 0 for what comes from no file.
    pub row: usize,
}

impl Default for Place {
    /// The place of an example that comes from no file.
    fn default() -> Self {
        Self { file: Path::new("").into(), row: 0 }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} line {}", self.file.display(), self.row)
    }
}
