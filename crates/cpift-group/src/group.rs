//! The stage: from masks to groups.json, the similarities by layer, and their heat maps.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Result;
use cpift_core::BadInput;
use cpift_core::files::StagedFile;
use cpift_core::format::digest::Digest;
use cpift_core::format::groups::{FORMAT_VERSION, Groups, Order, Parting, TauMode, WithoutTies};
use cpift_core::format::json;
use cpift_core::record::provenance::Recorder;

use crate::args::{Args, Method, Tau};
use crate::heatmaps::{self, Layers};
use crate::order::{Ordered, ascending, by_edges, by_help, mean_loss, named, random};
use crate::overlap::{Counts, Overlap, Regions};
use crate::partition::{Interval, Partition, Sweep, components, is_trivial, most_stable_tau, rows, sweep};
use crate::plan::{OrderInput, Outputs, Plan};

/// The paper's τ, used if `--tau auto` finds none.
const DEFAULT_TAU: f64 = 0.1;

/// Result of a run.
pub(crate) struct Outcome {
    /// Content of groups.json; `None` if nothing was written.
    pub(crate) groups: Option<Groups>,
    /// The groups for every interval of τ, with `--sweep`.
    pub(crate) sweep: Option<Sweep>,
}

/// Runs the stage: nothing is written unless all of it succeeds.
///
/// # Errors
/// [`cpift_core::Usage`] for arguments that do not go together; [`BadInput`] for unusable or
/// unrelated masks, order inputs that do not fit the tasks, or an output that exists; I/O errors.
pub(crate) fn group(args: &Args) -> Result<Outcome> {
    let mut recorder = Recorder::start(env!("CARGO_PKG_NAME"));
    let plan = Plan::new(args, &mut recorder)?;
    let regions = Regions::new(&plan.masks, &plan.excluded);
    // Digests are recorded in the outputs only.
    let (overlap, digests) = match plan.outputs {
        Some(_) => regions.count_and_hash()?,
        None => (regions.count()?, Vec::new()),
    };
    plan.refuse_empty(&overlap.total)?;
    let jaccard = overlap.total.matrix(Counts::jaccard);
    let intervals = sweep(&jaccard);
    let (tau, tau_mode) = plan.threshold(&intervals);
    let table = table(&plan.tasks, &overlap.total);
    log::info!("Jaccard similarity of core regions (in brackets: expected by chance)\n{table}");
    let without_ties = without_ties(&overlap);
    if let (Some(found), Some(counts)) = (&without_ties, &overlap.without_ties) {
        report_ties(&plan.tasks, found, counts);
    }
    let sweep = plan.sweep.then(|| Sweep {
        tau,
        tau_mode,
        tasks: plan.tasks.clone(),
        jaccard: jaccard.clone(),
        chance: overlap.total.matrix(Counts::chance),
        sweep: rows(&intervals, &plan.tasks, tau),
    });
    let Some(outputs) = &plan.outputs else { return Ok(Outcome { groups: None, sweep }) };
    let parts = plan.parting.as_ref().map_or_else(|| components(&jaccard, tau), |(_, groups)| groups.clone());
    let ordered = plan.order(parts, &regions)?;
    let groups = plan.groups(&overlap, (tau, tau_mode), &ordered, &digests);
    for ((task, mask), digest) in plan.tasks.iter().zip(&plan.masks).zip(digests) {
        recorder.input(format!("mask:{task}"), mask.path(), digest);
    }
    write(outputs, &groups, &overlap, recorder)?;
    report(&groups, &ordered.groups);
    Ok(Outcome { groups: Some(groups), sweep })
}

impl Plan {
    fn refuse_empty(&self, counts: &Counts) -> Result<()> {
        match (0..self.masks.len()).find(|i| counts.shared[*i][*i] == 0) {
            Some(i) => Err(BadInput::new(self.masks[i].path(), "nothing of this core region is left to compare")
                .expected("at least one element outside the tensors left out")
                .found(format!("{} elements, all of them left out", self.masks[i].header.selected))
                .hint("leave out fewer kinds of tensors with --exclude")
                .into()),
            None => Ok(()),
        }
    }

    fn threshold(&self, intervals: &[Interval]) -> (f64, TauMode) {
        let Tau::Fixed(tau) = self.tau else {
            let tau = most_stable_tau(intervals).unwrap_or_else(|| {
                log::warn!(
                    "--tau auto: every τ puts these {} tasks into one group or single tasks; taking \
                     {DEFAULT_TAU}",
                    self.tasks.len()
                );
                DEFAULT_TAU
            });
            return (tau, TauMode::Auto);
        };
        (tau, TauMode::Fixed)
    }

    fn order(&self, groups: Partition, regions: &Regions<'_>) -> Result<Ordered> {
        if self.is_like() {
            return Ok(Ordered { groups, figures: Vec::new() });
        }
        Ok(match (&self.input, self.method) {
            (OrderInput::Losses(losses), _) => {
                let figures = mean_loss(&groups, losses);
                ascending(groups, figures)
            }
            (OrderInput::Edges(path, edges), _) => by_edges(groups, edges, &self.tasks, path)?,
            (OrderInput::Help(help), _) => by_help(groups, help),
            (OrderInput::Nothing, Method::Overlap) => {
                let figures = regions.against_others(&groups);
                ascending(groups, figures)
            }
            (OrderInput::Nothing, _) => random(groups, self.seed),
        })
    }

    fn is_like(&self) -> bool {
        matches!(self.parting, Some((Parting::Like {}, _)))
    }

    fn order_record(&self, scores: Vec<f64>) -> Order {
        if self.is_like() {
            return Order { method: "like".to_owned(), seed: None, scores };
        }
        let seed = (self.method == Method::Random).then_some(self.seed);
        Order { method: self.method.name().to_owned(), seed, scores }
    }

    fn groups(&self, overlap: &Overlap, tau: (f64, TauMode), ordered: &Ordered, digests: &[Digest]) -> Groups {
        let named = |group: &Vec<usize>| group.iter().map(|i| self.tasks[*i].clone()).collect();
        Groups {
            format_version: FORMAT_VERSION,
            tau: tau.0,
            partition: self.parting.as_ref().map(|(how, _)| how.clone()),
            tau_mode: tau.1,
            tasks: self.tasks.clone(),
            jaccard: overlap.total.matrix(Counts::jaccard),
            chance: overlap.total.matrix(Counts::chance),
            without_ties: without_ties(overlap),
            excluded: self.excluded.iter().map(ToString::to_string).collect(),
            groups: ordered.groups.iter().map(named).collect(),
            order: self.order_record(ordered.figures.clone()),
            trivial: is_trivial(&ordered.groups),
            base: self.masks[0].header.base.clone(),
            masks: self.tasks.iter().cloned().zip(digests.iter().cloned()).collect::<BTreeMap<_, _>>(),
        }
    }
}

/// The similarities without the elements chosen among equals; `None` if there are none.
fn without_ties(overlap: &Overlap) -> Option<WithoutTies> {
    let (all, left) = (&overlap.total, overlap.without_ties.as_ref()?);
    let tied = |all: &Counts, a: usize, b: usize| match all.shared[a][b] {
        0 => 0.0,
        shared => (shared - left.shared[a][b]) as f64 / shared as f64,
    };
    Some(WithoutTies {
        tied: all.matrix(tied),
        jaccard: left.matrix(Counts::jaccard),
        chance: left.matrix(Counts::chance),
    })
}

/// Share of tied elements above which the similarities deserve a warning.
const MANY_TIES: f64 = 0.1;

/// Logs the part of each similarity that rests on ties, and what is left without them.
fn report_ties(tasks: &[String], found: &WithoutTies, counts: &Counts) {
    let width = tasks.iter().map(|t| t.chars().count()).max().unwrap_or(0);
    let cell = |value: f64| format!("{:.1} %", 100.0 * value);
    let tied = matrix(tasks, width.max(8), |a, b| cell(found.tied[a][b]));
    log::info!("Shared elements that at least one region chose among equals (diagonal: of the region)\n{tied}");
    log::info!("Jaccard similarity without them (in brackets: expected by chance)\n{}", table(tasks, counts));
    let worst = found.tied.iter().flatten().fold(0.0, |most: f64, share| most.max(*share));
    if worst > MANY_TIES {
        log::warn!(
            "up to {} of what core regions share was chosen among equals by a hash, which makes regions look less similar \
             than they are\n  hint: compare the similarities without them; save probes in f32 (cpift-probe --save-dtype f32)",
            cell(worst)
        );
    }
}

/// Writes the outputs. All are complete before any gets its name.
fn write(outputs: &Outputs, groups: &Groups, overlap: &Overlap, recorder: Recorder) -> Result<()> {
    let by_layer = Layers::new(overlap, groups);
    let texts = [
        (&outputs.svg, heatmaps::whole(groups)),
        (&outputs.layers, json::to_text(&by_layer)?),
        (&outputs.layers_svg, heatmaps::by_layer(&by_layer, groups)),
    ];
    let stage = |(path, text): (&PathBuf, String)| StagedFile::of_text(path, &text, outputs.force);
    let others: Vec<StagedFile> = texts.into_iter().map(stage).collect::<Result<_>>()?;
    let own = StagedFile::of_text(&outputs.groups, &json::to_text(groups)?, outputs.force)?;
    recorder.commit(own.into_path(), &others)
}

/// Logs the groups in order.
fn report(groups: &Groups, order: &Partition) {
    let tau = match groups.tau_mode {
        TauMode::Fixed => groups.tau.to_string(),
        TauMode::Auto => format!("{:.6} (auto)", groups.tau),
    };
    let plural = if order.len() == 1 { "" } else { "s" };
    let how = match &groups.partition {
        None => format!("τ = {tau}"),
        Some(Parting::Kind {}) => "by kind".to_owned(),
        Some(Parting::Like {}) => "as given".to_owned(),
        Some(Parting::Random { seed, .. }) => format!("at random, seed {seed}"),
    };
    log::info!("{how}: {} group{plural}, in {} order", order.len(), groups.order.method);
    for (k, group) in order.iter().enumerate() {
        let figure = groups.order.scores.get(k).map_or(String::new(), |f| format!("  [{f:.4}]"));
        log::info!("  {}. {}{figure}", k + 1, named(group, &groups.tasks));
    }
    if groups.trivial {
        let what = match (order.len(), &groups.partition) {
            (1, _) => {
                "all tasks are in one group: nothing is frozen while it trains, which is plain multi-task training"
            }
            (_, None) => "every task is a group of its own: no two core regions are similar enough to train together",
            (_, Some(_)) => "every task is a group of its own: no two are trained together",
        };
        let hint = match &groups.partition {
            None => "try --tau auto, another --tau (see the matrix), or --exclude embeddings,norms",
            Some(Parting::Kind {}) => "give some tasks of tasks.toml, but not all, the same kind",
            Some(Parting::Like {}) => "the groups.json given with --like has these groups",
            Some(Parting::Random { .. }) => "give another number of --groups",
        };
        log::warn!("{what}\n  hint: {hint}");
    }
}

/// The similarity matrix, with the similarity expected by chance in brackets.
fn table(tasks: &[String], counts: &Counts) -> String {
    let width = tasks.iter().map(|t| t.chars().count()).max().unwrap_or(0);
    matrix(tasks, width.max(15), |a, b| match a == b {
        true => "1".to_owned(),
        false => format!("{:.4} ({:.4})", counts.jaccard(a, b), counts.chance(a, b)),
    })
}

/// A table with a row and a column per task.
fn matrix(tasks: &[String], column: usize, cell: impl Fn(usize, usize) -> String) -> String {
    let width = tasks.iter().map(|t| t.chars().count()).max().unwrap_or(0);
    let mut out = " ".repeat(width);
    for task in tasks {
        let _ = write!(out, "  {task:>column$}");
    }
    for (a, task) in tasks.iter().enumerate() {
        let _ = write!(out, "\n{task:<width$}");
        for b in 0..tasks.len() {
            let _ = write!(out, "  {:>column$}", cell(a, b));
        }
    }
    out
}
