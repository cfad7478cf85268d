//! `cpift-pipeline clean-probes`: deletes the weights of probes that nothing needs any more.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cpift_core::error::usage;
use cpift_core::run::cli::print;

use crate::artifacts;
use crate::settings::Settings;

/// Deletes the probes but for their records, once everything made from them is up to date.
///
/// # Errors
/// [`cpift_core::error::Usage`] if something that needs a probe is due.
pub(crate) fn clean_probes(settings: &Settings) -> Result<()> {
    let run = &settings.run;
    if !settings.have_inputs() {
        return Err(usage(format!("{} has no settings: run make pipeline first", run.display())));
    }
    let all = artifacts::read(settings)?;
    for artifact in all.iter().filter(|artifact| artifact.is_due()) {
        let mut needed: Vec<&str> =
            artifact.reads.iter().map(String::as_str).filter(|name| name.starts_with("probe-")).collect();
        needed.sort_unstable();
        if !needed.is_empty() {
            let (state, reason) = artifact.state.words();
            let reason = if reason.is_empty() { String::new() } else { format!(" ({reason})") };
            let (name, needed) = (&artifact.name, needed.join(", "));
            return Err(usage(format!("{name} is {state}{reason}: {needed} is still needed; run make pipeline first")));
        }
    }
    let mut freed = 0;
    for task in all.iter().filter_map(|artifact| artifact.name.strip_prefix("probe-")) {
        let probe = run.join("probes").join(task);
        let record = probe.join("cpift.json");
        if record.is_file() {
            freed += delete_all_but(&record, &probe).with_context(|| format!("deleting {}", probe.display()))?;
        }
    }
    print(&format!("clean-probes: {:.1} GB freed\n", freed as f64 / 1e9));
    Ok(())
}

/// Deletes everything in `folder` but the file `kept` and returns its bytes.
fn delete_all_but(kept: &Path, folder: &Path) -> std::io::Result<u64> {
    let mut freed = 0;
    let entries: Vec<PathBuf> =
        fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    for path in entries.iter().filter(|path| *path != kept) {
        let kind = fs::symlink_metadata(path)?;
        if kind.is_dir() {
            freed += delete_all_but(kept, path)?;
            fs::remove_dir(path)?;
        } else {
            freed += kind.len();
            fs::remove_file(path)?;
        }
    }
    Ok(freed)
}
