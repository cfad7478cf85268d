//! `--config FILE`: arguments from a TOML file by their long names, or those of an earlier run from
//! its cpift.json; and `--print-config`, which prints arguments as such a file.
//!
//! A file becomes words of the command line before clap parses it, so that checks, the record and
//! the up-to-date rule see one list of arguments, wherever they come from.

use std::any::TypeId;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Arg, ArgAction, ArgMatches, Command};
use toml::{Table, Value};

use crate::error::closest;
use crate::error::{BadInput, usage};
use crate::files::read_text;
use crate::format::json;
use crate::hub::{self, Need};
use crate::record::provenance::{FORMAT_VERSION, Provenance};

/// The id of `--config`.
const CONFIG: &str = "config";
/// Ids that a file cannot set and that are not printed.
const OUTSIDE: [&str; 4] = [CONFIG, "print_config", "help", "version"];
/// Key of a file for the subcommand.
const COMMAND: &str = "command";

/// A command line with the arguments of its file.
pub(crate) struct Resolved {
    /// The words, the program's name first, without `--config`.
    pub words: Vec<OsString>,
    /// The file.
    pub file: Option<PathBuf>,
}

/// Replaces `--config FILE` among `words` by the arguments of the file. Those that are typed, or
/// that exclude a typed one, are left out.
///
/// # Errors
/// [`BadInput`] for a file that cannot be read, an unknown key or a wrong type; [`crate::Usage`]
/// for a file of another command.
pub(crate) fn resolve(command: &Command, words: Vec<OsString>) -> Result<Resolved> {
    let mut command = command.clone();
    command.build();
    let (program, rest) = words.split_first().map_or((OsString::new(), &words[..]), |(p, rest)| (p.clone(), rest));
    let mut typed = Line::of(&command, None, rest);
    let mut files = typed.given.iter().filter(|given| given.id == CONFIG);
    // If it is given twice, clap says so.
    let (Some(given), None) = (files.next(), files.next()) else { return Ok(Resolved { words, file: None }) };
    let Some(path) = given.value.as_deref().map(PathBuf::from) else { return Ok(Resolved { words, file: None }) };
    let file = if path.extension().is_some_and(|e| e == "json") {
        recorded(&command, &path)?
    } else {
        File::read(&command, &path, &typed)?
    };
    let subcommand = match (&typed.subcommand, &file.subcommand) {
        (Some(typed), Some(named)) if typed != named => {
            return Err(usage(format!("{} is of {} {named}, not {typed}", path.display(), command.get_name())));
        }
        (typed, named) => typed.clone().or_else(|| named.clone()),
    };
    if typed.subcommand.is_none() {
        // Its options are those of the subcommand that the file names.
        typed = Line::of(&command, subcommand.as_deref(), rest);
    }
    let leaf = leaf(&command, subcommand.as_deref());
    let kept = |given: &&Given| {
        let excluded = |other: &Given| excludes(leaf, &given.id, &other.id) || excludes(leaf, &other.id, &given.id);
        !typed.given.iter().any(|other| other.id == given.id || excluded(other))
    };
    let (positional, options): (Vec<&Given>, Vec<&Given>) =
        file.given.iter().filter(kept).partition(|given| given.is_positional());
    let before = typed.given.iter().filter(|given| given.id != CONFIG && given.before_subcommand);
    let after = typed.given.iter().filter(|given| given.id != CONFIG && !given.before_subcommand);
    let mut resolved = vec![program];
    resolved.extend(before.flat_map(|given| given.words.clone()));
    resolved.extend(subcommand.map(OsString::from));
    resolved.extend(options.into_iter().chain(after).chain(positional).flat_map(|given| given.words.clone()));
    Ok(Resolved { words: resolved, file: Some(path) })
}

/// A command line in which names of the Hugging Face Hub are replaced.
pub(crate) struct Located {
    /// By the directories of their snapshots in the local cache.
    pub words: Vec<OsString>,
    /// By `org/name@commit`, for the record.
    pub pinned: Vec<OsString>,
}

/// Replaces `org/name[@revision]` where an argument takes a model. What the local cache does not
/// have is downloaded if `download` is set, and else left as it is.
///
/// # Errors
/// [`BadInput`] for a model that cannot be downloaded.
pub(crate) fn locate(command: &Command, words: &[OsString], download: bool) -> Result<Located> {
    let mut command = command.clone();
    command.build();
    let Some((program, rest)) = words.split_first() else {
        return Ok(Located { words: vec![], pinned: vec![] });
    };
    let line = Line::of(&command, None, rest);
    let leaf = leaf(&command, line.subcommand.as_deref());
    let mut located = Located { words: vec![program.clone()], pinned: vec![program.clone()] };
    let after = line.given.iter().position(|given| !given.before_subcommand).unwrap_or(line.given.len());
    for (i, given) in line.given.iter().enumerate() {
        if i == after {
            located.both(line.subcommand.iter().map(OsString::from));
        }
        let arg = leaf.get_arguments().find(|arg| arg.get_id() == given.id.as_str());
        let text = arg.and_then(takes).zip(given.words.last().and_then(|word| word.to_str()));
        let found = text.map_or(Ok(None), |(need, text)| {
            // After `--model=` or `NAME=`.
            let name = text.rsplit_once('=').map_or(text, |(_, name)| name);
            let before = text.strip_suffix(name).unwrap_or_default();
            anyhow::Ok(hub::with_adapters(name, download.then_some(need))?.map(|found| (before, found)))
        });
        let Some((before, (path, pinned))) = found? else {
            located.both(given.words.iter().cloned());
            continue;
        };
        located.both(given.words[..given.words.len() - 1].iter().cloned());
        let mut word = OsString::from(before);
        word.push(&path);
        located.words.push(word);
        log::debug!("{pinned}: {}", path.to_string_lossy());
        located.pinned.push(OsString::from(format!("{before}{pinned}")));
    }
    if after == line.given.len() {
        located.both(line.subcommand.iter().map(OsString::from));
    }
    Ok(located)
}

impl Located {
    fn both(&mut self, words: impl Iterator<Item = OsString>) {
        for word in words {
            self.words.push(word.clone());
            self.pinned.push(word);
        }
    }
}

/// Files that an argument needs of a repository: `--help` shows it as MODEL, NAME=MODEL or ADAPTER,
/// or as SOURCE, of a tokenizer.
fn takes(arg: &Arg) -> Option<Need> {
    arg.get_value_names()?.iter().find_map(|name| match name.rsplit('=').next() {
        Some("MODEL" | "ADAPTER") => Some(Need::Model),
        Some("SOURCE") => Some(Need::Tokenizer),
        _ => None,
    })
}

/// The arguments of an earlier run of the same program.
fn recorded(command: &Command, path: &Path) -> Result<File> {
    let record: Provenance = json::read(path).map_err(|error| {
        let error = BadInput::new(path, format!("not a cpift.json: {error:#}"));
        error.hint(
            "--config takes a TOML file, or the cpift.json of an output; a model's config.json goes to --model-config",
        )
    })?;
    json::check_version(path, "a provenance record", record.format_version, FORMAT_VERSION)?;
    if record.stage != command.get_name() {
        return Err(usage(format!(
            "{} records a run of {}, not of {}",
            path.display(),
            record.stage,
            command.get_name()
        )));
    }
    if record.version != env!("CARGO_PKG_VERSION") {
        log::warn!("{}: made by version {}, this is {}", path.display(), record.version, env!("CARGO_PKG_VERSION"));
    }
    let words: Vec<OsString> = record.arguments.iter().map(OsString::from).collect();
    let Line { subcommand, given } = Line::of(command, None, &words);
    Ok(File { subcommand, given })
}

/// The subcommand `name`, or the program itself.
fn leaf<'a>(command: &'a Command, name: Option<&str>) -> &'a Command {
    name.and_then(|name| command.find_subcommand(name)).unwrap_or(command)
}

/// Returns true if the argument `id` is declared to exclude `other`.
fn excludes(command: &Command, id: &str, other: &str) -> bool {
    let arg = command.get_arguments().find(|arg| arg.get_id() == id);
    arg.is_some_and(|arg| command.get_arg_conflicts_with(arg).iter().any(|arg| arg.get_id() == other))
}

/// Words of one occurrence of an argument.
struct Given {
    /// Clap's id; empty for words that are no argument.
    id: String,
    words: Vec<OsString>,
    /// The first value of an option.
    value: Option<OsString>,
    before_subcommand: bool,
}

impl Given {
    fn is_positional(&self) -> bool {
        self.words.first().is_some_and(|word| !word.to_string_lossy().starts_with('-'))
    }
}

/// A command line, split into arguments. Mistakes are left to clap.
struct Line {
    subcommand: Option<String>,
    given: Vec<Given>,
}

impl Line {
    /// The line of a program, or of its subcommand `within` if no word names one.
    fn of(root: &Command, within: Option<&str>, words: &[OsString]) -> Self {
        let (mut command, mut subcommand, mut given) = (leaf(root, within), None::<String>, Vec::<Given>::new());
        let mut i = 0;
        while i < words.len() {
            let text = words[i].to_string_lossy();
            let flag = text.strip_prefix("--").filter(|name| !name.is_empty());
            if flag.is_none()
                && !text.starts_with('-')
                && subcommand.is_none()
                && let Some(found) = command.find_subcommand(&*text)
            {
                given.iter_mut().for_each(|given| given.before_subcommand = true);
                (command, subcommand) = (found, Some(found.get_name().to_owned()));
                i += 1;
                continue;
            }
            let inline = flag.and_then(|name| name.split_once('=')).map(|(_, value)| OsString::from(value));
            let arg = match flag {
                Some(name) => named(command, name.split_once('=').map_or(name, |(name, _)| name)),
                None => text.strip_prefix('-').and_then(|name| {
                    command.get_arguments().find(|arg| arg.get_short().is_some_and(|short| name.starts_with(short)))
                }),
            };
            let takes = arg.is_some_and(|arg| arg.get_action().takes_values()) && inline.is_none();
            let count = if takes { 2.min(words.len() - i) } else { 1 };
            let id = arg.map_or_else(String::new, |arg| arg.get_id().to_string());
            let value = inline.or_else(|| words[i..i + count].get(1).cloned());
            given.push(Given { id, words: words[i..i + count].to_vec(), value, before_subcommand: false });
            i += count;
        }
        let mut positionals = command.get_positionals().map(|arg| arg.get_id().to_string());
        let first = positionals.next().unwrap_or_default();
        given
            .iter_mut()
            .filter(|given| given.id.is_empty() && given.is_positional())
            .for_each(|g| g.id = first.clone());
        Self { subcommand, given }
    }
}

/// The option with the long name or alias `name`.
fn named<'a>(command: &'a Command, name: &str) -> Option<&'a Arg> {
    command.get_arguments().find(|arg| names(arg).iter().any(|known| known == name))
}

/// The long name of an option and its aliases; the id of a positional argument.
fn names(arg: &Arg) -> Vec<String> {
    let Some(long) = arg.get_long() else { return vec![arg.get_id().as_str().replace('_', "-")] };
    let aliases = arg.get_all_aliases().unwrap_or_default();
    std::iter::once(long).chain(aliases).map(str::to_owned).collect()
}

/// The arguments of a file.
struct File {
    subcommand: Option<String>,
    given: Vec<Given>,
}

impl File {
    fn read(root: &Command, path: &Path, typed: &Line) -> Result<Self> {
        let mut table: Table = toml::from_str(&read_text(path)?)
            .map_err(|e| BadInput::new(path, format!("not TOML: {}", e.to_string().trim_end())))?;
        let subcommand = match table.remove(COMMAND) {
            None => typed.subcommand.clone(),
            Some(Value::String(name)) if root.find_subcommand(&name).is_some() => Some(name),
            Some(other) => {
                let known: Vec<&str> = root.get_subcommands().map(Command::get_name).collect();
                return Err(BadInput::new(path, format!("{COMMAND} is not a command of {}", root.get_name()))
                    .expected(known.join(", "))
                    .found(other.to_string())
                    .into());
            }
        };
        let command = leaf(root, subcommand.as_deref());
        let mut values: BTreeMap<&str, (&str, &Value)> = BTreeMap::new();
        for (key, value) in &table {
            let arg = known_key(command, path, key)?;
            if let Some((other, _)) = values.insert(arg.get_id().as_str(), (key, value)) {
                return Err(BadInput::new(path, format!("{other} and {key} are the same argument")).into());
            }
        }
        let mut given = Vec::new();
        for arg in command.get_arguments() {
            if let Some((key, value)) = values.get(arg.get_id().as_str()) {
                given.extend(occurrences(arg, path, key, value)?);
            }
        }
        Ok(Self { subcommand, given })
    }
}

/// The argument that a key names, with `-` or `_`.
fn known_key<'a>(command: &'a Command, path: &Path, key: &str) -> Result<&'a Arg> {
    let plain = key.replace('_', "-");
    let settable = || command.get_arguments().filter(|arg| !OUTSIDE.contains(&arg.get_id().as_str()));
    if let Some(arg) = settable().find(|arg| names(arg).iter().any(|name| name.replace('_', "-") == plain)) {
        return Ok(arg);
    }
    let program = command.get_bin_name().unwrap_or(command.get_name()).to_owned();
    let known: Vec<String> = settable().flat_map(|arg| names(arg).into_iter().take(1)).collect();
    let known: Vec<&str> = known.iter().map(String::as_str).collect();
    let near = closest(&plain, &known);
    let hint = near.map_or_else(|| format!("{program} --help lists all"), |near| format!("did you mean {near}?"));
    Err(BadInput::new(path, format!("{key} is not an argument of {program}")).hint(hint).into())
}

/// Type of an argument's values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Flag,
    Bool,
    Whole,
    Number,
    Text,
    /// Text or a number, as the argument reads it.
    Any,
}

impl Kind {
    fn of(arg: &Arg) -> Self {
        if !arg.get_action().takes_values() {
            return Self::Flag;
        }
        let parser = arg.get_value_parser();
        let id = parser.type_id();
        let is = |types: &[TypeId]| types.iter().any(|other| id == *other);
        macro_rules! ids { ($($t:ty),*) => { [$(TypeId::of::<$t>()),*] } }
        if is(&ids!(bool)) {
            Self::Bool
        } else if is(&ids!(usize, u64, u32, u16, u8, i64, i32, NonZeroUsize)) {
            Self::Whole
        } else if is(&ids!(f64, f32)) {
            Self::Number
        } else if is(&ids!(String, OsString, PathBuf)) || !arg.get_possible_values().is_empty() || pairs(arg) {
            Self::Text
        } else {
            Self::Any
        }
    }

    fn expected(self) -> &'static str {
        match self {
            Self::Flag | Self::Bool => "true or false",
            Self::Whole => "a whole number",
            Self::Number => "a number",
            Self::Text => "a string",
            Self::Any => "a string or a number",
        }
    }

    /// The value as it would be typed.
    fn text(self, value: &Value) -> Option<String> {
        match (self, value) {
            (Self::Flag | Self::Bool, Value::Boolean(b)) => Some(b.to_string()),
            (Self::Whole | Self::Number | Self::Any, Value::Integer(n)) => Some(n.to_string()),
            (Self::Number | Self::Any, Value::Float(x)) => Some(x.to_string()),
            (Self::Text | Self::Any, Value::String(text)) => Some(text.clone()),
            _ => None,
        }
    }

    /// A typed value as TOML.
    fn toml(self, text: &str) -> String {
        let quoted = || Value::String(text.to_owned()).to_string();
        match self {
            Self::Flag | Self::Bool | Self::Whole => text.to_owned(),
            Self::Number | Self::Any if text.parse::<i64>().is_ok_and(|n| n.to_string() == text) => text.to_owned(),
            Self::Number => text.parse::<f64>().map_or_else(|_| quoted(), |x| format!("{x:?}")),
            Self::Text | Self::Any => quoted(),
        }
    }
}

/// Returns true if an argument may be given several times, or takes several values.
fn repeats(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Append) || arg.get_num_args().is_some_and(|range| range.max_values() > 1)
}

/// Returns true for `NAME=VALUE` arguments.
fn pairs(arg: &Arg) -> bool {
    arg.get_value_names().is_some_and(|names| names.iter().any(|name| name.contains('=')))
}

/// The words of a key of a file: none for a flag that is off or a value that is the default.
fn occurrences(arg: &Arg, path: &Path, key: &str, value: &Value) -> Result<Vec<Given>> {
    let kind = Kind::of(arg);
    let wrong = |value: &Value| -> anyhow::Error {
        let several = if !repeats(arg) {
            ""
        } else if pairs(arg) {
            ", a list of such or a table of names"
        } else {
            " or a list of such"
        };
        BadInput::new(path, format!("{key} has a wrong type"))
            .expected(format!("{}{several}", kind.expected()))
            .found(format!("{value} ({})", value.type_str()))
            .into()
    };
    let texts: Vec<String> = match value {
        Value::Array(list) if repeats(arg) => {
            list.iter().map(|v| kind.text(v).ok_or_else(|| wrong(v))).collect::<Result<_>>()?
        }
        Value::Table(table) if repeats(arg) && pairs(arg) => {
            let pair = |(name, v): (&String, &Value)| match kind.text(v) {
                Some(text) => Ok(format!("{name}={text}")),
                None => Err(wrong(v)),
            };
            table.iter().map(pair).collect::<Result<_>>()?
        }
        one => vec![kind.text(one).ok_or_else(|| wrong(one))?],
    };
    let given =
        |words: Vec<OsString>| Given { id: arg.get_id().to_string(), words, value: None, before_subcommand: false };
    let Some(long) = arg.get_long() else { return Ok(vec![given(texts.into_iter().map(OsString::from).collect())]) };
    let flag = OsString::from(format!("--{long}"));
    if kind == Kind::Flag {
        return Ok(if texts == ["true"] { vec![given(vec![flag])] } else { Vec::new() });
    }
    let defaults = arg.get_default_values();
    if texts.len() == defaults.len() && texts.iter().zip(defaults).all(|(a, b)| same(a, &b.to_string_lossy())) {
        return Ok(Vec::new());
    }
    let texts = match arg.get_value_delimiter() {
        Some(delimiter) if !texts.is_empty() => vec![texts.join(&delimiter.to_string())],
        _ => texts,
    };
    let words = |text: String| match text.starts_with('-') {
        // A number below zero, where the argument may not take it as a word of its own.
        true => vec![OsString::from(format!("--{long}={text}"))],
        false => vec![flag.clone(), text.into()],
    };
    Ok(texts.into_iter().map(|text| given(words(text))).collect())
}

/// Two spellings of one value.
fn same(a: &str, b: &str) -> bool {
    a == b || matches!((a.parse::<f64>(), b.parse::<f64>()), (Ok(a), Ok(b)) if a == b)
}

/// The parsed arguments as a file for `--config`, defaults included. What is not set is left out.
pub(crate) fn to_toml(command: &Command, matches: &ArgMatches) -> String {
    let mut command = command.clone();
    command.build();
    let (leaf, matches) = match matches.subcommand() {
        Some((name, matches)) => (leaf(&command, Some(name)), matches),
        None => (&command, matches),
    };
    let mut text = String::new();
    if leaf.get_name() != command.get_name() {
        let _ = writeln!(text, "{COMMAND} = {:?}", leaf.get_name());
    }
    let mut heading = None;
    let settable = leaf.get_arguments().filter(|arg| !OUTSIDE.contains(&arg.get_id().as_str()));
    for arg in settable {
        let (id, kind) = (arg.get_id().as_str(), Kind::of(arg));
        let shown = if kind == Kind::Flag {
            matches.get_flag(id).to_string()
        } else {
            let Ok(Some(values)) = matches.try_get_raw(id) else { continue };
            let values: Vec<String> = values.map(|value| kind.toml(&value.to_string_lossy())).collect();
            if repeats(arg) { format!("[{}]", values.join(", ")) } else { values.join("") }
        };
        if arg.get_help_heading() != heading {
            heading = arg.get_help_heading();
            let _ = writeln!(text, "\n# {}", heading.unwrap_or("Options"));
        }
        let _ = writeln!(text, "{} = {shown}", names(arg)[0]);
    }
    text
}
