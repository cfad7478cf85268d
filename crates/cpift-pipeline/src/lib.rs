//! Runs of the pipeline that scripts/pipeline.mk describes: make decides the order, the up-to-date
//! rule of cpift-core what must be made, and this program runs, shows and submits it.
//!
//! In the order of use: [`settings`] reads the settings of a run, [`artifacts`] its parts and their
//! states, [`stage`] runs one command, [`status`] shows all of them, [`slurm`] submits them as
//! jobs, and [`clean`] deletes probes that are no longer needed.

mod artifacts;
mod clean;
mod settings;
mod slurm;
mod stage;
mod status;

use std::os::unix::process::CommandExt;
use std::path::PathBuf;

use anyhow::{Context, Result};

use settings::Settings;

/// Runs the pipeline of scripts/pipeline.mk, shows its state, submits it to Slurm.
///
/// Settings are NAME=VALUE arguments or environment variables, as scripts/pipeline.mk lists them.
/// RUN=DIR is the directory of the run. CONFIG=FILE.toml has settings too, by their names in lower
/// case (base = "org/name", probe_tokens = 30000, methods = ["full-sft"]); arguments and
/// environment variables win over it. `status` and `clean-probes` take the others from the last
/// call that made something. Paths are relative to the directory of the project, in which this
/// program is called.
#[derive(clap::Parser, Debug)]
#[command(version, subcommand_required = true, arg_required_else_help = true)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Make what is not up to date
    Run(Given),
    /// Print every artifact and its state
    ///
    /// Prints every artifact and its state: done, running, queued, stopped (its state is saved),
    /// failed, stale or missing (with the reason), deleted (and not needed).
    Status(Given),
    /// Submit to Slurm what is neither up to date nor queued
    ///
    /// Submits to Slurm what is neither up to date nor queued. The nodes must see the directory of
    /// the project and RUN. CLUSTER=FILE says what the jobs request [default:
    /// scripts/slurm/cluster.env]. DRY_RUN=1 prints the sbatch lines.
    Slurm(Given),
    /// Delete probes that are no longer needed
    ///
    /// Deletes the probes, but for their records (cpift.json), once everything made from them is up
    /// to date. The pipeline remakes a probe only for an artifact that is due and reads its
    /// weights.
    CleanProbes(Given),
    /// Run one command of the pipeline, with its log and its state in RUN/logs
    ///
    /// The output of PROGRAM goes to LOG.log. LOG.state says whether it is running (host, process,
    /// Slurm job) or how it ended (exit code, time). SIGTERM and SIGINT are passed on, so that
    /// training saves its state.
    ///
    /// LAUNCH is a command (srun) that starts a program on every rank of a job. Programs that share
    /// their work over ranks run behind it and get SIGUSR1 instead of SIGTERM, at which srun would
    /// kill them.
    ///
    /// Prints a line when the command ends: how many of DUE (the artifacts that this call of make
    /// makes) are done since STARTED, and the seconds this one took. Until then it prints the step
    /// and the loss of running training: on a terminal one line for all, rewritten every second; in
    /// a log a line now and then, at growing intervals (the first after PROGRESS=10 seconds, none
    /// if that is 0).
    Stage {
        /// RUN/logs/NAME
        log: PathBuf,
        /// The program and its arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "PROGRAM")]
        command: Vec<String>,
    },
}

#[derive(clap::Args, Debug)]
struct Given {
    /// Settings; they win over the environment
    #[arg(value_name = "NAME=VALUE", value_parser = setting)]
    settings: Vec<(String, String)>,
}

fn setting(word: &str) -> Result<(String, String), String> {
    let (name, value) = word.split_once('=').ok_or("expected NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

/// Runs the program and returns its exit code.
///
/// # Errors
/// [`cpift_core::error::Usage`] for missing or wrong settings; otherwise what failed.
pub fn run(args: Args) -> Result<u8> {
    match args.command {
        Command::Run(given) => {
            let settings = Settings::read("run", given.settings)?;
            Err(settings.make().args(["--no-print-directory", "-f", settings::MAKEFILE, "all"]).exec())
                .context("starting make")
        }
        Command::Status(given) => status::show(&Settings::of_existing("status", given.settings)?).map(|()| 0),
        Command::Slurm(given) => slurm::submit(&Settings::read("slurm", given.settings)?).map(|()| 0),
        Command::CleanProbes(given) => {
            clean::clean_probes(&Settings::of_existing("clean-probes", given.settings)?).map(|()| 0)
        }
        Command::Stage { log, command } => stage::run(&log, &command),
    }
}
