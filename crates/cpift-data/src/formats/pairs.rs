//! Formats that hold a question and its answer in fields of their own: Alpaca, prompt and completion, GSM8K.

use anyhow::Result;
use serde_json::Value;

use super::turns::{chat, history};
use super::{Fields, message, need, need_text, take, take_system, text};
use crate::place::Place;
use crate::rows::Message;

/// `instruction` with `input` after a line break, as LLaMA-Factory joins them; `output`.
pub fn alpaca(fields: &mut Fields, place: &Place) -> Result<Vec<Message>> {
    let mut question = need_text(fields, "instruction", place)?;
    let input = take(fields, "input").map(|value| text(value, "input", place)).transpose()?;
    if let Some(input) = input.filter(|input| !input.is_empty()) {
        question = format!("{question}\n{input}");
    }
    let answer = need_text(fields, "output", place)?;
    let mut messages: Vec<Message> = take_system(fields, place)?.into_iter().collect();
    if let Some(earlier) = take(fields, "history") {
        messages.extend(history(earlier, place)?);
    }
    messages.extend([message("user", question), message("assistant", answer)]);
    Ok(messages)
}

/// `prompt` and `completion`, each a text or, as TRL's conversational form has it, a list of messages.
pub fn prompt_completion(fields: &mut Fields, place: &Place) -> Result<Vec<Message>> {
    let mut messages = side(need(fields, "prompt", place)?, "prompt", "user", place)?;
    messages.extend(side(need(fields, "completion", place)?, "completion", "assistant", place)?);
    Ok(messages)
}

fn side(value: Value, name: &str, role: &str, place: &Place) -> Result<Vec<Message>> {
    match value {
        Value::Array(turns) => chat(turns, name, place),
        other => Ok(vec![message(role, text(other, name, place)?)]),
    }
}

/// `question` and `answer`; the answer stays in the row, for the metric.
pub fn gsm8k(fields: &mut Fields, place: &Place) -> Result<Vec<Message>> {
    let question = need_text(fields, "question", place)?;
    let answer = need_text(fields, "answer", place)?;
    fields.insert("answer".into(), Value::String(answer.clone()));
    Ok(vec![message("user", question), message("assistant", answer)])
}
