//! What training on a second task does to the first: losses and gains over pairs of tasks, and the share of a baseline's loss that
//! a method avoids.

use anyhow::Result;
use cpift_core::BadInput;

use super::file::{Pair, PairRow};
use super::{File, Spread, scores_folder};
use crate::bootstrap;
use crate::comparison::Question;
use crate::runs::{Run, check_shared_tasks, differences_of_shared_tasks};
use crate::unit::Unit;

/// The losses and gains of every method.
#[derive(Debug, Clone)]
pub struct Forgetting {
    /// The unit of changes: percent where all metrics are fractions, points of 10 where a judge's ratings are among them.
    pub unit: Unit,
    /// The methods, in the file's order.
    pub methods: Vec<Method>,
    /// Which of them the others are compared with.
    pub baseline: Option<usize>,
    /// The pairs of tasks any method has, in order of appearance.
    pub pairs: Vec<(String, String)>,
    /// What the reader must know.
    pub notes: Vec<String>,
}

/// What one method forgot and gained.
#[derive(Debug, Clone)]
pub struct Method {
    /// Its name.
    pub name: String,
    /// One change a pair and seed.
    pub changes: Vec<Change>,
    /// ΔA of all of them.
    pub first: Spread,
    /// ΔB of all of them.
    pub second: Spread,
    /// The share of the baseline's loss that is avoided; none for the baseline itself and where it loses nothing.
    pub cut: Option<Cut>,
}

/// What a second task did.
#[derive(Debug, Clone)]
pub struct Change {
    /// The two tasks.
    pub pair: (String, String),
    /// The first task's metric after the second less after the first.
    pub first: f64,
    /// The second task's.
    pub second: f64,
}

/// A share of the baseline's loss.
#[derive(Debug, Clone, PartialEq)]
pub struct Cut {
    /// 1 − ΔA/ΔA of the baseline.
    pub value: f64,
    /// Its 95 % bootstrap interval over pairs of tasks.
    pub interval: Option<(f64, f64)>,
}

impl Method {
    /// The changes of one pair of tasks.
    pub fn of_pair<'a>(&'a self, pair: &'a (String, String)) -> impl Iterator<Item = &'a Change> {
        self.changes.iter().filter(move |change| change.pair == *pair)
    }
}

impl Forgetting {
    /// Reads the runs of `rows` and takes their differences.
    ///
    /// # Errors
    /// As [`super::Experiment::read`].
    pub fn new(file: &File, rows: &[PairRow], question: &Question, force: bool) -> Result<Self> {
        let runs = read(file, rows, force)?;
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
        let said = rows.iter().filter_map(|row| Some(format!("{}: {}", row.name, row.note.as_ref()?)));
        let notes = said.chain(differences_of_shared_tasks(&runs)).collect();
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

    /// How the intervals came to be.
    pub fn interval_words(&self, question: &Question) -> String {
        format!(
            "95 % bootstrap over pairs of tasks, each with all its seeds and the same for both methods; {} resamples, seed {}",
            question.resamples, question.seed
        )
    }

    /// Whether a pair of tasks has several seeds.
    pub fn has_seeds(&self) -> bool {
        self.methods.iter().any(|method| method.changes.len() > method.pairs())
    }
}

impl Method {
    /// How many pairs of tasks it has.
    pub fn pairs(&self) -> usize {
        self.changes.iter().map(|change| &change.pair).collect::<std::collections::BTreeSet<_>>().len()
    }
}

/// Two runs a pair, in the order of the file: after the first task, and after the second.
fn read(file: &File, rows: &[PairRow], force: bool) -> Result<Vec<Run>> {
    let mut runs = Vec::new();
    for (row, pair) in rows.iter().flat_map(|row| row.pairs.iter().map(move |pair| (row, pair))) {
        let after = format!("{} after {}", row.name, pair.first);
        let both = format!("{after} and {}", pair.second);
        for (name, folder) in [(after, &pair.after_first), (both, &pair.after_second)] {
            let path = scores_folder(file, &name, folder)?;
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
        BadInput::new(&run.path, format!("has no metric of {task}")).expected(format!(
            "a score of {}, as {} says",
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

/// The interval of a cut and how many draws have none; or why there is no interval.
fn interval(clusters: &[(f64, f64)], question: &Question) -> Result<((f64, f64), usize), &'static str> {
    if clusters.len() < 2 {
        return Err("no interval of the loss avoided: it is over one pair of tasks");
    }
    let drawn = bootstrap::ratios(clusters, question.resamples, question.seed);
    let cuts: Vec<f64> = drawn.iter().flatten().map(|ratio| 1.0 - ratio).collect();
    let left_out = drawn.len() - cuts.len();
    // A few draws without a loss of the baseline move no end of the interval far; many would.
    if left_out as f64 > 0.05 * drawn.len() as f64 {
        return Err("no interval of the loss avoided: in more than 5 % of the resamples the baseline forgets nothing");
    }
    Ok((bootstrap::interval(cuts), left_out))
}
