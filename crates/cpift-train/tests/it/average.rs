//! `--average-last` through the real binary.

use std::fs;

use crate::common::{Fixture, core, element, read_json};
use cpift_testkit::{Tensor, Tensors};

/// The mean of the weights of several checkpoints, in f64, rounded to f32.
fn mean(models: &[Tensors]) -> Tensors {
    let of = |(name, first): (&String, &Tensor)| {
        let all: Vec<Vec<f32>> = models.iter().map(|model| model[name].values()).collect();
        let sum = |i: usize| all.iter().map(|values| f64::from(values[i])).sum::<f64>();
        let values: Vec<f32> = (0..all[0].len()).map(|i| (sum(i) / models.len() as f64) as f32).collect();
        (name.clone(), Tensor::f32(&first.shape, &values))
    };
    models[0].iter().map(of).collect()
}

/// With a constant rate, a run of s steps ends with the weights that a longer one has after s.
const CONSTANT: [&str; 2] = ["--lr-scheduler", "constant"];

fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&CONSTANT[..], more].concat()
}

#[test]
fn the_output_is_the_mean_at_the_last_saved_steps_and_the_end() {
    let f = Fixture::new();
    for steps in ["6", "9", "10", "12"] {
        f.train(&format!("to{steps}"), &with(&["--steps", steps])).ok();
    }
    let at = |steps: &[&str]| mean(&steps.iter().map(|s| f.read(&format!("to{s}"))).collect::<Vec<_>>());
    let average = |out: &str, more: &[&str]| f.train(out, &with(&[&["--save-every", "3"], more].concat())).ok();
    average("uneven", &["--steps", "10", "--average-last", "3"]).says(&["averaging the weights at 3 saved steps"]);
    assert!(f.read("uneven") == at(&["6", "9", "10"]));
    average("even", &["--steps", "12", "--average-last", "2"]);
    assert!(f.read("even") == at(&["9", "12"]));
    average("one", &["--steps", "12", "--average-last", "1"]);
    assert!(f.read("one") == f.read("to12"));
    assert!(!f.path("runs/even.checkpoints").exists());
    assert_eq!(read_json(&f.path("runs/even/cpift.json"))["facts"]["run"]["average_last"], serde_json::json!([2, 3]));
}

/// States of steps that a signal saved are not averaged, and those that are needed stay.
#[test]
fn a_killed_run_ends_the_same_and_needs_its_states() {
    let f = Fixture::new();
    let args = with(&["--steps", "14", "--save-every", "3", "--average-last", "4"]);
    f.train("quiet", &args).ok();
    f.killed_at("killed", &args, 9);
    let states = f.path("runs/killed.checkpoints");
    let has = |step: usize| states.join(format!("step-{step:07}")).exists();
    assert!(!has(3) && has(6) && has(9));
    f.train("killed", &[&args[..], &["--resume"]].concat()).ok().says(&["resuming from", "step-0000009"]);
    assert!(f.read("killed") == f.read("quiet"));
    fs::remove_dir_all(f.path("runs/killed")).unwrap();
    f.killed_at("killed", &args, 9);
    fs::remove_dir_all(states.join("step-0000006")).unwrap();
    let resumed = f.train("killed", &[&args[..], &["--resume"]].concat());
    resumed.bad_input(&["step-0000006", "--average-last needs it"]);
}

/// Averaging does not change the bits of frozen elements, and stays within the last stage.
#[test]
fn frozen_elements_keep_their_bits() {
    let f = Fixture::new();
    let stages = |more: &[&'static str]| [&["--steps", "24", "--sample", "all"], more].concat();
    f.staged("last", &stages(&[])).ok();
    f.staged("mean", &stages(&["--save-every", "5", "--average-last", "3"])).ok();
    let (last, mean) = (f.read("last"), f.read("mean"));
    assert!(last != mean);
    // The core of the first group is frozen in the second stage: there both ends agree.
    for (name, tensor) in &last {
        for i in (0..tensor.bytes.len() / 4).filter(|i| core(1, *i)) {
            assert_eq!(element(tensor, i), element(&mean[name], i), "{name}[{i}]");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_before_training() {
    let f = Fixture::new();
    f.train("out", &with(&["--steps", "9", "--average-last", "2"])).usage_error(&["--save-every"]);
    let args = with(&["--steps", "9", "--save-every", "3"]);
    let more = |more: &[&'static str]| [&args[..], more].concat();
    f.train("out", &more(&["--average-last", "0"])).usage_error(&["--average-last must be at least 1"]);
    f.train("out", &more(&["--average-last", "4"])).usage_error(&["--average-last 4 needs", "saves 2 before the last"]);
    f.train("out", &more(&["--average-last", "2", "--lora-rank", "2"])).usage_error(&["exclude each other"]);
    assert!(!f.path("runs/out").exists());
}
