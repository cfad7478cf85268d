//! TensorBoard event files: scalars only.
//!
//! The format is TensorFlow's TFRecord: length, checksum of the length, an `Event` message of
//! event.proto, checksum of the message; the checksums are CRC-32C, rotated and offset ("masked").

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

/// An open event file.
pub(crate) struct TensorBoard {
    file: File,
    path: PathBuf,
}

impl TensorBoard {
    /// Creates a file in `folder`, and the directory if it is missing. Of earlier files there,
    /// TensorBoard shows only steps before `first`: a resumed run writes the steps after its last
    /// saved state again.
    pub fn create(folder: &Path, first: i64) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        let seconds = since_epoch() as u64;
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let path = folder.join(format!("events.out.tfevents.{seconds:010}.{}.{}", host.trim(), std::process::id()));
        let file = OpenOptions::new().create_new(true).append(true).open(&path);
        let mut board = Self { file: file.with_context(|| format!("creating {}", path.display()))?, path };
        board.event(0, &field(FILE_VERSION, b"brain.Event:2"))?;
        // SessionLog.status = START.
        board.event(first + 1, &field(SESSION_LOG, &[0x08, 1]))?;
        Ok(board)
    }

    /// Writes a value of the curve `tag`.
    pub fn scalar(&mut self, tag: &str, step: i64, value: f64) -> Result<()> {
        let mut of_tag = field(1, tag.as_bytes());
        of_tag.push(2 << 3 | FIXED32);
        of_tag.extend((value as f32).to_le_bytes());
        self.event(step, &field(SUMMARY, &field(1, &of_tag)))
    }

    fn event(&mut self, step: i64, payload: &[u8]) -> Result<()> {
        let mut event = vec![1 << 3 | FIXED64];
        event.extend(since_epoch().to_le_bytes());
        event.push(2 << 3 | VARINT);
        varint(&mut event, step as u64);
        event.extend(payload);
        let length = (event.len() as u64).to_le_bytes();
        let mut record = length.to_vec();
        record.extend(masked(&length).to_le_bytes());
        record.extend(&event);
        record.extend(masked(&event).to_le_bytes());
        self.file.write_all(&record).with_context(|| format!("writing {}", self.path.display()))
    }
}

// Fields of Event.
const FILE_VERSION: u8 = 3;
const SUMMARY: u8 = 5;
const SESSION_LOG: u8 = 7;

// Wire types of protocol buffers.
const VARINT: u8 = 0;
const FIXED64: u8 = 1;
const BYTES: u8 = 2;
const FIXED32: u8 = 5;

fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | BYTES];
    varint(&mut out, bytes.len() as u64);
    out.extend(bytes);
    out
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn masked(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn since_epoch() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}
