//! The elements that are ranked together, the score of each, and the chunks in which they are read.

use anyhow::Result;
use cpift_core::format::mask::Metric;
use cpift_core::stream::select::{Score, Source};
use cpift_core::{BadInput, TensorView, dispatch};
use rayon::prelude::*;

/// Elements per chunk: a multiple of 8, so that chunks end on whole bytes of a mask; a power of
/// two, so that each chunk can be hashed by itself; small enough that an index fits 16 bits.
pub(crate) const CHUNK: usize = 64 * 1024;

/// Elements per block; the values of a block fit the L1 cache.
const BLOCK: usize = 1024;

/// ε of [`Metric::Relative`]: avoids a division by zero where the base weight is zero.
const EPSILON: f64 = 1e-8;

/// One parameter in all inputs: same shape, floating-point dtype in each.
#[derive(Clone, Copy)]
pub(crate) struct Pair<'a> {
    /// The parameter before fine-tuning.
    pub base: TensorView<'a>,
    /// The parameter after fine-tuning.
    pub tuned: TensorView<'a>,
    /// Its sums of squared gradients, if given.
    pub fisher: Option<TensorView<'a>>,
    /// Its index among all tensors of base, tuned and fisher, by which the hashers count; `None` if
    /// its bytes are not those that are stored under its name.
    pub positions: [Option<usize>; 3],
}

impl<'a> Pair<'a> {
    /// Views of base, tuned and, if given, fisher.
    #[inline(always)]
    pub fn views(&self) -> impl Iterator<Item = &TensorView<'a>> {
        [&self.base, &self.tuned].into_iter().chain(&self.fisher)
    }
}

/// Consecutive elements of one pair.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chunk {
    /// Index of the pair in [`Part::pairs`].
    pub pair: usize,
    /// First element, a multiple of 8.
    pub start: usize,
    /// Number of elements, at most [`CHUNK`].
    pub len: usize,
}

impl Chunk {
    /// First element and length of each block of the chunk.
    #[inline(always)]
    pub fn blocks(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.len).step_by(BLOCK).map(move |at| (self.start + at, BLOCK.min(self.len - at)))
    }
}

/// Parameters whose elements are ranked together, in bytewise name order.
pub struct Part<'a> {
    /// Name in messages.
    pub(crate) label: String,
    /// The parameters.
    pub(crate) pairs: Vec<Pair<'a>>,
    /// All elements of the pairs, in order.
    pub(crate) chunks: Vec<Chunk>,
    /// Ranges of |Δ| and F over the part; only [`Metric::Blend`] reads them.
    pub(crate) ranges: [MinMax; 2],
}

impl<'a> Part<'a> {
    /// Cuts `pairs` into chunks.
    pub(crate) fn new(label: impl Into<String>, pairs: Vec<Pair<'a>>) -> Self {
        let chunks = pairs
            .iter()
            .enumerate()
            .flat_map(|(pair, p)| {
                let n = p.base.numel();
                (0..n).step_by(CHUNK).map(move |start| Chunk { pair, start, len: CHUNK.min(n - start) })
            })
            .collect();
        Self { label: label.into(), pairs, chunks, ranges: Default::default() }
    }

    /// Number of elements.
    pub(crate) fn numel(&self) -> u64 {
        self.pairs.iter().map(|p| p.base.numel() as u64).sum()
    }

    /// Size of the elements in all inputs, in bytes.
    pub(crate) fn nbytes(&self) -> u64 {
        self.pairs.iter().flat_map(Pair::views).map(|view| view.bytes.len() as u64).sum()
    }

    /// Size of the elements of `chunk` in all inputs, in bytes.
    pub(crate) fn chunk_bytes(&self, chunk: Chunk) -> u64 {
        self.pairs[chunk.pair].views().map(|view| (chunk.len * view.dtype.size()) as u64).sum()
    }
}

/// Range of a set of values, for min-max scaling.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct MinMax {
    /// Smallest value.
    low: f64,
    /// Largest minus smallest value; infinite if all are equal, so that all scale to 0.
    span: f64,
}

impl Default for MinMax {
    fn default() -> Self {
        Self { low: 0.0, span: f64::INFINITY }
    }
}

impl MinMax {
    /// The range from `low` to `high`.
    pub fn new<T: Score + Arithmetic>(low: T, high: T) -> Self {
        let span = if high > low { high.distance(low).to_f64() } else { f64::INFINITY };
        Self { low: low.to_f64(), span }
    }

    /// Maps the smallest value to 0 and the largest to 1.
    pub fn scale(self, value: f64) -> f64 {
        value.scaled(self.low, self.span)
    }
}

/// Buffers for the values and scores of one block.
pub(crate) struct Block<T> {
    base: [T; BLOCK],
    scores: [T; BLOCK],
    fisher: [T; BLOCK],
}

impl<T: Score + Arithmetic> Block<T> {
    /// Zero-filled buffers.
    pub fn new() -> Self {
        let zeros = [T::default(); BLOCK];
        Self { base: zeros, scores: zeros, fisher: zeros }
    }

    /// Scores of elements `start..start + len` of pair number `pair`. A score is NaN or infinite if
    /// a value is, and NaN if a squared gradient is negative. Call inside
    /// [`cpift_core::dispatch!`].
    ///
    /// # Panics
    /// If the metric needs squared gradients and the part has none, or if it ranks no elements.
    #[inline(always)]
    pub fn scores(&mut self, part: &Part<'_>, pair: usize, metric: Metric, start: usize, len: usize) -> &[T] {
        let pair = &part.pairs[pair];
        let (base, scores, fisher) = (&mut self.base[..len], &mut self.scores[..len], &mut self.fisher[..len]);
        if metric != Metric::Fisher {
            pair.base.read(start, base);
            pair.tuned.read(start, scores);
        }
        if matches!(metric, Metric::Fisher | Metric::Blend) {
            pair.fisher.expect("squared gradients are given where they are ranked").read(start, fisher);
        }
        match metric {
            Metric::Magnitude => scores.iter_mut().zip(base).for_each(|(t, b)| *t = t.distance(*b)),
            Metric::Relative => {
                let epsilon = T::from_f64(EPSILON);
                scores.iter_mut().zip(base).for_each(|(t, b)| *t = t.distance(*b).relative_to(*b, epsilon));
            }
            Metric::Fisher => scores.iter_mut().zip(fisher).for_each(|(score, f)| *score = f.square()),
            Metric::Blend => {
                let [delta_range, fisher_range] = part.ranges.map(|r| (T::from_f64(r.low), T::from_f64(r.span)));
                scores.iter_mut().zip(base).zip(fisher).for_each(|((t, b), f)| {
                    let (distance, square) = (t.distance(*b), f.square());
                    *t = distance
                        .scaled(delta_range.0, delta_range.1)
                        .mean(square.scaled(fisher_range.0, fisher_range.1));
                });
            }
            Metric::Rms | Metric::Trace | Metric::Random | Metric::Imported => panic!("{metric:?} ranks no elements"),
        }
        scores
    }
}

/// Ranges of |Δ| and F over the elements of `part`.
///
/// # Errors
/// [`BadInput`] naming the first value that is not finite.
pub(crate) fn ranges<T: Score + Arithmetic>(part: &Part<'_>) -> Result<[MinMax; 2]> {
    let infinity = T::from_f64(f64::INFINITY);
    let none = [(infinity, T::from_f64(f64::NEG_INFINITY)); 2];
    let wider = |a: [(T, T); 2], b: [(T, T); 2]| {
        [0, 1].map(|i| {
            let ((low, high), (l, h)) = (a[i], b[i]);
            (if l < low { l } else { low }, if h > high { h } else { high })
        })
    };
    let chunk = |block: &mut Block<T>, chunk: &Chunk| {
        dispatch!({
            chunk.blocks().fold(none, |found, (start, len)| {
                wider(
                    found,
                    [Metric::Magnitude, Metric::Fisher].map(|metric| {
                        let scores = block.scores(part, chunk.pair, metric, start, len);
                        scores.iter().fold(none[0], |(low, high), s| {
                            (if *s < low { *s } else { low }, if *s > high { *s } else { high })
                        })
                    }),
                )
            })
        })
    };
    let found = part.chunks.par_iter().map_init(Block::new, chunk).reduce(|| none, wider);
    if found.iter().any(|(_, high)| *high == infinity) {
        part.chunks.iter().try_for_each(|chunk| refuse_not_finite::<T>(&part.pairs[chunk.pair], *chunk))?;
        return Err(BadInput::new(
            part.pairs[0].tuned.file,
            "an update |Δ| overflows, so that scores cannot be scaled to 0..1",
        )
        .into());
    }
    Ok(found.map(|(low, high)| MinMax::new(low, high)))
}

impl<T: Score + Arithmetic> Default for Block<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// Arithmetic of the scores, in f32 and f64.
pub trait Arithmetic: Sized {
    /// |self − base|, never −0.0.
    fn distance(self, base: Self) -> Self;
    /// self / (|base| + epsilon).
    fn relative_to(self, base: Self, epsilon: Self) -> Self;
    /// self, never −0.0; NaN if negative, because a sum of squares cannot be.
    fn square(self) -> Self;
    /// (self − low) / span.
    fn scaled(self, low: Self, span: Self) -> Self;
    /// ½·self + ½·other.
    fn mean(self, other: Self) -> Self;
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

            #[inline(always)]
            fn square(self) -> Self {
                if self >= 0.0 { self + 0.0 } else { <$t>::NAN }
            }

            #[inline(always)]
            fn scaled(self, low: Self, span: Self) -> Self {
                (self - low) / span
            }

            #[inline(always)]
            fn mean(self, other: Self) -> Self {
                0.5 * self + 0.5 * other
            }
        }
    };
}

arithmetic_impl!(f32);
arithmetic_impl!(f64);

/// Computes the scores of a part anew on each pass, for the exact search.
pub struct PartScores<'a> {
    /// Elements that are ranked.
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
        out.clear();
        out.reserve(CHUNK);
        let mut block = Block::<T>::new();
        dispatch!({
            for (start, len) in chunk.blocks() {
                out.extend_from_slice(block.scores(self.part, chunk.pair, self.metric, start, len));
            }
        });
    }
}

/// Returns an error if `chunk` has a weight that is not finite, or a squared gradient that is
/// negative or not finite.
///
/// # Errors
/// [`BadInput`] naming the first such element.
pub(crate) fn refuse_not_finite<T: Score + Arithmetic>(pair: &Pair<'_>, chunk: Chunk) -> Result<()> {
    let mut values = vec![T::default(); chunk.len];
    let mut first = |view: &TensorView<'_>, usable: fn(&T) -> bool| {
        view.read(chunk.start, &mut values);
        values.iter().position(|v| !usable(v)).map(|i| (i, values[i].to_f64()))
    };
    let weight = |v: &T| v.is_finite();
    let mut found = vec![(first(&pair.base, weight), pair.base), (first(&pair.tuned, weight), pair.tuned)];
    found.extend(pair.fisher.map(|view| (first(&view, |v| v.square().is_finite()), view)));
    let worst = found.into_iter().filter_map(|(found, view)| Some((found?, view))).min_by_key(|((i, _), _)| *i);
    let Some(((i, value), view)) = worst else { return Ok(()) };
    let square = pair.fisher.is_some_and(|fisher| fisher.bytes.as_ptr() == view.bytes.as_ptr());
    let (what, expected, hint) = match square {
        false => (
            "a weight is not finite",
            "finite numbers",
            "the training run diverged: lower its learning rate or clip its gradients",
        ),
        true => (
            "a squared gradient is negative or not finite",
            "finite numbers, 0 or above",
            "--fisher takes the sums of squared gradients that cpift-probe saves, not gradients or weights",
        ),
    };
    Err(BadInput::new(view.file, format!("{what}, at flat index {}", chunk.start + i))
        .tensor(view.name)
        .expected(expected)
        .found(value.to_string())
        .hint(hint)
        .into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_square_is_never_negative_and_never_minus_zero() {
        // The exact search orders scores by their bits, which would put −0.0 above every other
        // score.
        assert_eq!([0.0f32, -0.0, 2.5].map(|f| f.square().to_bits()), [0.0f32, 0.0, 2.5].map(f32::to_bits));
        assert_eq!([0.0f64, -0.0, 2.5].map(|f| f.square().to_bits()), [0.0f64, 0.0, 2.5].map(f64::to_bits));
        assert!([-1e-40f32, f32::NAN, f32::NEG_INFINITY].iter().all(|f| f.square().is_nan()));
    }

    #[test]
    fn scaling_is_from_0_to_1_and_0_where_all_are_equal() {
        let extent = MinMax::new(2.0f32, 10.0);
        assert_eq!([2.0, 4.0, 10.0].map(|v| extent.scale(v)), [0.0, 0.25, 1.0]);
        assert_eq!(MinMax::new(3.0f64, 3.0).scale(3.0), 0.0);
        // Values that are not finite stay so and are detected later.
        assert!(MinMax::default().scale(f64::NAN).is_nan() && MinMax::default().scale(f64::INFINITY).is_nan());
    }
}
