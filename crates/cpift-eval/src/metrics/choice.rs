//! `choice`: multiple choice by log-likelihood.

use anyhow::Result;
use cpift_core::progress;
use cpift_core::tasks::Task;
use cpift_torch::data::Row;
use cpift_torch::score;
use cpift_torch::session::Session;
use serde_json::{Value, json};

use super::{Grade, Lines, Scored, field_error};
use crate::prompt::Prompt;

/// The letter-answer form: A, B, … compared by their log-likelihood after the chat prompt.
pub fn score(session: &Session, task: &Task, rows: &[Row]) -> Result<Scored> {
    let (mut lines, mut prompts_cut) = (Lines::default(), 0);
    let bar = progress::items("choices", rows.len() as u64);
    for row in rows {
        let (count, answer) = choice_fields(task, row)?;
        let prompt = Prompt::new(session, task, row, 1)?;
        let letters: Vec<String> = (0..count).map(|i| char::from(b'A' + i as u8).to_string()).collect();
        let continuations: Vec<Vec<i64>> =
            letters.iter().map(|letter| continuation(session, row, &prompt, letter)).collect::<Result<_>>()?;
        let log_likelihoods = score::continuations(&session.model, &prompt.ids, &continuations)?;
        let best = first_of_the_largest(&log_likelihoods);
        prompts_cut += usize::from(prompt.cut > 0);
        let line = json!({"prompt": prompt.text, "output": letters[best], "extracted": letters[best],
            "reference": letters[answer], "log_likelihoods": log_likelihoods});
        lines.add(row, Grade::one("acc", f64::from(best == answer)), line);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(lines.scored(prompts_cut))
}

/// Ties go to the first.
fn first_of_the_largest(values: &[f64]) -> usize {
    (0..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best })
}

/// The tokens of `answer` after the prompt: the whole is encoded and cut at the prompt's length, as lm-evaluation-harness does.
fn continuation(session: &Session, row: &Row, prompt: &Prompt, answer: &str) -> Result<Vec<i64>> {
    let whole = session.text.encode(&format!("{}{answer}", prompt.text))?;
    let rest = whole.get(prompt.ids.len() + prompt.cut..).filter(|rest| !rest.is_empty());
    rest.map(<[i64]>::to_vec).ok_or_else(|| {
        row.place
            .bad(format!("{answer:?} merges into the prompt's last token"))
            .hint("end the prompt so that the tokenizer keeps the answer apart")
            .into()
    })
}

/// Number of choices and the right one's index.
fn choice_fields(task: &Task, row: &Row) -> Result<(usize, usize)> {
    let null = Value::Null;
    let choices = row.fields.get("choices").unwrap_or(&null);
    let answer = row.fields.get("answer").unwrap_or(&null);
    let count = choices.as_array().map_or(0, Vec::len);
    if !(2..=26).contains(&count) {
        return Err(field_error(task, row, "choices", "a list of 2 to 26 options", choices).into());
    }
    match answer.as_u64() {
        Some(index) if (index as usize) < count => Ok((count, index as usize)),
        _ => Err(field_error(task, row, "answer", &format!("an index from 0 to {}", count - 1), answer).into()),
    }
}
