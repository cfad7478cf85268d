//! Order by dependency: from edges a user gives, or from how much each probe helps the other tasks.

use std::path::{Path, PathBuf};

use anyhow::Result;
use cpift_core::{BadInput, files};
use serde::Deserialize;

use crate::order::{Ordered, descending, read_losses};
use crate::partition::Partition;

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
pub fn read_edges(path: &Path, tasks: &[String]) -> Result<Vec<(usize, usize)>> {
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

/// Orders groups so that every edge points forwards; groups that no edge binds keep their places as
/// far as they can.
///
/// # Errors
/// [`BadInput`] naming the groups of a cycle.
pub fn by_edges(groups: Partition, edges: &[(usize, usize)], tasks: &[String], path: &Path) -> Result<Ordered> {
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

/// The error for groups `left` of which each waits for another.
fn cycle(groups: &Partition, bound: &[(usize, usize)], left: &[usize], tasks: &[String], path: &Path) -> BadInput {
    // Walking from group to group it waits for must come back to a group seen before.
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
        .hint("remove one of these edges, or give a larger --tau so that the groups fall apart")
}

/// A group as messages show it.
pub fn named(group: &[usize], tasks: &[String]) -> String {
    format!("{{{}}}", group.iter().map(|i| tasks[*i].as_str()).collect::<Vec<_>>().join(", "))
}

/// Where the scores of the probe of `task` lie: DIR/TASK/scores.json or DIR/TASK.json.
///
/// # Errors
/// [`BadInput`] when neither exists.
pub fn probe_file(folder: &Path, task: &str) -> Result<PathBuf> {
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

/// help(i → j) for all tasks: how much lower the loss on task j is for the probe of i than for the
/// base. `probes[i][j]` and `base[j]` are losses.
pub fn help(base: &[f64], probes: &[Vec<f64>]) -> Vec<Vec<f64>> {
    probes.iter().map(|row| row.iter().zip(base).map(|(probe, base)| base - probe).collect()).collect()
}

/// Reads the losses of every probe, and says which files were read.
///
/// # Errors
/// [`BadInput`] when a file or a task is missing.
pub fn read_probes(
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
pub fn by_help(groups: Partition, help: &[Vec<f64>]) -> Ordered {
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
