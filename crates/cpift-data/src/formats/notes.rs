//! What the rows of a file say beside their conversations, for one warning a kind and file.

use std::collections::BTreeMap;
use std::path::Path;

use log::warn;

use crate::place::Place;

/// Keys of turns and columns that are not used, counted over a file.
#[derive(Default)]
pub struct Notes {
    unused: BTreeMap<String, Seen>,
    not_trained: BTreeMap<String, Seen>,
    system: Option<Seen>,
}

/// How often something was seen, and where first.
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

/// Keys in which data sets keep what a model thought before its answer.
const REASONING: [&str; 4] = ["reasoning_content", "reasoning", "thinking", "thoughts"];

impl Notes {
    /// A key of a turn that changes nothing here.
    pub fn unused_key(&mut self, key: &str, place: &Place) {
        count(&mut self.unused, key, place);
    }

    /// A key that asks for training on a turn that is not the assistant's.
    pub fn not_trained(&mut self, key: &str, place: &Place) {
        count(&mut self.not_trained, key, place);
    }

    /// A column `system` that is another than the system turn in the list.
    pub fn other_system(&mut self, place: &Place) {
        self.system = Some(Seen::again(self.system.take(), place));
    }

    /// Logs a warning for each.
    pub fn log(&self, file: &Path) {
        let file = file.display();
        for (key, Seen { count, first }) in &self.unused {
            let hint = if REASONING.contains(&key.as_str()) {
                "the chat template does not see this text and the loss does not count it: write it into the content, in the \
                 form that the model's template knows, to train on it"
            } else {
                "content and role make the conversation, and weight, train or loss say which turns are trained"
            };
            warn!("{file}: the key {key} of {}, first in {first}, is not used\n  hint: {hint}", turns(*count));
        }
        for (key, Seen { count, first }) in &self.not_trained {
            warn!(
                "{file}: the key {key} asks for training on {} of the system or the user, first in {first}: the loss counts the \
                 assistant's turns only",
                turns(*count)
            );
        }
        if let Some(Seen { count, first }) = &self.system {
            warn!(
                "{file}: {count} rows, the first {first}, have a column system that is another than the system turn of the \
                 conversation, which is taken"
            );
        }
    }
}

fn turns(count: usize) -> String {
    if count == 1 { "1 turn".into() } else { format!("{count} turns") }
}
