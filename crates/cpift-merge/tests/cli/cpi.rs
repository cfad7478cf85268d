//! `cpi`: transplanted elements bit for bit, conflict rules, backbones, weights and the files of
//! the output.

use std::fs;

use cpift_core::format::digest::Digest;
use cpift_core::record::provenance::Recorder;
use cpift_core::{Checkpoint, Dtype};
use cpift_testkit::{Numbers, Tensor, Tensors};

use crate::world::{Core, World, assert_close, bytes, cast, core, json, w};

/// Base, two probes and conflicts at elements 2 (b moved more), 3 (a moved more) and 4 (both moved
/// equally).
fn conflict(world: &World) -> String {
    let base = w(&[0.0, 1.0, 1.0, 1.0, 1.0, -0.0, 7.0, 8.0, 9.0]);
    let a = w(&[-0.0, 1.5, 1.25, 3.0, 1.5, 2.0, 7.0, 8.0, 9.0]);
    let b = w(&[4.0, 1.0, -1.0, 2.0, 0.5, -0.0, 7.0, 8.0, 9.0]);
    world.cpi(&base, &[("b", &b, core("w", &[2, 3, 4, 5])), ("a", &a, core("w", &[0, 1, 2, 3, 4]))])
}

#[test]
fn each_conflict_rule_gives_its_value() {
    let world = World::new();
    let line = conflict(&world);
    let expected: [(&str, [f32; 3]); 4] = [
        ("first", [-1.0, 2.0, 0.5]),
        ("last", [1.25, 3.0, 1.5]),
        ("max-delta", [-1.0, 3.0, 0.5]),
        ("mean", [0.125, 2.5, 1.0]),
    ];
    for (rule, values) in expected {
        let run = world.run(&format!("{line} --conflict {rule} --out @{rule} --json")).ok();
        let summary: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
        assert_eq!((&summary["core"], &summary["conflicts"]), (&6.into(), &3.into()), "{summary}");
        let found = world.read_w(rule);
        assert_eq!(found[2..5], values, "{rule}");
        // Elements of one task alone, its −0.0 included, are the same under every rule.
        assert_eq!(found[0].to_bits(), (-0.0f32).to_bits(), "{rule}");
        assert_eq!((found[1], found[5].to_bits()), (1.5, (-0.0f32).to_bits()), "{rule}");
        // Outside, all three agree, and so does every mean of them.
        assert_eq!(found[6..], [7.0, 8.0, 9.0], "{rule}");
    }
    world.run(&format!("{line} --out @default")).ok();
    assert_eq!(bytes(&world.path("default/model.safetensors")), bytes(&world.path("max-delta/model.safetensors")));
}

/// A random checkpoint with a −0.0 at every 11th element.
fn random(numbers: &mut Numbers, sizes: &[usize]) -> Tensors {
    let tensor = |(i, n): (usize, &usize)| {
        let mut values = numbers.units(*n);
        values.iter_mut().step_by(11).for_each(|v| *v = -0.0);
        (format!("t{i}"), Tensor::f32(&[*n], &values))
    };
    sizes.iter().enumerate().map(tensor).collect()
}

#[test]
fn core_elements_equal_the_probe_in_every_bit() {
    for dtype in [Dtype::F32, Dtype::BF16] {
        let (world, mut numbers) = (World::new(), Numbers(1));
        let sizes = [1, 7, 8, 9, 70_001];
        let base = cast(&random(&mut numbers, &sizes), dtype);
        let a = cast(&random(&mut numbers, &sizes), dtype);
        let b = cast(&random(&mut numbers, &sizes), dtype);
        let pick = |step: usize, skip: usize| -> Core {
            let all = sizes.iter().enumerate();
            all.map(|(i, n)| (format!("t{i}"), (0..*n).skip(skip).step_by(step).collect())).collect()
        };
        let (core_a, core_b) = (pick(22, 0), pick(22, 11));
        let line = world.cpi(&base, &[("a", &a, core_a.clone()), ("b", &b, core_b.clone())]);
        world.run(&format!("{line} --out @out")).ok();
        let fused = world.read("out");
        let size = dtype.size();
        let mut negative_zeros = 0;
        for (probe, region) in [(&a, &core_a), (&b, &core_b)] {
            for (name, elements) in region {
                for j in elements {
                    let expected = &probe[name].bytes[j * size..][..size];
                    assert_eq!(&fused[name].bytes[j * size..][..size], expected, "{dtype} {name} {j}");
                    negative_zeros += usize::from(expected.ends_with(&[0x80]));
                }
            }
        }
        assert!(negative_zeros > 6000, "{negative_zeros}");
        assert_eq!(fused["t4"].dtype, dtype);
    }
}

#[test]
fn the_backbone_counts_outside_the_core_and_the_base_does_not() {
    let world = World::new();
    let task = w(&[3.0, 4.0, 0.0, 0.0]);
    let line = world.cpi(&w(&[100.0, -200.0, 300.0, 5.0]), &[("a", &task, core("w", &[3]))]);
    world.checkpoint("backbone", &w(&[4.0, 3.0, 0.0, 50.0]));
    world.run(&format!("{line} --backbone @backbone --out @out")).ok();
    // cos = 24/25; half-way on the circle both coefficients are equal.
    let half = (0.5 * 0.96f64.acos()).sin() / 0.96f64.acos().sin();
    let found: Vec<f64> = world.read_w("out").into_iter().map(f64::from).collect();
    assert_close(&found, &[7.0 * half, 7.0 * half, 0.0, 0.0], "fused");
}

#[test]
fn omega_and_weights_set_the_weight_of_a_task() {
    let world = World::new();
    let ones = w(&[1.0; 4]);
    let line = world.cpi(&w(&[1.0; 4]), &[("a", &w(&[1.01; 4]), Core::new()), ("b", &ones, Core::new())]);
    world.run(&format!("{line} --omega 0.25 --out @fixed")).ok();
    world.run(&format!("{line} --out @equal")).ok();
    let first = |name: &str| f64::from(world.read_w(name)[0]);
    assert_close(&[first("fixed")], &[1.0 + 0.25 * 0.75 * f64::from(1.01f32 - 1.0)], "omega");
    assert_close(&[first("equal")], &[1.0 + f64::from(1.01f32 - 1.0) / 3.0], "equal");
}

#[test]
fn the_order_is_that_of_the_groups_and_not_of_the_arguments() {
    let world = World::new();
    let line = conflict(&world);
    let swapped = "cpi --base @base --groups @groups.json --mask a=@a.mask --task a=@a --mask b=@b.mask --task b=@b";
    world.run(&format!("{line} --conflict last --out @one")).ok();
    world.run(&format!("{swapped} --conflict last --out @two")).ok();
    assert_eq!(bytes(&world.path("one/model.safetensors")), bytes(&world.path("two/model.safetensors")));
    world.groups(&["a", "b"]);
    world.run(&format!("{line} --conflict last --out @three")).ok();
    assert_eq!(world.read_w("three")[2], -1.0, "b is last now");
}

#[test]
fn tied_heads_are_dropped_buffers_copied_and_side_files_come_from_the_base() {
    let world = World::new();
    let mut base = Tensors::new();
    base.insert("model.embed_tokens.weight".into(), Tensor::f32(&[2, 2], &[1.0, 2.0, 3.0, 4.0]));
    base.insert("lm_head.weight".into(), Tensor::f32(&[2, 2], &[1.0, 2.0, 3.0, 4.0]));
    base.insert("rotary_emb.inv_freq".into(), Tensor::f32(&[2], &[1.0, 0.1]));
    base.insert("steps".into(), Tensor { dtype: Dtype::I64, shape: vec![1], bytes: 9i64.to_le_bytes().to_vec() });
    let mut probe = base.clone();
    probe.remove("lm_head.weight");
    let line = world.cpi(&base, &[("a", &probe, Core::new())]);
    let config = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": true,
        "torch_dtype": "float32", "rope_theta": 10000.0}"#;
    for name in ["base", "a"] {
        fs::write(world.path(name).join("config.json"), config).unwrap();
        fs::write(world.path(name).join("tokenizer.json"), name).unwrap();
    }
    world.mask("a", &Core::new());
    world.groups(&["a"]);
    world.run(&format!("{line} --dtype bf16 --out @out")).ok();
    let fused = world.read("out");
    let names: Vec<&str> = fused.keys().map(String::as_str).collect();
    assert_eq!(names, ["model.embed_tokens.weight", "rotary_emb.inv_freq", "steps"]);
    assert_eq!(fused["steps"].bytes, base["steps"].bytes);
    assert_eq!(fused["rotary_emb.inv_freq"].bytes, base["rotary_emb.inv_freq"].bytes);
    assert_eq!(fused["model.embed_tokens.weight"].dtype, Dtype::BF16);
    let config = json(&world.path("out/config.json"));
    assert_eq!((&config["torch_dtype"], &config["rope_theta"]), (&"bfloat16".into(), &10000.0.into()));
    assert_eq!(bytes(&world.path("out/tokenizer.json")), b"base");
}

#[test]
fn provenance_names_inputs_branches_and_angles() {
    let world = World::new();
    let line = conflict(&world);
    let run = world.run(&format!("{line} --out @out")).ok();
    run.says(&["core: 6 elements", "3 of them", "on the sphere", "median"]);
    let record = json(&world.path("out/cpift.json"));
    let roles: Vec<&String> = record["inputs"].as_object().unwrap().keys().collect();
    assert_eq!(roles, ["base", "groups", "mask:a", "mask:b", "task:a", "task:b"]);
    assert_eq!(record["stage"], "cpift-merge");
    let facts = &record["facts"];
    assert_eq!((&facts["core"], &facts["conflicts"], &facts["parameters"]), (&6.into(), &3.into(), &9.into()));
    assert!(facts["angles_degrees"]["max"].is_number() && record["output"]["blake3"].is_string(), "{record}");
    world.run("verify @out").ok().says(&["matches cpift.json"]);
}

#[test]
fn a_task_or_backbone_made_from_another_base_is_refused() {
    let world = World::new();
    let line = conflict(&world);
    let base = Digest::of_checkpoint(&Checkpoint::open(&world.path("base")).unwrap()).unwrap();
    let made_from = |name: &str, digest: Digest| {
        let mut recorder = Recorder::start("cpift-probe");
        recorder.input("base", &world.path("base"), digest);
        recorder.write_into(&world.path(name)).unwrap();
    };
    made_from("a", base.clone());
    world.run(&format!("{line} --out @right --quiet")).ok();
    made_from("b", Digest::blank());
    let other = Digest::blank().to_string();
    world.refused(
        &format!("{line} --out @out"),
        &["@b: made from another base than @base", base.to_string().as_str(), &other],
    );
}

#[test]
fn a_mask_from_another_checkpoint_than_its_task_is_refused() {
    let world = World::new();
    let line = conflict(&world);
    world.run(&format!("{line} --out @right --quiet")).ok();
    let swapped = line.replace("a=@a ", "a=@b ").replace("b=@b ", "b=@a ");
    world.refused(
        &format!("{swapped} --out @out"),
        &["@b.mask", "extracted from another checkpoint than", "expected: digest"],
    );
    // If the digest is recorded, the error comes before anything is read.
    for task in ["a", "b"] {
        Recorder::start("cpift-probe").write_into(&world.path(task)).unwrap();
    }
    world.run(&format!("{line} --out @again --quiet")).ok();
    world.refused(
        &format!("{swapped} --out @out"),
        &["@b.mask", "extracted from another checkpoint than", "expected: digest"],
    );
}
