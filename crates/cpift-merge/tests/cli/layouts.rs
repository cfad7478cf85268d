//! Checkpoints of one model whose layouts differ: missing parameters, prefixes, integers, buffers.

use cpift_core::Dtype;
use cpift_testkit::{Tensor, Tensors};

use crate::world::World;

fn one(value: f32) -> Tensor {
    Tensor::f32(&[2], &[value; 2])
}

/// A model of the tensors `names`, all of one value.
fn model(names: &[&str], value: f32) -> Tensors {
    names.iter().map(|name| ((*name).to_owned(), one(value))).collect()
}

const LINEAR: &str = "linear --model @a --model @b --out @out";

#[test]
fn a_parameter_that_a_model_lacks_is_an_error_the_base_s_or_left_alone() {
    let world = World::new();
    world.checkpoint("a", &model(&["x", "y"], 1.0));
    world.checkpoint("b", &model(&["x", "z"], 3.0));
    world.refused(LINEAR, &["@b", "tensor: y", "--missing base or skip"]);
    for (rule, y) in [("base", 1.0), ("skip", 1.0)] {
        let out = format!("{LINEAR}-{rule} --weight 3 --weight 1 --normalize false --missing {rule}");
        world.run(&out).ok().says(&["1 parameters are missing, the first y", "left out, the first z"]);
        let found = world.read(&format!("out-{rule}"));
        assert_eq!(found.keys().collect::<Vec<_>>(), ["x", "y"]);
        assert_eq!(found["x"].values(), [6.0; 2]);
        // With the base's values the weights count: 3 · 1 + 1 · 1.
        assert_eq!(found["y"].values(), [if rule == "base" { 4.0 } else { y }; 2], "{rule}");
        world.run(&format!("verify @out-{rule}")).ok().says(&["matches"]);
    }
    // Task vectors of a model without the tensor are zero there.
    let line = "task-arithmetic --base @a --model @b --missing base --out @tv";
    world.run(line).ok();
    assert_eq!(world.read("tv")["y"].values(), [1.0; 2]);
    // A shape that differs is an error in any case.
    let mut other = model(&["x", "y"], 3.0);
    other.insert("y".into(), Tensor::f32(&[3], &[1.0; 3]));
    world.checkpoint("b", &other);
    world.refused(&format!("{LINEAR} --missing skip"), &["tensor: y", "expected: [2]", "found: [3]"]);
}

#[test]
fn names_that_differ_by_one_prefix_are_mapped_and_said() {
    let short = ["embeddings.w", "encoder.layer.0.w"];
    let long = short.map(|name| format!("bert.{name}"));
    let long: Vec<&str> = long.iter().map(String::as_str).collect();
    let with_head = [&long[..], &["cls.w"]].concat();
    for (a, b, said) in [
        (&long[..], &short[..], "the prefix bert. is added to the names of"),
        (&short[..], &long[..], "the prefix bert. is removed from the names of"),
    ] {
        let world = World::new();
        world.checkpoint("a", &model(a, 1.0));
        world.checkpoint("b", &model(b, 3.0));
        world.run(LINEAR).ok().says(&[said]);
        let out = world.read("out");
        assert_eq!(out.keys().map(String::as_str).collect::<Vec<_>>(), a);
        assert!(out.values().all(|tensor| tensor.values() == [2.0; 2]));
    }
    // A head that only one has.
    let world = World::new();
    world.checkpoint("a", &model(&with_head, 1.0));
    world.checkpoint("b", &model(&short, 3.0));
    world.refused(LINEAR, &["tensor: cls.w", "--missing"]);
    world.run(&format!("{LINEAR} --missing skip")).ok().says(&["the prefix bert. is added", "the first cls.w"]);
    assert_eq!(world.read("out")["cls.w"].values(), [1.0; 2]);
    // Two prefixes fit: nothing is mapped.
    let world = World::new();
    world.checkpoint("a", &model(&["left.w", "right.w"], 1.0));
    world.checkpoint("b", &model(&["w"], 1.0));
    world.refused(LINEAR, &["tensor: left.w"]);
}

#[test]
fn counters_and_positions_may_differ_and_be_absent() {
    let world = World::new();
    let number = |value: u8| Tensor { dtype: Dtype::I64, shape: vec![], bytes: vec![value, 0, 0, 0, 0, 0, 0, 0] };
    for (name, value) in [("a", 1), ("b", 2)] {
        let mut tensors = model(&["bn.weight"], f32::from(value));
        tensors.insert("bn.num_batches_tracked".into(), number(value));
        tensors.insert("embeddings.position_ids".into(), number(value));
        tensors.insert(format!("only_{name}"), number(value));
        tensors.insert("vision.rotary_pos_emb.inv_freq".into(), one(f32::from(value)));
        world.checkpoint(name, &tensors);
    }
    world.run(LINEAR).ok().says(&["copied unchanged"]);
    let out = world.read("out");
    assert_eq!(out["bn.num_batches_tracked"].bytes[0], 1);
    assert_eq!((out.contains_key("only_a"), out.contains_key("only_b")), (true, false));
    assert_eq!(out["vision.rotary_pos_emb.inv_freq"].values(), [1.0; 2]);
}
