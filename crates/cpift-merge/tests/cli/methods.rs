//! Task arithmetic, TIES, DARE, spherical mean and the settings of all methods, against numbers
//! computed by hand.

use std::collections::BTreeMap;

use cpift_testkit::{Numbers, Tensor, Tensors};
use serde_json::Value;

use crate::world::{World, assert_close, bytes, json, w};

/// A base and models that differ from it by `models`.
fn vectors(base: &[f32], models: &[&[f32]]) -> World {
    let world = World::new();
    world.checkpoint("base", &w(base));
    for (i, steps) in models.iter().enumerate() {
        let moved: Vec<f32> = base.iter().zip(*steps).map(|(b, s)| b + s).collect();
        world.checkpoint(&format!("m{}", i + 1), &w(&moved));
    }
    world
}

const BOTH: &str = "--base @base --model @m1 --model @m2";

/// Difference of the model at `out` from `base`.
fn moved(world: &World, base: &[f32]) -> Vec<f32> {
    world.read_w("out").iter().zip(base).map(|(x, b)| x - b).collect()
}

fn run(world: &World, line: &str) -> Value {
    serde_json::from_str(&world.run(&format!("{line} --out @out --force --json")).ok().stdout).unwrap()
}

#[test]
fn task_arithmetic_adds_weighted_task_vectors() {
    let base = [1.0, 2.0, -4.0];
    let world = vectors(&base, &[&[1.0, 0.0, 2.0], &[4.0, -2.0, 0.0]]);
    for (flags, expected) in [
        ("", [5.0, -2.0, 2.0]),
        ("--weight 0.5 --weight 0.25", [1.5, -0.5, 1.0]),
        ("--weight 0.5 --weight 0.25 --lambda 2", [3.0, -1.0, 2.0]),
        ("--weight 3 --weight 1 --normalize true", [1.75, -0.5, 1.5]),
        ("--weight 1 --weight -1 --normalize true", [-3.0, 2.0, 2.0]),
    ] {
        run(&world, &format!("task-arithmetic {BOTH} {flags}"));
        assert_eq!(moved(&world, &base), expected, "{flags}");
    }
}

#[test]
fn ties_trims_elects_and_averages_the_terms_that_agree() {
    let base = [8.0; 6];
    // Half of six: three of each are kept. m1 keeps 4, -3, 2; m2 keeps -5, 2, and of the elements 1
    // and 4, both of size 1, the one whose tie hash comes first.
    let world = vectors(&base, &[&[4.0, -3.0, 2.0, 1.0, 0.5, 0.0], &[-5.0, 1.0, 2.0, 0.0, 1.0, 0.5]]);
    let summary = run(&world, &format!("ties {BOTH} --density 0.5"));
    let fourth = if world.tied_first("m2", &[1, 4], 1) == [4] { 1.0 } else { 0.0 };
    assert_eq!(moved(&world, &base), [-5.0, -3.0, 2.0, 0.0, fourth, 0.0]);
    assert_eq!(summary["trim"], serde_json::json!({"at_cut": 3, "decided_by_hash": 1}));
    run(&world, &format!("ties {BOTH} --density 0.5 --normalize false --weight 2 --weight 1 --lambda 0.5"));
    assert_eq!(moved(&world, &base), [4.0, -3.0, 3.0, 0.0, fourth * 0.5, 0.0]);
    // The elements that are kept are scaled by (4+3+2+1.5)/9 and (5+1+2+1+0.5)/8.
    run(&world, &format!("ties {BOTH} --density 0.5 --rescale true"));
    let (a, b) = (10.5 / 9.0, 9.5 / 8.0);
    let expected = [-5.0 * b, -3.0 * a, a + b, 0.0, b * f64::from(fourth), 0.0];
    let found: Vec<f64> = world.read_w("out").into_iter().map(|x| f64::from(x) - 8.0).collect();
    assert_close(&found, &expected.map(|x: f64| f64::from((8.0 + x) as f32) - 8.0), "rescaled");
    // A density per model: all elements of m1 are kept, and of m2 one, then none.
    run(&world, &format!("ties {BOTH} --density 1 --density 0.01"));
    assert_eq!(moved(&world, &base), [-5.0, -3.0, 2.0, 1.0, 0.5, 0.0]);
    for method in ["ties", "dare", "dare --elect-sign"] {
        run(&world, &format!("{method} {BOTH} --density 1 --density 0"));
        assert_eq!(moved(&world, &base), [4.0, -3.0, 2.0, 1.0, 0.5, 0.0], "{method}");
    }
}

#[test]
fn ties_over_many_chunks_keeps_exactly_the_share_and_equals_by_their_hashes() {
    let n = 300_000;
    let mut numbers = Numbers(5);
    // Steps of nine sizes only, so that the cut-off lies within thousands of equal ones.
    let steps: Vec<f32> = (0..n).map(|_| (numbers.unit() * 4.0).round() / 8.0).collect();
    let base = vec![1.0; n];
    let world = vectors(&base, &[&steps]);
    let line = "ties --base @base --model @m1 --density 0.3 --normalize false";
    let summary = run(&world, line);
    let all: Vec<usize> = (0..n).collect();
    let mut order = world.tied_first("m1", &all, n);
    order.sort_by(|i, j| steps[*j].abs().total_cmp(&steps[*i].abs()));
    let mut expected = vec![0.0; n];
    order[..90_000].iter().for_each(|i| expected[*i] = steps[*i]);
    assert!(moved(&world, &base) == expected);
    let threshold = steps[order[89_999]].abs();
    let at_cut = steps.iter().filter(|s| s.abs() == threshold).count();
    assert_eq!(summary["trim"]["at_cut"], at_cut, "{summary}");
    let one = bytes(&world.path("out/model.safetensors"));
    run(&world, &format!("{line} --threads 7"));
    assert!(one == bytes(&world.path("out/model.safetensors")));
}

#[test]
fn dare_keeps_the_share_and_the_sum_of_magnitudes_whatever_the_threads() {
    let n = 300_000;
    let steps: Vec<f32> = Numbers(6).units(n);
    let base = vec![0.0; n];
    let world = vectors(&base, &[&steps]);
    let line = "dare --base @base --model @m1 --density 0.3";
    run(&world, &format!("{line} --seed 7 --rescale false"));
    let plain = world.read_w("out");
    let kept = plain.iter().filter(|x| **x != 0.0).count();
    // A standard deviation is 251.
    assert!(kept.abs_diff(90_000) < 1000, "{kept}");
    assert!(plain.iter().zip(&steps).all(|(x, s)| *x == 0.0 || x == s));
    run(&world, &format!("{line} --seed 7"));
    let (stretched, sum) = (world.read_w("out"), |v: &[f32]| v.iter().map(|x| f64::from(x.abs())).sum::<f64>());
    assert!((sum(&stretched) / sum(&steps) - 1.0).abs() < 1e-6);
    assert!(stretched.iter().zip(&plain).all(|(x, y)| (*x == 0.0) == (*y == 0.0)));
    let one = bytes(&world.path("out/model.safetensors"));
    run(&world, &format!("{line} --seed 7 --threads 5"));
    assert!(one == bytes(&world.path("out/model.safetensors")));
    run(&world, &format!("{line} --seed 8"));
    assert!(one != bytes(&world.path("out/model.safetensors")));
    assert_eq!(json(&world.path("out/cpift.json"))["seed"], 8);
}

#[test]
fn dare_draws_for_each_model_and_elects_on_request() {
    let base = vec![0.0; 4000];
    let world = vectors(&base, &[&[1.0; 4000], &[-3.0; 4000]]);
    let count = |flags: &str| {
        run(&world, &format!("dare {BOTH} --density 0.5 --rescale false {flags}"));
        let mut counts: BTreeMap<i32, usize> = BTreeMap::new();
        world.read_w("out").iter().for_each(|x| *counts.entry(*x as i32).or_default() += 1);
        counts
    };
    let linear = count("");
    // The draws are independent, so all four combinations are about equally frequent.
    assert!(linear.keys().eq([&-3, &-2, &0, &1]) && linear.values().all(|n| n.abs_diff(1000) < 150), "{linear:?}");
    let elected = count("--elect-sign");
    assert_eq!(elected[&-3], linear[&-3] + linear[&-2], "the larger one wins: {elected:?}");
    assert_eq!((elected[&0], elected[&1]), (linear[&0], linear[&1]));
}

#[test]
fn linear_sums_where_it_is_not_normalised() {
    let world = vectors(&[0.0; 2], &[&[1.0, 2.0], &[10.0, 20.0]]);
    run(&world, "linear --model @m1 --model @m2 --weight 1 --weight 0.5 --normalize false");
    assert_eq!(world.read_w("out"), [6.0, 12.0]);
    world.misused("linear --model @m1 --model @m2 --weight 1 --weight -1 --out @o", &["do not sum to 0"]);
}

#[test]
fn a_spherical_mean_lies_between_the_directions_at_the_mean_norm() {
    let world = vectors(&[0.0; 3], &[&[1.0, 0.0, 0.0], &[0.0, 3.0, 0.0]]);
    let summary = run(&world, "spherical-mean --model @m1 --model @m2");
    let found: Vec<f64> = world.read_w("out").into_iter().map(f64::from).collect();
    assert_close(&found, &[2.0 * 0.5f64.sqrt(), 2.0 * 0.5f64.sqrt(), 0.0], "equal");
    assert_eq!(summary["branches"]["slerp"], 1);
    // A third of the way along a quarter circle, at a norm of (2·1 + 1·3)/3.
    run(&world, "spherical-mean --model @m1 --model @m2 --weight 2 --weight 1");
    let found: Vec<f64> = world.read_w("out").into_iter().map(f64::from).collect();
    let (norm, angle) = (5.0 / 3.0, std::f64::consts::FRAC_PI_6);
    assert_close(&found, &[norm * angle.cos(), norm * angle.sin(), 0.0], "weighted");
    world.misused("spherical-mean --model @m1 --model @m2 --weight 2 --weight -1 --out @o", &["must not be negative"]);
}

#[test]
fn delta_space_turns_task_vectors() {
    let base = [5.0, 6.0, 7.0];
    let world = vectors(&base, &[&[2.0, 0.0, 0.0], &[0.0, 2.0, 0.0]]);
    let line = "slerp --model @m1 --model @m2 --t 0.5";
    // Close together as weights, at a right angle as task vectors.
    let summary = run(&world, &format!("{line} --space delta --base @base"));
    assert!((summary["angles_degrees"]["max"].as_f64().unwrap() - 90.0).abs() < 1e-9, "{summary}");
    let found: Vec<f64> = world.read_w("out").into_iter().map(f64::from).collect();
    let half = 2f64.sqrt();
    assert_close(&found, &[5.0 + half, 6.0 + half, 7.0], "delta");
    let roles: Vec<String> =
        json(&world.path("out/cpift.json"))["inputs"].as_object().unwrap().keys().cloned().collect();
    assert_eq!(roles, ["base", "model:1", "model:2"]);
    world.misused(&format!("{line} --space delta --out @o"), &["needs --base"]);
    world.misused(&format!("{line} --base @base --out @o"), &["--space delta"]);
}

fn layered(value: f32) -> Tensors {
    let names =
        ["embed_tokens", "layers.0.mlp.up", "layers.1.self_attn.q", "layers.1.mlp.up", "layers.2.mlp.up", "norm"];
    names.iter().map(|n| (format!("model.{n}.weight"), Tensor::f32(&[2], &[value, -value]))).collect()
}

#[test]
fn t_may_be_a_gradient_over_the_layers_and_differ_by_name() {
    let world = World::new();
    world.checkpoint("a", &layered(0.0));
    world.checkpoint("b", &layered(1.0));
    let line = "slerp --model @a --model @b";
    // Zero norms make it linear: the values are t itself.
    world.run(&format!("{line} --t 0.9 --t self_attn=0.25 --t mlp=0,0.5,1 --out @out")).ok();
    let t: Vec<f32> = world.read("out").values().map(|tensor| tensor.values()[0]).collect();
    assert_eq!(t, [0.9, 0.0, 0.5, 0.25, 1.0, 0.9]);
    world.misused(&format!("{line} --t self_atn=0.5 --t 0.1 --out @o"), &["the filter self_atn of --t fits no tensor"]);
    world.misused(&format!("{line} --t mlp=0.5 --out @o"), &["no value of --t is for the tensor model.embed_tokens"]);
}

#[test]
fn settings_of_task_vectors_are_checked() {
    let world = vectors(&[0.0; 2], &[&[1.0, 2.0], &[10.0, 20.0]]);
    for density in ["-0.1", "1.5", "nan"] {
        let line = format!("ties {BOTH} --density {density} --out @out");
        world.misused(&line, &["--density"]);
    }
    world.misused(&format!("ties {BOTH} --out @out"), &["--density"]);
    world.misused(&format!("dare {BOTH} --density 0.5 --density 0.5 --density 0.5 --out @out"), &["found 3"]);
    world.misused(&format!("task-arithmetic {BOTH} --weight 1 --out @out"), &["one --weight for each of 2"]);
    world.misused("task-arithmetic --model @m1 --out @out", &["--base"]);
    world.misused(&format!("task-arithmetic {BOTH} --lambda inf --out @out"), &["number"]);
}
