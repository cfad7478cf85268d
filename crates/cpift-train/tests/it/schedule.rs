//! Length of training and learning rates, by the names of transformers too.

use crate::common::{Fixture, PROGRAM};
use clap::Parser;
use clap::error::ErrorKind;
use cpift_testkit::{expect_entries, run};
use cpift_train::Args;
use serde_json::Value;

fn steps(facts: &Value) -> Vec<u64> {
    facts["stages"].as_array().unwrap().iter().map(|stage| stage["steps"].as_u64().unwrap()).collect()
}

/// Learning rate of every step of a finished run.
fn rates(f: &Fixture, out: &str) -> Vec<f64> {
    let text = std::fs::read_to_string(f.path("runs").join(out).join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter_map(|line| line["lr"].as_f64()).collect()
}

/// Every task has 12 rows, and a step takes 4.
#[test]
fn without_a_budget_each_stage_sees_its_rows_once() {
    let f = Fixture::new();
    f.train("one", &["--only", "copy"]).ok().says(&["12 examples, 3 steps (1 epoch)"]);
    f.train("named", &["--only", "copy", "--epochs", "1"]).ok();
    assert_eq!(f.facts("one")["run"]["epochs"].as_f64(), Some(1.0));
    let bytes = |out: &str| std::fs::read(f.path("runs").join(out).join("model.safetensors")).unwrap();
    assert!(bytes("one") == bytes("named"));
    f.train("more", &["--only", "copy", "--num_train_epochs", "2.5"]).ok().says(&["8 steps (2.5 epochs)"]);
    assert_eq!(steps(&f.facts("more")), [8], "30 rows");
    f.train("tenths", &["--only", "copy", "--epochs", "0.3333333333333333"]).ok();
    assert_eq!(steps(&f.facts("tenths")), [1], "4 rows");
    let groups = f.path("groups.json").display().to_string();
    f.train("stages", &["--groups", &groups, "--no-freeze"]).ok();
    assert_eq!(steps(&f.facts("stages")), [3, 6], "epochs are not divided among the stages");
    f.train("steps", &["--only", "copy", "--steps", "2"]).ok();
    assert!(f.facts("steps")["run"].get("epochs").is_none());
}

#[test]
fn a_packed_epoch_has_every_row() {
    let f = Fixture::new();
    f.train("plain", &["--only", "copy"]).ok();
    f.train("packed", &["--only", "copy", "--packing", "--batch-size", "1", "--max-length", "64"]).ok();
    let tokens = |out: &str| f.facts(out)["tokens"].as_u64().unwrap();
    let (plain, packed) = (tokens("plain"), tokens("packed"));
    assert!(packed >= plain && packed <= plain + 64, "{packed} tokens packed, {plain} in the rows");
    assert!(steps(&f.facts("packed"))[0] < 12);
}

#[test]
fn one_length_is_given_and_a_schedule_must_fit_it() {
    let f = Fixture::new();
    let refused = |more: &[&str], parts: &[&str]| {
        run(PROGRAM, f.arguments("bad", &[&["--only", "copy"], more].concat())).usage_error(parts);
        let runs = f.path("runs");
        if runs.exists() {
            expect_entries(&runs, &[]);
        }
    };
    refused(&["--epochs", "2", "--steps", "3"], &["--epochs", "--steps"]);
    refused(&["--epochs", "2", "--tokens", "300"], &["--epochs", "--tokens"]);
    for bad in ["0", "-1", "nan", "inf"] {
        refused(&["--epochs", bad], &["--epochs"]);
    }
    refused(&["--warmup-steps", "2", "--warmup-ratio", "0.1"], &["--warmup-ratio"]);
    refused(&["--lr-scheduler", "wsd"], &["warmup_stable_decay"]);
    refused(&["--lr-scheduler", "warmup_stable_decay"], &["--num-decay-steps"]);
    refused(&["--warmup-steps", "3"], &["--warmup-steps 3", "3 steps", "(copy)"]);
    // The second stage has 6 steps, the first only 3.
    let groups = f.path("groups.json").display().to_string();
    run(PROGRAM, f.arguments("bad", &["--groups", &groups, "--no-freeze", "--warmup-steps", "4"]))
        .usage_error(&["3 steps", "(count)"]);
}

#[test]
fn every_stage_follows_the_schedule() {
    let f = Fixture::new();
    let near = |found: Vec<f64>, expected: &[f64]| {
        assert_eq!(found.len(), expected.len(), "{found:?}");
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected * 1e-2).abs() < 1e-9, "{found}, expected {expected} of the peak");
        }
    };
    f.train("linear", &["--only", "copy", "--steps", "6", "--lr_scheduler_type", "linear", "--warmup_steps", "2"]).ok();
    near(rates(&f, "linear"), &[0.0, 0.5, 1.0, 0.75, 0.5, 0.25]);
    let groups = f.path("groups.json").display().to_string();
    let staged = ["--groups", &groups, "--no-freeze", "--steps", "10", "--lr-scheduler", "warmup_stable_decay"];
    let decay = ["--num-decay-steps", "2", "--decay-type", "linear", "--warmup-steps", "1", "--min-lr-ratio", "0.2"];
    f.train("stable", &[&staged[..], &decay].concat()).ok();
    near(rates(&f, "stable"), &[0.2, 1.0, 1.0, 1.0, 0.6, 0.2, 1.0, 1.0, 1.0, 0.6]);
    let run = f.facts("stable")["run"].clone();
    assert_eq!((&run["lr_scheduler"], &run["num_decay_steps"]), (&"warmup_stable_decay".into(), &2.into()));
}

/// The names with a star in the table of the README.
#[test]
fn names_of_other_trainers_are_accepted() {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let table = readme.split("## From other trainers").nth(1).unwrap().split("\n## ").next().unwrap().to_owned();
    let rows = table.lines().filter(|line| line.starts_with("| `"));
    let cells = rows.filter_map(|line| line.split('|').nth(1)).flat_map(|cell| cell.split(','));
    let names: Vec<&str> = cells.filter_map(|cell| cell.trim().strip_suffix("`*")?.strip_prefix('`')).collect();
    assert!(names.len() > 20, "{names:?}");
    for name in names {
        for spelling in [name.to_owned(), name.replace('_', "-")] {
            let parsed = Args::try_parse_from(["cpift-train", "run", &format!("--{spelling}")]);
            assert_ne!(parsed.unwrap_err().kind(), ErrorKind::UnknownArgument, "{spelling}");
        }
    }
}
