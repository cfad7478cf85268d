//! Putting groups in training order.

use std::cmp::Ordering;
use std::path::Path;

use anyhow::Result;
use cpift_core::BadInput;
use cpift_core::format::digest::Digest;
use cpift_core::format::scores::Scores;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha12Rng;

use crate::partition::Partition;

/// Groups in training order, and the figure each was ordered by.
#[derive(Debug, Clone, PartialEq)]
pub struct Ordered {
    /// Groups of task indices.
    pub groups: Partition,
    /// One figure for each group; empty where the order does not come from figures.
    pub figures: Vec<f64>,
}

/// A shuffle that depends on the seed alone.
pub fn random(mut groups: Partition, seed: u64) -> Ordered {
    groups.shuffle(&mut ChaCha12Rng::seed_from_u64(seed));
    Ordered { groups, figures: Vec::new() }
}

/// Groups by ascending figure; equal figures by their first task.
pub fn ascending(groups: Partition, figures: Vec<f64>) -> Ordered {
    sorted(groups, figures, f64::total_cmp)
}

/// As [`ascending`], the largest figure first.
pub fn descending(groups: Partition, figures: Vec<f64>) -> Ordered {
    sorted(groups, figures, |a, b| b.total_cmp(a))
}

fn sorted(groups: Partition, figures: Vec<f64>, compare: impl Fn(&f64, &f64) -> Ordering) -> Ordered {
    let mut both: Vec<(f64, Vec<usize>)> = figures.into_iter().zip(groups).collect();
    both.sort_by(|a, b| compare(&a.0, &b.0).then_with(|| a.1.cmp(&b.1)));
    let (figures, groups) = both.into_iter().unzip();
    Ordered { groups, figures }
}

/// The mean loss of each group's tasks; `losses` by task.
pub fn mean_loss(groups: &Partition, losses: &[f64]) -> Vec<f64> {
    groups.iter().map(|g| g.iter().map(|i| losses[*i]).sum::<f64>() / g.len() as f64).collect()
}

/// The losses of a scores.json on all `tasks`, in their order. Where `base` is given and is not the
/// model that was scored, a warning says so.
///
/// # Errors
/// [`BadInput`] when the file cannot be read or a task was not scored.
pub fn read_losses(path: &Path, tasks: &[String], base: Option<&Digest>) -> Result<(Vec<f64>, Digest)> {
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
}
