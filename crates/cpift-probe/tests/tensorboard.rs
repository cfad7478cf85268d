//! `--tensorboard DIR`, decoded by hand from the description of the format: TFRecord framing and
//! the fields of event.proto.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use cpift_testkit::model::{write_tasks, write_tiny_model};
use cpift_testkit::run;
use serde_json::Value;

/// CRC-32C (Castagnoli), bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |c, _| if c & 1 == 1 { (c >> 1) ^ 0x82f6_3b78 } else { c >> 1 })
    })
}

fn masked(bytes: &[u8]) -> u32 {
    let crc = crc32c(bytes);
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

fn take<'a>(bytes: &mut &'a [u8], n: usize) -> &'a [u8] {
    let (head, tail) = bytes.split_at(n);
    *bytes = tail;
    head
}

/// The messages of an event file; both checksums of each are checked.
fn records(mut file: &[u8]) -> Vec<&[u8]> {
    let mut out = Vec::new();
    while !file.is_empty() {
        let length = take(&mut file, 8);
        assert_eq!(take(&mut file, 4), masked(length).to_le_bytes(), "checksum of the length of record {}", out.len());
        let event = take(&mut file, u64::from_le_bytes(length.try_into().unwrap()) as usize);
        assert_eq!(take(&mut file, 4), masked(event).to_le_bytes(), "checksum of record {}", out.len());
        out.push(event);
    }
    out
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let byte = take(bytes, 1)[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            break;
        }
    }
    value
}

/// Number and content of each field; numbers as their little-endian bytes.
fn fields(mut message: &[u8]) -> BTreeMap<u64, Vec<u8>> {
    let mut out = BTreeMap::new();
    while !message.is_empty() {
        let key = varint(&mut message);
        let content = match key & 7 {
            0 => varint(&mut message).to_le_bytes().to_vec(),
            1 => take(&mut message, 8).to_vec(),
            2 => {
                let length = varint(&mut message) as usize;
                take(&mut message, length).to_vec()
            }
            5 => take(&mut message, 4).to_vec(),
            other => panic!("wire type {other}"),
        };
        out.insert(key >> 3, content);
    }
    out
}

/// Tag, step and value of a scalar event.
fn scalar(event: &BTreeMap<u64, Vec<u8>>) -> (String, u64, f32) {
    let value = fields(&fields(&event[&5])[&1]);
    let step = event.get(&2).map_or(0, |s| u64::from_le_bytes(s[..].try_into().unwrap()));
    (String::from_utf8(value[&1].clone()).unwrap(), step, f32::from_le_bytes(value[&2][..].try_into().unwrap()))
}

fn one_file(folder: &Path) -> Vec<u8> {
    let files: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    assert!(files[0].file_name().unwrap().to_str().unwrap().starts_with("events.out.tfevents."));
    fs::read(&files[0]).unwrap()
}

#[test]
fn event_files_hold_the_figures_of_metrics_jsonl() {
    let dir = tempfile::tempdir().unwrap();
    let (base, tasks) = (write_tiny_model(&dir.path().join("base"), 1), write_tasks(&dir.path().join("data")));
    let (out, board) = (dir.path().join("probe"), dir.path().join("board"));
    let paths = [("--base", &base), ("--tasks", &tasks), ("--out", &out), ("--tensorboard", &board)];
    let args = paths.iter().flat_map(|(flag, path)| [(*flag).to_owned(), path.to_str().unwrap().to_owned()]);
    let more = "--task copy --steps 5 --eval-every 2 --device cpu --threads 1".split(' ').map(str::to_owned);
    run(env!("CARGO_BIN_EXE_cpift-probe"), args.chain(more)).ok();

    let file = one_file(&board);
    let events: Vec<_> = records(&file).into_iter().map(fields).collect();
    assert_eq!(events[0][&3], b"brain.Event:2");
    assert!(events[1].contains_key(&7), "the start of a session comes before its first step");
    let mut written: BTreeMap<(String, u64), f32> = BTreeMap::new();
    for event in &events[2..] {
        assert!(f64::from_le_bytes(event[&1][..].try_into().unwrap()) > 1.6e9, "seconds since 1970");
        let (tag, step, value) = scalar(event);
        assert!(written.insert((tag, step), value).is_none());
    }
    let mut expected = BTreeMap::new();
    for line in fs::read_to_string(out.join("metrics.jsonl")).unwrap().lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let step = line["step"].as_u64().unwrap();
        let mut add = |tag: String, value: &Value| {
            expected.insert((tag, step), value.as_f64().unwrap() as f32);
        };
        if let Some(losses) = line["eval_loss"].as_object() {
            losses.iter().for_each(|(task, loss)| add(format!("eval/{task}/loss"), loss));
        } else {
            ["loss", "lr", "grad_norm", "tokens_per_second"].iter().for_each(|k| add(format!("train/{k}"), &line[*k]));
        }
    }
    assert_eq!(expected.len(), 4 * 5 + 3, "five steps, held-out losses after 2, 4 and 5");
    assert_eq!(written, expected);
}
