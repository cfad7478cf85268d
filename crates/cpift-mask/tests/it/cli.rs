//! `cpift-mask` on bad input and bad arguments, its tables, and what it is linked to, through the
//! real binary.

use std::fs;
use std::path::{Path, PathBuf};

use cpift_core::{Dtype, Mask};
use cpift_testkit::{Run, Tensor, Tensors, expect_entries, run, write_checkpoint, write_safetensors, write_sharded};
use serde_json::{Value, json};
use tempfile::TempDir;

const BIN: &str = env!("CARGO_BIN_EXE_cpift-mask");

/// A sound base, and a folder of its own for the output.
struct Setting {
    dir: TempDir,
    out: PathBuf,
}

fn tensors() -> Tensors {
    let ramp = |n: usize, shape: &[usize]| Tensor::f32(shape, &(0..n).map(|i| i as f32).collect::<Vec<_>>());
    Tensors::from([
        ("model.layers.0.mlp.up_proj.weight".into(), ramp(40, &[4, 10])),
        ("model.layers.1.mlp.up_proj.weight".into(), ramp(40, &[4, 10])),
        ("model.norm.weight".into(), ramp(20, &[20])),
    ])
}

const NORM: &str = "model.norm.weight";

impl Setting {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_checkpoint(&dir.path().join("base"), &tensors());
        let out = dir.path().join("out");
        fs::create_dir(&out).unwrap();
        Self { dir, out }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn tuned(&self, change: impl FnOnce(&mut Tensors)) -> PathBuf {
        let mut tensors = tensors();
        change(&mut tensors);
        let _ = fs::remove_dir_all(self.path("tuned"));
        write_checkpoint(&self.path("tuned"), &tensors)
    }

    fn extract(&self, base: &Path, tuned: &Path, more: &[&str]) -> Run {
        let out = self.out.join("m.safetensors");
        let paths = [base, tuned, &out].map(|p| p.to_str().unwrap().to_owned());
        let args = ["extract", "--base", &paths[0], "--tuned", &paths[1], "--out", &paths[2]];
        run(BIN, args.iter().chain(more))
    }

    /// Extracts from the base and `tuned`: exit code 3, a message with all of `parts` and the
    /// file's path, no output.
    #[track_caller]
    fn refuses(&self, tuned: &Path, file: &Path, parts: &[&str]) {
        self.extract(&self.path("base"), tuned, &[]).bad_input(&[file.to_str().unwrap()]).says(parts);
        expect_entries(&self.out, &[]);
    }
}

/// A safetensors file with this header and so many bytes of data.
fn raw(path: &Path, header: &str, data: usize) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    bytes.resize(bytes.len() + data, 0);
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_path_that_does_not_exist() {
    let s = Setting::new();
    s.refuses(&s.path("nowhere"), &s.path("nowhere"), &["no such checkpoint", "expected: a Hugging Face directory"]);
}

#[test]
fn a_truncated_shard() {
    let s = Setting::new();
    let tuned = write_sharded(&s.path("tuned"), &tensors(), 2);
    let shard = tuned.join("model-00002-of-00002.safetensors");
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() - 5]).unwrap();
    let (whole, found) = (format!("expected: {} bytes", bytes.len()), format!("found: {} bytes", bytes.len() - 5));
    s.refuses(&tuned, &shard, &["truncated", &whole, &found]);
}

#[test]
fn a_header_longer_than_its_file() {
    let s = Setting::new();
    let file = s.tuned(|_| ()).join("model.safetensors");
    fs::write(&file, [&1_000_000u64.to_le_bytes()[..], &[b' '; 92]].concat()).unwrap();
    s.refuses(&s.path("tuned"), &file, &["past the end", "expected: at most 92 bytes", "found: 1000000 bytes"]);
}

#[test]
fn offsets_that_overlap_or_leave_the_file() {
    let s = Setting::new();
    let file = s.tuned(|_| ()).join("model.safetensors");
    let header = |range: [u64; 2]| {
        json!({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
               "b": {"dtype": "F32", "shape": [2], "data_offsets": range}})
        .to_string()
    };
    raw(&file, &header([4, 12]), 12);
    s.refuses(&s.path("tuned"), &file, &["overlap", "tensor: b", "expected: contiguous tensors"]);
    raw(&file, &header([8, 16]), 12);
    let len = header([8, 16]).len();
    let (expected, found) = (format!("expected: {} bytes", len + 24), format!("found: {} bytes", len + 20));
    s.refuses(&s.path("tuned"), &file, &[&expected, &found]);
    raw(&file, &header([8, 20]), 20);
    s.refuses(&s.path("tuned"), &file, &["offsets do not fit"]);
}

#[test]
fn an_index_that_names_a_missing_shard() {
    let s = Setting::new();
    let tuned = write_sharded(&s.path("tuned"), &tensors(), 3);
    let shard = tuned.join("model-00003-of-00003.safetensors");
    fs::remove_file(&shard).unwrap();
    s.refuses(&tuned, &shard, &["is missing", "model.safetensors.index.json", NORM]);
}

#[test]
fn shapes_that_differ() {
    let s = Setting::new();
    let tuned = s.tuned(|t| drop(t.insert(NORM.into(), Tensor::f32(&[4, 5], &[0.0; 20]))));
    s.refuses(&tuned, &tuned, &["shape differs", NORM, "expected: [20]", "found: [4, 5]"]);
}

#[test]
fn a_missing_and_an_extra_tensor() {
    let s = Setting::new();
    let tuned = s.tuned(|t| drop(t.remove(NORM)));
    s.refuses(&tuned, &tuned, &["is missing", NORM]);
    let tuned = s.tuned(|t| drop(t.insert("extra".into(), Tensor::f32(&[1], &[0.0]))));
    s.refuses(&tuned, &tuned, &["does not have", "tensor: extra"]);
}

#[test]
fn a_dtype_that_is_not_floating_point() {
    let s = Setting::new();
    let integers = Tensor { dtype: Dtype::I32, shape: vec![20], bytes: vec![0; 80] };
    let tuned = s.tuned(|t| drop(t.insert(NORM.into(), integers)));
    s.refuses(&tuned, &tuned, &["not floating-point", NORM, "expected: F64, F32, F16, BF16 or F8", "found: I32"]);
}

#[test]
fn numbers_that_are_not_finite() {
    let s = Setting::new();
    for (value, text) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        let mut values = vec![0f32; 20];
        values[13] = value;
        values[17] = f32::NAN;
        let bad = s.tuned(|t| drop(t.insert(NORM.into(), Tensor::f32(&[20], &values))));
        let found = format!("found: {text}");
        s.refuses(&bad, &bad.join("model.safetensors"), &["flat index 13", NORM, "expected: finite", &found]);
        s.extract(&bad, &s.path("base"), &[]).bad_input(&["tuned/model.safetensors", "flat index 13", NORM, &found]);
        // Leaving a tensor out of D does not make a broken checkpoint a sound one.
        s.extract(&s.path("base"), &bad, &["--exclude", "norms", "--percent", "5"]).bad_input(&["flat index 13", NORM]);
        s.extract(&s.path("base"), &bad, &["--scope", "tensor", "--percent", "2.5"]).bad_input(&["flat index 13"]);
        // The same infinity on both sides is no distance of zero.
        s.extract(&bad, &bad, &[]).bad_input(&["flat index 13", NORM]);
        expect_entries(&s.out, &[]);
    }
}

#[test]
fn distances_may_overflow() {
    let s = Setting::new();
    let mut values = vec![0f32; 20];
    values[7] = f32::MAX;
    let base = write_checkpoint(&s.path("b"), &Tensors::from([("w".into(), Tensor::f32(&[20], &values))]));
    values[7] = f32::MIN;
    let tuned = write_checkpoint(&s.path("t"), &Tensors::from([("w".into(), Tensor::f32(&[20], &values))]));
    s.extract(&base, &tuned, &["--percent", "5"]).ok();
    let mask = Mask::open(&s.out.join("m.safetensors")).unwrap();
    assert_eq!(mask.bits("w").unwrap(), [1 << 7, 0, 0]);
}

#[test]
fn an_output_that_exists() {
    let s = Setting::new();
    let tuned = s.tuned(|_| ());
    let out = s.out.join("m.safetensors");
    fs::write(&out, "precious").unwrap();
    s.extract(&s.path("base"), &tuned, &[]).bad_input(&[out.to_str().unwrap(), "exists already", "--force"]);
    assert_eq!(fs::read_to_string(&out).unwrap(), "precious");
    expect_entries(&s.out, &["m.safetensors"]);
    s.extract(&s.path("base"), &tuned, &["--force"]).ok();
    Mask::open(&out).unwrap().verify().unwrap();
    expect_entries(&s.out, &["m.safetensors", "m.safetensors.cpift.json"]);
}

#[test]
fn a_pickled_checkpoint() {
    let s = Setting::new();
    let tuned = s.path("tuned");
    fs::create_dir(&tuned).unwrap();
    fs::write(tuned.join("pytorch_model.bin"), "").unwrap();
    s.refuses(&tuned, &tuned, &["expected: model.safetensors", "found: a pickled", "safe_serialization=True"]);
}

#[test]
fn nothing_to_choose() {
    let s = Setting::new();
    let tuned = s.tuned(|_| ());
    let ran = s.extract(&s.path("base"), &tuned, &["--percent", "0.5"]);
    ran.usage_error(&["--percent 0.5 chooses nothing", "100 elements", "hint"]);
    let none = Tensors::from([(NORM.to_owned(), tensors()[NORM].clone())]);
    let only_norms = write_checkpoint(&s.path("only"), &none);
    let ran = s.extract(&only_norms, &only_norms, &["--exclude", "norms"]);
    ran.bad_input(&[only_norms.to_str().unwrap(), "no parameter to choose from"]);
    expect_entries(&s.out, &[]);
}

#[test]
fn arguments_out_of_range() {
    let s = Setting::new();
    let tuned = s.tuned(|_| ());
    for percent in ["0", "100.5", "-1", "nan", "many"] {
        s.extract(&s.path("base"), &tuned, &["--percent", percent]).usage_error(&["--percent", percent]);
    }
    s.extract(&s.path("base"), &tuned, &["--exclude", "biases"]).usage_error(&["embeddings or norms"]);
    s.extract(&s.path("base"), &tuned, &["--scope", "head"]).usage_error(&["global", "layer", "tensor"]);
    s.extract(&s.path("base"), &tuned, &["--threads", "0"]).usage_error(&["--threads"]);
    expect_entries(&s.out, &[]);
}

#[test]
fn verify_finds_a_flipped_bit() {
    let s = Setting::new();
    // The first ten change most, and no two alike.
    let values: Vec<f32> = (0..20).map(|i| 100.0 - i as f32).collect();
    let tuned = s.tuned(|t| drop(t.insert(NORM.into(), Tensor::f32(&[20], &values))));
    s.extract(&s.path("base"), &tuned, &["--percent", "10"]).ok();
    let out = s.out.join("m.safetensors");
    let file = out.to_str().unwrap();
    run(BIN, ["verify", file]).ok().says(&["sound", "10 of D = 100", "matches its record"]);
    let mut bytes = fs::read(&out).unwrap();
    // The last tensor is the norm's: 20 bits in 3 bytes.
    let last = bytes.len() - 1;
    let sound = bytes[last - 1];
    bytes[last - 1] = sound.rotate_left(1);
    assert_ne!(bytes[last - 1], sound);
    fs::write(&out, &bytes).unwrap();
    run(BIN, ["verify", file]).bad_input(&[file, "m.safetensors.cpift.json records", "expected: digest"]);
    bytes[last - 1] = sound;
    bytes[last - 1] ^= 0b0001_0000;
    fs::write(&out, &bytes).unwrap();
    run(BIN, ["verify", file]).bad_input(&[file, "expected: 10", "found: 11"]);
    run(BIN, ["stats", file]).bad_input(&[file, "expected: 10", "found: 11"]);
    bytes[last - 1] ^= 0b0001_0000;
    bytes[last] ^= 0b0001_0000;
    fs::write(&out, &bytes).unwrap();
    run(BIN, ["verify", file]).bad_input(&[file, "padding", NORM]);
    let no_mask = s.path("base/model.safetensors");
    run(BIN, ["verify", no_mask.to_str().unwrap()]).bad_input(&["not a mask", "expected: a file that cpift-mask"]);
}

#[test]
fn stats_count_by_layer_and_role() {
    let s = Setting::new();
    let up = "model.layers.1.mlp.up_proj.weight";
    let far: Vec<f32> = (0..40).map(|i| i as f32 + if i < 8 { 1.0 } else { 0.0 }).collect();
    let tuned = s.tuned(|t| {
        t.insert(up.into(), Tensor::f32(&[4, 10], &far));
        let moved: Vec<f32> = (0..20).map(|i| i as f32 + if i < 2 { 2.0 } else { 0.0 }).collect();
        t.insert(NORM.into(), Tensor::f32(&[20], &moved));
    });
    s.extract(&s.path("base"), &tuned, &["--percent", "10"]).ok();
    let out = s.out.join("m.safetensors");
    let ran = run(BIN, ["stats", out.to_str().unwrap(), "--json"]).ok();
    let said: Value = serde_json::from_str(&ran.stdout).unwrap();
    let row = |name: &str, elements: u64, selected: u64| {
        let (density, share) = (selected as f64 / elements as f64, selected as f64 / 10.0);
        json!({"name": name, "elements": elements, "selected": selected, "density": density, "share": share})
    };
    assert_eq!(said["layers"], json!([row("0", 40, 0), row("1", 40, 8), row("outside", 20, 2)]));
    assert_eq!(said["roles"], json!([row("up", 80, 8), row("norm", 20, 2)]));
    let table = run(BIN, ["stats", out.to_str().unwrap()]).ok().stdout;
    let line = |name: &str| table.lines().find(|l| l.starts_with(name)).unwrap().split_whitespace().collect::<Vec<_>>();
    assert_eq!(line("1 "), ["1", "40", "8", "20.000", "%", "80.00", "%"]);
    assert_eq!(line("norm"), ["norm", "20", "2", "10.000", "%", "20.00", "%"]);
}

#[test]
fn a_bare_file_is_a_checkpoint_too() {
    let s = Setting::new();
    let file = s.path("tuned.safetensors");
    write_safetensors(&file, &tensors());
    s.extract(&s.path("base"), &file, &["--percent", "5"]).ok();
}

#[test]
fn no_libtorch_is_linked() {
    let listed = run("ldd", [BIN]).ok().stdout;
    assert!(listed.contains("libc.so"), "{listed}");
    assert!(!listed.contains("torch") && !listed.contains("libc10"), "{listed}");
}

#[test]
fn an_output_that_is_an_input_is_refused_even_with_force() {
    let s = Setting::new();
    let tuned = s.tuned(|t| drop(t.insert(NORM.into(), Tensor::f32(&[20], &[9.0; 20]))));
    s.extract(&s.path("base"), &tuned, &["--percent", "10"]).ok();
    let (weights, mask) = (s.path("base").join("model.safetensors"), s.out.join("m.safetensors"));
    let base = s.path("base");
    let [base, tuned, weights, mask] = [&base, &tuned, &weights, &mask].map(|p| p.to_str().unwrap());
    let line = ["extract", "--base", base, "--tuned", tuned, "--force", "--out"];
    run(BIN, line.iter().chain(&[weights])).usage_error(&["--out", "would replace the input"]);
    run(BIN, line.iter().chain(&[mask, "--stats", weights])).usage_error(&["--stats", "would replace the input"]);
    run(BIN, ["stats", mask, "--out", mask, "--force"]).usage_error(&["--out", "would replace the input"]);
    run(BIN, ["verify", mask]).ok();
}

#[test]
fn extract_writes_the_statistics_that_stats_would() {
    let s = Setting::new();
    let tuned = s.tuned(|t| drop(t.insert(NORM.into(), Tensor::f32(&[20], &[9.0; 20]))));
    let stats = s.out.join("density.json");
    s.extract(&s.path("base"), &tuned, &["--percent", "10", "--stats", stats.to_str().unwrap()]).ok();
    expect_entries(&s.out, &["density.json", "density.svg", "m.safetensors", "m.safetensors.cpift.json"]);
    let again = [s.path("again.json"), s.path("again.svg")].map(|p| p.to_str().unwrap().to_owned());
    let mask = s.out.join("m.safetensors");
    run(BIN, ["stats", mask.to_str().unwrap(), "--out", &again[0], "--svg", &again[1]]).ok();
    assert_eq!(fs::read_to_string(&stats).unwrap(), fs::read_to_string(&again[0]).unwrap());
    assert_eq!(fs::read_to_string(stats.with_extension("svg")).unwrap(), fs::read_to_string(&again[1]).unwrap());
    // An output that exists is refused before anything is read or written, and so is one name for
    // two outputs.
    fs::remove_file(&mask).unwrap();
    s.extract(&s.path("base"), &tuned, &["--stats", stats.to_str().unwrap()]).bad_input(&["density.json", "--force"]);
    assert!(!mask.exists());
    let run = s.extract(&s.path("base"), &tuned, &["--stats", s.out.join("x.svg").to_str().unwrap()]);
    run.usage_error(&["--stats"]);
}

#[test]
fn updates_of_a_head_that_the_base_ties_count_from_its_embedding() {
    let dir = tempfile::tempdir().unwrap();
    let config = r#"{"model_type": "llama", "tie_word_embeddings": true}"#;
    let table = |values: [f32; 4]| Tensor::f32(&[2, 2], &values);
    let embedding = ("model.embed_tokens.weight".to_owned(), table([1.0, 2.0, 3.0, 4.0]));
    let own = ("lm_head.weight".to_owned(), table([1.0, 2.0, 9.0, 4.0]));
    let (tied, untied) = (dir.path().join("tied"), dir.path().join("untied"));
    write_checkpoint(&tied, &Tensors::from([embedding.clone()]));
    write_checkpoint(&untied, &Tensors::from([embedding, own]));
    for folder in [&tied, &untied] {
        fs::write(folder.join("config.json"), config).unwrap();
    }
    for (i, (base, tuned)) in [(&tied, &untied), (&untied, &tied)].into_iter().enumerate() {
        let out = dir.path().join(format!("{i}.safetensors"));
        let args =
            ["extract", "--percent", "12.5", "--base", base.to_str().unwrap(), "--tuned", tuned.to_str().unwrap()];
        let run = run(BIN, args.into_iter().chain(["--out", out.to_str().unwrap()])).ok();
        run.says(&["lm_head.weight is the input embedding", "its updates count from the input embedding"]);
        let mask = cpift_core::Mask::open(&out).unwrap();
        assert_eq!((mask.header.d, mask.header.selected), (8, 1));
        assert_eq!(mask.bits("lm_head.weight").unwrap(), [0b100]);
        let mut opened = cpift_core::Checkpoint::open(base).unwrap();
        let digest = opened.digest().unwrap();
        assert_eq!(mask.header.base, digest, "the digest is that of the files");
        mask.check_base(&opened, &digest).unwrap();
        opened.untie();
        mask.check_base(&opened, &digest).unwrap();
    }
}
