//! Models with different vocabularies: rows of the embeddings matched by token, against mergekit,
//! and tokenizers and rules that cannot be used.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use cpift_core::format::safetensors::MappedFile;
use cpift_testkit::{Run, Tensor, Tensors, read_checkpoint, run_command};
use serde_json::{Value, json};

use crate::world::{PROGRAM, World, json as read_json};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden/vocabulary")
}

/// Runs the program in the directory of the golden files, whose names the recipes use.
fn run_there(words: &[&str], out: &Path) -> Run {
    let mut command = Command::new(PROGRAM);
    command.args(words).arg("--out").arg(out).current_dir(golden());
    run_command(command)
}

/// Ids by token in the tokenizer of a directory.
fn vocabulary(folder: &Path) -> BTreeMap<String, usize> {
    let file = read_json(&folder.join("tokenizer.json"));
    let own =
        file["model"]["vocab"].as_object().unwrap().iter().map(|(token, id)| (token.clone(), id.as_u64().unwrap()));
    let added = file["added_tokens"].as_array().unwrap().iter();
    let added = added.map(|token| (token["content"].as_str().unwrap().to_owned(), token["id"].as_u64().unwrap()));
    own.chain(added).map(|(token, id)| (token, id as usize)).collect()
}

fn rows(tensor: &Tensor) -> Vec<Vec<f32>> {
    tensor.values().chunks(tensor.shape[1]).map(<[f32]>::to_vec).collect()
}

#[test]
fn rows_are_matched_by_token_as_mergekit_matches_them() {
    for name in ["base", "union", "path", "padded", "rules"] {
        let world = World::new();
        run_there(&["recipe", &format!("{name}.yml")], &world.path("out")).ok();
        let expected = MappedFile::open(&golden().join(format!("{name}.safetensors"))).unwrap();
        let theirs: BTreeMap<String, usize> = serde_json::from_str(&expected.metadata["vocab"]).unwrap();
        let (ours, out) = (vocabulary(&world.path("out")), world.read("out"));
        assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>(), "{name}");
        let mut expected = read_checkpoint(&golden().join(format!("{name}.safetensors")));
        for tensor in ["model.embed_tokens.weight", "lm_head.weight"] {
            let (found, expected) = (&out[tensor], expected.remove(tensor).unwrap());
            assert_eq!(found.shape, expected.shape, "{name}: {tensor}");
            let (found, expected) = (rows(found), rows(&expected));
            let padding = (ours.len()..found.len()).map(|row| (row, row));
            for (a, b) in ours.iter().map(|(token, id)| (*id, theirs[token])).chain(padding) {
                for (x, y) in found[a].iter().zip(&expected[b]) {
                    assert!((x - y).abs() <= 1e-6, "{name}: {tensor}: row {a}: {x}, expected {y}");
                }
            }
            assert_eq!(read_json(&world.path("out/config.json"))["vocab_size"], found.len());
        }
        world.run("verify @out").ok().says(&["matches"]);
        // The card's recipe gives the same output again.
        let card = fs::read_to_string(world.path("out/README.md")).unwrap();
        let recipe = card.split("```yaml\n").nth(1).unwrap().split("```").next().unwrap();
        fs::write(world.path("again.yml"), recipe).unwrap();
        run_there(&["recipe", world.path("again.yml").to_str().unwrap()], &world.path("again")).ok();
        let again = world.read("again");
        assert!(out.iter().all(|(name, tensor)| again[name].bytes == tensor.bytes), "{name}");
    }
}

#[test]
fn the_flag_gives_what_the_recipe_gives() {
    let world = World::new();
    let line = "task-arithmetic --base base --model one --model two --weight 0.5 --weight 0.25 --dtype f32";
    for (flags, recipe) in [("--tokenizer union --pad-to-multiple-of 8", "padded"), ("--tokenizer two", "path")] {
        let words: Vec<&str> = line.split(' ').chain(flags.split(' ')).collect();
        run_there(&words, &world.path(recipe)).ok();
        run_there(&["recipe", &format!("{recipe}.yml")], &world.path(&format!("{recipe}-recipe"))).ok();
        let (a, b) = (world.read(recipe), world.read(&format!("{recipe}-recipe")));
        assert!(a.iter().all(|(name, tensor)| b[name].bytes == tensor.bytes), "{recipe}");
    }
    let words: Vec<&str> = line.split(' ').collect();
    run_there(&words, &world.path("none")).bad_input(&["the vocabulary differs", "--tokenizer base or union"]);
    let words: Vec<&str> = line.split(' ').chain(["--pad-to-multiple-of", "8"]).collect();
    run_there(&words, &world.path("none")).usage_error(&["--tokenizer"]);
}

/// A language model with one row per token of `tokens`, all of the value of its index.
fn model(world: &World, name: &str, tokens: &[(&str, u64)], rows: usize) {
    let values: Vec<f32> = (0..rows).flat_map(|i| [i as f32; 2]).collect();
    world.checkpoint(
        name,
        &Tensors::from([
            ("model.embed_tokens.weight".to_owned(), Tensor::f32(&[rows, 2], &values)),
            ("model.norm.weight".to_owned(), Tensor::f32(&[2], &[1.0; 2])),
        ]),
    );
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().map(|(token, id)| ((*token).to_owned(), json!(id))).collect();
    let file = json!({"model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": []});
    fs::write(world.path(name).join("tokenizer.json"), file.to_string()).unwrap();
}

#[test]
fn tokens_in_another_order_are_a_warning_by_position_and_right_by_token() {
    let world = World::new();
    model(&world, "a", &[("x", 0), ("y", 1)], 2);
    model(&world, "b", &[("y", 0), ("x", 1)], 2);
    let line = "linear --model @a --model @b";
    world.run(&format!("{line} --out @position")).ok().says(&["2 ids stand for other tokens"]);
    let run = world.run(&format!("{line} --tokenizer base --out @token")).ok();
    assert!(!run.stderr.contains("stand for other tokens"), "{}", run.stderr);
    assert_eq!(world.read("token")["model.embed_tokens.weight"].values(), [0.5; 4]);
    // A tokenizer with more tokens than the model has rows: those count as absent.
    model(&world, "b", &[("y", 0), ("x", 5)], 2);
    world.run(&format!("{line} --tokenizer base --out @few")).ok().says(&["1 tokens have no row"]);
    assert_eq!(world.read("few")["model.embed_tokens.weight"].values(), [0.0, 0.0, 0.5, 0.5]);
}

#[test]
fn rules_and_tokenizers_that_cannot_be_used_are_refused() {
    let world = World::new();
    model(&world, "a", &[("x", 0), ("y", 1)], 2);
    model(&world, "b", &[("y", 0), ("z", 1)], 2);
    let recipe = |block: &str| {
        let (a, b) = (world.path("a"), world.path("b"));
        let text = format!(
            "merge_method: task_arithmetic\nbase_model: {0}\nmodels:\n  - model: {1}\n    parameters: {{weight: 1}}\ndtype: \
             float32\ntokenizer: {2}\n",
            a.display(),
            b.display(),
            block.replace("@a", &a.display().to_string()).replace("@b", &b.display().to_string())
        );
        fs::write(world.path("r.yml"), text).unwrap();
    };
    for (block, parts) in [
        ("{source: union, tokens: {z: {source: @a, force: true}}}", vec!["@a", "does not have the token \"z\""]),
        ("{source: union, tokens: {z: {source: other}}}", vec!["other", "names a model that is not merged"]),
        (
            "{source: union, tokens: {z: {source: {kind: model_token, model: @b, token_id: 9}}}}",
            vec!["@b", "an id below 2", "found: 9"],
        ),
        ("{source: union, tokens: {z: {source: {kind: model_token, model: @b}}}}", vec!["one of token and token_id"]),
        ("{source: union, tokens: {z: {source: {kind: mean}}}}", vec!["is not a known kind"]),
        ("{source: union, tokens: {z: {sauce: zero}}}", vec!["sauce", "is not a known key"]),
        ("{source: union, pad_to_multiple_of: 0}", vec!["pad_to_multiple_of", "out of range"]),
    ] {
        recipe(block);
        world.refused("recipe @r.yml --out @out", &parts);
    }
    let line = "linear --model @a --model @b --tokenizer base --out @out";
    let file = world.path("a/tokenizer.json");
    fs::write(&file, r#"{"model": {"vocab": {"x": 0, "y": 0}}}"#).unwrap();
    world.refused(line, &["@a/tokenizer.json", "two tokens have the same id", "found: 0"]);
    fs::write(&file, r#"{"model": {"type": "Other"}}"#).unwrap();
    world.refused(line, &["@a/tokenizer.json", "has no vocabulary"]);
    fs::write(&file, "{").unwrap();
    world.refused(line, &["@a/tokenizer.json", "cannot be read as JSON"]);
    fs::remove_file(&file).unwrap();
    world.refused(line, &["@a: has no tokenizer.json"]);
}
