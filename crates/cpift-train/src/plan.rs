//! The plan of a run, complete before it starts: stages, their examples, the masks each stage
//! freezes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::files::{check_not_input, check_output};
use cpift_core::format::digest::Digest;
use cpift_core::format::groups::Groups;
use cpift_core::format::mask::{self, Mask};
use cpift_core::format::tasks::{DEFAULT_SAMPLE, Task, Tasks};
use cpift_core::record::provenance::check_made_from;
use cpift_core::run::cli::{Common, Named, require_unique};
use cpift_core::stream::random::{seed_for, splitmix64};
use cpift_core::{BadInput, Checkpoint};
use cpift_data::Example;
use cpift_torch::args::Budget;
use cpift_torch::data::balanced_sample;
use cpift_torch::session::{ModelInfo, Session};
use cpift_torch::train::{HeldOut, States, read_examples};
use cpift_torch::workers::Workers;

use crate::args::{IsolationKind, RunArgs, SampleRows, StageData};

/// A checked and resolved run.
pub struct Plan {
    /// The open checkpoint.
    pub session: Session,
    /// The stages in order.
    pub stages: Vec<StagePlan>,
    /// Masks by task; empty if nothing is frozen.
    pub masks: BTreeMap<String, Mask>,
    /// Held-out examples; empty unless the arguments ask for their loss.
    pub held_out: Vec<HeldOut>,
    /// Role, path and digest of each input file.
    pub inputs: Vec<(String, PathBuf, Digest)>,
}

/// One stage.
pub struct StagePlan {
    /// Name in logs and metrics.
    pub label: String,
    /// Examples to train on; stages over all tasks share them.
    pub examples: Rc<[Example]>,
    /// The group's tasks.
    pub tasks: Vec<String>,
    /// Tasks of earlier groups, whose cores are frozen in it.
    pub earlier: Vec<String>,
    /// Examples of those tasks, for --isolation dynamic, which measures importance on them.
    pub earlier_examples: Vec<Example>,
    /// Epochs, steps or tokens.
    pub budget: Budget,
    /// Peak learning rate.
    pub lr: f64,
}

impl Plan {
    /// Checks all arguments and inputs and reads the data.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] for an argument, [`BadInput`] for a file that cannot be used.
    pub fn new(args: &RunArgs, common: &Common, workers: &Workers) -> Result<Self> {
        // Resuming a finished run is no error.
        if !args.training.resume {
            check_output(&args.out, common.force())?;
        }
        let tasks = Tasks::read(&args.tasks)?;
        let groups = args.groups.as_deref().map(Groups::read).transpose()?;
        let chosen = chosen_tasks(args, &tasks, groups.as_ref())?;
        check_inputs(args, &chosen)?;
        let placement = workers.placement.clone();
        let model = ModelInfo::open(&args.model, tasks.template()?)?;
        let examples = sampled_examples(args, &chosen, &model)?;
        let stages = plan_stages(args, groups.as_ref(), &chosen, examples)?;
        let held_out = HeldOut::read(&chosen, &model, &args.training)?;
        let inputs = digest_inputs(args, &chosen)?;
        let precision = args.training.precision(placement.device);
        let session = model.load_at(placement, precision)?;
        let masks = open_masks(args, groups.as_ref(), &session)?;
        check_model(args, &inputs)?;
        Ok(Self { session, stages, masks, held_out, inputs })
    }
}

/// Refuses an output that would replace an input.
fn check_inputs(args: &RunArgs, tasks: &[Task]) -> Result<()> {
    let mut inputs: Vec<&Path> = vec![&args.model, &args.tasks];
    inputs.extend(args.base.iter().chain(&args.groups).map(PathBuf::as_path));
    inputs.extend(args.masks.iter().map(|mask| mask.path.as_path()));
    inputs.extend(tasks.iter().flat_map(|task| [task.train.as_path(), task.eval.as_path()]));
    check_not_input("--out", &args.out, inputs.iter().copied())?;
    check_not_input("--out's states", &States::folder(&args.out), inputs)
}

fn chosen_tasks(args: &RunArgs, tasks: &Tasks, groups: Option<&Groups>) -> Result<Vec<Task>> {
    let names: Vec<&str> = match groups {
        Some(groups) => groups.task_order(),
        None if args.only.is_empty() => return Ok(tasks.list.clone()),
        None => args.only.iter().map(String::as_str).collect(),
    };
    let mut seen = BTreeSet::new();
    if let Some(twice) = names.iter().find(|name| !seen.insert(**name)) {
        return Err(usage(format!("--only names {twice} twice")));
    }
    names.into_iter().map(|name| tasks.named(name).cloned()).collect()
}

fn open_masks(args: &RunArgs, groups: Option<&Groups>, session: &Session) -> Result<BTreeMap<String, Mask>> {
    let (Some(groups), Some(path)) = (groups, &args.groups) else { return Ok(BTreeMap::new()) };
    if args.masks.is_empty() {
        return Ok(BTreeMap::new());
    }
    require_unique(&args.masks, "--mask")?;
    groups.check_names(path, "--mask", args.masks.iter().map(|m| &m.name))?;
    for mask in &args.masks {
        groups.check_mask(path, &mask.name, &mask.path)?;
    }
    let base = args.base.as_deref().map(Checkpoint::open).transpose()?;
    let digest = match &base {
        Some(base) => {
            cpift_core::format::checkpoint::check_same_parameters(base, &session.checkpoint)?;
            base.digest()?
        }
        None => session.digest.clone(),
    };
    if groups.base != digest {
        return Err(BadInput::new(path, "made from masks of another base")
            .expected(format!("base digest {digest}"))
            .found(format!("base digest {}", groups.base))
            .hint("give the base the masks were made for: --base DIR")
            .into());
    }
    mask::open_all(args.masks.iter().map(Named::pair), base.as_ref().unwrap_or(&session.checkpoint), &digest)
}

/// Refuses a fused model that was made from another base or other masks than the given ones.
fn check_model(args: &RunArgs, inputs: &[(String, PathBuf, Digest)]) -> Result<()> {
    let given = inputs.iter().filter(|(role, ..)| role == "base" || role.starts_with("mask:"));
    given.into_iter().try_for_each(|(role, path, digest)| check_made_from(&args.model, role, (path, digest)))
}

/// Each task's examples, sampled.
fn sampled_examples(args: &RunArgs, tasks: &[Task], model: &ModelInfo) -> Result<BTreeMap<String, Vec<Example>>> {
    let mut all = BTreeMap::new();
    for task in tasks {
        all.insert(task.name.clone(), read_examples(task, model, &args.training)?.examples);
    }
    let plain = args.masks.is_empty() && args.isolation.kind == IsolationKind::Static;
    let default = if plain { SampleRows::All } else { SampleRows::Balanced };
    let smallest = all.values().map(Vec::len).min().unwrap_or(0).min(DEFAULT_SAMPLE);
    for task in tasks {
        let rows = match args.sample.unwrap_or(default) {
            SampleRows::All => continue,
            SampleRows::Balanced => task.sample.unwrap_or(smallest),
            SampleRows::Count(n) => n,
        };
        let examples = all.get_mut(&task.name).expect("every task was read above");
        *examples = balanced_sample(examples, rows, seed_for(args.training.seed, &task.name));
    }
    Ok(all)
}

fn plan_stages(
    args: &RunArgs,
    groups: Option<&Groups>,
    tasks: &[Task],
    mut examples: BTreeMap<String, Vec<Example>>,
) -> Result<Vec<StagePlan>> {
    let every: Vec<String> = tasks.iter().map(|t| t.name.clone()).collect();
    let groups: Vec<Vec<String>> = groups.map_or_else(|| vec![every.clone()], |g| g.groups.clone());
    if !args.stage_lr.is_empty() && args.stage_lr.len() != groups.len() {
        return Err(usage(format!("--stage-lr has {} rates for {} stages", args.stage_lr.len(), groups.len())));
    }
    // A task is in one group; its rows are copied only if a later stage uses them too.
    let shared = args.replay > 0.0 || args.isolation.kind == IsolationKind::Dynamic;
    let mut of = |names: &[String]| -> Vec<Example> {
        let mut take = |name: &String| if shared { examples.get(name).cloned() } else { examples.remove(name) };
        names.iter().flat_map(|name| take(name).expect("a task is in one group")).collect()
    };
    let mixed: Option<Rc<[Example]>> = (args.stage_data() == StageData::Mixed).then(|| of(&every).into());
    let mut stages = Vec::new();
    for (k, group) in groups.iter().enumerate() {
        let earlier = groups[..k].concat();
        let examples = match &mixed {
            Some(mixed) => Rc::clone(mixed),
            None => {
                let mut rows = of(group);
                if args.replay > 0.0 {
                    earlier
                        .iter()
                        .for_each(|task| rows.extend(replayed(&of(std::slice::from_ref(task)), task, args, k)));
                }
                rows.into()
            }
        };
        stages.push(StagePlan {
            label: format!("stage {}/{} ({})", k + 1, groups.len(), group.join(" ")),
            examples,
            earlier_examples: if args.isolation.kind == IsolationKind::Dynamic { of(&earlier) } else { Vec::new() },
            tasks: group.clone(),
            earlier,
            budget: args.training.budget().part(k, groups.len())?,
            lr: args.stage_lr.get(k).copied().unwrap_or(args.training.lr),
        });
    }
    Ok(stages)
}

/// The share of an earlier task's rows that stage `k` replays, at least one row.
fn replayed(examples: &[Example], task: &str, args: &RunArgs, k: usize) -> Vec<Example> {
    let rows = ((examples.len() as f64 * args.replay).round() as usize).max(1);
    balanced_sample(examples, rows, splitmix64(seed_for(args.training.seed, task), k as u64))
}

fn digest_inputs(args: &RunArgs, tasks: &[Task]) -> Result<Vec<(String, PathBuf, Digest)>> {
    // The templates and lengths of tasks.toml determine the examples.
    let (list, names) = (Tasks::read(&args.tasks)?, tasks.iter().map(|task| task.name.as_str()));
    let mut inputs = vec![(list.role(names.clone()), args.tasks.clone(), list.digest(names)?)];
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
