//! `cpift-mask tensors` against importances computed here as NumPy would, through the real binary.

use std::path::PathBuf;

use crate::common::{BIN, model, record};
use cpift_core::format::mask::{Metric, Scope, count_ones};
use cpift_core::format::names::TensorKind;
use cpift_core::{Checkpoint, Dtype, Mask};
use cpift_testkit::{Numbers, Run, Tensor, Tensors, expect_entries, run, write_checkpoint, write_safetensors};
use serde_json::{Value, json};
use tempfile::TempDir;

struct Setting {
    dir: TempDir,
    tensors: [Tensors; 3],
    paths: [PathBuf; 3],
}

impl Setting {
    fn new(tensors: [Tensors; 3]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let fisher = dir.path().join("fisher.safetensors");
        write_safetensors(&fisher, &tensors[2]);
        let paths = [
            write_checkpoint(&dir.path().join("base"), &tensors[0]),
            write_checkpoint(&dir.path().join("tuned"), &tensors[1]),
            fisher,
        ];
        std::fs::create_dir(dir.path().join("out")).unwrap();
        Self { dir, tensors, paths }
    }

    /// Updates and squares of a scale of its own in each tensor.
    fn random(seed: u64) -> Self {
        let mut numbers = Numbers(seed);
        let base = model(&[Dtype::F32, Dtype::BF16], || numbers.unit());
        let (mut tuned, mut fisher) = (Tensors::new(), Tensors::new());
        for (name, before) in &base {
            let (far, steep) = (numbers.unit(), numbers.unit().abs());
            let moved: Vec<f32> = before.values().iter().map(|v| v + far * numbers.unit()).collect();
            let squares: Vec<f32> = moved.iter().map(|_| steep * numbers.unit().powi(2)).collect();
            tuned.insert(name.clone(), Tensor::f32(&before.shape, &moved));
            fisher.insert(name.clone(), Tensor::f32(&before.shape, &squares));
        }
        Self::new([base, tuned, fisher])
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("out/m.safetensors")
    }

    fn run(&self, fisher: bool, more: &[&str]) -> Run {
        let [base, tuned, file] = self.paths.each_ref().map(|p| p.to_str().unwrap());
        let out = self.out();
        let line = ["tensors", "--base", base, "--tuned", tuned, "--out", out.to_str().unwrap(), "--json"];
        let fisher: &[&str] = if fisher { &["--fisher", file] } else { &[] };
        run(BIN, line.iter().chain(fisher).chain(more))
    }

    /// Names and importances as a few lines of NumPy give them, the most important first.
    fn ranked(&self, fisher: bool, excluded: &[TensorKind]) -> Vec<(String, f64)> {
        let [base, tuned, squares] = &self.tensors;
        let names: Vec<&String> = base.keys().filter(|n| !excluded.iter().any(|kind| kind.matches(n))).collect();
        let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len() as f64;
        let rms = |name: &String| {
            let pairs = base[name].numbers().into_iter().zip(tuned[name].numbers());
            mean(pairs.map(|(b, t)| (t - b).powi(2)).collect()).sqrt()
        };
        let minmax = |values: Vec<f64>| -> Vec<f64> {
            let (low, high) =
                (values.iter().copied().fold(f64::MAX, f64::min), values.iter().copied().fold(0.0, f64::max));
            values.iter().map(|v| if high > low { (v - low) / (high - low) } else { 0.0 }).collect()
        };
        let moved: Vec<f64> = names.iter().map(|n| rms(n)).collect();
        let importance = if fisher {
            let felt = minmax(names.iter().map(|n| mean(squares[*n].numbers())).collect());
            minmax(moved).iter().zip(felt).map(|(m, f)| 0.5 * m + 0.5 * f).collect()
        } else {
            moved
        };
        let mut ranked: Vec<(String, f64)> = names.into_iter().cloned().zip(importance).collect();
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        ranked
    }

    /// Runs and compares the mask with the tensors that [`Setting::ranked`] puts first.
    fn check(&self, fisher: bool, percent: &str, count: usize, excluded: &[TensorKind], more: &[&str]) {
        let ran = self.run(fisher, &[&["--percent", percent, "--force"], more].concat()).ok();
        let said: Value = serde_json::from_str(&ran.stdout).unwrap();
        let ranked = self.ranked(fisher, excluded);
        let listed: Vec<&Value> = ["chosen", "others"].iter().flat_map(|k| said[k].as_array().unwrap()).collect();
        assert_eq!(listed.len(), ranked.len());
        for (found, (name, importance)) in listed.iter().zip(&ranked) {
            assert_eq!(found["name"], **name);
            let difference = found["importance"].as_f64().unwrap() - importance;
            assert!(difference.abs() <= 1e-12 * importance.abs(), "{name}: {difference}");
        }
        assert_eq!(said["chosen"].as_array().unwrap().len(), count);
        let mask = Mask::open(&self.out()).unwrap();
        let mut selected = 0;
        for (name, bits) in mask.tensors() {
            let n = self.tensors[0][name].numbers().len() as u64;
            let chosen = ranked[..count].iter().any(|(r, _)| r == name);
            assert_eq!(count_ones(bits), if chosen { n } else { 0 }, "{name}");
            selected += count_ones(bits);
        }
        let header = &mask.header;
        assert_eq!((header.scope, header.selected), (Scope::Whole, selected));
        assert_eq!(header.metric, if fisher { Metric::Trace } else { Metric::Rms });
        assert_eq!(header.d, ranked.iter().map(|(n, _)| self.tensors[0][n].numbers().len() as u64).sum::<u64>());
        let file = self.out();
        run(BIN, ["verify", file.to_str().unwrap()]).ok().says(&["sound", &format!("{selected} of D"), "matches"]);
        run(BIN, ["stats", file.to_str().unwrap()]).ok();
    }
}

#[test]
fn the_most_important_tensors_are_chosen_whole() {
    for seed in 1..=4 {
        let s = Setting::random(seed);
        for fisher in [false, true] {
            // Of eight tensors; the count is rounded up.
            for (percent, count) in [("10", 1), ("12.5", 1), ("13", 2), ("50", 4), ("99.9", 8), ("100", 8)] {
                s.check(fisher, percent, count, &[], &[]);
            }
            s.check(fisher, "10", 1, &[TensorKind::Embeddings, TensorKind::Norms], &["--exclude", "norms,embeddings"]);
        }
    }
}

#[test]
fn the_header_says_how_it_was_made_and_the_record_from_what() {
    let s = Setting::random(5);
    s.run(true, &[]).ok().says(&["1 of 8 tensors (p = 10 % of their number)", "importance"]);
    let mask = Mask::open(&s.out()).unwrap();
    let header = serde_json::to_value(&mask.header).unwrap();
    assert_eq!(
        (&header["percent"], &header["scope"], &header["metric"]),
        (&10.0.into(), &"whole".into(), &"trace".into())
    );
    assert!(header.get("seed").is_none());
    let record = record(&s.out());
    for (role, path) in ["base", "tuned", "fisher"].into_iter().zip(&s.paths) {
        let digest = Checkpoint::open(path).unwrap().digest().unwrap();
        let input = &record["inputs"][role];
        assert_eq!((&input["path"], &input["digest"]), (&json!(path), &json!(digest)), "{role}");
        assert!(header.get(role).is_none_or(|d| *d == json!(digest)), "{role}");
    }
    assert_eq!((&record["facts"]["tensors"], &record["facts"]["tensors_chosen"]), (&8.into(), &1.into()));
}

#[test]
fn threads_do_not_matter() {
    let s = Setting::random(6);
    let run = |threads: &str| {
        let ran = s.run(true, &["--percent", "40", "--force", "--threads", threads]).ok();
        (ran.stdout, std::fs::read(s.out()).unwrap())
    };
    let runs = ["1", "2", "8"].map(run);
    assert!(runs.iter().all(|r| *r == runs[0]));
}

#[test]
fn equal_importances_are_chosen_by_name_and_nothing_moved_is_warned_of() {
    let still = model(&[Dtype::F32], || 0.25);
    let s = Setting::new([still.clone(), model(&[Dtype::F32], || 0.5), model(&[Dtype::F32], || 1.0)]);
    for fisher in [false, true] {
        s.check(fisher, "25", 2, &[], &[]);
        let ran = s.run(fisher, &["--percent", "25", "--force"]).ok().says(&["warn: ", "by their names alone"]);
        let said: Value = serde_json::from_str(&ran.stdout).unwrap();
        let names = [&said["chosen"][0]["name"], &said["chosen"][1]["name"]];
        assert_eq!(names, ["lm_head.weight", "model.embed_tokens.weight"]);
    }
    let s = Setting::new([still.clone(), still.clone(), still]);
    s.run(false, &[]).ok().says(&["warn: ", "no parameter changed", "--tuned"]);
}

#[test]
fn inputs_that_cannot_be_used() {
    let bad = |which: usize, value: f32, parts: &[&str]| {
        let mut s = Setting::random(7);
        let mut values = vec![0.5; 100_003];
        values[70_000] = value;
        s.tensors[which].insert("lm_head.weight".into(), Tensor::f32(&[100_003], &values));
        let s = Setting::new(s.tensors);
        for more in [&[][..], &["--exclude", "embeddings"]] {
            s.run(true, more).bad_input(&["lm_head.weight", "flat index 70000"]).says(parts);
        }
        expect_entries(s.out().parent().unwrap(), &[]);
    };
    bad(0, f32::NAN, &["base", "a weight is not finite", "found: NaN"]);
    bad(1, f32::INFINITY, &["tuned", "a weight is not finite", "found: inf"]);
    bad(2, -0.5, &["fisher.safetensors", "squared gradient", "found: -0.5"]);
    let s = Setting::random(8);
    for percent in ["0", "100.5"] {
        s.run(true, &["--percent", percent]).usage_error(&["--percent"]);
    }
    let only = Tensors::from([("model.norm.weight".to_owned(), Tensor::f32(&[2], &[0.0; 2]))]);
    let none = Setting::new([only.clone(), only.clone(), only]);
    none.run(true, &["--exclude", "norms"]).bad_input(&["no tensor to choose from"]);
    std::fs::write(s.out(), "precious").unwrap();
    s.run(true, &[]).bad_input(&["exists already", "--force"]);
    assert_eq!(std::fs::read_to_string(s.out()).unwrap(), "precious");
    let [base, tuned, _] = s.paths.each_ref().map(|p| p.to_str().unwrap());
    let file = s.paths[2].to_str().unwrap();
    let line = ["tensors", "--base", base, "--tuned", tuned, "--fisher", file, "--out", file, "--force"];
    run(BIN, line).usage_error(&["--out", "would replace the input"]);
}
