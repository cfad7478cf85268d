//! The artifacts of a run in the order in which they can be made, and what is known of a command
//! that has been started.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::record::provenance::host_name;
use cpift_core::record::up_to_date::{self, State};

use crate::settings::{Settings, output_of, text_of};

/// An artifact: a target of the pipeline.
pub(crate) struct Artifact {
    pub name: String,
    pub state: State,
    /// Names of the artifacts it is made from.
    pub reads: Vec<String>,
    /// Names of those in a directory that it is about.
    pub surveys: Vec<String>,
    /// Name of the job that makes it.
    pub job: String,
    /// The element of the job's array, if it is one.
    pub element: Option<String>,
}

impl Artifact {
    /// Returns true if it must be made.
    pub fn is_due(&self) -> bool {
        self.state.is_due()
    }
}

/// Reads all artifacts of a run, with their states.
///
/// # Errors
/// If make fails.
pub(crate) fn read(settings: &Settings) -> Result<Vec<Artifact>> {
    let graph = settings.output_of_make(&["-n", "GRAPH=1", "all"])?;
    let commands = up_to_date::parse_commands(&graph).map_err(usage)?;
    let names = |list: &[usize]| list.iter().map(|i| commands[*i].name.clone()).collect();
    let artifact = |(command, status): (&up_to_date::Command, up_to_date::Status)| {
        let (job, element) = job_of(&command.name);
        Artifact {
            name: command.name.clone(),
            reads: names(&status.reads),
            surveys: names(&status.surveys),
            state: status.state,
            job: job.to_owned(),
            element: element.map(str::to_owned),
        }
    };
    Ok(commands.iter().zip(up_to_date::states(&commands)).map(artifact).collect())
}

/// The job that makes an artifact, and the element of its array.
fn job_of(name: &str) -> (&str, Option<&str>) {
    match name.split_once('-') {
        Some(("probe" | "mask", task)) => ("probe", Some(task)),
        Some(("score", rest)) => ("score", Some(rest)),
        _ if name == "table" || name.starts_with("scores-") => ("report", None),
        _ => (name, None),
    }
}

/// A job in Slurm's queue.
pub(crate) struct QueuedJob {
    /// Its id, that of the array's element included.
    pub id: String,
    /// `%T` of squeue.
    pub state: String,
    /// The reason for which it waits.
    pub reason: String,
    /// The line about it in RUN/slurm/jobs.
    pub line: String,
}

/// Jobs of a run in the queue, by the artifacts that they make.
///
/// # Errors
/// If squeue fails.
pub(crate) fn queued_jobs(run: &Path) -> Result<HashMap<String, QueuedJob>> {
    let submitted = text_of(&run.join("slurm/jobs"));
    if submitted.is_empty() {
        return Ok(HashMap::new());
    }
    let shown = output_of(Command::new("squeue").args(["-h", "-r", "--me", "-o", "%i\t%j\t%T\t%r"]))?;
    let queue: HashMap<(&str, &str), (&str, &str)> = shown
        .lines()
        .filter_map(|line| match line.split('\t').collect::<Vec<_>>()[..] {
            [id, title, state, reason] => Some(((id, title), (state, reason))),
            _ => None,
        })
        .collect();
    let queued = |line: &str| {
        let [name, id, title] = line.split_whitespace().collect::<Vec<_>>()[..] else { return None };
        let (state, reason) = queue.get(&(id, title))?;
        let [id, state, reason, line] = [id, state, reason, line].map(str::to_owned);
        Some((name.to_owned(), QueuedJob { id, state, reason, line }))
    };
    Ok(submitted.lines().filter_map(queued).collect())
}

/// State of a command that has been started or queued, and what is known about it.
pub(crate) fn at_work(run: &Path, name: &str, job: Option<&QueuedJob>) -> Option<(&'static str, String)> {
    let written = text_of(&run.join(format!("logs/{name}.state")));
    let written: Vec<&str> = written.split_whitespace().collect();
    let last = || last_line(&text_of(&run.join(format!("logs/{name}.log"))));
    let queue_state = job.map_or("", |job| job.state.as_str());
    if let ["running", host, process, own_job] = written[..] {
        let alive = match host == host_name() {
            true => Path::new("/proc").join(process).exists(),
            false => queue_state == "RUNNING" || own_job == "-",
        };
        if alive {
            let what = job.map_or_else(|| format!("process {process}"), |job| format!("job {}", job.id));
            return Some(("running", format!("{host}, {what}: {}", last())));
        }
    }
    if let Some(job) = job.filter(|job| job.state != "RUNNING") {
        return Some(("queued", format!("job {} ({})", job.id, job.reason)));
    }
    match written[..] {
        ["running", host, ..] => {
            Some(("failed", format!("ended without an exit code on {host}; last line: {}", last())))
        }
        ["exit", "75", ..] => Some(("stopped", last())),
        ["exit", code, ..] if code != "0" => Some(("failed", format!("exit code {code}: {}", last()))),
        _ => None,
    }
}

/// The first error in a log, or its last line.
fn last_line(log: &str) -> String {
    let lines = || log.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("hint:"));
    lines().find(|line| line.starts_with("error:")).or_else(|| lines().next_back()).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn artifacts_of_a_task_share_a_job_and_joined_scores_are_made_by_the_report_job() {
        for (name, job, element) in [
            ("probe-a-b", "probe", Some("a-b")),
            ("mask-a", "probe", Some("a")),
            ("score-cpi-ft.a", "score", Some("cpi-ft.a")),
            ("scores-cpi-ft", "report", None),
            ("table", "report", None),
            ("cpi-ft-plus", "cpi-ft-plus", None),
        ] {
            assert_eq!(job_of(name), (job, element), "{name}");
        }
    }

    #[test]
    fn a_command_that_ended_is_known_by_its_exit_code_and_the_error_in_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            std::fs::create_dir_all(dir.path().join("logs")).unwrap();
            std::fs::write(dir.path().join("logs").join(name), text).unwrap();
        };
        let found = || at_work(dir.path(), "x", None).map(|(state, more)| format!("{state} {more}"));
        assert_eq!(found(), None);
        write("x.log", "step 1\nerror: no such row\n  more\nhint: look\n");
        for (state, expected) in [
            ("exit 0 1.5\n", None),
            ("exit 75 1.5\n", Some("stopped error: no such row")),
            ("exit 3 1.5\n", Some("failed exit code 3: error: no such row")),
        ] {
            write("x.state", state);
            assert_eq!(found().as_deref(), expected);
        }
        let own = std::process::id();
        write("x.state", &format!("running {} {own} -\n", host_name()));
        assert_eq!(found().unwrap(), format!("running {}, process {own}: error: no such row", host_name()));
        write("x.state", &format!("running {} 999999999 -\n", host_name()));
        assert!(found().unwrap().starts_with("failed ended without an exit code on "));
        // The job of another machine is running for as long as its queue says so.
        write("x.state", "running elsewhere 1 7\n");
        let job = |state: &str| {
            let [id, state, reason, line] = ["7", state, "Resources", ""].map(str::to_owned);
            QueuedJob { id, state, reason, line }
        };
        assert!(found().unwrap().starts_with("failed "));
        assert_eq!(at_work(dir.path(), "x", Some(&job("RUNNING"))).unwrap().0, "running");
        assert_eq!(at_work(dir.path(), "x", Some(&job("PENDING"))).unwrap(), ("queued", "job 7 (Resources)".into()));
    }
}
