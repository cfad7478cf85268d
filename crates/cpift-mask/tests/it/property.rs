//! Random masks in this process, any shapes, dtypes, layouts, values and thread counts: what a full
//! sort chooses, bit for bit.

use std::path::Path;

use crate::common::{digest, sort_as_chosen};
use clap::Parser;
use cpift_core::format::digest::Digest;
use cpift_core::format::mask::{Metric, Scope, indices};
use cpift_core::{Dtype, Mask};
use cpift_mask::Args;
use cpift_testkit::layout::{memory_dir, silence, with_threads, write_anyhow};
use cpift_testkit::{Numbers, Tensor, Tensors};
use proptest::prelude::*;

const NAMES: [&str; 8] = [
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.10.input_layernorm.weight",
    "model.norm.weight",
    "x",
];
const FLOATS: [Dtype; 4] = [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F64];

/// How the values of a pair are drawn.
#[derive(Debug, Clone, Copy)]
enum Values {
    /// Both at random.
    Random,
    /// The tuned values are the base's plus a step so small that half precision loses most of them.
    Tuned,
    /// Distances of four values only.
    Few,
    /// Most elements do not move.
    Sparse,
    /// Nothing moves.
    Still,
    /// Zeros of both signs, subnormal numbers and numbers over many powers of two.
    Wild,
}

#[derive(Debug, Clone)]
struct Case {
    /// Elements of each tensor, and the dtypes before and after; as many as there are names.
    tensors: Vec<(usize, Dtype, Dtype)>,
    values: Values,
    seed: u64,
    scope: Scope,
    score: Metric,
    /// Ten times p.
    per_mille: usize,
    threads: usize,
}

fn case(sizes: impl Strategy<Value = usize>) -> impl Strategy<Value = Case> {
    let dtype = || prop_oneof![6 => Just(0usize), 6 => Just(1), 3 => Just(2), 1 => Just(3)].prop_map(|i| FLOATS[i]);
    let values = prop_oneof![
        Just(Values::Random),
        Just(Values::Tuned),
        Just(Values::Few),
        Just(Values::Sparse),
        Just(Values::Still),
        Just(Values::Wild)
    ];
    let scope = prop_oneof![Just(Scope::Global), Just(Scope::Layer), Just(Scope::Tensor)];
    let tensors = prop::collection::vec((sizes, dtype(), dtype()), 1..=NAMES.len());
    let per_mille = prop_oneof![1..=1000usize, Just(1), Just(10), Just(1000)];
    let score = prop_oneof![Just(Metric::Magnitude), Just(Metric::Relative), Just(Metric::Fisher), Just(Metric::Blend)];
    (tensors, values, any::<u64>(), scope, score, per_mille, 2..=4usize).prop_map(
        |(tensors, values, seed, scope, score, per_mille, threads)| Case {
            tensors,
            values,
            seed,
            scope,
            score,
            per_mille,
            threads,
        },
    )
}

impl Values {
    fn draw(self, n: usize, numbers: &mut Numbers) -> (Vec<f64>, Vec<f64>) {
        let mut pair = || {
            let base = f64::from(numbers.unit());
            let bits = numbers.bits();
            match self {
                Self::Random => (base, f64::from(numbers.unit())),
                Self::Tuned => (0.02 * base, 0.02 * base + 1e-4 * f64::from(numbers.unit())),
                Self::Few => (0.0, (bits % 4) as f64 * 0.25 - 0.5),
                Self::Sparse => (base, if bits.is_multiple_of(20) { base + 0.25 } else { base }),
                Self::Still => (base, base),
                Self::Wild => {
                    let scale = 2f64.powi((bits % 30) as i32 - 24);
                    match bits >> 8 & 7 {
                        0 => (0.0, -0.0),
                        1 => (-0.0, 0.0),
                        2 => (f64::from(f32::from_bits(bits as u32 >> 12)), 0.0),
                        _ => (base * scale, base),
                    }
                }
            }
        };
        (0..n).map(|_| pair()).unzip()
    }
}

impl Case {
    /// Base, tuned and squared gradients, the last as F32 alone.
    fn checkpoints(&self) -> [Tensors; 3] {
        let mut numbers = Numbers(self.seed);
        let [mut base, mut tuned, mut fisher] = [(); 3].map(|()| Tensors::new());
        for (name, &(n, before, after)) in NAMES.iter().zip(&self.tensors) {
            let (b, t) = self.values.draw(n, &mut numbers);
            let shape = if n == 1 {
                vec![]
            } else if n.is_multiple_of(3) {
                vec![3, n / 3]
            } else {
                vec![n]
            };
            base.insert((*name).into(), Tensor::of_numbers(before, &shape, &b));
            tuned.insert((*name).into(), Tensor::of_numbers(after, &shape, &t));
            // As many equal, zero and tiny squares as the values have distances of these.
            let (x, y) = self.values.draw(n, &mut numbers);
            let squares: Vec<f64> = x.iter().zip(y).map(|(x, y)| (x - y) * (x - y)).collect();
            fisher.insert((*name).into(), Tensor::of_numbers(Dtype::F32, &shape, &squares));
        }
        [base, tuned, fisher]
    }

    /// The elements that a full sort chooses, as (name, index).
    fn sorted(&self, [base, tuned, fisher]: [&Tensors; 3], digest: &Digest) -> Vec<(String, usize)> {
        let wide = self.tensors.iter().any(|(_, b, t)| [b, t].contains(&&Dtype::F64));
        let relative = self.score == Metric::Relative;
        let moved = |b: f64, t: f64| match (wide, relative) {
            (true, false) => (t - b).abs(),
            (true, true) => (t - b).abs() / (b.abs() + 1e-8),
            (false, false) => f64::from((t as f32 - b as f32).abs()),
            (false, true) => f64::from((t as f32 - b as f32).abs() / ((b as f32).abs() + 1e-8)),
        };
        let scaled = |x: f64, low: f64, high: f64| match (low < high, wide) {
            (false, _) => 0.0,
            (true, true) => (x - low) / (high - low),
            (true, false) => f64::from((x as f32 - low as f32) / (high as f32 - low as f32)),
        };
        type Scores<'a> = Vec<([f64; 2], &'a str, usize)>;
        let mut parts: std::collections::BTreeMap<String, Scores<'_>> = Default::default();
        for (name, before) in base {
            let part = match self.scope {
                Scope::Global | Scope::Whole => "",
                // Up to the number of the layer.
                Scope::Layer => name.match_indices('.').nth(2).map_or("", |(end, _)| &name[..end]),
                Scope::Tensor => name,
            };
            let scores = before.numbers().into_iter().zip(tuned[name].numbers()).enumerate();
            let squares = fisher[name].numbers();
            let list = scores.map(|(i, (b, t))| ([moved(b, t), squares[i]], name.as_str(), i));
            parts.entry(part.to_owned()).or_default().extend(list);
        }
        let mut chosen = Vec::new();
        for part in parts.into_values() {
            let ends = |which: usize| {
                let values = || part.iter().map(|e| e.0[which]);
                (values().fold(f64::MAX, f64::min), values().fold(0.0, f64::max))
            };
            let (ends_moved, ends_felt) = (ends(0), ends(1));
            let score = |[moved, felt]: [f64; 2]| match (self.score, wide) {
                (Metric::Fisher, _) => felt,
                (Metric::Blend, _) => {
                    let (m, f) = (scaled(moved, ends_moved.0, ends_moved.1), scaled(felt, ends_felt.0, ends_felt.1));
                    if wide { 0.5 * m + 0.5 * f } else { f64::from(0.5 * m as f32 + 0.5 * f as f32) }
                }
                _ => moved,
            };
            let mut part: Vec<_> = part.iter().map(|(values, name, i)| (score(*values), *name, *i)).collect();
            sort_as_chosen(&mut part, digest);
            part.truncate(part.len() * self.per_mille / 1000);
            chosen.extend(part.into_iter().map(|(_, name, i)| (name.to_owned(), i)));
        }
        chosen.sort();
        chosen
    }

    fn extract(&self, [base, tuned, fisher]: [&Path; 3], out: &Path, threads: usize) -> anyhow::Result<()> {
        let percent = format!("{}.{}", self.per_mille / 10, self.per_mille % 10);
        let scope = format!("{:?}", self.scope).to_lowercase();
        let score = format!("{:?}", self.score).to_lowercase();
        let line = ["cpift-mask", "extract", "--percent", &percent, "--scope", &scope, "--score", &score];
        let needs_fisher = matches!(self.score, Metric::Fisher | Metric::Blend);
        let paths = [("--base", base), ("--tuned", tuned), ("--out", out), ("--fisher", fisher)];
        let paths = paths[..3 + usize::from(needs_fisher)].iter().map(|(f, p)| [f.into(), p.to_path_buf()]);
        let words = line.iter().map(Into::into).chain(paths.flatten());
        let args = Args::try_parse_from(words.map(std::path::PathBuf::into_os_string))?;
        with_threads(threads, || cpift_mask::run(args))
    }

    fn check(&self) -> Result<(), TestCaseError> {
        silence();
        let dir = memory_dir();
        let [base, tuned, fisher] = self.checkpoints();
        let whole = write_anyhow(&dir.path().join("whole"), &tuned, self.seed);
        let digest = digest(&whole);
        let chosen = self.sorted([&base, &tuned, &fisher], &digest);
        // Two layouts of the same tensors, at one thread and at several.
        let runs: Vec<_> = [(1, 1), (2, self.threads)]
            .into_iter()
            .map(|(layout, threads)| {
                let path = |name: &str| dir.path().join(format!("{name}{layout}"));
                let b = write_anyhow(&path("base"), &base, self.seed ^ layout);
                let t = write_anyhow(&path("tuned"), &tuned, self.seed ^ layout << 8);
                let f = write_anyhow(&path("fisher"), &fisher, self.seed ^ layout << 16);
                (self.extract([&b, &t, &f], &path("mask"), threads), path("mask"))
            })
            .collect();
        if chosen.is_empty() {
            for (result, path) in runs {
                prop_assert_eq!(cpift_core::error::exit_code(&result.unwrap_err()), 2);
                prop_assert!(!path.exists());
            }
            return Ok(());
        }
        for (result, path) in &runs {
            prop_assert!(result.is_ok(), "{:?}", result);
            let mask = Mask::open(path).unwrap();
            mask.verify().unwrap();
            prop_assert_eq!(&mask.header.tuned, &digest);
            let found: Vec<(String, usize)> =
                mask.tensors().flat_map(|(name, bits)| indices(bits).map(move |i| (name.to_owned(), i))).collect();
            prop_assert!(found == chosen, "{} chosen, the sort chooses {}", found.len(), chosen.len());
        }
        let bytes = [&runs[0].1, &runs[1].1].map(|path| std::fs::read(path).unwrap());
        prop_assert!(bytes[0] == bytes[1], "the bytes depend on threads or layout");
        Ok(())
    }
}

proptest! {
    #![proptest_config(cpift_testkit::cases(400))]
    #[test]
    fn small_tensors_are_chosen_as_a_sort_chooses(case in case(prop_oneof![1..20usize, 1..3000usize])) {
        case.check()?;
    }
}

proptest! {
    #![proptest_config(cpift_testkit::cases(24))]
    #[test]
    // Around the sizes of blocks and chunks, and enough elements that the threshold is bracketed by
    // a sample.
    fn large_tensors_are_chosen_as_a_sort_chooses(
        case in case(prop_oneof![1..70_000usize, 32_767..=32_769usize, 65_535..=65_537usize, 99_990..=100_010usize])
    ) {
        case.check()?;
    }
}
