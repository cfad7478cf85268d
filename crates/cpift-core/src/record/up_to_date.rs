//! `--if-stale`: whether an output is the one that a command line would make from its inputs as they are now.
//!
//! What counts is in the output's record: program, version, arguments, the digest of every input, the digest of the output. Nothing of
//! the inputs is parsed, and where the records of inputs still hold nothing of them is read.

use std::path::Path;

use crate::format::checkpoint::reader::Checkpoint;
use crate::format::digest::Digest;
use crate::record::provenance::{self, Input, Provenance};

/// Flags that change nothing about what is made.
const WITHOUT_EFFECT: [&str; 6] = ["--force", "--if-stale", "--json", "--quiet", "-q", "--resume"];

/// An output that a command line would make.
pub struct Expected<'a> {
    /// The program (`env!("CARGO_PKG_NAME")`).
    pub stage: &'a str,
    /// The folder or file.
    pub out: &'a Path,
    /// Files that are made along with it and are not in its folder.
    pub also: Vec<&'a Path>,
    /// Facts of its record that do not follow from the arguments, such as the task of a Slurm array's element.
    pub facts: Vec<(&'a str, &'a str)>,
}

impl<'a> Expected<'a> {
    /// An output that `stage` makes at `out`.
    pub fn new(stage: &'a str, out: &'a Path) -> Self {
        Self { stage, out, also: Vec::new(), facts: Vec::new() }
    }
}

/// Why the output is to be made (again) with `arguments`; none where it is up to date.
pub fn reason(expected: &Expected<'_>, arguments: &[String]) -> Option<String> {
    let out = expected.out;
    if let Some(missing) = [out].into_iter().chain(expected.also.iter().copied()).find(|path| !path.exists()) {
        return Some(format!("{} is not there", missing.display()));
    }
    let Some(record) = Provenance::of(out) else {
        return Some("it has no record that this version reads".to_owned());
    };
    if record.stage != expected.stage || record.version != env!("CARGO_PKG_VERSION") {
        return Some(format!("it was made by {} {}", record.stage, record.version));
    }
    if with_effect(&record.arguments) != with_effect(arguments) {
        return Some("it was made with other arguments".to_owned());
    }
    let fact = |name: &str| record.facts.get(name).and_then(serde_json::Value::as_str);
    if let Some((name, value)) = expected.facts.iter().find(|(name, value)| fact(name) != Some(value)) {
        return Some(format!("its {name} is not {value}"));
    }
    if let Some((role, input)) = record.inputs.iter().find(|(_, input)| !is_as_recorded(input)) {
        return Some(format!("the input {role} ({}) has changed", input.path));
    }
    let whole = record.output.is_none_or(|output| {
        output.holds_for_file(out) || output.holds_for(out) || digests(out).any(|digest| digest == output.blake3)
    });
    (!whole).then(|| format!("it is not what {} records", provenance::of_output(out).display()))
}

fn with_effect(arguments: &[String]) -> impl PartialEq + use<> {
    arguments.iter().filter(|a| !WITHOUT_EFFECT.contains(&a.as_str())).cloned().collect::<Vec<String>>()
}

fn is_as_recorded(input: &Input) -> bool {
    let path = Path::new(&input.path);
    let recorded = Provenance::recorded_file_digest(path);
    recorded.as_ref() == Some(&input.digest) || digests(path).any(|digest| digest == input.digest)
}

/// The digests that `path` may go by: that of a checkpoint, or of the bytes of a file.
fn digests(path: &Path) -> impl Iterator<Item = Digest> {
    let file = path.is_file().then(|| Digest::of_file(path).ok()).flatten();
    let checkpoint = move || Checkpoint::open(path).ok()?.digest().ok();
    file.into_iter().chain(std::iter::once_with(checkpoint).flatten())
}
