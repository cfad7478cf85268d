//! Parameters as libtorch tensors: loaded from checkpoint files, and saved.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, bail};
use cpift_core::format::checkpoint::CheckpointWriter;
use cpift_core::{BadInput, Checkpoint, Dtype, TensorSpec, TensorView};
use tch::{Device, Kind, Tensor, no_grad};

/// Tensors by checkpoint name, in bytewise name order; they share storage with the model's.
pub type Parameters = BTreeMap<String, Tensor>;

/// Loads all parameters of `checkpoint` as leaves of dtype `kind` that require gradients.
///
/// # Errors
/// [`BadInput`] for a quantised parameter, or an element that is NaN or infinite.
pub fn load(checkpoint: &Checkpoint, kind: Kind, device: Device) -> Result<Parameters> {
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
    let mut parameters = Parameters::new();
    for view in checkpoint.parameters() {
        let tensor = to_tensor(&view)?.to_kind(kind).to_device(device).set_requires_grad(true);
        parameters.insert(view.name.to_owned(), tensor);
    }
    Ok(parameters)
}

fn to_tensor(view: &TensorView<'_>) -> Result<Tensor> {
    let shape: Vec<i64> = view.shape.iter().map(|&n| n as i64).collect();
    let tensor = Tensor::from_data_size(view.bytes, &shape, kind_of(view.dtype));
    if let Some(index) = first_not_finite(&tensor) {
        return Err(BadInput::new(view.file, "a weight is not finite")
            .tensor(view.name)
            .expected("finite numbers")
            .found(format!("{} at flat index {index}", tensor.flatten(0, -1).double_value(&[index])))
            .into());
    }
    Ok(tensor)
}

/// Flat index of the first element that is not finite.
fn first_not_finite(tensor: &Tensor) -> Option<i64> {
    let finite = tensor.isfinite();
    let all_finite = finite.all().int64_value(&[]) == 1;
    (!all_finite).then(|| finite.flatten(0, -1).to_kind(Kind::Int).argmin(0, false).int64_value(&[]))
}

/// Overwrites `parameters` in place with the tensors of `checkpoint`.
///
/// # Errors
/// [`BadInput`] if a tensor is missing or has another shape.
pub(crate) fn overwrite(parameters: &Parameters, checkpoint: &Checkpoint) -> Result<()> {
    for (name, parameter) in parameters {
        let Some(view) = checkpoint.get(name) else {
            return Err(BadInput::new(checkpoint.path(), "a tensor is missing").tensor(name).into());
        };
        let shape: Vec<i64> = view.shape.iter().map(|&n| n as i64).collect();
        if shape != parameter.size() {
            return Err(BadInput::new(view.file, "a tensor has another shape")
                .tensor(name)
                .expected(format!("{:?}", parameter.size()))
                .found(format!("{shape:?}"))
                .into());
        }
        no_grad(|| parameter.shallow_clone().copy_(&Tensor::from_data_size(view.bytes, &shape, kind_of(view.dtype))));
    }
    Ok(())
}

/// Writes `parameters` as safetensors files of dtype `dtype` into a staged directory.
///
/// # Errors
/// An element that is not finite in `dtype` (names tensor and index), or a failed write.
pub(crate) fn save(parameters: &Parameters, folder: &Path, dtype: Dtype) -> Result<()> {
    let specs: Vec<TensorSpec> = parameters
        .iter()
        .map(|(name, tensor)| TensorSpec {
            name: name.clone(),
            dtype,
            shape: tensor.size().iter().map(|&n| n as usize).collect(),
        })
        .collect();
    let writer = CheckpointWriter::create(folder, &specs, CheckpointWriter::SHARD_SIZE)?;
    for (spec, tensor) in specs.iter().zip(parameters.values()) {
        let host = tensor.detach().to_device(Device::Cpu).to_kind(kind_of(dtype)).contiguous();
        if let Some(index) = first_not_finite(&host) {
            let (trained, saved) =
                (tensor.flatten(0, -1).double_value(&[index]), host.flatten(0, -1).double_value(&[index]));
            let hint = if trained.is_finite() { "--save-dtype f32 or bf16 can hold it" } else { "lower --lr" };
            bail!("{}: element {index} is {trained:e}, which becomes {saved} in {dtype}\n  hint: {hint}", spec.name);
        }
        let mut bytes = vec![0u8; spec.nbytes()];
        host.f_copy_data_u8(&mut bytes, spec.numel())?;
        writer.write(&spec.name, 0, &bytes)?;
    }
    Ok(())
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
