//! `choice`: multiple choice by log-likelihood, of the letter after a chat prompt or of the
//! option's text after a harness prompt.

use anyhow::{Result, bail};
use cpift_core::format::tasks::Task;
use cpift_core::run::progress;
use cpift_data::Row;
use cpift_torch::score::{Alternatives, alternatives};
use cpift_torch::session::Session;
use log::warn;
use serde_json::{Map, Value, json};

use super::metric::{FRACTION, Grade, Lines, Metric, NOT_FINITE, Prepared, Scored, TaskView};
use crate::fields::{Choices, choices};
use crate::prompt::{PromptBuilder, PromptStyle};

/// `choice`: share of rows whose correct option has the highest summed log-likelihood. For a
/// harness prompt, `acc_norm` divides the sum by the option's length in code points.
pub(crate) struct Choice;

impl Metric for Choice {
    fn key(&self) -> &'static str {
        "choice"
    }

    fn name(&self) -> &'static str {
        "acc"
    }

    fn unit(&self) -> &'static str {
        FRACTION
    }

    fn summary(&self) -> &'static str {
        "rows whose correct option has the highest log-likelihood"
    }

    fn prepare(&self, view: &TaskView<'_>) -> Result<Box<dyn Prepared>> {
        let TaskView { task, rows, prompter, .. } = *view;
        let questions = rows.iter().map(|row| Question::new(prompter, task, row)).collect::<Result<Vec<_>>>()?;
        warn_of_rows(prompter, task, rows);
        let (questions, alternatives) = questions.into_iter().unzip();
        Ok(Box::new(Questions { name: self.name(), questions, alternatives }))
    }
}

/// Warns of prompts that contain the options twice, and of last turns that contradict `answer`.
fn warn_of_rows(prompter: &PromptBuilder<'_>, task: &Task, rows: &[Row]) {
    if let Some(row) = rows.iter().find(|row| prompter.doubles_options(row)) {
        warn!(
            "{}: the options are in the prompt twice, in the user's turn ({}) and under `Choices:`\n  hint: give the task a `split` in \
             {}, or the rows a field `question`",
            task.name,
            row.place,
            task.listed_in.display()
        );
    }
    let other = |row: &Row| Some((row.place.clone(), choices(task, row).ok()?.other_letter(row)?));
    let others: Vec<_> = rows.iter().filter_map(other).collect();
    if let Some((place, letter)) = others.first() {
        warn!(
            "{}: the last turn of {} rows answers with the letter of another option than the field answer names, first {place} with \
             {letter}\n  hint: an index counts from 0",
            task.name,
            others.len()
        );
    }
}

/// The prompts of a task and the options after each.
struct Questions {
    name: &'static str,
    questions: Vec<Question>,
    alternatives: Vec<Alternatives>,
}

impl Prepared for Questions {
    fn score(&self, session: &Session, view: &TaskView<'_>) -> Result<Scored> {
        let TaskView { task, rows, settings, prompter } = *view;
        let bar = progress::items("choices", rows.len() as u64);
        let scores = alternatives(&session.model, &self.alternatives, settings.batch_size, || bar.inc(1))?;
        bar.finish_and_clear();
        let mut lines = Lines::new(self.name);
        for ((row, question), log_likelihoods) in rows.iter().zip(&self.questions).zip(scores) {
            if let Some(i) = log_likelihoods.iter().position(|value| !value.is_finite()) {
                let (letter, value) = (question.choices.letters().nth(i).unwrap_or('?'), log_likelihoods[i]);
                bail!("{}: {}: the log-likelihood of option {letter} is {value}\n  {NOT_FINITE}", task.name, row.place);
            }
            let (grade, line) = question.grade(prompter.style, &log_likelihoods);
            lines.add(row, grade, line);
        }
        Ok(lines.scored(self.questions.iter().filter(|question| question.cut).count()))
    }
}

/// The prompt of a row and its options.
struct Question {
    /// Text of the prompt.
    prompt: String,
    /// True if the beginning of the prompt was cut.
    cut: bool,
    choices: Choices,
}

impl Question {
    fn new(prompter: &PromptBuilder<'_>, task: &Task, row: &Row) -> Result<(Self, Alternatives)> {
        let choices = choices(task, row)?;
        let texts: Vec<String> = match prompter.style {
            PromptStyle::Chat => choices.letters().map(String::from).collect(),
            PromptStyle::Harness => choices.options.iter().map(|option| format!(" {option}")).collect(),
        };
        let (prompt, continuations) = prompter.alternatives(row, &texts)?;
        let alternatives = Alternatives { context: prompt.ids, continuations };
        Ok((Self { prompt: prompt.text, cut: prompt.cut > 0, choices }, alternatives))
    }

    fn grade(&self, style: PromptStyle, log_likelihoods: &[f64]) -> (Grade, Value) {
        let letters: Vec<char> = self.choices.letters().collect();
        let right = |values: &[f64]| f64::from(first_of_the_largest(values) == self.choices.answer);
        let best = letters[first_of_the_largest(log_likelihoods)];
        let line = json!({"prompt": self.prompt, "output": best, "extracted": best,
            "reference": letters[self.choices.answer], "log_likelihoods": log_likelihoods});
        let mut also = Vec::new();
        if style == PromptStyle::Harness {
            let lengths = self.choices.options.iter().map(|option| option.chars().count() as f64);
            let norm: Vec<f64> = log_likelihoods.iter().zip(lengths).map(|(sum, length)| sum / length).collect();
            also.push(("acc_norm", right(&norm)));
        }
        (Grade { score: right(log_likelihoods), also, extracted: Map::new() }, line)
    }
}

/// Index of the largest value; the first of equal ones. No value is NaN.
fn first_of_the_largest(values: &[f64]) -> usize {
    (0..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best })
}
