//! The mean negative log-likelihood of the reference answers, and its perplexity.

use anyhow::Result;
use cpift_core::progress;
use cpift_core::scores::Figure;
use cpift_core::tasks::Task;
use cpift_torch::data::{Overlong, Row, encode_rows};
use cpift_torch::score::{self, ExampleLoss};
use cpift_torch::session::Session;

use super::Settings;

/// The loss on a task's reference answers.
pub struct Loss {
    /// The mean in nats a target token, with the standard error of a ratio of sums.
    pub nll: Figure,
    /// Rows scored on their first tokens only.
    pub truncated: usize,
    /// Rows left out: no assistant token within the context.
    pub dropped: usize,
}

impl Loss {
    /// exp(nll); its standard error by the delta method, exp(nll) · stderr.
    pub fn perplexity(&self) -> Figure {
        let value = self.nll.value.exp();
        Figure { name: "perplexity".into(), value, stderr: value * self.nll.stderr, n: self.nll.n }
    }
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
