//! The fields of a row that metrics read: the reference answer, and the options of a multiple
//! choice in the forms found in data sets.

use anyhow::Result;
use cpift_core::BadInput;
use cpift_core::format::tasks::Task;
use cpift_data::{Row, shown};
use serde_json::{Number, Value};

/// An error for `field` of `row`.
pub(crate) fn field_error(task: &Task, row: &Row, field: &str, expected: &str, found: &Value) -> BadInput {
    row.place
        .bad(format!("the field {field} does not fit the metric of {}", task.name))
        .expected(expected)
        .found(shown(found))
}

/// The reference answer of a row: `answer`, a text or a number, else the last message.
///
/// # Errors
/// [`BadInput`] for an `answer` of another type.
pub(crate) fn reference(task: &Task, row: &Row) -> Result<String> {
    match row.fields.get("answer") {
        None | Some(Value::Null) => Ok(row.reference().to_owned()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Number(number)) => Ok(number_text(number)),
        Some(other) => Err(field_error(task, row, "answer", "a text or a number", other).into()),
    }
}

/// The shortest text of a number: 42 for 42 and 42.0.
fn number_text(number: &Number) -> String {
    match number.as_f64() {
        Some(0.0) => "0".to_owned(),
        Some(value) if number.is_f64() => value.to_string(),
        _ => number.to_string(),
    }
}

/// The options of a multiple choice.
pub(crate) struct Choices {
    /// Texts without letters.
    pub(crate) options: Vec<String>,
    /// Index of the correct option.
    pub(crate) answer: usize,
    letters: Vec<char>,
}

impl Choices {
    /// Letters of the options: A, B, …, or the row's own labels if its last turn answers with one
    /// of them.
    pub(crate) fn letters(&self) -> impl Iterator<Item = char> {
        self.letters.iter().copied()
    }

    /// Text of the correct option.
    pub(crate) fn right(&self) -> &str {
        &self.options[self.answer]
    }

    /// The letter that the row's last turn answers with, if it is that of a wrong option.
    pub(crate) fn other_letter(&self, row: &Row) -> Option<char> {
        let said = bare(row.reference());
        let is_said = |letter: &char| said.chars().eq([*letter]);
        let other = self.letters().position(|letter| is_said(&letter)).is_some_and(|i| i != self.answer);
        (other && row.reference().trim() != self.right()).then(|| said.chars().next())?
    }
}

/// Fields with the correct option: our own name, and ARC's.
const ANSWERS: [&str; 2] = ["answer", "answerKey"];

/// Reads `choices` and `answer` (or `answerKey`) of a row.
///
/// # Errors
/// [`BadInput`] for a field that is missing, invalid or ambiguous.
pub(crate) fn choices(task: &Task, row: &Row) -> Result<Choices> {
    let field = |name: &str| row.fields.get(name).filter(|value| !value.is_null());
    let null = Value::Null;
    let list = field("choices").unwrap_or(&null);
    let Some(Listed { options, labels }) = Listed::of(list) else {
        let expected = "2 to 26 options: a list of texts, a list of {text, label}, or {text: [texts], label: [labels]}";
        return Err(field_error(task, row, "choices", expected, list).into());
    };
    let listed = Listed { options, labels };
    let mut answer = None;
    for name in ANSWERS {
        let Some(value) = field(name) else { continue };
        let index = listed.answer(value).map_err(|found| {
            field_error(task, row, name, &listed.expected(), value).found(found.unwrap_or_else(|| shown(value)))
        })?;
        if answer.is_some_and(|other| other != index) {
            let expected = format!("the same option as in {}", ANSWERS[0]);
            return Err(field_error(task, row, name, &expected, value).into());
        }
        answer = Some(index);
    }
    let Some(answer) = answer else {
        return Err(field_error(task, row, "answer", &listed.expected(), &null).into());
    };
    let letters = listed.letters(answer, row.reference());
    Ok(Choices { options: listed.options, answer, letters })
}

/// Options as listed in a row.
struct Listed {
    options: Vec<String>,
    /// One distinct label per option.
    labels: Option<Vec<String>>,
}

impl Listed {
    fn of(value: &Value) -> Option<Self> {
        let texts = |value: &Value| value.as_array()?.iter().map(word).collect::<Option<Vec<String>>>();
        let (options, labels) = match value {
            Value::Object(map) => (texts(map.get("text")?)?, Some(texts(map.get("label")?)?)),
            Value::Array(list) if list.iter().all(Value::is_object) => {
                let part =
                    |name: &str| list.iter().map(|entry| word(entry.get(name)?)).collect::<Option<Vec<String>>>();
                (part("text")?, Some(part("label")?))
            }
            _ => (texts(value)?, None),
        };
        let distinct = |labels: &Vec<String>| {
            labels.len() == options.len() && labels.iter().enumerate().all(|(i, label)| !labels[..i].contains(label))
        };
        ((2..=26).contains(&options.len()) && labels.as_ref().is_none_or(distinct)).then_some(Self { options, labels })
    }

    fn expected(&self) -> String {
        match &self.labels {
            Some(labels) => format!("one of the labels {}", labels.join(", ")),
            None => format!(
                "an index from 0 to {}, a letter from A to {}, or the text of one option",
                self.options.len() - 1,
                letter(self.options.len() - 1)
            ),
        }
    }

    /// Index of the option that `answer` names. The error describes an ambiguous answer.
    fn answer(&self, answer: &Value) -> Result<usize, Option<String>> {
        let mut readings: Vec<(usize, &str)> = Vec::new();
        let text = word(answer).ok_or(None)?;
        let bare = bare(&text);
        let mut found = |index: Option<usize>, what| readings.extend(index.map(|index| (index, what)));
        // An index from 0, as an integer or a float without a fraction.
        let index = bare.parse::<f64>().ok().filter(|number| number.fract() == 0.0 && *number >= 0.0);
        let index = index.map(|number| number as usize).filter(|index| *index < self.options.len());
        match &self.labels {
            // Digits as text are labels, never an index: ARC counts from 1.
            Some(labels) => {
                let same = |label: &String| label.trim() == bare;
                let alike = || labels.iter().position(|label| label.trim().eq_ignore_ascii_case(bare));
                found(labels.iter().position(same).or_else(alike), "a label");
                found(index.filter(|_| answer.is_number()), "an index from 0");
            }
            None => {
                found(index, "an index from 0");
                let letters = bare.len() == 1 && bare.as_bytes()[0].is_ascii_alphabetic();
                let place = letters.then(|| usize::from(bare.as_bytes()[0].to_ascii_uppercase() - b'A'));
                found(place.filter(|place| *place < self.options.len()), "a letter");
                let said = |option: &&String| option.trim() == text.trim() && answer.is_string();
                for (index, _) in self.options.iter().enumerate().filter(|(_, option)| said(option)) {
                    found(Some(index), "the text of an option");
                }
            }
        }
        match &readings[..] {
            [] => Err(None),
            [(first, what), rest @ ..] => match rest.iter().find(|(index, _)| index != first) {
                None => Ok(*first),
                Some((other, else_what)) => {
                    let (first, other) = (letter(*first), letter(*other));
                    Err(Some(format!(
                        "{}, which is option {first} as {what} and {other} as {else_what}",
                        shown(answer)
                    )))
                }
            },
        }
    }

    /// The labels if `reference` is the correct one of them, else A, B, ….
    fn letters(&self, answer: usize, reference: &str) -> Vec<char> {
        let single = |label: &String| label.chars().next().filter(|_| label.chars().count() == 1);
        let labels = self.labels.as_ref().filter(|labels| labels[answer] == bare(reference));
        let labels = labels.and_then(|labels| labels.iter().map(single).collect());
        labels.unwrap_or_else(|| (0..self.options.len()).map(letter).collect())
    }
}

/// Letter of an index below 26.
fn letter(index: usize) -> char {
    ('A'..='Z').nth(index).unwrap_or('?')
}

/// Text of a string or a number.
fn word(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number_text(number)),
        _ => None,
    }
}

/// Strips white space, parentheses, a dot or a colon: `(B)`, `B.`, `B)`.
fn bare(text: &str) -> &str {
    let text = text.trim();
    text.strip_prefix('(').unwrap_or(text).trim_end_matches([')', '.', ':']).trim()
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpift_data::{Message, Place};
    use serde_json::json;

    #[test]
    fn references_are_texts_and_numbers_in_their_shortest_form() {
        let task: Task = serde_json::from_value(
            json!({"name": "t", "train": "d.jsonl", "eval": "d.jsonl", "metric": "exact-match"}),
        )
        .unwrap();
        let of = |fields: Value| {
            let messages = vec![Message::new("user", "q"), Message::new("assistant", "last")];
            let fields = fields.as_object().unwrap().clone();
            reference(&task, &Row { messages, fields, place: Place::default() }).map_err(|e| e.to_string())
        };
        for (answer, expected) in [
            (json!(42), "42"),
            (json!(42.0), "42"),
            (json!(-7.0), "-7"),
            (json!(-0.0), "0"),
            (json!(0.1), "0.1"),
            (json!(1e-7), "0.0000001"),
            (json!(9_007_199_254_740_993_i64), "9007199254740993"),
            (json!(" a"), " a"),
            (Value::Null, "last"),
        ] {
            assert_eq!(of(json!({"answer": answer})).unwrap(), expected, "{answer}");
        }
        assert_eq!(of(json!({})).unwrap(), "last");
        for other in [json!(true), json!(["a"]), json!({"a": 1})] {
            assert!(of(json!({"answer": other})).unwrap_err().contains("a text or a number"), "{other}");
        }
    }

    fn read(fields: &Value, reference: &str) -> Result<Choices> {
        let messages = vec![Message::new("user", "q"), Message::new("assistant", reference)];
        let fields = fields.as_object().unwrap().clone();
        let task: Task = serde_json::from_value(json!({"name": "t", "train": "d.jsonl", "eval": "d.jsonl"})).unwrap();
        choices(&task, &Row { messages, fields, place: Place { file: std::path::Path::new("d.jsonl").into(), row: 3 } })
    }

    fn answer(fields: Value) -> usize {
        read(&fields, "x").unwrap_or_else(|e| panic!("{fields}: {e}")).answer
    }

    #[test]
    fn an_answer_is_an_index_a_letter_or_a_text() {
        let options = json!(["w", "x", "y"]);
        for right in [
            json!(1),
            json!(1.0),
            json!("1"),
            json!("1.0"),
            json!("B"),
            json!("b"),
            json!("(B)"),
            json!("B."),
            json!(" B)"),
            json!("x"),
        ] {
            assert_eq!(answer(json!({"choices": options, "answer": right})), 1, "{right}");
            assert_eq!(answer(json!({"choices": options, "answerKey": right, "answer": null})), 1, "{right}");
        }
        assert_eq!(answer(json!({"choices": ["0", "1", "2"], "answer": "1"})), 1, "all readings agree");
        assert_eq!(answer(json!({"choices": [3, 4], "answer": 1})), 1);
    }

    #[test]
    fn labels_take_precedence_over_indexes() {
        let arc = |labels: [&str; 3]| json!({"text": ["w", "x", "y"], "label": labels});
        let objects = json!([{"text": "w", "label": "A"}, {"label": "B", "text": "x"}, {"text": "y", "label": "C"}]);
        for (choices, right) in [
            (arc(["A", "B", "C"]), json!("B")),
            (arc(["A", "B", "C"]), json!("b")),
            (arc(["A", "B", "C"]), json!(1)),
            (arc(["1", "2", "3"]), json!("2")),
            (arc(["a", "A", "b"]), json!("A")),
            (objects, json!("(B)")),
            (json!({"text": ["w", "x"], "label": [1, 2]}), json!("2")),
            (json!({"text": ["w", "x"], "label": ["0", "1"]}), json!(1)),
        ] {
            assert_eq!(answer(json!({"choices": choices, "answerKey": right})), 1, "{choices} {right}");
        }
    }

    #[test]
    fn ambiguous_and_unreadable_answers_are_refused() {
        let texts = json!(["w", "x"]);
        let digits = json!({"text": ["w", "x", "y"], "label": ["1", "2", "3"]});
        for (fields, parts) in [
            (
                json!({"choices": texts, "answer": 2}),
                ["field answer", "index from 0 to 1, a letter from A to B", "found: 2"],
            ),
            (json!({"choices": texts, "answer": -1}), ["answer", "index", "found: -1"]),
            (json!({"choices": texts, "answer": 0.5}), ["answer", "index", "found: 0.5"]),
            (json!({"choices": texts, "answer": true}), ["answer", "index", "found: true"]),
            (json!({"choices": texts, "answer": "C"}), ["answer", "index", "found: \"C\""]),
            (json!({"choices": texts}), ["answer", "index", "found: null"]),
            (
                json!({"choices": texts, "answer": 0, "answerKey": "B"}),
                ["field answerKey", "the same option as in answer", "found: \"B\""],
            ),
            (
                json!({"choices": ["1", "2", "3"], "answer": "2"}),
                ["answer", "option C as an index from 0", "B as the text of an option"],
            ),
            (json!({"choices": ["B", "A"], "answer": "A"}), ["answer", "option A as a letter", "B as the text"]),
            (json!({"choices": ["w", "w"], "answer": "w"}), ["answer", "A as the text", "B as the text"]),
            (json!({"choices": digits, "answer": 2}), ["answer", "option B as a label", "C as an index from 0"]),
            (json!({"choices": digits, "answerKey": "4"}), ["answerKey", "one of the labels 1, 2, 3", "found: \"4\""]),
            (json!({"choices": digits, "answerKey": "B"}), ["answerKey", "one of the labels", "found: \"B\""]),
            (
                json!({"choices": {"text": ["w", "x"], "label": ["A", "A"]}, "answer": "A"}),
                ["choices", "2 to 26", "label"],
            ),
            (
                json!({"choices": {"text": ["w", "x"], "label": ["A"]}, "answer": "A"}),
                ["choices", "{text, label}", "label"],
            ),
            (json!({"choices": ["w"], "answer": 0}), ["field choices", "2 to 26", "[\"w\"]"]),
            (json!({"choices": "w, x", "answer": 0}), ["field choices", "2 to 26", "found: \"w, x\""]),
        ] {
            let error = read(&fields, "x").err().unwrap_or_else(|| panic!("{fields} is taken")).to_string();
            assert!(error.contains("line 3") && parts.iter().all(|part| error.contains(part)), "{fields}: {error}");
        }
    }

    #[test]
    fn letters_are_the_labels_that_the_conversation_answers_with() {
        let fields = json!({"choices": {"text": ["w", "x"], "label": ["1", "2"]}, "answerKey": "2"});
        let letters = |reference: &str| read(&fields, reference).unwrap().letters().collect::<String>();
        assert_eq!(
            (letters("2"), letters("(2)"), letters("B"), letters("x")),
            ("12".into(), "12".into(), "AB".into(), "AB".into())
        );
    }

    #[test]
    fn a_last_turn_with_another_letter_is_noticed() {
        let other = |options: Value, reference: &str| {
            let messages = vec![Message::new("user", "q"), Message::new("assistant", reference)];
            let read = read(&json!({"choices": options, "answer": 1}), reference).unwrap();
            read.other_letter(&Row { messages, fields: serde_json::Map::new(), place: Place::default() })
        };
        assert_eq!(other(json!(["w", "x"]), "(A)"), Some('A'));
        for (options, reference) in
            [(json!(["w", "x"]), "B"), (json!(["w", "A"]), "A"), (json!(["w", "x"]), "C"), (json!(["w", "x"]), "w")]
        {
            assert_eq!(other(options, reference), None, "{reference}");
        }
    }
}
