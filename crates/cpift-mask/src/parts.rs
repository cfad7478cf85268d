//! What competes with what: the parameters of the inputs cut into the parts of a scope, and those into chunks.

use std::collections::BTreeMap;

use cpift_core::format::mask::Scope;
use cpift_core::format::names::{TensorKind, layer};
use cpift_core::{Checkpoint, TensorView};

use crate::inputs::Inputs;
use crate::scores::{BLOCK, Extent};

/// Elements of a chunk: a multiple of 8, so that chunks end on whole bytes of a mask; a power of two, so that each can be
/// hashed by itself; and places in it fit 16 bits.
pub const CHUNK: usize = 64 * 1024;

/// One parameter in all inputs; same shape, floating-point in all.
#[derive(Clone, Copy)]
pub struct Pair<'a> {
    /// The parameter before.
    pub base: TensorView<'a>,
    /// The parameter after.
    pub tuned: TensorView<'a>,
    /// Its squared gradients, where they are given.
    pub fisher: Option<TensorView<'a>>,
    /// Its place among all tensors of base, of tuned and of fisher.
    pub places: [usize; 3],
}

impl<'a> Pair<'a> {
    /// Base, tuned, and fisher where it is given.
    #[inline(always)]
    pub fn views(&self) -> impl Iterator<Item = &TensorView<'a>> {
        [&self.base, &self.tuned].into_iter().chain(&self.fisher)
    }
}

/// A run of elements of one pair.
#[derive(Debug, Clone, Copy)]
pub struct Chunk {
    /// Index of the pair in [`Part::pairs`].
    pub pair: usize,
    /// First element, a multiple of 8.
    pub start: usize,
    /// Number of elements, at most [`CHUNK`].
    pub len: usize,
}

impl Chunk {
    /// First element and number of elements of each block of the chunk.
    #[inline(always)]
    pub fn blocks(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.len).step_by(BLOCK).map(move |at| (self.start + at, BLOCK.min(self.len - at)))
    }
}

/// Parameters that are ranked together, in bytewise name order.
pub struct Part<'a> {
    /// What messages call it.
    pub label: String,
    /// Its parameters.
    pub pairs: Vec<Pair<'a>>,
    /// All their elements, in order.
    pub chunks: Vec<Chunk>,
    /// Where |Δ| and F lie among them, for a score that scales both.
    pub extents: [Extent; 2],
}

impl<'a> Part<'a> {
    /// A part of `pairs`.
    pub fn new(label: impl Into<String>, pairs: Vec<Pair<'a>>) -> Self {
        let chunks = pairs
            .iter()
            .enumerate()
            .flat_map(|(pair, p)| {
                let n = p.base.numel();
                (0..n).step_by(CHUNK).map(move |start| Chunk { pair, start, len: CHUNK.min(n - start) })
            })
            .collect();
        Self { label: label.into(), pairs, chunks, extents: Default::default() }
    }

    /// Number of elements.
    pub fn numel(&self) -> u64 {
        self.pairs.iter().map(|p| p.base.numel() as u64).sum()
    }

    /// Bytes of the inputs that hold its elements.
    pub fn nbytes(&self) -> u64 {
        self.pairs.iter().flat_map(Pair::views).map(|view| view.bytes.len() as u64).sum()
    }

    /// Bytes of the inputs that hold the elements of `chunk`.
    pub fn chunk_bytes(&self, chunk: Chunk) -> u64 {
        self.pairs[chunk.pair].views().map(|view| (chunk.len * view.dtype.size()) as u64).sum()
    }
}

/// The parameters of the inputs, cut by scope; those of excluded kinds apart.
pub struct Parts<'a> {
    /// Where elements are chosen: parts in bytewise order of their first tensor's name.
    pub ranked: Vec<Part<'a>>,
    /// What is out of D.
    pub excluded: Part<'a>,
}

/// Cuts the parameters of the base, which the other inputs have too.
pub fn cut<'a>(inputs: &'a Inputs, scope: Scope, excluded: &[TensorKind]) -> Parts<'a> {
    let mut ranked: BTreeMap<String, Vec<Pair<'a>>> = BTreeMap::new();
    let mut out = Vec::new();
    let [in_base, in_tuned] = [&inputs.base, &inputs.tuned].map(places);
    let in_fisher = inputs.fisher.as_ref().map(places).unwrap_or_default();
    for view in inputs.base.parameters() {
        let other = |checkpoint: &'a Checkpoint| checkpoint.get(view.name).expect("all have the same parameters");
        let pair = Pair {
            base: view,
            tuned: other(&inputs.tuned),
            fisher: inputs.fisher.as_ref().map(other),
            places: [
                in_base[inputs.base.stored_name(view.name)],
                in_tuned[inputs.tuned.stored_name(view.name)],
                in_fisher.get(view.name).copied().unwrap_or(0),
            ],
        };
        if excluded.iter().any(|kind| kind.matches(view.name)) {
            out.push(pair);
        } else {
            ranked.entry(label(scope, view.name)).or_default().push(pair);
        }
    }
    let ranked = ranked.into_iter().map(|(label, pairs)| Part::new(label, pairs)).collect();
    Parts { ranked, excluded: Part::new("excluded", out) }
}

fn places(checkpoint: &Checkpoint) -> BTreeMap<&str, usize> {
    checkpoint.tensors().enumerate().map(|(i, view)| (view.name, i)).collect()
}

fn label(scope: Scope, name: &str) -> String {
    match scope {
        Scope::Global | Scope::Whole => "all parameters".to_owned(),
        Scope::Layer => layer(name).map_or("outside the layers", |(prefix, _)| prefix).to_owned(),
        Scope::Tensor => name.to_owned(),
    }
}
