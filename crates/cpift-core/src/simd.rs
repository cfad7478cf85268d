//! One way to run a loop with the widest vector instructions of the machine, chosen at run time.

/// Runs `op` compiled for the machine's vector instructions (AVX2 or AVX-512 on x86, where it has them).
///
/// The compiler vectorises the loops in `op` and in the `#[inline(always)]` functions it calls; other functions run as they
/// were compiled. Multiplications and additions are not fused, so results are the same on every machine.
#[inline(always)]
pub fn dispatch<R>(op: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(op)
}
