//! Memory of weights and moments: the device that computes, pinned host memory, or a file.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use cpift_core::BadInput;
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

/// Advice for a directory that cannot have the state.
const ROOM: &str = "name a directory on a disk with room for the state: cpift-train plan computes its size";

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

    /// Checks that files can be made in the directory, if it is one.
    ///
    /// # Errors
    /// [`BadInput`] naming the directory.
    pub(crate) fn check(&self) -> Result<()> {
        match self {
            Self::Files(folder) if !folder.is_dir() => {
                Err(BadInput::new(folder, "no such directory, for --offload-dir").hint(ROOM).into())
            }
            Self::Files(folder) => mapped(folder, "the state", &[1], Kind::Float).map(drop),
            Self::On(_) | Self::Pinned(_) => Ok(()),
        }
    }

    /// A tensor of zeros; `label` names it in errors.
    ///
    /// # Errors
    /// [`BadInput`] for a directory in which no file can be made, or not one of this size; host
    /// memory that cannot be pinned.
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
    let (path, bytes) = (folder.join(name), count as u64 * kind.elt_size_in_bytes() as u64);
    let refused = |message: String, error: &dyn std::fmt::Display| {
        BadInput::new(folder, message).found(error.to_string()).hint(ROOM)
    };
    let made = || -> Result<Tensor> {
        let file = std::fs::OpenOptions::new()
            .create_new(true)
            .write(true)
            .open(&path)
            .map_err(|e| refused("no file can be made in the directory of --offload-dir".to_owned(), &e))?;
        // Reserves the space: a full disk is an error here, not a signal at the first write.
        match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes) {
            Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(bytes)?,
            other => other.map_err(|e| refused(format!("no room for {label}, {bytes} bytes"), &e))?,
        }
        let text = path.to_str().context("the path is not UTF-8")?;
        let flat = Tensor::f_from_file(text, true, Some(count), (kind, Device::Cpu))?;
        Ok(flat.view(shape))
    };
    let tensor = made().with_context(|| format!("--offload-dir {}", folder.display()));
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
        assert!(
            missing.is::<BadInput>() && format!("{missing:#}").contains("none: no file can be made"),
            "{missing:#}"
        );
        let huge = storage.zeros("weights", &[1 << 58], Kind::Float).unwrap_err();
        assert!(huge.is::<BadInput>() && format!("{huge:#}").contains("no room for weights"), "{huge:#}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
