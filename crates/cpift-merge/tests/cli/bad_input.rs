//! Inputs and arguments that are refused, with the message that a user sees and nothing left
//! behind.

use std::fs;

use cpift_core::Dtype;
use cpift_testkit::{Tensor, Tensors};

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
    world.run(&format!("{LINEAR} --integers base")).ok().says(&["an integer tensor differs", "codes"]);
    assert_eq!(world.read("out")["codes"].bytes, [1]);
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
    world.misused(&format!("{SLERP} --dtype int8"), &["expected f32, bf16, f16, f64, f8_e4m3 or f8_e5m2"]);
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
