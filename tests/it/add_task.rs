//! scripts/add_task.py with the six programs on a tiny model: the safeguards reach the stage, the
//! choice follows its rule, and nothing is made twice.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use cpift_testkit::chain::programs;
use cpift_testkit::model::{tiny_weights, write_tasks, write_tiny_model};
use cpift_testkit::{Tensor, write_safetensors};
use serde_json::Value;

struct Adding {
    dir: tempfile::TempDir,
}

impl Adding {
    /// A base, a model that differs from it in the last layer, and three tasks.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_tiny_model(&dir.path().join("base"), 1);
        let tuned = write_tiny_model(&dir.path().join("tuned"), 1);
        let mut weights = tiny_weights(1);
        for (name, tensor) in &mut weights {
            if name.contains("layers.1.") {
                *tensor = Tensor::f32(&tensor.shape, &tensor.values().iter().map(|v| v * 1.5).collect::<Vec<_>>());
            }
        }
        fs::remove_file(tuned.join("model.safetensors")).unwrap();
        write_safetensors(&tuned.join("model.safetensors"), &weights);
        write_tasks(&dir.path().join("data"));
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs the script with `more`. Returns its exit code, output and errors.
    fn run(&self, run: &str, more: &[&str]) -> (i32, String, String) {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let setting = |name: &str, path: &str| format!("{name}={}", self.path(path).display());
        let output = Command::new("python3")
            .arg(root.join("scripts/add_task.py"))
            .args([setting("MODEL", "tuned"), setting("TASKS", "data/tasks.toml"), setting("RUN", run)])
            .args(["NEW=pick", "TOKENS=600", "ALPHAS=0.5", "DEV_ROWS=2", "DTYPE=f32"])
            .arg("TRAIN_FLAGS=--batch-size 4 --lr 1e-2 --device cpu")
            .arg("EVAL_FLAGS=--device cpu")
            .arg("SAMPLE_FLAGS=--device cpu --max-new-tokens 100")
            .arg(format!("BIN={}", programs().display()))
            .args(more)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("PROGRESS", "0")
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    }

    fn ok(&self, run: &str, more: &[&str]) -> (Value, String) {
        let (code, out, said) = self.run(run, more);
        assert_eq!(code, 0, "{out}\n{said}");
        (self.read(&format!("{run}/add-task.json")), out)
    }

    fn read(&self, name: &str) -> Value {
        serde_json::from_str(&fs::read_to_string(self.path(name)).unwrap()).unwrap()
    }

    fn arguments(&self, record: &str) -> String {
        self.read(record)["arguments"].to_string()
    }
}

#[test]
fn a_task_is_added_with_replay_and_told_what_it_cost() {
    let a = Adding::new();
    let (told, out) = a.ok("run", &["REPLAY_SHARE=0.3"]);
    assert!(out.contains("before") && out.contains("after") && out.contains("alpha "), "{out}");
    assert_eq!((&told["safeguards"]["replay"], &told["safeguards"]["protect"]), (&"rows".into(), &"dynamic".into()));
    assert!((told["safeguards"]["replayed_share"].as_f64().unwrap() - 0.3).abs() < 0.05);
    // The choice: the largest mean of the old tasks within a point of the new one's at 1.
    let mean = |point: &Value, names: &[&str]| {
        names.iter().map(|name| point["tasks"][name]["value"].as_f64().unwrap()).sum::<f64>() / names.len() as f64
    };
    let curve = told["curve"].as_array().unwrap();
    assert_eq!(curve.len(), 2);
    let enough = curve.iter().filter(|p| mean(p, &["pick"]) >= mean(&curve[1], &["pick"]) - 1.0);
    let best = enough.map(|p| mean(p, &["copy", "count"])).fold(f64::MIN, f64::max);
    let chosen = curve.iter().find(|p| p["alpha"] == told["alpha"]).unwrap();
    assert!(mean(chosen, &["copy", "count"]) == best);
    let folder = if told["alpha"] == 1.0 { "run/stage" } else { "run/alpha/0.5" };
    assert_eq!(fs::canonicalize(a.path("run/model")).unwrap(), fs::canonicalize(a.path(folder)).unwrap());
    // Rows that alpha is chosen on and rows that are reported do not meet.
    let rows = |folder: &str| {
        let text = fs::read_to_string(a.path(folder).join("outputs.jsonl")).unwrap();
        text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["row"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    assert!(rows("run/dev/1").iter().all(|row| *row <= 2) && rows("run/scores/after").iter().all(|row| *row > 2));
    let page = fs::read_to_string(a.path("run/report.html")).unwrap();
    assert!(page.contains("Added pick. Old tasks: copy, count."), "no section of the added task");

    // Nothing is made twice; another share makes what depends on it again.
    let made = |name: &str| fs::metadata(a.path(name)).unwrap().modified().unwrap();
    let before = [made("run/stage/model.safetensors"), made("run/scores/before/scores.json")];
    a.ok("run", &["REPLAY_SHARE=0.3"]);
    assert_eq!(before, [made("run/stage/model.safetensors"), made("run/scores/before/scores.json")]);
    a.ok("run", &["REPLAY_SHARE=0.5"]);
    assert!(made("run/stage/model.safetensors") > before[0]);
    assert_eq!(made("run/scores/before/scores.json"), before[1]);
    // The report follows the choice.
    a.ok("run", &["REPLAY_SHARE=0.5", "ALPHAS=0.25"]);
    assert!(fs::read_to_string(a.path("run/report.html")).unwrap().contains(">0.25<"));
}

#[test]
fn every_safeguard_reaches_the_stage() {
    let a = Adding::new();
    let base = format!("BASE={}", a.path("base").display());
    let (change, _) = a.ok("change", &["PROTECT=change", "PERCENT=10", "REPLAY=none", &base]);
    let weights: usize = tiny_weights(1).values().map(|t| t.values().len()).sum();
    assert_eq!(change["safeguards"]["frozen_elements"], weights / 10);
    assert_eq!(change["safeguards"]["replayed_rows"], 0);
    let (dynamic, _) = a.ok("dynamic", &["PROTECT=dynamic"]);
    assert!(dynamic["tokens"]["importance"].as_u64() > Some(0));
    a.ok("layers", &["PROTECT=layers", "LAYERS=1"]);
    assert!(a.arguments("layers/stage/cpift.json").contains("\"--freeze-layers\",\"1\""));
    let (own, _) = a.ok("own", &["REPLAY=self", "REPLAY_ROWS=12"]);
    let arguments = a.arguments("own/stage/cpift.json");
    assert!(arguments.contains("replay/copy.jsonl") && arguments.contains("replay/count.jsonl"), "{arguments}");
    assert!(own["safeguards"]["replayed_rows"].as_u64() > Some(1));
    assert!(a.path("own/replay/copy.jsonl.cpift.json").exists());
}

#[test]
fn without_old_tasks_the_divergence_decides() {
    let a = Adding::new();
    let tasks = fs::read_to_string(a.path("data/tasks.toml")).unwrap();
    let pick = &tasks[tasks.rfind("[[task]]").unwrap()..];
    fs::write(a.path("data/tasks.toml"), pick).unwrap();
    // Few turns of a model with random weights end in time.
    let short = "SAMPLE_FLAGS=--device cpu --max-new-tokens 40";
    let (told, _) = a.ok("run", &["KL_BUDGET=100", "REPLAY_ROWS=300", short]);
    assert_eq!((told["alpha"].as_f64(), &told["safeguards"]["replay"]), (Some(1.0), &"self".into()));
    let kl: Vec<f64> = told["curve"].as_array().unwrap().iter().map(|p| p["kl"].as_f64().unwrap()).collect();
    assert!(kl[0] < kl[1], "{kl:?}");
    let between = format!("KL_BUDGET={}", (kl[0] + kl[1]) / 2.0);
    assert_eq!(a.ok("run", &[&between, "REPLAY_ROWS=300", short]).0["alpha"], 0.5);
    let (code, _, said) = a.run("run", &["KL_BUDGET=0", "REPLAY_ROWS=300", short]);
    assert!(code == 1 && said.contains("KL_BUDGET=0"), "{code} {said}");
}

#[test]
fn losses_beyond_the_limit_and_bad_settings_are_errors() {
    let a = Adding::new();
    let (code, _, said) = a.run("run", &["MAX_LOSS=-200"]);
    assert!(code == 1 && said.contains("copy lost") && said.contains("MAX_LOSS=-200"), "{code} {said}");
    assert!(a.path("run/report.html").exists(), "the report shows what was lost");
    // Too few rows to report on are found before the training.
    let (code, _, said) = a.run("few", &["DEV_ROWS=4"]);
    assert!(code == 3 && said.contains("copy/eval.jsonl") && !a.path("few/stage").exists(), "{code} {said}");
    for (more, code, part) in [
        (&["NEW=sing"][..], 3, "no task sing; it has copy, count, pick"),
        (&["REPLAY=some"], 2, "REPLAY=some: expected one of rows, self, none"),
        (&["PROTECT=change"], 2, "needs BASE=DIR"),
        (&["PROTECT=layers"], 2, "needs LAYERS=N"),
        (&["PROTECT=dynamic", "REPLAY=none"], 2, "choose another REPLAY"),
        (&["ALPHAS=0.5 2"], 2, "ALPHAS"),
        (&["ALPHAS=x"], 2, "ALPHAS=x: expected numbers"),
        (&["MAX_LOSS=nan"], 2, "MAX_LOSS=nan: expected a number"),
        (&["DEV_ROWS=0"], 2, "DEV_ROWS=0: expected a whole number, at least 1"),
        (&["TOKENS=many"], 2, "TOKENS=many: expected a whole number"),
        (&["REPLAY_SHARE=much"], 2, "REPLAY_SHARE=much: expected a number"),
        (&["SPEED=9"], 2, "SPEED=9: no such setting"),
        (&["TASKS=/nowhere.toml"], 3, "/nowhere.toml"),
        (&["NEW=copy,count,pick", "REPLAY=rows"], 2, "lists no old task"),
    ] {
        let (found, _, said) = a.run("bad", more);
        assert!(found == code && said.contains(part) && !said.contains("Traceback"), "{more:?}: {found} {said}");
        assert!(!a.path("bad").exists());
    }
}
