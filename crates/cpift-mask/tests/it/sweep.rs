//! The one-pass choice and the exact search that stands in for it must agree, bit for bit.

use std::path::Path;

use cpift_core::format::mask::{FORMAT_VERSION, MaskHeader, MaskWriter, Metric, Scope, Ties, count_ones};
use cpift_core::stream::cuts::Guess;
use cpift_core::stream::select::find_cut;
use cpift_core::stream::ties::HashBand;
use cpift_core::{Checkpoint, Mask};

use cpift_mask::inputs::Inputs;
use cpift_mask::part::{Part, PartScores};
use cpift_mask::sweep::{ChunkFlags, LIMIT, Pass, emit, guess, sweep};
use cpift_testkit::{Numbers, Tensor, Tensors, write_checkpoint};

const N: usize = 300_007;

/// Runs `choose` on the only part of two checkpoints and returns the bits it wrote.
fn bits(dir: &Path, levels: u64, choose: impl FnOnce(&Part<'_>, &Pass<'_>) -> Vec<ChunkFlags>) -> Chosen {
    let mut numbers = Numbers(8);
    let mut tensors = |level: u64| {
        let values: Vec<f32> = (0..N).map(|_| (numbers.bits() % level) as f32 * 1e-3).collect();
        Tensors::from([("w".to_owned(), Tensor::f32(&[N], &values))])
    };
    let [base, tuned] = [("base", 1), ("tuned", levels)]
        .map(|(name, level)| Checkpoint::open(&write_checkpoint(&dir.join(name), &tensors(level))).unwrap());
    let inputs = Inputs { base, tuned, fisher: None, extra: 0 };
    let parts = inputs.parts(Scope::Global, &[]);
    let header = MaskHeader {
        format_version: FORMAT_VERSION,
        percent: 1.0,
        scope: Scope::Global,
        metric: Metric::Magnitude,
        seed: None,
        rule: None,
        d: N as u64,
        selected: N as u64,
        ties: Ties { at_threshold: 0, chosen: 0, decided_by_hash: 1 },
        excluded: Vec::new(),
        base: inputs.base.digest().unwrap(),
        tuned: inputs.tuned.digest().unwrap(),
        numel: [("w".to_owned(), N as u64)].into(),
    };
    let path = dir.join("mask");
    let writer = MaskWriter::create(&path, &header).unwrap();
    let (done, digests) = (|_| (), inputs.digests());
    let pass = Pass { metric: Metric::Magnitude, writer: &writer, digests: &digests, limit: LIMIT, done: &done };
    let flags = choose(&parts.ranked[0], &pass);
    (Mask::open(&path).unwrap().bits("w").unwrap().to_vec(), flags)
}

/// Bits of a part, and the flags of the elements chosen among equals.
type Chosen = (Vec<u8>, Vec<ChunkFlags>);

fn searched(k: u64, levels: u64) -> Chosen {
    bits(tempfile::tempdir().unwrap().path(), levels, |part, pass| {
        let cut = find_cut::<f32>(&PartScores { part, metric: pass.metric }, k);
        emit(part, &cut, k, pass).unwrap()
    })
}

/// What a guess that leaves at most `limit` candidates settles.
fn swept(k: u64, levels: u64, limit: usize, expect_tied: bool) -> Chosen {
    bits(tempfile::tempdir().unwrap().path(), levels, |part, pass| {
        let pass = Pass { limit, ..*pass };
        let guess = guess::<f32>(part, pass.metric, k, limit);
        assert_eq!(matches!(guess, Guess::Tied { .. }), expect_tied, "{k} of {levels} levels: {guess:?}");
        sweep(part, guess, &pass).unwrap().settle(part, k, &pass).unwrap().expect("settled").flags
    })
}

#[test]
fn a_bracket_that_holds_the_threshold_settles_it() {
    for (k, levels) in [(1, 1 << 40), (3_000, 1 << 40), (150_000, 1 << 40), (3_000, 50), (299_000, 7), (N as u64, 3)] {
        assert!(swept(k, levels, LIMIT, false) == searched(k, levels), "{k} of {levels} levels");
    }
}

#[test]
fn ties_that_are_too_many_to_keep_are_settled_by_their_hashes() {
    for (k, levels) in [(1, 3), (50_000, 10), (60_000, 3), (150_000, 3), (280_000, 3), (250_000, 2), (N as u64, 1)] {
        let (bits, flags) = swept(k, levels, 20_000, true);
        assert_eq!(count_ones(&bits), k);
        assert!((bits, flags) == searched(k, levels), "{k} of {levels} levels");
    }
}

#[test]
fn a_guess_that_is_wrong_or_leaves_too_much_open_is_not_trusted() {
    let (k, levels) = (3_000, 1 << 40);
    let wrong = |guess: Guess<f32>, limit: usize| {
        bits(tempfile::tempdir().unwrap().path(), levels, |part, pass| {
            let pass = Pass { limit, ..*pass };
            assert_eq!(sweep(part, guess, &pass).unwrap().settle(part, k, &pass).unwrap(), None);
            // Whatever the pass has written by then, the search writes over it.
            let cut = find_cut::<f32>(&PartScores { part, metric: pass.metric }, k);
            emit(part, &cut, k, &pass).unwrap()
        })
    };
    let expected = searched(k, levels);
    let bracket = |low, high| Guess::Bracket { low, high };
    assert!(wrong(bracket(0.0, 1.0), LIMIT) == expected, "the threshold lies above");
    assert!(wrong(bracket(f32::MAX, f32::INFINITY), LIMIT) == expected, "the threshold lies below");
    assert!(wrong(bracket(0.0, f32::INFINITY), 10) == expected, "too many candidates");
    assert!(
        wrong(Guess::Tied { score: 1.0, band: HashBand::around(0.5, 0.1) }, LIMIT) == expected,
        "another score is the threshold"
    );
}
