//! Copies between host memory and a CUDA device that neither waits for: pinned memory, and a stream
//! for copies beside the one that computes. Safe wrappers of shim/transfer.cpp.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::ptr::null_mut;

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor, no_grad};

use crate::ffi::{check, owned};

type Raw = *mut c_void;

unsafe extern "C" {
    fn cpift_pinned(tensor: *const c_void, out: *mut Raw) -> c_int;
    fn cpift_pinned_zeros(device: c_int, shape: *const i64, dimensions: c_int, like: Raw, out: *mut Raw) -> c_int;
    fn cpift_copy(to: Raw, from: *const c_void) -> c_int;
    fn cpift_synchronize(device: c_int) -> c_int;
    fn cpift_fork(device: c_int, before: *mut Raw) -> c_int;
    fn cpift_join(before: Raw, done: *mut Raw) -> c_int;
    fn cpift_arrive(device: c_int, done: Raw) -> c_int;
}

/// Elements copied at a time: if the dtypes differ, so many are on the device in both.
const PART: i64 = 1 << 24;

/// A copy of the host tensor in pinned memory; itself if it is pinned.
pub(crate) fn pinned(host: &Tensor) -> Tensor {
    let mut out = null_mut();
    // SAFETY: the tensor outlives the call.
    let code = unsafe { cpift_pinned(host.as_ptr() as Raw, &mut out) };
    check(code, "pinning host memory").unwrap_or_else(|e| panic!("{e:#}"));
    owned(out)
}

/// Zeros in pinned memory of exactly their size, for the CUDA device `index`.
///
/// # Errors
/// No room, or a limit on pinned memory.
pub(crate) fn pinned_zeros(index: usize, shape: &[i64], kind: Kind) -> Result<Tensor> {
    let mut out = null_mut();
    let like = Tensor::empty([0], (kind, Device::Cpu));
    let (index, dimensions) = (index as c_int, shape.len() as c_int);
    // SAFETY: the shape has the length stated, and `like` outlives the call.
    let code = unsafe { cpift_pinned_zeros(index, shape.as_ptr(), dimensions, like.as_ptr() as Raw, &mut out) };
    check(code, "pinning host memory").context("hint: `ulimit -l` and the memory of the job limit it")?;
    Ok(owned(out))
}

/// Copies `from` to `to`, of another device or dtype. Between pinned memory and a device the host
/// does not wait; host memory must not be touched before [`wait_for`].
///
/// # Errors
/// An error of libtorch.
pub(crate) fn copy(to: &Tensor, from: &Tensor) -> Result<()> {
    let one = |to: &Tensor, from: &Tensor| {
        // SAFETY: both tensors outlive the call, and libtorch keeps their memory until the copy is
        // made.
        check(unsafe { cpift_copy(to.as_ptr() as Raw, from.as_ptr() as Raw) }, "a copy")
    };
    if to.device() == from.device() || to.kind() == from.kind() {
        return no_grad(|| one(to, from));
    }
    let (to, from) = (to.view([-1]), from.view([-1]));
    let len = to.numel() as i64;
    let parts = (0..len).step_by(PART as usize).map(|start| (start, PART.min(len - start)));
    no_grad(|| parts.into_iter().try_for_each(|(i, n)| one(&to.narrow(0, i, n), &from.narrow(0, i, n))))
}

/// Waits until `device` has done all that it was given, so that pinned memory may be read; does
/// nothing on the CPU.
///
/// # Errors
/// An error of the device.
pub(crate) fn wait_for(device: Device) -> Result<()> {
    let Device::Cuda(index) = device else { return Ok(()) };
    // SAFETY: has no preconditions.
    check(unsafe { cpift_synchronize(index as c_int) }, "waiting for the device")
}

/// Copies under way on a stream of their own.
pub(crate) struct Arrival {
    device: c_int,
    /// Null once the computing stream waits for it.
    done: Raw,
}

impl Arrival {
    /// Makes the copies of `start` on the stream for copies of the CUDA device `index`, after all
    /// that the device was given before.
    ///
    /// # Errors
    /// Errors of `start` and of libtorch.
    pub(crate) fn of<T>(index: usize, start: impl FnOnce() -> Result<T>) -> Result<(Self, T)> {
        let (device, mut before, mut done) = (index as c_int, null_mut(), null_mut());
        // SAFETY: the pointer is valid for the call.
        check(unsafe { cpift_fork(device, &mut before) }, "a stream for copies")?;
        let started = start();
        // SAFETY: `before` is that of the call above and is used no more.
        check(unsafe { cpift_join(before, &mut done) }, "a stream for copies")?;
        let arrival = Self { device, done };
        Ok((arrival, started?))
    }

    /// Makes the work that the device is given from now on wait for the copies. The host does not
    /// wait.
    ///
    /// # Errors
    /// An error of libtorch.
    pub(crate) fn wait(mut self) -> Result<()> {
        self.arrive()
    }

    fn arrive(&mut self) -> Result<()> {
        let done = std::mem::replace(&mut self.done, null_mut());
        if done.is_null() {
            return Ok(());
        }
        // SAFETY: `done` is that of cpift_join and is used no more.
        check(unsafe { cpift_arrive(self.device, done) }, "waiting for copies")
    }
}

impl Drop for Arrival {
    /// The memory of copies that nobody waits for must not be used again before they are made.
    fn drop(&mut self) {
        let _ = self.arrive();
    }
}
