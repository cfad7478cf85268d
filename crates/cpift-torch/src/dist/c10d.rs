//! Safe wrappers of shim/dist.cpp: c10d's store, its process groups and their collectives.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr::{null, null_mut};
use std::time::Duration;

use anyhow::{Result, bail};
use tch::Tensor;

type Raw = *mut c_void;

unsafe extern "C" {
    fn cpift_error() -> *const c_char;
    fn cpift_store_new(
        host: *const c_char,
        port: c_int,
        serve: c_int,
        prefix: *const c_char,
        world: c_int,
        connect_ms: i64,
        timeout_ms: i64,
        out: *mut Raw,
    ) -> c_int;
    fn cpift_store_free(store: Raw);
    fn cpift_store_set(store: Raw, key: *const c_char, value: *const c_char, length: i64) -> c_int;
    fn cpift_store_get(store: Raw, key: *const c_char, value: *mut *const c_char, length: *mut i64) -> c_int;
    fn cpift_store_add(store: Raw, key: *const c_char, amount: i64, sum: *mut i64) -> c_int;
    fn cpift_group_new(
        store: Raw,
        device: c_int,
        own_host: *const c_char,
        rank: c_int,
        world: c_int,
        timeout_ms: i64,
        out: *mut Raw,
    ) -> c_int;
    fn cpift_all_gather(group: Raw, out: Raw, input: Raw, work: *mut Raw) -> c_int;
    fn cpift_reduce_scatter(group: Raw, out: Raw, input: Raw, work: *mut Raw) -> c_int;
    fn cpift_all_to_all(group: Raw, out: Raw, input: Raw, work: *mut Raw) -> c_int;
    fn cpift_all_reduce(group: Raw, tensor: Raw, work: *mut Raw) -> c_int;
    fn cpift_broadcast(group: Raw, tensor: Raw, root: c_int, work: *mut Raw) -> c_int;
    fn cpift_barrier(group: Raw, work: *mut Raw) -> c_int;
    fn cpift_wait(work: Raw) -> c_int;
    fn cpift_work_free(work: Raw);
    fn cpift_abort(group: Raw) -> c_int;
    fn cpift_shutdown(group: Raw) -> c_int;
    fn cpift_exit_at_once() -> c_int;
    fn cpift_set_storage(tensor: Raw, bytes: i64) -> c_int;
    fn _exit(code: c_int) -> !;
}

fn check(code: c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: the function returns a NUL-terminated string that is valid until the thread's next
    // failing call.
    let message = unsafe { CStr::from_ptr(cpift_error()) }.to_string_lossy();
    bail!("{}", plain(&message))
}

/// A message of c10d without the file and line it begins with and the C++ stack that may follow.
fn plain(message: &str) -> String {
    let message = message.split("\nException raised from").next().unwrap_or_default().trim();
    match message.strip_prefix('[').and_then(|rest| rest.split_once("] ")) {
        Some((place, rest)) if place.contains(".cc:") || place.contains(".cpp:") => rest.to_owned(),
        _ => message.to_owned(),
    }
}

fn milliseconds(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

/// A connection to the store in which the ranks find each other.
pub(super) struct Store(Raw);

// SAFETY: c10d's stores lock their connection.
unsafe impl Send for Store {}

/// Address of a store, and the beginning of its keys.
#[derive(Debug, Clone)]
pub(super) struct StoreAddress {
    pub host: String,
    pub port: u16,
    pub prefix: String,
    pub world: usize,
}

impl Store {
    /// Connects to the store within `connect`; serves it first if `serve`. `timeout` bounds waits
    /// of the process group for other ranks' keys.
    pub(super) fn open(at: &StoreAddress, serve: bool, connect: Duration, timeout: Duration) -> Result<Self> {
        let (host, prefix) = (CString::new(at.host.as_str())?, CString::new(at.prefix.as_str())?);
        let mut store = null_mut();
        // SAFETY: the strings outlive the call.
        check(unsafe {
            cpift_store_new(
                host.as_ptr(),
                at.port.into(),
                serve.into(),
                prefix.as_ptr(),
                at.world as c_int,
                milliseconds(connect),
                milliseconds(timeout),
                &mut store,
            )
        })?;
        Ok(Self(store))
    }

    pub(super) fn set(&self, key: &str, value: &str) -> Result<()> {
        let key = CString::new(key)?;
        // SAFETY: key and value outlive the call, and the value has the length stated.
        check(unsafe { cpift_store_set(self.0, key.as_ptr(), value.as_ptr().cast(), value.len() as i64) })
    }

    /// The value of `key` if it is set. Does not wait for it.
    pub(super) fn get(&self, key: &str) -> Result<Option<String>> {
        let key = CString::new(key)?;
        let (mut value, mut length) = (null(), 0);
        // SAFETY: the pointers are valid for the call.
        check(unsafe { cpift_store_get(self.0, key.as_ptr(), &mut value, &mut length) })?;
        if value.is_null() {
            return Ok(None);
        }
        // SAFETY: the shim returns `length` bytes that are valid until this thread's next call.
        let bytes = unsafe { std::slice::from_raw_parts(value.cast::<u8>(), length as usize) };
        Ok(Some(String::from_utf8_lossy(bytes).into_owned()))
    }

    /// Adds 1 to a counter, which starts at 0, and returns the sum.
    pub(super) fn count(&self, key: &str) -> Result<i64> {
        let key = CString::new(key)?;
        let mut sum = 0;
        // SAFETY: the pointers are valid for the call.
        check(unsafe { cpift_store_add(self.0, key.as_ptr(), 1, &mut sum) })?;
        Ok(sum)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: the pointer is the shim's and is used no more.
        unsafe { cpift_store_free(self.0) }
    }
}

/// Process group of one backend. Never freed, because its threads may wait for a rank that is gone.
pub(super) struct ProcessGroup(Raw);

impl ProcessGroup {
    /// A Gloo group that listens on `own_host`, or an NCCL group on the CUDA device `device`. All
    /// ranks must call it.
    pub(super) fn new(
        store: &Store,
        device: Option<usize>,
        own_host: &str,
        (rank, world): (usize, usize),
        timeout: Duration,
    ) -> Result<Self> {
        let own_host = CString::new(own_host)?;
        let device = device.map_or(-1, |d| d as c_int);
        let (rank, world) = (rank as c_int, world as c_int);
        let mut group = null_mut();
        // SAFETY: store and string outlive the call; the group holds the store by reference count.
        check(unsafe {
            cpift_group_new(store.0, device, own_host.as_ptr(), rank, world, milliseconds(timeout), &mut group)
        })?;
        Ok(Self(group))
    }

    fn start(start: impl FnOnce(*mut Raw) -> c_int) -> Result<RawWork> {
        let mut work = null_mut();
        check(start(&mut work))?;
        Ok(RawWork(work))
    }

    pub(super) fn all_gather(&self, out: &Tensor, input: &Tensor) -> Result<RawWork> {
        // SAFETY: group and tensors outlive the call, and c10d's work holds the tensors after it.
        Self::start(|work| unsafe { cpift_all_gather(self.0, raw(out), raw(input), work) })
    }

    pub(super) fn reduce_scatter(&self, out: &Tensor, input: &Tensor) -> Result<RawWork> {
        // SAFETY: as in `all_gather`.
        Self::start(|work| unsafe { cpift_reduce_scatter(self.0, raw(out), raw(input), work) })
    }

    pub(super) fn all_to_all(&self, out: &Tensor, input: &Tensor) -> Result<RawWork> {
        // SAFETY: as in `all_gather`.
        Self::start(|work| unsafe { cpift_all_to_all(self.0, raw(out), raw(input), work) })
    }

    pub(super) fn all_reduce(&self, tensor: &Tensor) -> Result<RawWork> {
        // SAFETY: as in `all_gather`.
        Self::start(|work| unsafe { cpift_all_reduce(self.0, raw(tensor), work) })
    }

    pub(super) fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<RawWork> {
        // SAFETY: as in `all_gather`.
        Self::start(|work| unsafe { cpift_broadcast(self.0, raw(tensor), root as c_int, work) })
    }

    pub(super) fn barrier(&self) -> Result<RawWork> {
        // SAFETY: the group outlives the call.
        Self::start(|work| unsafe { cpift_barrier(self.0, work) })
    }

    /// Ends collectives under way with an error.
    pub(super) fn abort(&self) -> Result<()> {
        // SAFETY: the group is never freed.
        check(unsafe { cpift_abort(self.0) })
    }

    /// Ends the threads of the group after its last collective.
    pub(super) fn shutdown(&self) -> Result<()> {
        // SAFETY: the group is never freed.
        check(unsafe { cpift_shutdown(self.0) })
    }
}

/// A collective under way.
pub(super) struct RawWork(Raw);

impl RawWork {
    /// Waits for the collective; on CUDA, lets the current stream wait.
    pub(super) fn wait(&self) -> Result<()> {
        // SAFETY: the pointer is the shim's, freed on drop.
        check(unsafe { cpift_wait(self.0) })
    }
}

impl Drop for RawWork {
    fn drop(&mut self) {
        // SAFETY: the pointer is the shim's and is used no more.
        unsafe { cpift_work_free(self.0) }
    }
}

fn raw(tensor: &Tensor) -> Raw {
    tensor.as_ptr() as Raw
}

/// Replaces the memory of a tensor's storage by `bytes` new bytes with unspecified content, or by
/// none. All tensors that share the storage then see the new memory; they must not be read or
/// written while it is smaller than they need.
///
/// # Errors
/// If the memory cannot be allocated.
pub fn set_storage(tensor: &Tensor, bytes: usize) -> Result<()> {
    // SAFETY: the tensor outlives the call.
    check(unsafe { cpift_set_storage(raw(tensor), bytes as i64) })
}

/// Lets exit() end this process without the destructors of libraries, which threads of a process
/// group may still need.
pub(super) fn exit_at_once() {
    // SAFETY: registers a function that only calls _exit. It fails only without memory, and then
    // the process ends as others do.
    unsafe { cpift_exit_at_once() };
}

/// Ends the process at once.
pub(super) fn end_process(code: i32) -> ! {
    // SAFETY: has no preconditions.
    unsafe { _exit(code) }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn messages_lose_their_place_in_the_source() {
        assert_eq!(
            plain("[/x/gloo/pair.cc:534] Connection closed by peer [::1]:3"),
            "Connection closed by peer [::1]:3"
        );
        assert_eq!(plain("[a] b"), "[a] b");
        assert_eq!(plain("broken\nException raised from f at x.cpp:1 (most recent call first):\nframe"), "broken");
    }

    #[test]
    fn storage_goes_and_comes_back_under_views() {
        let tensor = Tensor::ones([4, 8], (Kind::Float, Device::Cpu));
        let view = tensor.narrow(0, 2, 1);
        set_storage(&tensor, 0).unwrap();
        set_storage(&tensor, 4 * 8 * 4).unwrap();
        let _ = tensor.shallow_clone().fill_(3.0);
        assert_eq!(f64::try_from(view.sum(Kind::Double)).unwrap(), 24.0);
    }
}
