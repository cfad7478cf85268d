//! make, `make status`, Slurm submission and the experiments agree on the outputs that a change
//! affects.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use cpift_testkit::chain::{program, programs};
use cpift_testkit::model::{row, write_rows, write_tasks, write_tiny_model};
use cpift_testkit::run_command;

/// Experiment suite with the budgets and arguments that [`World::settings`] passes to the pipeline.
const SUITE: &str = r#"
base = "given"
tasks = "given"
seeds = 1
methods = ["base", "full SFT", "CPI-FT"]
p = 5
tau = 1.1
order = "overlap"
own_p = 20
taus = [0]
train = ["--batch-size", "4", "--lr", "1e-2", "--device", "cpu"]
eval = ["--device", "cpu"]
fisher = []
lora = []
plus = {}
budget = { probe = 600, backbone = 600, final = 600, fisher = 80, pair = 800 }
"#;

/// A finished pipeline and a finished experiment with the same base and task list.
struct World {
    dir: tempfile::TempDir,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_tiny_model(&dir.path().join("base"), 1);
        write_tasks(&dir.path().join("data"));
        fs::write(dir.path().join("suite.toml"), SUITE).unwrap();
        let world = Self { dir };
        let made = run_command(world.make(&["-j2", "all"], &[])).ok().stdout;
        assert!(made.contains(" report "), "{made}");
        run_command(world.experiment(&[])).ok();
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn settings(&self, changes: &[&str]) -> Vec<String> {
        let path = |key: &str, path: PathBuf| format!("{key}={}", path.display());
        let mut settings = vec![
            path("BIN", programs()),
            path("BASE", self.path("base")),
            path("TASKS", self.path("data/tasks.toml")),
            path("RUN", self.path("run")),
        ];
        let fixed = [
            "METHODS=full-sft cpi-ft",
            "PROBE_TOKENS=600",
            "BACKBONE_TOKENS=600",
            "FINAL_TOKENS=600",
            "P=5",
            "TAU=1.1",
            "ORDER=overlap",
            "TRAIN_FLAGS=--device cpu --lr 1e-2 --batch-size 4",
            "EVAL_FLAGS=--device cpu",
        ];
        settings.extend(fixed.iter().chain(changes).map(|text| (*text).to_owned()));
        settings
    }

    fn make(&self, targets: &[&str], changes: &[&str]) -> Command {
        let mut command = Command::new("make");
        command.current_dir(root()).args(["--no-print-directory", "-f", "scripts/pipeline.mk"]).args(targets);
        command.args(self.settings(changes)).env_remove("MAKEFLAGS");
        command
    }

    fn experiment(&self, more: &[&str]) -> Command {
        let mut command = Command::new("python3");
        command.arg(root().join("scripts/experiments/run.py")).arg("reproduce").args(more);
        for (flag, name) in
            [("--suite", "suite.toml"), ("--base", "base"), ("--tasks", "data/tasks.toml"), ("--run", "lab")]
        {
            command.arg(flag).arg(self.path(name));
        }
        command.arg("--bin").arg(programs()).env("PYTHONDONTWRITEBYTECODE", "1");
        command
    }

    /// Prepares `cpift-pipeline` with the settings of the pipeline in its environment.
    fn script(&self, arguments: &[&str], changes: &[&str]) -> Command {
        let mut command = Command::new(program("cpift-pipeline"));
        command.current_dir(root()).args(arguments).env("CLUSTER", root().join("scripts/slurm/cluster.env"));
        for setting in self.settings(changes) {
            let (key, value) = setting.split_once('=').unwrap();
            command.env(key, value);
        }
        command
    }

    /// Artifacts that make would make, according to `make -n`.
    fn by_make(&self, changes: &[&str]) -> BTreeSet<String> {
        let printed = run_command(self.make(&["-n", "all"], changes)).ok().stdout;
        let logs = format!("{}/logs/", self.path("run").display());
        let name = |line: &str| Some(line.split_once(&logs)?.1.split(' ').next()?.to_owned());
        printed.lines().filter_map(name).collect()
    }

    fn by_status(&self, changes: &[&str]) -> BTreeSet<String> {
        let printed = run_command(self.script(&["status"], changes)).ok().stdout;
        let words = printed.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let due = words.filter(|w| w.len() > 1 && ["stale", "missing"].contains(&w[1]));
        due.map(|w| w[0].to_owned()).collect()
    }

    /// Jobs and array elements that would be submitted, as `stage` or `stage/index`.
    fn by_slurm(&self, changes: &[&str]) -> BTreeSet<String> {
        let printed = run_command(self.script(&["slurm", "DRY_RUN=1"], changes)).ok().stdout;
        let mut due = BTreeSet::new();
        for line in printed.lines().filter(|line| line.starts_with("sbatch ")) {
            let value = |flag: &str| line.split_whitespace().find_map(|word| word.strip_prefix(flag));
            let stage = value("--job-name=run.").unwrap();
            match value("--array=") {
                Some(list) => due.extend(list.split(',').map(|index| format!("{stage}/{index}"))),
                None => drop(due.insert(stage.to_owned())),
            }
        }
        due
    }

    /// Steps that the experiment would run, by their names in the pipeline. Scores are excluded,
    /// because the experiment scores all tasks in one step.
    fn by_experiment(&self) -> BTreeSet<String> {
        let printed = run_command(self.experiment(&["--dry-run"])).ok().stdout;
        let name = |line: &str| line.rsplit_once("-s0-").map(|(name, _)| name.to_owned());
        printed.lines().filter_map(name).filter(|name| !name.starts_with("score-")).collect()
    }

    /// Asserts that all four report that `expected` must be made, apart from scores, table and
    /// report, which depend on it.
    fn expect_due(&self, what: &str, expected: &[&str], changes: &[&str]) {
        let expected: BTreeSet<String> = expected.iter().map(|name| (*name).to_owned()).collect();
        let made = self.by_make(changes);
        assert_eq!(made, self.by_status(changes), "{what}: make and status");
        let (scores, models): (BTreeSet<String>, BTreeSet<String>) = made.into_iter().partition(|name| is_score(name));
        assert_eq!(models, expected, "{what}: make");
        assert_eq!(!scores.is_empty(), !expected.is_empty(), "{what}: {scores:?}");
        let tasks = ["copy", "count", "pick"];
        let mut jobs = BTreeSet::new();
        for name in &models {
            let task = name.strip_prefix("probe-").or_else(|| name.strip_prefix("mask-"));
            jobs.insert(
                task.map_or(name.clone(), |task| format!("probe/{}", tasks.iter().position(|t| *t == task).unwrap())),
            );
        }
        let submitted = self.by_slurm(changes);
        let submitted_models: BTreeSet<String> =
            submitted.iter().filter(|job| !job.starts_with("score/") && *job != "report").cloned().collect();
        assert_eq!(submitted_models, jobs, "{what}: Slurm");
        assert_eq!(submitted.contains("report"), !scores.is_empty(), "{what}: Slurm");
        assert_eq!(self.by_experiment(), expected, "{what}: experiment");
    }
}

fn is_score(name: &str) -> bool {
    name.starts_with("score") || name == "table" || name == "report"
}

/// Sets the version in a record to an older one.
fn made_by_another_version(record: &Path) {
    let text = fs::read_to_string(record).unwrap();
    let version = format!("\"version\": \"{}\"", env!("CARGO_PKG_VERSION"));
    assert!(text.contains(&version), "{text}");
    fs::write(record, text.replace(&version, "\"version\": \"0.0.1\"")).unwrap();
}

#[test]
fn all_tools_agree_on_the_outputs_that_a_change_affects() {
    let world = World::new();
    let store = |prefix: &str| -> PathBuf {
        let mut found = fs::read_dir(world.path("lab/store")).unwrap().map(|entry| entry.unwrap().path());
        found
            .find(|path| {
                let name = path.file_name().unwrap().to_str().unwrap();
                name.starts_with(prefix) && !name.ends_with(".cpift.json")
            })
            .unwrap()
    };
    let everything_after_masks = ["groups", "backbone", "fused", "cpi-ft"];
    let after = |names: &[&'static str]| [names, &everything_after_masks].concat();
    world.expect_due("nothing", &[], &[]);
    world.expect_due("another number of threads", &[], &["THREADS=2"]);

    // Touching a file changes nothing.
    for name in ["data/copy/train.jsonl", "data/tasks.toml", "base/model.safetensors", "run/masks/copy.safetensors"] {
        let file = fs::File::options().write(true).open(world.path(name)).unwrap();
        file.set_modified(SystemTime::now() + Duration::from_secs(5)).unwrap();
    }
    world.expect_due("touched files", &[], &[]);

    // A changed flag of one stage.
    fs::write(world.path("suite.toml"), SUITE.replace("p = 5", "p = 6")).unwrap();
    world.expect_due("p", &after(&["mask-copy", "mask-count", "mask-pick"]), &["P=6"]);
    fs::write(world.path("suite.toml"), SUITE).unwrap();

    // The task list: a comment, the settings of one task.
    let tasks = fs::read_to_string(world.path("data/tasks.toml")).unwrap();
    fs::write(world.path("data/tasks.toml"), format!("# A comment.\n{tasks}")).unwrap();
    world.expect_due("a comment in tasks.toml", &[], &[]);
    let named = "name = \"count\"";
    assert!(tasks.contains(named), "{tasks}");
    fs::write(world.path("data/tasks.toml"), tasks.replace(named, &format!("{named}\nsample = 5"))).unwrap();
    world.expect_due("a task's settings", &after(&["probe-count", "mask-count", "full-sft"]), &[]);
    fs::write(world.path("data/tasks.toml"), &tasks).unwrap();

    // A row.
    let rows = fs::read(world.path("data/copy/train.jsonl")).unwrap();
    write_rows(&world.path("data/copy/train.jsonl"), &[row("say a", "a"), row("say b", "b")]);
    world.expect_due("a row", &after(&["probe-copy", "mask-copy", "full-sft"]), &[]);
    fs::write(world.path("data/copy/train.jsonl"), rows).unwrap();
    world.expect_due("the row as it was", &[], &[]);

    // Deleted outputs, and outputs of another version.
    let (mask, kept) = (world.path("run/masks/pick.safetensors"), store("mask-pick-"));
    let bytes = fs::read(&mask).unwrap();
    fs::remove_file(&mask).unwrap();
    fs::remove_file(&kept).unwrap();
    world.expect_due("a deleted output", &after(&["mask-pick"]), &[]);
    [&mask, &kept].iter().for_each(|path| fs::write(path, &bytes).unwrap());
    world.expect_due("the output as it was", &[], &[]);
    made_by_another_version(&world.path("run/probes/pick/cpift.json"));
    made_by_another_version(&store("probe-pick-").join("cpift.json"));
    world.expect_due("a newer program", &after(&["probe-pick", "mask-pick"]), &[]);
}
