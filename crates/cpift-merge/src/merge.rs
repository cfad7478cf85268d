//! Running a plan: merge tensor by tensor, copy the rest, record.

use std::path::Path;

use anyhow::{Context, Result};
use cpift_core::TensorSpec;
use cpift_core::files::{self, StagedDir};
use cpift_core::format::checkpoint::copy_sidecars;
use cpift_core::format::digest::Digest;
use cpift_core::format::json;
use cpift_core::record::provenance::Recorder;

use crate::engine::{self, InputHashes, Output, TensorStats};
use crate::plan::cpi::check_masks_of_tasks;
use crate::plan::{Plan, check_space};
use crate::report::Summary;

/// Runs `plan`: the output folder appears whole, with provenance inside, or not at all.
///
/// # Errors
/// [`cpift_core::BadInput`] where an input holds a number that is not finite; I/O errors.
pub fn merge(plan: &Plan, mut record: Recorder) -> Result<Summary> {
    check_space(&plan.output.dir, plan.bytes_to_write(), files::available_bytes(&plan.output.dir)?)?;
    check_masks_of_tasks(plan)?;
    let staged = StagedDir::create(&plan.output.dir, plan.output.force)?;
    let (settled, digest) = write(plan, staged.path())?;
    let summary = Summary::of(plan, &settled);
    check_masks_of_tasks(plan)?;
    record_inputs(plan, &mut record)?;
    for (name, value) in summary.facts() {
        record.fact(&name, value);
    }
    record.write_into_with(staged.path(), digest)?;
    staged.commit()?;
    Ok(summary)
}

/// Fills `folder` but for the record, and returns the digest of what is in it.
fn write(plan: &Plan, folder: &Path) -> Result<(Vec<TensorStats>, Digest)> {
    let copies = plan.copies();
    let specs: Vec<TensorSpec> = plan.specs().into_iter().chain(copies.iter().map(|view| view.spec())).collect();
    let output = Output::create(folder, &specs, plan.output.shard_size)?;
    let hashes = InputHashes::new(plan.sources());
    let settled = output.flushed(|| engine::run(&plan.job(), &hashes, &output))?;
    hashes.finish()?;
    copies.iter().try_for_each(|view| output.copy(view))?;
    for (name, text) in [("config.json", &json::to_text(&plan.output.config)?), ("README.md", &plan.card)] {
        let path = folder.join(name);
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    copy_sidecars(&plan.output.side_files, folder)?;
    Ok((settled, output.finish(folder)?))
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
