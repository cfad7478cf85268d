//! Rows of a task's data file: a conversation each, and what else the row holds.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use cpift_core::BadInput;
use serde::{Deserialize, Serialize};

use super::files::{Fields, read_fields};
use super::formats::Notes;
use super::layout::Layout;
use super::place::Place;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
    /// False for an assistant turn that is shown and not trained on.
    #[serde(skip_serializing, default = "trained")]
    pub train: bool,
}

fn trained() -> bool {
    true
}

impl Message {
    /// A turn that, if it is the assistant's, is trained on.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), train: true }
    }
}

/// One row of a data file.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The conversation: an optional system turn, then user and assistant in turn, the assistant last.
    pub messages: Vec<Message>,
    /// The other fields, such as `answer`.
    pub fields: Fields,
    /// Where it stands.
    pub place: Place,
}

impl Row {
    /// The turns before the last answer.
    pub fn prompt(&self) -> &[Message] {
        &self.messages[..self.messages.len() - 1]
    }

    /// The last answer.
    pub fn reference(&self) -> &str {
        &self.messages[self.messages.len() - 1].content
    }
}

/// Reads all rows of the data file at `path` (.jsonl, .json or .parquet), laid out as `layout` says, and logs what they were taken for.
///
/// # Errors
/// [`BadInput`] naming the row: not an object, no conversation, an unknown role, roles out of order, empty content, a template that
/// raises. Or naming the file: an unknown extension, a broken file, no row at all, none with an answer that its keys let be trained.
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

/// Warns of rows whose keys leave no answer to train.
fn warn_of_untrained(path: &Path, rows: &[Row]) -> Result<()> {
    let is_untrained = |row: &&Row| !row.messages.iter().any(|turn| turn.role == "assistant" && turn.train);
    let mut untrained = rows.iter().filter(is_untrained);
    let Some(first) = untrained.next() else { return Ok(()) };
    let count = 1 + untrained.count();
    if count == rows.len() {
        return Err(BadInput::new(path, "no row has an answer to train")
            .expected("an assistant turn that no key such as weight, train or loss marks as not trained")
            .into());
    }
    let (file, position) = (path.display(), first.place.position());
    log::warn!(
        "{file}: {count} rows, the first {position}, have no answer to train: every assistant turn is marked so"
    );
    Ok(())
}

/// What shows a column that was misread: the layouts that were found, and the columns that stay beside the conversation.
fn log_layouts(path: &Path, layouts: &BTreeMap<&str, usize>, rows: &[Row]) {
    let counts: Vec<String> = layouts.iter().map(|(name, count)| format!("{count} rows by {name}")).collect();
    let mut kept: Vec<&str> = rows.iter().flat_map(|row| row.fields.keys().map(String::as_str)).collect();
    kept.sort_unstable();
    kept.dedup();
    let kept = if kept.is_empty() { String::new() } else { format!("; columns kept: {}", kept.join(", ")) };
    log::info!("{}: {}{kept}", path.display(), counts.join(", "));
}

fn check_turns(messages: &[Message]) -> Result<(), (String, &'static str)> {
    if messages.is_empty() {
        return Err(("the conversation is empty".into(), "at least a user turn and an assistant turn"));
    }
    let turns = &messages[usize::from(messages[0].role == "system")..];
    for (i, message) in turns.iter().enumerate() {
        let expected = ["user", "assistant"][i % 2];
        if message.role != expected {
            let found = format!("turn {} has the role {:?} where {expected:?} is due", i + 1, message.role);
            return Err((found, "an optional system turn, then user and assistant in turn"));
        }
    }
    if turns.len() < 2 || turns.len() % 2 == 1 {
        return Err(("the conversation does not end with the assistant".into(), "the assistant's answer last"));
    }
    match messages.iter().position(|m| m.content.is_empty()) {
        Some(i) => {
            Err((format!("turn {}, of the {}, has empty content", i + 1, messages[i].role), "text in every turn"))
        }
        None => Ok(()),
    }
}
