//! Importance and the elements on top are NumPy's: fixtures/golden/importance.json, made by scripts/oracle/golden_importance.py.

use std::collections::BTreeMap;

use cpift_torch::train::importance::{Importance, Positions, jaccard};
use serde::Deserialize;
use tch::Tensor;

#[derive(Deserialize)]
struct Golden {
    decay: f64,
    shapes: BTreeMap<String, Vec<i64>>,
    gradients: Vec<BTreeMap<String, Vec<f32>>>,
    top: BTreeMap<String, BTreeMap<String, Vec<i64>>>,
}

#[test]
fn the_mask_is_that_of_numpy() {
    let golden: Golden = serde_json::from_str(include_str!("../../../fixtures/golden/importance.json")).unwrap();
    let parameters: Vec<(String, Tensor)> = golden
        .shapes
        .iter()
        .map(|(name, shape)| (name.clone(), Tensor::zeros(shape.as_slice(), tch::kind::FLOAT_CPU)))
        .collect();
    let mut importance = Importance::new(parameters.iter(), golden.decay);
    assert!(importance.is_empty());
    for step in &golden.gradients {
        let grads: Vec<(&str, Tensor)> = step
            .iter()
            .map(|(name, g)| (name.as_str(), Tensor::from_slice(g).view(golden.shapes[name].as_slice())))
            .collect();
        importance.update(grads.iter().map(|(name, grad)| (*name, grad)));
    }
    assert_eq!(golden.top.len(), 5);
    for (percent, expected) in &golden.top {
        let top = importance.top(percent.parse().unwrap());
        let found: BTreeMap<String, Vec<i64>> =
            top.iter().map(|(name, t)| (name.clone(), Vec::try_from(t).unwrap())).collect();
        assert_eq!(found, *expected, "{percent} %");
    }
}

#[test]
fn similarity_counts_what_both_have() {
    let set = |list: &[(&str, &[i64])]| -> Positions {
        list.iter().map(|(name, p)| ((*name).to_owned(), Tensor::from_slice(p))).collect()
    };
    let (a, b) = (set(&[("x", &[0, 2, 5]), ("y", &[1])]), set(&[("x", &[2, 5, 7]), ("z", &[3])]));
    assert_eq!(jaccard(&a, &b).unwrap(), 2.0 / 6.0);
    assert_eq!(jaccard(&a, &a).unwrap(), 1.0);
    assert_eq!(jaccard(&set(&[]), &set(&[])).unwrap(), 1.0);
}
