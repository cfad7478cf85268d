//! The scores of a run that can be compared with each other, and why the others cannot.

use anyhow::Result;
use cpift_core::error::usage;

use super::{entries, file_name, rank};
use crate::args::ReportArgs;
use crate::comparison::{Comparison, Question};
use crate::html::{escape, paragraph};
use crate::runs::{Run, conflict};

/// The run that others are compared with where none is named.
const BASE: &str = "base";

/// The scores of a run.
pub struct Compared {
    /// Those that are answers to the same questions; none where the run has none that can be read.
    pub comparison: Option<Comparison>,
    /// The others by name, each with the reason.
    pub left_out: Vec<(String, String)>,
}

impl Compared {
    /// The scores that are not in the tables, and why.
    pub fn left_out_list(&self) -> String {
        if self.left_out.is_empty() {
            return String::new();
        }
        let item = |(name, reason): &(String, String)| format!("<li>{}: {}</li>\n", escape(name), escape(reason));
        let items: String = self.left_out.iter().map(item).collect();
        format!(
            "{}<ul class=\"note left-out\">\n{items}</ul>\n",
            paragraph("Also under scores/, and in no table here:")
        )
    }
}

/// Compares the scores under RUN_DIR/scores that can be. `--force` replaces a page, it does not make runs comparable.
///
/// # Errors
/// [`cpift_core::Usage`] for a baseline that was not scored; a folder that cannot be listed.
pub fn compare(args: &ReportArgs) -> Result<Compared> {
    let (mut runs, mut left_out, mut names) = (Vec::new(), Vec::new(), Vec::new());
    for path in entries(&args.run.join("scores"))?.into_iter().filter(|path| path.join("scores.json").is_file()) {
        let name = file_name(&path);
        match Run::read(&name, &path, false) {
            Ok(run) => runs.push(run),
            Err(e) => left_out.push((name.clone(), format!("{e:#}"))),
        }
        names.push(name);
    }
    if let Some(name) = args.baseline.as_ref().filter(|name| !names.contains(name)) {
        let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        return Err(usage(format!("--baseline {name} is none of the scores under {}: {known}", args.run.display())));
    }
    runs.sort_by_key(|run| rank(&run.name));
    let chosen = chosen(&runs, args.baseline.as_deref());
    let (set, others): (Vec<_>, Vec<_>) = runs.into_iter().enumerate().partition(|(i, _)| chosen.contains(i));
    let set: Vec<Run> = set.into_iter().map(|(_, run)| run).collect();
    let reason = |run: Run| conflict(&set, &run).map(|(other, difference)| (run.name.clone(), difference.words(other)));
    left_out.extend(others.into_iter().filter_map(|(_, run)| reason(run)));
    if set.is_empty() {
        return Ok(Compared { comparison: None, left_out });
    }
    // A run without the baseline is shown without differences.
    let baseline = args.baseline.as_deref().unwrap_or(BASE);
    let baseline = set.iter().any(|run| run.name == baseline).then(|| baseline.to_owned());
    let question = Question { baseline, resamples: args.resamples, seed: args.seed };
    Ok(Compared { comparison: Some(Comparison::new(set, question)?), left_out })
}

/// The runs to be compared: those that go with the baseline; where none is named and nothing goes with the usual one, the most that go
/// with each other, the first such.
fn chosen(runs: &[Run], baseline: Option<&str>) -> Vec<usize> {
    let set_of = |name: &str| runs.iter().position(|run| run.name == name).map(|at| alike(runs, at));
    if let Some(set) = baseline.and_then(set_of) {
        return set;
    }
    if let Some(set) = set_of(BASE).filter(|set| set.len() > 1) {
        return set;
    }
    let largest = |best: Vec<usize>, set: Vec<usize>| if set.len() > best.len() { set } else { best };
    (0..runs.len()).map(|at| alike(runs, at)).fold(Vec::new(), largest)
}

/// The run at `at` and those that neither differ from it nor from each other, in order.
fn alike(runs: &[Run], at: usize) -> Vec<usize> {
    let mut set = vec![at];
    for (i, run) in runs.iter().enumerate().filter(|(i, _)| *i != at) {
        if conflict(set.iter().map(|i| &runs[*i]), run).is_none() {
            set.push(i);
        }
    }
    set.sort_unstable();
    set
}
