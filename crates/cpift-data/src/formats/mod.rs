//! From a row's fields to its conversation: the common data formats.
//!
//! | format | fields | conversation |
//! | --- | --- | --- |
//! | messages | `messages`: [turn] | as it is |
//! | sharegpt | `conversations` or `conversation`: [turn] | as it is |
//! | alpaca | `instruction`, `output`, `input`?, `history`? | pairs of history; instruction, a line break, input; output |
//! | prompt-completion | `prompt`, `completion` | user and assistant (texts), or the two lists of turns joined |
//! | gsm8k | `question`, `answer` | user and assistant |
//! | ultrachat | `data`: [text] | user and assistant alternating |
//!
//! A turn is {role, content} or {from, value} in any combination, under either list name; see
//! [`turns`]. With every format a text in the column `system` becomes the system turn. An empty
//! system turn is dropped. The columns of the conversation are removed from the row, except GSM8K's
//! `answer`, which its metric compares with.

pub mod notes;
mod turns;

use anyhow::Result;
use cpift_core::format::tasks::Format;
use serde_json::Value;

use crate::conversation::{Message, is_empty_system};
use crate::files::raw::{Fields, Place, list, names, need, need_list, need_text, reason, take, text};
use notes::Notes;
use turns::{add_system, chat, is_nothing};

/// Columns with a list of turns.
const LISTS: [&str; 3] = ["messages", "conversations", "conversation"];

/// Columns that TRL passes to the chat template.
const FOR_TEMPLATE: [&str; 3] = ["tools", "documents", "chat_template_kwargs"];

/// Columns with a text that a question or an instruction refers to.
const BACKGROUND: [&str; 4] = ["context", "passage", "document", "article"];

/// Returns true for a value that is empty, or whose text is that of an empty JSON value.
fn holds_nothing(value: &Value) -> bool {
    is_nothing(value) || value.as_str().is_some_and(|text| ["", "[]", "{}", "null", "None"].contains(&text.trim()))
}

/// The first format of the table above that fits `fields`. Null counts as absent: Parquet files and
/// joined data sets have it in columns that a row does not use.
fn detect(fields: &Fields, place: &Place) -> Result<Format> {
    // Joined data sets have NaN where others have null. A format with such a column is the last
    // choice.
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
            .hint("build the conversation from columns in tasks.toml: prompt = \"{{ … }}\" and completion = \"{{ … }}\"");
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
        // Multiple-choice rows often have a question too, but an index as the answer.
        (has("question") && has("answer") && fields["answer"].is_string(), Format::Gsm8k),
        (has("data"), Format::Ultrachat),
    ];
    known.into_iter().find_map(|(fits, format)| fits.then_some(format))
}

/// Takes the conversation of `format` out of `fields`; returns it with the format found. Unused
/// keys of turns are counted in `notes`.
///
/// # Errors
/// [`cpift_core::BadInput`] naming the row: no format fits, a field is missing or has another type,
/// a turn comes from a tool, or its keys contradict each other.
pub fn take_conversation(
    format: Format,
    fields: &mut Fields,
    place: &Place,
    notes: &mut Notes,
) -> Result<(Format, Vec<Message>)> {
    let detected = format == Format::Auto;
    let format = if detected { detect(fields, place)? } else { format };
    let [messages, conversations, conversation] = LISTS;
    let mut turns = match format {
        Format::Auto => unreachable!("detection names a format"),
        Format::Messages => turns::conversation(fields, LISTS, place, notes),
        Format::Sharegpt => turns::conversation(fields, [conversations, conversation, messages], place, notes),
        Format::Ultrachat => ultrachat(fields, place),
        Format::Alpaca => alpaca(fields, place, notes),
        Format::PromptCompletion => prompt_completion(fields, place, notes),
        Format::Gsm8k => gsm8k(fields, place),
    }?;
    let one_text_per_turn = matches!(format, Format::PromptCompletion | Format::Gsm8k | Format::Ultrachat);
    if one_text_per_turn && fields.get("system").is_some_and(Value::is_string) {
        add_system(&mut turns, fields, place, notes)?;
    }
    turns.retain(|turn| !is_empty_system(turn));
    let one_prompt = matches!(format, Format::Gsm8k | Format::Alpaca);
    for (name, value) in fields.iter().filter(|(_, value)| !holds_nothing(value)) {
        if FOR_TEMPLATE.contains(&name.as_str()) {
            notes.not_in_template(name, place);
        } else if detected && one_prompt && BACKGROUND.contains(&name.as_str()) && value.is_string() {
            notes.not_in_prompt(name, place);
        }
    }
    Ok((format, turns))
}

/// User: `instruction` and `input`, joined by a line break as LLaMA-Factory does; empty ones are
/// left out. Assistant: `output`.
fn alpaca(fields: &mut Fields, place: &Place, notes: &mut Notes) -> Result<Vec<Message>> {
    let input = take(fields, "input").map(|value| text(value, "input", place)).transpose()?;
    // Some rows have no instruction, only an input.
    let missing = fields.get("instruction").is_none_or(Value::is_null) && input.as_ref().is_some_and(|i| !i.is_empty());
    let instruction = if missing { None } else { Some(need_text(fields, "instruction", place)?) };
    fields.shift_remove("instruction");
    let parts: Vec<String> = [instruction, input].into_iter().flatten().filter(|part| !part.is_empty()).collect();
    let answer = need_text(fields, "output", place)?;
    let mut messages = Vec::new();
    if let Some(earlier) = take(fields, "history") {
        messages.extend(history(earlier, place)?);
    }
    messages.extend([Message::new("user", parts.join("\n")), Message::new("assistant", answer)]);
    add_system(&mut messages, fields, place, notes)?;
    Ok(messages)
}

/// `prompt` and `completion`, each a text or, as in TRL's conversational format, a list of
/// messages. As in TRL, answers within the prompt are not trained.
fn prompt_completion(fields: &mut Fields, place: &Place, notes: &mut Notes) -> Result<Vec<Message>> {
    let mut messages = side(need(fields, "prompt", place)?, ("prompt", "user", false), place, notes)?;
    messages.extend(side(need(fields, "completion", place)?, ("completion", "assistant", true), place, notes)?);
    Ok(messages)
}

fn side(
    value: Value,
    (name, role, train): (&str, &str, bool),
    place: &Place,
    notes: &mut Notes,
) -> Result<Vec<Message>> {
    match value {
        Value::Array(turns) => chat(turns, name, train, place, notes),
        other => Ok(vec![Message::new(role, text(other, name, place)?)]),
    }
}

/// `question` and `answer`; the answer stays in the row for the metric.
fn gsm8k(fields: &mut Fields, place: &Place) -> Result<Vec<Message>> {
    let question = need_text(fields, "question", place)?;
    let answer = need_text(fields, "answer", place)?;
    fields.insert("answer".into(), Value::String(answer.clone()));
    Ok(vec![Message::new("user", question), Message::new("assistant", answer)])
}

/// `data`: texts of user and assistant alternating, the user's first.
fn ultrachat(fields: &mut Fields, place: &Place) -> Result<Vec<Message>> {
    let texts = need_list(fields, "data", place)?;
    let said = texts.into_iter().zip(["user", "assistant"].into_iter().cycle()).enumerate();
    said.map(|(i, (value, role))| Ok(Message::new(role, text(value, &format!("data, turn {},", i + 1), place)?)))
        .collect()
}

/// Turns of Alpaca's `history`: [[text of the user, text of the assistant], …].
fn history(value: Value, place: &Place) -> Result<Vec<Message>> {
    let mut messages = Vec::new();
    for (i, pair) in list(value, "history", place)?.into_iter().enumerate() {
        let what = format!("history, pair {},", i + 1);
        let pair = list(pair, &what, place)?;
        let [user, assistant] = <[Value; 2]>::try_from(pair).map_err(|pair| {
            place.bad(format!("{what} has {} texts", pair.len())).expected("two: the user's and the assistant's")
        })?;
        messages.push(Message::new("user", text(user, &what, place)?));
        messages.push(Message::new("assistant", text(assistant, &what, place)?));
    }
    Ok(messages)
}
