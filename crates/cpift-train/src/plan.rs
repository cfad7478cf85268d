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
use cpift_torch::data::{Part, Shuffled, balanced_sample};
use cpift_torch::session::{ModelInfo, Precision, Session};
use cpift_torch::train::{HeldOut, States, read_examples};
use cpift_torch::workers::Workers;
use log::{info, warn};

use crate::args::{IsolationKind, RunArgs, SampleRows, StageData};

/// A checked and resolved run.
pub struct Plan {
    /// The open checkpoint.
    pub session: Session,
    /// The stages in order.
    pub stages: Vec<StagePlan>,
    /// Masks by task, those of --protect by number; empty if nothing is frozen.
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
    /// Number of rows of each task, and of the replayed ones, in an epoch; empty if each row comes
    /// once.
    pub mixture: Vec<Part>,
    /// The group's tasks.
    pub tasks: Vec<String>,
    /// Tasks of earlier groups, whose cores are frozen in it.
    pub earlier: Vec<String>,
    /// Examples of those tasks, for --isolation dynamic, which measures importance on them.
    pub earlier_examples: Vec<Example>,
    /// Examples and tokens of earlier tasks among `examples`.
    pub replayed: (usize, usize),
    /// Epochs, steps or tokens.
    pub budget: Budget,
    /// Peak learning rate.
    pub lr: f64,
}

impl StagePlan {
    /// Share of an epoch's tokens that are rows of earlier tasks.
    pub fn replayed_share(&self) -> f64 {
        self.replayed.1 as f64 / tokens(&self.examples) as f64
    }
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
        let model = ModelInfo::open(&args.model, tasks.template()?)?
            .with_router_aux_loss(args.training.router_aux_loss_coef)?;
        let blocks = model.numbers.num_hidden_layers;
        if i64::from(args.freeze_layers) > blocks {
            return Err(usage(format!("--freeze-layers is {}, but the model has {blocks} blocks", args.freeze_layers)));
        }
        let examples = sampled_examples(args, &chosen, &model)?;
        let stages = plan_stages(args, groups.as_ref(), &chosen, examples)?;
        let listed: Vec<Task> = chosen.iter().filter(is_listed).cloned().collect();
        let held_out = HeldOut::read(&listed, &model, &args.training)?;
        let inputs = digest_inputs(args, &chosen)?;
        let precision = match (args.training.precision(placement.device), args.lora.rank) {
            // Weights that are not updated need no masters.
            (precision, Some(_)) => Precision::all(precision.compute),
            (precision, None) => precision,
        };
        let session = model.load_at(placement, precision)?;
        let masks = open_masks(args, groups.as_ref(), &session)?;
        check_model(args, &inputs)?;
        Ok(Self { session, stages, masks, held_out, inputs })
    }
}

/// Refuses an output that would replace an input.
fn check_inputs(args: &RunArgs, tasks: &[Task]) -> Result<()> {
    let mut inputs: Vec<&Path> = vec![&args.model, &args.tasks];
    inputs.extend(args.base.iter().chain(&args.groups).chain(&args.protect).map(PathBuf::as_path));
    inputs.extend(args.masks.iter().map(|mask| mask.path.as_path()));
    inputs.extend(tasks.iter().flat_map(|task| [task.train.as_path(), task.eval.as_path()]));
    check_not_input("--out", &args.out, inputs.iter().copied())?;
    check_not_input("--out's states", &States::folder(&args.out), inputs)
}

fn chosen_tasks(args: &RunArgs, tasks: &Tasks, groups: Option<&Groups>) -> Result<Vec<Task>> {
    let named = if args.add.is_empty() { ("--only", &args.only) } else { ("--add", &args.add) };
    let mut names: Vec<&str> = match groups {
        Some(groups) => groups.task_order(),
        None if named.1.is_empty() => return Ok(tasks.list.clone()),
        None => named.1.iter().map(String::as_str).collect(),
    };
    let mut seen = BTreeSet::new();
    if let Some(twice) = names.iter().find(|name| !seen.insert(**name)) {
        return Err(usage(format!("{} names {twice} twice", named.0)));
    }
    if args.add.is_empty() || !(args.replays() || args.isolation.kind == IsolationKind::Dynamic) {
        return names.into_iter().map(|name| tasks.named(name).cloned()).collect();
    }
    let files = args.replay_from.iter().map(|path| unlisted_task(path, tasks)).collect::<Result<Vec<_>>>()?;
    if let Some(twice) = files.iter().find(|task| !seen.insert(&task.name)) {
        let hint = "rename the file: its rows are called by its name";
        return Err(BadInput::new(&twice.train, format!("a second task {}", twice.name)).hint(hint).into());
    }
    if files.is_empty() {
        names.extend(tasks.list.iter().map(|task| task.name.as_str()).filter(|name| !seen.contains(name)));
    }
    if files.is_empty() && names.len() == args.add.len() {
        let needs = if args.replays() { "--replay-share" } else { "--isolation dynamic" };
        return Err(BadInput::new(&args.tasks, format!("no task beside those of --add, whose rows {needs} needs"))
            .hint("list the earlier tasks, or give rows of theirs or of the model's own: --replay-from FILE")
            .into());
    }
    let listed = names.into_iter().map(|name| tasks.named(name).cloned());
    listed.chain(files.into_iter().map(Ok)).collect()
}

/// A task that consists of a file of rows and is in no tasks.toml. A listed task of the file's name
/// gives it its template arguments and maximum length.
fn unlisted_task(path: &Path, tasks: &Tasks) -> Result<Task> {
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    let task: Task = serde_json::from_value(serde_json::json!({"name": name, "train": path, "eval": path}))
        .map_err(|e| BadInput::new(path, format!("cannot be replayed: {e}")))?;
    Ok(match tasks.list.iter().find(|listed| listed.name == name) {
        Some(Task { template_args, max_length, .. }) => {
            Task { template_args: template_args.clone(), max_length: *max_length, ..task }
        }
        None => task,
    })
}

fn is_listed(task: &&Task) -> bool {
    !task.listed_in.as_os_str().is_empty()
}

fn open_masks(args: &RunArgs, groups: Option<&Groups>, session: &Session) -> Result<BTreeMap<String, Mask>> {
    if args.masks.is_empty() && args.protect.is_empty() {
        return Ok(BTreeMap::new());
    }
    let base = args.base.as_deref().map(Checkpoint::open).transpose()?;
    let digest = match &base {
        Some(base) => {
            cpift_core::format::checkpoint::check_same_parameters(base, &session.checkpoint)?;
            base.digest()?
        }
        None => session.digest.clone(),
    };
    let within = base.as_ref().unwrap_or(&session.checkpoint);
    let (Some(groups), Some(path)) = (groups, &args.groups) else {
        let names: Vec<String> = (1..=args.protect.len()).map(|n| n.to_string()).collect();
        let named = names.iter().map(String::as_str).zip(args.protect.iter().map(PathBuf::as_path));
        return mask::open_all(named, within, &digest);
    };
    require_unique(&args.masks, "--mask")?;
    groups.check_names(path, "--mask", args.masks.iter().map(|m| &m.name))?;
    for mask in &args.masks {
        groups.check_mask(path, &mask.name, &mask.path)?;
    }
    if groups.base != digest {
        return Err(BadInput::new(path, "made from masks of another base")
            .expected(format!("base digest {digest}"))
            .found(format!("base digest {}", groups.base))
            .hint("give the base the masks were made for: --base DIR")
            .into());
    }
    mask::open_all(args.masks.iter().map(Named::pair), within, &digest)
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
    let plain = !args.add.is_empty() || args.masks.is_empty() && args.isolation.kind == IsolationKind::Static;
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
    let own = if args.add.is_empty() { &every } else { &args.add };
    let counts: BTreeMap<String, usize> = examples.iter().map(|(name, rows)| (name.clone(), rows.len())).collect();
    let groups: Vec<Vec<String>> = groups.map_or_else(|| vec![own.clone()], |g| g.groups.clone());
    if !args.stage_lr.is_empty() && args.stage_lr.len() != groups.len() {
        return Err(usage(format!("--stage-lr has {} rates for {} stages", args.stage_lr.len(), groups.len())));
    }
    let dynamic = args.isolation.kind == IsolationKind::Dynamic;
    // A task is in one group; its rows are copied only if a later stage uses them too.
    let shared = args.replays() || dynamic;
    let mut of = |names: &[String]| -> Vec<Example> {
        let mut take = |name: &String| if shared { examples.get(name).cloned() } else { examples.remove(name) };
        names.iter().flat_map(|name| take(name).expect("a task is in one group")).collect()
    };
    let mixed: Option<Rc<[Example]>> = (args.stage_data() == StageData::Mixed).then(|| of(&every).into());
    let mut stages = Vec::new();
    for (k, group) in groups.iter().enumerate() {
        let earlier: Vec<String> = match args.add.is_empty() {
            true => groups[..k].concat(),
            false => every.iter().filter(|name| !args.add.contains(name)).cloned().collect(),
        };
        let (mut replayed, mut earlier_examples) = ((0, 0), Vec::new());
        let examples = match &mixed {
            Some(mixed) => Rc::clone(mixed),
            None => {
                let mut rows = of(group);
                let again = replayed_rows(args, k, &rows, earlier.iter().map(|t| (t, of(std::slice::from_ref(t)))));
                replayed = (again.len(), tokens(&again));
                rows.extend(again.iter().cloned());
                earlier_examples = again;
                rows.into()
            }
        };
        if dynamic && !args.replays() {
            earlier_examples = of(&earlier);
        }
        let label = format!("stage {}/{} ({})", k + 1, groups.len(), group.join(" "));
        let own_tasks = if mixed.is_some() { &every } else { group };
        stages.push(StagePlan {
            mixture: mixture(args, tasks, own_tasks, &counts, replayed.0, &label),
            label,
            examples,
            earlier_examples: if dynamic { earlier_examples } else { Vec::new() },
            replayed,
            tasks: group.clone(),
            earlier,
            budget: args.training.budget().part(k, groups.len())?,
            lr: args.stage_lr.get(k).copied().unwrap_or(args.training.lr),
        });
    }
    Ok(stages)
}

/// The mixture of a stage that trains on the rows of the tasks `own`, followed by `replayed` rows:
/// the shares of --mixture-temperature and the tasks' weights, in as many rows as there are.
fn mixture(
    args: &RunArgs,
    tasks: &[Task],
    own: &[String],
    counts: &BTreeMap<String, usize>,
    replayed: usize,
    label: &str,
) -> Vec<Part> {
    let of = |name: &String| tasks.iter().find(|task| task.name == *name).expect("the task was chosen");
    let (rows, weights): (Vec<usize>, Vec<f64>) = own.iter().map(|name| (counts[name], of(name).weight)).unzip();
    let alike = weights.iter().all(|weight| *weight == weights[0]);
    if own.len() == 1 || alike && args.mixture_temperature.is_none_or(|temperature| temperature == 1.0) {
        return Vec::new();
    }
    let drawn = epoch_rows(&rows, &weights, args.mixture_temperature.unwrap_or(1.0));
    let shown = own.iter().zip(&rows).zip(&drawn);
    let shown = shown
        .map(|((name, rows), drawn)| format!("{drawn} of {name} ({:.2} times {rows})", *drawn as f64 / *rows as f64));
    info!("{label}: an epoch has {} rows: {}", drawn.iter().sum::<usize>(), shown.collect::<Vec<_>>().join(", "));
    let mut parts: Vec<Part> = rows.into_iter().zip(drawn).map(|(rows, drawn)| Part { rows, drawn }).collect();
    if replayed > 0 {
        parts.push(Part { rows: replayed, drawn: replayed });
    }
    parts
}

/// Divides Σn rows in proportion to weight · n^(1/T): at least one row of each task, by largest
/// remainders.
fn epoch_rows(rows: &[usize], weights: &[f64], temperature: f64) -> Vec<usize> {
    let shares: Vec<f64> =
        rows.iter().zip(weights).map(|(n, weight)| weight * (*n as f64).powf(temperature.recip())).collect();
    let (total, sum) = (rows.iter().sum::<usize>(), shares.iter().sum::<f64>());
    let quotas: Vec<f64> = shares.iter().map(|share| total as f64 * share / sum).collect();
    let mut drawn: Vec<usize> = quotas.iter().map(|quota| (*quota as usize).max(1)).collect();
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by(|a, b| quotas[*b].fract().total_cmp(&quotas[*a].fract()).then(a.cmp(b)));
    let left = total.saturating_sub(drawn.iter().sum());
    order.iter().take(left).for_each(|task| drawn[*task] += 1);
    drawn
}

fn tokens(examples: &[Example]) -> usize {
    examples.iter().map(|example| example.ids.len()).sum()
}

/// The rows of earlier tasks that stage `k`, whose own rows are `rows`, replays.
fn replayed_rows<'a>(
    args: &RunArgs,
    k: usize,
    rows: &[Example],
    earlier: impl ExactSizeIterator<Item = (&'a String, Vec<Example>)>,
) -> Vec<Example> {
    let seed = |task: &str| splitmix64(seed_for(args.training.seed, task), k as u64);
    if args.replay > 0.0 {
        let share = |examples: &[Example]| ((examples.len() as f64 * args.replay).round() as usize).max(1);
        return earlier.flat_map(|(task, all)| balanced_sample(&all, share(&all), seed(task))).collect();
    }
    if args.replay_share == 0.0 || earlier.len() == 0 {
        return Vec::new();
    }
    let wanted = tokens(rows) as f64 * args.replay_share / (1.0 - args.replay_share);
    let each = wanted / earlier.len() as f64;
    earlier.flat_map(|(task, all)| rows_of_tokens(task, &all, each, seed(task))).collect()
}

/// Rows of a task with about `wanted` tokens in random order, at least one; from the beginning
/// again when all are used.
fn rows_of_tokens(task: &str, all: &[Example], wanted: f64, seed: u64) -> Vec<Example> {
    let (mut rows, mut seen) = (Vec::new(), 0);
    for i in Shuffled::new(all.len(), seed) {
        // Stop where the next row would go farther beyond the number than it is short of it now.
        let next = all[i].ids.len();
        if !rows.is_empty() && (seen as f64 + next as f64 / 2.0) > wanted {
            break;
        }
        seen += next;
        rows.push(all[i].clone());
    }
    if rows.len() > all.len() {
        warn!("{task}: its {} rows are replayed {:.1} times", all.len(), rows.len() as f64 / all.len() as f64);
    }
    rows
}

fn digest_inputs(args: &RunArgs, tasks: &[Task]) -> Result<Vec<(String, PathBuf, Digest)>> {
    // The templates and lengths of tasks.toml determine the examples.
    let (list, names) = (Tasks::read(&args.tasks)?, tasks.iter().filter(is_listed).map(|task| task.name.as_str()));
    let mut inputs = vec![(list.role(names.clone()), args.tasks.clone(), list.digest(names)?)];
    for task in tasks {
        inputs.push((format!("train:{}", task.name), task.train.clone(), Digest::of_file(&task.train)?));
    }
    for mask in &args.masks {
        inputs.push((format!("mask:{}", mask.name), mask.path.clone(), Digest::of_file(&mask.path)?));
    }
    for (n, path) in args.protect.iter().enumerate() {
        inputs.push((format!("protect:{}", n + 1), path.clone(), Digest::of_file(path)?));
    }
    if let Some(path) = &args.base {
        inputs.push(("base".to_owned(), path.clone(), Checkpoint::open(path)?.digest()?));
    }
    if let Some(path) = &args.groups {
        inputs.push(("groups".to_owned(), path.clone(), Digest::of_file(path)?));
    }
    Ok(inputs)
}

#[cfg(test)]
mod tests {
    use super::epoch_rows;

    #[test]
    fn rows_are_shared_by_temperature_and_weight() {
        assert_eq!(epoch_rows(&[900, 100], &[1.0, 1.0], 1.0), [900, 100]);
        assert_eq!(epoch_rows(&[900, 100], &[1.0, 1.0], 2.0), [750, 250]);
        assert_eq!(epoch_rows(&[900, 100], &[1.0, 1.0], 1e9), [500, 500]);
        assert_eq!(epoch_rows(&[100, 100], &[3.0, 1.0], 1.0), [150, 50]);
        // 5.33 rows each, the largest task a little more: the row left over is its.
        assert_eq!(epoch_rows(&[5, 5, 6], &[1.0; 3], 1e9), [5, 5, 6]);
        assert_eq!(epoch_rows(&[1_000_000, 1], &[1.0, 1e-3], 1.0), [1_000_000, 1]);
    }
}
