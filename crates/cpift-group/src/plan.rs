//! The arguments, checked: masks that fit each other are opened, order inputs are read, and outputs
//! are free to be written.

use std::path::{Path, PathBuf};

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::files::{check_not_input, check_output};
use cpift_core::format::digest::Digest;
use cpift_core::format::groups::{Groups, Parting};
use cpift_core::format::names::TensorKind;
use cpift_core::format::scores::Scores;
use cpift_core::format::tasks::Tasks;
use cpift_core::record::provenance::Recorder;
use cpift_core::run::cli;
use cpift_core::{BadInput, Mask};

use crate::args::{Args, Method, Parts, Tau};
use crate::order::{help, read_edges, read_losses, read_probes};
use crate::partition::{Partition, by_kind, shuffled};

/// A checked grouping, with its masks open and its order inputs read.
pub(crate) struct Plan {
    pub(crate) tasks: Vec<String>,
    pub(crate) masks: Vec<Mask>,
    pub(crate) excluded: Vec<TensorKind>,
    pub(crate) tau: Tau,
    /// The groups and their method, if they do not come from τ.
    pub(crate) parting: Option<(Parting, Partition)>,
    pub(crate) method: Method,
    pub(crate) seed: u64,
    pub(crate) input: OrderInput,
    /// `None` if nothing is to be written.
    pub(crate) outputs: Option<Outputs>,
    pub(crate) sweep: bool,
}

/// Input of the order, besides the masks.
pub(crate) enum OrderInput {
    Nothing,
    /// The base's loss on every task.
    Losses(Vec<f64>),
    /// The file and its edges, as task indices.
    Edges(PathBuf, Vec<(usize, usize)>),
    /// help(i → j), [tasks × tasks].
    Help(Vec<Vec<f64>>),
}

/// Paths of the outputs.
pub(crate) struct Outputs {
    pub(crate) groups: PathBuf,
    pub(crate) svg: PathBuf,
    pub(crate) layers: PathBuf,
    pub(crate) layers_svg: PathBuf,
    pub(crate) force: bool,
}

impl Plan {
    /// Checks the arguments, opens the masks and reads the other inputs.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] for arguments that do not go together; [`BadInput`] for unusable or
    /// unrelated masks, order inputs that do not fit the tasks, or an output that exists.
    pub(crate) fn new(args: &Args, recorder: &mut Recorder) -> Result<Self> {
        cli::require_unique(&args.masks, "--mask")?;
        check_flags(args)?;
        let outputs = Outputs::named_by(args);
        outputs.iter().try_for_each(|outputs| outputs.check(args))?;
        let masks: Vec<Mask> = args.masks.iter().map(|m| Mask::open(&m.path)).collect::<Result<_>>()?;
        masks.iter().try_for_each(Mask::verify_flags)?;
        masks[1..].iter().try_for_each(|mask| check_same_layout(&masks[0], mask))?;
        let tasks: Vec<String> = args.masks.iter().map(|m| m.name.clone()).collect();
        let input = read_order_input(args, &tasks, &masks[0].header.base, recorder)?;
        let parting = parting(args, &tasks, recorder)?;
        if args.order == Method::Random || args.partition == Parts::Random {
            recorder.seed(args.seed);
        }
        Ok(Self {
            excluded: excluded_kinds(&masks[0], &args.exclude)?,
            tasks,
            masks,
            tau: args.tau,
            parting,
            method: args.order,
            seed: args.seed,
            input,
            outputs,
            sweep: args.sweep,
        })
    }
}

impl Outputs {
    /// The outputs that the arguments name, if any.
    pub(crate) fn named_by(args: &Args) -> Option<Self> {
        let out = args.out.as_ref()?;
        let or = |given: &Option<PathBuf>, extension| given.clone().unwrap_or_else(|| out.with_extension(extension));
        Some(Self {
            groups: out.clone(),
            svg: or(&args.svg, "svg"),
            layers: or(&args.layers, "layers.json"),
            layers_svg: or(&args.layers_svg, "layers.svg"),
            force: args.common.force(),
        })
    }

    fn check(&self, args: &Args) -> Result<()> {
        let named = self.named();
        for (i, (flag, path)) in named.iter().enumerate() {
            if let Some((other, _)) = named[..i].iter().find(|(_, earlier)| earlier == path) {
                return Err(usage(format!("{other} and {flag} name the same file")));
            }
            check_output(path, self.force)?;
            let masks = args.masks.iter().map(|mask| mask.path.as_path());
            let others =
                [&args.scores, &args.edges, &args.tasks, &args.like].into_iter().flatten().map(PathBuf::as_path);
            check_not_input(flag, path, masks.chain(others))?;
        }
        Ok(())
    }

    fn named(&self) -> [(&'static str, &Path); 4] {
        [("--out", &self.groups), ("--svg", &self.svg), ("--layers", &self.layers), ("--layers-svg", &self.layers_svg)]
    }
}

/// Refuses an order without its inputs, and inputs that the order would ignore.
fn check_flags(args: &Args) -> Result<()> {
    check_partition_flags(args)?;
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

/// Refuses a partition without its inputs, and inputs that it would ignore.
fn check_partition_flags(args: &Args) -> Result<()> {
    let name = args.partition.name();
    for (flag, what, given, of) in [
        ("--tasks", " with a tasks.toml", args.tasks.is_some(), Parts::Kind),
        ("--groups", "", args.groups.is_some(), Parts::Random),
        ("--like", " with a groups.json", args.like.is_some(), Parts::Like),
    ] {
        match (given, args.partition == of) {
            (false, true) => return Err(usage(format!("--partition {name} needs {flag}{what}"))),
            (true, false) => return Err(usage(format!("{flag} has no part in --partition {name}"))),
            _ => {}
        }
    }
    let (tasks, groups) = (args.masks.len(), args.groups.unwrap_or(1));
    if !(1..=tasks).contains(&groups) {
        return Err(usage(format!("--groups must be 1 to {tasks}, the number of tasks: found {groups}")));
    }
    Ok(())
}

/// Groups that do not come from τ.
fn parting(args: &Args, tasks: &[String], recorder: &mut Recorder) -> Result<Option<(Parting, Partition)>> {
    if let Some(path) = &args.tasks {
        let kinds = read_kinds(path, tasks)?;
        let list = Tasks::read(path)?;
        recorder.tasks(&list, list.list.iter().map(|task| task.name.as_str()))?;
        return Ok(Some((Parting::Kind {}, by_kind(&kinds))));
    }
    if let Some(path) = &args.like {
        recorder.input("like", path, Digest::of_file(path)?);
        return read_groups(path, tasks).map(|groups| Some((Parting::Like {}, groups)));
    }
    Ok(args
        .groups
        .map(|groups| (Parting::Random { seed: args.seed, groups }, shuffled(tasks.len(), groups, args.seed))))
}

/// The groups of another groups.json, in its order, as indices into `tasks`.
fn read_groups(path: &Path, tasks: &[String]) -> Result<Partition> {
    let other = Groups::read(path)?;
    let place = |name: &String| tasks.iter().position(|task| task == name);
    let places = |group: &Vec<String>| group.iter().map(place).collect::<Option<Vec<usize>>>();
    match other.groups.iter().map(places).collect::<Option<Partition>>() {
        Some(groups) if other.tasks.len() == tasks.len() => Ok(groups),
        _ => Err(BadInput::new(path, "these groups are of other tasks than the masks")
            .expected(tasks.join(", "))
            .found(other.tasks.join(", "))
            .into()),
    }
}

/// The kind of each task.
fn read_kinds(path: &Path, tasks: &[String]) -> Result<Vec<String>> {
    let listed = Tasks::read(path)?;
    let kind = |name: &String| {
        listed.named(name)?.kind.clone().ok_or_else(|| {
            BadInput::new(path, format!("the task {name} has no kind"))
                .expected("kind = \"…\" for every task that is grouped")
                .hint("tasks of one kind are trained together; a task unlike all others needs a kind of its own")
                .into()
        })
    };
    tasks.iter().map(kind).collect()
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
    if (a.scope, a.percent, a.metric) != (b.scope, b.percent, b.metric) {
        log::warn!(
            "{} and {} were chosen with different --scope, --percent or --score: their similarity compares unlike regions",
            first.path().display(),
            other.path().display()
        );
    }
    Ok(())
}

/// Kinds of tensors left out: those that the masks exclude from D, and those of `--exclude`.
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
        recorder.input("scores", &Scores::file(path), digest);
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
