//! Generation with cache and left padding equals the plain forward pass token for token, and so
//! does scoring.

use crate::golden;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use cpift_testkit::model::{tiny_weights, write_tiny_model};
use cpift_testkit::write_safetensors;
use cpift_torch::generate::{GenerationOptions, Sampling, generate};
use cpift_torch::score::{self, Alternatives};
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
fn rows_that_come_and_go_are_answered_as_one_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let session = session(dir.path());
    // The shortest prompt is one token.
    let length = |i: i64| if i == 0 { 1 } else { 3 + 4 * i };
    let prompts: Vec<Vec<i64>> = (0..9).map(|i| (0..length(i)).map(|j| (17 * i + 5 * j * j) % 250).collect()).collect();
    // An id that the model generates ends some answers at their first token, so that rows come and
    // go at different times; the others outgrow the cache, which grows by 64 tokens. (Answers of
    // many lengths are tested through cpift-eval.)
    let free = reference(&session, &prompts[4], &[], 12);
    let mut lengths = BTreeSet::new();
    for eos in [[free[5]], [free[0]]] {
        let expected: Vec<Vec<i64>> = prompts.iter().map(|p| reference(&session, p, &eos, 70)).collect();
        lengths.extend(expected.iter().map(Vec::len));
        for batch_size in [1, 2, 4, 9, 20] {
            let options = GenerationOptions { batch_size, ..greedy(&eos, 70) };
            assert_eq!(ids(&session, &prompts, &options), expected, "batch size {batch_size}");
        }
    }
    assert!(lengths.contains(&0) && lengths.contains(&70), "{lengths:?}");
    let eos = [free[5]];
    let mut done = 0;
    generate(&session.model, &session.text, &prompts, &greedy(&eos, 2), || done += 1).unwrap();
    assert_eq!(done, prompts.len());
    assert!(ids(&session, &[], &greedy(&eos, 2)).is_empty());
}

#[test]
fn values_that_are_not_finite_stay_in_their_row() {
    let dir = tempfile::tempdir().unwrap();
    let folder = write_tiny_model(&dir.path().join("m"), 7);
    let mut weights = tiny_weights(7);
    // The values of token 5 overflow in the first block: it alone has a first element, which the
    // projection multiplies.
    let mut overwrite = |name: &str, change: &dyn Fn(usize, &mut [f32])| {
        let tensor = weights.get_mut(name).unwrap();
        let (mut values, shape) = (tensor.values(), tensor.shape.clone());
        values.chunks_mut(shape[1]).enumerate().for_each(|(row, values)| change(row, values));
        *tensor = cpift_testkit::Tensor::f32(&shape, &values);
    };
    overwrite("model.embed_tokens.weight", &|token, values| {
        values[0] = 0.0;
        if token == 5 {
            values.fill(0.0);
            values[0] = 1.0;
        }
    });
    overwrite("model.layers.0.self_attn.v_proj.weight", &|_, values| values[0] = 3e38);
    fs::remove_file(folder.join("model.safetensors")).unwrap();
    write_safetensors(&folder.join("model.safetensors"), &weights);
    let session = Session::open(&folder, None, Device::Cpu, Precision::F32).unwrap();
    // The second row becomes NaN, which argmax takes for id 0; the third enters its slot beside the
    // longer first.
    let prompts = [(10..40).collect(), vec![9; 20], vec![9; 8]].map(|p: Vec<i64>| p);
    let mut overflowing = prompts.clone();
    overflowing[1][3] = 5;
    let options = GenerationOptions { batch_size: 2, ..greedy(&[0], 12) };
    let found = ids(&session, &overflowing, &options);
    assert_eq!(found[1], [0i64; 0]);
    for i in [0, 2] {
        let alone = ids(&session, &prompts[i..=i], &options);
        assert!(!alone[0].is_empty() && found[i] == alone[0], "{found:?}, alone {alone:?}");
    }
}

#[test]
fn answers_are_those_of_transformers_in_every_family() {
    let dir = tempfile::tempdir().unwrap();
    // Only ids are compared: any tokenizer serves.
    let text = session(dir.path()).text;
    let file = include_str!("../../../../fixtures/golden/generate.json");
    let cases: BTreeMap<String, BTreeMap<String, Vec<Vec<i64>>>> = serde_json::from_str(file).unwrap();
    assert_eq!(cases.len(), 12);
    for (name, case) in cases {
        let (model, _) = golden::Golden::named(&name).open_f32();
        for batch_size in [1, 4] {
            let options = GenerationOptions { batch_size, ..greedy(&[], case["answers"][0].len()) };
            let answers = generate(&model, &text, &case["prompts"], &options, || ()).unwrap();
            let ids: Vec<Vec<i64>> = answers.into_iter().map(|answer| answer.ids).collect();
            assert_eq!(ids, case["answers"], "{name}, batch size {batch_size}");
        }
    }
}

fn greedy(eos_ids: &[i64], max_new_tokens: usize) -> GenerationOptions<'_> {
    GenerationOptions { eos_ids, stop: &[], max_new_tokens, batch_size: 4, sampling: None }
}

fn ids(session: &Session, prompts: &[Vec<i64>], options: &GenerationOptions<'_>) -> Vec<Vec<i64>> {
    let answers = generate(&session.model, &session.text, prompts, options, || ()).unwrap();
    answers.into_iter().map(|answer| answer.ids).collect()
}

#[test]
fn inference_sessions_write_and_score_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, folder) = (session(dir.path()), dir.path().join("m"));
    let inference = Session::for_inference(&folder, None, Device::Cpu, Kind::Float).unwrap();
    let prompts: Vec<Vec<i64>> = (0..5).map(|i| (0..4 + i).map(|j| (31 * i + 7 * j) % 250).collect()).collect();
    assert_eq!(ids(&plain, &prompts, &greedy(&[], 8)), ids(&inference, &prompts, &greedy(&[], 8)));
}

#[test]
fn a_stop_text_ends_the_answer_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let session = session(dir.path());
    // Letters as a prompt, so that some answer contains two letters or more.
    let prompts: Vec<Vec<i64>> = (0..12).map(|i| (65 + i..75 + i).collect()).collect();
    let free = generate(&session.model, &session.text, &prompts, &greedy(&[], 12), || ()).unwrap();
    for (i, answer) in free.iter().enumerate() {
        let chars: Vec<char> = answer.text.chars().collect();
        // Two characters, which are tokens of their own, from the middle.
        let stop: String = chars[chars.len() / 2..].iter().take(2).collect();
        if stop.contains('\u{fffd}') {
            continue;
        }
        let stop = [stop];
        let options = GenerationOptions { stop: &stop, ..greedy(&[], 12) };
        let cut = generate(&session.model, &session.text, &prompts, &options, || ()).unwrap();
        assert_eq!(cut[i].text, answer.text.split(stop[0].as_str()).next().unwrap());
        assert!(cut[i].ids.len() <= answer.ids.len() && answer.ids.starts_with(&cut[i].ids));
        assert!(!cut[i].text.contains(stop[0].as_str()));
    }
    assert!(free.iter().any(|a| !a.text.contains('\u{fffd}')), "an answer that was tried");
}

#[test]
fn sampled_answers_depend_on_the_seed_and_not_on_the_batch() {
    let dir = tempfile::tempdir().unwrap();
    let session = session(dir.path());
    let prompts: Vec<Vec<i64>> = (0..6).map(|i| (0..3 + 2 * i).map(|j| (13 * i + j) % 250).collect()).collect();
    let sampled = |seed, top_p, batch_size| {
        let sampling = Some(Sampling { temperature: 1.0, top_p, seed });
        ids(&session, &prompts, &GenerationOptions { sampling, batch_size, ..greedy(&[], 10) })
    };
    for batch_size in [2, 6] {
        assert_eq!(sampled(1, 0.9, 1), sampled(1, 0.9, batch_size), "batch size {batch_size}");
    }
    assert_ne!(sampled(1, 0.9, 6), sampled(2, 0.9, 6));
    // A nucleus of one token is the likeliest.
    assert_eq!(sampled(1, 1e-6, 6), ids(&session, &prompts, &greedy(&[], 10)));
}

#[test]
fn alternatives_score_as_the_log_softmax_says() {
    let dir = tempfile::tempdir().unwrap();
    let session = session(dir.path());
    // Contexts, numbers of continuations and lengths all differ.
    let item = |start: i64, end: i64, continuations: &[&[i64]]| Alternatives {
        context: (start..end).collect(),
        continuations: continuations.iter().map(|c| c.to_vec()).collect(),
    };
    let items = [
        item(40, 60, &[&[3], &[77]]),
        item(10, 15, &[&[3, 9, 1], &[77], &[5, 5, 5, 5, 8]]),
        item(90, 91, &[&[200, 1], &[7, 8, 9]]),
    ];
    for batch_size in [1, 3] {
        let found = score::alternatives(&session.model, &items, batch_size, || ()).unwrap();
        for (item, found) in items.iter().zip(found) {
            assert_eq!(found.len(), item.continuations.len());
            for (continuation, found) in item.continuations.iter().zip(found) {
                let ids: Vec<i64> = item.context.iter().chain(continuation).copied().collect();
                let log_probs = logits(&session, &ids).log_softmax(-1, Kind::Double);
                let place = |k: usize| (item.context.len() + k - 1) as i64;
                let expected: f64 =
                    (0..continuation.len()).map(|k| log_probs.double_value(&[place(k), continuation[k]])).sum();
                assert!((found - expected).abs() < 1e-4, "{found} {expected}");
            }
        }
    }
    let empty = item(1, 5, &[&[], &[1]]);
    assert!(score::alternatives(&session.model, &[empty], 1, || ()).is_err());
}
