//! A checkpoint folder opened for training or scoring: weights, model, tokenizer; and saved again as one.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use cpift_core::format::checkpoint::{read_config, with_head_of, with_torch_dtype};
use cpift_core::format::digest::Digest;
use cpift_core::format::json;
use cpift_core::format::tasks::Task;
use cpift_core::{BadInput, Checkpoint, Dtype};
use serde_json::Value;
use tch::{Device, Kind};

use crate::model::{CausalLM, ModelConfig};
use crate::weights::{self, Parameters};
use cpift_data::{ChatText, MaxLength};

/// The dtypes of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Precision {
    /// Of the weights in memory, which the optimizer moves.
    pub master: Kind,
    /// Of what blocks compute.
    pub compute: Kind,
}

impl Precision {
    /// f32 throughout.
    pub const F32: Self = Self { master: Kind::Float, compute: Kind::Float };

    /// Weights and blocks alike in `kind`: for inference, which has no use for finer weights.
    pub fn all(kind: Kind) -> Self {
        Self { master: kind, compute: kind }
    }
}

/// A model with everything that belongs to it.
pub struct Session {
    /// The folder it came from.
    pub folder: PathBuf,
    /// Digest of that folder.
    pub digest: Digest,
    /// The mapped checkpoint it came from.
    pub checkpoint: Checkpoint,
    /// Trainable tensors; they share storage with the model's.
    pub parameters: Parameters,
    /// The model.
    pub model: CausalLM,
    /// Tokenizer and chat template.
    pub text: ChatText,
    config: Value,
}

static STRICT_CONFIG: AtomicBool = AtomicBool::new(false);

/// Sets whether fields of config.json that this program does not know are refused (`--strict-config`), for the process: every folder that it
/// opens is read alike.
pub fn set_strict_config(strict: bool) {
    STRICT_CONFIG.store(strict, Ordering::Relaxed);
}

pub(crate) fn strict_config() -> bool {
    STRICT_CONFIG.load(Ordering::Relaxed)
}

/// What a checkpoint folder says without its weights: enough to turn rows into examples.
pub struct ModelInfo {
    /// The folder.
    pub folder: PathBuf,
    /// config.json.
    pub config: Value,
    /// What the model reads from it.
    pub numbers: ModelConfig,
    /// Tokenizer and chat template.
    pub text: ChatText,
}

impl ModelInfo {
    /// Reads config.json and the tokenizer of `folder`; `template` takes precedence over the checkpoint's own.
    ///
    /// # Errors
    /// [`BadInput`] for either.
    pub fn open(folder: &Path, template: Option<&str>) -> Result<Self> {
        if folder.symlink_metadata().is_err() {
            return Err(BadInput::new(folder, "no such checkpoint").expected("a Hugging Face folder").into());
        }
        let config = read_config(folder)?;
        let numbers = ModelConfig::from_json(folder, &config)?;
        numbers.check_unknown_fields(folder, strict_config())?;
        let text = ChatText::open(folder, template)?.with_embedding_rows(numbers.vocab_size);
        Ok(Self { folder: folder.to_owned(), config, numbers, text })
    }

    /// Loads the weights onto `device`.
    ///
    /// # Errors
    /// [`BadInput`] for weights that cannot be used.
    pub fn load(self, device: Device, precision: Precision) -> Result<Session> {
        let Self { folder, config, mut numbers, text } = self;
        let checkpoint = Checkpoint::open(&folder)?;
        let config = with_head_of(checkpoint.tied(), config);
        numbers.untie_as(&checkpoint);
        let digest = checkpoint.digest()?;
        let parameters = weights::load(&checkpoint, precision.master, device)?;
        let model = CausalLM::new(numbers, &parameters, &folder, precision.compute)?;
        Ok(Session { folder, digest, checkpoint, parameters, model, text, config })
    }

    /// As [`Session::context_of`].
    pub fn context_of(&self, task: &Task, asked: Option<usize>) -> MaxLength {
        context_of(&self.numbers, task, asked)
    }
}

fn context_of(model: &ModelConfig, task: &Task, asked: Option<usize>) -> MaxLength {
    MaxLength::new(asked.unwrap_or(task.max_length), model.max_position_embeddings as usize)
}

impl Session {
    /// Opens `folder` on `device`; `template` takes precedence over the checkpoint's own.
    ///
    /// # Errors
    /// [`BadInput`] for anything in the folder that cannot be used.
    pub fn open(folder: &Path, template: Option<&str>, device: Device, precision: Precision) -> Result<Self> {
        ModelInfo::open(folder, template)?.load(device, precision)
    }

    /// A dtype of the checkpoint's weights with values that `dtype` does not have.
    pub fn rounded_by(&self, dtype: Dtype) -> Option<Dtype> {
        self.checkpoint.parameters().map(|view| view.dtype).find(|stored| !dtype.holds(*stored))
    }

    /// As [`Session::open`], to generate and score only, all in `kind`.
    ///
    /// # Errors
    /// As [`Session::open`].
    pub fn for_inference(folder: &Path, template: Option<&str>, device: Device, kind: Kind) -> Result<Self> {
        let mut session = Self::open(folder, template, device, Precision::all(kind))?;
        if device == Device::Cpu && kind == Kind::Float {
            weights::store_by_columns(&mut session.parameters);
        }
        Ok(session)
    }

    /// The longest example of `task` in tokens: its max_length, or `asked` over it, within the model's own context.
    pub fn context_of(&self, task: &Task, asked: Option<usize>) -> MaxLength {
        context_of(&self.model.config, task, asked)
    }

    /// Writes the model as a Hugging Face folder into `staged`, weights as `dtype`.
    ///
    /// # Errors
    /// I/O errors.
    pub fn save(&self, staged: &Path, dtype: Dtype) -> Result<()> {
        weights::save(&self.parameters, staged, dtype)?;
        let config = with_torch_dtype(self.config.clone(), dtype);
        let path = staged.join("config.json");
        fs::write(&path, json::to_text(&config)?).with_context(|| format!("writing {}", path.display()))?;
        self.text.save(staged)
    }
}
