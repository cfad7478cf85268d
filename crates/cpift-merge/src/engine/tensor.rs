//! One parameter in all inputs, and blocks of its numbers: decoded, checked, and restricted to the
//! masks of the operands.

use cpift_core::{BadInput, Dtype, TensorView};

use crate::methods::region::{Region, outside};
use crate::methods::sign_merge::Number;
use crate::methods::{Claims, Rule};
use crate::plan::Source;

/// One parameter in all inputs, with the rule that merges it.
pub(super) struct Tensor<'a> {
    /// Operands in the order of the plan.
    pub operands: Vec<Operand<'a>>,
    /// Elements of the base, for methods that have one.
    pub base: Option<TensorView<'a>>,
    /// Core elements of each task (operand 1 is task 0), for `cpi`.
    pub claims: Claims<'a>,
    /// Name in the output.
    pub name: &'a str,
    /// Elements at which the result is the backbone.
    pub protected: Option<Region<'a>>,
    /// Rule by which it is merged.
    pub rule: &'a Rule,
    /// Dtype of the result.
    pub dtype: Dtype,
}

/// One parameter in one operand.
pub(super) struct Operand<'a> {
    /// Index among the operands of the plan.
    pub index: usize,
    /// Checkpoint that it comes from.
    pub source: &'a Source,
    /// Its elements.
    pub view: TensorView<'a>,
    /// Packed bits outside which the elements are those of the backbone.
    pub mask: Option<&'a [u8]>,
}

impl<'a> Tensor<'a> {
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.operands[0].view.numel()
    }

    /// Number of elements that are not protected.
    pub fn free(&self) -> u64 {
        self.numel() as u64 - self.protected.map_or(0, |region| region.count(self.numel()))
    }

    /// Returns true if an input is F64, which f32 cannot hold.
    pub fn is_wide(&self) -> bool {
        self.views().any(|view| view.dtype == Dtype::F64)
    }

    /// Returns true if an operand has a mask.
    pub fn is_masked(&self) -> bool {
        self.operands.iter().any(|operand| operand.mask.is_some())
    }

    /// Elements in the operands and in the base.
    pub fn views(&self) -> impl Iterator<Item = &TensorView<'a>> {
        self.operands.iter().map(|operand| &operand.view).chain(&self.base)
    }

    /// The error that names the first element in this range that is not finite, of the operands or
    /// the base.
    pub fn not_finite(&self, start: usize, len: usize) -> BadInput {
        let mut values = vec![0f64; len];
        for view in self.views() {
            view.read(start, &mut values);
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                return BadInput::new(view.file, "a weight that is not a finite number")
                    .tensor(view.name)
                    .expected("finite numbers")
                    .found(format!("{} at element {}", values[at], start + at))
                    .hint("the training run that made this checkpoint diverged, or the file is damaged");
            }
        }
        unreachable!("only called for a range with such an element")
    }
}

/// Number of elements decoded at a time: those of all operands fit in the first-level cache.
pub(super) const BLOCK: usize = 1 << 10;

/// Working space of a thread: one block in all operands, and its result.
pub(super) struct Block<T> {
    /// Elements of each operand.
    pub operands: Vec<Vec<T>>,
    /// Elements of the base; empty if they were not asked for.
    pub base: Vec<T>,
    /// Result.
    pub out: Vec<T>,
    /// Partial sums of the result.
    pub sums: Vec<f64>,
    /// Divisors of the sums.
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

    /// Reads elements `start..start + len` of the operands, and of the base if `with_base` is set;
    /// outside its mask an operand gets the elements of the backbone. Returns true if every element
    /// read is finite.
    #[inline(always)]
    pub fn load(&mut self, tensor: &Tensor<'_>, start: usize, len: usize, with_base: bool) -> bool {
        let mut finite = true;
        // Slices can merge different numbers of models.
        self.operands.resize_with(tensor.operands.len(), Vec::new);
        for (values, operand) in self.operands.iter_mut().zip(&tensor.operands) {
            finite &= read(&operand.view, start, len, values);
        }
        match (with_base, &tensor.base) {
            (true, Some(view)) => finite &= read(view, start, len, &mut self.base),
            _ => self.base.clear(),
        }
        if tensor.is_masked() {
            self.restrict(tensor, start);
        }
        finite
    }

    /// Replaces the elements outside the mask of an operand by those of the backbone.
    fn restrict(&mut self, tensor: &Tensor<'_>, start: usize) {
        let (backbone, restricted, operands) = match &tensor.base {
            Some(_) => (&self.base[..], &mut self.operands[..], &tensor.operands[..]),
            None => {
                let (first, others) = self.operands.split_first_mut().expect("there are operands");
                (&first[..], others, &tensor.operands[1..])
            }
        };
        for (values, operand) in restricted.iter_mut().zip(operands) {
            if let Some(bits) = operand.mask {
                outside(bits, start, values, |j, v| *v = backbone[j]);
            }
        }
    }

    /// Sets the elements of operands and base in `region` to zero, which takes them out of every
    /// sum.
    pub fn clear(&mut self, region: Region<'_>, start: usize) {
        for values in self.operands.iter_mut().chain([&mut self.base]).filter(|v| !v.is_empty()) {
            region.inside(start, values, |_, v| *v = T::default());
        }
    }

    /// As [`Block::clear`], for the operands alone.
    pub fn clear_operands(&mut self, region: Region<'_>, start: usize) {
        for values in &mut self.operands {
            region.inside(start, values, |_, v| *v = T::default());
        }
    }

    /// As [`Block::clear`], for element `j` of the block.
    pub fn clear_one(&mut self, j: usize) {
        for values in self.operands.iter_mut().chain([&mut self.base]).filter(|v| !v.is_empty()) {
            values[j] = T::default();
        }
    }

    /// Puts the elements of the backbone into the result in `region`.
    pub fn keep_backbone(&mut self, region: Region<'_>, start: usize) {
        let backbone = if self.base.is_empty() { &self.operands[0] } else { &self.base };
        region.inside(start, &mut self.out, |j, v| *v = backbone[j]);
    }
}

/// Reads elements `start..start + len`; returns true if all are finite.
#[inline(always)]
fn read<T: Number>(view: &TensorView<'_>, start: usize, len: usize, out: &mut Vec<T>) -> bool {
    out.resize(len, T::default());
    view.read(start, out);
    out.iter().fold(true, |finite, v| finite & v.is_finite())
}
