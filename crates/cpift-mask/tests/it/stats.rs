//! `cpift-mask stats`: the matrix of layers by roles against a loop over single bits, its files and
//! its picture.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use cpift_core::format::mask::{FORMAT_VERSION, MaskHeader, MaskWriter, Metric, Scope, Ties};
use cpift_testkit::{Numbers, expect_entries, run};
use serde_json::{Value, json};
use tempfile::TempDir;

const BIN: &str = env!("CARGO_BIN_EXE_cpift-mask");

/// Names with the layer and the role they count for.
const TENSORS: [(&str, &str, &str); 9] = [
    ("lm_head.weight", "outside", "head"),
    ("model.embed_tokens.weight", "outside", "embed"),
    ("model.layers.0.mlp.down_proj.weight", "0", "down"),
    ("model.layers.0.self_attn.q_proj.bias", "0", "q"),
    ("model.layers.0.self_attn.q_proj.weight", "0", "q"),
    ("model.layers.10.mlp.down_proj.weight", "10", "down"),
    ("model.layers.10.router.weight", "10", "other"),
    ("model.layers.2.input_layernorm.weight", "2", "norm"),
    ("model.norm.weight", "outside", "norm"),
];

/// A mask of random sizes and bits, with those of `excluded` kinds all zero; its counts by layer
/// and role.
struct Setting {
    dir: TempDir,
    mask: PathBuf,
    counts: BTreeMap<(&'static str, &'static str), (u64, u64)>,
}

impl Setting {
    fn new(seed: u64, excluded: &[&str]) -> Self {
        let mut numbers = Numbers(seed);
        let sizes: Vec<u64> = TENSORS.iter().map(|_| 1 + numbers.bits() % 5000).collect();
        let left_out = |role: &str| match role {
            "norm" => excluded.contains(&"norms"),
            "head" | "embed" => excluded.contains(&"embeddings"),
            _ => false,
        };
        let (mut counts, mut bits) = (BTreeMap::new(), Vec::new());
        for ((name, layer, role), n) in TENSORS.into_iter().zip(&sizes) {
            let set: Vec<bool> = (0..*n).map(|_| !left_out(role) && numbers.bits().is_multiple_of(50)).collect();
            let sums: &mut (u64, u64) = counts.entry((layer, role)).or_default();
            *sums = (sums.0 + n, sums.1 + set.iter().filter(|b| **b).count() as u64);
            bits.push((name, set));
        }
        let header = MaskHeader {
            format_version: FORMAT_VERSION,
            percent: 2.0,
            scope: Scope::Layer,
            metric: Metric::Magnitude,
            seed: None,
            rule: None,
            d: counts.iter().filter(|((_, role), _)| !left_out(role)).map(|(_, (n, _))| n).sum(),
            selected: counts.values().map(|(_, selected)| selected).sum(),
            ties: Ties::default(),
            excluded: excluded.iter().map(ToString::to_string).collect(),
            base: serde_json::from_value(json!("base")).unwrap(),
            tuned: serde_json::from_value(json!("tuned")).unwrap(),
            numel: TENSORS.iter().zip(&sizes).map(|((name, ..), n)| ((*name).to_owned(), *n)).collect(),
        };
        let dir = tempfile::tempdir().unwrap();
        let mask = dir.path().join("m.safetensors");
        let writer = MaskWriter::create(&mask, &header).unwrap();
        for (name, set) in bits {
            let byte = |bits: &[bool]| bits.iter().rev().fold(0u8, |byte, bit| byte << 1 | u8::from(*bit));
            writer.write(name, 0, &set.chunks(8).map(byte).collect::<Vec<_>>()).unwrap();
        }
        Self { dir, mask, counts }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn stats(&self, more: &[&str]) -> cpift_testkit::Run {
        run(BIN, ["stats", self.mask.to_str().unwrap()].iter().chain(more))
    }
}

fn read(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn the_matrix_is_that_of_a_loop_over_bits() {
    for (seed, excluded) in [(1, &[][..]), (2, &["norms"]), (3, &["embeddings", "norms"]), (4, &[])] {
        let s = Setting::new(seed, excluded);
        let said: Value = serde_json::from_str(&s.stats(&["--json"]).ok().stdout).unwrap();
        let matrix = &said["matrix"];
        assert_eq!(matrix["layers"], json!(["0", "2", "10", "outside"]));
        assert_eq!(matrix["roles"], json!(["q", "down", "norm", "embed", "head", "other"]));
        for (i, layer) in ["0", "2", "10", "outside"].into_iter().enumerate() {
            for (j, role) in ["q", "down", "norm", "embed", "head", "other"].into_iter().enumerate() {
                let (n, selected) = s.counts.get(&(layer, role)).copied().unwrap_or_default();
                assert_eq!(matrix["elements"][i][j], n, "{layer} {role}");
                assert_eq!(matrix["selected"][i][j], selected, "{layer} {role}");
                let left_out = match role {
                    "norm" => excluded.contains(&"norms"),
                    "embed" | "head" => excluded.contains(&"embeddings"),
                    _ => false,
                };
                let density = (n > 0 && !left_out).then(|| selected as f64 / n as f64);
                assert_eq!(matrix["density"][i][j], json!(density), "{layer} {role}");
            }
        }
        for (rows, axis) in [("layers", 0), ("roles", 1)] {
            let sums = said[rows].as_array().unwrap().iter().map(|row| row["selected"].as_u64().unwrap());
            let cells = |i: usize| -> u64 {
                let cell = |k: usize| match axis {
                    0 => &matrix["selected"][i][k],
                    _ => &matrix["selected"][k][i],
                };
                (0..6).filter_map(|k| cell(k).as_u64()).sum()
            };
            assert!(sums.enumerate().all(|(i, sum)| sum == cells(i)), "{rows}");
        }
    }
}

#[test]
fn files_hold_what_is_printed_at_any_number_of_threads() {
    let s = Setting::new(7, &[]);
    let (out, svg) = (s.path("s.json"), s.path("s.svg"));
    let args = ["--out", out.to_str().unwrap(), "--svg", svg.to_str().unwrap(), "--force", "--threads"];
    let mut files = Vec::new();
    for threads in ["1", "2", "8"] {
        assert_eq!(s.stats(&[&args[..], &[threads]].concat()).ok().stdout, "");
        files.push((fs::read(&out).unwrap(), fs::read(&svg).unwrap()));
    }
    assert!(files.iter().all(|f| *f == files[0]));
    let said: Value = serde_json::from_str(&s.stats(&["--json"]).ok().stdout).unwrap();
    assert_eq!(read(&out), said);
}

#[test]
fn the_picture_has_a_cell_for_every_layer_and_role_there_is() {
    let s = Setting::new(9, &["norms"]);
    let svg = s.path("s.svg");
    s.stats(&["--svg", svg.to_str().unwrap()]).ok();
    let text = fs::read_to_string(&svg).unwrap();
    let document = roxmltree::Document::parse(&text).unwrap();
    let cells: Vec<_> = document.descendants().filter(|n| n.has_tag_name("g")).collect();
    // Eight of the matrix, sums of four layers and six roles, the sum of all.
    assert_eq!(cells.len(), 8 + 4 + 6 + 1);
    let of = |start: &str| {
        let cell = cells.iter().find(|g| g.first_child().and_then(|t| t.text()).unwrap().starts_with(start)).unwrap();
        let shown = cell.last_child().and_then(|t| t.text()).unwrap().to_owned();
        (cell.first_child().unwrap().text().unwrap().to_owned(), shown)
    };
    let (n, selected) = s.counts[&("10", "down")];
    let density = 100.0 * selected as f64 / n as f64;
    let (title, shown) = of("layer 10, down: ");
    assert!(title.starts_with(&format!("layer 10, down: {selected} of {n}, ")), "{title}");
    assert!((shown.parse::<f64>().unwrap() - density).abs() < 0.006, "{shown} {density}");
    let (n, _) = s.counts[&("outside", "norm")];
    assert_eq!(
        of("outside the layers, norm"),
        (format!("outside the layers, norm: 0 of {n}, left out of D"), "–".into())
    );
    assert!(text.contains("layer scope") && text.contains("without norms") && text.contains("p = 2 %"), "{text}");
}

#[test]
fn outputs_that_exist_or_coincide() {
    let s = Setting::new(1, &[]);
    let (out, svg) = (s.path("s.json"), s.path("s.svg"));
    let args = ["--out", out.to_str().unwrap(), "--svg", svg.to_str().unwrap()];
    s.stats(&["--out", args[1], "--svg", args[1]]).usage_error(&["--out and --svg name the same file"]);
    for path in [&out, &svg] {
        fs::write(path, "precious").unwrap();
        s.stats(&args).bad_input(&[path.to_str().unwrap(), "exists already", "--force"]);
        assert_eq!(fs::read_to_string(path).unwrap(), "precious");
        expect_entries(s.dir.path(), &["m.safetensors", path.file_name().unwrap().to_str().unwrap()]);
        fs::remove_file(path).unwrap();
    }
    fs::write(&out, "old").unwrap();
    s.stats(&[&args[..], &["--force"]].concat()).ok();
    assert_eq!(read(&out)["mask"]["scope"], "layer");
}
