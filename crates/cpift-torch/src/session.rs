//! A checkpoint directory opened for training or scoring (weights, model, tokenizer), and saved
//! again.

use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use cpift_core::format::checkpoint::{Excluded, model_of, read_config, with_head_of, with_torch_dtype};
use cpift_core::format::digest::Digest;
use cpift_core::format::json;
use cpift_core::format::tasks::Task;
use cpift_core::hub;
use cpift_core::{BadInput, Checkpoint, Dtype, TensorView};
use cpift_data::{ChatText, MaxLength};
use serde_json::Value;
use tch::{Device, Kind, no_grad};

use crate::home::{self, Home, UnitHome};
use crate::model::{CausalLM, ModelConfig};
use crate::placement::{Pieces, Placement, whole_pieces};
use crate::weights::{self, Parameters, Saver};

/// Files of the inputs other than text.
const PROCESSOR_FILES: [&str; 2] = ["preprocessor_config.json", "processor_config.json"];

/// Dtypes of weights and computation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Precision {
    /// Dtype of the weights in memory, which the optimizer updates (master weights).
    pub master: Kind,
    /// Dtype in which the blocks compute.
    pub compute: Kind,
}

impl Precision {
    /// f32 for both.
    pub const F32: Self = Self { master: Kind::Float, compute: Kind::Float };

    /// `kind` for both: for inference, which needs no finer weights.
    pub fn all(kind: Kind) -> Self {
        Self { master: kind, compute: kind }
    }
}

/// An open checkpoint: weights, model, tokenizer.
pub struct Session {
    /// Checkpoint directory.
    pub folder: PathBuf,
    /// Digest of the checkpoint directory.
    pub digest: Digest,
    /// The checkpoint, memory-mapped.
    pub checkpoint: Checkpoint,
    /// Trainable tensors, which the model shares. They have no memory while their unit is not lent;
    /// [`Session::pieces`] has the values.
    pub parameters: Parameters,
    /// Placement of the weights.
    pub placement: Placement,
    /// The model.
    pub model: CausalLM,
    /// Tokenizer and chat template.
    pub text: ChatText,
    config: Value,
}

/// End of the name of the embedding table.
const EMBEDDING: &str = "embed_tokens.weight";

static STRICT_CONFIG: AtomicBool = AtomicBool::new(false);

/// Sets `--strict-config` for the process: unknown fields of config.json are refused in every
/// checkpoint it opens.
pub fn set_strict_config(strict: bool) {
    STRICT_CONFIG.store(strict, Ordering::Relaxed);
}

pub(crate) fn strict_config() -> bool {
    STRICT_CONFIG.load(Ordering::Relaxed)
}

/// A checkpoint without its weights: enough to turn rows into examples.
pub struct ModelInfo {
    /// Checkpoint directory.
    pub folder: PathBuf,
    /// The parsed config.json.
    pub config: Value,
    /// The model configuration read from it.
    pub numbers: ModelConfig,
    /// Tokenizer and chat template.
    pub text: ChatText,
}

impl ModelInfo {
    /// Reads config.json and the tokenizer of `folder`; `template` overrides the checkpoint's chat
    /// template.
    ///
    /// # Errors
    /// [`BadInput`] if either cannot be used.
    pub fn open(folder: &Path, template: Option<&str>) -> Result<Self> {
        // Of MODEL+ADAPTER the model.
        let own = model_of(folder);
        let own = own.as_deref().unwrap_or(folder);
        if own.symlink_metadata().is_err() {
            let error = BadInput::new(folder, "no such checkpoint").expected("a Hugging Face directory");
            return Err(hub::hinted(error, folder).into());
        }
        let config = read_config(own)?;
        let numbers = ModelConfig::from_json(own, &config)?;
        numbers.check_unknown_fields(own, strict_config())?;
        let text = ChatText::open(own, template)?.with_embedding_rows(numbers.vocab_size);
        Ok(Self { folder: folder.to_owned(), config, numbers, text })
    }

    /// The same with `coef` as factor of the load-balancing loss, if it is given.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] for a model without experts.
    pub fn with_router_aux_loss(mut self, coef: Option<f64>) -> Result<Self> {
        self.numbers.set_router_aux_loss(coef)?;
        Ok(self)
    }

    /// Loads the weights onto `device`.
    ///
    /// # Errors
    /// [`BadInput`] for weights that cannot be used.
    pub fn load(self, device: Device, precision: Precision) -> Result<Session> {
        self.load_at(Placement::on(device), precision)
    }

    /// Loads this process's part of the weights.
    ///
    /// # Errors
    /// [`BadInput`] for weights that cannot be used; no room for them.
    pub fn load_at(self, placement: Placement, precision: Precision) -> Result<Session> {
        let Self { folder, config, mut numbers, text } = self;
        let mut checkpoint = Checkpoint::open(&folder)?;
        let config = with_head_of(checkpoint.tied(), config);
        numbers.untie_as(&checkpoint);
        numbers.keep_text(&mut checkpoint);
        let digest = checkpoint.digest()?;
        let parameters = if placement.lends() {
            weights::refuse_quantised(&checkpoint)?;
            home::placeholders(&checkpoint, precision.master, placement.device)
        } else {
            weights::load_into(&checkpoint, precision.master, &placement.weights)?
        };
        let mut model = CausalLM::new(numbers, &parameters, &folder, precision.compute)?;
        model.row_sharers = placement.group.clone();
        if placement.lends() {
            let wire = |name: &str, leaf: &tch::Tensor| model.wire_kind(name, leaf);
            let home = UnitHome::load(placement.clone(), &model.units, &parameters, &checkpoint, wire)?;
            model.home = Home::Units(Rc::new(home));
        }
        Ok(Session { folder, digest, checkpoint, parameters, placement, model, text, config })
    }

    /// See [`Session::context_of`].
    pub fn context_of(&self, task: &Task, asked: Option<usize>) -> MaxLength {
        context_of(&self.numbers, task, asked)
    }
}

fn context_of(model: &ModelConfig, task: &Task, asked: Option<usize>) -> MaxLength {
    MaxLength::new(asked.unwrap_or(task.max_length), model.max_position_embeddings as usize)
}

impl Session {
    /// Opens `folder` on `device`; `template` overrides the checkpoint's chat template.
    ///
    /// # Errors
    /// [`BadInput`] for a file of the checkpoint that cannot be used.
    pub fn open(folder: &Path, template: Option<&str>, device: Device, precision: Precision) -> Result<Self> {
        ModelInfo::open(folder, template)?.load(device, precision)
    }

    /// Returns a dtype of the checkpoint's weights that `dtype` cannot represent exactly.
    pub fn rounded_by(&self, dtype: Dtype) -> Option<Dtype> {
        self.checkpoint.parameters().map(|view| view.dtype).find(|stored| !dtype.holds(*stored))
    }

    /// Opens `folder` for generation and scoring only, all in `kind`.
    ///
    /// # Errors
    /// As [`Session::open`].
    pub fn for_inference(folder: &Path, template: Option<&str>, device: Device, kind: Kind) -> Result<Self> {
        let mut session = Self::open(folder, template, device, Precision::all(kind))?;
        if device == Device::Cpu && kind == Kind::Float {
            store_by_columns(&mut session.parameters);
        }
        Ok(session)
    }

    /// Maximum length of an example of `task` in tokens: `asked`, else the task's max_length,
    /// capped at the model's context.
    pub fn context_of(&self, task: &Task, asked: Option<usize>) -> MaxLength {
        context_of(&self.model.config, task, asked)
    }

    /// This process's pieces of all parameters; they share storage with the weights.
    pub fn pieces(&self) -> Pieces {
        self.model.unit_home().map_or_else(|| whole_pieces(&self.parameters), |home| home.pieces())
    }

    /// Writes `pieces` as whole tensors into the directory `folder`, weights as `dtype`: rank 0
    /// writes, every other rank takes part without a directory.
    ///
    /// # Errors
    /// A weight that is not finite in `dtype`, a failed write, or a failed collective.
    pub(crate) fn save_pieces(&self, pieces: &Pieces, folder: Option<&Path>, dtype: Dtype) -> Result<()> {
        self.save_beside(pieces, &[], folder, dtype)
    }

    /// As [`Session::save_pieces`], with the tensors `others` of the checkpoint unchanged.
    fn save_beside(
        &self,
        pieces: &Pieces,
        others: &[TensorView<'_>],
        folder: Option<&Path>,
        dtype: Dtype,
    ) -> Result<()> {
        let saver = folder.map(|folder| Saver::create(pieces, others, folder, dtype)).transpose()?;
        let write = |name: &str, tensor: &tch::Tensor| saver.as_ref().map_or(Ok(()), |saver| saver.write(name, tensor));
        match self.model.unit_home() {
            Some(home) => home.each_whole(pieces, write),
            None => pieces.iter().try_for_each(|(name, piece)| write(name, &piece.tensor)),
        }
    }

    /// Writes the model as a Hugging Face directory into `staged`, weights as `dtype`: rank 0
    /// writes, every other rank takes part without a directory.
    ///
    /// # Errors
    /// A weight that is not finite in `dtype`, a failed write, or a failed collective.
    pub fn save(&self, staged: Option<&Path>, dtype: Dtype) -> Result<()> {
        self.save_beside(&self.pieces(), &self.others(), staged, dtype)?;
        staged.map_or(Ok(()), |staged| self.save_settings(staged, dtype))
    }

    /// As [`Session::save`], with `weight` computing each whole parameter by its name on rank 0.
    ///
    /// # Errors
    /// As [`Session::save`], and those of `weight`.
    pub(crate) fn save_each(
        &self,
        staged: Option<&Path>,
        dtype: Dtype,
        weight: impl Fn(&str) -> Result<tch::Tensor>,
    ) -> Result<()> {
        let Some(staged) = staged else { return Ok(()) };
        let saver = Saver::create(&whole_pieces(&self.parameters), &self.others(), staged, dtype)?;
        self.parameters.keys().try_for_each(|name| saver.write(name, &weight(name)?))?;
        self.save_settings(staged, dtype)
    }

    /// Tensors of the checkpoint that are not part of the model and stay as they are.
    fn others(&self) -> Vec<TensorView<'_>> {
        let skipped = self.checkpoint.not_parameters().filter(|(_, why)| *why == Excluded::Skipped);
        skipped.map(|(view, _)| view).collect()
    }

    /// Writes config.json, the tokenizer and the files of other inputs.
    fn save_settings(&self, staged: &Path, dtype: Dtype) -> Result<()> {
        for file in PROCESSOR_FILES.map(|name| self.folder.join(name)).iter().filter(|file| file.exists()) {
            let to = staged.join(file.file_name().unwrap_or_default());
            fs::copy(file, &to).with_context(|| format!("copying {} to {}", file.display(), to.display()))?;
        }
        let config = with_torch_dtype(self.config.clone(), dtype);
        let path = staged.join("config.json");
        fs::write(&path, json::to_text(&config)?).with_context(|| format!("writing {}", path.display()))?;
        self.text.save(staged)
    }
}

/// Stores every matrix but the embedding in column-major order; values and shapes stay. On the CPU
/// oneDNN multiplies a few rows by such a matrix about twice as fast. The embedding stays
/// row-major, because lookups read its rows.
fn store_by_columns(parameters: &mut Parameters) {
    no_grad(|| {
        for (_, weight) in parameters.iter_mut().filter(|(name, w)| w.dim() == 2 && !name.ends_with(EMBEDDING)) {
            // Into the same variable, which the model shares.
            let by_columns = weight.detach().tr().contiguous().tr();
            weight.set_data(&by_columns);
        }
    });
}
