//! The numbers of one short range of a tensor in all inputs: decoded, checked, and restricted to their masks.

use std::ops::{Add, Mul, Sub};

use cpift_core::stream::select::Score;
use cpift_core::{BadInput, TensorView};

use super::Tensor;

/// The type a tensor is merged in: `f32`, which holds every element of an input exactly, or `f64` where an input is F64.
pub trait Number: Score + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> {
    /// The magnitude.
    fn abs(self) -> Self;
}

impl Number for f32 {
    #[inline(always)]
    fn abs(self) -> Self {
        Self::abs(self)
    }
}

impl Number for f64 {
    #[inline(always)]
    fn abs(self) -> Self {
        Self::abs(self)
    }
}

/// Elements decoded at a time: those of all operands fit the first caches.
pub const BLOCK: usize = 1 << 10;

/// What a thread works on.
pub struct Block<T> {
    /// The elements of each operand.
    pub operands: Vec<Vec<T>>,
    /// The base's elements, where they were asked for.
    pub base: Vec<T>,
    /// The result.
    pub out: Vec<T>,
    /// Sums on the way to the result.
    pub sums: Vec<f64>,
    /// What the sums are divided by.
    pub divisors: Vec<f64>,
}

impl<T: Number> Block<T> {
    /// Buffers for `k` operands.
    pub fn new(k: usize) -> Self {
        let numbers = || vec![T::default(); BLOCK];
        Self {
            operands: (0..k).map(|_| numbers()).collect(),
            base: Vec::new(),
            out: numbers(),
            sums: vec![0.0; BLOCK],
            divisors: vec![0.0; BLOCK],
        }
    }

    /// Reads elements `start..start + len` of the operands, and of the base where asked; operands with a mask count as
    /// the backbone outside it. Returns whether every element read is finite.
    #[inline(always)]
    pub fn load(&mut self, tensor: &Tensor<'_>, start: usize, len: usize, with_base: bool) -> bool {
        let mut finite = true;
        for (values, view) in self.operands.iter_mut().zip(&tensor.operands) {
            finite &= read(view, start, len, values);
        }
        match (with_base, &tensor.base) {
            (true, Some(view)) => finite &= read(view, start, len, &mut self.base),
            _ => self.base.clear(),
        }
        if !tensor.masks.is_empty() {
            self.restrict(tensor, start);
        }
        finite
    }

    /// Puts the backbone's elements in the place of those outside an operand's mask.
    fn restrict(&mut self, tensor: &Tensor<'_>, start: usize) {
        let (backbone, restricted) = match &tensor.base {
            Some(_) => (&self.base[..], &mut self.operands[..]),
            None => {
                let (first, others) = self.operands.split_first_mut().expect("there are operands");
                (&first[..], others)
            }
        };
        let masks = &tensor.masks[tensor.masks.len() - restricted.len()..];
        for (values, bits) in restricted.iter_mut().zip(masks) {
            if let Some(bits) = bits {
                outside(bits, start, values, |j, v| *v = backbone[j]);
            }
        }
    }

    /// Takes the elements that are set in `bits` out of every sum, as if all inputs were zero there.
    pub fn clear(&mut self, bits: &[u8], start: usize) {
        for values in self.operands.iter_mut().chain([&mut self.base]).filter(|v| !v.is_empty()) {
            inside(bits, start, values, |_, v| *v = T::default());
        }
    }

    /// As [`Block::clear`], for the operands alone.
    pub fn clear_operands(&mut self, bits: &[u8], start: usize) {
        for values in &mut self.operands {
            inside(bits, start, values, |_, v| *v = T::default());
        }
    }

    /// Takes element `j` of the block out of every sum.
    pub fn clear_one(&mut self, j: usize) {
        for values in self.operands.iter_mut().chain([&mut self.base]).filter(|v| !v.is_empty()) {
            values[j] = T::default();
        }
    }

    /// Makes the combination of the operands the result: Σ cᵢ vᵢ, or base + Σ cᵢ (vᵢ − base).
    #[inline(always)]
    pub fn combine(&mut self, coefficients: &[f64], len: usize, about_base: bool) {
        let Self { operands, base, out, sums, .. } = self;
        out.resize(len, T::default());
        if let ([a, b], false) = (coefficients, about_base)
            && *a != 0.0
            && *b != 0.0
        {
            let pairs = operands[0].iter().zip(&operands[1]);
            out.iter_mut().zip(pairs).for_each(|(o, (x, y))| *o = T::from_f64(a * x.to_f64() + b * y.to_f64()));
            return;
        }
        // Sums begin at −0.0 and terms without weight are left out: then a −0.0 stays what it is.
        let sums = &mut sums[..len];
        sums.fill(-0.0);
        for (c, values) in coefficients.iter().zip(&*operands).filter(|(c, _)| **c != 0.0) {
            if about_base {
                let pairs = values.iter().zip(&*base);
                sums.iter_mut().zip(pairs).for_each(|(s, (v, b))| *s += c * (v.to_f64() - b.to_f64()));
            } else {
                sums.iter_mut().zip(values).for_each(|(s, v)| *s += c * v.to_f64());
            }
        }
        if about_base {
            sums.iter_mut().zip(&*base).for_each(|(s, b)| *s += b.to_f64());
        }
        out.iter_mut().zip(&*sums).for_each(|(o, s)| *o = T::from_f64(*s));
    }

    /// Puts the backbone's elements into the result where `bits` are set.
    pub fn keep_backbone(&mut self, bits: &[u8], start: usize) {
        let backbone = if self.base.is_empty() { &self.operands[0] } else { &self.base };
        inside(bits, start, &mut self.out, |j, v| *v = backbone[j]);
    }
}

/// Reads elements `start..start + len`; returns whether all are finite.
#[inline(always)]
pub fn read<T: Number>(view: &TensorView<'_>, start: usize, len: usize, out: &mut Vec<T>) -> bool {
    out.resize(len, T::default());
    view.read(start, out);
    out.iter().fold(true, |finite, v| finite & v.is_finite())
}

/// Calls `each` with position and value of every element whose bit is set; `values[0]` is element `start`, a multiple of 8.
pub fn inside<T>(bits: &[u8], start: usize, values: &mut [T], each: impl FnMut(usize, &mut T)) {
    by_bit(bits, start, values, 0, each);
}

/// Calls `each` with position and value of every element whose bit is not set.
pub fn outside<T>(bits: &[u8], start: usize, values: &mut [T], each: impl FnMut(usize, &mut T)) {
    by_bit(bits, start, values, 0xFF, each);
}

fn by_bit<T>(bits: &[u8], start: usize, values: &mut [T], flip: u8, mut each: impl FnMut(usize, &mut T)) {
    debug_assert_eq!(start % 8, 0);
    for (a, (byte, eight)) in bits[start / 8..].iter().zip(values.chunks_mut(8)).enumerate() {
        let byte = byte ^ flip;
        if byte != 0 {
            eight.iter_mut().enumerate().filter(|(b, _)| byte >> b & 1 == 1).for_each(|(b, v)| each(8 * a + b, v));
        }
    }
}

/// The error that names the first element of the operands or the base in this range that is not finite.
pub fn not_finite(tensor: &Tensor<'_>, start: usize, len: usize) -> BadInput {
    let mut values = vec![0f64; len];
    for view in tensor.operands.iter().chain(&tensor.base) {
        view.read(start, &mut values);
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return BadInput::new(view.file, "a weight that is not a finite number")
                .tensor(view.name)
                .expected("finite numbers")
                .found(format!("{} at element {}", values[at], start + at))
                .hint("the training run behind this checkpoint has diverged, or the file is damaged");
        }
    }
    unreachable!("only called for a range with such an element")
}
