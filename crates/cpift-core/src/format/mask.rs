//! Core-region masks: one bit per parameter of a base checkpoint, in a safetensors file, and one
//! bit per bit set for the elements that were chosen among equals.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::error::BadInput;
use crate::format::checkpoint::reader::Checkpoint;
use crate::format::digest::Digest;
use crate::format::dtype::Dtype;
use crate::format::json;
use crate::format::safetensors::{Entry, FileWriter, MappedFile, TensorSpec};

/// Format version of mask files that this program reads and writes.
///
/// Version 1 broke ties by position.
pub const FORMAT_VERSION: u32 = 2;

/// Name of the tensor of [`Mask::tie_flags`].
pub const TIES_TENSOR: &str = "cpift.ties";

/// Metadata key of the [`MaskHeader`], stored as JSON.
pub(crate) const METADATA_KEY: &str = "cpift";

/// Metadata of a mask file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MaskHeader {
    /// Format version of the file.
    pub format_version: u32,
    /// p in percent of D, or of the number of tensors for [`Scope::Whole`]; for [`Metric::Random`],
    /// that of the mask it imitates.
    pub percent: f64,
    /// Set of elements from which the top p % are chosen.
    pub scope: Scope,
    /// Quantity by which elements are ranked.
    pub metric: Metric,
    /// Seed of [`Metric::Random`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Rule of the selection if it is not the top p % of single elements: `row`, `2:4`, `union of 2
    /// masks` and others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// D, the number of ranked parameters.
    #[serde(rename = "D")]
    pub d: u64,
    /// Number of bits set.
    pub selected: u64,
    /// Ties at the threshold; all zero if there is no threshold.
    pub ties: Ties,
    /// Kinds of tensors excluded from D (`embeddings`, `norms`); their bits are zero.
    pub excluded: Vec<String>,
    /// Digest of the base checkpoint.
    pub base: Digest,
    /// Digest of the tuned checkpoint.
    pub tuned: Digest,
    /// Number of elements of each tensor, including excluded tensors.
    pub numel: BTreeMap<String, u64>,
}

/// Set of elements from which the top p % are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// All parameters together (the paper).
    Global,
    /// Each decoder layer by itself, and all parameters outside the layers together.
    Layer,
    /// Each tensor by itself.
    Tensor,
    /// Whole tensors are ranked and chosen instead of elements (cpift-mask tensors).
    #[value(skip)]
    Whole,
}

/// Quantity by which elements are ranked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Metric {
    /// |θ⁽ⁱ⁾ − θ⁽⁰⁾| (the paper).
    Magnitude,
    /// |θ⁽ⁱ⁾ − θ⁽⁰⁾| / (|θ⁽⁰⁾| + 10⁻⁸): the change relative to the size of the weight.
    Relative,
    /// F, the sum of squared gradients saved by a probe (--fisher): the sensitivity of the loss to
    /// a weight.
    Fisher,
    /// ½·minmax(|θ⁽ⁱ⁾ − θ⁽⁰⁾|) + ½·minmax(F), each scaled to 0..1 over the elements of the scope
    /// (--fisher).
    Blend,
    /// For whole tensors: the root mean square of θ⁽ⁱ⁾ − θ⁽⁰⁾.
    #[value(skip)]
    Rms,
    /// For whole tensors: ½·minmax(root mean square of θ⁽ⁱ⁾ − θ⁽⁰⁾) + ½·minmax(mean of F), scaled
    /// over the tensors (TRACE).
    #[value(skip)]
    Trace,
    /// None: a random control mask drawn with the seed (cpift-mask random).
    #[value(skip)]
    Random,
    /// None: bits that another program chose (cpift-mask convert).
    #[value(skip)]
    Imported,
}

/// Ties at the threshold, summed over the parts of the scope.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ties {
    /// Elements whose score equals the threshold.
    pub at_threshold: u64,
    /// Number of these that are chosen.
    pub chosen: u64,
    /// Number of chosen elements that were preferred to equal ones only because of their hash
    /// (module `ties` of `stream`).
    pub decided_by_hash: u64,
}

/// A mapped mask file.
pub struct Mask {
    /// Metadata of the file.
    pub header: MaskHeader,
    file: MappedFile,
    ties: Option<Entry>,
}

impl Mask {
    /// Opens a mask file and checks its structure. [`Mask::verify`] checks the bits.
    ///
    /// # Errors
    /// [`BadInput`] if it is not a mask, has another version or is inconsistent.
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = MappedFile::open(path)?;
        let text = file.metadata.get(METADATA_KEY).ok_or_else(|| {
            BadInput::new(path, "not a mask")
                .expected("a file that cpift-mask extract wrote")
                .found("no cpift metadata")
        })?;
        check_header_version(path, text)?;
        let header: MaskHeader = serde_json::from_str(text)
            .map_err(|e| BadInput::new(path, format!("the mask's metadata cannot be read: {e}")))?;
        let ties = file.entries.remove(TIES_TENSOR);
        let mask = Self { header, file, ties };
        mask.check_layout()?;
        mask.check_ties()?;
        Ok(mask)
    }

    fn check_layout(&self) -> Result<()> {
        for (name, entry) in &self.file.entries {
            let numel = self.header.numel.get(name).copied();
            let expected = numel.map(|n| vec![n.div_ceil(8) as usize]);
            if entry.dtype != Dtype::U8 || expected.as_ref() != Some(&entry.shape) {
                return Err(BadInput::new(&self.file.path, "a mask tensor has the wrong dtype or shape")
                    .tensor(name)
                    .expected(expected.map_or("no such tensor".into(), |s| format!("U8 {s:?}")))
                    .found(format!("{} {:?}", entry.dtype, entry.shape))
                    .into());
            }
        }
        if let Some(missing) = self.header.numel.keys().find(|n| !self.file.entries.contains_key(*n)) {
            return Err(BadInput::new(&self.file.path, "a mask tensor is missing").tensor(missing).into());
        }
        Ok(())
    }

    fn check_ties(&self) -> Result<()> {
        let expected = (self.header.ties.decided_by_hash > 0).then(|| self.header.selected.div_ceil(8) as usize);
        let found = self.ties.as_ref().map(|entry| (entry.dtype, entry.shape.clone()));
        if found == expected.map(|n| (Dtype::U8, vec![n])) {
            return Ok(());
        }
        let tensor = |n: Option<String>| n.unwrap_or_else(|| "no such tensor".to_owned());
        Err(BadInput::new(&self.file.path, "the flags of ties do not fit the mask's metadata")
            .tensor(TIES_TENSOR)
            .expected(tensor(expected.map(|n| format!("U8 [{n}]"))))
            .found(tensor(found.map(|(dtype, shape)| format!("{dtype} {shape:?}"))))
            .into())
    }

    /// Packed flags, one per bit set in the order of [`Mask::tensors`]: true if the element was
    /// preferred to equal ones only because of its hash. `None` if no element was.
    pub fn tie_flags(&self) -> Option<&[u8]> {
        self.ties.as_ref().map(|entry| self.file.bytes(entry))
    }

    /// Path of the file.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// Bytes of the whole file, for its digest.
    pub fn file_bytes(&self) -> &[u8] {
        self.file.whole()
    }

    /// Names and packed bits of all tensors in bytewise name order. Bit b of byte a is element 8a +
    /// b.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.file.entries.iter().map(|(name, entry)| (name.as_str(), self.file.bytes(entry)))
    }

    /// Packed bits of one tensor.
    pub fn bits(&self, name: &str) -> Option<&[u8]> {
        self.file.entries.get(name).map(|entry| self.file.bytes(entry))
    }

    /// Byte range of the packed bits of one tensor in [`Mask::file_bytes`].
    pub fn range(&self, name: &str) -> Option<Range<usize>> {
        self.file.entries.get(name).map(|entry| entry.range.clone())
    }

    /// Checks that the mask was made for `base`: digest, names and sizes.
    ///
    /// # Errors
    /// [`BadInput`] with the first difference.
    pub fn check_base(&self, base: &Checkpoint, digest: &Digest) -> Result<()> {
        for view in base.parameters() {
            let found = self.header.numel.get(view.name).copied();
            if found != Some(view.numel() as u64) {
                return Err(self
                    .other_base(base)
                    .tensor(view.name)
                    .expected(format!("{} elements", view.numel()))
                    .found(found.map_or("no such tensor in the mask".into(), |n| format!("{n} elements")))
                    .into());
            }
        }
        // A tuned checkpoint may have its own output embedding although the base ties it to the
        // input embedding.
        let extra = |name: &&String| base.get(name).is_none() && !base.ties(name, self.header.numel[*name]);
        if let Some(extra) = self.header.numel.keys().find(extra) {
            return Err(self.other_base(base).tensor(extra).found("a tensor the base does not have").into());
        }
        if self.header.base != *digest {
            return Err(self
                .other_base(base)
                .expected(format!("base digest {digest}"))
                .found(format!("base digest {}", self.header.base))
                .hint("extract the mask again from this base and its probe")
                .into());
        }
        Ok(())
    }

    fn other_base(&self, base: &Checkpoint) -> BadInput {
        BadInput::new(&self.file.path, format!("a mask made for another base than {}", base.path().display()))
    }

    /// Checks that the number of bits set equals `selected` and that padding bits are zero.
    ///
    /// # Errors
    /// [`BadInput`] if either does not hold.
    pub fn verify(&self) -> Result<()> {
        let mut count = 0;
        for (name, bits) in self.tensors() {
            let used = self.header.numel[name] % 8;
            if used != 0 && bits.last().is_some_and(|last| last >> used != 0) {
                return Err(BadInput::new(self.path(), "padding bits are set").tensor(name).into());
            }
            count += count_ones(bits);
        }
        if count != self.header.selected {
            return Err(BadInput::new(self.path(), "the number of bits set is not the one recorded")
                .expected(self.header.selected.to_string())
                .found(count.to_string())
                .hint("the file is damaged: extract the mask again")
                .into());
        }
        self.verify_flags()
    }

    /// Checks that as many ties are flagged as the header says and that padding bits are zero.
    ///
    /// # Errors
    /// [`BadInput`] if either does not hold.
    pub fn verify_flags(&self) -> Result<()> {
        let Some(flags) = self.tie_flags() else { return Ok(()) };
        let (used, flagged) = (self.header.selected % 8, count_ones(flags));
        if used != 0 && flags.last().is_some_and(|last| last >> used != 0) {
            return Err(BadInput::new(self.path(), "padding bits are set").tensor(TIES_TENSOR).into());
        }
        if flagged != self.header.ties.decided_by_hash {
            return Err(BadInput::new(self.path(), "the number of flagged ties is not the one recorded")
                .tensor(TIES_TENSOR)
                .expected(self.header.ties.decided_by_hash.to_string())
                .found(flagged.to_string())
                .hint("the file is damaged: extract the mask again")
                .into());
        }
        Ok(())
    }
}

fn check_header_version(path: &Path, text: &str) -> Result<()> {
    #[derive(Deserialize)]
    struct Version {
        format_version: u32,
    }
    let found: Version = serde_json::from_str(text)
        .map_err(|e| BadInput::new(path, format!("the mask's metadata cannot be read: {e}")))?;
    json::check_version(path, "a mask", found.format_version, FORMAT_VERSION)
}

/// Writes a mask file at a staged path, in any order and from any thread.
pub struct MaskWriter {
    file: FileWriter,
    has_flags: bool,
}

impl MaskWriter {
    /// Creates the mask file at `path` with all bits zero. The header is written by
    /// [`MaskWriter::finish`]; `longest` reserves room for it and must be at least as long as JSON
    /// text, and have the same `numel`. If its `ties` are not zero, there is room for the flags of
    /// [`Mask::tie_flags`].
    ///
    /// # Errors
    /// [`BadInput`] if a parameter has the name of those flags; I/O errors.
    pub fn create(path: &Path, longest: &MaskHeader) -> Result<Self> {
        let specs: Vec<TensorSpec> = longest
            .numel
            .iter()
            .map(|(name, n)| TensorSpec { name: name.clone(), dtype: Dtype::U8, shape: vec![n.div_ceil(8) as usize] })
            .collect();
        if longest.numel.contains_key(TIES_TENSOR) {
            return Err(BadInput::new(path, "a parameter has the name that masks reserve").tensor(TIES_TENSOR).into());
        }
        let flags = (longest.ties.decided_by_hash > 0).then(|| TensorSpec {
            name: TIES_TENSOR.to_owned(),
            dtype: Dtype::U8,
            shape: vec![longest.selected.div_ceil(8) as usize],
        });
        let has_flags = flags.is_some();
        Ok(Self { file: FileWriter::create_with_last(path, &specs, flags, &metadata(longest)?)?, has_flags })
    }

    /// Writes packed bits at byte `offset` of the tensor `name`.
    pub fn write(&self, name: &str, offset: u64, bits: &[u8]) -> Result<()> {
        self.file.write(name, offset, bits)
    }

    /// Reads back packed bits from byte `offset` of the tensor `name`.
    pub fn read(&self, name: &str, offset: u64, bits: &mut [u8]) -> Result<()> {
        self.file.read(name, offset, bits)
    }

    /// Writes packed flags at byte `offset` of [`Mask::tie_flags`].
    pub fn write_flags(&self, offset: u64, flags: &[u8]) -> Result<()> {
        self.file.write(TIES_TENSOR, offset, flags)
    }

    /// Writes the final header, and leaves out the flags of ties if it counts none.
    pub fn finish(mut self, header: &MaskHeader) -> Result<()> {
        if self.has_flags && header.ties.decided_by_hash == 0 {
            self.file.drop_last()?;
        }
        self.file.replace_metadata(&metadata(header)?)
    }
}

fn metadata(header: &MaskHeader) -> Result<BTreeMap<String, String>> {
    Ok(BTreeMap::from([(METADATA_KEY.to_owned(), serde_json::to_string(header)?)]))
}

/// Returns true if element `index` is set in packed bits.
pub fn bit(bits: &[u8], index: usize) -> bool {
    bits[index / 8] >> (index % 8) & 1 == 1
}

/// Number of bits set; fastest inside `dispatch!`.
#[inline(always)]
pub fn count_ones(bits: &[u8]) -> u64 {
    let (words, rest) = bits.as_chunks::<8>();
    let whole: u64 = words.iter().map(|w| u64::from(u64::from_le_bytes(*w).count_ones())).sum();
    whole + rest.iter().map(|b| u64::from(b.count_ones())).sum::<u64>()
}

/// Indices of the bits set, in order.
pub fn indices(bits: &[u8]) -> impl Iterator<Item = usize> + '_ {
    bits.iter()
        .enumerate()
        .filter(|(_, b)| **b != 0)
        .flat_map(|(a, &byte)| (0..8).filter(move |b| byte >> b & 1 == 1).map(move |b| 8 * a + b))
}

/// Opens masks and checks each against the base. Returns them by task name.
///
/// # Errors
/// As [`Mask::open`], [`Mask::check_base`] and [`Mask::verify`].
pub fn open_all<'a>(
    list: impl IntoIterator<Item = (&'a str, &'a Path)>,
    base: &Checkpoint,
    digest: &Digest,
) -> Result<BTreeMap<String, Mask>> {
    let mut masks = BTreeMap::new();
    for (name, path) in list {
        let mask = Mask::open(path)?;
        mask.check_base(base, digest)?;
        mask.verify()?;
        masks.insert(name.to_owned(), mask);
    }
    Ok(masks)
}

/// Bits appended one by one, packed from the lowest bit of each byte.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BitList {
    bytes: Vec<u8>,
    len: u64,
}

impl BitList {
    /// Appends a bit.
    #[inline(always)]
    pub fn push(&mut self, bit: bool) {
        if self.len.is_multiple_of(8) {
            self.bytes.push(0);
        }
        if bit && let Some(last) = self.bytes.last_mut() {
            *last |= 1 << (self.len % 8);
        }
        self.len += 1;
    }

    /// Appends the first `n` bits of `bits`; bits past its end are zero.
    pub fn extend(&mut self, bits: &[u8], n: u64) {
        let (start, shift) = ((self.len / 8) as usize, self.len % 8);
        self.len += n;
        self.bytes.resize(self.len.div_ceil(8) as usize, 0);
        let whole = (n / 8) as usize;
        let last = bits.get(whole).map(|byte| byte & ((1 << (n % 8)) - 1)).filter(|byte| *byte != 0);
        let bytes = bits.iter().take(whole).copied().chain(last);
        for (i, byte) in bytes.enumerate().filter(|(_, byte)| *byte != 0) {
            self.bytes[start + i] |= byte << shift;
            if shift > 0
                && let Some(next) = self.bytes.get_mut(start + i + 1)
            {
                *next |= byte >> (8 - shift);
            }
        }
    }

    /// Number of bits.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Returns true if there are no bits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes the whole bytes out of the list and leaves the bits after them.
    pub fn take_whole_bytes(&mut self) -> Vec<u8> {
        let rest = self.bytes.split_off((self.len / 8) as usize);
        self.len %= 8;
        std::mem::replace(&mut self.bytes, rest)
    }

    /// The packed bits; those past the end are zero.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

/// Bits of a word that are handled without a branch: in a mask of a few percent most words have no
/// more, and a loop that ends after a varying number of steps costs more than these.
const FEW: u32 = 3;

/// Calls `each` with every bit that is set in `word`, as a word of its own, and with its number
/// among them. It is called [`FEW`] times or more: a bit that is not there is 0.
#[inline(always)]
fn each_set(word: u64, mut each: impl FnMut(u64, u32)) {
    let mut left = word;
    let mut next = |left: &mut u64, i: u32| {
        let lowest = *left & left.wrapping_neg();
        each(lowest, i);
        *left ^= lowest;
    };
    (0..FEW).for_each(|i| next(&mut left, i));
    let mut i = FEW;
    while left != 0 {
        next(&mut left, i);
        i += 1;
    }
}

/// Puts the first bits of `flags`, one after another, where the bits of `word` are set.
#[inline(always)]
fn spread(word: u64, flags: u64) -> u64 {
    let mut found = 0;
    each_set(word, |bit, i| found |= bit & 0u64.wrapping_sub(flags >> i & 1));
    found
}

/// Inverse of [`spread`]: the bits of `marks` at which `word` is set, one after another.
#[inline(always)]
fn gather(word: u64, marks: u64) -> u64 {
    let mut found = 0;
    each_set(word, |bit, i| found |= u64::from(marks & bit != 0) << i);
    found
}

/// The 64 flags from number `at` on; those past the end are not set.
#[inline(always)]
fn flags_from(flags: &[u8], at: u64) -> u64 {
    let rest = flags.get((at / 8) as usize..).unwrap_or(&[]);
    let bytes = rest.first_chunk::<16>().copied().unwrap_or_else(|| {
        let mut padded = [0; 16];
        padded[..rest.len()].copy_from_slice(rest);
        padded
    });
    (u128::from_le_bytes(bytes) >> (at % 8)) as u64
}

/// A word of at most eight bytes.
#[inline(always)]
fn word_of(bytes: &[u8]) -> u64 {
    let mut padded = [0; 8];
    padded[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(padded)
}

/// Flags of the bits set in `bits`: those that are set in `marked` too. Fastest inside
/// [`crate::dispatch!`].
#[inline(always)]
pub fn flags_of(bits: &[u8], marked: &[u8]) -> Vec<u8> {
    let (mut flags, mut wait, mut n) = (Vec::new(), 0u64, 0);
    // Appends the flags of a word: `n` flags wait in `wait`, less than 64.
    let mut append = |word: u64, marks: u64| {
        let (found, count) = (gather(word, marks), word.count_ones());
        wait |= found << n;
        n += count;
        if n >= 64 {
            flags.extend_from_slice(&wait.to_le_bytes());
            n -= 64;
            // Shifted in two steps, because all 64 may be used up.
            wait = found >> 1 >> (count - n - 1);
        }
    };
    let ((words, rest), (marks, rest_marks)) = (bits.as_chunks::<8>(), marked.as_chunks::<8>());
    for (word, marks) in words.iter().zip(marks) {
        append(u64::from_le_bytes(*word), u64::from_le_bytes(*marks));
    }
    append(word_of(rest), word_of(rest_marks));
    flags.extend_from_slice(&wait.to_le_bytes()[..n.div_ceil(8) as usize]);
    flags
}

/// Clears the flagged bits of `bits`; flag number `at` belongs to its first bit set, and flags past
/// the end are not set. Returns the number of the next flag. Fastest inside [`crate::dispatch!`].
#[inline(always)]
pub fn clear_flagged(bits: &mut [u8], flags: &[u8], mut at: u64) -> u64 {
    let mut cleared = |word: u64| {
        let flagged = spread(word, flags_from(flags, at));
        at += u64::from(word.count_ones());
        word & !flagged
    };
    let (words, rest) = bits.as_chunks_mut::<8>();
    words.iter_mut().for_each(|word| *word = cleared(u64::from_le_bytes(*word)).to_le_bytes());
    let last = cleared(word_of(rest)).to_le_bytes();
    rest.copy_from_slice(&last[..rest.len()]);
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bit_order_is_little_endian() {
        // NumPy: unpackbits([0b0000_0101, 0b1000_0000], bitorder='little') sets elements 0, 2 and
        // 15.
        let bits = [0b0000_0101, 0b1000_0000];
        assert_eq!(indices(&bits).collect::<Vec<_>>(), [0, 2, 15]);
        assert!(bit(&bits, 2) && !bit(&bits, 1) && bit(&bits, 15));
        assert_eq!(count_ones(&bits), 3);
        assert_eq!(count_ones(&[255; 19]), 152);
    }

    #[test]
    fn flags_follow_the_bits_set() {
        let (bits, marked) = ([0b1010_0001, 0, 0b11], [0b1000_0000, 0, 0b01]);
        let flags = flags_of(&bits, &marked);
        assert_eq!(flags, [0b0000_1100]);
        let mut left = bits;
        assert_eq!(clear_flagged(&mut left, &flags, 0), 5);
        assert_eq!(left, [0b0010_0001, 0, 0b10]);
        let mut tail = [bits[2]];
        assert_eq!(clear_flagged(&mut tail, &flags, 3), 5);
        assert_eq!(tail, [0b10]);
    }

    #[test]
    fn flags_of_many_bits_are_those_of_one_after_another() {
        let draw = |key: u64| (0..500u64).map(|i| (((i * i + 7) * key) >> (i % 23)) as u8).collect::<Vec<u8>>();
        let (bits, marked) = (draw(0x9E37_79B9), draw(0x85EB_CA6B));
        let mut list = BitList::default();
        for at in (0..8 * bits.len()).filter(|at| bits[at / 8] >> (at % 8) & 1 == 1) {
            list.push(marked[at / 8] >> (at % 8) & 1 == 1);
        }
        assert_eq!(flags_of(&bits, &marked), list.into_bytes());
    }

    #[test]
    fn flagged_bits_are_cleared_wherever_their_flags_begin() {
        let draw = |key: u64| (0..99u64).map(|i| (((i * i + 7) * key) >> (i % 23)) as u8).collect::<Vec<u8>>();
        let (bits, marked) = (draw(0x9E37_79B9), draw(0x85EB_CA6B));
        let n = bits.iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>();
        for skipped in [0, 1, 7, 8, 63, 64, 100] {
            let mut flags = BitList::default();
            (0..skipped).for_each(|_| flags.push(true));
            flags.extend(&flags_of(&bits, &marked), n);
            let mut left = bits.clone();
            assert_eq!(clear_flagged(&mut left, &flags.into_bytes(), skipped), skipped + n);
            assert!(left.iter().zip(bits.iter().zip(&marked)).all(|(left, (bit, mark))| *left == bit & !mark));
        }
        let mut left = bits.clone();
        clear_flagged(&mut left, &[], 0);
        assert_eq!(left, bits, "flags past the end are not set");
    }

    #[test]
    fn lists_are_joined_bit_by_bit() {
        let mut list = BitList::default();
        list.extend(&[0b101], 3);
        list.extend(&[0b1111_1111], 8);
        list.extend(&[], 2);
        list.extend(&[0b1111_1110], 1);
        list.extend(&[], 0);
        assert_eq!((list.len(), list.take_whole_bytes()), (14, vec![0b1111_1101]));
        list.push(true);
        list.push(true);
        list.extend(&[0b11, 0b1], 9);
        assert_eq!(list.into_bytes(), [0b1100_0111, 0b0000_0011, 0b1]);
    }
}
