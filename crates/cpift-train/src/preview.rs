//! `cpift-train preview`: the first examples of each task as training uses them, with target tokens
//! highlighted.

use std::ffi::OsStr;
use std::io::{IsTerminal, stdout};

use anyhow::Result;
use clap::ColorChoice;
use cpift_core::error::usage;
use cpift_core::format::tasks::{Task, Tasks};
use cpift_core::run::cli::{self, Common};
use cpift_data::{self as data, Layout, Overlong, Place, Tokenised};
use cpift_torch::session::{ModelInfo, set_strict_config};
use serde_json::{Value, json};

use crate::args::PreviewArgs;

/// Prints the examples; with `--json` a list of objects.
///
/// # Errors
/// [`cpift_core::Usage`] for an argument; [`cpift_core::BadInput`] for data, a tokenizer or a
/// template that training would refuse.
pub fn run(args: &PreviewArgs, common: &Common) -> Result<()> {
    if args.rows == 0 || args.max_length.is_some_and(|n| n < 2) {
        return Err(usage("--rows must be at least 1, --max-length at least 2"));
    }
    set_strict_config(args.strict_config);
    let tasks = Tasks::read(&args.tasks)?;
    let chosen: Vec<&Task> = match args.only.as_slice() {
        [] => tasks.list.iter().collect(),
        names => names.iter().map(|name| tasks.named(name)).collect::<Result<_>>()?,
    };
    let model = ModelInfo::open(&args.model, tasks.template()?)?;
    let colour = coloured(args.color, stdout().is_terminal(), std::env::var_os("NO_COLOR").as_deref());
    let mut shown = Vec::new();
    for task in chosen {
        for example in examples(args, &model, task)? {
            if common.json {
                shown.push(example.to_json(task, &model));
            } else {
                cli::print(&format!("{}{}\n", example.header(task), paint(&example.runs(), colour)));
            }
        }
    }
    common.print_json(&Value::Array(shown));
    Ok(())
}

/// The first rows of `task`, after all rows have been checked.
fn examples(args: &PreviewArgs, model: &ModelInfo, task: &Task) -> Result<Vec<Shown>> {
    let rows = data::read_rows(&task.train, &Layout::of(task)?)?;
    let max_length = model.context_of(task, args.max_length);
    let encoded =
        data::encode_rows(&task.train, &rows, model.text.with(&task.template_args), max_length, Overlong::Truncate)?;
    data::report(&task.name, &encoded, max_length);
    let first = rows.iter().take(args.rows);
    first
        .map(|row| {
            Ok(Shown::new(
                data::tokenise(row, model.text.with(&task.template_args))?,
                max_length.tokens,
                row.place.clone(),
            ))
        })
        .collect()
}

/// Start of token `i` in the text; a token that starts within a character includes all of it.
fn start_of(tokens: &Tokenised, i: usize) -> usize {
    tokens.text.floor_char_boundary(tokens.spans[i].start)
}

/// An example to show: a conversation's tokens, truncated to the context.
struct Shown {
    tokens: Tokenised,
    place: Place,
    /// Number of tokens before truncation.
    whole: usize,
}

impl Shown {
    fn new(mut tokens: Tokenised, max_length: usize, place: Place) -> Self {
        let whole = tokens.ids.len();
        if whole > max_length {
            tokens.text.truncate(start_of(&tokens, max_length));
            tokens.ids.truncate(max_length);
            tokens.spans.truncate(max_length);
            tokens.target.truncate(max_length);
        }
        Self { tokens, place, whole }
    }

    fn targets(&self) -> usize {
        self.tokens.target.iter().filter(|target| **target).count()
    }

    fn header(&self, task: &Task) -> String {
        let (tokens, targets) = (self.tokens.ids.len(), self.targets());
        let cut = if tokens < self.whole { format!(", cut from {}", self.whole) } else { String::new() };
        let left_out = if targets == 0 { ": left out of training" } else { "" };
        format!("--- {}, {}: {tokens} tokens{cut}, {targets} targets{left_out}\n", task.name, self.place)
    }

    /// The text in runs of targets and others. A run extends to the start of the next one, so that
    /// no text between tokens is lost.
    fn runs(&self) -> Vec<Run<'_>> {
        let Tokenised { text, target, .. } = &self.tokens;
        let mut runs = Vec::new();
        let mut start = 0;
        for (i, pair) in target.windows(2).enumerate() {
            if pair[0] != pair[1] {
                let end = start_of(&self.tokens, i + 1);
                runs.push(Run { text: &text[start..end], target: pair[0] });
                start = end;
            }
        }
        runs.extend(target.last().map(|&target| Run { text: &text[start..], target }));
        runs
    }

    fn to_json(&self, task: &Task, model: &ModelInfo) -> Value {
        let Tokenised { ids, target, .. } = &self.tokens;
        json!({"task": task.name, "file": self.place.file.display().to_string(), "row": self.place.row,
            "truncated": ids.len() < self.whole, "ids": ids, "tokens": model.text.tokens(ids), "target": target})
    }
}

const TARGET: &str = "\x1b[30;42m";
const OTHER: &str = "\x1b[2m";
const RESET: &str = "\x1b[0m";

/// A run of text that is target of the loss, or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run<'a> {
    text: &'a str,
    target: bool,
}

/// Returns true for coloured output: as given, else on a terminal unless NO_COLOR is set and not
/// empty (no-color.org).
fn coloured(asked: ColorChoice, terminal: bool, no_color: Option<&OsStr>) -> bool {
    match asked {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        ColorChoice::Auto => terminal && no_color.is_none_or(OsStr::is_empty),
    }
}

/// The runs concatenated, with a line break at the end: targets on green and the rest dim, or
/// targets between « and ».
fn paint(runs: &[Run<'_>], colour: bool) -> String {
    let mut out = String::new();
    for run in runs.iter().filter(|run| !run.text.is_empty()) {
        let (before, after) = match (colour, run.target) {
            (true, true) => (TARGET, RESET),
            (true, false) => (OTHER, RESET),
            (false, true) => ("«", "»"),
            (false, false) => ("", ""),
        };
        // A background colour at a line break would fill the rest of the terminal's line.
        let line_break = if colour { format!("↵{after}\n{before}") } else { "↵\n".to_owned() };
        out.push_str(before);
        run.text.chars().for_each(|c| show(c, &line_break, &mut out));
        out.push_str(after);
    }
    out.push('\n');
    out
}

/// Writes `c` visibly: control characters as Unicode's pictures of them, and those that reorder or
/// hide text as code points.
fn show(c: char, line_break: &str, out: &mut String) {
    match c {
        '\n' => out.push_str(line_break),
        '\0'..='\u{1f}' => out.extend(char::from_u32(0x2400 + u32::from(c))),
        '\u{7f}' => out.push('␡'),
        '\u{80}'..='\u{9f}'
        | '\u{200b}'..='\u{200f}'
        | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{2069}'
        | '\u{feff}' => {
            out.push_str(&format!("<U+{:04X}>", u32::from(c)));
        }
        c => out.push(c),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNS: [Run<'_>; 3] = [
        Run { text: "user\nhi", target: false },
        Run { text: "a\nb", target: true },
        Run { text: "\n", target: false },
    ];

    #[test]
    fn targets_stand_between_marks_without_colours() {
        assert_eq!(paint(&RUNS, false), "user↵\nhi«a↵\nb»↵\n\n");
    }

    #[test]
    fn colours_are_off_at_every_line_break() {
        let expected = "\x1b[2muser↵\x1b[0m\n\x1b[2mhi\x1b[0m\x1b[30;42ma↵\x1b[0m\n\x1b[30;42mb\x1b[0m\x1b[2m↵\x1b[0m\n\x1b[2m\x1b[0m\n";
        assert_eq!(paint(&RUNS, true), expected);
    }

    #[test]
    fn what_controls_a_terminal_is_shown_not_sent() {
        let run = Run { text: "a\x1b[31m\t\r\x7f\u{9b}\u{202e}\u{feff}é", target: false };
        assert_eq!(paint(&[run], false), "a␛[31m␉␍␡<U+009B><U+202E><U+FEFF>é\n");
    }

    #[test]
    fn colours_follow_the_argument_the_terminal_and_no_color() {
        let no_color = Some(OsStr::new("1"));
        assert!(coloured(ColorChoice::Always, false, no_color));
        assert!(!coloured(ColorChoice::Never, true, None));
        assert!(coloured(ColorChoice::Auto, true, None));
        assert!(coloured(ColorChoice::Auto, true, Some(OsStr::new(""))));
        assert!(!coloured(ColorChoice::Auto, true, no_color));
        assert!(!coloured(ColorChoice::Auto, false, None));
    }
}
