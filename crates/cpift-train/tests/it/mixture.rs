//! Mixtures of tasks: temperatures and weights.

use std::fs;

use crate::common::{Fixture, PROGRAM};
use cpift_testkit::run;
use serde_json::json;

/// Leaves `copy` 12 rows, `count` 6 and `pick` 3.
fn unequal() -> Fixture {
    let f = Fixture::new();
    for (task, rows) in [("count", 6), ("pick", 3)] {
        let path = f.path(&format!("data/{task}/train.jsonl"));
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.lines().take(rows).map(|line| line.to_owned() + "\n").collect::<String>()).unwrap();
    }
    f
}

fn weights(f: &Fixture, out: &str) -> Vec<u8> {
    fs::read(f.path("runs").join(out).join("model.safetensors")).unwrap()
}

#[test]
fn a_temperature_evens_the_tasks_out_and_one_changes_nothing() {
    let f = unequal();
    f.train("plain", &[]).ok();
    f.train("one", &["--mixture-temperature", "1"]).ok();
    assert!(weights(&f, "plain") == weights(&f, "one"));
    assert_eq!(f.facts("plain")["stages"][0]["epoch_rows"], json!([]));
    f.train("roots", &["--mixture-temperature", "2"]).ok().says(&["an epoch has 21 rows", "of pick"]);
    let drawn = &f.facts("roots")["stages"][0]["epoch_rows"];
    // Shares by sqrt(12) : sqrt(6) : sqrt(3) = 2 : 1.414 : 1 of 21 rows are 9.51, 6.73 and 4.76.
    assert_eq!(*drawn, json!([9, 7, 5]));
    assert!(weights(&f, "plain") != weights(&f, "roots"));
    f.train("even", &["--mixture-temperature", "1e6", "--batch-size", "7"]).ok();
    assert_eq!(f.facts("even")["stages"][0]["epoch_rows"], json!([7, 7, 7]));
    assert_eq!(f.facts("even")["stages"][0]["steps"], 3);
}

#[test]
fn a_weight_multiplies_a_tasks_share_in_every_stage_with_other_tasks() {
    let f = Fixture::new();
    f.weigh("pick", "3.0");
    f.train("all", &[]).ok();
    assert_eq!(f.facts("all")["stages"][0]["epoch_rows"], json!([7, 7, 22]));
    let groups = f.path("groups.json").display().to_string();
    f.train("stages", &["--groups", &groups, "--no-freeze", "--replay", "0.5"]).ok();
    let stages = &f.facts("stages")["stages"];
    // The second stage replays six rows of `count`, which keep their number.
    assert_eq!((&stages[0]["epoch_rows"], &stages[1]["epoch_rows"]), (&json!([]), &json!([6, 18, 6])));
    // A changed weight makes the output stale.
    f.train("all", &["--skip-up-to-date"]).ok().says(&["up to date"]);
    let text = fs::read_to_string(&f.tasks).unwrap();
    fs::write(&f.tasks, text.replace("weight = 3.0", "weight = 2.0")).unwrap();
    f.train("all", &["--skip-up-to-date"]).ok();
    assert_eq!(f.facts("all")["stages"][0]["epoch_rows"], json!([9, 9, 18]));
}

#[test]
fn a_temperature_must_be_positive() {
    let f = Fixture::new();
    for bad in ["0", "-1", "nan"] {
        run(PROGRAM, f.arguments("bad", &["--mixture-temperature", bad])).usage_error(&["must be positive"]);
    }
    f.weigh("copy", "-1.0");
    f.train("bad", &[]).bad_input(&["task copy: the weight is not a positive number", "found: -1"]);
}
