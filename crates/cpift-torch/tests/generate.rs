//! Generation with cache and left padding gives what the plain forward pass gives, token for token; scoring agrees with it too.

use cpift_testkit::model::write_tiny_model;
use cpift_torch::generate::{GreedyOptions, greedy};
use cpift_torch::score;
use cpift_torch::session::{Precision, Session};
use tch::{Device, Kind, Tensor, no_grad};

fn session(dir: &std::path::Path) -> Session {
    Session::open(&write_tiny_model(&dir.join("m"), 7), None, Device::Cpu, Precision::F32).unwrap()
}

fn logits(session: &Session, ids: &[i64]) -> Tensor {
    no_grad(|| {
        let x = Tensor::from_slice(ids).unsqueeze(0);
        session
            .model
            .logits(&session.model.hidden(&x, &session.model.documents(&[ids.len() as i64]), None))
            .squeeze_dim(0)
    })
}

/// One token at a time, the whole sequence recomputed for each.
fn reference(session: &Session, prompt: &[i64], eos: &[i64], most: usize) -> Vec<i64> {
    let mut ids = prompt.to_vec();
    while ids.len() < prompt.len() + most {
        let next = logits(session, &ids).get(-1).argmax(-1, false).int64_value(&[]);
        if eos.contains(&next) {
            break;
        }
        ids.push(next);
    }
    ids.split_off(prompt.len())
}

#[test]
fn batches_of_unequal_prompts_equal_one_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let session = session(dir.path());
    let prompts: Vec<Vec<i64>> = (0..9).map(|i| (0..3 + 4 * i).map(|j| (17 * i + 5 * j * j) % 250).collect()).collect();
    // An id that the model does write ends some answers early, so that rows leave the batch at different times.
    let free = reference(&session, &prompts[4], &[], 12);
    let eos = [free[5]];
    let expected: Vec<Vec<i64>> = prompts.iter().map(|p| reference(&session, p, &eos, 12)).collect();
    assert!(expected.iter().any(|a| a.len() < 12) && expected.iter().any(|a| a.len() == 12), "{expected:?}");
    for batch_size in [1, 4, 9] {
        let options = GreedyOptions { eos_ids: &eos, pad_id: 258, max_new_tokens: 12, batch_size };
        assert_eq!(greedy(&session.model, &prompts, &options, || ()), expected, "batch size {batch_size}");
    }
}

#[test]
fn continuations_score_as_the_log_softmax_says() {
    let dir = tempfile::tempdir().unwrap();
    let session = session(dir.path());
    let prompt: Vec<i64> = (40..60).collect();
    for continuations in [vec![vec![3], vec![77]], vec![vec![3, 9, 1], vec![77]]] {
        let found = score::continuations(&session.model, &prompt, &continuations).unwrap();
        for (continuation, found) in continuations.iter().zip(found) {
            let ids: Vec<i64> = prompt.iter().chain(continuation).copied().collect();
            let log_probs = logits(&session, &ids).log_softmax(-1, Kind::Double);
            let expected: f64 = (0..continuation.len())
                .map(|k| log_probs.double_value(&[(prompt.len() + k - 1) as i64, continuation[k]]))
                .sum();
            assert!((found - expected).abs() < 1e-4, "{found} {expected}");
        }
    }
}
