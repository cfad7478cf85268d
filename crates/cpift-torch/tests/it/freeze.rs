//! Frozen elements keep their bits through steps with momentum and weight decay, −0.0 included, in
//! f32 and bf16.

use std::collections::BTreeMap;
use std::path::Path;

use cpift_core::Checkpoint;
use cpift_core::format::mask::{FORMAT_VERSION, Mask, MaskHeader, MaskWriter, Metric, Scope, Ties, indices};
use cpift_testkit::{Numbers, Tensor as TestTensor, Tensors, write_checkpoint};
use cpift_torch::freeze::Freeze;
use cpift_torch::optim::{AdamW, AdamWConfig, Guard, Update, sum_of_squares};
use cpift_torch::pieces::whole_pieces;
use cpift_torch::placement::Placement;
use cpift_torch::weights::Parameters;
use tch::{Device, Kind, Tensor, no_grad};

const ROWS: i64 = 37;
const COLUMNS: i64 = 11;

/// A mask over `w` [37, 11] that sets about a fifth of the elements; and one with others.
fn mask(dir: &Path, name: &str, seed: u64) -> Mask {
    let mut numbers = Numbers(seed);
    let n = (ROWS * COLUMNS) as u64;
    let mut bits = vec![0u8; n.div_ceil(8) as usize];
    (0..n as usize).filter(|_| numbers.bits().is_multiple_of(5)).for_each(|i| bits[i / 8] |= 1 << (i % 8));
    let model = write_checkpoint(&dir.join(name), &Tensors::from([("w".into(), TestTensor::f32(&[1], &[0.0]))]));
    let digest = Checkpoint::open(&model).unwrap().digest().unwrap();
    let header = MaskHeader {
        format_version: FORMAT_VERSION,
        percent: 20.0,
        scope: Scope::Global,
        metric: Metric::Magnitude,
        seed: None,
        rule: None,
        d: n,
        selected: indices(&bits).count() as u64,
        ties: Ties::default(),
        excluded: Vec::new(),
        base: digest.clone(),
        tuned: digest,
        numel: BTreeMap::from([("w".to_owned(), n)]),
    };
    let path = dir.join(format!("{name}.safetensors"));
    MaskWriter::create(&path, &header).unwrap().write("w", 0, &bits).unwrap();
    Mask::open(&path).unwrap()
}

fn bits_of(t: &Tensor) -> Vec<u8> {
    let size = t.kind().elt_size_in_bytes();
    let mut out = vec![0; t.numel() * size];
    t.detach().contiguous().copy_data_u8(&mut out, t.numel());
    out
}

/// Makes ten AdamW steps; returns true for elements of which a bit changed.
fn changed(kind: Kind, masks: &[&Mask]) -> Vec<bool> {
    tch::manual_seed(3);
    let w = Tensor::randn([ROWS, COLUMNS], (Kind::Float, Device::Cpu)).to_kind(kind);
    // Every third element starts as -0.0, which an update multiplied by a mask would turn into
    // +0.0.
    no_grad(|| drop(w.view([-1]).slice(0, None, None, 3).fill_(-0.0)));
    let parameters = Parameters::from([("w".to_owned(), w.set_requires_grad(true))]);
    let before = bits_of(&parameters["w"]);
    let freeze = Freeze::new(&whole_pieces(&parameters), masks).unwrap();
    let config = AdamWConfig { weight_decay: 0.5, ..AdamWConfig::default() };
    let mut optimizer = AdamW::new(whole_pieces(&parameters).iter(), config, &Placement::on(Device::Cpu)).unwrap();
    let guard = Guard::new(Device::Cpu);
    tch::manual_seed(4);
    let grads: Vec<Tensor> = (0..10).map(|_| Tensor::randn([COLUMNS, ROWS], (Kind::Float, Device::Cpu))).collect();
    for (seed, grad) in grads.into_iter().enumerate() {
        let mut grad = grad.to_kind(kind).tr();
        freeze.zero_frozen_grads("w", &mut grad);
        optimizer.step(&[0], &[grad], Update { lr: 0.05, seed: seed as u64, guard: &guard }).unwrap();
        freeze.restore("w", &parameters["w"]);
    }
    let after = bits_of(&parameters["w"]);
    let size = kind.elt_size_in_bytes();
    before.chunks(size).zip(after.chunks(size)).map(|(a, b)| a != b).collect()
}

#[test]
fn frozen_elements_keep_their_bits_and_the_others_move() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (mask(dir.path(), "a", 1), mask(dir.path(), "b", 2));
    for kind in [Kind::Float, Kind::BFloat16] {
        let moved = changed(kind, &[&a, &b]);
        let frozen = |i: usize| [&a, &b].iter().any(|m| m.bits("w").unwrap()[i / 8] >> (i % 8) & 1 == 1);
        assert!((0..moved.len()).filter(|&i| frozen(i)).count() > 100);
        for (i, moved) in moved.iter().enumerate() {
            assert!(!(frozen(i) && *moved), "{kind:?} element {i} is frozen and changed");
        }
        // A bf16 element may return to its start by chance, so nearly all elements must have
        // changed.
        let free: Vec<bool> = (0..moved.len()).filter(|&i| !frozen(i)).map(|i| moved[i]).collect();
        let share = |moved: &[bool]| moved.iter().filter(|m| **m).count() as f64 / moved.len() as f64;
        assert!(share(&free) > 0.97, "{kind:?}: of the free elements only {} moved", share(&free));
        assert!(share(&changed(kind, &[])) > 0.97, "{kind:?}: without masks all move");
    }
}

#[test]
fn gradients_of_any_layout_make_the_same_step() {
    let step = |grad: Tensor| {
        let w = Tensor::ones([3, 2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let parameters = Parameters::from([("w".to_owned(), w)]);
        let guard = Guard::new(Device::Cpu);
        let update = Update { lr: 0.1, seed: 0, guard: &guard };
        let config = AdamWConfig { eps: 0.5, ..AdamWConfig::default() };
        AdamW::new(whole_pieces(&parameters).iter(), config, &Placement::on(Device::Cpu))
            .unwrap()
            .step(&[0], &[grad], update)
            .unwrap();
        bits_of(&parameters["w"])
    };
    let transposed = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([2, 3]).tr();
    assert_eq!(step(transposed.contiguous()), step(transposed));
}

#[test]
fn muted_gradients_do_not_count() {
    let dir = tempfile::tempdir().unwrap();
    let a = mask(dir.path(), "a", 1);
    let w = Tensor::zeros([ROWS, COLUMNS], (Kind::Float, Device::Cpu));
    let parameters = Parameters::from([("w".to_owned(), w)]);
    let freeze = Freeze::new(&whole_pieces(&parameters), &[&a]).unwrap();
    let mut grad = Tensor::ones([ROWS, COLUMNS], (Kind::Float, Device::Cpu));
    freeze.zero_frozen_grads("w", &mut grad);
    let left = (ROWS * COLUMNS) as u64 - freeze.len();
    assert_eq!(freeze.len(), a.header.selected);
    let norm = sum_of_squares(&[grad], Device::Cpu).sqrt().double_value(&[]);
    assert!((norm - (left as f64).sqrt()).abs() < 1e-4);
}
