//! Conversations: their turns, the rules for their order, and the lists of turns that rows hold:
//! OpenAI's messages, ShareGPT's conversations, and their mixtures.

use anyhow::{Result, bail};
use cpift_core::BadInput;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::files::{Fields, Place, need_list, shown, take, text};
use crate::notes::Notes;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Text of the turn.
    pub content: String,
    /// False for an assistant turn that is in the context but not trained on.
    #[serde(skip_serializing, default = "trained")]
    pub train: bool,
}

fn trained() -> bool {
    true
}

impl Message {
    /// A turn with `train` set.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), train: true }
    }
}

/// Returns true for a system turn without text, which is treated as absent.
pub fn is_empty_system(turn: &Message) -> bool {
    turn.role == "system" && turn.content.trim().is_empty()
}

/// Checks the order of roles and that no turn is empty. The error is a message and the text
/// expected.
pub fn check_turns(messages: &[Message]) -> Result<(), (String, &'static str)> {
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

/// Keys that name the speaker of a turn, in any combination with those of [`SPEECH`].
const SPEAKER: [&str; 2] = ["role", "from"];
/// Keys with the text of a turn.
const SPEECH: [&str; 2] = ["content", "value"];
/// Names of speakers in data sets, with their role.
const ROLES: [(&str, &str); 8] = [
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("assistant", "assistant"),
    ("chatgpt", "assistant"),
    ("bard", "assistant"),
    ("model", "assistant"),
    ("system", "system"),
];
/// Keys that turn training on an assistant turn on or off: OpenAI and Mistral, axolotl, ms-swift,
/// verl.
const TRAINING: [&str; 6] = ["weight", "train", "trainable", "training", "loss", "loss_mask"];
/// Speakers and keys of tool use, for which no targets are defined here.
const TOOL_ROLES: [&str; 6] = ["tool", "tool_call", "function", "function_call", "observation", "ipython"];
const TOOL_KEYS: [&str; 2] = ["tool_calls", "function_call"];
/// Types of content parts that are text: chat completions, and two of OpenAI's Responses API.
const TEXT_PARTS: [&str; 3] = ["text", "input_text", "output_text"];

/// The list of turns in the first of the columns `names` that the row has, after an optional column
/// `system`.
pub fn conversation(fields: &mut Fields, names: [&str; 3], place: &Place, notes: &mut Notes) -> Result<Vec<Message>> {
    let has = |name: &&str| fields.get(*name).is_some_and(|value| !value.is_null());
    let name = names.into_iter().find(has).unwrap_or(names[0]);
    let mut turns = chat(need_list(fields, name, place)?, name, true, place, notes)?;
    // Next to `messages`, a column that is no string has another meaning.
    if name != "messages" || fields.get("system").is_some_and(Value::is_string) {
        add_system(&mut turns, fields, place, notes)?;
    }
    Ok(turns)
}

/// Puts the text of the column `system` before `turns`, unless they have a system turn of their
/// own.
pub fn add_system(turns: &mut Vec<Message>, fields: &mut Fields, place: &Place, notes: &mut Notes) -> Result<()> {
    let own = turns.iter().find(|turn| turn.role == "system" && !turn.content.trim().is_empty());
    match (take_system(fields, place)?, own.map(|own| own.content.clone())) {
        (Some(system), None) => turns.insert(0, system),
        (Some(system), Some(own)) if system.content != own => notes.other_system(place),
        _ => {}
    }
    Ok(())
}

/// The turns of a list, the value of the field `what`. Assistant turns are trained as their keys
/// say, by default as `train` says. The order of roles is checked later, for all formats.
pub fn chat(turns: Vec<Value>, what: &str, train: bool, place: &Place, notes: &mut Notes) -> Result<Vec<Message>> {
    let said =
        turns.into_iter().enumerate().map(|(i, value)| Turn { what, number: i + 1, place }.said(value, train, notes));
    said.collect()
}

/// Position of a turn, for messages.
struct Turn<'a> {
    what: &'a str,
    number: usize,
    place: &'a Place,
}

impl Turn<'_> {
    fn bad(&self, message: impl std::fmt::Display) -> BadInput {
        self.place.bad(format!("{}, turn {}, {message}", self.what, self.number))
    }

    fn said(&self, value: Value, train: bool, notes: &mut Notes) -> Result<Message> {
        let Value::Object(mut turn) = value else {
            let expected = "{role: …, content: …} or {from: …, value: …}";
            bail!(self.bad("is not an object").expected(expected).found(shown(&value)));
        };
        self.refuse_tools(&turn)?;
        let role = self.role(&mut turn)?;
        // Exports write null for a system turn that a conversation does not have.
        let null = SPEECH.iter().filter_map(|key| turn.get(*key)).all(Value::is_null);
        if role == "system" && null && SPEECH.iter().any(|key| turn.contains_key(*key)) {
            SPEECH.iter().for_each(|key| drop(turn.shift_remove(*key)));
            turn.insert(SPEECH[0].to_owned(), Value::from(""));
        }
        let content = self.content(&mut turn)?;
        let asked = self.training(&mut turn, role, notes)?;
        for (key, _) in turn.iter().filter(|(_, value)| !is_nothing(value)) {
            notes.unused_key(key, self.place);
        }
        Ok(Message { train: asked.unwrap_or(train), ..Message::new(role, content) })
    }

    /// Role of the speaker.
    fn role(&self, turn: &mut Map<String, Value>) -> Result<&'static str> {
        let named = self.take(turn, SPEAKER)?.into_iter().map(|(key, value)| {
            let Value::String(name) = value else {
                bail!(self.bad(format!("has no text as its {key}")).expected("a string").found(shown(&value)));
            };
            let role = ROLES.iter().find(|(known, _)| *known == name).map(|(_, role)| *role);
            let verb = if key == "from" { "is from" } else { "has the role" };
            let expected = "human or user, gpt or assistant (also chatgpt, bard, model), system";
            role.ok_or_else(|| self.bad(format!("{verb} {name:?}")).expected(expected).into())
        });
        let roles: Vec<&'static str> = named.collect::<Result<_>>()?;
        match roles[..] {
            [role] => Ok(role),
            [role, other] if role == other => Ok(role),
            _ => bail!(
                self.bad(format!("has the role {} and is from the {}", roles[0], roles[1])).expected("one speaker")
            ),
        }
    }

    /// Text of the turn.
    fn content(&self, turn: &mut Map<String, Value>) -> Result<String> {
        let said = self.take(turn, SPEECH)?.into_iter().map(|(key, value)| self.text(key, value));
        let mut texts: Vec<String> = said.collect::<Result<_>>()?;
        if texts.len() == 2 && texts[0] != texts[1] {
            bail!(self.bad("has a content and another value").expected("one text, under content or under value"));
        }
        Ok(texts.swap_remove(0))
    }

    /// Removes both of two keys from a turn. Null counts as absent; at least one value must be
    /// present.
    fn take(&self, turn: &mut Map<String, Value>, keys: [&'static str; 2]) -> Result<Vec<(&'static str, Value)>> {
        let there = keys.map(|key| (key, turn.shift_remove(key)));
        let name = there.iter().find(|(_, value)| value.is_some()).map_or(keys[0], |(key, _)| *key);
        let null = there.iter().any(|(_, value)| value.is_some());
        let given: Vec<_> =
            there.into_iter().filter_map(|(key, value)| Some((key, value.filter(|v| !v.is_null())?))).collect();
        if given.is_empty() {
            let found = if null { "null" } else { "nothing" };
            bail!(self.bad(format!("has no text as its {name}")).expected("a string").found(found));
        }
        Ok(given)
    }

    /// A text, or the concatenated texts of a list of parts, as the chat templates of transformers
    /// write it.
    fn text(&self, key: &str, value: Value) -> Result<String> {
        let no_text = |value: &Value| {
            self.bad(format!("has no text as its {key}"))
                .expected("a string, or a list of {type: text, text: …}")
                .found(shown(value))
        };
        let parts = match value {
            Value::String(text) => return Ok(text),
            Value::Array(parts) => parts,
            other => bail!(no_text(&other)),
        };
        let mut text = String::new();
        for part in &parts {
            let kind = part.get("type").and_then(Value::as_str);
            match part.as_str().or_else(|| part.get("text").and_then(Value::as_str)) {
                Some(said) if kind.is_none_or(|kind| TEXT_PARTS.contains(&kind)) => text.push_str(said),
                _ => match kind {
                    Some(kind) if !TEXT_PARTS.contains(&kind) => bail!(
                        self.bad(format!("has a part of the type {kind:?} in its {key}"))
                            .expected("parts of text: {type: text, text: …}")
                            .hint("text models do not read images, audio or files: leave out such rows, or describe the content as text")
                    ),
                    _ => bail!(no_text(&Value::Array(parts))),
                },
            }
        }
        Ok(text)
    }

    /// Value of the turn's training keys; `None` if it has none. On turns of the system or the
    /// user, which are never trained, the keys are removed too.
    fn training(&self, turn: &mut Map<String, Value>, role: &str, notes: &mut Notes) -> Result<Option<bool>> {
        let mut asked: Option<(&str, bool)> = None;
        for key in TRAINING {
            let Some(value) = turn.shift_remove(key).filter(|value| !value.is_null()) else { continue };
            let answer = match &value {
                Value::Bool(answer) => Some(*answer),
                Value::Number(number) => {
                    let number = number.as_f64();
                    [(0.0, false), (1.0, true)].into_iter().find(|(n, _)| number == Some(*n)).map(|(_, answer)| answer)
                }
                _ => None,
            };
            if role != "assistant" {
                match answer {
                    Some(false) => {}
                    Some(true) => notes.not_trained(key, self.place),
                    None => notes.unused_key(key, self.place),
                }
                continue;
            }
            let Some(answer) = answer else {
                bail!(
                    self.bad(format!("has a {key} that is neither on nor off"))
                        .expected("0 or 1, false or true")
                        .found(shown(&value))
                        .hint("a turn is trained or not, with no weight in between: round the value, or rename a key with another meaning")
                );
            };
            match asked {
                Some((other, said)) if said != answer => bail!(
                    self.bad(format!(
                        "is trained according to one key and not according to another: {other} and {key}"
                    ))
                    .expected("keys that agree")
                    .found(format!("{other} for {said}, {key} for {answer}"))
                ),
                _ => asked = Some((key, answer)),
            }
        }
        Ok(asked.map(|(_, answer)| answer))
    }

    fn refuse_tools(&self, turn: &Map<String, Value>) -> Result<()> {
        let speaks = |key: &&str| {
            let role = turn.get(*key)?.as_str()?;
            TOOL_ROLES.contains(&role).then(|| format!("{key}: {role}"))
        };
        let calls = |key: &&&str| turn.get(**key).is_some_and(|value| !is_nothing(value));
        let calls = || TOOL_KEYS.iter().find(calls).map(|key| (*key).to_owned());
        let Some(found) = SPEAKER.iter().find_map(speaks).or_else(calls) else { return Ok(()) };
        let error =
            self.bad("belongs to a tool: tool turns are not supported").expected("turns of system, user and assistant");
        bail!(error.found(found).hint("leave out the rows that use tools"))
    }
}

/// Returns true for values that exports write for an absent key: null, and empty texts, lists and
/// objects.
pub fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// The optional column `system` as a turn; an empty one counts as absent.
fn take_system(fields: &mut Fields, place: &Place) -> Result<Option<Message>> {
    let Some(value) = take(fields, "system") else { return Ok(None) };
    let turn = Message::new("system", text(value, "system", place)?);
    Ok((!is_empty_system(&turn)).then_some(turn))
}
