//! Runs a plan: merges every tensor, copies the rest, and records the result.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cpift_core::TensorSpec;
use cpift_core::files::{self, StagedDir, StagedPath};
use cpift_core::format::checkpoint::{copy_sidecars, is_sidecar};
use cpift_core::format::digest::Digest;
use cpift_core::format::json;
use cpift_core::record::provenance::Recorder;

use crate::engine::{self, InputHashes, Output, TensorStats};
use crate::plan::{Destination, Plan, check_space};
use crate::report::Summary;

/// A merge that is ready to run.
pub(crate) struct Merge {
    pub plan: Plan,
    /// Text of the model card.
    pub card: String,
    pub record: Recorder,
}

/// Runs one merge. The output appears complete, with cpift.json, or not at all.
///
/// # Errors
/// As [`merge_all`].
pub(crate) fn merge(merge: Merge) -> Result<Summary> {
    Ok(merge_all(vec![merge])?.remove(0))
}

/// Runs merges of the same inputs with one reading of them. Each output appears complete, with
/// cpift.json, or not at all.
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
    let staged: Vec<Staged> = plans.iter().map(|plan| Staged::create(plan)).collect::<Result<_>>()?;
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
        staged.commit(record, digest)?;
        summaries.push(summary);
    }
    Ok(summaries)
}

/// An output that is not complete yet.
enum Staged {
    /// A directory.
    Folder(StagedDir),
    /// A single file, with its record beside it.
    File(StagedPath),
}

impl Staged {
    fn create(plan: &Plan) -> Result<Self> {
        let output = &plan.output;
        Ok(match output.layout.is_file {
            true => Self::File(StagedPath::create(&output.dir, output.force)?),
            false => Self::Folder(StagedDir::create(&output.dir, output.force)?),
        })
    }

    fn path(&self) -> PathBuf {
        match self {
            Self::Folder(staged) => staged.path().to_owned(),
            Self::File(staged) => staged.path(),
        }
    }

    /// Writes the record and moves the output to its place; `digest` is that of a directory.
    fn commit(self, record: Recorder, digest: Option<Digest>) -> Result<()> {
        match self {
            Self::Folder(staged) => {
                record.write_into_with(staged.path(), digest.expect("directories have one"))?;
                staged.commit()
            }
            Self::File(staged) => record.commit(staged, &[]),
        }
    }
}

/// Statistics of a merge, and the digest of its content if it is a directory.
type Written = (Vec<TensorStats>, Option<Digest>);

/// Writes all files but the record to the staged outputs.
fn write(merges: &[Merge], staged: &[Staged]) -> Result<Vec<Written>> {
    let plans: Vec<&Plan> = merges.iter().map(|merge| &merge.plan).collect();
    let create = |(plan, staged): (&&Plan, &Staged)| {
        let copies = plan.copies();
        let specs = plan.specs().into_iter().chain(copies.iter().map(|view| view.spec()));
        let (output, specs) = (&plan.output, specs.collect::<Vec<TensorSpec>>());
        Output::create(&output.layout, &staged.path(), &specs, output.shard_size)
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
    let finish = |(((merge, staged), output), stats): (((&Merge, &Staged), Output), Vec<TensorStats>)| {
        merge.plan.copies().iter().try_for_each(|view| output.copy(view))?;
        Ok((
            stats,
            match staged {
                Staged::Folder(staged) => Some(finish(merge, staged.path(), output)?),
                Staged::File(_) => None,
            },
        ))
    };
    merges.iter().zip(staged).zip(outputs).zip(stats).map(finish).collect()
}

/// Writes the files beside the tensors, and returns the digest of the content.
fn finish(Merge { plan, card, .. }: &Merge, folder: &Path, output: Output) -> Result<Digest> {
    let Destination { config, side_files, written, others, .. } = &plan.output;
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    };
    let config = (!config.is_null()).then(|| json::to_text(config)).transpose()?;
    for (name, text) in config.iter().map(|text| ("config.json", text.as_str())).chain([("README.md", card.as_str())]) {
        write(name, text)?;
    }
    if let Some(from) = side_files {
        copy_sidecars(from, folder)?;
    }
    if let Some(from) = plan.backbone().folder() {
        // Tokenizer and chat template come from one directory only.
        let all = side_files.as_deref() == Some(from);
        others.copy(from, folder, |name| all || !is_sidecar(name))?;
    }
    written.iter().try_for_each(|(name, text)| write(name, text))?;
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
