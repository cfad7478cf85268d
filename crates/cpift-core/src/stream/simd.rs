//! Runtime dispatch to the widest vector instructions of the CPU.

use pulp::{Arch, Simd, WithSimd};

/// Evaluates an expression with the vector instructions of the CPU (AVX2 or AVX-512 on x86, if
/// available).
///
/// The compiler vectorizes the loops in the expression and in the `#[inline(always)]` functions it
/// calls. Other functions keep their baseline code. Multiplications and additions are not fused, so
/// results are the same on every CPU.
#[macro_export]
macro_rules! dispatch {
    ($body:expr) => {
        // Without the attribute the closure is a separate function, compiled for the baseline CPU.
        $crate::stream::simd::run(
            #[inline(always)]
            || $body,
        )
    };
}

#[doc(hidden)]
#[inline(always)]
pub fn run<R>(op: impl FnMut() -> R) -> R {
    Arch::new().dispatch(Op(op))
}

/// A closure called by reference: calling it by value (`FnOnce`) goes through a shim that is
/// compiled for the baseline CPU.
struct Op<F>(F);

impl<R, F: FnMut() -> R> WithSimd for Op<F> {
    type Output = R;

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _simd: S) -> R {
        (self.0)()
    }
}
