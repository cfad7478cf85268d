//! `cpift-pipeline stage`: runs one command of the pipeline, with its log and its state.

use std::fs::{self, File, OpenOptions};
use std::io::{IsTerminal, Seek, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use cpift_core::error::usage;
use cpift_core::record::provenance::host_name;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use regex::Regex;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::settings::text_of;

/// Pause between two looks for the end of the command and for signals.
const LOOK: Duration = Duration::from_millis(10);

/// One command, and the call of make that it is a part of.
struct Stage {
    logs: PathBuf,
    name: String,
    /// Artifacts that this call of make makes.
    due: Vec<String>,
    /// A file with a byte for every artifact that this call of make has made.
    made: PathBuf,
    /// Seconds until the first line about progress in a log; 0 for none.
    pause: f64,
    terminal: bool,
    /// Finds the stage, the step and the loss in a line of training.
    step: Regex,
}

/// Runs `command` with its output in `log`.log, and returns its exit code.
///
/// # Errors
/// If the log cannot be written or the program cannot be started.
pub(crate) fn run(log: &Path, command: &[String]) -> Result<u8> {
    let stage = Stage::new(log)?;
    fs::create_dir_all(&stage.logs).with_context(|| format!("making {}", stage.logs.display()))?;
    let [log, before] = [".log", ".before.log"].map(|end| stage.file(end));
    if log.exists() {
        fs::rename(&log, &before)?;
    }
    let (code, took) = stage.run(command, &log)?;
    let seconds = took.as_secs_f64();
    let took = if seconds < 100.0 { format!("{seconds:.1}") } else { format!("{seconds:.0}") };
    let clear = if stage.terminal { "\r\x1b[K" } else { "" };
    let name = &stage.name;
    if code != 0 {
        say(&format!("{clear}{name}: exit code {code} after {took} s"));
        let text = text_of(&log);
        let lines: Vec<&str> = text.lines().collect();
        eprintln!("{}", lines[lines.len().saturating_sub(20)..].join("\n"));
        return Ok(code);
    }
    // A command that found its output up to date leaves the log of the one that made it.
    if before.exists() && text_of(&log).trim_end().ends_with(": up to date") {
        fs::rename(&before, &log)?;
    }
    let total = stage.due.len();
    say(&format!("{clear}[{:>width$}/{total}] {name:<24}{took:>6} s", stage.count()?, width = total.to_string().len()));
    stage.delete_old_counts();
    Ok(0)
}

impl Stage {
    fn new(log: &Path) -> Result<Self> {
        let (Some(logs), Some(name)) = (log.parent(), log.file_name()) else {
            return Err(usage(format!("{}: expected RUN/logs/NAME", log.display())));
        };
        let name = name.to_string_lossy().into_owned();
        let variable = |key: &str| std::env::var(key).ok();
        let started = variable("STARTED").unwrap_or_else(|| "0".into());
        let pause = variable("PROGRESS").unwrap_or_else(|| "10".into());
        Ok(Self {
            due: variable("DUE").unwrap_or_else(|| name.clone()).split_whitespace().map(str::to_owned).collect(),
            made: logs.join(format!(".made-{started}")),
            pause: pause.parse().map_err(|_| usage(format!("PROGRESS={pause}: expected seconds")))?,
            terminal: std::io::stdout().is_terminal(),
            step: Regex::new(r"(?m)^(?:stage \d+/\d+|\S+).* step \d+/\d+ loss \S+")?,
            logs: logs.to_owned(),
            name,
        })
    }

    fn file(&self, end: &str) -> PathBuf {
        self.logs.join(format!("{}{end}", self.name))
    }

    /// Exit code of the command and the time it took.
    fn run(&self, command: &[String], log: &Path) -> Result<(u8, Duration)> {
        let launch = std::env::var("LAUNCH").unwrap_or_default();
        let launch = shlex::split(&launch).ok_or_else(|| usage(format!("LAUNCH: quotes do not match: {launch}")))?;
        let shared = !launch.is_empty() && shares_its_work(command);
        let warning = if shared { Signal::SIGUSR1 } else { Signal::SIGTERM };
        let words: Vec<&String> = launch.iter().filter(|_| shared).chain(command).collect();
        // From here on signals wait until they are passed on.
        let mut signals = Signals::new([SIGTERM, SIGINT]).context("listening for signals")?;
        let output = File::create(log).with_context(|| format!("writing {}", log.display()))?;
        let begun = Instant::now();
        let mut child = Command::new(words[0])
            .args(&words[1..])
            .stdout(output.try_clone()?)
            .stderr(Stdio::from(output))
            .spawn()
            .with_context(|| format!("starting {}", words[0]))?;
        let job = std::env::var("SLURM_JOB_ID").unwrap_or_else(|_| "-".into());
        let code = self
            .set_state(&format!("running {} {} {job}", host_name(), child.id()))
            .and_then(|()| self.wait(&mut child, &mut signals, warning))
            // Without a state, nobody would know that the program still runs.
            .inspect_err(|_| drop(child.kill().and_then(|()| child.wait())))?;
        let ended = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.set_state(&format!("exit {code} {}", ended.as_secs_f64()))?;
        if let Some(file) = std::env::var_os("STAGE_CODE") {
            fs::write(file, code.to_string())?;
        }
        Ok((code, begun.elapsed()))
    }

    /// Exit code of the command. Passes signals on and reports its steps until it has ended.
    fn wait(&self, child: &mut Child, signals: &mut Signals, warning: Signal) -> Result<u8> {
        let (begun, mut next_report, mut shown) = (Instant::now(), self.pause, String::new());
        let mut next_look = 1.0;
        loop {
            for _ in signals.pending() {
                let _ = kill(Pid::from_raw(child.id().cast_signed()), warning);
            }
            if let Some(status) = child.try_wait()? {
                let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
                return Ok(u8::try_from(code).unwrap_or(1));
            }
            sleep(LOOK);
            let seconds = begun.elapsed().as_secs_f64();
            if self.pause == 0.0 || seconds < next_look {
                continue;
            }
            next_look = seconds + 1.0;
            if self.terminal {
                self.show_all();
            } else if seconds >= next_report {
                let step = self.last_step(&self.name);
                if !step.is_empty() && step != shown {
                    say(&format!("        {:<24}{step}", self.name));
                }
                (next_report, shown) = (1.5 * seconds, step);
            }
        }
    }

    /// Stage, step and loss of the last step in a log, or nothing.
    fn last_step(&self, name: &str) -> String {
        let log = text_of(&self.logs.join(format!("{name}.log")));
        let last = self.step.find_iter(&log).last().map_or("", |found| found.as_str());
        // Without the tasks of the stage.
        match (last.find(" ("), last.rfind(") step ")) {
            (Some(from), Some(to)) if from < to => format!("{}{}", &last[..from], &last[to + 1..]),
            _ => last.to_owned(),
        }
    }

    /// Rewrites the line about all that is running.
    fn show_all(&self) {
        let running = |name: &&String| text_of(&self.logs.join(format!("{name}.state"))).starts_with("running");
        let step = |name: &String| {
            let step = self.last_step(name);
            let own = step.strip_prefix(&format!("{name} ")).unwrap_or(&step);
            format!("{name} {own}").trim_end().to_owned()
        };
        let steps: Vec<String> = self.due.iter().filter(running).map(step).collect();
        let made = fs::metadata(&self.made).map_or(0, |made| made.len());
        let line = format!("[{made}/{}] {}", self.due.len(), steps.join("; "));
        let width = terminal_size::terminal_size().map_or(80, |(width, _)| usize::from(width.0));
        let line: String = line.chars().take(width.saturating_sub(1)).collect();
        write(&format!("\r\x1b[K{line}"));
    }

    /// Counts this artifact as made and returns the number of those that are.
    fn count(&self) -> Result<u64> {
        let open = OpenOptions::new().create(true).append(true).open(&self.made);
        let mut made = open.with_context(|| format!("writing {}", self.made.display()))?;
        // Appending is atomic, so no other artifact gets the same number.
        made.write_all(b".")?;
        Ok(made.stream_position()?)
    }

    fn delete_old_counts(&self) {
        let day = Duration::from_secs(86400);
        for entry in fs::read_dir(&self.logs).into_iter().flatten().flatten() {
            let age = || entry.metadata().and_then(|data| data.modified()).ok()?.elapsed().ok();
            if entry.file_name().to_string_lossy().starts_with(".made-") && age().is_some_and(|age| age > day) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// Writes the state by renaming, so that no reader sees half a line.
    fn set_state(&self, words: &str) -> Result<()> {
        let new = self.file(&format!(".state.{}", std::process::id()));
        fs::write(&new, format!("{words}\n"))
            .and_then(|()| fs::rename(&new, self.file(".state")))
            .inspect_err(|_| drop(fs::remove_file(&new)))
            .with_context(|| format!("writing {}", new.display()))
    }
}

/// Returns true for programs that divide their work between the ranks of a job.
fn shares_its_work(command: &[String]) -> bool {
    let program = Path::new(&command[0]).file_name().unwrap_or_default().to_string_lossy();
    let runs = command.get(1).is_some_and(|word| word == "run");
    program == "cpift-probe" || runs && ["cpift-train", "cpift-eval"].contains(&program.as_ref())
}

fn say(line: &str) {
    write(&format!("{line}\n"));
}

/// Prints in one write: programs of `make -j` share the output.
fn write(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_step_of_a_log_is_shown_without_the_tasks_of_its_stage() {
        let dir = tempfile::tempdir().unwrap();
        let stage = Stage::new(&dir.path().join("x")).unwrap();
        fs::write(dir.path().join("x.log"), "warning: step\n").unwrap();
        assert_eq!(stage.last_step("x"), "");
        let log = "copy: step 3/9 loss 1.25 (ETA 4 s)\nstage 2/3 (copy, say (it)) step 10/40 loss 0.5 lr 1e-3\nlast\n";
        fs::write(dir.path().join("x.log"), log).unwrap();
        assert_eq!(stage.last_step("x"), "stage 2/3 step 10/40 loss 0.5");
    }

    #[test]
    fn only_programs_that_share_their_work_run_on_every_rank() {
        let shares = |line: &str| shares_its_work(&line.split(' ').map(str::to_owned).collect::<Vec<_>>());
        assert!(shares("bin/cpift-probe --threads 1") && shares("cpift-train run") && shares("/x/cpift-eval run"));
        assert!(!shares("cpift-eval join") && !shares("cpift-mask run") && !shares("cpift-train"));
    }
}
