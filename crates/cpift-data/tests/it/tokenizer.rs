//! The tokenizer files of a checkpoint folder against transformers
//! (fixtures/golden/tokenizer_files.json, made by scripts/oracle/golden_tokenizer_files.py, and the
//! texts of chat_targets.json, made by golden_targets.py).

use std::path::Path;

use cpift_data::FolderTokenizer;
use serde_json::{Value, json};

fn golden() -> Value {
    golden_file("tokenizer_files.json")
}

fn golden_file(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden").join(name);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// A folder with the golden tokenizer.json and `files`, an object of names and contents.
fn folder(tokenizer: &Value, files: &Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    for (name, content) in files.as_object().unwrap() {
        std::fs::write(dir.path().join(name), content.to_string()).unwrap();
    }
    dir
}

fn open(files: &Value) -> anyhow::Result<FolderTokenizer> {
    FolderTokenizer::open(folder(&golden()["tokenizer"], files).path())
}

fn ids(read: &FolderTokenizer, text: &str) -> Vec<u32> {
    read.tokenizer.encode(text, false).unwrap().get_ids().to_vec()
}

#[test]
fn tokens_are_those_that_transformers_reads_from_the_same_files() {
    let golden = golden();
    let variants = golden["variants"].as_object().unwrap();
    assert!(variants.len() > 30);
    for (name, variant) in variants {
        let mut tokenizer = golden["tokenizer"].clone();
        for (key, value) in variant["merged"].as_object().unwrap() {
            tokenizer[key] = value.clone();
        }
        let read = FolderTokenizer::open(folder(&tokenizer, &variant["files"]).path()).unwrap();
        assert_eq!(json!(read.special), variant["special"], "{name}");
        for (key, id) in variant["ids"].as_object().unwrap() {
            assert_eq!(read.special_id(key), id.as_i64(), "{name} {key}");
        }
        let encoded = ids(&read, variant["text"].as_str().unwrap());
        assert_eq!(json!(encoded), variant["encoded"], "{name}");
        assert_eq!(json!(read.tokenizer.decode(&encoded, true).unwrap()), variant["decoded"], "{name}");
    }
}

#[test]
fn whole_chats_have_the_ids_that_transformers_gives_them() {
    let golden = golden_file("chat_targets.json");
    let cases = golden["cases"].as_array().unwrap();
    for (name, tokenizer) in golden["tokenizers"].as_object().unwrap() {
        let read = FolderTokenizer::open(folder(tokenizer, &json!({})).path()).unwrap();
        let of_this = cases.iter().filter(|case| case["tokenizer"] == name.as_str() && case["text"].is_string());
        let mut count = 0;
        for case in of_this {
            let text = case["text"].as_str().unwrap();
            assert_eq!(json!(ids(&read, text)), case["ids"], "{name}: {text}");
            count += 1;
        }
        assert!(count > 50, "{name}: {count}");
    }
}

#[test]
fn a_token_that_another_file_declares_is_told() {
    let read =
        open(&json!({"tokenizer_config.json": {"eos_token": "<|b|>", "extra_special_tokens": ["<|a|>", "<s>"]}}));
    assert_eq!(read.unwrap().added, ["<|b|>", "<|a|>"]);
    assert!(open(&json!({"tokenizer_config.json": {"eos_token": "e"}})).unwrap().added.is_empty());
}

#[test]
fn end_ids_are_those_of_all_files() {
    let end_ids = |generation: Value, config: Value| {
        let tokenizer_config = json!({"eos_token": "<|a|>"});
        let files = json!({"tokenizer_config.json": tokenizer_config, "generation_config.json": generation,
            "config.json": config});
        open(&files).unwrap().end_ids
    };
    assert_eq!(end_ids(json!({}), json!({})), [99]);
    assert_eq!(end_ids(json!({"eos_token_id": 97}), json!({})), [97, 99]);
    assert_eq!(end_ids(json!({}), json!({"eos_token_id": 97})), [97, 99]);
    assert_eq!(end_ids(json!({"eos_token_id": 97}), json!({"eos_token_id": [98, 97]})), [97, 98, 99]);
    assert_eq!(end_ids(json!({"eos_token_id": null}), json!({"text_config": {"eos_token_id": [1]}})), [1, 99]);
    assert_eq!(end_ids(json!({"eos_token_id": [-1, 100, 5000]}), json!({"text_config": {"eos_token_id": 2}})), [2, 99]);
    assert!(open(&json!({})).unwrap().end_ids.is_empty());
}

#[test]
fn objects_without_a_type_are_tokens_too() {
    let files = json!({"tokenizer_config.json": {"eos_token": {"content": "<|a|>", "lstrip": true}}});
    let read = open(&files).unwrap();
    assert_eq!(read.special_id("eos_token"), Some(99));
    assert_eq!(ids(&read, "h  <|a|>"), [*ids(&read, "h").first().unwrap(), 99]);
    let map = json!({"special_tokens_map.json": {"additional_special_tokens": [{"content": "<|b|>"}]}});
    assert_eq!(open(&map).unwrap().added, ["<|b|>"]);
}

#[test]
fn what_is_no_token_is_refused_with_its_key() {
    for (file, key, value) in [
        ("tokenizer_config.json", "eos_token", json!(5)),
        ("tokenizer_config.json", "bos_token", json!({"text": "<s>"})),
        ("tokenizer_config.json", "extra_special_tokens", json!("<s>")),
        ("tokenizer_config.json", "extra_special_tokens", json!({"image_token": 3})),
        ("tokenizer_config.json", "additional_special_tokens", json!([["<s>"]])),
        ("tokenizer_config.json", "added_tokens_decoder", json!({"one": {"content": "<s>"}})),
        ("tokenizer_config.json", "added_tokens_decoder", json!({"1": "<s>"})),
        ("special_tokens_map.json", "pad_token", json!(["<pad>"])),
        ("added_tokens.json", "<tool>", json!("7")),
    ] {
        let error = open(&json!({file: {key: value}})).err().expect(key).to_string();
        assert!(error.contains(file) && error.contains(key), "{error}");
    }
    let error = open(&json!({"tokenizer_config.json": []})).err().unwrap().to_string();
    assert!(error.contains("not an object"), "{error}");
}

#[test]
fn damaged_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let error = FolderTokenizer::open(dir.path()).err().unwrap().to_string();
    assert!(error.contains("no such file"), "{error}");
    let mut contradictory = golden()["tokenizer"].clone();
    contradictory["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"});
    for text in [contradictory.to_string(), "{".to_owned(), "[".repeat(1_000_000), "{\"model\": 1}".to_owned()] {
        std::fs::write(dir.path().join("tokenizer.json"), text).unwrap();
        let error = FolderTokenizer::open(dir.path()).err().unwrap().to_string();
        assert!(error.contains("tokenizer.json") && error.contains("cannot be read"), "{error}");
    }
}
