//! What a run will do, complete before it starts: stages, their examples, the masks each one freezes.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use cpift_core::checkpoint::Digest;
use cpift_core::cli::Common;
use cpift_core::error::usage;
use cpift_core::files::check_output;
use cpift_core::groups::Groups;
use cpift_core::mask::{self, Mask};
use cpift_core::tasks::{DEFAULT_SAMPLE, Task, Tasks};
use cpift_core::{BadInput, Checkpoint};
use cpift_torch::args::Budget;
use cpift_torch::data::{self, Example, Layout, balanced_sample};
use cpift_torch::session::Session;
use cpift_torch::train::HeldOut;

use crate::args::{RunArgs, SampleRows, StageData};

/// A checked run.
pub struct Plan {
    /// The model, opened.
    pub session: Session,
    /// The stages in order.
    pub stages: Vec<StagePlan>,
    /// Masks by task; empty when nothing is frozen.
    pub masks: BTreeMap<String, Mask>,
    /// What the loss is also taken on.
    pub held_out: Vec<HeldOut>,
    /// Digests of files that were read, by role.
    pub inputs: Vec<(String, PathBuf, Digest)>,
}

/// One stage.
pub struct StagePlan {
    /// Name in logs and metrics.
    pub label: String,
    /// What it trains on.
    pub examples: Vec<Example>,
    /// Tasks whose cores are frozen in it: those of earlier groups.
    pub frozen_tasks: Vec<String>,
    /// How long.
    pub budget: Budget,
    /// Peak learning rate.
    pub lr: f64,
}

impl Plan {
    /// Checks everything and reads the data.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] and [`BadInput`].
    pub fn new(args: &RunArgs, common: &Common) -> Result<Self> {
        args.training.check()?;
        if args.stage_lr.iter().any(|lr| !(lr.is_finite() && *lr > 0.0)) {
            return Err(usage("--stage-lr must be positive"));
        }
        // Resuming a run that is finished is no error.
        if !args.training.resume {
            check_output(&args.out, common.force)?;
        }
        let tasks = Tasks::read(&args.tasks)?;
        let groups = args.groups.as_deref().map(Groups::read).transpose()?;
        let chosen = chosen_tasks(args, &tasks, groups.as_ref())?;
        if groups.is_some() && args.masks.is_empty() && !args.no_freeze {
            return Err(usage("--groups needs a --mask NAME=FILE for every task, or --no-freeze"));
        }
        let device = args.training.device.open(common.threads)?;
        let session = Session::open(&args.model, tasks.template()?, device, args.training.precision(device))?;
        let masks = open_masks(args, groups.as_ref(), &session)?;
        let examples = read_examples(args, &chosen, &session)?;
        let stages = plan_stages(args, groups.as_ref(), &chosen, &examples)?;
        let inputs = digest_inputs(args, &chosen)?;
        let held_out = read_held_out(args, &chosen, &session)?;
        Ok(Self { session, stages, masks, held_out, inputs })
    }
}

fn chosen_tasks(args: &RunArgs, tasks: &Tasks, groups: Option<&Groups>) -> Result<Vec<Task>> {
    let names: Vec<&str> = match groups {
        Some(groups) => groups.task_order(),
        None if args.only.is_empty() => return Ok(tasks.list.clone()),
        None => args.only.iter().map(String::as_str).collect(),
    };
    names.into_iter().map(|name| tasks.named(name).cloned()).collect()
}

fn open_masks(args: &RunArgs, groups: Option<&Groups>, session: &Session) -> Result<BTreeMap<String, Mask>> {
    let (Some(groups), Some(path)) = (groups, &args.groups) else { return Ok(BTreeMap::new()) };
    if args.masks.is_empty() {
        return Ok(BTreeMap::new());
    }
    groups.check_names(path, "--mask", args.masks.iter().map(|m| &m.name))?;
    for mask in &args.masks {
        groups.check_mask(path, &mask.name, &mask.path)?;
    }
    let base = args.base.as_deref().map(Checkpoint::open).transpose()?;
    let digest = match &base {
        Some(base) => {
            cpift_core::checkpoint::check_same_parameters(base, &session.checkpoint)?;
            base.digest()?
        }
        None => session.digest.clone(),
    };
    if groups.base != digest {
        return Err(BadInput::new(path, "made from masks of another base")
            .expected(format!("base digest {digest}"))
            .found(format!("base digest {}", groups.base))
            .hint("name the base the masks were made for: --base DIR")
            .into());
    }
    mask::open_all(&args.masks, base.as_ref().unwrap_or(&session.checkpoint), &digest)
}

/// Each task's examples, sampled.
fn read_examples(args: &RunArgs, tasks: &[Task], session: &Session) -> Result<BTreeMap<String, Vec<Example>>> {
    let mut all = BTreeMap::new();
    for task in tasks {
        let rows = data::read_rows(&task.train, &Layout::of(task)?)?;
        let max_length = session.context_of(task, args.training.max_length);
        let encoded = data::encode_rows(&task.train, &rows, &session.text, max_length, args.training.overlong())?;
        data::report(&task.name, &encoded, max_length);
        all.insert(task.name.clone(), encoded.examples);
    }
    let default = if args.masks.is_empty() { SampleRows::All } else { SampleRows::Balanced };
    let smallest = all.values().map(Vec::len).min().unwrap_or(0).min(DEFAULT_SAMPLE);
    for (i, task) in tasks.iter().enumerate() {
        let rows = match args.sample.unwrap_or(default) {
            SampleRows::All => continue,
            SampleRows::Balanced => task.sample.unwrap_or(smallest),
            SampleRows::Count(n) => n,
        };
        let seed = args.training.seed.wrapping_add(i as u64);
        let examples = all.get_mut(&task.name).expect("every task was read above");
        *examples = balanced_sample(examples, rows, seed);
    }
    Ok(all)
}

/// The held-out rows of every task, where the arguments ask for their loss.
fn read_held_out(args: &RunArgs, tasks: &[Task], session: &Session) -> Result<Vec<HeldOut>> {
    if args.training.eval_every.is_none() {
        return Ok(Vec::new());
    }
    let read = |task: &Task| {
        let max_length = session.context_of(task, args.training.max_length);
        HeldOut::read(task, args.training.eval_rows, &session.text, max_length)
    };
    tasks.iter().map(read).collect()
}

fn plan_stages(
    args: &RunArgs,
    groups: Option<&Groups>,
    tasks: &[Task],
    examples: &BTreeMap<String, Vec<Example>>,
) -> Result<Vec<StagePlan>> {
    let every: Vec<String> = tasks.iter().map(|t| t.name.clone()).collect();
    let groups: Vec<Vec<String>> = groups.map_or_else(|| vec![every.clone()], |g| g.groups.clone());
    if !args.stage_lr.is_empty() && args.stage_lr.len() != groups.len() {
        return Err(usage(format!("--stage-lr has {} rates for {} stages", args.stage_lr.len(), groups.len())));
    }
    let mut stages = Vec::new();
    for (k, group) in groups.iter().enumerate() {
        let sources = if args.stage_data == StageData::Mixed { &every } else { group };
        stages.push(StagePlan {
            label: format!("stage {}/{} ({})", k + 1, groups.len(), group.join(" ")),
            examples: sources.iter().flat_map(|name| examples[name].iter().cloned()).collect(),
            frozen_tasks: if args.masks.is_empty() { Vec::new() } else { groups[..k].concat() },
            budget: args.training.budget().part(k, groups.len())?,
            lr: args.stage_lr.get(k).copied().unwrap_or(args.training.lr),
        });
    }
    Ok(stages)
}

fn digest_inputs(args: &RunArgs, tasks: &[Task]) -> Result<Vec<(String, PathBuf, Digest)>> {
    // Its templates and lengths decide what the rows become.
    let mut inputs = vec![("tasks".to_owned(), args.tasks.clone(), Digest::of_file(&args.tasks)?)];
    for task in tasks {
        inputs.push((format!("train:{}", task.name), task.train.clone(), Digest::of_file(&task.train)?));
    }
    for mask in &args.masks {
        inputs.push((format!("mask:{}", mask.name), mask.path.clone(), Digest::of_file(&mask.path)?));
    }
    if let Some(path) = &args.base {
        inputs.push(("base".to_owned(), path.clone(), Checkpoint::open(path)?.digest()?));
    }
    if let Some(path) = &args.groups {
        inputs.push(("groups".to_owned(), path.clone(), Digest::of_file(path)?));
    }
    Ok(inputs)
}
