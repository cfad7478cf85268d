//! Inputs and arguments that are refused, with the message that a user sees and nothing left
//! behind.

use std::fs;

use cpift_core::Dtype;
use cpift_testkit::{Tensor, Tensors, write_sharded};

use crate::world::{Core, World, cast, core, w};

const LINEAR: &str = "linear --model @a --model @b --out @out";
const SLERP: &str = "slerp --model @a --model @b --out @out";

fn pair(a: &Tensors, b: &Tensors) -> World {
    let world = World::new();
    world.checkpoint("a", a);
    world.checkpoint("b", b);
    world
}

fn sound() -> World {
    pair(&w(&[1.0, 2.0, 3.0]), &w(&[2.0, 1.0, 0.0]))
}

/// A sound `cpi` of two tasks, with `--out`.
fn cpi(world: &World) -> String {
    let base = w(&[1.0, 2.0, 3.0, 4.0]);
    let (a, b) = (w(&[1.5, 2.0, 3.0, 4.0]), w(&[1.0, 2.0, 3.0, 5.0]));
    world.cpi(&base, &[("a", &a, core("w", &[0])), ("b", &b, core("w", &[3]))]) + " --out @out"
}

#[test]
fn a_missing_path_is_named() {
    let world = sound();
    for method in ["linear", "slerp"] {
        let line = format!("{method} --model @a --model @none --out @out");
        world.refused(&line, &["@none", "no such checkpoint", "expected: a Hugging Face directory"]);
    }
    let world = World::new();
    let line = cpi(&world);
    world.refused(&line.replace("--base @base", "--base @none"), &["@none", "no such checkpoint"]);
    world.refused(&line.replace("b=@b.mask", "b=@none.mask"), &["@none.mask", "cannot be opened"]);
    world.refused(&line.replace("@groups.json", "@none.json"), &["@none.json", "cannot be opened"]);
}

#[test]
fn a_bare_file_or_a_directory_without_config_is_refused() {
    let world = sound();
    let line = "linear --model @a/model.safetensors --model @b --out @out";
    world.refused(line, &["model.safetensors", "is a bare file", "config.json"]);
    fs::remove_file(world.path("b/config.json")).unwrap();
    world.refused(LINEAR, &["@b/config.json", "cannot be opened"]);
}

#[test]
fn a_truncated_shard_is_reported_with_both_lengths() {
    let world = sound();
    let tensors = Tensors::from([
        ("w".to_owned(), Tensor::f32(&[3], &[1.0, 2.0, 3.0])),
        ("x".to_owned(), Tensor::f32(&[3], &[1.0, 2.0, 3.0])),
    ]);
    write_sharded(&world.path("c"), &tensors, 2);
    let shard = world.path("c/model-00002-of-00002.safetensors");
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() - 2]).unwrap();
    let (whole, cut) = (format!("expected: {} bytes", bytes.len()), format!("found: {} bytes", bytes.len() - 2));
    let parts = ["@c/model-00002-of-00002.safetensors", "truncated", &whole, &cut];
    world.refused("linear --model @c --model @a --out @out", &parts);
}

#[test]
fn shapes_that_differ_are_reported_with_tensor_and_both_shapes() {
    let world = pair(&w(&[1.0, 2.0, 3.0]), &w(&[1.0, 2.0]));
    for line in [LINEAR, SLERP] {
        world.refused(line, &["@b/model.safetensors", "tensor: w", "expected: [3]", "found: [2]"]);
    }
    let world = World::new();
    let line = cpi(&world);
    world.checkpoint("b", &w(&[1.0, 2.0]));
    world.refused(&line, &["@b/model.safetensors", "tensor: w", "expected: [4]", "found: [2]"]);
}

#[test]
fn a_missing_or_extra_tensor_is_named() {
    let mut more = w(&[1.0, 2.0, 3.0]);
    more.insert("v".into(), Tensor::f32(&[1], &[1.0]));
    let world = pair(&more, &w(&[1.0, 2.0, 3.0]));
    world.refused(LINEAR, &["@b: a tensor of", "@a is missing", "tensor: v"]);
    let line = "linear --model @b --model @a --out @out";
    world.refused(line, &["@a/model.safetensors: a tensor that", "@b does not have", "tensor: v"]);
}

#[test]
fn numbers_that_are_not_finite_are_refused_with_their_position() {
    for (bad, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        let mut values = vec![1.0; 70_000];
        values[66_001] = bad;
        let world = pair(&w(&[2.0; 70_000]), &w(&values));
        let found = format!("found: {shown} at element 66001");
        for line in [LINEAR, SLERP] {
            world.refused(line, &["@b/model.safetensors", "tensor: w", "expected: finite numbers", &found]);
        }
    }
}

#[test]
fn cpi_refuses_nan_in_base_backbone_and_core_elements_alike() {
    let world = World::new();
    let line = cpi(&world);
    let sound = w(&[1.0, 2.0, 3.0, 4.0]);
    let broken = w(&[f32::NAN, 2.0, 3.0, 4.0]);
    world.checkpoint("backbone", &broken);
    let parts = ["@backbone/model.safetensors", "NaN at element 0"];
    world.refused(&format!("{line} --backbone @backbone"), &parts);
    // In a task: element 0 is core to a and only transplanted.
    world.checkpoint("a", &broken);
    world.refused(&line, &["@a/model.safetensors", "NaN at element 0"]);
    // In a base that is not the backbone, which nothing but conflicts would read.
    let world = World::new();
    let line = world.cpi(&broken, &[("a", &sound, core("w", &[1]))]);
    world.checkpoint("backbone", &sound);
    let parts = ["@base/model.safetensors", "NaN at element 0"];
    world.refused(&format!("{line} --backbone @backbone --out @out"), &parts);
}

#[test]
fn a_mask_made_for_another_base_is_refused() {
    let world = World::new();
    let line = cpi(&world);
    world.checkpoint("base", &w(&[9.0, 2.0, 3.0, 4.0]));
    world.mask("a", &core("w", &[0]));
    world.groups(&["a", "b"]);
    world.refused(&line, &["@b.mask", "made for another base", "expected: base digest", "found: base digest"]);
    // Of another shape altogether.
    world.checkpoint("base", &w(&[1.0; 3]));
    for task in ["a", "b"] {
        world.checkpoint(task, &w(&[1.0; 3]));
    }
    world.groups(&["a", "b"]);
    world.refused(&line, &["@a.mask", "tensor: w", "expected: 3 elements", "found: 4 elements"]);
}

#[test]
fn groups_of_other_tasks_another_base_or_other_masks_are_refused() {
    let world = World::new();
    let line = cpi(&world);
    world.refused(&line.replace("--task b=@b ", ""), &["@groups.json", "the task b", "no --task", "--task b=PATH"]);
    world.refused(&line.replace("--mask b=@b.mask ", ""), &["@groups.json", "the task b", "no --mask"]);
    let extra = format!("{line} --task c=@a");
    world.refused(&extra, &["@groups.json", "has no task c, which --task names", "expected: a, b"]);
    world.mask("b", &core("w", &[1, 2]));
    world.refused(&line, &["@b.mask", "not the mask of b that", "groups.json", "group the masks again"]);
    world.checkpoint("base", &w(&[9.0, 2.0, 3.0, 4.0]));
    world.refused(&line, &["@groups.json", "made for another base than", "expected: base digest"]);
}

#[test]
fn a_damaged_mask_is_refused() {
    let world = World::new();
    let line = cpi(&world);
    let path = world.path("b.mask");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() |= 0b1000_0000;
    fs::write(&path, bytes).unwrap();
    world.groups(&["a", "b"]);
    world.refused(&line, &["@b.mask", "padding bits are set", "tensor: w"]);
}

#[test]
fn mixed_dtypes_need_a_dtype() {
    let world = pair(&w(&[1.0, 2.0]), &cast(&w(&[3.0, 4.0]), Dtype::BF16));
    let parts = ["@b/model.safetensors", "tensor: w", "expected: F32", "found: BF16", "hint: --dtype"];
    world.refused(LINEAR, &parts);
    world.refused(SLERP, &parts);
    world.run(&format!("{LINEAR} --dtype f16")).ok();
    assert_eq!((world.read("out")["w"].dtype, world.read_w("out")), (Dtype::F16, vec![2.0, 3.0]));
    let world = World::new();
    let line = cpi(&world);
    world.checkpoint("b", &cast(&w(&[1.0, 2.0, 3.0, 5.0]), Dtype::BF16));
    world.refused(&line, &["@b/model.safetensors", "several dtypes", "hint: --dtype"]);
}

#[test]
fn an_output_that_exists_is_refused_and_left_alone() {
    let world = sound();
    fs::create_dir(world.path("out")).unwrap();
    fs::write(world.path("out/mine"), "x").unwrap();
    for line in [LINEAR, SLERP] {
        world.refused(line, &["@out: the output exists already", "--force"]);
    }
    assert!(world.path("out/mine").exists());
    let world = World::new();
    let line = cpi(&world);
    fs::create_dir(world.path("out")).unwrap();
    world.refused(&line, &["@out: the output exists already", "--force"]);
}

#[test]
fn another_architecture_or_tying_is_refused() {
    let world = sound();
    let mistral = r#"{"architectures": ["MistralForCausalLM"], "model_type": "mistral"}"#;
    fs::write(world.path("b/config.json"), mistral).unwrap();
    let parts =
        ["@b/config.json: architectures differs", "LlamaForCausalLM", r#"found: ["MistralForCausalLM"]"#, "hint"];
    world.refused(LINEAR, &parts);
    for (key, a, b) in [("num_attention_heads", 32, 16), ("num_key_value_heads", 4, 8), ("num_hidden_layers", 2, 3)] {
        for (name, value) in [("a", a), ("b", b)] {
            let config =
                format!(r#"{{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "{key}": {value}}}"#);
            std::fs::write(world.path(name).join("config.json"), config).unwrap();
        }
        let expected = [format!("@b/config.json: {key} differs"), format!("expected: {a}"), format!("found: {b}")];
        world.refused(LINEAR, &expected.each_ref().map(String::as_str));
    }
    let world = sound();
    let untied = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": false}"#;
    fs::write(world.path("a/config.json"), untied).unwrap();
    let tied = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": true}"#;
    fs::write(world.path("b/config.json"), tied).unwrap();
    world.refused(SLERP, &["@b/config.json: tie_word_embeddings differs", "expected: false", "found: true"]);
    let world = World::new();
    let line = cpi(&world);
    fs::write(world.path("a/config.json"), mistral).unwrap();
    world.refused(&line, &["@a/config.json: architectures differs", "MistralForCausalLM"]);
}

#[test]
fn quantised_models_and_integers_that_differ_are_refused() {
    let world = sound();
    let quantised =
        r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "quantization_config": {"bits": 4}}"#;
    fs::write(world.path("b/config.json"), quantised).unwrap();
    world.refused(LINEAR, &["@b: is quantised", "hint"]);
    let world = World::new();
    for (name, code) in [("a", 1), ("b", 2)] {
        let mut tensors = w(&[1.0]);
        tensors.insert("codes".into(), Tensor { dtype: Dtype::I8, shape: vec![1], bytes: vec![code] });
        world.checkpoint(name, &tensors);
    }
    world.refused(LINEAR, &["@b: an integer tensor differs from @a", "tensor: codes"]);
    world.checkpoint("b", &w(&[1.0]));
    world.refused(LINEAR, &["@b: an integer tensor differs from @a", "tensor: codes"]);
}

#[test]
fn a_result_that_its_dtype_cannot_hold_is_refused() {
    let world = pair(&w(&[1.0, 70_000.0]), &w(&[1.0, 70_000.0]));
    let line = format!("{LINEAR} --dtype f16");
    world.refused(&line, &["out of the range of float16", "tensor: w", "at element 1", "--dtype"]);
}

#[test]
fn arguments_out_of_range_are_usage_errors() {
    let world = sound();
    for t in ["1.5", "-0.1", "0,0.5,2", "mlp=1.5"] {
        world.misused(&format!("{SLERP} --t {t}"), &["--t must lie between 0 and 1"]);
    }
    world.misused("slerp --model @a --out @out", &["exactly two --model, found 1"]);
    world.misused("slerp --model @a --model @b --model @a --out @out", &["exactly two --model, found 3"]);
    world.misused("linear --model @a --out @out", &["at least two --model, found 1"]);
    world.misused(&format!("{LINEAR} --weight 1"), &["one --weight for each of 2 --model, found 1"]);
    world.misused(&format!("{LINEAR} --weight 1 --weight -1"), &["do not sum to 0"]);
    world.misused(&format!("{SLERP} --epsilon -1"), &["--epsilon must lie between"]);
    world.misused(&format!("{SLERP} --dtype int8"), &["expected f32, bf16, f16 or f64"]);
    world.misused(&format!("{SLERP} --shard-size 0"), &["expected bytes or a size"]);
    world.misused(&format!("{SLERP} --threads 0"), &["--threads must be 1 to 4096"]);
    world.misused(&format!("{SLERP} --bogus"), &["--bogus"]);
    let world = World::new();
    let line = world.cpi(&w(&[1.0]), &[("a", &w(&[2.0]), Core::new())]) + " --out @out";
    for omega in ["-0.5", "1.5"] {
        world.misused(&format!("{line} --omega {omega}"), &["--omega must lie between 0 and 1"]);
    }
    world.misused(&format!("{line} --omega 0.5 --weights equal"), &["cannot be used with"]);
    world.misused(&format!("{line} --task a=@base"), &["--task a is given twice"]);
    world.misused(&format!("{line} --conflict loudest"), &["loudest", "max-delta"]);
    world.misused(&line.replace("a=@a ", "a "), &["expected NAME=PATH"]);
}
