//! Memory of weights and moments: the device that computes, pinned host memory, or a file.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor, no_grad};

use crate::transfer::pinned_zeros;

/// Memory in which tensors are made that outlive a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Storage {
    /// Memory of a device.
    On(Device),
    /// Pinned host memory, for the CUDA device of this number.
    Pinned(usize),
    /// Memory-mapped files in this directory, which have no name once they are open.
    Files(PathBuf),
}

/// Number of the next file: names in a directory must differ for a moment only.
static NEXT: AtomicU64 = AtomicU64::new(0);

impl Storage {
    /// Device of the tensors made here.
    pub fn device(&self) -> Device {
        match self {
            Self::On(device) => *device,
            Self::Pinned(_) | Self::Files(_) => Device::Cpu,
        }
    }

    /// A tensor of zeros; `label` names it in errors.
    ///
    /// # Errors
    /// A file that cannot be created or mapped; host memory that cannot be pinned.
    pub fn zeros(&self, label: &str, shape: &[i64], kind: Kind) -> Result<Tensor> {
        match self {
            Self::On(device) => Ok(Tensor::zeros(shape, (kind, *device))),
            Self::Pinned(index) => pinned_zeros(*index, shape, kind).with_context(|| format!("no room for {label}")),
            Self::Files(folder) => mapped(folder, label, shape, kind),
        }
    }

    /// A tensor with the values of `source`, as `kind`.
    ///
    /// # Errors
    /// As [`Storage::zeros`].
    pub fn copy_of(&self, label: &str, source: &Tensor, kind: Kind) -> Result<Tensor> {
        if let Self::On(device) = self {
            return Ok(source.to_kind(kind).to_device(*device));
        }
        let mut own = self.zeros(label, &source.size(), kind)?;
        no_grad(|| own.copy_(source));
        Ok(own)
    }
}

/// A tensor of zeros in a file without a name: the memory goes when the process ends, however.
fn mapped(folder: &Path, label: &str, shape: &[i64], kind: Kind) -> Result<Tensor> {
    let count: i64 = shape.iter().product();
    if count == 0 {
        return Ok(Tensor::zeros(shape, (kind, Device::Cpu)));
    }
    let name = format!(".cpift-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let path = folder.join(name);
    let made = || -> Result<Tensor> {
        let file = std::fs::OpenOptions::new().create_new(true).write(true).open(&path)?;
        let bytes = count as u64 * kind.elt_size_in_bytes() as u64;
        // Reserves the space: a full disk is an error here, not a signal at the first write.
        match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes) {
            Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(bytes)?,
            other => other?,
        }
        let text = path.to_str().context("the path is not UTF-8")?;
        let flat = Tensor::f_from_file(text, true, Some(count), (kind, Device::Cpu))?;
        Ok(flat.view(shape))
    };
    let tensor = made().with_context(|| format!("{}: no room for {label}", folder.display()));
    let _ = std::fs::remove_file(&path);
    tensor
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapped_tensor_behaves_like_any_other_and_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let storage = Storage::Files(dir.path().to_owned());
        let mut a = storage.zeros("a", &[3, 5], Kind::Float).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(a.sum(Kind::Float).double_value(&[]), 0.0);
        let _ = a.g_add_scalar_(2.0);
        let b = storage.copy_of("b", &a, Kind::BFloat16).unwrap();
        assert_eq!((b.kind(), b.sum(Kind::Float).double_value(&[])), (Kind::BFloat16, 30.0));
        let missing = Storage::Files(dir.path().join("none")).zeros("weights", &[1], Kind::Float).unwrap_err();
        assert!(format!("{missing:#}").contains("no room for weights"), "{missing:#}");
    }
}
