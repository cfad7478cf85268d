//! Rows of a task's data file: a conversation each, with the other columns.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use cpift_core::BadInput;

use crate::conversation::{Message, check_turns};
use crate::files::raw::{Fields, Place};
use crate::files::read_fields;
use crate::formats::notes::Notes;
use crate::layout::Layout;

/// One row of a data file.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Conversation: an optional system turn, then user and assistant alternating, the assistant
    /// last.
    pub messages: Vec<Message>,
    /// Other columns, such as `answer`.
    pub fields: Fields,
    /// Position in the file.
    pub place: Place,
}

impl Row {
    /// Turns before the last answer.
    pub fn prompt(&self) -> &[Message] {
        &self.messages[..self.messages.len() - 1]
    }

    /// Text of the last answer.
    pub fn reference(&self) -> &str {
        &self.messages[self.messages.len() - 1].content
    }
}

/// Reads all rows of the data file at `path` (.jsonl, .json or .parquet) by `layout` and logs the
/// formats found.
///
/// # Errors
/// [`BadInput`] naming the row (not an object, no conversation, an unknown role, roles out of
/// order, empty content, a template that raises) or the file (unknown extension, broken, no rows,
/// no answer to train).
pub fn read_rows(path: &Path, layout: &Layout) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut layouts: BTreeMap<&str, usize> = BTreeMap::new();
    let mut notes = Notes::default();
    for (place, mut fields) in read_fields(path)? {
        let (name, messages) = layout.take_conversation(&mut fields, &place, &mut notes)?;
        check_turns(&messages).map_err(|(message, expected)| place.bad(message).expected(expected))?;
        *layouts.entry(name).or_default() += 1;
        rows.push(Row { messages, fields, place });
    }
    if rows.is_empty() {
        return Err(BadInput::new(path, "no rows in this data file").expected("at least one conversation").into());
    }
    log_layouts(path, &layouts, &rows);
    notes.log(path);
    warn_of_untrained(path, &rows)?;
    Ok(rows)
}

/// Warns about rows in which no answer is trained; an error if that is true of all rows.
fn warn_of_untrained(path: &Path, rows: &[Row]) -> Result<()> {
    let is_untrained = |row: &&Row| !row.messages.iter().any(|turn| turn.role == "assistant" && turn.train);
    let mut untrained = rows.iter().filter(is_untrained);
    let Some(first) = untrained.next() else { return Ok(()) };
    let count = 1 + untrained.count();
    if count == rows.len() {
        return Err(BadInput::new(path, "no row has an answer to train")
            .expected("an assistant turn that no key such as weight, train or loss turns off")
            .into());
    }
    let (file, position) = (path.display(), first.place.position());
    log::warn!("{file}: {count} rows, first {position}, have no answer to train: keys turn off every assistant turn");
    Ok(())
}

/// Logs the formats found and the columns kept, which reveals a column that was misread.
fn log_layouts(path: &Path, layouts: &BTreeMap<&str, usize>, rows: &[Row]) {
    let counts: Vec<String> = layouts.iter().map(|(name, count)| format!("{count} rows by {name}")).collect();
    let mut kept: Vec<&str> = rows.iter().flat_map(|row| row.fields.keys().map(String::as_str)).collect();
    kept.sort_unstable();
    kept.dedup();
    let kept = if kept.is_empty() { String::new() } else { format!("; columns kept: {}", kept.join(", ")) };
    log::info!("{}: {}{kept}", path.display(), counts.join(", "));
}
