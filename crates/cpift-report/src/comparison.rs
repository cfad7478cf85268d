//! Runs by tasks: values, the best of each column, and differences to a baseline.

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::scores::{Figure, Scores, TaskScore};

use crate::bootstrap;
use crate::runs::Run;
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
    Value(Figure, bool),
    /// The task wants a judge, and none has read this run.
    NotJudged,
    /// A judge has read the run, and no reply of it held a grade.
    NoGrade,
    /// The run has no such figure.
    Missing,
}

impl Cell {
    /// The figure, where there is one.
    pub fn figure(&self) -> Option<&Figure> {
        if let Self::Value(figure, _) = self { Some(figure) } else { None }
    }
}

/// The difference of a run to the baseline.
#[derive(Debug, Clone, PartialEq)]
pub struct Delta {
    /// Run minus baseline.
    pub value: f64,
    /// The 95 % paired bootstrap interval, where rows can be paired.
    pub interval: Option<(f64, f64)>,
    /// Rows that were paired.
    pub rows: usize,
    /// Means of the resamples, for the interval of a mean over tasks.
    pub(crate) means: Vec<f64>,
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
        let mut notes = Vec::new();
        let mut tasks: Vec<&str> = Vec::new();
        for task in runs.iter().flat_map(|run| &run.scores.tasks) {
            if !tasks.contains(&task.task.as_str()) {
                tasks.push(&task.task);
            }
        }
        let mut scores: Vec<Column> = tasks.iter().map(|task| score_column(&runs, task)).collect();
        let mut losses: Vec<Column> = tasks.iter().map(|task| loss_column(&runs, task)).collect();
        let mut ans = summary(&runs, "ANS", Unit::Rating, average_normalised_score);
        let mut mean_loss = summary(&runs, "mean nll", Unit::Nats, |scores| Some(mean_nll(scores)));
        if let Some(base) = baseline {
            for (stream, column) in scores.iter_mut().enumerate() {
                column.deltas = paired(&runs, base, column, &question, stream as u64, &mut notes);
            }
            losses.iter_mut().for_each(|column| column.deltas = unpaired(base, column));
            mean_loss.deltas = unpaired(base, &mean_loss);
            ans.deltas = ans_deltas(&scores, base, &ans);
        }
        scores.iter_mut().chain(&mut losses).chain([&mut ans, &mut mean_loss]).for_each(mark_best);
        notes.extend(left_out(&runs, &scores));
        Ok(Self { runs, question, scores, ans, losses, mean_loss, notes })
    }

    /// The columns of the table: a score for each task, ANS, mean loss.
    pub fn columns(&self) -> impl Iterator<Item = &Column> {
        self.scores.iter().chain([&self.ans, &self.mean_loss])
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

/// The mean over the tasks with a metric, each on a scale of 0 to 10; `None` when no task has one.
pub fn average_normalised_score(scores: &Scores) -> Option<f64> {
    let of = |task: &TaskScore| task.metric.as_ref().map(|m| Unit::of(&m.name).normalised(m.value));
    let values: Vec<f64> = scores.tasks.iter().filter_map(of).collect();
    mean(&values)
}

/// The mean loss over the tasks.
pub fn mean_nll(scores: &Scores) -> f64 {
    scores.tasks.iter().map(|t| t.nll.value).sum::<f64>() / scores.tasks.len() as f64
}

fn mean(values: &[f64]) -> Option<f64> {
    if values.is_empty() { None } else { Some(values.iter().sum::<f64>() / values.len() as f64) }
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
        Some(TaskScore { metric: Some(metric), .. }) => Cell::Value(metric.clone(), false),
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

fn summary(runs: &[Run], name: &str, unit: Unit, of: impl Fn(&Scores) -> Option<f64>) -> Column {
    let cell = |run: &Run| match of(&run.scores) {
        Some(value) => {
            let n = run.scores.tasks.len() as u64;
            Cell::Value(Figure { name: name.to_owned(), value, stderr: 0.0, n }, false)
        }
        None => Cell::Missing,
    };
    Column { task: None, figure: name.to_owned(), unit, cells: runs.iter().map(cell).collect(), deltas: Vec::new() }
}

/// The best value of a column, where it holds different ones.
fn mark_best(column: &mut Column) {
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

/// Differences without intervals.
fn unpaired(base: usize, column: &Column) -> Vec<Option<Delta>> {
    let of = column.cells[base].figure();
    let delta = |(i, cell): (usize, &Cell)| {
        let value = cell.figure()?.value - of?.value;
        (i != base).then(|| Delta { value, interval: None, rows: 0, means: Vec::new() })
    };
    column.cells.iter().enumerate().map(delta).collect()
}

/// Differences with their intervals where the rows of both runs are known.
fn paired(
    runs: &[Run],
    base: usize,
    column: &Column,
    question: &Question,
    stream: u64,
    notes: &mut Vec<String>,
) -> Vec<Option<Delta>> {
    let mut deltas = unpaired(base, column);
    for (i, delta) in deltas.iter_mut().enumerate() {
        let (Some(delta), Some(task)) = (delta, &column.task) else { continue };
        match differences(&runs[base], &runs[i], task, column.unit) {
            Ok(rows) => {
                let means = bootstrap::means(&rows, question.resamples, question.seed, stream);
                let all = [base, i].map(|run| column.cells[run].figure().map_or(0, |f| f.n)).into_iter().max();
                if Some(rows.len() as u64) != all {
                    delta.value = rows.iter().sum::<f64>() / rows.len() as f64;
                    notes.push(format!(
                        "{}, {task}: the difference is over the {} rows both have.",
                        runs[i].name,
                        rows.len()
                    ));
                }
                let interval = Some(bootstrap::interval(means.clone()));
                *delta = Delta { interval, rows: rows.len(), means, value: delta.value };
            }
            Err(reason) => notes.push(format!("{}, {task}: no paired interval: {reason}.", runs[i].name)),
        }
    }
    deltas
}

/// Score differences of the rows two runs have in common, in order of row; or why there are none.
fn differences(base: &Run, run: &Run, task: &str, unit: Unit) -> Result<Vec<f64>, String> {
    if unit == Unit::Nats {
        return Err("outputs.jsonl holds no losses".into());
    }
    let (base, run) = (row_scores(base, task)?, row_scores(run, task)?);
    let both: Vec<f64> = base.iter().filter_map(|(row, a)| Some(run.get(row)? - a)).collect();
    if both.is_empty() { Err("the runs have no row in common".into()) } else { Ok(both) }
}

/// The scores of a run's rows: checked to be what its figure was made from.
pub(crate) fn row_scores(run: &Run, task: &str) -> Result<std::collections::BTreeMap<u64, f64>, String> {
    let outputs = run.outputs.as_ref().ok_or_else(|| format!("{} has no outputs.jsonl", run.name))?;
    let rows: std::collections::BTreeMap<u64, f64> =
        outputs.get(task).into_iter().flatten().filter_map(|output| Some((output.row, output.score?))).collect();
    let figure = run.task(task).and_then(|t| t.metric.as_ref()).map_or(f64::NAN, |m| m.value);
    let values: Vec<f64> = rows.values().copied().collect();
    match mean(&values) {
        None => Err(format!("outputs.jsonl of {} has no scored rows of this task", run.name)),
        Some(value) if (value - figure).abs() < 1e-9 => Ok(rows),
        Some(_) => Err(format!("the figure of {} is not the mean of its rows' scores in outputs.jsonl", run.name)),
    }
}

/// Differences of ANS; their intervals combine the resamples of the tasks, where every task has some.
fn ans_deltas(scores: &[Column], base: usize, ans: &Column) -> Vec<Option<Delta>> {
    let mut deltas = unpaired(base, ans);
    let metrics: Vec<&Column> = scores.iter().filter(|c| c.unit != Unit::Nats).collect();
    for (i, delta) in deltas.iter_mut().enumerate() {
        let Some(delta) = delta else { continue };
        let of = |column: &&Column| {
            let means = &column.deltas[i].as_ref()?.means;
            (!means.is_empty()).then(|| means.iter().map(|m| column.unit.normalised(*m)).collect::<Vec<f64>>())
        };
        let Some(tasks) = metrics.iter().map(of).collect::<Option<Vec<_>>>().filter(|tasks| !tasks.is_empty()) else {
            continue;
        };
        let sum = |draw: usize| tasks.iter().map(|means| means[draw]).sum::<f64>() / tasks.len() as f64;
        let means: Vec<f64> = (0..tasks[0].len()).map(sum).collect();
        delta.interval = Some(bootstrap::interval(means));
    }
    deltas
}

/// Says which runs' ANS leaves out tasks that another's counts.
fn left_out(runs: &[Run], scores: &[Column]) -> Vec<String> {
    let of = |(i, run): (usize, &Run)| {
        let tasks: Vec<&str> = scores
            .iter()
            .filter(|c| c.unit != Unit::Nats && c.cells[i].figure().is_none())
            .filter_map(|c| c.task.as_deref())
            .collect();
        (!tasks.is_empty()).then(|| format!("ANS of {} leaves out {}.", run.name, tasks.join(", ")))
    };
    runs.iter().enumerate().filter_map(of).collect()
}
