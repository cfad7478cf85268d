//! Rows of two runs matched by number: the difference of a figure with its interval, or why it has none.

use std::collections::BTreeMap;

use cpift_core::format::scores::TaskScore;

use crate::bootstrap::{self, Pair};
use crate::comparison::Question;
use crate::runs::Run;
use crate::unit::Unit;

/// The difference of a run to the baseline.
#[derive(Debug, Clone, PartialEq)]
pub struct Delta {
    /// Run minus baseline.
    pub value: f64,
    /// The 95 % paired bootstrap interval, where rows can be paired.
    pub interval: Option<(f64, f64)>,
    /// Rows that were paired.
    pub rows: usize,
    /// Differences of the resamples, for the interval of a mean over tasks.
    means: Vec<f64>,
}

impl Delta {
    /// A difference whose doubt is not known.
    pub fn alone(value: f64) -> Self {
        Self { value, interval: None, rows: 0, means: Vec::new() }
    }

    /// The mean of differences of several tasks, each brought to one scale; none where a task has none. Its interval combines the
    /// resamples of the tasks, where every task has some.
    pub fn over_tasks(tasks: &[(Unit, Option<&Self>)], scale: impl Fn(Unit, f64) -> f64) -> Option<Self> {
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

/// Two methods of which one is compared with the other: a run of each a seed.
pub struct Sides<'a> {
    /// What the one that is compared is called.
    pub name: &'a str,
    /// What it is compared with.
    pub base: &'a [Run],
    /// Its runs.
    pub run: &'a [Run],
    /// The most rows behind any of their figures.
    pub rows: u64,
}

/// What is drawn: a figure of a task; all figures of one `stream` get the same draws of rows.
pub struct Drawn<'a> {
    /// The task.
    pub task: &'a str,
    /// The figure's unit.
    pub unit: Unit,
    /// The stream of random numbers.
    pub stream: u64,
}

/// The draws of seeds that every difference is taken over; those of rows follow from the seed.
pub struct Draws {
    shares: Vec<Vec<f64>>,
    seed: u64,
}

impl Draws {
    /// The draws for `seeds` seeds a method.
    pub fn new(seeds: usize, question: &Question) -> Self {
        Self { shares: bootstrap::shares(seeds, question.resamples, question.seed), seed: question.seed }
    }

    /// Gives a difference its interval, or says why it has none. Where not all rows are in both, it becomes that of the rows that are.
    pub fn draw(&self, delta: &mut Delta, sides: &Sides<'_>, drawn: &Drawn<'_>, notes: &mut Vec<String>) {
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
        // Score, loss and perplexity of a task often lack an interval for one reason.
        notes.extend(note.filter(|note| !notes.contains(note)));
    }
}

/// The rows that all runs of both sides have, in order of row, seed by seed; or why there are none.
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
        // Drawn again and again it is always the same: no doubt would be left.
        1 => Err("the runs have one row in common".into()),
        _ => Ok(all),
    }
}

/// What each row of a run adds to its figure, as a sum and a weight: checked to be what the figure was made from.
fn rows(run: &Run, drawn: &Drawn<'_>) -> Result<BTreeMap<u64, [f64; 2]>, String> {
    let name = &run.name;
    let outputs = run.outputs.as_ref().ok_or_else(|| format!("{name} has no outputs.jsonl"))?;
    let lines = outputs.get(drawn.task).into_iter().flatten();
    let (loss, task) = (drawn.unit.is_loss(), run.task(drawn.task));
    let rows: BTreeMap<u64, [f64; 2]> = match loss {
        // A row none of whose target tokens fits is in no loss.
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
