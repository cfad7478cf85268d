//! Low-rank adapters train as in PEFT: fixtures/golden/lora.json, made by
//! scripts/oracle/golden_lora.py.

mod golden;

use cpift_torch::optim::AdamWConfig;
use cpift_torch::train::{LoraConfig, StepConfig, StepInput, Trainer};
use golden::{Golden, batch, list};
use serde_json::Value;

#[test]
fn ten_steps_of_the_adapters_equal_those_of_peft() {
    let file: Value = serde_json::from_str(include_str!("../../../fixtures/golden/lora.json")).unwrap();
    let hyper = &file["adamw"];
    let number = |value: &Value| value.as_f64().unwrap();
    let optimizer = AdamWConfig {
        betas: (number(&hyper["betas"][0]), number(&hyper["betas"][1])),
        eps: number(&hyper["eps"]),
        weight_decay: number(&hyper["weight_decay"]),
        ..AdamWConfig::default()
    };
    let lora = LoraConfig {
        rank: file["rank"].as_i64().unwrap(),
        alpha: number(&file["alpha"]),
        seed: file["seed"].as_u64().unwrap(),
    };
    let cases = file["cases"].as_object().unwrap();
    assert_eq!(cases.len(), 2);
    for (name, expected) in cases {
        let golden = Golden::named(name);
        let (model, parameters) = golden.open_f32();
        let config = StepConfig {
            optimizer,
            max_grad_norm: number(&hyper["max_grad_norm"]),
            lora: Some(lora),
            ..StepConfig::default()
        };
        let mut trainer = Trainer::new(&model, &parameters, None, config).unwrap();
        let (losses, norms) = (list(&expected["losses"]), list(&expected["grad_norms"]));
        for step in 0..losses.len() {
            let documents = batch(&golden.step_documents(step));
            let (loss, norm) = trainer.step(&StepInput::alone(&[documents]), number(&hyper["lr"]), 0).unwrap().read();
            assert!((loss - losses[step]).abs() < 1e-5, "{name} step {step}: loss {loss}, expected {}", losses[step]);
            assert!((norm - norms[step]).abs() < 1e-4 * norms[step], "{name} step {step}: gradient norm {norm}");
        }
        for (parameter, norm) in expected["merged_norms"].as_object().unwrap() {
            // PEFT lists a tied head as well as the embedding.
            let Some(merged) = parameters.get(parameter) else { continue };
            let (found, norm) = (merged.to_kind(tch::Kind::Double).norm().double_value(&[]), number(norm));
            assert!((found - norm).abs() < 1e-5 * norm, "{name}, {parameter}: norm {found}, expected {norm}");
        }
    }
}
