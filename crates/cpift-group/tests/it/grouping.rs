//! `cpift-group` on hand-made masks through the real binary: similarities (checked against sets),
//! groups, orders and outputs.

use std::collections::HashSet;
use std::fs;

use crate::common::{BIN, MODEL, Region, Setting, every};
use cpift_core::format::groups::TauMode;
use cpift_testkit::{Numbers, expect_entries, run};
use serde_json::{Value, json};

/// Four tasks: a and b share most, so do c and d, the two pairs share little.
fn four() -> [(&'static str, Region); 4] {
    let with = |main: std::ops::Range<usize>, more: std::ops::Range<usize>| main.chain(more).collect();
    [
        ("a", with(0..100, 5000..5010)),
        ("c", with(200_000..200_100, 5000..5020)),
        ("b", with(20..120, 5000..5010)),
        ("d", with(200_010..200_110, 6000..6010)),
    ]
}

/// The numbers of the matrix in groups.json, row by row, parsed to the last bit.
fn written_jaccard(s: &Setting) -> Vec<f64> {
    let text = fs::read_to_string(s.out.join("groups.json")).unwrap();
    let matrix = &text[text.find("\"jaccard\"").unwrap() + 9..text.find("\"chance\"").unwrap()];
    matrix.split(|c: char| !(c.is_ascii_digit() || ".e-".contains(c))).filter_map(|n| n.parse().ok()).collect()
}

fn names(groups: &[&[&str]]) -> Vec<Vec<String>> {
    groups.iter().map(|g| g.iter().map(|t| (*t).to_owned()).collect()).collect()
}

#[test]
fn jaccard_and_chance_equal_a_set_computation() {
    let mut numbers = Numbers(11);
    let total: usize = MODEL.iter().map(|(_, n)| n).sum();
    let mut random = |n: usize| (0..n).map(|_| (numbers.bits() as usize) % total).collect::<Region>();
    let mut regions = vec![("a", random(30_000)), ("b", random(30_000)), ("c", random(1000)), ("d", Region::new())];
    regions[3].1 = regions[0].1.iter().chain(&regions[1].1).copied().filter(|i| i % 3 == 0).collect();
    let s = Setting::new(&regions);
    let head = MODEL[0].1 + MODEL[1].1;
    let inner = head..head + MODEL[2].1;
    for (flags, range) in [(&[][..], 0..total), (&["--exclude", "norms,embeddings"][..], inner)] {
        let groups = s.groups(flags);
        let written = written_jaccard(&s);
        let sets: Vec<HashSet<usize>> =
            regions.iter().map(|(_, r)| r.range(range.clone()).copied().collect()).collect();
        for (a, b) in (0..4).flat_map(|a| (0..4).map(move |b| (a, b))) {
            let shared = sets[a].intersection(&sets[b]).count() as f64;
            let union = sets[a].union(&sets[b]).count() as f64;
            assert_eq!(written[4 * a + b], shared / union, "{a} {b}");
            let q = |i: usize| sets[i].len() as f64 / range.len() as f64;
            let chance = q(a) * q(b) / (q(a) + q(b) - q(a) * q(b));
            assert!((groups.chance[a][b] - chance).abs() < 1e-15, "{a} {b}");
        }
        assert_eq!(groups.excluded.len(), if flags.is_empty() { 0 } else { 2 });
    }
}

#[test]
fn tau_cuts_the_graph_into_its_components() {
    let s = Setting::new(&four());
    let all = names(&[&["a", "c", "b", "d"]]);
    let pairs = names(&[&["a", "b"], &["c", "d"]]);
    let alone = names(&[&["a"], &["c"], &["b"], &["d"]]);
    for (tau, expected, trivial) in [("0", all, true), ("0.2", pairs.clone(), false), ("1.5", alone, true)] {
        let groups = s.groups(&["--tau", tau, "--order", "dependency", "--edges", empty_edges(&s).as_str()]);
        assert_eq!((&groups.groups, groups.trivial), (&expected, trivial), "τ = {tau}");
        assert_eq!((groups.tau, groups.tau_mode), (tau.parse().unwrap(), TauMode::Fixed));
    }
    let groups = s.groups(&["--tau", "auto", "--order", "dependency", "--edges", empty_edges(&s).as_str()]);
    assert_eq!((&groups.groups, groups.tau_mode), (&pairs, TauMode::Auto));
    // The pairs' similarities are 90/130 and 90/140; the largest between pairs is 10/220.
    let (low, high) = (groups.jaccard[0][1], groups.jaccard[1][3]);
    assert_eq!((low, high), (10.0 / 220.0, 90.0 / 140.0));
    assert_eq!(groups.tau, f64::midpoint(low, high));
}

fn empty_edges(s: &Setting) -> String {
    let path = s.path("none.toml");
    fs::write(&path, "").unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_chain_of_similar_tasks_is_one_group() {
    let s = Setting::new(&[("x", every(0..100, 1)), ("y", every(50..150, 1)), ("z", every(100..200, 1))]);
    let groups = s.groups(&["--tau", "0.3"]);
    assert_eq!(groups.jaccard[0][2], 0.0);
    assert_eq!(groups.groups, names(&[&["x", "y", "z"]]));
}

#[test]
fn trivial_groupings_are_warned_of() {
    let s = Setting::new(&four());
    s.run(&["--tau", "0", "--force"]).ok().says(&["warn: ", "one group", "hint: try --tau auto"]);
    s.run(&["--tau", "2", "--force"]).ok().says(&["warn: ", "group of its own", "hint"]);
    let ran = s.run(&["--tau", "auto", "--force"]).ok();
    assert!(!ran.stderr.contains("warn"), "{}", ran.stderr);
    let two = Setting::new(&four()[..2]);
    two.run(&["--tau", "auto"]).ok().says(&["warn: --tau auto", "taking 0.1"]);
    let one = Setting::new(&four()[..1]);
    assert_eq!(one.groups(&[]).groups, names(&[&["a"]]));
}

#[test]
fn the_random_order_depends_on_the_seed_alone() {
    let regions: Vec<(String, Region)> = (0..6).map(|i| (format!("t{i}"), every(i * 10..i * 10 + 5, 1))).collect();
    let regions: Vec<(&str, Region)> = regions.iter().map(|(n, r)| (n.as_str(), r.clone())).collect();
    let s = Setting::new(&regions);
    let orders: Vec<_> = ["1", "1", "2", "3"].map(|seed| s.groups(&["--seed", seed])).into_iter().collect();
    assert_eq!(orders[0], orders[1]);
    assert!(orders[0].groups != orders[2].groups || orders[0].groups != orders[3].groups);
    assert_eq!(serde_json::to_value(&orders[2].order).unwrap(), json!({"method": "random", "seed": 2}));
}

#[test]
fn overlap_puts_the_least_entangled_group_first() {
    // Of the 37 elements in all, {q} shares 1 with the others, {r} 2, {p} 3.
    let p = every(0..20, 1);
    let q: Region = (100..109).chain([0]).collect();
    let r: Region = (200..208).chain([1, 2]).collect();
    let s = Setting::new(&[("p", p), ("r", r), ("q", q)]);
    let groups = s.groups(&["--tau", "0.5", "--order", "overlap"]);
    assert_eq!(groups.groups, names(&[&["q"], &["r"], &["p"]]));
    let union = 20.0 + 9.0 + 8.0;
    assert_eq!(groups.order.scores, [1.0 / union, 2.0 / union, 3.0 / union]);
    // A group's tasks count as one: here {a, b} against {c, d}, which overlap each other
    // equally, so the first stays first.
    let groups = Setting::new(&four()).groups(&["--tau", "0.2", "--order", "overlap"]);
    assert_eq!(groups.groups, names(&[&["a", "b"], &["c", "d"]]));
    assert_eq!(groups.order.scores, [10.0 / 260.0; 2]);
}

#[test]
fn difficulty_puts_the_smallest_mean_loss_first() {
    let s = Setting::new(&four());
    let scores = s.scores("scores.json", "base", &[("d", 1.0), ("a", 2.0), ("b", 2.5), ("c", 2.0)]);
    let args = ["--tau", "0.2", "--order", "difficulty", "--scores", scores.to_str().unwrap()];
    let groups = s.groups(&args);
    assert_eq!(groups.groups, names(&[&["c", "d"], &["a", "b"]]));
    assert_eq!(groups.order.scores, [1.5, 2.25]);
    assert!(!s.run(&[&args[..], &["--force"]].concat()).ok().stderr.contains("warn"));
    s.scores("scores.json", "another", &[("d", 1.0), ("a", 2.0), ("b", 2.5), ("c", 2.0)]);
    s.run(&[&args[..], &["--force"]].concat()).ok().says(&["warn: ", "scores.json", "digest is not that of the base"]);
}

#[test]
fn dependency_follows_the_edges() {
    let s = Setting::new(&four());
    let edges = s.path("edges.toml");
    fs::write(&edges, "[[edge]]\nbefore = \"d\"\nafter = \"b\"\n[[edge]]\nbefore = \"a\"\nafter = \"b\"\n").unwrap();
    let args = ["--tau", "0.2", "--order", "dependency", "--edges", edges.to_str().unwrap(), "--force"];
    s.run(&args).ok().says(&["warn: ", "a -> b is ignored"]);
    assert_eq!(s.groups(&args[..6]).groups, names(&[&["c", "d"], &["a", "b"]]));
}

#[test]
fn dependency_learns_from_the_probes() {
    let s = Setting::new(&four());
    let base = s.scores("base.json", "base", &[("a", 2.0), ("b", 2.0), ("c", 2.0), ("d", 2.0)]);
    let losses = |a, b, c, d| [("a", a), ("b", b), ("c", c), ("d", d)];
    s.scores("probes/a/scores.json", "pa", &losses(1.0, 1.5, 2.0, 2.0));
    s.scores("probes/b.json", "pb", &losses(1.5, 1.0, 2.0, 2.5));
    s.scores("probes/c.json", "pc", &losses(1.75, 1.75, 1.0, 1.5));
    s.scores("probes/d/scores.json", "pd", &losses(2.0, 2.0, 2.0, 1.0));
    let (base, probes) = (base.to_str().unwrap().to_owned(), s.path("probes"));
    let args = ["--order", "dependency", "--scores", &base, "--probe-scores", probes.to_str().unwrap()];
    let groups = s.groups(&[&args[..], &["--tau", "0.2"]].concat());
    // {c, d} gives 0.25 + 0.25 + 0 + 0 and gets 0 + 0 + 0 − 0.5, over four pairs.
    assert_eq!(groups.groups, names(&[&["c", "d"], &["a", "b"]]));
    assert_eq!(groups.order.scores, [0.25, -0.25]);
    fs::remove_file(s.path("probes/b.json")).unwrap();
    s.run(&[&args[..], &["--force"]].concat()).bad_input(&[
        "probes/b/scores.json",
        "probe of b",
        "probes/b.json",
        "hint",
    ]);
}

#[test]
fn reruns_and_thread_counts_give_the_same_bytes() {
    let s = Setting::new(&four());
    let files = ["groups.json", "groups.layers.json", "groups.layers.svg", "groups.svg"];
    let read = || files.map(|f| fs::read(s.out.join(f)).unwrap());
    let mut outputs = Vec::new();
    for threads in ["1", "2", "8", "8"] {
        s.groups(&["--tau", "auto", "--order", "overlap", "--threads", threads]);
        outputs.push(read());
    }
    assert!(outputs.iter().all(|o| *o == outputs[0]));
    expect_entries(&s.out, &[&files[..], &["groups.json.cpift.json"]].concat());
    let text = fs::read_to_string(s.out.join("groups.json.cpift.json")).unwrap();
    let record: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(record["stage"], "cpift-group");
    assert_eq!(record["inputs"]["mask:c"]["path"], s.path("c.mask").to_str().unwrap());
    let groups = s.groups(&["--tau", "auto"]);
    assert_eq!(record["inputs"]["mask:c"]["digest"], serde_json::to_value(&groups.masks["c"]).unwrap());
}

#[test]
fn the_heat_map_shows_values_chance_and_escaped_names() {
    let regions = four().map(|(name, region)| (if name == "a" { "a<&\">" } else { name }, region));
    let s = Setting::new(&regions);
    let svg = s.out.join("map.svg");
    s.run(&["--tau", "0.2", "--svg", svg.to_str().unwrap()]).ok();
    let text = fs::read_to_string(&svg).unwrap();
    for part in ["<title id=", "0.692", "chance", "prefers-color-scheme: dark", "a&lt;&amp;&quot;&gt;", "τ = 0.2"] {
        assert!(text.contains(part), "{part}");
    }
    assert!(!text.contains("a<&"));
    assert_eq!(text.matches("class=\"frame\"").count(), 2);
    assert_eq!(text.matches("<g><title>").count(), 16);
}

#[test]
fn json_on_stdout_is_groups_json_and_the_log_shows_the_matrix() {
    let s = Setting::new(&four());
    let ran = s.run(&["--tau", "0.2", "--json"]).ok().says(&["0.6923 (0.0", "1. {", "2. {", "τ = 0.2"]);
    let file = fs::read_to_string(s.out.join("groups.json")).unwrap();
    let said: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(said, serde_json::from_str::<Value>(&file).unwrap());
}

#[test]
fn no_libtorch_is_linked() {
    let listed = run("ldd", [BIN]).ok().stdout;
    assert!(listed.contains("libc.so"), "{listed}");
    assert!(!listed.contains("torch") && !listed.contains("libc10"), "{listed}");
}
