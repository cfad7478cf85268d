//! Parameters between checkpoint files and libtorch tensors.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, bail};
use cpift_core::format::checkpoint::CheckpointWriter;
use cpift_core::{BadInput, Checkpoint, Dtype, TensorSpec, TensorView};
use tch::{Device, Kind, Tensor, no_grad};

use crate::model::{EMBEDDING, ModelConfig};

/// Trainable tensors by checkpoint name, in bytewise name order. Clones share storage with the model's.
pub type Parameters = BTreeMap<String, Tensor>;

/// Loads all parameters of `checkpoint` as `kind` leaves that require gradients.
///
/// # Errors
/// [`BadInput`] for a quantised parameter, or NaN or infinite elements (tensor and index named).
pub fn load(checkpoint: &Checkpoint, kind: Kind, device: Device) -> Result<Parameters> {
    if let Some((view, _)) = checkpoint
        .not_parameters()
        .find(|(v, why)| *why == cpift_core::format::checkpoint::Excluded::NotFloat && v.name.ends_with(".weight"))
    {
        return Err(BadInput::new(view.file, "a weight that is not floating-point")
            .tensor(view.name)
            .expected("F64, F32, F16 or BF16")
            .found(view.dtype.name())
            .hint("quantised checkpoints cannot be fine-tuned: take the floating-point one")
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

/// The flat index of the first element that is not finite.
fn first_not_finite(tensor: &Tensor) -> Option<i64> {
    let finite = tensor.isfinite();
    let whole = finite.all().int64_value(&[]) == 1;
    (!whole).then(|| finite.flatten(0, -1).to_kind(Kind::Int).argmin(0, false).int64_value(&[]))
}

/// Copies the tensors of `checkpoint` over `parameters`, in place.
///
/// # Errors
/// [`BadInput`] when one is missing or of another shape.
pub(crate) fn overwrite(parameters: &Parameters, checkpoint: &Checkpoint) -> Result<()> {
    for (name, parameter) in parameters {
        let Some(view) = checkpoint.get(name) else {
            return Err(BadInput::new(checkpoint.path(), "a tensor is missing").tensor(name).into());
        };
        let shape: Vec<i64> = view.shape.iter().map(|&n| n as i64).collect();
        if shape != parameter.size() {
            return Err(BadInput::new(view.file, "a tensor of another shape")
                .tensor(name)
                .expected(format!("{:?}", parameter.size()))
                .found(format!("{shape:?}"))
                .into());
        }
        no_grad(|| parameter.shallow_clone().copy_(&Tensor::from_data_size(view.bytes, &shape, kind_of(view.dtype))));
    }
    Ok(())
}

/// Writes `parameters` as `dtype` safetensors files into a staged folder.
///
/// # Errors
/// An element that is not finite, or not as `dtype`, with its tensor; I/O errors.
pub fn save(parameters: &Parameters, folder: &Path, dtype: Dtype) -> Result<()> {
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
            let hint = if trained.is_finite() { "--save-dtype f32 or bf16 has room for it" } else { "lower --lr" };
            bail!("{}: element {index} is {trained:e}, which as {dtype} is {saved}\n  hint: {hint}", spec.name);
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
/// When `dtype` is not floating-point.
pub fn kind_of(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::F64 => Kind::Double,
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        other => panic!("{other} is not a floating-point dtype"),
    }
}

/// Takes the tensor `name` of shape `shape` out of `parameters` (a clone that shares storage).
///
/// # Errors
/// [`BadInput`] when it is missing or of another shape.
pub(crate) fn take(parameters: &Parameters, path: &Path, name: &str, shape: &[i64]) -> Result<Tensor> {
    let Some(tensor) = parameters.get(name) else {
        return Err(BadInput::new(path, "a tensor that config.json asks for is missing").tensor(name).into());
    };
    if tensor.size() != shape {
        return Err(BadInput::new(path, "a tensor's shape disagrees with config.json")
            .tensor(name)
            .expected(format!("{shape:?}"))
            .found(format!("{:?}", tensor.size()))
            .into());
    }
    Ok(tensor.shallow_clone())
}

/// Refuses parameters that the model did not take: each would be trained or saved in vain.
///
/// # Errors
/// [`BadInput`] naming the first.
pub(crate) fn check_all_taken(parameters: &Parameters, path: &Path, taken: &[String]) -> Result<()> {
    match parameters.keys().find(|name| !taken.contains(name)) {
        Some(extra) => {
            Err(BadInput::new(path, "a tensor that the model of config.json does not have").tensor(extra).into())
        }
        None if taken.len() != parameters.len() => bail!("a parameter was taken twice"),
        None => Ok(()),
    }
}

/// Random parameters of the shapes of `config`, for benchmarks: normal with standard deviation 0.02, norms 1.
pub fn random(config: &ModelConfig, kind: Kind, device: Device) -> Parameters {
    let make = |(name, shape): (String, Vec<i64>)| {
        let tensor = if name.ends_with("norm.weight") && !config.gemma_norms {
            Tensor::ones(&shape, (kind, device))
        } else {
            Tensor::randn(&shape, (kind, device)).g_mul_scalar_(0.02)
        };
        (name, tensor.set_requires_grad(true))
    };
    config.parameter_shapes().into_iter().map(make).collect()
}

/// Stores every matrix but the embedding by columns, values and shapes as they were: on the CPU oneDNN multiplies a few rows with
/// such a matrix about twice as fast. The embedding stays as it is, for its rows are looked up one by one.
pub fn store_by_columns(parameters: &mut Parameters) {
    no_grad(|| {
        for (_, weight) in parameters.iter_mut().filter(|(name, w)| w.dim() == 2 && *name != EMBEDDING) {
            // Into the same variable, which the model shares.
            let by_columns = weight.detach().tr().contiguous().tr();
            weight.set_data(&by_columns);
        }
    });
}
