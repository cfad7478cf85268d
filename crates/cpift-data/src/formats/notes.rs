//! Remarks on the rows of a file: one warning per kind and file.

use std::collections::BTreeMap;
use std::path::Path;

use log::warn;

use crate::files::raw::Place;

/// Unused keys of turns and unused columns, counted over a file.
#[derive(Default)]
pub struct Notes {
    unused: BTreeMap<String, Seen>,
    not_trained: BTreeMap<String, Seen>,
    system: Option<Seen>,
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
        warnings
    }
}

fn turns(count: usize) -> String {
    if count == 1 { "1 turn".into() } else { format!("{count} turns") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::take_conversation;
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
