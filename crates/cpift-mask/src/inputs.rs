//! The inputs of a mask (base, tuned, squared gradients): opened, compared with each other, cut
//! into parts and hashed.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use anyhow::Result;
use cpift_core::format::checkpoint::{Excluded, check_readable, check_same_parameters, read_config};
use cpift_core::format::digest::Digest;
use cpift_core::format::mask::Scope;
use cpift_core::format::names::{TensorKind, layer};
use cpift_core::record::provenance::Recorder;
use cpift_core::stream::hashing::PieceHasher;
use cpift_core::stream::ties::TieSalt;
use cpift_core::{Checkpoint, Dtype, TensorView};

use crate::part::{CHUNK, Pair, Part};
use crate::vocabulary::match_rows;

/// Two checkpoints of one model and, if given, squared gradients of its parameters.
pub struct Inputs {
    /// Checkpoint before fine-tuning.
    pub base: Checkpoint,
    /// Checkpoint after fine-tuning.
    pub tuned: Checkpoint,
    /// Sums of squared gradients, with the names and shapes of the parameters.
    pub fisher: Option<Checkpoint>,
    /// Elements of the tuned checkpoint in rows of tokens that the base does not have.
    pub extra: u64,
}

/// Digests of base, tuned and, if given, fisher.
pub(crate) type Digests = (Digest, Digest, Option<Digest>);

/// The parameters of the inputs, cut into parts by scope.
pub struct Parts<'a> {
    /// Parts in which elements are chosen, in bytewise order of their labels.
    pub ranked: Vec<Part<'a>>,
    /// Parameters outside D.
    pub(crate) excluded: Part<'a>,
}

impl Inputs {
    /// Opens the inputs and checks that all have the parameters of the base.
    ///
    /// # Errors
    /// [`cpift_core::BadInput`] for an input that cannot be opened, or a name, shape or dtype that
    /// does not match.
    pub(crate) fn open(base: &Path, tuned: &Path, fisher: Option<&Path>) -> Result<Self> {
        let mut inputs = Self {
            base: Checkpoint::open(base)?,
            tuned: Checkpoint::open(tuned)?,
            fisher: fisher.map(Checkpoint::open).transpose()?,
            extra: 0,
        };
        inputs.all().try_for_each(refuse_quantized)?;
        inputs.share_head();
        let Self { base, tuned, fisher, .. } = &mut inputs;
        if let Some(change) = tuned.align_names(base) {
            log::info!("{change}, as in {}", base.path().display());
        }
        inputs.extra = match_rows(base, tuned, fisher.as_mut())?;
        [&inputs.tuned].into_iter().chain(&inputs.fisher).try_for_each(|c| check_same_parameters(&inputs.base, c))?;
        Ok(inputs)
    }

    /// If only one of base and tuned has an output embedding of its own, the other's input
    /// embedding stands for its output embedding, as tied checkpoints are loaded.
    fn share_head(&mut self) {
        const HEAD: &str = "lm_head.weight";
        let Self { base, tuned, .. } = self;
        let (with, without) = if base.tied() { (tuned, base) } else { (base, tuned) };
        if without.tied() && !with.tied() && with.get(HEAD).is_some() {
            log::warn!(
                "{}: {HEAD} is the input embedding, and a parameter of its own in {}: its updates count from the input embedding",
                without.path().display(),
                with.path().display()
            );
            without.untie();
        }
    }

    /// Files of all inputs.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Path> {
        self.all().flat_map(Checkpoint::files)
    }

    /// Returns true if any parameter is stored in more than 32 bits; scores are then computed in
    /// f64.
    pub(crate) fn wide(&self) -> bool {
        self.all().any(|c| c.parameters().any(|v| v.dtype == Dtype::F64))
    }

    fn all(&self) -> impl Iterator<Item = &Checkpoint> {
        [&self.base, &self.tuned].into_iter().chain(&self.fisher)
    }

    /// Cuts the parameters of the base, which the other inputs have too, into the parts of `scope`.
    pub fn parts(&self, scope: Scope, excluded: &[TensorKind]) -> Parts<'_> {
        let mut ranked: BTreeMap<String, Vec<Pair<'_>>> = BTreeMap::new();
        let mut out = Vec::new();
        let [in_base, in_tuned] = [&self.base, &self.tuned].map(positions);
        let in_fisher = self.fisher.as_ref().map(positions).unwrap_or_default();
        for view in self.base.parameters() {
            let tuned = parameter(&self.tuned, view.name);
            let fisher = self.fisher.as_ref().map(|fisher| parameter(fisher, view.name));
            let position = |checkpoint: &Checkpoint, places: &BTreeMap<&str, usize>, view: &TensorView<'_>| {
                let place = places.get(checkpoint.stored_name(view.name)).copied();
                place.filter(|_| view.is_as_stored(checkpoint))
            };
            let positions = [
                position(&self.base, &in_base, &view),
                position(&self.tuned, &in_tuned, &tuned),
                self.fisher.as_ref().zip(fisher.as_ref()).and_then(|(f, view)| position(f, &in_fisher, view)),
            ];
            let pair = Pair { base: view, tuned, fisher, positions };
            if excluded.iter().any(|kind| kind.matches(view.name)) {
                out.push(pair);
            } else {
                ranked.entry(label(scope, view.name)).or_default().push(pair);
            }
        }
        let ranked = ranked.into_iter().map(|(label, pairs)| Part::new(label, pairs)).collect();
        Parts { ranked, excluded: Part::new("excluded", out) }
    }

    /// Number of elements by parameter, as the header of a mask lists them.
    pub(crate) fn numel(&self) -> BTreeMap<String, u64> {
        self.base.parameters().map(|view| (view.name.to_owned(), view.numel() as u64)).collect()
    }

    /// Tensors of the base that are not parameters, with the reason.
    pub(crate) fn not_parameters(&self) -> BTreeMap<String, &'static str> {
        let reason = |why| match why {
            Excluded::Buffer => "a buffer",
            Excluded::NotFloat => "not floating-point",
            Excluded::Tied => "tied to the input embedding",
            Excluded::Skipped => "missing in another checkpoint",
        };
        self.base.not_parameters().map(|(view, why)| (view.name.to_owned(), reason(why))).collect()
    }

    /// Adds the inputs to the record of an output.
    pub(crate) fn record(&self, recorder: &mut Recorder, (base, tuned, fisher): &Digests) {
        recorder.input("base", self.base.path(), base.clone());
        recorder.input("tuned", self.tuned.path(), tuned.clone());
        if let (Some(checkpoint), Some(digest)) = (&self.fisher, fisher) {
            recorder.input("fisher", checkpoint.path(), digest.clone());
        }
    }

    /// Digests of the inputs, to be computed while they are read.
    pub fn digests(&self) -> InputDigests<'_> {
        InputDigests {
            base: InputDigest::new(&self.base),
            tuned: InputDigest::new(&self.tuned),
            fisher: self.fisher.as_ref().map(InputDigest::new),
        }
    }
}

fn refuse_quantized(checkpoint: &Checkpoint) -> Result<()> {
    match checkpoint.folder().filter(|folder| folder.join("config.json").exists()) {
        Some(folder) => check_readable(checkpoint.path(), &read_config(folder)?),
        None => Ok(()),
    }
}

fn parameter<'a>(checkpoint: &'a Checkpoint, name: &str) -> TensorView<'a> {
    checkpoint.get(name).expect("all inputs have the same parameters")
}

/// Index of each tensor among all tensors of `checkpoint`.
fn positions(checkpoint: &Checkpoint) -> BTreeMap<&str, usize> {
    checkpoint.tensors().enumerate().map(|(i, view)| (view.name, i)).collect()
}

fn label(scope: Scope, name: &str) -> String {
    match scope {
        Scope::Global | Scope::Whole => "all parameters".to_owned(),
        Scope::Layer => layer(name).map_or("outside the layers", |(prefix, _)| prefix).to_owned(),
        Scope::Tensor => name.to_owned(),
    }
}

/// `kinds` in order, each once.
pub(crate) fn each_once(kinds: &[TensorKind]) -> Vec<TensorKind> {
    let mut kinds = kinds.to_vec();
    kinds.sort_unstable();
    kinds.dedup();
    kinds
}

/// Digests of all inputs while they are computed.
pub struct InputDigests<'a> {
    base: InputDigest<'a>,
    tuned: InputDigest<'a>,
    fisher: Option<InputDigest<'a>>,
}

impl InputDigests<'_> {
    /// Hashers of base, tuned and fisher; `None` for an input whose digest is known.
    pub(crate) fn hashers(&self) -> [Option<&PieceHasher>; 3] {
        [self.base.hasher(), self.tuned.hasher(), self.fisher.as_ref().and_then(InputDigest::hasher)]
    }

    /// Salt of the tie hashes. The parts of the tuned checkpoint that were not read yet are hashed
    /// now, and no pass hashes it again.
    pub(crate) fn tie_salt(&self) -> Result<TieSalt> {
        self.tuned.get().map(TieSalt::new)
    }

    /// The digests; tensors and side files that were not read yet are read now.
    pub(crate) fn finish(&self) -> Result<Digests> {
        let fisher = self.fisher.as_ref().map(|fisher| fisher.get().cloned()).transpose()?;
        Ok((self.base.get()?.clone(), self.tuned.get()?.clone(), fisher))
    }
}

/// The digest of an input: recorded, or computed while the input is read.
struct InputDigest<'a> {
    checkpoint: &'a Checkpoint,
    hasher: Option<PieceHasher>,
    digest: OnceLock<Digest>,
}

impl<'a> InputDigest<'a> {
    fn new(checkpoint: &'a Checkpoint) -> Self {
        let digest = checkpoint.recorded_digest();
        let specs = || checkpoint.tensors().map(|view| view.spec()).collect::<Vec<_>>();
        let hasher = digest.is_none().then(|| PieceHasher::new(&specs(), CHUNK));
        Self { checkpoint, hasher, digest: digest.map(OnceLock::from).unwrap_or_default() }
    }

    fn hasher(&self) -> Option<&PieceHasher> {
        self.hasher.as_ref().filter(|_| self.digest.get().is_none())
    }

    /// The digest; tensors and side files that were not read yet are read now.
    fn get(&self) -> Result<&Digest> {
        let digest = match self.hasher() {
            Some(hasher) => {
                hasher.add_missing(self.checkpoint);
                self.checkpoint.with_adapter(hasher.finish(self.checkpoint.folder())?)
            }
            None => Digest::blank(),
        };
        Ok(self.digest.get_or_init(|| digest))
    }
}
