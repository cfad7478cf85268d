//! `verify`: is a checkpoint sound, finite, and what its cpift.json says it is?

use std::path::Path;

use anyhow::Result;
use cpift_core::checkpoint::{Digest, Float};
use cpift_core::provenance::{self, Provenance};
use cpift_core::{BadInput, Checkpoint, TensorView, json};
use rayon::prelude::*;
use serde_json::{Value, json};

/// The first bad element of a tensor and how many there are.
struct NotFinite {
    count: u64,
    first: usize,
}

/// Checks the checkpoint at `path` and returns what was found, for `--json`.
///
/// # Errors
/// [`BadInput`] when it cannot be opened, holds NaN or Inf, or is not what its cpift.json records.
pub fn verify(path: &Path) -> Result<Value> {
    let checkpoint = Checkpoint::open(path)?;
    let views: Vec<TensorView<'_>> = checkpoint.parameters().collect();
    let scans: Vec<Option<NotFinite>> = views.par_iter().map(scan).collect();
    let not_finite: u64 = scans.iter().flatten().map(|s| s.count).sum();
    let digest = Digest::of_checkpoint(&checkpoint)?;
    let recorded = recorded(&checkpoint)?;
    let differs = recorded.as_ref().is_some_and(|r| *r != digest);
    let problem = match (not_finite, differs) {
        (0, false) => None,
        (0, true) => Some("the content is not what cpift.json records".to_owned()),
        (n, false) => Some(format!("{n} weights are not finite numbers")),
        (n, true) => {
            Some(format!("{n} weights are not finite numbers, and the content is not what cpift.json records"))
        }
    };
    let Some(problem) = problem else {
        let state = if recorded.is_some() { "matches cpift.json" } else { "has no digest recorded in a cpift.json" };
        log::info!("{}: {} parameter tensors, all finite; the content {state}", path.display(), views.len());
        return Ok(
            json!({"path": path, "tensors": views.len(), "not_finite": 0, "digest": digest, "recorded": recorded}),
        );
    };
    let mut error = BadInput::new(path, problem).expected(match &recorded {
        Some(recorded) => format!("finite weights and digest {recorded}"),
        None => "finite weights".to_owned(),
    });
    let mut found = format!("digest {digest}");
    if let Some((view, scan)) = views.iter().zip(&scans).find_map(|(v, s)| Some((v, s.as_ref()?))) {
        error = error.tensor(view.name);
        found = format!("the first at element {} of this tensor in {}; {found}", scan.first, view.file.display());
    }
    Err(error.found(found).hint("make the checkpoint again, or copy it again").into())
}

/// The digest in cpift.json, where the checkpoint is a folder that has one.
fn recorded(checkpoint: &Checkpoint) -> Result<Option<Digest>> {
    let Some(path) = checkpoint.folder().map(|f| f.join(provenance::FILE_NAME)).filter(|p| p.exists()) else {
        return Ok(None);
    };
    let record: Provenance = json::read(&path)?;
    json::check_version(&path, "a provenance record", record.format_version, provenance::FORMAT_VERSION)?;
    Ok(record.output.map(|r| r.blake3))
}

fn scan(view: &TensorView<'_>) -> Option<NotFinite> {
    const BLOCK: usize = 1 << 12;
    let mut values = Vec::new();
    let mut bad: Option<NotFinite> = None;
    for start in (0..view.numel()).step_by(BLOCK) {
        values.resize(BLOCK.min(view.numel() - start), 0f64);
        view.read(start, &mut values);
        for (at, _) in values.iter().enumerate().filter(|(_, v)| !Float::is_finite(**v)) {
            bad.get_or_insert(NotFinite { count: 0, first: start + at }).count += 1;
        }
    }
    bad
}
