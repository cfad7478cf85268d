//! The six programs end to end, run by scripts/pipeline.mk on a tiny model. Transplanted and frozen
//! elements keep their bits, a rerun gives the same bytes, and editing a data file reruns only what
//! depends on it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use cpift_core::format::mask::{Mask, bit, count_ones};
use cpift_testkit::chain::{program, programs};
use cpift_testkit::model::{row, write_rows, write_tasks, write_tiny_model};
use cpift_testkit::{Run, Tensors, read_checkpoint, run_command};
use serde_json::Value;

const TASKS: [&str; 3] = ["copy", "count", "pick"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

struct Pipeline {
    dir: tempfile::TempDir,
}

impl Pipeline {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_tiny_model(&dir.path().join("base"), 1);
        write_tasks(&dir.path().join("data"));
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs make and returns the names of the artifacts that it made.
    fn make(&self, run: &str) -> Vec<String> {
        self.make_with(run, &[])
    }

    /// As [`Pipeline::make`], with additional settings.
    fn make_with(&self, run: &str, more: &[&str]) -> Vec<String> {
        let bin = programs();
        let variable = |key: &str, value: &Path| format!("{key}={}", value.display());
        let output = Command::new("make")
            .current_dir(root())
            .args(["--no-print-directory", "-j2", "-f", "scripts/pipeline.mk", "all"])
            .args([variable("BIN", &bin), variable("BASE", &self.path("base")), variable("RUN", &self.path(run))])
            .arg(variable("TASKS", &self.path("data/tasks.toml")))
            .args(["PROBE_TOKENS=600", "BACKBONE_TOKENS=600", "FINAL_TOKENS=1200", "P=5", "ORDER=overlap"])
            // With TAU above 1 every task is a group of its own, so that two stages freeze
            // parameters.
            .args([
                "METHODS=full-sft multi-stage cpi-ft",
                "TAU=1.1",
                "TRAIN_FLAGS=--device cpu --lr 1e-2 --batch-size 4",
                "EVAL_FLAGS=--device cpu",
            ])
            .args(more)
            .env_remove("MAKEFLAGS")
            .output()
            .unwrap();
        let stdout = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "make\n{stdout}\n{}", String::from_utf8_lossy(&output.stderr));
        let made: Vec<(String, String)> = stdout.lines().filter_map(made_line).collect();
        // Every artifact is counted once, up to the announced total.
        let mut counts: Vec<String> = made.iter().map(|(count, _)| count.clone()).collect();
        counts.sort_by_key(|count| count.split('/').next().unwrap().parse::<usize>().unwrap());
        let expected: Vec<String> = (1..=made.len()).map(|k| format!("{k}/{}", made.len())).collect();
        assert_eq!(counts, expected, "{stdout}");
        let mut made: Vec<String> = made.into_iter().map(|(_, name)| name).collect();
        made.sort();
        made
    }

    /// Runs `cpift-pipeline COMMAND` with the settings `more`.
    fn script(&self, command: &str, more: &[String]) -> Run {
        let mut script = Command::new(program("cpift-pipeline"));
        script.current_dir(root()).arg(command).args(more).env("BIN", programs());
        run_command(script)
    }

    /// Runs `make clean-probes`.
    fn clean_probes(&self, run: &str) -> Run {
        let mut command = Command::new(program("cpift-pipeline"));
        command.current_dir(root()).arg("clean-probes");
        if !run.is_empty() {
            command.arg(format!("RUN={}", self.path(run).display()));
        }
        command.env("BIN", programs());
        run_command(command)
    }

    fn read(&self, name: &str) -> Tensors {
        read_checkpoint(&self.path(name))
    }

    fn groups(&self) -> Vec<String> {
        let groups: Value = serde_json::from_str(&fs::read_to_string(self.path("run/groups.json")).unwrap()).unwrap();
        groups["groups"].as_array().unwrap().iter().map(|g| g[0].as_str().unwrap().to_owned()).collect()
    }
}

/// Count and name in a line such as `[ 3/20] probe-copy    1.2 s`; none for other lines.
fn made_line(line: &str) -> Option<(String, String)> {
    let (count, rest) = line.strip_prefix('[')?.split_once("] ")?;
    let [name, seconds, "s"] = rest.split_whitespace().collect::<Vec<_>>()[..] else { panic!("{line}") };
    assert!(seconds.parse::<f64>().is_ok(), "{line}");
    Some((count.trim().to_owned(), name.to_owned()))
}

/// Bytes of element `i` of an F32 tensor.
fn element<'a>(tensors: &'a Tensors, name: &str, i: usize) -> &'a [u8] {
    &tensors[name].bytes[4 * i..4 * i + 4]
}

fn assert_transplanted(p: &Pipeline, masks: &BTreeMap<&str, Mask>) {
    let fused = p.read("run/fused");
    let probes: BTreeMap<&str, Tensors> = TASKS.iter().map(|t| (*t, p.read(&format!("run/probes/{t}")))).collect();
    let mut checked = 0;
    for (name, tensor) in &fused {
        for i in 0..tensor.bytes.len() / 4 {
            let owners: Vec<&str> = TASKS.into_iter().filter(|t| bit(masks[t].bits(name).unwrap(), i)).collect();
            if let [owner] = owners[..] {
                assert_eq!(element(&fused, name, i), element(&probes[owner], name, i), "{name}[{i}] of {owner}");
                checked += 1;
            }
        }
    }
    assert!(checked > 100, "only {checked} elements are core to one task alone");
}

/// Asserts that each stage froze the cores of the groups before it. cpift-train's tests check that
/// these keep their bits, because they have access to the state between stages.
fn assert_frozen(p: &Pipeline, masks: &BTreeMap<&str, Mask>) {
    let order = p.groups();
    let text = fs::read_to_string(p.path("run/cpi-ft/cpift.json")).unwrap();
    let provenance: Value = serde_json::from_str(&text).unwrap();
    let stages = provenance["facts"]["stages"].as_array().unwrap();
    let mut frozen: BTreeMap<&str, Vec<u8>> = BTreeMap::new();
    for (stage, task) in stages.iter().zip(&order) {
        let expected: u64 = frozen.values().map(|bits| count_ones(bits)).sum();
        assert_eq!(stage["frozen_elements"].as_u64(), Some(expected), "{stage}");
        for (name, bits) in masks[task.as_str()].tensors() {
            let union = frozen.entry(name).or_insert_with(|| vec![0; bits.len()]);
            union.iter_mut().zip(bits).for_each(|(u, b)| *u |= b);
        }
    }
    assert_eq!(stages.len(), 3);
}

/// Asserts that cpi-ft trained on the balanced mixture in every stage and cpi-ft-group on the rows
/// of each group, both from the same fused model and with the same budget.
fn assert_rows_of_the_last_stages(p: &Pipeline) {
    let of = |name: &str| -> (Value, Vec<u64>, Value) {
        let text = fs::read_to_string(p.path("run").join(name).join("cpift.json")).unwrap();
        let record: Value = serde_json::from_str(&text).unwrap();
        let stages = record["facts"]["stages"].as_array().unwrap().iter();
        let examples = stages.map(|s| s["examples"].as_u64().unwrap()).collect();
        assert!(record["arguments"].as_array().unwrap().windows(2).any(|w| w == ["--tokens", "1200"]), "{text}");
        (record["facts"]["stage_data"].clone(), examples, record["inputs"]["model"]["digest"].clone())
    };
    let (mixed, group) = (of("cpi-ft"), of("cpi-ft-group"));
    assert_eq!((mixed.0.as_str(), group.0.as_str()), (Some("mixed"), Some("group")));
    let all: u64 = group.1.iter().sum();
    assert_eq!(mixed.1, [all; 3]);
    assert_eq!(group.1, [all / 3; 3]);
    assert_eq!(mixed.2, group.2);
}

#[test]
fn the_whole_pipeline() {
    let p = Pipeline::new();
    let all = ["METHODS=full-sft multi-stage cpi-ft cpi-ft-group"];
    let made = p.make_with("run", &all);
    for part in [
        "probe-copy",
        "mask-pick",
        "groups",
        "backbone",
        "fused",
        "cpi-ft",
        "cpi-ft-group",
        "full-sft",
        "multi-stage",
        "score-cpi-ft.pick",
        "scores-cpi-ft",
    ] {
        assert!(made.iter().any(|m| m == part), "{part} in {made:?}");
    }
    let table = fs::read_to_string(p.path("run/table.md")).unwrap();
    assert_eq!(table.lines().filter(|l| l.starts_with('|')).count(), 7, "{table}");
    assert!(fs::read_to_string(p.path("run/groups.svg")).unwrap().starts_with("<svg"));
    let masks: BTreeMap<&str, Mask> =
        TASKS.iter().map(|t| (*t, Mask::open(&p.path(&format!("run/masks/{t}.safetensors"))).unwrap())).collect();
    assert_transplanted(&p, &masks);
    assert_frozen(&p, &masks);
    assert_rows_of_the_last_stages(&p);

    assert!(p.make_with("run", &all).is_empty(), "everything is up to date");
    // A comma in the path, because it separates the arguments of make's functions.
    p.make_with("again,here", &all);
    for model in ["probes/copy", "backbone", "fused", "cpi-ft", "cpi-ft-group", "full-sft", "multi-stage"] {
        let bytes = |run: &str| fs::read(p.path(run).join(model).join("model.safetensors")).unwrap();
        assert_eq!(bytes("run"), bytes("again,here"), "{model} is the same on a rerun");
    }
    fs::write(p.path("run/probes/notes.txt"), "mine").unwrap();
    p.clean_probes("run").ok();
    assert!(!p.path("run/probes/copy/model.safetensors").exists() && p.path("run/probes/notes.txt").exists());
    p.clean_probes("").expect_code(2).says(&["RUN=DIR"]);
    // Another spelling of the path is the same run; scoring again needs no probe.
    assert!(p.make_with("./run", &all).is_empty());
    fs::remove_dir_all(p.path("run/task-scores/full-sft/copy")).unwrap();
    let made = p.make_with("run", &all);
    assert!(made.iter().any(|name| name == "score-full-sft.copy"), "{made:?}");
    assert!(!made.iter().any(|name| name.starts_with("probe-") || name.starts_with("mask-")), "{made:?}");
    assert!(p.make_with("run", &all).is_empty(), "probes are not needed once masks and fused model exist");
    // A probe is remade for its mask. With the same mask, all that is made from it is up to date.
    let stamp = |name: &str| -> SystemTime { fs::metadata(p.path(name)).unwrap().modified().unwrap() };
    let same = ["run/groups.json", "run/fused/model.safetensors", "run/cpi-ft/model.safetensors", "run/table.md"];
    let before = same.map(stamp);
    fs::remove_file(p.path("run/masks/pick.safetensors")).unwrap();
    p.clean_probes("run").expect_code(2).says(&["mask-pick is missing", "probe-pick is still needed"]);
    let made = p.make_with("run", &all);
    assert!(["mask-pick", "probe-pick"].iter().all(|name| made.iter().any(|m| m == name)), "{made:?}");
    assert!(p.path("run/masks/pick.safetensors").exists() && p.path("run/probes/pick/model.safetensors").exists());
    assert_eq!(same.map(stamp), before);
    assert!(p.make_with("run", &all).is_empty(), "everything is up to date again");
}

#[test]
fn editing_a_data_file_reruns_only_what_depends_on_it() {
    let p = Pipeline::new();
    let all = p.make("run");
    let stamp = |name: &str| -> SystemTime { fs::metadata(p.path("run").join(name)).unwrap().modified().unwrap() };
    let untouched =
        ["probes/count/cpift.json", "probes/pick/cpift.json", "masks/count.safetensors", "scores/base/scores.json"];
    let before: Vec<SystemTime> = untouched.iter().map(|n| stamp(n)).collect();
    write_rows(
        &p.path("data/copy/train.jsonl"),
        &(0..9).map(|i| row(&format!("say v{i}"), &format!("v{i}"))).collect::<Vec<_>>(),
    );
    let made = p.make("run");
    let spared = ["mask-count", "mask-pick", "probe-count", "probe-pick", "scores-base"];
    let spared = |name: &String| spared.contains(&name.as_str()) || name.starts_with("score-base.");
    let expected: Vec<String> = all.into_iter().filter(|m| !spared(m)).collect();
    assert_eq!(made, expected);
    assert_eq!(untouched.iter().map(|n| stamp(n)).collect::<Vec<_>>(), before);
    // Evaluation rows affect the scores of every model on that task, and everything made from these
    // scores.
    let eval: Vec<Value> = (0..3).map(|i| row(&format!("say w{i}"), &format!("w{i}"))).collect();
    write_rows(&p.path("data/copy/eval.jsonl"), &eval);
    let models = ["base", "cpi-ft", "full-sft", "multi-stage"];
    let mut expected: Vec<String> =
        models.iter().flat_map(|m| [format!("score-{m}.copy"), format!("scores-{m}")]).collect();
    expected.extend(["report".to_owned(), "table".to_owned()]);
    expected.sort();
    assert_eq!(p.make("run"), expected);
}

#[test]
fn cpi_ft_plus_changes_only_core_elements_after_the_mixture() {
    let p = Pipeline::new();
    let made = p.make_with("run", &["METHODS=full-sft capped-mixture cpi-ft-plus", "CAP=8", "PLUS_LR=1e-3"]);
    assert!(
        ["mixture", "capped-mixture", "cpi-ft-plus", "scores-cpi-ft-plus"]
            .iter()
            .all(|part| made.iter().any(|m| m == part)),
        "{made:?}"
    );
    assert!(!made.iter().any(|m| ["backbone", "fused", "multi-stage", "cpi-ft"].contains(&m.as_str())), "{made:?}");
    let table = fs::read_to_string(p.path("run/table.md")).unwrap();
    assert_eq!(table.lines().filter(|l| l.starts_with('|')).count(), 6, "{table}");
    // Nothing is fused, so the probes can be deleted without anything being remade.
    p.clean_probes("run").ok();
    assert!(!p.path("run/probes/copy/model.safetensors").exists());
    assert!(p.make_with("run", &["METHODS=full-sft capped-mixture cpi-ft-plus", "CAP=8", "PLUS_LR=1e-3"]).is_empty());
    // The table is remade for another set of methods.
    assert_eq!(p.make_with("run", &["METHODS=full-sft", "CAP=8", "PLUS_LR=1e-3"]), ["report", "table"]);
    assert!(!fs::read_to_string(p.path("run/table.md")).unwrap().contains("cpi-ft-plus"));
    let [before, after] = ["run/mixture", "run/cpi-ft-plus"].map(|folder| p.read(folder));
    let masks = TASKS.map(|task| Mask::open(&p.path(&format!("run/masks/{task}.safetensors"))).unwrap());
    let mut moved = 0;
    for (name, tensor) in &before {
        let core = |i: usize| {
            masks.iter().any(|mask| mask.tensors().any(|(own, bits)| own == name && bits[i / 8] >> (i % 8) & 1 == 1))
        };
        for i in 0..tensor.bytes.len() / 4 {
            let differs = element(&before, name, i) != element(&after, name, i);
            assert!(!differs || core(i), "{name}[{i}] moved");
            moved += usize::from(differs);
        }
    }
    assert!(moved > 0);
    let record = fs::read_to_string(p.path("run/cpi-ft-plus/cpift.json")).unwrap();
    assert!(record.contains("\"--trainable\""), "{record}");
    // PLUS_LR overrides the learning rate in TRAIN_FLAGS.
    let metrics = fs::read_to_string(p.path("run/cpi-ft-plus/metrics.jsonl")).unwrap();
    let steps = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let rates: Vec<f64> = steps.filter_map(|step| step["lr"].as_f64()).collect();
    assert!(rates.iter().any(|rate| *rate > 5e-4) && rates.iter().all(|rate| *rate <= 1e-3), "{rates:?}");
}

#[test]
fn one_file_has_the_settings_of_a_run() {
    let p = Pipeline::new();
    let config = |more: &str| {
        let [base, tasks, run] = ["base", "data/tasks.toml", "run"].map(|name| p.path(name).display().to_string());
        let text = format!(
            "base = {base:?}\ntasks = {tasks:?}\nrun = {run:?}\nmethods = [\"full-sft\", \"temperature-mixture\"]\n\
             probe_tokens = 100\nbackbone_tokens = 100\nfinal_tokens = 100\n\
             train_flags = [\"--device\", \"cpu\", \"--lr\", \"1e-2\"]\neval_flags = \"--device cpu\"\n{more}"
        );
        fs::write(p.path("run.toml"), text).unwrap();
        format!("CONFIG={}", p.path("run.toml").display())
    };
    let file = config("");
    p.script("run", std::slice::from_ref(&file)).ok();
    let record = fs::read_to_string(p.path("run/temperature-mixture/cpift.json")).unwrap();
    let record: Value = serde_json::from_str(&record).unwrap();
    let given = |pair: [&str; 2]| record["arguments"].as_array().unwrap().windows(2).any(|w| w == pair);
    assert!(given(["--tokens", "500"]) && given(["--mixture-temperature", "2"]) && given(["--lr", "1e-2"]), "{record}");
    let status = p.script("status", std::slice::from_ref(&file)).ok().stdout;
    assert!(status.lines().any(|line| line.starts_with("full-sft ") && line.ends_with("done")), "{status}");
    let again = p.script("run", std::slice::from_ref(&file)).ok();
    assert!(!again.stdout.contains('['), "{}", again.stdout);
    // An argument of the command line overrides the file.
    let typed = p.script("status", &[file, "TEMPERATURE=4".to_owned()]).ok();
    let stale = |name: &str| typed.stdout.lines().any(|line| line.starts_with(name) && line.contains("stale"));
    assert!(stale("temperature-mixture ") && !stale("full-sft "), "{}", typed.stdout);
    for (more, says) in [
        ("final_token = 3", "unknown setting final_token (hint: final_tokens?)"),
        ("seed = true", "seed is no text, number or list of texts"),
        ("seed = ", "run.toml: "),
    ] {
        p.script("run", &[config(more)]).expect_code(2).says(&[says]);
    }
}

/// Returns name and command of every artifact that make would make with `methods` as its only
/// settings.
fn planned(p: &Pipeline, methods: &[&str]) -> BTreeMap<String, String> {
    let variable = |key: &str, value: &Path| format!("{key}={}", value.display());
    let output = Command::new("make")
        .current_dir(root())
        .args(["-sn", "--no-print-directory", "-f", "scripts/pipeline.mk", "GRAPH=1", "all"])
        .args([variable("BIN", &programs()), variable("BASE", &p.path("base")), variable("RUN", &p.path("run"))])
        .arg(variable("TASKS", &p.path("data/tasks.toml")))
        .args(methods)
        .env_remove("MAKEFLAGS")
        .output()
        .unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    let parts = |line: &str| line.split('\t').map(str::to_owned).collect::<Vec<_>>();
    lines.lines().map(parts).filter(|p| p.len() == 2).map(|p| (p[0].clone(), p[1].clone())).collect()
}

#[test]
fn defaults_are_the_best_method_and_one_setting_selects_the_published_one() {
    let p = Pipeline::new();
    let default = planned(&p, &[]);
    let says = |plan: &BTreeMap<String, String>, name: &str, parts: &[&str]| {
        let command = plan.get(name).unwrap_or_else(|| panic!("{name} is not in {plan:?}"));
        assert!(parts.iter().all(|part| format!("{command} ").contains(&format!("{part} "))), "{parts:?} in {command}");
    };
    assert!(!default.contains_key("cpi-ft") && !default.contains_key("multi-stage"), "{default:?}");
    // The same budget for every method: three probes, the mixture and the last stage.
    says(&default, "full-sft", &["--tokens 1540000"]);
    says(&default, "capped-mixture", &["--tokens 1540000", "--sample 1000"]);
    says(&default, "probe-pick", &["--tokens 30000"]);
    says(&default, "mixture", &["--tokens 1300000", "--sample 1000"]);
    let rate = planned(&p, &["PLUS_LR=1e-4"]);
    says(&rate, "cpi-ft-plus", &["--lr 1e-4"]);
    says(&default, "cpi-ft-plus", &["--tokens 150000", "--sample 1000", "--trainable cores", "--lr-scale 0.333"]);
    says(&default, "mask-pick", &["--percent 20"]);
    says(&default, "groups", &["--tau auto"]);
    says(&default, "score-cpi-ft-plus.pick", &["--only pick"]);
    let published = planned(&p, &["METHODS=full-sft multi-stage cpi-ft"]);
    assert!(!published.contains_key("capped-mixture") && !published.contains_key("mixture"), "{published:?}");
    says(&published, "full-sft", &["--tokens 1200000"]);
    says(&published, "cpi-ft", &["--tokens 200000", "--stage-data mixed"]);
    let group = planned(&p, &["METHODS=cpi-ft-group", "FINAL_FLAGS=--lr 1e-4"]);
    says(&group, "cpi-ft-group", &["--tokens 200000", "--stage-data group", "--lr 1e-4"]);
    says(&group, "mask-pick", &["--percent 1"]);
    assert!(!group.contains_key("cpi-ft") && !group.contains_key("mixture"), "{group:?}");
    says(&published, "mask-pick", &["--percent 1"]);
    says(&published, "groups", &["--tau 0.1"]);
}
