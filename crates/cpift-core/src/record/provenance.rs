//! cpift.json: which stage made an output, from what, with which arguments, and the output's digest.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::error::BadInput;
use crate::files::naming::RECORD_NAME;
use crate::files::staging::{self, StagedFile, StagedPath};
use crate::format::checkpoint::reader::Checkpoint;
use crate::format::digest::{Digest, DigestRecord, FileStamp};
use crate::format::json;
use crate::format::tasks::Tasks;

/// The form of cpift.json this program writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// The record of how an output came to be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// Form of the file.
    pub format_version: u32,
    /// The program, such as `cpift-mask`.
    pub stage: String,
    /// The program's version.
    pub version: String,
    /// The command line as typed.
    pub arguments: Vec<String>,
    /// The seed, where the stage draws random numbers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Inputs by their role (`base`, `mask:gsm8k`), with path and digest.
    pub inputs: BTreeMap<String, Input>,
    /// Files made along with the output and not in its folder.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub also: Vec<String>,
    /// What the stage counted, such as the tokens trained on.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub facts: serde_json::Map<String, serde_json::Value>,
    /// The output's digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<DigestRecord>,
    /// The machine's name.
    pub host: String,
    /// Start, in seconds since 1970.
    pub started_unix: u64,
    /// Duration in seconds.
    pub seconds: f64,
}

/// An input of a stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    /// The path as given; what is not UTF-8 in it is replaced.
    pub path: String,
    /// BLAKE3 of its content.
    pub digest: Digest,
    /// Sizes and times of its files when it was read: while they hold, the content need not be hashed again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<FileStamp>,
}

/// A provenance being collected while its stage runs.
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
        // The settings of tasks are a part of a file, and templates in files of their own: their digest is cheap to take again.
        let files = if Tasks::is_role(&role) { Vec::new() } else { FileStamp::of(path) };
        self.record.inputs.insert(role, Input { path: path.display().to_string(), digest, files });
    }

    /// Records a file that is made along with the output and is not in its folder.
    pub fn also(&mut self, path: &Path) {
        self.record.also.push(path.display().to_string());
    }

    /// Records the settings in `tasks` of the tasks `names` as an input.
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

    /// Writes cpift.json into a staged checkpoint folder, with the digest of what it holds. Call last.
    ///
    /// # Errors
    /// I/O errors.
    pub fn write_into(mut self, staged: &Path) -> Result<()> {
        self.record.output = Some(DigestRecord::compute(staged)?);
        self.write_to(&staged.join(RECORD_NAME))
    }

    /// As [`Recorder::write_into`], for a writer that hashed what it wrote and knows the `digest`.
    ///
    /// # Errors
    /// I/O errors.
    pub fn write_into_with(mut self, staged: &Path, digest: Digest) -> Result<()> {
        self.record.output = Some(DigestRecord::stamp(staged, digest)?);
        self.write_to(&staged.join(RECORD_NAME))
    }

    /// Gives a `staged` output file its name, with it the record `DEST.cpift.json` with the digest of that file, and before it what is
    /// made `also`: whoever waits for the output finds that.
    ///
    /// # Errors
    /// As [`StagedPath::commit`].
    pub fn commit(mut self, staged: StagedPath, also: &[StagedFile]) -> Result<()> {
        self.record.output = Some(DigestRecord::of_staged(&staged.path(), staged.dest())?);
        also.iter().for_each(|file| self.also(file.dest()));
        let record = StagedFile::of_text(&beside(staged.dest()), &self.text()?, true)?;
        staged.commit_with(record, also)
    }

    /// Writes the record to `path`.
    ///
    /// # Errors
    /// I/O errors.
    pub fn write_to(mut self, path: &Path) -> Result<()> {
        staging::write_text(path, &self.text()?, true)
    }

    fn text(&mut self) -> Result<String> {
        self.record.seconds = self.clock.elapsed().as_secs_f64();
        json::to_text(&self.record)
    }
}

/// Where the record of the output `out` lies: in a folder, beside a file.
pub(crate) fn of_output(out: &Path) -> PathBuf {
    if out.is_dir() { out.join(RECORD_NAME) } else { beside(out) }
}

/// Where the record of the output file `dest` lies.
pub fn beside(dest: &Path) -> PathBuf {
    let mut name = dest.file_name().unwrap_or_default().to_owned();
    name.push(".");
    name.push(RECORD_NAME);
    dest.with_file_name(name)
}

impl Provenance {
    /// The digest recorded beside the output file `dest`, where there is one and size and time of the file still match it.
    pub fn recorded_file_digest(dest: &Path) -> Option<Digest> {
        Self::of(dest)?.output.filter(|output| output.holds_for_file(dest)).map(|output| output.blake3)
    }

    /// Checks that the output file `dest` is what the record beside it says; whether there is such a record.
    ///
    /// # Errors
    /// [`BadInput`] with both digests, or when the record cannot be read.
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
            .hint("make the file again, or copy it again together with its record")
            .into())
    }

    /// The record of the output `out`, a folder or a file, if there is one that can be read.
    pub fn of(out: &Path) -> Option<Self> {
        let path = of_output(out);
        path.is_file().then(|| json::read::<Self>(&path).ok()).flatten().filter(|p| p.format_version == FORMAT_VERSION)
    }

    /// The digest recorded in the cpift.json of `folder`, if there is a readable one.
    pub fn recorded_digest(folder: &Path) -> Option<DigestRecord> {
        Self::of(folder)?.output
    }
}

/// Refuses the checkpoint `folder` where its record says that it was made from another `role` than `given`, whose digest is `digest`.
/// What has no record, or was changed since, is taken as it is.
///
/// # Errors
/// [`BadInput`] naming both.
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
                .hint(format!("make it again from this {kind}, or name the {kind} it was made from"))
                .into())
        }
        _ => Ok(()),
    }
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").map_or_else(|_| "unknown".into(), |s| s.trim().to_owned())
}

/// The command line as typed, for provenance.
pub fn argv() -> Vec<String> {
    std::env::args_os().skip(1).map(|arg| arg.to_string_lossy().into_owned()).collect()
}

impl Checkpoint {
    /// The content digest recorded in cpift.json, where there is one and the files' sizes and times still match it.
    pub fn recorded_digest(&self) -> Option<Digest> {
        let folder = self.folder()?;
        Provenance::recorded_digest(folder).filter(|record| record.holds_for(folder)).map(|record| record.blake3)
    }

    /// The content digest: the recorded one, or else computed.
    ///
    /// # Errors
    /// I/O errors on the side files.
    pub fn digest(&self) -> Result<Digest> {
        self.recorded_digest().map_or_else(|| Digest::of_checkpoint(self), Ok)
    }
}
