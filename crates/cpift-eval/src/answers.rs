//! Generated answers to the prompts of a task.

use anyhow::Result;
use cpift_core::run::progress;
use cpift_data::Row;
use cpift_torch::generate::{Generated, GenerationOptions, generate};
use cpift_torch::session::Session;
use serde_json::{Value, json};

use crate::metrics::Settings;
use crate::prompt::{Prompt, PromptBuilder};

/// A prompt and what the model wrote after it.
pub struct Answered {
    /// The prompt as text.
    pub prompt: String,
    /// The answer, cut before a stop text, without the reasoning before it.
    pub output: String,
    /// Reasoning that the model wrote before the answer, with its closing mark.
    pub reasoning: Option<String>,
}

impl Answered {
    /// The row's line of outputs.jsonl, to be graded.
    pub fn line(&self, reference: &str) -> Value {
        let mut line = json!({"prompt": self.prompt, "output": self.output, "reference": reference});
        if let Some(reasoning) = &self.reasoning {
            line["reasoning"] = json!(reasoning);
        }
        line
    }
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
/// As [`PromptBuilder::prompt`].
pub fn answers(session: &Session, prompter: &PromptBuilder<'_>, rows: &[Row], settings: &Settings) -> Result<Answers> {
    let prompts: Vec<Prompt> =
        rows.iter().map(|row| prompter.prompt(row, settings.max_new_tokens)).collect::<Result<_>>()?;
    let prompts_cut = prompts.iter().filter(|p| p.cut > 0).count();
    let (texts, ids): (Vec<String>, Vec<Vec<i64>>) = prompts.into_iter().map(|p| (p.text, p.ids)).unzip();
    let options = GenerationOptions {
        eos_ids: &session.text.stop_ids(),
        stop: &prompter.stop(),
        max_new_tokens: settings.max_new_tokens,
        batch_size: settings.batch_size,
        sampling: settings.sampling,
    };
    let bar = progress::items("answers", ids.len() as u64);
    let answers = generate(&session.model, &session.text, &ids, &options, || bar.inc(1))?;
    bar.finish_and_clear();
    let answered = |(prompt, answer): (String, Generated)| {
        let (output, reasoning) = prompter.split_reasoning(answer)?;
        Ok(Answered { prompt, output, reasoning })
    };
    Ok(Answers { list: texts.into_iter().zip(answers).map(answered).collect::<Result<_>>()?, prompts_cut })
}
