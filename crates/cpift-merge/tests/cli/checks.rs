//! Checks before any work (vocabularies, tying, tokenizers), and `--dry-run`, which writes nothing.

use std::fs;
use std::path::Path;

use cpift_core::Dtype;
use cpift_testkit::{Tensor, Tensors};
use serde_json::Value;

use crate::world::{Core, World, bytes, json, w};

fn pair() -> World {
    let world = World::new();
    world.checkpoint("a", &w(&[1.0, 0.0]));
    world.checkpoint("b", &w(&[0.0, 1.0]));
    world
}

const LINEAR: &str = "linear --model @a --model @b --out @out";

fn language_model(tokens: usize) -> Tensors {
    let embedding = Tensor::f32(&[tokens, 2], &vec![1.0; 2 * tokens]);
    Tensors::from([
        ("model.embed_tokens.weight".to_owned(), embedding.clone()),
        ("lm_head.weight".to_owned(), embedding),
        ("model.norm.weight".to_owned(), Tensor::f32(&[2], &[1.0, 1.0])),
    ])
}

#[test]
fn vocabularies_of_different_sizes_are_refused_with_a_hint() {
    let world = World::new();
    world.checkpoint("a", &language_model(5));
    world.checkpoint("b", &language_model(7));
    let parts = [
        "@b/model.safetensors: the vocabulary differs from",
        "expected: 5 tokens",
        "found: 7 tokens",
        "hint: --tokenizer base or union matches rows by token; or bring both to one tokenizer",
    ];
    world.refused(LINEAR, &parts);
    world.refused("task-arithmetic --base @a --model @b --out @out", &parts);
}

fn tie(folder: &Path, tied: bool) {
    let config =
        format!(r#"{{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": {tied}}}"#);
    fs::write(folder.join("config.json"), config).unwrap();
}

#[test]
fn a_tied_head_stored_in_one_model_only_is_no_difference_and_is_not_written() {
    let world = World::new();
    world.checkpoint("a", &language_model(5));
    let mut without = language_model(5);
    without.remove("lm_head.weight");
    world.checkpoint("b", &without);
    for name in ["a", "b"] {
        tie(&world.path(name), true);
    }
    for (line, out) in [(LINEAR, "out"), ("linear --model @b --model @a --out @other", "other")] {
        world.run(line).ok();
        assert_eq!(world.read(out).keys().collect::<Vec<_>>(), ["model.embed_tokens.weight", "model.norm.weight"]);
        world.run(&format!("verify @{out}")).ok().says(&["matches"]);
    }
    // Untied, the same head is a parameter, and the other model's is its embedding.
    tie(&world.path("a"), false);
    world.run(&LINEAR.replace("@out", "@o")).ok().says(&["lm_head.weight is the input embedding"]);
    assert_eq!(world.read("o")["lm_head.weight"].values(), world.read("a")["lm_head.weight"].values());
}

#[test]
fn an_output_without_tokenizer_is_refused_or_warned_about() {
    let world = pair();
    world.run(LINEAR).ok().says(&["none of the inputs has a tokenizer"]);
    fs::write(world.path("b/tokenizer.json"), "of b").unwrap();
    let line = LINEAR.replace("@out", "@second");
    let parts = ["@a: the output would have no tokenizer", "hint: --copy-from @b"];
    world.refused(&line, &parts);
    fs::write(world.path("b/chat_template.jinja"), "template").unwrap();
    fs::write(world.path("b/generation_config.json"), "{}").unwrap();
    let run = world.run(&format!("{line} --copy-from @b")).ok();
    assert!(!run.stderr.contains("tokenizer"), "{}", run.stderr);
    assert_eq!(bytes(&world.path("second/tokenizer.json")), b"of b");
    assert!(world.path("second/chat_template.jinja").exists() && world.path("second/generation_config.json").exists());
    let line = LINEAR.replace("@out", "@third");
    world.refused(&format!("{line} --copy-from @none"), &["@none: no such directory"]);
}

#[test]
fn configuration_buffers_and_tokenizer_come_from_the_base() {
    let world = pair();
    world.checkpoint("base", &w(&[0.0, 0.0]));
    let config = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "mine": 1}"#;
    fs::write(world.path("base/config.json"), config).unwrap();
    fs::write(world.path("base/tokenizer.json"), "of the base").unwrap();
    world.run("task-arithmetic --base @base --model @a --model @b --dtype bf16 --out @out").ok();
    let config = json(&world.path("out/config.json"));
    assert_eq!((&config["mine"], &config["dtype"]), (&1.into(), &"bfloat16".into()));
    assert_eq!(bytes(&world.path("out/tokenizer.json")), b"of the base");
    assert_eq!(world.read("out")["w"].dtype, Dtype::BF16);
}

/// Plan that `--dry-run --json` prints; asserts that nothing was written.
fn preview(world: &World, line: &str) -> Value {
    let before = fs::read_dir(world.path("")).unwrap().count();
    let run = world.run(&format!("{line} --dry-run --json")).ok();
    assert_eq!(fs::read_dir(world.path("")).unwrap().count(), before);
    serde_json::from_str(&run.stdout).unwrap()
}

#[test]
fn a_dry_run_prints_angles_branches_and_bytes_and_writes_nothing() {
    let world = World::new();
    let mut a = w(&[1.0, 0.0, 0.0]);
    let mut b = w(&[0.0, 1.0, 0.0]);
    a.insert("v".into(), Tensor::f32(&[2], &[1.0, 1.0]));
    b.insert("v".into(), Tensor::f32(&[2], &[1.0, 1.001]));
    world.checkpoint("a", &a);
    world.checkpoint("b", &b);
    let line = "slerp --model @a --model @b --t 0.25 --dtype bf16 --shard-size 6 --out @out";
    let plan = preview(&world, line);
    assert_eq!((&plan["bytes_to_read"], &plan["bytes_to_write"], &plan["files"]), (&40.into(), &10.into(), &2.into()));
    assert_eq!((&plan["branches"]["slerp"], &plan["branches"]["collinear"]), (&1.into(), &1.into()), "{plan}");
    let rows = plan["plan"].as_array().unwrap();
    assert_eq!((&rows[0]["name"], &rows[0]["steps"][0]["branch"]), (&"v".into(), &"collinear".into()));
    assert_eq!((&rows[1]["name"], &rows[1]["settings"]), (&"w".into(), &"t 0.25".into()));
    assert!((rows[1]["steps"][0]["angle_degrees"].as_f64().unwrap() - 90.0).abs() < 1e-9);
    assert!(plan["peak_memory"].as_u64().unwrap() < 512 << 20 && plan["bytes_available"].as_u64().unwrap() > 0);
    let text = world.run(&format!("{line} --dry-run")).ok().stdout;
    for part in ["slerp of 2 tensors, 5 parameters", "settings    t 0.25", "w  slerp 90.0000°", "10 bytes, of"] {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
    // The merge agrees with the plan.
    let done: Value = serde_json::from_str(&world.run(&format!("{line} --json")).ok().stdout).unwrap();
    assert_eq!((&done["branches"], &done["angles_degrees"]), (&plan["branches"], &plan["angles_degrees"]));
    // A plan can be printed although the output exists.
    preview(&world, line);
}

#[test]
fn a_dry_run_shows_settings_where_they_differ_and_needs_no_angles() {
    let world = World::new();
    let tensors = |v: f32| -> Tensors { (0..3).map(|i| (format!("layers.{i}.w"), Tensor::f32(&[1], &[v]))).collect() };
    for (i, name) in ["base", "a", "b"].iter().enumerate() {
        world.checkpoint(name, &tensors(i as f32));
    }
    let text = world
        .run("ties --base @base --model @a --model @b --density 0.5 --lambda 1,2 --out @out --dry-run")
        .ok()
        .stdout;
    assert!(text.contains("layers.1.w  weights 1, 1; densities 0.5, 0.5; λ 1.5\n"), "{text}");
    let text = world.run("dare --base @base --model @a --density 0.5 --out @out --dry-run").ok().stdout;
    assert!(text.contains("settings    weights 1; densities 0.5; λ 1\n") && !text.contains("layers.1.w"), "{text}");
}

#[test]
fn a_dry_run_of_cpi_counts_core_elements() {
    let world = World::new();
    let base = w(&[1.0, 2.0, 3.0, 4.0]);
    let line = world.cpi(&base, &[("a", &w(&[1.5, 2.0, 3.0, 4.0]), Core::from([("w".into(), vec![0, 3])]))]);
    let plan = preview(&world, &format!("{line} --out @out"));
    assert_eq!((&plan["core"], &plan["plan"][0]["settings"]), (&2.into(), &"t 0.5".into()), "{plan}");
}
