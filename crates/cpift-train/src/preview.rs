//! `cpift-train preview`: the first examples of each task as training sees them.

use std::io::{IsTerminal, stdout};

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::format::tasks::{Task, Tasks};
use cpift_core::run::cli::{self, Common};
use cpift_data::{self as data, Layout, Overlong, Place, Tokenised};
use cpift_torch::session::{ModelInfo, set_strict_config};
use serde_json::{Value, json};

use crate::args::PreviewArgs;
use crate::highlight::{Run, coloured, paint};

/// Prints the examples; with `--json` one list of objects.
///
/// # Errors
/// [`cpift_core::Usage`], and [`cpift_core::BadInput`] for whatever training would refuse in the data, the tokenizer or the template.
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

/// The first rows of `task`, once all of them are known to be usable.
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

/// Where the text of token `i` begins; a token that begins within a character has all of it.
fn start_of(tokens: &Tokenised, i: usize) -> usize {
    tokens.text.floor_char_boundary(tokens.spans[i].start)
}

/// An example to show: a conversation's tokens, those beyond the context gone.
struct Shown {
    tokens: Tokenised,
    place: Place,
    /// Tokens before the cut.
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

    /// The text in runs of targets and others. A run goes on to where the next one starts, so that no text between tokens is lost.
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
