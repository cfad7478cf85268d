//! Low-rank adapters through the real binary: what is saved, resumed and refused.

use std::collections::BTreeSet;
use std::fs;

use crate::common::{Fixture, read_json};
use cpift_core::Checkpoint;
use cpift_core::format::checkpoint::read_lora;
use cpift_testkit::{expect_entries, read_checkpoint};
use serde_json::json;

/// Largest difference of the weights of `base+adapter` from those of the checkpoint `out`.
fn difference(f: &Fixture, adapter: &str, out: &str) -> f32 {
    let path = format!("{}+{}", f.base.display(), f.path("runs").join(adapter).display());
    let (sum, merged) = (Checkpoint::open(path.as_ref()).unwrap(), f.read(out));
    let mut most = 0f32;
    for view in sum.parameters() {
        let mut values = vec![0f32; view.numel()];
        view.read(0, &mut values);
        let pairs = values.iter().zip(merged[view.name].values());
        most = pairs.fold(most, |most, (a, b)| most.max((a - b).abs()));
    }
    most
}

#[test]
fn adapters_are_a_peft_directory_that_gives_the_merged_model() {
    let f = Fixture::new();
    let shared = ["--lora-rank", "3", "--lora-alpha", "5", "--lora-target", "q_proj,mlp.down_proj", "--steps", "6"];
    let train = |out: &str, more: &[&str]| f.train(out, &[&shared, more].concat()).ok();
    train("adapter", &["--lora-output", "adapter", "--lora-rslora"]);
    train("merged", &["--lora-rslora"]);
    train("plain", &[]);
    let folder = f.path("runs/adapter");
    expect_entries(&folder, &["adapter_config.json", "adapter_model.safetensors", "cpift.json", "metrics.jsonl"]);
    let config = read_json(&folder.join("adapter_config.json"));
    for (key, value) in [
        ("peft_type", json!("LORA")),
        ("task_type", json!("CAUSAL_LM")),
        ("r", json!(3)),
        ("lora_alpha", json!(5)),
        ("lora_dropout", json!(0.0)),
        ("use_rslora", json!(true)),
        ("target_modules", json!(["q_proj", "mlp.down_proj"])),
        ("base_model_name_or_path", json!(f.base)),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    let pairs = read_lora(&folder).unwrap().pairs;
    let names: BTreeSet<String> = pairs.into_values().flat_map(|pair| [pair.names.0, pair.names.1]).collect();
    let factor =
        |layer: i32, module: &str, x: &str| format!("base_model.model.model.layers.{layer}.{module}.lora_{x}.weight");
    let expected = ["self_attn.q_proj", "mlp.down_proj"]
        .iter()
        .flat_map(|module| [0, 1].into_iter().flat_map(move |layer| ["A", "B"].map(|x| factor(layer, module, x))));
    assert_eq!(names, expected.collect());
    assert!(difference(&f, "adapter", "merged") < 1e-6);
    assert!(difference(&f, "adapter", "plain") > 1e-4, "the scale of rsLoRA is another");
    assert_eq!(f.facts("adapter")["lora"]["rank_stabilized"], true);
    // The record belongs to the output.
    train("adapter", &["--lora-output", "adapter", "--lora-rslora", "--resume"]).says(&["is finished already"]);
    train("adapter", &["--lora-output", "adapter", "--lora-rslora", "--skip-up-to-date"]).says(&["up to date"]);
}

/// A base in f32 of which the computation sees bf16 is merged as f32.
#[test]
fn merging_does_not_round_the_base() {
    let f = Fixture::new();
    f.train("a", &["--lora-rank", "2", "--lora-target", "v_proj", "--steps", "2", "--compute-dtype", "bf16"]).ok();
    let (before, after) = (read_checkpoint(&f.base), f.read("a"));
    for (name, b) in &before {
        assert_eq!(after[name].bytes == b.bytes, !name.contains("v_proj"), "{name}");
    }
}

#[test]
fn a_killed_run_of_adapters_ends_the_same() {
    let f = Fixture::new();
    let groups = f.path("groups.json").display().to_string();
    for (more, dtype) in [
        (vec!["--steps", "12", "--grad-accum", "2", "--max-grad-norm", "0.05"], "f32"),
        (vec!["--steps", "12", "--groups", &groups, "--no-freeze", "--optim-state-dtype", "bf16"], "bf16"),
    ] {
        let common = ["--lora-rank", "2", "--lora-output", "adapter", "--compute-dtype", dtype];
        let args = [&common[..], &more].concat();
        f.train("quiet", &[&args[..], &["--force"]].concat()).ok();
        let saving = [&args[..], &["--save-every", "1", "--save-total-limit", "100"]].concat();
        let _ = fs::remove_dir_all(f.path("runs/killed"));
        // In the second case, within the second of two stages.
        f.killed_at("killed", &saving, 8);
        let state = f.path("runs/killed.checkpoints/step-0000008/rank-0-of-1.safetensors");
        let base = fs::metadata(f.base.join("model.safetensors")).unwrap().len();
        assert!(fs::metadata(state).unwrap().len() < base, "a state has no weights of the base");
        f.train("killed", &[&saving[..], &["--resume"]].concat()).ok().says(&["resuming from", "step-0000008"]);
        let bytes = |out: &str| fs::read(f.path("runs").join(out).join("adapter_model.safetensors")).unwrap();
        assert!(bytes("quiet") == bytes("killed"), "another end after {args:?}");
    }
    f.train("other", &["--lora-rank", "2", "--steps", "3"]).ok();
    f.train("other", &["--lora-rank", "3", "--steps", "3", "--resume"]).bad_input(&["another lora"]);
}

#[test]
fn what_adapters_do_not_go_with_is_refused() {
    let f = Fixture::new();
    let groups = f.path("groups.json").display().to_string();
    let mask = f.path("count.safetensors").display().to_string();
    let states = f.path("states").display().to_string();
    for (more, part) in [
        (vec!["--lora-dropout", "0.1"], "--lora-dropout must be 0"),
        (vec!["--lora-alpha", "-1"], "must be positive"),
        (vec!["--master-dtype", "bf16"], "leave out --master-dtype"),
        (vec!["--offload", "all", "--offload-dir", &states], "--offload exclude each other"),
        (vec!["--add", "pick", "--protect", &mask], "leave out --mask, --protect"),
        (vec!["--groups", &groups, "--isolation", "dynamic"], "--isolation dynamic"),
        (vec!["--lora-target", "c_attn"], "--lora-target c_attn is no linear layer"),
        (vec!["--lora-target", ""], "--lora-target"),
    ] {
        f.train("out", &[&["--lora-rank", "2"], &more[..]].concat()).usage_error(&[part]);
    }
    let staged = ["--lora-rank", "2", "--steps", "2"];
    f.staged("out", &staged).usage_error(&["leave out --mask"]);
    f.train("out", &["--lora-output", "adapter"]).usage_error(&["they need --lora-rank"]);
    f.train("out", &["--lora-target", "q_proj"]).usage_error(&["they need --lora-rank"]);
    assert!(!f.path("runs/out").exists());
}
