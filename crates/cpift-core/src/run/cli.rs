//! Shared parts of all command lines: common arguments, logging, subcommands of every program, exit
//! codes.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;

use anyhow::{Context, Result};
use clap::Parser;

use super::{check_threads, config, listen, prepare};
use crate::error::{EXIT_BAD_INPUT, EXIT_FAILED, Stopped, exit_code, usage};
use crate::record::provenance::{argv, set_argv};
use crate::record::up_to_date;

/// Arguments that all stages take.
#[derive(clap::Args, Debug, Clone, Default)]
#[command(next_help_heading = "Run")]
pub struct Common {
    /// Number of worker threads [default: all cores]
    #[arg(long, value_name = "N", global = true)]
    pub threads: Option<usize>,
    /// Replace an existing output
    #[arg(long, global = true)]
    pub force: bool,
    /// Do nothing if the output is up to date, that is, made by this version with these arguments
    /// from the inputs as they are now. Otherwise replace it, as --force does
    #[arg(long, global = true, alias = "if-stale")]
    pub skip_up_to_date: bool,
    /// Print a summary as one JSON object on stdout
    #[arg(long, global = true)]
    pub json: bool,
    /// Log warnings and errors only
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// Take arguments from a TOML file, by their long names, or from the cpift.json of an output,
    /// to repeat its run. Arguments of the command line win
    #[arg(long, value_name = "FILE", global = true)]
    pub config: Option<PathBuf>,
    /// Print all arguments, defaults included, as a file for --config, and do nothing else
    #[arg(long, global = true)]
    pub print_config: bool,
}

impl Common {
    /// Starts logging and the thread pool. Call it once, before anything else.
    ///
    /// # Errors
    /// [`crate::error::Usage`] if `--threads` is out of range.
    pub fn start(&self) -> Result<()> {
        start_logging(self.quiet);
        if self.threads.is_some_and(|threads| !(1..=4096).contains(&threads)) {
            return Err(usage("--threads must be 1 to 4096"));
        }
        check_threads(self.threads.unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from)))?;
        if let Some(threads) = self.threads {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().context("starting the thread pool")?;
        }
        Ok(())
    }

    /// Returns true if an existing output may be replaced.
    pub fn force(&self) -> bool {
        self.force || self.skip_up_to_date
    }

    /// Returns true if `--skip-up-to-date` is given and the output is up to date. Logs the result,
    /// or the reason to make the output.
    pub fn up_to_date(&self, expected: &up_to_date::Expected<'_>) -> bool {
        if !self.skip_up_to_date {
            return false;
        }
        let out = expected.out.display();
        match up_to_date::reason(expected, &argv()) {
            Some(reason) => {
                log::info!("{out}: must be made: {reason}");
                false
            }
            None => {
                log::info!("{out}: up to date");
                self.print_json(&serde_json::json!({"out": expected.out, "up_to_date": true}));
                true
            }
        }
    }

    /// Prints `summary` on stdout if `--json` is given.
    pub fn print_json(&self, summary: &serde_json::Value) {
        if self.json {
            print(&format!("{summary}\n"));
        }
    }
}

/// Starts logging, unless it is started.
fn start_logging(quiet: bool) {
    let level = if quiet { "warn" } else { "info" };
    let env = env_logger::Env::new().filter_or("CPIFT_LOG", level);
    let _ = env_logger::Builder::from_env(env).format(log_line).try_init();
}

/// Prints `text` on stdout. A closed pipe (`| head`) is ignored and other errors are only logged,
/// because the work is done by then.
pub fn print(text: &str) {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => log::warn!("cannot print on stdout: {e}"),
        _ => {}
    }
}

fn log_line(out: &mut env_logger::fmt::Formatter, record: &log::Record<'_>) -> std::io::Result<()> {
    // HTTP clients trace their requests including API keys in headers. These lines are never
    // logged, whatever CPIFT_LOG says.
    let client = ["ureq", "rustls"].iter().any(|name| record.target().starts_with(name));
    if client && record.level() > log::Level::Warn {
        return Ok(());
    }
    match record.level() {
        log::Level::Info => writeln!(out, "{}", record.args()),
        level => writeln!(out, "{}: {}", level.to_string().to_lowercase(), record.args()),
    }
}

/// Parses the arguments, runs the stage, prints an error once to stderr and returns the documented
/// exit code.
pub fn run_stage<A: Parser>(run: impl FnOnce(A) -> Result<()>) -> ExitCode {
    if !prepare() {
        eprintln!("error: out of memory: ulimit -v leaves no address space to start");
        return ExitCode::from(EXIT_FAILED);
    }
    let args = match parse::<A>() {
        Ok(args) => args,
        Err(code) => return code,
    };
    if let Err(error) = listen() {
        eprintln!("error: {error:#}");
        return ExitCode::from(EXIT_FAILED);
    }
    // libtorch's exceptions, such as out of memory, arrive as panics. Unwinding removes unfinished
    // outputs.
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(args))) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            // A stop on request is not an error.
            let label = if error.is::<Stopped>() { "" } else { "error: " };
            eprintln!("{label}{error:#}");
            ExitCode::from(exit_code(&error))
        }
        // The panic hook has already printed the message.
        Err(_) => ExitCode::from(EXIT_FAILED),
    }
}

/// Parses the arguments of the stage, those of `--config` included. `--print-config` and the
/// subcommands that every program has (`up-to-date`, `completions`) are run here and return the
/// exit code.
fn parse<A: Parser>() -> Result<A, ExitCode> {
    const UP_TO_DATE: &str = "up-to-date";
    const COMPLETIONS: &str = "completions";
    let up_to_date = clap::Command::new(UP_TO_DATE)
        .about("Show which outputs of a list of commands are up to date")
        .long_about(
            "Show which outputs of a list of commands are up to date, without running the commands.\n\nReads one command per line from \
             stdin: a name, a tab and a command line of any CPI-FT program, optionally followed by further input paths, each after a \
             tab. A command must come after the commands that make its inputs. Prints one line per command, separated by tabs: its \
             name, its state (done, deleted, missing or stale), the reason, the names of the commands that make its inputs, and those of \
             the commands whose outputs are in a directory that it is about. An output is done if its record has this version, these arguments (ignoring those that do not affect the output, such as \
             --threads) and the current content of every input.",
        )
        .arg(
            clap::Arg::new("due")
                .long("due")
                .action(clap::ArgAction::SetTrue)
                .help_heading("Input and output")
                .help("Print only the names of the commands that must run"),
        );
    let shell = clap::Arg::new("shell")
        .required(true)
        .value_parser(clap::value_parser!(clap_complete::Shell))
        .help_heading("Input and output")
        .help("Shell to print the script for");
    let completions = clap::Command::new(COMPLETIONS).about("Print the completion script for a shell").arg(shell);
    let mut command = A::command().subcommand_negates_reqs(true).subcommands([up_to_date, completions]);
    let refuse = |error: anyhow::Error| {
        eprintln!("error: {error:#}");
        ExitCode::from(exit_code(&error))
    };
    let resolved = config::resolve(&command, std::env::args_os().collect()).map_err(refuse)?;
    let matches = command.clone().try_get_matches_from(&resolved.words).unwrap_or_else(|error| {
        let _ = error.print();
        if let Some(file) = resolved.file.filter(|_| error.use_stderr()) {
            eprintln!("\nSome arguments come from {}.", file.display());
        }
        std::process::exit(error.exit_code())
    });
    match matches.subcommand() {
        Some((UP_TO_DATE, given)) => Err(print_states(given.get_flag("due"))),
        Some((COMPLETIONS, given)) => {
            let shell = *given.get_one::<clap_complete::Shell>("shell").expect("required");
            let name = command.get_name().to_owned();
            clap_complete::generate(shell, &mut command, name, &mut std::io::stdout());
            Err(ExitCode::SUCCESS)
        }
        _ if matches.get_flag("print_config") => {
            let located = config::locate(&command, &resolved.words, false).map_err(refuse)?;
            print(&config::to_toml(&command, &command.clone().get_matches_from(&located.pinned)));
            Err(ExitCode::SUCCESS)
        }
        _ => {
            // Models are downloaded only for a command line without mistakes.
            start_logging(matches.get_flag("quiet"));
            let located = config::locate(&command, &resolved.words, true).map_err(refuse)?;
            set_argv(located.pinned.get(1..).unwrap_or_default());
            let matches = command.clone().get_matches_from(&located.words);
            A::from_arg_matches(&matches).map_err(|error| error.format(&mut command).exit())
        }
    }
}

/// Runs `up-to-date`: prints the states of the commands on stdin.
fn print_states(due_only: bool) -> ExitCode {
    let commands = std::io::read_to_string(std::io::stdin()).map_err(|e| format!("stdin: {e}"));
    match commands.and_then(|text| up_to_date::parse_commands(&text)) {
        Ok(commands) => {
            let name = |i: &usize| commands[*i].name.as_str();
            for (command, status) in commands.iter().zip(up_to_date::states(&commands)) {
                let (word, reason) = status.state.words();
                match due_only {
                    true if status.state.is_due() => print(&format!("{}\n", command.name)),
                    true => {}
                    false => {
                        let names = |list: &[usize]| list.iter().map(name).collect::<Vec<_>>().join(" ");
                        let (reads, surveys) = (names(&status.reads), names(&status.surveys));
                        print(&format!("{}\t{word}\t{reason}\t{reads}\t{surveys}\n", command.name));
                    }
                }
            }
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::from(EXIT_BAD_INPUT)
        }
    }
}

/// A `NAME=PATH` argument, as in `--mask gsm8k=run/gsm8k.mask.safetensors`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// Task name.
    pub name: String,
    /// File or directory given for the task.
    pub path: PathBuf,
}

impl Named {
    /// Returns name and path.
    pub fn pair(&self) -> (&str, &Path) {
        (&self.name, &self.path)
    }
}

impl std::str::FromStr for Named {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, path)) if !name.is_empty() && !path.is_empty() => {
                Ok(Self { name: name.to_owned(), path: path.into() })
            }
            _ => Err(format!("expected NAME=PATH, found {text:?}")),
        }
    }
}

/// Refuses a list with a repeated name.
///
/// # Errors
/// [`crate::error::Usage`] with the repeated argument.
pub fn require_unique(list: &[Named], flag: &str) -> Result<()> {
    let mut seen = std::collections::BTreeSet::new();
    for named in list {
        if !seen.insert(&named.name) {
            return Err(usage(format!("{flag} {} is given twice", named.name)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_splits_at_the_first_equals_sign() {
        let named: Named = "a=b=c".parse().unwrap();
        assert_eq!((named.name.as_str(), named.path.to_str().unwrap()), ("a", "b=c"));
        assert!("a".parse::<Named>().is_err());
        assert!("=b".parse::<Named>().is_err());
    }
}
