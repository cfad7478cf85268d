//! Provenance records and the up-to-date rule.

pub mod provenance;
pub mod up_to_date;
