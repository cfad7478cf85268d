//! cpift-train through the real binary.

use crate::common;
use std::fs;

use crate::common::{Fixture, assert_frozen, core, element, with_negative_zeros};
use cpift_core::Dtype;
use cpift_testkit::masks::{write_groups, write_mask};
use cpift_testkit::model::{tiny_weights, write_tiny_model};
use cpift_testkit::{Tensor, expect_entries, read_checkpoint, write_safetensors};

#[test]
fn the_cores_of_earlier_groups_keep_their_bits_in_f32_and_bf16() {
    for (dtype, name) in [(Dtype::F32, "f32"), (Dtype::BF16, "bf16")] {
        let f = Fixture::with_base(&with_negative_zeros(dtype));
        // The first stage changes the core too: stop after it, to know the start of the second
        // stage.
        let first = f.path("first.json");
        write_groups(&first, &f.base, &[&["count"]], &[]);
        let first = first.to_str().unwrap();
        f.train(
            "first",
            &["--groups", first, "--no-freeze", "--steps", "4", "--save-dtype", name, "--sample", "balanced"],
        )
        .ok();
        f.staged("staged", &["--steps", "8", "--save-dtype", name, "--stage-data", "group"]).ok();
        let stages = f.facts("staged")["stages"].clone();
        assert_eq!(stages[0]["frozen_elements"], 0);
        assert_eq!(stages[1]["frozen_tasks"], serde_json::json!(["count"]));
        assert_frozen(&f.read("first"), &f.read("staged"));
    }
}

#[test]
fn the_cores_of_earlier_groups_keep_their_bits_on_mixed_rows() {
    let f = Fixture::with_base(&with_negative_zeros(Dtype::F32));
    let groups = f.path("groups.json");
    // A second stage at a rate that changes nothing leaves the result of the first one.
    let first = ["--groups", groups.to_str().unwrap(), "--no-freeze", "--stage-data", "mixed", "--sample", "balanced"];
    let same = ["--steps", "8", "--weight-decay", "0"];
    f.train("first", &[&first[..], &same, &["--stage-lr", "1e-2,1e-40"]].concat()).ok();
    f.staged("staged", &same).ok();
    assert_frozen(&f.read("first"), &f.read("staged"));
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
    f.staged("group", &["--steps", "2", "--sample", "5", "--stage-data", "group"]).ok();
    assert_eq!(examples("group"), [5, 10]);
    f.staged("mixed", &["--steps", "2", "--sample", "5", "--stage-data", "mixed"]).ok();
    assert_eq!(examples("mixed"), [15, 15]);
    // Balanced, the default when freezing: as many rows as the smallest task has.
    let few = fs::read_to_string(f.path("data/copy/train.jsonl")).unwrap();
    fs::write(f.path("data/copy/train.jsonl"), few.lines().take(7).map(|l| format!("{l}\n")).collect::<String>())
        .unwrap();
    f.staged("balanced", &["--steps", "2"]).ok();
    assert_eq!(examples("balanced"), [21, 21]);
    f.staged("balanced-group", &["--steps", "2", "--stage-data", "group"]).ok();
    assert_eq!(examples("balanced-group"), [7, 14]);
}

#[test]
fn the_last_stage_is_mixed_and_every_other_method_keeps_its_rows() {
    let f = Fixture::new();
    let groups = f.path("groups.json");
    let plain = ["--groups", groups.to_str().unwrap()];
    let masks = f.stages();
    let masks: Vec<&str> = masks.iter().map(String::as_str).collect();
    type Args<'a> = &'a [&'a str];
    // Arguments, the rows that they select, and the number of rows of each stage.
    let cases: [(Args<'_>, Args<'_>, &str, [u64; 2]); 8] = [
        (&masks, &[], "mixed", [15, 15]),
        (&masks, &["--stage-data", "group"], "group", [5, 10]),
        (&masks, &["--trainable", "cores"], "group", [5, 10]),
        (&masks, &["--replay", "0.2"], "group", [5, 11]),
        (&plain, &["--no-freeze"], "group", [5, 10]),
        (&plain, &["--isolation", "dynamic"], "group", [5, 10]),
        (&plain, &["--no-freeze", "--stage-data", "mixed"], "mixed", [15, 15]),
        // If given twice, the last one counts, as with --lr: flags after those of the pipeline
        // win.
        (&masks, &["--stage-data", "mixed", "--stage-data", "group"], "group", [5, 10]),
    ];
    for (k, (first, more, data, rows)) in cases.into_iter().enumerate() {
        let out = format!("out{k}");
        f.train(&out, &[first, more, &["--steps", "2", "--sample", "5"]].concat()).ok();
        let facts = f.facts(&out);
        assert_eq!(facts["stage_data"], data, "{more:?}");
        let found: Vec<u64> =
            facts["stages"].as_array().unwrap().iter().map(|s| s["examples"].as_u64().unwrap()).collect();
        assert_eq!(found, rows, "{more:?}");
    }
    f.staged("said", &["--steps", "2", "--sample", "5", "--stage-data", "mixed"]).ok();
    let bytes = |out: &str| fs::read(f.path("runs").join(out).join("model.safetensors")).unwrap();
    assert!(bytes("out0") == bytes("said") && bytes("out0") != bytes("out1"));
    // All rows are in the mixture: none can be replayed.
    f.staged("both", &["--steps", "2", "--replay", "0.5", "--stage-data", "mixed"])
        .usage_error(&["--replay", "--stage-data mixed"]);
    f.train("sft", &["--steps", "1"]).ok();
    assert!(f.facts("sft")["stage_data"].is_null(), "one stage over all tasks has no such choice");
}

#[test]
fn a_tasks_sample_depends_on_its_name_and_not_on_its_place() {
    let f = Fixture::new();
    // The same rows under two names.
    fs::copy(f.path("data/copy/train.jsonl"), f.path("data/count/train.jsonl")).unwrap();
    let weights = |out: &str, only: &str| {
        f.train(out, &["--steps", "2", "--sample", "5", "--only", only]).ok();
        fs::read(f.path("runs").join(out).join("model.safetensors")).unwrap()
    };
    assert!(weights("copy", "copy") != weights("count", "count"), "two tasks share a permutation");
    f.train("twice", &["--steps", "2", "--only", "copy,pick,copy"]).usage_error(&["--only", "copy twice"]);
}

#[test]
fn rows_are_read_before_weights() {
    let f = Fixture::new();
    fs::write(f.path("data/pick/train.jsonl"), "{}\n").unwrap();
    let mut weights = tiny_weights(1);
    weights.insert("model.norm.weight".into(), Tensor::f32(&[16], &[f32::NAN; 16]));
    fs::remove_file(f.base.join("model.safetensors")).unwrap();
    write_safetensors(&f.base.join("model.safetensors"), &weights);
    f.train("out", &["--steps", "2"]).bad_input(&["pick/train.jsonl", "line 1"]);
}

#[test]
fn an_output_never_replaces_an_input() {
    let f = Fixture::new();
    f.train("out", &["--steps", "1"]).ok();
    let weights = fs::read(f.path("runs/out/model.safetensors")).unwrap();
    fs::rename(f.path("groups.json"), f.path("runs/out/groups.json")).unwrap();
    let own = Fixture { base: f.path("runs/out"), tasks: f.tasks.clone(), dir: f.dir };
    let refused = |more: &[&str]| {
        own.train("out", &[&["--steps", "1", "--force"], more].concat())
            .usage_error(&["--out", "would replace the input"]);
    };
    refused(&[]);
    refused(&["--resume"]);
    let base = Fixture { base: own.path("base"), tasks: own.tasks.clone(), dir: own.dir };
    let groups = base.path("runs/out/groups.json");
    base.train("out", &["--steps", "2", "--force", "--no-freeze", "--groups", groups.to_str().unwrap()])
        .usage_error(&["--out", "would replace the input", "groups.json"]);
    assert_eq!(fs::read(base.path("runs/out/model.safetensors")).unwrap(), weights);
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

#[test]
fn every_flag_has_a_heading_in_the_help() {
    for command in ["run", "plan", "preview"] {
        assert_headings(command);
    }
}

/// Only the shared flags of cpift-core may have no heading.
fn assert_headings(command: &str) {
    const SHARED: [&str; 6] = ["--threads", "--force", "--skip-up-to-date", "--json", "--quiet", "--help"];
    let help = cpift_testkit::run(common::PROGRAM, [command, "--help"]).ok().stdout;
    let mut heading = "";
    for line in help.lines() {
        if line.ends_with(':') && !line.starts_with(' ') {
            heading = line;
        }
        let flag = line.trim_start().split(", ").last().filter(|flag| flag.starts_with("--"));
        if let Some(flag) = flag.filter(|_| line.starts_with("  ") && heading == "Options:") {
            let name = flag.split(' ').next().unwrap_or_default();
            assert!(SHARED.contains(&name), "{command} {name} has no heading");
        }
    }
    assert!(help.contains("\nInput and output:\n") && help.contains("\nData:\n"), "{help}");
}
