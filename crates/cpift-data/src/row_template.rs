//! Templates over the columns of a row: `prompt`, `completion` and `system` of tasks.toml.

use anyhow::{Result, anyhow};
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior};
use serde_json::{Map, Value};

use crate::files::{has_unusable, reason};
use crate::template::{environment, jinja_lines};

/// A parsed template; it knows the columns of a row by their names, and the functions and filters of chat templates.
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
        // Jinja's own white space, which tools for data sets have, not that of chat templates: a line break after a block stays.
        environment.set_trim_blocks(false);
        environment.set_lstrip_blocks(false);
        // A misspelt column must not become an empty text, nor a missing value the word "none".
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_formatter(|out, state, value| {
            if value.is_none() {
                return Err(Error::new(ErrorKind::InvalidOperation, "a null would be written as text"));
            }
            minijinja::escape_formatter(out, state, value)
        });
        environment.add_template_owned(key, jinja_lines(source)).map_err(|e| anyhow!("{e:#}"))?;
        Ok(Self { environment, key })
    }

    /// Renders the columns of a row.
    ///
    /// # Errors
    /// A sentence: which columns the row lacks, or what the template raised.
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

/// `value` of the column `name` for templates: what cannot be used in it is an error where it is used, and only there.
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

/// Whether the dotted `path` leads to a value.
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
