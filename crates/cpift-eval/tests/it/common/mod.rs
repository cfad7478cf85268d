//! A tiny model, its tasks, and runs of cpift-eval.

use std::fs;
use std::path::{Path, PathBuf};

use cpift_testkit::model::{row, tiny_weights, write_tasks, write_tiny_model};
use cpift_testkit::{Run, Tensor, run, write_safetensors};
use serde_json::{Value, json};

/// A model and three tasks: copy, count and pick.
pub struct Fixture {
    pub dir: tempfile::TempDir,
    pub model: PathBuf,
    pub tasks: PathBuf,
}

impl Fixture {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let model = write_tiny_model(&dir.path().join("model"), 1);
        let tasks = write_tasks(&dir.path().join("data"));
        Self { dir, model, tasks }
    }

    pub fn out(&self, name: &str) -> PathBuf {
        self.dir.path().join("runs").join(name)
    }

    pub fn eval(&self, out: &str, more: &[&str]) -> Run {
        let out = self.out(out);
        let fixed = ["run", "--model", self.model.to_str().unwrap(), "--tasks", self.tasks.to_str().unwrap()];
        let fixed = fixed.into_iter().chain(["--out", out.to_str().unwrap(), "--device", "cpu", "--threads", "1"]);
        run(env!("CARGO_BIN_EXE_cpift-eval"), fixed.chain(more.iter().copied()))
    }

    pub fn compare(&self, args: &[&str]) -> Run {
        run(env!("CARGO_BIN_EXE_cpift-eval"), ["compare"].iter().chain(args))
    }
}

pub fn read_json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// Rows of outputs.jsonl.
pub fn outputs(folder: &Path) -> Vec<Value> {
    let text = fs::read_to_string(folder.join("outputs.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

pub fn task(name: &str, more: &str) -> String {
    format!("[[task]]\nname = '{name}'\ntrain = '{name}/train.jsonl'\neval = '{name}/eval.jsonl'\n{more}\n")
}

pub fn question(user: &str, choices: Value, answer: usize) -> Value {
    let mut r = row(user, ["A", "B"][answer]);
    (r["choices"], r["answer"]) = (choices, json!(answer));
    r
}

/// Makes the model of `f` one that continues `chain` token by token, by an output embedding of its
/// own under the tied config. `</think>` is its token 258.
pub fn continue_by(f: &Fixture, chain: &[usize]) {
    let mut weights = tiny_weights(1);
    for (name, tensor) in &mut weights {
        // The blocks add nothing: the next token depends on the last one alone.
        if name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight") {
            *tensor = Tensor::f32(&tensor.shape, &vec![0.0; tensor.values().len()]);
        }
    }
    let (embedding, head) = ("model.embed_tokens.weight", "lm_head.weight");
    let shape = weights[embedding].shape.clone();
    let (values, width) = (weights[embedding].values(), shape[1]);
    let unit = |row: &[f32]| {
        let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
        row.iter().map(|x| x / length).collect::<Vec<f32>>()
    };
    let rows: Vec<Vec<f32>> = values.chunks(width).map(unit).collect();
    let mut heads = vec![vec![0.0; width]; rows.len()];
    chain.windows(2).for_each(|pair| heads[pair[1]] = rows[pair[0]].clone());
    weights.insert(embedding.into(), Tensor::f32(&shape, &rows.concat()));
    weights.insert(head.into(), Tensor::f32(&shape, &heads.concat()));
    fs::remove_file(f.model.join("model.safetensors")).unwrap();
    write_safetensors(&f.model.join("model.safetensors"), &weights);
    let path = f.model.join("tokenizer.json");
    fs::write(&path, fs::read_to_string(&path).unwrap().replace("<|pad|>", "</think>")).unwrap();
}
