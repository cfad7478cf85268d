//! Formats that hold a list of turns: messages, ShareGPT, UltraChat's first release.

use anyhow::{Result, bail};
use cpift_core::BadInput;
use serde_json::{Map, Value};

use super::{Fields, list, message, need_list, shown, take_system, text};
use crate::place::Place;
use crate::rows::Message;

/// Speakers and keys of tool use, which no target mask here is defined for.
const TOOL_ROLES: [&str; 6] = ["tool", "tool_call", "function", "function_call", "observation", "ipython"];
const TOOL_KEYS: [&str; 2] = ["tool_calls", "function_call"];

/// `messages`: [{role, content}].
pub fn messages(fields: &mut Fields, place: &Place) -> Result<Vec<Message>> {
    chat(need_list(fields, "messages", place)?, "messages", place)
}

/// `conversations`: [{from, value}] after an optional `system`.
pub fn sharegpt(fields: &mut Fields, place: &Place) -> Result<Vec<Message>> {
    let turns = need_list(fields, "conversations", place)?;
    let said = turns.into_iter().enumerate().map(|(i, value)| {
        let at = Turn { what: "conversations", number: i + 1, place };
        let (from, content) = at.said(value, "from", "value")?;
        match from.as_str() {
            "human" | "user" => Ok(message("user", content)),
            "gpt" | "assistant" => Ok(message("assistant", content)),
            "system" => Ok(message("system", content)),
            _ => bail!(at.bad(format!("is from {from:?}")).expected("human or user, gpt or assistant, system")),
        }
    });
    take_system(fields, place)?.map(Ok).into_iter().chain(said).collect()
}

/// `data`: texts in turn, the user's first.
pub fn ultrachat(fields: &mut Fields, place: &Place) -> Result<Vec<Message>> {
    let texts = need_list(fields, "data", place)?;
    let said = texts.into_iter().zip(["user", "assistant"].into_iter().cycle()).enumerate();
    said.map(|(i, (value, role))| Ok(message(role, text(value, &format!("data, turn {},", i + 1), place)?))).collect()
}

/// A list of {role, content}, the value of the field `what`. Roles and their order are checked for all formats alike, later.
pub fn chat(turns: Vec<Value>, what: &str, place: &Place) -> Result<Vec<Message>> {
    let said = turns.into_iter().enumerate().map(|(i, value)| {
        let (role, content) = Turn { what, number: i + 1, place }.said(value, "role", "content")?;
        Ok(Message::new(role, content))
    });
    said.collect()
}

/// A turn, for messages about it.
struct Turn<'a> {
    what: &'a str,
    number: usize,
    place: &'a Place,
}

impl Turn<'_> {
    fn bad(&self, message: impl std::fmt::Display) -> BadInput {
        self.place.bad(format!("{}, turn {}, {message}", self.what, self.number))
    }

    /// Who speaks and what, from an object with the two keys.
    fn said(&self, value: Value, speaker: &str, speech: &str) -> Result<(String, String)> {
        let Value::Object(mut turn) = value else {
            let expected = format!("{{{speaker}: …, {speech}: …}}");
            bail!(self.bad("is not an object").expected(expected).found(shown(&value)));
        };
        self.refuse_tools(&turn, speaker)?;
        let mut part = |key: &str| match turn.remove(key) {
            Some(Value::String(text)) => Ok(text),
            other => {
                let found = other.map_or("nothing".into(), |value| shown(&value));
                bail!(self.bad(format!("has no text as its {key}")).expected("a string").found(found))
            }
        };
        Ok((part(speaker)?, part(speech)?))
    }

    fn refuse_tools(&self, turn: &Map<String, Value>, speaker: &str) -> Result<()> {
        let role = turn.get(speaker).and_then(Value::as_str).filter(|role| TOOL_ROLES.contains(role));
        // Exports write null or an empty list where a turn calls nothing.
        let calls =
            |key: &&&str| turn.get(**key).is_some_and(|v| !v.is_null() && v.as_array().is_none_or(|l| !l.is_empty()));
        let found = role.map(|role| format!("{speaker}: {role}"));
        let Some(found) = found.or_else(|| TOOL_KEYS.iter().find(calls).map(|key| (*key).to_owned())) else {
            return Ok(());
        };
        let error =
            self.bad("is a tool's: tool turns are not supported").expected("turns of system, user and assistant");
        bail!(error.found(found).hint("leave out the rows that use tools"))
    }
}

/// The pairs of Alpaca's `history`: [[what the user said, what the assistant said], …].
pub fn history(value: Value, place: &Place) -> Result<Vec<Message>> {
    let mut messages = Vec::new();
    for (i, pair) in list(value, "history", place)?.into_iter().enumerate() {
        let what = format!("history, pair {},", i + 1);
        let pair = list(pair, &what, place)?;
        let [user, assistant] = <[Value; 2]>::try_from(pair).map_err(|pair| {
            place.bad(format!("{what} has {} texts", pair.len())).expected("two: the user's and the assistant's")
        })?;
        messages.push(message("user", text(user, &what, place)?));
        messages.push(message("assistant", text(assistant, &what, place)?));
    }
    Ok(messages)
}
