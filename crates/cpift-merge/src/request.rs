//! The merge that was asked for, by flags or by a recipe, before any file is opened.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use cpift_core::Dtype;
use cpift_core::run::cli::Named;

pub use crate::method::Method;
use crate::methods::Conflict;
use crate::setting::Setting;

/// Vectors that are interpolated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// The weights.
    Weights,
    /// Their differences from the base.
    Delta,
}

impl Space {
    /// Name on the command line, in recipes and in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Delta => "delta",
        }
    }
}

/// Treatment of layouts that differ.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayoutPolicy {
    /// A parameter of the base that a model does not have.
    pub missing: Missing,
    /// An integer tensor whose values differ.
    pub integers: Integers,
}

/// Treatment of a parameter of the base that a model does not have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Missing {
    /// The merge is refused.
    #[default]
    Error,
    /// The model counts as having the values of the base.
    Base,
    /// The parameter is not merged: the output has the values of the base.
    Skip,
}

/// Treatment of integer tensors whose values differ.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Integers {
    /// The merge is refused.
    #[default]
    Error,
    /// The output has the values of the base.
    Base,
}

/// Vocabulary of the output of models whose vocabularies differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizerRequest {
    /// Tokenizer of the output.
    pub source: TokenizerSource,
    /// Rules for the rows of single tokens.
    pub tokens: BTreeMap<String, TokenRule>,
    /// Pad the rows of the embeddings to a multiple of this number.
    pub pad_to_multiple_of: Option<usize>,
}

impl TokenizerRequest {
    /// The tokenizer of `source`, without further rules.
    pub fn new(source: TokenizerSource) -> Self {
        Self { source, tokens: BTreeMap::new(), pad_to_multiple_of: None }
    }

    /// As [`Request::relocate`].
    fn relocate(&mut self, of: &impl Fn(&Path) -> Option<PathBuf>) {
        let source = match &mut self.source {
            TokenizerSource::Path(path) => Some(path),
            TokenizerSource::Base | TokenizerSource::Union => None,
        };
        let rows = self.tokens.values_mut().filter_map(|rule| match &mut rule.source {
            Some(TokenRow::Model(path) | TokenRow::Token(path, _) | TokenRow::Id(path, _)) => Some(path),
            Some(TokenRow::Zero) | None => None,
        });
        for path in source.into_iter().chain(rows) {
            if let Some(new) = of(path) {
                *path = new;
            }
        }
    }
}

/// Tokenizer of the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenizerSource {
    /// The tokenizer of the base, or first model.
    Base,
    /// The tokenizer of the base, with the tokens of all other models added.
    Union,
    /// The tokenizer of a directory.
    Path(PathBuf),
}

/// Rule for the row of a token in models that do not have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRule {
    /// Source of the row; by default that of the base, of the only model with the token, or the
    /// mean of those that have it.
    pub source: Option<TokenRow>,
    /// Use it in models that have the token, too.
    pub force: bool,
}

/// Source of the row of a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenRow {
    /// Zeros.
    Zero,
    /// The token's row in a model.
    Model(PathBuf),
    /// Another token's row in a model.
    Token(PathBuf, String),
    /// The row of an id in a model.
    Id(PathBuf, usize),
}

/// A merge of models by one [`Method`].
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Method of the merge.
    pub method: Method,
    /// Models in order, without the base. `slerp` takes exactly two, of which the first is t = 0.
    pub models: Vec<ModelRequest>,
    /// Base of the differences, if the method or the space works on differences.
    pub base: Option<PathBuf>,
    /// Position between the two models of `slerp`, 0 to 1.
    pub t: Setting,
    /// Factor of the merged task vector.
    pub lambda: Setting,
    /// Divide by the sum of the weights.
    pub normalize: bool,
    /// Scale the elements that are kept up to the sum of magnitudes of the whole task vector.
    pub rescale: bool,
    /// Seed of the random drop.
    pub seed: u64,
    /// Angle in radians below which, or within which of π, interpolation is linear.
    pub epsilon: f64,
    /// Vectors that are interpolated.
    pub space: Space,
    /// Dtype of the output; by default that of the models.
    pub dtype: Option<Dtype>,
    /// Directory of the output's tokenizer and other side files; by default the base or first
    /// model.
    pub side_files: Option<PathBuf>,
    /// Mask of the elements at which the output is the backbone.
    pub protect: Option<PathBuf>,
    /// Mask of the elements that are merged; elsewhere the output is the backbone.
    pub within: Option<PathBuf>,
    /// Parameters of the method that have no field of their own.
    pub values: Values,
    /// Blocks of layers that the output is made of, in order; none if every model is merged as a
    /// whole. The models above are then those of all blocks.
    pub slices: Vec<Slice>,
    /// Chat template of the output.
    pub chat_template: Option<ChatTemplate>,
    /// Treatment of layouts that differ.
    pub layouts: LayoutPolicy,
    /// Vocabulary of the output; by default all must have the same number of tokens.
    pub tokenizer: Option<TokenizerRequest>,
}

/// Settings of parameters by name, for the parameters that have no field of their own.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Values(BTreeMap<&'static str, Setting>);

/// A block of layers of the output.
#[derive(Debug, Clone, PartialEq)]
pub struct Slice {
    /// Models, base and settings of the block. Its dtype and destination are not used.
    pub request: Request,
    /// Layers taken from each model, all of one length.
    pub layers: Vec<Range<usize>>,
    /// Layers of the base, if the method has one.
    pub base_layers: Option<Range<usize>>,
}

/// Chat template of the output, in place of that of its tokenizer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChatTemplate {
    /// The template that most of the inputs have.
    Auto,
    /// The text of a template.
    Text(String),
}

/// One model of a merge.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelRequest {
    /// Directory of the checkpoint.
    pub path: PathBuf,
    /// Weight of the model.
    pub weight: Setting,
    /// Share of its task vector that is kept, 0 to 1.
    pub density: Setting,
    /// Mask of the elements to which it contributes.
    pub mask: Option<PathBuf>,
    /// Parameters of the model that have no field of their own.
    pub values: Values,
}

impl Values {
    /// The setting of `name`, if it was given.
    pub fn get(&self, name: &str) -> Option<&Setting> {
        self.0.get(name)
    }

    /// Sets the parameter `name`.
    pub fn set(&mut self, name: &'static str, setting: Setting) {
        self.0.insert(name, setting);
    }

    /// Names and settings.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &Setting)> {
        self.0.iter().map(|(name, setting)| (*name, setting))
    }
}

impl Request {
    /// A merge with the defaults of `method` and no models.
    pub fn new(method: Method) -> Self {
        Self {
            method,
            models: Vec::new(),
            base: None,
            t: Setting::constant(0.5),
            lambda: Setting::constant(1.0),
            normalize: method.normalizes(),
            rescale: method.rescales(),
            seed: 0,
            epsilon: method.epsilon(),
            space: Space::Weights,
            dtype: None,
            side_files: None,
            protect: None,
            within: None,
            values: Values::default(),
            slices: Vec::new(),
            chat_template: None,
            layouts: LayoutPolicy::default(),
            tokenizer: None,
        }
    }
}

impl Request {
    /// Directories of the models, the base and the side files.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        let models = self.models.iter().map(|model| model.path.as_path());
        models.chain(self.base.as_deref()).chain(self.side_files.as_deref())
    }

    /// Replaces every directory by the one that `of` returns for it, if any.
    pub(crate) fn relocate(&mut self, of: &impl Fn(&Path) -> Option<PathBuf>) {
        let models = self.models.iter_mut().map(|model| &mut model.path);
        for path in models.chain(&mut self.base).chain(&mut self.side_files) {
            if let Some(new) = of(path) {
                *path = new;
            }
        }
        if let Some(tokenizer) = &mut self.tokenizer {
            tokenizer.relocate(of);
        }
        self.slices.iter_mut().for_each(|slice| slice.request.relocate(of));
    }
}

impl ModelRequest {
    /// The model at `path` with weight and density 1.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            weight: Setting::constant(1.0),
            density: Setting::constant(1.0),
            mask: None,
            values: Values::default(),
        }
    }
}

/// A merge by `cpi`: core regions transplanted, the rest interpolated.
#[derive(Debug, Clone)]
pub(crate) struct CpiRequest {
    /// Checkpoint the tasks were fine-tuned from and the masks were made for.
    pub base: PathBuf,
    /// Path of groups.json, which gives the order of the tasks.
    pub groups: PathBuf,
    /// Checkpoint of each task, in the order in which they were given.
    pub tasks: Vec<Named>,
    /// Core region of each task, in the order in which they were given.
    pub masks: Vec<Named>,
    /// Checkpoint the tasks are folded into; by default the base.
    pub backbone: Option<PathBuf>,
    /// Value of an element that is core to several tasks.
    pub conflict: Conflict,
    /// Weights of backbone and tasks outside the core regions.
    pub weights: TaskWeights,
    /// Vectors that are interpolated.
    pub space: Space,
    /// Angle in radians below which, or within which of π, interpolation is linear.
    pub epsilon: Option<f64>,
}

/// Weights of backbone and tasks outside the core regions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum TaskWeights {
    /// Task i is folded in with weight 1/(i+1), so that backbone and tasks have equal weights.
    Equal,
    /// Spherical mean of backbone and tasks, independent of their order.
    SphericalMean,
    /// Each task is folded in with this weight.
    Omega(f64),
}

/// Destination of a merge.
#[derive(Debug, Clone)]
pub(crate) struct OutputRequest {
    /// Directory that is created.
    pub dir: PathBuf,
    /// Replace an existing output.
    pub force: bool,
    /// Dtype of all parameters; by default that of the inputs.
    pub dtype: Option<Dtype>,
    /// Size of the largest shard in bytes.
    pub shard_size: u64,
    /// Directory of the tokenizer and other side files; by default the base or first model.
    pub side_files: Option<PathBuf>,
    /// Plan only, so that an existing output is no error.
    pub dry_run: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_those_of_the_method() {
        for (method, normalize, rescale) in [
            (Method::Linear, true, false),
            (Method::TaskArithmetic, false, false),
            (Method::Ties, true, false),
            (Method::DareLinear, false, true),
            (Method::DareTies, false, true),
        ] {
            let request = Request::new(method);
            assert_eq!((request.normalize, request.rescale), (normalize, rescale), "{}", method.name());
        }
    }
}
