//! The training core that cpift-probe and cpift-train share.
//!
//! [`run`](Run) goes through the stages: batches come from a thread of their own, [`step`](Trainer) makes one optimizer step out of one or
//! more passes (`pass`: forward and backward, unit by unit; `loss`: the head), [`isolation`](Isolation) says what may move, `watch` shows what happens, `state` saves what a
//! later start needs to go on, `fisher` looks back at the gradients where training has ended.

mod batches;
mod fisher;
mod held_out;
pub mod importance;
mod isolation;
mod lora;
mod loss;
mod pass;
mod run;
mod state;
mod step;
mod watch;

pub use fisher::{FISHER, FisherConfig, squared_gradients};
pub use held_out::HeldOut;
pub use isolation::{Evolving, Isolation, REFRESH_BATCHES};
pub use lora::LoraConfig;
pub use loss::target_losses;
pub use pass::{PassConfig, loss_and_gradients};
pub use run::{Run, Stage, StageReport};
pub use state::{RUN, States, verify_states};
pub use step::{StepConfig, StepOutcome, Trainer};

/// The file of a run's figures, one JSON object a line.
const METRICS: &str = "metrics.jsonl";
