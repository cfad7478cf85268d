//! Safe wrappers of shim/, the C++ layer over libtorch, and loading of libtorch's CUDA library at
//! run time.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::{null, null_mut};

use anyhow::{Result, bail};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use tch::{Device, Kind, Tensor};

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
        grad_scale: *const c_void,
        found_inf: *const c_void,
    ) -> c_int;
    fn cpift_grad(
        outputs: *const RawTensor,
        grad_outputs: *const RawTensor,
        output_count: c_int,
        inputs: *const RawTensor,
        count: c_int,
        grads: *mut RawTensor,
    ) -> c_int;
    fn cpift_linear(x: *const c_void, w: *const c_void, bias: *const c_void, out: *mut RawTensor) -> c_int;
    fn cpift_flash_varlen(
        q: *const c_void,
        k: *const c_void,
        v: *const c_void,
        ends: *const c_void,
        longest: i64,
        scale: f64,
        window: i64,
        out: *mut RawTensor,
    ) -> c_int;
    fn cpift_cuda_memory(device: c_int, current: *mut i64, peak: *mut i64) -> c_int;
    fn cpift_cuda_total(device: c_int, total: *mut i64) -> c_int;
}

/// The tensors of an optimizer step; every list has one entry per parameter.
#[derive(Default)]
pub(crate) struct AdamWTensors<'a> {
    pub params: Vec<&'a Tensor>,
    pub grads: Vec<&'a Tensor>,
    pub exp_avgs: Vec<&'a Tensor>,
    pub exp_avg_sqs: Vec<&'a Tensor>,
    pub steps: Vec<&'a Tensor>,
}

/// Hyperparameters of a fused AdamW step.
pub(crate) struct AdamWNumbers<'a> {
    pub lr: f64,
    pub betas: (f64, f64),
    pub weight_decay: f64,
    pub eps: f64,
    /// Gradients are divided by this one-element f32 tensor.
    pub grad_scale: Option<&'a Tensor>,
    /// The step does nothing if this one-element f32 tensor is not 0.
    pub found_inf: Option<&'a Tensor>,
}

/// Makes a fused AdamW step; parameter, gradient and both moments must have one dtype.
pub(crate) fn fused_adamw(tensors: &AdamWTensors<'_>, numbers: &AdamWNumbers<'_>) -> Result<()> {
    let count = tensors.params.len();
    let lists = [&tensors.grads, &tensors.exp_avgs, &tensors.exp_avg_sqs, &tensors.steps];
    assert!(lists.iter().all(|list| list.len() == count));
    // SAFETY: every pointer is an at::Tensor that outlives the call, and every list has `count`
    // entries.
    let code = unsafe {
        cpift_fused_adamw(
            raw(&tensors.params).as_ptr(),
            raw(&tensors.grads).as_ptr(),
            raw(&tensors.exp_avgs).as_ptr(),
            raw(&tensors.exp_avg_sqs).as_ptr(),
            raw(&tensors.steps).as_ptr(),
            count as c_int,
            numbers.lr,
            numbers.betas.0,
            numbers.betas.1,
            numbers.weight_decay,
            numbers.eps,
            pointer(numbers.grad_scale),
            pointer(numbers.found_inf),
        )
    };
    check(code, "AdamW step")
}

/// Sums of the gradients of `outputs` by `inputs`, given with each output its gradient. Frees the
/// graph.
///
/// # Errors
/// An error of libtorch, for example for an input that the output does not depend on.
pub(crate) fn grad(outputs: &[(&Tensor, &Tensor)], inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    let (outputs, grad_outputs): (Vec<&Tensor>, Vec<&Tensor>) = outputs.iter().copied().unzip();
    let mut grads = vec![null_mut(); inputs.len()];
    // SAFETY: every pointer is an at::Tensor that outlives the call; the lists have as many entries
    // as the counts say.
    let code = unsafe {
        cpift_grad(
            raw(&outputs).as_ptr(),
            raw(&grad_outputs).as_ptr(),
            outputs.len() as c_int,
            raw(inputs).as_ptr(),
            inputs.len() as c_int,
            grads.as_mut_ptr(),
        )
    };
    check(code, "backward pass")?;
    Ok(grads.into_iter().map(owned).collect())
}

/// x·wᵀ + b over the last dimension of x, with its graph; on the CPU, oneDNN computes f32 products.
///
/// # Panics
/// If shapes or dtypes do not match, as tch's operators do.
pub(crate) fn linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let mut out = null_mut();
    // SAFETY: every pointer is an at::Tensor that outlives the call, or null.
    let code = unsafe { cpift_linear(pointer(Some(x)), pointer(Some(w)), pointer(bias), &mut out) };
    check(code, "linear").unwrap_or_else(|e| panic!("{e:#}"));
    owned(out)
}

/// Causal flash attention over documents concatenated in one row; q, k and v are [tokens, heads,
/// head width].
pub(crate) fn flash_varlen(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    ends: &Tensor,
    longest: i64,
    scale: f64,
    window: Option<i64>,
) -> Result<Tensor> {
    let mut out = null_mut();
    // SAFETY: every pointer is an at::Tensor that outlives the call.
    let code = unsafe {
        cpift_flash_varlen(
            pointer(Some(q)),
            pointer(Some(k)),
            pointer(Some(v)),
            pointer(Some(ends)),
            longest,
            scale,
            window.unwrap_or(-1),
            &mut out,
        )
    };
    check(code, "flash attention")?;
    Ok(owned(out))
}

/// Returns true if `device` runs variable-length flash attention and its backward pass for `heads`
/// query and `kv_heads` key heads of width `head_dim` and each of `windows`: tries it once, on two
/// tokens.
pub(crate) fn has_flash_varlen(
    device: Device,
    [heads, kv_heads, head_dim]: [i64; 3],
    windows: impl IntoIterator<Item = Option<i64>>,
) -> bool {
    let input = |n: i64| Tensor::zeros([2, n, head_dim], (Kind::BFloat16, device)).set_requires_grad(true);
    let (q, k, v) = (input(heads), input(kv_heads), input(kv_heads));
    let ends = Tensor::from_slice(&[0i32, 2]).to_device(device);
    let tried = |window| {
        let out = flash_varlen((&q, &k, &v), &ends, 2, 1.0, window)?;
        grad(&[(&out, &out.detach())], &[&q, &k, &v])
    };
    tch::with_grad(|| windows.into_iter().all(|window| tried(window).is_ok()))
}

/// Bytes allocated to tensors on the CUDA device `index`: current and peak.
pub(crate) fn cuda_memory(index: usize) -> Option<(u64, u64)> {
    let (mut current, mut peak) = (0, 0);
    // SAFETY: both pointers are valid for the call.
    let code = unsafe { cpift_cuda_memory(index as c_int, &mut current, &mut peak) };
    (code == 0).then_some((current as u64, peak as u64))
}

/// Total memory of the CUDA device `index` in bytes.
pub(crate) fn cuda_total(index: usize) -> Option<u64> {
    let mut total = 0;
    // SAFETY: the pointer is valid for the call.
    let code = unsafe { cpift_cuda_total(index as c_int, &mut total) };
    (code == 0).then_some(total as u64)
}

pub(crate) fn check(code: c_int, what: &str) -> Result<()> {
    if code != 0 {
        // SAFETY: the function returns a NUL-terminated string that is valid until the thread's
        // next failing call.
        let message = unsafe { CStr::from_ptr(cpift_error()) };
        bail!("{what}: {}", message.to_string_lossy());
    }
    Ok(())
}

fn raw(tensors: &[&Tensor]) -> Vec<RawTensor> {
    tensors.iter().map(|t| t.as_ptr() as RawTensor).collect()
}

fn pointer(tensor: Option<&Tensor>) -> *const c_void {
    tensor.map_or(null(), |t| t.as_ptr() as *const c_void)
}

pub(crate) fn owned(tensor: RawTensor) -> Tensor {
    // SAFETY: the shim returns a heap-allocated at::Tensor, which tch frees when the Tensor is
    // dropped.
    unsafe { Tensor::from_ptr(tensor as *mut torch_sys::C_tensor) }
}

/// Loads libtorch_cuda.so, so that one binary runs on CPU and CUDA. Must be called before libtorch
/// is asked about CUDA: it caches the first answer.
pub(crate) fn load_cuda() -> Result<()> {
    // SAFETY: loading a library runs its initialisers, which libtorch's are made for.
    let library = unsafe { Library::open(Some("libtorch_cuda.so"), RTLD_NOW | RTLD_GLOBAL)? };
    // Never closed: libtorch keeps pointers into it.
    std::mem::forget(library);
    Ok(())
}
