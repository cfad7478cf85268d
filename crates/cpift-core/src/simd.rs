//! One way to run a loop with the widest vector instructions of the machine, chosen at run time.

use pulp::{Arch, Simd, WithSimd};

/// Runs `op` compiled for the machine's vector instructions (AVX2 or AVX-512 on x86, where it has them).
///
/// The compiler vectorises the loops in `op` and in the `#[inline(always)]` functions it calls; other functions run as they
/// were compiled. So does `op` itself where it is more than a line, unless it says so too:
/// `dispatch(#[inline(always)] || ...)`. Multiplications and additions are not fused, so results are the same on every
/// machine.
#[inline(always)]
pub fn dispatch<R>(op: impl FnMut() -> R) -> R {
    Arch::new().dispatch(Op(op))
}

/// A closure that is called by reference: a call of `FnOnce` goes through a function of the compiler's that is never
/// inlined into the vector code.
struct Op<F>(F);

impl<R, F: FnMut() -> R> WithSimd for Op<F> {
    type Output = R;

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _simd: S) -> R {
        (self.0)()
    }
}
