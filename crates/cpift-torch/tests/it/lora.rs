//! Low-rank adapters train as in PEFT: fixtures/golden/lora.json and fixtures/golden/lora, made by
//! scripts/oracle/golden_lora.py.

use std::path::Path;

use crate::golden::{Golden, batch, list};
use cpift_core::format::checkpoint::{LoraFile, read_lora};
use cpift_torch::optim::AdamWConfig;
use cpift_torch::train::{
    LoraConfig, LoraOutput, PassConfig, StepConfig, StepInput, Trainer, attach_adapters, loss_and_gradients,
};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

fn file() -> Value {
    serde_json::from_str(include_str!("../../../../fixtures/golden/lora.json")).unwrap()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

fn lora(file: &Value, case: &Value) -> LoraConfig {
    let named = case["target_modules"].as_array().into_iter().flatten();
    LoraConfig {
        rank: file["rank"].as_i64().unwrap(),
        alpha: number(&file["alpha"]),
        rank_stabilized: case["use_rslora"].as_bool().unwrap(),
        targets: named.map(|name| name.as_str().unwrap().to_owned()).collect(),
        output: LoraOutput::Adapter,
        seed: file["seed"].as_u64().unwrap(),
    }
}

fn step_config(hyper: &Value) -> StepConfig {
    let optimizer = AdamWConfig {
        betas: (number(&hyper["betas"][0]), number(&hyper["betas"][1])),
        eps: number(&hyper["eps"]),
        weight_decay: number(&hyper["weight_decay"]),
        ..AdamWConfig::default()
    };
    StepConfig { optimizer, max_grad_norm: number(&hyper["max_grad_norm"]), ..StepConfig::default() }
}

/// PEFT's adapter of `case`.
fn adapter(case: &str) -> LoraFile {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden/lora").join(case);
    read_lora(&folder).unwrap()
}

#[test]
fn ten_steps_of_the_adapters_equal_those_of_peft() {
    let file = file();
    let hyper = &file["adamw"];
    let cases = file["cases"].as_object().unwrap();
    assert_eq!(cases.len(), 4);
    for (name, expected) in cases {
        let golden = Golden::named(expected["model"].as_str().unwrap());
        let (model, parameters) = golden.open_f32();
        let config = lora(&file, expected);
        let base: Vec<Tensor> = parameters.values().map(|weight| weight.detach().copy()).collect();
        attach_adapters(&model, &parameters, &config).unwrap();
        let mut trainer = Trainer::new(&model, &parameters, None, step_config(hyper)).unwrap();
        let (losses, norms) = (list(&expected["losses"]), list(&expected["grad_norms"]));
        for step in 0..losses.len() {
            let documents = batch(&golden.step_documents(step));
            let (loss, norm) = trainer.step(&StepInput::alone(&[documents]), number(&hyper["lr"]), 0).unwrap().read();
            assert!((loss - losses[step]).abs() < 1e-5, "{name} step {step}: loss {loss}, expected {}", losses[step]);
            assert!((norm - norms[step]).abs() < 1e-4 * norms[step], "{name} step {step}: gradient norm {norm}");
        }
        let peft = adapter(name);
        let mut compared = 0;
        for (parameter, before) in parameters.keys().zip(base) {
            assert_eq!(parameters[parameter], before, "{parameter} of the base has moved");
            let Some(found) = model.adapter(parameter) else { continue };
            let module = parameter.strip_suffix(".weight").unwrap();
            // B is read with its scale.
            let pair = &peft.pairs[&format!("/{module}")];
            for (factor, found, expected) in
                [("A", found.a.detach(), &pair.right), ("B", found.b.detach() * found.scale, &pair.left)]
            {
                let expected = Tensor::from_slice(expected).view(found.size().as_slice());
                let off = (found - &expected).abs().max().double_value(&[]);
                assert!(off < 2e-5, "{name}, {module}: {factor} is off by {off}");
            }
            compared += 1;
            let merged = &parameters[parameter] + found.b.matmul(&found.a) * found.scale;
            let (norm, expected) =
                (merged.to_kind(Kind::Double).norm().double_value(&[]), number(&expected["merged_norms"][parameter]));
            assert!((norm - expected).abs() < 1e-5 * expected, "{name}, {parameter}: norm {norm}, expected {expected}");
        }
        assert_eq!(compared, peft.pairs.len(), "{name}: every adapter of PEFT");
    }
}

/// Recomputation, updates in the backward pass and split batches change no result beyond rounding.
#[test]
fn options_that_save_memory_train_the_same_adapters() {
    let file = file();
    let case = &file["cases"]["some_rslora"];
    let golden = Golden::named(case["model"].as_str().unwrap());
    let usual = StepConfig { max_grad_norm: 0.0, ..step_config(&file["adamw"]) };
    let train = |config: StepConfig, split: bool| {
        let (model, parameters) = golden.open_f32();
        attach_adapters(&model, &parameters, &lora(&file, case)).unwrap();
        let mut trainer = Trainer::new(&model, &parameters, None, config).unwrap();
        for step in 0..3 {
            let documents = golden.step_documents(step);
            let batches: Vec<_> = documents.chunks(if split { 1 } else { documents.len() }).map(batch).collect();
            trainer.step(&StepInput::alone(&batches), 5e-3, 0).unwrap();
        }
        let adapters = parameters.keys().filter_map(|name| model.adapter(name));
        adapters.flat_map(|adapter| [adapter.a.detach().copy(), adapter.b.detach().copy()]).collect::<Vec<Tensor>>()
    };
    let plain = train(usual, false);
    assert_eq!(plain.len(), 2 * 3 * 3);
    let recomputed = StepConfig { pass: PassConfig { checkpointing: true, ..usual.pass }, ..usual };
    assert_eq!(train(recomputed, false), plain);
    assert_eq!(train(StepConfig { optimizer_in_backward: true, ..usual }, false), plain);
    for (split, whole) in train(usual, true).iter().zip(&plain) {
        assert!((split - whole).abs().max().double_value(&[]) < 1e-5);
    }
}

/// In bf16 the base and its products are rounded, the adapters are not.
#[test]
fn adapters_of_a_bf16_base_are_f32_and_learn() {
    let file = file();
    let case = &file["cases"]["all_linear"];
    let golden = Golden::named(case["model"].as_str().unwrap());
    let (model, parameters) = golden.open(Device::Cpu, Kind::BFloat16, Kind::BFloat16);
    attach_adapters(&model, &parameters, &lora(&file, case)).unwrap();
    let mut trainer = Trainer::new(&model, &parameters, None, step_config(&file["adamw"])).unwrap();
    let losses = list(&case["losses"]);
    for (step, expected) in losses.iter().enumerate() {
        let documents = batch(&golden.step_documents(step));
        let (loss, _) = trainer.step(&StepInput::alone(&[documents]), 5e-3, 0).unwrap().read();
        assert!((loss - expected).abs() < 0.06, "step {step}: loss {loss}, in f32 {expected}");
    }
    for name in parameters.keys().filter(|name| model.adapter(name).is_some()) {
        assert_eq!(parameters[name].kind(), Kind::BFloat16);
        assert_eq!(model.adapter(name).unwrap().b.kind(), Kind::Float);
    }
}

/// Without a target, every linear layer of the blocks has an adapter but routers and experts.
#[test]
fn experts_take_no_adapters() {
    let file = file();
    let golden = Golden::named("models/qwen3_moe_aux");
    let (model, parameters) = golden.open_f32();
    let all = LoraConfig { targets: Vec::new(), ..lora(&file, &file["cases"]["experts"]) };
    for target in ["mlp.gate", "experts.0.up_proj"] {
        let config = LoraConfig { targets: vec![target.into()], ..all.clone() };
        let error = attach_adapters(&model, &parameters, &config).unwrap_err().to_string();
        assert!(error.contains(target) && error.contains("experts take no adapters"), "{error}");
    }
    attach_adapters(&model, &parameters, &all).unwrap();
    for (name, weight) in &parameters {
        let linear = name.starts_with("model.layers.") && weight.dim() == 2;
        let expected = linear && !name.contains(".experts.") && !name.contains(".mlp.gate.");
        assert_eq!(model.adapter(name).is_some(), expected, "{name}");
    }
    // Layers 0 to 4 without layer 1 have a dense MLP; only they have adapters now, and the first
    // layer with experts, behind them, has none.
    let config = LoraConfig { targets: vec!["down_proj".into()], ..all };
    let (model, parameters) = golden.open_f32();
    attach_adapters(&model, &parameters, &config).unwrap();
    let mut trainer = Trainer::new(&model, &parameters, None, step_config(&file["adamw"])).unwrap();
    let losses: Vec<f64> = (0..3)
        .map(|step| {
            let documents = batch(&golden.step_documents(step));
            trainer.step(&StepInput::alone(&[documents]), 5e-3, 0).unwrap().read().0
        })
        .collect();
    assert!(losses[2] < losses[0], "{losses:?}");
    assert_eq!(parameters.keys().filter(|name| model.adapter(name).is_some()).count(), 4);
}

#[test]
fn a_target_that_the_model_lacks_is_refused_with_those_it_has() {
    let file = file();
    let (model, parameters) = Golden::named("models/qwen2").open_f32();
    let config =
        LoraConfig { targets: vec!["q_proj".into(), "c_attn".into()], ..lora(&file, &file["cases"]["all_linear"]) };
    let error = attach_adapters(&model, &parameters, &config).unwrap_err().to_string();
    assert!(error.contains("--lora-target c_attn") && error.contains("down_proj, gate_proj, k_proj"), "{error}");
    // The end of a name is the whole of its last parts.
    let config = LoraConfig { targets: vec!["proj".into()], ..config };
    assert!(attach_adapters(&model, &parameters, &config).is_err());
    assert!(
        loss_and_gradients(
            &model,
            &parameters,
            &batch(&Golden::named("models/qwen2").documents()),
            StepConfig::default().pass
        )
        .is_ok()
    );
}
