//! Running out of memory, reported as one error with options that would fit.
//!
//! libtorch's exceptions arrive as panics (tch's methods unwrap) or, from our C++ layer, as errors.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, set_hook, take_hook};
use std::sync::Once;

use anyhow::{Result, anyhow};
use cpift_core::{BadInput, Stopped, Usage};

use crate::dist::JOB_FAILED;

thread_local! {
    /// True if [`explain`] catches and reports a panic of this thread.
    static CATCHING: Cell<bool> = const { Cell::new(false) };
}

/// Marks that a panic of this thread is passed on to a thread whose [`explain`] reports it.
pub(crate) fn handled_by_another_thread() {
    CATCHING.set(true);
}

/// Runs `work`. If it runs out of memory, the error names the failed allocation, followed by
/// `table`: the memory the work takes, and options that take less. Any other panic becomes an error
/// with its first line; the panic hook has printed its location.
///
/// # Errors
/// Errors of `work`, and its panics.
pub fn explain<T>(table: impl FnOnce() -> String, work: impl FnOnce() -> Result<T>) -> Result<T> {
    install_hook();
    let before = CATCHING.replace(true);
    let done = catch_unwind(AssertUnwindSafe(work));
    CATCHING.set(before);
    let (error, panicked) = match done {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) if error.is::<BadInput>() || error.is::<Usage>() || error.is::<Stopped>() => return Err(error),
        Ok(Err(error)) => (error, false),
        Err(panic) => (anyhow!(text_of(panic.as_ref())), true),
    };
    let text = format!("{error:#}");
    if is_out_of_memory(&text) {
        return Err(anyhow!("out of memory: {}\n{}", request(&text), table()));
    }
    // libtorch's messages continue with its C++ stack.
    Err(if panicked { anyhow!(first_line(&text)) } else { error })
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

/// Suppresses the output of out-of-memory panics that [`explain`] reports; the previous hook prints
/// all others.
fn install_hook() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |info: &PanicHookInfo<'_>| {
            if !(CATCHING.get() && is_out_of_memory(&text_of(info.payload()))) {
                before(info);
            }
        }));
    });
}

fn text_of(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str).or(payload.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without a message").to_owned()
}

/// Returns true if a message of libtorch, C++ or the system reports that this process has run out
/// of memory.
fn is_out_of_memory(text: &str) -> bool {
    const SIGNS: [&str; 9] = [
        "out of memory",
        "DefaultCPUAllocator",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "std::bad_alloc",
        "can't allocate memory",
        "Cannot allocate memory",
        // Messages of oneDNN, and of threads without memory for a stack (or beyond ulimit -u).
        "could not create a primitive",
        "could not execute a primitive",
        "failed to spawn thread",
    ];
    // A primitive that this CPU does not support is another error, and so is that of another rank.
    let other = ["primitive descriptor", JOB_FAILED].iter().any(|sign| text.contains(sign));
    SIGNS.iter().any(|sign| text.contains(sign)) && !other
}

/// The failed allocation: its size if the message has it, else the first line.
fn request(text: &str) -> String {
    const CUDA: &str = "Tried to allocate ";
    const CPU: &str = "you tried to allocate ";
    let after = |sign: &str| Some(text.split_once(sign)?.1);
    if let Some(amount) = after(CUDA).and_then(|rest| rest.split_once(". ")) {
        return format!("{} more could not be allocated on the device", amount.0);
    }
    let bytes = after(CPU).and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
    match bytes {
        Some(bytes) => format!("{:.1} MiB more could not be allocated", bytes / f64::from(1 << 20)),
        None => first_line(text.strip_prefix("out of memory: ").unwrap_or(text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(work: impl FnOnce() -> Result<()>) -> String {
        format!("{:#}", explain(|| "TABLE".to_owned(), work).unwrap_err())
    }

    #[test]
    fn running_out_of_memory_is_one_error_whether_it_comes_as_a_panic_or_an_error() {
        const CUDA: &str = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB";
        const CPU: &str = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you \
                           tried to allocate 4194304 bytes. Error code 12 (Cannot allocate memory)\nC++ stack";
        let expected = "out of memory: 2.50 GiB more could not be allocated on the device\nTABLE";
        assert_eq!(told(|| panic!("called `Result::unwrap()`: Torch(\"{CUDA}\")")), expected);
        assert_eq!(told(|| Err(anyhow!("{CUDA}").context("stage 1, step 3"))), expected);
        assert_eq!(told(|| panic!("{CPU}")), "out of memory: 4.0 MiB more could not be allocated\nTABLE");
        assert_eq!(told(|| Err(anyhow!("std::bad_alloc"))), "out of memory: std::bad_alloc\nTABLE");
        assert_eq!(
            told(|| panic!("linear: could not execute a primitive\nC++ stack")),
            "out of memory: linear: could not execute a primitive\nTABLE"
        );
    }

    #[test]
    fn other_failures_stay_what_they_are() {
        assert_eq!(told(|| panic!("shapes differ\nC++ stack")), "shapes differ");
        assert_eq!(told(|| Err(anyhow!("disk full").context("saving"))), "saving: disk full");
        let none = "could not create a primitive descriptor for a matmul primitive";
        assert_eq!(told(|| Err(anyhow!(none))), none);
        let other = format!("rank 2 of 4{JOB_FAILED}rank 3 (n2, process 7): out of memory: 2.50 GiB more");
        assert_eq!(told(|| Err(anyhow!(other.clone()))), other);
        assert_eq!(told(|| Err(anyhow!("loss NaN\n  hint: lower --lr"))), "loss NaN\n  hint: lower --lr");
        let bad = explain(String::new, || Err::<(), _>(BadInput::new("x", "is out of memory").hint("y").into()));
        assert!(bad.unwrap_err().is::<BadInput>());
        assert_eq!(explain(String::new, || Ok(7)).unwrap(), 7);
    }
}
