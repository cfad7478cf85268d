//! The `Metric` trait and the types that metrics share, and the loss, which every task gets: mean
//! negative log-likelihood of the reference answers, with its perplexity.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use cpift_core::format::scores::MetricValue;
use cpift_core::format::tasks::Task;
use cpift_core::run::progress;
use cpift_data::{Encoded, MaxLength, Row};
use cpift_torch::generate::Sampling;
use cpift_torch::score::{self, ExampleLoss};
use cpift_torch::session::Session;
use serde_json::{Map, Value, json};

use crate::prompt::PromptBuilder;

/// Hint of an error about a figure that is not finite.
pub(super) const NOT_FINITE: &str =
    "hint: the model overflows on this row, so none of its figures is meaningful: check how it was trained";

/// Unit of a figure that is a share of rows, or a mean of values from 0 to 1.
pub(super) const FRACTION: &str = "0 to 1";

/// A metric that tasks.toml can name.
pub(crate) trait Metric: Sync {
    /// Name in tasks.toml.
    fn key(&self) -> &'static str;

    /// Name of the main figure in scores.json.
    fn name(&self) -> &'static str;

    /// Unit of the main figure.
    fn unit(&self) -> &'static str;

    /// Definition of the main figure, in a few words.
    fn summary(&self) -> &'static str;

    /// Checks every row of a task and builds and tokenises its prompts, once per task and model.
    /// All tasks are prepared before any is scored.
    ///
    /// # Errors
    /// [`cpift_core::BadInput`] naming the row that cannot be encoded or lacks a field;
    /// [`cpift_core::Usage`] for an answer longer than the model's context.
    fn prepare(&self, task: &TaskView<'_>) -> Result<Box<dyn Prepared>>;
}

/// A metric with the prompts of one task.
pub(crate) trait Prepared {
    /// Runs the model on the prompts and scores the rows.
    ///
    /// # Errors
    /// A figure that is not finite, with its row; failures of the tokenizer.
    fn score(&self, session: &Session, task: &TaskView<'_>) -> Result<Scored>;
}

/// One task as a metric sees it.
#[derive(Clone, Copy)]
pub(crate) struct TaskView<'a> {
    pub(crate) task: &'a Task,
    /// Rows to score.
    pub(crate) rows: &'a [Row],
    pub(crate) settings: &'a Settings,
    pub(crate) prompter: &'a PromptBuilder<'a>,
}

/// Settings that the figures of a task depend on.
pub(crate) struct Settings {
    /// Rows per batch.
    pub(crate) batch_size: usize,
    /// Maximum length of a generated answer in tokens.
    pub(crate) max_new_tokens: usize,
    /// Maximum length of an example.
    pub(crate) max_length: MaxLength,
    /// Sampling of tokens; `None` for greedy decoding.
    pub(crate) sampling: Option<Sampling>,
}

/// Scores of one task's own metric.
#[derive(Default)]
pub(crate) struct Scored {
    /// Main figure; `None` for a task scored by its loss alone or not yet judged.
    pub(crate) metric: Option<MetricValue>,
    /// Further figures of the same outputs.
    pub(crate) also: Vec<MetricValue>,
    /// Number of prompts whose beginning was cut to fit the model's context.
    pub(crate) prompts_cut: usize,
    /// Number of rows that the metric does not apply to; no figure includes them.
    pub(crate) skipped: usize,
    /// Settings of this metric alone, for scores.json.
    pub(crate) settings: Vec<(&'static str, Value)>,
    /// One JSON object per row for outputs.jsonl: prompt, output, extracted text, reference, score.
    pub(crate) lines: Vec<Value>,
}

/// Scores of one row.
pub(crate) struct Grade {
    /// The main figure.
    pub(crate) score: f64,
    /// Further figures by name; the same names in the same order for every row.
    pub(crate) also: Vec<(&'static str, f64)>,
    /// Text that the score was computed from, such as `extracted`; part of the row's line.
    pub(crate) extracted: Map<String, Value>,
}

impl Grade {
    /// A grade with one figure.
    pub(crate) fn one(score: f64) -> Self {
        Self { score, also: Vec::new(), extracted: Map::new() }
    }
}

/// Collects the lines of outputs.jsonl and the values of each figure.
pub(super) struct Lines {
    name: &'static str,
    scores: Vec<f64>,
    also: Vec<(&'static str, Vec<f64>)>,
    lines: Vec<Value>,
}

impl Lines {
    /// For a metric whose main figure is `name`.
    pub(super) fn new(name: &'static str) -> Self {
        Self { name, scores: Vec::new(), also: Vec::new(), lines: Vec::new() }
    }

    /// Adds a graded row. `line` is an object.
    pub(super) fn add(&mut self, row: &Row, grade: Grade, mut line: Value) {
        if self.scores.is_empty() {
            self.also = grade.also.iter().map(|(name, _)| (*name, Vec::new())).collect();
        }
        self.scores.push(grade.score);
        self.also.iter_mut().zip(&grade.also).for_each(|((_, all), (_, score))| all.push(*score));
        let object = line.as_object_mut().expect("a line is an object");
        object.insert("row".into(), json!(row.place.row));
        object.extend(grade.extracted);
        object.insert("score".into(), json!(grade.score));
        let figures = [(self.name, grade.score)].into_iter().chain(grade.also);
        object.extend(figures.map(|(name, score)| (name.to_owned(), json!(score))));
        self.lines.push(line);
    }

    /// Adds a row without a score.
    pub(super) fn skip(&mut self, row: &Row, mut line: Value) {
        line["row"] = json!(row.place.row);
        self.lines.push(line);
    }

    /// The mean of each figure.
    pub(super) fn scored(self, prompts_cut: usize) -> Scored {
        let metric = (!self.scores.is_empty()).then(|| MetricValue::mean(self.name, &self.scores));
        let also = self.also.iter().map(|(name, scores)| MetricValue::mean(name, scores)).collect();
        Scored { metric, also, prompts_cut, lines: self.lines, ..Scored::default() }
    }
}

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
