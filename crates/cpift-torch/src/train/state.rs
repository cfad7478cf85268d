//! Saved training states: OUT.checkpoints/step-N is written whole or not at all and holds
//! everything the rest of a run depends on.
//!
//! rank-R-of-M.safetensors has the pieces that rank R of M keeps: `weights/NAME` and
//! `moments/NAME.exp_avg` in the dtypes of training (8-bit moments with `NAME.exp_avg_absmax`), and
//! `extra/NAME` of a dynamic mask (f32); of LoRA, those of the adapters only. Each is flat; the
//! metadata has its start in the whole tensor and the whole shape, so that any number of ranks can
//! load it. Besides, metrics.jsonl so far, and state.json with the digests of all files. The order
//! of the data, the learning rate and the random bits follow from seed and step and are not saved.
//! The running job writes OUT.checkpoints/metrics.jsonl, which stays if the run fails.
//!
//! `--average-last` takes the mean of the weights at the last saved steps from them at the end of
//! training, one tensor at a time.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cpift_core::error::usage;
use cpift_core::files::{NewFolders, RECORD_NAME, StagedDir};
use cpift_core::format::digest::Digest;
use cpift_core::format::json;
use cpift_core::format::safetensors::{FileWriter, MappedFile, TensorSpec};
use cpift_core::{BadInput, Dtype};
use log::warn;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor, no_grad};

use super::stage::StageReport;
use super::watch::METRICS;
use crate::args::TrainingArgs;
use crate::placement::{Piece, Pieces, Placement};
use crate::weights::{bytes_of, first_not_finite, kind_of};

const VERSION: u32 = 4;
const STATE: &str = "state.json";
/// Metadata key of a rank's file.
const META: &str = "cpift";
/// Fact of cpift.json with the description of the run.
pub(crate) const RUN: &str = "run";

/// Progress of a run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// Reports of the finished stages.
    pub finished: Vec<StageReport>,
    /// Steps done in the current stage.
    pub step: usize,
    /// Tokens seen in the current stage.
    pub tokens: usize,
    /// Loss of each step of the current stage.
    pub losses: Vec<f64>,
    /// Tokens of the current stage that importance was measured on.
    #[serde(default)]
    pub importance_tokens: usize,
}

/// Checks the state in `folder`, or all states in it, against the saved digests; returns their
/// number.
///
/// # Errors
/// [`BadInput`] naming the damaged file, or if there is no state.
pub fn verify_states(folder: &Path) -> Result<usize> {
    let folders = match folder.join(STATE).exists() {
        true => vec![folder.to_owned()],
        false => list(folder)?.into_iter().map(|(_, state)| state).collect(),
    };
    if folders.is_empty() {
        return Err(BadInput::new(folder, "contains no training state")
            .expected("OUT.checkpoints, or a step-N in it")
            .into());
    }
    folders.iter().try_for_each(|state| parts(state).map(drop))?;
    Ok(folders.len())
}

/// The saved states of a run.
pub struct States {
    folder: PathBuf,
    /// Description of the run: arguments and inputs. A state with another description is refused.
    run: Map<String, Value>,
    /// The description with the arguments that only the output depends on.
    output: Map<String, Value>,
    /// Number of states to keep.
    keep: usize,
}

/// A saved state, opened.
pub(crate) struct SavedState {
    pub folder: PathBuf,
    pub position: Progress,
    ranks: Vec<RankFile>,
}

/// Kinds of pieces in a state; the first part of their names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// Master weights, or adapters.
    Weights,
    /// The optimizer's moments.
    Moments,
    /// A dynamic mask.
    Extra,
}

impl Part {
    fn name(self, tensor: &str) -> String {
        let part = match self {
            Self::Weights => "weights",
            Self::Moments => "moments",
            Self::Extra => "extra",
        };
        format!("{part}/{tensor}")
    }
}

/// A rank's file of a state, mapped.
struct RankFile {
    file: MappedFile,
    places: BTreeMap<String, Place>,
}

/// Place of a flat piece in the whole tensor.
#[derive(Serialize, Deserialize)]
struct Place {
    start: i64,
    shape: Vec<i64>,
}

/// Exclusive use of the directory of states, which is removed on drop if it is empty.
pub(crate) struct StateLock {
    folder: PathBuf,
    /// The operating system releases the lock when the process ends.
    _lock: File,
    _parents: NewFolders,
}

impl Drop for StateLock {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.folder);
    }
}

impl States {
    /// States of the run that writes `out`; `run` describes all arguments and inputs that the
    /// weights depend on.
    pub fn new(out: &Path, run: Map<String, Value>, args: &TrainingArgs) -> Self {
        let mut output = run.clone();
        output.insert("save_dtype".into(), args.save_dtype.name().into());
        Self { folder: Self::folder(out), run, output, keep: args.save_total_limit }
    }

    /// Directory of the states of the run that writes `out`.
    pub fn folder(out: &Path) -> PathBuf {
        let mut name = out.file_name().unwrap_or_default().to_owned();
        name.push(".checkpoints");
        out.with_file_name(name)
    }

    /// Path of the metrics of the running job.
    pub(crate) fn metrics(&self) -> PathBuf {
        self.folder.join(METRICS)
    }

    /// Creates the directory and locks it for this run until the returned lock is dropped.
    ///
    /// # Errors
    /// [`BadInput`] if another run holds the lock.
    pub(crate) fn hold(&self) -> Result<StateLock> {
        if self.folder.is_symlink() {
            return Err(BadInput::new(&self.folder, "is a symbolic link, which is not followed for writing")
                .hint("give the target itself to --out, or mount it there")
                .into());
        }
        for _ in 0..100 {
            let parents = NewFolders::make(&self.folder)?;
            let Ok(lock) = File::open(&self.folder) else { continue };
            // Some network file systems have no locks: there, two runs cannot be told apart.
            if matches!(lock.try_lock(), Err(TryLockError::WouldBlock)) {
                return Err(BadInput::new(&self.folder, "another run is writing here")
                    .hint("wait until it ends, or choose another --out")
                    .into());
            }
            // A run that has just ended may have removed what was opened.
            let opened = lock.metadata().context("reading the metadata of the directory")?;
            if fs::metadata(&self.folder).is_ok_and(|now| (now.dev(), now.ino()) == (opened.dev(), opened.ino())) {
                return Ok(StateLock { folder: self.folder.clone(), _lock: lock, _parents: parents });
            }
        }
        bail!("cannot lock the directory {}: other runs keep removing it", self.folder.display())
    }

    /// Opens the newest state, which must belong to this run; none if there is no state. `force`
    /// skips and removes states that are damaged, of another version or of another run.
    pub(crate) fn newest(&self, force: bool) -> Result<Option<SavedState>> {
        for (_, folder) in list(&self.folder)?.into_iter().rev() {
            match self.read(&folder) {
                Err(error) if force => {
                    warn!("skipping a saved state: {error:#}");
                    discard(&folder)?;
                }
                other => return other.map(Some),
            }
        }
        Ok(None)
    }

    /// Opens the state after step `step` of the run, which must belong to this run.
    ///
    /// # Errors
    /// [`BadInput`] for a state that is missing, damaged or of another run.
    pub(super) fn after(&self, step: usize) -> Result<SavedState> {
        let folder = self.folder.join(format!("step-{step:07}"));
        if !folder.exists() {
            return Err(BadInput::new(&folder, "the state is missing, and --average-last needs it")
                .hint("--force starts over")
                .into());
        }
        self.read(&folder)
    }

    /// Opens the state in `folder`, which must belong to this run.
    pub(super) fn read(&self, folder: &Path) -> Result<SavedState> {
        let (file, ranks) = parts(folder)
            .with_context(|| format!("{} cannot be resumed from (--resume --force skips it)", folder.display()))?;
        self.check(&folder.join(STATE), &file.run, &self.run)?;
        Ok(SavedState { folder: folder.to_owned(), position: file.position, ranks })
    }

    /// Returns true if this run has already written `out`, and removes leftover states.
    ///
    /// # Errors
    /// [`BadInput`] if `out` is the output of another run, or of none.
    pub fn finished(&self, out: &Path) -> Result<bool> {
        if out.symlink_metadata().is_err() {
            return Ok(false);
        }
        let path = out.join(RECORD_NAME);
        let record: Value = json::read(&path)?;
        let Some(run) = record["facts"][RUN].as_object() else {
            return Err(BadInput::new(&path, "does not record the run that wrote it")
                .hint("--force replaces it")
                .into());
        };
        self.check(&path, run, &self.output)?;
        if self.folder.exists() {
            let _held = self.hold()?;
            self.remove()?;
        }
        Ok(true)
    }

    /// Description of the run for cpift.json, as the fact `run`.
    pub fn run(&self) -> Value {
        Value::Object(self.output.clone())
    }

    /// Refuses a state or output of another run.
    fn check(&self, path: &Path, saved: &Map<String, Value>, own: &Map<String, Value>) -> Result<()> {
        let differs = |key: &&String| saved.get(*key) != own.get(*key);
        let Some(key) = saved.keys().chain(own.keys()).find(differs) else { return Ok(()) };
        let shown = |run: &Map<String, Value>| run.get(key).map_or("nothing".to_owned(), Value::to_string);
        Err(BadInput::new(path, format!("of a run with another {key}"))
            .expected(shown(own))
            .found(shown(saved))
            .hint("resume with the arguments and inputs of the first run; --force starts over")
            .into())
    }

    /// Refuses to start over if there are states of an earlier run; `force` removes them.
    pub(crate) fn start_afresh(&self, force: bool) -> Result<()> {
        if !force && !list(&self.folder)?.is_empty() {
            return Err(BadInput::new(&self.folder, "contains states of a run that did not finish")
                .hint("--resume continues from the newest; --force removes them and starts over")
                .into());
        }
        self.clear()
    }

    /// Saves a state, to which every rank adds its own `parts`; removes the oldest beyond the
    /// limit except those after the steps `kept`, and returns its directory.
    ///
    /// # Errors
    /// A weight that is not finite, a failed write, a failed rank.
    pub(crate) fn save(
        &self,
        total_steps: usize,
        position: &Progress,
        parts: &[(Part, Pieces)],
        placement: &Placement,
        kept: &[usize],
    ) -> Result<PathBuf> {
        let dest = self.folder.join(format!("step-{total_steps:07}"));
        let leads = placement.rank() == 0;
        let staged = (leads && !dest.exists()).then(|| StagedDir::create(&dest, false)).transpose()?;
        let own = staged.as_ref().map_or_else(String::new, |s| s.path().to_string_lossy().into_owned());
        let shared = match &placement.group {
            Some(group) => group.share("the directory of the state", leads.then_some(own.as_str()))?,
            None => own,
        };
        // Empty if the state is there already.
        if !shared.is_empty() {
            let name = format!("rank-{}-of-{}.safetensors", placement.rank(), placement.world());
            // The other ranks are told before the directory in which they write is removed.
            let tell = |error: &anyhow::Error| placement.group.iter().for_each(|group| group.fail(error));
            let digest = write_rank(&Path::new(&shared).join(&name), parts, placement).inspect_err(tell)?;
            let digest = serde_json::to_string(&(name, digest))?;
            let digests = match &placement.group {
                Some(group) => group.exchange("digests of the state", &digest)?,
                None => vec![digest],
            };
            if let Some(staged) = staged {
                fs::copy(self.metrics(), staged.path().join(METRICS)).context("copying metrics.jsonl")?;
                let file = StateFile::new(staged.path(), self.run.clone(), position.clone(), &digests)?;
                let path = staged.path().join(STATE);
                fs::write(&path, json::to_text(&file)?).with_context(|| format!("writing {}", path.display()))?;
                staged.commit()?;
            }
        }
        if leads {
            let states = list(&self.folder)?;
            for (_, old) in states.iter().rev().skip(self.keep).filter(|(step, _)| !kept.contains(step)) {
                discard(old)?;
            }
        }
        if let Some(group) = &placement.group {
            group.barrier()?;
        }
        Ok(dest)
    }

    /// Removes all states and their directory.
    pub(crate) fn remove(&self) -> Result<()> {
        self.clear()?;
        let _ = fs::remove_dir(&self.folder);
        Ok(())
    }

    fn clear(&self) -> Result<()> {
        list(&self.folder)?.iter().try_for_each(|(_, folder)| discard(folder))?;
        // Left half-written or half-removed by a killed run.
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(".step-") {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let _ = fs::remove_file(self.metrics());
        Ok(())
    }
}

/// Step and path of each state in `folder`, oldest first.
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

/// Opens and verifies the files of a state.
fn parts(folder: &Path) -> Result<(StateFile, Vec<RankFile>)> {
    let path = folder.join(STATE);
    let value: Value = json::read(&path)?;
    json::check_version(&path, "a training state", json::version_of(&value), VERSION)?;
    let file: StateFile =
        serde_json::from_value(value).map_err(|e| BadInput::new(&path, format!("cannot be read: {e}")))?;
    file.verify(folder)?;
    let ranks = file.files.keys().filter(|name| name.starts_with("rank-"));
    let ranks = ranks.map(|name| RankFile::open(&folder.join(name))).collect::<Result<_>>()?;
    Ok((file, ranks))
}

impl RankFile {
    fn open(path: &Path) -> Result<Self> {
        let file = MappedFile::open(path)?;
        let text = file.metadata.get(META).map_or("", String::as_str);
        let places: BTreeMap<String, Place> = serde_json::from_str(text)
            .map_err(|e| BadInput::new(path, format!("does not describe its tensors: {e}")))?;
        Ok(Self { file, places })
    }
}

/// Writes the pieces of a rank; returns the digest of the file.
fn write_rank(path: &Path, parts: &[(Part, Pieces)], placement: &Placement) -> Result<Digest> {
    let all: BTreeMap<String, &Piece> =
        parts.iter().flat_map(|(part, pieces)| pieces.iter().map(|(name, p)| (part.name(name), p))).collect();
    let spec = |(name, piece): (&String, &&Piece)| TensorSpec {
        name: name.clone(),
        dtype: match piece.tensor.kind() {
            Kind::BFloat16 => Dtype::BF16,
            Kind::Uint8 => Dtype::U8,
            _ => Dtype::F32,
        },
        shape: vec![piece.len() as usize],
    };
    let specs: Vec<TensorSpec> = all.iter().map(spec).collect();
    let place = |p: &Piece| Place { start: p.start, shape: p.shape.clone() };
    let places: BTreeMap<&String, Place> = all.iter().map(|(name, p)| (name, place(p))).collect();
    let metadata = BTreeMap::from([(META.to_owned(), serde_json::to_string(&places)?)]);
    let writer = FileWriter::create(path, &specs, &metadata)?;
    for (name, piece) in &all {
        let host = piece.tensor.detach().flatten(0, -1).to_device(Device::Cpu).contiguous();
        if let Some(index) = first_not_finite(&host) {
            bail!("{name}: element {} is {:e}\n  hint: lower --lr", piece.start + index, host.double_value(&[index]));
        }
        writer.write(name, 0, &bytes_of(&host)?)?;
    }
    writer.sync().with_context(|| format!("rank {}", placement.rank()))?;
    Digest::of_file(path)
}

/// Removes a state; renamed first, so that a half-removed state is not taken for a state.
fn discard(folder: &Path) -> Result<()> {
    let gone = folder.with_file_name(format!(".{}.old", folder.file_name().unwrap_or_default().to_string_lossy()));
    fs::rename(folder, &gone)
        .and_then(|()| fs::remove_dir_all(&gone))
        .with_context(|| format!("removing {}", folder.display()))
}

impl SavedState {
    /// Overwrites `pieces` with the saved ones, whatever the number of ranks that saved them.
    ///
    /// # Errors
    /// [`BadInput`] if a tensor is missing or has another shape.
    pub fn load(&self, part: Part, pieces: &Pieces) -> Result<()> {
        for (name, piece) in pieces.iter().filter(|(_, piece)| !piece.is_empty()) {
            let name = part.name(name);
            let mut found = 0;
            for rank in &self.ranks {
                found += rank.copy_to(&name, piece)?;
            }
            if found != piece.len() {
                return Err(BadInput::new(&self.folder, "the saved pieces of a tensor are not the whole of it")
                    .tensor(&name)
                    .expected(format!("elements {} to {}", piece.start, piece.start + piece.len()))
                    .found(format!("{found} of them"))
                    .into());
            }
        }
        Ok(())
    }
}

impl RankFile {
    /// Copies the elements that this file has of `piece`; returns their number.
    fn copy_to(&self, name: &str, piece: &Piece) -> Result<i64> {
        let (Some(place), Some(entry)) = (self.places.get(name), self.file.entries.get(name)) else { return Ok(0) };
        if place.shape != piece.shape {
            return Err(BadInput::new(&self.file.path, "a tensor has another shape")
                .tensor(name)
                .expected(format!("{:?}", piece.shape))
                .found(format!("{:?}", place.shape))
                .into());
        }
        let count = entry.shape.iter().product::<usize>() as i64;
        let (from, to) = (place.start.max(piece.start), (place.start + count).min(piece.start + piece.len()));
        if from >= to {
            return Ok(0);
        }
        let size = entry.dtype.size();
        let (first, last) = ((from - place.start) as usize * size, (to - place.start) as usize * size);
        let bytes = &self.file.bytes(entry)[first..last];
        let kind = if entry.dtype == Dtype::U8 { Kind::Uint8 } else { kind_of(entry.dtype) };
        let read = Tensor::from_data_size(bytes, &[to - from], kind);
        no_grad(|| {
            let flat = piece.tensor.detach().view([-1]);
            flat.narrow(0, from - piece.start, to - from).copy_(&read);
        });
        Ok(to - from)
    }
}

/// state.json: the description of the run, its progress, and the digests of all files of the state.
#[derive(Serialize, Deserialize)]
struct StateFile {
    format_version: u32,
    /// BLAKE3 of every other file of the state, by relative path.
    files: BTreeMap<String, Digest>,
    /// BLAKE3 of `run` and `position`.
    own: Digest,
    /// Description of the run.
    run: Map<String, Value>,
    position: Progress,
}

impl StateFile {
    /// A description of the state in `folder`; `ranks` are the names and digests of the ranks'
    /// files, which the ranks have computed.
    fn new(folder: &Path, run: Map<String, Value>, position: Progress, ranks: &[String]) -> Result<Self> {
        let own = digest_of(&run, &position)?;
        let mut files = BTreeMap::from([(METRICS.to_owned(), Digest::of_file(&folder.join(METRICS))?)]);
        for line in ranks {
            let (name, digest): (String, Digest) = serde_json::from_str(line).context("a rank's file and digest")?;
            files.insert(name, digest);
        }
        Ok(Self { format_version: VERSION, files, own, run, position })
    }

    /// Checks the state in `folder` against the digests.
    fn verify(&self, folder: &Path) -> Result<()> {
        let damaged = |name: &str, what: &str| {
            let error = BadInput::new(folder.join(name), format!("{what}, so the state is not what was saved"));
            error.hint("an older state may be intact: --resume --force skips this one")
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

/// Digest of the contents of state.json.
fn digest_of(run: &Map<String, Value>, position: &Progress) -> Result<Digest> {
    Ok(Digest::of_chunks([serde_json::to_vec(&(run, position))?]))
}

/// Digests of all files of a state but state.json.
fn digests_in(folder: &Path) -> Result<BTreeMap<String, Digest>> {
    let mut digests = BTreeMap::new();
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry.with_context(|| format!("reading {}", folder.display()))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_file() && name != STATE {
            digests.insert(name, Digest::of_file(&path)?);
        }
    }
    Ok(digests)
}

/// Steps within a stage of `total` steps whose states are averaged with the weights at its end:
/// the last multiples of `every` below `total`, `count` − 1 of them.
///
/// # Errors
/// [`cpift_core::Usage`] for a stage that has fewer.
pub(super) fn averaged_steps(label: &str, total: usize, every: usize, count: usize) -> Result<Vec<usize>> {
    let saved = (total - 1) / every;
    if saved + 1 < count {
        return Err(usage(format!(
            "--average-last {count} needs as many saved steps, but {label} has {}: of its {total} steps, --save-every \
             {every} saves {saved} before the last",
            saved + 1
        )));
    }
    Ok((saved + 2 - count..=saved).map(|k| k * every).collect())
}

/// Replaces `pieces` by the mean of their values and those in the states after `steps`.
///
/// # Errors
/// [`cpift_core::BadInput`] for a state that is missing or damaged.
pub(super) fn average(pieces: &Pieces, states: &States, steps: &[usize]) -> Result<()> {
    let saved = steps.iter().map(|step| states.after(*step)).collect::<Result<Vec<_>>>()?;
    for (name, piece) in pieces.iter().filter(|(_, piece)| !piece.is_empty()) {
        let earlier = Pieces::from([(name.clone(), piece.with(piece.tensor.detach().copy()))]);
        // Sums of equal numbers and their quotients are exact in f64: frozen elements keep their
        // bits.
        let mut sum = None;
        for state in &saved {
            state.load(Part::Weights, &earlier)?;
            let own = earlier[name].tensor.to_kind(Kind::Double);
            sum = Some(sum.map_or_else(|| own.copy(), |sum| sum + &own));
        }
        let Some(sum) = sum else { continue };
        let mean = (sum + piece.tensor.detach().to_kind(Kind::Double)) / (saved.len() + 1) as f64;
        no_grad(|| piece.tensor.detach().copy_(&mean.to_kind(Kind::Float)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::averaged_steps;

    #[test]
    fn the_end_of_training_is_the_last_saved_step() {
        let steps = |total, every, count| averaged_steps("stage", total, every, count).unwrap();
        assert_eq!(steps(10, 3, 3), [6, 9]);
        assert_eq!(steps(9, 3, 3), [3, 6]);
        assert_eq!(steps(9, 3, 1), [0usize; 0]);
        assert!(averaged_steps("stage", 9, 3, 4).is_err());
        assert!(averaged_steps("stage", 1, 5, 1).unwrap().is_empty());
    }
}
