//! Runs by tasks: values with their units, the best of each column, and differences to a baseline
//! with paired intervals. A unit has a format, a direction that is better, and a share in the
//! Average Normalised Score.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::format::scores::{MetricValue, TaskScore};
use serde_json::Value;

use crate::bootstrap::{self, Pair};
use crate::runs::{self, Run};

/// Settings of a comparison: the baseline, and the bootstrap of the differences to it.
#[derive(Debug, Clone)]
pub(crate) struct Question {
    /// The run the others are compared with.
    pub(crate) baseline: Option<String>,
    /// Resamples of the bootstrap.
    pub(crate) resamples: usize,
    /// Seed of the bootstrap.
    pub(crate) seed: u64,
}

impl Question {
    /// Checks the number of resamples.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] if it is out of range.
    pub(crate) fn check(&self) -> Result<()> {
        match self.resamples {
            1..=1_000_000 => Ok(()),
            _ => Err(usage("--resamples must be 1 to 1000000")),
        }
    }
}

/// The figures of one task, or of all tasks: one cell per run.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Column {
    /// The task; `None` for ANS and the mean loss.
    pub(crate) task: Option<String>,
    /// The figure's name: `acc`, `nll`, `ANS`.
    pub(crate) figure: String,
    /// Its unit.
    pub(crate) unit: Unit,
    /// One cell per run, in their order.
    pub(crate) cells: Vec<Cell>,
    /// One difference per run, if there is a baseline; `None` for the baseline itself and if either
    /// has no value.
    pub(crate) deltas: Vec<Option<Delta>>,
}

/// The value of one run.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Cell {
    /// A figure, and true if it is the best of its column.
    Value(MetricValue, bool),
    /// The task is scored by a judge, which has not read this run.
    NotJudged,
    /// A judge has read the run, but no reply contained a grade.
    NoGrade,
    /// The run has no such figure.
    Missing,
}

impl Cell {
    /// The figure, if there is one.
    pub(crate) fn figure(&self) -> Option<&MetricValue> {
        if let Self::Value(figure, _) = self { Some(figure) } else { None }
    }
}

/// Runs and their figures, side by side.
#[derive(Debug, Clone)]
pub(crate) struct Comparison {
    /// The runs, in the order given.
    pub(crate) runs: Vec<Run>,
    /// Baseline and bootstrap settings.
    pub(crate) question: Question,
    /// One column per task: its metric if any run has one, otherwise its loss.
    pub(crate) scores: Vec<Column>,
    /// The Average Normalised Score.
    pub(crate) ans: Column,
    /// The loss of every task.
    pub(crate) losses: Vec<Column>,
    /// The mean loss over the tasks.
    pub(crate) mean_loss: Column,
    /// Further figures of the same rows: other readings of a metric, its parts, perplexity, and the
    /// rows that scoring skipped or cut.
    pub(crate) also: Vec<Column>,
    /// Notes under the tables: intervals that cannot be given, means that leave tasks out.
    pub(crate) notes: Vec<String>,
}

impl Comparison {
    /// Compares `runs`.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] when the baseline is none of them, or there are no resamples.
    pub(crate) fn new(runs: Vec<Run>, question: Question) -> Result<Self> {
        let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
        let baseline = match &question.baseline {
            None => None,
            Some(name) => Some(
                names
                    .iter()
                    .position(|n| n == name)
                    .ok_or_else(|| usage(format!("--baseline {name} is not among the runs: {}", names.join(", "))))?,
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
    pub(crate) fn columns(&self) -> impl Iterator<Item = &Column> {
        self.scores.iter().chain([&self.ans, &self.mean_loss])
    }

    /// Every column, each once.
    pub(crate) fn all_columns(&self) -> impl Iterator<Item = &Column> {
        let shown = |c: &&Column| !self.scores.iter().any(|s| s.task == c.task && s.figure == c.figure);
        self.columns().chain(self.losses.iter().filter(shown)).chain(&self.also)
    }

    /// The baseline's place among the runs.
    pub(crate) fn baseline(&self) -> Option<usize> {
        self.runs.iter().position(|run| Some(&run.name) == self.question.baseline.as_ref())
    }

    /// Description of the intervals: method, resamples, seed.
    pub(crate) fn interval_text(&self) -> String {
        format!("95 % paired bootstrap over rows, {} resamples, seed {}", self.question.resamples, self.question.seed)
    }

    /// Number of rows behind each task's score; empty if nothing was scored. It differs between
    /// runs if a judge gave no grade.
    pub(crate) fn rows_text(&self) -> String {
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

/// Returns true if the settings of a task name a judge.
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
        // With --force runs may have other metrics; one on another scale does not belong in this
        // column.
        Some(TaskScore { metric: Some(metric), .. }) if Unit::of(&metric.name) == unit => {
            Cell::Value(metric.clone(), false)
        }
        Some(TaskScore { metric: Some(_), .. }) => Cell::Missing,
        // Null until a judge has read the run.
        Some(task) if unit == Unit::Rating => match task.settings.get("judge") {
            None | Some(Value::Null) => Cell::NotJudged,
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

/// The columns of a task's further figures, and of the counts that are above 0 in any run.
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

/// The mean over the tasks of `columns` that any run has a figure of. A run that lacks one of them
/// gets no mean: means over different tasks cannot be compared. ANS scales each figure to 0 to 10.
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

/// Marks the best values of a column, unless all are equal.
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

/// Differences without intervals. Counts have none: they say how much was scored, not how well.
fn unpaired(base: usize, column: &Column) -> Vec<Option<Delta>> {
    let of = column.cells[base].figure().filter(|_| column.unit != Unit::Count);
    let delta = |(i, cell): (usize, &Cell)| {
        let value = cell.figure()?.value - of?.value;
        (i != base).then(|| Delta::alone(value))
    };
    column.cells.iter().enumerate().map(delta).collect()
}

impl Column {
    /// The column's name in text tables: task, figure and unit.
    pub(crate) fn title(&self) -> String {
        match (&self.task, self.unit) {
            (Some(task), Unit::Nats) => format!("{task} nll"),
            (Some(task), unit) => format!("{task} {} {}", self.figure, unit.symbol()),
            (None, _) => self.figure.clone(),
        }
    }

    /// The cell of a run as tables show it.
    pub(crate) fn text(&self, run: usize) -> String {
        match &self.cells[run] {
            Cell::Value(f, _) if self.task.is_none() || self.unit == Unit::Count => self.unit.text(f.value),
            Cell::Value(f, _) => f.shown(|x| self.unit.text(*x)),
            Cell::NotJudged => "not judged".into(),
            Cell::NoGrade => "no grade".into(),
            Cell::Missing => "-".into(),
        }
    }

    /// Returns true if the cell of a run is the best of the column.
    pub(crate) fn is_best(&self, run: usize) -> bool {
        matches!(self.cells[run], Cell::Value(_, true))
    }

    /// Gives the differences their intervals if the rows of both runs are known.
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

/// Difference of a run to the baseline.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Delta {
    /// Run minus baseline.
    pub(crate) value: f64,
    /// The 95 % paired bootstrap interval, if rows can be paired.
    pub(crate) interval: Option<(f64, f64)>,
    /// Number of paired rows.
    pub(crate) rows: usize,
    /// Differences by resample, from which the interval of a mean over tasks is made.
    means: Vec<f64>,
}

impl Delta {
    /// A difference without an interval.
    pub(crate) fn alone(value: f64) -> Self {
        Self { value, interval: None, rows: 0, means: Vec::new() }
    }

    /// The difference with its interval, both with their signs.
    pub(crate) fn text(&self, unit: Unit) -> String {
        match self.interval {
            Some((low, high)) => {
                format!("{} [{}, {}]", unit.signed(self.value), unit.signed(low), unit.signed(high))
            }
            None => unit.signed(self.value),
        }
    }

    /// The mean of the differences of several tasks, each brought to one scale; `None` if a task
    /// has none. Its interval combines the resamples of the tasks, if every task has them.
    pub(crate) fn over_tasks(tasks: &[(Unit, Option<&Self>)], scale: impl Fn(Unit, f64) -> f64) -> Option<Self> {
        let tasks: Vec<(Unit, &Self)> =
            tasks.iter().map(|(unit, delta)| Some((*unit, (*delta)?))).collect::<Option<_>>()?;
        let draws = tasks.iter().map(|(_, delta)| delta.means.len()).min()?;
        let mean = |of: &dyn Fn(&Self) -> f64| {
            tasks.iter().map(|(unit, delta)| scale(*unit, of(delta))).sum::<f64>() / tasks.len() as f64
        };
        let means: Vec<f64> = (0..draws).map(|draw| mean(&|delta| delta.means[draw])).collect();
        let interval = (draws > 0).then(|| bootstrap::interval(means.clone()));
        Some(Self { value: mean(&|delta| delta.value), interval, rows: 0, means })
    }
}

/// A method and its baseline, each with one run per seed.
pub(crate) struct Sides<'a> {
    /// Name of the method.
    pub(crate) name: &'a str,
    /// Runs of the baseline.
    pub(crate) base: &'a [Run],
    /// Runs of the method.
    pub(crate) run: &'a [Run],
    /// Largest number of rows behind any of their figures.
    pub(crate) rows: u64,
}

/// The figure whose difference is resampled. All figures of one `stream` get the same draws of
/// rows.
pub(crate) struct Drawn<'a> {
    /// The task.
    pub(crate) task: &'a str,
    /// The figure's unit.
    pub(crate) unit: Unit,
    /// Stream of the random generator: the task's index.
    pub(crate) stream: u64,
}

/// The draws of seeds, shared by all differences of a comparison; the draws of rows follow from the
/// random seed.
pub(crate) struct Draws {
    shares: Vec<Vec<f64>>,
    seed: u64,
}

impl Draws {
    /// The draws for methods with `seeds` seeds each.
    pub(crate) fn new(seeds: usize, question: &Question) -> Self {
        Self { shares: bootstrap::shares(seeds, question.resamples, question.seed), seed: question.seed }
    }

    /// Sets the interval of a difference, or adds a note with the reason it has none. If some rows
    /// are not in all runs, the difference becomes that over the common rows.
    pub(crate) fn draw(&self, delta: &mut Delta, sides: &Sides<'_>, drawn: &Drawn<'_>, notes: &mut Vec<String>) {
        let (name, task) = (sides.name, drawn.task);
        let note = match pairs(sides, drawn) {
            Ok(rows) => {
                let difference = drawn.unit.difference();
                let means = bootstrap::two_way(&rows, &self.shares, self.seed, drawn.stream, difference);
                let interval = Some(bootstrap::interval(means.clone()));
                let partly = rows.len() as u64 != sides.rows;
                let value = if partly { bootstrap::difference(&rows, difference) } else { delta.value };
                *delta = Delta { interval, rows: rows.len(), means, value };
                let (what, whose) = (
                    if drawn.unit.is_loss() { "difference in loss" } else { "difference" },
                    if sides.run.len() > 1 { "that every run has" } else { "both have" },
                );
                partly.then(|| format!("{name}, {task}: the {what} is over the {} rows {whose}.", rows.len()))
            }
            Err(reason) => Some(format!("{name}, {task}: no paired interval: {reason}.")),
        };
        // Score, loss and perplexity of a task often lack an interval for the same reason.
        notes.extend(note.filter(|note| !notes.contains(note)));
    }
}

/// The rows that all runs of both sides have, ordered by row number, with one pair per seed; or the
/// reason there are none.
fn pairs(sides: &Sides<'_>, drawn: &Drawn<'_>) -> Result<Vec<Vec<Pair>>, String> {
    let scored: Vec<&TaskScore> = sides.base.iter().chain(sides.run).filter_map(|run| run.task(drawn.task)).collect();
    if scored.windows(2).any(|two| two[0].eval_digest != two[1].eval_digest) {
        return Err("their evaluation files differ".into());
    }
    let metric = |score: &TaskScore| score.metric.as_ref().map(|metric| metric.name.clone());
    if !drawn.unit.is_loss() && scored.windows(2).any(|two| metric(two[0]) != metric(two[1])) {
        return Err("their metrics differ".into());
    }
    let of = |runs: &[Run]| runs.iter().map(|run| rows(run, drawn)).collect::<Result<Vec<_>, _>>();
    let (base, run) = (of(sides.base)?, of(sides.run)?);
    let pair = |row: &u64| {
        base.iter().zip(&run).map(|(a, b)| Some(Pair { base: *a.get(row)?, run: *b.get(row)? })).collect::<Option<_>>()
    };
    let all: Vec<Vec<Pair>> = base[0].keys().filter_map(pair).collect();
    match all.len() {
        0 => Err("the runs have no row in common".into()),
        // Every resample would be the same row, and the interval a point.
        1 => Err("the runs have one row in common".into()),
        _ => Ok(all),
    }
}

/// Contribution of each row of a run to its figure, as a sum and a weight, checked to give that
/// figure.
fn rows(run: &Run, drawn: &Drawn<'_>) -> Result<BTreeMap<u64, [f64; 2]>, String> {
    let name = &run.name;
    let outputs = run.outputs.as_ref().ok_or_else(|| format!("{name} has no outputs.jsonl"))?;
    let lines = outputs.get(drawn.task).into_iter().flatten();
    let (loss, task) = (drawn.unit.is_loss(), run.task(drawn.task));
    let rows: BTreeMap<u64, [f64; 2]> = match loss {
        // A row without a target token that fits is not part of the loss.
        true => lines.filter_map(|o| Some((o.row, [o.nll?, o.targets.filter(|n| *n > 0)? as f64]))).collect(),
        false => lines.filter_map(|o| Some((o.row, [o.score?, 1.0]))).collect(),
    };
    if rows.is_empty() {
        return Err(match loss {
            true => format!("outputs.jsonl of {name} has no losses of this task's rows"),
            false => format!("outputs.jsonl of {name} has no scored rows of this task"),
        });
    }
    let figure = if loss { task.map(|t| t.nll.value) } else { task.and_then(|t| Some(t.metric.as_ref()?.value)) };
    let [sum, weight] = rows.values().fold([0.0, 0.0], |[sum, weight], [s, w]| [sum + s, weight + w]);
    let near = |figure: f64| (sum / weight - figure).abs() < 1e-9 * figure.abs().max(1.0);
    match figure.is_some_and(near) {
        true => Ok(rows),
        false if loss => Err(format!("the loss of {name} is not that of its rows in outputs.jsonl")),
        false => Err(format!("the figure of {name} is not the mean of its rows' scores in outputs.jsonl")),
    }
}

/// The formula printed under every table. The paper publishes none, so no match with its column is
/// claimed.
pub(crate) const ANS_FORMULA: &str = "ANS (Average Normalised Score): the mean over the tasks with a metric, each brought to 0 to 10: \
                               10 x metric for accuracy and CodeBLEU, the judge's rating as given. \
                               No parity with the paper's column is claimed: its formula is not published.";

/// The unit of a figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// A fraction, shown in percent; more is better.
    Percent,
    /// A judge's rating, 1 to 10; more is better.
    Rating,
    /// A negative log-likelihood in nats per token; less is better.
    Nats,
    /// A perplexity: e to the loss; less is better.
    Perplexity,
    /// A number of rows, neither good nor bad.
    Count,
}

impl Unit {
    /// The unit of the figure called `name` in scores.json.
    pub(crate) fn of(name: &str) -> Self {
        match name {
            "nll" => Self::Nats,
            "perplexity" => Self::Perplexity,
            name if name.starts_with("judge") => Self::Rating,
            _ => Self::Percent,
        }
    }

    /// The unit's symbol after a figure's name.
    pub(crate) fn symbol(self) -> &'static str {
        match self {
            Self::Percent => "%",
            Self::Rating => "of 10",
            Self::Nats => "nats",
            Self::Perplexity | Self::Count => "",
        }
    }

    /// The direction that is better: 1 upwards, -1 downwards.
    pub(crate) fn direction(self) -> f64 {
        if self.is_loss() { -1.0 } else { 1.0 }
    }

    /// Returns true if the figure comes from the loss on the reference answers.
    pub(crate) fn is_loss(self) -> bool {
        matches!(self, Self::Nats | Self::Perplexity)
    }

    /// The function that gives the difference between the baseline's figure and another's, each
    /// computed from rows. The rows of a perplexity give its loss, so the exponential is taken
    /// there.
    pub(crate) fn difference(self) -> fn(f64, f64) -> f64 {
        match self {
            Self::Perplexity => |base, run| run.exp() - base.exp(),
            _ => |base, run| run - base,
        }
    }

    /// A value in the unit that tables show: percent for fractions.
    pub(crate) fn shown(self, value: f64) -> f64 {
        if self == Self::Percent { 100.0 * value } else { value }
    }

    /// A value as text, without its symbol.
    pub(crate) fn text(self, value: f64) -> String {
        let text = self.rounded(value);
        // Rounding may leave a minus sign on zero.
        if is_zero(&text) { text.replace('-', "") } else { text }
    }

    /// A difference as text: with its sign.
    pub(crate) fn signed(self, value: f64) -> String {
        let text = self.rounded(value);
        match text.strip_prefix('-') {
            _ if is_zero(&text) => text.replace('-', ""),
            Some(text) => format!("−{text}"),
            None => format!("+{text}"),
        }
    }

    /// A perplexity may be of any size; large ones are written with an exponent.
    fn rounded(self, value: f64) -> String {
        let shown = self.shown(value);
        if self == Self::Perplexity && shown.abs() >= 1e6 {
            format!("{shown:.3e}")
        } else {
            format!("{shown:.*}", self.digits())
        }
    }

    fn digits(self) -> usize {
        match self {
            Self::Percent => 1,
            Self::Rating | Self::Perplexity => 2,
            Self::Nats => 4,
            Self::Count => 0,
        }
    }

    /// A metric on the scale of the Average Normalised Score, 0 to 10.
    pub(crate) fn normalised(self, value: f64) -> f64 {
        if self == Self::Percent { 10.0 * value } else { value }
    }
}

fn is_zero(text: &str) -> bool {
    text.chars().all(|c| matches!(c, '-' | '0' | '.'))
}

/// One value per seed, or per pair of tasks.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Spread {
    /// The values, in their order.
    pub(crate) values: Vec<f64>,
}

impl Spread {
    /// The mean.
    pub(crate) fn mean(&self) -> f64 {
        self.values.iter().sum::<f64>() / self.values.len() as f64
    }

    /// The sample standard deviation (n − 1); `None` for one value.
    pub(crate) fn sd(&self) -> Option<f64> {
        let (n, mean) = (self.values.len() as f64, self.mean());
        let squares: f64 = self.values.iter().map(|v| (v - mean).powi(2)).sum();
        (self.values.len() > 1).then(|| (squares / (n - 1.0)).sqrt())
    }

    /// `mean ± sd`, or the one value.
    pub(crate) fn text(&self, unit: Unit) -> String {
        unit.text(self.mean()) + &self.sd_text(unit)
    }

    /// As [`Spread::text`], with the sign of a difference.
    pub(crate) fn signed(&self, unit: Unit) -> String {
        unit.signed(self.mean()) + &self.sd_text(unit)
    }

    fn sd_text(&self, unit: Unit) -> String {
        self.sd().map_or(String::new(), |sd| format!(" ± {}", unit.text(sd)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_shown_in_their_unit_and_differences_with_a_sign() {
        assert_eq!((Unit::of("acc").text(0.755), Unit::of("nll").text(0.755)), ("75.5".into(), "0.7550".into()));
        assert_eq!(Unit::Percent.signed(-0.05), "−5.0");
        assert_eq!(Unit::Percent.signed(0.0001), "0.0");
        assert_eq!(Unit::Percent.signed(1.0), "+100.0");
        assert_eq!((Unit::Percent.text(-0.0001), Unit::Percent.text(-0.01)), ("0.0".into(), "-1.0".into()));
        assert_eq!((Unit::Perplexity.text(7.389), Unit::Perplexity.text(2.5e31)), ("7.39".into(), "2.500e31".into()));
        assert_eq!((Unit::Perplexity.signed(-0.5), Unit::Count.text(3.0)), ("−0.50".into(), "3".into()));
        assert_eq!(Unit::of("judge").normalised(7.5), 7.5);
        assert_eq!(Unit::of("codebleu").normalised(0.75), 7.5);
    }
}
