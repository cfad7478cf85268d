//! Block-wise 8-bit storage of the optimizer's moments ([arXiv
//! 2110.02861](https://arxiv.org/abs/2110.02861)), as bitsandbytes defines it: each block of 256
//! elements is divided by its largest absolute value, which is kept in f32, and each quotient is
//! stored as the number of the nearest of 256 values, the dynamic map.

use tch::{Device, Kind, Tensor, no_grad};

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

/// A tensor in 8 bits per element.
pub(crate) struct Blockwise {
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
            absmax: Tensor::zeros([(count + BLOCK - 1) / BLOCK], (Kind::Float, device)),
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
        self.absmax.narrow(0, start / BLOCK, (count + BLOCK - 1) / BLOCK)
    }
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
