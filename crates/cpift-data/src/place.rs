//! Where in a data file something stands.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use cpift_core::BadInput;

use super::files::FileKind;

/// A row of a data file, for messages: `data/x.jsonl line 12`, `data/x.parquet row 12`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file; every row of it shares the name.
    pub file: Arc<Path>,
    /// The row, from 1: in JSONL the line, blank ones counted. 0 for what comes from no file.
    pub row: usize,
}

impl Place {
    /// `line 12` of a JSONL file, `row 12` of any other.
    pub fn position(&self) -> String {
        let unit = if FileKind::of(&self.file) == Some(FileKind::JsonLines) { "line" } else { "row" };
        format!("{unit} {}", self.row)
    }

    /// A problem with this row.
    pub fn bad(&self, message: impl fmt::Display) -> BadInput {
        BadInput::new(&self.file, format!("{}: {message}", self.position()))
    }
}

impl Default for Place {
    /// The place of an example that comes from no file.
    fn default() -> Self {
        Self { file: Path::new("").into(), row: 0 }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.row == 0 {
            return f.write_str("an example from no file");
        }
        write!(f, "{} {}", self.file.display(), self.position())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_names_file_and_row_in_the_units_of_the_file() {
        for (file, expected) in
            [("d/x.jsonl", "d/x.jsonl line 12"), ("d/x.json", "d/x.json row 12"), ("d/x.parquet", "d/x.parquet row 12")]
        {
            assert_eq!(Place { file: Path::new(file).into(), row: 12 }.to_string(), expected);
        }
        assert_eq!(Place::default().to_string(), "an example from no file");
    }
}
