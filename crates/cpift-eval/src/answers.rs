//! Generated answers to the prompts of a task.

use anyhow::Result;
use cpift_core::progress;
use cpift_core::tasks::Task;
use cpift_torch::data::Row;
use cpift_torch::generate::{GreedyOptions, greedy};
use cpift_torch::session::Session;

use crate::metrics::Settings;
use crate::prompt::Prompt;

/// A prompt and what the model wrote after it.
pub struct Answered {
    /// The prompt as text.
    pub prompt: String,
    /// The answer.
    pub output: String,
}

/// The answers to all rows of a task.
pub struct Answers {
    /// In the order of the rows.
    pub list: Vec<Answered>,
    /// Prompts that lost their beginning, because the model's context holds no more.
    pub prompts_cut: usize,
}

/// Generates an answer to each row.
///
/// # Errors
/// As [`Prompt::new`].
pub fn answers(session: &Session, task: &Task, rows: &[Row], settings: &Settings) -> Result<Answers> {
    let prompts: Vec<Prompt> =
        rows.iter().map(|row| Prompt::new(session, task, row, settings.max_new_tokens)).collect::<Result<_>>()?;
    let prompts_cut = prompts.iter().filter(|p| p.cut > 0).count();
    let (texts, ids): (Vec<String>, Vec<Vec<i64>>) = prompts.into_iter().map(|p| (p.text, p.ids)).unzip();
    let options = GreedyOptions {
        eos_ids: &session.text.eos_ids,
        pad_id: session.text.pad_id,
        max_new_tokens: settings.max_new_tokens,
        batch_size: settings.batch_size,
    };
    let bar = progress::items("answers", ids.len() as u64);
    let answers = greedy(&session.model, &ids, &options, || bar.inc(1));
    bar.finish_and_clear();
    let answered =
        |(prompt, ids): (String, Vec<i64>)| anyhow::Ok(Answered { prompt, output: session.text.decode(&ids)? });
    Ok(Answers { list: texts.into_iter().zip(answers).map(answered).collect::<Result<_>>()?, prompts_cut })
}
