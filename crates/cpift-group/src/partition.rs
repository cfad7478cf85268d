//! Cutting tasks into groups: connected components of the graph of similar pairs, and the choice of τ.

/// Groups of task indices: each in ascending order, groups by their first task.
pub type Partition = Vec<Vec<usize>>;

/// The connected components of the graph with an edge where `similarity[a][b] >= tau`.
pub fn components(similarity: &[Vec<f64>], tau: f64) -> Partition {
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

/// Whether a partition of `n` tasks is one group, or every task alone.
pub fn is_trivial(groups: &Partition) -> bool {
    groups.len() <= 1 || groups.iter().all(|g| g.len() == 1)
}

/// The middle of the longest interval of τ whose partition does not change and is not trivial; the interval of the
/// smaller τ where two are equally long. `None` when every partition is trivial, as with two tasks.
pub fn most_stable_tau(similarity: &[Vec<f64>]) -> Option<f64> {
    let mut values: Vec<f64> = similarity.iter().enumerate().flat_map(|(a, row)| row[..a].iter().copied()).collect();
    values.sort_by(f64::total_cmp);
    values.dedup();
    // The partition is the same for all τ in (from, to], where `from` and `to` are neighbouring values.
    let mut best: Option<(f64, f64)> = None;
    let mut from = 0.0;
    for (i, &to) in values.iter().enumerate() {
        let groups = components(similarity, to);
        if values.get(i + 1).is_some_and(|next| components(similarity, *next) == groups) {
            continue;
        }
        if !is_trivial(&groups) && best.is_none_or(|(start, end)| to - from > end - start) {
            best = Some((from, to));
        }
        from = to;
    }
    best.map(|(from, to)| f64::midpoint(from, to))
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
    fn auto_takes_the_middle_of_the_longest_interval() {
        // One group up to 0.1; {0,1},{2,3} up to 0.4; {0,1} and two alone up to 0.5; then all alone.
        let m = matrix(4, &[(0, 1, 0.5), (2, 3, 0.4), (1, 2, 0.1), (0, 2, 0.05), (0, 3, 0.05), (1, 3, 0.05)]);
        assert_eq!(most_stable_tau(&m), Some(0.25));
        // Values inside one component that change nothing do not cut an interval.
        let m = matrix(4, &[(0, 1, 0.5), (1, 2, 0.5), (0, 2, 0.3), (0, 3, 0.1), (1, 3, 0.1), (2, 3, 0.1)]);
        assert_eq!(most_stable_tau(&m), Some(0.3));
        // Nothing shared between the two halves: the interval starts at 0.
        let m = matrix(4, &[(0, 1, 0.2), (2, 3, 0.2)]);
        assert_eq!(most_stable_tau(&m), Some(0.1));
        // Two intervals of equal length: the smaller τ.
        let m = matrix(3, &[(0, 1, 0.75), (1, 2, 0.5), (0, 2, 0.25)]);
        assert_eq!(components(&m, most_stable_tau(&m).unwrap()), [vec![0, 1], vec![2]]);
    }

    #[test]
    fn auto_gives_up_where_every_partition_is_trivial() {
        assert_eq!(most_stable_tau(&matrix(2, &[(0, 1, 0.3)])), None);
        assert_eq!(most_stable_tau(&matrix(1, &[])), None);
        assert_eq!(most_stable_tau(&matrix(3, &[(0, 1, 0.3), (1, 2, 0.3), (0, 2, 0.3)])), None);
    }
}
