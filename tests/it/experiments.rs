//! scripts/experiments/run.py with the six programs on a tiny model: all methods have the same
//! budget, the same seeds give the same table, and nothing is made twice.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use cpift_testkit::chain::programs;
use cpift_testkit::model::{write_tasks, write_tiny_model};
use serde_json::Value;

const SUITE: &str = r#"
base = "given"
tasks = "given"
seeds = 1
p = 5
tau = 2
order = "random"
own_p = 20
taus = [0, 2]
train = ["--batch-size", "1", "--lr", "1e-3", "--device", "cpu"]
eval = ["--device", "cpu"]
fisher = ["--save-fisher", "--fisher-batches", "4", "--fisher-batch-size", "1"]
lora = ["--lr", "1e-2"]
layers = 1
plus = { rows = 8, p = 20, lr = "1e-4", budget = { probe = 200, backbone = 1600, final = 200 } }
budget = { probe = 400, backbone = 800, final = 400, fisher = 80, pair = 800 }
"#;
/// Token budget of a method: probes, backbone and last stage.
const TOTAL: u64 = 3 * 400 + 800 + 400;
/// Possible excess: each training run ends with the batch that reaches its budget, and the longest
/// row has 96 tokens.
const SLACK: u64 = 8 * 96;

struct Experiment {
    dir: tempfile::TempDir,
}

impl Experiment {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_tiny_model(&dir.path().join("base"), 1);
        let tasks = write_tasks(&dir.path().join("data"));
        let text = fs::read_to_string(&tasks).unwrap().replace("[[task]]", "[[task]]\nkind = \"any\"");
        fs::write(&tasks, text).unwrap();
        fs::write(dir.path().join("suite.toml"), SUITE).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, names: &[&str], run: &str) -> Command {
        let bin = programs();
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let mut command = Command::new("python3");
        command
            .arg(root.join("scripts/experiments/run.py"))
            .args(names)
            .args(["--pair", "copy,count", "--suite"])
            .arg(self.path("suite.toml"))
            .arg("--base")
            .arg(self.path("base"))
            .arg("--tasks")
            .arg(self.path("data/tasks.toml"))
            .arg("--run")
            .arg(self.path(run))
            .arg("--bin")
            .arg(bin)
            .env("PYTHONDONTWRITEBYTECODE", "1");
        command
    }

    /// Runs experiments. Returns the table and the log.
    fn run(&self, names: &[&str], run: &str) -> (String, String) {
        let output = self.command(names, run).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{said}");
        (String::from_utf8(output.stdout).unwrap(), said)
    }

    fn read(&self, name: &str) -> Value {
        serde_json::from_str(&fs::read_to_string(self.path(name)).unwrap()).unwrap()
    }

    /// The only entry of the run `a`'s logs whose name begins with `step`.
    fn log_file(&self, step: &str) -> PathBuf {
        let mut logs = fs::read_dir(self.path("a/store/logs")).unwrap().map(|entry| entry.unwrap().path());
        logs.find(|path| path.file_name().unwrap().to_str().unwrap().starts_with(step)).unwrap()
    }

    /// Data of the files of the run `a`'s store whose names begin with `start` and end with
    /// `.safetensors`, without their headers.
    fn bits(&self, start: &str) -> BTreeSet<Vec<u8>> {
        let files = fs::read_dir(self.path("a/store")).unwrap().map(|entry| entry.unwrap().path());
        let named = files.filter(|path| {
            let name = path.file_name().unwrap().to_str().unwrap();
            name.starts_with(start) && name.ends_with(".safetensors")
        });
        named
            .map(|path| {
                let bytes = fs::read(path).unwrap();
                let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
                bytes[8 + header..].to_vec()
            })
            .collect()
    }

    fn log(&self, step: &str) -> String {
        fs::read_to_string(self.log_file(step)).unwrap()
    }

    /// Removes the output of a training step and leaves the state of a run that was stopped.
    fn stop_in_the_middle(&self, step: &str) {
        let log = self.log(step);
        let command: Vec<&str> = log.lines().next().unwrap().split(' ').collect();
        let out = self.log_file(step).file_stem().unwrap().to_str().unwrap().to_owned();
        let out = self.path("a/store").join(out);
        fs::remove_dir_all(&out).unwrap();
        let mut child = Command::new(command[0])
            .args(&command[1..])
            .args(["--save-every", "1"])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let states = out.with_file_name(format!("{}.checkpoints", out.file_name().unwrap().to_str().unwrap()));
        while !fs::read_dir(&states)
            .is_ok_and(|mut all| all.any(|e| e.unwrap().file_name().to_str().unwrap().starts_with("step-")))
        {
            assert!(child.try_wait().unwrap().is_none(), "{step} ended before its first state");
            sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!out.exists());
    }

    /// `stage_data` of the model that was scored in `scores`, a directory of the run `a`.
    fn stage_data(&self, scores: &str) -> String {
        let model = self.read(&format!("a/{scores}/scores.json"))["model"].as_str().unwrap().to_owned();
        let record: Value =
            serde_json::from_str(&fs::read_to_string(Path::new(&model).join("cpift.json")).unwrap()).unwrap();
        record["facts"]["stage_data"].as_str().unwrap().to_owned()
    }
}

fn row_named<'a>(rows: &'a [Value], name: &str) -> &'a Value {
    rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("no row {name}"))
}

#[test]
fn methods_have_one_budget_and_the_same_seeds_give_the_same_table() {
    let e = Experiment::new();
    let (table, said) = e.run(&["reproduce", "forgetting", "schedules"], "a");
    assert!(said.contains("steps to run"), "{said}");
    let json = e.read("a/experiments/reproduce.json");
    let rows = json["rows"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    let baselines = ["base", "full SFT", "multi-stage, random", "multi-stage, by kind", "LoRA", "HFT"];
    let mixtures = ["capped mixture", "mixture, n^0.3", "mixture, n^0.5", "mixture, n^0.7"];
    let isolation = ["CPI-FT", "CPI-FT, no fusion", "EPI", "own cores", "TRACE", "CPI-FT+"];
    let random = ["CPI-FT, random masks", "own cores, random masks", "CPI-FT+, random masks"];
    for name in baselines.iter().chain(&mixtures).chain(&isolation).chain(&random) {
        assert!(names.contains(name) && table.contains(name), "{name}\n{table}");
    }
    for row in rows {
        let (name, tokens) = (row["name"].as_str().unwrap(), row["tokens"].as_u64().unwrap());
        let expected = match name {
            "base" => 0,
            "CPI-FT, 2.5 times the tokens" => TOTAL * 5 / 2,
            _ => TOTAL,
        };
        let slack = if expected == 0 { 1 } else { SLACK };
        assert!((expected..expected + slack).contains(&tokens), "{name}: {tokens} tokens, expected {expected}");
    }
    // Random masks of three tasks, in the sizes of CPI-FT and of own cores and CPI-FT+.
    assert_eq!(e.bits("random-").len(), 3 * 2);
    assert!(e.path("a/report.html").exists() && e.path("a/masks/copy.safetensors").exists());
    // The last stage of CPI-FT and of its controls is mixed; group stages have a row of their own.
    let controls = ["CPI-FT", "CPI-FT, random masks", "CPI-FT, no freezing"];
    assert!(controls.iter().all(|name| e.stage_data(row_named(rows, name)["runs"][0].as_str().unwrap()) == "mixed"));
    assert_eq!(e.stage_data(row_named(rows, "CPI-FT, group stages")["runs"][0].as_str().unwrap()), "group");
    let pairs = e.read("a/experiments/forgetting.json");
    for (name, data) in [("CPI-FT", "mixed"), ("CPI-FT, group stages", "group")] {
        let pair = &row_named(pairs["rows"].as_array().unwrap(), name)["pairs"][0];
        assert_eq!(e.stage_data(pair["after_second"].as_str().unwrap()), data, "{name}");
    }

    // Existing outputs are reused, and a run in another directory gives the same table.
    let (again, said) = e.run(&["reproduce", "forgetting", "schedules"], "a");
    assert_eq!(again, table);
    assert!(!said.contains("steps to run"), "{said}");
    let (elsewhere, _) = e.run(&["reproduce", "--tidy"], "b");
    assert!(table.starts_with(elsewhere.trim_end()), "{elsewhere}\n{table}");
    // --tidy leaves no weights. They are not remade for existing outputs, but are for missing ones.
    let weights = || {
        let folders = fs::read_dir(e.path("b/store")).unwrap().map(|entry| entry.unwrap().path());
        folders.filter(|path| path.join("model.safetensors").exists()).count()
    };
    assert_eq!(weights(), 0);
    let (_, said) = e.run(&["reproduce", "--tidy"], "b");
    assert!(!said.contains("steps to run"), "{said}");
    let (_, said) = e.run(&["stages"], "b");
    assert!(said.contains("] probe-copy-s0-") && said.contains("] fused-s0-") && !said.contains("] mask-"), "{said}");
    // Three probes, the backbone, the fused model and the one-stage model.
    assert_eq!(weights(), 6);

    // A training that was stopped goes on where it was.
    e.stop_in_the_middle("full-sft-s0-");
    let (again, said) = e.run(&["reproduce", "forgetting", "schedules"], "a");
    assert_eq!(again, table);
    assert!(said.contains("] full-sft-s0-"), "{said}");
    assert!(e.log("full-sft-s0-").contains("resuming from"), "{}", e.log("full-sft-s0-"));

    // Changed rows of a task affect only the outputs made from them.
    let rows = e.path("data/count/train.jsonl");
    let text = fs::read_to_string(&rows).unwrap();
    fs::write(&rows, text.lines().skip(1).map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    let (_, said) = e.run(&["reproduce"], "a");
    assert!(said.contains("] probe-count-s0-") && !said.contains("] probe-copy-s0-"), "{said}");
}

#[test]
fn a_sequence_trains_every_task_once_with_equal_tokens() {
    let e = Experiment::new();
    let (table, _) = e.run(&["sequences"], "a");
    let json = e.read("a/experiments/sequences.json");
    let rows = json["rows"].as_array().unwrap();
    assert!(rows.len() >= 12 && table.contains("EPI, replay of 5 %, between, α 0.7"), "{table}");
    for row in rows.iter().filter(|row| row["name"] != "base") {
        let (name, tokens) = (row["name"].as_str().unwrap(), row["tokens"].as_u64().unwrap());
        // EPI measures importance on top.
        let measured = if name.contains("EPI") { 3 * 800 / 4 } else { 0 };
        assert!((3 * 800..3 * 800 + 3 * 96 + measured).contains(&tokens), "{name}: {tokens} tokens");
    }
    // Every stage is on one new task and lists the tasks before it, and no later one.
    let lists = fs::read_dir(e.path("a/store")).unwrap().map(|entry| entry.unwrap().path());
    let lists = lists.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("tasks-only-"));
    let mut lists: Vec<String> = lists.map(|path| fs::read_to_string(path.join("tasks.toml")).unwrap()).collect();
    lists.sort_by_key(String::len);
    assert_eq!(lists.iter().map(|list| list.matches("[[task]]").count()).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(lists.windows(2).all(|two| two[1].starts_with(&two[0])), "{lists:?}");
    let added = |stage: &str| {
        let log = e.log(stage);
        log.lines().next().unwrap().split(" --add ").nth(1).unwrap().split(' ').next().unwrap().to_owned()
    };
    for (stage, list) in [("added-plain-2-", &lists[1]), ("added-plain-3-", &lists[2])] {
        let last = list.rsplit("name = \"").next().unwrap().split('"').next().unwrap();
        assert_eq!(added(stage), last, "{list}");
    }
}

#[test]
fn the_conflict_suite_has_the_conflicts_it_claims() {
    let e = Experiment::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let write = |folder: &str| {
        let mut command = Command::new("python3");
        command.arg(root.join("scripts/experiments/conflict_tasks.py")).arg("--out").arg(e.path(folder));
        assert!(command.env("PYTHONDONTWRITEBYTECODE", "1").status().unwrap().success());
    };
    write("one");
    write("two");
    let rows = |folder: &str, file: &str| -> Vec<Value> {
        let text = fs::read_to_string(e.path(folder).join(file)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let prompt = |row: &Value| {
        let turns = row["messages"].as_array().unwrap();
        serde_json::to_string(&turns[..turns.len() - 1]).unwrap()
    };
    for task in ["forward", "backward", "noisy", "long", "large", "small"] {
        let [train, dev, eval] = ["train", "dev", "eval"].map(|file| rows("one", &format!("{task}/{file}.jsonl")));
        assert_eq!(train, rows("two", &format!("{task}/train.jsonl")));
        let all = train.len() + dev.len() + eval.len();
        let prompts: BTreeSet<String> = train.iter().chain(&dev).chain(&eval).map(prompt).collect();
        assert_eq!(prompts.len(), all, "{task}");
    }
    let train = |task: &str| rows("one", &format!("{task}/train.jsonl"));
    assert_eq!(train("large").len(), 100 * train("small").len());
    for (a, b) in train("forward").iter().zip(&train("backward")) {
        assert_eq!(prompt(a).replace("\"A give", "\"B give"), prompt(b));
        assert_ne!(a["answer"], b["answer"]);
    }
    // The right choice follows from the first word and from "no" before the kind.
    let wrong = |row: &&Value| {
        let text = row["messages"][0]["content"].as_str().unwrap();
        let first = text.split(' ').next().unwrap();
        let rules = [["every", "each", "all"], ["no", "never", "none"], ["some", "most", "few"]];
        let applies = !text.contains("this is no ");
        let right = if applies { rules.iter().position(|words| words.contains(&first)).unwrap() } else { 3 };
        row["answer"] != right
    };
    assert_eq!(train("noisy").iter().filter(wrong).count() * 10, train("noisy").len() * 3);
    assert_eq!(rows("one", "noisy/eval.jsonl").iter().filter(wrong).count(), 0);
    let words = |task: &str| {
        let rows = train(task);
        let of = |row: &Value| -> usize {
            let turns = row["messages"].as_array().unwrap().iter();
            // Each turn has a token before it and one after it.
            turns.map(|turn| turn["content"].as_str().unwrap().split(' ').count() + 2).sum()
        };
        rows.iter().map(of).sum::<usize>() as f64 / rows.len() as f64
    };
    let short = ["forward", "backward", "noisy", "large", "small"].map(words).iter().sum::<f64>() / 5.0;
    assert!((9.0..14.0).contains(&(words("long") / short)), "{} {short}", words("long"));
}

#[test]
fn invalid_arguments_are_reported_before_any_work() {
    let e = Experiment::new();
    let refused = |more: &[&str], parts: &[&str]| {
        let output = e.command(&["forgetting"], "c").args(more).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(3), "{more:?}: {said}");
        assert!(parts.iter().all(|part| said.contains(part)) && !said.contains("Traceback"), "{more:?}: {said}");
        assert!(!e.path("c").exists());
    };
    refused(&["--pair", "copy"], &["--pair copy", "copy, count, pick"]);
    refused(&["--pair", "copy,other"], &["--pair copy,other"]);
    refused(&["--bin", "/nowhere"], &["/nowhere/cpift-probe", "make build"]);
    refused(&["--base", "/nowhere"], &["/nowhere: no such file"]);
    refused(&["--with", "small"], &["suite.toml", "[small]"]);
    refused(&["--suite", "/nowhere.toml"], &["/nowhere.toml: no such file"]);
    fs::write(e.path("suite.toml"), "p = 1").unwrap();
    refused(&[], &["suite.toml: lacks seeds, tau"]);
    fs::write(e.path("suite.toml"), "p = ").unwrap();
    refused(&[], &["suite.toml: cannot be read as TOML"]);
}
