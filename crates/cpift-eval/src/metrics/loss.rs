//! The mean negative log-likelihood of the reference answers, and its perplexity.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use cpift_core::format::scores::MetricValue;
use cpift_core::format::tasks::Task;
use cpift_core::run::progress;
use cpift_data::{ChatText, Encoded, Overlong, Row, encode_rows};
use cpift_torch::score::{self, ExampleLoss};
use cpift_torch::session::Session;

use super::{NOT_FINITE, Settings};

/// The loss on a task's reference answers.
pub struct Loss {
    /// The mean in nats a target token, with the standard error of a ratio of sums.
    pub nll: MetricValue,
    /// The loss of each row by its number, without those that were left out.
    pub rows: BTreeMap<usize, ExampleLoss>,
    /// Rows scored on their first tokens only.
    pub truncated: usize,
    /// Rows left out: no assistant token within the context.
    pub dropped: usize,
}

impl Loss {
    /// exp(nll); its standard error by the delta method, exp(nll) · stderr. None where that is more than a number can hold.
    pub fn perplexity(&self) -> Option<MetricValue> {
        let value = self.nll.value.exp();
        let stderr = self.nll.stderr.map(|stderr| value * stderr);
        let finite = value.is_finite() && stderr.is_none_or(f64::is_finite);
        finite.then(|| MetricValue { name: "perplexity".into(), value, stderr, n: self.nll.n })
    }
}

/// The reference answers as tokens.
///
/// # Errors
/// [`cpift_core::BadInput`] where a row cannot be encoded, or none has a token to be scored.
pub fn encoded(text: &ChatText, task: &Task, rows: &[Row], settings: &Settings) -> Result<Encoded> {
    encode_rows(&task.eval, rows, text.with(&task.template_args), settings.max_length, Overlong::Truncate)
}

/// Scores the reference answers.
///
/// # Errors
/// As [`encoded`]; a loss that is not finite, with its row.
pub fn loss(session: &Session, task: &Task, rows: &[Row], settings: &Settings) -> Result<Loss> {
    let encoded = encoded(&session.text, task, rows, settings)?;
    let bar = progress::items("loss", encoded.examples.len() as u64);
    let losses = score::losses(&session.model, &encoded.examples, settings.batch_size, || bar.inc(1));
    bar.finish_and_clear();
    let places = encoded.examples.iter().map(|example| &example.place);
    if let Some((place, loss)) = places.clone().zip(&losses).find(|(_, loss)| !loss.nll.is_finite()) {
        bail!("{}: {place}: the loss of the reference answer is {}\n  {NOT_FINITE}", task.name, loss.nll);
    }
    let rows = places.map(|place| place.row).zip(losses.iter().copied()).collect();
    Ok(Loss { nll: ratio(&losses), rows, truncated: encoded.truncated, dropped: encoded.dropped })
}

fn ratio(losses: &[ExampleLoss]) -> MetricValue {
    let targets: f64 = losses.iter().map(|l| l.targets as f64).sum();
    let value = losses.iter().map(|l| l.nll).sum::<f64>() / targets;
    let n = losses.len() as f64;
    let squares: f64 = losses.iter().map(|l| (l.nll - value * l.targets as f64).powi(2)).sum();
    let stderr = (n > 1.0).then(|| (squares * n / (n - 1.0)).sqrt() / targets);
    MetricValue { name: "nll".into(), value, stderr, n: losses.len() as u64 }
}
