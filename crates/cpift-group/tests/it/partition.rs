//! `cpift-group --partition kind`, `random` and `like` through the real binary: groups that do not
//! come from τ.

use std::collections::BTreeSet;
use std::fs;

use crate::common::{BIN, Region, Setting, every};
use cpift_core::format::groups::{Groups, Parting, TauMode};
use cpift_core::format::tasks::Tasks;
use cpift_testkit::{expect_entries, run};
use serde_json::{Value, json};

/// Regions of which only a and b overlap.
fn setting(n: usize) -> Setting {
    let names = ["a", "b", "c", "d", "e", "f", "g"];
    let region = |i: usize| every(100 * i.saturating_sub(1)..100 * i.saturating_sub(1) + 50, 1);
    let regions: Vec<(&str, Region)> = (0..n).map(|i| (names[i], region(i))).collect();
    Setting::new(&regions)
}

/// Writes a tasks.toml with these kinds and returns the flags that name it.
fn kinds(s: &Setting, kinds: &[(&str, Option<&str>)]) -> [String; 4] {
    fs::write(s.path("d.jsonl"), "").unwrap();
    let task = |(name, kind): &(&str, Option<&str>)| {
        let kind = kind.map_or(String::new(), |k| format!("kind = \"{k}\"\n"));
        format!("[[task]]\nname = \"{name}\"\ntrain = \"d.jsonl\"\neval = \"d.jsonl\"\n{kind}")
    };
    let path = s.path("tasks.toml");
    fs::write(&path, kinds.iter().map(task).collect::<String>()).unwrap();
    ["--partition", "kind", "--tasks", path.to_str().unwrap()].map(String::from)
}

const KINDS: [(&str, Option<&str>); 6] = [
    ("e", Some("chat")),
    ("d", Some("code")),
    ("unused", None),
    ("c", Some("maths")),
    ("b", Some("code")),
    ("a", Some("maths")),
];

fn with<'a>(flags: &'a [String], more: &[&'a str]) -> Vec<&'a str> {
    flags.iter().map(String::as_str).chain(more.iter().copied()).collect()
}

fn text(s: &Setting) -> Value {
    serde_json::from_str(&fs::read_to_string(s.out.join("groups.json")).unwrap()).unwrap()
}

/// The groups, regardless of their order.
fn set(groups: &Groups) -> BTreeSet<Vec<String>> {
    groups.groups.iter().cloned().collect()
}

fn sets(groups: &[&[&str]]) -> BTreeSet<Vec<String>> {
    groups.iter().map(|g| g.iter().map(|t| (*t).to_owned()).collect()).collect()
}

#[test]
fn tasks_of_one_kind_are_a_group_in_every_order() {
    let s = setting(5);
    let flags = kinds(&s, &KINDS);
    let expected = sets(&[&["a", "c"], &["b", "d"], &["e"]]);
    let scores = s.scores("scores.json", "base", &[("a", 5.0), ("b", 1.0), ("c", 3.0), ("d", 1.5), ("e", 0.5)]);
    let edges = s.path("edges.toml");
    fs::write(&edges, "[[edge]]\nbefore = \"e\"\nafter = \"c\"\n[[edge]]\nbefore = \"c\"\nafter = \"b\"\n").unwrap();
    let (scores, edges) = (scores.to_str().unwrap(), edges.to_str().unwrap());
    for (order, first) in [
        (&["--seed", "1"][..], None),
        (&["--order", "overlap"], Some("e")),
        (&["--order", "difficulty", "--scores", scores], Some("e")),
        (&["--order", "dependency", "--edges", edges], Some("e")),
    ] {
        let groups = s.groups(&with(&flags, order));
        assert_eq!(set(&groups), expected, "{order:?}");
        assert!(first.is_none_or(|f| groups.groups[0] == [f]), "{order:?}: {:?}", groups.groups);
        assert_eq!((groups.partition, groups.trivial), (Some(Parting::Kind {}), false));
        assert_eq!((groups.tau, groups.tau_mode), (0.1, TauMode::Fixed));
        assert!(groups.jaccard[0][1] > 0.9, "the masks are compared all the same");
    }
    assert_eq!(text(&s)["partition"], json!({"method": "kind"}));
    let record: Value =
        serde_json::from_str(&fs::read_to_string(s.out.join("groups.json.cpift.json")).unwrap()).unwrap();
    let tasks = s.path("tasks.toml");
    let list = Tasks::read(&tasks).unwrap();
    let digest = list.digest(list.names().iter().map(String::as_str)).unwrap();
    assert_eq!(record["inputs"]["tasks"], json!({"path": tasks, "digest": digest}));
    assert!(record.get("seed").is_none());
    let ran = s.run(&with(&flags, &["--force"])).ok().says(&["by kind: 3 groups"]);
    assert!(!ran.stderr.contains("τ =") && !ran.stderr.contains("warn"), "{}", ran.stderr);
    let map = fs::read_to_string(s.out.join("groups.svg")).unwrap();
    assert!(map.contains("by kind: 3 groups (framed)") && !map.contains("τ ="));
}

#[test]
fn a_kind_that_is_missing_names_the_task() {
    let s = setting(5);
    let flags = kinds(&s, &[KINDS[0], KINDS[1], KINDS[3], ("b", None), KINDS[5]]);
    let file = flags[3].as_str();
    s.run(&with(&flags, &[])).bad_input(&[file, "the task b has no kind", "expected: kind =", "hint"]);
    kinds(&s, &KINDS[..5]);
    s.run(&with(&flags, &[])).bad_input(&[file, "no task named a"]);
    fs::write(file, "[[task]]\nname = 3").unwrap();
    s.run(&with(&flags, &[])).bad_input(&[file, "not a usable task list"]);
    fs::remove_file(file).unwrap();
    s.run(&with(&flags, &[])).bad_input(&[file]);
    expect_entries(&s.out, &[]);
}

#[test]
fn a_shuffle_is_cut_into_groups_of_nearly_equal_size() {
    let mut seen = BTreeSet::new();
    for n in 1..=7 {
        let s = setting(n);
        for k in 1..=n {
            for seed in ["0", "1", "2"] {
                let count = k.to_string();
                let groups = s.groups(&["--partition", "random", "--groups", &count, "--seed", seed]);
                let sizes: Vec<usize> = groups.groups.iter().map(Vec::len).collect();
                assert_eq!((sizes.len(), sizes.iter().sum::<usize>()), (k, n));
                assert!(sizes.iter().all(|size| [n / k, n.div_ceil(k)].contains(size)), "{n} {k}: {sizes:?}");
                assert!(groups.groups.iter().all(|g| g.is_sorted()), "a group lists its tasks as they were given");
                assert_eq!(groups.trivial, k == 1 || k == n);
                let seed = seed.parse().unwrap();
                assert_eq!(groups.partition, Some(Parting::Random { seed, groups: k }));
                assert_eq!(groups.tau, 0.1);
                if (n, k) == (7, 3) {
                    seen.insert(set(&groups));
                }
            }
        }
    }
    assert!(seen.len() > 1, "the seed does not matter");
}

#[test]
fn every_pair_is_as_likely_to_share_a_group() {
    // Of 6 tasks in 3 groups, a pair shares one in a fifth of the cases.
    let together = |seed: u64| cpift_group::partition::shuffled(6, 3, seed);
    let mut counts = [[0f64; 6]; 6];
    for group in (0..5000).flat_map(together) {
        counts[group[0]][group[1]] += 1.0;
    }
    for (a, b) in (0..6).flat_map(|a| (a + 1..6).map(move |b| (a, b))) {
        assert!((counts[a][b] - 1000.0).abs() < 4.5 * 28.3, "{a} {b}: {}", counts[a][b]);
    }
}

#[test]
fn the_seed_alone_makes_the_random_groups() {
    let s = setting(7);
    let args = ["--partition", "random", "--groups", "3", "--order", "overlap", "--seed"];
    let bytes = |seed: &str, threads: &str| {
        s.groups(&[&args[..], &[seed, "--threads", threads]].concat());
        fs::read(s.out.join("groups.json")).unwrap()
    };
    let first = bytes("5", "1");
    assert!(["1", "2", "8"].iter().all(|threads| bytes("5", threads) == first));
    assert_eq!(text(&s)["partition"], json!({"method": "random", "seed": 5, "groups": 3}));
    assert_eq!(text(&s)["order"]["method"], "overlap");
    let record = fs::read_to_string(s.out.join("groups.json.cpift.json")).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&record).unwrap()["seed"], 5);
    s.run(&[&args[..], &["5", "--force"]].concat()).ok().says(&["at random, seed 5: 3 groups, in overlap order"]);
}

#[test]
fn the_groups_of_another_file_are_taken_over_in_its_order() {
    let s = setting(5);
    let first = s.groups(&["--partition", "random", "--groups", "3", "--seed", "2"]);
    let other = s.path("other.json");
    fs::rename(s.out.join("groups.json"), &other).unwrap();
    let like = ["--partition", "like", "--like", other.to_str().unwrap()];
    let second = s.groups(&like);
    assert_eq!((&second.groups, second.order.method.as_str()), (&first.groups, "like"));
    assert_eq!((second.partition, second.masks), (Some(Parting::Like {}), first.masks));
    let few = setting(4);
    few.run(&like).bad_input(&["other.json", "other tasks", "expected: a, b, c, d", "found: a, b, c, d, e"]);
    s.run(&["--partition", "like"]).usage_error(&["--partition like needs --like"]);
    s.run(&["--like", like[3]]).usage_error(&["--like has no part in --partition overlap"]);
}

#[test]
fn overlap_is_the_default_and_writes_what_it_always_did() {
    let s = setting(5);
    let groups = s.groups(&[]);
    assert_eq!((groups.partition.clone(), groups.groups.len()), (None, 4));
    let bytes = fs::read(s.out.join("groups.json")).unwrap();
    assert!(text(&s).get("partition").is_none());
    s.groups(&["--partition", "overlap"]);
    assert_eq!(fs::read(s.out.join("groups.json")).unwrap(), bytes);
    // The keys of groups.json from before the key `partition` existed.
    let keys: Vec<String> = text(&s).as_object().unwrap().keys().cloned().collect();
    let known = ["format_version", "tau", "tau_mode", "tasks", "jaccard", "chance", "excluded", "groups", "order"];
    assert_eq!(keys, [&known[..], &["trivial", "base", "masks"]].concat());
}

#[test]
fn trivial_groups_are_warned_of() {
    let s = setting(5);
    let one = kinds(&s, &["a", "b", "c", "d", "e"].map(|t| (t, Some("x"))));
    s.run(&with(&one, &["--force"])).ok().says(&["warn: ", "all tasks are in one group", "not all, the same kind"]);
    kinds(&s, &["a", "b", "c", "d", "e"].map(|t| (t, Some(t))));
    s.run(&with(&one, &["--force"])).ok().says(&["warn: ", "every task is a group of its own", "the same kind"]);
    s.run(&["--partition", "random", "--groups", "5", "--force"]).ok().says(&["warn: ", "another number of --groups"]);
}

#[test]
fn flags_that_do_not_go_together() {
    let s = setting(3);
    let flags = kinds(&s, &KINDS);
    let file = flags[3].as_str();
    s.run(&["--partition", "alphabet"]).usage_error(&["overlap", "kind", "random"]);
    s.run(&["--partition", "kind"]).usage_error(&["--partition kind needs --tasks"]);
    s.run(&["--partition", "random"]).usage_error(&["--partition random needs --groups"]);
    s.run(&["--tasks", file]).usage_error(&["--tasks has no part in --partition overlap"]);
    s.run(&["--groups", "2"]).usage_error(&["--groups has no part in --partition overlap"]);
    s.run(&with(&flags, &["--groups", "2"])).usage_error(&["--groups has no part in --partition kind"]);
    for groups in ["0", "4"] {
        let ran = s.run(&["--partition", "random", "--groups", groups]);
        ran.usage_error(&["--groups must be 1 to 3", &format!("found {groups}")]);
    }
    run(BIN, ["--partition", "random", "--groups", "1", "--out", "groups.json"]).usage_error(&["--mask"]);
    let onto = ["--svg", file, "--force"];
    s.run(&with(&flags, &onto)).usage_error(&["--svg", "would replace the input"]);
    expect_entries(&s.out, &[]);
}
