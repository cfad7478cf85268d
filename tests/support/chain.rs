//! The six stages as a chain of commands over a tiny model and three tasks, in one temporary
//! directory.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::model::{write_tasks, write_tiny_model};
use crate::{Run, run_command};

/// Names of the tasks of [`write_tasks`].
pub const TASKS: [&str; 3] = ["copy", "count", "pick"];

/// One command of the chain: a program, its arguments and its output.
#[derive(Debug, Clone)]
pub struct Link {
    /// Name for messages.
    pub name: String,
    /// Program name.
    pub program: &'static str,
    /// Arguments.
    pub args: Vec<String>,
    /// Output path, relative to the directory of the chain.
    pub out: String,
}

/// Temporary directory with a base model, data and the outputs of the stages.
pub struct Chain {
    dir: tempfile::TempDir,
}

impl Default for Chain {
    fn default() -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_tiny_model(&dir.path().join("base"), 1);
        write_tasks(&dir.path().join("data"));
        Self { dir }
    }
}

impl Chain {
    /// Path of the directory.
    pub fn root(&self) -> &Path {
        self.dir.path()
    }

    /// Path of `name` in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    /// All commands in order, with `--skip-up-to-date` and `--resume`. Paths begin with `prefix`;
    /// with an empty prefix they are relative to the directory of the chain.
    pub fn links(prefix: &str) -> Vec<Link> {
        let at = |path: &str| format!("{prefix}{path}");
        let tasks = at("data/tasks.toml");
        let train = "--batch-size 4 --lr 1e-2 --steps 8 --save-every 2 --device cpu --threads 1 --resume";
        let link = |name: String, program, line: String, out: String| {
            let args = format!("{line} --out {} --skip-up-to-date", at(&out));
            Link { name, program, args: args.split_whitespace().map(str::to_owned).collect(), out }
        };
        let (base, mut links) = (at("base"), Vec::new());
        for task in TASKS {
            let line = format!("--base {base} --tasks {tasks} --task {task} {train}");
            links.push(link(format!("probe {task}"), "cpift-probe", line, format!("run/probes/{task}")));
        }
        for task in TASKS {
            let line = format!("extract --base {base} --tuned {} --percent 5", at(&format!("run/probes/{task}")));
            links.push(link(format!("mask {task}"), "cpift-mask", line, format!("run/masks/{task}.safetensors")));
        }
        let each = |flag: &str, end: &str, folder: &str| {
            TASKS.map(|t| format!("{flag} {t}={}", at(&format!("run/{folder}/{t}{end}")))).join(" ")
        };
        let masks = each("--mask", ".safetensors", "masks");
        // With tau above 1 every task is a group of its own, so that two stages freeze parameters.
        let line = format!("{masks} --tau 1.1 --order overlap");
        links.push(link("group".into(), "cpift-group", line, "run/groups.json".into()));
        let groups = at("run/groups.json");
        let line = format!("cpi --base {base} --groups {groups} {} {masks}", each("--task", "", "probes"));
        links.push(link("merge".into(), "cpift-merge", line, "run/fused".into()));
        let line =
            format!("run --model {} --base {base} --tasks {tasks} --groups {groups} {masks} {train}", at("run/fused"));
        links.push(link("train".into(), "cpift-train", line, "run/final".into()));
        let line = format!("run --model {} --tasks {tasks} --device cpu --threads 1", at("run/final"));
        links.push(link("eval".into(), "cpift-eval", line, "run/scores".into()));
        links
    }

    /// Returns the command called `name`, with paths relative to the directory of the chain.
    pub fn link(name: &str) -> Link {
        Self::links("").into_iter().find(|link| link.name == name).unwrap()
    }

    /// Prepares a command to run in the directory of the chain.
    pub fn command(&self, link: &Link) -> Command {
        let mut command = Command::new(program(link.program));
        command.args(&link.args).current_dir(self.root()).stdin(Stdio::null());
        command
    }

    /// Runs a command with additional arguments.
    pub fn run<S: AsRef<OsStr>>(&self, link: &Link, more: impl IntoIterator<Item = S>) -> Run {
        let mut command = self.command(link);
        command.args(more);
        run_command(command)
    }

    /// Runs all commands, which must succeed.
    pub fn run_all(&self) -> &Self {
        Self::links("").iter().for_each(|link| drop(self.run(link, [""; 0]).ok()));
        self
    }

    /// Asserts that directory `a` of this chain and `b` of another contain the same files with the
    /// same bytes, except for records and metrics.jsonl, and no unfinished outputs.
    ///
    /// # Panics
    /// If they differ.
    pub fn same_run(&self, a: &str, other: &Self, b: &str) {
        let files = [self.path(a), other.path(b)].map(|folder| content(&folder));
        let names = files.each_ref().map(|all| all.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>());
        assert_eq!(names[0], names[1]);
        assert!(!names[0].iter().any(|name| name.contains(".partial") || name.contains(".checkpoints")), "{names:?}");
        for ((name, ours), (_, theirs)) in files[0].iter().zip(&files[1]) {
            // Records and metrics.jsonl contain times.
            assert!(
                name.ends_with("cpift.json") || name.ends_with("metrics.jsonl") || ours == theirs,
                "{name} differs"
            );
        }
    }
}

/// Directory of the programs of the workspace, target/PROFILE. The running test program is in
/// target/PROFILE/deps.
///
/// # Panics
/// If the path of the test program is unknown.
pub fn programs() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().and_then(Path::parent).unwrap().to_owned()
}

/// Path of a program of the workspace.
pub fn program(name: &str) -> PathBuf {
    programs().join(name)
}

/// Names and bytes of all files below `folder`, sorted by name.
fn content(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let (mut files, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(next) = folders.pop() {
        for path in fs::read_dir(next).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned();
                files.push((name, fs::read(path).unwrap()));
            }
        }
    }
    files.sort();
    files
}
