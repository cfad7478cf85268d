//! What the model is asked: the chat prompt of a row.

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::tasks::Task;
use cpift_torch::data::Row;
use cpift_torch::session::Session;

/// The prompt of a row.
pub struct Prompt {
    /// As text.
    pub text: String,
    /// As token ids, within the model's context.
    pub ids: Vec<i64>,
    /// Tokens that were cut off its beginning: the end of a long prompt is what the answer continues.
    pub cut: usize,
}

impl Prompt {
    /// Renders and encodes the prompt of `row`, with room for `answer` tokens in the model's context.
    ///
    /// # Errors
    /// What the chat template raised, with the row; no room for a prompt.
    pub fn new(session: &Session, task: &Task, row: &Row, answer: usize) -> Result<Self> {
        let text = session.text.render(row.prompt(), true).map_err(|e| row.place.bad(format!("{e:#}")))?;
        let mut ids = session.text.encode(&text)?;
        let context = session.model.config.max_position_embeddings as usize;
        if answer >= context {
            return Err(usage(format!(
                "max_new_tokens of {} ({answer}) leaves no room for a prompt in the model's context of {context} tokens",
                task.name
            )));
        }
        let cut = ids.len().saturating_sub(context - answer);
        ids.drain(..cut);
        Ok(Self { text, ids, cut })
    }
}
