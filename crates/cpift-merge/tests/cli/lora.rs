//! `extract-lora` against NumPy's singular values, and `merge-adapters` against the sum of
//! products.

use std::fs;
use std::path::Path;

use cpift_core::Dtype;
use cpift_testkit::{Tensor, Tensors, expect_entries, read_checkpoint, write_safetensors};
use serde_json::Value;

use crate::world::{World, bytes, json};

fn golden(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden/adapters").join(name)
}

/// The base of the golden adapters, and the model that PEFT made of it with the adapter `case`.
fn models(case: &str) -> World {
    let world = World::new();
    fs::create_dir(world.path("base")).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(golden("llama").join(name), world.path("base").join(name)).unwrap();
    }
    let mut tensors = read_checkpoint(&golden("llama"));
    tensors.extend(read_checkpoint(&golden(case).join("merged.safetensors")));
    fs::create_dir(world.path("tuned")).unwrap();
    fs::copy(golden("llama/config.json"), world.path("tuned/config.json")).unwrap();
    write_safetensors(&world.path("tuned/model.safetensors"), &tensors);
    world
}

#[test]
fn the_errors_of_an_extraction_are_those_of_the_singular_values_left_out() {
    let world = models("rslora");
    let expected = json(&golden("extract.json"));
    for rank in [1, 2, 3] {
        let line = format!("extract-lora --base @base --model @tuned --rank {rank} --out @lora{rank} --json");
        let said: Value = serde_json::from_str(&world.run(&line).ok().stdout).unwrap();
        let errors = said["errors"].as_object().unwrap();
        assert_eq!(errors.len(), 6);
        for (name, error) in errors {
            let (found, best) = (error.as_f64().unwrap(), expected[name][rank - 1].as_f64().unwrap());
            assert!((found - best).abs() < 1e-5, "rank {rank} of {name}: {found}, expected {best}");
        }
        // The summary and the adapter agree: the model with the adapter has the errors that are
        // reported.
        let out = format!("out{rank}");
        let model = format!("@base+@lora{rank}");
        world.run(&format!("linear --model {model} --model {model} --out @{out}")).ok();
        let (made, tuned, base) = (world.read(&out), world.read("tuned"), world.read("base"));
        for (name, error) in errors {
            let [made, tuned, base] = [&made, &tuned, &base].map(|tensors| tensors[name].values());
            let norm = |pairs: std::iter::Zip<std::slice::Iter<'_, f32>, std::slice::Iter<'_, f32>>| {
                pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
            };
            let found = norm(made.iter().zip(&tuned)) / norm(tuned.iter().zip(&base));
            assert!((found - error.as_f64().unwrap()).abs() < 1e-5, "{name}: {found}");
        }
    }
}

#[test]
fn an_extraction_of_full_rank_gives_the_model_back_and_names_what_it_leaves_out() {
    let world = models("saved");
    let run = world.run("extract-lora --base @base --model @tuned --rank 8 --out @lora").ok();
    run.says(&["6 tensors differ and are not in the adapter"]);
    expect_entries(&world.path("lora"), &["adapter_config.json", "adapter_model.safetensors", "cpift.json"]);
    let config = json(&world.path("lora/adapter_config.json"));
    assert_eq!(config["peft_type"], "LORA");
    assert_eq!(config["target_modules"].as_array().unwrap().len(), 2);
    let line = "extract-lora --base @base --model @tuned --rank 8 --out @lora";
    world.refused(line, &["@lora: the output exists already"]);
    world.run(&format!("{line} --skip-up-to-date")).ok().says(&["up to date"]);
    world.run("extract-lora --base @base --model @tuned --rank 8 --out @one --threads 1").ok();
    let file = |name: &str| bytes(&world.path(name).join("adapter_model.safetensors"));
    assert_eq!(file("lora"), file("one"));
    world.refused("extract-lora --base @base --model @base --rank 8 --out @o", &["no matrix of a layer differs"]);
    world.misused("extract-lora --base @base --model @tuned --rank 0 --out @o", &["--rank must be at least 1"]);
}

/// Weights of `base` plus the weighted differences that PEFT made with the adapters.
fn sum(base: &Tensors, parts: &[(f64, &str)]) -> std::collections::BTreeMap<String, Vec<f64>> {
    let mut all: std::collections::BTreeMap<String, Vec<f64>> = base
        .iter()
        .map(|(name, tensor)| (name.clone(), tensor.values().into_iter().map(f64::from).collect()))
        .collect();
    for (weight, case) in parts {
        for (name, tensor) in read_checkpoint(&golden(case).join("merged.safetensors")) {
            let before = base[&name].values();
            let sums = all.get_mut(&name).unwrap();
            for ((sum, after), before) in sums.iter_mut().zip(tensor.values()).zip(before) {
                *sum += weight * f64::from(after - before);
            }
        }
    }
    all
}

#[test]
fn combined_adapters_are_the_weighted_sum_of_their_products() {
    let world = models("plain");
    let cases = [golden("plain"), golden("rslora")].map(|path| path.display().to_string());
    let line = format!("merge-adapters --adapter {} --adapter {}", cases[0], cases[1]);
    for (flags, weights, tolerance) in
        [("", [0.5, 0.5], 1e-6), ("--weight 2 --weight -1", [2.0, -1.0], 1e-6), ("--rank 7", [0.5, 0.5], 1e-6)]
    {
        let out = format!("both{}", flags.replace([' ', '-'], ""));
        world.run(&format!("{line} {flags} --out @{out}")).ok();
        world.run(&format!("linear --model @base+@{out} --model @base+@{out} --out @of-{out}")).ok();
        let expected = sum(&world.read("base"), &[(weights[0], "plain"), (weights[1], "rslora")]);
        for (name, tensor) in world.read(&format!("of-{out}")) {
            for (a, b) in tensor.values().iter().zip(&expected[&name]) {
                assert!((f64::from(*a) - b).abs() < tolerance, "{flags}: {name}: {a}, expected {b}");
            }
        }
    }
    // Compression says what it loses.
    let run = world.run(&format!("{line} --rank 2 --out @small --json")).ok();
    let said: Value = serde_json::from_str(&run.stdout).unwrap();
    let errors = said["errors"].as_object().unwrap();
    assert!(!errors.is_empty() && errors.values().all(|e| e.as_f64().unwrap() < 1.0), "{said}");
    assert_eq!(json(&world.path("small/adapter_config.json"))["r"], 2);
}

#[test]
fn files_of_kohya_are_combined_into_a_file_with_alpha() {
    let world = World::new();
    let module = "lora_unet_down_blocks_0_to_q";
    for (name, value, alpha) in [("a", 1.0, 1.0), ("b", 3.0, 2.0)] {
        let tensors = Tensors::from([
            (format!("{module}.lora_down.weight"), Tensor::f32(&[2, 3], &[value; 6])),
            (format!("{module}.lora_up.weight"), Tensor::f32(&[4, 2], &[1.0; 8])),
            (format!("{module}.alpha"), Tensor::f32(&[], &[alpha])),
        ]);
        write_safetensors(&world.path(&format!("{name}.safetensors")), &tensors);
    }
    let line = "merge-adapters --adapter @a.safetensors --adapter @b.safetensors";
    world.run(&format!("{line} --dtype f16 --out @c.safetensors")).ok();
    let out = read_checkpoint_of_adapter(&world.path("c.safetensors"));
    assert_eq!(out[&format!("{module}.alpha")].values(), [4.0]);
    let (down, up) = (&out[&format!("{module}.lora_down.weight")], &out[&format!("{module}.lora_up.weight")]);
    assert_eq!((down.shape.as_slice(), up.shape.as_slice(), down.dtype), (&[4, 3][..], &[4, 4][..], Dtype::F16));
    let product: f32 = (0..4).map(|k| up.values()[k] * down.values()[3 * k]).sum();
    // Half of 2·1·(1/2), and half of 2·3·(2/2).
    assert_eq!(product, 3.5);
    let mut other = out.clone();
    other.insert(format!("{module}.lora_up.weight"), Tensor::f32(&[5, 4], &[1.0; 20]));
    write_safetensors(&world.path("d.safetensors"), &other);
    let line = line.replace("@b.", "@d.") + " --out @o";
    world.refused(&line, &["@d.safetensors: the module has another shape", "expected: 4 × 3", "found: 5 × 3"]);
    world.misused("merge-adapters --adapter @a.safetensors --out @o", &["two or more"]);
}

/// Tensors of a file that is no checkpoint.
fn read_checkpoint_of_adapter(path: &Path) -> Tensors {
    let file = cpift_core::format::safetensors::MappedFile::open(path).unwrap();
    let tensor = |(name, entry): (&String, &cpift_core::format::safetensors::Entry)| {
        let bytes = file.bytes(entry).to_vec();
        (name.clone(), Tensor { dtype: entry.dtype, shape: entry.shape.clone(), bytes })
    };
    file.entries.iter().map(tensor).collect()
}
