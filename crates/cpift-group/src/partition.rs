//! Partitions of tasks into groups: the connected components of the graph of similar tasks, the
//! choice of τ and the sweep over it; groups by kind; random groups.

use std::fmt::Write as _;

use cpift_core::format::groups::TauMode;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

/// Groups of task indices: each in ascending order, groups by their first task.
pub type Partition = Vec<Vec<usize>>;

/// The connected components of the graph with an edge where `similarity[a][b] >= tau`.
pub(crate) fn components(similarity: &[Vec<f64>], tau: f64) -> Partition {
    let n = similarity.len();
    let mut group_of: Vec<Option<usize>> = vec![None; n];
    let mut groups = Partition::new();
    for first in 0..n {
        if group_of[first].is_some() {
            continue;
        }
        let mut reached = vec![first];
        group_of[first] = Some(groups.len());
        let mut next = 0;
        while let Some(&a) = reached.get(next) {
            for b in 0..n {
                if group_of[b].is_none() && similarity[a][b] >= tau {
                    group_of[b] = Some(groups.len());
                    reached.push(b);
                }
            }
            next += 1;
        }
        reached.sort_unstable();
        groups.push(reached);
    }
    groups
}

/// One group per kind.
pub(crate) fn by_kind(kinds: &[String]) -> Partition {
    let mut groups = Partition::new();
    for (task, kind) in kinds.iter().enumerate() {
        match groups.iter_mut().find(|group| kinds[group[0]] == *kind) {
            Some(group) => group.push(task),
            None => groups.push(vec![task]),
        }
    }
    groups
}

/// `tasks` tasks shuffled by the seed and cut into `groups` groups whose sizes
/// differ by one at most.
pub fn shuffled(tasks: usize, groups: usize, seed: u64) -> Partition {
    let mut order: Vec<usize> = (0..tasks).collect();
    order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    let end = |group: usize| group * tasks / groups;
    let mut parts: Partition = (0..groups).map(|group| order[end(group)..end(group + 1)].to_vec()).collect();
    parts.iter_mut().for_each(|group| group.sort_unstable());
    parts.sort_unstable();
    parts
}

/// Returns true if all tasks are in one group, or every task is alone.
pub(crate) fn is_trivial(groups: &Partition) -> bool {
    groups.len() <= 1 || groups.iter().all(|g| g.len() == 1)
}

/// An interval of τ in which the groups do not change.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Interval {
    /// Lower end, exclusive; the first interval includes its lower end 0.
    pub(crate) from: f64,
    /// Upper end, inclusive; infinite in the last interval.
    pub(crate) to: f64,
    /// The groups.
    pub(crate) groups: Partition,
}

/// All intervals of τ, from one group to every task alone.
pub(crate) fn sweep(similarity: &[Vec<f64>]) -> Vec<Interval> {
    let mut values: Vec<f64> = similarity.iter().enumerate().flat_map(|(a, row)| row[..a].iter().copied()).collect();
    values.push(f64::INFINITY);
    values.sort_by(f64::total_cmp);
    values.dedup();
    // The groups are the same for all τ in (from, to], where `from` and `to` are neighbouring
    // values.
    let mut intervals: Vec<Interval> = Vec::new();
    let mut from = 0.0;
    for to in values {
        let groups = components(similarity, to);
        match intervals.last_mut() {
            Some(last) if last.groups == groups => last.to = to,
            _ => intervals.push(Interval { from, to, groups }),
        }
        from = to;
    }
    intervals
}

/// Index of the interval of a [`sweep`] that contains τ.
pub(crate) fn holding(intervals: &[Interval], tau: f64) -> usize {
    intervals.iter().position(|i| tau <= i.to).expect("the last interval has no end")
}

/// Index of the longest interval that is not trivial, and of equally long ones the first. `None` if
/// all are trivial, as with two tasks.
pub(crate) fn most_stable(intervals: &[Interval]) -> Option<usize> {
    let length = |i: usize| intervals[i].to - intervals[i].from;
    let candidates = (0..intervals.len()).filter(|i| !is_trivial(&intervals[*i].groups));
    candidates.reduce(|best, i| if length(i) > length(best) { i } else { best })
}

/// The middle of the [`most_stable`] interval.
pub(crate) fn most_stable_tau(intervals: &[Interval]) -> Option<f64> {
    most_stable(intervals).map(|i| f64::midpoint(intervals[i].from, intervals[i].to))
}

/// Output of `--sweep`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Sweep {
    /// τ of this run.
    pub(crate) tau: f64,
    /// Fixed by the user or chosen automatically.
    pub(crate) tau_mode: TauMode,
    /// Task names; rows and columns of the matrices.
    pub(crate) tasks: Vec<String>,
    /// Jaccard similarity of every pair of core regions, [tasks × tasks].
    pub(crate) jaccard: Vec<Vec<f64>>,
    /// Similarity expected by chance, [tasks × tasks].
    pub(crate) chance: Vec<Vec<f64>>,
    /// One row per interval of τ, from one group to every task alone.
    pub(crate) sweep: Vec<Row>,
}

/// The groups for all τ above `from` and up to `to`; the first row includes 0.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Row {
    /// Lower end, exclusive.
    pub(crate) from: f64,
    /// Upper end, inclusive; `None` in the last row.
    pub(crate) to: Option<f64>,
    /// Task names by group, in the order of their first tasks.
    pub(crate) groups: Vec<Vec<String>>,
    /// True for the row whose middle `--tau auto` takes.
    pub(crate) auto: bool,
    /// True for the row that contains the τ of this run.
    pub(crate) chosen: bool,
}

/// The rows of `intervals` with task names; the row of `--tau auto` and the row of `tau` are
/// marked.
pub(crate) fn rows(intervals: &[Interval], tasks: &[String], tau: f64) -> Vec<Row> {
    let (auto, chosen) = (most_stable(intervals), holding(intervals, tau));
    let row = |(i, interval): (usize, &Interval)| Row {
        from: interval.from,
        to: interval.to.is_finite().then_some(interval.to),
        groups: interval.groups.iter().map(|g| g.iter().map(|t| tasks[*t].clone()).collect()).collect(),
        auto: auto == Some(i),
        chosen: chosen == i,
    };
    intervals.iter().enumerate().map(row).collect()
}

impl Sweep {
    /// The rows as a table.
    pub(crate) fn table(&self) -> String {
        let mut out = format!("{:>10}  {:>10}  {:>6}\n", "τ above", "up to", "groups");
        for row in &self.sweep {
            let to = row.to.map_or("any".to_owned(), |to| format!("{to:.6}"));
            let groups: Vec<String> = row.groups.iter().map(|g| format!("{{{}}}", g.join(", "))).collect();
            let _ = write!(out, "{:>10.6}  {to:>10}  {:>6}  {}", row.from, row.groups.len(), groups.join(" "));
            if row.auto {
                let _ = write!(out, "  <- --tau auto ({:.6})", f64::midpoint(row.from, row.to.unwrap_or(row.from)));
            }
            if row.chosen && self.tau_mode == TauMode::Fixed {
                let _ = write!(out, "  <- --tau {}", self.tau);
            }
            out.push('\n');
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A symmetric matrix with 1 on the diagonal from the pairs given; 0 elsewhere.
    fn matrix(n: usize, pairs: &[(usize, usize, f64)]) -> Vec<Vec<f64>> {
        let mut m = vec![vec![0.0; n]; n];
        (0..n).for_each(|i| m[i][i] = 1.0);
        for &(a, b, s) in pairs {
            (m[a][b], m[b][a]) = (s, s);
        }
        m
    }

    #[test]
    fn components_are_transitive() {
        let m = matrix(5, &[(0, 3, 0.2), (3, 1, 0.2), (2, 4, 0.15)]);
        assert_eq!(components(&m, 0.2), [vec![0, 1, 3], vec![2], vec![4]]);
        assert_eq!(components(&m, 0.15), [vec![0, 1, 3], vec![2, 4]]);
    }

    #[test]
    fn tau_of_zero_joins_all_and_above_one_parts_all() {
        let m = matrix(3, &[(0, 1, 1.0)]);
        assert_eq!(components(&m, 0.0), [vec![0, 1, 2]]);
        assert_eq!(components(&m, 1.0), [vec![0, 1], vec![2]]);
        assert_eq!(components(&m, 1.0000001), [vec![0], vec![1], vec![2]]);
    }

    #[test]
    fn the_sweep_has_a_row_for_every_change() {
        // {0,1} join at 0.5, {2,3} at 0.4, both pairs at 0.1; 0.05 changes nothing.
        let m = matrix(4, &[(0, 1, 0.5), (2, 3, 0.4), (1, 2, 0.1), (0, 2, 0.05), (0, 3, 0.05), (1, 3, 0.05)]);
        let row = |from, to, groups| Interval { from, to, groups };
        let expected = [
            row(0.0, 0.1, vec![vec![0, 1, 2, 3]]),
            row(0.1, 0.4, vec![vec![0, 1], vec![2, 3]]),
            row(0.4, 0.5, vec![vec![0, 1], vec![2], vec![3]]),
            row(0.5, f64::INFINITY, vec![vec![0], vec![1], vec![2], vec![3]]),
        ];
        let rows = sweep(&m);
        assert_eq!(rows, expected);
        assert_eq!(most_stable(&rows), Some(1));
        for tau in [0.0, 0.01, 0.1, 0.100001, 0.4, 0.45, 0.5, 0.6, 7.0] {
            assert_eq!(rows[holding(&rows, tau)].groups, components(&m, tau), "τ = {tau}");
        }
        // Two halves that share nothing are one group at τ = 0 alone.
        let rows = sweep(&matrix(4, &[(0, 1, 0.2), (2, 3, 0.2)]));
        assert_eq!(
            rows.iter().map(|r| (r.from, r.to)).collect::<Vec<_>>(),
            [(0.0, 0.0), (0.0, 0.2), (0.2, f64::INFINITY)]
        );
        assert_eq!([0.0, 0.1, 0.2, 0.3].map(|tau| holding(&rows, tau)), [0, 1, 1, 2]);
        assert_eq!(sweep(&matrix(1, &[])), [row(0.0, f64::INFINITY, vec![vec![0]])]);
    }

    #[test]
    fn auto_takes_the_middle_of_the_longest_interval() {
        // One group up to 0.1; {0,1},{2,3} up to 0.4; {0,1} and two alone up to 0.5; then all
        // alone.
        let m = matrix(4, &[(0, 1, 0.5), (2, 3, 0.4), (1, 2, 0.1), (0, 2, 0.05), (0, 3, 0.05), (1, 3, 0.05)]);
        assert_eq!(most_stable_tau(&sweep(&m)), Some(0.25));
        // Values inside one component that change nothing do not cut an interval.
        let m = matrix(4, &[(0, 1, 0.5), (1, 2, 0.5), (0, 2, 0.3), (0, 3, 0.1), (1, 3, 0.1), (2, 3, 0.1)]);
        assert_eq!(most_stable_tau(&sweep(&m)), Some(0.3));
        // Nothing shared between the two halves: the interval starts at 0.
        let m = matrix(4, &[(0, 1, 0.2), (2, 3, 0.2)]);
        assert_eq!(most_stable_tau(&sweep(&m)), Some(0.1));
        // Two intervals of equal length: the smaller τ.
        let m = matrix(3, &[(0, 1, 0.75), (1, 2, 0.5), (0, 2, 0.25)]);
        assert_eq!(components(&m, most_stable_tau(&sweep(&m)).unwrap()), [vec![0, 1], vec![2]]);
    }

    #[test]
    fn auto_gives_up_where_every_partition_is_trivial() {
        assert_eq!(most_stable_tau(&sweep(&matrix(2, &[(0, 1, 0.3)]))), None);
        assert_eq!(most_stable_tau(&sweep(&matrix(1, &[]))), None);
        assert_eq!(most_stable_tau(&sweep(&matrix(3, &[(0, 1, 0.3), (1, 2, 0.3), (0, 2, 0.3)]))), None);
    }
}
