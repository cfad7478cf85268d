//! From masks to groups.json and its heat map.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cpift_core::checkpoint::{Digest, TensorKind};
use cpift_core::error::usage;
use cpift_core::files::{StagedFile, check_output};
use cpift_core::groups::{FORMAT_VERSION, Groups, Order, TauMode};
use cpift_core::provenance::Recorder;
use cpift_core::{BadInput, Mask, cli, json};

use crate::args::{Args, Method, Tau};
use crate::dependency::{by_edges, by_help, help, named, read_edges, read_probes};
use crate::heatmap;
use crate::order::{Ordered, ascending, mean_loss, random, read_losses};
use crate::overlap::{Counts, Regions};
use crate::partition::{Partition, components, is_trivial, most_stable_tau};

/// The τ of the paper, which `auto` falls back to.
const DEFAULT_TAU: f64 = 0.1;

/// A grouping to make, its masks opened and its order inputs read.
struct Plan {
    tasks: Vec<String>,
    masks: Vec<Mask>,
    excluded: Vec<TensorKind>,
    tau: Tau,
    method: Method,
    seed: u64,
    input: OrderInput,
    out: PathBuf,
    svg: PathBuf,
    force: bool,
}

/// What the order needs beside the masks.
enum OrderInput {
    Nothing,
    /// The base's loss on every task.
    Losses(Vec<f64>),
    /// The file, and its edges as task indices.
    Edges(PathBuf, Vec<(usize, usize)>),
    /// help(i → j), [tasks × tasks].
    Help(Vec<Vec<f64>>),
}

/// Runs the stage: nothing is written unless all of it succeeds.
///
/// # Errors
/// [`cpift_core::Usage`] for arguments that do not go together; [`BadInput`] for unusable or unrelated masks, order inputs
/// that do not fit the tasks, or an output that exists; I/O errors.
pub fn group(args: &Args) -> Result<Groups> {
    let mut recorder = Recorder::start(env!("CARGO_PKG_NAME"));
    let plan = Plan::new(args, &mut recorder)?;
    let regions = Regions::new(&plan.masks, &plan.excluded);
    let (overlap, digests) = regions.count_and_hash()?;
    let counts = &overlap.total;
    plan.refuse_empty(counts)?;
    let jaccard = counts.matrix(Counts::jaccard);
    let (tau, tau_mode) = plan.threshold(&jaccard);
    let partition = components(&jaccard, tau);
    let trivial = is_trivial(&partition);
    let ordered = plan.order(partition, &regions)?;
    let mut masks = BTreeMap::new();
    for ((task, mask), digest) in plan.tasks.iter().zip(&plan.masks).zip(digests) {
        recorder.input(format!("mask:{task}"), mask.path(), digest.clone());
        masks.insert(task.clone(), digest);
    }
    let named = |group: &Vec<usize>| group.iter().map(|i| plan.tasks[*i].clone()).collect();
    let groups = Groups {
        format_version: FORMAT_VERSION,
        tau,
        tau_mode,
        tasks: plan.tasks.clone(),
        jaccard,
        chance: counts.matrix(Counts::chance),
        excluded: plan.excluded.iter().map(ToString::to_string).collect(),
        groups: ordered.groups.iter().map(named).collect(),
        order: plan.order_record(ordered.figures),
        trivial,
        base: plan.masks[0].header.base.clone(),
        masks,
    };
    plan.write(&groups, recorder)?;
    report(&groups, &ordered.groups);
    Ok(groups)
}

impl Plan {
    fn new(args: &Args, recorder: &mut Recorder) -> Result<Self> {
        cli::require_unique(&args.masks, "--mask")?;
        check_flags(args)?;
        let svg = args.svg.clone().unwrap_or_else(|| args.out.with_extension("svg"));
        if svg == args.out {
            return Err(usage("--out and --svg name the same file"));
        }
        check_output(&args.out, args.common.force)?;
        check_output(&svg, args.common.force)?;
        let masks: Vec<Mask> = args.masks.iter().map(|m| Mask::open(&m.path)).collect::<Result<_>>()?;
        masks[1..].iter().try_for_each(|mask| check_same_layout(&masks[0], mask))?;
        let tasks: Vec<String> = args.masks.iter().map(|m| m.name.clone()).collect();
        let input = read_order_input(args, &tasks, &masks[0].header.base, recorder)?;
        if args.order == Method::Random {
            recorder.seed(args.seed);
        }
        Ok(Self {
            excluded: excluded_kinds(&masks[0], &args.exclude)?,
            tasks,
            masks,
            tau: args.tau,
            method: args.order,
            seed: args.seed,
            input,
            out: args.out.clone(),
            svg,
            force: args.common.force,
        })
    }

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

    fn threshold(&self, jaccard: &[Vec<f64>]) -> (f64, TauMode) {
        match self.tau {
            Tau::Fixed(tau) => (tau, TauMode::Fixed),
            Tau::Auto => {
                let tau = most_stable_tau(jaccard).unwrap_or_else(|| {
                    log::warn!(
                        "--tau auto: no τ parts these {} tasks into anything but one group or single tasks; taking \
                         {DEFAULT_TAU}",
                        self.tasks.len()
                    );
                    DEFAULT_TAU
                });
                (tau, TauMode::Auto)
            }
        }
    }

    fn order(&self, groups: Partition, regions: &Regions<'_>) -> Result<Ordered> {
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

    fn order_record(&self, scores: Vec<f64>) -> Order {
        let seed = (self.method == Method::Random).then_some(self.seed);
        Order { method: self.method.name().to_owned(), seed, scores }
    }

    /// Both outputs are complete before either gets its name.
    fn write(&self, groups: &Groups, recorder: Recorder) -> Result<()> {
        let svg = StagedFile::create(&self.svg, self.force)?;
        let out = StagedFile::create(&self.out, self.force)?;
        for (staged, text) in [(&svg, heatmap::svg(groups)), (&out, json::to_text(groups)?)] {
            staged.file().write_all(text.as_bytes()).with_context(|| format!("writing {}", self.out.display()))?;
        }
        svg.commit()?;
        out.commit()?;
        recorder.write_beside(&self.out)
    }
}

/// Refuses order inputs that the chosen order lacks or would ignore.
fn check_flags(args: &Args) -> Result<()> {
    let (edges, probes) = (args.edges.is_some(), args.probe_scores.is_some());
    let order = args.order.name();
    let lacks = match args.order {
        Method::Difficulty if args.scores.is_none() => Some("--scores with the base's scores.json"),
        Method::Dependency if !edges && !probes => Some("--edges, or --probe-scores with --scores"),
        _ => None,
    };
    if let Some(what) = lacks {
        return Err(usage(format!("--order {order} needs {what}")));
    }
    let uses_scores = args.order == Method::Difficulty || (args.order == Method::Dependency && probes);
    let given = [("--scores", args.scores.is_some()), ("--edges", edges), ("--probe-scores", probes)];
    let used = [uses_scores, args.order == Method::Dependency, args.order == Method::Dependency];
    match given.iter().zip(used).find(|((_, given), used)| *given && !used) {
        Some(((flag, _), _)) => Err(usage(format!("{flag} has no part in --order {order}"))),
        None => Ok(()),
    }
}

fn check_same_layout(first: &Mask, other: &Mask) -> Result<()> {
    let (a, b) = (&first.header, &other.header);
    let differs = |what: &str| BadInput::new(other.path(), format!("{what} than {}", first.path().display()));
    if a.base != b.base {
        return Err(differs("a mask made for another base")
            .expected(format!("base digest {}", a.base))
            .found(format!("base digest {}", b.base))
            .hint("extract all masks from the same base checkpoint")
            .into());
    }
    if a.numel != b.numel {
        let name = a.numel.keys().chain(b.numel.keys()).find(|n| a.numel.get(*n) != b.numel.get(*n));
        let size = |n: Option<&u64>| n.map_or("no such tensor".to_owned(), |n| format!("{n} elements"));
        let name = name.cloned().unwrap_or_default();
        let (expected, found) = (size(a.numel.get(&name)), size(b.numel.get(&name)));
        return Err(differs("a mask of another layout").tensor(name).expected(expected).found(found).into());
    }
    if a.excluded != b.excluded {
        return Err(differs("a mask with other tensors left out of D")
            .expected(format!("excluded: {:?}", a.excluded))
            .found(format!("excluded: {:?}", b.excluded))
            .hint("extract all masks with the same --exclude")
            .into());
    }
    if (a.scope, a.percent) != (b.scope, b.percent) {
        log::warn!(
            "{} and {} were extracted with different --scope or --percent: their similarity compares unlike regions",
            first.path().display(),
            other.path().display()
        );
    }
    Ok(())
}

/// What the masks left out of D already, and what is left out now.
fn excluded_kinds(mask: &Mask, more: &[TensorKind]) -> Result<Vec<TensorKind>> {
    let mut kinds = more.to_vec();
    for text in &mask.header.excluded {
        kinds.push(text.parse().map_err(|e| BadInput::new(mask.path(), format!("excluded kinds: {e}")))?);
    }
    kinds.sort_unstable();
    kinds.dedup();
    Ok(kinds)
}

fn read_order_input(args: &Args, tasks: &[String], base: &Digest, recorder: &mut Recorder) -> Result<OrderInput> {
    let base_losses = |path: &Path, recorder: &mut Recorder| {
        let (losses, digest) = read_losses(path, tasks, Some(base))?;
        recorder.input("scores", path, digest);
        anyhow::Ok(losses)
    };
    match (&args.edges, &args.probe_scores, &args.scores) {
        (Some(path), _, _) => {
            let edges = read_edges(path, tasks)?;
            recorder.input("edges", path, Digest::of_file(path)?);
            Ok(OrderInput::Edges(path.clone(), edges))
        }
        (None, Some(folder), Some(scores)) => {
            let losses = base_losses(scores, recorder)?;
            let mut rows = Vec::new();
            for (task, (file, row, digest)) in tasks.iter().zip(read_probes(folder, tasks)?) {
                recorder.input(format!("probe-scores:{task}"), &file, digest);
                rows.push(row);
            }
            Ok(OrderInput::Help(help(&losses, &rows)))
        }
        (None, _, Some(scores)) => Ok(OrderInput::Losses(base_losses(scores, recorder)?)),
        (None, _, None) => Ok(OrderInput::Nothing),
    }
}

/// Tells the matrix beside chance and the groups in order.
fn report(groups: &Groups, order: &Partition) {
    log::info!("Jaccard similarity of core regions (in brackets: what chance gives)\n{}", table(groups));
    let tau = match groups.tau_mode {
        TauMode::Fixed => groups.tau.to_string(),
        TauMode::Auto => format!("{:.6} (auto)", groups.tau),
    };
    let plural = if order.len() == 1 { "" } else { "s" };
    log::info!("τ = {tau}: {} group{plural}, in {} order", order.len(), groups.order.method);
    for (k, group) in order.iter().enumerate() {
        let figure = groups.order.scores.get(k).map_or(String::new(), |f| format!("  [{f:.4}]"));
        log::info!("  {}. {}{figure}", k + 1, named(group, &groups.tasks));
    }
    if groups.trivial {
        let what = if order.len() == 1 {
            "all tasks are in one group: nothing is frozen while it trains, which is plain multi-task training"
        } else {
            "every task is a group of its own: no two core regions are similar enough to train together"
        };
        log::warn!("{what}\n  hint: try --tau auto, another --tau (see the matrix), or --exclude embeddings,norms");
    }
}

fn table(groups: &Groups) -> String {
    let width = groups.tasks.iter().map(|t| t.chars().count()).max().unwrap_or(0);
    let column = width.max(15);
    let mut out = " ".repeat(width);
    for task in &groups.tasks {
        let _ = write!(out, "  {task:>column$}");
    }
    for (a, task) in groups.tasks.iter().enumerate() {
        let _ = write!(out, "\n{task:<width$}");
        for b in 0..groups.tasks.len() {
            let cell = match a == b {
                true => "1".to_owned(),
                false => format!("{:.4} ({:.4})", groups.jaccard[a][b], groups.chance[a][b]),
            };
            let _ = write!(out, "  {cell:>column$}");
        }
    }
    out
}
