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

/// Runs `plan` with `card` as the model card. The output directory appears complete, with
/// cpift.json, or not at all.
///
/// # Errors
/// [`cpift_core::BadInput`] if an input has a number that is not finite; too little disk space, or
/// a failed write.
pub(crate) fn merge(plan: &Plan, card: &str, mut record: Recorder) -> Result<Summary> {
    check_space(&plan.output.dir, plan.bytes_to_write(), files::available_bytes(&plan.output.dir)?)?;
    plan.check_masks_of_tasks()?;
    let staged = StagedDir::create(&plan.output.dir, plan.output.force)?;
    let (stats, digest) = write(plan, card, staged.path())?;
    let summary = Summary::of(plan, &stats);
    // The digests of the tasks are known by now.
    plan.check_masks_of_tasks()?;
    record_inputs(plan, &mut record)?;
    for (name, value) in summary.facts() {
        record.fact(&name, value);
    }
    record.write_into_with(staged.path(), digest)?;
    staged.commit()?;
    Ok(summary)
}

/// Writes all files but the record to `folder`, and returns the digest of its content.
fn write(plan: &Plan, card: &str, folder: &Path) -> Result<(Vec<TensorStats>, Digest)> {
    let copies = plan.copies();
    let specs: Vec<TensorSpec> = plan.specs().into_iter().chain(copies.iter().map(|view| view.spec())).collect();
    let output = Output::create(folder, &specs, plan.output.shard_size)?;
    let hashes = InputHashes::new(plan);
    let stats = output.flushed(|| engine::run(plan, &hashes, &output))?;
    hashes.finish()?;
    copies.iter().try_for_each(|view| output.copy(view))?;
    for (name, text) in [("config.json", json::to_text(&plan.output.config)?.as_str()), ("README.md", card)] {
        let path = folder.join(name);
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    copy_sidecars(&plan.output.side_files, folder)?;
    Ok((stats, output.finish(folder)?))
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
