//! Writing masks and groups.json directly, for tests of their readers.

use std::collections::BTreeMap;
use std::path::Path;

use cpift_core::Checkpoint;
use cpift_core::format::digest::Digest;
use cpift_core::format::groups::{self, Groups, Order, TauMode};
use cpift_core::format::mask::{FORMAT_VERSION, MaskHeader, MaskWriter, Metric, Scope, Ties, count_ones};

/// Writes or replaces a mask for the checkpoint `base`. `chosen` returns true for the elements to
/// set, by tensor name and flat index.
///
/// # Panics
/// On I/O errors.
pub fn write_mask(path: &Path, base: &Path, chosen: impl Fn(&str, usize) -> bool) {
    let _ = std::fs::remove_file(path);
    let checkpoint = Checkpoint::open(base).unwrap();
    let mut packed: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut numel = BTreeMap::new();
    for view in checkpoint.parameters() {
        let mut bits = vec![0u8; view.numel().div_ceil(8)];
        (0..view.numel()).filter(|&i| chosen(view.name, i)).for_each(|i| bits[i / 8] |= 1 << (i % 8));
        numel.insert(view.name.to_owned(), view.numel() as u64);
        packed.insert(view.name.to_owned(), bits);
    }
    let d = numel.values().sum();
    let selected = packed.values().map(|bits| count_ones(bits)).sum();
    let header = MaskHeader {
        format_version: FORMAT_VERSION,
        percent: 100.0 * selected as f64 / d as f64,
        scope: Scope::Global,
        metric: Metric::Magnitude,
        seed: None,
        rule: None,
        d,
        selected,
        ties: Ties::default(),
        excluded: Vec::new(),
        base: checkpoint.digest().unwrap(),
        tuned: checkpoint.digest().unwrap(),
        numel,
    };
    let writer = MaskWriter::create(path, &header).unwrap();
    packed.iter().for_each(|(name, bits)| writer.write(name, 0, bits).unwrap());
}

/// Writes a groups.json for `base` with these groups.
///
/// # Panics
/// On I/O errors.
pub fn write_groups(path: &Path, base: &Path, groups: &[&[&str]], masks: &[(&str, &Path)]) {
    let groups: Vec<Vec<String>> = groups.iter().map(|g| g.iter().map(|t| (*t).to_owned()).collect()).collect();
    let tasks = groups.concat();
    let square = vec![vec![0.0; tasks.len()]; tasks.len()];
    Groups {
        format_version: groups::FORMAT_VERSION,
        tau: 0.1,
        partition: None,
        tau_mode: TauMode::Fixed,
        jaccard: square.clone(),
        chance: square,
        without_ties: None,
        excluded: Vec::new(),
        trivial: false,
        order: Order { method: "random".into(), seed: Some(0), scores: Vec::new() },
        base: Checkpoint::open(base).unwrap().digest().unwrap(),
        masks: masks.iter().map(|(n, p)| ((*n).to_owned(), Digest::of_file(p).unwrap())).collect(),
        tasks,
        groups,
    }
    .write(path, true)
    .unwrap();
}
