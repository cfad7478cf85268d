//! The way in which rows of a task become conversations: a known format, or templates in
//! tasks.toml.

use anyhow::{Result, anyhow};
use cpift_core::BadInput;
use cpift_core::format::tasks::{Format, Task};

use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior};
use serde_json::{Map, Value};

use crate::conversation::{Message, is_empty_system};
use crate::files::raw::{Fields, Place, has_unusable, reason};
use crate::formats;
use crate::formats::notes::Notes;
use crate::jinja::{environment, jinja_lines, write_value};

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
            Self::Format(format) => formats::take_conversation(*format, fields, place, notes)
                .map(|(found, messages)| (name(found), messages)),
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

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
