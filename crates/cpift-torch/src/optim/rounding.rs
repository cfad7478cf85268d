//! Stochastic rounding.

use tch::{Kind, Tensor};

/// An f32 tensor as bf16, each element rounded up or down with the chance that makes the rounding right on average, so that updates
/// smaller than half a bf16 step are not lost but come through now and then. Draws from libtorch's generator.
pub fn stochastic_bf16(wide: &Tensor) -> Tensor {
    // bf16 is the upper half of f32: adding 16 random bits to the lower half carries into the upper with just that chance.
    let noise = Tensor::randint(1 << 16, wide.size(), (Kind::Int, wide.device()));
    let bits = wide.contiguous().view_dtype(Kind::Int) + noise;
    bits.bitwise_and(-(1i64 << 16)).view_dtype(Kind::Float).to_kind(Kind::BFloat16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    /// The mean of many roundings of x: within 5 standard errors of x.
    #[test]
    fn the_mean_is_unbiased_for_either_sign() {
        tch::manual_seed(1);
        let draws = 1 << 18;
        for x in [1.001, -1.001, 3e-5, -7.7e4, 1.0 + 1.0 / 512.0] {
            let rounded = stochastic_bf16(&Tensor::full([draws], x, (Kind::Float, Device::Cpu))).to_kind(Kind::Double);
            let x = f64::from(x as f32);
            let spread = rounded.std(true).double_value(&[]) / (draws as f64).sqrt();
            let error = (rounded.mean(Kind::Double).double_value(&[]) - x).abs();
            assert!(spread > 0.0 && error < 5.0 * spread, "{x}: mean off by {error}, standard error {spread}");
            let values = rounded.unique_dim(0, true, false, false).0;
            assert_eq!(values.numel(), 2, "{x}: only its two neighbours");
        }
    }

    #[test]
    fn what_bf16_holds_is_kept() {
        let exact = Tensor::from_slice(&[0.0f32, -0.0, 1.0, -2.5, 3.3895314e38]);
        let rounded = stochastic_bf16(&exact).to_kind(Kind::Float);
        assert_eq!(exact.view_dtype(Kind::Int), rounded.view_dtype(Kind::Int));
    }
}
