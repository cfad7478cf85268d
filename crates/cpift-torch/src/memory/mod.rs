//! The memory that training takes, computed from config.json and the arguments before anything is
//! loaded: `job` says what is trained, `estimate` adds up the step, `advice` reads the limits of
//! the machine and finds options that fit, `traffic` counts what a step moves between ranks and
//! between host and device, and sizes the outputs of a pipeline.

mod advice;
mod estimate;
mod job;
mod traffic;

pub use advice::{Advice, advice, available, check_address_space, check_run, of_failed_run, verdict};
pub use estimate::{Moment, PARTS};
pub use job::{Job, Sizes, longest_of, read_model};
pub use traffic::{Disk, Traffic};
