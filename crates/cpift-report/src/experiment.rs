//! Experiments over seeds: mean scores of methods, or forgetting, with the uncertainty from seeds,
//! rows and pairs of tasks.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::Result;
use cpift_core::BadInput;

use crate::bootstrap;
use crate::comparison::{self, Comparison, Delta, Drawn, Draws, Question, Sides, Spread, Unit};
use crate::experiment_file::{Axis, File, Head, Pair, PairRow, Rows, ScoreRow};
use crate::runs::{Run, check_comparable, check_shared_tasks, differences_of_shared_tasks};

/// An experiment and its outcome.
#[derive(Debug, Clone)]
pub(crate) struct Experiment {
    /// Name, question and baseline.
    pub(crate) head: Head,
    /// Baseline and bootstrap settings.
    pub(crate) question: Question,
    /// The results.
    pub(crate) outcome: Outcome,
}

/// The results of an experiment, by its kind.
#[derive(Debug, Clone)]
pub(crate) enum Outcome {
    /// Scores over seeds.
    Scores(Box<SeedScores>),
    /// Changes through training on a second task.
    Forgetting(Forgetting),
}

impl Experiment {
    /// Reads an experiment's file and the scores it names.
    ///
    /// # Errors
    /// [`BadInput`] when a file cannot be read or, without `force`, when the runs are not
    /// comparable; [`cpift_core::Usage`] for a number of resamples out of range.
    pub(crate) fn read(path: &Path, question: Question, force: bool) -> Result<Self> {
        question.check()?;
        let file = File::read(path)?;
        let question = Question { baseline: file.head.baseline.clone(), ..question };
        let outcome = match &file.rows {
            Rows::Scores(rows) => Outcome::Scores(Box::new(SeedScores::new(&file, rows, &question, force)?)),
            Rows::Forgetting(rows) => Outcome::Forgetting(Forgetting::new(&file, rows, &question, force)?),
        };
        Ok(Self { head: file.head, question, outcome })
    }
}

/// The scores of every row of an experiment.
#[derive(Debug, Clone)]
pub(crate) struct SeedScores {
    /// The methods, in the file's order.
    pub(crate) rows: Vec<ScoreRow>,
    /// The axis, if they are a sweep.
    pub(crate) axis: Option<Axis>,
    /// Number of seeds of every row.
    pub(crate) seeds: usize,
    /// Index of the baseline of each row; `None` without one and for the baseline itself.
    pub(crate) baselines: Vec<Option<usize>>,
    /// One column per task: its metric if any run has one, otherwise its loss.
    pub(crate) scores: Vec<Column>,
    /// The plain mean over the tasks, if all metrics are fractions.
    pub(crate) mean: Option<Column>,
    /// The Average Normalised Score.
    pub(crate) ans: Column,
    /// The loss of every task.
    pub(crate) losses: Vec<Column>,
    /// The mean loss over the tasks.
    pub(crate) mean_loss: Column,
    /// Further figures of the same rows.
    pub(crate) also: Vec<Column>,
    /// Sentence with the number of rows behind each task's score.
    pub(crate) rows_text: String,
    /// Notes under the tables.
    pub(crate) notes: Vec<String>,
}

/// The figures of one task, or of all tasks: one cell per row.
#[derive(Debug, Clone)]
pub(crate) struct Column {
    /// The task; `None` for means over tasks.
    pub(crate) task: Option<String>,
    /// The figure's name.
    pub(crate) figure: String,
    /// Its unit.
    pub(crate) unit: Unit,
    /// One cell per row.
    pub(crate) cells: Vec<Cell>,
    /// One difference to the baseline per row.
    pub(crate) deltas: Vec<Option<Delta>>,
}

/// A figure of one row.
#[derive(Debug, Clone)]
pub(crate) enum Cell {
    /// One value per seed, and true if no other row has a better mean.
    Value(Spread, bool),
    /// The text to show if a seed has no value.
    Without(String),
}

impl Cell {
    /// The values, if every seed has one.
    pub(crate) fn spread(&self) -> Option<&Spread> {
        if let Self::Value(spread, _) = self { Some(spread) } else { None }
    }

    /// The cell as tables show it, and true if it is the best.
    pub(crate) fn text(&self, unit: Unit) -> (String, bool) {
        match self {
            Self::Value(spread, best) => (spread.text(unit), *best),
            Self::Without(text) => (text.clone(), false),
        }
    }
}

impl SeedScores {
    /// Reads the runs of `rows` and compares them.
    ///
    /// # Errors
    /// As [`Experiment::read`].
    pub(crate) fn new(file: &File, rows: &[ScoreRow], question: &Question, force: bool) -> Result<Self> {
        let seeds = rows[0].runs.len();
        let runs = read(file, rows, seeds, force)?;
        let flat = Comparison::new(runs, Question { baseline: None, ..question.clone() })?;
        let one = |column| over_seeds(column, seeds);
        let scores: Vec<Column> = flat.scores.iter().map(one).collect();
        let row_notes = rows.iter().filter_map(|row| Some(format!("{}: {}", label(row), row.note.as_ref()?)));
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
            rows_text: flat.rows_text(),
            notes: row_notes.chain(flat.notes.iter().cloned()).collect(),
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
            // Further figures are not recorded by row, except the perplexity, which comes from the
            // loss.
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

    /// Returns true if any row has a baseline.
    pub(crate) fn compared(&self) -> bool {
        self.baselines.iter().any(Option::is_some)
    }

    /// The columns of the table: a score for each task, their mean, ANS, mean loss.
    pub(crate) fn columns(&self) -> impl Iterator<Item = &Column> {
        self.scores.iter().chain(&self.mean).chain([&self.ans, &self.mean_loss])
    }

    /// Every column, each once.
    pub(crate) fn all_columns(&self) -> impl Iterator<Item = &Column> {
        let shown = |c: &&Column| !self.scores.iter().any(|s| s.task == c.task && s.figure == c.figure);
        self.columns().chain(self.losses.iter().filter(shown)).chain(&self.also)
    }

    /// The column that summarizes all tasks: their mean, ANS, or the mean loss.
    pub(crate) fn overall(&self) -> &Column {
        let has = |column: &&Column| column.cells.iter().any(|cell| cell.spread().is_some());
        self.mean.iter().chain([&self.ans]).find(has).unwrap_or(&self.mean_loss)
    }

    /// Description of the intervals: method, resamples, seed.
    pub(crate) fn interval_text(&self, question: &Question) -> String {
        let draws = format!("{} resamples, seed {}", question.resamples, question.seed);
        match self.seeds {
            1 => format!("95 % paired bootstrap over rows, {draws}"),
            n => format!(
                "95 % paired two-way bootstrap: the {n} seeds and, for each task on its own, its rows are drawn with replacement, the \
                 same for both methods; {draws}"
            ),
        }
    }

    /// Sentence with the numbers of rows and seeds behind the table.
    pub(crate) fn spread_text(&self) -> String {
        let seeds = match self.seeds {
            1 => "One seed.".to_owned(),
            n => format!("{n} seeds: mean ± sample standard deviation over them."),
        };
        format!("{} {seeds}", self.rows_text).trim_start().to_owned()
    }
}

/// The row's name, with its position in a sweep.
fn label(row: &ScoreRow) -> String {
    row.x.map_or(row.name.clone(), |x| format!("{} at {x}", row.name))
}

fn read(file: &File, rows: &[ScoreRow], seeds: usize, force: bool) -> Result<Vec<Run>> {
    let mut runs = Vec::new();
    for row in rows {
        for (i, folder) in row.runs.iter().enumerate() {
            let name = if seeds == 1 { label(row) } else { format!("{}, seed {}", label(row), i + 1) };
            let path = file.scores_dir(&name, folder)?;
            runs.push(Run::read(&name, &path, force)?.without_texts());
        }
    }
    if !force {
        check_comparable(&runs)?;
    }
    Ok(runs)
}

/// The baseline of each row; if a sweep has several, the one at the same x.
fn baselines(rows: &[ScoreRow], name: Option<&str>) -> Vec<Option<usize>> {
    let named = |row: &ScoreRow| Some(row.name.as_str()) == name;
    let alone = rows.iter().filter(|row| named(row)).count() == 1;
    let of = |row: &ScoreRow| rows.iter().position(|other| named(other) && (alone || other.x == row.x));
    rows.iter().map(|row| if named(row) { None } else { of(row) }).collect()
}

fn over_seeds(column: &comparison::Column, seeds: usize) -> Column {
    let cell = |(row, cells): (usize, &[comparison::Cell])| match cells.iter().position(|cell| cell.figure().is_none())
    {
        Some(at) => Cell::Without(column.text(row * seeds + at)),
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

/// Marks the best means of a column, unless all are equal.
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

/// Differences without intervals; counts have none.
fn unpaired(baselines: &[Option<usize>], column: &Column) -> Vec<Option<Delta>> {
    let delta = |(cell, base): (&Cell, &Option<usize>)| {
        let value = cell.spread()?.mean() - column.cells[(*base)?].spread()?.mean();
        (column.unit != Unit::Count).then(|| Delta::alone(value))
    };
    column.cells.iter().zip(baselines).map(delta).collect()
}

/// Differences of a mean over the tasks of which any row has a figure.
fn over_tasks(tasks: &[&Column], mean: &Column, scale: impl Fn(Unit, f64) -> f64) -> Vec<Option<Delta>> {
    let counted: Vec<&&Column> = tasks.iter().filter(|c| c.cells.iter().any(|cell| cell.spread().is_some())).collect();
    let delta = |row: usize| {
        let deltas: Vec<_> = counted.iter().map(|c| (c.unit, c.deltas[row].as_ref())).collect();
        mean.cells[row].spread().and_then(|_| Delta::over_tasks(&deltas, &scale))
    };
    (0..mean.cells.len()).map(delta).collect()
}

/// Changes of scores through training on a second task, by method.
#[derive(Debug, Clone)]
pub(crate) struct Forgetting {
    /// Unit of the changes: percent if all metrics are fractions, points of 10 if any is a judge's
    /// rating.
    pub(crate) unit: Unit,
    /// The methods, in the file's order.
    pub(crate) methods: Vec<Method>,
    /// Index of the baseline.
    pub(crate) baseline: Option<usize>,
    /// Pairs of tasks of any method, in order of appearance.
    pub(crate) pairs: Vec<(String, String)>,
    /// Notes under the tables.
    pub(crate) notes: Vec<String>,
}

/// The changes of one method.
#[derive(Debug, Clone)]
pub(crate) struct Method {
    /// Name of the method.
    pub(crate) name: String,
    /// One change per pair and seed.
    pub(crate) changes: Vec<Change>,
    /// ΔA of all changes.
    pub(crate) first: Spread,
    /// ΔB of all changes.
    pub(crate) second: Spread,
    /// Share of the baseline's loss that is avoided; `None` for the baseline itself and if it loses
    /// nothing.
    pub(crate) cut: Option<Cut>,
}

/// Change through training on a second task.
#[derive(Debug, Clone)]
pub(crate) struct Change {
    /// First and second task.
    pub(crate) pair: (String, String),
    /// ΔA: the first task's metric after the second task, less that after the first.
    pub(crate) first: f64,
    /// ΔB: the same difference of the second task's metric.
    pub(crate) second: f64,
}

/// Share of the baseline's loss that a method avoids.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Cut {
    /// 1 − ΔA/ΔA of the baseline.
    pub(crate) value: f64,
    /// The 95 % bootstrap interval over pairs of tasks.
    pub(crate) interval: Option<(f64, f64)>,
}

impl Method {
    /// The changes of one pair of tasks.
    pub(crate) fn of_pair<'a>(&'a self, pair: &'a (String, String)) -> impl Iterator<Item = &'a Change> {
        self.changes.iter().filter(move |change| change.pair == *pair)
    }

    /// Number of pairs of tasks.
    pub(crate) fn pairs(&self) -> usize {
        self.changes.iter().map(|change| &change.pair).collect::<BTreeSet<_>>().len()
    }
}

impl Forgetting {
    /// Reads the runs of `rows` and takes their differences.
    ///
    /// # Errors
    /// As [`Experiment::read`].
    pub(crate) fn new(file: &File, rows: &[PairRow], question: &Question, force: bool) -> Result<Self> {
        let runs = read_pairs(file, rows, force)?;
        let unit = unit(file, rows, &runs)?;
        let mut methods = Vec::new();
        let mut left = runs.chunks(2);
        for row in rows {
            let pairs = row.pairs.iter().zip(&mut left);
            let changes: Vec<Change> =
                pairs.map(|(pair, runs)| change(file, pair, runs, unit)).collect::<Result<_>>()?;
            let spread = |of: fn(&Change) -> f64| Spread { values: changes.iter().map(of).collect() };
            let (first, second) = (spread(|c| c.first), spread(|c| c.second));
            methods.push(Method { name: row.name.clone(), first, second, cut: None, changes });
        }
        let mut pairs: Vec<(String, String)> = Vec::new();
        for change in methods.iter().flat_map(|method| &method.changes) {
            if !pairs.contains(&change.pair) {
                pairs.push(change.pair.clone());
            }
        }
        let row_notes = rows.iter().filter_map(|row| Some(format!("{}: {}", row.name, row.note.as_ref()?)));
        let notes = row_notes.chain(differences_of_shared_tasks(&runs)).collect();
        let baseline = rows.iter().position(|row| Some(&row.name) == file.head.baseline.as_ref());
        let mut all = Self { unit, methods, baseline, pairs, notes };
        all.take_cuts(question);
        Ok(all)
    }

    fn take_cuts(&mut self, question: &Question) {
        let Some(base) = self.baseline else { return };
        let base = self.methods[base].clone();
        if base.first.mean() >= 0.0 {
            self.notes.push(format!("{} forgets nothing: there is no loss to avoid.", base.name));
            return;
        }
        for method in self.methods.iter_mut().filter(|method| method.name != base.name) {
            method.cut = cut(method, &base, &self.pairs, question, &mut self.notes);
        }
    }

    /// Description of the intervals: method, resamples, seed.
    pub(crate) fn interval_text(&self, question: &Question) -> String {
        format!(
            "95 % bootstrap over pairs of tasks, each with all its seeds and the same for both methods; {} resamples, seed {}",
            question.resamples, question.seed
        )
    }

    /// Returns true if a pair of tasks has several seeds.
    pub(crate) fn has_seeds(&self) -> bool {
        self.methods.iter().any(|method| method.changes.len() > method.pairs())
    }
}

/// Reads two runs per pair, in the order of the file: after the first task, and after the second.
fn read_pairs(file: &File, rows: &[PairRow], force: bool) -> Result<Vec<Run>> {
    let mut runs = Vec::new();
    for (row, pair) in rows.iter().flat_map(|row| row.pairs.iter().map(move |pair| (row, pair))) {
        let after = format!("{} after {}", row.name, pair.first);
        let both = format!("{after} and {}", pair.second);
        for (name, folder) in [(after, &pair.after_first), (both, &pair.after_second)] {
            let path = file.scores_dir(&name, folder)?;
            runs.push(Run::read_scores(&name, &path, force)?);
        }
    }
    if !force {
        check_shared_tasks(&runs)?;
    }
    Ok(runs)
}

fn unit(file: &File, rows: &[PairRow], runs: &[Run]) -> Result<Unit> {
    let mut unit = Unit::Percent;
    for (pair, runs) in rows.iter().flat_map(|row| &row.pairs).zip(runs.chunks(2)) {
        for (run, task) in runs.iter().flat_map(|run| [(run, &pair.first), (run, &pair.second)]) {
            if metric(file, run, task)?.0 == Unit::Rating {
                unit = Unit::Rating;
            }
        }
    }
    Ok(unit)
}

/// A task's metric and its unit.
fn metric(file: &File, run: &Run, task: &str) -> Result<(Unit, f64)> {
    let found = run.task(task).and_then(|score| score.metric.as_ref());
    let metric = found.ok_or_else(|| {
        BadInput::new(&run.path, format!("no metric of {task}")).expected(format!(
            "a score of {}, which {} names",
            run.name,
            file.path.display()
        ))
    })?;
    Ok((Unit::of(&metric.name), metric.value))
}

fn change(file: &File, pair: &Pair, runs: &[Run], unit: Unit) -> Result<Change> {
    let of = |task: &str| -> Result<f64> {
        let [before, after] = [metric(file, &runs[0], task)?, metric(file, &runs[1], task)?]
            .map(|(own, value)| if unit == Unit::Rating { own.normalised(value) } else { value });
        Ok(after - before)
    };
    let (first, second) = (of(&pair.first)?, of(&pair.second)?);
    Ok(Change { pair: (pair.first.clone(), pair.second.clone()), first, second })
}

/// The share of the baseline's loss that `method` avoids, over the pairs and seeds both have.
fn cut(
    method: &Method,
    base: &Method,
    pairs: &[(String, String)],
    question: &Question,
    notes: &mut Vec<String>,
) -> Option<Cut> {
    let mut matched = 0;
    let mut clusters: Vec<(f64, f64)> = Vec::new();
    for pair in pairs {
        let both: Vec<(f64, f64)> =
            method.of_pair(pair).zip(base.of_pair(pair)).map(|(a, b)| (a.first, b.first)).collect();
        matched += both.len();
        clusters.extend((!both.is_empty()).then(|| both.iter().fold((0.0, 0.0), |sum, d| (sum.0 + d.0, sum.1 + d.1))));
    }
    if matched != method.changes.len() || matched != base.changes.len() {
        notes.push(format!(
            "{}: the loss avoided is over the {matched} pairs and seeds that {} has too.",
            method.name, base.name
        ));
    }
    let sum = clusters.iter().fold((0.0, 0.0), |sum, d| (sum.0 + d.0, sum.1 + d.1));
    if sum.1 >= 0.0 {
        notes.push(format!("{}: on those, {} forgets nothing.", method.name, base.name));
        return None;
    }
    let interval = match interval(&clusters, question) {
        Ok((ends, left_out)) => {
            if left_out > 0 {
                notes.push(format!(
                    "{}: {left_out} resamples in which {} forgets nothing are left out.",
                    method.name, base.name
                ));
            }
            Some(ends)
        }
        Err(why) => {
            notes.push(format!("{}: {why}.", method.name));
            None
        }
    };
    Some(Cut { value: 1.0 - sum.0 / sum.1, interval })
}

/// The interval of a cut and the number of draws without one; or the reason there is no interval.
fn interval(clusters: &[(f64, f64)], question: &Question) -> Result<((f64, f64), usize), &'static str> {
    if clusters.len() < 2 {
        return Err("no interval of the loss avoided: it is over one pair of tasks");
    }
    let drawn = bootstrap::ratios(clusters, question.resamples, question.seed);
    let cuts: Vec<f64> = drawn.iter().flatten().map(|ratio| 1.0 - ratio).collect();
    let left_out = drawn.len() - cuts.len();
    // A few draws in which the baseline forgets nothing hardly move the ends of the interval; many
    // would.
    if left_out as f64 > 0.05 * drawn.len() as f64 {
        return Err("no interval of the loss avoided: in more than 5 % of the resamples the baseline forgets nothing");
    }
    Ok((bootstrap::interval(cuts), left_out))
}
