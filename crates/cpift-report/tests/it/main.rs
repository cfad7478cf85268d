//! Tests of the pages and tables of finished runs.

mod compare;
mod experiment;
mod figures;
mod page;
mod support;
