//! `choice`: multiple choice by log-likelihood, of the letter after a chat prompt, of the option's text after a harness prompt.

use anyhow::{Result, bail};
use cpift_core::progress;
use cpift_core::tasks::Task;
use cpift_data::Row;
use cpift_torch::score::{Alternatives, alternatives};
use cpift_torch::session::Session;
use log::warn;
use serde_json::{Map, Value, json};

use super::{Grade, Lines, NOT_FINITE, Scored, Settings, field_error};
use crate::prompt::{Prompt, PromptStyle, Prompter};

/// The options of a row.
pub struct Choices {
    /// Their texts, without letters.
    pub options: Vec<String>,
    answer: usize,
}

impl Choices {
    /// A, B, … for each option.
    pub fn letters(&self) -> impl Iterator<Item = char> {
        ('A'..='Z').take(self.options.len())
    }

    /// The right option.
    pub fn right(&self) -> &str {
        &self.options[self.answer]
    }
}

/// `choices` and `answer` of a row.
///
/// # Errors
/// [`cpift_core::BadInput`] naming the row and the field that is missing or does not fit.
pub fn choices(task: &Task, row: &Row) -> Result<Choices> {
    let null = Value::Null;
    let list = row.fields.get("choices").unwrap_or(&null);
    let answer = row.fields.get("answer").unwrap_or(&null);
    let texts = list.as_array().map(|list| list.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
    let options = match texts.flatten() {
        Some(texts) if (2..=26).contains(&texts.len()) => texts.into_iter().map(str::to_owned).collect(),
        _ => return Err(field_error(task, row, "choices", "a list of 2 to 26 options, each a text", list).into()),
    };
    let options: Vec<String> = options;
    match answer.as_u64().map(|index| index as usize).filter(|index| *index < options.len()) {
        Some(answer) => Ok(Choices { options, answer }),
        None => {
            let expected = format!("an index from 0 to {}", options.len() - 1);
            Err(field_error(task, row, "answer", &expected, answer).into())
        }
    }
}

/// Checks that every row can be asked, and warns where its prompt has the options twice.
///
/// # Errors
/// As [`choices`] and [`Prompter::prompt`].
pub fn check(prompter: &Prompter<'_>, task: &Task, rows: &[Row]) -> Result<()> {
    rows.iter().try_for_each(|row| Asked::new(prompter, task, row).map(drop))?;
    if let Some(row) = rows.iter().find(|row| prompter.doubles_options(row)) {
        warn!(
            "{}: the options stand in the prompt twice, in the user's turn ({}) and under `Choices:`\n  hint: give the task a `split` in \
             {}, or the rows a field `question`",
            task.name,
            row.place,
            task.listed_in.display()
        );
    }
    Ok(())
}

/// acc by the sum of log-likelihoods; for a harness prompt also acc_norm, by the sum over the option's length in code points.
///
/// # Errors
/// As [`check`]; a log-likelihood that is not finite, with its row.
pub fn score(
    session: &Session,
    prompter: &Prompter<'_>,
    task: &Task,
    rows: &[Row],
    settings: &Settings,
) -> Result<Scored> {
    let asked: Vec<Asked> = rows.iter().map(|row| Asked::new(prompter, task, row)).collect::<Result<_>>()?;
    let items: Vec<Alternatives> = asked.iter().map(|asked| asked.alternatives.clone()).collect();
    let bar = progress::items("choices", rows.len() as u64);
    let scores = alternatives(&session.model, &items, settings.batch_size, || bar.inc(1))?;
    bar.finish_and_clear();
    let mut lines = Lines::default();
    for ((row, asked), log_likelihoods) in rows.iter().zip(&asked).zip(scores) {
        if let Some(which) = log_likelihoods.iter().position(|value| !value.is_finite()) {
            let (letter, value) = (asked.choices.letters().nth(which).unwrap_or('?'), log_likelihoods[which]);
            bail!("{}: {}: the log-likelihood of option {letter} is {value}\n  {NOT_FINITE}", task.name, row.place);
        }
        let (grade, line) = asked.grade(prompter.style, &log_likelihoods);
        lines.add(row, grade, line);
    }
    Ok(lines.scored(asked.iter().filter(|asked| asked.prompt.cut > 0).count()))
}

/// A row's prompt and what may follow it.
struct Asked {
    prompt: Prompt,
    choices: Choices,
    alternatives: Alternatives,
}

impl Asked {
    fn new(prompter: &Prompter<'_>, task: &Task, row: &Row) -> Result<Self> {
        let choices = choices(task, row)?;
        let texts: Vec<String> = match prompter.style {
            PromptStyle::Chat => choices.letters().map(String::from).collect(),
            PromptStyle::Harness => choices.options.iter().map(|option| format!(" {option}")).collect(),
        };
        let (prompt, continuations) = prompter.alternatives(row, &texts)?;
        let alternatives = Alternatives { context: prompt.ids.clone(), continuations };
        Ok(Self { prompt, choices, alternatives })
    }

    fn grade(&self, style: PromptStyle, log_likelihoods: &[f64]) -> (Grade, Value) {
        let letters: Vec<char> = self.choices.letters().collect();
        let right = |values: &[f64]| f64::from(first_of_the_largest(values) == self.choices.answer);
        let best = letters[first_of_the_largest(log_likelihoods)];
        let line = json!({"prompt": self.prompt.text, "output": best, "extracted": best,
            "reference": letters[self.choices.answer], "log_likelihoods": log_likelihoods});
        let mut scores = vec![("acc", right(log_likelihoods))];
        if style == PromptStyle::Harness {
            let lengths = self.choices.options.iter().map(|option| option.chars().count() as f64);
            let norm: Vec<f64> = log_likelihoods.iter().zip(lengths).map(|(sum, length)| sum / length).collect();
            scores.push(("acc_norm", right(&norm)));
        }
        (Grade { scores, extracted: Map::new() }, line)
    }
}

/// Ties go to the first; no value is NaN.
fn first_of_the_largest(values: &[f64]) -> usize {
    (0..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best })
}
