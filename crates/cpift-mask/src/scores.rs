//! The score of an element, and the scores of a part's chunks.

use anyhow::Result;
use cpift_core::mask::Metric;
use cpift_core::select::{Score, Source};
use cpift_core::{BadInput, TensorView, dispatch};

use crate::parts::{CHUNK, Chunk, Pair, Part};

/// ε of [`Metric::Relative`]: keeps a weight that was zero from dividing by zero.
const EPSILON: f64 = 1e-8;

/// Elements whose scores are computed at a time: small enough for the first cache.
pub const BLOCK: usize = 1024;

/// Room for the values and scores of one block.
pub struct Block<T> {
    base: [T; BLOCK],
    scores: [T; BLOCK],
}

impl<T: Score + Arithmetic> Block<T> {
    /// All zero.
    pub fn new() -> Self {
        Self { base: [T::default(); BLOCK], scores: [T::default(); BLOCK] }
    }

    /// The scores of elements `start..start + len` of a pair. Call inside [`cpift_core::dispatch!`].
    #[inline(always)]
    pub fn scores(&mut self, pair: &Pair<'_>, metric: Metric, start: usize, len: usize) -> &[T] {
        let (base, scores) = (&mut self.base[..len], &mut self.scores[..len]);
        pair.base.read(start, base);
        pair.tuned.read(start, scores);
        match metric {
            Metric::Magnitude => scores.iter_mut().zip(base).for_each(|(t, b)| *t = t.distance(*b)),
            Metric::Relative => {
                let epsilon = T::from_f64(EPSILON);
                scores.iter_mut().zip(base).for_each(|(t, b)| *t = t.distance(*b).relative_to(*b, epsilon));
            }
        }
        scores
    }
}

impl<T: Score + Arithmetic> Default for Block<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// What scores are made with.
pub trait Arithmetic: Sized {
    /// |self − base|, never −0.0.
    fn distance(self, base: Self) -> Self;
    /// self / (|base| + epsilon).
    fn relative_to(self, base: Self, epsilon: Self) -> Self;
}

macro_rules! arithmetic_impl {
    ($t:ty) => {
        impl Arithmetic for $t {
            #[inline(always)]
            fn distance(self, base: Self) -> Self {
                (self - base).abs()
            }

            #[inline(always)]
            fn relative_to(self, base: Self, epsilon: Self) -> Self {
                self / (base.abs() + epsilon)
            }
        }
    };
}

arithmetic_impl!(f32);
arithmetic_impl!(f64);

/// The scores of a part, for the search that keeps none of them.
pub struct PartScores<'a> {
    /// The part.
    pub part: &'a Part<'a>,
    /// The quantity that is ranked.
    pub metric: Metric,
}

impl<T: Score + Arithmetic> Source<T> for PartScores<'_> {
    fn chunks(&self) -> usize {
        self.part.chunks.len()
    }

    fn scores(&self, i: usize, out: &mut Vec<T>) {
        let chunk = self.part.chunks[i];
        let pair = &self.part.pairs[chunk.pair];
        out.clear();
        out.reserve(CHUNK);
        let mut block = Block::<T>::new();
        dispatch!({
            for (start, len) in chunk.blocks() {
                out.extend_from_slice(block.scores(pair, self.metric, start, len));
            }
        });
    }
}

/// Refuses a chunk with an element that is NaN or infinite.
///
/// # Errors
/// [`BadInput`] naming the first such element of the chunk.
pub fn refuse_non_finite<T: Score>(pair: &Pair<'_>, chunk: Chunk) -> Result<()> {
    let mut values = vec![T::default(); chunk.len];
    let mut first = |view: &TensorView<'_>| {
        view.read(chunk.start, &mut values);
        values.iter().position(|v| !v.is_finite()).map(|i| (i, values[i].to_f64()))
    };
    let found = [(first(&pair.base), pair.base), (first(&pair.tuned), pair.tuned)];
    let worst = found.into_iter().filter_map(|(found, view)| Some((found?, view))).min_by_key(|((i, _), _)| *i);
    let Some(((i, value), view)) = worst else { return Ok(()) };
    Err(BadInput::new(view.file, format!("a weight is not finite, at flat index {}", chunk.start + i))
        .tensor(view.name)
        .expected("finite numbers")
        .found(value.to_string())
        .hint("the training that made this checkpoint diverged: lower its learning rate or clip its gradients")
        .into())
}
