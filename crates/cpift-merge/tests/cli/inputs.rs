//! Kinds of checkpoints: bare files, directories of diffusers and sentence-transformers, variants,
//! 8-bit weights with scales, mixed dtypes, and the files beside the weights.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use cpift_core::Dtype;
use cpift_core::format::safetensors::{FileWriter, MappedFile, TensorSpec};
use cpift_testkit::{Tensor, Tensors, expect_entries, write_safetensors};
use serde_json::json;

use crate::world::{World, bytes, cast, json as read_json, w};

/// Writes a file with metadata.
fn file(path: &Path, tensors: &Tensors, metadata: &[(&str, &str)]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let specs: Vec<TensorSpec> =
        tensors.iter().map(|(n, t)| TensorSpec { name: n.clone(), dtype: t.dtype, shape: t.shape.clone() }).collect();
    let metadata: BTreeMap<String, String> = metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let writer = FileWriter::create(path, &specs, &metadata).unwrap();
    tensors.iter().for_each(|(name, tensor)| writer.write(name, 0, &tensor.bytes).unwrap());
}

fn text(world: &World, path: &str, content: &str) {
    let path = world.path(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

#[test]
fn two_files_make_a_file_with_the_metadata_of_the_first() {
    let world = World::new();
    let metadata = [("modelspec.title", "one"), ("ss_seed", "7"), ("sshs_model_hash", "00")];
    file(&world.path("a.safetensors"), &w(&[1.0, 2.0]), &metadata);
    file(&world.path("b.safetensors"), &w(&[3.0, 6.0]), &[]);
    let line = "linear --model @a.safetensors --model @b.safetensors --out @out.safetensors";
    world.run(line).ok();
    assert_eq!(world.read_w("out.safetensors"), [2.0, 4.0]);
    let out = MappedFile::open(&world.path("out.safetensors")).unwrap();
    let kept: Vec<(&str, &str)> = out.metadata.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    // The hash of the content is not that of the output.
    assert_eq!(kept, [("format", "pt"), ("modelspec.title", "one"), ("ss_seed", "7")]);
    let names = ["a.safetensors", "b.safetensors", "out.safetensors", "out.safetensors.cpift.json"];
    expect_entries(&world.path(""), &names);
    world.refused(line, &["@out.safetensors: the output exists already", "--force"]);
    world.run(&format!("{line} --skip-up-to-date")).ok().says(&["up to date"]);
    world.run(&format!("{line} --force")).ok();
    world.run("verify @out.safetensors").ok();
    world.misused(&line.replace("@out.safetensors", "@a.safetensors --force"), &["would replace the input"]);
}

#[test]
fn a_file_and_a_directory_of_one_model_give_what_the_first_is() {
    let world = World::new();
    world.checkpoint("a", &w(&[1.0]));
    file(&world.path("b.safetensors"), &w(&[3.0]), &[]);
    world.run("linear --model @a --model @b.safetensors --out @folder").ok();
    world.run("linear --model @b.safetensors --model @a --out @file").ok();
    assert_eq!((world.read_w("folder"), world.read_w("file")), (vec![2.0], vec![2.0]));
    assert!(world.path("folder/config.json").is_file() && world.path("file").is_file());
}

/// Writes a component of a pipeline of diffusers.
fn unet(world: &World, name: &str, value: f32) {
    text(world, &format!("{name}/config.json"), r#"{"_class_name": "UNet2DConditionModel", "sample_size": 8}"#);
    let tensors = Tensors::from([
        ("conv_in.weight".to_owned(), Tensor::floats(Dtype::F16, &[2, 1, 1, 1, 2], &[value; 4])),
        ("scale".to_owned(), Tensor::floats(Dtype::F32, &[], &[value])),
        ("empty".to_owned(), Tensor::floats(Dtype::F16, &[0, 3], &[])),
        ("größe.重み".to_owned(), Tensor::floats(Dtype::F16, &[1], &[value])),
    ]);
    file(&world.path(name).join("diffusion_pytorch_model.safetensors"), &tensors, &[("format", "pt")]);
}

#[test]
fn a_component_of_diffusers_keeps_its_names_and_each_tensor_its_dtype() {
    let world = World::new();
    unet(&world, "a", 1.0);
    unet(&world, "b", 3.0);
    text(&world, "a/notes/usage.md", "text");
    world.run("linear --model @a --model @b --out @out").ok().says(&["notes/usage.md"]);
    let names = ["README.md", "config.json", "cpift.json", "diffusion_pytorch_model.safetensors", "notes"];
    expect_entries(&world.path("out"), &names);
    let out = world.read("out");
    assert_eq!(out["scale"].values(), [2.0]);
    assert_eq!((out["scale"].dtype, out["conv_in.weight"].dtype), (Dtype::F32, Dtype::F16));
    assert_eq!((out["empty"].shape.as_slice(), out["größe.重み"].values()), (&[0, 3][..], vec![2.0]));
    // Nothing is written into a config that says no dtype.
    assert_eq!(read_json(&world.path("out/config.json")), read_json(&world.path("a/config.json")));
    world.run("verify @out").ok().says(&["matches"]);
    world.run("linear --model @a --model @b --dtype f32 --shard-size 8 --out @shards").ok();
    assert!(world.path("shards/diffusion_pytorch_model.safetensors.index.json").exists());
    assert!(world.path("shards/diffusion_pytorch_model-00001-of-00002.safetensors").exists());
    assert_eq!(world.read("shards")["conv_in.weight"].dtype, Dtype::F32);
}

#[test]
fn a_whole_pipeline_is_merged_component_by_component() {
    let world = World::new();
    for (name, value) in [("a", 1.0), ("b", 3.0)] {
        unet(&world, &format!("{name}/unet"), value);
        text(&world, &format!("{name}/text_encoder/config.json"), "{}");
        file(&world.path(name).join("text_encoder/model.safetensors"), &w(&[value]), &[]);
        text(&world, &format!("{name}/scheduler/scheduler_config.json"), "{}");
        let index = json!({"_class_name": "Pipeline", "unet": ["diffusers", "UNet2DConditionModel"],
            "text_encoder": ["transformers", "CLIPTextModel"], "scheduler": ["diffusers", "DDIMScheduler"]});
        text(&world, &format!("{name}/model_index.json"), &index.to_string());
        text(&world, &format!("{name}/safety/pytorch_model.bin"), "x");
    }
    world.run("linear --model @a --model @b --out @out").ok().says(&["left out", "safety/"]);
    let out = world.read("out");
    assert_eq!((out["text_encoder/w"].values(), out["unet/scale"].values()), (vec![2.0], vec![2.0]));
    for name in ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"] {
        assert_eq!(bytes(&world.path("out").join(name)), bytes(&world.path("a").join(name)), "{name}");
    }
    assert!(MappedFile::open(&world.path("out/text_encoder/model.safetensors")).unwrap().entries.contains_key("w"));
    assert!(!world.path("out/safety").exists());
    world.run("verify @out").ok().says(&["matches"]);
}

#[test]
fn modules_beside_an_encoder_are_merged_and_their_files_copied() {
    let world = World::new();
    for (name, value) in [("a", 1.0), ("b", 3.0)] {
        world.checkpoint(name, &w(&[value]));
        text(&world, &format!("{name}/config.json"), r#"{"model_type": "bert", "architectures": ["BertModel"]}"#);
        let modules = json!([{"idx": 0, "path": "", "type": "Transformer"},
            {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]);
        text(&world, &format!("{name}/modules.json"), &modules.to_string());
        text(&world, &format!("{name}/1_Pooling/config.json"), "{}");
        text(&world, &format!("{name}/2_Dense/config.json"), r#"{"in_features": 1}"#);
        text(&world, &format!("{name}/modeling_own.py"), "code = 1\n");
        text(&world, &format!("{name}/.git/config"), "hidden");
        text(&world, &format!("{name}/pytorch_model.bin"), "pickle");
        text(&world, &format!("{name}/onnx/model.onnx"), "other weights");
        let dense = Tensors::from([("linear.weight".to_owned(), Tensor::f32(&[1, 1], &[value]))]);
        file(&world.path(name).join("2_Dense/model.safetensors"), &dense, &[]);
    }
    world.run("slerp --model @a --model @b --t 0.5 --out @out").ok().says(&["left out", "onnx/", "pytorch_model.bin"]);
    assert_eq!(world.read("out")["2_Dense/linear.weight"].values(), [2.0]);
    for name in ["modules.json", "1_Pooling/config.json", "2_Dense/config.json", "modeling_own.py"] {
        assert_eq!(bytes(&world.path("out").join(name)), bytes(&world.path("a").join(name)), "{name}");
    }
    for absent in [".git", "pytorch_model.bin", "onnx"] {
        assert!(!world.path("out").join(absent).exists(), "{absent}");
    }
    // A module whose weights are a pickle is not dropped in silence.
    fs::remove_file(world.path("b/2_Dense/model.safetensors")).unwrap();
    text(&world, "b/2_Dense/pytorch_model.bin", "pickle");
    world.refused("linear --model @a --model @b --out @o", &["@b/2_Dense", "pickled checkpoint"]);
    // Nor is the model itself.
    fs::remove_file(world.path("b/2_Dense/pytorch_model.bin")).unwrap();
    fs::rename(world.path("b/model.safetensors"), world.path("b/pytorch_model.bin")).unwrap();
    text(&world, "b/config.json", &json!({"model_type": "bert"}).to_string());
    file(&world.path("b/2_Dense/model.safetensors"), &w(&[1.0]), &[]);
    world.refused("linear --model @a --model @b --out @o", &["@b: no weights", "pickled checkpoint"]);
}

#[test]
fn other_names_of_weights_are_read_and_kept() {
    for name in ["consolidated.safetensors", "model.fp16.safetensors", "weights_1.0.safetensors"] {
        let world = World::new();
        for (folder, value) in [("a", 1.0), ("b", 3.0)] {
            file(&world.path(folder).join(name), &w(&[value]), &[]);
        }
        world.run("linear --model @a --model @b --out @out").ok();
        expect_entries(&world.path("out"), &["README.md", "cpift.json", name]);
        assert_eq!(world.read_w("out"), [2.0]);
        // Not beside the configuration of a transformers model, which would not load them.
        if name != "weights_1.0.safetensors" {
            text(&world, "b/config.json", &json!({"model_type": "llama"}).to_string());
            world.refused("linear --model @a --model @b --out @o", &["@b: no weights", name]);
        }
    }
    let world = World::new();
    for name in ["one", "two"] {
        file(&world.path("a").join(name).with_extension("safetensors"), &w(&[1.0]), &[]);
    }
    world.checkpoint("b", &w(&[1.0]));
    world.refused(
        "linear --model @b --model @a --out @out",
        &["@a: several sets of weights", "one.safetensors", "hint"],
    );
}

#[test]
fn read_only_snapshots_of_links_are_read() {
    let world = World::new();
    world.checkpoint("blobs", &w(&[1.0]));
    world.checkpoint("b", &w(&[3.0]));
    fs::create_dir(world.path("snapshot")).unwrap();
    for name in ["config.json", "model.safetensors"] {
        let blob = world.path("blobs").join(name);
        fs::set_permissions(&blob, fs::Permissions::from_mode(0o444)).unwrap();
        symlink(Path::new("../blobs").join(name), world.path("snapshot").join(name)).unwrap();
    }
    text(&world, "blobs/extra.txt", "x");
    symlink("../blobs/extra.txt", world.path("snapshot/extra.txt")).unwrap();
    world.run("linear --model @snapshot --model @b --out @out").ok();
    assert_eq!(world.read_w("out"), [2.0]);
    let copied = fs::symlink_metadata(world.path("out/extra.txt")).unwrap();
    assert!(copied.is_file() && copied.permissions().mode() & 0o200 != 0);
}

#[test]
fn a_config_without_architectures_is_no_obstacle() {
    let world = World::new();
    world.checkpoint("a", &w(&[1.0]));
    world.checkpoint("b", &w(&[3.0]));
    text(&world, "b/config.json", r#"{"model_type": "llama"}"#);
    world.run("linear --model @a --model @b --out @out").ok();
    text(&world, "b/config.json", r#"{"architectures": ["GemmaForCausalLM"]}"#);
    world.refused("linear --model @a --model @b --out @o", &["architectures differs", "GemmaForCausalLM"]);
}

/// 8-bit weights with one scale per block of 2×2, per row, and in all.
fn eight_bits(world: &World, name: &str, value: f32) {
    let f8 = |shape: &[usize]| Tensor::floats(Dtype::F8E4M3, shape, &vec![value; shape.iter().product()]);
    let tensors = Tensors::from([
        ("a.weight".to_owned(), f8(&[3, 4])),
        ("a.weight_scale_inv".to_owned(), Tensor::f32(&[2, 2], &[1.0, 2.0, 0.5, 4.0])),
        ("b.weight".to_owned(), f8(&[2, 3])),
        ("b.weight_scale".to_owned(), Tensor::f32(&[2, 1], &[3.0, 0.25])),
        ("c.weight".to_owned(), f8(&[2, 2])),
        ("c.weight_scale".to_owned(), Tensor::f32(&[1], &[1.5])),
        ("c.input_scale".to_owned(), Tensor::f32(&[1], &[9.0])),
        ("norm.weight".to_owned(), Tensor::floats(Dtype::BF16, &[2], &[value; 2])),
    ]);
    world.checkpoint(name, &tensors);
    let config = json!({"model_type": "x", "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 2]}});
    text(world, &format!("{name}/config.json"), &config.to_string());
}

#[test]
fn weights_of_eight_bits_are_merged_as_numbers_and_stored_in_sixteen() {
    let world = World::new();
    eight_bits(&world, "a", 1.0);
    eight_bits(&world, "b", 2.0);
    world.run("linear --model @a --model @b --out @out").ok().says(&["3 weights of 8 bits are read with their scales"]);
    let out = world.read("out");
    assert_eq!(out.keys().collect::<Vec<_>>(), ["a.weight", "b.weight", "c.weight", "norm.weight"]);
    assert!(out.values().all(|tensor| tensor.dtype == Dtype::BF16));
    assert_eq!(out["a.weight"].values(), [1.5, 1.5, 3.0, 3.0, 1.5, 1.5, 3.0, 3.0, 0.75, 0.75, 6.0, 6.0]);
    assert_eq!(out["b.weight"].values(), [4.5, 4.5, 4.5, 0.375, 0.375, 0.375]);
    assert_eq!(out["c.weight"].values(), [2.25; 4]);
    assert!(read_json(&world.path("out/config.json")).get("quantization_config").is_none());
    world.run("verify @out").ok().says(&["matches"]);
    // A full model and its quantised form are two spellings of one layout.
    world.run("linear --model @out --model @a --out @both").ok();
    assert_eq!(world.read("both")["c.weight"].values()[0], 1.875);
}

#[test]
fn a_missing_or_misshapen_scale_is_refused() {
    for (name, tensor, parts) in [
        ("a.weight_scale_inv", None, ["the scale of a weight in 8 bits is missing", "tensor: a.weight"]),
        (
            "b.weight_scale",
            Some(Tensor::f32(&[3, 1], &[1.0; 3])),
            ["does not fit the weight b.weight", "b.weight_scale"],
        ),
    ] {
        let world = World::new();
        eight_bits(&world, "a", 1.0);
        eight_bits(&world, "b", 1.0);
        let mut tensors = world.read("b");
        tensors.remove(name);
        tensors.extend(tensor.map(|tensor| (name.to_owned(), tensor)));
        fs::remove_file(world.path("b/model.safetensors")).unwrap();
        write_safetensors(&world.path("b/model.safetensors"), &tensors);
        world.refused("linear --model @a --model @b --out @out", &parts);
    }
}

#[test]
fn plain_numbers_of_eight_bits_keep_their_dtype_and_are_written_on_request() {
    let world = World::new();
    for (name, value) in [("a", 1.0), ("b", 2.0)] {
        file(&world.path(name).with_extension("safetensors"), &cast(&w(&[value, 448.0]), Dtype::F8E4M3), &[]);
    }
    let line = "linear --model @a.safetensors --model @b.safetensors";
    world.run(&format!("{line} --out @out")).ok();
    assert_eq!(world.read("out")["w"].dtype, Dtype::F8E4M3);
    assert_eq!(world.read_w("out"), [1.5, 448.0]);
    world.run(&format!("{line} --dtype f8_e5m2 --out @wide")).ok();
    assert_eq!((world.read("wide")["w"].dtype, world.read_w("wide")), (Dtype::F8E5M2, vec![1.5, 448.0]));
    world.run(&format!("{line} --dtype bf16 --out @bf16")).ok();
    assert_eq!(world.read("bf16")["w"].dtype, Dtype::BF16);
    // No number of this dtype is as large.
    file(&world.path("c.safetensors"), &w(&[1.0, 1000.0]), &[]);
    world.refused(
        "linear --model @c.safetensors --model @c.safetensors --dtype f8_e4m3 --out @o",
        &["out of the range of float8_e4m3fn", "1e3 at element 1"],
    );
}

#[test]
fn quantised_models_are_refused_with_the_way_to_full_weights() {
    for (method, hint) in [("gptq", "was quantised"), ("awq", "was quantised"), ("bitsandbytes", "dequantize()")] {
        let world = World::new();
        world.checkpoint("a", &w(&[1.0]));
        world.checkpoint("b", &w(&[1.0]));
        let config = json!({"model_type": "llama", "quantization_config": {"quant_method": method, "bits": 4}});
        text(&world, "b/config.json", &config.to_string());
        world.refused("linear --model @a --model @b --out @out", &["@b: is quantised", method, hint]);
    }
}
