//! The score of an element, and the scores of a part's chunks.

use anyhow::Result;
use cpift_core::format::mask::Metric;
use cpift_core::stream::select::{Score, Source};
use cpift_core::{BadInput, TensorView, dispatch};
use rayon::prelude::*;

use crate::parts::{CHUNK, Chunk, Pair, Part};

/// ε of [`Metric::Relative`]: keeps a weight that was zero from dividing by zero.
const EPSILON: f64 = 1e-8;

/// Elements whose scores are computed at a time: small enough for the first cache.
pub const BLOCK: usize = 1024;

/// Where values lie, to scale them to 0..1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Extent {
    /// The smallest value.
    low: f64,
    /// The largest less the smallest; infinite where all are equal, so that all become 0.
    span: f64,
}

impl Default for Extent {
    fn default() -> Self {
        Self { low: 0.0, span: f64::INFINITY }
    }
}

impl Extent {
    /// From the smallest and the largest value.
    pub fn new<T: Score + Arithmetic>(low: T, high: T) -> Self {
        let span = if high > low { high.distance(low).to_f64() } else { f64::INFINITY };
        Self { low: low.to_f64(), span }
    }

    /// `value` between 0, the smallest, and 1, the largest.
    pub fn scale(self, value: f64) -> f64 {
        value.scaled(self.low, self.span)
    }
}

/// Room for the values and scores of one block.
pub struct Block<T> {
    base: [T; BLOCK],
    scores: [T; BLOCK],
    fisher: [T; BLOCK],
}

impl<T: Score + Arithmetic> Block<T> {
    /// All zero.
    pub fn new() -> Self {
        let zeros = [T::default(); BLOCK];
        Self { base: zeros, scores: zeros, fisher: zeros }
    }

    /// The scores of elements `start..start + len` of a pair of `part`; NaN or infinite where a value is, or a square is negative.
    /// Call inside [`cpift_core::dispatch!`].
    ///
    /// # Panics
    /// When the metric needs squared gradients and the part has none, or ranks no elements.
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
                let [moved, felt] = part.extents.map(|e| (T::from_f64(e.low), T::from_f64(e.span)));
                scores.iter_mut().zip(base).zip(fisher).for_each(|((t, b), f)| {
                    let (distance, square) = (t.distance(*b), f.square());
                    *t = distance.scaled(moved.0, moved.1).mean(square.scaled(felt.0, felt.1));
                });
            }
            Metric::Rms | Metric::Trace | Metric::Random => panic!("{metric:?} ranks no elements"),
        }
        scores
    }
}

/// Where |Δ| and F lie among the elements of `part`.
///
/// # Errors
/// [`BadInput`] where one of them is not finite.
pub fn extents<T: Score + Arithmetic>(part: &Part<'_>) -> Result<[Extent; 2]> {
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
        part.chunks.iter().try_for_each(|chunk| refuse_unusable::<T>(&part.pairs[chunk.pair], *chunk))?;
        return Err(BadInput::new(
            part.pairs[0].tuned.file,
            "a distance from the base overflows, so none can be scaled",
        )
        .into());
    }
    Ok(found.map(|(low, high)| Extent::new(low, high)))
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
    /// self, never −0.0; NaN where it is negative, as no sum of squares is.
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

/// Refuses a chunk with a weight that is NaN or infinite, or a squared gradient that is negative besides.
///
/// # Errors
/// [`BadInput`] naming the first such element of the chunk.
pub fn refuse_unusable<T: Score + Arithmetic>(pair: &Pair<'_>, chunk: Chunk) -> Result<()> {
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
            "the training that made this checkpoint diverged: lower its learning rate or clip its gradients",
        ),
        true => (
            "a squared gradient is negative or not finite",
            "finite numbers, 0 or above",
            "--fisher takes the sums of squares that a probe saved, not gradients or weights",
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
        // The exact search orders scores by their bits, where −0.0 would come first of all.
        assert_eq!([0.0f32, -0.0, 2.5].map(|f| f.square().to_bits()), [0.0f32, 0.0, 2.5].map(f32::to_bits));
        assert_eq!([0.0f64, -0.0, 2.5].map(|f| f.square().to_bits()), [0.0f64, 0.0, 2.5].map(f64::to_bits));
        assert!([-1e-40f32, f32::NAN, f32::NEG_INFINITY].iter().all(|f| f.square().is_nan()));
    }

    #[test]
    fn scaling_is_from_0_to_1_and_0_where_all_are_equal() {
        let extent = Extent::new(2.0f32, 10.0);
        assert_eq!([2.0, 4.0, 10.0].map(|v| extent.scale(v)), [0.0, 0.25, 1.0]);
        assert_eq!(Extent::new(3.0f64, 3.0).scale(3.0), 0.0);
        // What is not finite stays so that it is found.
        assert!(Extent::default().scale(f64::NAN).is_nan() && Extent::default().scale(f64::INFINITY).is_nan());
    }
}
