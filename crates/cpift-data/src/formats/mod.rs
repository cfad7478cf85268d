//! From a row's fields to its conversation: the layouts that data sets commonly have.
//!
//! | format | fields | the conversation |
//! | --- | --- | --- |
//! | messages | `messages`: [turn], `system`? | as it is |
//! | sharegpt | `conversations` or `conversation`: [turn], `system`? | as it is |
//! | alpaca | `instruction`, `output`, `input`?, `system`?, `history`? | the pairs of history; instruction, a line break, input; output |
//! | prompt-completion | `prompt`, `completion` | texts: user and assistant; or lists of turns, joined |
//! | gsm8k | `question`, `answer` | user and assistant |
//! | ultrachat | `data`: [text] | user and assistant in turn |
//!
//! A turn is {role, content} or {from, value} in any pairing, whatever the list is called; see [`turns`]. An empty system turn is
//! the same as none. The fields of the conversation leave the row, but for GSM8K's `answer`, which its metric compares with.

mod notes;
mod pairs;
mod turns;

use anyhow::{Result, bail};
use cpift_core::format::tasks::Format;
use serde_json::Value;

use super::files::{Fields, reason, text_of};
use super::place::Place;
use super::rows::Message;

pub use notes::Notes;

/// Columns that hold a list of turns.
const LISTS: [&str; 3] = ["messages", "conversations", "conversation"];

/// The format that `fields` have; the first that fits, in the order of the table above. Null counts as absent, as Parquet files
/// and joined data sets have it in columns a row does not use.
fn detect(fields: &Fields, place: &Place) -> Result<Format> {
    // In joined data sets NaN stands where others have null; only where nothing else fits is it the fault of the column.
    let usable = |name: &str| fields.get(name).is_some_and(|value| !value.is_null() && reason(value).is_none());
    let present = |name: &str| fields.get(name).is_some_and(|value| !value.is_null());
    let found = fitting(fields, usable).or_else(|| fitting(fields, present));
    found.ok_or_else(|| {
        let error = place
            .bad("no conversation in this row")
            .expected(
                "messages or conversations (lists of turns); instruction and output; prompt and completion; question and answer \
                 (texts); or data",
            )
            .found(names(fields))
            .hint("say how its columns make one in tasks.toml: prompt = \"{{ … }}\" and completion = \"{{ … }}\"");
        error.into()
    })
}

fn fitting(fields: &Fields, has: impl Fn(&str) -> bool) -> Option<Format> {
    let instructed = has("instruction") || fields.contains_key("instruction") && has("input");
    let known = [
        (has("messages"), Format::Messages),
        (has("conversations") || fields.get("conversation").is_some_and(Value::is_array), Format::Sharegpt),
        (instructed && has("output"), Format::Alpaca),
        (has("prompt") && has("completion"), Format::PromptCompletion),
        // Multiple choice often has a question too, but an index as the answer.
        (has("question") && has("answer") && fields["answer"].is_string(), Format::Gsm8k),
        (has("data"), Format::Ultrachat),
    ];
    known.into_iter().find_map(|(fits, format)| fits.then_some(format))
}

/// The names of the fields, for messages; of those that hold nothing usable, what they hold too.
pub fn names(fields: &Fields) -> String {
    let named = |(name, value): (&String, &Value)| match reason(value) {
        Some(found) => format!("{name} ({found})"),
        None if value.is_null() => format!("{name} (null)"),
        None => name.clone(),
    };
    let names: Vec<String> = fields.iter().map(named).collect();
    if names.is_empty() { "no fields".into() } else { format!("the fields {}", names.join(", ")) }
}

/// Takes the conversation of `format` out of `fields`; returns the format that was found too. Keys of turns that are not used are counted
/// in `notes`.
///
/// # Errors
/// [`cpift_core::BadInput`] naming the row: no format fits, a field is missing or of another type, a turn is a tool's, or its keys
/// contradict one another.
pub fn take_conversation(
    format: Format,
    fields: &mut Fields,
    place: &Place,
    notes: &mut Notes,
) -> Result<(Format, Vec<Message>)> {
    let format = if format == Format::Auto { detect(fields, place)? } else { format };
    let [messages, conversations, conversation] = LISTS;
    let mut turns = match format {
        Format::Auto => unreachable!("detection names a format"),
        Format::Messages => turns::conversation(fields, LISTS, place, notes),
        Format::Sharegpt => turns::conversation(fields, [conversations, conversation, messages], place, notes),
        Format::Ultrachat => turns::ultrachat(fields, place),
        Format::Alpaca => pairs::alpaca(fields, place),
        Format::PromptCompletion => pairs::prompt_completion(fields, place, notes),
        Format::Gsm8k => pairs::gsm8k(fields, place),
    }?;
    turns.retain(|turn| !is_empty_system(turn));
    Ok((format, turns))
}

/// Returns true for a system turn that says nothing, which is the same as none.
pub fn is_empty_system(turn: &Message) -> bool {
    turn.role == "system" && turn.content.trim().is_empty()
}

/// Takes the field `name`; null counts as absent.
fn take(fields: &mut Fields, name: &str) -> Option<Value> {
    fields.shift_remove(name).filter(|value| !value.is_null())
}

fn need(fields: &mut Fields, name: &str, place: &Place) -> Result<Value> {
    if fields.get(name).is_some_and(Value::is_null) {
        bail!(place.bad(format!("the field {name} is null")).expected("a value").found(names(fields)));
    }
    take(fields, name).ok_or_else(|| place.bad(format!("no field {name}")).found(names(fields)).into())
}

fn need_text(fields: &mut Fields, name: &str, place: &Place) -> Result<String> {
    text(need(fields, name, place)?, name, place)
}

fn need_list(fields: &mut Fields, name: &str, place: &Place) -> Result<Vec<Value>> {
    list(need(fields, name, place)?, name, place)
}

/// The optional system turn of Alpaca and of lists of turns; empty counts as absent, as their files have it.
fn take_system(fields: &mut Fields, place: &Place) -> Result<Option<Message>> {
    let Some(value) = take(fields, "system") else { return Ok(None) };
    let turn = Message::new("system", text(value, "system", place)?);
    Ok((!is_empty_system(&turn)).then_some(turn))
}

fn text(value: Value, what: &str, place: &Place) -> Result<String> {
    match value {
        Value::String(text) => Ok(text),
        other => bail!(place.bad(format!("{what} is not text")).expected("a string").found(shown(&other))),
    }
}

fn list(value: Value, what: &str, place: &Place) -> Result<Vec<Value>> {
    match value {
        Value::Array(list) => Ok(list),
        other => bail!(place.bad(format!("{what} is not a list")).expected("[…]").found(shown(&other))),
    }
}

/// The beginning of `value` as JSON, for messages; of one that cannot be used, what was found.
pub fn shown(value: &Value) -> String {
    const MOST: usize = 80;
    let text = text_of(value);
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
