//! The training core that cpift-probe and cpift-train share, in the order data takes: [`Run`]
//! goes through its stages (`stage`), whose batches a thread of their own makes; [`Trainer`]
//! (`step`) makes an optimizer step out of forward and backward passes (`pass`) that go unit by
//! unit.
//!
//! [`Isolation`] says which elements may change (`importance` measures what a dynamic mask
//! protects, and the Fisher information after training), `lora` trains adapters, `watch` writes
//! metrics, `state` saves what a later start needs and takes the mean of saved states.

pub mod importance;
mod isolation;
mod lora;
mod pass;
mod run;
mod stage;
mod state;
mod step;
mod watch;

pub use importance::{FISHER, FisherConfig, squared_gradients};
pub use isolation::{DynamicConfig, Isolation};
pub use lora::{LoraConfig, LoraOutput, attach as attach_adapters};
pub use pass::{PassConfig, loss_and_gradients};
pub use run::Run;
pub use stage::{HeldOut, Stage, StageReport, read_examples};
pub use state::{States, verify_states};
pub use step::{StepConfig, StepInput, StepOutcome, Trainer};
