//! Importance and the top elements equal NumPy's: fixtures/golden/importance.json, made by
//! scripts/oracle/golden_importance.py.

use std::collections::BTreeMap;

use cpift_data::Example;
use cpift_testkit::model::write_tiny_model;
use cpift_torch::data::Batch;
use cpift_torch::pieces::whole_pieces;
use cpift_torch::placement::Placement;
use cpift_torch::session::{Precision, Session};
use cpift_torch::train::importance::{Importance, Positions, jaccard};
use cpift_torch::train::{FisherConfig, StepConfig, loss_and_gradients, squared_gradients};
use cpift_torch::weights::Parameters;
use serde::Deserialize;
use tch::{Device, Tensor};

#[derive(Deserialize)]
struct Golden {
    decay: f64,
    shapes: BTreeMap<String, Vec<i64>>,
    gradients: Vec<BTreeMap<String, Vec<f32>>>,
    top: BTreeMap<String, BTreeMap<String, Vec<i64>>>,
}

fn here() -> Placement {
    Placement::on(Device::Cpu)
}

#[test]
fn the_mask_is_that_of_numpy() {
    let golden: Golden = serde_json::from_str(include_str!("../../../../fixtures/golden/importance.json")).unwrap();
    let parameters: Parameters = golden
        .shapes
        .iter()
        .map(|(name, shape)| (name.clone(), Tensor::zeros(shape.as_slice(), tch::kind::FLOAT_CPU)))
        .collect();
    let mut importance = Importance::new(whole_pieces(&parameters).iter(), golden.decay, &here());
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
        let top = importance.top(percent.parse().unwrap()).unwrap();
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
    assert_eq!(jaccard(&a, &b, &here()).unwrap(), 2.0 / 6.0);
    assert_eq!(jaccard(&a, &a, &here()).unwrap(), 1.0);
    assert_eq!(jaccard(&set(&[]), &set(&[]), &here()).unwrap(), 1.0);
}

#[test]
fn squared_gradients_are_those_of_the_batches() {
    let dir = tempfile::tempdir().unwrap();
    let folder = write_tiny_model(&dir.path().join("m"), 3);
    let session = Session::open(&folder, None, Device::Cpu, Precision::F32).unwrap();
    let ids = |i: i64| (0..9).map(|j| (17 * i + 5 * j * j) % 250).collect::<Vec<i64>>();
    let examples: Vec<Example> =
        (0..4).map(|i| Example { ids: ids(i), target: vec![true; 9], ..Example::default() }).collect();
    let pass = StepConfig::default().pass;
    let config = FisherConfig { batches: 4, batch_size: 2, seed: 5 };
    let (sums, tokens) = squared_gradients(&session, &examples, config, pass).unwrap();
    assert_eq!(tokens, 4 * 2 * 9);
    // Twice through the four rows, in pairs: each pass has two batches that together are all rows;
    // whatever the pairs were, the mean of their gradients is that of all rows, and the sum of
    // squares is no less than 2 passes x 2 x its square.
    let all = Batch::new(&examples.iter().collect::<Vec<_>>());
    let (_, mean) = loss_and_gradients(&session.model, &session.parameters, &all, pass).unwrap();
    assert_eq!(sums.keys().collect::<Vec<_>>(), session.parameters.keys().collect::<Vec<_>>());
    // Of single batches it is exactly the square.
    let one = FisherConfig { batches: 3, batch_size: 4, seed: 5 };
    let (squares, _) = squared_gradients(&session, &examples, one, pass).unwrap();
    for (name, gradient) in &mean {
        let square: Tensor = gradient.square();
        let least: bool = (&sums[name].tensor - &square * 4.0 * 0.999).min().double_value(&[]) >= -1e-9;
        assert!(least, "{name}: less than the mean's square");
        assert!(squares[name].tensor.allclose(&(square * 3.0), 1e-3, 1e-9, false), "{name}");
    }
}
