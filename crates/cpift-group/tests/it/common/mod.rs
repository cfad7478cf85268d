//! Masks and score files made by hand, for the tests of the real binary.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use cpift_core::format::digest::Digest;
use cpift_core::format::mask::{FORMAT_VERSION, MaskHeader, MaskWriter, Metric, Scope, Ties};
use cpift_testkit::{Run, run};
use serde_json::json;
use tempfile::TempDir;

pub const BIN: &str = env!("CARGO_BIN_EXE_cpift-group");

/// Positions in the model below, with its tensors concatenated in bytewise name order.
pub type Region = BTreeSet<usize>;

/// Elements of each tensor. One size is not a multiple of 8, one fills several blocks, and there is
/// a tensor of each kind.
pub const MODEL: [(&str, usize); 4] = [
    ("lm_head.weight", 1003),
    ("model.embed_tokens.weight", 300_001),
    ("model.layers.0.mlp.up_proj.weight", 20_000),
    ("model.norm.weight", 13),
];

pub fn digest(text: &str) -> Digest {
    serde_json::from_value(json!(text)).unwrap()
}

pub fn header(selected: usize) -> MaskHeader {
    MaskHeader {
        format_version: FORMAT_VERSION,
        percent: 1.0,
        scope: Scope::Global,
        metric: Metric::Magnitude,
        seed: None,
        rule: None,
        d: MODEL.iter().map(|(_, n)| *n as u64).sum(),
        selected: selected as u64,
        ties: Ties::default(),
        excluded: Vec::new(),
        base: digest("base"),
        tuned: digest("tuned"),
        numel: MODEL.iter().map(|(name, n)| ((*name).to_owned(), *n as u64)).collect(),
    }
}

pub fn write_mask(path: &Path, region: &Region, header: &MaskHeader) {
    let writer = MaskWriter::create(path, header).unwrap();
    let mut start = 0;
    for (name, n) in &header.numel {
        let n = *n as usize;
        let mut bytes = vec![0u8; n.div_ceil(8)];
        for i in region.range(start..start + n).map(|i| i - start) {
            bytes[i / 8] |= 1 << (i % 8);
        }
        writer.write(name, 0, &bytes).unwrap();
        start += n;
    }
}

/// A directory with masks, and one for the outputs.
pub struct Setting {
    pub dir: TempDir,
    pub out: PathBuf,
    args: Vec<String>,
}

impl Setting {
    /// Masks of these regions.
    pub fn new(regions: &[(&str, Region)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        fs::create_dir(&out).unwrap();
        let mut args = vec!["--out".to_owned(), out.join("groups.json").to_str().unwrap().to_owned()];
        for (name, region) in regions {
            let path = dir.path().join(format!("{name}.mask"));
            write_mask(&path, region, &header(region.len()));
            args.extend(["--mask".to_owned(), format!("{name}={}", path.display())]);
        }
        Self { dir, out, args }
    }

    /// Runs without `--out`.
    pub fn run_without_out(&self, more: &[&str]) -> Run {
        run(BIN, self.args[2..].iter().map(String::as_str).chain(more.iter().copied()))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn run(&self, more: &[&str]) -> Run {
        run(BIN, self.args.iter().map(String::as_str).chain(more.iter().copied()))
    }

    /// Runs and reads groups.json.
    pub fn groups(&self, more: &[&str]) -> cpift_core::format::groups::Groups {
        self.run(&[more, &["--force"]].concat()).ok();
        cpift_core::format::groups::Groups::read(&self.out.join("groups.json")).unwrap()
    }

    /// Writes a scores.json with these losses.
    pub fn scores(&self, name: &str, model: &str, losses: &[(&str, f64)]) -> PathBuf {
        let tasks: Vec<_> = losses
            .iter()
            .map(|(task, nll)| {
                json!({"task": task, "eval_digest": "e", "metric": null, "settings": BTreeMap::<String, u8>::new(),
                       "nll": {"name": "nll", "value": nll, "stderr": 0.0, "n": 1}})
            })
            .collect();
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let text = json!({"format_version": 1, "model": "m", "model_digest": model, "tasks": tasks}).to_string();
        fs::write(&path, text).unwrap();
        path
    }
}

/// The region of every `step`-th position in `range`.
pub fn every(range: std::ops::Range<usize>, step: usize) -> Region {
    range.step_by(step).collect()
}
