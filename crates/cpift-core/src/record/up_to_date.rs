//! The one rule for what is up to date: an output is, if its record names this program version, the
//! revision of the stage, the arguments that matter and the content of every input as it is now,
//! and the output is the one that the record describes.
//!
//! Stages ask it about themselves (`--skip-up-to-date`); make, `make status`, Slurm submission and
//! the experiments ask it about whole lists of commands (`cpift-STAGE up-to-date`). Inputs are
//! hashed only where neither the sizes and times in the record nor the inputs' own records tell.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use crate::format::checkpoint::reader::Checkpoint;
use crate::format::digest::{Digest, FileStamp};
use crate::format::tasks::Tasks;
use crate::hub;
use crate::record::provenance::{self, Input, Provenance};

/// Flags that do not change the output, and their number of values.
const WITHOUT_EFFECT: [(&str, usize); 12] = [
    ("--force", 0),
    ("--skip-up-to-date", 0),
    ("--if-stale", 0),
    ("--json", 0),
    ("--quiet", 0),
    ("-q", 0),
    ("--resume", 0),
    ("--threads", 1),
    ("--save-every", 1),
    ("--save-total-limit", 1),
    ("--keep", 1),
    ("--log-every", 1),
];

/// An output that a command line would make.
pub struct Expected<'a> {
    /// The program (`env!("CARGO_PKG_NAME")`).
    pub stage: &'a str,
    /// The directory or file.
    pub out: &'a Path,
    /// Files that are made along with it and are not in its directory.
    pub also: Vec<&'a Path>,
    /// Facts of its record that do not follow from the arguments, such as the task of a Slurm
    /// array's element.
    pub facts: Vec<(&'a str, &'a str)>,
}

impl<'a> Expected<'a> {
    /// An output that `stage` makes at `out`.
    pub fn new(stage: &'a str, out: &'a Path) -> Self {
        Self { stage, out, also: Vec::new(), facts: Vec::new() }
    }
}

/// Returns the reason why the output must be made (again) with `arguments`, or none if it is up to
/// date.
pub fn reason(expected: &Expected<'_>, arguments: &[String]) -> Option<String> {
    let out = expected.out;
    if let Some(missing) = [out].into_iter().chain(expected.also.iter().copied()).find(|path| !path.exists()) {
        return Some(format!("{} does not exist", missing.display()));
    }
    let Some(record) = Provenance::of(out) else {
        return Some("it has no record that this version reads".to_owned());
    };
    let fact = |name: &str| record.facts.get(name).and_then(serde_json::Value::as_str);
    if let Some((name, value)) = expected.facts.iter().find(|(name, value)| fact(name) != Some(value)) {
        return Some(format!("its {name} is not {value}"));
    }
    let contents = Contents::default();
    difference(&record, expected.stage, arguments, &contents, |_| None).or_else(|| damage(&record, out, &contents))
}

/// Returns what differs between a record and a command line with its inputs as they are now.
/// `deleted` tells, of an input whose content was deleted on purpose, if it was the recorded one.
fn difference(
    record: &Provenance,
    stage: &str,
    arguments: &[String],
    contents: &Contents,
    deleted: impl Fn(&Input) -> Option<bool>,
) -> Option<String> {
    if record.stage != stage || record.version != env!("CARGO_PKG_VERSION") {
        return Some(format!("made by {} {}, now {stage} {}", record.stage, record.version, env!("CARGO_PKG_VERSION")));
    }
    if record.revision != provenance::revision(stage) {
        return Some(format!("made by an earlier revision of {stage} {}", record.version));
    }
    if let Some(change) = changed_argument(&record.arguments, arguments) {
        return Some(change);
    }
    let changed =
        |(role, input): &(&String, &Input)| !deleted(input).unwrap_or_else(|| is_as_recorded(role, input, contents));
    let (role, input) = record.inputs.iter().find(changed)?;
    Some(match Path::new(&input.path).exists() {
        true => format!("input {role} has changed: {}", input.path),
        false => format!("input {role} does not exist: {}", input.path),
    })
}

/// Returns what is wrong with the output, if it is not the one that `record` describes.
fn damage(record: &Provenance, out: &Path, contents: &Contents) -> Option<String> {
    if let Some(missing) = record.also.iter().find(|path| !Path::new(path).exists()) {
        return Some(format!("{missing} does not exist"));
    }
    let whole = record.output.as_ref().is_none_or(|output| {
        let subject = output.subject(out);
        output.holds_for_file(&subject) || output.holds_for(&subject) || contents.has(&subject, &output.blake3)
    });
    (!whole).then(|| format!("it is not what {} records", provenance::of_output(out).display()))
}

/// Returns the first argument that differs, together with the flag it belongs to.
fn changed_argument(before: &[String], now: &[String]) -> Option<String> {
    let (before, now) = (with_effect(before), with_effect(now));
    let at = (0..before.len().max(now.len())).find(|i| !same_argument(before.get(*i), now.get(*i)))?;
    let is_flag = |words: &[&str]| words.get(at).is_some_and(|word| word.starts_with("--"));
    let from = if is_flag(&before) || is_flag(&now) { at } else { at.saturating_sub(1) };
    let show = |words: &[&str]| match words.get(from..=at.min(words.len().saturating_sub(1))) {
        Some(words) if !words.is_empty() => words.join(" "),
        _ => "none".to_owned(),
    };
    Some(format!("argument: {}, now {}", show(&before), show(&now)))
}

/// Two spellings of one path are the same argument. A name on the Hub is its snapshot in the cache.
fn same_argument(before: Option<&&str>, now: Option<&&str>) -> bool {
    let (Some(before), Some(now)) = (before, now) else { return false };
    let parts = |word: &str| {
        word.rsplit_once('=').map_or((String::new(), word.to_owned()), |(k, v)| (k.to_owned(), v.to_owned()))
    };
    let ((key, path), (other_key, other)) = (parts(before), parts(now));
    let real = |text: &str| hub::snapshot(text).map_or_else(|| PathBuf::from(text), |found| found.path).canonicalize();
    before == now || key == other_key && real(&path).is_ok_and(|path| real(&other).is_ok_and(|other| other == path))
}

fn with_effect(arguments: &[String]) -> Vec<&str> {
    let mut left = Vec::new();
    let mut words = arguments.iter().map(String::as_str);
    while let Some(word) = words.next() {
        let flag = word.split_once('=').map_or(word, |(flag, _)| flag);
        match WITHOUT_EFFECT.iter().find(|(name, _)| *name == flag) {
            Some((_, values)) => drop((flag == word).then(|| words.by_ref().take(*values).count())),
            None => left.push(word),
        }
    }
    left
}

fn is_as_recorded(role: &str, input: &Input, contents: &Contents) -> bool {
    let path = Path::new(&input.path);
    if let Some(digest) = Tasks::digest_of_role(path, role) {
        return digest.is_ok_and(|digest| digest == input.digest);
    }
    !input.files.is_empty() && FileStamp::of(path) == input.files
        || Provenance::recorded_file_digest(path).as_ref() == Some(&input.digest)
        || contents.has(path, &input.digest)
}

/// Digests of files and checkpoints, each taken once.
#[derive(Default)]
struct Contents(RefCell<HashMap<PathBuf, Vec<Digest>>>);

impl Contents {
    /// Returns true if `path` has the digest, as a checkpoint or as the bytes of a file.
    fn has(&self, path: &Path, digest: &Digest) -> bool {
        let mut known = self.0.borrow_mut();
        let digests = known.entry(path.to_owned()).or_insert_with(|| {
            let file = path.is_file().then(|| Digest::of_file(path).ok()).flatten();
            let checkpoint = || Checkpoint::open(path).ok()?.digest().ok();
            file.into_iter().chain(checkpoint()).collect()
        });
        digests.contains(digest)
    }
}

/// One command of a pipeline.
#[derive(Debug, Clone)]
pub struct Command {
    /// Name of what it makes.
    pub name: String,
    /// The program's name.
    pub stage: String,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// The output: the value of `--out`.
    pub out: PathBuf,
    /// Inputs that the arguments do not name.
    pub more_inputs: Vec<PathBuf>,
}

/// State of an output in a pipeline, and the commands it comes after, by index.
#[derive(Debug, Clone)]
pub struct Status {
    /// Its state.
    pub state: State,
    /// Commands whose outputs it is made from.
    pub reads: Vec<usize>,
    /// Commands whose outputs lie in a directory that it is about.
    pub surveys: Vec<usize>,
}

/// State of an output in a pipeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Up to date.
    Done,
    /// Its weights were deleted and its record kept, and they are not needed: everything made from
    /// them is up to date, and they would be made the same.
    Deleted,
    /// Does not exist; the reason if that is not all.
    Missing(String),
    /// Exists but is out of date, for a reason.
    Stale(String),
}

impl State {
    /// Returns true if the command must run.
    pub fn is_due(&self) -> bool {
        matches!(self, Self::Missing(_) | Self::Stale(_))
    }

    /// The state's word and its reason.
    pub fn words(&self) -> (&'static str, &str) {
        match self {
            Self::Done => ("done", ""),
            Self::Deleted => ("deleted", "everything made from it is up to date"),
            Self::Missing(reason) => ("missing", reason),
            Self::Stale(reason) => ("stale", reason),
        }
    }
}

/// States of the outputs of `commands`, each of which comes after those that make its inputs. What
/// is made from an output that is due is due itself.
pub fn states(commands: &[Command]) -> Vec<Status> {
    let outs: Vec<PathBuf> = commands.iter().map(|command| resolved(&command.out)).collect();
    let after: Vec<Needs> = commands.iter().enumerate().map(|(i, c)| Needs::of(c, &outs[i], &outs[..i])).collect();
    let records: Vec<Option<Provenance>> = commands.iter().map(|c| Provenance::of(&c.out)).collect();
    let output_of = |i: usize| records[i].as_ref().and_then(|record| record.output.as_ref());
    let weights_gone = |i: usize| outs[i].is_dir() && output_of(i).is_some_and(|output| output.lost_weights(&outs[i]));
    let gone: Vec<bool> = (0..commands.len()).map(|i| !outs[i].exists() || weights_gone(i)).collect();
    let contents = Contents::default();
    let mut states: Vec<State> = Vec::new();
    for (i, command) in commands.iter().enumerate() {
        // Weights that were deleted count as those that their record describes.
        let deleted = |input: &Input| {
            let path = resolved(Path::new(&input.path));
            let j = after[i].reads.iter().copied().find(|j| gone[*j] && path.starts_with(&outs[*j]))?;
            Some(path != outs[j] || output_of(j).is_none_or(|output| output.blake3 == input.digest))
        };
        let own = match &records[i] {
            _ if !outs[i].exists() => State::Missing(String::new()),
            None => State::Stale("it has no record that this version reads".to_owned()),
            Some(record) => {
                let difference = difference(record, &command.stage, &command.arguments, &contents, deleted);
                match (gone[i], difference) {
                    (true, None) => State::Deleted,
                    (true, Some(reason)) => State::Missing(reason),
                    (false, None) => damage(record, &command.out, &contents).map_or(State::Done, State::Stale),
                    (false, Some(reason)) => State::Stale(reason),
                }
            }
        };
        let before = after[i].reads.iter().chain(&after[i].surveys);
        let due: Vec<&str> = before.filter(|j| states[**j].is_due()).map(|j| commands[*j].name.as_str()).collect();
        states.push(match own {
            State::Missing(reason) if reason.is_empty() && !due.is_empty() => {
                State::Missing(format!("waits for {}", due.join(", ")))
            }
            State::Deleted if !due.is_empty() => State::Missing(format!("waits for {}", due.join(", "))),
            State::Done if !due.is_empty() => State::Stale(format!("follows {}", due.join(", "))),
            own => own,
        });
    }
    // Deleted weights are needed again if something made from them is due, or if nothing is made
    // from them.
    for i in (0..commands.len()).rev().filter(|i| gone[*i]) {
        let mut users = (0..commands.len()).filter(|j| after[*j].reads.contains(&i)).peekable();
        let unused = users.peek().is_none();
        let user = users.find(|j| states[*j].is_due());
        match (&states[i], user) {
            (State::Deleted, Some(user)) => {
                states[i] = State::Missing(format!("needed again by {}", commands[user].name));
            }
            (State::Deleted, None) if unused => states[i] = State::Missing(String::new()),
            _ => {}
        }
    }
    let status = |(state, Needs { reads, surveys })| Status { state, reads, surveys };
    states.into_iter().zip(after).map(status).collect()
}

/// The same path for every spelling of it; the file need not exist.
fn resolved(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        match (parent.map(resolved), path.file_name()) {
            (Some(parent), Some(name)) => parent.join(name),
            _ => std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
        }
    })
}

/// Earlier commands that a command comes after, by index.
struct Needs {
    /// An argument is their output, or lies in it.
    reads: Vec<usize>,
    /// An argument that is no flag's value is a directory that holds their output.
    surveys: Vec<usize>,
}

impl Needs {
    fn of(command: &Command, out: &Path, before: &[PathBuf]) -> Self {
        let value = |word: &str| PathBuf::from(word.rsplit_once('=').map_or(word, |(_, path)| path));
        let words = &command.arguments;
        let mut paths: Vec<PathBuf> = words.iter().map(|word| value(word)).collect();
        paths.extend(command.more_inputs.iter().cloned());
        let paths: Vec<PathBuf> = paths
            .into_iter()
            .filter(|p| !p.as_os_str().is_empty())
            .map(|p| resolved(&p))
            .filter(|p| p != out)
            .collect();
        let free = |k: &usize| *k > 0 && !words[*k].starts_with('-') && !words[*k - 1].starts_with('-');
        let folders: Vec<PathBuf> =
            (0..words.len()).filter(free).map(|k| resolved(Path::new(&words[k]))).filter(|p| p.is_dir()).collect();
        let reads: Vec<usize> =
            (0..before.len()).filter(|j| paths.iter().any(|path| path.starts_with(&before[*j]))).collect();
        let held = |j: &usize| folders.iter().any(|folder| before[*j] != *folder && before[*j].starts_with(folder));
        let surveys = (0..before.len()).filter(|j| !reads.contains(j)).filter(held).collect();
        Self { reads, surveys }
    }
}

/// Reads commands as `make -n` with GRAPH=1 prints them: name, command and further inputs,
/// separated by tabs, one per line.
///
/// # Errors
/// A message that names the line.
pub fn parse_commands(text: &str) -> Result<Vec<Command>, String> {
    let mut seen = BTreeMap::new();
    let parse = |(i, line): (usize, &str)| {
        let mut fields = line.split('\t');
        let (name, command) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        let words = shlex::split(command).ok_or_else(|| format!("line {}: quotes do not match: {command}", i + 1))?;
        let (program, arguments) =
            words.split_first().ok_or_else(|| format!("line {}: expected NAME, a tab and a command", i + 1))?;
        let stage = Path::new(program).file_name().unwrap_or_default().to_string_lossy().into_owned();
        if arguments.iter().any(|word| word == "--config" || word.starts_with("--config=")) {
            return Err(format!("line {}: --config is not read here: write the arguments out", i + 1));
        }
        let separate = arguments.iter().rposition(|word| word == "--out").and_then(|at| arguments.get(at + 1));
        let out = separate
            .map(String::as_str)
            .or_else(|| arguments.iter().rev().find_map(|word| word.strip_prefix("--out=")));
        let out = out.ok_or_else(|| format!("line {}: {name}: the command has no --out", i + 1))?.into();
        if let Some(other) = seen.insert(name.to_owned(), i + 1) {
            return Err(format!("line {}: {name} is on line {other} already", i + 1));
        }
        let more_inputs = fields.filter(|path| !path.is_empty()).map(PathBuf::from).collect();
        Ok(Command { name: name.to_owned(), stage, arguments: arguments.to_vec(), out, more_inputs })
    };
    text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn arguments_without_effect_do_not_count() {
        let change = |a: &str, b: &str| changed_argument(&words(a), &words(b));
        assert_eq!(change("run --lr 1 --threads 4 --json", "run --skip-up-to-date --lr 1 --threads=2"), None);
        assert_eq!(change("run --lr 1", "run --lr 2").unwrap(), "argument: --lr 1, now --lr 2");
        assert_eq!(change("run --lr 1", "run --lr 1 --seed 2").unwrap(), "argument: none, now --seed");
        assert_eq!(change("--base ./ --x 1", "--base . --x 1"), None);
    }

    #[test]
    fn a_command_comes_after_those_whose_outputs_it_reads_or_surveys() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        std::fs::create_dir(&run).unwrap();
        let text = "probe\tcpift-probe --base b --out run/p\nmask\tbin/cpift-mask extract --fisher run/p/fisher --out run/m\n\
                    group\tcpift-group --mask a=run/./m --out run/g.json\n\
                    train\tcpift-train run --model run --tasks t --out run/t\n\
                    report\tcpift-eval report run --out run/report.html\nmore\tcpift-eval x --out elsewhere\trun/p";
        let run = run.to_str().unwrap();
        let list =
            parse_commands(&text.replace("run/", &format!("{run}/")).replace("report run", &format!("report {run}")))
                .unwrap();
        let outs: Vec<PathBuf> = list.iter().map(|command| resolved(&command.out)).collect();
        let all: Vec<Needs> = list.iter().enumerate().map(|(i, c)| Needs::of(c, &outs[i], &outs[..i])).collect();
        let reads: Vec<Vec<usize>> = all.iter().map(|needs| needs.reads.clone()).collect();
        assert_eq!(reads, [vec![], vec![0], vec![1], vec![], vec![], vec![0]]);
        let surveys: Vec<Vec<usize>> = all.into_iter().map(|needs| needs.surveys).collect();
        assert_eq!(surveys, [vec![], vec![], vec![], vec![], vec![0, 1, 2, 3], vec![]]);
        assert_eq!(list[1].stage, "cpift-mask");
        assert!(parse_commands("a\tcpift-mask extract").unwrap_err().contains("no --out"));
        assert!(parse_commands("a\tx --out y\na\tx --out z").unwrap_err().contains("line 2: a is on line 1"));
    }
}
