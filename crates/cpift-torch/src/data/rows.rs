//! Rows of a task's data file: JSONL with `messages`, checked line by line.

use std::path::Path;

use anyhow::Result;
use cpift_core::{BadInput, files};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// One row of a data file.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The conversation: an optional system turn, then user and assistant in turn, the assistant last.
    pub messages: Vec<Message>,
    /// The other fields, such as `answer`.
    pub fields: Map<String, Value>,
    /// Line in the file, from 1.
    pub line: usize,
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

/// Reads all rows of the JSONL file at `path`; blank lines are passed over.
///
/// # Errors
/// [`BadInput`] naming the line: not JSON, no messages, an unknown role, roles out of order, empty content. Or no row at all.
pub fn read_rows(path: &Path) -> Result<Vec<Row>> {
    let text = files::read_text(path)?;
    let mut rows = Vec::new();
    // Only \n ends a line: JSON strings may hold other characters that Unicode calls line ends.
    for (i, line) in text.split('\n').enumerate() {
        if !line.trim().is_empty() {
            rows.push(parse(path, i + 1, line)?);
        }
    }
    if rows.is_empty() {
        return Err(BadInput::new(path, "no rows in this data file").expected("one JSON object a line").into());
    }
    Ok(rows)
}

fn parse(path: &Path, line: usize, text: &str) -> Result<Row> {
    let bad = |message: String| BadInput::new(path, format!("line {line}: {message}"));
    let mut fields: Map<String, Value> =
        serde_json::from_str(text).map_err(|e| bad(format!("not a JSON object: {e}")))?;
    let Some(messages) = fields.shift_remove("messages") else {
        return Err(bad("no messages".into()).expected("a field `messages`: [{role, content}, …]").into());
    };
    let messages: Vec<Message> =
        serde_json::from_value(messages).map_err(|e| bad(format!("messages cannot be read: {e}")))?;
    check_turns(&messages).map_err(|(message, expected)| bad(message).expected(expected))?;
    Ok(Row { messages, fields, line })
}

fn check_turns(messages: &[Message]) -> Result<(), (String, &'static str)> {
    if messages.is_empty() {
        return Err(("messages is empty".into(), "at least a user turn and an assistant turn"));
    }
    let turns = &messages[usize::from(messages[0].role == "system")..];
    for (i, message) in turns.iter().enumerate() {
        let expected = ["user", "assistant"][i % 2];
        if message.role != expected {
            let found = format!("turn {} has the role {:?} where {expected:?} is due", i + 1, message.role);
            return Err((
                found,
                "an optional system turn, then user and assistant in turn (tool turns are not supported)",
            ));
        }
    }
    if turns.len() < 2 || turns.len() % 2 == 1 {
        return Err(("the conversation does not end with the assistant".into(), "the assistant's answer last"));
    }
    match messages.iter().position(|m| m.content.is_empty()) {
        Some(i) => Err((format!("turn {} has empty content", i + 1), "text in every turn")),
        None => Ok(()),
    }
}
