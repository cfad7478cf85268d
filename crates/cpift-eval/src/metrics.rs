//! Scoring the rows of one task: the loss always, and the task's own metric.

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::progress;
use cpift_core::scores::Figure;
use cpift_core::tasks::{Task, TaskMetric};
use cpift_torch::data::{Overlong, Row, encode_rows};
use cpift_torch::generate::{GreedyOptions, greedy};
use cpift_torch::score::{self, ExampleLoss};
use cpift_torch::session::Session;
use serde_json::{Value, json};

use crate::gsm8k;

/// Settings that the figures of a task depend on.
pub struct Settings {
    /// Rows in a batch.
    pub batch_size: usize,
    /// Longest generated answer in tokens.
    pub max_new_tokens: usize,
    /// Longest example in tokens.
    pub max_length: usize,
}

/// The task's own metric over its rows.
pub struct Scored {
    /// The main figure; `None` for tasks scored by their loss.
    pub metric: Option<Figure>,
    /// Further figures of the same outputs.
    pub also: Vec<Figure>,
    /// Prompts that lost their beginning, because the model's context holds no more.
    pub prompts_cut: usize,
    /// One JSON object for each row: output, what was extracted, score.
    pub outputs: Vec<Value>,
}

/// The loss on a task's reference answers.
pub struct Loss {
    /// The mean in nats a target token, with the standard error of a ratio of sums.
    pub nll: Figure,
    /// Rows scored on their first tokens only.
    pub truncated: usize,
    /// Rows left out: no assistant token within the context.
    pub dropped: usize,
}

/// Scores the reference answers.
///
/// # Errors
/// [`cpift_core::BadInput`] where a row cannot be encoded.
pub fn loss(session: &Session, task: &Task, rows: &[Row], settings: &Settings) -> Result<Loss> {
    let encoded = encode_rows(&task.eval, rows, &session.text, settings.max_length, Overlong::Truncate)?;
    let bar = progress::items("loss", encoded.examples.len() as u64);
    let losses = score::losses(&session.model, &encoded.examples, settings.batch_size, || bar.inc(1));
    bar.finish_and_clear();
    Ok(Loss { nll: ratio(&losses), truncated: encoded.truncated, dropped: encoded.dropped })
}

fn ratio(losses: &[ExampleLoss]) -> Figure {
    let targets: f64 = losses.iter().map(|l| l.targets as f64).sum();
    let value = losses.iter().map(|l| l.nll).sum::<f64>() / targets;
    let n = losses.len() as f64;
    let squares: f64 = losses.iter().map(|l| (l.nll - value * l.targets as f64).powi(2)).sum();
    let stderr = if n > 1.0 { (squares * n / (n - 1.0)).sqrt() / targets } else { 0.0 };
    Figure { name: "nll".into(), value, stderr, n: losses.len() as u64 }
}

/// Scores the task's own metric.
///
/// # Errors
/// [`cpift_core::BadInput`] naming the line of a row without the fields its metric needs.
pub fn score(session: &Session, task: &Task, rows: &[Row], settings: &Settings) -> Result<Scored> {
    match task.metric {
        TaskMetric::Nll => Ok(Scored { metric: None, also: Vec::new(), prompts_cut: 0, outputs: Vec::new() }),
        TaskMetric::ExactMatch => exact_match(session, task, rows, settings),
        TaskMetric::Gsm8k => gsm8k_match(session, task, rows, settings),
        TaskMetric::Choice => choice(session, task, rows),
    }
}

fn exact_match(session: &Session, task: &Task, rows: &[Row], settings: &Settings) -> Result<Scored> {
    let references: Result<Vec<String>> = rows.iter().map(|row| reference(task, row)).collect();
    let references = references?;
    let (answers, prompts_cut) = answers(session, task, rows, settings)?;
    let (mut scores, mut outputs) = (Vec::new(), Vec::new());
    for ((row, answer), reference) in rows.iter().zip(&answers).zip(&references) {
        let score = f64::from(answer.trim() == reference.trim());
        scores.push(score);
        outputs.push(json!({"row": row.place.row, "output": answer, "reference": reference, "score": score}));
    }
    Ok(Scored { metric: Some(Figure::mean("exact_match", &scores)), also: Vec::new(), prompts_cut, outputs })
}

fn gsm8k_match(session: &Session, task: &Task, rows: &[Row], settings: &Settings) -> Result<Scored> {
    let references: Result<Vec<String>> = rows.iter().map(|row| reference(task, row)).collect();
    let references = references?;
    let (answers, prompts_cut) = answers(session, task, rows, settings)?;
    let (mut strict, mut flexible, mut outputs) = (Vec::new(), Vec::new(), Vec::new());
    for ((row, answer), reference) in rows.iter().zip(&answers).zip(&references) {
        let (by_strict, by_flexible) = (gsm8k::strict_match(answer), gsm8k::flexible_extract(answer));
        let wanted = gsm8k::normalise(reference);
        strict.push(f64::from(gsm8k::normalise(by_strict) == wanted));
        flexible.push(f64::from(gsm8k::normalise(by_flexible) == wanted));
        outputs.push(json!({"row": row.place.row, "output": answer, "reference": reference, "strict_match": by_strict,
            "flexible_extract": by_flexible, "score": strict[strict.len() - 1]}));
    }
    let also = vec![Figure::mean("exact_match_flexible", &flexible)];
    Ok(Scored { metric: Some(Figure::mean("exact_match", &strict)), also, prompts_cut, outputs })
}

/// `answer` of the row, or its last message.
fn reference(task: &Task, row: &Row) -> Result<String> {
    match row.fields.get("answer") {
        None => Ok(row.reference().to_owned()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(field_error(task, row, "answer", "a string", other)),
    }
}

fn field_error(task: &Task, row: &Row, field: &str, expected: &str, found: &Value) -> anyhow::Error {
    row.place
        .bad(format!("the field {field} does not fit the metric of {}", task.name))
        .expected(expected)
        .found(found.to_string())
        .into()
}

/// Greedy answers to the prompts of `rows`, and how many prompts were cut.
fn answers(session: &Session, task: &Task, rows: &[Row], settings: &Settings) -> Result<(Vec<String>, usize)> {
    let prompts: Vec<Prompt> =
        rows.iter().map(|row| Prompt::new(session, task, row, settings.max_new_tokens)).collect::<Result<_>>()?;
    let cut = prompts.iter().filter(|p| p.cut > 0).count();
    let ids: Vec<Vec<i64>> = prompts.into_iter().map(|p| p.ids).collect();
    let options = GreedyOptions {
        eos_ids: &session.text.eos_ids,
        pad_id: session.text.pad_id,
        max_new_tokens: settings.max_new_tokens,
        batch_size: settings.batch_size,
    };
    let bar = progress::items("answers", ids.len() as u64);
    let answers = greedy(&session.model, &ids, &options, || bar.inc(1));
    bar.finish_and_clear();
    let texts: Result<Vec<String>> = answers.iter().map(|answer| session.text.decode(answer)).collect();
    Ok((texts?, cut))
}

/// The chat prompt of a row, with the generation prompt.
struct Prompt {
    rendered: String,
    ids: Vec<i64>,
    /// Tokens that were cut off its beginning: the end of a long prompt is what the answer continues.
    cut: usize,
}

impl Prompt {
    /// Renders and encodes the prompt of `row`, with room for `answer` tokens in the model's context.
    fn new(session: &Session, task: &Task, row: &Row, answer: usize) -> Result<Self> {
        let rendered = session.text.render(row.prompt(), true).map_err(|e| row.place.bad(format!("{e:#}")))?;
        let mut ids = session.text.encode(&rendered)?;
        let context = session.model.config.max_position_embeddings as usize;
        if answer >= context {
            return Err(usage(format!(
                "max_new_tokens of {} ({answer}) leaves no room for a prompt in the model's context of {context} tokens",
                task.name
            )));
        }
        let cut = ids.len().saturating_sub(context - answer);
        ids.drain(..cut);
        Ok(Self { rendered, ids, cut })
    }
}

/// The letter-answer form of multiple choice: A, B, … compared by their log-likelihood after the chat prompt.
fn choice(session: &Session, task: &Task, rows: &[Row]) -> Result<Scored> {
    let (mut scores, mut outputs, mut prompts_cut) = (Vec::new(), Vec::new(), 0);
    let bar = progress::items("choices", rows.len() as u64);
    for row in rows {
        let (count, answer) = choice_fields(task, row)?;
        let prompt = Prompt::new(session, task, row, 1)?;
        let letters: Vec<String> = (0..count).map(|i| char::from(b'A' + i as u8).to_string()).collect();
        let continuations: Vec<Vec<i64>> =
            letters.iter().map(|letter| continuation(session, row, &prompt, letter)).collect::<Result<_>>()?;
        let log_likelihoods = score::continuations(&session.model, &prompt.ids, &continuations)?;
        // Ties go to the first.
        let best = (0..count).fold(0, |best, i| if log_likelihoods[i] > log_likelihoods[best] { i } else { best });
        scores.push(f64::from(best == answer));
        prompts_cut += usize::from(prompt.cut > 0);
        outputs.push(json!({"row": row.place.row, "output": letters[best], "reference": letters[answer],
            "log_likelihoods": log_likelihoods, "score": scores[scores.len() - 1]}));
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(Scored { metric: Some(Figure::mean("acc", &scores)), also: Vec::new(), prompts_cut, outputs })
}

/// The tokens of `answer` after the prompt: the whole is encoded and cut at the prompt's length, as lm-evaluation-harness does.
fn continuation(session: &Session, row: &Row, prompt: &Prompt, answer: &str) -> Result<Vec<i64>> {
    let whole = session.text.encode(&format!("{}{answer}", prompt.rendered))?;
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
        return Err(field_error(task, row, "choices", "a list of 2 to 26 options", choices));
    }
    match answer.as_u64() {
        Some(index) if (index as usize) < count => Ok((count, index as usize)),
        _ => Err(field_error(task, row, "answer", &format!("an index from 0 to {}", count - 1), answer)),
    }
}
