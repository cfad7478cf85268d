//! Models as they are published: output embeddings despite a tied config, prefixed names, adapters,
//! indexes that list too much, settings spelled differently.

use std::fs;

use cpift_testkit::{Tensor, Tensors, write_sharded};
use serde_json::{Value, json};

use crate::world::{World, core, json as read_json};

const LINEAR: &str = "linear --model @a --model @b --out @out";
const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// A language model of three tokens, with a head if one is given.
fn model(embedding: f32, head: Option<f32>) -> Tensors {
    let table = |value: f32| Tensor::f32(&[3, 2], &[value; 6]);
    let mut tensors = Tensors::from([
        (EMBEDDING.to_owned(), table(embedding)),
        ("model.layers.0.mlp.w".to_owned(), Tensor::f32(&[2], &[embedding; 2])),
    ]);
    tensors.extend(head.map(|value| (HEAD.to_owned(), table(value))));
    tensors
}

fn config(world: &World, name: &str, more: &Value) {
    let mut config = json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": true});
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    fs::write(world.path(name).join("config.json"), config.to_string()).unwrap();
}

fn pair(a: &Tensors, b: &Tensors) -> World {
    let world = World::new();
    for (name, tensors) in [("a", a), ("b", b)] {
        world.checkpoint(name, tensors);
        config(&world, name, &json!({}));
    }
    world
}

#[test]
fn a_head_of_its_own_is_merged_whatever_config_json_says() {
    let world = pair(&model(1.0, Some(5.0)), &model(3.0, Some(7.0)));
    world.run(LINEAR).ok().says(&["lm_head.weight differs from model.embed_tokens.weight"]);
    let out = world.read("out");
    assert_eq!((out[EMBEDDING].values()[0], out[HEAD].values()[0]), (2.0, 6.0));
    assert_eq!(read_json(&world.path("out/config.json"))["tie_word_embeddings"], json!(false));
    world.run("verify @out").ok().says(&["matches"]);
}

#[test]
fn a_tied_head_merged_with_an_untied_one_is_the_embedding() {
    for line in [LINEAR, "linear --model @b --model @a --out @out"] {
        let world = pair(&model(1.0, Some(5.0)), &model(3.0, None));
        world.run(line).ok().says(&["lm_head.weight is the input embedding", "the output has one of its own"]);
        let out = world.read("out");
        assert_eq!((out[EMBEDDING].values()[0], out[HEAD].values()[0]), (2.0, 4.0));
        assert_eq!(read_json(&world.path("out/config.json"))["tie_word_embeddings"], json!(false));
        world.run("verify @out").ok().says(&["matches"]);
    }
}

#[test]
fn cpi_transplants_heads_that_the_base_ties() {
    let world = World::new();
    let (base, tuned) = (model(1.0, None), model(1.0, Some(9.0)));
    let both = [("base", &base), ("a", &tuned)];
    for (name, tensors) in both {
        world.checkpoint(name, tensors);
        config(&world, name, &json!({}));
    }
    // The layout of a mask that cpift-mask extracts from the two.
    world.untied_mask("a", &core(HEAD, &[0, 5]));
    world.groups(&["a"]);
    world.run("cpi --base @base --groups @groups.json --task a=@a --mask a=@a.mask --out @out").ok();
    let head = world.read("out")[HEAD].values();
    assert_eq!((head[0], head[5]), (9.0, 9.0));
    assert!((head[1] - 5.0).abs() < 1e-5, "{head:?}");
}

#[test]
fn a_tied_model_that_kept_only_its_head_is_opened() {
    let mut head_only = model(3.0, None);
    let embedding = head_only.remove(EMBEDDING).unwrap();
    head_only.insert(HEAD.into(), embedding);
    let world = pair(&model(1.0, None), &head_only);
    world.run(LINEAR).ok().says(&["lm_head.weight is also used as the input embedding"]);
    let out = world.read("out");
    assert_eq!((out[EMBEDDING].values()[0], out.contains_key(HEAD)), (2.0, false));
}

#[test]
fn prefixes_of_names_are_removed_or_named() {
    let wrapped =
        |prefix: &str| model(3.0, None).into_iter().map(|(n, t)| (format!("{prefix}{n}"), t)).collect::<Tensors>();
    for prefix in ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."] {
        let world = pair(&wrapped(prefix), &model(1.0, None));
        world.run(LINEAR).ok().says(&["all names begin with", prefix]);
        assert_eq!(world.read("out").keys().collect::<Vec<_>>(), [EMBEDDING, "model.layers.0.mlp.w"]);
        world.run("verify @out").ok().says(&["matches"]);
    }
    let mut some = wrapped("module.");
    some.insert("model.norm.weight".into(), Tensor::f32(&[1], &[1.0]));
    let world = pair(&model(1.0, None), &some);
    world.refused(
        LINEAR,
        &["@b/model.safetensors", "the prefix module. of a wrapper", "found: model.norm.weight", "hint: "],
    );
}

#[test]
fn adapters_and_pointers_are_named() {
    let world = pair(&model(1.0, None), &model(3.0, None));
    fs::create_dir(world.path("lora")).unwrap();
    fs::write(
        world.path("lora/adapter_config.json"),
        r#"{"peft_type": "LORA", "base_model_name_or_path": "org/base"}"#,
    )
    .unwrap();
    let line = "linear --model @a --model @lora --out @out";
    world.refused(line, &["@lora: a LORA adapter, not a model", "org/base", "merge_and_unload"]);
    let mut unmerged = model(1.0, None);
    unmerged.insert("model.layers.0.q_proj.lora_A.weight".into(), Tensor::f32(&[1], &[1.0]));
    world.checkpoint("b", &unmerged);
    world.refused(
        LINEAR,
        &["@b/model.safetensors", "an adapter that is not merged", "tensor: model.layers.0.q_proj.lora_A.weight"],
    );
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 269060552\n";
    fs::write(world.path("b/model.safetensors"), pointer).unwrap();
    world.refused(
        LINEAR,
        &["@b/model.safetensors: a git-lfs pointer", "expected: a file of 269060552 bytes", "git lfs pull"],
    );
}

#[test]
fn an_index_may_list_absent_tensors_that_are_not_parameters_and_no_others() {
    for (extra, lost, fine) in [
        (HEAD, "model-00002-of-00002.safetensors", true),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "model-00002-of-00002.safetensors", true),
        (HEAD, "model-00003-of-00003.safetensors", true),
        ("model.norm.weight", "model-00002-of-00002.safetensors", false),
        ("model.norm.weight", "model-00003-of-00003.safetensors", false),
    ] {
        let world = pair(&model(1.0, None), &model(3.0, None));
        fs::remove_dir_all(world.path("b")).unwrap();
        write_sharded(&world.path("b"), &model(3.0, None), 2);
        config(&world, "b", &json!({}));
        let path = world.path("b/model.safetensors.index.json");
        let mut index = read_json(&path);
        index["weight_map"][extra] = json!(lost);
        fs::write(&path, index.to_string()).unwrap();
        if fine {
            world.run(LINEAR).ok();
        } else {
            world.refused(
                LINEAR,
                &[&format!("@b/{lost}"), "model.safetensors.index.json", &format!("tensor: {extra}"), "hint: "],
            );
        }
    }
}

#[test]
fn rotary_settings_are_compared_by_meaning() {
    let (plain, scaled) = (json!({"rope_theta": 5e5, "rope_scaling": null}), json!({"type": "linear", "factor": 2}));
    for (a, b, same) in [
        (plain.clone(), json!({"rope_parameters": {"rope_type": "default", "rope_theta": 500_000}}), true),
        (plain.clone(), json!({"rope_theta": 5e5, "rope_scaling": {}}), true),
        (json!({}), json!({"rope_theta": 10000}), true),
        (json!({"rope_scaling": scaled}), json!({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}), true),
        (
            json!({"rope_scaling": scaled}),
            json!({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}}),
            true,
        ),
        (plain.clone(), json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}), false),
        (plain.clone(), json!({"rope_theta": 5e5, "rope_scaling": scaled}), false),
        (
            json!({"rope_scaling": {"type": "longrope", "x": 1}}),
            json!({"rope_scaling": {"type": "longrope", "x": 2}}),
            false,
        ),
    ] {
        let world = pair(&model(1.0, None), &model(3.0, None));
        config(&world, "a", &a);
        config(&world, "b", &b);
        let said = world.run(LINEAR).ok().stderr;
        assert_eq!(said.contains("whose config.json the output takes"), !same, "{a} and {b}: {said}");
    }
}

#[test]
fn different_tokens_at_the_same_id_are_warned_about() {
    let tokenizer = |last: &str, added: &str| {
        json!({"model": {"vocab": {"x": 0, last: 1}}, "added_tokens": [{"id": 2, "content": added}]}).to_string()
    };
    for (ours, theirs, parts) in [
        (tokenizer("y", "<e>"), tokenizer("y", "<e>"), &[][..]),
        (
            tokenizer("y", "<e>"),
            tokenizer("z", "<e>"),
            &["1 ids stand for other tokens", "id 1 is \"z\", and \"y\" there"],
        ),
        (
            tokenizer("y", "<e>"),
            tokenizer("z", "<im>"),
            &["2 ids stand for other tokens", "id 1 is \"z\", and \"y\" there"],
        ),
        (
            tokenizer("y", "<e>"),
            json!({"model": {"vocab": {"x": 0, "y": 1}}}).to_string(),
            &["id 2 is no token, and \"<e>\" there"],
        ),
        (
            json!({"model": {"vocab": [["x", 0.0], ["y", -1.0]]}}).to_string(),
            json!({"model": {"vocab": [["x", 0.0], ["q", -1.0]]}}).to_string(),
            &["id 1 is \"q\", and \"y\" there"],
        ),
    ] {
        let world = pair(&model(1.0, None), &model(3.0, None));
        fs::write(world.path("a/tokenizer.json"), ours).unwrap();
        fs::write(world.path("b/tokenizer.json"), theirs).unwrap();
        let run = world.run(LINEAR).ok();
        assert_eq!(run.stderr.contains("stand for other tokens"), !parts.is_empty(), "{}", run.stderr);
        run.says(parts);
    }
    // Tokens that only tokenizer_config.json adds.
    let world = pair(&model(1.0, None), &model(3.0, None));
    for (name, added) in [("a", "<e>"), ("b", "<im>")] {
        fs::write(world.path(name).join("tokenizer.json"), tokenizer("y", "<s>")).unwrap();
        let config = json!({"added_tokens_decoder": {"2": {"content": "<s>"}, "3": {"content": added}}});
        fs::write(world.path(name).join("tokenizer_config.json"), config.to_string()).unwrap();
    }
    world.run(LINEAR).ok().says(&["1 ids stand for other tokens", "id 3 is \"<im>\", and \"<e>\" there"]);
}
