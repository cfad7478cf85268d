//! The mean of the weights at the last saved steps (`--average-last`), read from the saved states
//! at the end of training, one tensor at a time.

use anyhow::Result;
use cpift_core::error::usage;
use tch::{Kind, no_grad};

use super::state::{Part, States};
use crate::pieces::Pieces;

/// Steps within a stage of `total` steps whose states are averaged with the weights at its end:
/// the last multiples of `every` below `total`, `count` − 1 of them.
///
/// # Errors
/// [`cpift_core::Usage`] for a stage that has fewer.
pub(super) fn averaged_steps(label: &str, total: usize, every: usize, count: usize) -> Result<Vec<usize>> {
    let saved = (total - 1) / every;
    if saved + 1 < count {
        return Err(usage(format!(
            "--average-last {count} needs as many saved steps, but {label} has {}: of its {total} steps, --save-every \
             {every} saves {saved} before the last",
            saved + 1
        )));
    }
    Ok((saved + 2 - count..=saved).map(|k| k * every).collect())
}

/// Replaces `pieces` by the mean of their values and those in the states after `steps`.
///
/// # Errors
/// [`cpift_core::BadInput`] for a state that is missing or damaged.
pub(super) fn average(pieces: &Pieces, states: &States, steps: &[usize]) -> Result<()> {
    let saved = steps.iter().map(|step| states.after(*step)).collect::<Result<Vec<_>>>()?;
    for (name, piece) in pieces.iter().filter(|(_, piece)| !piece.is_empty()) {
        let earlier = Pieces::from([(name.clone(), piece.with(piece.tensor.detach().copy()))]);
        // Sums of equal numbers and their quotients are exact in f64: frozen elements keep their
        // bits.
        let mut sum = None;
        for state in &saved {
            state.load(Part::Weights, &earlier)?;
            let own = earlier[name].tensor.to_kind(Kind::Double);
            sum = Some(sum.map_or_else(|| own.copy(), |sum| sum + &own));
        }
        let Some(sum) = sum else { continue };
        let mean = (sum + piece.tensor.detach().to_kind(Kind::Double)) / (saved.len() + 1) as f64;
        no_grad(|| piece.tensor.detach().copy_(&mean.to_kind(Kind::Float)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::averaged_steps;

    #[test]
    fn the_end_of_training_is_the_last_saved_step() {
        let steps = |total, every, count| averaged_steps("stage", total, every, count).unwrap();
        assert_eq!(steps(10, 3, 3), [6, 9]);
        assert_eq!(steps(9, 3, 3), [3, 6]);
        assert_eq!(steps(9, 3, 1), [0usize; 0]);
        assert!(averaged_steps("stage", 9, 3, 4).is_err());
        assert!(averaged_steps("stage", 1, 5, 1).unwrap().is_empty());
    }
}
