//! Formats that hold a question and its answer in fields of their own: Alpaca, prompt and completion, GSM8K.

use anyhow::Result;
use serde_json::Value;

use super::notes::Notes;
use super::turns::{chat, history};
use super::{Fields, need, need_text, take, take_system, text};
use crate::place::Place;
use crate::rows::Message;

/// `instruction` and `input`, those that are not empty, with a line break between, as LLaMA-Factory joins them; `output`.
pub fn alpaca(fields: &mut Fields, place: &Place) -> Result<Vec<Message>> {
    let input = take(fields, "input").map(|value| text(value, "input", place)).transpose()?;
    // The instruction may be missing where the input says it all.
    let missing = fields.get("instruction").is_none_or(Value::is_null) && input.as_ref().is_some_and(|i| !i.is_empty());
    let instruction = if missing { None } else { Some(need_text(fields, "instruction", place)?) };
    fields.shift_remove("instruction");
    let parts: Vec<String> = [instruction, input].into_iter().flatten().filter(|part| !part.is_empty()).collect();
    let answer = need_text(fields, "output", place)?;
    let mut messages: Vec<Message> = take_system(fields, place)?.into_iter().collect();
    if let Some(earlier) = take(fields, "history") {
        messages.extend(history(earlier, place)?);
    }
    messages.extend([Message::new("user", parts.join("\n")), Message::new("assistant", answer)]);
    Ok(messages)
}

/// `prompt` and `completion`, each a text or, as TRL's conversational form has it, a list of messages. As there, answers within a prompt
/// are not trained.
pub fn prompt_completion(fields: &mut Fields, place: &Place, notes: &mut Notes) -> Result<Vec<Message>> {
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

/// `question` and `answer`; the answer stays in the row, for the metric.
pub fn gsm8k(fields: &mut Fields, place: &Place) -> Result<Vec<Message>> {
    let question = need_text(fields, "question", place)?;
    let answer = need_text(fields, "answer", place)?;
    fields.insert("answer".into(), Value::String(answer.clone()));
    Ok(vec![Message::new("user", question), Message::new("assistant", answer)])
}
