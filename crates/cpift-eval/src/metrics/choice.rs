//! `choice`: multiple choice by log-likelihood, of the letter after a chat prompt, of the option's text after a harness prompt.

use anyhow::{Result, bail};
use cpift_core::format::tasks::Task;
use cpift_core::run::progress;
use cpift_data::Row;
use cpift_torch::score::{Alternatives, alternatives};
use cpift_torch::session::Session;
use log::warn;
use serde_json::{Map, Value, json};

use super::options::{Choices, choices};
use super::{Grade, Lines, NOT_FINITE, Scored, Settings};
use crate::prompt::{Prompt, PromptBuilder, PromptStyle};

/// Checks that every row can be asked, and warns where its prompt has the options twice or its last turn has another answer.
///
/// # Errors
/// As [`choices`] and [`PromptBuilder::prompt`].
pub fn check(prompter: &PromptBuilder<'_>, task: &Task, rows: &[Row]) -> Result<()> {
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
    Ok(())
}

/// acc by the sum of log-likelihoods; for a harness prompt also acc_norm, by the sum over the option's length in code points.
///
/// # Errors
/// As [`check`]; a log-likelihood that is not finite, with its row.
pub fn score(
    session: &Session,
    prompter: &PromptBuilder<'_>,
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
    fn new(prompter: &PromptBuilder<'_>, task: &Task, row: &Row) -> Result<Self> {
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
