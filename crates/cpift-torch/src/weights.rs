//! Parameters as libtorch tensors: loaded from checkpoint files, and saved.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, bail};
use cpift_core::format::checkpoint::CheckpointWriter;
use cpift_core::{BadInput, Checkpoint, Dtype, TensorSpec, TensorView};
use tch::{Device, Kind, Tensor};

use crate::placement::{Pieces, Storage};

/// Tensors by checkpoint name, in bytewise name order; they share storage with the model's.
pub type Parameters = BTreeMap<String, Tensor>;

/// Loads all parameters of `checkpoint` as leaves of dtype `kind` that require gradients.
///
/// # Errors
/// [`BadInput`] for a quantised parameter, or an element that is NaN or infinite.
pub fn load(checkpoint: &Checkpoint, kind: Kind, device: Device) -> Result<Parameters> {
    load_into(checkpoint, kind, &Storage::On(device))
}

/// Refuses a checkpoint whose weights are quantised.
///
/// # Errors
/// [`BadInput`] naming the tensor.
pub(crate) fn refuse_quantised(checkpoint: &Checkpoint) -> Result<()> {
    if let Some((view, _)) = checkpoint
        .not_parameters()
        .find(|(v, why)| *why == cpift_core::format::checkpoint::Excluded::NotFloat && v.name.ends_with(".weight"))
    {
        return Err(BadInput::new(view.file, "a weight that is not floating-point")
            .tensor(view.name)
            .expected("F64, F32, F16 or BF16")
            .found(view.dtype.name())
            .hint("quantised checkpoints cannot be fine-tuned: use the floating-point checkpoint")
            .into());
    }
    Ok(())
}

/// As [`load`], in the memory of `storage`.
///
/// # Errors
/// As [`load`].
pub(crate) fn load_into(checkpoint: &Checkpoint, kind: Kind, storage: &Storage) -> Result<Parameters> {
    refuse_quantised(checkpoint)?;
    let mut parameters = Parameters::new();
    for view in checkpoint.parameters() {
        let shape: Vec<i64> = view.shape.iter().map(|&n| n as i64).collect();
        let read = read_part(&view, 0, view.numel() as i64)?.view(shape.as_slice());
        let tensor = storage.copy_of(view.name, &read, kind)?.set_requires_grad(true);
        parameters.insert(view.name.to_owned(), tensor);
    }
    Ok(parameters)
}

/// Elements `from` to `to` of a tensor of a checkpoint, flat and in its dtype (F32 if they are
/// computed: 8-bit numbers, scales, adapters); reads no others.
///
/// # Errors
/// [`BadInput`] for an element that is NaN or infinite.
pub(crate) fn read_part(view: &TensorView<'_>, from: i64, to: i64) -> Result<Tensor> {
    let tensor = if view.is_plain() && !view.dtype.is_f8() {
        Tensor::from_data_size(view.slice(from as usize, (to - from) as usize), &[to - from], kind_of(view.dtype))
    } else {
        let mut values = vec![0f32; (to - from) as usize];
        view.read(from as usize, &mut values);
        Tensor::from_slice(&values)
    };
    if let Some(index) = first_not_finite(&tensor) {
        return Err(BadInput::new(view.file, "a weight is not finite")
            .tensor(view.name)
            .expected("finite numbers")
            .found(format!("{} at flat index {}", tensor.double_value(&[index]), from + index))
            .into());
    }
    Ok(tensor)
}

/// Flat index of the first element that is not finite.
pub(crate) fn first_not_finite(tensor: &Tensor) -> Option<i64> {
    let finite = tensor.isfinite();
    let all_finite = finite.all().int64_value(&[]) == 1;
    (!all_finite).then(|| finite.flatten(0, -1).to_kind(Kind::Int).argmin(0, false).int64_value(&[]))
}

/// Writes tensors as safetensors files of dtype `dtype` into a staged directory, as they come.
pub(crate) struct Saver {
    writer: CheckpointWriter,
    dtype: Dtype,
}

impl Saver {
    /// Creates the files for the whole parameters of `pieces` in `folder`, and writes `others` as
    /// they are.
    ///
    /// # Errors
    /// A file that cannot be created.
    pub fn create(pieces: &Pieces, others: &[TensorView<'_>], folder: &Path, dtype: Dtype) -> Result<Self> {
        let spec = |(name, piece): (&String, &crate::placement::Piece)| TensorSpec {
            name: name.clone(),
            dtype,
            shape: piece.shape.iter().map(|&n| n as usize).collect(),
        };
        let stored = |view: &TensorView<'_>| TensorSpec {
            name: view.name.to_owned(),
            dtype: view.dtype,
            shape: view.shape.to_vec(),
        };
        let mut specs: Vec<TensorSpec> = pieces.iter().map(spec).chain(others.iter().map(stored)).collect();
        specs.sort_by(|a, b| a.name.cmp(&b.name));
        let writer = CheckpointWriter::create(folder, &specs, CheckpointWriter::SHARD_SIZE)?;
        others.iter().try_for_each(|view| writer.write(view.name, 0, view.bytes))?;
        Ok(Self { writer, dtype })
    }

    /// Writes the whole tensor `name`.
    ///
    /// # Errors
    /// An element that is not finite in the dtype (names tensor and index), or a failed write.
    pub fn write(&self, name: &str, tensor: &Tensor) -> Result<()> {
        let host = tensor.detach().to_device(Device::Cpu).to_kind(kind_of(self.dtype)).contiguous();
        if let Some(index) = first_not_finite(&host) {
            let (trained, saved) =
                (tensor.flatten(0, -1).double_value(&[index]), host.flatten(0, -1).double_value(&[index]));
            let hint = if trained.is_finite() { "--save-dtype f32 or bf16 can hold it" } else { "lower --lr" };
            bail!("{name}: element {index} is {trained:e}, which becomes {saved} in {}\n  hint: {hint}", self.dtype);
        }
        self.writer.write(name, 0, &bytes_of(&host)?)
    }
}

/// Bytes of a contiguous host tensor.
pub(crate) fn bytes_of(host: &Tensor) -> Result<Vec<u8>> {
    let mut bytes = vec![0u8; host.numel() * host.kind().elt_size_in_bytes()];
    host.f_copy_data_u8(&mut bytes, host.numel())?;
    Ok(bytes)
}

/// The libtorch kind of a floating-point dtype.
///
/// # Panics
/// If `dtype` is not floating-point.
pub fn kind_of(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::F64 => Kind::Double,
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        other => panic!("{other} is not a floating-point dtype"),
    }
}
