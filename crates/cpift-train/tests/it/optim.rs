//! The optimizers through the real binary.

use crate::common::Fixture;
use cpift_core::Dtype;
use cpift_testkit::read_checkpoint;

/// Arguments of a run in which optimizers can be compared.
const STEPS: [&str; 2] = ["--steps", "12"];

fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&STEPS[..], more].concat()
}

#[test]
fn moments_of_8_bits_train_nearly_as_those_of_32() {
    let f = Fixture::new();
    f.train("wide", &with(&[])).ok();
    f.train("narrow", &with(&["--optim", "adamw_8bit"])).ok();
    let loss = |out: &str| f.facts(out)["stages"][0]["final_loss"].as_f64().unwrap();
    let first = f.facts("wide")["stages"][0]["first_loss"].as_f64().unwrap();
    assert!(loss("wide") < first - 0.5, "training lowers the loss");
    assert!((loss("narrow") - loss("wide")).abs() < 0.1 * (first - loss("wide")));
    assert!(f.read("narrow") != f.read("wide"));
    // Tensors below 4096 elements have moments in f32: the first step moves them alike.
    f.train("wide1", &["--steps", "1"]).ok();
    f.train("narrow1", &["--steps", "1", "--optim", "adamw_8bit"]).ok();
    assert!(f.read("narrow1")["model.norm.weight"] == f.read("wide1")["model.norm.weight"]);
}

#[test]
fn a_state_has_codes_and_largest_values_of_blocks() {
    let f = Fixture::new();
    let args = with(&["--optim", "adamw_8bit", "--save-every", "1", "--save-total-limit", "100"]);
    f.killed_at("killed", &args, 4);
    let state = read_checkpoint(&f.path("runs/killed.checkpoints/step-0000004/rank-0-of-1.safetensors"));
    let (table, name) = (&state["weights/model.embed_tokens.weight"], "moments/model.embed_tokens.weight.exp_avg");
    let elements = table.bytes.len() / 4;
    assert_eq!((state[name].dtype, state[name].bytes.len()), (Dtype::U8, elements));
    assert_eq!(state[&format!("{name}_absmax")].shape, [elements.div_ceil(256)]);
    assert_eq!(state["moments/model.norm.weight.exp_avg"].dtype, Dtype::F32);
    // Names of transformers are the same optimizer.
    let same = with(&["--optim", "adamw_bnb_8bit", "--resume", "--save-every", "1"]);
    f.train("killed", &same).ok().says(&["resuming from", "step-0000004"]);
    f.train("killed", &with(&["--resume", "--optim", "adamw_torch"])).bad_input(&["another optim"]);
}

#[test]
fn what_8_bits_do_not_go_with_is_refused() {
    let f = Fixture::new();
    let states = f.path("states").display().to_string();
    let refused = |more: &[&str], part: &str| {
        let args = with(&[&["--optim", "adamw_8bit"], more].concat());
        f.train("out", &args).usage_error(&[part]);
    };
    refused(&["--optim-state-dtype", "bf16"], "leave out --optim-state-dtype");
    refused(&["--offload", "optimizer", "--offload-dir", &states], "leave out --offload");
    f.train("out", &with(&["--optim", "sgd"])).usage_error(&["--optim"]);
    assert!(!f.path("runs/out").exists());
}
