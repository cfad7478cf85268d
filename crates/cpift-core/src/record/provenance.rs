//! cpift.json: the provenance record of an output, with its stage, arguments, inputs and digest.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::error::BadInput;
use crate::files::staging::{self, RECORD_NAME, StagedFile, StagedPath};
use crate::format::checkpoint::reader::Checkpoint;
use crate::format::digest::{Digest, DigestRecord, FileStamp};
use crate::format::json;
use crate::format::tasks::Tasks;
use crate::hub;

/// Format version of cpift.json that this program reads and writes.
pub const FORMAT_VERSION: u32 = 1;

/// Revision of the output of `stage`: raised when a stage gives another output for the same inputs
/// and arguments and the program's version stays, so that the outputs of other stages stay valid.
pub fn revision(stage: &str) -> u32 {
    match stage {
        // 1: ties are broken by a hash instead of by position.
        "cpift-mask" | "cpift-merge" => 1,
        // 1: the norm for clipping is f64, and rows are dealt to accumulated batches by tokens.
        // 2: one epoch without a budget, which was 100 steps; adapters are added to the outputs of
        // layers instead of to their weights.
        "cpift-probe" | "cpift-train" => 2,
        _ => 0,
    }
}

fn is_zero(revision: &u32) -> bool {
    *revision == 0
}

/// Provenance record of an output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// Format version of the file.
    pub format_version: u32,
    /// Name of the program, such as `cpift-mask`.
    pub stage: String,
    /// Version of the program.
    pub version: String,
    /// Revision of the stage's output within that version ([`revision`]).
    #[serde(default, skip_serializing_if = "is_zero")]
    pub revision: u32,
    /// Arguments as typed, with those of `--config` in place of it.
    pub arguments: Vec<String>,
    /// Seed, if the stage draws random numbers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Inputs by their role (`base`, `mask:gsm8k`), with path and digest.
    pub inputs: BTreeMap<String, Input>,
    /// Files made together with the output but outside its directory.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub also: Vec<String>,
    /// Counts and figures of the run, such as the tokens trained on.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub facts: serde_json::Map<String, serde_json::Value>,
    /// Digest of the output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<DigestRecord>,
    /// Host name.
    pub host: String,
    /// Start time, in seconds since 1970 (Unix time).
    pub started_unix: u64,
    /// Duration in seconds.
    pub seconds: f64,
}

/// Input of a stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    /// Path as given, with bytes that are not UTF-8 replaced.
    pub path: String,
    /// `org/name@commit` if it is a snapshot in the local cache of the Hugging Face Hub.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repository: Option<String>,
    /// BLAKE3 digest of its content.
    pub digest: Digest,
    /// Sizes and mtimes of its files when it was read. While they match, the content need not be
    /// hashed again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<FileStamp>,
}

/// Collects the provenance of an output while its stage runs.
pub struct Recorder {
    record: Provenance,
    clock: Instant,
}

impl Recorder {
    /// Starts the record of `stage` (`env!("CARGO_PKG_NAME")`).
    pub fn start(stage: &str) -> Self {
        let started_unix = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let record = Provenance {
            format_version: FORMAT_VERSION,
            stage: stage.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            revision: revision(stage),
            arguments: argv(),
            seed: None,
            inputs: BTreeMap::new(),
            also: Vec::new(),
            facts: serde_json::Map::new(),
            output: None,
            host: host_name(),
            started_unix,
            seconds: 0.0,
        };
        Self { record, clock: Instant::now() }
    }

    /// Records the seed.
    pub fn seed(&mut self, seed: u64) {
        self.record.seed = Some(seed);
    }

    /// Records an input by its role.
    pub fn input(&mut self, role: impl Into<String>, path: &Path, digest: Digest) {
        let role = role.into();
        // The settings of tasks are a part of tasks.toml plus template files, and are cheap to hash
        // again.
        let files =
            if Tasks::is_role(&role) { Vec::new() } else { FileStamp::of_unchanged(path, self.record.started_unix) };
        self.record
            .inputs
            .insert(role, Input { path: path.display().to_string(), repository: hub::repository(path), digest, files });
    }

    /// Records a file made together with the output but outside its directory.
    pub fn also(&mut self, path: &Path) {
        self.record.also.push(path.display().to_string());
    }

    /// Records the settings of the tasks `names` as an input.
    ///
    /// # Errors
    /// As [`Tasks::digest`].
    pub fn tasks<'a>(&mut self, tasks: &Tasks, names: impl IntoIterator<Item = &'a str> + Clone) -> Result<()> {
        self.input(tasks.role(names.clone()), &tasks.path, tasks.digest(names)?);
        Ok(())
    }

    /// Records a count or a figure of the run.
    pub fn fact(&mut self, name: &str, value: impl Into<serde_json::Value>) {
        self.record.facts.insert(name.to_owned(), value.into());
    }

    /// Writes cpift.json, with the digest of the checkpoint, into a staged checkpoint directory.
    /// Call it when all other files are written.
    pub fn write_into(mut self, staged: &Path) -> Result<()> {
        self.record.output = Some(DigestRecord::compute(staged)?);
        self.write_to(&staged.join(RECORD_NAME))
    }

    /// As [`Recorder::write_into`], for a checkpoint whose `digest` is already known.
    pub fn write_into_with(mut self, staged: &Path, digest: Digest) -> Result<()> {
        self.record.output = Some(DigestRecord::stamp(staged, digest)?);
        self.write_to(&staged.join(RECORD_NAME))
    }

    /// As [`Recorder::write_into`], for a directory whose content is that of its file `name`, with
    /// the digest of that file.
    pub fn write_into_for(mut self, staged: &Path, name: &str) -> Result<()> {
        self.record.output = Some(DigestRecord::of_staged(&staged.join(name), Path::new(name))?);
        self.write_to(&staged.join(RECORD_NAME))
    }

    /// Commits a `staged` output file together with its record `DEST.cpift.json`. The files in
    /// `also` are committed first, so that they exist once the output does.
    ///
    /// # Errors
    /// As [`StagedPath::commit`].
    pub fn commit(mut self, staged: StagedPath, also: &[StagedFile]) -> Result<()> {
        // The disk works while the file is hashed.
        let (path, dest) = (staged.path(), staged.dest());
        let (digest, synced) = rayon::join(|| DigestRecord::of_staged(&path, dest), || staged.sync());
        (self.record.output, ()) = (Some(digest?), synced?);
        also.iter().for_each(|file| self.also(file.dest()));
        let record = StagedFile::of_text(&beside(staged.dest()), &self.text()?, true)?;
        staged.commit_with(record, also)
    }

    /// Writes the record to `path`.
    pub fn write_to(mut self, path: &Path) -> Result<()> {
        staging::write_text(path, &self.text()?, true)
    }

    fn text(&mut self) -> Result<String> {
        self.record.seconds = self.clock.elapsed().as_secs_f64();
        json::to_text(&self.record)
    }
}

/// Path of the record of the output `out`: inside a directory, beside a file.
pub(crate) fn of_output(out: &Path) -> PathBuf {
    if out.is_dir() { out.join(RECORD_NAME) } else { beside(out) }
}

/// Path of the record of the output file `dest`.
pub fn beside(dest: &Path) -> PathBuf {
    let mut name = dest.file_name().unwrap_or_default().to_owned();
    name.push(".");
    name.push(RECORD_NAME);
    dest.with_file_name(name)
}

impl Provenance {
    /// Digest recorded beside the output file `dest`, if there is one and the file's size and mtime
    /// still match.
    pub fn recorded_file_digest(dest: &Path) -> Option<Digest> {
        Self::of(dest)?.output.filter(|output| output.holds_for_file(dest)).map(|output| output.blake3)
    }

    /// Checks the output file `dest` against the digest in its record. Returns false if there is no
    /// record.
    ///
    /// # Errors
    /// [`BadInput`] with both digests if they differ, or if the record cannot be read.
    pub fn verify_file(dest: &Path) -> Result<bool> {
        let path = beside(dest);
        if !path.exists() {
            return Ok(false);
        }
        let record: Self = json::read(&path)?;
        json::check_version(&path, "a provenance record", record.format_version, FORMAT_VERSION)?;
        let Some(output) = record.output else { return Ok(false) };
        let found = Digest::of_file(dest)?;
        if output.blake3 == found {
            return Ok(true);
        }
        Err(BadInput::new(dest, format!("not the file that {} records", path.display()))
            .expected(format!("digest {}", output.blake3))
            .found(format!("digest {found}"))
            .hint("regenerate the file, or copy it again together with its record")
            .into())
    }

    /// Reads the record of the output `out`, a directory or a file, if there is a readable one.
    pub fn of(out: &Path) -> Option<Self> {
        let path = of_output(out);
        path.is_file().then(|| json::read::<Self>(&path).ok()).flatten().filter(|p| p.format_version == FORMAT_VERSION)
    }

    /// Digest recorded in the cpift.json of `folder`, if there is a readable one.
    pub fn recorded_digest(folder: &Path) -> Option<DigestRecord> {
        Self::of(folder)?.output
    }
}

/// Refuses the checkpoint `folder` if its record says that its input `role` was not `given`, whose
/// digest is `digest`. A checkpoint without a record, or changed since, is accepted.
///
/// # Errors
/// [`BadInput`] with both digests.
pub fn check_made_from(folder: &Path, role: &str, (given, digest): (&Path, &Digest)) -> Result<()> {
    let Some(record) = Provenance::of(folder).filter(|p| p.output.as_ref().is_some_and(|o| o.holds_for(folder))) else {
        return Ok(());
    };
    match record.inputs.get(role) {
        Some(input) if input.digest != *digest => {
            let kind = role.split_once(':').map_or_else(|| role.to_owned(), |(kind, of)| format!("{kind} of {of}"));
            Err(BadInput::new(folder, format!("made from another {kind} than {}", given.display()))
                .expected(format!("digest {digest}"))
                .found(format!("digest {} ({} when it was made)", input.digest, input.path))
                .hint(format!("regenerate it from this {kind}, or pass the {kind} it was made from"))
                .into())
        }
        _ => Ok(()),
    }
}

/// Name of this machine.
pub fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").map_or_else(|_| "unknown".into(), |s| s.trim().to_owned())
}

/// The arguments where they are not all typed.
static RESOLVED: OnceLock<Vec<String>> = OnceLock::new();

/// Arguments without the program name: as typed, with those of `--config` in place of it.
pub fn argv() -> Vec<String> {
    let typed = || std::env::args_os().skip(1).map(|arg| arg.to_string_lossy().into_owned()).collect();
    RESOLVED.get().cloned().unwrap_or_else(typed)
}

/// Sets what [`argv`] returns, once and before anything asks for it.
pub(crate) fn set_argv(words: &[OsString]) {
    let _ = RESOLVED.set(words.iter().map(|word| word.to_string_lossy().into_owned()).collect());
}

impl Checkpoint {
    /// Content digest recorded in cpift.json, if there is one and the sizes and mtimes of the files
    /// still match.
    pub fn recorded_digest(&self) -> Option<Digest> {
        let folder = self.folder()?;
        Provenance::recorded_digest(folder)
            .filter(|record| record.holds_for(folder))
            .map(|record| self.with_adapter(record.blake3))
    }

    /// Content digest: the recorded one if it still matches, computed otherwise.
    ///
    /// # Errors
    /// If a side file cannot be read.
    pub fn digest(&self) -> Result<Digest> {
        self.recorded_digest().map_or_else(|| Digest::of_checkpoint(self), Ok)
    }
}
