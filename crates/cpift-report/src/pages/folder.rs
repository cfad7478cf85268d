//! The directory of a run: its files and models, and the records of how each artifact was made.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use cpift_core::BadInput;
use cpift_core::files::RECORD_NAME;
use cpift_core::format::json;
use cpift_core::record::provenance::{Provenance, beside};
use maud::{Markup, html};

use crate::html::{Table, missing, paragraph, verbatim};

/// Names the pipeline gives to methods, in the order of the page; other models come between the two
/// lists, by name.
const FIRST: [&str; 3] = ["base", "full-sft", "multi-stage"];
const LAST: [&str; 6] = ["backbone", "fused", "cpi-ft-group", "cpi-ft", "mixture", "cpi-ft-plus"];

/// Sort key of a model among the others.
pub(crate) fn rank(name: &str) -> (usize, usize, String) {
    let first = FIRST.iter().position(|n| *n == name).map(|i| (0, i));
    let last = LAST.iter().position(|n| *n == name).map(|i| (2, i));
    let (group, place) = first.or(last).unwrap_or((1, 0));
    (group, place, name.to_owned())
}

/// Lists a directory by name, without hidden entries such as unfinished outputs; empty if there is
/// no such directory.
pub(crate) fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let error = |e| BadInput::new(folder, format!("cannot be listed: {e}"));
    let list: Result<Vec<PathBuf>, _> =
        std::fs::read_dir(folder).map_err(error)?.map(|e| e.map(|e| e.path())).collect();
    let mut list = list.map_err(error)?;
    list.retain(|path| !file_name(path).starts_with('.'));
    list.sort();
    Ok(list)
}

pub(crate) fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned())
}

/// Paths, under a run's directory, of the models made by the pipeline: probes first, then the
/// others by [`rank`].
pub(crate) fn models(folder: &Path) -> Result<Vec<String>> {
    let is_model = |path: &PathBuf| path.join(RECORD_NAME).is_file() && path.join("config.json").is_file();
    let probes = entries(&folder.join("probes"))?.into_iter().filter(is_model);
    let probes: Vec<String> = probes.map(|path| format!("probes/{}", file_name(&path))).collect();
    let mut rest: Vec<String> = entries(folder)?.into_iter().filter(is_model).map(|path| file_name(&path)).collect();
    rest.sort_by_key(|name| rank(name));
    Ok([probes, rest].concat())
}

/// Depth to which records are searched: `task-scores/MODEL/TASK/cpift.json`.
const DEPTH: usize = 3;

/// An artifact's path under the run's directory, and its record or the reason it cannot be read.
pub(crate) type Record = (String, Result<Provenance, String>);

/// Finds the files of all records under `folder`, but for that of the page itself.
///
/// # Errors
/// [`BadInput`] when a directory cannot be listed.
pub(crate) fn record_files(folder: &Path, page_file: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    collect(folder, DEPTH, &mut files)?;
    files.retain(|file| *file != beside(page_file));
    Ok(files)
}

/// Finds all records under `folder`, but for that of the page itself, ordered by start time.
///
/// # Errors
/// [`BadInput`] when a directory cannot be listed.
pub(crate) fn find(folder: &Path, page_file: &Path) -> Result<Vec<Record>> {
    let mut records: Vec<Record> = record_files(folder, page_file)?
        .iter()
        .map(|path| {
            let record = json::read::<Provenance>(path).map_err(|e| e.to_string());
            (artifact(folder, path), record)
        })
        .collect();
    records.sort_by_key(|(path, record)| (record.as_ref().map_or(u64::MAX, |r| r.started_unix), path.clone()));
    Ok(records)
}

fn collect(folder: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<()> {
    for path in entries(folder)? {
        if path.is_dir() && depth > 0 && !path.is_symlink() {
            collect(&path, depth - 1, files)?;
        } else if file_name(&path) == RECORD_NAME || file_name(&path).ends_with(&format!(".{RECORD_NAME}")) {
            files.push(path);
        }
    }
    Ok(())
}

/// The artifact of a record: the directory it is in, or the file it is beside.
fn artifact(folder: &Path, record: &Path) -> String {
    let path = record.strip_prefix(folder).unwrap_or(record);
    let shown = path.display().to_string();
    let name = shown.strip_suffix(&format!(".{RECORD_NAME}")).or_else(|| shown.strip_suffix(RECORD_NAME));
    match name.unwrap_or(&shown).trim_end_matches('/') {
        "" => ".".to_owned(),
        name => name.to_owned(),
    }
}

/// The section on provenance.
pub(crate) fn provenance(folder: &Path, records: &[Record]) -> Markup {
    if records.is_empty() {
        return missing(&format!("No cpift.json under {}.", folder.display()));
    }
    html! {
        (paragraph(
            "Every artifact with the command that made it, oldest first. Run the commands from the directory in which the first one was \
             run: paths are as typed. Existing outputs are replaced only with --force.",
        ))
        @for (path, record) in records {
            @match record {
                Ok(record) => { (entry(path, record)) }
                Err(e) => { (missing(&format!("{path}: {e}"))) }
            }
        }
    }
}

fn entry(path: &str, record: &Provenance) -> Markup {
    let mut facts: Vec<(&str, String)> = Vec::new();
    facts.extend(record.seed.map(|seed| ("seed", seed.to_string())));
    let simple = record.facts.iter().filter(|(_, value)| !value.is_array() && !value.is_object());
    facts.extend(simple.map(|(name, value)| (name.as_str(), value.to_string())));
    facts.push(("took", format!("{:.1} s on {}", record.seconds, record.host)));
    facts.extend(record.output.as_ref().map(|output| ("digest", output.blake3.to_string())));
    let header = ["role", "path", "BLAKE3"].map(str::to_owned);
    let mut inputs = Table::new(&format!("Inputs of {path}"), &header).text_column(1);
    for (role, input) in &record.inputs {
        let digest = input.digest.to_string();
        let short: String = digest.chars().take(12).collect();
        inputs.markup_row([html! { (role) }, html! { (input.path) }, html! { code title=(digest) { (short) } }]);
    }
    html! {
        details.record {
            "\n"
            summary {
                (path) " " small { (record.stage) " " (record.version) ", " (format!("{:.1}", record.seconds)) " s" }
            }
            "\n"
            div {
                "\n"
                dl {
                    "\n"
                    dt { "command" } dd { (verbatim(&command(record))) } "\n"
                    @for (name, value) in facts { dt { (name) } dd { (value) } "\n" }
                }
                "\n"
                @if !record.inputs.is_empty() { (inputs.markup()) }
            }
            "\n"
        }
        "\n"
    }
}

/// The command line, quoted for a shell.
fn command(record: &Provenance) -> String {
    let words = record.arguments.iter().map(|argument| quoted(argument));
    [quoted(&record.stage)].into_iter().chain(words).collect::<Vec<_>>().join(" ")
}

/// One word of a command line, quoted for bash if necessary.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_@%+=:,./-".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    if !word.chars().any(char::is_control) {
        return format!("'{}'", word.replace('\'', r"'\''"));
    }
    let mut out = "$'".to_owned();
    for c in word.chars() {
        match c {
            '\'' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => {
                let _ = write!(out, "\\U{:08x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out + "'"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_back_the_words_that_were_typed() {
        let words = ["--lr=1e-3", "", "two words", "it's", "$HOME `x` \"y\"", "a\nb\t\\'", "*", "~", "é", "-n"];
        let line: Vec<String> = words.iter().map(|w| quoted(w)).collect();
        let script = format!("printf '%s\\0' {}", line.join(" "));
        let output =
            std::process::Command::new("bash").env("LC_ALL", "C.UTF-8").args(["-c", &script]).output().unwrap();
        let read = String::from_utf8(output.stdout).unwrap();
        assert_eq!(read.trim_end_matches('\0').split('\0').collect::<Vec<_>>(), words, "{script}");
    }
}
