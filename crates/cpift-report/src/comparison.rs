//! Runs by tasks: values, the best of each column, and differences to a baseline.

use std::collections::BTreeSet;

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::format::scores::{MetricValue, TaskScore};
use serde_json::Value;

pub use crate::pairing::Delta;
use crate::pairing::{Drawn, Draws, Sides};
use crate::runs::{self, Run};
use crate::unit::Unit;

/// What a comparison is asked to show.
#[derive(Debug, Clone)]
pub struct Question {
    /// The run the others are compared with.
    pub baseline: Option<String>,
    /// Resamples of the bootstrap.
    pub resamples: usize,
    /// Its seed.
    pub seed: u64,
}

impl Question {
    /// # Errors
    /// [`cpift_core::Usage`] for a number of resamples out of range.
    pub fn check(&self) -> Result<()> {
        match self.resamples {
            1..=1_000_000 => Ok(()),
            _ => Err(usage("--resamples must be 1 to 1000000")),
        }
    }
}

/// The figures of one task, or of all: one cell a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Column {
    /// The task; none for ANS and the mean loss.
    pub task: Option<String>,
    /// The figure's name: `acc`, `nll`, `ANS`.
    pub figure: String,
    /// Its unit.
    pub unit: Unit,
    /// One cell a run, in their order.
    pub cells: Vec<Cell>,
    /// One difference a run, where there is a baseline; none for the baseline itself and where either has no value.
    pub deltas: Vec<Option<Delta>>,
}

/// A value of one run.
#[derive(Debug, Clone, PartialEq)]
pub enum Cell {
    /// A figure, and whether no other run has a better one.
    Value(MetricValue, bool),
    /// The task wants a judge, and none has read this run.
    NotJudged,
    /// A judge has read the run, and no reply of it held a grade.
    NoGrade,
    /// The run has no such figure.
    Missing,
}

impl Cell {
    /// The figure, where there is one.
    pub fn figure(&self) -> Option<&MetricValue> {
        if let Self::Value(figure, _) = self { Some(figure) } else { None }
    }
}

/// A whole comparison.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// The runs, in the order given.
    pub runs: Vec<Run>,
    /// What was asked.
    pub question: Question,
    /// One column a task: its metric where any run has one, its loss where not.
    pub scores: Vec<Column>,
    /// The Average Normalised Score.
    pub ans: Column,
    /// The loss of every task.
    pub losses: Vec<Column>,
    /// The mean loss over the tasks.
    pub mean_loss: Column,
    /// Further figures of the same rows: other readings of a metric, its parts, perplexity, and the rows that scoring skipped or cut.
    pub also: Vec<Column>,
    /// What the reader must know: intervals that cannot be given, scores that leave tasks out.
    pub notes: Vec<String>,
}

impl Comparison {
    /// Compares `runs`.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] when the baseline is none of them, or there are no resamples.
    pub fn new(runs: Vec<Run>, question: Question) -> Result<Self> {
        let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
        let baseline = match &question.baseline {
            None => None,
            Some(name) => Some(
                names
                    .iter()
                    .position(|n| n == name)
                    .ok_or_else(|| usage(format!("--baseline {name} is none of the runs: {}", names.join(", "))))?,
            ),
        };
        question.check()?;
        let mut notes = runs::differences(&runs);
        let mut tasks: Vec<&str> = Vec::new();
        for task in runs.iter().flat_map(|run| &run.scores.tasks) {
            if !tasks.contains(&task.task.as_str()) {
                tasks.push(&task.task);
            }
        }
        let mut scores: Vec<Column> = tasks.iter().map(|task| score_column(&runs, task)).collect();
        let mut losses: Vec<Column> = tasks.iter().map(|task| loss_column(&runs, task)).collect();
        let mut also: Vec<Column> = tasks.iter().flat_map(|task| further_columns(&runs, task)).collect();
        if let Some(base) = baseline {
            let draws = Draws::new(1, &question);
            also.iter_mut().for_each(|column| column.deltas = unpaired(base, column));
            let perplexities = also.iter_mut().filter(|column| column.unit.is_loss());
            for column in scores.iter_mut().chain(&mut losses).chain(perplexities) {
                column.deltas = unpaired(base, column);
                let stream = tasks.iter().position(|task| Some(*task) == column.task.as_deref()).unwrap_or(0);
                column.draw(&draws, &runs, base, stream as u64, &mut notes);
            }
        }
        let metrics: Vec<&Column> = scores.iter().filter(|c| !c.unit.is_loss()).collect();
        let mut ans = over_tasks(&metrics, &runs, "ANS", Unit::Rating, &mut notes);
        let mut mean_loss = over_tasks(&losses.iter().collect::<Vec<_>>(), &runs, "mean nll", Unit::Nats, &mut notes);
        let summaries = [&mut ans, &mut mean_loss];
        scores.iter_mut().chain(&mut losses).chain(&mut also).chain(summaries).for_each(mark_best);
        Ok(Self { runs, question, scores, ans, losses, mean_loss, also, notes })
    }

    /// The columns of the table: a score for each task, ANS, mean loss.
    pub fn columns(&self) -> impl Iterator<Item = &Column> {
        self.scores.iter().chain([&self.ans, &self.mean_loss])
    }

    /// Every column, each once.
    pub fn all_columns(&self) -> impl Iterator<Item = &Column> {
        let shown = |c: &&Column| !self.scores.iter().any(|s| s.task == c.task && s.figure == c.figure);
        self.columns().chain(self.losses.iter().filter(shown)).chain(&self.also)
    }

    /// The baseline's place among the runs.
    pub fn baseline(&self) -> Option<usize> {
        self.runs.iter().position(|run| Some(&run.name) == self.question.baseline.as_ref())
    }

    /// How the intervals came to be.
    pub fn interval_words(&self) -> String {
        format!("95 % paired bootstrap over rows, {} resamples, seed {}", self.question.resamples, self.question.seed)
    }

    /// The number of rows behind each task's score; empty where nothing was scored. Runs differ in it where a judge gave no grade.
    pub fn rows_words(&self) -> String {
        let count = |column: &Column| {
            let counts = column.cells.iter().filter_map(|cell| Some(cell.figure()?.n));
            let (low, high) = (counts.clone().min()?, counts.max()?);
            Some(if low == high { low.to_string() } else { format!("{low} to {high}") })
        };
        let counts: Vec<(&str, String)> =
            self.scores.iter().filter_map(|c| Some((c.task.as_deref()?, count(c)?))).collect();
        match counts.first() {
            None => String::new(),
            Some((_, n)) if counts.iter().all(|(_, m)| m == n) => format!("Rows (n): {n} for each task."),
            _ => {
                let list: Vec<String> = counts.iter().map(|(task, n)| format!("{task} {n}")).collect();
                format!("Rows (n): {}.", list.join(", "))
            }
        }
    }
}

/// Whether a task wants a judge that has not read the run: its settings speak of one, and there is no metric.
fn wants_judge(task: &TaskScore) -> bool {
    let named = task.settings.get("metric").and_then(|m| m.as_str()).is_some_and(|m| Unit::of(m) == Unit::Rating);
    named || task.settings.keys().any(|key| key.starts_with("judge"))
}

fn score_column(runs: &[Run], task: &str) -> Column {
    let scored = |run: &Run| run.task(task).and_then(|t| t.metric.as_ref()).map(|m| m.name.clone());
    let wanted = runs.iter().filter_map(|run| run.task(task)).any(wants_judge).then(|| "judge".to_owned());
    let Some(figure) = runs.iter().find_map(scored).or(wanted) else { return loss_column(runs, task) };
    let unit = Unit::of(&figure);
    let cell = |run: &Run| match run.task(task) {
        // By force a run of another metric is here: one on another scale has no place in this column.
        Some(TaskScore { metric: Some(metric), .. }) if Unit::of(&metric.name) == unit => {
            Cell::Value(metric.clone(), false)
        }
        Some(TaskScore { metric: Some(_), .. }) => Cell::Missing,
        // Null until a judge has read the run.
        Some(task) if unit == Unit::Rating => match task.settings.get("judge") {
            None | Some(serde_json::Value::Null) => Cell::NotJudged,
            Some(_) => Cell::NoGrade,
        },
        _ => Cell::Missing,
    };
    Column { task: Some(task.to_owned()), unit, figure, cells: runs.iter().map(cell).collect(), deltas: Vec::new() }
}

fn loss_column(runs: &[Run], task: &str) -> Column {
    let cell = |run: &Run| run.task(task).map_or(Cell::Missing, |t| Cell::Value(t.nll.clone(), false));
    let cells = runs.iter().map(cell).collect();
    Column { task: Some(task.to_owned()), figure: "nll".into(), unit: Unit::Nats, cells, deltas: Vec::new() }
}

/// The columns of a task's further figures, and of the counts that are not 0 everywhere.
fn further_columns(runs: &[Run], task: &str) -> Vec<Column> {
    let scored: Vec<Option<&TaskScore>> = runs.iter().map(|run| run.task(task)).collect();
    let column = |name: &str, unit, cells| Column {
        task: Some(task.to_owned()),
        figure: name.to_owned(),
        unit,
        cells,
        deltas: Vec::new(),
    };
    let figure = |name: &String| {
        let cell = |score: &Option<&TaskScore>| match score.and_then(|score| score.also.get(name)) {
            Some(figure) => Cell::Value(figure.clone(), false),
            None => Cell::Missing,
        };
        column(name, Unit::of(name), scored.iter().map(cell).collect())
    };
    let count = |name: &str| {
        let number = |score: &TaskScore, name: &str| score.settings.get(name)?.as_u64();
        let cell = |score: &Option<&TaskScore>| match score.and_then(|s| Some((s, number(s, name)?))) {
            Some((score, count)) => {
                let n = number(score, "rows").unwrap_or(score.nll.n);
                Cell::Value(MetricValue { name: name.to_owned(), value: count as f64, stderr: None, n }, false)
            }
            None => Cell::Missing,
        };
        column(name, Unit::Count, scored.iter().map(cell).collect())
    };
    let names: BTreeSet<&String> = scored.iter().flatten().flat_map(|score| score.also.keys()).collect();
    let counts: BTreeSet<&str> =
        runs::COUNTS.into_iter().filter(|name| scored.iter().flatten().any(|s| is_some_rows(s, name))).collect();
    names.into_iter().map(figure).chain(counts.into_iter().map(count)).collect()
}

fn is_some_rows(score: &TaskScore, name: &str) -> bool {
    score.settings.get(name).and_then(Value::as_u64).is_some_and(|count| count > 0)
}

/// The mean over the tasks of `columns` that any run has, and only of runs that have all of them: a mean over other tasks is another
/// figure. ANS brings each to a scale of 0 to 10.
fn over_tasks(columns: &[&Column], runs: &[Run], name: &str, unit: Unit, notes: &mut Vec<String>) -> Column {
    let named = |columns: &[&Column]| columns.iter().filter_map(|c| c.task.as_deref()).collect::<Vec<_>>().join(", ");
    let (counted, empty): (Vec<&Column>, Vec<&Column>) =
        columns.iter().copied().partition(|column| column.cells.iter().any(|cell| cell.figure().is_some()));
    if !counted.is_empty() && !empty.is_empty() {
        notes.push(format!("{name} leaves out {}: no run has a figure of it.", named(&empty)));
    }
    let mut cell = |(i, run): (usize, &Run)| {
        let lacking: Vec<&Column> = counted.iter().copied().filter(|c| c.cells[i].figure().is_none()).collect();
        if !lacking.is_empty() {
            notes.push(format!("{name} of {} is left out: it has no figure of {}.", run.name, named(&lacking)));
        }
        let values = counted.iter().filter_map(|c| Some(c.unit.normalised(c.cells[i].figure()?.value)));
        let (sum, n) = (values.sum::<f64>(), counted.len() as u64);
        match lacking.is_empty() && n > 0 {
            true => Cell::Value(MetricValue { name: name.to_owned(), value: sum / n as f64, stderr: None, n }, false),
            false => Cell::Missing,
        }
    };
    let cells = runs.iter().enumerate().map(&mut cell).collect();
    let delta = |i: usize| {
        let deltas: Vec<_> = counted.iter().map(|c| (c.unit, c.deltas.get(i).and_then(Option::as_ref))).collect();
        Delta::over_tasks(&deltas, Unit::normalised)
    };
    let deltas = (0..runs.len()).map(delta).collect();
    Column { task: None, figure: name.to_owned(), unit, cells, deltas }
}

/// The best value of a column, where it holds different ones.
fn mark_best(column: &mut Column) {
    if column.unit == Unit::Count {
        return;
    }
    let direction = column.unit.direction();
    let values = column.cells.iter().filter_map(|cell| Some(direction * cell.figure()?.value));
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if low < high {
        for cell in &mut column.cells {
            if let Cell::Value(figure, best) = cell {
                *best = direction * figure.value == high;
            }
        }
    }
}

/// Differences without intervals. Of a count there is none: it tells what was scored, not how well.
fn unpaired(base: usize, column: &Column) -> Vec<Option<Delta>> {
    let of = column.cells[base].figure().filter(|_| column.unit != Unit::Count);
    let delta = |(i, cell): (usize, &Cell)| {
        let value = cell.figure()?.value - of?.value;
        (i != base).then(|| Delta::alone(value))
    };
    column.cells.iter().enumerate().map(delta).collect()
}

impl Column {
    /// Gives the differences their intervals where the rows of both runs are known.
    fn draw(&mut self, draws: &Draws, runs: &[Run], base: usize, stream: u64, notes: &mut Vec<String>) {
        let (Some(task), unit) = (&self.task, self.unit) else { return };
        for (i, delta) in self.deltas.iter_mut().enumerate() {
            let Some(delta) = delta else { continue };
            let rows = [base, i].map(|run| self.cells[run].figure().map_or(0, |f| f.n)).into_iter().max();
            let sides =
                Sides { name: &runs[i].name, base: &runs[base..=base], run: &runs[i..=i], rows: rows.unwrap_or(0) };
            draws.draw(delta, &sides, &Drawn { task, unit, stream }, notes);
        }
    }
}
