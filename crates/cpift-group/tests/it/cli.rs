//! `cpift-group` on bad input and bad arguments, through the real binary.

use crate::common;
use std::fs;

use crate::common::{Region, Setting, digest, every, header, write_mask};
use cpift_core::format::mask::MaskHeader;
use cpift_testkit::expect_entries;

fn three() -> Setting {
    Setting::new(&[("a", every(0..100, 1)), ("b", every(50..150, 1)), ("c", every(400..500, 1))])
}

/// Replaces the mask of `b` by one with a changed header, and expects a refusal that names both
/// masks.
#[track_caller]
fn refuses(change: impl FnOnce(&mut MaskHeader), parts: &[&str]) {
    let s = three();
    let mut header = header(100);
    change(&mut header);
    fs::remove_file(s.path("b.mask")).unwrap();
    write_mask(&s.path("b.mask"), &every(50..150, 1), &header);
    s.run(&[]).bad_input(&[s.path("b.mask").to_str().unwrap(), s.path("a.mask").to_str().unwrap()]).says(parts);
    expect_entries(&s.out, &[]);
}

#[test]
fn masks_of_different_bases() {
    let parts = ["another base", "expected: base digest base", "found: base digest other", "hint"];
    refuses(|h| h.base = digest("other"), &parts);
}

#[test]
fn masks_of_different_layouts() {
    let change = |h: &mut MaskHeader| *h.numel.get_mut("model.norm.weight").unwrap() = 14;
    refuses(change, &["layout", "tensor: model.norm.weight", "expected: 13 elements", "found: 14 elements"]);
    let change = |h: &mut MaskHeader| h.numel.retain(|name, _| name != "model.norm.weight");
    refuses(change, &["layout", "tensor: model.norm.weight", "found: no such tensor"]);
    refuses(|h| h.excluded = vec!["norms".into()], &["left out of D", "expected: excluded: []", "norms"]);
}

#[test]
fn a_damaged_mask() {
    let s = three();
    let path = s.path("c.mask");
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] |= 1;
    fs::write(&path, &bytes).unwrap();
    s.run(&[]).bad_input(&[path.to_str().unwrap(), "expected: 100", "found: 101", "damaged"]);
    // In a tensor that is left out of the comparison, too.
    s.run(&["--exclude", "norms"]).bad_input(&[path.to_str().unwrap(), "found: 101"]);
    fs::write(&path, &bytes[..last]).unwrap();
    s.run(&[]).bad_input(&[path.to_str().unwrap(), "truncated"]);
    fs::remove_file(&path).unwrap();
    s.run(&[]).bad_input(&[path.to_str().unwrap(), "cannot be opened"]);
    expect_entries(&s.out, &[]);
}

#[test]
fn a_mask_of_a_newer_version() {
    let s = three();
    let mut header = header(100);
    header.format_version = 3;
    fs::remove_file(s.path("b.mask")).unwrap();
    write_mask(&s.path("b.mask"), &every(50..150, 1), &header);
    s.run(&[]).bad_input(&["b.mask", "another format version", "expected: 2", "found: 3", "newer cpift"]);
}

#[test]
fn nothing_left_to_compare() {
    // All of both regions is in lm_head.
    let s = three();
    s.run(&["--exclude", "embeddings"]).bad_input(&["a.mask", "nothing of this core region", "found: 100", "hint"]);
    let s = Setting::new(&[("a", every(0..10, 1)), ("b", Region::new())]);
    s.run(&[]).bad_input(&["b.mask", "nothing of this core region"]);
    expect_entries(&s.out, &[]);
}

#[test]
fn outputs_that_exist() {
    for name in ["groups.json", "groups.svg", "groups.layers.json", "groups.layers.svg"] {
        let s = three();
        let path = s.out.join(name);
        fs::write(&path, "precious").unwrap();
        s.run(&[]).bad_input(&[path.to_str().unwrap(), "exists already", "--force"]);
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
        expect_entries(&s.out, &[name]);
    }
}

#[test]
fn edges_that_cannot_be_followed() {
    let s = three();
    let edges = s.path("edges.toml");
    let args = ["--order", "dependency", "--edges", edges.to_str().unwrap()];
    let edge = |before: &str, after: &str| format!("[[edge]]\nbefore = \"{before}\"\nafter = \"{after}\"\n");
    let file = edges.to_str().unwrap();
    fs::write(&edges, edge("a", "c") + &edge("c", "b")).unwrap();
    s.run(&args).bad_input(&[file, "cycle", "{a, b} -> {c} -> {a, b}", "hint"]);
    fs::write(&edges, edge("a", "maths")).unwrap();
    s.run(&args).bad_input(&[file, "unknown task maths", "expected: a, b, c"]);
    fs::write(&edges, "[[edge]]\nbefore = \"a\"\nthen = \"b\"\n").unwrap();
    s.run(&args).bad_input(&[file, "not a file of edges", "then", "line 3"]);
    fs::remove_file(&edges).unwrap();
    s.run(&args).bad_input(&[file, "cannot be opened"]);
    expect_entries(&s.out, &[]);
}

#[test]
fn scores_that_lack_a_task_or_are_none() {
    let s = three();
    let scores = s.scores("scores.json", "base", &[("a", 1.0), ("b", 1.0)]);
    let args = ["--order", "difficulty", "--scores", scores.to_str().unwrap()];
    s.run(&args).bad_input(&[scores.to_str().unwrap(), "task c has no score", "found: scores of a, b", "hint"]);
    fs::write(&scores, "{\"format_version\": 1}").unwrap();
    s.run(&args).bad_input(&[scores.to_str().unwrap(), "not a scores file"]);
    fs::remove_file(&scores).unwrap();
    s.run(&args).bad_input(&[scores.to_str().unwrap()]);
    expect_entries(&s.out, &[]);
}

#[test]
fn arguments_that_make_no_sense() {
    let s = three();
    for tau in ["-0.1", "nan", "inf", "some"] {
        s.run(&["--tau", tau]).usage_error(&["--tau", tau]);
    }
    s.run(&["--order", "alphabet"]).usage_error(&["random", "overlap", "difficulty", "dependency"]);
    s.run(&["--order", "difficulty"]).usage_error(&["--order difficulty needs --scores"]);
    s.run(&["--order", "dependency"]).usage_error(&["--order dependency needs --edges"]);
    s.run(&["--order", "dependency", "--probe-scores", "x"]).usage_error(&["--scores"]);
    s.run(&["--edges", "x"]).usage_error(&["--edges has no part in --order random"]);
    s.run(&["--order", "dependency", "--edges", "x", "--scores", "y"]).usage_error(&["--scores has no part"]);
    s.run(&["--mask", "a=x"]).usage_error(&["--mask a is given twice"]);
    s.run(&["--mask", "x"]).usage_error(&["NAME=PATH"]);
    for (flag, name, other) in [
        ("--svg", "groups.json", "--out"),
        ("--layers", "groups.svg", "--svg"),
        ("--layers-svg", "groups.layers.json", "--layers"),
    ] {
        let error = format!("{other} and {flag} name the same file");
        s.run(&[flag, s.out.join(name).to_str().unwrap()]).usage_error(&[&error]);
    }
    cpift_testkit::run(common::BIN, ["--out", "groups.json"]).usage_error(&["--mask"]);
    let mask = format!("a={}", s.path("a.mask").display());
    cpift_testkit::run(common::BIN, ["--mask", &mask]).usage_error(&["--out"]);
    for flag in ["--svg", "--layers", "--layers-svg"] {
        cpift_testkit::run(common::BIN, ["--mask", &mask, "--sweep", flag, "x"]).usage_error(&["--out"]);
    }
    expect_entries(&s.out, &[]);
}
