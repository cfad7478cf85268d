//! The work of a merge: its tensors in all inputs, cut into chunks; blocks of their numbers,
//! decoded, checked, and restricted to the masks of the operands; and everything the threads share
//! while they process them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;

use anyhow::Result;
use cpift_core::run::progress;
use cpift_core::stream::hashing::PieceHasher;
use cpift_core::{BadInput, Dtype, Mask, TensorView};
use indicatif::ProgressBar;
use rayon::prelude::*;

use crate::methods::region::{Region, outside};
use crate::methods::sign_merge::Number;
use crate::methods::{Claims, Conflict, Rule};
use crate::plan::{Inputs, Model, Plan, Source, Target};
use crate::request::Space;

/// Number of elements that one job takes: its bytes in two inputs and the output fit in a core's
/// second-level cache, and a write is long enough to hide the cost of the system call. A power of
/// two, as pieces of a digest are.
pub(crate) const CHUNK: usize = 1 << 17;

/// A merge as the passes need it.
pub(super) struct Job<'a> {
    /// Parameters in bytewise name order.
    pub tensors: Vec<Tensor<'a>>,
    /// Number of operands of each tensor.
    pub operands: usize,
    /// Vectors that are combined.
    pub space: Space,
    /// True if there is a base that is not one of the operands.
    pub base_is_separate: bool,
    /// Angle in radians below which, or within which of π, interpolation is linear.
    pub epsilon: f64,
    /// Value of an element in several core regions.
    pub conflict: Option<Conflict>,
}

impl<'a> Job<'a> {
    pub fn of(plan: &'a Plan) -> Self {
        let rules = plan.rules.iter().zip(&plan.output.dtypes);
        let tensors = match plan.targets() {
            Some(targets) => {
                targets.iter().zip(rules).map(|(t, (rule, dtype))| rearranged(plan, t, rule, *dtype)).collect()
            }
            None => {
                let parameters = plan.backbone().checkpoint.parameters();
                parameters.zip(rules).map(|(view, (rule, dtype))| tensor(plan, view.name, rule, *dtype)).collect()
            }
        };
        Self {
            tensors,
            operands: plan.operands().len(),
            space: plan.space,
            base_is_separate: plan.base_is_separate(),
            epsilon: plan.epsilon,
            conflict: match &plan.inputs {
                Inputs::Models(_) => None,
                Inputs::Tasks { conflict, .. } => Some(*conflict),
            },
        }
    }
}

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

/// A tensor that is made from those of its name.
fn tensor<'a>(plan: &'a Plan, name: &'a str, rule: &'a Rule, dtype: Dtype) -> Tensor<'a> {
    // A model that lacks a parameter counts as having the backbone's, where the plan allows it.
    let of_backbone = || plan.backbone().checkpoint.get(name).expect("it is a parameter of the backbone");
    let view = |source: &'a Source| source.checkpoint.get(name).unwrap_or_else(of_backbone);
    let bits = |mask: &'a Mask| mask.bits(name).expect("checked by the plan");
    let operand = |(index, (source, mask)): (usize, (&'a Source, Option<&'a [u8]>))| Operand {
        index,
        source,
        view: view(source),
        mask,
    };
    let (operands, claims) = match &plan.inputs {
        Inputs::Models(models) => {
            let of_models = models.iter().map(|m: &'a Model| (&*m.source, m.mask.as_ref().map(bits)));
            (of_models.enumerate().map(operand).collect(), Claims::default())
        }
        Inputs::Tasks { backbone, tasks, .. } => {
            let sources = [backbone].into_iter().chain(tasks.iter().map(|task| &task.source));
            let operands = sources.map(|source| (&**source, None)).enumerate().map(operand).collect();
            (operands, Claims::new(tasks.iter().map(|task| bits(&task.core)).collect()))
        }
    };
    let base = plan.base.as_deref().map(view);
    let region = |mask: &'a Mask, inverted| Region { bits: bits(mask), inverted };
    let within = plan.within.as_ref().map(|mask| region(mask, true));
    let protected = plan.protect.as_ref().map(|mask| region(mask, false)).or(within);
    Tensor { operands, base, claims, protected, rule, name, dtype }
}

/// A tensor whose origins are spelled out.
fn rearranged<'a>(plan: &'a Plan, target: &'a Target, rule: &'a Rule, dtype: Dtype) -> Tensor<'a> {
    let sources = plan.operands();
    let view = |source: &'a Source, name: &str| source.checkpoint.get(name).expect("checked by the plan");
    let operand = |(index, name): &(usize, String)| {
        let source = sources[*index];
        Operand { index: *index, source, view: view(source, name), mask: None }
    };
    let base = target.base.as_ref().and_then(|name| Some(view(plan.base.as_deref()?, name)));
    Tensor {
        operands: target.operands.iter().map(operand).collect(),
        base,
        claims: Claims::default(),
        protected: None,
        rule,
        name: &target.name,
        dtype,
    }
}

/// Number of bytes of the first operand of `tensors`.
pub(super) fn bytes_of(tensors: &[Tensor<'_>]) -> u64 {
    tensors.iter().map(|t| t.operands[0].view.bytes.len() as u64).sum()
}

/// One chunk of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    /// Index of the tensor.
    pub tensor: usize,
    /// Index of the chunk in the tensor.
    pub chunk: usize,
    /// Elements of the chunk.
    pub elements: Range<usize>,
}

impl Piece {
    /// Start and length of each block.
    #[inline(always)]
    pub fn blocks(&self) -> impl Iterator<Item = (usize, usize)> {
        let end = self.elements.end;
        self.elements.clone().step_by(BLOCK).map(move |start| (start, BLOCK.min(end - start)))
    }
}

/// Chunks of the tensors in `range`.
pub(super) fn pieces(tensors: &[Tensor<'_>], range: Range<usize>) -> Vec<Piece> {
    range.flat_map(|tensor| pieces_of(tensor, tensors[tensor].numel())).collect()
}

/// Chunks of the tensor at index `tensor`, which has `numel` elements.
pub(super) fn pieces_of(tensor: usize, numel: usize) -> impl Iterator<Item = Piece> {
    (0..numel.div_ceil(CHUNK)).map(move |chunk| Piece {
        tensor,
        chunk,
        elements: chunk * CHUNK..numel.min((chunk + 1) * CHUNK),
    })
}

/// Runs of tensors that keep all threads busy and, unless a tensor is large, fit in the last-level
/// cache.
pub(super) fn batches(tensors: &[Tensor<'_>]) -> Vec<Range<usize>> {
    let enough = 8 * rayon::current_num_threads();
    let (mut batches, mut start, mut filled) = (Vec::new(), 0, 0);
    for (i, tensor) in tensors.iter().enumerate() {
        filled += tensor.numel().div_ceil(CHUNK);
        if filled >= enough || i + 1 == tensors.len() {
            batches.push(start..i + 1);
            (start, filled) = (i + 1, 0);
        }
    }
    batches
}

/// Calls `each` for every piece, on all threads, and returns the results in the order of the
/// pieces.
///
/// # Errors
/// The first error in that order.
pub(super) fn for_each<R: Send>(pieces: &[Piece], each: impl Fn(&Piece) -> Result<R> + Sync + Send) -> Result<Vec<R>> {
    let results: Vec<Result<R>> = pieces.par_iter().with_max_len(1).map(each).collect();
    results.into_iter().collect()
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

/// Buffers that are not in use.
pub(super) struct Pool<T> {
    operands: usize,
    free: Mutex<Vec<(Block<T>, Vec<u8>)>>,
}

impl<T: Number> Pool<T> {
    /// An empty pool of blocks for `operands` operands.
    fn new(operands: usize) -> Self {
        Self { operands, free: Mutex::new(Vec::new()) }
    }

    /// Calls `with` with a block and a buffer for bytes.
    pub fn with<R>(&self, with: impl FnOnce(&mut Block<T>, &mut Vec<u8>) -> R) -> R {
        let taken = self.free.lock().expect("no thread panics here").pop();
        let (mut block, mut bytes) = taken.unwrap_or_else(|| (Block::new(self.operands), Vec::new()));
        let result = with(&mut block, &mut bytes);
        self.free.lock().expect("no thread panics here").push((block, bytes));
        result
    }
}

/// Everything the threads of a pass share.
pub(super) struct Shared<'a> {
    pub job: &'a Job<'a>,
    /// Buffers for tensors that are merged in f32.
    pub narrow: Pool<f32>,
    /// Buffers for tensors that are merged in f64.
    pub wide: Pool<f64>,
    pub bar: ProgressBar,
    hashes: Option<&'a InputHashes<'a>>,
}

impl<'a> Shared<'a> {
    /// The first of several merges of the same inputs has `hashes`, and shows the progress.
    pub fn new(job: &'a Job<'a>, hashes: Option<&'a InputHashes<'a>>, shown: Option<&'static str>) -> Self {
        let bar = shown.map_or_else(ProgressBar::hidden, |label| progress::bytes(label, bytes_of(&job.tensors)));
        Self { job, narrow: Pool::new(job.operands), wide: Pool::new(job.operands), bar, hashes }
    }

    /// Adds a piece of every input to the digests that are not known.
    pub fn hash(&self, tensor: &Tensor<'_>, piece: &Piece) {
        let Some(hashes) = self.hashes else { return };
        let base = tensor.base.iter().filter(|_| self.job.base_is_separate).map(|view| (self.job.operands, view));
        let operands = tensor.operands.iter().map(|operand| (operand.index, &operand.view));
        for (source, view) in operands.chain(base) {
            // A digest that a tie needed is known by now.
            if let Some(hash) = hashes.list[source].as_ref().filter(|hash| !hash.source.has_digest()) {
                hash.add(view, piece);
            }
        }
    }
}

/// Digests of the inputs that have none recorded, computed in the pass that reads them first.
pub(crate) struct InputHashes<'a> {
    /// One entry per source of the plan, in its order; `None` if the digest is known.
    list: Vec<Option<InputHash<'a>>>,
}

struct InputHash<'a> {
    source: &'a Source,
    hasher: PieceHasher,
    index: BTreeMap<&'a str, usize>,
}

impl<'a> InputHashes<'a> {
    pub fn new(plan: &'a Plan) -> Self {
        let hash = |source: &'a Source| {
            if source.known_digest().is_some() {
                return None;
            }
            let specs: Vec<_> = source.checkpoint.tensors().map(|view| view.spec()).collect();
            let index = source.checkpoint.tensors().enumerate().map(|(i, view)| (view.name, i)).collect();
            Some(InputHash { source, hasher: PieceHasher::new(&specs, CHUNK), index })
        };
        Self { list: plan.sources().map(hash).collect() }
    }

    /// Adds the tensors that the merge did not read, and stores the digest of each source.
    ///
    /// # Errors
    /// A side file that cannot be read.
    pub fn finish(self) -> Result<()> {
        let unknown = self.list.into_iter().flatten().filter(|hash| !hash.source.has_digest());
        for InputHash { source, hasher, .. } in unknown {
            hasher.add_missing(&source.checkpoint);
            let stored = hasher.finish(source.checkpoint.folder())?;
            source.set_digest(source.checkpoint.with_adapter(stored));
        }
        Ok(())
    }
}

impl InputHash<'_> {
    fn add(&self, view: &TensorView<'_>, piece: &Piece) {
        // An output embedding that stands for the input embedding is not a tensor of the file, nor
        // is a weight that an adapter replaces.
        if let Some(index) = self.index.get(self.source.checkpoint.stored_name(view.name))
            && view.is_as_stored(&self.source.checkpoint)
        {
            self.hasher.add(*index, piece.elements.start, view.slice(piece.elements.start, piece.elements.len()));
        }
    }
}
