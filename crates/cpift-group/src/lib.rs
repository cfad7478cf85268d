//! Stage 2 of CPI-FT: groups tasks whose core regions overlap, and puts the groups in training order.
//!
//! [`overlap`] counts the bits that regions share, [`partition`] cuts the graph of similar tasks into groups, [`order`]
//! orders them, [`heatmap`] draws the result.

mod args;
mod dependency;
mod group;
pub mod heatmap;
pub mod order;
pub mod overlap;
pub mod partition;

pub use args::{Args, run};
pub use group::group;
