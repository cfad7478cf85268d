//! The commands of the methods, compared with mergekit's and NumPy's results in fixtures/golden.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use cpift_core::Dtype;
use cpift_testkit::read_checkpoint;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden")
}

/// Runs cpift-merge with these words, among the checkpoints of fixtures/golden/merge.
fn run(words: &str, out: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cpift-merge"))
        .current_dir(golden().join("merge"))
        .args(words.split_whitespace())
        .args(["--out".as_ref(), out.as_os_str()])
        .output()
        .unwrap()
}

#[track_caller]
fn merged(words: &str, out: &Path) -> cpift_testkit::Tensors {
    let done = run(words, out);
    assert!(done.status.success(), "{words}: {}", String::from_utf8_lossy(&done.stderr));
    read_checkpoint(out)
}

/// Commands with the settings of a recipe in fixtures/golden/merge.
const COMMANDS: [(&str, &str); 18] = [
    ("karcher_few", "spherical-mean --model a --model b --model c --max-iter 1 --tol 1e-9"),
    ("nuslerp", "nuslerp --model a --model c --weight 0.3 --weight 0.7,0.2"),
    ("nuslerp_base_rows", "nuslerp --base base --model b --model c --weight 0.6 --weight 0.9 --along rows"),
    ("nuslerp_columns", "nuslerp --model b --model c --weight 2 --weight 1 --along columns"),
    ("multislerp", "multislerp --model a --model b --model c --weight 0.5 --weight 0.2 --weight 0.1,0.9"),
    (
        "multislerp_base",
        "multislerp --base base --model a --model b --model c --weight 0.4 --weight 0.4 --weight 0.4 \
         --normalize-weights false",
    ),
    ("nearswap", "nearswap --base a --model c --t 0.01,0.05"),
    ("arcee_fusion", "arcee-fusion --base base --model c"),
    ("model_stock", "model-stock --base base --model a --model b --model c"),
    ("model_stock_filter_wise", "model-stock --base base --model b --model d --model a --filter-wise"),
    ("sce", "sce --base base --model a --model b --model c --select-topk 0.4"),
    ("sce_all", "sce --base base --model a --model b"),
    ("ram", "ram --base base --model a --model b --model c --epsilon 0.003"),
    ("ramplus_tl", "ram --plus --base base --model a --model b --model c --epsilon 0.01 --r 0.5 --alpha 0.6"),
    (
        "breadcrumbs_ties",
        "breadcrumbs --elect-sign --base base --model a --model b --model c --weight 0.5 --weight 0.5 --weight 0.5 \
         --density 0.6 --gamma 0.05 --rescale true --normalize true",
    ),
    ("dare_all", "dare --elect-sign --base base --model a --model b --weight 0.5 --weight 0.5 --density 1"),
    (
        "della_all",
        "della --elect-sign --base base --model a --model b --model c --weight 0.5 --weight 0.5 --weight 0.5 \
         --density 1 --density 0 --density 1",
    ),
    ("linear", "linear --model a --model b --model c --weight 1.5 --weight 0.25 --weight 1"),
];

#[test]
fn commands_give_what_mergekit_gives_for_the_recipe() {
    let dir = tempfile::tempdir().unwrap();
    for (name, words) in COMMANDS {
        let found = merged(&format!("{words} --dtype bf16"), &dir.path().join(name));
        let expected = read_checkpoint(&golden().join(format!("merge/{name}.safetensors")));
        assert!(found.keys().eq(expected.keys()), "{name}");
        for (tensor, expected) in &expected {
            let (found, expected) = (found[tensor].numbers(), expected.numbers());
            for (j, (a, b)) in found.iter().zip(&expected).enumerate() {
                // One ulp of bf16 is at most 2^-7 of the number.
                assert!((a - b).abs() <= b.abs() / 128.0, "{name}: element {j} of {tensor} is {a}, expected {b}");
            }
        }
    }
}

#[test]
fn singular_vectors_agree_with_numpy_at_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    for (name, command) in [("tsv_m", "tsv-m"), ("iso_c", "iso-c"), ("wudi", "wudi")] {
        let words = format!("{command} --base base --model a --model b --model c --dtype f32");
        let out = [1, 3].map(|threads| dir.path().join(format!("{name}-{threads}")));
        let found = merged(&format!("{words} --threads 1"), &out[0]);
        merged(&format!("{words} --threads 3"), &out[1]);
        let [one, three] = out.map(|out| std::fs::read(out.join("model.safetensors")).unwrap());
        assert!(one == three, "{name}: the bytes depend on the number of threads");
        let expected = read_checkpoint(&golden().join(format!("spectral/{name}.safetensors")));
        for (tensor, expected) in &expected {
            assert_eq!(expected.dtype, Dtype::F32);
            for (j, (a, b)) in found[tensor].numbers().iter().zip(expected.numbers()).enumerate() {
                assert!((a - b).abs() <= 1e-6, "{name}: element {j} of {tensor} is {a}, expected {b}");
            }
        }
        // λ scales what is added to the base.
        let base = read_checkpoint(&golden().join("merge/base"));
        let half = merged(&format!("{words} --lambda 0.5"), &dir.path().join(format!("{name}-half")));
        for (tensor, base) in &base {
            let full = found[tensor].numbers();
            for ((h, b), f) in half[tensor].numbers().iter().zip(base.numbers()).zip(full) {
                assert!((h - b - 0.5 * (f - b)).abs() < 1e-6, "{name}: {tensor}");
            }
        }
    }
}

#[test]
fn a_passthrough_copies_or_scales() {
    let dir = tempfile::tempdir().unwrap();
    let a = read_checkpoint(&golden().join("merge/a"));
    let copy = merged("passthrough --model a", &dir.path().join("copy"));
    assert!(a.iter().all(|(name, tensor)| tensor.bytes == copy[name].bytes));
    let scaled = merged("passthrough --model a --scale mlp=-0.5 --scale 1", &dir.path().join("scaled"));
    for (name, tensor) in &a {
        let factor = if name.contains("mlp") { -0.5 } else { 1.0 };
        let expected: Vec<f64> = tensor.numbers().iter().map(|v| v * factor).collect();
        assert_eq!(scaled[name].numbers(), expected, "{name}");
    }
}

#[test]
fn della_drops_small_elements_more_often_and_keeps_the_sum_of_magnitudes() {
    let dir = tempfile::tempdir().unwrap();
    let words = "della --base base --model b --density 0.5 --epsilon 0.45 --dtype f32";
    let (base, tuned) = (read_checkpoint(&golden().join("merge/base")), read_checkpoint(&golden().join("merge/b")));
    let (mut small, mut large) = ([0u32; 2], [0u32; 2]);
    for seed in 0..20 {
        let found = merged(&format!("{words} --seed {seed}"), &dir.path().join(seed.to_string()));
        for (name, tensor) in base.iter().filter(|(_, tensor)| tensor.shape.len() == 2) {
            let (before, after, tuned) = (tensor.numbers(), found[name].numbers(), tuned[name].numbers());
            let sum = |values: &[f64]| values.iter().zip(&before).map(|(v, b)| (v - b).abs()).sum::<f64>();
            assert!((sum(&after) / sum(&tuned) - 1.0).abs() < 1e-3, "{name}");
            let columns = tensor.shape[1];
            for row in (0..before.len()).step_by(columns) {
                let mut ranks: Vec<usize> = (row..row + columns).collect();
                ranks.sort_by(|i, j| (tuned[*i] - before[*i]).abs().total_cmp(&(tuned[*j] - before[*j]).abs()));
                let count = |at: usize, counts: &mut [u32; 2]| counts[usize::from(after[at] != before[at])] += 1;
                count(ranks[0], &mut small);
                count(ranks[columns - 1], &mut large);
            }
        }
    }
    let share = |[dropped, kept]: [u32; 2]| f64::from(kept) / f64::from(dropped + kept);
    assert!((share(small) - 0.05).abs() < 0.02 && (share(large) - 0.95).abs() < 0.02, "{small:?} {large:?}");
}

#[test]
fn the_bytes_do_not_depend_on_the_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    let more = [
        "breadcrumbs --base base --model a --model b --density 0.7 --gamma 0.1 --rescale true",
        "della --base base --model a --model b --density 0.6 --epsilon 0.3",
    ];
    for (i, words) in COMMANDS.iter().map(|(_, words)| *words).chain(more).enumerate() {
        let bytes = [1, 4].map(|threads| {
            let out = dir.path().join(format!("{i}-{threads}"));
            merged(&format!("{words} --threads {threads}"), &out);
            std::fs::read(out.join("model.safetensors")).unwrap()
        });
        assert!(bytes[0] == bytes[1], "{words}");
    }
}

#[test]
fn a_sweep_gives_what_single_merges_give() {
    let dir = tempfile::tempdir().unwrap();
    for (words, flags) in [
        ("slerp --model a --model c", ["--t 0", "--t 0.3", "--t 1"]),
        ("linear --model a --model c", ["--weight 1 --weight 0", "--weight 0.7 --weight 0.3", "--weight 0 --weight 1"]),
        ("task-arithmetic --base base --model a --model b", ["--lambda 0", "--lambda 0.3", "--lambda 1"]),
    ] {
        let name = words.split(' ').next().unwrap();
        let out = dir.path().join(name);
        let done = run(&format!("{words} --sweep 0,0.3,1"), &out);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        for (value, flags) in ["0", "0.3", "1"].iter().zip(flags) {
            let single = dir.path().join(format!("{name}-{value}"));
            merged(&format!("{words} {flags}"), &single);
            for file in ["model.safetensors", "config.json", "README.md"] {
                let [swept, single] = [out.join(value), single.clone()].map(|d| std::fs::read(d.join(file)).unwrap());
                assert!(swept == single, "{name} {value}: {file}");
            }
            assert!(out.join(value).join("cpift.json").is_file());
        }
    }
    for (words, part) in [
        ("slerp --model a --model c --sweep 0,2", "--t must lie between 0 and 1, found 2"),
        ("slerp --model a --model c --sweep 0.5,0.5", "has the value 0.5 twice"),
        ("linear --model a --model b --model c --sweep 0,1", "takes exactly two --model"),
        ("slerp --model a --model c --sweep 0,1 --dry-run", "leave --sweep out"),
    ] {
        let out = dir.path().join("none");
        let done = run(words, &out);
        assert_eq!(done.status.code(), Some(2), "{words}");
        assert!(String::from_utf8_lossy(&done.stderr).contains(part), "{}", String::from_utf8_lossy(&done.stderr));
        assert!(!out.exists());
    }
}

#[test]
fn settings_that_a_method_cannot_take_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (words, part) in [
        ("model-stock --base base --model a", "model-stock takes at least two --model, found 1"),
        ("nearswap --base base --model a --model b --t 0.1", "nearswap takes exactly one --model, found 2"),
        ("nuslerp --model a --model b --model c", "nuslerp takes exactly two --model, found 3"),
        ("sce --base base --model a --select-topk 1.5", "--select-topk must lie between 0.0 and 1.0, found 1.5"),
        ("breadcrumbs --base base --model a --density 0.5 --gamma -1", "--gamma must lie between"),
        ("della --base base --model a --density 0.5 --epsilon 0.5", "--density plus and minus --epsilon"),
        ("model-stock --base base --model a --model b --protect m --mask n", "exclude one another"),
        ("ram --base base --model a --r 1", "--plus"),
    ] {
        let out = dir.path().join("out");
        let done = run(words, &out);
        let stderr = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(2), "{words}: {stderr}");
        assert!(stderr.contains(part), "{words}: {stderr}");
        assert!(!out.exists());
    }
}
