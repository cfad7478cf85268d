//! From a row's fields to its conversation: the layouts that data sets commonly have.
//!
//! | format | fields | the conversation |
//! | --- | --- | --- |
//! | messages | `messages`: [{role, content}] | as it is |
//! | sharegpt | `conversations`: [{from, value}], `system`? | human is the user, gpt the assistant |
//! | alpaca | `instruction`, `output`, `input`?, `system`?, `history`? | the pairs of history; instruction, a line break, input; output |
//! | prompt-completion | `prompt`, `completion` | texts: user and assistant; or lists of messages, joined |
//! | gsm8k | `question`, `answer` | user and assistant |
//! | ultrachat | `data`: [text] | user and assistant in turn |
//!
//! The fields of the conversation leave the row, but for GSM8K's `answer`, which its metric compares with.

mod pairs;
mod turns;

use anyhow::{Result, bail};
use cpift_core::tasks::Format;
use serde_json::Value;

use super::files::Fields;
use super::place::Place;
use super::rows::Message;

/// The format that `fields` have; the first that fits, in the order of the table above. Null counts as absent, as Parquet files
/// and joined data sets have it in columns a row does not use.
fn detect(fields: &Fields, place: &Place) -> Result<Format> {
    let has = |names: &[&str]| names.iter().all(|name| fields.get(*name).is_some_and(|value| !value.is_null()));
    let known = [
        (has(&["messages"]), Format::Messages),
        (has(&["conversations"]), Format::Sharegpt),
        (has(&["instruction", "output"]), Format::Alpaca),
        (has(&["prompt", "completion"]), Format::PromptCompletion),
        // Multiple choice often has a question too, but an index as the answer.
        (has(&["question", "answer"]) && fields["answer"].is_string(), Format::Gsm8k),
        (has(&["data"]), Format::Ultrachat),
    ];
    known.into_iter().find_map(|(fits, format)| fits.then_some(format)).ok_or_else(|| {
        let error = place
            .bad("no conversation in this row")
            .expected(
                "messages; conversations; instruction and output; prompt and completion; question and answer (texts); or data",
            )
            .found(names(fields))
            .hint("say how its columns make one in tasks.toml: prompt = \"{{ … }}\" and completion = \"{{ … }}\"");
        error.into()
    })
}

/// The names of the fields, for messages.
pub fn names(fields: &Fields) -> String {
    let names: Vec<&str> = fields.keys().map(String::as_str).collect();
    if names.is_empty() { "no fields".into() } else { format!("the fields {}", names.join(", ")) }
}

/// Takes the conversation of `format` out of `fields`; returns the format that was found too.
///
/// # Errors
/// [`cpift_core::BadInput`] naming the row: no format fits, or a field is missing or of another type, or a turn is a tool's.
pub fn take_conversation(format: Format, fields: &mut Fields, place: &Place) -> Result<(Format, Vec<Message>)> {
    let format = if format == Format::Auto { detect(fields, place)? } else { format };
    let messages = match format {
        Format::Auto => unreachable!("detection names a format"),
        Format::Messages => turns::messages(fields, place),
        Format::Sharegpt => turns::sharegpt(fields, place),
        Format::Ultrachat => turns::ultrachat(fields, place),
        Format::Alpaca => pairs::alpaca(fields, place),
        Format::PromptCompletion => pairs::prompt_completion(fields, place),
        Format::Gsm8k => pairs::gsm8k(fields, place),
    }?;
    Ok((format, messages))
}

/// A turn of `role`.
fn message(role: &str, content: String) -> Message {
    Message::new(role, content)
}

/// Takes the field `name`; null counts as absent.
fn take(fields: &mut Fields, name: &str) -> Option<Value> {
    fields.shift_remove(name).filter(|value| !value.is_null())
}

fn need(fields: &mut Fields, name: &str, place: &Place) -> Result<Value> {
    take(fields, name).ok_or_else(|| place.bad(format!("no field {name}")).found(names(fields)).into())
}

fn need_text(fields: &mut Fields, name: &str, place: &Place) -> Result<String> {
    text(need(fields, name, place)?, name, place)
}

fn need_list(fields: &mut Fields, name: &str, place: &Place) -> Result<Vec<Value>> {
    list(need(fields, name, place)?, name, place)
}

/// The optional system turn of Alpaca and ShareGPT; empty counts as absent, as their files have it.
fn take_system(fields: &mut Fields, place: &Place) -> Result<Option<Message>> {
    let Some(value) = take(fields, "system") else { return Ok(None) };
    let content = text(value, "system", place)?;
    Ok((!content.is_empty()).then(|| message("system", content)))
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

/// The beginning of `value` as JSON, for messages.
pub fn shown(value: &Value) -> String {
    const MOST: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
