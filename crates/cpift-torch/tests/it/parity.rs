//! Every family and the optimizer against transformers and PyTorch: fixtures/golden, made by
//! scripts/oracle/golden_llama.py and golden_models.py.

use crate::golden::{Golden, batch, list, max_abs};
use cpift_torch::optim::AdamWConfig;
use cpift_torch::schedule::{Schedule, Shape};
use cpift_torch::train::{StepConfig, StepInput, Trainer, loss_and_gradients};
use tch::{Device, Kind, no_grad};

#[test]
fn every_family_is_there() {
    let names: Vec<String> = Golden::here().into_iter().map(|g| g.name).collect();
    for case in [
        "llama/rope_llama3",
        "models/mistral_window",
        "models/ministral",
        "models/qwen2",
        "models/qwen3",
        "models/gemma2",
        "models/gemma3",
        "models/phi3",
        "models/phi4_mini",
        "models/olmo2",
        "models/granite",
        "models/smollm3",
        "models/qwen3_moe",
        "models/qwen3_moe_aux",
    ] {
        assert!(names.iter().any(|n| n == case), "{case} is among {names:?}");
    }
}

#[test]
fn logits_equal_those_of_transformers() {
    for golden in Golden::here() {
        let (model, _) = golden.open_f32();
        let all = batch(&golden.documents());
        let x = model.hidden(&all.ids_bs, &model.documents(&all.lengths), None);
        let difference = max_abs(&(model.logits(&x).squeeze_dim(0) - golden.logits()));
        assert!(difference <= 1e-4, "{}: logits differ by {difference}", golden.name);
    }
}

/// The tolerances of examples/check_parity.rs, which holds CUDA to them.
#[test]
fn blocks_that_compute_in_bf16_are_as_close_as_bf16_allows() {
    for golden in Golden::here() {
        let (model, parameters) = golden.open(Device::Cpu, Kind::Float, Kind::BFloat16);
        let all = batch(&golden.documents());
        let x = no_grad(|| model.hidden(&all.ids_bs, &model.documents(&all.lengths), None));
        assert_eq!(x.kind(), Kind::BFloat16);
        let (logits, expected) = (model.logits(&x).squeeze_dim(0), golden.logits());
        let relative = max_abs(&(&logits - &expected)) / max_abs(&expected);
        assert!(relative > 1e-5 && relative <= 1e-1, "{}: logits differ by {relative} of their largest", golden.name);
        let (loss, grads) = loss_and_gradients(&model, &parameters, &all, StepConfig::default().pass).unwrap();
        let off = (loss - golden.get("loss").double_value(&[])).abs();
        assert!(off <= 2e-2, "{}: the loss differs by {off}", golden.name);
        for (name, grad) in &grads {
            let expected = golden.get(&format!("grad.{name}"));
            let cosine = (grad.to_kind(Kind::Float) * &expected).sum(Kind::Double).double_value(&[])
                / (grad.norm().double_value(&[]) * expected.norm().double_value(&[]));
            assert!(cosine > 0.98, "{}: the gradient of {name} points elsewhere, cosine {cosine}", golden.name);
        }
    }
}

#[test]
fn loss_and_every_gradient_equal_those_of_transformers() {
    for golden in Golden::here() {
        let (case, (model, parameters)) = (&golden.name, golden.open_f32());
        let all = batch(&golden.documents());
        let (loss, grads) = loss_and_gradients(&model, &parameters, &all, StepConfig::default().pass).unwrap();
        let expected = golden.get("loss").double_value(&[]);
        assert!((loss - expected).abs() < 1e-5, "{case}: loss {loss}, expected {expected}");
        assert!(grads.keys().eq(parameters.keys()), "{case}: a gradient for every parameter");
        for (name, grad) in &grads {
            let expected = golden.get(&format!("grad.{name}"));
            let relative = max_abs(&(grad - &expected)) / max_abs(&expected);
            assert!(relative <= 1e-4, "{case}: the gradient of {name} differs by {relative}");
        }
    }
}

#[test]
fn ten_adamw_steps_equal_those_of_pytorch() {
    let mut curves = 0;
    for golden in Golden::here() {
        let Some(curve) = golden.curve() else { continue };
        curves += 1;
        let (case, (model, parameters)) = (&golden.name, golden.open_f32());
        let hyper = &curve["hyperparameters"];
        let number = |key: &str| hyper[key].as_f64().unwrap();
        let optimizer = AdamWConfig {
            betas: (hyper["betas"][0].as_f64().unwrap(), hyper["betas"][1].as_f64().unwrap()),
            eps: number("eps"),
            weight_decay: number("weight_decay"),
            ..AdamWConfig::default()
        };
        let schedule = Schedule {
            peak: number("lr"),
            warmup_steps: number("warmup_steps") as usize,
            total_steps: number("steps") as usize,
            shape: Shape::Cosine { min: 0.0 },
        };
        let config = StepConfig { optimizer, max_grad_norm: number("max_grad_norm"), ..StepConfig::default() };
        let mut trainer = Trainer::new(&model, &parameters, None, config).unwrap();
        let (losses, lrs, norms) = (list(&curve["losses"]), list(&curve["lrs"]), list(&curve["grad_norms"]));
        assert_eq!(losses.len(), 10);
        for step in 0..10 {
            let lr = schedule.rate(step);
            assert!((lr - lrs[step]).abs() < 1e-12, "{case} step {step}: lr {lr}, expected {}", lrs[step]);
            let (loss, norm) =
                trainer.step(&StepInput::alone(&[batch(&golden.step_documents(step))]), lr, 0).unwrap().read();
            let off = (loss - losses[step]).abs();
            assert!(off < 1e-5, "{case} step {step}: loss {loss}, expected {}", losses[step]);
            assert!((norm - norms[step]).abs() < 1e-4 * norms[step], "{case} step {step}: gradient norm {norm}");
        }
    }
    assert!(curves >= 10, "{curves} training curves");
}
