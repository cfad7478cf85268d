//! `apply`: keeps the change of a fine-tune inside a mask, or outside it, as a checkpoint or as a
//! sparse task vector; and adds a sparse task vector to its base.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cpift_core::files::{StagedDir, StagedPath};
use cpift_core::format::checkpoint::{CheckpointWriter, Excluded, OtherFiles, read_config, without_quantization};
use cpift_core::format::digest::Digest;
use cpift_core::format::dtype::Float;
use cpift_core::format::json;
use cpift_core::format::mask::{count_ones, indices as indices_of};
use cpift_core::format::safetensors::{FileWriter, MappedFile};
use cpift_core::record::provenance::Recorder;
use cpift_core::{BadInput, Checkpoint, Dtype, Mask, TensorSpec, TensorView};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::inputs::Inputs;

/// Format version of sparse task vectors.
const FORMAT_VERSION: u32 = 1;

/// Metadata key of [`SparseHeader`].
const METADATA_KEY: &str = "cpift.sparse";

/// Elements whose change is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Keep {
    /// Those in the mask.
    Inside,
    /// Those that are not in the mask.
    Outside,
}

/// Values of a sparse task vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Values {
    /// Differences tuned − base, in F32 (F64 if an input is F64).
    Delta,
    /// The tuned weights, in their own dtype: the fine-tune is restored bit for bit.
    Tuned,
}

/// Output of `apply`.
pub(crate) enum Target {
    /// A checkpoint directory.
    Checkpoint,
    /// A safetensors file of indices and values.
    Sparse(Values),
}

/// A checked request to keep a part of a change.
pub(crate) struct Plan {
    pub(crate) inputs: Inputs,
    pub(crate) mask: Mask,
    pub(crate) keep: Keep,
    pub(crate) target: Target,
    pub(crate) out: PathBuf,
    pub(crate) force: bool,
}

/// Metadata of a sparse task vector.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SparseHeader {
    format_version: u32,
    values: Values,
    /// Digests of the checkpoints.
    base: Digest,
    tuned: Digest,
    /// Shape of each parameter.
    shapes: BTreeMap<String, Vec<usize>>,
}

impl Plan {
    /// Writes the output and its record, or nothing; returns the summary for `--json`.
    ///
    /// # Errors
    /// [`BadInput`] for a mask of another base.
    pub(crate) fn run(&self, mut recorder: Recorder) -> Result<Value> {
        let Inputs { base, tuned, .. } = &self.inputs;
        let (base_digest, tuned_digest) = (base.digest()?, tuned.digest()?);
        self.mask.check_base(base, &base_digest)?;
        self.mask.verify()?;
        recorder.input("mask", self.mask.path(), Digest::of_file(self.mask.path())?);
        recorder.input("base", base.path(), base_digest.clone());
        recorder.input("tuned", tuned.path(), tuned_digest.clone());
        let kept: u64 = base.parameters().map(|view| count_ones(&self.kept(view.name, view.numel()))).sum();
        recorder.fact("kept", kept);
        match &self.target {
            Target::Checkpoint => self.write_checkpoint(recorder)?,
            Target::Sparse(values) => {
                let shapes = base.parameters().map(|view| (view.name.to_owned(), view.shape.to_vec())).collect();
                let header = SparseHeader {
                    format_version: FORMAT_VERSION,
                    values: *values,
                    base: base_digest,
                    tuned: tuned_digest,
                    shapes,
                };
                self.write_sparse(&header, recorder)?;
            }
        }
        log::info!("{}: the change of {kept} elements is kept", self.out.display());
        Ok(json!({"out": self.out, "kept": kept, "D": self.mask.header.d}))
    }

    /// Bits of the elements whose change is kept.
    fn kept(&self, name: &str, numel: usize) -> Vec<u8> {
        let mut bits = self.mask.bits(name).map_or_else(|| vec![0; numel.div_ceil(8)], <[u8]>::to_vec);
        if self.keep == Keep::Outside {
            bits.iter_mut().for_each(|byte| *byte = !*byte);
            crate::output::clear_padding(&mut bits, numel as u64);
        }
        bits
    }

    fn tuned(&self, name: &str) -> TensorView<'_> {
        self.inputs.tuned.get(name).expect("both have the same parameters")
    }

    fn write_checkpoint(&self, recorder: Recorder) -> Result<()> {
        let merge = |view: TensorView<'_>| {
            let (tuned, bits) = (self.tuned(view.name), self.kept(view.name, view.numel()));
            let dtype = common(view.output_dtype(), tuned.output_dtype());
            let (mut bytes, changed, size) = (cast(&view, dtype), cast(&tuned, dtype), dtype.size());
            for at in indices_of(&bits) {
                bytes[at * size..(at + 1) * size].copy_from_slice(&changed[at * size..(at + 1) * size]);
            }
            bytes
        };
        let dtype = |view: &TensorView<'_>| common(view.output_dtype(), self.tuned(view.name).output_dtype());
        let Inputs { base, tuned, .. } = &self.inputs;
        // With the rows of the base come its tokenizer and the size of its vocabulary.
        let other = if tuned.has_mapped_rows() { base } else { tuned };
        write_checkpoint(base, other, &self.out, self.force, dtype, merge, recorder)
    }

    fn write_sparse(&self, header: &SparseHeader, recorder: Recorder) -> Result<()> {
        let wide = self.inputs.wide();
        let index_dtype = |numel: usize| if numel <= 1 << 31 { Dtype::I32 } else { Dtype::I64 };
        let (mut specs, mut counts) = (Vec::new(), BTreeMap::new());
        for view in self.inputs.base.parameters() {
            let n = count_ones(&self.kept(view.name, view.numel())) as usize;
            let dtype = match header.values {
                Values::Tuned => self.tuned(view.name).output_dtype(),
                Values::Delta => {
                    if wide {
                        Dtype::F64
                    } else {
                        Dtype::F32
                    }
                }
            };
            counts.insert(view.name, (n, dtype));
            let spec =
                |suffix: &str, dtype| TensorSpec { name: format!("{}.{suffix}", view.name), dtype, shape: vec![n] };
            specs.extend([spec("indices", index_dtype(view.numel())), spec("values", dtype)]);
        }
        let staged = StagedPath::create(&self.out, self.force)?;
        let metadata = BTreeMap::from([(METADATA_KEY.to_owned(), serde_json::to_string(header)?)]);
        let file = FileWriter::create(&staged.path(), &specs, &metadata)?;
        let write = |view: &TensorView<'_>| -> Result<()> {
            let (tuned, bits) = (self.tuned(view.name), self.kept(view.name, view.numel()));
            let (_, dtype) = counts[view.name];
            let (mut indices, mut values) = (Vec::new(), Vec::new());
            let (size, changed) = (dtype.size(), matches!(header.values, Values::Tuned).then(|| cast(&tuned, dtype)));
            for at in indices_of(&bits) {
                match index_dtype(view.numel()) {
                    Dtype::I32 => indices.extend((at as i32).to_le_bytes()),
                    _ => indices.extend((at as i64).to_le_bytes()),
                }
                match &changed {
                    Some(changed) => values.extend_from_slice(&changed[at * size..(at + 1) * size]),
                    None => {
                        let (mut before, mut after) = ([0f64], [0f64]);
                        view.read(at, &mut before);
                        tuned.read(at, &mut after);
                        f64::write(dtype, &[after[0] - before[0]], &mut values);
                    }
                }
            }
            file.write(&format!("{}.indices", view.name), 0, &indices)?;
            file.write(&format!("{}.values", view.name), 0, &values)
        };
        let views: Vec<TensorView<'_>> = self.inputs.base.parameters().collect();
        views.par_iter().map(write).collect::<Result<()>>()?;
        drop(file);
        recorder.commit(staged, &[])
    }
}

/// Dtype that holds both: one of them, or F32.
fn common(a: Dtype, b: Dtype) -> Dtype {
    match (a.holds(b), b.holds(a)) {
        (true, _) => a,
        (_, true) => b,
        _ => Dtype::F32,
    }
}

/// The elements of `view` as `dtype`.
fn cast(view: &TensorView<'_>, dtype: Dtype) -> Vec<u8> {
    if view.dtype == dtype && view.is_plain() {
        return view.bytes.to_vec();
    }
    let mut bytes = Vec::new();
    // Computed elements are F32 numbers, as a merge reads them.
    if dtype == Dtype::F64 || view.dtype == Dtype::F64 {
        let mut values = vec![0f64; view.numel()];
        view.read(0, &mut values);
        f64::write(dtype, &values, &mut bytes);
    } else {
        let mut values = vec![0f32; view.numel()];
        view.read(0, &mut values);
        f32::write(dtype, &values, &mut bytes);
    }
    bytes
}

/// Writes a checkpoint in the layout of `base` with the parameters `bytes_of`, and everything else
/// from `other`.
fn write_checkpoint<'a>(
    base: &'a Checkpoint,
    other: &Checkpoint,
    out: &Path,
    force: bool,
    dtype: impl Fn(&TensorView<'a>) -> Dtype,
    bytes_of: impl Fn(TensorView<'a>) -> Vec<u8> + Sync,
    recorder: Recorder,
) -> Result<()> {
    let layout = base.layout();
    let parameters: Vec<TensorView<'a>> = base.parameters().collect();
    // A tied output embedding is restored from the input embedding.
    let copied = |(view, why): &(TensorView<'_>, Excluded)| {
        *why != Excluded::Tied && parameters.iter().all(|parameter| parameter.name != view.name)
    };
    let rest: Vec<TensorView<'_>> = other.not_parameters().filter(copied).map(|(view, _)| view).collect();
    let mut specs: Vec<TensorSpec> =
        parameters.iter().map(|view| TensorSpec { dtype: dtype(view), ..view.spec() }).collect();
    specs.extend(rest.iter().map(TensorView::spec));
    let write = |path: &Path| -> Result<()> {
        let writer = CheckpointWriter::create_like(layout, path, &specs, CheckpointWriter::SHARD_SIZE)?;
        parameters.par_iter().try_for_each(|view| writer.write(view.name, 0, &bytes_of(*view)))?;
        rest.iter().try_for_each(|view| writer.write(view.name, 0, &cast(view, view.output_dtype())))
    };
    if layout.is_file {
        let staged = StagedPath::create(out, force)?;
        write(&staged.path())?;
        return recorder.commit(staged, &[]);
    }
    let staged = StagedDir::create(out, force)?;
    write(staged.path())?;
    if let Some(folder) = other.folder().or(base.folder()) {
        if folder.join("config.json").is_file() {
            let config = json::to_text(&without_quantization(read_config(folder)?))?;
            fs::write(staged.path().join("config.json"), config).context("writing config.json")?;
        }
        let components = layout.components().map(str::to_owned).collect();
        OtherFiles::of(folder, &components)?.copy(folder, staged.path(), |_| true)?;
    }
    recorder.write_into(staged.path())?;
    staged.commit()
}

/// A checked request to add a sparse task vector to its base.
pub(crate) struct Restore {
    pub(crate) base: Checkpoint,
    pub(crate) vector: MappedFile,
    pub(crate) out: PathBuf,
    pub(crate) force: bool,
}

impl Restore {
    /// Writes the checkpoint and its record, or nothing; returns the summary for `--json`.
    ///
    /// # Errors
    /// [`BadInput`] for a vector that is damaged or of another base.
    pub(crate) fn run(&self, mut recorder: Recorder) -> Result<Value> {
        let header = self.header()?;
        let digest = self.base.digest()?;
        if header.base != digest {
            return Err(BadInput::new(
                &self.vector.path,
                format!("a change of another base than {}", self.base.path().display()),
            )
            .expected(format!("base digest {digest}"))
            .found(format!("base digest {}", header.base))
            .into());
        }
        let changes: BTreeMap<&str, Vec<usize>> =
            self.base.parameters().map(|view| Ok((view.name, self.indices(&view)?))).collect::<Result<_>>()?;
        recorder.input("vector", &self.vector.path, Digest::of_file(&self.vector.path)?);
        recorder.input("base", self.base.path(), digest);
        let kept: usize = changes.values().map(Vec::len).sum();
        let values_of = |name: &str| {
            let entry = &self.vector.entries[&format!("{name}.values")];
            (entry.dtype, self.vector.bytes(entry))
        };
        let dtype = |view: &TensorView<'_>| match header.values {
            Values::Delta => view.output_dtype(),
            Values::Tuned => common(view.output_dtype(), values_of(view.name).0),
        };
        let bytes_of = |view: TensorView<'_>| {
            let (from, stored) = values_of(view.name);
            let (to, mut bytes) = (dtype(&view), cast(&view, dtype(&view)));
            let (mut values, size) = (vec![0f64; changes[view.name].len()], to.size());
            f64::read(from, stored, &mut values);
            for (at, value) in changes[view.name].iter().zip(values) {
                let mut before = [0f64];
                view.read(*at, &mut before);
                let new = if header.values == Values::Delta { before[0] + value } else { value };
                f64::store(to, &[new], &mut bytes[at * size..(at + 1) * size]);
            }
            bytes
        };
        write_checkpoint(&self.base, &self.base, &self.out, self.force, dtype, bytes_of, recorder)?;
        log::info!("{}: {kept} elements changed", self.out.display());
        Ok(json!({"out": self.out, "changed": kept}))
    }

    fn header(&self) -> Result<SparseHeader> {
        let path = &self.vector.path;
        let text = self.vector.metadata.get(METADATA_KEY).ok_or_else(|| {
            BadInput::new(path, "not a sparse task vector")
                .expected("a file that cpift-mask apply --sparse wrote")
                .found("no cpift.sparse metadata")
        })?;
        let value: Value =
            serde_json::from_str(text).map_err(|e| BadInput::new(path, format!("its metadata cannot be read: {e}")))?;
        json::check_version(path, "a sparse task vector", json::version_of(&value), FORMAT_VERSION)?;
        Ok(serde_json::from_value(value)
            .map_err(|e| BadInput::new(path, format!("its metadata cannot be read: {e}")))?)
    }

    /// Checked indices of the changed elements of a parameter.
    fn indices(&self, view: &TensorView<'_>) -> Result<Vec<usize>> {
        let bad = |what: &str| BadInput::new(&self.vector.path, what).tensor(view.name);
        let [indices, values] =
            ["indices", "values"].map(|suffix| self.vector.entries.get(&format!("{}.{suffix}", view.name)));
        let (Some(indices), Some(values)) = (indices, values) else {
            return Err(bad("a parameter of the base is missing").expected("indices and values").into());
        };
        let bytes = self.vector.bytes(indices);
        let list: Vec<i64> = match indices.dtype {
            Dtype::I32 => bytes.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b).into()).collect(),
            Dtype::I64 => bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect(),
            other => {
                return Err(bad("indices of another dtype").expected("I32 or I64").found(other.to_string()).into());
            }
        };
        if !values.dtype.is_float() || values.shape != [list.len()] {
            return Err(bad("as many values as indices are needed")
                .expected(format!("{} floating-point numbers", list.len()))
                .found(format!("{} {:?}", values.dtype, values.shape))
                .into());
        }
        let numel = view.numel();
        if let Some(at) = list.iter().find(|at| !usize::try_from(**at).is_ok_and(|at| at < numel)) {
            return Err(bad("an index out of range")
                .expected(format!("0 to {}", numel.max(1) - 1))
                .found(at.to_string())
                .into());
        }
        Ok(list.into_iter().map(|at| at as usize).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_common_dtype_holds_both() {
        assert_eq!(common(Dtype::BF16, Dtype::F32), Dtype::F32);
        assert_eq!(common(Dtype::BF16, Dtype::BF16), Dtype::BF16);
        assert_eq!(common(Dtype::BF16, Dtype::F16), Dtype::F32);
    }
}
