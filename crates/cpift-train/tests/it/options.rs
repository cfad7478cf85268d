//! The training options of cpift-train through the real binary: the effect of each, and that frozen
//! elements keep their bits under all.

use crate::common;
use std::fs;

use crate::common::{Fixture, assert_frozen, read_json, with_negative_zeros};
use cpift_core::Dtype;
use cpift_testkit::Tensor;
use cpift_testkit::masks::write_groups;
use cpift_testkit::model::{tiny_weights, write_json};
use serde_json::{Value, json};

fn metrics(f: &Fixture, out: &str) -> Vec<Value> {
    let text = fs::read_to_string(f.path("runs").join(out).join("metrics.jsonl")).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[test]
fn the_cores_of_earlier_groups_keep_their_bits_under_every_option() {
    let in_backward = ["--gradient-checkpointing", "--optimizer-in-backward", "--max-grad-norm", "0"];
    for (i, options) in [
        vec!["--packing", "--grad-accum", "2", "--max-length", "64"],
        in_backward.to_vec(),
        vec!["--optim-state-dtype", "bf16", "--loss-chunk", "3"],
        [&in_backward[..], &["--master-dtype", "bf16", "--optim-state-dtype", "bf16"]].concat(),
        vec!["--master-dtype", "bf16", "--compute-dtype", "bf16", "--grad-accum", "2"],
    ]
    .into_iter()
    .enumerate()
    {
        // bf16 weights are exact in memory only if the base is bf16.
        let dtype = if options.contains(&"--master-dtype") { Dtype::BF16 } else { Dtype::F32 };
        let f = Fixture::with_base(&with_negative_zeros(dtype));
        let first = f.path("first.json");
        write_groups(&first, &f.base, &[&["count"]], &[]);
        let only = ["--groups", first.to_str().unwrap(), "--no-freeze", "--steps", "4", "--sample", "balanced"];
        f.train(&format!("first-{i}"), &[&only[..], &options].concat()).ok();
        f.staged(&format!("staged-{i}"), &[&["--steps", "8", "--stage-data", "group"], &options[..]].concat()).ok();
        assert!(f.facts(&format!("staged-{i}"))["stages"][1]["frozen_elements"].as_u64() > Some(0));
        assert_frozen(&f.read(&format!("first-{i}")), &f.read(&format!("staged-{i}")));
    }
}

#[test]
fn what_rounds_frozen_elements_is_warned_of() {
    let f = Fixture::new();
    f.staged("master", &["--steps", "2", "--master-dtype", "bf16"]).ok().says(&[
        "--master-dtype BF16 rounds",
        "F32",
        "frozen elements",
    ]);
    f.staged("saved", &["--steps", "2", "--save-dtype", "f16"])
        .ok()
        .says(&["--save-dtype F16 rounds", "frozen elements"]);
    // Nothing is frozen, or nothing is rounded.
    assert!(!f.train("plain", &["--steps", "2", "--master-dtype", "bf16"]).ok().stderr.contains("rounds"));
    let f = Fixture::with_base(&with_negative_zeros(Dtype::BF16));
    assert!(!f.staged("bf16", &["--steps", "2", "--master-dtype", "bf16"]).ok().stderr.contains("rounds"));
}

#[test]
fn recomputation_and_updates_in_the_backward_pass_change_no_byte() {
    let f = Fixture::new();
    let weights = |out: &str, more: &[&str]| {
        f.staged(out, &[&["--steps", "6", "--max-grad-norm", "0"], more].concat()).ok();
        fs::read(f.path("runs").join(out).join("model.safetensors")).unwrap()
    };
    let plain = weights("plain", &[]);
    assert!(plain == weights("recomputed", &["--gradient-checkpointing"]));
    assert!(plain == weights("in-backward", &["--gradient-checkpointing", "--optimizer-in-backward"]));
    assert!(plain != weights("clipped", &["--freeze-embeddings"]));
}

#[test]
fn updates_in_the_backward_pass_refuse_what_needs_all_gradients() {
    let f = Fixture::new();
    f.train("out", &["--optimizer-in-backward"]).usage_error(&["--max-grad-norm 0"]);
    f.train("out", &["--optimizer-in-backward", "--max-grad-norm", "0", "--grad-accum", "2"])
        .usage_error(&["--grad-accum 1"]);
    f.train("out", &["--master-dtype", "f16"]).usage_error(&["--master-dtype must be f32 or bf16"]);
}

#[test]
fn held_out_losses_are_logged_and_fall() {
    let f = Fixture::new();
    f.train("out", &["--steps", "40", "--eval-every", "20", "--eval-rows", "5"]).ok();
    let losses: Vec<Value> = metrics(&f, "out").into_iter().filter(|l| !l["eval_loss"].is_null()).collect();
    let steps: Vec<u64> = losses.iter().map(|l| l["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [20, 40]);
    for task in common::TASKS {
        let loss = |i: usize| losses[i]["eval_loss"][task].as_f64().unwrap();
        assert!(loss(1) < loss(0), "{task}: {} then {}", loss(0), loss(1));
    }
    // Held-out losses do not change the weights.
    f.train("blind", &["--steps", "40"]).ok();
    let weights = |out: &str| fs::read(f.path("runs").join(out).join("model.safetensors")).unwrap();
    assert!(weights("out") == weights("blind"));
}

#[test]
fn packing_fills_rows_with_whole_examples() {
    let f = Fixture::new();
    let tokens = |out: &str, more: &[&str]| {
        f.train(out, &[&["--steps", "1", "--max-length", "96"], more].concat()).ok();
        metrics(&f, out)[0]["tokens"].as_u64().unwrap()
    };
    // Four rows of at most 96 tokens, each too full for another example.
    let packed = tokens("packed", &["--packing"]);
    let plain = tokens("plain", &[]);
    assert!(packed <= 4 * 96 && packed > 2 * plain, "{packed} tokens packed, {plain} in four examples");
}

#[test]
fn each_stage_can_have_its_own_rate() {
    let f = Fixture::new();
    f.staged("out", &["--steps", "8", "--stage-lr", "1e-2,5e-4", "--warmup-ratio", "0"]).ok();
    let lines = metrics(&f, "out");
    let peak = |stage: &str| {
        let own = lines.iter().filter(|l| l["stage"].as_str().unwrap().starts_with(stage));
        own.map(|l| l["lr"].as_f64().unwrap()).fold(0.0, f64::max)
    };
    assert_eq!((peak("stage 1/2"), peak("stage 2/2")), (1e-2, 5e-4));
    f.staged("bad", &["--steps", "8", "--stage-lr", "1e-2"]).usage_error(&["1 rates for 2 stages"]);
}

#[test]
fn a_bad_gradient_in_the_backward_pass_says_what_has_moved() {
    // Gradients in the first block whose squares are too large for f32, under a loss of the usual
    // size.
    let mut weights = tiny_weights(1);
    for (name, tensor) in &mut weights {
        let scale = match name.strip_prefix("model.layers.0.") {
            Some("input_layernorm.weight") => 1e30,
            Some("self_attn.q_proj.weight" | "self_attn.k_proj.weight" | "self_attn.v_proj.weight") => 1e-30,
            _ => continue,
        };
        *tensor = Tensor::f32(&tensor.shape, &tensor.values().iter().map(|v| v * scale).collect::<Vec<_>>());
    }
    let f = Fixture::with_base(&weights);
    let more = ["--steps", "3", "--only", "copy", "--max-grad-norm", "0"];
    let failed =
        f.train("after", &more).expect_code(1).says(&["step 1: loss 5.", "norm inf; stopped before the update"]);
    assert!(!failed.stderr.contains("already"));
    f.train("during", &[&more[..], &["--optimizer-in-backward"]].concat()).expect_code(1).says(&[
        "step 1: loss 5.",
        "norm inf",
        "blocks above the first bad gradient were updated already",
    ]);
}

#[test]
fn a_loss_that_is_not_finite_names_the_rows() {
    let f = Fixture::new();
    // A rate so high that the second loss is NaN.
    let more = ["--steps", "60", "--lr", "1e30", "--warmup-ratio", "0", "--only", "copy", "--batch-size", "9"];
    f.train("out", &more).expect_code(1).says(&["stopped before the update", "copy/train.jsonl line ", ", and 1 more"]);
    assert!(!f.path("runs/out").exists());
}

#[test]
fn a_head_of_its_own_under_a_tied_config_is_trained_and_saved() {
    const HEAD: &str = "lm_head.weight";
    let mut weights = tiny_weights(1);
    weights.insert(HEAD.into(), tiny_weights(2)["model.embed_tokens.weight"].clone());
    let f = Fixture::with_base(&weights);
    let steps = ["--steps", "3"];
    f.train("tied", &steps).ok().says(&[HEAD, "config.json ties them"]);
    let trained = f.read("tied");
    let moved = trained[HEAD].values().iter().zip(weights[HEAD].values()).filter(|(a, b)| **a != *b).count();
    assert!(moved * 10 > trained[HEAD].values().len() * 9, "{moved} elements of {HEAD} moved");
    assert_eq!(read_json(&f.path("runs/tied/config.json"))["tie_word_embeddings"], json!(false));
    // The same as from a config that says so.
    let mut config = read_json(&f.base.join("config.json"));
    config["tie_word_embeddings"] = json!(false);
    write_json(&f.base.join("config.json"), &config);
    f.train("untied", &steps).ok();
    let read = |out: &str| fs::read(f.path("runs").join(out).join("model.safetensors")).unwrap();
    assert!(read("tied") == read("untied"));
}
