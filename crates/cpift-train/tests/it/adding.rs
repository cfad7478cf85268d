//! `cpift-train run --add`: tasks added to a tuned model, with replayed rows and elements that keep
//! their bits.

use std::fs;

use crate::common::{Fixture, TASKS, core, element};
use cpift_testkit::masks::write_mask;
use cpift_testkit::model::{row, write_rows, write_tiny_model};
use cpift_testkit::{Run, Tensors, read_checkpoint};
use serde_json::Value;

const NEW: [&str; 4] = ["--add", "pick", "--steps", "3"];

fn add(f: &Fixture, out: &str, more: &[&str]) -> Run {
    f.train(out, &[&NEW[..], more].concat())
}

fn weights(f: &Fixture, out: &str) -> Vec<u8> {
    fs::read(f.path("runs").join(out).join("model.safetensors")).unwrap()
}

fn stage(f: &Fixture, out: &str) -> Value {
    f.facts(out)["stages"][0].clone()
}

/// Shares of the elements of all parameters that `changed` by name and index.
fn moved(before: &Tensors, after: &Tensors, of: impl Fn(&str, usize) -> bool) -> (usize, usize) {
    let (mut all, mut moved) = (0, 0);
    for (name, b) in before {
        let elements = (0..b.values().len()).filter(|i| of(name, *i));
        elements.for_each(|i| {
            all += 1;
            moved += usize::from(element(b, i) != element(&after[name], i));
        });
    }
    (moved, all)
}

#[test]
fn only_the_new_rows_are_read_unless_others_are_replayed() {
    let f = Fixture::new();
    for old in &TASKS[..2] {
        fs::write(f.path(&format!("data/{old}/train.jsonl")), "no row").unwrap();
    }
    add(&f, "add", &[]).ok();
    f.train("only", &["--only", "pick", "--steps", "3"]).ok();
    assert!(weights(&f, "add") == weights(&f, "only"));
    assert_eq!((&stage(&f, "add")["examples"], &stage(&f, "add")["replayed_examples"]), (&12.into(), &0.into()));
    add(&f, "none", &["--replay-share", "0.1"]).bad_input(&["copy/train.jsonl"]);
    add(&f, "none", &["--isolation", "dynamic"]).bad_input(&["copy/train.jsonl"]);
    assert!(!f.path("runs/none").exists());
}

#[test]
fn replayed_rows_are_a_share_of_the_tokens_alike_for_every_old_task() {
    let f = Fixture::new();
    let rows: Vec<Value> = (0..60).map(|i| row(&format!("pick {i}"), "one")).collect();
    write_rows(&f.path("data/pick/train.jsonl"), &rows);
    // Rows of one old task are five times as long as those of the other.
    for (name, words) in [("copy", 1), ("count", 5)] {
        let rows: Vec<Value> = (0..12).map(|i| row(&format!("say {i}").repeat(words), "ok")).collect();
        write_rows(&f.path(&format!("data/{name}/train.jsonl")), &rows);
    }
    for share in [0.05, 0.3, 0.6] {
        let out = format!("share-{share}");
        add(&f, &out, &["--replay-share", &share.to_string()]).ok();
        let found = stage(&f, &out)["replayed_share"].as_f64().unwrap();
        // To half a row of each task.
        assert!((found - share).abs() < 0.05, "{share}: {found}");
    }
    // More tokens than there are: rows are repeated.
    let run = add(&f, "much", &["--replay-share", "0.9"]).ok();
    assert!(run.stderr.contains("copy: its 12 rows are replayed "), "{}", run.stderr);
    assert!(stage(&f, "much")["replayed_examples"].as_u64() > Some(24));
    assert!((stage(&f, "much")["replayed_share"].as_f64().unwrap() - 0.9).abs() < 0.01);
    // A share so small that each task has its one row.
    add(&f, "little", &["--replay-share", "0.0001"]).ok();
    assert_eq!(stage(&f, "little")["replayed_examples"], 2);
}

#[test]
fn stages_of_groups_replay_a_share_of_their_tokens() {
    let f = Fixture::new();
    let groups = f.path("groups.json").display().to_string();
    let args = ["--groups", &groups, "--no-freeze", "--steps", "4", "--replay-share", "0.25"];
    f.train("out", &args).ok();
    let stages = f.facts("out")["stages"].clone();
    assert_eq!(stages[0]["replayed_examples"], 0);
    assert!((stages[1]["replayed_share"].as_f64().unwrap() - 0.25).abs() < 0.05, "{stages}");
    f.train("bad", &[&args[..], &["--replay", "0.1"]].concat()).usage_error(&["--replay"]);
}

#[test]
fn rows_of_a_file_are_replayed_instead_of_the_old_tasks() {
    let f = Fixture::new();
    let own = f.path("own.jsonl");
    write_rows(&own, &[row("what do you know", "this"), row("and else", "that")]);
    let own = own.to_str().unwrap();
    let from = ["--replay-share", "0.2", "--replay-from", own];
    add(&f, "own", &from).ok();
    assert!((stage(&f, "own")["replayed_share"].as_f64().unwrap() - 0.2).abs() < 0.05);
    for old in &TASKS[..2] {
        fs::write(f.path(&format!("data/{old}/train.jsonl")), "no row").unwrap();
    }
    add(&f, "alone", &from).ok();
    assert!(weights(&f, "own") == weights(&f, "alone"));
    let record = fs::read_to_string(f.path("runs/own/cpift.json")).unwrap();
    assert!(record.contains("\"train:own\""), "{record}");
    // A file called like a listed task is rendered with its template arguments.
    let listed = f.path("own/copy.jsonl");
    write_rows(&listed, &[row("what do you know", "this"), row("and else", "that")]);
    let listed = ["--replay-share", "0.2", "--replay-from", listed.to_str().unwrap()];
    add(&f, "plain", &listed).ok();
    let tasks = fs::read_to_string(&f.tasks).unwrap();
    fs::write(&f.tasks, tasks.replacen("max_length = 96", "max_length = 30", 1)).unwrap();
    add(&f, "short", &listed).ok().says(&["copy: 2 examples were cut to 30 tokens"]);
    fs::write(&f.tasks, tasks).unwrap();
    assert!(weights(&f, "plain") != weights(&f, "short"));
    // A file with the name of the new task, the same file twice, a missing file, no use for it.
    let pick = f.path("data/pick/pick.jsonl");
    fs::copy(own, &pick).unwrap();
    let pick = pick.to_str().unwrap();
    add(&f, "bad", &["--replay-share", "0.2", "--replay-from", pick]).bad_input(&["pick.jsonl", "second task pick"]);
    add(&f, "bad", &[&from[..], &["--replay-from", own]].concat()).bad_input(&["own.jsonl", "second task own"]);
    add(&f, "bad", &["--replay-share", "0.2", "--replay-from", "/nowhere.jsonl"]).bad_input(&["/nowhere.jsonl"]);
    add(&f, "bad", &["--replay-from", own]).usage_error(&["--replay-from", "--replay-share"]);
    assert!(!f.path("runs/bad").exists());
}

#[test]
fn importance_is_measured_on_the_replayed_rows_alone() {
    let f = Fixture::new();
    let texts: Vec<Value> = (0..6).map(|i| row(&format!("say w{i}"), &format!("w{i}"))).collect();
    let buffer = f.path("buffer.jsonl");
    let args = ["--isolation", "dynamic", "--mask-interval", "1", "--percent", "20", "--replay-share", "0.02"];
    let args = [&args[..], &["--replay-from", buffer.to_str().unwrap()]].concat();
    let result = |rows: &[Value]| {
        write_rows(&buffer, rows);
        add(&f, "out", &[&args[..], &["--force"]].concat()).ok();
        assert!(stage(&f, "out")["importance_tokens"].as_u64() > Some(0));
        assert!(stage(&f, "out")["frozen_elements"].as_u64() > Some(0));
        (weights(&f, "out"), stage(&f, "out")["replayed_examples"].as_u64().unwrap())
    };
    let (first, replayed) = result(&texts);
    assert_eq!(replayed, 1);
    // Of the rows at hand, changing one that is not replayed changes nothing.
    let changes = (0..texts.len()).filter(|&i| {
        let mut other = texts.clone();
        other[i] = row(&format!("say x{i}"), &format!("x{i}"));
        result(&other).0 != first
    });
    assert_eq!(changes.count(), 1);
}

#[test]
fn protected_elements_keep_their_bits() {
    let f = Fixture::new();
    let masks = [0, 1].map(|k| f.path(&format!("{}.safetensors", TASKS[k])).display().to_string());
    add(&f, "one", &["--protect", &masks[0]]).ok();
    let (before, one) = (read_checkpoint(&f.base), f.read("one"));
    assert_eq!(moved(&before, &one, |_, i| core(0, i)).0, 0);
    let (changed, all) = moved(&before, &one, |_, i| !core(0, i));
    assert!(changed * 10 > all * 9, "{changed} of {all}");
    // Several masks: their union.
    add(&f, "two", &["--protect", &masks[0], "--protect", &masks[1]]).ok();
    assert_eq!(moved(&before, &f.read("two"), |_, i| core(0, i) || core(1, i)).0, 0);
    let frozen = |out: &str| stage(&f, out)["frozen_elements"].as_u64().unwrap();
    assert!(frozen("two") > frozen("one") * 3 / 2);
    // The masks belong to another base, which has to be named.
    let other = write_tiny_model(&f.path("other"), 7);
    let mask = f.path("other.safetensors");
    write_mask(&mask, &other, |_, i| core(2, i));
    let mask = mask.to_str().unwrap();
    add(&f, "bad", &["--protect", mask]).bad_input(&["other.safetensors", "base"]);
    add(&f, "named", &["--protect", mask, "--base", other.to_str().unwrap()]).ok();
    assert_eq!(moved(&before, &f.read("named"), |_, i| core(2, i)).0, 0);
    assert!(!f.path("runs/bad").exists());
}

#[test]
fn the_bottom_layers_keep_their_bits() {
    let f = Fixture::new();
    add(&f, "one", &["--freeze-layers", "1"]).ok();
    let (before, after) = (read_checkpoint(&f.base), f.read("one"));
    let bottom = |name: &str| name.starts_with("model.layers.0.") || name.contains("embed_tokens");
    assert_eq!(moved(&before, &after, |name, _| bottom(name)).0, 0);
    let (changed, all) = moved(&before, &after, |name, _| !bottom(name));
    assert!(changed * 10 > all * 9, "{changed} of {all}");
    add(&f, "more", &["--freeze-layers", "3"]).usage_error(&["--freeze-layers is 3", "2 blocks"]);
    let rounded = add(&f, "rounded", &["--freeze-layers", "1", "--save-dtype", "bf16"]).ok();
    rounded.says(&["--save-dtype BF16 rounds", "frozen elements"]);
    // With a mask both hold.
    let mask = f.path("copy.safetensors").display().to_string();
    add(&f, "both", &["--freeze-layers", "1", "--protect", &mask]).ok();
    assert_eq!(moved(&before, &f.read("both"), |name, i| bottom(name) || core(0, i)).0, 0);
}

#[test]
fn what_does_not_go_together_is_refused() {
    let f = Fixture::new();
    let groups = f.path("groups.json").display().to_string();
    let mask = f.path("copy.safetensors").display().to_string();
    for (args, part) in [
        (vec!["--add", "pick", "--only", "copy"], "--only"),
        (vec!["--add", "pick", "--groups", &groups], "--groups"),
        (vec!["--add", "pick,pick"], "--add names pick twice"),
        (vec!["--protect", &mask], "--add"),
        (vec!["--freeze-layers", "1"], "--add"),
        (vec!["--replay-share", "0.1"], "--replay-share needs"),
        (vec!["--add", "pick", "--replay-share", "1"], "below 1"),
        (vec!["--add", "pick", "--base", "x"], "--base"),
        (vec!["--add", "pick", "--isolation", "dynamic", "--protect", &mask], "leave out --protect"),
        (vec!["--add", "pick", "--lora-rank", "2", "--freeze-layers", "1"], "--lora-rank"),
    ] {
        f.train("out", &args).usage_error(&[part]);
    }
    f.train("out", &["--add", "sing"]).expect_code(3).says(&["sing"]);
    f.train("out", &["--add", "copy,count,pick", "--replay-share", "0.1"]).bad_input(&["tasks.toml", "--replay-from"]);
    assert!(!f.path("runs/out").exists());
}
