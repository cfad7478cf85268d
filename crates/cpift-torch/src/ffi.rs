//! The Rust face of shim/shim.cpp, and the run-time loading of libtorch's CUDA half.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};

use anyhow::{Result, bail};
use tch::Tensor;

type RawTensor = *mut c_void;

unsafe extern "C" {
    fn cpift_error() -> *const c_char;
    fn cpift_fused_adamw(
        params: *const RawTensor,
        grads: *const RawTensor,
        exp_avgs: *const RawTensor,
        exp_avg_sqs: *const RawTensor,
        steps: *const RawTensor,
        count: c_int,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
    ) -> c_int;
}

/// The tensors of one optimizer step, one entry for each parameter in every list.
pub(crate) struct AdamWTensors<'a> {
    pub params: Vec<&'a Tensor>,
    pub grads: Vec<&'a Tensor>,
    pub exp_avgs: Vec<&'a Tensor>,
    pub exp_avg_sqs: Vec<&'a Tensor>,
    pub steps: Vec<&'a Tensor>,
}

/// One fused AdamW step; libtorch wants parameter, gradient and both moments in one dtype.
pub(crate) fn fused_adamw(
    tensors: &AdamWTensors<'_>,
    lr: f64,
    betas: (f64, f64),
    weight_decay: f64,
    eps: f64,
) -> Result<()> {
    let count = tensors.params.len();
    let lists = [&tensors.grads, &tensors.exp_avgs, &tensors.exp_avg_sqs, &tensors.steps];
    assert!(lists.iter().all(|list| list.len() == count));
    // SAFETY: every pointer is an at::Tensor that outlives the call, and every list has `count` entries.
    let code = unsafe {
        cpift_fused_adamw(
            raw(&tensors.params).as_ptr(),
            raw(&tensors.grads).as_ptr(),
            raw(&tensors.exp_avgs).as_ptr(),
            raw(&tensors.exp_avg_sqs).as_ptr(),
            raw(&tensors.steps).as_ptr(),
            count as c_int,
            lr,
            betas.0,
            betas.1,
            weight_decay,
            eps,
        )
    };
    if code != 0 {
        // SAFETY: the function returns a NUL-terminated string that lives until the thread's next failing call.
        let message = unsafe { CStr::from_ptr(cpift_error()) };
        bail!("AdamW step: {}", message.to_string_lossy());
    }
    Ok(())
}

fn raw(tensors: &[&Tensor]) -> Vec<RawTensor> {
    tensors.iter().map(|t| t.as_ptr() as RawTensor).collect()
}

/// Loads libtorch_cuda.so, so that one binary serves CPU and CUDA. Must come before anything asks libtorch about CUDA:
/// it remembers the first answer.
pub(crate) fn load_cuda() -> Result<()> {
    let name = CString::new("libtorch_cuda.so")?;
    // SAFETY: loading a library runs its initialisers, which libtorch's are made for; the handle is never closed.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if handle.is_null() {
        // SAFETY: dlerror returns a NUL-terminated string after a failed dlopen.
        let message = unsafe { CStr::from_ptr(libc::dlerror()) };
        bail!("{}", message.to_string_lossy());
    }
    Ok(())
}
