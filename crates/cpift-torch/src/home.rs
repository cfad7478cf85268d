//! The home of the weights, which lends the units of a model (embedding, blocks, head) whole
//! parameters.
//!
//! In one process the model's tensors are the home. Otherwise each rank keeps an equal part of each
//! unit, in flat vectors: the model's tensors have no memory until a unit is lent to them for its
//! forward or backward pass, and gradients are summed onto the parts. A part may lie in host memory
//! instead of on the device.
//!
//! A flat vector holds the parameters of a unit that are lent in one dtype, each from a multiple of
//! [`ALIGN`] elements on; rank r of N keeps the r-th of N equal parts, also of a multiple of
//! [`ALIGN`] elements. A parameter's place does not depend on N.

use std::ops::Range;
use std::rc::Rc;

use anyhow::{Result, anyhow};
use cpift_core::Checkpoint;
use tch::{Device, Kind, Tensor, no_grad};

use crate::dist::{Work, set_storage};
use crate::optim::BLOCK;
use crate::placement::{Piece, Pieces, Placement, Reduce};
use crate::transfer::{self, Arrival};
use crate::weights::{self, Parameters};

/// Parameters and parts begin at multiples of this number of elements: kernels see the alignment of
/// a tensor of its own, vectors are cut where they would be cut in the whole tensor, and no block
/// of 8-bit moments is cut. Otherwise the update of the elements beside a cut rounds differently.
const ALIGN: i64 = BLOCK;

/// Home of a model's weights.
pub enum Home {
    /// The model's own tensors.
    Whole,
    /// Parts, lent unit by unit.
    Units(Rc<UnitHome>),
}

/// Parts of all units of a model.
pub struct UnitHome {
    placement: Placement,
    units: Vec<Unit>,
}

struct Unit {
    flats: Vec<Flat>,
    /// Number of parameters.
    len: usize,
}

/// A flat vector of parameters that are lent in one dtype.
struct Flat {
    members: Vec<Member>,
    /// Dtype of the lent parameters.
    wire: Kind,
    /// Elements of each rank's part.
    part: i64,
    /// This rank's part, in the master dtype.
    shard: Tensor,
}

impl Flat {
    /// Start and length of what no parameter covers in a whole vector of `len` elements.
    fn gaps(&self, len: i64) -> impl Iterator<Item = (i64, i64)> {
        let ends = self.members.iter().map(|m| m.start + m.len);
        let starts = self.members.iter().skip(1).map(|m| m.start).chain([len]);
        ends.zip(starts).map(|(end, start)| (end, start - end)).filter(|(_, len)| *len > 0)
    }
}

struct Member {
    name: String,
    /// Place among the unit's parameters.
    place: usize,
    /// The model's tensor.
    leaf: Tensor,
    /// Contents of the model's tensor while the unit is not lent: the shape, without memory.
    nothing: Tensor,
    shape: Vec<i64>,
    start: i64,
    len: i64,
}

impl Member {
    /// The parameter in a whole flat vector.
    fn in_whole(&self, whole: &Tensor) -> Tensor {
        whole.narrow(0, self.start, self.len).view(self.shape.as_slice())
    }

    /// Flat indices that lie in both the parameter and `own`.
    fn held(&self, own: &Range<i64>) -> Range<i64> {
        let (from, to) = (own.start.max(self.start), own.end.min(self.start + self.len));
        from..to.max(from)
    }
}

/// Leaves of the shapes of `checkpoint`'s parameters without memory, as `kind`, for a model whose
/// units are lent. Unlent weights are NaN, so that no result can come of them.
pub(crate) fn placeholders(checkpoint: &Checkpoint, kind: Kind, device: Device) -> Parameters {
    let leaf = |shape: &[usize]| {
        let shape: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
        nothing(&shape, kind, device).set_requires_grad(true)
    };
    checkpoint.parameters().map(|view| (view.name.to_owned(), leaf(view.shape))).collect()
}

fn nothing(shape: &[i64], kind: Kind, device: Device) -> Tensor {
    Tensor::full([1], f64::NAN, (kind, device)).expand(shape, false)
}

fn aligned(n: i64) -> i64 {
    (n + ALIGN - 1) / ALIGN * ALIGN
}

impl UnitHome {
    /// Lays out the units of a model (names in the order of `units`) over its `leaves` and reads
    /// this rank's parts from `checkpoint`. `wire` returns the dtype in which a parameter is lent.
    ///
    /// # Errors
    /// [`cpift_core::BadInput`] for a weight that is not finite; no memory for a part.
    pub(crate) fn load(
        placement: Placement,
        units: &[Vec<String>],
        leaves: &Parameters,
        checkpoint: &Checkpoint,
        wire: impl Fn(&str, &Tensor) -> Kind,
    ) -> Result<Self> {
        let mut home = Self { placement, units: Vec::new() };
        for (index, names) in units.iter().enumerate() {
            let mut by_kind: Vec<(Kind, Vec<Member>, i64)> = Vec::new();
            for (place, name) in names.iter().enumerate() {
                let leaf = &leaves[name];
                let kind = wire(name, leaf);
                if !by_kind.iter().any(|(k, ..)| *k == kind) {
                    by_kind.push((kind, Vec::new(), 0));
                }
                let (_, members, end) = by_kind.iter_mut().find(|(k, ..)| *k == kind).expect("pushed above");
                let len = leaf.numel() as i64;
                members.push(Member {
                    name: name.clone(),
                    place,
                    leaf: leaf.shallow_clone(),
                    nothing: nothing(&leaf.size(), kind, leaf.device()),
                    shape: leaf.size(),
                    start: *end,
                    len,
                });
                *end += aligned(len);
            }
            let mut flats = Vec::new();
            for (i, (wire, members, len)) in by_kind.into_iter().enumerate() {
                flats.push(home.flat(&format!("unit-{index}-{i}"), wire, members, len, checkpoint)?);
            }
            home.units.push(Unit { flats, len: names.len() });
        }
        Ok(home)
    }

    fn flat(&self, label: &str, wire: Kind, members: Vec<Member>, len: i64, checkpoint: &Checkpoint) -> Result<Flat> {
        let master = members[0].leaf.kind();
        // From now on in the dtype in which they are lent: a graph would lose a leaf whose dtype
        // changes.
        members.iter().for_each(Member::take_back);
        let part = aligned((len + self.world() - 1) / self.world());
        let shard = self.placement.weights.zeros(label, &[part], master)?;
        let flat = Flat { members, wire, part, shard };
        let own = self.own(&flat);
        for member in &flat.members {
            let held = member.held(&own);
            if held.is_empty() {
                continue;
            }
            let view = checkpoint.get(&member.name).ok_or_else(|| anyhow!("{}: no such tensor", member.name))?;
            let read = weights::read_part(&view, held.start - member.start, held.end - member.start)?;
            let mut slot = flat.shard.narrow(0, held.start - own.start, held.end - held.start);
            no_grad(|| slot.copy_(&read));
        }
        Ok(flat)
    }

    fn world(&self) -> i64 {
        self.placement.world() as i64
    }

    /// Flat indices of this rank's part.
    fn own(&self, flat: &Flat) -> Range<i64> {
        let rank = self.placement.rank() as i64;
        rank * flat.part..(rank + 1) * flat.part
    }

    /// This rank's pieces of all parameters; they share storage with the parts.
    pub(crate) fn pieces(&self) -> Pieces {
        let mut pieces = Pieces::new();
        for flat in self.units.iter().flat_map(|unit| &unit.flats) {
            for member in &flat.members {
                pieces.insert(member.name.clone(), self.piece(flat, member, &flat.shard));
            }
        }
        pieces
    }

    /// The piece of `member` in `part`, a tensor like the flat vector's part.
    fn piece(&self, flat: &Flat, member: &Member, part: &Tensor) -> Piece {
        let own = self.own(flat);
        let held = member.held(&own);
        let at = if held.is_empty() { 0 } else { held.start - own.start };
        Piece {
            tensor: part.narrow(0, at, held.end - held.start),
            start: if held.is_empty() { 0 } else { held.start - member.start },
            shape: member.shape.clone(),
        }
    }

    /// Starts to bring the whole parameters of a unit to the device.
    fn ask(self: &Rc<Self>, unit: usize) -> Result<Asked> {
        let mut asked = Units { home: Rc::clone(self), unit, wholes: Vec::new(), coming: Vec::new() };
        for flat in &self.units[unit].flats {
            let whole = Tensor::empty([flat.part * self.world()], (flat.wire, self.placement.device));
            asked.coming.push(self.fill(flat, &whole)?);
            asked.wholes.push(whole);
        }
        Ok(Asked(Some(asked)))
    }

    /// Starts to fill `whole`: from all ranks, or in one process from host memory.
    fn fill(&self, flat: &Flat, whole: &Tensor) -> Result<Coming> {
        let Some(group) = &self.placement.group else {
            return match self.placement.device {
                // On a stream for copies, beside the work of the device.
                Device::Cuda(index) => {
                    let (arrival, ()) = Arrival::of(index, || transfer::copy(whole, &flat.shard))?;
                    Ok(Coming { work: None, arrival: Some(arrival) })
                }
                _ => transfer::copy(whole, &flat.shard).map(|()| Coming { work: None, arrival: None }),
            };
        };
        let own = if flat.shard.device() == whole.device() {
            no_grad(|| flat.shard.to_kind(flat.wire))
        } else {
            let own = Tensor::empty([flat.part], (flat.wire, whole.device()));
            transfer::copy(&own, &flat.shard)?;
            own
        };
        Ok(Coming { work: Some(group.all_gather(whole, &own)?), arrival: None })
    }

    /// Starts to sum the gradients of a unit's parameters over the ranks; see
    /// [`UnitHome::finish`].
    pub(crate) fn start_sum(&self, unit: usize, grads: Vec<Tensor>) -> Result<Reduction> {
        let unit_home = &self.units[unit];
        assert_eq!(grads.len(), unit_home.len, "a gradient for each parameter of the unit");
        let mut parts = Vec::new();
        for flat in &unit_home.flats {
            let of = |m: &Member| &grads[m.place];
            // bf16 if all gradients are: nothing is rounded on the way.
            let narrow = flat.members.iter().all(|m| of(m).kind() == Kind::BFloat16);
            let native = self.placement.reduce == Reduce::Native;
            let kind = if narrow && !native { Kind::BFloat16 } else { Kind::Float };
            let whole = Tensor::empty([flat.part * self.world()], (kind, self.placement.device));
            no_grad(|| {
                flat.members.iter().for_each(|m| m.in_whole(&whole).copy_(of(m)));
                flat.gaps(whole.numel() as i64).for_each(|(at, len)| drop(whole.narrow(0, at, len).zero_()));
            });
            parts.push(match &self.placement.group {
                None => (whole, None),
                Some(group) if native => {
                    let own = Tensor::empty([flat.part], (kind, whole.device()));
                    let work = group.reduce_scatter(&own, &whole)?;
                    (own, Some(work))
                }
                Some(group) => {
                    let received = Tensor::empty_like(&whole);
                    let work = group.all_to_all(&received, &whole)?;
                    (received, Some(work))
                }
            });
        }
        Ok(Reduction { unit, parts })
    }
}

/// Gradients of a unit on their way to the ranks that keep its parts.
pub(crate) struct Reduction {
    unit: usize,
    /// For each flat vector, the contributions of all ranks to this rank's part, in rank order.
    parts: Vec<(Tensor, Option<Work>)>,
}

/// Sums of the gradients of this rank's parts, by unit and flat vector; none before the first.
pub(crate) struct GradientSums(Vec<Vec<Option<Tensor>>>);

impl UnitHome {
    /// Sums without any gradient.
    pub(crate) fn no_sums(&self) -> GradientSums {
        GradientSums(self.units.iter().map(|unit| unit.flats.iter().map(|_| None).collect()).collect())
    }

    /// Waits for a sum and adds it to `sums`, rank by rank.
    pub(crate) fn finish(&self, reduction: Reduction, sums: &mut GradientSums) -> Result<()> {
        let Reduction { unit, parts } = reduction;
        for ((flat, (received, work)), sum) in self.units[unit].flats.iter().zip(parts).zip(&mut sums.0[unit]) {
            if let Some(work) = work {
                work.wait()?;
            }
            no_grad(|| {
                let mut parts = received.view([-1, flat.part]).unbind(0).into_iter();
                if sum.is_none() {
                    // A tensor of its own, without the other ranks' contributions.
                    let (first, second) = (parts.next().expect("one or more ranks"), parts.next());
                    let first = first.to_kind(Kind::Float);
                    *sum = Some(second.map_or(first.shallow_clone(), |second| first + second));
                }
                let sum = sum.as_mut().expect("begun above");
                parts.for_each(|part| drop(sum.g_add_(&part)));
            });
        }
        Ok(())
    }

    /// This rank's piece of the gradient of each parameter of `unit`, in its order; they share
    /// storage with `sums`.
    pub(crate) fn gradients(&self, unit: usize, sums: &GradientSums) -> Vec<Tensor> {
        let mut grads: Vec<Option<Tensor>> = (0..self.units[unit].len).map(|_| None).collect();
        for (flat, sum) in self.units[unit].flats.iter().zip(&sums.0[unit]) {
            let sum = sum.as_ref().expect("the backward pass visits every trained unit");
            for member in &flat.members {
                grads[member.place] = Some(self.piece(flat, member, sum).tensor);
            }
        }
        grads.into_iter().map(|g| g.expect("every parameter is in a flat vector")).collect()
    }

    /// Forgets the sums of `unit`.
    pub(crate) fn clear(&self, unit: usize, sums: &mut GradientSums) {
        sums.0[unit].iter_mut().for_each(|sum| *sum = None);
    }

    /// Passes pieces as whole tensors to `sink`, one flat vector at a time; every rank must call it
    /// with its own pieces of the same parameters.
    ///
    /// # Errors
    /// Errors of `sink`; a failed collective.
    pub(crate) fn each_whole(&self, pieces: &Pieces, mut sink: impl FnMut(&str, &Tensor) -> Result<()>) -> Result<()> {
        for flat in self.units.iter().flat_map(|unit| &unit.flats) {
            let Some(kind) = flat.members.iter().find_map(|m| pieces.get(&m.name)).map(|p| p.tensor.kind()) else {
                continue;
            };
            let own = Tensor::zeros([flat.part], (kind, self.placement.device));
            for (member, piece) in flat.members.iter().filter_map(|m| Some((m, pieces.get(&m.name)?))) {
                no_grad(|| self.piece(flat, member, &own).tensor.copy_(&piece.tensor.detach().flatten(0, -1)));
            }
            let whole = match &self.placement.group {
                None => own,
                Some(group) => {
                    let whole = Tensor::empty([flat.part * self.world()], (kind, self.placement.device));
                    group.all_gather(&whole, &own)?.wait()?;
                    whole
                }
            };
            for member in flat.members.iter().filter(|m| pieces.contains_key(&m.name)) {
                sink(&member.name, &member.in_whole(&whole))?;
            }
        }
        Ok(())
    }
}

impl Home {
    /// Starts to bring the weights of a unit to the device; does nothing if they are there.
    ///
    /// # Errors
    /// A failed collective.
    pub(crate) fn ask(&self, unit: usize) -> Result<Asked> {
        match self {
            Self::Whole => Ok(Asked(None)),
            Self::Units(home) => home.ask(unit),
        }
    }
}

/// Whole parameters of a unit.
struct Units {
    home: Rc<UnitHome>,
    unit: usize,
    wholes: Vec<Tensor>,
    coming: Vec<Coming>,
}

/// A flat vector on its way to the device.
struct Coming {
    work: Option<Work>,
    arrival: Option<Arrival>,
}

impl Coming {
    fn wait(self) -> Result<()> {
        self.work.map_or(Ok(()), Work::wait)?;
        self.arrival.map_or(Ok(()), Arrival::wait)
    }
}

impl Units {
    fn flats(&self) -> &[Flat] {
        &self.home.units[self.unit].flats
    }
}

/// A unit's weights on their way to the device.
#[must_use]
pub(crate) struct Asked(Option<Units>);

/// A unit's weights in the model's tensors, until dropped.
#[must_use]
pub(crate) struct Lent(Option<Units>);

/// A unit's weights between its forward and its backward pass: kept, or without memory while a
/// graph has views of it.
pub(crate) struct Parked {
    units: Option<Units>,
    kept: bool,
}

impl Asked {
    /// Waits for the weights and puts them into the model's tensors.
    ///
    /// # Errors
    /// A failed collective.
    pub(crate) fn lend(self) -> Result<Lent> {
        let Some(mut units) = self.0 else { return Ok(Lent(None)) };
        units.coming.drain(..).try_for_each(Coming::wait)?;
        for (flat, whole) in units.flats().iter().zip(&units.wholes) {
            for member in &flat.members {
                member.leaf.shallow_clone().set_data(&member.in_whole(whole));
            }
        }
        Ok(Lent(Some(units)))
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(units) = &self.0 {
            units.flats().iter().flat_map(|flat| &flat.members).for_each(Member::take_back);
        }
    }
}

impl Member {
    fn take_back(&self) {
        self.leaf.shallow_clone().set_data(&self.nothing);
    }
}

impl Lent {
    /// Takes the weights back, and their memory too where a graph still has views of it.
    ///
    /// # Errors
    /// An error of libtorch.
    pub(crate) fn park(mut self) -> Result<Parked> {
        if let Some(units) = &self.0 {
            units.flats().iter().flat_map(|flat| &flat.members).for_each(Member::take_back);
            units.wholes.iter().try_for_each(|whole| set_storage(whole, 0))?;
        }
        Ok(Parked { units: self.0.take(), kept: false })
    }

    /// Keeps the weights for the backward pass.
    pub(crate) fn keep(mut self) -> Parked {
        Parked { units: self.0.take(), kept: true }
    }
}

impl Parked {
    /// Starts to bring the weights back to where the graph has them, unless they were kept.
    ///
    /// # Errors
    /// A failed collective; no memory.
    pub(crate) fn ask(self) -> Result<Asked> {
        let Some(mut units) = self.units else { return Ok(Asked(None)) };
        if self.kept {
            return Ok(Asked(Some(units)));
        }
        let home = Rc::clone(&units.home);
        for (flat, whole) in home.units[units.unit].flats.iter().zip(&units.wholes) {
            set_storage(whole, whole.numel() * whole.kind().elt_size_in_bytes())?;
            // Through a tensor with a version counter of its own: to autograd nothing is written.
            units.coming.push(home.fill(flat, &whole.data())?);
        }
        Ok(Asked(Some(units)))
    }
}
