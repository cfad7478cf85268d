//! state.json: what a run was started with, how far it has come, and the digests of all files of the state.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use cpift_core::BadInput;
use cpift_core::format::digest::Digest;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{EXTRA, MOMENTS, Progress, WEIGHTS};

pub(super) const VERSION: u32 = 3;
pub(super) const STATE: &str = "state.json";

#[derive(Serialize, Deserialize)]
pub(super) struct StateFile {
    pub format_version: u32,
    /// BLAKE3 of every other file of the state, by its path in the folder.
    files: BTreeMap<String, Digest>,
    /// BLAKE3 of the two below.
    own: Digest,
    /// What the run was started with.
    pub run: Map<String, Value>,
    pub position: Progress,
}

impl StateFile {
    pub fn new(folder: &Path, run: Map<String, Value>, position: Progress) -> Result<Self> {
        let own = digest_of(&run, &position)?;
        Ok(Self { format_version: VERSION, files: digests_in(folder)?, own, run, position })
    }

    /// Checks that the state in `folder` is what was saved.
    pub fn verify(&self, folder: &Path) -> Result<()> {
        let damaged = |name: &str, what: &str| {
            let error = BadInput::new(folder.join(name), format!("{what}, so the state is not what was saved"));
            error.hint("an older state may serve: --resume --force passes over this one")
        };
        if digest_of(&self.run, &self.position)? != self.own {
            return Err(damaged(STATE, "does not have the digest that it records").into());
        }
        let found = digests_in(folder)?;
        let differs = |name: &&String| found.get(*name) != self.files.get(*name);
        match self.files.keys().chain(found.keys()).find(differs) {
            Some(name) if !found.contains_key(name) => Err(damaged(name, "is missing").into()),
            Some(name) => Err(damaged(name, &format!("does not have the digest that {STATE} records")).into()),
            None => Ok(()),
        }
    }
}

/// The digest of what state.json itself says.
fn digest_of(run: &Map<String, Value>, position: &Progress) -> Result<Digest> {
    Ok(Digest::of_chunks([serde_json::to_vec(&(run, position))?]))
}

/// The digests of all files of a state but state.json.
fn digests_in(folder: &Path) -> Result<BTreeMap<String, Digest>> {
    let mut digests = BTreeMap::new();
    for inside in ["", WEIGHTS, MOMENTS, EXTRA] {
        let entries = match fs::read_dir(folder.join(inside)) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            other => other.with_context(|| format!("reading {}", folder.join(inside).display()))?,
        };
        for entry in entries {
            let path = entry.with_context(|| format!("reading {}", folder.display()))?.path();
            let name = path.strip_prefix(folder).unwrap_or(&path).to_string_lossy().into_owned();
            if path.is_file() && name != STATE {
                digests.insert(name, Digest::of_file(&path)?);
            }
        }
    }
    Ok(digests)
}
