//! Remarks on the rows of a file: one warning per kind and file.

use std::collections::BTreeMap;
use std::path::Path;

use log::warn;

use crate::files::Place;

/// Unused keys of turns and unused columns, counted over a file.
#[derive(Default)]
pub struct Notes {
    unused: BTreeMap<String, Seen>,
    not_trained: BTreeMap<String, Seen>,
    system: Option<Seen>,
    not_in_template: BTreeMap<String, Seen>,
    not_in_prompt: BTreeMap<String, Seen>,
}

/// Number of occurrences and position of the first.
struct Seen {
    count: usize,
    first: String,
}

impl Seen {
    fn again(at: Option<Self>, place: &Place) -> Self {
        at.map_or_else(|| Self { count: 1, first: place.position() }, |seen| Self { count: seen.count + 1, ..seen })
    }
}

fn count(map: &mut BTreeMap<String, Seen>, key: &str, place: &Place) {
    let seen = Seen::again(map.remove(key), place);
    map.insert(key.to_owned(), seen);
}

/// Keys with a model's reasoning before its answer.
const REASONING: [&str; 4] = ["reasoning_content", "reasoning", "thinking", "thoughts"];

impl Notes {
    /// Notes a key of a turn that is not used.
    pub fn unused_key(&mut self, key: &str, place: &Place) {
        count(&mut self.unused, key, place);
    }

    /// Notes a key that turns training on for a turn of the system or the user.
    pub fn not_trained(&mut self, key: &str, place: &Place) {
        count(&mut self.not_trained, key, place);
    }

    /// Notes a column `system` that differs from the system turn in the list.
    pub fn other_system(&mut self, place: &Place) {
        self.system = Some(Seen::again(self.system.take(), place));
    }

    /// Notes a column that other tools pass to the chat template.
    pub fn not_in_template(&mut self, column: &str, place: &Place) {
        count(&mut self.not_in_template, column, place);
    }

    /// Notes a column that the question of the row probably refers to.
    pub fn not_in_prompt(&mut self, column: &str, place: &Place) {
        count(&mut self.not_in_prompt, column, place);
    }

    /// Logs one warning per kind.
    pub fn log(&self, file: &Path) {
        self.warnings().iter().for_each(|warning| warn!("{}: {warning}", file.display()));
    }

    fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        for (key, Seen { count, first }) in &self.unused {
            let hint = if REASONING.contains(&key.as_str()) {
                "the chat template does not get this text and it is not trained; to train on it, put it into the content in the \
                 form that the model's chat template uses"
            } else {
                "content and role make the conversation; weight, train and loss say which turns are trained"
            };
            warnings.push(format!("the key {key} of {}, first in {first}, is not used\n  hint: {hint}", turns(*count)));
        }
        for (key, Seen { count, first }) in &self.not_trained {
            warnings.push(format!(
                "the key {key} turns training on for {} of the system or the user, first in {first}; only assistant turns are \
                 trained",
                turns(*count)
            ));
        }
        if let Some(Seen { count, first }) = &self.system {
            warnings.push(format!(
                "{count} rows, first {first}, have a column system that differs from the system turn of the conversation; \
                 the turn is used"
            ));
        }
        for (column, Seen { count, first }) in &self.not_in_template {
            let hint = match column.as_str() {
                "tools" => "leave out rows that need tools, or describe the tools in the system turn",
                _ => "template_args in tasks.toml sets variables of the chat template for all rows of a task",
            };
            warnings.push(format!(
                "the column {column} of {}, first {first}, is not passed to the chat template\n  hint: {hint}",
                rows(*count)
            ));
        }
        for (column, Seen { count, first }) in &self.not_in_prompt {
            warnings.push(format!(
                "the column {column} of {}, first {first}, is not in the prompt\n  hint: build the conversation from columns in \
                 tasks.toml, for example prompt = \"{{{{ {column} }}}}\\n{{{{ question }}}}\" and completion = \"{{{{ answer }}}}\"",
                rows(*count)
            ));
        }
        warnings
    }
}

fn rows(count: usize) -> String {
    if count == 1 { "1 row".into() } else { format!("{count} rows") }
}

fn turns(count: usize) -> String {
    if count == 1 { "1 turn".into() } else { format!("{count} turns") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::take_conversation;
    use cpift_core::format::tasks::Format;
    use serde_json::{Value, json};

    /// The warnings of a file with these lists of turns.
    fn warnings(rows: &[Value]) -> Vec<String> {
        let mut notes = Notes::default();
        for (i, row) in rows.iter().enumerate() {
            let place = Place { file: Path::new("d.jsonl").into(), row: i + 1 };
            take_conversation(Format::Auto, &mut row.as_object().unwrap().clone(), &place, &mut notes).unwrap();
        }
        notes.warnings()
    }

    #[test]
    fn a_key_is_warned_of_once_with_its_turns_and_first_row() {
        let row = |user: Value, assistant: Value| {
            let (mut user, mut assistant) = (user, assistant);
            (user["role"], user["content"]) = (json!("user"), json!("q"));
            (assistant["role"], assistant["content"]) = (json!("assistant"), json!("a"));
            json!({"messages": [user, assistant]})
        };
        let plain =
            row(json!({"weight": 0, "name": null}), json!({"weight": 1, "tool_calls": [], "id": "", "meta": {}}));
        assert!(warnings(&[plain.clone(), row(json!({"train": false}), json!({}))]).is_empty());
        let thinking = row(json!({"name": "Ann"}), json!({"reasoning_content": "so", "weight": 0}));
        let found = warnings(&[plain.clone(), thinking.clone(), thinking]);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(
            found[0].starts_with("the key name of 2 turns, first in line 2, is not used\n  hint: content and role")
        );
        assert!(found[1].starts_with(
            "the key reasoning_content of 2 turns, first in line 2, is not used\n  hint: the chat template"
        ));
        let found = warnings(&[row(json!({"weight": 1, "loss": 3}), json!({}))]);
        assert!(found[0].starts_with("the key loss of 1 turn, first in line 1, is not used"), "{found:?}");
        assert!(
            found[1]
                .starts_with("the key weight turns training on for 1 turn of the system or the user, first in line 1")
        );
    }

    #[test]
    fn columns_that_change_the_prompt_elsewhere_are_warned_of() {
        let turns = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]);
        let row = |tools: Value| json!({"messages": turns, "tools": tools, "context": "c"});
        assert!(warnings(&[row(json!([])), row(json!("[]")), row(Value::Null), row(json!(" {} "))]).is_empty());
        let found = warnings(&[row(json!([])), row(json!([{"name": "f"}])), row(json!("[{}]"))]);
        assert!(
            found.len() == 1 && found[0].starts_with("the column tools of 2 rows, first line 2, is not passed to"),
            "{found:?}"
        );
        let found = warnings(&[json!({"messages": turns, "chat_template_kwargs": {"enable_thinking": false}})]);
        assert!(found.len() == 1 && found[0].contains("hint: template_args in tasks.toml"), "{found:?}");
        let row = |column: &str, value: Value| json!({"question": "q", "answer": "a", column: value});
        assert!(warnings(&[row("id", json!("7")), row("context", json!("")), row("choices", json!(["a"]))]).is_empty());
        let found = warnings(&[json!({"instruction": "q", "output": "a", "context": "c"})]);
        assert!(
            found.len() == 1 && found[0].starts_with("the column context of 1 row, first line 1, is not in"),
            "{found:?}"
        );
        let found = warnings(&[row("passage", json!("p"))]);
        let prompt = r#"prompt = "{{ passage }}\n{{ question }}" and completion"#;
        assert!(found.len() == 1 && found[0].contains(prompt), "{found:?}");
    }

    #[test]
    fn a_system_column_is_warned_of_where_the_turns_have_another() {
        let row = |column: &str| {
            json!({"system": column, "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"}]})
        };
        assert!(warnings(&[row("s"), row("")]).is_empty());
        let found = warnings(&[row("s"), row("t"), row("u")]);
        assert!(found.len() == 1 && found[0].starts_with("2 rows, first line 2, have a column system"), "{found:?}");
    }
}
