//! What every stage's command line shares: running, logging, exit codes, common arguments.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;

use crate::error::{EXIT_BAD_INPUT, EXIT_FAILED, Stopped, exit_code, usage};
use crate::record::provenance::argv;
use crate::record::up_to_date;
use crate::run::signals;

/// Arguments that all stages take.
#[derive(clap::Args, Debug, Clone, Default)]
#[command(next_help_heading = "Run")]
pub struct Common {
    /// Worker threads; all cores when not given
    #[arg(long, value_name = "N", global = true)]
    pub threads: Option<usize>,
    /// Replace an existing output
    #[arg(long, global = true)]
    pub force: bool,
    /// Do nothing if the output is up to date: made by this version, with these arguments, from the inputs as they are. Otherwise
    /// make it, as with --force
    #[arg(long, global = true, alias = "if-stale")]
    pub skip_up_to_date: bool,
    /// Print a machine-readable summary (one JSON object) on stdout
    #[arg(long, global = true)]
    pub json: bool,
    /// Log warnings and errors only
    #[arg(long, short, global = true)]
    pub quiet: bool,
}

impl Common {
    /// Starts logging and sizes the thread pool; call once, first.
    ///
    /// # Errors
    /// [`crate::error::Usage`] when `--threads` is 0.
    pub fn start(&self) -> Result<()> {
        let level = if self.quiet { "warn" } else { "info" };
        let env = env_logger::Env::new().filter_or("CPIFT_LOG", level);
        let _ = env_logger::Builder::from_env(env).format(log_line).try_init();
        if let Some(threads) = self.threads {
            if !(1..=4096).contains(&threads) {
                return Err(usage("--threads must be 1 to 4096"));
            }
            rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().context("starting the thread pool")?;
        }
        Ok(())
    }

    /// Returns true if an existing output is replaced.
    pub fn force(&self) -> bool {
        self.force || self.skip_up_to_date
    }

    /// Returns true, and logs it, if `--skip-up-to-date` finds nothing to do.
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

    /// Prints `summary` on stdout where `--json` asks for it.
    pub fn print_json(&self, summary: &serde_json::Value) {
        if self.json {
            print(&format!("{summary}\n"));
        }
    }
}

/// Prints `text` on stdout. A reader that has gone (`| head`) is no failure, and what a full disk takes is told: what was asked for is
/// done by then.
pub fn print(text: &str) {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => log::warn!("cannot print on stdout: {e}"),
        _ => {}
    }
}

fn log_line(out: &mut env_logger::fmt::Formatter, record: &log::Record<'_>) -> std::io::Result<()> {
    // An HTTP client traces what it sends, keys in headers included: whatever CPIFT_LOG asks for, that is not logged.
    let client = ["ureq", "rustls"].iter().any(|name| record.target().starts_with(name));
    if client && record.level() > log::Level::Warn {
        return Ok(());
    }
    match record.level() {
        log::Level::Info => writeln!(out, "{}", record.args()),
        level => writeln!(out, "{}: {}", level.to_string().to_lowercase(), record.args()),
    }
}

/// Parses the arguments, runs the stage, prints an error once on stderr and returns the documented exit code.
pub fn run_stage<A: Parser>(run: impl FnOnce(A) -> Result<()>) -> ExitCode {
    let args = match parse::<A>() {
        Ok(args) => args,
        Err(code) => return code,
    };
    if let Err(error) = signals::listen() {
        eprintln!("error: {error:#}");
        return ExitCode::from(EXIT_FAILED);
    }
    // libtorch's exceptions (out of memory, say) arrive as panics; unwinding removes what is staged.
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(args))) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            // Stopping when asked to is no error.
            let label = if error.is::<Stopped>() { "" } else { "error: " };
            eprintln!("{label}{error:#}");
            ExitCode::from(exit_code(&error))
        }
        // The panic hook has printed what and where.
        Err(_) => ExitCode::from(EXIT_FAILED),
    }
}

/// Arguments of the stage, unless the command line asks for what every program can do, which is then done.
fn parse<A: Parser>() -> Result<A, ExitCode> {
    const UP_TO_DATE: &str = "up-to-date";
    const COMPLETIONS: &str = "completions";
    let up_to_date = clap::Command::new(UP_TO_DATE)
        .about("Tell which outputs of a list of commands are up to date")
        .long_about(
            "Tell which outputs of a list of commands are up to date, without running them.\n\nReads lines from stdin: a name, a tab \
             and a command of any CPI-FT program; further tabs part further inputs. Commands come after those that make their inputs. \
             Prints, for each, its name, its state (done, deleted, missing or stale), the reason and the names of the commands that \
             make its inputs, separated by tabs. An output is done if its record names this version, these arguments (but for those \
             that change nothing, such as --threads) and the content of every input as it is now.",
        )
        .arg(clap::Arg::new("due").long("due").action(clap::ArgAction::SetTrue).help("Print only the names of those that must run"));
    let shell = clap::Arg::new("shell").required(true).value_parser(clap::value_parser!(clap_complete::Shell));
    let completions =
        clap::Command::new(COMPLETIONS).about("Print the completions of a shell, such as: completions bash").arg(shell);
    let mut command = A::command().subcommand_negates_reqs(true).subcommands([up_to_date, completions]);
    let matches = command.clone().get_matches();
    match matches.subcommand() {
        Some((UP_TO_DATE, given)) => Err(print_states(given.get_flag("due"))),
        Some((COMPLETIONS, given)) => {
            let shell = *given.get_one::<clap_complete::Shell>("shell").expect("required");
            let name = command.get_name().to_owned();
            clap_complete::generate(shell, &mut command, name, &mut std::io::stdout());
            Err(ExitCode::SUCCESS)
        }
        _ => A::from_arg_matches(&matches).map_err(|error| error.format(&mut command).exit()),
    }
}

/// `up-to-date`: states of the commands on stdin.
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
                        let needs = status.needs.iter().map(name).collect::<Vec<_>>().join(" ");
                        print(&format!("{}\t{word}\t{reason}\t{needs}\n", command.name));
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
    /// The task's name.
    pub name: String,
    /// The file or folder given for it.
    pub path: PathBuf,
}

impl Named {
    /// Name and path.
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

/// Refuses a list in which one name is given twice.
///
/// # Errors
/// [`crate::error::Usage`] that names the repeated argument.
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
