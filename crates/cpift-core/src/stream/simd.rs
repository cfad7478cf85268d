//! One way to run a loop with the widest vector instructions of the machine, chosen at run time.

use pulp::{Arch, Simd, WithSimd};

/// Evaluates an expression compiled for the machine's vector instructions (AVX2 or AVX-512 on x86, where it has them).
///
/// The compiler vectorises the loops in it and in the `#[inline(always)]` functions it calls; other functions run as they
/// were compiled. Multiplications and additions are not fused, so results are the same on every machine.
#[macro_export]
macro_rules! dispatch {
    ($body:expr) => {
        // Without the attribute the closure stays a function of its own, compiled for the oldest machine.
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

/// A closure that is called by reference: a call by value (`FnOnce`) of one that only borrows goes through a function that the
/// compiler makes for the oldest machine.
struct Op<F>(F);

impl<R, F: FnMut() -> R> WithSimd for Op<F> {
    type Output = R;

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _simd: S) -> R {
        (self.0)()
    }
}
