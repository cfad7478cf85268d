//! Results as text: the tables of experiments, and comparisons and experiments as Markdown, CSV and
//! JSON.

pub(crate) mod data;
pub(crate) mod markdown;
pub(crate) mod sheet;
