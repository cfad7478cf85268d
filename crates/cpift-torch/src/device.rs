//! Devices: choosing one, copying to it, its memory.

use anyhow::Result;
use cpift_core::error::usage;
use tch::{Device, Tensor};

use crate::dist::Place;
use crate::ffi;
use crate::transfer::pinned;

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
