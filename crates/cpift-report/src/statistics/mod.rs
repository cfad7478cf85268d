//! Statistics over scored checkpoints: reading the scores, comparing them, intervals by bootstrap,
//! and experiments over seeds.

pub(crate) mod bootstrap;
pub(crate) mod comparison;
pub(crate) mod experiment;
pub(crate) mod experiment_file;
pub(crate) mod runs;
pub(crate) mod unit;
