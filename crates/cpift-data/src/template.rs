//! Chat templates: the Jinja that transformers runs, by minijinja with Python's manners.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{Context, Result, anyhow};
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, context};
use regex::Regex;
use serde::Serialize;

use crate::rows::Message;

/// Work a template may do before it is stopped; real ones use a few thousand steps.
const FUEL: u64 = 10_000_000;

/// The special tokens a template can name, such as `bos_token`.
pub type SpecialTokens = BTreeMap<String, String>;

/// A parsed chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
}

impl ChatTemplate {
    /// Parses `source`.
    ///
    /// # Errors
    /// A sentence that says where the syntax breaks.
    pub fn new(source: &str) -> Result<Self> {
        let mut environment = environment();
        // transformers marks the assistant's text with this block; for rendering it is transparent.
        let block = Regex::new(r"\{%(-?)\s*(end)?generation\s*(-?)%\}").expect("a constant that parses");
        let plain = block.replace_all(source, |found: &regex::Captures<'_>| {
            let body = if found.get(2).is_some() { "endif" } else { "if true" };
            format!("{{%{} {body} {}%}}", &found[1], &found[3])
        });
        environment.add_template_owned("chat", plain.into_owned()).map_err(|e| anyhow!("{e:#}"))?;
        Ok(Self { environment, source: source.to_owned() })
    }

    /// The template as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders `messages`; with `add_generation_prompt` the assistant's header follows.
    ///
    /// # Errors
    /// What the template raised, such as roles out of order.
    pub fn render(&self, messages: &[Message], special: &SpecialTokens, add_generation_prompt: bool) -> Result<String> {
        let template = self.environment.get_template("chat").context("the template was added at creation")?;
        let extra = Value::from_serialize(special);
        template
            .render(context! {
                messages => Value::from_serialize(messages),
                add_generation_prompt => add_generation_prompt,
                tools => Value::from(()),
                documents => Value::from(()),
                ..extra
            })
            .map_err(|e| anyhow!("the chat template refuses the messages: {}", e.detail().unwrap_or(&e.to_string())))
    }
}

/// Jinja as transformers sets it up: its functions and filters, Python's methods, and bounded work.
pub(super) fn environment() -> Environment<'static> {
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

/// The date that templates may print, taken once for each template: SOURCE_DATE_EPOCH (seconds since 1970, UTC) where it is set,
/// else now. Set it to give the same tokens on another day.
fn template_date() -> chrono::DateTime<chrono::Local> {
    let fixed = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|text| text.parse().ok());
    let fixed = fixed.and_then(|seconds| chrono::DateTime::from_timestamp(seconds, 0));
    fixed.map_or_else(chrono::Local::now, |date| date.with_timezone(&chrono::Local))
}

/// `tojson` as transformers defines it: Python's `json.dumps(ensure_ascii=False)`, with an optional indent.
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

/// Separators `", "` and `": "`, as `json.dumps` has them.
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
