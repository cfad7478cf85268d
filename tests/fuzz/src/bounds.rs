//! What the targets share: inputs become files in memory, and no reader may allocate more than a
//! small multiple of them.

use std::alloc::System;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use cap::Cap;
use serde_json::Value;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// Bytes a reader may hold for each byte of its input, and those it may hold whatever the input.
const PER_BYTE: usize = 4;
const CONSTANT: usize = 512 << 10;

/// The largest file of zeros that a header is given.
const MAX_DATA: u64 = 1 << 20;

/// FUZZ_FOLDER, else one in memory; [`clean`] removes it.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let parent = if Path::new("/dev/shm").is_dir() { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
    let own = || parent.join(format!("cpift-fuzz-{}", std::process::id()));
    let folder = std::env::var_os("FUZZ_FOLDER").map_or_else(own, PathBuf::from);
    std::fs::create_dir_all(&folder).expect("a folder for the inputs");
    folder
});

/// A folder of this process.
pub fn folder() -> &'static Path {
    &FOLDER
}

/// Removes the folder, at the end of a process.
pub fn clean() {
    let _ = std::fs::remove_dir_all(folder());
}

/// Runs `reader`; an allocation that brings it above its share of `input` bytes ends the process,
/// which is a finding.
pub fn bounded<R>(input: usize, reader: impl FnOnce() -> R) -> R {
    bounded_by(CONSTANT + PER_BYTE * input, reader)
}

/// As [`bounded`], with `bytes` to have.
pub fn bounded_by<R>(bytes: usize, reader: impl FnOnce() -> R) -> R {
    // What starts once and stays, such as the thread pool, is no reader's.
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

/// Writes a safetensors file of this header, with the right length before it and as many zeros
/// behind it as it describes.
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

/// Bytes of data that `header` describes.
fn described(header: &[u8]) -> Option<u64> {
    let header: Value = serde_json::from_slice(header).ok()?;
    header.as_object()?.values().filter_map(|v| v.get("data_offsets")?.get(1)?.as_u64()).max()
}

/// Splits the input at zero bytes into as many pieces; what is missing is empty.
pub fn pieces<const N: usize>(data: &[u8]) -> [&[u8]; N] {
    let mut parts = data.splitn(N, |byte| *byte == 0);
    std::array::from_fn(|_| parts.next().unwrap_or(&[]))
}
