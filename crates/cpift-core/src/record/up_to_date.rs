//! The one rule for what is up to date: an output is, if its record names this program version, the arguments that matter and
//! the content of every input as it is now, and the output is the one that the record describes.
//!
//! Stages ask it about themselves (`--skip-up-to-date`); make, `make status`, Slurm submission and the experiments ask it about
//! whole lists of commands (`cpift-STAGE up-to-date`). Inputs are hashed only where neither the sizes and times in the record nor
//! the inputs' own records tell.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::format::checkpoint::reader::Checkpoint;
use crate::format::digest::{Digest, FileStamp};
use crate::format::tasks::Tasks;
use crate::record::provenance::{self, Input, Provenance};

/// Flags that do not change the output, and their number of values.
const WITHOUT_EFFECT: [(&str, usize); 11] = [
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
];

/// An output that a command line would make.
pub struct Expected<'a> {
    /// The program (`env!("CARGO_PKG_NAME")`).
    pub stage: &'a str,
    /// The directory or file.
    pub out: &'a Path,
    /// Files that are made along with it and are not in its directory.
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

/// Returns the reason why the output must be made (again) with `arguments`, or none if it is up to date.
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
    difference(&record, expected.stage, arguments, |_| false).or_else(|| damage(&record, out))
}

/// Returns what differs between a record and a command line with its inputs as they are now. Inputs for which `skip` returns true
/// are not looked at.
fn difference(record: &Provenance, stage: &str, arguments: &[String], skip: impl Fn(&Path) -> bool) -> Option<String> {
    if record.stage != stage || record.version != env!("CARGO_PKG_VERSION") {
        return Some(format!("made by {} {}, now {stage} {}", record.stage, record.version, env!("CARGO_PKG_VERSION")));
    }
    if let Some(change) = changed_argument(&record.arguments, arguments) {
        return Some(change);
    }
    let changed = |(role, input): &(&String, &Input)| {
        !skip(Path::new(&input.path)) && !is_as_recorded(role, input, record.started_unix)
    };
    let (role, input) = record.inputs.iter().find(changed)?;
    Some(match Path::new(&input.path).exists() {
        true => format!("input {role} has changed: {}", input.path),
        false => format!("input {role} does not exist: {}", input.path),
    })
}

/// Returns what is wrong with the output, if it is not the one that `record` describes.
fn damage(record: &Provenance, out: &Path) -> Option<String> {
    if let Some(missing) = record.also.iter().find(|path| !Path::new(path).exists()) {
        return Some(format!("{missing} does not exist"));
    }
    let whole = record.output.as_ref().is_none_or(|output| {
        output.holds_for_file(out) || output.holds_for(out) || digests(out).any(|digest| digest == output.blake3)
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

/// Two spellings of one path are the same argument.
fn same_argument(before: Option<&&str>, now: Option<&&str>) -> bool {
    let (Some(before), Some(now)) = (before, now) else { return false };
    let parts = |word: &str| {
        word.rsplit_once('=').map_or((String::new(), word.to_owned()), |(k, v)| (k.to_owned(), v.to_owned()))
    };
    let ((key, path), (other_key, other)) = (parts(before), parts(now));
    before == now
        || key == other_key
            && Path::new(&path)
                .canonicalize()
                .is_ok_and(|path| Path::new(&other).canonicalize().is_ok_and(|o| o == path))
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

fn is_as_recorded(role: &str, input: &Input, started_unix: u64) -> bool {
    let path = Path::new(&input.path);
    if let Some(digest) = Tasks::digest_of_role(path, role) {
        return digest.is_ok_and(|digest| digest == input.digest);
    }
    let untouched = !input.files.is_empty()
        && input.files.iter().all(|file| file.is_before(started_unix))
        && FileStamp::of(path) == input.files;
    untouched
        || Provenance::recorded_file_digest(path).as_ref() == Some(&input.digest)
        || digests(path).any(|digest| digest == input.digest)
}

/// Digests that `path` may have been recorded with: that of a checkpoint, or of the bytes of a file.
fn digests(path: &Path) -> impl Iterator<Item = Digest> {
    let file = path.is_file().then(|| Digest::of_file(path).ok()).flatten();
    let checkpoint = move || Checkpoint::open(path).ok()?.digest().ok();
    file.into_iter().chain(std::iter::once_with(checkpoint).flatten())
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

/// State of an output in a pipeline, and the indices of the commands whose outputs it is made from.
#[derive(Debug, Clone)]
pub struct Status {
    /// Its state.
    pub state: State,
    /// Indices of the commands that make its inputs.
    pub needs: Vec<usize>,
}

/// State of an output in a pipeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Up to date.
    Done,
    /// Its weights were deleted and its record kept, and they are not needed: everything made from them is up to date, and they
    /// would be made the same.
    Deleted,
    /// Does not exist; the reason if that is not all.
    Missing(String),
    /// Must be made again, for a reason.
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

/// States of the outputs of `commands`, each of which comes after those that make its inputs. What is made from an output that is
/// due is due itself.
pub fn states(commands: &[Command]) -> Vec<Status> {
    let needs: Vec<Vec<usize>> = commands.iter().enumerate().map(|(i, c)| needs(c, &commands[..i])).collect();
    let records: Vec<Option<Provenance>> = commands.iter().map(|c| Provenance::of(&c.out)).collect();
    let weights_gone = |i: usize| {
        let output = records[i].as_ref().and_then(|record| record.output.as_ref());
        output.is_some_and(|output| commands[i].out.is_dir() && output.lost_weights(&commands[i].out))
    };
    let gone: Vec<bool> = (0..commands.len()).map(|i| !commands[i].out.exists() || weights_gone(i)).collect();
    let mut states: Vec<State> = Vec::new();
    for (i, command) in commands.iter().enumerate() {
        let is_gone = |path: &Path| needs[i].iter().any(|j| gone[*j] && path.starts_with(&commands[*j].out));
        let own = match &records[i] {
            _ if !command.out.exists() => State::Missing(String::new()),
            None => State::Stale("it has no record that this version reads".to_owned()),
            Some(record) => {
                let difference = difference(record, &command.stage, &command.arguments, is_gone);
                match (gone[i], difference) {
                    (true, None) => State::Deleted,
                    (true, Some(reason)) => State::Missing(reason),
                    (false, None) => damage(record, &command.out).map_or(State::Done, State::Stale),
                    (false, Some(reason)) => State::Stale(reason),
                }
            }
        };
        let due: Vec<&str> =
            needs[i].iter().filter(|j| states[**j].is_due()).map(|j| commands[*j].name.as_str()).collect();
        states.push(match own {
            State::Missing(reason) if reason.is_empty() && !due.is_empty() => {
                State::Missing(format!("waits for {}", due.join(", ")))
            }
            State::Deleted if !due.is_empty() => State::Missing(format!("waits for {}", due.join(", "))),
            State::Done if !due.is_empty() => State::Stale(format!("follows {}", due.join(", "))),
            own => own,
        });
    }
    // What is gone is needed again where something made from it is due.
    for i in (0..commands.len()).rev().filter(|i| gone[*i]) {
        let used = (0..commands.len()).find(|j| needs[*j].contains(&i) && states[*j].is_due());
        let is_used = (0..commands.len()).any(|j| needs[j].contains(&i));
        if let (State::Deleted, Some(user)) = (&states[i], used) {
            states[i] = State::Missing(format!("needed again by {}", commands[user].name));
        } else if states[i] == State::Deleted && !is_used {
            states[i] = State::Missing(String::new());
        }
    }
    states.into_iter().zip(needs).map(|(state, needs)| Status { state, needs }).collect()
}

/// Indices of the commands in `before` whose outputs `command` reads: an argument is such an output, lies in it or holds it.
fn needs(command: &Command, before: &[Command]) -> Vec<usize> {
    let words =
        command.arguments.iter().map(|word| Path::new(word.rsplit_once('=').map_or(word.as_str(), |(_, path)| path)));
    let paths: Vec<&Path> = words.chain(command.more_inputs.iter().map(PathBuf::as_path)).collect();
    let reads = |out: &Path| {
        let touches = |path: &&Path| {
            !path.as_os_str().is_empty() && **path != *command.out && (path.starts_with(out) || out.starts_with(path))
        };
        paths.iter().any(touches)
    };
    (0..before.len()).filter(|j| reads(&before[*j].out)).collect()
}

/// Reads commands as `make -n` with GRAPH=1 prints them: name, command and further inputs, separated by tabs, one per line.
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
    fn a_command_needs_what_its_arguments_name() {
        let parse = |text: &str| parse_commands(text).unwrap();
        let list = parse(
            "probe\tcpift-probe --base b --out run/p\nmask\tbin/cpift-mask extract --fisher run/p/fisher --out run/m\n\
             group\tcpift-group --mask a=run/m --out run/g.json\nreport\tcpift-eval report run --out run/report.html\n\
             more\tcpift-eval x --out elsewhere\trun/p",
        );
        let all: Vec<Vec<usize>> = (0..list.len()).map(|i| needs(&list[i], &list[..i])).collect();
        assert_eq!(all, [vec![], vec![0], vec![1], vec![0, 1, 2], vec![0]]);
        assert_eq!(list[1].stage, "cpift-mask");
        assert!(parse_commands("a\tcpift-mask extract").unwrap_err().contains("no --out"));
        assert!(parse_commands("a\tx --out y\na\tx --out z").unwrap_err().contains("line 2: a is on line 1"));
    }
}
