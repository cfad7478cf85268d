//! Losses per row, and errors for models that overflow.

use std::fs;

use cpift_testkit::model::{row, tiny_weights, write_rows};
use cpift_testkit::{Tensor, Tensors, write_safetensors};
use serde_json::{Value, json};

use crate::common::{Fixture, outputs, question, read_json, task};

fn write_weights(f: &Fixture, tensors: &Tensors) {
    let file = f.model.join("model.safetensors");
    fs::remove_file(&file).unwrap();
    write_safetensors(&file, tensors);
}

/// The tiny model with its last norm, and so every logit, multiplied by `factor`.
fn louder(f: &Fixture, factor: f32) {
    let mut tensors = tiny_weights(1);
    tensors.insert("model.norm.weight".into(), Tensor::f32(&[16], &[factor; 16]));
    write_weights(f, &tensors);
}

#[test]
fn a_loss_that_is_not_finite_ends_the_run_with_its_row() {
    let f = Fixture::new();
    louder(&f, 3e38);
    f.eval("a", &["--only", "count"]).expect_code(1).says(&["count: ", "count/eval.jsonl line 1", "loss", "NaN"]);
    assert!(!f.out("a").exists());
}

/// Dimension 0 is large for every token, and the output row of `Z` so negative there that its logit
/// is −∞.
#[test]
fn a_log_likelihood_that_is_not_finite_ends_the_run_with_its_row_and_option() {
    let f = Fixture::new();
    let mut tensors = tiny_weights(1);
    let mut embedding = tensors["model.embed_tokens.weight"].values();
    let mut head = embedding.clone();
    embedding.chunks_mut(16).for_each(|token| token[0] = 5.0);
    head[usize::from(b'Z') * 16..][..16].copy_from_slice(&[[-3e38].as_slice(), &[0.0; 15]].concat());
    tensors.insert("model.embed_tokens.weight".into(), Tensor::f32(&[259, 16], &embedding));
    tensors.insert("lm_head.weight".into(), Tensor::f32(&[259, 16], &head));
    write_weights(&f, &tensors);
    let mut config = read_json(&f.model.join("config.json"));
    config["tie_word_embeddings"] = json!(false);
    fs::write(f.model.join("config.json"), config.to_string()).unwrap();
    let rows = [question("which", json!(["x", "y"]), 0), question("which", json!(["x", "Z"]), 0)];
    write_rows(&f.dir.path().join("data/pick/eval.jsonl"), &rows);
    fs::write(&f.tasks, task("pick", "metric = 'choice'")).unwrap();
    f.eval("a", &["--prompt", "harness", "--limit", "1"]).ok();
    let run = f.eval("b", &["--prompt", "harness"]).expect_code(1);
    run.says(&["pick: ", "pick/eval.jsonl line 2", "log-likelihood of option B is -inf"]);
    assert!(!f.out("b").exists());
}

#[test]
fn a_perplexity_that_overflows_is_omitted_with_a_warning() {
    let f = Fixture::new();
    louder(&f, 1e4);
    f.eval("a", &["--only", "copy"]).ok().says(&["copy: a loss of", "no perplexity"]);
    let scores = read_json(&f.out("a").join("scores.json"))["tasks"][0].clone();
    assert!(scores["nll"]["value"].as_f64().unwrap() > 710.0, "{scores}");
    assert!(scores.get("also").is_none(), "{scores}");
    f.compare(&[f.out("a").to_str().unwrap()]).ok();
}

#[test]
fn row_losses_add_up_to_the_loss_of_the_task() {
    let f = Fixture::new();
    let rows = [row("say it", "short"), row("say it", "a longer answer"), row(&"long ".repeat(18), "lost")];
    write_rows(&f.dir.path().join("data/copy/eval.jsonl"), &rows);
    let copy = task("copy", "metric = 'exact-match'\nmax_new_tokens = 4\nmax_length = 96");
    fs::write(&f.tasks, copy + &task("count", "") + &task("pick", "metric = 'choice'")).unwrap();
    f.eval("a", &[]).ok();
    let (lines, scores) = (outputs(&f.out("a")), read_json(&f.out("a").join("scores.json")));
    for score in scores["tasks"].as_array().unwrap() {
        let own: Vec<&Value> = lines.iter().filter(|line| line["task"] == score["task"]).collect();
        let sum = |name: &str| own.iter().map(|line| line[name].as_f64().unwrap()).sum::<f64>();
        let value = score["nll"]["value"].as_f64().unwrap();
        assert!((sum("nll") / sum("targets") - value).abs() < 1e-12, "{score}");
        assert_eq!(own.len() as u64, score["settings"]["rows"].as_u64().unwrap());
    }
    // One token per byte, and one for the end of the turn.
    let targets = |row: usize| (lines[row]["targets"].clone(), lines[row]["nll"].as_f64().unwrap() > 0.0);
    assert_eq!([targets(0), targets(1), targets(2)], [(json!(6), true), (json!(16), true), (json!(0), false)]);
    // A task scored by its loss alone has prompt and reference, but no answer.
    let count = lines.iter().find(|line| line["task"] == "count").unwrap();
    let prompt = "<|im_start|>user\n100 + 1 =<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!((&count["prompt"], &count["reference"], &count["row"]), (&json!(prompt), &json!("#### 101"), &json!(1)));
    assert!(count.get("output").is_none() && count.get("score").is_none(), "{count}");
}
