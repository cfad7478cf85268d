//! `cpift-eval join` through the real binary.

use std::fs;

use cpift_testkit::model::write_tiny_model;
use cpift_testkit::{Run, expect_entries, run};

use crate::common::{Fixture, read_json};

fn join(f: &Fixture, parts: &[&str], more: &[&str]) -> Run {
    let paths: Vec<_> = parts.iter().map(|part| f.out(part)).collect();
    let out = f.out("joined");
    let given = ["join", "--out", out.to_str().unwrap()].into_iter().chain(paths.iter().map(|p| p.to_str().unwrap()));
    run(env!("CARGO_BIN_EXE_cpift-eval"), given.chain(more.iter().copied()))
}

fn read(f: &Fixture, name: &str) -> String {
    fs::read_to_string(f.out(name)).unwrap()
}

#[test]
fn tasks_scored_apart_are_joined_to_the_bytes_of_one_run() {
    let f = Fixture::new();
    f.eval("whole", &[]).ok();
    f.eval("one", &["--only", "copy"]).ok();
    f.eval("rest", &["--only", "count,pick"]).ok();
    join(&f, &["one", "rest"], &[]).ok();
    expect_entries(&f.out("joined"), &["cpift.json", "outputs.jsonl", "scores.json"]);
    for name in ["scores.json", "outputs.jsonl"] {
        assert_eq!(read(&f, &format!("joined/{name}")), read(&f, &format!("whole/{name}")), "{name}");
    }
    let record = read_json(&f.out("joined/cpift.json"));
    let inputs: Vec<&str> = record["inputs"].as_object().unwrap().keys().map(String::as_str).collect();
    let of = ["outputs.jsonl:copy", "outputs.jsonl:count,pick", "scores.json:copy", "scores.json:count,pick"];
    assert_eq!(inputs, of);
    // A file that was edited by hand.
    let edited = read(&f, "one/outputs.jsonl");
    fs::write(f.out("one/outputs.jsonl"), edited.trim_end()).unwrap();
    join(&f, &["one", "rest"], &["--force"]).ok();
    assert_eq!(read(&f, "joined/outputs.jsonl"), read(&f, "whole/outputs.jsonl"));
    // The tasks are in the order of the directories.
    join(&f, &["rest", "one"], &["--force"]).ok();
    let tasks = read_json(&f.out("joined/scores.json"))["tasks"].clone();
    assert_eq!(tasks[2]["task"], "copy", "{tasks}");
    let before = fs::metadata(f.out("joined")).unwrap().modified().unwrap();
    join(&f, &["rest", "one"], &["--skip-up-to-date"]).ok();
    assert_eq!(fs::metadata(f.out("joined")).unwrap().modified().unwrap(), before, "nothing has changed");
    fs::remove_file(f.out("joined/outputs.jsonl")).unwrap();
    join(&f, &["rest", "one"], &["--skip-up-to-date"]).ok();
    assert_eq!(read(&f, "joined/outputs.jsonl").lines().count(), 12);
    // Scores that were edited by hand are not those of the record; touched ones are.
    let scores = read(&f, "joined/scores.json");
    fs::write(f.out("joined/scores.json"), &scores).unwrap();
    let before = fs::metadata(f.out("joined")).unwrap().modified().unwrap();
    join(&f, &["rest", "one"], &["--skip-up-to-date"]).ok();
    assert_eq!(fs::metadata(f.out("joined")).unwrap().modified().unwrap(), before, "only touched");
    fs::write(f.out("joined/scores.json"), format!("{scores} ")).unwrap();
    join(&f, &["rest", "one"], &["--skip-up-to-date"]).ok();
    assert_eq!(read(&f, "joined/scores.json"), scores);
}

#[test]
fn a_judges_verdicts_stay() {
    let f = Fixture::new();
    f.eval("one", &["--only", "copy"]).ok();
    f.eval("two", &["--only", "count"]).ok();
    fs::write(f.out("one/verdicts.jsonl"), "{\"key\":\"a\"}\n{\"key\":\"b\"}\n{\"ke").unwrap();
    join(&f, &["one", "two"], &[]).ok();
    assert_eq!(read(&f, "joined/verdicts.jsonl"), "{\"key\":\"a\"}\n{\"key\":\"b\"}\n");
    fs::write(f.out("joined/verdicts.jsonl"), "{\"key\":\"b\"}\n{\"key\":\"c\"}\n").unwrap();
    join(&f, &["one", "two"], &["--force"]).ok();
    assert_eq!(read(&f, "joined/verdicts.jsonl"), "{\"key\":\"b\"}\n{\"key\":\"c\"}\n{\"key\":\"a\"}\n");
    join(&f, &["joined", "two"], &["--force"]).usage_error(&["would replace the input", "joined"]);
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let f = Fixture::new();
    f.eval("one", &["--only", "copy"]).ok();
    f.eval("both", &["--only", "copy,count"]).ok();
    join(&f, &["one", "both"], &[]).bad_input(&["both", "task copy is scored twice", "one scores it as well", "hint"]);
    // The same directory name, other weights.
    fs::remove_dir_all(&f.model).unwrap();
    write_tiny_model(&f.model, 2);
    f.eval("other", &["--only", "pick"]).ok();
    join(&f, &["one", "other"], &[]).bad_input(&["other", "another checkpoint than", "one", "expected", "found"]);
    fs::remove_file(f.out("one/outputs.jsonl")).unwrap();
    join(&f, &["one"], &[]).bad_input(&["outputs.jsonl"]);
    join(&f, &["nowhere"], &[]).bad_input(&["nowhere"]);
    assert!(!f.out("joined").exists(), "nothing is half-written");
    join(&f, &[], &[]).usage_error(&["SCORES"]);
    fs::create_dir(f.out("joined")).unwrap();
    join(&f, &["both"], &[]).bad_input(&["joined", "exists already", "--force"]);
    fs::write(f.out("joined/mine.txt"), "").unwrap();
    join(&f, &["both"], &["--force"]).bad_input(&["CPI-FT did not write"]);
}
