//! `--dry-run`
use crate::plan::Plan;
use anyhow::Result;
/// x
pub fn show(_plan: &Plan, _json: bool) -> Result<()> {
    Ok(())
}
