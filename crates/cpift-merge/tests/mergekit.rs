//! Recipes through the real binary, compared with the output of mergekit 0.1.5 in
//! fixtures/golden/merge.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use cpift_core::Dtype;
use cpift_testkit::{Tensors, read_checkpoint};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden/merge")
}

/// Maps bf16 numbers to integers in the same order, so that adjacent numbers differ by 1.
fn ordered(tensors: &Tensors, name: &str) -> Vec<i32> {
    let tensor = &tensors[name];
    assert_eq!(tensor.dtype, Dtype::BF16, "{name}");
    let pairs = tensor.bytes.as_chunks::<2>().0;
    pairs
        .iter()
        .map(|pair| i32::from(i16::from_le_bytes(*pair)))
        .map(|x| if x < 0 { -(x & 0x7FFF) } else { x })
        .collect()
}

/// Runs the recipe at `path` in the directory of its models, with output `out`.
fn run(path: &Path, out: &Path) {
    let run = Command::new(env!("CARGO_BIN_EXE_cpift-merge"))
        .current_dir(golden())
        .args(["recipe".as_ref(), path.as_os_str(), "--out".as_ref(), out.as_os_str()])
        .output()
        .unwrap();
    assert!(run.status.success(), "{}: {}", path.display(), String::from_utf8_lossy(&run.stderr));
}

/// Number of elements that differ; panics if one differs by more than one ulp.
fn differing(found: &Tensors, expected: &Tensors, recipe: &str) -> usize {
    assert!(found.keys().eq(expected.keys()), "{recipe}");
    let mut differing = 0;
    for name in expected.keys() {
        for (j, (a, b)) in ordered(found, name).into_iter().zip(ordered(expected, name)).enumerate() {
            assert!((a - b).abs() <= 1, "{recipe}: element {j} of {name} is {} ulps off", (a - b).abs());
            differing += usize::from(a != b);
        }
    }
    differing
}

#[test]
fn every_element_is_within_one_ulp_of_mergekit() {
    let out = tempfile::tempdir().unwrap();
    let mut methods = BTreeSet::new();
    for entry in std::fs::read_dir(golden()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "yml") {
            continue;
        }
        let name = path.file_stem().unwrap().to_str().unwrap();
        methods.insert(name.split('_').next().unwrap().to_owned());
        let folder = out.path().join(name);
        run(&path, &folder);
        let expected = read_checkpoint(&path.with_extension("safetensors"));
        let elements: usize = expected.values().map(|t| t.bytes.len() / 2).sum();
        let differing = differing(&read_checkpoint(&folder), &expected, name);
        assert!(differing * 100 <= elements, "{name}: {differing} of {elements} elements differ");
    }
    let expected = "arcee breadcrumbs dare della karcher linear model multislerp nearswap nuslerp passthrough ram \
                    ramplus sce slerp task ties";
    assert_eq!(methods.into_iter().collect::<Vec<_>>().join(" "), expected);
}

#[test]
fn the_recipe_in_the_card_reproduces_the_merge() {
    let out = tempfile::tempdir().unwrap();
    for name in ["linear_base", "slerp_gradients", "ties_sum", "karcher", "slerp_slices", "ties_slices", "karcher_few"]
    {
        let (first, second) = (out.path().join(name), out.path().join(format!("{name}-again")));
        run(&golden().join(format!("{name}.yml")), &first);
        let card = std::fs::read_to_string(first.join("README.md")).unwrap();
        let block = card.split_once("```yaml\n").unwrap().1.split_once("```\n").unwrap().0;
        let recipe = out.path().join(format!("{name}.yml"));
        std::fs::write(&recipe, block).unwrap();
        run(&recipe, &second);
        for file in ["model.safetensors", "config.json", "README.md"] {
            assert!(
                std::fs::read(first.join(file)).unwrap() == std::fs::read(second.join(file)).unwrap(),
                "{name}: {file}"
            );
        }
    }
}
