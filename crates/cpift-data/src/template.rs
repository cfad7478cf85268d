//! Chat templates: from messages to text, with the bytes that `{% generation %}` blocks write, in
//! Jinja as transformers runs it. minijinja runs it, with transformers' functions and filters, and
//! values written as Python writes them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::Range;

use anyhow::{Context, Result, anyhow};
use minijinja::value::{Kwargs, Rest, Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, Output, State};
use minijinja_contrib::pycompat;
use regex::Regex;

use crate::conversation::Message;

/// Special tokens that a template can use, such as `bos_token`.
pub type SpecialTokens = BTreeMap<String, String>;

/// More variables of a template, such as `enable_thinking`: `template_args` in tasks.toml.
pub type TemplateArgs = serde_json::Map<String, serde_json::Value>;

/// Marks around the output of a `{% generation %}` block: noncharacters of Unicode, which no text
/// contains.
const BLOCK_START: char = '\u{fdd2}';
const BLOCK_END: char = '\u{fdd3}';

/// An error of rendering: one that the chat template raised, such as roles out of order, or one in
/// the template itself.
#[derive(Debug)]
pub struct Refusal {
    raised: bool,
    message: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = if self.raised { "refuses the messages" } else { "fails on the messages" };
        write!(f, "the chat template {what}: {}", self.message)
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
        // In Jinja an undefined variable has the length 0, such as the tool calls of a turn without
        // them.
        for name in ["length", "count"] {
            environment.add_filter(name, |value: &Value| match value.is_undefined() {
                true => Ok(0),
                false => minijinja::filters::length(value),
            });
        }
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
        let mut variables: BTreeMap<&str, Value> = [("tools", Value::from(())), ("documents", Value::from(()))].into();
        variables.extend(special.iter().map(|(name, token)| (name.as_str(), Value::from(token.as_str()))));
        variables.extend(args.iter().map(|(name, value)| (name.as_str(), Value::from_serialize(value))));
        variables.insert("messages", Value::from_serialize(messages));
        variables.insert("add_generation_prompt", add_generation_prompt.into());
        let rendered = template.render(variables).map_err(|error| {
            let message = error.detail().map_or_else(|| error.to_string(), str::to_owned);
            Refusal { raised: is_raised(&error), message }
        })?;
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

/// Limit on the work of a template; real ones need a few thousand steps.
const FUEL: u64 = 10_000_000;

/// The environment of chat templates in transformers, with bounded work.
pub fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_fuel(Some(FUEL));
    environment.set_formatter(write_value);
    environment.set_unknown_method_callback(method);
    minijinja_contrib::add_to_environment(&mut environment);
    environment.add_function("raise_exception", |text: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, text.clone()).with_source(Raised(text)))
    });
    let today = template_date();
    environment.add_function("strftime_now", move |format: String| -> Result<String, Error> {
        let mut out = String::new();
        write!(out, "{}", today.format(&format)).map_err(|_| invalid(format!("strftime_now({format:?})")))?;
        Ok(out)
    });
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |value: &Value| python_str(value));
    // In Python a string and a mapping have a length and items, and a boolean is a number.
    let is_sequence = |value: &Value| matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map);
    environment.add_test("sequence", is_sequence);
    // None is not iterable: templates test `tools is iterable` before they take its length.
    let is_iterable = |value: &Value| !value.is_none() && value.try_iter().is_ok();
    environment.add_test("iterable", is_iterable);
    environment.add_test("number", |value: &Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool));
    environment
}

/// `source` with line breaks normalised to `\n`, as Jinja does.
pub fn jinja_lines(source: &str) -> String {
    source.replace("\r\n", "\n").replace('\r', "\n")
}

/// The message of a template's `raise_exception`, as the source of its error.
#[derive(Debug)]
struct Raised(String);

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

/// Returns true if `error` comes from the template's `raise_exception`.
fn is_raised(error: &Error) -> bool {
    let first: &(dyn std::error::Error + 'static) = error;
    std::iter::successors(Some(first), |error| error.source()).any(|error| error.is::<Raised>())
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// Date for templates, taken once per template: SOURCE_DATE_EPOCH (seconds since 1970, UTC) if set,
/// else now. Set it to get the same tokens on another day.
fn template_date() -> chrono::DateTime<chrono::Local> {
    let fixed = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|text| text.parse().ok());
    let fixed = fixed.and_then(|seconds| chrono::DateTime::from_timestamp(seconds, 0));
    fixed.map_or_else(chrono::Local::now, |date| date.with_timezone(&chrono::Local))
}

/// Writes the value of a `{{ … }}` as Python's `str` does.
pub fn write_value(out: &mut Output<'_>, state: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Map => {
            minijinja::escape_formatter(out, state, &Value::from(python_str(value)?))
        }
        _ => minijinja::escape_formatter(out, state, value),
    }
}

/// Python's `str(value)`.
fn python_str(value: &Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    let mut out = String::new();
    python_repr(value, &mut out)?;
    Ok(out)
}

/// Appends Python's `repr(value)`. A tuple of a template is written as a list, which it is to
/// minijinja.
fn python_repr(value: &Value, out: &mut String) -> Result<(), Error> {
    match value.kind() {
        ValueKind::String => string_repr(value.as_str().unwrap_or_default(), out),
        ValueKind::Number if !value.is_integer() => out.push_str(&float_repr(f64::try_from(value.clone())?)),
        ValueKind::Seq => {
            out.push('[');
            for (i, item) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                python_repr(&item, out)?;
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                python_repr(&key, out)?;
                out.push_str(": ");
                python_repr(&value.get_item(&key)?, out)?;
            }
            out.push('}');
        }
        ValueKind::Invalid => return Err(error_of(value)),
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

/// The error that stands in place of a value.
fn error_of(value: &Value) -> Error {
    let text = value.to_string();
    let message = text.strip_prefix("<invalid value: ").and_then(|text| text.strip_suffix('>')).unwrap_or(&text);
    invalid(message.strip_prefix("invalid operation: ").unwrap_or(message))
}

fn string_repr(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            // After another character, Rust escapes the characters that cannot be printed.
            c if format!("a{c}").escape_debug().count() > 2 && c != '\'' && c != '"' => {
                let _ = match u32::from(c) {
                    code @ 0..0x100 => write!(out, "\\x{code:02x}"),
                    code @ 0x100..0x10000 => write!(out, "\\u{code:04x}"),
                    code => write!(out, "\\U{code:08x}"),
                };
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// Python's `repr` of a float: the shortest digits, with an exponent below 1e-4 and from 1e16 on.
fn float_repr(number: f64) -> String {
    let scientific = format!("{number:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else {
        return if number.is_nan() { "nan".into() } else { scientific };
    };
    match exponent.parse::<i32>() {
        Ok(-4..16) => format!("{number:?}"),
        Ok(exponent) => format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs()),
        Err(_) => scientific.clone(),
    }
}

/// Python's methods of strings and lists: those of minijinja's collection, and those that it lacks.
fn method(state: &State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else { return pycompat::unknown_method_callback(state, value, name, args) };
    let strings = |parts: Vec<&str>| parts.into_iter().map(Value::from).collect::<Value>();
    Ok(match name {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "partition" => {
            let (mark,): (&str,) = from_args(args)?;
            strings(text.split_once(mark).map_or(vec![text, "", ""], |(head, tail)| vec![head, mark, tail]))
        }
        "rpartition" => {
            let (mark,): (&str,) = from_args(args)?;
            strings(text.rsplit_once(mark).map_or(vec!["", "", text], |(head, tail)| vec![head, mark, tail]))
        }
        "index" => {
            let (part,): (&str,) = from_args(args)?;
            let at = text.find(part).ok_or_else(|| invalid("substring not found"))?;
            Value::from(text[..at].chars().count())
        }
        "split" | "rsplit" => return split(state, value, text, name, args),
        _ => return pycompat::unknown_method_callback(state, value, name, args),
    })
}

/// `split` and `rsplit` with a separator and the largest number of splits by position or by name.
fn split(state: &State<'_, '_>, value: &Value, text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (positional, kwargs): (&[Value], Kwargs) = from_args(args)?;
    let argument = |place: usize, key: &str| match positional.get(place) {
        Some(value) => Ok(Some(value.clone())),
        None => kwargs.get::<Option<Value>>(key),
    };
    let (mark, most) = (argument(0, "sep")?, argument(1, "maxsplit")?);
    kwargs.assert_all_used()?;
    let most = most.map(i64::try_from).transpose()?.and_then(|most| usize::try_from(most).ok());
    let Some(mark) = mark.filter(|mark| !mark.is_none()) else {
        let all: Vec<Value> = [Value::from(()), Value::from(most.map_or(-1, |most| most as i64))].into();
        return match (name, most) {
            ("rsplit", Some(_)) => Err(invalid("rsplit with maxsplit needs a separator here")),
            _ => pycompat::unknown_method_callback(state, value, "split", &all),
        };
    };
    let mark = mark.as_str().filter(|mark| !mark.is_empty()).ok_or_else(|| invalid("empty separator"))?;
    let limit = most.map_or(usize::MAX, |most| most.saturating_add(1));
    let mut parts: Vec<&str> =
        if name == "split" { text.splitn(limit, mark).collect() } else { text.rsplitn(limit, mark).collect() };
    if name == "rsplit" {
        parts.reverse();
    }
    Ok(parts.into_iter().map(Value::from).collect())
}

/// `tojson` as in transformers: Python's `json.dumps` with ensure_ascii, indent, separators and
/// sort_keys, by position or by name.
fn to_json(value: &Value, args: Rest<Value>) -> Result<Value, Error> {
    let (positional, kwargs): (&[Value], Kwargs) = from_args(&args)?;
    let argument = |place: usize, key: &str| match positional.get(place) {
        Some(value) => Ok(Some(value.clone())),
        None => kwargs.get::<Option<Value>>(key),
    };
    let options =
        [argument(0, "ensure_ascii")?, argument(1, "indent")?, argument(2, "separators")?, argument(3, "sort_keys")?];
    kwargs.assert_all_used()?;
    let [ascii, indent, separators, sorted] = options.map(|option| option.filter(|value| !value.is_none()));
    let indent = match indent {
        None => None,
        Some(text) if text.as_str().is_some() => text.as_str().map(str::to_owned),
        Some(width) => Some(" ".repeat(usize::try_from(width)?)),
    };
    let mut dump = Dump {
        ascii: ascii.is_some_and(|value| value.is_true()),
        sorted: sorted.is_some_and(|value| value.is_true()),
        separators: (if indent.is_some() { "," } else { ", " }.into(), ": ".into()),
        indent,
        out: String::new(),
    };
    if let Some(pair) = separators {
        let part = |place: usize| -> Result<String, Error> { python_str(&pair.get_item_by_index(place)?) };
        dump.separators = (part(0)?, part(1)?);
    }
    dump.value(value, 0)?;
    Ok(Value::from_safe_string(dump.out))
}

/// A run of `json.dumps`.
struct Dump {
    ascii: bool,
    sorted: bool,
    /// Text between items, and between a key and its value.
    separators: (String, String),
    indent: Option<String>,
    out: String,
}

impl Dump {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.out.push_str(&value.to_string()),
            ValueKind::Number => self.out.push_str(&float_repr(f64::try_from(value.clone())?)),
            ValueKind::String => self.text(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.group(('[', ']'), depth, items, |dump, item| dump.value(&item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort();
                }
                self.group(('{', '}'), depth, keys, |dump, key| {
                    match key.as_str() {
                        Some(text) => dump.text(text),
                        None => dump.text(&python_str(&key)?),
                    }
                    dump.out.push_str(&dump.separators.1.clone());
                    dump.value(&value.get_item(&key)?, depth + 1)
                })?;
            }
            ValueKind::Invalid => return Err(error_of(value)),
            kind => {
                return Err(Error::new(ErrorKind::BadSerialization, format!("tojson: {kind} has no JSON form")));
            }
        }
        Ok(())
    }

    fn group(
        &mut self,
        (open, close): (char, char),
        depth: usize,
        items: Vec<Value>,
        mut write: impl FnMut(&mut Self, Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        let any = !items.is_empty();
        for (i, item) in items.into_iter().enumerate() {
            if i > 0 {
                self.out.push_str(&self.separators.0.clone());
            }
            self.line(depth + 1);
            write(self, item)?;
        }
        if any {
            self.line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn text(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            let _ = match c {
                '"' | '\\' => write!(self.out, "\\{c}"),
                '\n' => write!(self.out, "\\n"),
                '\r' => write!(self.out, "\\r"),
                '\t' => write!(self.out, "\\t"),
                '\u{8}' => write!(self.out, "\\b"),
                '\u{c}' => write!(self.out, "\\f"),
                c if c < ' ' || self.ascii && !(' '..='~').contains(&c) => {
                    c.encode_utf16(&mut [0; 2]).iter().try_for_each(|unit| write!(self.out, "\\u{unit:04x}"))
                }
                c => write!(self.out, "{c}"),
            };
        }
        self.out.push('"');
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Text that transformers 5.24 renders from the same source and variables.
    #[test]
    fn values_are_written_as_python_writes_them() {
        let variables = json!({"big": 1e20, "small": 1e-5, "list": ["a", "it's", 1, true, null, 2.5],
            "map": {"b": 1, "a": [1, {"x": null}]}, "odd": ["say \"hi\" it's", "a\n\u{200b}\u{1}é🌊"], "yes": true});
        for (source, expected) in [
            (
                "{{ big }} {{ small }} {{ 0.0001 }} {{ 100000.0 }} {{ 1e16 }} {{ -1.5 }}",
                "1e+20 1e-05 0.0001 100000.0 1e+16 -1.5",
            ),
            ("{{ list }}", r#"['a', "it's", 1, True, None, 2.5]"#),
            ("{{ map }} {{ map | string }}", "{'b': 1, 'a': [1, {'x': None}]} {'b': 1, 'a': [1, {'x': None}]}"),
            ("{{ odd }}", r#"['say "hi" it\'s', 'a\n\u200b\x01é🌊']"#),
            ("{{ yes }} {{ list[4] }} {{ nothing }}", "True None "),
            (
                "{{ 'x' is sequence }} {{ map is sequence }} {{ yes is number }} {{ 'x' is number }}",
                "True True True False",
            ),
            (
                "{{ none is iterable }} {{ yes is iterable }} {{ 'x' is iterable }} {{ map is iterable }} {{ nothing is iterable }}",
                "False False True True True",
            ),
            ("{{ map | tojson(ensure_ascii=False) }}", r#"{"b": 1, "a": [1, {"x": null}]}"#),
            ("{{ 'é🌊\u{7f}' | tojson(ensure_ascii=True) }}", r#""\u00e9\ud83c\udf0a\u007f""#),
            ("{{ map | tojson(sort_keys=True, separators=(',', ':')) }}", r#"{"a":[1,{"x":null}],"b":1}"#),
            ("{{ {'a': [], 'b': [big]} | tojson(indent=2) }}", "{\n  \"a\": [],\n  \"b\": [\n    1e+20\n  ]\n}"),
            ("{{ 'a,b,c'.rsplit(',', 1) }} {{ 'a,b,c'.split(',', maxsplit=1) }}", "['a,b', 'c'] ['a', 'b,c']"),
            ("{{ ' a  b c '.split() }} {{ 'a b c'.split(none, 1) }}", "['a', 'b', 'c'] ['a', 'b c']"),
            ("{{ 'abc'.removeprefix('a') }} {{ 'abc'.removesuffix('c') }} {{ 'aéb'.index('b') }}", "bc ab 2"),
            ("{{ 'a=b=c'.partition('=')[2] }} {{ 'a=b=c'.rpartition('=')[0] }}", "b=c a=b"),
        ] {
            let found = environment().render_str(source, &variables);
            assert_eq!(found.as_deref().map_err(ToString::to_string), Ok(expected), "{source}");
        }
    }

    #[test]
    fn an_error_that_a_template_raises_is_told_from_others() {
        let error = |source: &str| environment().render_str(source, ()).unwrap_err();
        assert!(is_raised(&error("{{ raise_exception('no') }}")));
        assert!(!is_raised(&error("{{ none + 'x' }}")) && !is_raised(&error("{{ nothing | tojson }}")));
    }
}
