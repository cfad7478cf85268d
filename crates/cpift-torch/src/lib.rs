//! libtorch for CPI-FT: models, batches, the optimizer, freezing, the training loop, generation and
//! scoring.
//!
//! A training step: examples of cpift-data become batches ([`data`]), [`model`] turns a batch into
//! hidden states and `loss` into a loss, [`optim`] updates the parameters and [`freeze`] restores
//! the frozen elements; [`train`] is the loop around it, [`session`] opens and saves checkpoints.

pub mod args;
pub mod data;
pub mod dist;
mod ffi;
pub mod freeze;
pub mod generate;
pub mod home;
pub mod loss;
pub mod memory;
pub mod model;
pub mod oom;
pub mod optim;
pub mod placement;
pub mod schedule;
pub mod score;
pub mod session;
pub mod train;
mod transfer;
pub mod weights;
pub mod workers;
