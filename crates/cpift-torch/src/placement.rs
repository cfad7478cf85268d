//! Placement of a model: the device that computes and how it is chosen, the ranks that share it,
//! the memory of its state (the device's, pinned host memory, or a file), and the pieces of
//! parameters that one process keeps, updates and saves.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use cpift_core::BadInput;
use cpift_core::error::usage;
use tch::{Device, Kind, Tensor, no_grad};

use crate::dist::{Group, Place};
use crate::ffi;
use crate::transfer::{pinned, pinned_zeros};

/// The device as typed: `cpu`, `cuda`, `cuda:N`, or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The CPU.
    Cpu,
    /// A CUDA device by its number.
    Cuda(usize),
    /// The first CUDA device, or the CPU if there is none.
    Auto,
}

impl std::str::FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "cpu" => Ok(Self::Cpu),
            "auto" => Ok(Self::Auto),
            "cuda" => Ok(Self::Cuda(0)),
            other => other
                .strip_prefix("cuda:")
                .and_then(|n| n.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| format!("expected cpu, cuda, cuda:N or auto, found {other:?}")),
        }
    }
}

impl DeviceChoice {
    /// Sets libtorch's number of threads, loads its CUDA library if needed, and returns the device.
    /// Call before the first tensor is made.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] if CUDA is requested and not available.
    pub fn open(self, threads: Option<usize>) -> Result<Device> {
        self.open_for(threads, None)
    }

    /// As [`DeviceChoice::open`], for a rank of several: `cuda` and `auto` are the device of its
    /// place on the node.
    ///
    /// # Errors
    /// As [`DeviceChoice::open`]; fewer devices than ranks on the node.
    pub(crate) fn open_for(self, threads: Option<usize>, place: Option<&Place>) -> Result<Device> {
        if let Some(threads) = threads {
            tch::set_num_threads(threads as i32);
        }
        let wanted = match self {
            Self::Cpu => return Ok(Device::Cpu),
            Self::Cuda(index) => Some(index),
            Self::Auto => None,
        };
        if let (Some(place), Some(1..)) = (place, wanted) {
            return Err(usage(format!(
                "--device cuda:N is one device for all {} ranks\n  hint: --device cuda gives each rank its own",
                place.world
            )));
        }
        let loaded = ffi::load_cuda();
        let count = if loaded.is_ok() { tch::Cuda::device_count().max(0) as usize } else { 0 };
        let of_place = place.filter(|_| count > 0).map(|place| place.cuda_index(count)).transpose()?;
        match wanted.and(of_place).or(wanted) {
            Some(index) if index < count => Ok(Device::Cuda(index)),
            Some(index) => {
                let reason = loaded.err().map_or(format!("{count} CUDA devices are visible"), |e| format!("{e:#}"));
                Err(usage(format!(
                    "--device cuda:{index} is not available: {reason}\n  hint: `make setup CUDA=1` lays out libtorch \
                     with CUDA; --device cpu works everywhere"
                )))
            }
            None if count > 0 => Ok(Device::Cuda(of_place.unwrap_or(0))),
            None => Ok(Device::Cpu),
        }
    }
}

/// Copies a host tensor to `device`, asynchronously where the device allows.
pub(crate) fn to_device(host: &Tensor, device: Device) -> Tensor {
    if device.is_cuda() { pinned(host).to_device_(device, host.kind(), true, false) } else { host.shallow_clone() }
}

/// Peak number of bytes allocated to tensors on the CUDA device `index`; 0 if unknown.
pub fn cuda_memory_peak(index: usize) -> u64 {
    ffi::cuda_memory(index).map_or(0, |(_, peak)| peak)
}

/// Sum of gradients over ranks.
#[derive(clap::ValueEnum, serde::Serialize, Debug, Clone, Copy, PartialEq, Eq, Default)]
#[serde(rename_all = "lowercase")]
pub enum Reduce {
    /// In rank order, with sums in f32: the same bits as micro-batches added by one process.
    #[default]
    Ordered,
    /// By the backend's reduce-scatter, in its order and in f32: less memory with many ranks.
    Native,
}

impl Reduce {
    /// Returns true for the sum in rank order.
    pub(crate) fn is_ordered(&self) -> bool {
        *self == Self::Ordered
    }
}

/// Placement of a model: who shares it, and where its parts lie.
#[derive(Clone)]
pub struct Placement {
    /// The ranks; none in one process.
    pub group: Option<Rc<Group>>,
    /// Device that computes.
    pub device: Device,
    /// Memory of the weights.
    pub weights: Storage,
    /// Memory of the optimizer's moments.
    pub moments: Storage,
    /// Sum of the gradients.
    pub reduce: Reduce,
}

impl Placement {
    /// All on `device`, in one process.
    pub fn on(device: Device) -> Self {
        Self {
            group: None,
            device,
            weights: Storage::On(device),
            moments: Storage::On(device),
            reduce: Reduce::default(),
        }
    }

    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.group.as_ref().map_or(1, |g| g.world())
    }

    /// This process's rank.
    pub fn rank(&self) -> usize {
        self.group.as_ref().map_or(0, |g| g.rank())
    }

    /// Returns true if units must be lent: the weights are shared or lie elsewhere than the device
    /// that computes.
    pub(crate) fn lends(&self) -> bool {
        self.group.is_some() || self.weights.device() != self.device
    }

    /// Sums one or more f64 values over the ranks, in rank order.
    ///
    /// # Errors
    /// A failed collective.
    pub(crate) fn total(&self, values: &Tensor) -> Result<Tensor> {
        let Some(group) = &self.group else { return Ok(values.shallow_clone()) };
        let (n, world) = (values.numel() as i64, group.world() as i64);
        let all = Tensor::empty([world * n], (Kind::Double, values.device()));
        group.all_gather(&all, &values.flatten(0, -1))?.wait()?;
        let all = all.view([world, n]);
        let sum = (1..world).fold(all.get(0).copy(), |mut sum, r| sum.g_add_(&all.get(r)));
        Ok(sum.view(values.size().as_slice()))
    }

    /// Rank 0's decision, for all ranks.
    ///
    /// # Errors
    /// The error of `decide` on rank 0; a failed rank.
    pub(crate) fn decide(&self, what: &str, decide: impl FnOnce() -> Result<bool>) -> Result<bool> {
        let Some(group) = &self.group else { return decide() };
        let own = (group.rank() == 0).then(decide).transpose()?;
        let text = group.share(what, own.map(|yes| if yes { "yes" } else { "no" }))?;
        Ok(text == "yes")
    }

    /// Sums a count over the ranks.
    ///
    /// # Errors
    /// A failed collective.
    pub(crate) fn total_count(&self, count: u64) -> Result<u64> {
        if self.group.is_none() {
            return Ok(count);
        }
        let counts = Tensor::from_slice(&[count as f64]).to_device(self.device);
        Ok(self.total(&counts)?.double_value(&[0]) as u64)
    }
}

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

/// The part of a parameter that this process keeps and updates.
pub struct Piece {
    /// The elements: flat, or in one process the parameter itself.
    pub tensor: Tensor,
    /// Flat index of the first element in the parameter.
    pub start: i64,
    /// Shape of the whole parameter.
    pub shape: Vec<i64>,
}

impl Piece {
    /// The whole of `parameter`; shares its storage.
    pub fn whole(parameter: &Tensor) -> Self {
        Self { tensor: parameter.shallow_clone(), start: 0, shape: parameter.size() }
    }

    /// Number of elements of the whole parameter.
    pub fn whole_len(&self) -> i64 {
        self.shape.iter().product()
    }

    /// Number of elements of the piece.
    pub fn len(&self) -> i64 {
        self.tensor.numel() as i64
    }

    /// Returns true if this process keeps no element of the parameter.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A piece at the same place with other elements.
    pub fn with(&self, tensor: Tensor) -> Self {
        Self { tensor, start: self.start, shape: self.shape.clone() }
    }
}

/// Pieces by parameter name, in bytewise name order.
pub type Pieces = BTreeMap<String, Piece>;

/// The whole parameters as pieces.
pub fn whole_pieces(parameters: &BTreeMap<String, Tensor>) -> Pieces {
    parameters.iter().map(|(name, t)| (name.clone(), Piece::whole(t))).collect()
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
