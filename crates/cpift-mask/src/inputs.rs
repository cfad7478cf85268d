//! The checkpoints and squared gradients that scores come from, checked against each other, and their digests.

use std::path::Path;

use anyhow::Result;
use cpift_core::format::checkpoint::check_same_parameters;
use cpift_core::format::digest::Digest;
use cpift_core::format::names::TensorKind;
use cpift_core::record::provenance::Recorder;
use cpift_core::stream::hashing::PieceHasher;
use cpift_core::{Checkpoint, Dtype};

use crate::parts::CHUNK;

/// Checkpoints of one model, and the squared gradients where they are given.
pub struct Inputs {
    /// Before fine-tuning.
    pub base: Checkpoint,
    /// After.
    pub tuned: Checkpoint,
    /// Sums of squared gradients, with the names and shapes of the parameters.
    pub fisher: Option<Checkpoint>,
}

/// Digests of base, tuned, and fisher where it is given.
pub type Digests = (Digest, Digest, Option<Digest>);

impl Inputs {
    /// Opens what is given, and checks that all have the parameters of the base.
    ///
    /// # Errors
    /// [`cpift_core::BadInput`] for what cannot be opened or differs in a name, a shape, or a dtype that is not floating-point.
    pub fn open(base: &Path, tuned: &Path, fisher: Option<&Path>) -> Result<Self> {
        let mut inputs = Self {
            base: Checkpoint::open(base)?,
            tuned: Checkpoint::open(tuned)?,
            fisher: fisher.map(Checkpoint::open).transpose()?,
        };
        inputs.share_head();
        [&inputs.tuned].into_iter().chain(&inputs.fisher).try_for_each(|c| check_same_parameters(&inputs.base, c))?;
        Ok(inputs)
    }

    /// Where one of base and tuned has an output embedding of its own and the other ties it, the tied one's input embedding stands for both:
    /// the updates of the output embedding count from there.
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

    /// All files of all inputs.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.all().flat_map(Checkpoint::files)
    }

    /// Whether any parameter is stored wider than f32.
    pub fn wide(&self) -> bool {
        self.all().any(|c| c.parameters().any(|v| v.dtype == Dtype::F64))
    }

    fn all(&self) -> impl Iterator<Item = &Checkpoint> {
        [&self.base, &self.tuned].into_iter().chain(&self.fisher)
    }

    /// Writes the inputs into the record of what is made from them.
    pub fn record(&self, recorder: &mut Recorder, (base, tuned, fisher): &Digests) {
        recorder.input("base", self.base.path(), base.clone());
        recorder.input("tuned", self.tuned.path(), tuned.clone());
        if let (Some(checkpoint), Some(digest)) = (&self.fisher, fisher) {
            recorder.input("fisher", checkpoint.path(), digest.clone());
        }
    }

    /// The digests, to be computed while the inputs are read.
    pub fn digests(&self) -> InputDigests<'_> {
        InputDigests {
            base: InputDigest::new(&self.base),
            tuned: InputDigest::new(&self.tuned),
            fisher: self.fisher.as_ref().map(InputDigest::new),
        }
    }
}

/// `kinds` in order, each once.
pub fn each_once(kinds: &[TensorKind]) -> Vec<TensorKind> {
    let mut kinds = kinds.to_vec();
    kinds.sort_unstable();
    kinds.dedup();
    kinds
}

/// The digests of all inputs in the making.
pub struct InputDigests<'a> {
    base: InputDigest<'a>,
    tuned: InputDigest<'a>,
    fisher: Option<InputDigest<'a>>,
}

impl InputDigests<'_> {
    /// What the pieces of base, tuned and fisher are to be given to; none where there is nothing to compute.
    pub fn hashers(&self) -> [Option<&PieceHasher>; 3] {
        [self.base.hasher(), self.tuned.hasher(), self.fisher.as_ref().and_then(InputDigest::hasher)]
    }

    /// The digests, once what was read is hashed: the rest is read now.
    ///
    /// # Errors
    /// I/O errors on the side files.
    pub fn finish(self) -> Result<Digests> {
        Ok((self.base.finish()?, self.tuned.finish()?, self.fisher.map(InputDigest::finish).transpose()?))
    }
}

/// The digest of an input: recorded, or computed while the input is read.
enum InputDigest<'a> {
    /// It was recorded.
    Recorded(Digest),
    /// It is being computed.
    Computed(&'a Checkpoint, PieceHasher),
}

impl<'a> InputDigest<'a> {
    /// Of `checkpoint`.
    fn new(checkpoint: &'a Checkpoint) -> Self {
        checkpoint.recorded_digest().map_or_else(
            || {
                let specs: Vec<_> = checkpoint.tensors().map(|view| view.spec()).collect();
                Self::Computed(checkpoint, PieceHasher::new(&specs, CHUNK))
            },
            Self::Recorded,
        )
    }

    /// What the pieces of the input are to be given to; none where the digest is known.
    fn hasher(&self) -> Option<&PieceHasher> {
        match self {
            Self::Recorded(_) => None,
            Self::Computed(_, hasher) => Some(hasher),
        }
    }

    /// The digest, once what was read is hashed: the rest is read now.
    ///
    /// # Errors
    /// I/O errors on the side files.
    fn finish(self) -> Result<Digest> {
        match self {
            Self::Recorded(digest) => Ok(digest),
            Self::Computed(checkpoint, hasher) => {
                hasher.add_missing(checkpoint);
                hasher.finish(checkpoint.folder())
            }
        }
    }
}
