//! The table of inputs in the README: every kind of checkpoint with every command.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use cpift_core::format::checkpoint::{Checkpoint, CheckpointWriter};
use cpift_core::{Dtype, TensorSpec};
use cpift_testkit::{Tensor, Tensors, expect_entries, write_safetensors};
use serde_json::{Value, json};

use crate::world::{World, core, json as read_json};

/// Name of the matrix that all kinds have, below that of a component.
const MATRIX: &str = "model.layers.0.proj.weight";

/// A kind of checkpoint: a base of ones and a model of threes.
struct Kind {
    name: &'static str,
    /// Writes the checkpoint of the given name and value.
    write: fn(&World, &str, f32),
    /// Base and model, as the command line names them.
    base: &'static str,
    model: &'static str,
    /// Name of the matrix.
    matrix: &'static str,
    is_file: bool,
}

fn matrix(value: f32) -> Tensor {
    Tensor::f32(&[4, 3], &[value; 12])
}

fn model(value: f32) -> Tensors {
    Tensors::from([
        (MATRIX.to_owned(), matrix(value)),
        ("model.norm.weight".to_owned(), Tensor::f32(&[4], &[value; 4])),
    ])
}

fn text(path: &Path, content: &Value) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content.to_string()).unwrap();
}

fn safetensors(path: &Path, tensors: &Tensors) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    write_safetensors(path, tensors);
}

fn directory(world: &World, name: &str, value: f32) {
    world.checkpoint(name, &model(value));
}

fn shards(world: &World, name: &str, value: f32) {
    let (folder, tensors) = (world.path(name), model(value));
    text(&folder.join("config.json"), &json!({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}));
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .map(|(name, t)| TensorSpec { name: name.clone(), dtype: t.dtype, shape: t.shape.clone() })
        .collect();
    let writer = CheckpointWriter::create(&folder, &specs, 16).unwrap();
    tensors.iter().for_each(|(name, tensor)| writer.write(name, 0, &tensor.bytes).unwrap());
}

fn named(world: &World, name: &str, value: f32, file: &str) {
    safetensors(&world.path(name).join(file), &model(value));
}

fn pipeline(world: &World, name: &str, value: f32) {
    let folder = world.path(name);
    text(&folder.join("model_index.json"), &json!({"_class_name": "Pipeline", "unet": ["diffusers", "UNet"]}));
    text(&folder.join("unet/config.json"), &json!({"_class_name": "UNet"}));
    safetensors(&folder.join("unet/diffusion_pytorch_model.safetensors"), &model(value));
}

fn sentences(world: &World, name: &str, value: f32) {
    world.checkpoint(name, &model(value));
    let folder = world.path(name);
    text(&folder.join("modules.json"), &json!([{"idx": 0, "path": ""}, {"idx": 1, "path": "2_Dense"}]));
    text(&folder.join("2_Dense/config.json"), &json!({"in_features": 1}));
    let dense = Tensors::from([("linear.weight".to_owned(), Tensor::f32(&[2, 2], &[value; 4]))]);
    safetensors(&folder.join("2_Dense/model.safetensors"), &dense);
}

/// The adapter adds `value` − 1 to every element of the matrix.
fn adapter(world: &World, name: &str, value: f32) {
    world.checkpoint("base", &model(1.0));
    let folder = world.path(name);
    text(&folder.join("adapter_config.json"), &json!({"peft_type": "LORA", "r": 1, "lora_alpha": 1}));
    let key = |part: &str| format!("base_model.model.{}.lora_{part}.weight", MATRIX.trim_end_matches(".weight"));
    let tensors = Tensors::from([
        (key("A"), Tensor::f32(&[1, 3], &[1.0; 3])),
        (key("B"), Tensor::f32(&[4, 1], &[value - 1.0; 4])),
    ]);
    safetensors(&folder.join("adapter_model.safetensors"), &tensors);
}

fn scaled(world: &World, name: &str, value: f32) {
    let mut tensors = model(value);
    tensors.insert(MATRIX.to_owned(), Tensor::floats(Dtype::F8E4M3, &[4, 3], &[value / 2.0; 12]));
    tensors.insert(format!("{MATRIX}_scale"), Tensor::f32(&[1], &[2.0]));
    world.checkpoint(name, &tensors);
    let config =
        json!({"model_type": "llama", "torch_dtype": "float32", "quantization_config": {"quant_method": "fp8"}});
    text(&world.path(name).join("config.json"), &config);
}

fn unscaled(world: &World, name: &str, value: f32) {
    let mut tensors = model(value);
    tensors.insert(MATRIX.to_owned(), Tensor::floats(Dtype::F8E5M2, &[4, 3], &[value; 12]));
    world.checkpoint(name, &tensors);
}

fn kinds() -> Vec<Kind> {
    let kind = |name, write| Kind { name, write, base: "@base", model: "@tuned", matrix: MATRIX, is_file: false };
    let file = |world: &World, name: &str, value: f32| {
        safetensors(&world.path(name).with_extension("safetensors"), &model(value));
    };
    let unet = "unet/model.layers.0.proj.weight";
    vec![
        kind("a directory of one file", directory),
        kind("shards with an index", shards),
        kind("consolidated", |world, name, value| named(world, name, value, "consolidated.safetensors")),
        kind("a variant", |world, name, value| named(world, name, value, "model.fp16.safetensors")),
        Kind { base: "@base.safetensors", model: "@tuned.safetensors", is_file: true, ..kind("a bare file", file) },
        kind("a component of diffusers", |world, name, value| {
            named(world, name, value, "diffusion_pytorch_model.safetensors");
        }),
        Kind { matrix: unet, ..kind("a pipeline of diffusers", pipeline) },
        kind("sentence-transformers", sentences),
        Kind { model: "@base+@tuned", ..kind("a model with an adapter", adapter) },
        kind("F8 with scales", scaled),
        kind("F8 without scales", unscaled),
    ]
}

#[test]
fn every_kind_of_checkpoint_is_read_by_every_command() {
    for Kind { name, write, base, model, matrix, is_file } in kinds() {
        let world = World::new();
        if base == "@base" || is_file {
            write(&world, "base", 1.0);
        }
        write(&world, "tuned", 3.0);
        let values = |out: &str| world.read(out)[matrix].values();
        world.run(&format!("linear --model {base} --model {model} --out @linear")).ok();
        assert_eq!(values("linear"), [2.0; 12], "{name}");
        assert_eq!(world.path("linear").is_file(), is_file, "{name}");
        let recipe = format!(
            "merge_method: task_arithmetic\nbase_model: {0}\nmodels:\n  - model: {1}\n    parameters: {{weight: 0.5}}\n\
             dtype: float32\n",
            world.resolve(base),
            world.resolve(model)
        );
        fs::write(world.path("r.yml"), recipe).unwrap();
        world.run("recipe @r.yml --out @recipe").ok();
        assert_eq!(values("recipe"), [2.0; 12], "{name}");
        // The core is transplanted, and the rest is halfway.
        world.mask_between(base, model, "t", &core(matrix, &[1, 7]));
        world.groups_of(base, &["t"]);
        let line = format!("cpi --base {base} --groups @groups.json --task t={model} --mask t=@t.mask --out @cpi");
        world.run(&line).ok();
        let expected: Vec<f32> = (0..12).map(|i| if [1, 7].contains(&i) { 3.0 } else { 2.0 }).collect();
        assert_eq!(values("cpi"), expected, "{name}");
        world.run(&format!("extract-lora --base {base} --model {model} --rank 1 --out @lora")).ok();
        world.run(&format!("linear --model {base}+@lora --model {base}+@lora --dtype f32 --out @again")).ok();
        assert!(values("again").iter().all(|v| (v - 3.0).abs() < 1e-6), "{name}");
        for path in [base, model, "@linear", "@recipe", "@cpi"] {
            world.run(&format!("verify {path}")).ok().says(&["all finite"]);
        }
        // The digest is the one that records have.
        let record = if is_file { "linear.cpift.json" } else { "linear/cpift.json" };
        let recorded = read_json(&world.path(record))["inputs"]["model:2"]["digest"].clone();
        let said: Value = serde_json::from_str(&world.run(&format!("verify {model} --json")).ok().stdout).unwrap();
        assert_eq!(said["digest"], recorded, "{name}");
        if !is_file {
            let said = world.run(&format!("digest {model}")).ok().stdout;
            assert!(said.starts_with(recorded.as_str().unwrap()), "{name}: {said}");
        }
    }
}

/// Writes weights that are no numbers under `name`, and returns the path on the command line and a
/// part of the message.
type Unreadable = fn(&World, &str) -> (String, &'static str);

fn quantised(world: &World, name: &str, method: &str) -> String {
    world.checkpoint(name, &model(1.0));
    let config = json!({"model_type": "llama", "quantization_config": {"quant_method": method, "bits": 4}});
    text(&world.path(name).join("config.json"), &config);
    format!("@{name}")
}

#[test]
fn weights_that_are_no_numbers_are_refused_by_every_command() {
    let cases: [Unreadable; 6] = [
        |world, name| (quantised(world, name, "gptq"), "use the model that was quantised"),
        |world, name| (quantised(world, name, "awq"), "use the model that was quantised"),
        |world, name| (quantised(world, name, "bitsandbytes"), "dequantize()"),
        |world, name| {
            fs::create_dir(world.path(name)).unwrap();
            fs::write(world.path(name).join("model.gguf"), "GGUF").unwrap();
            (format!("@{name}"), "use the safetensors repository")
        },
        |world, name| {
            fs::create_dir(world.path(name)).unwrap();
            fs::write(world.path(name).join("pytorch_model.bin"), "PK").unwrap();
            (format!("@{name}"), "pickled checkpoint")
        },
        |world, name| {
            fs::write(world.path(name), b"PK\x03\x04").unwrap();
            fs::rename(world.path(name), world.path(name).with_extension("bin")).unwrap();
            (format!("@{name}.bin"), "pickled checkpoint")
        },
    ];
    for case in cases {
        let world = World::new();
        directory(&world, "base", 1.0);
        directory(&world, "tuned", 3.0);
        world.mask_between("@base", "@tuned", "t", &core(MATRIX, &[1]));
        world.groups_of("@base", &["t"]);
        let (path, part) = case(&world, "other");
        let parts = [path.as_str(), part, "hint: "];
        let recipe = format!(
            "merge_method: linear\nmodels: [{{model: {}, parameters: {{weight: 1}}}}, {{model: {}, parameters: {{weight: 1}}}}]\n",
            world.resolve("@base"),
            world.resolve(&path)
        );
        fs::write(world.path("r.yml"), recipe).unwrap();
        world.refused(&format!("linear --model @base --model {path} --out @out"), &parts);
        world.refused("recipe @r.yml --out @out", &parts);
        let line = format!("cpi --base @base --groups @groups.json --task t={path} --mask t=@t.mask --out @out");
        world.refused(&line, &parts);
        world.refused(&format!("extract-lora --base @base --model {path} --rank 1 --out @out"), &parts);
        world.refused(&format!("verify {path}"), &parts);
    }
}

#[test]
fn layouts_that_differ_are_refused_by_the_commands_that_need_one_layout() {
    let prefixed =
        |value: f32| model(value).into_iter().map(|(name, tensor)| (format!("inner.{name}"), tensor)).collect();
    let mut fewer = model(3.0);
    fewer.remove("model.norm.weight");
    let mut wider = model(3.0);
    wider.insert("model.embed_tokens.weight".into(), Tensor::f32(&[3, 2], &[3.0; 6]));
    let mut with_embedding = model(1.0);
    with_embedding.insert("model.embed_tokens.weight".into(), Tensor::f32(&[2, 2], &[1.0; 4]));
    let cases: [(Tensors, Tensors, &str); 3] = [
        (model(1.0), prefixed(3.0), MATRIX),
        (model(1.0), fewer, "model.norm.weight"),
        (with_embedding, wider, "model.embed_tokens.weight"),
    ];
    for (base, tuned, tensor) in cases {
        let world = World::new();
        world.checkpoint("base", &base);
        world.checkpoint("tuned", &tuned);
        world.mask_between("@base", "@tuned", "t", &core(MATRIX, &[1]));
        world.groups_of("@base", &["t"]);
        let tensor = format!("tensor: {tensor}");
        let parts = ["@tuned", tensor.as_str(), "hint: "];
        world.refused("cpi --base @base --groups @groups.json --task t=@tuned --mask t=@t.mask --out @out", &parts);
        world.refused("extract-lora --base @base --model @tuned --rank 1 --out @out", &parts);
    }
}

/// Layers of one matrix each, whose value is that of the model and the number of the layer.
fn layers(n: usize, value: f32) -> Tensors {
    let layer = |i: usize| (format!("model.layers.{i}.proj.weight"), Tensor::f32(&[2], &[value + i as f32; 2]));
    (0..n).map(layer).chain([("model.norm.weight".to_owned(), Tensor::f32(&[2], &[value; 2]))]).collect()
}

#[test]
fn slices_of_bare_files_make_a_file() {
    let world = World::new();
    safetensors(&world.path("a.safetensors"), &layers(3, 10.0));
    safetensors(&world.path("b.safetensors"), &layers(3, 20.0));
    let recipe = |ranges: [&str; 2]| {
        let [a, b] = ["@a.safetensors", "@b.safetensors"].map(|path| world.resolve(path));
        let text = format!(
            "merge_method: passthrough\nslices:\n  - sources: [{{model: {a}, layer_range: {}}}]\n  - sources: [{{model: {b}, \
             layer_range: {}}}]\ndtype: float32\n",
            ranges[0], ranges[1]
        );
        fs::write(world.path("r.yml"), text).unwrap();
    };
    recipe(["[0, 2]", "[1, 3]"]);
    world.run("recipe @r.yml --out @out.safetensors").ok();
    let out = world.read("out.safetensors");
    let first = |name: String| out[&name].values()[0];
    let found: Vec<f32> = (0..4).map(|i| first(format!("model.layers.{i}.proj.weight"))).collect();
    assert_eq!((found, out.len()), (vec![10.0, 11.0, 21.0, 22.0], 5));
    world.run("verify @out.safetensors").ok();
    recipe(["[0, 2]", "[1, 4]"]);
    world.refused("recipe @r.yml --out @o.safetensors", &["@b.safetensors", "beyond the model", "at most [0, 3]"]);
    // One slice with all layers is the model as a whole.
    let a = world.resolve("@a.safetensors");
    let text = format!("merge_method: passthrough\nslices: [{{sources: [{{model: {a}, layer_range: [0, 3]}}]}}]\n");
    fs::write(world.path("r.yml"), text).unwrap();
    world.run("recipe @r.yml --out @whole.safetensors").ok();
    let bytes = |name: &str| world.read(name).into_iter().map(|(name, t)| (name, t.bytes)).collect::<Vec<_>>();
    assert_eq!(bytes("whole.safetensors"), bytes("a.safetensors"));
}

#[test]
fn results_of_a_recipe_are_merged_on_as_files_and_with_adapters() {
    let world = World::new();
    for (name, value) in [("a", 1.0), ("b", 3.0), ("c", 6.0)] {
        safetensors(&world.path(name).with_extension("safetensors"), &model(value));
    }
    adapter(&world, "lora", 3.0);
    let [a, b, c, lora] =
        ["@a.safetensors", "@b.safetensors", "@c.safetensors", "@lora"].map(|path| world.resolve(path));
    let recipe = |adapter: &str| {
        let text = format!(
            "name: first\nmerge_method: linear\nmodels:\n  - {{model: {a}, parameters: {{weight: 1}}}}\n  - {{model: {b}, \
             parameters: {{weight: 1}}}}\ndtype: float32\n---\nmerge_method: linear\nmodels:\n  - {{model: first+{adapter}, \
             parameters: {{weight: 1}}}}\n  - {{model: {c}, parameters: {{weight: 1}}}}\ndtype: float32\n"
        );
        fs::write(world.path("r.yml"), text).unwrap();
    };
    recipe(&lora);
    world.run("recipe @r.yml --out @out.safetensors").ok();
    let out = world.read("out.safetensors");
    // The mean of 2 + 2 and 6, and without the adapter that of 2 and 6.
    assert_eq!((out[MATRIX].values(), out["model.norm.weight"].values()), (vec![5.0; 12], vec![4.0; 4]));
    let kept = ["a.safetensors", "b.safetensors", "c.safetensors", "base", "lora", "r.yml"];
    let made = ["out.safetensors", "out.safetensors.cpift.json"];
    expect_entries(&world.path(""), &[&kept[..], &made[..]].concat());
    recipe(&world.resolve("@none"));
    world.refused("recipe @r.yml --out @o.safetensors", &["@r.yml", "does not exist", "first+@none"]);
}

#[test]
fn a_tied_embedding_and_a_head_of_its_own_get_each_their_rows() {
    let world = World::new();
    let embedding = |rows: usize, value: f32| {
        Tensor::f32(&[rows, 2], &(0..rows).flat_map(|row| [value + row as f32; 2]).collect::<Vec<_>>())
    };
    let tokenizer = |name: &str, tokens: &[&str]| {
        let vocab: BTreeMap<&str, usize> = tokens.iter().copied().zip(0..).collect();
        let file = json!({"model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": []});
        text(&world.path(name).join("tokenizer.json"), &file);
    };
    let embed = "model.embed_tokens.weight".to_owned();
    world.checkpoint("tied", &Tensors::from([(embed.clone(), embedding(2, 10.0))]));
    tokenizer("tied", &["x", "y"]);
    let own = Tensors::from([(embed, embedding(2, 20.0)), ("lm_head.weight".to_owned(), embedding(2, 30.0))]);
    world.checkpoint("own", &own);
    tokenizer("own", &["x", "z"]);
    world.run("linear --model @tied --model @own --tokenizer union --out @out").ok();
    let out = world.read("out");
    let first = |name: &str| out[name].values().chunks(2).map(|row| row[0]).collect::<Vec<f32>>();
    // x is in both; y has the row of the first in both, and z that of the second.
    assert_eq!(first("model.embed_tokens.weight"), [15.0, 11.0, 21.0]);
    assert_eq!(first("lm_head.weight"), [20.0, 11.0, 31.0]);
    let checkpoint = Checkpoint::open(&world.path("out")).unwrap();
    assert!(!checkpoint.tied());
}
