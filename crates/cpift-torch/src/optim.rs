//! The optimizer: AdamW with decoupled weight decay, clipping to a global norm, the guard against
//! values that are not finite, stochastic rounding to bf16, and moments in 8 bits.
//!
//! Moments in 8 bits are stored block-wise ([arXiv
//! 2110.02861](https://arxiv.org/abs/2110.02861)), as bitsandbytes defines it: each block of 256
//! elements is divided by its largest absolute value, which is kept in f32, and each quotient is
//! stored as the number of the nearest of 256 values, the dynamic map.

use anyhow::Result;
use cpift_core::Dtype;
use cpift_core::stream::random::splitmix64;
use tch::{Device, Kind, Tensor, no_grad};

use crate::ffi::{AdamWNumbers, AdamWTensors, fused_adamw};
use crate::placement::{Piece, Pieces, Placement};
use crate::transfer::{copy, wait_for};

/// Hyperparameters of AdamW; the defaults are PyTorch's, without weight decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay rates of the first and second moment.
    pub betas: (f64, f64),
    /// ε, added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay, applied to tensors of two or more dimensions: not to norms and
    /// biases.
    pub weight_decay: f64,
    /// Form of the moments.
    pub state: StateKind,
}

/// Form of the optimizer's moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateKind {
    /// f32.
    Float,
    /// bf16 with stochastic rounding.
    BFloat16,
    /// Block-wise 8-bit numbers, as in bitsandbytes, for tensors of 4096 elements or more; f32 for
    /// others.
    Blockwise,
}

impl StateKind {
    /// Moments of `dtype`, F32 or BF16.
    pub fn plain(dtype: Dtype) -> Self {
        if dtype == Dtype::BF16 { Self::BFloat16 } else { Self::Float }
    }
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.0, state: StateKind::Float }
    }
}

/// AdamW with its state for a list of parameters' pieces.
pub struct AdamW {
    config: AdamWConfig,
    slots: Vec<Slot>,
}

struct Slot {
    name: String,
    param: Piece,
    moments: Moments,
    step: Tensor,
    decays: bool,
}

/// The first and the second moment.
enum Moments {
    /// In the shape of the piece.
    Plain([Tensor; 2]),
    Blockwise([Blockwise; 2]),
}

impl Moments {
    /// Returns true if both lie on `device`.
    fn on(&self, device: Device) -> bool {
        match self {
            Self::Plain(pair) => pair[0].device() == device,
            Self::Blockwise(pair) => pair[0].codes.device() == device,
        }
    }

    /// Returns true for f32 on `device`.
    fn wide_on(&self, device: Device) -> bool {
        matches!(self, Self::Plain(pair) if pair[0].kind() == Kind::Float) && self.on(device)
    }
}

/// Inputs of an update besides its gradients.
#[derive(Clone, Copy)]
pub struct Update<'a> {
    /// Learning rate.
    pub lr: f64,
    /// Seed of the stochastic rounding; a different one for each step.
    pub seed: u64,
    /// Decides if the update happens, and scales the gradients.
    pub guard: &'a Guard,
}

/// Elements widened to f32 at a time if dtypes differ: 64 MiB for each of four temporaries.
const WIDENED: i64 = 1 << 24;
/// The same for moments in 8 bits, which need more temporaries; a number of whole blocks.
const WIDENED_BLOCKS: i64 = 1 << 22;
const _: () = assert!(WIDENED_BLOCKS % BLOCK == 0);

impl AdamW {
    /// An optimizer for `pieces` whose moments are zero, in the placement's memory for moments.
    ///
    /// # Errors
    /// No room for the moments.
    pub fn new<'a>(
        pieces: impl Iterator<Item = (&'a String, &'a Piece)>,
        config: AdamWConfig,
        placement: &Placement,
    ) -> Result<Self> {
        let slot = |(name, piece): (&String, &Piece)| -> Result<Slot> {
            let size = piece.tensor.size();
            let zeros = |kind| placement.moments.zeros("the moments", &size, kind);
            let moments = match config.state {
                StateKind::Blockwise if piece.whole_len() >= SMALLEST => {
                    assert_eq!(piece.start % BLOCK, 0, "blocks are those of a whole parameter");
                    Moments::Blockwise([true, false].map(|signed| Blockwise::zeros(&size, signed, placement.device)))
                }
                StateKind::BFloat16 => Moments::Plain([zeros(Kind::BFloat16)?, zeros(Kind::BFloat16)?]),
                StateKind::Blockwise | StateKind::Float => Moments::Plain([zeros(Kind::Float)?, zeros(Kind::Float)?]),
            };
            Ok(Slot {
                name: name.clone(),
                moments,
                step: Tensor::zeros([], (Kind::Float, placement.device)),
                decays: piece.shape.len() >= 2,
                param: piece.with(piece.tensor.shallow_clone()),
            })
        };
        Ok(Self { config, slots: no_grad(|| pieces.map(slot).collect::<Result<_>>())? })
    }

    /// Updates the pieces with indices `chosen` (in the list given to [`AdamW::new`]) by `grads`,
    /// one each.
    ///
    /// # Errors
    /// An error of libtorch.
    pub fn step(&mut self, chosen: &[usize], grads: &[Tensor], update: Update<'_>) -> Result<()> {
        assert_eq!(grads.len(), chosen.len());
        // The fused kernel reads gradients by the parameter's strides.
        let grads: Vec<Tensor> = grads.iter().map(Tensor::contiguous).collect();
        for decays in [true, false] {
            let mut tensors = AdamWTensors::default();
            let held = |i: usize| self.slots[i].decays == decays && !self.slots[i].param.is_empty();
            for (&i, grad) in chosen.iter().zip(&grads).filter(|(i, _)| held(**i)) {
                let slot = &self.slots[i];
                let device = slot.step.device();
                let wide = [&slot.param.tensor, grad].iter().all(|t| t.kind() == Kind::Float && t.device() == device);
                if let (true, Moments::Plain([exp_avg, exp_avg_sq])) =
                    (wide && slot.moments.wide_on(device), &slot.moments)
                {
                    tensors.params.push(&slot.param.tensor);
                    tensors.grads.push(grad);
                    tensors.exp_avgs.push(exp_avg);
                    tensors.exp_avg_sqs.push(exp_avg_sq);
                    tensors.steps.push(&slot.step);
                } else {
                    // A seed of its own, so that the bits do not depend on which parameters are
                    // updated together.
                    tch::manual_seed(splitmix64(update.seed, i as u64) as i64);
                    self.step_widened(slot, grad, update)?;
                }
            }
            if !tensors.params.is_empty() {
                fused_adamw(&tensors, &self.numbers(decays, update))?;
            }
        }
        // The host may read what it holds once this returns.
        let away = |slot: &Slot| {
            let device = slot.step.device();
            slot.param.tensor.device() != device || !slot.moments.on(device)
        };
        let waits = chosen.iter().map(|&i| &self.slots[i]).find(|slot| away(slot));
        waits.map_or(Ok(()), |slot| wait_for(slot.step.device()))
    }

    /// Updates a piece whose tensors are not all f32 on the device that computes: a part at a time
    /// is copied there as f32, updated, and copied back, to bf16 by stochastic rounding. The random
    /// bits depend on an element's place in the whole parameter only.
    fn step_widened(&self, slot: &Slot, grad: &Tensor, update: Update<'_>) -> Result<()> {
        let (device, whole) = (slot.step.device(), slot.param.whole_len());
        let held = slot.param.start..slot.param.start + slot.param.len();
        let (plain, parts): (Vec<&Tensor>, i64) = match &slot.moments {
            Moments::Plain([exp_avg, exp_avg_sq]) => (vec![&slot.param.tensor, exp_avg, exp_avg_sq], WIDENED),
            Moments::Blockwise(_) => (vec![&slot.param.tensor], WIDENED_BLOCKS),
        };
        let before = no_grad(|| slot.step.copy());
        for start in (0..whole).step_by(parts as usize).take_while(|start| *start < held.end) {
            let count = parts.min(whole - start);
            let (from, to) = (start.max(held.start), (start + count).min(held.end));
            let noise = || Tensor::randint(1 << 16, [count], (Kind::Int, device));
            if from >= to {
                plain.iter().filter(|t| t.kind() == Kind::BFloat16).for_each(|_| drop(noise()));
                continue;
            }
            let part = |t: &Tensor| t.detach().view([-1]).narrow(0, from - held.start, to - from);
            let kept: Vec<Tensor> = plain.iter().map(|t| part(t)).collect();
            // From pinned memory without waiting.
            let widened = |t: &Tensor| t.to_device_(device, Kind::Float, true, false);
            let mut wide: Vec<Tensor> = kept.iter().map(widened).collect();
            if let Moments::Blockwise(pair) = &slot.moments {
                wide.extend(pair.iter().map(|moment| moment.read(from - held.start, to - from)));
            }
            let wide_grad = widened(&part(grad));
            // All parts belong to one step: each starts from the same counter.
            let step = before.copy();
            let tensors = AdamWTensors {
                params: vec![&wide[0]],
                grads: vec![&wide_grad],
                exp_avgs: vec![&wide[1]],
                exp_avg_sqs: vec![&wide[2]],
                steps: vec![&step],
            };
            fused_adamw(&tensors, &self.numbers(slot.decays, update))?;
            for (kept, wide) in kept.iter().zip(&wide) {
                if kept.kind() == Kind::BFloat16 {
                    copy(kept, &stochastic_bf16(wide, &noise().narrow(0, from - start, to - from)))?;
                } else if wide.data_ptr() != kept.data_ptr() {
                    copy(kept, wide)?;
                }
            }
            if let Moments::Blockwise(pair) = &slot.moments {
                pair.iter().zip(&wide[1..]).for_each(|(moment, wide)| moment.write(from - held.start, wide));
            }
        }
        no_grad(|| drop(slot.step.shallow_clone().g_add_scalar_(1.0)));
        Ok(())
    }

    fn numbers<'a>(&self, decays: bool, update: Update<'a>) -> AdamWNumbers<'a> {
        AdamWNumbers {
            lr: update.lr,
            betas: self.config.betas,
            weight_decay: if decays { self.config.weight_decay } else { 0.0 },
            eps: self.config.eps,
            grad_scale: update.guard.grad_scale(),
            found_inf: Some(update.guard.found_inf()),
        }
    }

    /// The moments as `NAME.exp_avg` and `NAME.exp_avg_sq`, with the largest values of their blocks
    /// as `NAME.exp_avg_absmax` and `NAME.exp_avg_sq_absmax` if they have 8 bits; they share
    /// storage with the optimizer.
    pub fn moments(&self) -> Pieces {
        let of = |s: &Slot| -> Vec<(String, Piece)> {
            let names = ["exp_avg", "exp_avg_sq"].map(|moment| format!("{}.{moment}", s.name));
            match &s.moments {
                Moments::Plain(pair) => {
                    names.into_iter().zip(pair).map(|(name, t)| (name, s.param.with(t.shallow_clone()))).collect()
                }
                Moments::Blockwise(pair) => names
                    .into_iter()
                    .zip(pair)
                    .flat_map(|(name, moment)| {
                        let absmax = Piece {
                            tensor: moment.absmax.shallow_clone(),
                            start: s.param.start / BLOCK,
                            shape: vec![blocks_of(s.param.whole_len())],
                        };
                        let absmax = (format!("{name}_absmax"), absmax);
                        [(name, s.param.with(moment.codes.shallow_clone())), absmax]
                    })
                    .collect(),
            }
        };
        self.slots.iter().flat_map(of).collect()
    }

    /// Sets the number of updates already made, for bias correction.
    pub fn set_steps(&mut self, steps: usize) {
        no_grad(|| self.slots.iter_mut().for_each(|s| drop(s.step.fill_(steps as f64))));
    }
}

/// Blocks updates after a loss or norm that is not finite, on the device and without synchronising,
/// and clips gradients. Once a value was not finite, all later updates do nothing: the host may
/// notice steps later.
pub struct Guard {
    /// One f32 element: 1 from the first value on that is not finite.
    found_inf: Tensor,
    /// Divisor of the gradients, one f32 element; none without clipping.
    grad_scale: Option<Tensor>,
}

impl Guard {
    /// A guard that blocks nothing yet.
    pub fn new(device: Device) -> Self {
        Self { found_inf: Tensor::zeros([1], (Kind::Float, device)), grad_scale: None }
    }

    /// Blocks all further updates unless `value` (one element) is finite.
    pub fn require_finite(&mut self, value: &Tensor) {
        let bad = value.isfinite().logical_not().to_kind(Kind::Float).view([1]);
        self.found_inf = no_grad(|| self.found_inf.max_other(&bad));
    }

    /// Scales the next update so that gradients of the global L2 norm `norm` (one f64 element) get
    /// at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does.
    pub fn clip(&mut self, norm: &Tensor, max_norm: f64) {
        self.grad_scale = Some(((norm + 1e-6) / max_norm).clamp_min(1.0).to_kind(Kind::Float).view([1]));
    }

    pub(crate) fn grad_scale(&self) -> Option<&Tensor> {
        self.grad_scale.as_ref()
    }

    pub(crate) fn found_inf(&self) -> &Tensor {
        &self.found_inf
    }
}

/// Sum of the squares of all elements of `grads`: one f64 element on `device`. In f64, so that the
/// f32 scale that follows does not depend on how the elements are shared among ranks; infinite if
/// it is more than an f32 holds, as the second moments would be.
pub fn sum_of_squares(grads: &[Tensor], device: Device) -> Tensor {
    let mut sum = Tensor::zeros([], (Kind::Double, device));
    for grad in grads.iter().filter(|g| g.numel() > 0) {
        let flat = grad.reshape([-1]);
        let count = flat.numel() as i64;
        for start in (0..count).step_by(WIDENED as usize) {
            let norm = flat.narrow(0, start, WIDENED.min(count - start)).norm_scalaropt_dtype(2, Kind::Double);
            sum += norm.square();
        }
    }
    let most = sum.le(f64::from(f32::MAX));
    sum.where_self(&most, &sum.full_like(f64::INFINITY))
}

/// Rounds an f32 tensor to bf16 stochastically: up or down with the probabilities that make the
/// rounding unbiased, so that updates smaller than half a bf16 step are not lost. `noise` has 16
/// random bits per element.
fn stochastic_bf16(wide: &Tensor, noise: &Tensor) -> Tensor {
    // bf16 is the upper half of f32: adding 16 random bits to the lower half carries into the upper
    // with that probability.
    let bits = wide.contiguous().view_dtype(Kind::Int) + noise;
    bits.bitwise_and(-(1i64 << 16)).view_dtype(Kind::Float).to_kind(Kind::BFloat16)
}

/// Elements per block.
pub(crate) const BLOCK: i64 = 256;

/// Tensors with fewer elements keep their moments in f32.
pub(crate) const SMALLEST: i64 = 4096;

/// The dynamic map for values in −1 to 1, or 0 to 1 if they are not `signed`: for each of 7 decimal
/// exponents the means of equal parts of 0.1 to 1, twice as many for each larger exponent; and 0
/// and 1.
fn dynamic_map(signed: bool) -> Vec<f32> {
    let mut values = vec![0.0, 1.0];
    for exponent in 0..7 {
        let parts = 1i64 << (exponent + u32::from(!signed));
        let bounds = Tensor::linspace(0.1, 1.0, parts + 1, (Kind::Float, Device::Cpu));
        let means = (bounds.narrow(0, 0, parts) + bounds.narrow(0, 1, parts)) / 2.0;
        let scaled = means * 10f64.powi(exponent as i32 - 6);
        let part = Vec::<f32>::try_from(scaled).expect("a flat f32 tensor");
        if signed {
            values.extend(part.iter().map(|v| -v));
        }
        values.extend(part);
    }
    values.sort_by(f32::total_cmp);
    values
}

/// A tensor, or a piece of one that begins at a block, in 8 bits per element.
struct Blockwise {
    /// Numbers in the map, u8, in the shape of the tensor.
    pub codes: Tensor,
    /// Largest absolute value of each block, f32.
    pub absmax: Tensor,
    map: Tensor,
    /// Values halfway between those of the map.
    bounds: Tensor,
}

impl Blockwise {
    /// Zeros of shape `size` on `device`.
    pub fn zeros(size: &[i64], signed: bool, device: Device) -> Self {
        let map = Tensor::from_slice(&dynamic_map(signed)).to_device(device);
        let count: i64 = size.iter().product();
        Self {
            codes: Tensor::zeros(size, (Kind::Uint8, device)),
            absmax: Tensor::zeros([blocks_of(count)], (Kind::Float, device)),
            bounds: (map.narrow(0, 0, 255) + map.narrow(0, 1, 255)) / 2.0,
            map,
        }
    }

    /// The `count` elements from `start` on, a multiple of [`BLOCK`], in f32.
    pub fn read(&self, start: i64, count: i64) -> Tensor {
        no_grad(|| {
            let codes = self.codes.view([-1]).narrow(0, start, count).to_kind(Kind::Int);
            in_blocks(&self.map.index_select(0, &codes), |blocks| blocks * self.absmax_of(start, count).unsqueeze(1))
        })
    }

    /// Stores `values` from the element `start` on, a multiple of [`BLOCK`].
    pub fn write(&self, start: i64, values: &Tensor) {
        no_grad(|| {
            let count = values.numel() as i64;
            let mut absmax = self.absmax_of(start, count);
            // A block of zeros is divided by the smallest number instead.
            let quotients = in_blocks(values, |blocks| {
                absmax.copy_(&blocks.abs().amax([1i64].as_slice(), false));
                blocks / absmax.unsqueeze(1).clamp_min(1e-38)
            });
            let codes = quotients.bucketize(&self.bounds, true, false);
            self.codes.view([-1]).narrow(0, start, count).copy_(&codes);
        });
    }

    fn absmax_of(&self, start: i64, count: i64) -> Tensor {
        self.absmax.narrow(0, start / BLOCK, blocks_of(count))
    }
}

/// Number of blocks of `count` elements.
fn blocks_of(count: i64) -> i64 {
    (count + BLOCK - 1) / BLOCK
}

/// Applies `with` to the flat `values` as rows of blocks, the last of them filled up with zeros.
fn in_blocks(values: &Tensor, with: impl FnOnce(&Tensor) -> Tensor) -> Tensor {
    let count = values.numel() as i64;
    let padded = values.constant_pad_nd([0, (BLOCK - count % BLOCK) % BLOCK]);
    with(&padded.view([-1, BLOCK])).view([-1]).narrow(0, 0, count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounded(wide: &Tensor) -> Tensor {
        stochastic_bf16(wide, &Tensor::randint(1 << 16, wide.size(), (Kind::Int, wide.device())))
    }

    /// The mean of many roundings of x: within 5 standard errors of x.
    #[test]
    fn the_mean_is_unbiased_for_either_sign() {
        tch::manual_seed(1);
        let draws = 1 << 18;
        for x in [1.001, -1.001, 3e-5, -7.7e4, 1.0 + 1.0 / 512.0] {
            let found = rounded(&Tensor::full([draws], x, (Kind::Float, Device::Cpu))).to_kind(Kind::Double);
            let x = f64::from(x as f32);
            let spread = found.std(true).double_value(&[]) / (draws as f64).sqrt();
            let error = (found.mean(Kind::Double).double_value(&[]) - x).abs();
            assert!(spread > 0.0 && error < 5.0 * spread, "{x}: mean off by {error}, standard error {spread}");
            let values = found.unique_dim(0, true, false, false).0;
            assert_eq!(values.numel(), 2, "{x}: only its two neighbours");
        }
    }

    #[test]
    fn what_bf16_holds_is_kept() {
        let exact = Tensor::from_slice(&[0.0f32, -0.0, 1.0, -2.5, 3.3895314e38]);
        let rounded = rounded(&exact).to_kind(Kind::Float);
        assert_eq!(exact.view_dtype(Kind::Int), rounded.view_dtype(Kind::Int));
    }

    const SIGNED: [f32; 3] = [-0.99296874, 5.5000004e-07, 0.99296874];
    const UNSIGNED: [f32; 3] = [3.2500003e-07, 0.11054687, 0.9964844];
    const SUMS: [f64; 2] = [1.0, 75.1052632433869];

    /// Values of bitsandbytes.functional.create_dynamic_map, version 0.50.2.
    #[test]
    fn the_maps_are_those_of_bitsandbytes() {
        let (signed, unsigned) = (dynamic_map(true), dynamic_map(false));
        assert_eq!((signed.len(), unsigned.len()), (256, 256));
        assert!(signed.is_sorted() && unsigned.is_sorted());
        assert_eq!((signed[127], unsigned[0], signed[255], unsigned[255]), (0.0, 0.0, 1.0, 1.0));
        assert_eq!((signed[0], signed[128], signed[254]), (SIGNED[0], SIGNED[1], SIGNED[2]));
        assert_eq!((unsigned[1], unsigned[128], unsigned[254]), (UNSIGNED[0], UNSIGNED[1], UNSIGNED[2]));
        let sum = |map: &[f32]| map.iter().map(|v| f64::from(*v)).sum::<f64>();
        assert!((sum(&signed) - SUMS[0]).abs() < 1e-12 && (sum(&unsigned) - SUMS[1]).abs() < 1e-12);
    }

    /// No element moves farther than to the nearest value of the map, zeros stay, and the largest
    /// of each block is exact.
    #[test]
    fn stored_values_are_the_nearest_of_the_map() {
        tch::manual_seed(3);
        let count = 3 * BLOCK + 17;
        let values = Tensor::randn([count], (Kind::Float, Device::Cpu)) * 1e-3;
        let _ = values.narrow(0, BLOCK, BLOCK).zero_();
        let stored = Blockwise::zeros(&[count], true, Device::Cpu);
        stored.write(0, &values);
        let read = stored.read(0, count);
        let (values, read) = (Vec::<f32>::try_from(values).unwrap(), Vec::<f32>::try_from(read).unwrap());
        let map = dynamic_map(true);
        for (block, found) in values.chunks(BLOCK as usize).zip(read.chunks(BLOCK as usize)) {
            let most = block.iter().fold(0f32, |most, v| most.max(v.abs()));
            for (value, found) in block.iter().zip(found) {
                let error = map.iter().map(|m| (m * most - value).abs()).fold(f32::INFINITY, f32::min);
                assert!((found - value).abs() <= error * 1.0001 + most * 1e-7, "{value}: {found}, off by {error}");
            }
        }
        // A part that begins at a block is stored as if with the rest.
        let again = Blockwise::zeros(&[count], true, Device::Cpu);
        let all = Tensor::from_slice(&values);
        again.write(2 * BLOCK, &all.narrow(0, 2 * BLOCK, count - 2 * BLOCK));
        again.write(0, &all.narrow(0, 0, 2 * BLOCK));
        assert_eq!((again.codes, again.absmax), (stored.codes, stored.absmax));
    }
}
