//! Rows of a task's data file: a conversation each, with the other columns. The conversation comes
//! from the row's columns by a known format or by templates in tasks.toml.
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
//! [`conversation`](crate::conversation). With every format a text in the column `system` becomes
//! the system turn. An empty system turn is dropped. The columns of the conversation are removed
//! from the row, except GSM8K's `answer`, which its metric compares with.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, anyhow};
use cpift_core::BadInput;
use cpift_core::format::tasks::{Format, Task};
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior};
use serde_json::{Map, Value};

use crate::conversation::{self, Message, add_system, chat, check_turns, is_empty_system, is_nothing};
use crate::files::{
    self, Fields, FileKind, Place, has_unusable, list, names, need, need_list, need_text, reason, take, text,
};
use crate::notes::Notes;
use crate::parquet;
use crate::template::{environment, jinja_lines, write_value};

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

/// Reads all rows of the file at `path` with their places, in order.
///
/// # Errors
/// [`BadInput`] for an unknown extension, a broken file, or a row that is not an object, with its
/// place.
fn read_fields(path: &Path) -> Result<Vec<(Place, Fields)>> {
    let file: Arc<Path> = path.into();
    match FileKind::of(path) {
        Some(FileKind::JsonLines) => files::read_lines(&file),
        Some(FileKind::Json) => files::read_list(&file),
        Some(FileKind::Parquet) => parquet::read(&file),
        None => Err(BadInput::new(path, "unknown kind of data file")
            .expected("a name that ends in .jsonl, .json or .parquet")
            .hint("rename the file if it has one of these formats, else convert it to JSONL (one object per line)")
            .into()),
    }
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

/// Conversion of rows to conversations.
pub enum Layout {
    /// A format, or automatic detection per row.
    Format(Format),
    /// Templates in tasks.toml.
    Templates(Box<Templates>),
}

/// Templates of a task for its turns.
pub struct Templates {
    system: Option<RowTemplate>,
    prompt: RowTemplate,
    completion: RowTemplate,
}

impl Layout {
    /// Layout of `task`.
    ///
    /// # Errors
    /// [`BadInput`] naming tasks.toml and the key of a template that does not parse.
    pub fn of(task: &Task) -> Result<Self> {
        let (Some(prompt), Some(completion)) = (&task.prompt, &task.completion) else {
            return Ok(Self::Format(task.format));
        };
        let parse = |key: &'static str, source: &str| {
            RowTemplate::new(key, source).map_err(|e| {
                let message = format!("task {}: {key} does not parse: {e:#}", task.name);
                anyhow::Error::from(BadInput::new(&task.listed_in, message))
            })
        };
        Ok(Self::Templates(Box::new(Templates {
            system: task.system.as_deref().map(|source| parse("system", source)).transpose()?,
            prompt: parse("prompt", prompt)?,
            completion: parse("completion", completion)?,
        })))
    }

    /// Takes the conversation out of a row's fields; returns it with the name of the layout.
    /// Templates leave all fields.
    pub(crate) fn take_conversation(
        &self,
        fields: &mut Fields,
        place: &Place,
        notes: &mut Notes,
    ) -> Result<(&'static str, Vec<Message>)> {
        match self {
            Self::Format(format) => {
                take_conversation(*format, fields, place, notes).map(|(found, messages)| (name(found), messages))
            }
            Self::Templates(templates) => Ok(("the templates of tasks.toml", templates.conversation(fields, place)?)),
        }
    }
}

impl Templates {
    fn conversation(&self, fields: &Fields, place: &Place) -> Result<Vec<Message>> {
        let turn = |role: &str, template: &RowTemplate| {
            let content = template.render(fields).map_err(|problem| place.bad(problem))?;
            anyhow::Ok(Message::new(role, content))
        };
        let system = self.system.as_ref().map(|template| turn("system", template)).transpose()?;
        let mut messages: Vec<Message> = system.into_iter().filter(|system| !is_empty_system(system)).collect();
        messages.push(turn("user", &self.prompt)?);
        messages.push(turn("assistant", &self.completion)?);
        Ok(messages)
    }
}

fn name(format: Format) -> &'static str {
    match format {
        Format::Auto => "auto",
        Format::Messages => "messages",
        Format::Alpaca => "alpaca (instruction, input, output)",
        Format::Sharegpt => "sharegpt (conversations)",
        Format::PromptCompletion => "prompt-completion",
        Format::Gsm8k => "gsm8k (question, answer)",
        Format::Ultrachat => "ultrachat (data)",
    }
}

/// A parsed template over the columns of a row, with the functions and filters of chat templates.
pub struct RowTemplate {
    environment: Environment<'static>,
    key: &'static str,
}

impl RowTemplate {
    /// Parses `source`, the template called `key` in tasks.toml.
    ///
    /// # Errors
    /// A sentence that says where the syntax breaks.
    pub fn new(key: &'static str, source: &str) -> Result<Self> {
        let mut environment = environment();
        // Jinja's default white space, as in other data tools, not that of chat templates: a line
        // break after a block is kept.
        environment.set_trim_blocks(false);
        environment.set_lstrip_blocks(false);
        // A misspelt column must not render as empty text, nor null as the word "none".
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_formatter(|out, state, value| {
            if value.is_none() {
                return Err(Error::new(ErrorKind::InvalidOperation, "a null would be written as text"));
            }
            write_value(out, state, value)
        });
        environment.add_template_owned(key, jinja_lines(source)).map_err(|e| anyhow!("{e:#}"))?;
        Ok(Self { environment, key })
    }

    /// Renders the columns of a row.
    ///
    /// # Errors
    /// A sentence naming the columns that the row lacks, or the message that the template raised.
    pub fn render(&self, fields: &Map<String, Value>) -> Result<String, String> {
        let template = self.environment.get_template(self.key).expect("the template was added at creation");
        let columns = if fields.values().any(has_unusable) {
            fields.iter().map(|(name, value)| (name.clone(), refusing(name, value))).collect()
        } else {
            minijinja::Value::from_serialize(fields)
        };
        template.render(columns).map_err(|error| {
            let mut missing: Vec<String> = template.undeclared_variables(true).into_iter().collect();
            missing.retain(|path| !resolves(fields, path) && !self.is_global(path));
            missing.sort_unstable();
            if error.kind() == ErrorKind::UndefinedError && !missing.is_empty() {
                let (missing, there) = (missing.join(", "), fields.keys().cloned().collect::<Vec<_>>().join(", "));
                return format!(
                    "the template {} uses {missing}, which this row does not have; it has {there}",
                    self.key
                );
            }
            format!("the template {} fails: {}", self.key, error.detail().unwrap_or(&error.to_string()))
        })
    }

    fn is_global(&self, name: &str) -> bool {
        self.environment.globals().any(|(global, _)| global == name)
    }
}

/// `value` of the column `name` for templates, in which using a marker is an error.
fn refusing(name: &str, value: &Value) -> minijinja::Value {
    if let Some(found) = reason(value) {
        return Error::new(ErrorKind::InvalidOperation, format!("the column {name} holds {found}")).into();
    }
    match value {
        Value::Array(list) => list.iter().map(|value| refusing(name, value)).collect(),
        Value::Object(map) => map.iter().map(|(key, value)| (key.clone(), refusing(name, value))).collect(),
        other => minijinja::Value::from_serialize(other),
    }
}

/// Returns true if the dotted `path` leads to a value.
fn resolves(fields: &Map<String, Value>, path: &str) -> bool {
    let mut parts = path.split('.');
    let first = parts.next().and_then(|name| fields.get(name));
    first.is_some_and(|value| parts.try_fold(value, |value, name| value.get(name)).is_some())
}

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
        Format::Messages => conversation::conversation(fields, LISTS, place, notes),
        Format::Sharegpt => conversation::conversation(fields, [conversations, conversation, messages], place, notes),
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(source: &str, fields: Value) -> Result<String, String> {
        let Value::Object(fields) = fields else { panic!("an object") };
        RowTemplate::new("prompt", source).unwrap().render(&fields)
    }

    #[test]
    fn columns_render_with_filters_loops_and_line_breaks() {
        let row = json!({"passage": "<p> & q", "options": ["x", "y"], "answer": 1, "meta": {"id": 7}});
        let source =
            "{{ passage }}{% for o in options %}\n{{ 'AB'[loop.index0] }}. {{ o | upper }}{% endfor %}\n#{{ meta.id }}";
        assert_eq!(render(source, row.clone()).unwrap(), "<p> & q\nA. X\nB. Y\n#7");
        assert_eq!(render("{{ 'AB'[answer] }}", row).unwrap(), "B");
    }

    #[test]
    fn what_a_row_lacks_is_named() {
        let row = json!({"question": "q", "meta": {"id": 7}, "empty": null});
        let error = render("{{ passage }}{{ question }}{{ namespace() }}", row.clone()).unwrap_err();
        assert_eq!(
            error,
            "the template prompt uses passage, which this row does not have; it has question, meta, empty"
        );
        assert!(render("{{ meta.name }}", row.clone()).unwrap_err().contains("uses meta.name, which"));
        assert!(render("{% if hint %}x{% endif %}", row.clone()).unwrap_err().contains("uses hint, which"));
        assert!(render("{{ empty }}", row.clone()).unwrap_err().contains("null"));
        assert_eq!(render("{% if empty %}{{ empty }}{% else %}-{% endif %}", row).unwrap(), "-");
    }

    #[test]
    fn what_a_template_raises_is_told_and_endless_ones_are_stopped() {
        let raised = render("{{ raise_exception('no ' + q) }}", json!({"q": "question"})).unwrap_err();
        assert_eq!(raised, "the template prompt fails: no question");
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}";
        assert!(render(endless, json!({})).unwrap_err().contains("fuel"));
        assert!(RowTemplate::new("prompt", "{{ a").is_err());
    }
}
