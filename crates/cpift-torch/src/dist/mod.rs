//! Several processes that work as one: their places in the job, collectives over Gloo or NCCL, and
//! the end of all when one fails.
//!
//! Every process of a job joins a [`Group`] at the [`Place`] that torchrun or Slurm states in the
//! environment. c10d, PyTorch's layer for this, provides the store in which the ranks find each
//! other and the process groups: Gloo in libtorch_cpu, NCCL in libtorch_cuda.
//!
//! A rank that dies, hangs or fails ends all others: a thread per rank leaves signs of life in the
//! store and reads those of the next rank. [`Group::fail`] passes on the error of a rank.

mod c10d;
mod group;
mod liveness;
mod place;

pub use c10d::set_storage;
pub use group::{Backend, Group, Work};
pub(crate) use group::{in_batches, in_shares};
pub(crate) use liveness::JOB_FAILED;
pub use place::Place;
