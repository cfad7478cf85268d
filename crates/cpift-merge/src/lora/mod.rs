//! Adapters as outputs: `extract-lora` turns the difference of two models into a LoRA adapter, and
//! `merge-adapters` combines adapters into one.

mod combine;
mod extract;
mod svd;

pub(crate) use combine::Combination;
pub(crate) use extract::Extraction;
