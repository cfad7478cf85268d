//! Runs a plan: merges every tensor, copies the rest, and records the result.

use std::path::Path;

use anyhow::{Context, Result};
use cpift_core::TensorSpec;
use cpift_core::files::{self, StagedDir};
use cpift_core::format::checkpoint::copy_sidecars;
use cpift_core::format::digest::Digest;
use cpift_core::format::json;
use cpift_core::record::provenance::Recorder;

use crate::engine::{self, InputHashes, Output, TensorStats};
use crate::plan::{Plan, check_space};
use crate::report::Summary;

/// A merge that is ready to run.
pub(crate) struct Merge {
    pub plan: Plan,
    /// Text of the model card.
    pub card: String,
    pub record: Recorder,
}

/// Runs one merge. The output directory appears complete, with cpift.json, or not at all.
///
/// # Errors
/// As [`merge_all`].
pub(crate) fn merge(merge: Merge) -> Result<Summary> {
    Ok(merge_all(vec![merge])?.remove(0))
}

/// Runs merges of the same inputs with one reading of them. Each output directory appears complete,
/// with cpift.json, or not at all.
///
/// # Errors
/// [`cpift_core::BadInput`] if an input has a number that is not finite; too little disk space, or
/// a failed write.
pub(crate) fn merge_all(merges: Vec<Merge>) -> Result<Vec<Summary>> {
    let plans: Vec<&Plan> = merges.iter().map(|merge| &merge.plan).collect();
    let needed = plans.iter().map(|plan| plan.bytes_to_write()).sum();
    let first = &plans[0].output.dir;
    check_space(first, needed, files::available_bytes(first)?)?;
    plans.iter().try_for_each(|plan| plan.check_masks_of_tasks())?;
    let stage = |plan: &&Plan| StagedDir::create(&plan.output.dir, plan.output.force);
    let staged: Vec<StagedDir> = plans.iter().map(stage).collect::<Result<_>>()?;
    let written = write(&merges, &staged)?;
    let mut summaries = Vec::new();
    for ((Merge { plan, mut record, .. }, staged), (stats, digest)) in merges.into_iter().zip(staged).zip(written) {
        let summary = Summary::of(&plan, &stats);
        // The digests of the tasks are known by now.
        plan.check_masks_of_tasks()?;
        record_inputs(&plan, &mut record)?;
        for (name, value) in summary.facts() {
            record.fact(&name, value);
        }
        record.write_into_with(staged.path(), digest)?;
        staged.commit()?;
        summaries.push(summary);
    }
    Ok(summaries)
}

/// Writes all files but the record to the staged folders, and returns the digest of the content of
/// each.
fn write(merges: &[Merge], staged: &[StagedDir]) -> Result<Vec<(Vec<TensorStats>, Digest)>> {
    let plans: Vec<&Plan> = merges.iter().map(|merge| &merge.plan).collect();
    let create = |(plan, staged): (&&Plan, &StagedDir)| {
        let copies = plan.copies();
        let specs = plan.specs().into_iter().chain(copies.iter().map(|view| view.spec()));
        Output::create(staged.path(), &specs.collect::<Vec<TensorSpec>>(), plan.output.shard_size)
    };
    let outputs: Vec<Output> = plans.iter().zip(staged).map(create).collect::<Result<_>>()?;
    let hashes = InputHashes::new(plans[0]);
    let stats = Output::all_flushed(&outputs, Box::new(|| engine::run(&plans, &hashes, &outputs)))?;
    hashes.finish()?;
    for other in &plans[1..] {
        for (known, source) in plans[0].sources().zip(other.sources()) {
            source.set_digest(known.digest()?.clone());
        }
    }
    let parts = merges.iter().zip(staged).zip(outputs).zip(stats);
    parts.map(|(((merge, staged), output), stats)| Ok((stats, finish(merge, staged.path(), output)?))).collect()
}

/// Writes the files beside the merged tensors, and returns the digest of the content.
fn finish(Merge { plan, card, .. }: &Merge, folder: &Path, output: Output) -> Result<Digest> {
    plan.copies().iter().try_for_each(|view| output.copy(view))?;
    for (name, text) in [("config.json", json::to_text(&plan.output.config)?.as_str()), ("README.md", card)] {
        let path = folder.join(name);
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    copy_sidecars(&plan.output.side_files, folder)?;
    plan.output.write_chat_template(folder)?;
    output.finish(folder)
}

fn record_inputs(plan: &Plan, record: &mut Recorder) -> Result<()> {
    for source in plan.sources() {
        record.input(source.role.as_str(), source.path(), source.digest()?.clone());
    }
    for (role, (path, digest)) in &plan.files {
        record.input(role.as_str(), path, digest.clone());
    }
    if let Some(seed) = plan.seed {
        record.seed(seed);
    }
    Ok(())
}
