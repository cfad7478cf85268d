//! Chat templates: the Jinja of transformers, run by minijinja with Python's methods.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::ops::Range;

use anyhow::{Context, Result, anyhow};
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, context};
use regex::Regex;
use serde::Serialize;

use crate::conversation::Message;

/// Limit on the work of a template; real ones need a few thousand steps.
const FUEL: u64 = 10_000_000;

/// Special tokens that a template can use, such as `bos_token`.
pub type SpecialTokens = BTreeMap<String, String>;

/// More variables of a template, such as `enable_thinking`: `template_args` in tasks.toml.
pub type TemplateArgs = serde_json::Map<String, serde_json::Value>;

/// Marks around the output of a `{% generation %}` block: noncharacters of Unicode, which no text
/// contains.
const BLOCK_START: char = '\u{fdd2}';
const BLOCK_END: char = '\u{fdd3}';

/// An error that a chat template raised, such as roles out of order, with the template's own
/// message.
#[derive(Debug)]
pub struct Refusal(String);

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the chat template refuses the messages: {}", self.0)
    }
}

impl std::error::Error for Refusal {}

/// A parsed chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    /// Closing mark of the reasoning before an answer, such as `</think>`, if the template contains
    /// one.
    pub reasoning_end: Option<String>,
    /// True if the template has `{% generation %}` blocks around the assistant's text.
    pub marks_answers: bool,
}

impl ChatTemplate {
    /// Parses `source`.
    ///
    /// # Errors
    /// A sentence with the place of the syntax error.
    pub fn new(source: &str) -> Result<Self> {
        let source = jinja_lines(source);
        let mut environment = environment();
        // A filter block has the white space rules of the block that it replaces.
        let block = Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("a constant that parses");
        let plain = block.replace_all(&source, |found: &regex::Captures<'_>| {
            let body = if found.get(2).is_some() { "endfilter" } else { "filter assistant_block" };
            format!("{{%{} {body} {}%}}", &found[1], &found[3])
        });
        environment.add_filter("assistant_block", |text: String| format!("{BLOCK_START}{text}{BLOCK_END}"));
        environment.add_template_owned("chat", plain.clone().into_owned()).map_err(|e| anyhow!("{e:#}"))?;
        let reasoning = Regex::new(r"</[\w:]*think[\w:]*>|\[/THINK\]").expect("a constant that parses");
        let reasoning_end = reasoning.find(&source).map(|found| found.as_str().to_owned());
        Ok(Self { environment, reasoning_end, marks_answers: block.is_match(&source), source })
    }

    /// Source of the template.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders `messages`, followed by the assistant's header if `add_generation_prompt` is true.
    ///
    /// # Errors
    /// The message that the template raised, such as roles out of order.
    pub fn render(
        &self,
        messages: &[Message],
        special: &SpecialTokens,
        args: &TemplateArgs,
        add_generation_prompt: bool,
    ) -> Result<String> {
        Ok(self.render_marked(messages, special, args, add_generation_prompt)?.0)
    }

    /// As [`ChatTemplate::render`], with the bytes written by `{% generation %}` blocks.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_marked(
        &self,
        messages: &[Message],
        special: &SpecialTokens,
        args: &TemplateArgs,
        add_generation_prompt: bool,
    ) -> Result<(String, Vec<Range<usize>>)> {
        let template = self.environment.get_template("chat").context("the template was added at creation")?;
        let mut extra: BTreeMap<&str, Value> =
            special.iter().map(|(name, token)| (name.as_str(), Value::from(token.as_str()))).collect();
        extra.extend(args.iter().map(|(name, value)| (name.as_str(), Value::from_serialize(value))));
        let extra = Value::from_serialize(extra);
        let rendered = template.render(context! {
            messages => Value::from_serialize(messages),
            add_generation_prompt => add_generation_prompt,
            tools => Value::from(()),
            documents => Value::from(()),
            ..extra
        });
        let rendered = rendered.map_err(|e| Refusal(e.detail().map_or_else(|| e.to_string(), str::to_owned)))?;
        Ok(if self.marks_answers { unmark(&rendered) } else { (rendered, Vec::new()) })
    }
}

/// `text` without block marks, and the bytes that each block wrote.
fn unmark(text: &str) -> (String, Vec<Range<usize>>) {
    let (mut plain, mut blocks, mut start) = (String::with_capacity(text.len()), Vec::new(), 0);
    for c in text.chars() {
        match c {
            BLOCK_START => start = plain.len(),
            BLOCK_END => blocks.push(start..plain.len()),
            c => plain.push(c),
        }
    }
    (plain, blocks)
}

/// `source` with line breaks normalised to `\n`, as Jinja does.
pub(crate) fn jinja_lines(source: &str) -> String {
    source.replace("\r\n", "\n").replace('\r', "\n")
}

/// Jinja as transformers configures it: functions and filters, Python's methods, bounded work.
pub(crate) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |text: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, text))
    });
    let today = template_date();
    environment.add_function("strftime_now", move |format: String| -> Result<String, Error> {
        let mut out = String::new();
        write!(out, "{}", today.format(&format))
            .map_err(|_| Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?})")))?;
        Ok(out)
    });
    environment.add_filter("tojson", to_python_json);
    environment
}

/// Date for templates, taken once per template: SOURCE_DATE_EPOCH (seconds since 1970, UTC) if set,
/// else now. Set it to get the same tokens on another day.
fn template_date() -> chrono::DateTime<chrono::Local> {
    let fixed = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|text| text.parse().ok());
    let fixed = fixed.and_then(|seconds| chrono::DateTime::from_timestamp(seconds, 0));
    fixed.map_or_else(chrono::Local::now, |date| date.with_timezone(&chrono::Local))
}

/// `tojson` as in transformers: Python's `json.dumps(ensure_ascii=False)` with an optional indent.
fn to_python_json(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    kwargs.assert_all_used()?;
    let mut out = Vec::new();
    let fail = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    match indent {
        Some(width) => {
            let spaces = vec![b' '; width];
            let formatter = serde_json::ser::PrettyFormatter::with_indent(&spaces);
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter)).map_err(fail)?;
        }
        None => {
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonFormatter)).map_err(fail)?;
        }
    }
    let text = String::from_utf8(out).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(Value::from_safe_string(text))
}

/// Separators `", "` and `": "`, as in `json.dumps`.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}
