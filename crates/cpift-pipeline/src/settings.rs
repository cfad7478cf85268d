//! Settings of a run: NAME=VALUE arguments, the environment, a CONFIG file and, for a run that
//! exists, those it was started with, in this order.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use cpift_core::error::usage;

/// Description of the pipeline, relative to the directory of the project.
pub(crate) const MAKEFILE: &str = "scripts/pipeline.mk";

/// Variables by which make passes its own arguments on to the makes that it calls.
const OF_MAKE: [&str; 4] = ["MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"];

/// Settings of a run.
pub(crate) struct Settings {
    /// Directory of the run, without a slash at its end.
    pub run: PathBuf,
    /// Settings that are not in the environment, or differ from it.
    added: BTreeMap<String, String>,
}

impl Settings {
    /// Reads the settings that `command` is called with.
    ///
    /// # Errors
    /// [`cpift_core::error::Usage`] if the run is not named, the CONFIG file is wrong, or the
    /// current directory is not that of the project.
    pub fn read(command: &str, given: Vec<(String, String)>) -> Result<Self> {
        if !Path::new(MAKEFILE).is_file() {
            return Err(usage(format!("{MAKEFILE} is not here: run this in the directory of the project")));
        }
        let mut settings = Self { run: PathBuf::new(), added: given.into_iter().collect() };
        if let Some(file) = settings.get("CONFIG") {
            for (name, value) in read_config(Path::new(&file))? {
                settings.set_default(&name, value);
            }
        }
        // The programs of a pipeline are those beside this one.
        let own = std::env::current_exe().context("finding this program")?;
        settings.set_default("BIN", own.parent().unwrap_or(Path::new(".")).display().to_string());
        let run = settings.get("RUN").ok_or_else(|| usage(format!("name the run: make {command} RUN=DIR")))?;
        settings.run = Path::new(&run).components().collect();
        settings.added.insert("RUN".into(), settings.run.display().to_string());
        Ok(settings)
    }

    /// As [`Settings::read`], of a run that exists: what is not given is as it was started.
    ///
    /// # Errors
    /// As [`Settings::read`], and if there is no such run.
    pub fn of_existing(command: &str, given: Vec<(String, String)>) -> Result<Self> {
        let mut settings = Self::read(command, given)?;
        let run = &settings.run;
        if !run.is_dir() {
            return Err(usage(format!("{}: no such directory (hint: make {command} RUN=DIR)", run.display())));
        }
        for (name, value) in text_of(&run.join("pipeline.env")).lines().filter_map(|line| line.split_once('=')) {
            settings.set_default(name, value.to_owned());
        }
        Ok(settings)
    }

    fn set_default(&mut self, name: &str, value: String) {
        if std::env::var_os(name).is_none() {
            self.added.entry(name.to_owned()).or_insert(value);
        }
    }

    /// Value of a setting that is given and not empty.
    pub fn get(&self, name: &str) -> Option<String> {
        self.added.get(name).cloned().or_else(|| std::env::var(name).ok()).filter(|value| !value.is_empty())
    }

    /// Returns true if the base checkpoint and the tasks are known.
    pub fn have_inputs(&self) -> bool {
        self.get("BASE").is_some() && self.get("TASKS").is_some()
    }

    /// Prepares a program with these settings in its environment.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.envs(&self.added);
        for name in OF_MAKE {
            command.env_remove(name);
        }
        command
    }

    /// Prepares make, as a part of the make that called this program (`-j`).
    pub fn make(&self) -> Command {
        let mut make = self.command("make");
        if let Some(flags) = std::env::var_os("MAKEFLAGS") {
            make.env("MAKEFLAGS", flags);
        }
        make
    }

    /// Output of make for the pipeline.
    ///
    /// # Errors
    /// If make fails.
    pub fn output_of_make(&self, arguments: &[&str]) -> Result<String> {
        output_of(self.command("make").args(["-s", "--no-print-directory", "-f", MAKEFILE]).args(arguments))
    }
}

/// Output of a command. What it prints on stderr is shown.
///
/// # Errors
/// If it cannot be started or fails; the exit code of this program is then 2, as make's is.
pub(crate) fn output_of(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stderr(Stdio::inherit()).output().with_context(|| format!("starting {name}"))?;
    if !output.status.success() {
        return Err(usage(format!("{name} failed ({})", output.status)));
    }
    String::from_utf8(output.stdout).with_context(|| format!("output of {name}"))
}

/// Text of a file; empty if there is none.
pub(crate) fn text_of(path: &Path) -> String {
    std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

/// Settings of a TOML file, by the names that make has for them.
fn read_config(path: &Path) -> Result<Vec<(String, String)>> {
    let wrong = |message: String| usage(format!("{}: {message}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|e| wrong(e.to_string()))?;
    let config: toml::Table = text.parse().map_err(|e: toml::de::Error| wrong(e.to_string()))?;
    let known = known_settings()?;
    let known: Vec<&str> = known.iter().map(String::as_str).collect();
    let read = |(name, value): (&String, &toml::Value)| {
        if !known.contains(&name.as_str()) {
            let hint = match cpift_core::error::closest(name, &known) {
                Some(near) => format!("{near}?"),
                None => format!("known are {}", known.join(", ")),
            };
            return Err(wrong(format!("unknown setting {name} (hint: {hint})")));
        }
        let texts =
            |list: &Vec<toml::Value>| list.iter().map(|v| v.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>();
        let value = match value {
            toml::Value::String(text) => Some(text.clone()),
            toml::Value::Integer(number) => Some(number.to_string()),
            toml::Value::Float(number) => Some(number.to_string()),
            toml::Value::Array(list) => {
                texts(list).and_then(|words| shlex::try_join(words.iter().map(String::as_str)).ok())
            }
            _ => None,
        };
        let value = value.ok_or_else(|| wrong(format!("{name} is no text, number or list of texts")))?;
        Ok((name.to_uppercase(), value))
    };
    config.iter().map(read).collect()
}

/// Names of all settings in lower case: those that pipeline.mk keeps, and those of one call.
fn known_settings() -> Result<Vec<String>> {
    let text = std::fs::read_to_string(MAKEFILE).context(MAKEFILE)?.replace("\\\n", " ");
    let Some(kept) = text.lines().find_map(|line| line.strip_prefix("SETTINGS := ")) else {
        bail!("{MAKEFILE} has no line SETTINGS")
    };
    let more = ["run", "methods", "threads", "cluster"];
    Ok(kept.split_whitespace().map(str::to_lowercase).chain(more.map(str::to_owned)).collect())
}
