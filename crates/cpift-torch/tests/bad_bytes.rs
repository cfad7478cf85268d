//! Files that the libtorch stages read, with single bytes changed: config.json, tokenizer files,
//! data files.

use std::alloc::System;
use std::fs;
use std::path::Path;

use cap::Cap;
use cpift_core::format::tasks::Format;
use cpift_data::{Layout, read_rows};
use cpift_testkit::model::{row, write_rows, write_tiny_model};
use cpift_testkit::spoil::Spoiler;
use cpift_torch::session::ModelInfo;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// Reads the whole model, tokenizer included, whatever file is damaged.
const MODEL: Spoiler = Spoiler { allocator: &ALLOCATOR, per_byte: 4, constant: 4 << 20 };
const DATA: Spoiler = Spoiler { allocator: &ALLOCATOR, per_byte: 4, constant: 1 << 20 };

#[test]
fn spoilt_models_do_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let model = write_tiny_model(&dir.path().join("m"), 1);
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        MODEL.each(&model.join(name), || ModelInfo::open(&model, None).is_ok());
    }
}

#[test]
fn spoilt_data_does_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let read = |path: &Path| read_rows(path, &Layout::Format(Format::Auto)).is_ok();
    let rows: Vec<_> = (0..20).map(|i| row(&format!("say w{i}"), &format!("w{i}"))).collect();
    let (lines, list) = (dir.path().join("rows.jsonl"), dir.path().join("rows.json"));
    write_rows(&lines, &rows);
    fs::write(&list, serde_json::Value::from(rows).to_string()).unwrap();
    DATA.each(&lines, || read(&lines));
    DATA.each(&list, || read(&list));
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden/parquet");
    for name in ["snappy.parquet", "zstd.parquet"] {
        let path = dir.path().join(name);
        fs::copy(golden.join(name), &path).unwrap();
        DATA.each(&path, || read(&path));
    }
}
