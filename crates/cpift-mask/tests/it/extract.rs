//! `cpift-mask extract` against a brute-force sort, through the real binary.

use std::path::Path;

use crate::common::{BIN, chosen, digest, model, sort_as_chosen};
use cpift_core::format::digest::Digest;
use cpift_core::format::mask::{Metric, Scope};
use cpift_core::format::names::layer;
use cpift_core::{Dtype, Mask};
use cpift_testkit::{Numbers, Tensor, Tensors, run, write_checkpoint, write_sharded};
use serde_json::Value;

/// Every element as (part, score, name, index), by the rules of the format's documentation.
fn ranked(base: &Tensors, tuned: &Tensors, scope: Scope, metric: Metric) -> Vec<(String, f64, String, usize)> {
    let wide = base.values().chain(tuned.values()).any(|t| t.dtype == Dtype::F64);
    let mut all = Vec::new();
    for (name, before) in base {
        let part = match scope {
            Scope::Global | Scope::Whole => String::new(),
            Scope::Layer => layer(name).map_or(String::new(), |(prefix, _)| prefix.to_owned()),
            Scope::Tensor => name.clone(),
        };
        for (i, (b, t)) in before.numbers().into_iter().zip(tuned[name].numbers()).enumerate() {
            let score = match (metric, wide) {
                (Metric::Magnitude, true) => (t - b).abs(),
                (Metric::Magnitude, false) => f64::from((t as f32 - b as f32).abs()),
                (Metric::Relative, true) => (t - b).abs() / (b.abs() + 1e-8),
                (Metric::Relative, false) => f64::from((t as f32 - b as f32).abs() / ((b as f32).abs() + 1e-8)),
                (other, _) => panic!("{other:?} has tests of its own"),
            };
            all.push((part.clone(), score, name.clone(), i));
        }
    }
    all
}

/// The elements a full sort chooses; `per_mille` is ten times p.
fn brute_force(
    base: &Tensors,
    tuned: &Tensors,
    digest: &Digest,
    (scope, metric): (Scope, Metric),
    per_mille: usize,
) -> Vec<(String, usize)> {
    let all = ranked(base, tuned, scope, metric);
    let mut parts: Vec<&String> = all.iter().map(|e| &e.0).collect();
    parts.sort();
    parts.dedup();
    let mut chosen = Vec::new();
    for part in parts {
        let here = all.iter().filter(|e| e.0 == *part);
        let mut list: Vec<_> = here.map(|(_, score, name, i)| (*score, name.as_str(), *i)).collect();
        sort_as_chosen(&mut list, digest);
        let k = list.len() * per_mille / 1000;
        chosen.extend(list[..k].iter().map(|(_, name, i)| ((*name).to_owned(), *i)));
    }
    chosen.sort();
    chosen
}

fn extract(base: &Path, tuned: &Path, out: &Path, more: &[&str]) -> Value {
    let mut args = vec!["extract", "--base", base.to_str().unwrap(), "--tuned", tuned.to_str().unwrap()];
    args.extend(["--out", out.to_str().unwrap(), "--json"]);
    args.extend(more);
    serde_json::from_str(&run(BIN, args).ok().stdout).unwrap()
}

fn check(base: &Tensors, tuned: &Tensors) {
    check_metric(base, tuned, Metric::Magnitude, "magnitude");
}

/// Extracts in every scope at several p and compares with the sort, and the bytes at 1, 2 and 8
/// threads.
fn check_metric(base: &Tensors, tuned: &Tensors, metric: Metric, score: &str) {
    let dir = tempfile::tempdir().unwrap();
    let b = write_checkpoint(&dir.path().join("base"), base);
    let t = write_sharded(&dir.path().join("tuned"), tuned, 3);
    let tuned_digest = digest(&t);
    for (scope, name) in [(Scope::Global, "global"), (Scope::Layer, "layer"), (Scope::Tensor, "tensor")] {
        for (percent, per_mille) in [("0.1", 1), ("1", 10), ("33.3", 333), ("100", 1000)] {
            let expected = brute_force(base, tuned, &tuned_digest, (scope, metric), per_mille);
            let mut bytes = Vec::new();
            for threads in ["1", "2", "8"] {
                let out = dir.path().join(format!("{name}-{percent}-{threads}.safetensors"));
                let said = extract(
                    &b,
                    &t,
                    &out,
                    &["--scope", name, "--percent", percent, "--threads", threads, "--score", score],
                );
                assert_eq!(said["selected"], expected.len());
                bytes.push(std::fs::read(&out).unwrap());
                let mask = Mask::open(&out).unwrap();
                mask.verify().unwrap();
                assert!(chosen(&mask) == expected, "{name} {percent} differs from the sort");
            }
            assert!(bytes[0] == bytes[1] && bytes[1] == bytes[2], "{name} {percent} depends on the threads");
        }
    }
}

#[test]
fn random_distances_are_chosen_as_a_sort_chooses() {
    let mut numbers = Numbers(1);
    let base = model(&[Dtype::F32], || numbers.unit());
    check(&base, &model(&[Dtype::F32], || numbers.unit()));
}

#[test]
fn mixed_dtypes_are_chosen_as_a_sort_chooses() {
    let mut numbers = Numbers(2);
    let base = model(&[Dtype::F32, Dtype::BF16, Dtype::F16], || numbers.unit());
    check(&base, &model(&[Dtype::BF16, Dtype::F32], || numbers.unit()));
    let base = model(&[Dtype::F64, Dtype::BF16, Dtype::F16, Dtype::F32], || numbers.unit());
    check(&base, &model(&[Dtype::BF16, Dtype::F32, Dtype::F64], || numbers.unit()));
}

#[test]
fn relative_scores_are_chosen_as_a_sort_chooses() {
    let mut numbers = Numbers(6);
    let mut base = || if numbers.bits().is_multiple_of(5) { 0.0 } else { numbers.unit() };
    let base = model(&[Dtype::F32, Dtype::BF16], &mut base);
    let mut numbers = Numbers(7);
    check_metric(&base, &model(&[Dtype::F32], || numbers.unit()), Metric::Relative, "relative");
    check_metric(&base, &model(&[Dtype::F32, Dtype::F64], || numbers.unit()), Metric::Relative, "relative");
}

#[test]
fn equal_distances_are_chosen_by_hash() {
    let zero = model(&[Dtype::F32], || 0.0);
    check(&zero, &model(&[Dtype::F32], || 0.5));
    check(&zero, &zero);
}

#[test]
fn a_few_distinct_distances_are_chosen_as_a_sort_chooses() {
    let mut numbers = Numbers(3);
    let zero = model(&[Dtype::F32], || 0.0);
    check(&zero, &model(&[Dtype::BF16], || (numbers.bits() % 4) as f32 * 0.25 - 0.5));
}

#[test]
fn doubles_are_compared_as_doubles() {
    let dir = tempfile::tempdir().unwrap();
    // 1 + i·2⁻⁵⁰ are one and the same number in f32.
    let doubles = |f: &dyn Fn(u64) -> f64| {
        let bytes = (0..100).flat_map(|i| f(i).to_le_bytes()).collect();
        Tensors::from([("w".to_owned(), Tensor { dtype: Dtype::F64, shape: vec![100], bytes })])
    };
    let base = write_checkpoint(&dir.path().join("base"), &doubles(&|_| 1.0));
    let tuned =
        write_checkpoint(&dir.path().join("tuned"), &doubles(&|i| 1.0 + ((i * 37 % 100) as f64) * 2f64.powi(-50)));
    let out = dir.path().join("m");
    let said = extract(&base, &tuned, &out, &["--percent", "2"]);
    assert_eq!(said["ties"], serde_json::json!({"at_threshold": 1, "chosen": 1, "decided_by_hash": 0}));
    // 37 · 27 mod 100 = 99, 37 · 54 mod 100 = 98.
    assert_eq!(chosen(&Mask::open(&out).unwrap()), [("w".to_owned(), 27), ("w".to_owned(), 54)]);
}

#[test]
fn the_bits_lie_little_end_first() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = |values: &[f32]| Tensors::from([("w".to_owned(), Tensor::f32(&[10], values))]);
    let base = write_checkpoint(&dir.path().join("base"), &tensors(&[0.0; 10]));
    let tuned = tensors(&[9.0, 0.0, -8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 7.0]);
    let tuned = write_checkpoint(&dir.path().join("tuned"), &tuned);
    let out = dir.path().join("m");
    extract(&base, &tuned, &out, &["--percent", "30"]);
    assert_eq!(Mask::open(&out).unwrap().bits("w").unwrap(), [0b0000_0101, 0b0000_0010]);
}

#[test]
fn ties_are_reported_and_warned_of() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = |values: &[f32]| Tensors::from([("w".to_owned(), Tensor::f32(&[100], values))]);
    let mut values = [0f32; 100];
    values[90] = 3.0;
    values[40..60].fill(1.0);
    let base = write_checkpoint(&dir.path().join("base"), &tensors(&[0.0; 100]));
    let tuned = write_checkpoint(&dir.path().join("tuned"), &tensors(&values));
    let out = dir.path().join("m");
    let args = ["extract", "--percent", "5", "--base", base.to_str().unwrap(), "--tuned", tuned.to_str().unwrap()];
    let args = [&args[..], &["--out", out.to_str().unwrap(), "--json"]].concat();
    let ran = run(BIN, &args).ok().says(&["warn: ", "4 of the 5 chosen", "by a hash alone", "bf16"]);
    let said: Value = serde_json::from_str(&ran.stdout).unwrap();
    let ties = serde_json::json!({"at_threshold": 20, "chosen": 4, "decided_by_hash": 4});
    assert_eq!(said["ties"], ties);
    let mask = Mask::open(&out).unwrap();
    assert_eq!(serde_json::to_value(mask.header.ties).unwrap(), ties);
    let mut tied: Vec<_> = (40..60).map(|i| (1.0, "w", i)).collect();
    sort_as_chosen(&mut tied, &mask.header.tuned);
    let mut expected: Vec<usize> = tied[..4].iter().map(|e| e.2).chain([90]).collect();
    expected.sort_unstable();
    assert_eq!(chosen(&mask).iter().map(|c| c.1).collect::<Vec<_>>(), expected);
    // One flag per chosen element: the four ties, and the element above them.
    assert_eq!(mask.tie_flags(), Some(&[0b0000_1111][..]));
    let args: Vec<&str> =
        args.into_iter().map(|a| if a == base.to_str().unwrap() { tuned.to_str().unwrap() } else { a }).collect();
    run(BIN, [&args[..], &["--force"]].concat()).ok().says(&["warn: ", "no parameter changed", "by a hash alone"]);
}

#[test]
fn what_is_no_parameter_or_excluded_is_left_out_of_d() {
    let dir = tempfile::tempdir().unwrap();
    let mut numbers = Numbers(4);
    let mut base = model(&[Dtype::F32], || numbers.unit());
    let mut tuned = model(&[Dtype::F32], || numbers.unit());
    let d: usize = base
        .iter()
        .filter(|(n, _)| !n.contains("embed") && !n.contains("head") && !n.contains("norm"))
        .map(|(_, t)| t.values().len())
        .sum();
    for tensors in [&mut base, &mut tuned] {
        let positions = Tensor { dtype: Dtype::I64, shape: vec![1], bytes: vec![0; 8] };
        tensors.insert("model.position_ids".into(), positions);
        tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), Tensor::f32(&[1], &[1.0]));
    }
    let base = write_checkpoint(&dir.path().join("base"), &base);
    let tuned = write_checkpoint(&dir.path().join("tuned"), &tuned);
    let out = dir.path().join("m");
    let said = extract(&base, &tuned, &out, &["--percent", "50", "--exclude", "norms,embeddings"]);
    assert_eq!((&said["D"], &said["selected"]), (&d.into(), &(d / 2).into()));
    assert_eq!(said["not_parameters"]["model.position_ids"], "not floating-point");
    assert_eq!(said["not_parameters"]["model.layers.0.self_attn.rotary_emb.inv_freq"], "a buffer");
    let mask = Mask::open(&out).unwrap();
    assert_eq!(mask.header.excluded, ["embeddings", "norms"]);
    assert!(mask.bits("model.position_ids").is_none());
    assert!(mask.bits("model.norm.weight").unwrap().iter().all(|b| *b == 0));
    assert!(mask.bits("lm_head.weight").unwrap().iter().all(|b| *b == 0));
}

#[test]
fn provenance_names_inputs_and_arguments() {
    let dir = tempfile::tempdir().unwrap();
    let mut numbers = Numbers(5);
    let base = write_checkpoint(&dir.path().join("base"), &model(&[Dtype::F32], || numbers.unit()));
    let tuned = write_checkpoint(&dir.path().join("tuned"), &model(&[Dtype::F32], || numbers.unit()));
    let out = dir.path().join("m.safetensors");
    extract(&base, &tuned, &out, &[]);
    let text = std::fs::read_to_string(dir.path().join("m.safetensors.cpift.json")).unwrap();
    let record: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(record["stage"], "cpift-mask");
    assert_eq!(record["inputs"]["tuned"]["path"], tuned.to_str().unwrap());
    let header = Mask::open(&out).unwrap().header;
    assert_eq!(record["inputs"]["base"]["digest"], serde_json::to_value(&header.base).unwrap());
    assert_ne!(header.base, header.tuned);
}
