//! Shared parts of the targets: inputs are written to files in memory, and a reader may allocate
//! only a small multiple of their size.

use std::alloc::System;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use cap::Cap;
use serde_json::Value;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// Bytes that a reader may allocate per byte of its input.
const PER_BYTE: usize = 4;
/// Bytes that a reader may allocate in addition.
const CONSTANT: usize = 512 << 10;

/// Largest data section of zeros that is appended to a header, in bytes.
const MAX_DATA: u64 = 1 << 20;

/// FUZZ_FOLDER, or else a directory in /dev/shm. [`clean`] removes it.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let parent = if Path::new("/dev/shm").is_dir() { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
    let own = || parent.join(format!("cpift-fuzz-{}", std::process::id()));
    let folder = std::env::var_os("FUZZ_FOLDER").map_or_else(own, PathBuf::from);
    std::fs::create_dir_all(&folder).expect("a folder for the inputs");
    folder
});

/// Directory for the files of this process.
pub fn folder() -> &'static Path {
    &FOLDER
}

/// Removes the directory. Call it at the end of the process.
pub fn clean() {
    let _ = std::fs::remove_dir_all(folder());
}

/// Runs `reader` on an input of `input` bytes. An allocation above the bound aborts the process,
/// which is a finding.
pub fn bounded<R>(input: usize, reader: impl FnOnce() -> R) -> R {
    bounded_by(CONSTANT + PER_BYTE * input, reader)
}

/// As [`bounded`], with a bound of `bytes`.
pub fn bounded_by<R>(bytes: usize, reader: impl FnOnce() -> R) -> R {
    // Start the thread pool and similar once, so that their memory does not count.
    static START: std::sync::Once = std::sync::Once::new();
    START.call_once(|| {
        let path = write("first", &[0; 1 << 20]);
        cpift_core::format::digest::Digest::of_file(&path).expect("a file has a digest");
        std::fs::remove_file(path).expect("it was there");
    });
    ALLOCATOR.set_limit(ALLOCATOR.allocated() + bytes).expect("the limit is above what is held");
    let result = reader();
    ALLOCATOR.set_limit(usize::MAX).expect("no limit");
    result
}

/// Writes `bytes` to the file `name`.
pub fn write(name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder().join(name);
    std::fs::write(&path, bytes).expect("memory has room for the input");
    path
}

/// Writes a safetensors file with this header, preceded by its length and followed by `data` and as
/// many zeros as it describes.
pub fn write_framed(name: &str, header: &[u8], data: &[u8]) -> PathBuf {
    let path = folder().join(name);
    let mut file = File::create(&path).expect("memory has room for the input");
    let start = 8 + header.len() as u64;
    let all = [&(header.len() as u64).to_le_bytes(), header, data].concat();
    file.write_all(&all).expect("memory has room for the input");
    if let Some(len) = described(header).filter(|len| *len <= MAX_DATA) {
        file.set_len(start + len).expect("memory has room for the input");
    }
    path
}

/// Number of data bytes that `header` describes.
fn described(header: &[u8]) -> Option<u64> {
    let header: Value = serde_json::from_slice(header).ok()?;
    header.as_object()?.values().filter_map(|v| v.get("data_offsets")?.get(1)?.as_u64()).max()
}

/// Splits the input at zero bytes into `N` pieces; missing pieces are empty.
pub fn pieces<const N: usize>(data: &[u8]) -> [&[u8]; N] {
    let mut parts = data.splitn(N, |byte| *byte == 0);
    std::array::from_fn(|_| parts.next().unwrap_or(&[]))
}
