//! Rows of a data file. The first byte selects JSONL (`l`), a JSON list (`j`), Parquet (`p`), or a
//! template of tasks.toml and a row, separated by a zero byte (`t`).

use cpift_core::format::tasks::Format;
use cpift_data::{Layout, RowTemplate, read_rows};
use serde_json::{Map, Value};

use crate::bounds;

/// Memory bound, for the output of a template within its fuel and for compressed Parquet pages.
const BOUND: usize = 64 << 20;

pub fn run(data: &[u8]) -> bool {
    let (name, rest) = match data.split_first() {
        Some((b'l', rest)) => ("rows.jsonl", rest),
        Some((b'j', rest)) => ("rows.json", rest),
        Some((b'p', rest)) => ("rows.parquet", rest),
        Some((b't', rest)) => return template(rest),
        _ => return false,
    };
    let path = bounds::write(name, rest);
    let read = || match read_rows(&path, &Layout::Format(Format::Auto)) {
        Ok(rows) => {
            rows.iter().for_each(|row| assert!(!row.prompt().is_empty() && !row.reference().is_empty()));
            true
        }
        Err(error) => {
            assert!(format!("{error:#}").contains(name), "{error:#}");
            false
        }
    };
    if name == "rows.parquet" { bounds::bounded_by(BOUND, read) } else { bounds::bounded(rest.len(), read) }
}

fn template(data: &[u8]) -> bool {
    let [source, row] = bounds::pieces(data);
    let Ok(source) = std::str::from_utf8(source) else { return false };
    let row: Map<String, Value> = serde_json::from_slice(row).unwrap_or_default();
    bounds::bounded_by(BOUND, || RowTemplate::new("prompt", source).is_ok_and(|template| template.render(&row).is_ok()))
}
