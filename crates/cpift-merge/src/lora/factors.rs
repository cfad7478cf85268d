//! The tensors of an adapter, and its file.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use cpift_core::Dtype;
use cpift_core::format::dtype::Float;
use cpift_core::format::safetensors::{FileWriter, TensorSpec};

/// A tensor of an adapter: shape and elements.
pub(super) type Factor = (Vec<usize>, Vec<f32>);

/// Writes the tensors of an adapter as `dtype`.
pub(super) fn write(
    path: &Path,
    tensors: &BTreeMap<String, Factor>,
    dtype: Dtype,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let spec = |(name, (shape, _)): (&String, &Factor)| TensorSpec { name: name.clone(), dtype, shape: shape.clone() };
    let writer = FileWriter::create(path, &tensors.iter().map(spec).collect::<Vec<_>>(), metadata)?;
    for (name, (_, values)) in tensors {
        let mut bytes = Vec::new();
        f32::write(dtype, values, &mut bytes);
        writer.write(name, 0, &bytes)?;
    }
    writer.sync()
}
