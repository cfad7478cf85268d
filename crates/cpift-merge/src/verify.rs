//! `verify`: checks that a checkpoint is well-formed and finite, and that its content has the
//! digest in its cpift.json.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use cpift_core::dispatch;
use cpift_core::files::RECORD_NAME;
use cpift_core::format::checkpoint::{check_readable, read_config};
use cpift_core::format::digest::Digest;
use cpift_core::format::json;
use cpift_core::record::provenance::{self, Provenance};
use cpift_core::stream::hashing::PieceHasher;
use cpift_core::{BadInput, Checkpoint, TensorSpec, TensorView};
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::engine::CHUNK;

/// Elements of a tensor that are not finite.
struct NotFinite {
    count: u64,
    /// Index of the first.
    first: usize,
}

/// Checks the checkpoint at `path` and returns the findings as JSON.
///
/// # Errors
/// [`BadInput`] if it cannot be opened, has NaN or Inf, or differs from the record in its
/// cpift.json.
pub fn verify(path: &Path) -> Result<Value> {
    let checkpoint = Checkpoint::open(path)?;
    if let Some(folder) = checkpoint.folder().filter(|folder| folder.join("config.json").exists()) {
        check_readable(path, &read_config(folder)?)?;
    }
    let views: Vec<TensorView<'_>> = checkpoint.parameters().collect();
    let (scans, digest) = scan(&checkpoint, &views)?;
    let not_finite: u64 = scans.iter().flatten().map(|s| s.count).sum();
    let recorded = recorded(&checkpoint)?;
    if recorded.is_some() {
        check_metadata(&checkpoint)?;
    }
    let differs = recorded.as_ref().is_some_and(|r| *r != digest);
    let problem = match (not_finite, differs) {
        (0, false) => None,
        (0, true) => Some("the content differs from the digest in cpift.json".to_owned()),
        (n, false) => Some(format!("{n} weights are not finite numbers")),
        (n, true) => {
            Some(format!("{n} weights are not finite numbers, and the content differs from the digest in cpift.json"))
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
    Err(error.found(found).hint("regenerate the checkpoint, or copy it again").into())
}

/// Refuses metadata without `format: pt`, without which transformers does not load a file; the
/// digest does not cover it.
fn check_metadata(checkpoint: &Checkpoint) -> Result<()> {
    match checkpoint.metadata().find(|(_, metadata)| metadata.get("format").is_none_or(|format| format != "pt")) {
        Some((file, found)) => Err(BadInput::new(file, "the metadata differs from what cpift-merge writes")
            .expected("format: pt")
            .found(format!("{found:?}"))
            .hint("regenerate the checkpoint, or copy it again")
            .into()),
        None => Ok(()),
    }
}

/// Digest in cpift.json, if the checkpoint is a directory that has one.
fn recorded(checkpoint: &Checkpoint) -> Result<Option<Digest>> {
    let Some(path) = checkpoint.folder().map(|f| f.join(RECORD_NAME)).filter(|p| p.exists()) else {
        return Ok(None);
    };
    let record: Provenance = json::read(&path)?;
    json::check_version(&path, "a provenance record", record.format_version, provenance::FORMAT_VERSION)?;
    Ok(record.output.map(|r| r.blake3))
}

/// Reads the checkpoint once; returns the elements of each of `views` that are not finite, and the
/// digest.
fn scan(checkpoint: &Checkpoint, views: &[TensorView<'_>]) -> Result<(Vec<Option<NotFinite>>, Digest)> {
    let specs: Vec<TensorSpec> = checkpoint.tensors().map(|view| view.spec()).collect();
    let hasher = PieceHasher::new(&specs, CHUNK);
    let places: BTreeMap<&str, usize> = specs.iter().enumerate().map(|(i, spec)| (spec.name.as_str(), i)).collect();
    let scan = |view: &TensorView<'_>| -> Option<NotFinite> {
        let index = places.get(view.name).copied().unwrap_or_default();
        let stored = view.is_as_stored(checkpoint) && places.contains_key(view.name);
        let found = (0..view.numel().div_ceil(CHUNK)).into_par_iter().filter_map(|i| {
            let len = CHUNK.min(view.numel() - i * CHUNK);
            if stored {
                hasher.add(index, i * CHUNK, view.slice(i * CHUNK, len));
            }
            let found = dispatch!(not_finite(view, i * CHUNK, len))?;
            Some(NotFinite { first: i * CHUNK + found.first, ..found })
        });
        found.reduce_with(|a, b| NotFinite { count: a.count + b.count, first: a.first.min(b.first) })
    };
    let scans = views.par_iter().map(scan).collect();
    hasher.add_missing(checkpoint);
    Ok((scans, checkpoint.with_adapter(hasher.finish(checkpoint.folder())?)))
}

/// Elements among `start..start + len` of a tensor that are not finite; `first` is counted from
/// `start`.
#[inline(always)]
fn not_finite(view: &TensorView<'_>, start: usize, len: usize) -> Option<NotFinite> {
    const BLOCK: usize = 1 << 10;
    let mut values = [0f64; BLOCK];
    let mut bad: Option<NotFinite> = None;
    for at in (0..len).step_by(BLOCK) {
        let values = &mut values[..BLOCK.min(len - at)];
        view.read(start + at, values);
        if !values.iter().fold(true, |finite, v| finite & v.is_finite()) {
            let mut which = (0..values.len()).filter(|j| !values[*j].is_finite());
            let first = at + which.next().expect("one is not finite");
            bad.get_or_insert(NotFinite { count: 0, first }).count += 1 + which.count() as u64;
        }
    }
    bad
}
