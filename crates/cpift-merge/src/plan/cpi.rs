//! The plan of `cpi`: base, backbone and tasks in the order of the groups, with their core regions.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use cpift_core::format::digest::Digest;
use cpift_core::format::groups::Groups;
use cpift_core::format::mask;
use cpift_core::record::provenance::check_made_from;
use cpift_core::run::cli::{self, Named};
use cpift_core::{BadInput, Mask, files};

use super::inputs::{Source, check_compatible, share_head};
use super::output::resolve;
use super::{Plan, check_epsilon, require_unit};
use crate::card;
use crate::cli::{CpiArgs, WeightsArg};
use crate::methods::Rule;
use crate::methods::sphere::COLLINEAR_COSINE;

/// Resolves `cpift-merge cpi`.
///
/// # Errors
/// [`cpift_core::Usage`] and [`BadInput`] as the arguments and inputs deserve.
pub fn plan_cpi(args: &CpiArgs, force: bool) -> Result<Plan> {
    let epsilon = args.epsilon.unwrap_or_else(|| COLLINEAR_COSINE.acos());
    check_epsilon(epsilon)?;
    if let Some(omega) = args.omega {
        require_unit("--omega", omega)?;
    }
    cli::require_unique(&args.tasks, "--task")?;
    cli::require_unique(&args.masks, "--mask")?;
    if !args.output.dry_run {
        files::check_output_dir(&args.output.out, force)?;
    }
    let groups = Groups::read(&args.groups)?;
    groups.check_names(&args.groups, "--task", args.tasks.iter().map(|t| &t.name))?;
    groups.check_names(&args.groups, "--mask", args.masks.iter().map(|m| &m.name))?;
    let (base, operands) = open(args, &groups)?;
    let tasks: Vec<&Source> = operands[1..].iter().map(Arc::as_ref).collect();
    let everything: Vec<&Source> = operands.iter().chain([&base]).map(Arc::as_ref).collect();
    let output = resolve(&args.output, force, &tasks, &operands[0], &base, &everything)?;
    check_groups_base(&args.groups, &groups, &base)?;
    for operand in operands.iter().filter(|o| !Arc::ptr_eq(o, &base)) {
        check_made_from(operand.path(), "base", (base.path(), base.digest()?))?;
    }
    let (cores, mut files) = open_masks(args, &groups, &base)?;
    files.insert("groups".into(), (args.groups.clone(), Digest::of_file(&args.groups)?));
    let folders = everything.iter().map(|source| source.path());
    files::check_not_input("--out", &output.dir, folders.chain(files.values().map(|(path, _)| path.as_path())))?;
    let rule = rule(args, operands.len() - 1);
    Ok(Plan {
        method: "cpi",
        rules: vec![rule; operands[0].checkpoint.parameters().count()],
        base: Some(base),
        operands,
        space: args.space,
        epsilon,
        cores,
        conflict: args.conflict,
        masks: Vec::new(),
        protect: None,
        seed: None,
        card: card::of_cpi(args, output.dtype),
        output,
        files,
    })
}

/// The base, and the backbone with the tasks in the order of the groups, all checked to be of the base's model.
fn open(args: &CpiArgs, groups: &Groups) -> Result<(Arc<Source>, Vec<Arc<Source>>)> {
    let mut base = Source::open("base", &args.base)?;
    let mut backbone = args.backbone.as_deref().map(|path| Source::open("backbone", path)).transpose()?;
    let mut tasks = Vec::new();
    for name in groups.task_order() {
        let task = args.tasks.iter().find(|t| t.name == name).expect("names are checked");
        tasks.push(Source::open(format!("task:{name}"), &task.path)?);
    }
    share_head(&mut [&mut base].into_iter().chain(&mut backbone).chain(&mut tasks).collect::<Vec<_>>());
    let base = Arc::new(base);
    let mut operands = vec![backbone.map_or_else(|| Arc::clone(&base), Arc::new)];
    operands.extend(tasks.into_iter().map(Arc::new));
    for operand in operands.iter().filter(|o| !Arc::ptr_eq(o, &base)) {
        check_compatible(&base, operand)?;
    }
    Ok((base, operands))
}

fn rule(args: &CpiArgs, tasks: usize) -> Rule {
    match (args.omega, args.weights) {
        (Some(omega), _) => Rule::Fold(vec![omega; tasks]),
        (None, WeightsArg::Equal) => Rule::Fold((1..=tasks).map(|i| 1.0 / (i as f64 + 1.0)).collect()),
        (None, WeightsArg::SphericalMean) => Rule::SphericalMean(vec![1.0 / (tasks as f64 + 1.0); tasks + 1]),
    }
}

fn check_groups_base(path: &Path, groups: &Groups, base: &Source) -> Result<()> {
    let digest = base.digest()?;
    if groups.base == *digest {
        return Ok(());
    }
    Err(BadInput::new(path, format!("made for another base than {}", base.path().display()))
        .expected(format!("base digest {digest}"))
        .found(format!("base digest {}", groups.base))
        .hint("extract the masks and group them again from this base")
        .into())
}

/// Masks in the order of the tasks, with the files they came from.
type OpenedMasks = (Vec<Mask>, BTreeMap<String, (PathBuf, Digest)>);

fn open_masks(args: &CpiArgs, groups: &Groups, base: &Source) -> Result<OpenedMasks> {
    let mut by_name = mask::open_all(args.masks.iter().map(Named::pair), &base.checkpoint, base.digest()?)?;
    let (mut masks, mut files) = (Vec::new(), BTreeMap::new());
    for name in groups.task_order() {
        let mask = by_name.remove(name).expect("names are checked");
        let digest = groups.check_mask(&args.groups, name, mask.path())?;
        files.insert(format!("mask:{name}"), (mask.path().to_owned(), digest));
        masks.push(mask);
    }
    Ok((masks, files))
}

/// Refuses masks that were extracted from another checkpoint than their task's; those whose tasks' digests are known are refused before
/// the tasks are read.
///
/// # Errors
/// [`BadInput`] naming both.
pub fn check_masks_of_tasks(plan: &Plan) -> Result<()> {
    for (mask, task) in plan.cores.iter().zip(&plan.operands[1..]) {
        let Some(digest) = task.known_digest().filter(|digest| **digest != mask.header.tuned) else { continue };
        return Err(BadInput::new(
            mask.path(),
            format!("extracted from another checkpoint than {}", task.path().display()),
        )
        .expected(format!("digest {digest}"))
        .found(format!("digest {} of the tuned checkpoint", mask.header.tuned))
        .hint("check that --task and --mask name the same probes, or extract the mask again")
        .into());
    }
    Ok(())
}
