//! Layers, sweep and heat maps of `cpift-group` through the real binary; counts are checked against
//! loops over single bits.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::common::{BIN, Region, Setting, every, header, write_mask};
use cpift_core::format::digest::Digest;
use cpift_core::format::groups::Groups;
use cpift_core::format::mask::MaskHeader;
use cpift_core::format::names::{TensorKind, layer};
use cpift_group::heatmaps::Layers;
use cpift_testkit::{Numbers, expect_entries, run};
use serde_json::{Value, json};

fn read_layers(path: &Path) -> Layers {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// Tensors of random sizes, one of them larger than a piece, and regions in them.
fn random_model(numbers: &mut Numbers) -> (BTreeMap<String, u64>, Vec<Region>) {
    let mut next = |below: u64| numbers.bits() % below;
    let mut numel = BTreeMap::from([
        ("lm_head.weight".to_owned(), 1 + next(900_000)),
        ("model.embed_tokens.weight".to_owned(), 1 + next(2000)),
        ("model.norm.weight".to_owned(), 1 + next(70)),
    ]);
    for i in [0, 1, 2, 10] {
        numel.insert(format!("model.layers.{i}.mlp.up_proj.weight"), 1 + next(150_000));
        numel.insert(format!("model.layers.{i}.input_layernorm.weight"), 1 + next(20));
    }
    let total = numel.values().sum::<u64>();
    let regions = (0..4).map(|i| (0..[30_000, 2000, 30_000, 5][i]).map(|_| next(total) as usize).collect()).collect();
    (numel, regions)
}

/// The row that a tensor is counted in.
fn row_of(name: &str) -> String {
    layer(name).map_or("outside".to_owned(), |(_, n)| n.to_string())
}

/// |a ∩ b| by row, bit by bit.
fn shared(numel: &BTreeMap<String, u64>, excluded: &[TensorKind], a: &Region, b: &Region) -> BTreeMap<String, u64> {
    let (mut rows, mut start) = (BTreeMap::new(), 0);
    for (name, n) in numel {
        let end = start + *n as usize;
        if !excluded.iter().any(|kind| kind.matches(name)) {
            *rows.entry(row_of(name)).or_default() += a.range(start..end).filter(|i| b.contains(i)).count() as u64;
        }
        start = end;
    }
    rows
}

#[test]
fn counts_of_every_layer_are_those_of_a_loop_over_bits() {
    let mut numbers = Numbers(5);
    for kinds in [&[][..], &[TensorKind::Norms], &[TensorKind::Embeddings, TensorKind::Norms], &[]] {
        let (numel, regions) = random_model(&mut numbers);
        let s = Setting::new(&[]);
        let mut args = vec!["--out".to_owned(), s.out.join("groups.json").display().to_string()];
        for (i, region) in regions.iter().enumerate() {
            // Headers of different lengths: the same tensor lies at a different offset in every
            // file.
            let percent = [1.0, 0.123_456_789, 1.5, 10.0][i];
            let header = MaskHeader { numel: numel.clone(), percent, ..header(region.len()) };
            write_mask(&s.path(&format!("{i}.mask")), region, &header);
            args.extend(["--mask".to_owned(), format!("t{i}={}", s.path(&format!("{i}.mask")).display())]);
        }
        let list: Vec<String> = kinds.iter().map(ToString::to_string).collect();
        if !kinds.is_empty() {
            args.extend(["--exclude".to_owned(), list.join(",")]);
        }
        run(BIN, &args).ok();
        let groups = Groups::read(&s.out.join("groups.json")).unwrap();
        let layers = read_layers(&s.out.join("groups.layers.json"));
        assert_eq!((&layers.tasks, &layers.masks, &layers.base), (&groups.tasks, &groups.masks, &groups.base));
        let names: Vec<&str> = layers.layers.iter().map(|l| l.name.as_str()).collect();
        let outside = if kinds.len() == 2 { None } else { Some("outside") };
        assert_eq!(names, ["0", "1", "2", "10"].into_iter().chain(outside).collect::<Vec<_>>());
        for (a, b) in (0..4).flat_map(|a| (0..4).map(move |b| (a, b))) {
            let expected = shared(&numel, kinds, &regions[a], &regions[b]);
            let found = layers.layers.iter().map(|l| (l.name.clone(), l.shared[a][b])).collect::<BTreeMap<_, _>>();
            assert_eq!(found, expected, "{a} {b}");
            let sum = |a: usize, b: usize| layers.layers.iter().map(|l| l.shared[a][b]).sum::<u64>() as f64;
            assert_eq!(groups.jaccard[a][b], sum(a, b) / (sum(a, a) + sum(b, b) - sum(a, b)), "{a} {b}");
            for l in &layers.layers {
                let (both, union) = (l.shared[a][b], l.shared[a][a] + l.shared[b][b] - l.shared[a][b]);
                assert_eq!(l.jaccard[a][b], if union == 0 { 0.0 } else { both as f64 / union as f64 });
                let q = |i: usize| l.shared[i][i] as f64 / l.elements as f64;
                let chance = if q(a) * q(b) == 0.0 { 0.0 } else { q(a) * q(b) / (q(a) + q(b) - q(a) * q(b)) };
                assert!((l.chance[a][b] - chance).abs() < 1e-15);
            }
        }
        for l in &layers.layers {
            let compared = numel.iter().filter(|(name, _)| !kinds.iter().any(|k| k.matches(name)));
            assert_eq!(l.elements, compared.filter(|(n, _)| row_of(n) == l.name).map(|(_, n)| n).sum::<u64>());
        }
        for (i, task) in groups.tasks.iter().enumerate() {
            assert_eq!(groups.masks[task], Digest::of_file(&s.path(&format!("{i}.mask"))).unwrap());
        }
    }
}

/// Two pairs of similar tasks that share little.
fn two_pairs() -> Setting {
    Setting::new(&[
        ("a", every(0..100, 1)),
        ("b", every(20..120, 1)),
        ("c", (1000..1100).chain(0..10).collect()),
        ("d", every(1010..1110, 1)),
    ])
}

#[test]
fn the_sweep_shows_the_groups_for_every_tau() {
    let s = two_pairs();
    // a and b share 80 of 120, c and d 90 of 120; a and c share 10 of 200.
    let (low, cd, ab) = (10.0 / 200.0, 90.0 / 120.0, 80.0 / 120.0);
    let row = |from: f64, to: Option<f64>, groups: Value, auto: bool, chosen: bool| json!({"from": from, "to": to, "groups": groups, "auto": auto, "chosen": chosen});
    let ran = s.run_without_out(&["--sweep", "--json", "--tau", "0.7"]).ok().says(&["0.6667 (0.0"]);
    let said: Value = serde_json::from_str(&ran.stdout).unwrap();
    let expected = json!([
        row(0.0, Some(low), json!([["a", "b", "c", "d"]]), false, false),
        row(low, Some(ab), json!([["a", "b"], ["c", "d"]]), true, false),
        row(ab, Some(cd), json!([["a"], ["b"], ["c", "d"]]), false, true),
        row(cd, None, json!([["a"], ["b"], ["c"], ["d"]]), false, false),
    ]);
    assert_eq!(said["sweep"], expected);
    assert_eq!((&said["tau"], &said["tau_mode"]), (&json!(0.7), &json!("fixed")));
    expect_entries(&s.out, &[]);

    let lines = s.run_without_out(&["--sweep", "--tau", "0.7"]).ok().stdout;
    let lines: Vec<Vec<&str>> = lines.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(lines.len(), 5);
    assert_eq!(lines[2].join(" "), "0.050000 0.666667 2 {a, b} {c, d} <- --tau auto (0.358333)");
    assert_eq!(lines[3].join(" "), "0.666667 0.750000 3 {a} {b} {c, d} <- --tau 0.7");
    assert_eq!(lines[4].join(" "), "0.750000 any 4 {a} {b} {c} {d}");

    // With --out the files are written as well.
    let ran = s.run(&["--sweep", "--tau", "auto", "--json"]).ok();
    let said: Value = serde_json::from_str(&ran.stdout).unwrap();
    let groups = Groups::read(&s.out.join("groups.json")).unwrap();
    assert_eq!((said["tau"].as_f64().unwrap(), groups.groups.len()), (groups.tau, 2));
    assert_eq!((&said["sweep"][1]["auto"], &said["sweep"][1]["chosen"]), (&json!(true), &json!(true)));
}

#[test]
fn the_picture_by_layer_has_every_pair_and_layer() {
    let name = "a<b>&\"c";
    let s = Setting::new(&[(name, every(0..100, 1)), ("b", every(20..120, 1)), ("c", every(301_010..301_110, 1))]);
    let (layers, map) = (s.out.join("l.json"), s.out.join("m.svg"));
    s.run(&["--layers", layers.to_str().unwrap(), "--layers-svg", map.to_str().unwrap()]).ok();
    expect_entries(&s.out, &["groups.json", "groups.json.cpift.json", "groups.svg", "l.json", "m.svg"]);
    assert_eq!(read_layers(&layers).tasks, [name, "b", "c"]);
    for file in ["groups.svg", "m.svg"] {
        let text = fs::read_to_string(s.out.join(file)).unwrap();
        let document = roxmltree::Document::parse(&text).unwrap();
        let shown: Vec<&str> = document.descendants().filter_map(|node| node.text()).collect();
        assert!(shown.iter().any(|t| t.contains(name)), "{file}");
    }
    let text = fs::read_to_string(&map).unwrap();
    let document = roxmltree::Document::parse(&text).unwrap();
    let titles: Vec<&str> =
        document.descendants().filter(|n| n.has_tag_name("g")).filter_map(|g| g.first_child()?.text()).collect();
    // Three pairs; layer 0, outside and all; a cell and its strip.
    assert_eq!(titles.len(), 18, "{titles:?}");
    assert!(titles.iter().any(|t| t.starts_with("a<b>&\"c and b, outside the layers: 0.666667, chance 0.000")));
    assert!(titles.iter().any(|t| t.starts_with("b and c, all layers: 0.000000")));
    // Regions a and b have nothing in layer 0.
    assert_eq!(text.matches("fill=\"#dfe3e8\"").count(), 2);
}

#[test]
fn one_task_alone_has_pictures_too() {
    let s = Setting::new(&[("a", every(0..100, 1))]);
    s.run(&["--sweep"]).ok();
    for file in ["groups.svg", "groups.layers.svg"] {
        let text = fs::read_to_string(s.out.join(file)).unwrap();
        roxmltree::Document::parse(&text).unwrap();
        assert!(text.contains("nothing to compare"), "{file}");
    }
}
