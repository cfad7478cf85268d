//! `cpift-mask random`: its counts, its seed, and how evenly it draws, through the real binary.

use std::path::PathBuf;

use crate::common::{BIN, chosen, model, record};
use cpift_core::format::digest::Digest;
use cpift_core::format::mask::{FORMAT_VERSION, MaskHeader, MaskWriter, Metric, Scope, Ties, count_ones};
use cpift_core::format::names::TensorKind;
use cpift_core::{Dtype, Mask};
use cpift_testkit::{Numbers, Run, expect_entries, run, write_checkpoint};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A mask that `extract` made.
struct Setting {
    dir: TempDir,
    like: PathBuf,
}

impl Setting {
    fn new(more: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut numbers = Numbers(1);
        let [base, tuned] = ["base", "tuned"]
            .map(|name| write_checkpoint(&dir.path().join(name), &model(&[Dtype::F32], || numbers.unit())));
        let like = dir.path().join("like.safetensors");
        let paths = [&base, &tuned, &like].map(|p| p.to_str().unwrap());
        let line = ["extract", "--base", paths[0], "--tuned", paths[1], "--out", paths[2]];
        run(BIN, line.iter().chain(more)).ok();
        std::fs::create_dir(dir.path().join("out")).unwrap();
        Self { dir, like }
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("out/m.safetensors")
    }

    fn run(&self, more: &[&str]) -> Run {
        let out = self.out();
        let line = ["random", "--like", self.like.to_str().unwrap(), "--out", out.to_str().unwrap(), "--json"];
        run(BIN, line.iter().chain(more))
    }

    fn mask(&self, more: &[&str]) -> Mask {
        self.run(&[more, &["--force"]].concat()).ok();
        run(BIN, ["verify", self.out().to_str().unwrap()]).ok().says(&["sound", "matches its record"]);
        run(BIN, ["stats", self.out().to_str().unwrap()]).ok();
        Mask::open(&self.out()).unwrap()
    }
}

fn counts(mask: &Mask) -> Vec<u64> {
    mask.tensors().map(|(_, bits)| count_ones(bits)).collect()
}

#[test]
fn as_many_elements_as_the_mask_in_all_or_in_each_tensor() {
    for percent in ["0.01", "3", "60", "100"] {
        let s = Setting::new(&["--percent", percent, "--exclude", "norms"]);
        let like = Mask::open(&s.like).unwrap();
        let [all, each] = [s.mask(&["--seed", "3"]), s.mask(&["--seed", "3", "--per-tensor"])];
        assert_eq!(counts(&all).iter().sum::<u64>(), like.header.selected);
        assert_eq!(counts(&each), counts(&like));
        for (mask, scope) in [(&all, Scope::Global), (&each, Scope::Tensor)] {
            for (name, bits) in mask.tensors().filter(|(name, _)| TensorKind::Norms.matches(name)) {
                assert_eq!(count_ones(bits), 0, "{name}");
            }
            let expected = MaskHeader {
                scope,
                metric: Metric::Random,
                seed: Some(3),
                rule: None,
                ties: Ties::default(),
                ..like.header.clone()
            };
            assert_eq!(mask.header, expected);
        }
        if percent != "100" {
            assert_ne!(chosen(&all), chosen(&like));
            assert_ne!(chosen(&each), chosen(&like));
        }
    }
}

#[test]
fn every_element_of_d_is_as_likely() {
    let s = Setting::new(&["--percent", "20", "--exclude", "norms"]);
    let like = Mask::open(&s.like).unwrap();
    let (mut shares, rounds) = (vec![0f64; like.header.numel.len()], 20);
    let mut pairs = 0f64;
    for seed in 0..rounds {
        let mask = s.mask(&["--seed", &seed.to_string()]);
        shares.iter_mut().zip(counts(&mask)).for_each(|(sum, n)| *sum += n as f64);
        let (a, b) = (chosen(&mask), chosen(&like));
        pairs += a.iter().filter(|e| b.binary_search(e).is_ok()).count() as f64;
    }
    for ((name, n), sum) in like.header.numel.iter().zip(&shares).filter(|((n, _), _)| !TensorKind::Norms.matches(n)) {
        let (expected, error) = (0.2 * (n * rounds) as f64, (0.2 * 0.8 * (n * rounds) as f64).sqrt());
        assert!((sum - expected).abs() < 4.5 * error, "{name}: {sum} of {expected} ± {error}");
    }
    // What it shares with the mask is what chance gives: 20 % of it.
    let (n, k) = ((like.header.d * rounds) as f64, (like.header.selected * rounds) as f64);
    assert!((pairs - k * k / n).abs() < 4.5 * (0.04 * 0.96 * n).sqrt(), "{pairs} of {}", k * k / n);
}

#[test]
fn the_seed_alone_decides() {
    let s = Setting::new(&["--percent", "5"]);
    let bytes = |more: &[&str]| {
        s.mask(more);
        std::fs::read(s.out()).unwrap()
    };
    for each in [&[][..], &["--per-tensor"]] {
        let run = |seed: &str, threads: &str| bytes(&[&["--seed", seed, "--threads", threads], each].concat());
        let first = run("7", "1");
        assert!(["1", "2", "8"].iter().all(|threads| run("7", threads) == first));
        assert!(run("8", "1") != first);
    }
    assert!(bytes(&[]) == bytes(&["--seed", "0"]));
    // The draws are part of the format of a run: another generator would give other controls under
    // the same seed.
    let digest = |mask: &Mask| chosen(mask).iter().take(3).map(|(_, i)| *i).collect::<Vec<_>>();
    assert_eq!(digest(&s.mask(&["--seed", "7"])), FIRST);
}

/// The first three elements that seed 7 draws.
const FIRST: [usize; 3] = [5, 17, 40];

#[test]
fn header_and_record_name_seed_and_source() {
    let s = Setting::new(&[]);
    let ran = s.run(&["--seed", "11"]).ok().says(&["at random, seed 11", "as many as"]);
    let said: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((&said["metric"], &said["seed"], &said["scope"]), (&"random".into(), &11.into(), &"global".into()));
    let header = serde_json::to_value(&Mask::open(&s.out()).unwrap().header).unwrap();
    assert_eq!((&header["metric"], &header["seed"]), (&"random".into(), &11.into()));
    let record = record(&s.out());
    assert_eq!(record["seed"], 11);
    let (input, digest) = (&record["inputs"]["like"], Digest::of_file(&s.like).unwrap());
    assert_eq!(record["inputs"].as_object().unwrap().len(), 1);
    assert_eq!((&input["path"], &input["digest"]), (&json!(s.like), &json!(digest)));
    // A mask of whole tensors has a control too.
    let (base, tuned) = (s.dir.path().join("base"), s.dir.path().join("tuned"));
    let whole = s.dir.path().join("whole.safetensors");
    let [base, tuned, whole] = [&base, &tuned, &whole].map(|p| p.to_str().unwrap());
    run(BIN, ["tensors", "--base", base, "--tuned", tuned, "--out", whole]).ok();
    let out = s.dir.path().join("out/w.safetensors");
    run(BIN, ["random", "--like", whole, "--out", out.to_str().unwrap()]).ok();
    let [like, mask] = [whole, out.to_str().unwrap()].map(|p| Mask::open(p.as_ref()).unwrap());
    mask.verify().unwrap();
    assert_eq!(mask.header.selected, like.header.selected);
}

#[test]
fn masks_that_cannot_be_followed() {
    let s = Setting::new(&[]);
    let sound = std::fs::read(&s.like).unwrap();
    let like = s.like.to_str().unwrap();
    s.run(&["--seed", "seven"]).usage_error(&["--seed"]);
    run(BIN, ["random", "--like", like, "--out", like, "--force"]).usage_error(&["--out", "would replace the input"]);
    std::fs::write(s.out(), "precious").unwrap();
    s.run(&[]).bad_input(&["exists already", "--force"]);
    assert_eq!(std::fs::read_to_string(s.out()).unwrap(), "precious");
    std::fs::remove_file(s.out()).unwrap();
    let mut bytes = sound.clone();
    // The last tensor is a scalar: its bit is the lowest, the others are padding.
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&s.like, &bytes).unwrap();
    s.run(&[]).bad_input(&[like, "the number of bits set is not the one recorded"]);
    std::fs::write(&s.like, &sound[..sound.len() - 1]).unwrap();
    s.run(&[]).bad_input(&[like, "truncated"]);
    // A header that contradicts its bits.
    let write = |excluded: &[&str], d: u64| {
        let digest = Digest::blank();
        let header = MaskHeader {
            format_version: FORMAT_VERSION,
            percent: 1.0,
            scope: Scope::Global,
            metric: Metric::Magnitude,
            seed: None,
            rule: None,
            d,
            selected: 1,
            ties: Ties::default(),
            excluded: excluded.iter().map(ToString::to_string).collect(),
            base: digest.clone(),
            tuned: digest,
            numel: [("model.norm.weight".to_owned(), 4), ("w".to_owned(), 9)].into(),
        };
        std::fs::remove_file(&s.like).unwrap();
        MaskWriter::create(&s.like, &header).unwrap().write("model.norm.weight", 0, &[2]).unwrap();
    };
    write(&["norms"], 9);
    s.run(&[]).bad_input(&[like, "excluded from D", "tensor: model.norm.weight"]);
    write(&[], 12);
    s.run(&[]).bad_input(&[like, "expected: 12", "found: 13"]);
    write(&["biases"], 13);
    s.run(&[]).bad_input(&[like, "unknown kind", "biases"]);
    expect_entries(s.out().parent().unwrap(), &[]);
    write(&[], 13);
    s.run(&[]).ok();
}
