//! Help texts of all programs, compared with the files in tests/help, so that a changed flag shows
//! up as a changed file. `UPDATE_HELP=1` rewrites them.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use cpift_testkit::chain::program;

const STAGES: [&str; 6] = ["cpift-probe", "cpift-mask", "cpift-group", "cpift-merge", "cpift-train", "cpift-eval"];
const PIPELINE: &str = "cpift-pipeline";
/// Subcommands that every stage has; their help texts are recorded once.
const SHARED: [&str; 3] = ["up-to-date", "completions", "help"];

fn help(name: &str, subcommand: &[&str]) -> String {
    let mut command = Command::new(program(name));
    let output = command.args(subcommand).arg("--help").env("COLUMNS", "100").stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{name} {subcommand:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Lines of the section called `title`.
fn section<'a>(help: &'a str, title: &str) -> Vec<&'a str> {
    let lines = help.lines().skip_while(|line| *line != title).skip(1);
    lines.take_while(|line| line.is_empty() || line.starts_with(' ')).collect()
}

fn subcommands(help: &str) -> Vec<&str> {
    let names =
        section(help, "Commands:").into_iter().filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    names.filter_map(|line| line.split_whitespace().next()).filter(|name| !SHARED.contains(name)).collect()
}

#[test]
fn help_texts_are_as_recorded() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("help");
    let update = std::env::var_os("UPDATE_HELP").is_some();
    let mut changed = Vec::new();
    for name in STAGES.into_iter().chain([PIPELINE]) {
        let top = help(name, &[]);
        let mut text = format!("$ {name} --help\n{top}");
        let shared = if name == "cpift-mask" { &SHARED[..2] } else { &[] };
        for subcommand in subcommands(&top).into_iter().chain(shared.iter().copied()) {
            write!(text, "\n$ {name} {subcommand} --help\n{}", help(name, &[subcommand])).unwrap();
        }
        // clap leaves trailing spaces at wrapped lines.
        let text: String = text.lines().map(|line| format!("{}\n", line.trim_end())).collect();
        let file = folder.join(format!("{name}.txt"));
        if update {
            fs::create_dir_all(&folder).unwrap();
            fs::write(&file, &text).unwrap();
        } else if fs::read_to_string(&file).unwrap_or_default() != text {
            changed.push(format!("{}:\n{text}", file.display()));
        }
    }
    assert!(changed.is_empty(), "UPDATE_HELP=1 rewrites what has changed:\n{}", changed.join("\n"));
}

#[test]
fn every_flag_is_under_a_heading() {
    for name in STAGES.into_iter().chain([PIPELINE]) {
        let top = help(name, &[]);
        for subcommand in subcommands(&top).into_iter().map(Some).chain([None]) {
            let text = subcommand.map_or_else(|| top.clone(), |subcommand| help(name, &[subcommand]));
            let flags =
                section(&text, "Options:").into_iter().map(str::trim_start).filter(|line| line.starts_with('-'));
            let loose: Vec<&str> =
                flags.filter(|line| !line.starts_with("-h, --help") && !line.starts_with("-V, --version")).collect();
            assert!(loose.is_empty(), "{name} {subcommand:?}: {loose:?}");
        }
    }
}

#[test]
fn shells_get_completions() {
    for name in STAGES {
        let output = Command::new(program(name)).args(["completions", "bash"]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && text.contains(&format!(" {name}\n")), "{name}: {text}");
        assert!(text.contains("--skip-up-to-date"), "{name}");
    }
}
