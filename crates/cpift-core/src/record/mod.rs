//! The record of how an output came to be, and whether that output is up to date.

pub mod provenance;
pub mod up_to_date;
