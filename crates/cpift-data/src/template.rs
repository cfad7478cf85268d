//! Chat templates: from messages to text, with the bytes that `{% generation %}` blocks write.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context, Result, anyhow};
use minijinja::Environment;
use minijinja::value::Value;
use regex::Regex;

use crate::conversation::Message;
use crate::jinja::{environment, is_raised, jinja_lines};

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
