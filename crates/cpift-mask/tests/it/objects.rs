//! Masks as objects: set operations, other selections, `apply`, `restore` and `convert`, each
//! against the same choice made here, through the real binary; and the NumPy lines of the README.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Command;

use crate::common::{BIN, chosen, digest, sort_as_chosen};
use cpift_core::format::mask::{Metric, count_ones};
use cpift_core::format::safetensors::MappedFile;
use cpift_core::{Checkpoint, Dtype, Mask};
use cpift_testkit::{Numbers, Run, Tensor, Tensors, expect_entries, run, write_checkpoint, write_safetensors};
use serde_json::Value;
use tempfile::TempDir;

/// A base, three fine-tunes and a mask of each, in a directory.
struct World {
    dir: TempDir,
    base: Tensors,
    tuned: [Tensors; 3],
}

type Elements = BTreeSet<(String, usize)>;

const NAMES: [(&str, &[usize]); 5] = [
    ("model.embed_tokens.weight", &[30, 8]),
    ("model.layers.0.mlp.up_proj.weight", &[64, 36]),
    ("model.layers.10.self_attn.q_proj.weight", &[17, 12]),
    ("model.norm.weight", &[11]),
    ("scalar", &[]),
];

impl World {
    fn new(dtype: Dtype) -> Self {
        let dir = TempDir::new().unwrap();
        let mut numbers = Numbers(3);
        let mut draw = || -> Tensors {
            let tensor = |(name, shape): &(&str, &[usize])| {
                let values: Vec<f32> = (0..shape.iter().product()).map(|_| numbers.unit()).collect();
                ((*name).to_owned(), Tensor::floats(dtype, shape, &values))
            };
            NAMES.iter().map(tensor).collect()
        };
        let (base, tuned) = (draw(), [draw(), draw(), draw()]);
        write_checkpoint(&dir.path().join("base"), &base);
        let world = Self { dir, base, tuned };
        for (name, tensors) in ["a", "b", "c"].iter().zip(&world.tuned) {
            write_checkpoint(&world.path(&format!("tuned-{name}")), tensors);
            let line = format!(
                "extract --base @base --tuned @tuned-{name} --percent 30 --exclude norms --out @{name}.safetensors"
            );
            world.run(&line).ok();
        }
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, line: &str) -> Run {
        run(BIN, line.replace('@', &format!("{}/", self.dir.path().display())).split_whitespace())
    }

    /// Elements of the mask that `line --out @out` writes.
    fn mask(&self, line: &str) -> Elements {
        let run = self.run(&format!("{line} --out @out.safetensors --force --json")).ok();
        let said: Value = serde_json::from_str(&run.stdout).unwrap();
        let elements = self.elements("out.safetensors");
        assert_eq!(said["selected"], elements.len(), "{line}");
        elements
    }

    fn elements(&self, file: &str) -> Elements {
        let mask = Mask::open(&self.path(file)).unwrap();
        mask.verify().unwrap();
        self.run(&format!("verify @{file}")).ok().says(&["sound"]);
        chosen(&mask).into_iter().collect()
    }

    /// |Δ| of the elements of fine-tune `i` as f32.
    fn moved(&self, i: usize) -> BTreeMap<(String, usize), f32> {
        let mut all = BTreeMap::new();
        for (name, base) in &self.base {
            let pairs = base.values().into_iter().zip(self.tuned[i][name].values());
            all.extend(pairs.enumerate().map(|(at, (b, t))| ((name.clone(), at), (t - b).abs())));
        }
        all
    }

    /// Asserts exit code 3, the parts of the message, and that no output is left.
    #[track_caller]
    fn refuses(&self, line: &str, parts: &[&str]) {
        let parts: Vec<String> =
            parts.iter().map(|p| p.replace('@', &format!("{}/", self.dir.path().display()))).collect();
        std::fs::create_dir_all(self.path("empty")).unwrap();
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        self.run(&format!("{line} --out @empty/out")).bad_input(&parts);
        expect_entries(&self.path("empty"), &[]);
    }
}

#[test]
fn set_operations_are_those_of_sets() {
    let w = World::new(Dtype::F32);
    let [a, b, c] = ["a", "b", "c"].map(|name| w.elements(&format!("{name}.safetensors")));
    let files = "@a.safetensors @b.safetensors @c.safetensors";
    assert!(w.mask(&format!("union {files}")) == &(&a | &b) | &c);
    assert!(w.mask(&format!("intersect {files}")) == &(&a & &b) & &c);
    assert!(w.mask(&format!("subtract {files}")) == &(&a - &b) - &c);
    let two: Elements = [&a & &b, &a & &c, &b & &c].concat();
    assert!(w.mask(&format!("consensus {files}")) == two && !two.is_empty());
    for (min, expected) in [("1", &(&a | &b) | &c), ("3", &(&a & &b) & &c)] {
        assert!(w.mask(&format!("consensus {files} --min {min}")) == expected, "{min}");
    }
    // The complement stays in D: the norm was excluded.
    let all: Elements = w.moved(0).into_keys().filter(|(name, _)| name != "model.norm.weight").collect();
    assert!(w.mask("complement @a.safetensors") == &all - &a);
    let header = Mask::open(&w.path("out.safetensors")).unwrap().header;
    assert_eq!((header.rule.as_deref(), header.d), (Some("complement of a mask"), all.len() as u64));
    assert_eq!(header.tuned, digest(&w.path("tuned-a")));
}

trait Concat {
    fn concat(self) -> Elements;
}

impl<const N: usize> Concat for [Elements; N] {
    fn concat(self) -> Elements {
        self.into_iter().flatten().collect()
    }
}

#[test]
fn overlap_counts_every_pair() {
    let w = World::new(Dtype::F32);
    let [a, b] = ["a", "b"].map(|name| w.elements(&format!("{name}.safetensors")));
    let said: Value = serde_json::from_str(&w.run("overlap @a.safetensors @b.safetensors --json").ok().stdout).unwrap();
    let (shared, union) = ((&a & &b).len(), (&a | &b).len());
    assert_eq!((&said["shared"][0][1], &said["shared"][1][1]), (&shared.into(), &b.len().into()));
    assert_eq!(said["jaccard"][1][0], shared as f64 / union as f64);
    assert_eq!(said["covered"][0][1], shared as f64 / a.len() as f64);
    let table = w.run("overlap @a.safetensors @b.safetensors").ok().stdout;
    assert!(table.contains("1 and 2") && table.contains(&shared.to_string()), "{table}");
}

#[test]
fn updates_above_a_size() {
    for dtype in [Dtype::F32, Dtype::F64] {
        let w = World::new(dtype);
        let expected: Elements = w.moved(0).into_iter().filter(|(_, moved)| *moved > 0.75).map(|(at, _)| at).collect();
        assert!(w.mask("extract --base @base --tuned @tuned-a --above 0.75") == expected);
        let header = Mask::open(&w.path("out.safetensors")).unwrap().header;
        assert_eq!(header.rule.as_deref(), Some("above 7.5e-1"));
        assert_eq!(header.percent, 100.0 * expected.len() as f64 / header.d as f64);
    }
    let w = World::new(Dtype::F32);
    let line = "extract --base @base --tuned @tuned-a --out @none";
    w.run(&format!("{line} --above 9")).usage_error(&["--above chooses nothing", "hint"]);
    w.run(&format!("{line} --above -1")).usage_error(&["--above"]);
    w.run(&format!("{line} --above 1 --percent 2")).usage_error(&["--percent"]);
    assert!(!w.path("none").exists());
}

#[test]
fn the_best_of_every_group() {
    let w = World::new(Dtype::BF16);
    let (moved, tuned) = (w.moved(0), digest(&w.path("tuned-a")));
    let mut expected = Elements::new();
    for (name, shape) in NAMES {
        let numel: usize = shape.iter().product();
        let width = shape.last().copied().unwrap_or(1);
        for row in (0..numel).step_by(width) {
            for start in (row..row + width).step_by(4) {
                let group = start..(start + 4).min(row + width);
                let mut list: Vec<_> =
                    group.clone().map(|at| (f64::from(moved[&(name.to_owned(), at)]), name, at)).collect();
                sort_as_chosen(&mut list, &tuned);
                expected.extend(list[..2 * group.len() / 4].iter().map(|e| (e.1.to_owned(), e.2)));
            }
        }
    }
    assert!(w.mask("extract --base @base --tuned @tuned-a --structure 2:4") == expected);
    let bytes = ["1", "3"].map(|threads| {
        w.mask(&format!("extract --base @base --tuned @tuned-a --structure 2:4 --threads {threads}"));
        std::fs::read(w.path("out.safetensors")).unwrap()
    });
    assert!(bytes[0] == bytes[1]);
    w.run("extract --base @base --tuned @tuned-a --structure 5:4 --out @none").usage_error(&["N:M"]);
}

#[test]
fn whole_rows_and_columns() {
    let w = World::new(Dtype::F32);
    let moved = w.moved(1);
    for structure in ["row", "column"] {
        let mut units: BTreeMap<(String, usize), Vec<(String, usize)>> = BTreeMap::new();
        for (name, shape) in NAMES {
            let numel: usize = shape.iter().product();
            for at in 0..numel {
                let unit = match (structure, shape) {
                    ("row", [rows, ..]) => at / (numel / rows),
                    (_, [.., columns]) => at % columns,
                    _ => 0,
                };
                units.entry((name.to_owned(), unit)).or_default().push((name.to_owned(), at));
            }
        }
        let mean =
            |list: &[(String, usize)]| list.iter().map(|at| f64::from(moved[at])).sum::<f64>() / list.len() as f64;
        let mut order: Vec<&Vec<(String, usize)>> = units.values().collect();
        order.sort_by(|x, y| mean(y).total_cmp(&mean(x)));
        let mut left = moved.len() / 5;
        let mut expected = Elements::new();
        for unit in order {
            if unit.len() > left {
                break;
            }
            left -= unit.len();
            expected.extend(unit.iter().cloned());
        }
        let line = format!("extract --base @base --tuned @tuned-b --percent 20 --structure {structure}");
        assert!(w.mask(&line) == expected, "{structure}");
    }
    w.run("extract --base @base --tuned @tuned-b --percent 0.00001 --structure row --out @none")
        .usage_error(&["chooses nothing"]);
}

#[test]
fn tall_masks_choose_what_the_sum_owes_to_a_model() {
    let w = World::new(Dtype::F32);
    let delta = |i: usize, name: &str, at: usize| w.tuned[i][name].values()[at] - w.base[name].values()[at];
    let expected = |lambda: f32| -> Elements {
        let all = w.moved(0).into_keys();
        all.filter(|(name, at)| {
            let rest = delta(1, name, *at) + delta(2, name, *at);
            delta(0, name, *at).abs() >= lambda * rest.abs()
        })
        .collect()
    };
    let line = "tall --base @base --tuned @tuned-a --model @tuned-b --model @tuned-c";
    for (lambda, text) in [(0.5, "0.5"), (2.0, "2")] {
        let found = w.mask(&format!("{line} --lambda {text}"));
        assert!(found == expected(lambda), "{lambda}: {} and {}", found.len(), expected(lambda).len());
    }
    // An element that no model moves belongs to none.
    w.run("tall --base @base --tuned @base --model @tuned-b --lambda 0.000000001 --exclude norms --out @none")
        .usage_error(&["no element belongs to this model", "smaller --lambda"]);
}

#[test]
fn a_change_is_kept_inside_or_outside_a_mask() {
    for dtype in [Dtype::F32, Dtype::BF16] {
        let w = World::new(dtype);
        let inside = w.elements("a.safetensors");
        for (keep, within) in [("inside", true), ("outside", false)] {
            w.run(&format!("apply @a.safetensors --base @base --tuned @tuned-a --keep {keep} --out @kept --force"))
                .ok();
            let kept = Checkpoint::open(&w.path("kept")).unwrap();
            for (name, base) in &w.base {
                let view = kept.get(name).unwrap();
                assert_eq!((view.dtype, view.shape), (dtype, &base.shape[..]));
                let size = dtype.size();
                for at in 0..view.numel() {
                    let from = if inside.contains(&(name.clone(), at)) == within { &w.tuned[0][name] } else { base };
                    let range = at * size..(at + 1) * size;
                    assert_eq!(view.bytes[range.clone()], from.bytes[range], "{keep} {name} {at}");
                }
            }
        }
        // A sparse task vector of the tuned weights gives the same checkpoint; so does one of
        // differences, which bf16 weights add without rounding here.
        let checkpoint = |line: &str| {
            w.run(&format!("apply @a.safetensors --base @base --tuned @tuned-a {line}")).ok();
            digest(&w.path("dense"))
        };
        let dense = checkpoint("--out @dense");
        for values in ["tuned", "delta"] {
            w.run(&format!(
                "apply @a.safetensors --base @base --tuned @tuned-a --sparse --values {values} --out @v --force"
            ))
            .ok();
            w.run("restore @v --base @base --out @restored --force").ok();
            let restored = Checkpoint::open(&w.path("restored")).unwrap();
            for (name, base) in &w.base {
                let (view, wanted) = (restored.get(name).unwrap(), Checkpoint::open(&w.path("dense")).unwrap());
                let wanted = wanted.get(name).unwrap();
                let error = |at: usize| {
                    let (mut x, mut y) = ([0f64], [0f64]);
                    view.read(at, &mut x);
                    wanted.read(at, &mut y);
                    (x[0] - y[0]).abs()
                };
                let worst = (0..base.values().len()).map(error).fold(0.0, f64::max);
                let allowed = if values == "tuned" { 0.0 } else { 1e-7 };
                assert!(worst <= allowed, "{values} {name}: {worst}");
            }
            if values == "tuned" {
                assert_eq!(digest(&w.path("restored")), dense);
            }
        }
    }
}

#[test]
fn sparse_vectors_that_do_not_fit_are_refused() {
    let w = World::new(Dtype::F32);
    w.run("apply @a.safetensors --base @base --tuned @tuned-a --sparse --out @v").ok();
    w.refuses("restore @v --base @tuned-b", &["@v", "another base"]);
    w.refuses("restore @a.safetensors --base @base", &["@a.safetensors", "not a sparse task vector"]);
    w.refuses("apply @a.safetensors --base @tuned-b --tuned @tuned-a", &["@a.safetensors", "another base"]);
    let file = MappedFile::open(&w.path("v")).unwrap();
    let entry = &file.entries["model.layers.0.mlp.up_proj.weight.indices"];
    let mut bytes = file.whole().to_vec();
    for (value, what) in [(64 * 36, "an index out of range"), (-1, "an index out of range")] {
        bytes[entry.range.start..entry.range.start + 4].copy_from_slice(&i32::to_le_bytes(value));
        std::fs::write(w.path("bad"), &bytes).unwrap();
        w.refuses("restore @bad --base @base", &["@bad", "model.layers.0.mlp.up_proj.weight", what, "0 to 2303"]);
    }
}

#[test]
fn masks_go_to_boolean_arrays_and_back() {
    let w = World::new(Dtype::F32);
    let expected = w.elements("a.safetensors");
    for (form, out) in [("npy", "arrays"), ("bool", "bools")] {
        for base in ["", "--base @base"] {
            w.run(&format!("convert @a.safetensors --to {form} {base} --out @{out} --force")).ok();
            w.run(&format!("convert @{out} --to mask --base @base --tuned @tuned-a --out @back --force")).ok();
            assert!(w.elements("back") == expected, "{form} {base}");
            let header = Mask::open(&w.path("back")).unwrap().header;
            assert_eq!((header.metric, &header.base), (Metric::Imported, &digest(&w.path("base"))));
            assert_eq!(header.tuned, digest(&w.path("tuned-a")));
        }
    }
    let file = MappedFile::open(&w.path("bools")).unwrap();
    for (name, shape) in NAMES {
        let entry = &file.entries[name];
        assert_eq!((entry.dtype, &entry.shape[..]), (Dtype::Bool, shape));
    }
    // Other programs write U8 tensors of 0 and 1.
    let bits: Tensors = w
        .base
        .iter()
        .map(|(name, t)| {
            let bytes = t.values().iter().map(|v| u8::from(*v > 0.0)).collect();
            (name.clone(), Tensor { dtype: Dtype::U8, shape: t.shape.clone(), bytes })
        })
        .collect();
    write_safetensors(&w.path("u8"), &bits);
    w.run("convert @u8 --to mask --base @base --out @positive").ok();
    let positive: Elements = w
        .base
        .iter()
        .flat_map(|(name, t)| (0..).zip(t.values()).filter(|(_, v)| *v > 0.0).map(move |(at, _)| (name.clone(), at)))
        .collect();
    assert!(w.elements("positive") == positive);
}

#[test]
fn boolean_arrays_that_do_not_fit_are_refused() {
    let w = World::new(Dtype::F32);
    w.run("convert @a.safetensors --to npy --base @base --out @arrays").ok();
    let line = "convert @arrays --to mask --base @base";
    let norm = w.path("arrays/model.norm.weight.npy");
    let good = std::fs::read(&norm).unwrap();
    std::fs::write(&norm, &good[..good.len() - 1]).unwrap();
    w.refuses(line, &["model.norm.weight.npy", "11", "10 bytes"]);
    let mut two = good.clone();
    *two.last_mut().unwrap() = 2;
    std::fs::write(&norm, &two).unwrap();
    w.refuses(line, &["not a boolean", "flat index 10", "found: 2"]);
    std::fs::write(&norm, []).unwrap();
    w.refuses(line, &["model.norm.weight.npy", "not a NumPy array"]);
    std::fs::remove_file(&norm).unwrap();
    w.refuses(line, &["@arrays", "model.norm.weight", "no bits for a parameter"]);
    std::fs::write(&norm, &good).unwrap();
    std::fs::write(w.path("arrays/more.npy"), &good).unwrap();
    w.refuses(line, &["more", "no parameter of the base"]);
    std::fs::remove_file(w.path("arrays/more.npy")).unwrap();
    std::fs::copy(w.path("arrays/scalar.npy"), &norm).unwrap();
    w.refuses(line, &["model.norm.weight", "another shape", "[11]"]);
    w.refuses("convert @tuned-a/model.safetensors --to mask --base @base", &["not a tensor of booleans", "F32"]);
    std::fs::create_dir(w.path("nothing")).unwrap();
    w.refuses("convert @nothing --to mask --base @base", &["@nothing", "no NumPy files"]);
    w.run("convert @arrays --to mask --out @empty/out").usage_error(&["--base"]);
    w.run("convert @a.safetensors --to mask --base @base --out @empty/out").usage_error(&["a mask already"]);
    w.run("convert @a.safetensors --to npy --tuned @base --out @empty/out").usage_error(&["--tuned"]);
    expect_entries(&w.path("empty"), &[]);
}

#[test]
fn masks_that_do_not_belong_together_are_refused() {
    let w = World::new(Dtype::F32);
    w.run("extract --base @tuned-b --tuned @tuned-a --exclude norms --out @other").ok();
    w.refuses("union @a.safetensors @other", &["@other", "another base", "@a.safetensors"]);
    w.run("extract --base @base --tuned @tuned-a --out @all").ok();
    w.refuses("intersect @a.safetensors @all", &["@all", "another D", "norms", "--exclude"]);
    let mut small = w.base.clone();
    small.remove("scalar");
    write_checkpoint(&w.path("small"), &small);
    w.run("extract --base @small --tuned @small --exclude norms --out @smaller").ok();
    w.refuses("subtract @a.safetensors @smaller", &["@smaller", "scalar", "another model", "no such tensor"]);
    w.refuses("subtract @a.safetensors @nowhere", &["@nowhere"]);
    w.run("union @a.safetensors --out @empty/out").usage_error(&["MASK"]);
    w.run("consensus @a.safetensors @b.safetensors --min 3 --out @empty/out").usage_error(&["--min", "found 3"]);
    w.run("union @a.safetensors @b.safetensors --out @b.safetensors --force").usage_error(&["would replace the input"]);
    w.run("tall --base @base --tuned @tuned-a --model @small --out @empty/out").bad_input(&["scalar"]);
    w.run("tall --base @base --tuned @tuned-a --model @tuned-b --lambda 0 --out @empty/out").usage_error(&["--lambda"]);
    expect_entries(&w.path("empty"), &[]);
}

#[test]
fn stats_list_every_tensor_on_request() {
    let w = World::new(Dtype::F32);
    let mask = Mask::open(&w.path("a.safetensors")).unwrap();
    let said: Value = serde_json::from_str(&w.run("stats @a.safetensors --tensors --json").ok().stdout).unwrap();
    for ((name, bits), row) in mask.tensors().zip(said["tensors"].as_array().unwrap()) {
        assert_eq!((&row["name"], &row["selected"]), (&name.into(), &count_ones(bits).into()));
    }
    let table = w.run("stats @a.safetensors --tensors").ok().stdout;
    assert!(NAMES.iter().all(|(name, _)| table.contains(name)), "{table}");
    assert!(!w.run("stats @a.safetensors").ok().stdout.contains("q_proj.weight"));
}

/// The Python code of the README's section on NumPy.
fn readme() -> String {
    let text = include_str!("../../README.md");
    let section = text.split("## Masks in NumPy").nth(1).expect("the README has the section");
    let section = section.split("\n## ").next().unwrap();
    section.lines().filter_map(|line| line.strip_prefix("    ")).map(|line| format!("{line}\n")).collect()
}

#[test]
fn the_lines_for_numpy_in_the_readme_give_the_same_masks() {
    let code = readme();
    for name in ["union", "intersect", "subtract", "complement", "consensus", "above", "two_of_four", "tall", "kept"] {
        assert!(code.contains(&format!("{name} = ")), "{name} is not in the README");
    }
    let has_numpy = Command::new("python3").args(["-c", "import numpy"]).output().is_ok_and(|out| out.status.success());
    if !has_numpy {
        // The tests above compare with the same choices made in Rust.
        return;
    }
    let w = World::new(Dtype::F32);
    for name in ["a", "b", "c"] {
        w.run(&format!("extract --base @base --tuned @tuned-{name} --percent 30 --out @{name}.safetensors --force"))
            .ok();
    }
    // Tensors whose rows are cut into whole groups.
    for (to, line) in [
        ("union", "union @a.safetensors @b.safetensors"),
        ("intersect", "intersect @a.safetensors @b.safetensors"),
        ("subtract", "subtract @a.safetensors @b.safetensors"),
        ("complement", "complement @a.safetensors"),
        ("consensus", "consensus @a.safetensors @b.safetensors @c.safetensors --min 2"),
        ("above", "extract --base @base --tuned @tuned-a --above 0.5"),
        ("two_of_four", "extract --base @base --tuned @tuned-a --structure 2:4"),
        ("tall", "tall --base @base --tuned @tuned-a --model @tuned-b --model @tuned-c --lambda 0.4"),
    ] {
        w.run(&format!("{line} --out @{to}.safetensors")).ok();
    }
    w.run("apply @a.safetensors --base @base --tuned @tuned-a --out @kept").ok();
    w.run("apply @a.safetensors --base @base --tuned @tuned-a --sparse --values tuned --out @vector.safetensors").ok();
    w.run("convert @a.safetensors --to npy --base @base --out @arrays").ok();
    let checks = "
for name in ['union', 'intersect', 'subtract', 'complement', 'consensus', 'above', 'two_of_four', 'tall']:
    found = mask(f'{name}.safetensors')
    for key, bits in globals()[name].items():
        assert numpy.array_equal(bits.ravel(), found[key]), (name, key)
model = load('kept/model.safetensors')[0]
assert all(numpy.array_equal(kept[k], model[k]) for k in model)
assert all(numpy.array_equal(restored[k], model[k]) for k in model)
assert all(numpy.array_equal(arrays[k].ravel(), a[k]) for k in a)
";
    let script = w.path("script.py");
    std::fs::write(&script, code + checks).unwrap();
    let out = Command::new("python3").arg(&script).current_dir(w.dir.path()).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    // Arrays that NumPy saved come back as a mask.
    w.run("convert @large --to mask --base @base --out @imported").ok();
    let expected: Elements = w.moved(0).into_iter().filter(|(_, moved)| *moved > 0.25).map(|(at, _)| at).collect();
    assert!(w.elements("imported") == expected);
}

#[test]
fn outputs_are_kept_unless_forced_and_up_to_date_ones_are_not_made_again() {
    let w = World::new(Dtype::F32);
    let line = "union @a.safetensors @b.safetensors --out @u";
    w.run(line).ok();
    w.run(line).bad_input(&["exists", "--force"]);
    w.run(&format!("{line} --skip-up-to-date")).ok().says(&["up to date"]);
    w.run("complement @a.safetensors --out @a2").ok();
    let one = std::fs::read(w.path("a2")).unwrap();
    w.run("complement @a.safetensors --out @a2 --force --threads 3").ok();
    assert!(one == std::fs::read(w.path("a2")).unwrap());
}

#[test]
fn a_mask_whose_ties_an_earlier_revision_broke_is_made_again() {
    let w = World::new(Dtype::F32);
    let line = "extract --base @base --tuned @tuned-a --out @m --skip-up-to-date";
    w.run(line).ok();
    w.run(line).ok().says(&["up to date"]);
    let path = w.path("m.cpift.json");
    let mut record: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    assert_eq!(record["revision"], 1);
    record.as_object_mut().unwrap().remove("revision");
    std::fs::write(&path, record.to_string()).unwrap();
    let run = w.run(line).ok();
    assert!(!run.stderr.contains("up to date"), "{}", run.stderr);
    assert_eq!(serde_json::from_str::<Value>(&std::fs::read_to_string(&path).unwrap()).unwrap()["revision"], 1);
}
