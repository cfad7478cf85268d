//! The loss: mean negative log-likelihood of the reference answers, with its perplexity.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use cpift_core::format::scores::MetricValue;
use cpift_core::format::tasks::Task;
use cpift_core::run::progress;
use cpift_data::Encoded;
use cpift_torch::score::{self, ExampleLoss};
use cpift_torch::session::Session;
use serde_json::{Value, json};

use super::metric::{Metric, NOT_FINITE, Prepared, Scored, TaskView};

/// Loss on the reference answers of a task.
pub(crate) struct Loss {
    /// Mean in nats per target token, with the standard error of a ratio of sums.
    pub(crate) nll: MetricValue,
    /// Loss of each row by row number, without the dropped rows.
    pub(crate) rows: BTreeMap<usize, ExampleLoss>,
    /// Number of rows scored on their first tokens only.
    pub(crate) truncated: usize,
    /// Number of rows without an assistant token within the context.
    pub(crate) dropped: usize,
}

impl Loss {
    /// Scores the reference answers.
    ///
    /// # Errors
    /// A loss that is not finite, with its row.
    pub(crate) fn of(session: &Session, task: &Task, examples: &Encoded, batch_size: usize) -> Result<Self> {
        let bar = progress::items("loss", examples.examples.len() as u64);
        let losses = score::losses(&session.model, &examples.examples, batch_size, || bar.inc(1))?;
        bar.finish_and_clear();
        let places = examples.examples.iter().map(|example| &example.place);
        if let Some((place, loss)) = places.clone().zip(&losses).find(|(_, loss)| !loss.nll.is_finite()) {
            bail!("{}: {place}: the loss of the reference answer is {}\n  {NOT_FINITE}", task.name, loss.nll);
        }
        let rows = places.map(|place| place.row).zip(losses.iter().copied()).collect();
        Ok(Self { nll: ratio(&losses), rows, truncated: examples.truncated, dropped: examples.dropped })
    }

    /// exp(nll) with the standard error exp(nll) · stderr (delta method). `None` if it overflows
    /// f64.
    pub(crate) fn perplexity(&self) -> Option<MetricValue> {
        let value = self.nll.value.exp();
        let stderr = self.nll.stderr.map(|stderr| value * stderr);
        let finite = value.is_finite() && stderr.is_none_or(f64::is_finite);
        finite.then(|| MetricValue { name: "perplexity".into(), value, stderr, n: self.nll.n })
    }
}

/// Sum of losses over sum of targets.
fn ratio(losses: &[ExampleLoss]) -> MetricValue {
    let targets: f64 = losses.iter().map(|l| l.targets as f64).sum();
    let value = losses.iter().map(|l| l.nll).sum::<f64>() / targets;
    let n = losses.len() as f64;
    let squares: f64 = losses.iter().map(|l| (l.nll - value * l.targets as f64).powi(2)).sum();
    let stderr = (n > 1.0).then(|| (squares * n / (n - 1.0)).sqrt() / targets);
    MetricValue { name: "nll".into(), value, stderr, n: losses.len() as u64 }
}

/// `nll`: the loss alone.
pub(crate) struct Nll;

impl Metric for Nll {
    fn key(&self) -> &'static str {
        "nll"
    }

    fn name(&self) -> &'static str {
        "nll"
    }

    fn unit(&self) -> &'static str {
        "nats/token"
    }

    fn summary(&self) -> &'static str {
        "the loss alone, which every task gets (default)"
    }

    fn prepare(&self, task: &TaskView<'_>) -> Result<Box<dyn Prepared>> {
        let prompts = task.rows.iter().map(|row| task.prompter.before_the_answer(row)).collect::<Result<_>>()?;
        Ok(Box::new(WithoutAnswers { prompts }))
    }
}

/// A task without generated answers.
struct WithoutAnswers {
    prompts: Vec<String>,
}

impl Prepared for WithoutAnswers {
    fn score(&self, _: &Session, task: &TaskView<'_>) -> Result<Scored> {
        let line = |(row, prompt): (&cpift_data::Row, &String)| -> Value {
            json!({"prompt": prompt, "reference": row.reference(), "row": row.place.row})
        };
        Ok(Scored { lines: task.rows.iter().zip(&self.prompts).map(line).collect(), ..Scored::default() })
    }
}
