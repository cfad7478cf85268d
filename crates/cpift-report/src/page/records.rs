//! Where every artifact came from: its cpift.json, and the command that makes it again.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use cpift_core::files::RECORD_NAME;
use cpift_core::format::json;
use cpift_core::record::provenance::Provenance;

use super::{entries, file_name};
use crate::html::{Table, escape, missing, paragraph, verbatim};

/// How deep under the run's folder records are looked for: `task-scores/MODEL/TASK/cpift.json`.
const DEPTH: usize = 3;

/// A record: the artifact's path under the run's folder, and what its file says, or why it cannot be read.
pub type Record = (String, Result<Provenance, String>);

/// All records under `folder`, in order of when they were started.
///
/// # Errors
/// Folders that cannot be listed.
pub fn find(folder: &Path) -> Result<Vec<Record>> {
    let mut files = Vec::new();
    collect(folder, DEPTH, &mut files)?;
    let mut records: Vec<Record> = files
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

/// What a record is about: the folder it lies in, or the file it lies beside.
fn artifact(folder: &Path, record: &Path) -> String {
    let path = record.strip_prefix(folder).unwrap_or(record);
    let shown = path.display().to_string();
    let name = shown.strip_suffix(&format!(".{RECORD_NAME}")).or_else(|| shown.strip_suffix(RECORD_NAME));
    match name.unwrap_or(&shown).trim_end_matches('/') {
        "" => ".".to_owned(),
        name => name.to_owned(),
    }
}

/// The records as HTML.
pub fn section(folder: &Path, records: &[Record]) -> String {
    if records.is_empty() {
        return missing(&format!("No cpift.json under {}.", folder.display()));
    }
    let parts: String = records.iter().map(|(path, record)| entry(path, record)).collect();
    paragraph(
        "Every artifact with the command that made it, oldest first: run it from the folder the first one was run from. Paths are as \
         they were typed; an output that is there is replaced with --force only.",
    ) + &parts
}

fn entry(path: &str, record: &Result<Provenance, String>) -> String {
    let record = match record {
        Ok(record) => record,
        Err(e) => return missing(&format!("{path}: {e}")),
    };
    let mut facts = format!("<dt>command</dt><dd>{}</dd>\n", verbatim(&command(record)));
    let mut fact = |name: &str, value: &str| {
        let _ = writeln!(facts, "<dt>{}</dt><dd>{}</dd>", escape(name), escape(value));
    };
    if let Some(seed) = record.seed {
        fact("seed", &seed.to_string());
    }
    for (name, value) in record.facts.iter().filter(|(_, value)| !value.is_array() && !value.is_object()) {
        fact(name, &value.to_string());
    }
    fact("took", &format!("{:.1} s on {}", record.seconds, record.host));
    if let Some(output) = &record.output {
        fact("digest", &output.blake3.to_string());
    }
    let mut inputs =
        Table::new(&format!("Inputs of {path}"), &["role", "path", "BLAKE3"].map(str::to_owned)).text_column(1);
    for (role, input) in &record.inputs {
        let digest = input.digest.to_string();
        let short: String = digest.chars().take(12).collect();
        let cell = format!("<code title=\"{}\">{}</code>", escape(&digest), escape(&short));
        inputs.html_row([escape(role), escape(&input.path), cell]);
    }
    let inputs = if record.inputs.is_empty() { String::new() } else { inputs.finish() };
    format!(
        "<details class=\"record\">\n<summary>{} <small>{} {}, {:.1} s</small></summary>\n<div>\n<dl>\n{facts}</dl>\n{inputs}</div>\n\
         </details>\n",
        escape(path),
        escape(&record.stage),
        escape(&record.version),
        record.seconds
    )
}

/// The command line, quoted for a shell.
fn command(record: &Provenance) -> String {
    let words = record.arguments.iter().map(|argument| quoted(argument));
    [quoted(&record.stage)].into_iter().chain(words).collect::<Vec<_>>().join(" ")
}

/// One word of a command line as bash reads it.
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
