//! SLERP, its branches, folds and the spherical mean against the NumPy float64 reference in
//! fixtures/golden.

use std::path::Path;

use cpift_merge::sphere::{COLLINEAR_COSINE, Combination, Gram, Stop, fold, spherical_mean};
use serde_json::Value;

use crate::world::{Core, World, assert_close, core, json, w};

fn golden() -> Value {
    let golden = json(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden/slerp.json"));
    assert_eq!(golden["threshold"], COLLINEAR_COSINE);
    golden
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn vectors(value: &Value) -> Vec<Vec<f64>> {
    value.as_array().unwrap().iter().map(numbers).collect()
}

fn f32s(values: &[f64]) -> Vec<f32> {
    values.iter().map(|x| *x as f32).collect()
}

fn combined(combination: &Combination, vectors: &[Vec<f64>]) -> Vec<f64> {
    let sum = |j: usize| combination.coefficients.iter().zip(vectors).map(|(c, v)| c * v[j]).sum();
    (0..vectors[0].len()).map(sum).collect()
}

fn epsilon() -> f64 {
    COLLINEAR_COSINE.acos()
}

fn cases(golden: &Value, key: &str) -> Vec<Value> {
    golden[key].as_array().unwrap().clone()
}

#[test]
fn pairs_agree_in_the_library() {
    let mut branches = std::collections::BTreeSet::new();
    for case in cases(&golden(), "pairs") {
        let pair = [numbers(&case["base"]), numbers(&case["task"])];
        let gram = Gram::of(&pair);
        for result in case["results"].as_array().unwrap() {
            let folded = fold(&gram, &[result["omega"].as_f64().unwrap()], epsilon());
            let branch = folded.steps[0].branch.name();
            assert_eq!(branch, case["branch"], "{}", case["name"]);
            assert_close(&combined(&folded, &pair), &numbers(&result["expected"]), &case["name"].to_string());
            branches.insert(branch);
        }
    }
    assert_eq!(branches.len(), 4, "every branch is taken: {branches:?}");
}

#[test]
fn pairs_agree_through_the_binary() {
    let mut branches = std::collections::BTreeSet::new();
    for case in cases(&golden(), "pairs") {
        let world = World::new();
        world.checkpoint("a", &w(&f32s(&numbers(&case["base"]))));
        world.checkpoint("b", &w(&f32s(&numbers(&case["task"]))));
        for (i, result) in case["results"].as_array().unwrap().iter().enumerate() {
            let line = format!("slerp --model @a --model @b --t {} --out @out{i} --json", result["omega"]);
            let summary: Value = serde_json::from_str(&world.run(&line).ok().stdout).unwrap();
            let branch = case["branch"].as_str().unwrap();
            assert_eq!(summary["branches"][branch], 1, "{}: {summary}", case["name"]);
            branches.insert(branch.to_owned());
            let found: Vec<f64> = world.read_w(&format!("out{i}")).into_iter().map(f64::from).collect();
            assert_close(&found, &numbers(&result["expected"]), &case["name"].to_string());
        }
    }
    assert_eq!(branches.len(), 4, "every branch is taken: {branches:?}");
}

/// The elements outside the core, in order.
fn outside(core: &Value, values: &[f64]) -> Vec<f64> {
    let core = core.as_array().unwrap();
    values.iter().zip(core).filter(|(_, c)| !c.as_bool().unwrap()).map(|(v, _)| *v).collect()
}

#[test]
fn folds_agree_in_the_library() {
    for case in cases(&golden(), "folds") {
        let base = outside(&case["core"], &numbers(&case["base"]));
        let mut operands = vec![numbers(&case["backbone"])];
        operands.extend(vectors(&case["tasks"]));
        let delta = case["space"] == "delta";
        let shift = |v: &Vec<f64>| -> Vec<f64> {
            let kept = outside(&case["core"], v);
            kept.iter().zip(&base).map(|(x, b)| if delta { x - b } else { *x }).collect()
        };
        let operands: Vec<Vec<f64>> = operands.iter().map(shift).collect();
        let folded = fold(&Gram::of(&operands), &numbers(&case["omegas"]), epsilon());
        let branches: Vec<&str> = folded.steps.iter().map(|s| s.branch.name()).collect();
        assert_eq!(serde_json::json!(branches), case["branches"], "{}", case["name"]);
        for (step, angle) in folded.steps.iter().zip(case["angles"].as_array().unwrap()) {
            assert_eq!(step.angle.is_some(), angle.is_number());
            assert_close(&[step.angle.unwrap_or(0.0)], &[angle.as_f64().unwrap_or(0.0)], "angle");
        }
        let found: Vec<f64> =
            combined(&folded, &operands).iter().zip(&base).map(|(x, b)| if delta { x + b } else { *x }).collect();
        let expected: Vec<f64> = case["expected"].as_array().unwrap().iter().filter_map(Value::as_f64).collect();
        assert_close(&found, &expected, &case["name"].to_string());
    }
}

#[test]
fn folds_agree_through_the_binary() {
    for case in cases(&golden(), "folds") {
        let world = World::new();
        let tasks: Vec<_> = vectors(&case["tasks"]).iter().map(|t| w(&f32s(t))).collect();
        let flags = case["core"].as_array().unwrap();
        let in_core: Vec<usize> = (0..flags.len()).filter(|j| flags[*j] == true).collect();
        // The whole core belongs to the first task: outside it, the task that claims an element
        // does not matter.
        let named: Vec<(&str, _, Core)> = ["a", "b", "c"]
            .into_iter()
            .zip(&tasks)
            .enumerate()
            .map(|(i, (name, t))| (name, t, if i == 0 { core("w", &in_core) } else { Core::new() }))
            .collect();
        let line = world.cpi(&w(&f32s(&numbers(&case["base"]))), &named);
        world.checkpoint("backbone", &w(&f32s(&numbers(&case["backbone"]))));
        let space = case["space"].as_str().unwrap();
        world.run(&format!("{line} --backbone @backbone --space {space} --out @out")).ok();
        let record = json(&world.path("out/cpift.json"));
        for (branch, count) in record["facts"]["branches"].as_object().unwrap() {
            let expected = case["branches"].as_array().unwrap().iter().filter(|b| *b == branch).count();
            assert_eq!(count, expected, "{branch} in {}", case["name"]);
        }
        let found = world.read_w("out");
        for (j, expected) in case["expected"].as_array().unwrap().iter().enumerate() {
            match expected.as_f64() {
                Some(x) => assert_close(&[found[j].into()], &[x], &format!("{} {space} {j}", case["name"])),
                None => assert_eq!(found[j].to_bits(), tasks[0]["w"].values()[j].to_bits()),
            }
        }
    }
}

#[test]
fn spherical_means_agree() {
    for case in cases(&golden(), "spherical_means") {
        let (vectors, weights) = (vectors(&case["vectors"]), numbers(&case["weights"]));
        let expected = numbers(&case["expected"]);
        // With ε = 0, because the reference has no linear branch.
        let mean = spherical_mean(&Gram::of(&vectors), &weights, 0.0, Stop::FULL);
        assert_close(&combined(&mean, &vectors), &expected, &case["name"].to_string());
        if case["name"] == "weighted" {
            continue;
        }
        let world = World::new();
        let tensors: Vec<_> = vectors.iter().map(|v| w(&f32s(v))).collect();
        let line = world.cpi(&tensors[0], &[("a", &tensors[1], Core::new()), ("b", &tensors[2], Core::new())]);
        world.run(&format!("{line} --weights spherical-mean --epsilon 0 --out @out")).ok();
        let found: Vec<f64> = world.read_w("out").into_iter().map(f64::from).collect();
        assert_close(&found, &expected, &case["name"].to_string());
    }
}
