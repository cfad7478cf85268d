//! `convert`: masks to and from boolean arrays of other programs, as NumPy files (one array per
//! file, format 1.0) or safetensors.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cpift_core::files::{StagedDir, StagedPath, map};
use cpift_core::format::digest::Digest;
use cpift_core::format::mask::{FORMAT_VERSION, MaskHeader, Metric, Scope, Ties, bit, count_ones};
use cpift_core::format::safetensors::{FileWriter, MappedFile};
use cpift_core::record::provenance::Recorder;
use cpift_core::{BadInput, Checkpoint, Dtype, Mask, TensorSpec};
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::output::write_mask;

/// Form of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Form {
    /// A directory with one NumPy file of booleans per tensor, NAME.npy.
    Npy,
    /// A safetensors file of BOOL tensors.
    Bool,
    /// A mask.
    Mask,
}

/// A checked request for a conversion.
pub(crate) struct Plan {
    pub(crate) input: Input,
    pub(crate) form: Form,
    /// Gives the shapes; required to make a mask.
    pub(crate) base: Option<Checkpoint>,
    /// Recorded in a mask.
    pub(crate) tuned: Option<Checkpoint>,
    pub(crate) out: PathBuf,
    pub(crate) force: bool,
}

/// A file or directory of bits.
pub(crate) enum Input {
    /// A mask.
    Mask(Box<Mask>),
    /// A safetensors file of BOOL or U8 tensors.
    Safetensors(MappedFile),
    /// A directory of NumPy files.
    Npy(PathBuf, BTreeMap<String, PathBuf>),
}

impl Input {
    /// Opens a mask, a safetensors file of booleans, or a directory of NumPy files.
    ///
    /// # Errors
    /// [`BadInput`] if it is neither.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            let file = MappedFile::open(path)?;
            let is_mask = file.metadata.contains_key("cpift");
            return Ok(if is_mask { Self::Mask(Box::new(Mask::open(path)?)) } else { Self::Safetensors(file) });
        }
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(path).with_context(|| format!("reading {}", path.display()))? {
            let file = entry.with_context(|| format!("reading {}", path.display()))?.path();
            let name = file.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".npy"));
            if let Some(name) = name {
                files.insert(name.to_owned(), file.clone());
            }
        }
        if files.is_empty() {
            return Err(BadInput::new(path, "no NumPy files").expected("one file NAME.npy per tensor").into());
        }
        Ok(Self::Npy(path.to_owned(), files))
    }

    fn path(&self) -> &Path {
        match self {
            Self::Mask(mask) => mask.path(),
            Self::Safetensors(file) => &file.path,
            Self::Npy(folder, _) => folder,
        }
    }

    fn names(&self) -> Vec<String> {
        match self {
            Self::Mask(mask) => mask.header.numel.keys().cloned().collect(),
            Self::Safetensors(file) => file.entries.keys().cloned().collect(),
            Self::Npy(_, files) => files.keys().cloned().collect(),
        }
    }

    /// Digest of the content.
    fn digest(&self) -> Result<Digest> {
        match self {
            Self::Npy(_, files) => {
                let parts = files.iter().map(|(name, path)| Ok(format!("{name}\0{}\0", Digest::of_file(path)?)));
                Ok(Digest::of_chunks(parts.collect::<Result<Vec<String>>>()?))
            }
            _ => Digest::of_file(self.path()),
        }
    }

    /// Packed bits of the tensor `name`, which has this shape if one is given; and its shape.
    fn bits(&self, name: &str, shape: Option<&[usize]>) -> Result<(Vec<usize>, Vec<u8>)> {
        let (found, bits) = match self {
            Self::Mask(mask) => {
                let n = mask.header.numel[name] as usize;
                let shape = shape.filter(|shape| shape.iter().product::<usize>() == n);
                let bits = mask.bits(name).expect("the name is one of the mask's").to_vec();
                (shape.map_or_else(|| vec![n], <[usize]>::to_vec), bits)
            }
            Self::Safetensors(file) => {
                let entry = &file.entries[name];
                if !matches!(entry.dtype, Dtype::Bool | Dtype::U8) {
                    return Err(BadInput::new(&file.path, "not a tensor of booleans")
                        .tensor(name)
                        .expected("BOOL, or U8 of 0 and 1")
                        .found(entry.dtype.to_string())
                        .into());
                }
                (entry.shape.clone(), pack(&file.path, name, file.bytes(entry))?)
            }
            Self::Npy(_, files) => {
                let path = &files[name];
                let bytes = if fs::metadata(path).is_ok_and(|meta| meta.len() > 0) { Some(map(path)?) } else { None };
                let (shape, data) = read_npy(path, bytes.as_deref().unwrap_or_default())?;
                let bits = pack(path, name, data)?;
                (shape, bits)
            }
        };
        let flat = |shape: &[usize]| vec![shape.iter().product::<usize>()];
        if let Some(shape) = shape.filter(|shape| found != **shape && found != flat(shape)) {
            return Err(BadInput::new(self.path(), "a tensor of another shape than that of the base")
                .tensor(name)
                .expected(format!("{shape:?}, or flat {:?}", flat(shape)))
                .found(format!("{found:?}"))
                .into());
        }
        Ok((shape.map_or(found, <[usize]>::to_vec), bits))
    }
}

/// Packs bytes of 0 and 1.
fn pack(path: &Path, name: &str, bytes: &[u8]) -> Result<Vec<u8>> {
    if let Some(at) = bytes.iter().position(|byte| *byte > 1) {
        return Err(BadInput::new(path, format!("not a boolean, at flat index {at}"))
            .tensor(name)
            .expected("0 or 1")
            .found(bytes[at].to_string())
            .into());
    }
    let byte = |eight: &[u8]| eight.iter().enumerate().fold(0, |packed, (b, one)| packed | one << b);
    Ok(bytes.chunks(8).map(byte).collect())
}

impl Plan {
    /// Writes the output and its record, or nothing; returns the summary for `--json`.
    ///
    /// # Errors
    /// [`BadInput`] naming the tensor that does not fit.
    pub(crate) fn run(&self, mut recorder: Recorder) -> Result<Value> {
        if let Input::Mask(mask) = &self.input {
            mask.verify()?;
            if let Some(base) = &self.base {
                mask.check_base(base, &base.digest()?)?;
            }
        }
        recorder.input("input", self.input.path(), self.input.digest()?);
        for (role, checkpoint) in [("base", &self.base), ("tuned", &self.tuned)] {
            if let Some(checkpoint) = checkpoint {
                recorder.input(role, checkpoint.path(), checkpoint.digest()?);
            }
        }
        let selected = match self.form {
            Form::Npy => self.to_npy(recorder)?,
            Form::Bool => self.to_bool(recorder)?,
            Form::Mask => self.to_mask(recorder)?,
        };
        let tensors = self.input.names().len();
        log::info!("{}: {tensors} tensors, {selected} elements selected", self.out.display());
        Ok(json!({"out": self.out, "tensors": tensors, "selected": selected}))
    }

    /// Shape of a parameter of the base; `None` without a base.
    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.base.as_ref().and_then(|base| base.get(name)).map(|view| view.shape)
    }

    fn to_npy(&self, mut recorder: Recorder) -> Result<u64> {
        let names = self.input.names();
        if let Some(name) = names.iter().find(|name| name.contains('/') || name.starts_with('.')) {
            return Err(BadInput::new(self.input.path(), "a name that cannot be the name of a file")
                .tensor(name)
                .hint("--to bool writes one safetensors file")
                .into());
        }
        let staged = StagedDir::create(&self.out, self.force)?;
        let write = |name: &String| {
            let (shape, bits) = self.input.bits(name, self.shape(name))?;
            let path = staged.path().join(format!("{name}.npy"));
            fs::write(&path, write_npy(&shape, &bits)).with_context(|| format!("writing {name}.npy"))?;
            Ok(count_ones(&bits))
        };
        let counts: Vec<u64> = names.par_iter().map(write).collect::<Result<_>>()?;
        let selected = counts.iter().sum();
        recorder.fact("selected", selected);
        recorder.write_to(&staged.path().join(cpift_core::files::RECORD_NAME))?;
        staged.commit()?;
        Ok(selected)
    }

    fn to_bool(&self, mut recorder: Recorder) -> Result<u64> {
        let names = self.input.names();
        let spec = |name: &String| {
            let (shape, _) = self.input.bits(name, self.shape(name))?;
            Ok(TensorSpec { name: name.clone(), dtype: Dtype::Bool, shape })
        };
        let specs: Vec<TensorSpec> = names.iter().map(spec).collect::<Result<_>>()?;
        let staged = StagedPath::create(&self.out, self.force)?;
        let file = FileWriter::create(&staged.path(), &specs, &BTreeMap::new())?;
        let write = |spec: &TensorSpec| {
            let (_, bits) = self.input.bits(&spec.name, self.shape(&spec.name))?;
            let bytes: Vec<u8> = (0..spec.numel()).map(|i| u8::from(bit(&bits, i))).collect();
            file.write(&spec.name, 0, &bytes)?;
            Ok(count_ones(&bits))
        };
        let counts: Vec<u64> = specs.par_iter().map(write).collect::<Result<_>>()?;
        drop(file);
        let selected = counts.iter().sum();
        recorder.fact("selected", selected);
        recorder.commit(staged, &[])?;
        Ok(selected)
    }

    fn to_mask(&self, recorder: Recorder) -> Result<u64> {
        let base = self.base.as_ref().expect("the command line asks for a base");
        let names = self.input.names();
        let bad = |what: &str, name: &str| BadInput::new(self.input.path(), what).tensor(name);
        if let Some(name) = names.iter().find(|name| !base.parameters().any(|view| view.name == **name)) {
            return Err(bad("a tensor that is no parameter of the base", name).into());
        }
        if let Some(view) = base.parameters().find(|view| !names.iter().any(|name| name == view.name)) {
            return Err(bad("no bits for a parameter of the base", view.name)
                .hint("give every parameter an array, of zeros where nothing is selected")
                .into());
        }
        let bits: Vec<Vec<u8>> =
            names.par_iter().map(|name| Ok(self.input.bits(name, self.shape(name))?.1)).collect::<Result<_>>()?;
        let numel: BTreeMap<String, u64> =
            base.parameters().map(|view| (view.name.to_owned(), view.numel() as u64)).collect();
        let (d, selected): (u64, u64) = (numel.values().sum(), bits.iter().map(|bits| count_ones(bits)).sum());
        let header = MaskHeader {
            format_version: FORMAT_VERSION,
            percent: 100.0 * selected as f64 / d.max(1) as f64,
            scope: Scope::Global,
            metric: Metric::Imported,
            seed: None,
            rule: Some("imported".to_owned()),
            d,
            selected,
            ties: Ties::default(),
            excluded: Vec::new(),
            base: base.digest()?,
            tuned: self.tuned.as_ref().map_or_else(|| Ok(Digest::blank()), Checkpoint::digest)?,
            numel,
        };
        write_mask(&self.out, self.force, &header, names.iter().map(String::as_str).zip(bits), recorder)?;
        Ok(selected)
    }
}

/// First bytes of a NumPy file.
const MAGIC: &[u8] = b"\x93NUMPY";

/// The bytes of a NumPy file with the boolean array of these packed bits.
fn write_npy(shape: &[usize], bits: &[u8]) -> Vec<u8> {
    let dims: String = shape.iter().map(|n| format!("{n}, ")).collect();
    let dims = if shape.len() == 1 { dims.trim_end() } else { dims.trim_end_matches(", ") };
    let mut header = format!("{{'descr': '|b1', 'fortran_order': False, 'shape': ({dims}), }}");
    // Magic, version and length take ten bytes; the data begin at a multiple of 64.
    let end = (MAGIC.len() + 4 + header.len() + 1).next_multiple_of(64);
    header.push_str(&" ".repeat(end - MAGIC.len() - 4 - header.len() - 1));
    header.push('\n');
    let mut out = [MAGIC, &[1, 0], &(header.len() as u16).to_le_bytes(), header.as_bytes()].concat();
    let numel: usize = shape.iter().product();
    out.extend((0..numel).map(|i| bits[i / 8] >> (i % 8) & 1));
    out
}

/// Shape and elements of a NumPy file with a boolean or U8 array in C order.
///
/// # Errors
/// [`BadInput`] naming what was expected.
fn read_npy<'a>(path: &Path, bytes: &'a [u8]) -> Result<(Vec<usize>, &'a [u8])> {
    let bad = |expected: &str, found: String| {
        BadInput::new(path, "not a NumPy array of booleans").expected(expected).found(found)
    };
    let rest = bytes.strip_prefix(MAGIC).ok_or_else(|| bad("a .npy file", "another kind of file".to_owned()))?;
    let length = |at: usize, n: usize| {
        let bytes = rest.get(at..at + n)?;
        Some(bytes.iter().rev().fold(0usize, |sum, byte| sum << 8 | usize::from(*byte)))
    };
    let (start, len): (usize, _) = match rest.first() {
        Some(1) => (4, length(2, 2)),
        Some(2 | 3) => (6, length(2, 4)),
        version => return Err(bad("format version 1, 2 or 3", format!("{version:?}")).into()),
    };
    let header = len.and_then(|len| rest.get(start..start.checked_add(len)?));
    let header = header.and_then(|text| std::str::from_utf8(text).ok());
    let header = header.ok_or_else(|| bad("a header", "the file ends within it".to_owned()))?;
    let data = &rest[start + header.len()..];
    let value = |key: &str| {
        let (_, after) = header.split_once(&format!("'{key}':"))?;
        Some(after.trim_start())
    };
    let descr = value("descr").unwrap_or_default();
    if !["'|b1'", "'|u1'", "'b1'", "'u1'"].iter().any(|kind| descr.starts_with(kind)) {
        let found = descr.split([',', '}']).next().unwrap_or_default();
        return Err(bad("dtype bool or uint8", found.to_owned()).into());
    }
    if !value("fortran_order").is_some_and(|text| text.starts_with("False")) {
        return Err(bad("C order", "Fortran order".to_owned()).into());
    }
    let dims = value("shape").and_then(|text| text.strip_prefix('(')?.split_once(')'));
    let dims = dims.map(|(dims, _)| dims.split(',').map(str::trim).filter(|n| !n.is_empty()).map(str::parse));
    let shape: Option<Vec<usize>> = dims.and_then(|dims| dims.collect::<Result<_, _>>().ok());
    let shape = shape.ok_or_else(|| bad("a shape", header.trim().to_owned()))?;
    let numel = shape.iter().try_fold(1usize, |product, n| product.checked_mul(*n));
    if numel != Some(data.len()) {
        return Err(bad(&format!("{numel:?} elements for shape {shape:?}"), format!("{} bytes", data.len())).into());
    }
    Ok((shape, data))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_have_the_layout_of_numpy() {
        // numpy.save of numpy.array([[True, False, True]])
        let file = write_npy(&[1, 3], &[0b101]);
        assert_eq!(&file[..10], b"\x93NUMPY\x01\x00\x76\x00");
        assert!(file[10..].starts_with(b"{'descr': '|b1', 'fortran_order': False, 'shape': (1, 3), } "));
        assert_eq!(file[127..], [b'\n', 1, 0, 1]);
        for shape in [&[][..], &[3], &[1, 3], &[3, 1, 1], &[0]] {
            let file = write_npy(shape, &[0b101]);
            let (found, data) = read_npy(Path::new("w.npy"), &file).unwrap();
            assert_eq!((found.as_slice(), data.len()), (shape, shape.iter().product()));
        }
        assert!(String::from_utf8_lossy(&write_npy(&[3], &[0])).contains("'shape': (3,), }"));
    }

    #[test]
    fn other_arrays_are_refused() {
        let good = write_npy(&[2], &[0b11]);
        let text = |from: &str, to: &str| {
            let text: Vec<char> = good.iter().map(|b| char::from(*b)).collect();
            let text: String = text.into_iter().collect::<String>().replace(from, to);
            text.chars().map(|c| c as u8).collect::<Vec<u8>>()
        };
        for (bytes, what) in [
            (text("|b1", "<f4"), "dtype bool or uint8"),
            (text("False", "True "), "C order"),
            (text("(2,)", "(3,)"), "elements for shape"),
            (text("(2,)", "(x,)"), "a shape"),
            (good[..40].to_vec(), "a header"),
            (b"PK".to_vec(), "a .npy file"),
        ] {
            let error = read_npy(Path::new("w.npy"), &bytes).unwrap_err().to_string();
            assert!(error.contains("w.npy") && error.contains(what), "{error}");
        }
    }
}
