//! The only module that opens, maps, stages and renames files. Errors name the file and suggest a
//! fix.

pub(crate) mod staging;

use std::fs::{DirEntry, File};
use std::io::{self, Read};
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use memmap2::Mmap;
use rustix::io::Errno;

use crate::error::BadInput;
pub use staging::{
    NewFolders, RECORD_NAME, StagedDir, StagedFile, StagedPath, check_not_input, check_output, check_output_dir,
    discard_unfinished, write_text,
};

/// Opens `path` for reading.
///
/// # Errors
/// [`BadInput`] if it is missing or not a file.
pub fn open(path: &Path) -> Result<File> {
    if path.is_dir() {
        return Err(BadInput::new(path, "is a directory").expected("a file").into());
    }
    File::open(path).map_err(|e| refuse(path, "opened", &e))
}

/// Lists a directory, in bytewise order of the names.
///
/// # Errors
/// [`BadInput`] if it cannot be read.
pub(crate) fn list(folder: &Path) -> Result<Vec<DirEntry>> {
    let entries = std::fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<DirEntry>>>);
    let mut entries = entries.map_err(|e| refuse(folder, "listed", &e))?;
    entries.sort_by_key(DirEntry::file_name);
    Ok(entries)
}

/// Reads a whole UTF-8 file.
///
/// # Errors
/// [`BadInput`] if it is missing or not UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    read_text_of(path, u64::MAX)
}

/// Reads a whole UTF-8 file of at most `limit` bytes. Endless files such as devices are refused at
/// that length.
///
/// # Errors
/// [`BadInput`] if it is missing, too long, or not UTF-8 (with the line of the first invalid byte).
pub(crate) fn read_text_of(path: &Path, limit: u64) -> Result<String> {
    let mut bytes = Vec::new();
    let file = open(path)?;
    let len = file.metadata().map_or(0, |meta| meta.len()).min(limit);
    let room = bytes.try_reserve_exact(usize::try_from(len).unwrap_or(usize::MAX));
    room.map_err(|e| BadInput::new(path, format!("cannot be read: {e}")))?;
    let read = file.take(limit.saturating_add(1)).read_to_end(&mut bytes);
    read.map_err(|e| BadInput::new(path, format!("cannot be read: {e}")))?;
    if bytes.len() as u64 > limit {
        return Err(BadInput::new(path, "is too long").expected(format!("at most {limit} bytes")).into());
    }
    String::from_utf8(bytes).map_err(|error| not_utf8(path, error.as_bytes(), error.utf8_error().valid_up_to()).into())
}

/// Error for a text whose byte at `at` is not UTF-8.
fn not_utf8(path: &Path, bytes: &[u8], at: usize) -> BadInput {
    let lines = bytes[..at].iter().filter(|byte| **byte == b'\n').count() + 1;
    let start = bytes[..at].iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    let column = String::from_utf8_lossy(&bytes[start..at]).chars().count() + 1;
    let from = match bytes {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => "UTF-16",
        _ => "ISO-8859-1",
    };
    BadInput::new(path, format!("line {lines} is not UTF-8 text"))
        .found(format!("the byte 0x{:02X} as character {column} of the line", bytes[at]))
        .hint(format!("if the file is in {from}: iconv -f {from} -t UTF-8 FILE > NEW"))
}

/// Maps `path` read-only; an empty file gives an empty map.
///
/// # Errors
/// [`BadInput`] if it cannot be opened.
#[allow(unsafe_code)]
pub fn map(path: &Path) -> Result<Mmap> {
    let file = open(path)?;
    // SAFETY: the mapping is read-only and we never write to inputs. If another process truncates
    // the file while we read it, SIGBUS is raised; this is documented as unsupported.
    unsafe { Mmap::map(&file) }.map_err(|e| refuse(path, "mapped", &e))
}

/// Refuses a placeholder for a file that was not downloaded (a git-lfs pointer, an HTML page) and
/// GGUF weights under another name.
///
/// # Errors
/// [`BadInput`] with a hint how to get the file.
pub(crate) fn refuse_placeholder(path: &Path, bytes: &[u8]) -> Result<()> {
    let error = if bytes.starts_with(b"version https://git-lfs.github.com/spec/") {
        let text = String::from_utf8_lossy(&bytes[..bytes.len().min(1024)]).into_owned();
        let size = text.lines().find_map(|line| line.strip_prefix("size "));
        BadInput::new(path, "a git-lfs pointer instead of the file")
            .expected(size.map_or("the file".to_owned(), |size| format!("a file of {size} bytes")))
            .found(format!("a pointer of {} bytes", bytes.len()))
            .hint("download the file with `git lfs pull` or `hf download`")
    } else if bytes.starts_with(b"GGUF") {
        BadInput::new(path, "weights in the GGUF format of llama.cpp")
            .expected("a safetensors file")
            .hint("use the safetensors repository they were converted from")
    } else if [&b"<!DOCTYPE"[..], b"<!doctype", b"<html"].iter().any(|page| bytes.starts_with(page)) {
        BadInput::new(path, "an HTML page instead of the file")
            .found("text that begins with <")
            .hint("download the file itself: its URL on the Hub contains /resolve/ instead of /blob/")
    } else {
        return Ok(());
    };
    Err(error.into())
}

/// Error for a file that cannot be opened or mapped: a bad input, unless the process has run out of
/// memory or file handles.
fn refuse(path: &Path, done: &str, error: &std::io::Error) -> anyhow::Error {
    let message = format!("cannot be {done}: {error}");
    let (hint, what) = match Errno::from_io_error(error) {
        Some(Errno::NOMEM) => ("a memory limit is reached (ulimit -v); files are mapped whole", "memory"),
        Some(Errno::MFILE | Errno::NFILE) => ("a limit of open files is reached (ulimit -n)", "file handles"),
        _ => return BadInput::new(path, message).expected("a readable regular file").into(),
    };
    anyhow!("{}: {message}\n  hint: {hint}", path.display()).context(format!("out of {what}"))
}

/// Free space, in bytes, on the file system of `dest`, which need not exist yet.
pub fn available_bytes(dest: &Path) -> Result<u64> {
    let absolute = std::path::absolute(dest).with_context(|| format!("resolving the path {}", dest.display()))?;
    let existing = absolute.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    let stat =
        rustix::fs::statvfs(existing).with_context(|| format!("querying the free space at {}", dest.display()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
