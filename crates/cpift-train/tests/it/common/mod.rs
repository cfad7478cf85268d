//! A tiny base with three tasks, a mask for each and two groups: {count}, then {copy, pick}.
#![allow(dead_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use cpift_core::Dtype;
use cpift_testkit::masks::{write_groups, write_mask};
use cpift_testkit::model::{
    tiny_expert_fields, tiny_expert_weights, tiny_weights, write_json, write_tasks, write_tiny_model,
};
use cpift_testkit::{Run, Tensor, Tensors, read_checkpoint, run, write_safetensors};
use serde_json::{Value, json};

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_cpift-train");

pub const TASKS: [&str; 3] = ["copy", "count", "pick"];

pub struct Fixture {
    pub dir: tempfile::TempDir,
    pub base: PathBuf,
    pub tasks: PathBuf,
}

/// Returns true for elements that are core to task `k`: every eleventh, shifted by the task.
pub fn core(k: usize, index: usize) -> bool {
    index % 11 == 3 * k
}

impl Fixture {
    pub fn new() -> Self {
        Self::with_base(&tiny_weights(1))
    }

    pub fn with_base(weights: &Tensors) -> Self {
        Self::with_config(weights, &json!({}))
    }

    /// A base with experts.
    pub fn with_experts() -> Self {
        Self::with_config(&tiny_expert_weights(1), &tiny_expert_fields())
    }

    /// A base with the fields `more` in its config.json.
    fn with_config(weights: &Tensors, more: &Value) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = write_tiny_model(&dir.path().join("base"), 1);
        let mut config = read_json(&base.join("config.json"));
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        write_json(&base.join("config.json"), &config);
        fs::remove_file(base.join("model.safetensors")).unwrap();
        write_safetensors(&base.join("model.safetensors"), weights);
        let tasks = write_tasks(&dir.path().join("data"));
        for (k, task) in TASKS.iter().enumerate() {
            write_mask(&dir.path().join(format!("{task}.safetensors")), &base, |_, i| core(k, i));
        }
        let f = Self { dir, base, tasks };
        f.group(&f.base, &[&["count"], &["copy", "pick"]]);
        f
    }

    /// Writes groups.json for `base` and the fixture's masks.
    pub fn group(&self, base: &Path, groups: &[&[&str]]) {
        let masks = TASKS.map(|t| (t, self.path(&format!("{t}.safetensors"))));
        let masks: Vec<(&str, &Path)> = masks.iter().map(|(t, p)| (*t, p.as_path())).collect();
        write_groups(&self.path("groups.json"), base, groups, &masks);
    }

    /// Sets the weight of `task` in tasks.toml.
    pub fn weigh(&self, task: &str, weight: &str) {
        let name = format!("name = \"{task}\"");
        let text = fs::read_to_string(&self.tasks).unwrap();
        assert!(text.contains(&name), "{text}");
        fs::write(&self.tasks, text.replace(&name, &format!("{name}\nweight = {weight}"))).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn train(&self, out: &str, more: &[&str]) -> Run {
        run(PROGRAM, self.arguments(out, more))
    }

    /// Arguments of a run into `out`.
    pub fn arguments(&self, out: &str, more: &[&str]) -> Vec<String> {
        let out = self.path("runs").join(out);
        let fixed = ["run", "--model", self.base.to_str().unwrap(), "--tasks", self.tasks.to_str().unwrap()];
        let fixed = fixed.into_iter().chain(["--out", out.to_str().unwrap(), "--device", "cpu", "--threads", "1"]);
        let usual = [["--lr", "1e-2"], ["--weight-decay", "0.1"], ["--batch-size", "4"]];
        let usual = usual.iter().filter(|pair| !more.contains(&pair[0])).flatten();
        fixed.chain(usual.copied()).chain(more.iter().copied()).map(str::to_owned).collect()
    }

    /// Arguments of a staged run: groups.json and a mask for every task.
    pub fn stages(&self) -> Vec<String> {
        let masks = TASKS
            .iter()
            .flat_map(|t| ["--mask".to_owned(), format!("{t}={}", self.path(&format!("{t}.safetensors")).display())]);
        ["--groups".to_owned(), self.path("groups.json").display().to_string()].into_iter().chain(masks).collect()
    }

    pub fn staged(&self, out: &str, more: &[&str]) -> Run {
        let stages = self.stages();
        let all: Vec<&str> = stages.iter().map(String::as_str).chain(more.iter().copied()).collect();
        self.train(out, &all)
    }

    /// Kills a run as soon as its state after `step` exists, and removes later states.
    pub fn killed_at(&self, out: &str, args: &[&str], step: usize) {
        let state = self.path(&format!("runs/{out}.checkpoints/step-{step:07}"));
        for _ in 0..50 {
            let args = [args, &["--force"]].concat();
            let mut child =
                Command::new(PROGRAM).args(self.arguments(out, &args)).stderr(Stdio::null()).spawn().unwrap();
            while !state.exists() && child.try_wait().unwrap().is_none() {
                sleep(Duration::from_millis(1));
            }
            child.kill().unwrap();
            child.wait().unwrap();
            // A run that ended before it was killed has removed its states.
            if state.exists() {
                for entry in fs::read_dir(state.parent().unwrap()).unwrap().flatten() {
                    let later = entry.file_name().to_str().and_then(|n| n.strip_prefix("step-")?.parse::<usize>().ok());
                    if later.is_some_and(|later| later > step) {
                        fs::remove_dir_all(entry.path()).unwrap();
                    }
                }
                return;
            }
            let _ = fs::remove_dir_all(self.path("runs").join(out));
        }
        panic!("no run could be killed after step {step}");
    }

    pub fn read(&self, out: &str) -> Tensors {
        read_checkpoint(&self.path("runs").join(out))
    }

    pub fn facts(&self, out: &str) -> Value {
        read_json(&self.path("runs").join(out).join("cpift.json"))["facts"].clone()
    }
}

pub fn read_json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// Bytes of element `i`.
pub fn element(t: &Tensor, i: usize) -> &[u8] {
    &t.bytes[i * t.dtype.size()..(i + 1) * t.dtype.size()]
}

/// Asserts that exactly the core of `count`, the first group, kept its bits; in bf16 a free element
/// may by chance.
pub fn assert_frozen(before: &Tensors, after: &Tensors) {
    let (mut free, mut moved) = (0, 0);
    for (name, b) in before {
        let a = &after[name];
        assert_eq!(a.dtype, b.dtype);
        for i in 0..b.bytes.len() / b.dtype.size() {
            let same = element(a, i) == element(b, i);
            if core(1, i) {
                assert!(same, "{name}[{i}] is core to the first group and changed");
            } else {
                free += 1;
                moved += usize::from(!same);
            }
        }
    }
    assert!(moved * 10 > free * 9, "only {moved} of {free} free elements moved");
}

/// Weights in which every fifth element is −0.0.
pub fn with_negative_zeros(dtype: Dtype) -> Tensors {
    let mut weights = tiny_weights(1);
    for tensor in weights.values_mut() {
        let mut values = tensor.values();
        values.iter_mut().step_by(5).for_each(|v| *v = -0.0);
        *tensor = Tensor::floats(dtype, &tensor.shape, &values);
    }
    weights
}
