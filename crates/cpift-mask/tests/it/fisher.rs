//! `extract --score fisher` and `--score blend` against a brute-force sort, and on squared
//! gradients that cannot be used, through the real binary.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::common::{BIN, chosen, digest, model, record, sort_as_chosen};
use cpift_core::format::digest::Digest;
use cpift_core::format::mask::{Metric, Scope};
use cpift_core::format::names::layer;
use cpift_core::{Checkpoint, Dtype, Mask};
use cpift_testkit::{
    Numbers, Run, Tensor, Tensors, expect_entries, run, write_checkpoint, write_safetensors, write_sharded,
};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Base, probe and squared gradients in a folder.
struct Setting {
    dir: TempDir,
    inputs: [PathBuf; 3],
}

impl Setting {
    fn new(base: &Tensors, tuned: &Tensors, fisher: &Tensors) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = write_checkpoint(&dir.path().join("base"), base);
        let tuned = write_sharded(&dir.path().join("tuned"), tuned, 3);
        let file = dir.path().join("fisher.safetensors");
        write_safetensors(&file, fisher);
        std::fs::create_dir(dir.path().join("out")).unwrap();
        Self { dir, inputs: [base, tuned, file] }
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("out/m.safetensors")
    }

    fn run(&self, score: &str, more: &[&str]) -> Run {
        let [base, tuned, fisher] = self.inputs.each_ref().map(|p| p.to_str().unwrap());
        let out = self.out();
        let line = ["extract", "--base", base, "--tuned", tuned, "--fisher", fisher, "--score", score, "--json"];
        run(BIN, line.iter().chain(&["--out", out.to_str().unwrap()]).chain(more))
    }

    fn mask(&self, score: &str, more: &[&str]) -> (Mask, Value) {
        let ran = self.run(score, &[more, &["--force"]].concat()).ok();
        let mask = Mask::open(&self.out()).unwrap();
        mask.verify().unwrap();
        (mask, serde_json::from_str(&ran.stdout).unwrap())
    }
}

/// (x − min) / (max − min), in f32 or f64; 0 where all are equal.
fn minmax(values: &[f64], wide: bool) -> Vec<f64> {
    let (low, high) = (values.iter().copied().fold(f64::MAX, f64::min), values.iter().copied().fold(0.0, f64::max));
    let scaled = |x: f64| match (high > low, wide) {
        (false, _) => 0.0,
        (true, true) => (x - low) / (high - low),
        (true, false) => f64::from((x as f32 - low as f32) / (high as f32 - low as f32)),
    };
    values.iter().map(|x| scaled(*x)).collect()
}

/// The elements a full sort chooses among those of `names`.
fn brute_force(
    [base, tuned, fisher]: [&Tensors; 3],
    digest: &Digest,
    (scope, metric): (Scope, Metric),
    per_mille: usize,
) -> Vec<(String, usize)> {
    let wide = [base, tuned, fisher].iter().any(|c| c.values().any(|t| t.dtype == Dtype::F64));
    // Name, index, |Δ|, F of every element by part.
    let mut parts: BTreeMap<String, Vec<(&str, usize, f64, f64)>> = BTreeMap::new();
    for (name, before) in base {
        let part = match scope {
            Scope::Layer => layer(name).map_or("", |(prefix, _)| prefix),
            Scope::Tensor => name,
            _ => "",
        };
        let list = parts.entry(part.to_owned()).or_default();
        let (after, squares) = (tuned[name].numbers(), fisher[name].numbers());
        for (i, ((b, t), f)) in before.numbers().into_iter().zip(after).zip(squares).enumerate() {
            let moved = if wide { (t - b).abs() } else { f64::from((t as f32 - b as f32).abs()) };
            list.push((name, i, moved, f));
        }
    }
    let mut chosen = Vec::new();
    for part in parts.values() {
        let moved = minmax(&part.iter().map(|e| e.2).collect::<Vec<_>>(), wide);
        let felt = minmax(&part.iter().map(|e| e.3).collect::<Vec<_>>(), wide);
        let score = |i: usize| match (metric, wide) {
            (Metric::Fisher, _) => part[i].3 + 0.0,
            (_, true) => 0.5 * moved[i] + 0.5 * felt[i],
            (_, false) => f64::from(0.5 * moved[i] as f32 + 0.5 * felt[i] as f32),
        };
        let mut order: Vec<_> = (0..part.len()).map(|i| (score(i), part[i].0, part[i].1)).collect();
        sort_as_chosen(&mut order, digest);
        chosen.extend(order[..part.len() * per_mille / 1000].iter().map(|e| (e.1.to_owned(), e.2)));
    }
    chosen.sort();
    chosen
}

const METRICS: [(Metric, &str); 2] = [(Metric::Fisher, "fisher"), (Metric::Blend, "blend")];

/// Both scores in every scope at several p against the sort, and the bytes at 1, 2 and 8 threads.
fn check(base: &Tensors, tuned: &Tensors, fisher: &Tensors) {
    let s = Setting::new(base, tuned, fisher);
    let tuned_digest = digest(&s.inputs[1]);
    for ((metric, score), (scope, name)) in METRICS
        .into_iter()
        .flat_map(|m| [(Scope::Global, "global"), (Scope::Layer, "layer"), (Scope::Tensor, "tensor")].map(|s| (m, s)))
    {
        for (percent, per_mille) in [("0.1", 1), ("1", 10), ("33.3", 333), ("100", 1000)] {
            let expected = brute_force([base, tuned, fisher], &tuned_digest, (scope, metric), per_mille);
            let mut bytes = Vec::new();
            for threads in ["1", "2", "8"] {
                let (mask, said) = s.mask(score, &["--scope", name, "--percent", percent, "--threads", threads]);
                assert_eq!((&said["selected"], &said["metric"]), (&expected.len().into(), &score.into()));
                assert_eq!((mask.header.metric, mask.header.scope), (metric, scope));
                assert!(chosen(&mask) == expected, "{score} {name} {percent} differs from the sort");
                bytes.push(std::fs::read(s.out()).unwrap());
            }
            assert!(bytes[0] == bytes[1] && bytes[1] == bytes[2], "{score} {name} {percent} depends on the threads");
        }
    }
}

fn units(seed: u64, dtypes: &[Dtype]) -> Tensors {
    let mut numbers = Numbers(seed);
    model(dtypes, || numbers.unit())
}

#[test]
fn random_squares_are_chosen_as_a_sort_chooses() {
    let mut numbers = Numbers(3);
    let fisher = model(&[Dtype::F32], || numbers.unit().powi(4) * 1e-6);
    check(&units(1, &[Dtype::F32]), &units(2, &[Dtype::BF16, Dtype::F32]), &fisher);
}

#[test]
fn doubles_are_scaled_as_doubles() {
    let mut numbers = Numbers(6);
    let fisher = model(&[Dtype::F32, Dtype::F64], || numbers.unit().powi(2));
    check(&units(4, &[Dtype::F64, Dtype::F32]), &units(5, &[Dtype::F32]), &fisher);
}

#[test]
fn doubles_that_are_one_number_in_f32_are_told_apart() {
    // 1 + i·2⁻⁵⁰ are one and the same number in f32.
    let near = |i: usize| 1.0 + ((i * 37 % 100) as f64) * 2f64.powi(-50);
    let tensors = |dtype, value: &dyn Fn(usize) -> f64| {
        let values: Vec<f64> = (0..100).map(value).collect();
        Tensors::from([("w".to_owned(), Tensor::of_numbers(dtype, &[100], &values))])
    };
    let (ones, doubles) = (tensors(Dtype::F32, &|_| 1.0), tensors(Dtype::F64, &near));
    let s = Setting::new(&ones, &ones, &doubles);
    let t = Setting::new(&ones, &doubles, &ones);
    for (s, score) in [(&s, "fisher"), (&s, "blend"), (&t, "blend")] {
        let (mask, said) = s.mask(score, &["--percent", "2"]);
        // 37 · 27 mod 100 = 99, 37 · 54 mod 100 = 98.
        assert_eq!(chosen(&mask), [("w".to_owned(), 27), ("w".to_owned(), 54)], "{score}");
        assert_eq!(said["ties"]["at_threshold"], 1);
    }
}

#[test]
fn equal_squares_are_chosen_by_hash() {
    let mut numbers = Numbers(7);
    // Mostly zeros of both signs, which are one score.
    let fisher = model(&[Dtype::F32], || match numbers.bits() % 40 {
        0 => 2.0,
        1..20 => 0.0,
        _ => -0.0,
    });
    let still = units(8, &[Dtype::F32]);
    check(&still, &still, &fisher);
}

#[test]
fn what_is_constant_counts_nothing() {
    let (base, tuned) = (units(1, &[Dtype::F32]), units(2, &[Dtype::F32]));
    let constant = model(&[Dtype::F32], || 0.75);
    let blend = chosen(&Setting::new(&base, &tuned, &constant).mask("blend", &[]).0);
    let s = Setting::new(&base, &tuned, &constant);
    let [b, t, _] = s.inputs.each_ref().map(|p| p.to_str().unwrap());
    run(BIN, ["extract", "--base", b, "--tuned", t, "--out", s.out().to_str().unwrap()]).ok();
    // Only the distances differ, and scaling keeps their order where it does not make two of them
    // equal.
    assert_eq!(blend, chosen(&Mask::open(&s.out()).unwrap()));
    check(&base, &base, &constant);
    s.run("fisher", &["--force"]).ok().says(&[
        "warn: ",
        "1055 of the 1055 chosen",
        "by a hash alone",
        "smaller --percent",
    ]);
    let nothing = Setting::new(&base, &tuned, &model(&[Dtype::F32], || 0.0));
    nothing.run("fisher", &[]).ok().says(&["warn: ", "no parameter has a gradient", "check that --fisher"]);
}

#[test]
fn excluded_tensors_neither_compete_nor_set_the_scale() {
    let base = units(1, &[Dtype::F32]);
    let mut numbers = Numbers(3);
    let (mut tuned, mut fisher) = (units(2, &[Dtype::F32]), model(&[Dtype::F32], || numbers.unit().powi(2)));
    for name in ["lm_head.weight", "model.norm.weight"] {
        for tensors in [&mut tuned, &mut fisher] {
            let shape = tensors[name].shape.clone();
            let values = vec![1e6; shape.iter().product()];
            tensors.insert(name.into(), Tensor::f32(&shape, &values));
        }
    }
    let s = Setting::new(&base, &tuned, &fisher);
    let left = |tensors: &Tensors| -> Tensors {
        let out = ["lm_head", "embed_tokens", "norm"];
        tensors
            .iter()
            .filter(|(n, _)| !out.iter().any(|o| n.contains(o)))
            .map(|(n, t)| (n.clone(), t.clone()))
            .collect()
    };
    let inner = [left(&base), left(&tuned), left(&fisher)];
    for (metric, score) in METRICS {
        let (mask, _) = s.mask(score, &["--exclude", "norms,embeddings", "--percent", "5"]);
        assert_eq!(
            chosen(&mask),
            brute_force(inner.each_ref(), &mask.header.tuned, (Scope::Global, metric), 50),
            "{score}"
        );
    }
}

#[test]
fn provenance_names_the_squares_with_their_digest() {
    let (base, tuned) = (units(1, &[Dtype::F32]), units(2, &[Dtype::F32]));
    let s = Setting::new(&base, &tuned, &model(&[Dtype::F32], || 0.5));
    let (mask, _) = s.mask("fisher", &[]);
    let record = record(&s.out());
    for (role, path, digest) in [
        ("base", &s.inputs[0], Some(&mask.header.base)),
        ("tuned", &s.inputs[1], Some(&mask.header.tuned)),
        ("fisher", &s.inputs[2], None),
    ] {
        let expected = Checkpoint::open(path).unwrap().digest().unwrap();
        let input = &record["inputs"][role];
        assert_eq!((&input["path"], &input["digest"]), (&json!(path), &json!(expected)), "{role}");
        assert!(digest.is_none_or(|d| *d == expected), "{role}");
    }
}

#[test]
fn squares_that_are_none_are_refused() {
    let (base, tuned) = (units(1, &[Dtype::F32]), units(2, &[Dtype::F32]));
    let good = model(&[Dtype::F32], || 0.5);
    // In a part that is sampled, in a small one, and in one that is left out of D.
    for (name, n, at) in [("lm_head.weight", 100_003, 99_999), ("model.norm.weight", 13, 7)] {
        for (value, text) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (-1e-30, "-0.000")] {
            let mut values = vec![0.5; n];
            values[at] = value;
            values[n - 1] = f32::NAN;
            let mut fisher = good.clone();
            fisher.insert(name.into(), Tensor::f32(&[n], &values));
            let s = Setting::new(&base, &tuned, &fisher);
            let (file, index) = (s.inputs[2].to_str().unwrap(), format!("flat index {at}"));
            for (score, more) in [
                ("fisher", &[][..]),
                ("blend", &[]),
                ("blend", &["--scope", "tensor"]),
                ("fisher", &["--exclude", "norms,embeddings"]),
                ("blend", &["--exclude", "norms,embeddings"]),
            ] {
                let found = format!("found: {text}");
                s.run(score, more).bad_input(&[file, name, &index, "squared gradient", "0 or above", &found, "hint"]);
            }
            expect_entries(s.out().parent().unwrap(), &[]);
        }
    }
}

#[test]
fn weights_and_distances_that_are_not_finite_are_refused_where_they_count() {
    let base = units(1, &[Dtype::F32]);
    let fisher = model(&[Dtype::F32], || 0.5);
    for (value, parts) in [(f32::NAN, ["a weight is not finite", "flat index 3"]), (f32::MAX, ["overflows", "tuned"])] {
        let (mut tuned, mut far) = (base.clone(), base.clone());
        let values = |v: f32| Tensor::f32(&[13], &[[0.0; 3].as_slice(), &[v], &[0.0; 9]].concat());
        tuned.insert("model.norm.weight".into(), values(value));
        far.insert("model.norm.weight".into(), values(-f32::MAX));
        let s = Setting::new(&far, &tuned, &fisher);
        s.run("blend", &[]).bad_input(&parts);
        expect_entries(s.out().parent().unwrap(), &[]);
    }
}

#[test]
fn squares_of_another_model_and_flags_that_do_not_go_together() {
    let (base, tuned) = (units(1, &[Dtype::F32]), units(2, &[Dtype::F32]));
    let good = model(&[Dtype::F32], || 0.5);
    let refuses = |change: &dyn Fn(&mut Tensors), parts: &[&str]| {
        let mut fisher = good.clone();
        change(&mut fisher);
        let s = Setting::new(&base, &tuned, &fisher);
        s.run("fisher", &[]).bad_input(&["fisher.safetensors"]).says(parts);
        expect_entries(s.out().parent().unwrap(), &[]);
    };
    refuses(&|f| drop(f.remove("scalar")), &["is missing", "tensor: scalar"]);
    refuses(&|f| drop(f.insert("scalar".into(), Tensor::f32(&[1], &[0.0]))), &["shape differs", "found: [1]"]);
    refuses(&|f| drop(f.insert("more".into(), Tensor::f32(&[1], &[0.0]))), &["does not have", "tensor: more"]);
    let s = Setting::new(&base, &tuned, &good);
    s.run("magnitude", &[]).usage_error(&["--score magnitude does not use --fisher"]);
    s.run("trace", &[]).usage_error(&["fisher", "blend", "relative"]);
    let [b, t, f] = s.inputs.each_ref().map(|p| p.to_str().unwrap());
    let line = ["extract", "--base", b, "--tuned", t];
    for score in ["fisher", "blend"] {
        let needs = format!("--score {score} needs --fisher");
        run(BIN, line.iter().chain(&["--out", "m", "--score", score])).usage_error(&[&needs]);
    }
    let onto = ["--score", "fisher", "--fisher", f, "--out", f, "--force"];
    run(BIN, line.iter().chain(&onto)).usage_error(&["--out", "would replace the input"]);
    assert!(Path::new(f).exists());
}
