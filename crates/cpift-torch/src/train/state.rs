//! States to resume from: OUT.checkpoints/step-N holds all that the rest of a run depends on, whole or not at all.
//!
//! weights/ and moments/ (safetensors, in the dtypes of training), metrics.jsonl so far, state.json. The order of the data, the learning
//! rate and the random bits follow from the seed and the step, so that nothing else needs saving.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cpift_core::files::StagedDir;
use cpift_core::{BadInput, Checkpoint, Dtype, json, provenance};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::StageReport;
use crate::weights::{self, Parameters};

const VERSION: u32 = 1;
const STATE: &str = "state.json";
/// The fact of cpift.json that tells what a run was started with.
pub const RUN: &str = "run";

/// How far a run has come.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Position {
    /// Reports of the stages that are done.
    pub finished: Vec<StageReport>,
    /// Steps made in the stage after those.
    pub step: usize,
    /// Tokens seen in it.
    pub tokens: usize,
    /// Loss of each of its steps.
    pub losses: Vec<f64>,
}

#[derive(Serialize, Deserialize)]
struct StateFile {
    format_version: u32,
    /// What the run was started with.
    run: Map<String, Value>,
    position: Position,
}

/// The states of one run.
pub struct States {
    folder: PathBuf,
    /// What the run is started with: a state of a run with other arguments or inputs is refused.
    run: Map<String, Value>,
    keep: usize,
}

/// A state that was found.
pub(crate) struct Found {
    pub folder: PathBuf,
    pub position: Position,
}

impl States {
    /// Those of the run that will write `out`; `run` names all its arguments and inputs that the result depends on.
    pub fn new(out: &Path, run: Map<String, Value>, keep: usize) -> Self {
        let mut name = out.file_name().unwrap_or_default().to_owned();
        name.push(".checkpoints");
        Self { folder: out.with_file_name(name), run, keep }
    }

    /// The newest state, checked to be of this very run; none where there is no state, or with `force` only one of another run.
    pub(crate) fn newest(&self, force: bool) -> Result<Option<Found>> {
        let Some((_, folder)) = self.list()?.pop() else { return Ok(None) };
        let path = folder.join(STATE);
        let value: Value = json::read(&path)?;
        json::check_version(&path, "a training state", json::version_of(&value), VERSION)?;
        let file: StateFile =
            serde_json::from_value(value).map_err(|e| BadInput::new(&path, format!("cannot be read: {e}")))?;
        match self.check(&path, &file.run) {
            Err(_) if force => return Ok(None),
            other => other?,
        }
        Ok(Some(Found { folder, position: file.position }))
    }

    /// Whether this very run has written `out` already; what it left of its states goes.
    ///
    /// # Errors
    /// [`BadInput`] when `out` is that of another run, or of none.
    pub fn finished(&self, out: &Path) -> Result<bool> {
        if out.symlink_metadata().is_err() {
            return Ok(false);
        }
        let path = out.join(provenance::FILE_NAME);
        let record: Value = json::read(&path)?;
        let Some(run) = record["facts"][RUN].as_object() else {
            return Err(BadInput::new(&path, "does not say which run wrote it").hint("--force replaces it").into());
        };
        self.check(&path, run)?;
        self.remove()?;
        Ok(true)
    }

    /// What the run is started with, as a fact for cpift.json under the name [`RUN`].
    pub fn run(&self) -> Value {
        Value::Object(self.run.clone())
    }

    /// Refuses what another run has saved.
    fn check(&self, path: &Path, saved: &Map<String, Value>) -> Result<()> {
        let differs = |key: &&String| saved.get(*key) != self.run.get(*key);
        let Some(key) = saved.keys().chain(self.run.keys()).find(differs) else { return Ok(()) };
        let shown = |run: &Map<String, Value>| run.get(key).map_or("nothing".to_owned(), Value::to_string);
        Err(BadInput::new(path, format!("of a run with another {key}"))
            .expected(shown(&self.run))
            .found(shown(saved))
            .hint("resume with the arguments and inputs of the first run; --force starts afresh")
            .into())
    }

    /// Refuses to start afresh over the states of an earlier run, unless `force`, which removes them.
    ///
    /// # Errors
    /// [`BadInput`] with the way out.
    pub(crate) fn start_afresh(&self, force: bool) -> Result<()> {
        if !force && !self.list()?.is_empty() {
            return Err(BadInput::new(&self.folder, "holds the states of a run that did not finish")
                .hint("--resume goes on from the newest; --force starts afresh and removes them")
                .into());
        }
        self.remove()
    }

    /// Saves one more state and removes the oldest beyond those to keep; returns its folder.
    pub(crate) fn save(
        &self,
        total_steps: usize,
        position: &Position,
        parameters: &Parameters,
        moments: &Parameters,
        metrics: &Path,
    ) -> Result<PathBuf> {
        let dest = self.folder.join(format!("step-{total_steps:07}"));
        if !dest.exists() {
            let staged = StagedDir::create(&dest, false)?;
            for (name, tensors) in [("weights", parameters), ("moments", moments)] {
                let folder = staged.path().join(name);
                fs::create_dir(&folder).with_context(|| format!("creating {}", folder.display()))?;
                weights::save(tensors, &folder, dtype_of(tensors))?;
            }
            fs::copy(metrics, staged.path().join(super::METRICS)).context("copying metrics.jsonl")?;
            let file = StateFile { format_version: VERSION, run: self.run.clone(), position: position.clone() };
            let path = staged.path().join(STATE);
            fs::write(&path, json::to_text(&file)?).with_context(|| format!("writing {}", path.display()))?;
            staged.commit()?;
        }
        let states = self.list()?;
        for (_, old) in states.iter().rev().skip(self.keep) {
            discard(old)?;
        }
        Ok(dest)
    }

    /// Removes all states; they are of no use once the output is there.
    ///
    /// # Errors
    /// I/O errors.
    pub fn remove(&self) -> Result<()> {
        self.list()?.iter().try_for_each(|(_, folder)| discard(folder))?;
        // What a killed run left half-written or half-removed.
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(".step-") {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let _ = fs::remove_dir(&self.folder);
        Ok(())
    }

    /// Steps and folder of each state, oldest first.
    fn list(&self) -> Result<Vec<(usize, PathBuf)>> {
        let entries = match fs::read_dir(&self.folder) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.with_context(|| format!("reading {}", self.folder.display()))?,
        };
        let mut states = Vec::new();
        for entry in entries {
            let entry = entry.with_context(|| format!("reading {}", self.folder.display()))?;
            let name = entry.file_name();
            if let Some(step) = name.to_str().and_then(|n| n.strip_prefix("step-")?.parse().ok()) {
                states.push((step, entry.path()));
            }
        }
        states.sort();
        Ok(states)
    }
}

/// Removes a state so that no half of it can be taken for one: what makes it a state goes first.
fn discard(folder: &Path) -> Result<()> {
    let gone = folder.with_file_name(format!(".{}.old", folder.file_name().unwrap_or_default().to_string_lossy()));
    fs::rename(folder, &gone)
        .and_then(|()| fs::remove_dir_all(&gone))
        .with_context(|| format!("removing {}", folder.display()))
}

fn dtype_of(tensors: &Parameters) -> Dtype {
    let bf16 = tensors.values().next().is_some_and(|t| t.kind() == tch::Kind::BFloat16);
    if bf16 { Dtype::BF16 } else { Dtype::F32 }
}

impl Found {
    /// Copies the saved weights and moments over the present ones.
    ///
    /// # Errors
    /// [`BadInput`] when one is missing or of another shape.
    pub fn load(&self, name: &str, tensors: &Parameters) -> Result<()> {
        weights::overwrite(tensors, &Checkpoint::open(&self.folder.join(name))?)
    }
}
