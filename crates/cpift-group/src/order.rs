//! Putting groups in training order: at random, by figures, by edges that a user gives, or by how
//! much each probe helps the other tasks.

use std::cmp::Ordering;
use std::path::{Path, PathBuf};

use anyhow::Result;
use cpift_core::format::digest::Digest;
use cpift_core::format::scores::Scores;
use cpift_core::{BadInput, files};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha12Rng;
use serde::Deserialize;

use crate::partition::Partition;

/// Groups in training order, with the figure each was ordered by.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ordered {
    /// Groups of task indices.
    pub(crate) groups: Partition,
    /// One figure per group; empty if the order does not come from figures.
    pub(crate) figures: Vec<f64>,
}

/// The groups shuffled by the seed.
pub(crate) fn random(mut groups: Partition, seed: u64) -> Ordered {
    groups.shuffle(&mut ChaCha12Rng::seed_from_u64(seed));
    Ordered { groups, figures: Vec::new() }
}

/// Groups by ascending figure; equal figures by their first task.
pub(crate) fn ascending(groups: Partition, figures: Vec<f64>) -> Ordered {
    sorted(groups, figures, f64::total_cmp)
}

/// As [`ascending`], the largest figure first.
pub(crate) fn descending(groups: Partition, figures: Vec<f64>) -> Ordered {
    sorted(groups, figures, |a, b| b.total_cmp(a))
}

fn sorted(groups: Partition, figures: Vec<f64>, compare: impl Fn(&f64, &f64) -> Ordering) -> Ordered {
    let mut both: Vec<(f64, Vec<usize>)> = figures.into_iter().zip(groups).collect();
    both.sort_by(|a, b| compare(&a.0, &b.0).then_with(|| a.1.cmp(&b.1)));
    let (figures, groups) = both.into_iter().unzip();
    Ordered { groups, figures }
}

/// The mean loss of each group's tasks; `losses` by task.
pub(crate) fn mean_loss(groups: &Partition, losses: &[f64]) -> Vec<f64> {
    groups.iter().map(|g| g.iter().map(|i| losses[*i]).sum::<f64>() / g.len() as f64).collect()
}

/// Reads the losses of a scores.json on all `tasks`, in their order, and the file's digest. Warns
/// if `base` is given and is not the digest of the scored model.
///
/// # Errors
/// [`BadInput`] when the file cannot be read or lacks a task.
pub(crate) fn read_losses(path: &Path, tasks: &[String], base: Option<&Digest>) -> Result<(Vec<f64>, Digest)> {
    let scores = Scores::read(path)?;
    if base.is_some_and(|base| scores.model_digest != *base) {
        log::warn!(
            "{}: the scores are of {}, whose digest is not that of the base the masks were made from",
            path.display(),
            scores.model
        );
    }
    let mut losses = Vec::new();
    for task in tasks {
        losses.push(scores.nll(task).ok_or_else(|| unscored(path, task, tasks, &scores))?);
    }
    let file = if path.is_dir() { path.join("scores.json") } else { path.to_owned() };
    Ok((losses, Digest::of_file(&file)?))
}

fn unscored(path: &Path, task: &str, tasks: &[String], scores: &Scores) -> BadInput {
    let scored: Vec<&str> = scores.tasks.iter().map(|t| t.task.as_str()).collect();
    BadInput::new(path, format!("the task {task} has no score"))
        .expected(format!("scores of {}", tasks.join(", ")))
        .found(format!("scores of {}", scored.join(", ")))
        .hint("evaluate the model on all tasks that are grouped")
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EdgeFile {
    #[serde(default)]
    edge: Vec<Edge>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Edge {
    before: String,
    after: String,
}

/// Reads a TOML of edges as pairs of task indices (before, after).
///
/// # Errors
/// [`BadInput`] when it cannot be read or names a task that is not grouped.
pub(crate) fn read_edges(path: &Path, tasks: &[String]) -> Result<Vec<(usize, usize)>> {
    let file: EdgeFile = toml::from_str(&files::read_text(path)?).map_err(|e| {
        BadInput::new(path, format!("not a file of edges: {e}")).expected("[[edge]] with before and after")
    })?;
    let index = |name: &String| {
        tasks.iter().position(|t| t == name).ok_or_else(|| -> anyhow::Error {
            BadInput::new(path, format!("an edge names the unknown task {name}")).expected(tasks.join(", ")).into()
        })
    };
    file.edge.iter().map(|e| Ok((index(&e.before)?, index(&e.after)?))).collect()
}

/// Orders groups so that every edge points forwards. Groups without edges keep their places as far
/// as possible.
///
/// # Errors
/// [`BadInput`] with the groups of a cycle.
pub(crate) fn by_edges(groups: Partition, edges: &[(usize, usize)], tasks: &[String], path: &Path) -> Result<Ordered> {
    let group_of = |task: usize| groups.iter().position(|g| g.contains(&task)).expect("groups are a partition");
    let mut bound: Vec<(usize, usize)> = Vec::new();
    for &(before, after) in edges {
        let (g, h) = (group_of(before), group_of(after));
        if g == h {
            log::warn!("the edge {} -> {} is ignored: both are in one group", tasks[before], tasks[after]);
        } else {
            bound.push((g, h));
        }
    }
    let mut left: Vec<usize> = (0..groups.len()).collect();
    let mut order = Vec::new();
    while !left.is_empty() {
        let free = |g: &usize| !bound.iter().any(|(before, after)| after == g && left.contains(before));
        match left.iter().position(free) {
            Some(place) => order.push(groups[left.remove(place)].clone()),
            None => return Err(cycle(&groups, &bound, &left, tasks, path).into()),
        }
    }
    Ok(Ordered { groups: order, figures: Vec::new() })
}

/// The error for groups `left`, each of which waits for another.
fn cycle(groups: &Partition, bound: &[(usize, usize)], left: &[usize], tasks: &[String], path: &Path) -> BadInput {
    // Following the edges backwards must return to a group seen before.
    let mut walk = vec![left[0]];
    let start = loop {
        let last = walk[walk.len() - 1];
        let waits_for = bound.iter().find(|(before, after)| *after == last && left.contains(before));
        let before = waits_for.expect("a group that waits for none would have been free").0;
        if let Some(place) = walk.iter().position(|g| *g == before) {
            break place;
        }
        walk.push(before);
    };
    let mut circle: Vec<usize> = walk[start..].iter().rev().copied().collect();
    let first = (0..circle.len()).min_by_key(|i| circle[*i]).unwrap_or(0);
    circle.rotate_left(first);
    circle.push(circle[0]);
    let names: Vec<String> = circle.into_iter().map(|g| named(&groups[g], tasks)).collect();
    BadInput::new(path, "the edges between groups form a cycle")
        .expected("an order in which every `before` can precede its `after`")
        .found(names.join(" -> "))
        .hint("remove one of these edges, or give a larger --tau for smaller groups")
}

/// A group in messages: `{a, b}`.
pub(crate) fn named(group: &[usize], tasks: &[String]) -> String {
    format!("{{{}}}", group.iter().map(|i| tasks[*i].as_str()).collect::<Vec<_>>().join(", "))
}

/// Path of the scores of the probe of `task`: DIR/TASK/scores.json or DIR/TASK.json.
///
/// # Errors
/// [`BadInput`] when neither exists.
pub(crate) fn probe_file(folder: &Path, task: &str) -> Result<PathBuf> {
    let (nested, flat) = (folder.join(task).join("scores.json"), folder.join(format!("{task}.json")));
    match (nested.is_file(), flat.is_file()) {
        (true, _) => Ok(nested),
        (_, true) => Ok(flat),
        _ => Err(BadInput::new(&nested, format!("the scores of the probe of {task} are missing"))
            .expected(format!("this file or {}", flat.display()))
            .hint("evaluate every probe on all tasks")
            .into()),
    }
}

/// help(i → j) for all pairs of tasks: the base's loss on task j minus that of the probe of i.
/// `probes[i][j]` and `base[j]` are losses.
pub(crate) fn help(base: &[f64], probes: &[Vec<f64>]) -> Vec<Vec<f64>> {
    probes.iter().map(|row| row.iter().zip(base).map(|(probe, base)| base - probe).collect()).collect()
}

/// Reads the losses of every probe: for each task the file, the losses and the file's digest.
///
/// # Errors
/// [`BadInput`] when a file or a task is missing.
pub(crate) fn read_probes(
    folder: &Path,
    tasks: &[String],
) -> Result<Vec<(PathBuf, Vec<f64>, cpift_core::format::digest::Digest)>> {
    let read = |task: &String| {
        let file = probe_file(folder, task)?;
        let (losses, digest) = read_losses(&file, tasks, None)?;
        Ok((file, losses, digest))
    };
    tasks.iter().map(read).collect()
}

/// Orders groups by net help, the largest first: the mean help its tasks give to tasks of other
/// groups less the mean help they get from them. Means over pairs, so that a group's size does not
/// matter; 0 for a single group.
pub(crate) fn by_help(groups: Partition, help: &[Vec<f64>]) -> Ordered {
    let net = groups
        .iter()
        .map(|group| {
            let outside: Vec<usize> = (0..help.len()).filter(|i| !group.contains(i)).collect();
            let pairs: Vec<f64> =
                group.iter().flat_map(|&i| outside.iter().map(move |&j| help[i][j] - help[j][i])).collect();
            if pairs.is_empty() { 0.0 } else { pairs.iter().sum::<f64>() / pairs.len() as f64 }
        })
        .collect();
    descending(groups, net)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> Partition {
        vec![vec![0, 2], vec![1], vec![3]]
    }

    #[test]
    fn the_shuffle_depends_on_the_seed_alone() {
        let groups: Partition = (0..20).map(|i| vec![i]).collect();
        assert_eq!(random(groups.clone(), 7), random(groups.clone(), 7));
        assert_ne!(random(groups.clone(), 7), random(groups.clone(), 8));
        let mut sorted = random(groups.clone(), 7).groups;
        sorted.sort();
        assert_eq!(sorted, groups);
    }

    #[test]
    fn figures_order_groups_and_ties_keep_their_places() {
        let up = ascending(three(), vec![0.5, 0.25, 0.25]);
        assert_eq!(up.groups, [vec![1], vec![3], vec![0, 2]]);
        assert_eq!(up.figures, [0.25, 0.25, 0.5]);
        let down = descending(three(), vec![0.25, 0.5, 0.25]);
        assert_eq!(down.groups, [vec![1], vec![0, 2], vec![3]]);
        assert_eq!(down.figures, [0.5, 0.25, 0.25]);
    }

    #[test]
    fn a_groups_loss_is_the_mean_of_its_tasks() {
        assert_eq!(mean_loss(&three(), &[1.0, 2.5, 3.0, 0.5]), [2.0, 2.5, 0.5]);
    }

    fn tasks() -> Vec<String> {
        ["a", "b", "c", "d"].map(String::from).to_vec()
    }

    fn ordered(groups: Partition, edges: &[(usize, usize)]) -> Result<Partition> {
        by_edges(groups, edges, &tasks(), Path::new("e.toml")).map(|o| o.groups)
    }

    #[test]
    fn edges_point_forwards_and_the_rest_keeps_its_place() {
        let alone = || (0..4).map(|i| vec![i]).collect::<Partition>();
        assert_eq!(ordered(alone(), &[]).unwrap(), alone());
        assert_eq!(ordered(alone(), &[(3, 0)]).unwrap(), [vec![1], vec![2], vec![3], vec![0]]);
        assert_eq!(ordered(alone(), &[(3, 1), (1, 0)]).unwrap(), [vec![2], vec![3], vec![1], vec![0]]);
        let pair = vec![vec![0, 2], vec![1], vec![3]];
        assert_eq!(ordered(pair, &[(0, 2), (1, 2)]).unwrap(), [vec![1], vec![0, 2], vec![3]]);
    }

    #[test]
    fn a_cycle_between_groups_is_named() {
        // a before b, b before c, and c is in the group of a.
        let error = ordered(vec![vec![0, 2], vec![1], vec![3]], &[(0, 1), (1, 2), (1, 3)]).unwrap_err().to_string();
        assert!(error.contains("{a, c} -> {b} -> {a, c}"), "{error}");
        assert!(error.contains("e.toml"));
    }

    #[test]
    fn net_help_is_given_less_got() {
        let help = help(&[2.0, 2.0, 2.0], &[vec![1.0, 1.5, 1.75], vec![2.25, 1.0, 2.0], vec![2.0, 1.0, 1.0]]);
        assert_eq!(help[0], [1.0, 0.5, 0.25]);
        // a: (0.5 + 0.25 − (−0.25) − 0) / 2; b: (−0.25 + 0 − 0.5 − 1) / 2; c: (0 + 1 − 0.25 − 0) /
        // 2
        let alone = by_help(vec![vec![0], vec![1], vec![2]], &help);
        assert_eq!(alone.groups, [vec![0], vec![2], vec![1]]);
        assert_eq!(alone.figures, [0.5, 0.375, -0.875]);
        let paired = by_help(vec![vec![0, 1], vec![2]], &help);
        assert_eq!((paired.groups, paired.figures), (vec![vec![2], vec![0, 1]], vec![0.375, -0.375]));
        assert_eq!(by_help(vec![vec![0, 1, 2]], &help).figures, [0.0]);
    }
}
