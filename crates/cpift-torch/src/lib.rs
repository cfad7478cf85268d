//! libtorch for CPI-FT: models, batches, the optimizer, freezing, the training loop, generation and scoring.
//!
//! The data flow of a training step: examples of cpift-data become batches ([`data`]),
//! [`model`] turns a batch into a loss, [`optim`] moves the parameters and [`freeze`] puts back what must not move;
//! [`train`] is the loop around it, [`session`] opens and saves checkpoint folders.

pub mod args;
pub mod data;
pub mod device;
mod ffi;
pub mod freeze;
pub mod generate;
pub mod memory;
pub mod model;
pub mod oom;
pub mod optim;
pub mod schedule;
pub mod score;
pub mod session;
pub mod tensorboard;
pub mod train;
pub mod weights;
