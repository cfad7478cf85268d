//! Ties at the threshold: chosen by a hash of the tuned checkpoint, so that independent fine-tunes
//! stay independent. Through the real binary.

use std::path::{Path, PathBuf};

use crate::common::{BIN, chosen};
use cpift_core::format::flags::clear_flagged;
use cpift_core::format::mask::{count_ones, indices};
use cpift_core::{Dtype, Mask};
use cpift_testkit::{Numbers, Tensor, Tensors, run, write_checkpoint};
use tempfile::TempDir;

const LAYERS: usize = 12;
/// Elements per layer.
const N: usize = 400_000;

fn name(layer: usize) -> String {
    format!("model.layers.{layer}.mlp.up_proj.weight")
}

/// Weights of one binade, where bf16 numbers lie 2⁻¹³ apart: every update is a small multiple.
fn weights(numbers: &mut Numbers) -> f32 {
    (1.5 + 0.49 * numbers.unit()) * 2f32.powi(-6)
}

/// A base, and two fine-tunes that move each weight at random, in bf16 and in f32.
fn write(dir: &Path) -> [PathBuf; 5] {
    let mut numbers = Numbers(21);
    let base: Vec<Vec<f32>> = (0..LAYERS).map(|_| (0..N).map(|_| weights(&mut numbers)).collect()).collect();
    let bf16 = |values: &[f32]| Tensor::floats(Dtype::BF16, &[N], values);
    let base: Vec<Vec<f32>> = base.iter().map(|values| bf16(values).values()).collect();
    let tuned: Vec<Vec<Vec<f32>>> = (0..2)
        .map(|_| {
            let mut moved = |b: &f32| b + 2e-4 * numbers.unit() * numbers.unit();
            base.iter().map(|values| values.iter().map(&mut moved).collect()).collect()
        })
        .collect();
    let save = |file: &str, layers: &[Vec<f32>], dtype: Dtype| {
        let tensor = |(i, values): (usize, &Vec<f32>)| (name(i), Tensor::floats(dtype, &[N], values));
        write_checkpoint(&dir.join(file), &layers.iter().enumerate().map(tensor).collect::<Tensors>())
    };
    [
        save("base", &base, Dtype::BF16),
        save("a", &tuned[0], Dtype::BF16),
        save("b", &tuned[1], Dtype::BF16),
        save("a32", &tuned[0], Dtype::F32),
        save("b32", &tuned[1], Dtype::F32),
    ]
}

fn extract(base: &Path, tuned: &Path, out: &Path, more: &[&str]) -> Mask {
    let [base, tuned, file] = [base, tuned, out].map(|path| path.to_str().unwrap());
    run(BIN, ["extract", "--base", base, "--tuned", tuned, "--out", file, "--force"].iter().chain(more)).ok();
    let mask = Mask::open(out).unwrap();
    mask.verify().unwrap();
    mask
}

fn jaccard(a: &Mask, b: &Mask) -> f64 {
    let shared: u64 = a
        .tensors()
        .zip(b.tensors())
        .map(|((_, a), (_, b))| count_ones(&a.iter().zip(b).map(|(x, y)| x & y).collect::<Vec<u8>>()))
        .sum();
    shared as f64 / (a.header.selected + b.header.selected - shared) as f64
}

#[test]
fn independent_fine_tunes_in_bf16_overlap_as_chance_has_it() {
    let dir = TempDir::new().unwrap();
    let [base, a, b, a32, b32] = write(dir.path());
    for (percent, q) in [("1", 0.01), ("5", 0.05)] {
        let mask = |tuned: &Path, to: &str| extract(&base, tuned, &dir.path().join(to), &["--percent", percent]);
        let (half, full) = ([mask(&a, "ma"), mask(&b, "mb")], [mask(&a32, "ma32"), mask(&b32, "mb32")]);
        for mask in &half {
            let ties = mask.header.ties;
            assert!(ties.decided_by_hash * 2 > mask.header.selected, "ties decide: {ties:?}");
        }
        let chance = q / (2.0 - q);
        for found in [jaccard(&half[0], &half[1]), jaccard(&full[0], &full[1])] {
            assert!((found - chance).abs() < 0.001, "p = {percent}: {found}, chance {chance}");
        }
        // Four standard errors of the difference of two densities.
        let slack = 4.0 * (2.0 * q * (1.0 - q) / N as f64).sqrt();
        for layer in 0..LAYERS {
            let density = |mask: &Mask| count_ones(mask.bits(&name(layer)).unwrap()) as f64 / N as f64;
            for (half, full) in half.iter().zip(&full) {
                let (half, full) = (density(half), density(full));
                assert!((half - full).abs() < slack, "layer {layer}: {half}, in f32 {full}, ± {slack}");
            }
        }
    }
}

#[test]
fn the_bytes_are_the_same_at_any_number_of_threads() {
    let dir = TempDir::new().unwrap();
    let [base, a, ..] = write(dir.path());
    for percent in ["1", "5", "50"] {
        let bytes = ["1", "2", "3"].map(|threads| {
            let out = dir.path().join("m");
            extract(&base, &a, &out, &["--percent", percent, "--threads", threads]);
            std::fs::read(out).unwrap()
        });
        assert!(bytes[0] == bytes[1] && bytes[1] == bytes[2], "p = {percent}");
    }
}

#[test]
fn flags_are_set_at_the_ties_and_nowhere_else() {
    let dir = TempDir::new().unwrap();
    let [base, a, ..] = write(dir.path());
    let mask = extract(&base, &a, &dir.path().join("m"), &["--percent", "5"]);
    let values = |path: &Path| {
        let checkpoint = cpift_core::Checkpoint::open(path).unwrap();
        checkpoint
            .parameters()
            .map(|view| {
                let mut values = vec![0f32; view.numel()];
                view.read(0, &mut values);
                (view.name.to_owned(), values)
            })
            .collect::<std::collections::BTreeMap<_, _>>()
    };
    let (before, after) = (values(&base), values(&a));
    let moved = |name: &str, i: usize| (after[name][i] - before[name][i]).abs();
    let all = chosen(&mask);
    let threshold = all.iter().map(|(name, i)| moved(name, *i)).fold(f32::INFINITY, f32::min);
    let (mut at, mut left) = (0, Vec::new());
    for (name, bits) in mask.tensors() {
        let mut bits = bits.to_vec();
        at = clear_flagged(&mut bits, mask.tie_flags().unwrap(), at);
        left.extend(indices(&bits).map(|i| (name.to_owned(), i)));
    }
    assert_eq!(at, mask.header.selected);
    let expected: Vec<_> = all.iter().filter(|(name, i)| moved(name, *i) > threshold).cloned().collect();
    assert!(left == expected, "{} without flags, {} above the threshold", left.len(), expected.len());
}

#[test]
fn a_mask_whose_threshold_no_two_elements_share_has_no_flags() {
    let dir = TempDir::new().unwrap();
    let tensors = |values: &[f32]| Tensors::from([("w".to_owned(), Tensor::f32(&[8], values))]);
    let base = write_checkpoint(&dir.path().join("base"), &tensors(&[0.0; 8]));
    let tuned = write_checkpoint(&dir.path().join("tuned"), &tensors(&[1.0, 2.0, 2.0, 3.0, 0.0, 0.5, 4.0, 0.0]));
    let mask = |percent: &str| extract(&base, &tuned, &dir.path().join("m"), &["--percent", percent]);
    // The two ties are both chosen at 50 %, one of them at 37.5 %.
    assert_eq!(mask("50").tie_flags(), None);
    assert_eq!(mask("37.5").tie_flags().map(count_ones), Some(1));
    assert_eq!(mask("25").tie_flags(), None);
}

#[test]
fn the_choice_among_equals_follows_the_content_of_the_tuned_checkpoint() {
    let dir = TempDir::new().unwrap();
    let tensors = |value: f32| Tensors::from([("w".to_owned(), Tensor::f32(&[50_000], &[value; 50_000]))]);
    let base = write_checkpoint(&dir.path().join("base"), &tensors(0.0));
    let mask = |value: f32, folder: &str| {
        let tuned = write_checkpoint(&dir.path().join(folder), &tensors(value));
        chosen(&extract(&base, &tuned, &dir.path().join(format!("{folder}.mask")), &["--percent", "10"]))
    };
    let (one, again, other) = (mask(1.0, "one"), mask(1.0, "again"), mask(2.0, "other"));
    assert!(one == again, "a path must not matter");
    let shared = one.iter().filter(|e| other.contains(e)).count() as f64;
    // Of 5,000, a tenth: a standard deviation is 20.
    assert!((shared - 500.0).abs() < 100.0, "{shared}");
}
