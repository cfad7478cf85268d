//! `MODEL+ADAPTER`: LoRA adapters merged while they are read, against PEFT, and adapters that do
//! not fit.

use std::fs;
use std::path::{Path, PathBuf};

use cpift_core::Dtype;
use cpift_testkit::{Numbers, Tensor, Tensors, write_safetensors};
use serde_json::json;

use crate::world::{World, bytes};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden/adapters")
}

/// Copies a directory of the golden files.
fn copy(world: &World, name: &str) {
    fs::create_dir_all(world.path(name)).unwrap();
    for entry in fs::read_dir(golden().join(name)).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), world.path(name).join(entry.file_name())).unwrap();
    }
}

/// Asserts that the tensors `found` are those of the model `before` but for `changed`, to a few
/// roundings of f32.
#[track_caller]
fn assert_merged(found: &Tensors, before: &Tensors, changed: &Tensors, what: &str) {
    assert_eq!(found.keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>(), "{what}");
    for (name, tensor) in found {
        let Some(expected) = changed.get(name) else {
            assert_eq!(tensor.bytes, before[name].bytes, "{what}: {name}");
            continue;
        };
        for (a, b) in tensor.values().iter().zip(expected.values()) {
            assert!((a - b).abs() <= 4e-7 * b.abs().max(1.0), "{what}: {name}: {a}, expected {b}");
        }
    }
}

#[test]
fn adapters_are_merged_as_peft_merges_them() {
    for (case, base) in [
        ("plain", "llama"),
        ("rslora", "llama"),
        ("dora", "llama"),
        ("patterns", "llama"),
        ("embedding", "llama"),
        ("saved", "llama"),
        ("transposed", "gpt2"),
    ] {
        let world = World::new();
        copy(&world, base);
        copy(&world, case);
        let model = format!("@{base}+@{case}");
        world.run(&format!("linear --model {model} --model {model} --out @out")).ok();
        let changed = cpift_testkit::read_checkpoint(&golden().join(case).join("merged.safetensors"));
        assert_merged(&world.read("out"), &world.read(base), &changed, case);
        world.run("verify @out").ok().says(&["matches"]);
        // The files of the model, none of the adapter.
        assert!(world.path("out/config.json").exists() && !world.path("out/adapter_config.json").exists());
    }
}

/// A model of two matrices and an embedding, in BF16.
fn model() -> Tensors {
    let mut numbers = Numbers(3);
    let mut floats = |shape: &[usize]| Tensor::floats(Dtype::BF16, shape, &numbers.units(shape.iter().product()));
    Tensors::from([
        ("model.layers.0.self_attn.q_proj.weight".to_owned(), floats(&[6, 4])),
        ("model.layers.0.self_attn.q_proj.bias".to_owned(), floats(&[6])),
        ("model.embed_tokens.weight".to_owned(), floats(&[5, 4])),
    ])
}

fn peft(world: &World, name: &str, settings: &serde_json::Value, tensors: &Tensors) {
    let mut config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base"});
    config.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
    fs::create_dir_all(world.path(name)).unwrap();
    fs::write(world.path(name).join("adapter_config.json"), config.to_string()).unwrap();
    let file = world.path(name).join("adapter_model.safetensors");
    let _ = fs::remove_file(&file);
    write_safetensors(&file, tensors);
}

const Q: &str = "base_model.model.model.layers.0.self_attn.q_proj";

/// The two factors of the matrix `module`, of `rank`.
fn factors(module: &str, down: &str, up: &str, rank: usize) -> Tensors {
    let mut numbers = Numbers(5);
    Tensors::from([
        (format!("{module}.{down}"), Tensor::f32(&[rank, 4], &numbers.units(4 * rank))),
        (format!("{module}.{up}"), Tensor::f32(&[6, rank], &numbers.units(6 * rank))),
    ])
}

/// W + scaling · B·A in f64.
fn expected(scaling: f64, rank: usize) -> Vec<f64> {
    let weight = model()["model.layers.0.self_attn.q_proj.weight"].values();
    let pair = factors("q", "a", "b", rank);
    let (a, b) = (pair["q.a"].values(), pair["q.b"].values());
    let product =
        |i: usize, j: usize| (0..rank).map(|k| f64::from(b[i * rank + k]) * f64::from(a[k * 4 + j])).sum::<f64>();
    (0..24).map(|at| f64::from(weight[at]) + scaling * product(at / 4, at % 4)).collect()
}

#[test]
fn key_styles_of_kohya_and_diffusers_are_read_from_single_files() {
    let alpha = |module: &str, value: f32| (format!("{module}.alpha"), Tensor::f32(&[], &[value]));
    let kohya = "lora_unet_layers_0_self_attn_q_proj";
    let mut with_alpha = factors(kohya, "lora_down.weight", "lora_up.weight", 2);
    with_alpha.extend([alpha(kohya, 1.0)]);
    let module = "unet.layers.0.self_attn.q_proj";
    for (name, tensors, scaling) in [
        ("kohya", with_alpha, 0.5),
        ("diffusers", factors(module, "lora_A.weight", "lora_B.weight", 2), 1.0),
        ("older", factors(module, "lora.down.weight", "lora.up.weight", 2), 1.0),
    ] {
        let world = World::new();
        world.checkpoint("base", &model());
        write_safetensors(&world.path("lora.safetensors"), &tensors);
        world.run("task-arithmetic --base @base --model @base+@lora.safetensors --dtype f32 --out @out").ok();
        let found = world.read("out")["model.layers.0.self_attn.q_proj.weight"].values();
        for (a, b) in found.iter().zip(expected(scaling, 2)) {
            assert!((f64::from(*a) - b).abs() < 1e-6, "{name}: {a}, expected {b}");
        }
    }
}

#[test]
fn the_part_of_an_adapter_for_a_text_encoder_is_left_out_with_a_warning_if_there_is_none() {
    let world = World::new();
    world.checkpoint("base", &model());
    let mut tensors = factors("lora_unet_layers_0_self_attn_q_proj", "lora_down.weight", "lora_up.weight", 2);
    tensors.extend(factors("lora_te_text_model_q_proj", "lora_down.weight", "lora_up.weight", 2));
    write_safetensors(&world.path("lora.safetensors"), &tensors);
    let line = "linear --model @base --model @base+@lora.safetensors --out @out";
    world.run(line).ok().says(&["for the text_encoder is left out"]);
}

#[test]
fn an_adapter_in_a_recipe_is_merged_too_and_its_digest_is_recorded() {
    let world = World::new();
    world.checkpoint("base", &model());
    peft(&world, "lora", &json!({}), &factors(Q, "lora_A.weight", "lora_B.weight", 2));
    let (base, lora) = (world.path("base"), world.path("lora"));
    let recipe = format!(
        "merge_method: linear\nmodels:\n  - model: {0}\n    parameters: {{weight: 1}}\n  - model: {0}+{1}\n    parameters: \
         {{weight: 1}}\ndtype: float32\n",
        base.display(),
        lora.display()
    );
    fs::write(world.path("r.yml"), recipe).unwrap();
    world.run("recipe @r.yml --out @out").ok();
    let found = world.read("out")["model.layers.0.self_attn.q_proj.weight"].values();
    let before = model()["model.layers.0.self_attn.q_proj.weight"].values();
    for ((a, b), w) in found.iter().zip(expected(2.0, 2)).zip(before) {
        assert!((f64::from(*a) - (b + f64::from(w)) / 2.0).abs() < 1e-6, "{a}");
    }
    let record = |out: &str| crate::world::json(&world.path(out).join("cpift.json"))["inputs"].clone();
    let digests = record("out");
    assert_ne!(digests["model:1"]["digest"], digests["model:2"]["digest"]);
    // Another scaling is another input.
    world.run("recipe @r.yml --out @out --skip-up-to-date").ok().says(&["up to date"]);
    peft(&world, "lora", &json!({"lora_alpha": 5}), &factors(Q, "lora_A.weight", "lora_B.weight", 2));
    world.run("recipe @r.yml --out @out --skip-up-to-date").ok();
    assert_eq!(digests["model:1"]["digest"], record("out")["model:1"]["digest"]);
    assert_ne!(digests["model:2"]["digest"], record("out")["model:2"]["digest"]);
}

#[test]
fn the_output_does_not_depend_on_threads_and_replaces_no_adapter() {
    let world = World::new();
    world.checkpoint("base", &model());
    peft(&world, "lora", &json!({}), &factors(Q, "lora_A.weight", "lora_B.weight", 2));
    let line = "slerp --model @base --model @base+@lora";
    world.run(&format!("{line} --out @one --threads 1")).ok();
    world.run(&format!("{line} --out @two --threads 2")).ok();
    assert_eq!(bytes(&world.path("one/model.safetensors")), bytes(&world.path("two/model.safetensors")));
    fs::write(world.path("lora/cpift.json"), "{}").unwrap();
    world.misused(&format!("{line} --out @lora --force"), &["would replace the input"]);
}

#[test]
fn adapters_that_do_not_fit_are_refused_by_tensor() {
    let good = || factors(Q, "lora_A.weight", "lora_B.weight", 2);
    let with = |name: &str, tensor: Tensor| {
        let mut tensors = good();
        tensors.insert(name.to_owned(), tensor);
        tensors
    };
    let numbers = |shape: &[usize]| Tensor::f32(shape, &vec![0.5; shape.iter().product()]);
    let (a, b) = (format!("{Q}.lora_A.weight"), format!("{Q}.lora_B.weight"));
    let mut lonely = good();
    lonely.remove(&b);
    let cases: Vec<(&str, serde_json::Value, Tensors, Vec<&str>)> = vec![
        (
            "another model",
            json!({}),
            with(&a.replace("layers.0", "layers.9"), numbers(&[2, 4])),
            vec!["layers.9", "no tensor of"],
        ),
        ("rank", json!({}), with(&b, numbers(&[6, 3])), vec!["lora_B", "expected: rank 2", "found: rank 3"]),
        ("rank of config", json!({"r": 3}), good(), vec!["expected: rank 3", "found: rank 2"]),
        (
            "shape",
            json!({}),
            with(&a, numbers(&[2, 5])),
            vec!["lora_A", "expected: [2, 4]", "found: [2, 5]", "another model"],
        ),
        ("half a pair", json!({}), lonely, vec!["no lora_B", "lora_A"]),
        (
            "style",
            json!({}),
            with("lora_unet_q.hada_w1_a", numbers(&[2, 2])),
            vec!["LoHa is not supported", "hada_w1_a"],
        ),
        ("kind", json!({"peft_type": "IA3"}), good(), vec!["adapter_config.json", "IA3", "merge_and_unload"]),
        ("start", json!({"init_lora_weights": "pissa_niter_4"}), good(), vec!["changed base weights", "pissa"]),
        ("biases", json!({"lora_bias": true}), good(), vec!["lora_bias is not supported"]),
        (
            "not finite",
            json!({}),
            with(&a, Tensor::f32(&[2, 4], &[f32::NAN; 8])),
            vec!["not a finite number", "lora_A"],
        ),
        (
            "integers",
            json!({}),
            with(&a, Tensor { dtype: Dtype::I8, shape: vec![2, 4], bytes: vec![1; 8] }),
            vec!["lora_A", "I8"],
        ),
    ];
    let embed = |part: &str| format!("base_model.model.model.embed_tokens.{part}");
    let dora_of_embedding = Tensors::from([
        (embed("lora_embedding_A"), numbers(&[2, 5])),
        (embed("lora_embedding_B"), numbers(&[4, 2])),
        (embed("lora_magnitude_vector"), numbers(&[4])),
    ]);
    let magnitude = |n: usize| with(&format!("{Q}.lora_magnitude_vector.weight"), numbers(&[n]));
    let cases = cases.into_iter().chain([
        (
            "DoRA of an embedding",
            json!({"use_dora": true}),
            dora_of_embedding,
            vec![
                "embed_tokens.lora_magnitude_vector",
                "DoRA is supported for matrices of linear layers only",
                "hint: ",
            ],
        ),
        (
            "DoRA of another size",
            json!({"use_dora": true}),
            magnitude(5),
            vec!["lora_magnitude_vector", "expected: 6 numbers", "found: [5]", "hint: "],
        ),
        (
            "key",
            json!({}),
            with(&format!("{Q}.lora_A.other.thing"), numbers(&[2, 4])),
            vec!["unknown style", "other.thing"],
        ),
        (
            "twice",
            json!({}),
            with(&format!("{Q}.lora_down.weight"), numbers(&[2, 4])),
            vec!["a second part of one product"],
        ),
        (
            "replaced weight",
            json!({}),
            with("base_model.model.model.embed_tokens.modules_to_save.weight", numbers(&[7, 4])),
            vec!["embed_tokens", "expected: [5, 4]", "found: [7, 4]", "hint: "],
        ),
    ]);
    for (what, settings, tensors, parts) in cases {
        let world = World::new();
        world.checkpoint("base", &model());
        peft(&world, "lora", &settings, &tensors);
        let parts: Vec<&str> = ["@lora"].into_iter().chain(parts).collect();
        world.refused("linear --model @base --model @base+@lora --out @out", &parts);
        let _ = what;
    }
    let world = World::new();
    world.checkpoint("base", &model());
    world.refused("linear --model @base --model @base+@none --out @out", &["@none: no such adapter"]);
    fs::create_dir(world.path("empty")).unwrap();
    world.refused("linear --model @base --model @base+@empty --out @out", &["@empty: no adapter in this directory"]);
    fs::write(world.path("empty/adapter_model.bin"), "x").unwrap();
    world.refused("linear --model @base --model @base+@empty --out @out", &["pickled checkpoint"]);
}
