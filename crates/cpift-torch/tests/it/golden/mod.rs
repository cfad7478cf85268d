//! Golden checkpoints of fixtures/golden: models with results of transformers and PyTorch.

use std::path::{Path, PathBuf};

use cpift_core::Checkpoint;
use cpift_core::format::checkpoint::read_config;
use cpift_torch::data::Batch;
use cpift_torch::model::{CausalLM, ModelConfig};
use cpift_torch::weights::{self, Parameters};
use serde_json::Value;
use tch::{Device, IndexOp, Kind, Tensor};

/// A folder of fixtures/golden/llama (golden_llama.py) or fixtures/golden/models
/// (golden_models.py).
pub struct Golden {
    pub name: String,
    folder: PathBuf,
    tensors: Checkpoint,
}

impl Golden {
    /// All golden models under the directory fixtures/golden.
    pub fn all(root: &Path) -> Vec<Self> {
        let mut found = Vec::new();
        for set in ["llama", "models"] {
            for entry in std::fs::read_dir(root.join(set)).expect("a folder of golden models") {
                let folder = entry.expect("a folder entry").path();
                let tensors = Checkpoint::open(&folder.join("golden.safetensors")).expect("golden numbers");
                let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
                found.push(Self { name: format!("{set}/{name}"), folder, tensors });
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        found
    }

    /// The golden models of this checkout.
    pub fn here() -> Vec<Self> {
        Self::all(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden"))
    }

    pub fn named(name: &str) -> Self {
        Self::here().into_iter().find(|g| g.name == name).unwrap_or_else(|| panic!("no golden model {name}"))
    }

    pub fn open(&self, device: Device, master: Kind, compute: Kind) -> (CausalLM, Parameters) {
        let config = ModelConfig::from_json(&self.folder, &read_config(&self.folder).unwrap()).unwrap();
        let parameters = weights::load(&Checkpoint::open(&self.folder).unwrap(), master, device).unwrap();
        let model = CausalLM::new(config, &parameters, &self.folder, compute).unwrap();
        (model, parameters)
    }

    pub fn open_f32(&self) -> (CausalLM, Parameters) {
        self.open(Device::Cpu, Kind::Float, Kind::Float)
    }

    pub fn get(&self, name: &str) -> Tensor {
        let view = self.tensors.get(name).unwrap_or_else(|| panic!("{name} is in the golden file of {}", self.name));
        let shape: Vec<i64> = view.shape.iter().map(|n| *n as i64).collect();
        let kind = if view.dtype.is_float() { Kind::Float } else { Kind::Int64 };
        Tensor::from_data_size(view.bytes, &shape, kind)
    }

    /// Ids and unshifted labels of each document.
    pub fn documents(&self) -> Vec<(Tensor, Tensor)> {
        if self.tensors.get("input_ids").is_some() {
            return rows(&self.get("input_ids"), &self.get("labels"));
        }
        (0..2).map(|i| (self.get(&format!("ids_{i}")), self.get(&format!("labels_{i}")))).collect()
    }

    /// The documents of training step `step`.
    pub fn step_documents(&self, step: usize) -> Vec<(Tensor, Tensor)> {
        if self.tensors.get("train.input_ids").is_none() {
            return self.documents();
        }
        let (ids, labels) = (self.get("train.input_ids"), self.get("train.labels"));
        let pick = step as i64 % ids.size()[0];
        rows(&ids.i(pick), &labels.i(pick))
    }

    /// Expected logits of all documents one after another, [tokens, v].
    pub fn logits(&self) -> Tensor {
        if self.tensors.get("logits").is_some() {
            return self.get("logits").flatten(0, 1);
        }
        Tensor::cat(&[self.get("logits_0"), self.get("logits_1")], 0)
    }

    /// The training curve, if there is one.
    pub fn curve(&self) -> Option<Value> {
        let text = std::fs::read_to_string(self.folder.join("adamw.json")).ok()?;
        Some(serde_json::from_str(&text).unwrap())
    }
}

fn rows(ids: &Tensor, labels: &Tensor) -> Vec<(Tensor, Tensor)> {
    (0..ids.size()[0]).map(|i| (ids.i(i), labels.i(i))).collect()
}

/// A batch of documents with transformers' labels: position t holds the label of token t.
pub fn batch(documents: &[(Tensor, Tensor)]) -> Batch {
    let (mut places, mut labels, mut lengths, mut start) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for (_, own) in documents {
        let own: Vec<i64> = Vec::try_from(own).unwrap();
        let targets = own.iter().enumerate().skip(1).filter(|(_, label)| **label != -100);
        for (t, &label) in targets {
            places.push(start + t as i64 - 1);
            labels.push(label);
        }
        lengths.push(own.len() as i64);
        start += own.len() as i64;
    }
    let ids: Vec<&Tensor> = documents.iter().map(|(ids, _)| ids).collect();
    Batch {
        ids_bs: Tensor::cat(&ids, 0).unsqueeze(0),
        places_n: Tensor::from_slice(&places),
        labels_n: Tensor::from_slice(&labels),
        lengths,
    }
}

pub fn max_abs(t: &Tensor) -> f64 {
    t.to_kind(Kind::Double).abs().max().double_value(&[])
}

pub fn list(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}
