//! The memory that training takes, computed from config.json and the arguments before anything is
//! loaded: `job` says what is trained, `estimate` adds up the step, `advice` finds options that
//! fit, `traffic` counts what a step moves between ranks and between host and device, `disk` sizes
//! the outputs of a pipeline, `device` reads the limits of the machine.

mod advice;
mod device;
mod disk;
mod estimate;
mod job;
mod traffic;

use anyhow::Result;
use cpift_core::run::left_by_ulimit;

use crate::args::TrainingArgs;
use crate::dist::Place;

pub use advice::{Advice, advice, verdict};
pub use device::{available, check_address_space};
pub use disk::Disk;
pub use estimate::{Moment, PARTS};
pub use job::{Job, Sizes, longest_of, read_model};
pub use traffic::Traffic;

use advice::after_failure;
use job::PROGRAM;

/// The estimate for the job of a run with `frozen` elements, and options that take less, for
/// [`crate::oom::explain`].
pub fn of_failed_run(job: Result<Job>, args: &TrainingArgs, frozen: u64) -> String {
    let world = Place::from_env().ok().flatten().map_or(1, |place| place.world as u64);
    let job = job.map(|job| Job { frozen, ..job }.shared_by(world));
    let device = args.device.open(None);
    match job {
        Ok(job) => after_failure(&job, device.ok().and_then(available)),
        Err(error) => format!("  the memory of the run cannot be computed: {error:#}"),
    }
}

/// Refuses a job on `world` ranks if `ulimit -v` leaves less memory than the estimate. Does nothing
/// if there is no estimate.
///
/// # Errors
/// Errors of [`check_address_space`].
pub fn check_run(job: impl FnOnce() -> Result<Job>, world: usize) -> Result<()> {
    if left_by_ulimit().is_none() {
        return Ok(());
    }
    match job() {
        Ok(job) if !job.cuda => check_address_space(job.shared_by(world as u64).peak().total() - PROGRAM),
        _ => Ok(()),
    }
}
