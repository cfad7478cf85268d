//! `judge`: the answers for a judge to grade, later and elsewhere (`cpift-eval judge`).

use anyhow::Result;
use cpift_data::Row;
use cpift_torch::session::Session;
use serde_json::{Value, json};

use super::{Scored, Settings};
use crate::answers::answers;
use crate::prompt::PromptBuilder;

/// Generates the answers. There is no metric yet, and no score: not judged is not a grade of zero.
///
/// # Errors
/// As [`answers`].
pub fn score(session: &Session, prompter: &PromptBuilder<'_>, rows: &[Row], settings: &Settings) -> Result<Scored> {
    let answers = answers(session, prompter, rows, settings)?;
    let line = |(row, answer): (&Row, &crate::answers::Answered)| {
        let turns: Vec<Value> =
            row.prompt().iter().map(|turn| json!({"role": turn.role, "content": turn.content})).collect();
        let mut line = answer.line(row.reference());
        (line["messages"], line["row"]) = (json!(turns), json!(row.place.row));
        line
    };
    let outputs = rows.iter().zip(&answers.list).map(line).collect();
    Ok(Scored { metric: None, also: Vec::new(), prompts_cut: answers.prompts_cut, skipped: 0, outputs })
}
