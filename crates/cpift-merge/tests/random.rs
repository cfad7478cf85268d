//! Random merges of any shapes, dtypes, layouts and thread counts, run in this process: the result
//! agrees with f64 arithmetic on whole tensors, and has the same bytes for any layout and number of
//! threads.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser;
use cpift_core::Dtype;
use cpift_merge::cli::Args;
use cpift_testkit::layout::{memory_dir, silence, with_threads, write_anyhow};
use cpift_testkit::{Numbers, Tensor, Tensors, read_checkpoint};
use proptest::prelude::*;

const FLOATS: [Dtype; 4] = [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F64];
/// Cosine above which interpolation is linear, and the distance from it within which the arithmetic
/// of the test may disagree.
const COLLINEAR: (f64, f64) = (0.9995, 1e-7);

/// Method of a merge.
#[derive(Debug, Clone)]
enum Method {
    /// Weight of each model.
    Linear(Vec<f64>),
    /// Position between two models.
    Slerp(f64),
}

#[derive(Debug, Clone)]
struct Case {
    /// Number of elements of each tensor.
    sizes: Vec<usize>,
    /// Dtypes that the tensors of the models take in turn.
    dtypes: Vec<Dtype>,
    /// Distance between the models.
    distance: f64,
    method: Method,
    output: Dtype,
    /// Size of the largest shard in bytes.
    shard: usize,
    seed: u64,
    threads: usize,
}

fn case(sizes: impl Strategy<Value = usize>, tensors: usize) -> impl Strategy<Value = Case> {
    let dtype = || (0..FLOATS.len()).prop_map(|i| FLOATS[i]);
    let weight = || prop_oneof![Just(0.0), Just(1.0), -1.0..2.0f64];
    let method = prop_oneof![
        prop::collection::vec(weight(), 2..=4)
            .prop_filter("weights that do not cancel", |w| w.iter().sum::<f64>().abs() > 0.1)
            .prop_map(Method::Linear),
        prop_oneof![Just(0.0), Just(1.0), Just(0.5), 0.0..1.0f64].prop_map(Method::Slerp),
    ];
    let distance = prop_oneof![Just(0.0), Just(1e-3), Just(0.1), Just(2.0)];
    let shard = prop_oneof![Just(1), 100..20_000usize, Just(5_000_000_000)];
    (
        prop::collection::vec(sizes, 1..=tensors),
        prop::collection::vec(dtype(), 1..=4),
        distance,
        method,
        dtype(),
        shard,
        any::<u64>(),
        2..=4usize,
    )
        .prop_map(|(sizes, dtypes, distance, method, output, shard, seed, threads)| Case {
            sizes,
            dtypes,
            distance,
            method,
            output,
            shard,
            seed,
            threads,
        })
}

impl Case {
    fn models(&self) -> Vec<Tensors> {
        let count = match &self.method {
            Method::Linear(weights) => weights.len(),
            Method::Slerp(_) => 2,
        };
        let (mut common, mut own) = (Numbers(self.seed), Numbers(!self.seed));
        let mut models = vec![Tensors::new(); count];
        for (i, &n) in self.sizes.iter().enumerate() {
            // Some tensors are zero and have no direction.
            let scale = if self.seed.wrapping_add(i as u64).is_multiple_of(11) { 0.0 } else { 1.0 };
            let centre: Vec<f64> = common.units(n).into_iter().map(|v| scale * f64::from(v)).collect();
            for (m, model) in models.iter_mut().enumerate() {
                let dtype = self.dtypes[(i + m) % self.dtypes.len()];
                let step = if m == 0 { 0.0 } else { self.distance };
                let values: Vec<f64> = centre.iter().map(|c| c + step * f64::from(own.unit())).collect();
                model.insert(format!("model.layers.{i}.w"), Tensor::of_numbers(dtype, &[n], &values));
            }
        }
        models
    }

    /// Coefficient of each operand by f64 arithmetic; two answers if the angle is very close to the
    /// threshold.
    fn coefficients(&self, operands: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let t = match &self.method {
            Method::Linear(weights) => {
                let sum: f64 = weights.iter().sum();
                return vec![weights.iter().map(|w| w / sum).collect()];
            }
            Method::Slerp(t) => *t,
        };
        let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(x, y)| x * y).sum() };
        let (a, b) = (&operands[0], &operands[1]);
        let lengths = dot(a, a).sqrt() * dot(b, b).sqrt();
        let linear = vec![1.0 - t, t];
        if lengths == 0.0 {
            return vec![linear];
        }
        let cosine = (dot(a, b) / lengths).clamp(-1.0, 1.0);
        let angle = cosine.acos();
        let sphere = vec![((1.0 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin()];
        let (limit, doubt) = COLLINEAR;
        match cosine.abs() - limit {
            over if over > doubt => vec![linear],
            over if over < -doubt => vec![sphere],
            _ => vec![linear, sphere],
        }
    }

    /// Tolerance of a result: one rounding to the output dtype, and several roundings to f32 (or
    /// f64 if an input is F64) of terms that may cancel.
    fn tolerance(&self, value: f64, terms: f64, wide: bool) -> f64 {
        let (bits, smallest) = match self.output {
            Dtype::F64 => (52, 1074),
            Dtype::F32 => (23, 149),
            Dtype::BF16 => (7, 133),
            _ => (10, 24),
        };
        let rounding = (value.abs() * 2f64.powi(-bits)).max(2f64.powi(-smallest));
        rounding + terms * 2f64.powi(if wide { -38 } else { -21 })
    }

    fn run(&self, models: &[PathBuf], out: &Path, threads: usize) -> anyhow::Result<()> {
        let mut words = vec!["cpift-merge".to_owned(), String::new()];
        for path in models {
            words.extend(["--model".to_owned(), path.to_str().unwrap().to_owned()]);
        }
        match &self.method {
            Method::Linear(weights) => {
                words[1] = "linear".into();
                words.extend(weights.iter().map(|w| format!("--weight={w}")));
            }
            Method::Slerp(t) => {
                words[1] = "slerp".into();
                words.push(format!("--t={t}"));
            }
        }
        words.extend(["--out".to_owned(), out.to_str().unwrap().to_owned()]);
        words.extend([format!("--dtype={}", self.output.name()), format!("--shard-size={}", self.shard)]);
        let args = Args::try_parse_from(words)?;
        with_threads(threads, || cpift_merge::run(args))
    }

    fn check(&self) -> Result<(), TestCaseError> {
        silence();
        let dir = memory_dir();
        let models = self.models();
        // Two layouts of the same tensors, at one thread and at several.
        for (layout, threads) in [(1u64, 1), (2, self.threads)] {
            let write = |(m, tensors): (usize, &Tensors)| {
                let folder = dir.path().join(format!("{layout}-{m}"));
                write_anyhow(&folder, tensors, self.seed ^ layout << 8 ^ m as u64)
            };
            let paths: Vec<PathBuf> = models.iter().enumerate().map(write).collect();
            let done = self.run(&paths, &dir.path().join(format!("out{layout}")), threads);
            prop_assert!(done.is_ok(), "{:?}", done);
        }
        let outputs = [1, 2].map(|layout| content(&dir.path().join(format!("out{layout}"))));
        prop_assert!(outputs[0] == outputs[1], "the bytes depend on threads or layout");
        self.compare(&models, &read_checkpoint(&dir.path().join("out1")))
    }

    fn compare(&self, models: &[Tensors], merged: &Tensors) -> Result<(), TestCaseError> {
        prop_assert!(merged.keys().eq(models[0].keys()));
        for (name, tensor) in merged {
            prop_assert_eq!(tensor.dtype, self.output);
            let wide = models.iter().any(|model| model[name].dtype == Dtype::F64);
            let operands: Vec<Vec<f64>> = models.iter().map(|model| model[name].numbers()).collect();
            let found = tensor.numbers();
            // The first element that differs from the combination with these coefficients.
            let off = |coefficients: &Vec<f64>| {
                found.iter().enumerate().find_map(|(j, found)| {
                    let terms = || coefficients.iter().zip(&operands).map(|(c, values)| c * values[j]);
                    let (expected, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum());
                    let far = (found - expected).abs() > self.tolerance(expected, size, wide);
                    far.then(|| format!("{name}, element {j}: {found:e}, expected {expected:e}"))
                })
            };
            let off: Vec<Option<String>> = self.coefficients(&operands).iter().map(off).collect();
            prop_assert!(off.iter().any(Option::is_none), "{:?}", off);
        }
        Ok(())
    }
}

/// Files of an output by name, without those that have timestamps or paths.
fn content(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let named = files.map(|f| (f.file_name().into_string().unwrap(), fs::read(f.path()).unwrap()));
    named.filter(|(name, _)| name != "cpift.json" && name != "README.md").collect()
}

proptest! {
    #![proptest_config(cpift_testkit::cases(200))]
    #[test]
    fn small_tensors_agree_with_f64_arithmetic(case in case(prop_oneof![1..20usize, 1..3000usize], 8)) {
        case.check()?;
    }
}

proptest! {
    #![proptest_config(cpift_testkit::cases(24))]
    #[test]
    // Sizes around those of blocks and chunks.
    fn large_tensors_agree_with_f64_arithmetic(
        case in case(prop_oneof![1..70_000usize, 65_535..=65_537usize, 131_071..=131_073usize, 262_143..=262_145usize], 3)
    ) {
        case.check()?;
    }
}
