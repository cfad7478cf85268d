//! States to resume from: OUT.checkpoints/step-N holds all that the rest of a run depends on, whole or not at all.
//!
//! weights/ and moments/ (safetensors, in the dtypes of training), extra/ where adapters train or a mask moves (f32), metrics.jsonl so
//! far, state.json with the digests of them all. The order of the data, the learning
//! rate and the random bits follow from the seed and the step, so that nothing else needs saving. OUT.checkpoints/metrics.jsonl is what
//! the run at work writes its figures to; it stays where a run fails.

mod file;

use std::fs::{self, File, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cpift_core::files::{NewFolders, RECORD_NAME, StagedDir};
use cpift_core::format::json;
use cpift_core::{BadInput, Checkpoint, Dtype};
use log::warn;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use file::{STATE, StateFile, VERSION};

use super::{METRICS, StageReport};
use crate::args::TrainingArgs;
use crate::weights::{self, Parameters};

const WEIGHTS: &str = "weights";
const MOMENTS: &str = "moments";
const EXTRA: &str = "extra";
/// The fact of cpift.json that tells what a run was started with.
pub const RUN: &str = "run";

/// How far a run has come.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// Reports of the stages that are done.
    pub finished: Vec<StageReport>,
    /// Steps made in the stage after those.
    pub step: usize,
    /// Tokens seen in it.
    pub tokens: usize,
    /// Loss of each of its steps.
    pub losses: Vec<f64>,
    /// Tokens of it that only importance was measured on.
    #[serde(default)]
    pub importance_tokens: usize,
}

/// Checks the state in `folder`, or all states in it, against the digests that were saved; returns how many there are.
///
/// # Errors
/// [`BadInput`] naming what is damaged, or where there is no state.
pub fn verify_states(folder: &Path) -> Result<usize> {
    let folders = match folder.join(STATE).exists() {
        true => vec![folder.to_owned()],
        false => list(folder)?.into_iter().map(|(_, state)| state).collect(),
    };
    if folders.is_empty() {
        return Err(BadInput::new(folder, "holds no training state")
            .expected("OUT.checkpoints, or a step-N in it")
            .into());
    }
    folders.iter().try_for_each(|state| parts(state).map(drop))?;
    Ok(folders.len())
}

/// The states of one run.
pub struct States {
    folder: PathBuf,
    /// What the run is started with: a state of a run with other arguments or inputs is refused.
    run: Map<String, Value>,
    /// The same with what only the output depends on.
    output: Map<String, Value>,
    keep: usize,
}

/// A state that was found.
pub(crate) struct SavedState {
    pub folder: PathBuf,
    pub position: Progress,
    weights: Checkpoint,
    moments: Checkpoint,
    extra: Option<Checkpoint>,
}

/// The right to work in the states' folder, which is gone at the end where it is empty.
pub(crate) struct StateLock {
    folder: PathBuf,
    /// Released when the process ends, however it ends.
    _lock: File,
    _parents: NewFolders,
}

impl Drop for StateLock {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.folder);
    }
}

impl States {
    /// Those of the run with `args` that will write `out`; `run` names all arguments and inputs that the weights depend on.
    pub fn new(out: &Path, run: Map<String, Value>, args: &TrainingArgs) -> Self {
        let mut output = run.clone();
        output.insert("save_dtype".into(), args.save_dtype.name().into());
        Self { folder: Self::folder(out), run, output, keep: args.keep }
    }

    /// The folder of the states of the run that writes `out`.
    pub fn folder(out: &Path) -> PathBuf {
        let mut name = out.file_name().unwrap_or_default().to_owned();
        name.push(".checkpoints");
        out.with_file_name(name)
    }

    /// The file that the run at work writes its figures to.
    pub(crate) fn metrics(&self) -> PathBuf {
        self.folder.join(METRICS)
    }

    /// Makes the folder, for this run alone as long as what is returned lives.
    ///
    /// # Errors
    /// [`BadInput`] when another run is at work in it; I/O errors.
    pub(crate) fn hold(&self) -> Result<StateLock> {
        if self.folder.is_symlink() {
            return Err(BadInput::new(&self.folder, "is a symbolic link, which is not followed for writing")
                .hint("name the place itself with --out, or mount it there")
                .into());
        }
        for _ in 0..100 {
            let parents = NewFolders::make(&self.folder)?;
            let Ok(lock) = File::open(&self.folder) else { continue };
            // Some network file systems have no locks: there, two runs are not told apart.
            if matches!(lock.try_lock(), Err(TryLockError::WouldBlock)) {
                return Err(BadInput::new(&self.folder, "another run is at work here")
                    .hint("wait until it has ended, or choose another --out")
                    .into());
            }
            // A run that has just ended may have removed what was opened.
            let opened = lock.metadata().context("asking for the folder's number")?;
            if fs::metadata(&self.folder).is_ok_and(|now| (now.dev(), now.ino()) == (opened.dev(), opened.ino())) {
                return Ok(StateLock { folder: self.folder.clone(), _lock: lock, _parents: parents });
            }
        }
        bail!("cannot keep the folder {}: other runs remove it", self.folder.display())
    }

    /// The newest state, checked to be of this very run; none where there is no state. `force` passes over, and removes, states that are
    /// damaged, of another version or of another run.
    pub(crate) fn newest(&self, force: bool) -> Result<Option<SavedState>> {
        for (_, folder) in list(&self.folder)?.into_iter().rev() {
            match self.read(&folder) {
                Err(error) if force => {
                    warn!("passing over a state: {error:#}");
                    discard(&folder)?;
                }
                other => return other.map(Some),
            }
        }
        Ok(None)
    }

    fn read(&self, folder: &Path) -> Result<SavedState> {
        let (file, weights, moments, extra) = parts(folder).with_context(|| {
            format!("{} cannot be resumed from (--resume --force passes over it)", folder.display())
        })?;
        self.check(&folder.join(STATE), &file.run, &self.run)?;
        Ok(SavedState { folder: folder.to_owned(), position: file.position, weights, moments, extra })
    }

    /// Whether this very run has written `out` already; what it left of its states goes.
    ///
    /// # Errors
    /// [`BadInput`] when `out` is that of another run, or of none.
    pub fn finished(&self, out: &Path) -> Result<bool> {
        if out.symlink_metadata().is_err() {
            return Ok(false);
        }
        let path = out.join(RECORD_NAME);
        let record: Value = json::read(&path)?;
        let Some(run) = record["facts"][RUN].as_object() else {
            return Err(BadInput::new(&path, "does not say which run wrote it").hint("--force replaces it").into());
        };
        self.check(&path, run, &self.output)?;
        if self.folder.exists() {
            let _held = self.hold()?;
            self.remove()?;
        }
        Ok(true)
    }

    /// What the output is made with, as a fact for cpift.json under the name [`RUN`].
    pub fn run(&self) -> Value {
        Value::Object(self.output.clone())
    }

    /// Refuses what another run has saved.
    fn check(&self, path: &Path, saved: &Map<String, Value>, own: &Map<String, Value>) -> Result<()> {
        let differs = |key: &&String| saved.get(*key) != own.get(*key);
        let Some(key) = saved.keys().chain(own.keys()).find(differs) else { return Ok(()) };
        let shown = |run: &Map<String, Value>| run.get(key).map_or("nothing".to_owned(), Value::to_string);
        Err(BadInput::new(path, format!("of a run with another {key}"))
            .expected(shown(own))
            .found(shown(saved))
            .hint("resume with the arguments and inputs of the first run; --force starts afresh")
            .into())
    }

    /// Refuses to start afresh over the states of an earlier run, unless `force`, which removes them.
    ///
    /// # Errors
    /// [`BadInput`] with the way out.
    pub(crate) fn start_afresh(&self, force: bool) -> Result<()> {
        if !force && !list(&self.folder)?.is_empty() {
            return Err(BadInput::new(&self.folder, "holds the states of a run that did not finish")
                .hint("--resume goes on from the newest; --force starts afresh and removes them")
                .into());
        }
        self.clear()
    }

    /// Saves one more state, with what else the stage holds in f32 in `extra`, and removes the oldest beyond those to keep; returns its folder.
    pub(crate) fn save(
        &self,
        total_steps: usize,
        position: &Progress,
        parameters: &Parameters,
        moments: &Parameters,
        extra: &Parameters,
    ) -> Result<PathBuf> {
        let dest = self.folder.join(format!("step-{total_steps:07}"));
        if !dest.exists() {
            let staged = StagedDir::create(&dest, false)?;
            for (name, tensors) in [(WEIGHTS, parameters), (MOMENTS, moments), (EXTRA, extra)] {
                if name == EXTRA && extra.is_empty() {
                    continue;
                }
                let folder = staged.path().join(name);
                fs::create_dir(&folder).with_context(|| format!("creating {}", folder.display()))?;
                weights::save(tensors, &folder, dtype_of(tensors))?;
            }
            fs::copy(self.metrics(), staged.path().join(METRICS)).context("copying metrics.jsonl")?;
            let file = StateFile::new(staged.path(), self.run.clone(), position.clone())?;
            let path = staged.path().join(STATE);
            fs::write(&path, json::to_text(&file)?).with_context(|| format!("writing {}", path.display()))?;
            staged.commit()?;
        }
        let states = list(&self.folder)?;
        for (_, old) in states.iter().rev().skip(self.keep) {
            discard(old)?;
        }
        Ok(dest)
    }

    /// Removes all states and their folder; they are of no use once the output is there.
    pub(crate) fn remove(&self) -> Result<()> {
        self.clear()?;
        let _ = fs::remove_dir(&self.folder);
        Ok(())
    }

    fn clear(&self) -> Result<()> {
        list(&self.folder)?.iter().try_for_each(|(_, folder)| discard(folder))?;
        // What a killed run left half-written or half-removed.
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(".step-") {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let _ = fs::remove_file(self.metrics());
        Ok(())
    }
}

/// Steps and folder of each state in `folder`, oldest first.
fn list(folder: &Path) -> Result<Vec<(usize, PathBuf)>> {
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(|| format!("reading {}", folder.display()))?,
    };
    let mut states = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("reading {}", folder.display()))?;
        let name = entry.file_name();
        if let Some(step) = name.to_str().and_then(|n| n.strip_prefix("step-")?.parse().ok()) {
            states.push((step, entry.path()));
        }
    }
    states.sort();
    Ok(states)
}

/// What a state consists of; the figures must be there too.
fn parts(folder: &Path) -> Result<(StateFile, Checkpoint, Checkpoint, Option<Checkpoint>)> {
    let path = folder.join(STATE);
    let value: Value = json::read(&path)?;
    json::check_version(&path, "a training state", json::version_of(&value), VERSION)?;
    let file: StateFile =
        serde_json::from_value(value).map_err(|e| BadInput::new(&path, format!("cannot be read: {e}")))?;
    file.verify(folder)?;
    let extra = Some(folder.join(EXTRA)).filter(|path| path.exists());
    let extra = extra.map(|path| Checkpoint::open(&path)).transpose()?;
    Ok((file, Checkpoint::open(&folder.join(WEIGHTS))?, Checkpoint::open(&folder.join(MOMENTS))?, extra))
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

impl SavedState {
    /// Copies the saved weights over the present ones.
    ///
    /// # Errors
    /// [`BadInput`] when one is missing or of another shape.
    pub fn load(&self, parameters: &Parameters) -> Result<()> {
        weights::overwrite(parameters, &self.weights)
    }

    /// As [`SavedState::load`], for the optimizer's moments.
    ///
    /// # Errors
    /// As [`SavedState::load`].
    pub fn load_moments(&self, moments: &Parameters) -> Result<()> {
        weights::overwrite(moments, &self.moments)
    }

    /// Names of what else the stage held.
    pub fn extra_names(&self) -> Vec<String> {
        self.extra.iter().flat_map(|c| c.tensors().map(|view| view.name.to_owned())).collect()
    }

    /// As [`SavedState::load`], for what else the stage held.
    ///
    /// # Errors
    /// As [`SavedState::load`].
    pub fn load_extra(&self, extra: &Parameters) -> Result<()> {
        match &self.extra {
            Some(saved) => weights::overwrite(extra, saved),
            None => Ok(()),
        }
    }
}
