//! Scores over seeds: mean and standard deviation by task, and differences to a baseline by a paired two-way bootstrap.

use anyhow::Result;

use super::{Axis, File, ScoreRow, Spread, scored, scores_folder};
use crate::comparison::{self, Comparison, Delta, Question};
use crate::pairing::{Drawn, Draws, Sides};
use crate::runs::{Run, check_comparable};
use crate::text::cell_text;
use crate::unit::Unit;

/// The scores of every row of an experiment.
#[derive(Debug, Clone)]
pub struct Seeds {
    /// The methods, as the file has them.
    pub rows: Vec<ScoreRow>,
    /// What they are a sweep over.
    pub axis: Option<Axis>,
    /// Seeds of every row.
    pub seeds: usize,
    /// Which row each one is compared with: none where there is no baseline, and for the baseline itself.
    pub baselines: Vec<Option<usize>>,
    /// One column a task: its metric where any run has one, its loss where not.
    pub scores: Vec<Column>,
    /// The plain mean over the tasks, where all of them are fractions.
    pub mean: Option<Column>,
    /// The Average Normalised Score.
    pub ans: Column,
    /// The loss of every task.
    pub losses: Vec<Column>,
    /// The mean loss over the tasks.
    pub mean_loss: Column,
    /// Further figures of the same rows.
    pub also: Vec<Column>,
    /// The number of rows behind each task's score.
    pub rows_words: String,
    /// What the reader must know.
    pub notes: Vec<String>,
}

/// The figures of one task, or of all: one cell a row.
#[derive(Debug, Clone)]
pub struct Column {
    /// The task; none for means over tasks.
    pub task: Option<String>,
    /// The figure's name.
    pub figure: String,
    /// Its unit.
    pub unit: Unit,
    /// One cell a row.
    pub cells: Vec<Cell>,
    /// One difference to the baseline a row, where there is one.
    pub deltas: Vec<Option<Delta>>,
}

/// A figure of one row.
#[derive(Debug, Clone)]
pub enum Cell {
    /// One value a seed, and whether no other row has a better mean.
    Value(Spread, bool),
    /// What to show where a seed has none.
    Without(String),
}

impl Cell {
    /// The values, where every seed has one.
    pub fn spread(&self) -> Option<&Spread> {
        if let Self::Value(spread, _) = self { Some(spread) } else { None }
    }

    /// The cell as the tables show it, and whether it is the best.
    pub fn text(&self, unit: Unit) -> (String, bool) {
        match self {
            Self::Value(spread, best) => (spread.text(unit), *best),
            Self::Without(text) => (text.clone(), false),
        }
    }
}

impl Seeds {
    /// Reads the runs of `rows` and compares them.
    ///
    /// # Errors
    /// As [`super::Experiment::read`].
    pub fn new(file: &File, rows: &[ScoreRow], question: &Question, force: bool) -> Result<Self> {
        let seeds = rows[0].runs.len();
        let runs = read(file, rows, seeds, force)?;
        let flat = Comparison::new(runs, Question { baseline: None, ..question.clone() })?;
        let one = |column| over_seeds(column, seeds);
        let scores: Vec<Column> = flat.scores.iter().map(one).collect();
        let said = rows.iter().filter_map(|row| Some(format!("{}: {}", label(row), row.note.as_ref()?)));
        let mut all = Self {
            rows: rows.to_vec(),
            axis: file.head.axis.clone(),
            seeds,
            baselines: baselines(rows, file.head.baseline.as_deref()),
            mean: mean_column(&scores),
            scores,
            ans: over_seeds(&flat.ans, seeds),
            losses: flat.losses.iter().map(one).collect(),
            mean_loss: over_seeds(&flat.mean_loss, seeds),
            also: flat.also.iter().map(one).collect(),
            rows_words: flat.rows_words(),
            notes: said.chain(flat.notes.iter().cloned()).collect(),
        };
        if all.compared() {
            all.take_differences(&flat, question);
        }
        let Self { scores, mean, ans, losses, mean_loss, also, .. } = &mut all;
        scores.iter_mut().chain(losses).chain(also).chain(mean).chain([ans, mean_loss]).for_each(mark_best);
        Ok(all)
    }

    fn take_differences(&mut self, flat: &Comparison, question: &Question) {
        let draws = Draws::new(self.seeds, question);
        let tasks: Vec<Option<String>> = self.losses.iter().map(|column| column.task.clone()).collect();
        let labels: Vec<String> = self.rows.iter().map(label).collect();
        let scored = self.scores.iter_mut().zip(&flat.scores).chain(self.losses.iter_mut().zip(&flat.losses));
        for (column, flat_column) in scored.chain(self.also.iter_mut().zip(&flat.also)) {
            column.deltas = unpaired(&self.baselines, column);
            // Further figures are not kept by row, but for the perplexity, which is the loss.
            let kept = column.unit.is_loss() || !flat.also.contains(flat_column);
            let (Some(task), true) = (&column.task, kept) else { continue };
            let stream = tasks.iter().position(|other| *other == column.task).unwrap_or(0) as u64;
            let drawn = Drawn { task, unit: column.unit, stream };
            for (i, delta) in column.deltas.iter_mut().enumerate() {
                let (Some(delta), Some(base)) = (delta, self.baselines[i]) else { continue };
                let of = |row: usize| row * self.seeds..(row + 1) * self.seeds;
                let cells = [base, i].into_iter().flat_map(|row| &flat_column.cells[of(row)]);
                let rows = cells.filter_map(|cell| Some(cell.figure()?.n)).max().unwrap_or(0);
                let sides = Sides { name: &labels[i], base: &flat.runs[of(base)], run: &flat.runs[of(i)], rows };
                draws.draw(delta, &sides, &drawn, &mut self.notes);
            }
        }
        let metrics: Vec<&Column> = self.scores.iter().filter(|c| !c.unit.is_loss()).collect();
        self.ans.deltas = over_tasks(&metrics, &self.ans, Unit::normalised);
        self.mean_loss.deltas = over_tasks(&self.losses.iter().collect::<Vec<_>>(), &self.mean_loss, Unit::normalised);
        if let Some(mean) = &mut self.mean {
            mean.deltas = over_tasks(&metrics, mean, |_, value| value);
        }
    }

    /// Whether any row has another to be compared with.
    pub fn compared(&self) -> bool {
        self.baselines.iter().any(Option::is_some)
    }

    /// The columns of the table: a score for each task, their mean, ANS, mean loss.
    pub fn columns(&self) -> impl Iterator<Item = &Column> {
        self.scores.iter().chain(&self.mean).chain([&self.ans, &self.mean_loss])
    }

    /// Every column, each once.
    pub fn all_columns(&self) -> impl Iterator<Item = &Column> {
        let shown = |c: &&Column| !self.scores.iter().any(|s| s.task == c.task && s.figure == c.figure);
        self.columns().chain(self.losses.iter().filter(shown)).chain(&self.also)
    }

    /// The one column that stands for all tasks: their mean, or ANS, or the mean loss.
    pub fn overall(&self) -> &Column {
        let has = |column: &&Column| column.cells.iter().any(|cell| cell.spread().is_some());
        self.mean.iter().chain([&self.ans]).find(has).unwrap_or(&self.mean_loss)
    }

    /// How the intervals came to be.
    pub fn interval_words(&self, question: &Question) -> String {
        let draws = format!("{} resamples, seed {}", question.resamples, question.seed);
        match self.seeds {
            1 => format!("95 % paired bootstrap over rows, {draws}"),
            n => format!(
                "95 % paired two-way bootstrap: the {n} seeds and, for each task on its own, its rows are drawn with replacement, the \
                 same for both methods; {draws}"
            ),
        }
    }

    /// The rows of scores and the seeds behind the table.
    pub fn spread_words(&self) -> String {
        let seeds = match self.seeds {
            1 => "One seed.".to_owned(),
            n => format!("{n} seeds: mean ± sample standard deviation over them."),
        };
        format!("{} {seeds}", self.rows_words).trim_start().to_owned()
    }
}

/// What a row is called where its name alone may not tell it from others.
fn label(row: &ScoreRow) -> String {
    row.x.map_or(row.name.clone(), |x| format!("{} at {x}", row.name))
}

fn read(file: &File, rows: &[ScoreRow], seeds: usize, force: bool) -> Result<Vec<Run>> {
    let mut runs = Vec::new();
    for row in rows {
        for (i, folder) in row.runs.iter().enumerate() {
            let name = if seeds == 1 { label(row) } else { format!("{}, seed {}", label(row), i + 1) };
            let path = scores_folder(file, &name, folder)?;
            runs.push(scored(name, &path, force)?);
        }
    }
    if !force {
        check_comparable(&runs)?;
    }
    Ok(runs)
}

/// The row of the baseline's name; where a sweep has several, the one at the same place.
fn baselines(rows: &[ScoreRow], name: Option<&str>) -> Vec<Option<usize>> {
    let named = |row: &ScoreRow| Some(row.name.as_str()) == name;
    let alone = rows.iter().filter(|row| named(row)).count() == 1;
    let of = |row: &ScoreRow| rows.iter().position(|other| named(other) && (alone || other.x == row.x));
    rows.iter().map(|row| if named(row) { None } else { of(row) }).collect()
}

fn over_seeds(column: &comparison::Column, seeds: usize) -> Column {
    let cell = |(row, cells): (usize, &[comparison::Cell])| match cells.iter().position(|cell| cell.figure().is_none())
    {
        Some(at) => Cell::Without(cell_text(column, row * seeds + at)),
        None => {
            let values = cells.iter().filter_map(|cell| Some(cell.figure()?.value)).collect();
            Cell::Value(Spread { values }, false)
        }
    };
    let (task, figure, unit) = (column.task.clone(), column.figure.clone(), column.unit);
    Column { task, figure, unit, cells: column.cells.chunks(seeds).enumerate().map(cell).collect(), deltas: Vec::new() }
}

fn mean_column(scores: &[Column]) -> Option<Column> {
    if scores.iter().any(|c| c.unit != Unit::Percent) {
        return None;
    }
    let cell = |row: usize| {
        let Some(tasks) = scores.iter().map(|c| c.cells[row].spread()).collect::<Option<Vec<_>>>() else {
            return Cell::Without("-".into());
        };
        let of = |seed: usize| tasks.iter().map(|task| task.values[seed]).sum::<f64>() / tasks.len() as f64;
        Cell::Value(Spread { values: (0..tasks[0].values.len()).map(of).collect() }, false)
    };
    let cells = (0..scores.first()?.cells.len()).map(cell).collect();
    Some(Column { task: None, figure: "mean".into(), unit: Unit::Percent, cells, deltas: Vec::new() })
}

/// The best mean of a column, where it holds different ones.
fn mark_best(column: &mut Column) {
    if column.unit == Unit::Count {
        return;
    }
    let direction = column.unit.direction();
    let values = column.cells.iter().filter_map(|cell| Some(direction * cell.spread()?.mean()));
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    for cell in &mut column.cells {
        if let Cell::Value(spread, best) = cell {
            *best = low < high && direction * spread.mean() == high;
        }
    }
}

/// Differences without intervals; a count has none.
fn unpaired(baselines: &[Option<usize>], column: &Column) -> Vec<Option<Delta>> {
    let delta = |(cell, base): (&Cell, &Option<usize>)| {
        let value = cell.spread()?.mean() - column.cells[(*base)?].spread()?.mean();
        (column.unit != Unit::Count).then(|| Delta::alone(value))
    };
    column.cells.iter().zip(baselines).map(delta).collect()
}

/// Differences of a mean over the tasks that any row has a figure of.
fn over_tasks(tasks: &[&Column], mean: &Column, scale: impl Fn(Unit, f64) -> f64) -> Vec<Option<Delta>> {
    let counted: Vec<&&Column> = tasks.iter().filter(|c| c.cells.iter().any(|cell| cell.spread().is_some())).collect();
    let delta = |row: usize| {
        let deltas: Vec<_> = counted.iter().map(|c| (c.unit, c.deltas[row].as_ref())).collect();
        mean.cells[row].spread().and_then(|_| Delta::over_tasks(&deltas, &scale))
    };
    (0..mean.cells.len()).map(delta).collect()
}
