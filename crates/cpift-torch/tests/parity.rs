//! The model and the optimizer against transformers and PyTorch: fixtures/golden/llama, made by
//! scripts/oracle/golden_llama.py.

use std::path::{Path, PathBuf};

use cpift_core::Checkpoint;
use cpift_core::checkpoint::read_config;
use cpift_torch::data::Batch;
use cpift_torch::model::{CausalLM, ModelConfig};
use cpift_torch::optim::AdamWConfig;
use cpift_torch::schedule::CosineWithWarmup;
use cpift_torch::train::{StepConfig, Trainer, loss_and_gradients};
use cpift_torch::weights::{self, Parameters};
use tch::{Device, IndexOp, Kind, Tensor};

const CASES: [&str; 7] =
    ["gqa_untied", "gqa_tied", "rope_llama3", "rope_linear", "rope_yarn", "rope_dynamic", "mha_bias"];

fn folder(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden/llama").join(case)
}

fn open(case: &str) -> (CausalLM, Parameters) {
    let folder = folder(case);
    let config = ModelConfig::from_json(&folder, &read_config(&folder).unwrap()).unwrap();
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let parameters = weights::load(&checkpoint, Kind::Float, Device::Cpu).unwrap();
    let model = CausalLM::new(config, &parameters, &folder, Kind::Float).unwrap();
    (model, parameters)
}

struct Golden(Checkpoint);

impl Golden {
    fn open(case: &str) -> Self {
        Self(Checkpoint::open(&folder(case).join("golden.safetensors")).unwrap())
    }

    fn get(&self, name: &str) -> Tensor {
        let view = self.0.get(name).unwrap_or_else(|| panic!("{name} is in the golden file"));
        let shape: Vec<i64> = view.shape.iter().map(|n| *n as i64).collect();
        let kind = if view.dtype.is_float() { Kind::Float } else { Kind::Int64 };
        Tensor::from_data_size(view.bytes, &shape, kind)
    }

    /// A batch from transformers' unshifted labels: position t holds the label of token t.
    fn batch(&self, ids: &Tensor, labels: &Tensor) -> Batch {
        let (b, s) = ids.size2().unwrap();
        let ignored = Tensor::full([b, 1], -100, (Kind::Int64, Device::Cpu));
        let shifted = Tensor::cat(&[labels.narrow(1, 1, s - 1), ignored], 1).view([b * s]);
        let places_n = shifted.ne(-100).nonzero().squeeze_dim(1);
        let labels_n = shifted.index_select(0, &places_n);
        Batch { ids_bs: ids.reshape([1, b * s]), places_n, labels_n, lengths: vec![s; b as usize] }
    }
}

fn max_abs(t: &Tensor) -> f64 {
    t.abs().max().double_value(&[])
}

#[test]
fn logits_equal_those_of_transformers() {
    for case in CASES {
        let (model, _) = open(case);
        let golden = Golden::open(case);
        let ids = golden.get("input_ids");
        let (b, s) = ids.size2().unwrap();
        let x = model.hidden(&ids.view([1, b * s]), &model.documents(&vec![s; b as usize]), None);
        let difference = max_abs(&(model.logits(&x) - golden.get("logits").view([1, b * s, -1])));
        assert!(difference <= 1e-4, "{case}: logits differ by {difference}");
    }
}

#[test]
fn loss_and_every_gradient_equal_those_of_transformers() {
    for case in CASES {
        let (model, parameters) = open(case);
        let golden = Golden::open(case);
        let batch = golden.batch(&golden.get("input_ids"), &golden.get("labels"));
        let (loss, grads) = loss_and_gradients(&model, &parameters, &batch, StepConfig::default().pass).unwrap();
        let expected = golden.get("loss").double_value(&[]);
        assert!((loss - expected).abs() < 1e-5, "{case}: loss {loss:?}, expected {expected}");
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
    for case in ["gqa_untied", "gqa_tied"] {
        let (model, parameters) = open(case);
        let golden = Golden::open(case);
        let text = std::fs::read_to_string(folder(case).join("adamw.json")).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let hyper = &json["hyperparameters"];
        let number = |key: &str| hyper[key].as_f64().unwrap();
        let list =
            |key: &str| -> Vec<f64> { json[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect() };
        let optimizer = AdamWConfig {
            betas: (hyper["betas"][0].as_f64().unwrap(), hyper["betas"][1].as_f64().unwrap()),
            eps: number("eps"),
            weight_decay: number("weight_decay"),
            ..AdamWConfig::default()
        };
        let schedule = CosineWithWarmup {
            peak: number("lr"),
            warmup_steps: number("warmup_steps") as usize,
            total_steps: number("steps") as usize,
        };
        let config = StepConfig { optimizer, max_grad_norm: number("max_grad_norm"), ..StepConfig::default() };
        let mut trainer = Trainer::new(&model, &parameters, None, config);
        let (ids, labels) = (golden.get("train.input_ids"), golden.get("train.labels"));
        let (losses, lrs, norms) = (list("losses"), list("lrs"), list("grad_norms"));
        assert_eq!(losses.len(), 10);
        for step in 0..10 {
            let pick = step as i64 % ids.size()[0];
            let batch = golden.batch(&ids.i(pick), &labels.i(pick));
            let lr = schedule.rate(step);
            assert!((lr - lrs[step]).abs() < 1e-12, "{case} step {step}: lr {lr}, expected {}", lrs[step]);
            let (loss, norm) = trainer.step(&[batch], lr, 0).unwrap().read();
            let off = (loss - losses[step]).abs();
            assert!(off < 1e-5, "{case} step {step}: loss {loss}, expected {}", losses[step]);
            assert!((norm - norms[step]).abs() < 1e-4 * norms[step], "{case} step {step}: gradient norm");
        }
    }
}

#[test]
fn micro_batches_make_the_step_of_one_big_batch() {
    let run = |split: bool| {
        let (model, parameters) = open("gqa_untied");
        let golden = Golden::open("gqa_untied");
        let (ids, labels) = (golden.get("input_ids"), golden.get("labels"));
        let batches = if split {
            (0..2).map(|i| golden.batch(&ids.narrow(0, i, 1), &labels.narrow(0, i, 1))).collect()
        } else {
            vec![golden.batch(&ids, &labels)]
        };
        let optimizer = AdamWConfig { eps: 1.0, ..AdamWConfig::default() };
        let mut trainer = Trainer::new(&model, &parameters, None, StepConfig { optimizer, ..StepConfig::default() });
        // A large epsilon, so that the update follows the gradient's size and not its sign alone.
        let figures = trainer.step(&batches, 1e-1, 0).unwrap().read();
        (figures, parameters)
    };
    let ((whole, a), (split, b)) = (run(false), run(true));
    assert!((whole.0 - split.0).abs() < 1e-6 && (whole.1 - split.1).abs() < 1e-5);
    for (name, tensor) in &a {
        let difference = max_abs(&(tensor - &b[name]));
        assert!(difference < 1e-6, "{name} differs by {difference} after the step");
    }
}
