//! A small run folder as the pipeline lays it out, with rows that would act on a careless page.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use cpift_core::checkpoint::Digest;
use cpift_core::scores::{Figure, Scores, TaskScore};
use cpift_testkit::masks::{write_groups, write_mask};
use cpift_testkit::model::write_tiny_model;
use serde_json::{Value, json};

pub const HOSTILE: &str = "<script>alert(1)</script>{{ 7 * 7 }}{% x %}<img src=http://x.example/a.png onerror=alert(2)>\u{1b}[31m\u{0}\u{202e}</pre></td>";

pub struct Folder {
    pub dir: tempfile::TempDir,
}

impl Folder {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// The scores of a model and its outputs: per task the score of every row.
    pub fn score(&self, name: &str, tasks: &[(&str, &[f64])]) -> PathBuf {
        let lines = tasks.iter().flat_map(|(task, scores)| {
            scores.iter().enumerate().map(move |(i, score)| {
                json!({"task": task, "row": i + 1, "prompt": format!("{task} question {}", i + 1), "output": HOSTILE,
                    "reference": "right", "score": score})
                .to_string()
                    + "\n"
            })
        });
        self.write(&format!("scores/{name}/outputs.jsonl"), &lines.collect::<String>());
        let tasks = tasks.iter().map(|(task, scores)| task_score(task, Some(Figure::mean("acc", scores))));
        self.write_scores(name, tasks.collect())
    }

    pub fn write_scores(&self, name: &str, tasks: Vec<TaskScore>) -> PathBuf {
        let scores = Scores { format_version: 1, model: name.into(), model_digest: Digest::blank(), tasks };
        self.write(&format!("scores/{name}/scores.json"), &serde_json::to_string(&scores).unwrap());
        self.path(&format!("scores/{name}"))
    }

    /// Changes a scores.json.
    pub fn edit(&self, name: &str, edit: impl FnOnce(&mut Value)) {
        let path = self.path(&format!("scores/{name}/scores.json"));
        let mut value: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        edit(&mut value);
        fs::write(path, value.to_string()).unwrap();
    }

    /// Everything a finished pipeline leaves.
    pub fn whole() -> Self {
        let f = Self::new();
        let base = write_tiny_model(&f.path("base-model"), 1);
        fs::create_dir_all(f.path("masks")).unwrap();
        let masks = ["copy", "pick"].map(|task| f.path(&format!("masks/{task}.safetensors")));
        write_mask(&masks[0], &base, |name, i| name.contains("q_proj") && i % 3 == 0);
        write_mask(&masks[1], &base, |name, i| name.contains("embed") && i % 5 == 0);
        write_groups(
            &f.path("groups.json"),
            &base,
            &[&["pick"], &["copy"]],
            &[("copy", &masks[0]), ("pick", &masks[1])],
        );
        f.score("base", &[("copy", &[0.0, 0.0, 0.0, 1.0]), ("pick", &[1.0, 1.0, 0.0, 1.0])]);
        f.score("cpi-ft", &[("copy", &[1.0, 1.0, 0.0, 1.0]), ("pick", &[1.0, 0.0, 0.0, 1.0])]);
        for name in ["probes/copy", "multi-stage"] {
            f.write(&format!("{name}/config.json"), "{}");
            let arguments = ["run", "--note", "it's <b>"];
            let inputs = json!({"model": {"path": base, "digest": Digest::blank()}});
            let record = json!({"format_version": 1, "stage": "cpift-train", "version": "0.1.0", "arguments": arguments, "seed": 5,
                "inputs": inputs, "facts": {"tokens": 1234}, "host": "here", "started_unix": 1, "seconds": 2.5});
            f.write(&format!("{name}/cpift.json"), &record.to_string());
        }
        let step = |stage: &str, step: u64, loss: f64| {
            json!({"stage": stage, "step": step, "loss": loss, "tokens": 10 * step}).to_string() + "\n"
        };
        let held_out = |stage: &str, step: u64, copy: f64, pick: f64| {
            json!({"stage": stage, "step": step, "eval_loss": {"copy": copy, "pick": pick}}).to_string() + "\n"
        };
        f.write("probes/copy/metrics.jsonl", &(step("copy", 1, 5.0) + &step("copy", 2, 3.0)));
        let stages = [
            step("stage 1/2 (pick)", 1, 4.0),
            held_out("stage 1/2 (pick)", 1, 3.0, 1.0),
            step("stage 2/2 (copy)", 1, 3.5),
            held_out("stage 2/2 (copy)", 1, 0.5, 2.25),
        ];
        f.write("multi-stage/metrics.jsonl", &stages.concat());
        f
    }
}

/// The score of a task on four rows; without a metric where there is none.
pub fn task_score(task: &str, metric: Option<Figure>) -> TaskScore {
    let nll = Figure { name: "nll".into(), value: 2.0, stderr: 0.1, n: 4 };
    let settings = BTreeMap::from([("rows".to_owned(), json!(4)), ("truncated".to_owned(), json!(0))]);
    TaskScore { task: task.into(), eval_digest: Digest::blank(), metric, also: BTreeMap::new(), nll, settings }
}

pub fn common(force: bool) -> cpift_core::cli::Common {
    cpift_core::cli::Common { force, ..Default::default() }
}

pub fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}
