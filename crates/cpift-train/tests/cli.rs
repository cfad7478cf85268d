//! cpift-train through the real binary.

use std::fs;
use std::path::{Path, PathBuf};

use cpift_core::Dtype;
use cpift_testkit::masks::{write_groups, write_mask};
use cpift_testkit::model::{tiny_weights, write_tasks, write_tiny_model};
use cpift_testkit::{Run, Tensor, Tensors, expect_entries, read_checkpoint, run, write_safetensors};
use serde_json::Value;

const TASKS: [&str; 3] = ["copy", "count", "pick"];

struct Fixture {
    dir: tempfile::TempDir,
    base: PathBuf,
    tasks: PathBuf,
}

/// Which elements are core to the task number `k`: every eleventh, shifted by the task.
fn core(k: usize, index: usize) -> bool {
    index % 11 == 3 * k
}

impl Fixture {
    fn new() -> Self {
        Self::with_base(&tiny_weights(1))
    }

    fn with_base(weights: &Tensors) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = write_tiny_model(&dir.path().join("base"), 1);
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
    fn group(&self, base: &Path, groups: &[&[&str]]) {
        let masks = TASKS.map(|t| (t, self.path(&format!("{t}.safetensors"))));
        let masks: Vec<(&str, &Path)> = masks.iter().map(|(t, p)| (*t, p.as_path())).collect();
        write_groups(&self.path("groups.json"), base, groups, &masks);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn train(&self, out: &str, more: &[&str]) -> Run {
        let out = self.path("runs").join(out);
        let fixed = ["run", "--model", self.base.to_str().unwrap(), "--tasks", self.tasks.to_str().unwrap()];
        let fixed = fixed.into_iter().chain(["--out", out.to_str().unwrap(), "--lr", "1e-2", "--weight-decay", "0.1"]);
        let fixed = fixed.chain(["--device", "cpu", "--threads", "1", "--batch-size", "4"]);
        run(env!("CARGO_BIN_EXE_cpift-train"), fixed.chain(more.iter().copied()))
    }

    fn staged(&self, out: &str, more: &[&str]) -> Run {
        let groups = self.path("groups.json");
        let masks: Vec<String> =
            TASKS.iter().map(|t| format!("{t}={}", self.path(&format!("{t}.safetensors")).display())).collect();
        let mut args = vec!["--groups", groups.to_str().unwrap()];
        masks.iter().for_each(|m| args.extend(["--mask", m]));
        args.extend(more);
        self.train(out, &args)
    }

    fn read(&self, out: &str) -> Tensors {
        read_checkpoint(&self.path("runs").join(out))
    }

    fn facts(&self, out: &str) -> Value {
        read_json(&self.path("runs").join(out).join("cpift.json"))["facts"].clone()
    }
}

fn read_json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// Bytes of element `i`.
fn element(t: &Tensor, i: usize) -> &[u8] {
    &t.bytes[i * t.dtype.size()..(i + 1) * t.dtype.size()]
}

/// Asserts that exactly the core of `count`, the first group, kept its bits; in bf16 a free element may by chance.
fn assert_frozen(before: &Tensors, after: &Tensors) {
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
fn with_negative_zeros(dtype: Dtype) -> Tensors {
    let mut weights = tiny_weights(1);
    for tensor in weights.values_mut() {
        let mut values = tensor.values();
        values.iter_mut().step_by(5).for_each(|v| *v = -0.0);
        *tensor = Tensor::floats(dtype, &tensor.shape, &values);
    }
    weights
}

#[test]
fn the_cores_of_earlier_groups_keep_their_bits_in_f32_and_bf16() {
    for (dtype, name) in [(Dtype::F32, "f32"), (Dtype::BF16, "bf16")] {
        let f = Fixture::with_base(&with_negative_zeros(dtype));
        // The stage before the freeze moves the core too: stop it there first, to know what the second stage starts from.
        let first = f.path("first.json");
        write_groups(&first, &f.base, &[&["count"]], &[]);
        let first = first.to_str().unwrap();
        f.train(
            "first",
            &["--groups", first, "--no-freeze", "--steps", "4", "--save-dtype", name, "--sample", "balanced"],
        )
        .ok();
        f.staged("staged", &["--steps", "8", "--save-dtype", name]).ok();
        let stages = f.facts("staged")["stages"].clone();
        assert_eq!(stages[0]["frozen_elements"], 0);
        assert_eq!(stages[1]["frozen_tasks"], serde_json::json!(["count"]));
        assert_frozen(&f.read("first"), &f.read("staged"));
    }
}

#[test]
fn without_freezing_the_cores_move() {
    let f = Fixture::new();
    let groups = f.path("groups.json");
    f.train("plain", &["--groups", groups.to_str().unwrap(), "--no-freeze", "--steps", "8"]).ok();
    let stages = f.facts("plain")["stages"].as_array().unwrap().clone();
    assert_eq!(stages.len(), 2);
    assert!(stages.iter().all(|s| s["frozen_elements"] == 0 && s["steps"] == 4));
    let (before, after) = (read_checkpoint(&f.base), f.read("plain"));
    let moved = before
        .iter()
        .all(|(n, b)| (0..b.bytes.len() / 4).any(|i| core(1, i) && element(&after[n], i) != element(b, i)));
    assert!(moved);
}

#[test]
fn without_groups_it_is_one_stage_over_all_rows() {
    let f = Fixture::new();
    f.train("sft", &["--steps", "3"]).ok();
    let stages = f.facts("sft")["stages"].as_array().unwrap().clone();
    assert_eq!((stages.len(), stages[0]["examples"].as_u64()), (1, Some(36)));
    f.train("again", &["--steps", "3"]).ok();
    let bytes = |out: &str| fs::read(f.path("runs").join(out).join("model.safetensors")).unwrap();
    assert_eq!(bytes("sft"), bytes("again"), "a rerun gives the same bytes");
    f.train("one", &["--steps", "1", "--only", "pick"]).ok();
    assert_eq!(f.facts("one")["stages"][0]["examples"], 12);
    assert_ne!(bytes("one"), fs::read(f.base.join("model.safetensors")).unwrap(), "a single step moves the weights");
}

#[test]
fn stages_see_their_groups_rows_or_all_and_samples_are_balanced() {
    let f = Fixture::new();
    let examples = |out: &str| -> Vec<u64> {
        f.facts(out)["stages"].as_array().unwrap().iter().map(|s| s["examples"].as_u64().unwrap()).collect()
    };
    f.staged("group", &["--steps", "2", "--sample", "5"]).ok();
    assert_eq!(examples("group"), [5, 10]);
    f.staged("mixed", &["--steps", "2", "--sample", "5", "--stage-data", "mixed"]).ok();
    assert_eq!(examples("mixed"), [15, 15]);
    // Balanced, the default when freezing: as many rows as the smallest task has.
    let few = fs::read_to_string(f.path("data/copy/train.jsonl")).unwrap();
    fs::write(f.path("data/copy/train.jsonl"), few.lines().take(7).map(|l| format!("{l}\n")).collect::<String>())
        .unwrap();
    f.staged("balanced", &["--steps", "2"]).ok();
    assert_eq!(examples("balanced"), [7, 14]);
}

#[test]
fn masks_and_groups_must_belong_to_the_base() {
    let f = Fixture::new();
    let none_left = || assert!(!f.path("runs").exists() || fs::read_dir(f.path("runs")).unwrap().count() == 0);
    let other = write_tiny_model(&f.path("other"), 2);
    let good = fs::read(f.path("pick.safetensors")).unwrap();
    write_mask(&f.path("pick.safetensors"), &other, |_, i| core(2, i));
    f.staged("out", &["--steps", "2"]).bad_input(&["pick.safetensors", "not the mask of pick", "expected: digest"]);
    f.group(&f.base, &[&["count"], &["copy", "pick"]]);
    f.staged("out", &["--steps", "2"]).bad_input(&["pick.safetensors", "another base", "expected: base digest"]);
    none_left();
    fs::write(f.path("pick.safetensors"), &good).unwrap();
    f.group(&other, &[&["count"], &["copy", "pick"]]);
    f.staged("out", &["--steps", "2"]).bad_input(&["groups.json", "another base", "--base DIR"]);
    f.group(&f.base, &[&["count"], &["copy"]]);
    f.staged("out", &["--steps", "2"]).bad_input(&["groups.json", "pick"]);
    f.group(&f.base, &[&["count"], &["copy", "pick", "fourth"]]);
    f.staged("out", &["--steps", "2"]).bad_input(&["fourth"]);
    none_left();
}

#[test]
fn a_damaged_mask_is_refused() {
    let f = Fixture::new();
    let path = f.path("count.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 0x80;
    fs::write(&path, bytes).unwrap();
    f.group(&f.base, &[&["count"], &["copy", "pick"]]);
    f.staged("out", &["--steps", "2"]).bad_input(&["count.safetensors", "bits"]);
    assert!(!f.path("runs/out").exists());
}

#[test]
fn a_fused_model_is_trained_with_masks_of_its_base() {
    let f = Fixture::new();
    let fused = write_tiny_model(&f.path("fused"), 3);
    let base = f.base.clone();
    let f = Fixture { base: fused.clone(), ..f };
    f.staged("out", &["--steps", "4", "--base", base.to_str().unwrap()]).ok();
    let stage = &f.facts("out")["stages"][1];
    let elements: usize =
        read_checkpoint(&fused).values().map(|t| (0..t.bytes.len() / 4).filter(|&i| core(1, i)).count()).sum();
    assert_eq!(stage["frozen_elements"].as_u64(), Some(elements as u64));
}

#[test]
fn wrong_combinations_are_usage_errors() {
    let f = Fixture::new();
    let groups = f.path("groups.json");
    let groups = groups.to_str().unwrap();
    f.train("out", &["--groups", groups]).usage_error(&["--mask NAME=FILE", "--no-freeze"]);
    f.train("out", &["--no-freeze"]).usage_error(&["--groups"]);
    f.train("out", &["--sample", "some"]).usage_error(&["some"]);
    f.train("out", &["--groups", groups, "--no-freeze", "--steps", "1"]).usage_error(&["2 stages"]);
    f.train("out", &["--steps", "5", "--lr", "0"]).usage_error(&["--lr"]);
}

#[test]
fn a_loss_that_is_not_finite_stops_before_the_update_and_leaves_nothing() {
    let f = Fixture::new();
    fs::create_dir(f.path("runs")).unwrap();
    f.train("out", &["--steps", "20", "--warmup-ratio", "0", "--max-grad-norm", "0", "--only", "copy"]).ok();
    let mut weights = tiny_weights(1);
    weights
        .values_mut()
        .for_each(|t| *t = Tensor::f32(&t.shape, &t.values().iter().map(|v| v * 1e30).collect::<Vec<_>>()));
    fs::remove_file(f.base.join("model.safetensors")).unwrap();
    write_safetensors(&f.base.join("model.safetensors"), &weights);
    f.train("bad", &["--steps", "2"]).expect_code(1).says(&["step 1", "stopped before the update", "--lr"]);
    expect_entries(&f.path("runs"), &["out"]);
}
