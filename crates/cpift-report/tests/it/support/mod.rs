//! A small run directory as the pipeline lays it out, with outputs that would act on a page that
//! does not escape them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use cpift_core::format::digest::Digest;
use cpift_core::format::scores::{MetricValue, Scores, TaskScore};
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
        self.score_at(&format!("scores/{name}"), tasks)
    }

    /// As [`Folder::score`], in any folder of the run.
    pub fn score_at(&self, folder: &str, tasks: &[(&str, &[f64])]) -> PathBuf {
        let lines = tasks.iter().flat_map(|(task, scores)| {
            scores.iter().enumerate().map(move |(i, score)| {
                json!({"task": task, "row": i + 1, "prompt": format!("{task} question {}", i + 1), "output": HOSTILE,
                    "reference": "right", "score": score})
                .to_string()
                    + "\n"
            })
        });
        self.write(&format!("{folder}/outputs.jsonl"), &lines.collect::<String>());
        let tasks = tasks.iter().map(|(task, scores)| task_score(task, Some(MetricValue::mean("acc", scores))));
        self.write_scores_at(folder, tasks.collect())
    }

    pub fn write_scores(&self, name: &str, tasks: Vec<TaskScore>) -> PathBuf {
        self.write_scores_at(&format!("scores/{name}"), tasks)
    }

    pub fn write_scores_at(&self, folder: &str, tasks: Vec<TaskScore>) -> PathBuf {
        let scores = Scores { format_version: 1, model: folder.into(), model_digest: Digest::blank(), tasks };
        self.write(&format!("{folder}/scores.json"), &serde_json::to_string(&scores).unwrap());
        self.path(folder)
    }

    /// Gives the rows of a task in outputs.jsonl their losses, as sums and numbers of tokens, and
    /// scores.json the mean.
    pub fn losses_at(&self, folder: &str, task: &str, losses: &[(f64, u64)]) {
        let path = self.path(&format!("{folder}/outputs.jsonl"));
        let with_loss = |line: &str| {
            let mut line: Value = serde_json::from_str(line).unwrap();
            if line["task"] == task {
                let (nll, targets) = losses[line["row"].as_u64().unwrap() as usize - 1];
                (line["nll"], line["targets"]) = (json!(nll), json!(targets));
            }
            format!("{line}\n")
        };
        let lines: String = read(&path).lines().map(with_loss).collect();
        fs::write(path, lines).unwrap();
        let (nll, tokens) = losses.iter().fold((0.0, 0), |(nll, tokens), (n, t)| (nll + n, tokens + t));
        let n = losses.iter().filter(|(_, tokens)| *tokens > 0).count();
        self.edit_at(folder, |scores| {
            let all = scores["tasks"].as_array_mut().unwrap();
            let score = all.iter_mut().find(|score| score["task"] == task).unwrap();
            let value = nll / tokens as f64;
            score["nll"] = json!({"name": "nll", "value": value, "stderr": 0.1, "n": n});
            score["also"]["perplexity"] = json!({"name": "perplexity", "value": value.exp(), "stderr": 0.1, "n": n});
        });
    }

    /// Writes experiments/NAME.json, with the fields of every experiment and `more`; returns its
    /// path.
    pub fn experiment(&self, name: &str, kind: &str, more: &Value) -> PathBuf {
        let mut value = json!({"format_version": 1, "name": name, "title": format!("The {name} experiment"),
            "question": "Does it hold?", "kind": kind});
        more.as_object().unwrap().iter().for_each(|(key, field)| value[key] = field.clone());
        self.write(&format!("experiments/{name}.json"), &value.to_string());
        self.path(&format!("experiments/{name}.json"))
    }

    /// Changes a scores.json.
    pub fn edit(&self, name: &str, edit: impl FnOnce(&mut Value)) {
        self.edit_at(&format!("scores/{name}"), edit);
    }

    /// As [`Folder::edit`], in any folder of the run.
    pub fn edit_at(&self, folder: &str, edit: impl FnOnce(&mut Value)) {
        let path = self.path(&format!("{folder}/scores.json"));
        let mut value: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        edit(&mut value);
        fs::write(path, value.to_string()).unwrap();
    }

    /// Three experiments over seeds: methods at one budget, a sweep, and forgetting.
    pub fn add_experiments(&self) {
        let seeds = |method: &str, shift: usize| -> Vec<String> {
            let folder = |seed: usize| format!("store/{method}-{seed}");
            for seed in 0..3 {
                let right = |row: usize, task: usize| ((row * 7 + task) % 10 < 4 + shift) != (row < seed * (2 + shift));
                let rows = |task| -> Vec<f64> { (0..40).map(|row| f64::from(u8::from(right(row, task)))).collect() };
                self.score_at(&folder(seed), &[("copy", &rows(0)), ("pick", &rows(5))]);
            }
            (0..3).map(folder).collect()
        };
        let (full, cpi, tuned) = (seeds("full-sft", 0), seeds("cpi-ft", 2), seeds("tuned", 1));
        let named = |name: &str, runs: &[String]| json!({"name": name, "tokens": 801514, "runs": runs});
        self.experiment(
            "1-methods",
            "scores",
            &json!({"baseline": "full-sft", "rows": [named("full-sft", &full), named("cpi-ft", &cpi), named(HOSTILE, &tuned)]}),
        );
        let at =
            |series: &str, x: f64, runs: &[String]| json!({"name": series, "series": series, "x": x, "runs": runs});
        let rows = [
            at("cpi-ft", 0.1, &tuned),
            at("cpi-ft", 1.0, &cpi),
            at("cpi-ft", 10.0, &tuned),
            at("full-sft", 0.1, &full),
            at("full-sft", 1.0, &full),
            at("full-sft", 10.0, &tuned),
        ];
        self.experiment(
            "2-sweep",
            "scores",
            &json!({"axis": {"label": "p (%)", "log": true}, "baseline": "full-sft", "rows": rows}),
        );
        let pair = |a: &str, b: &str, first: &str, second: &str| json!({"first": a, "second": b, "after_first": first, "after_second": second});
        let ones = |n: usize| -> Vec<f64> { (0..40).map(|row| f64::from(u8::from(row < n))).collect() };
        self.score_at("store/copied", &[("copy", &ones(32)), ("pick", &ones(8))]);
        self.score_at("store/picked", &[("copy", &ones(4)), ("pick", &ones(28))]);
        let pairs = |after: &[String]| {
            let both = |i: usize| {
                [pair("copy", "pick", "store/copied", &after[i]), pair("pick", "copy", "store/picked", &after[i])]
            };
            (0..3).flat_map(both).collect::<Vec<_>>()
        };
        let rows =
            [json!({"name": "full-sft", "pairs": pairs(&full)}), json!({"name": "cpi-ft", "pairs": pairs(&tuned)})];
        self.experiment("3-forgetting", "forgetting", &json!({"baseline": "full-sft", "rows": rows}));
    }

    /// All files of a finished pipeline.
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

/// The score of a task on four rows.
pub fn task_score(task: &str, metric: Option<MetricValue>) -> TaskScore {
    let nll = MetricValue { name: "nll".into(), value: 2.0, stderr: Some(0.1), n: 4 };
    let settings = BTreeMap::from([("rows".to_owned(), json!(4)), ("truncated".to_owned(), json!(0))]);
    TaskScore { task: task.into(), eval_digest: Digest::blank(), metric, also: BTreeMap::new(), nll, settings }
}

pub fn common(force: bool) -> cpift_core::run::cli::Common {
    cpift_core::run::cli::Common { force, ..Default::default() }
}

pub fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}
