//! Scoring the rows of one task: the loss always, and the task's own metric, one file each.
//!
//! A metric of generated answers is a [`Grader`]; one of likelihoods runs the model itself, as [`choice`] does.

mod choice;
mod codebleu;
mod exact_match;
mod gsm8k;
mod judge;
mod loss;
mod options;
mod rouge;

pub use gsm8k::{flexible_extract, normalise, strict_match};
pub use loss::{Loss, encoded, loss};
pub use options::choices;

use anyhow::Result;
use cpift_core::BadInput;
use cpift_core::format::scores::MetricValue;
use cpift_core::format::tasks::{Task, TaskMetric};
use cpift_data::{ChatText, MaxLength, Row, shown};
use cpift_torch::generate::Sampling;
use cpift_torch::session::Session;
use serde_json::{Map, Number, Value, json};

use crate::answers::answers;
use crate::prompt::PromptBuilder;

/// What a figure that is not finite means.
const NOT_FINITE: &str =
    "hint: the model overflows on this row, and no figure of it would mean anything: see how it was made";

/// Settings that the figures of a task depend on.
pub struct Settings {
    /// Rows in a batch.
    pub batch_size: usize,
    /// Longest generated answer in tokens.
    pub max_new_tokens: usize,
    /// Longest example.
    pub max_length: MaxLength,
    /// How tokens are chosen; `None`: the likeliest.
    pub sampling: Option<Sampling>,
}

/// The task's own metric over its rows.
pub struct Scored {
    /// The main figure; `None` for tasks scored by their loss.
    pub metric: Option<MetricValue>,
    /// Further figures of the same outputs.
    pub also: Vec<MetricValue>,
    /// Prompts that lost their beginning, because the model's context holds no more.
    pub prompts_cut: usize,
    /// Rows that the metric is not computed for; they are in no figure of it.
    pub skipped: usize,
    /// One JSON object for each row: prompt, output, what was extracted, reference, score.
    pub outputs: Vec<Value>,
}

/// A generated answer to be graded.
pub struct Answer<'a> {
    /// What the model wrote.
    pub output: &'a str,
    /// What it should have written.
    pub reference: &'a str,
}

/// What one row scores.
pub struct Grade {
    /// The figures by name, the task's main one first; every row has the same names in the same order.
    pub scores: Vec<(&'static str, f64)>,
    /// What the score was taken from, such as `extracted`; joins the row's line of outputs.jsonl.
    pub extracted: Map<String, Value>,
}

impl Grade {
    /// A grade by one figure.
    pub fn one(name: &'static str, score: f64) -> Self {
        Self { scores: vec![(name, score)], extracted: Map::new() }
    }
}

/// Grades one answer.
pub type Grader = fn(&Answer<'_>) -> Grade;

/// Checks all that [`loss`] and [`score`] take from rows and settings, so that nothing of a task list is scored before all of it can be.
///
/// # Errors
/// [`cpift_core::BadInput`] naming the row that cannot be encoded, or has not the fields its metric needs; [`cpift_core::Usage`] for an
/// answer longer than the model's context.
pub fn check(
    text: &ChatText,
    prompter: &PromptBuilder<'_>,
    task: &Task,
    rows: &[Row],
    settings: &Settings,
) -> Result<()> {
    encoded(text, task, rows, settings)?.warn_of_template(&task.name);
    let ask = |row: &Row| prompter.prompt(row, settings.max_new_tokens).map(drop);
    match task.metric {
        TaskMetric::Nll => rows.iter().try_for_each(|row| prompter.before_the_answer(row).map(drop)),
        TaskMetric::Choice => choice::check(prompter, task, rows),
        TaskMetric::Codebleu => codebleu::check(prompter, task, rows, settings),
        TaskMetric::Judge => rows.iter().try_for_each(ask),
        TaskMetric::ExactMatch | TaskMetric::Contains | TaskMetric::RougeL | TaskMetric::Gsm8k => {
            rows.iter().try_for_each(|row| reference(task, row).and_then(|_| ask(row)))
        }
    }
}

/// Scores the task's own metric. One scored by its loss alone has no outputs.
///
/// # Errors
/// [`cpift_core::BadInput`] naming the line of a row without the fields its metric needs.
pub fn score(
    session: &Session,
    prompter: &PromptBuilder<'_>,
    task: &Task,
    rows: &[Row],
    settings: &Settings,
) -> Result<Scored> {
    let grader: Grader = match task.metric {
        TaskMetric::Nll => {
            return Ok(Scored { metric: None, also: Vec::new(), prompts_cut: 0, skipped: 0, outputs: Vec::new() });
        }
        TaskMetric::Choice => return choice::score(session, prompter, task, rows, settings),
        TaskMetric::Codebleu => return codebleu::score(session, prompter, task, rows, settings),
        TaskMetric::Judge => return judge::score(session, prompter, rows, settings),
        TaskMetric::ExactMatch => exact_match::exact_match,
        TaskMetric::Contains => exact_match::contains,
        TaskMetric::RougeL => rouge::rouge_l,
        TaskMetric::Gsm8k => gsm8k::grade,
    };
    graded(session, prompter, (task, rows), settings, grader)
}

/// Generates the answers and grades each.
fn graded(
    session: &Session,
    prompter: &PromptBuilder<'_>,
    (task, rows): (&Task, &[Row]),
    settings: &Settings,
    grader: Grader,
) -> Result<Scored> {
    let references: Vec<String> = rows.iter().map(|row| reference(task, row)).collect::<Result<_>>()?;
    let answers = answers(session, prompter, rows, settings)?;
    let mut lines = Lines::default();
    for ((row, answer), reference) in rows.iter().zip(&answers.list).zip(&references) {
        let grade = grader(&Answer { output: &answer.output, reference });
        lines.add(row, grade, answer.line(reference));
    }
    Ok(lines.scored(answers.prompts_cut))
}

/// The lines of outputs.jsonl as rows are graded, and the scores by name.
#[derive(Default)]
struct Lines {
    names: Vec<&'static str>,
    scores: Vec<Vec<f64>>,
    outputs: Vec<Value>,
}

impl Lines {
    /// `line` is an object; row, grade and what was extracted join it.
    fn add(&mut self, row: &Row, grade: Grade, mut line: Value) {
        if self.names.is_empty() {
            self.names = grade.scores.iter().map(|(name, _)| *name).collect();
            self.scores = vec![Vec::new(); self.names.len()];
        }
        self.scores.iter_mut().zip(&grade.scores).for_each(|(all, (_, score))| all.push(*score));
        let object = line.as_object_mut().expect("a line is an object");
        object.insert("row".into(), json!(row.place.row));
        object.extend(grade.extracted);
        object.insert("score".into(), json!(grade.scores[0].1));
        object.extend(grade.scores.iter().map(|(name, score)| ((*name).to_owned(), json!(score))));
        self.outputs.push(line);
    }

    /// A row without a score.
    fn skip(&mut self, row: &Row, mut line: Value) {
        line["row"] = json!(row.place.row);
        self.outputs.push(line);
    }

    fn scored(self, prompts_cut: usize) -> Scored {
        let mut figures = self.names.iter().zip(&self.scores).map(|(name, scores)| MetricValue::mean(name, scores));
        let metric = figures.next();
        Scored { metric, also: figures.collect(), prompts_cut, skipped: 0, outputs: self.outputs }
    }
}

/// `answer` of the row, a text or a number, or its last message. Every answer would hold an empty one.
fn reference(task: &Task, row: &Row) -> Result<String> {
    let text = match row.fields.get("answer") {
        None | Some(Value::Null) => row.reference().to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Number(number)) => number_text(number),
        Some(other) => return Err(field_error(task, row, "answer", "a text or a number", other).into()),
    };
    if task.metric == TaskMetric::Contains && text.trim().is_empty() {
        return Err(field_error(task, row, "answer", "a text to look for", &json!(text)).into());
    }
    Ok(text)
}

/// The shortest text of a number: 42 for 42 and 42.0.
fn number_text(number: &Number) -> String {
    match number.as_f64() {
        Some(0.0) => "0".to_owned(),
        Some(value) if number.is_f64() => value.to_string(),
        _ => number.to_string(),
    }
}

fn field_error(task: &Task, row: &Row, field: &str, expected: &str, found: &Value) -> BadInput {
    row.place
        .bad(format!("the field {field} does not fit the metric of {}", task.name))
        .expected(expected)
        .found(shown(found))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpift_data::{Message, Place};

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
}
