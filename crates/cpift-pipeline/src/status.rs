//! `cpift-pipeline status`: every artifact, its state, and how many are in each.

use std::collections::HashMap;

use anyhow::Result;
use cpift_core::run::cli::print;

use crate::artifacts;
use crate::settings::Settings;

/// Prints the state of every artifact.
///
/// # Errors
/// If make fails.
pub(crate) fn show(settings: &Settings) -> Result<()> {
    let all = artifacts::read(settings)?;
    let queue = artifacts::queued_jobs(&settings.run).unwrap_or_else(|error| {
        eprintln!("status: jobs are not shown: {error:#}");
        HashMap::new()
    });
    let width = all.iter().map(|artifact| artifact.name.len()).max().unwrap_or(0) + 2;
    let mut counts: Vec<(&str, usize)> = Vec::new();
    let mut text = String::new();
    for artifact in &all {
        let name = &artifact.name;
        let at_work = || artifacts::at_work(&settings.run, name, queue.get(name));
        let (state, more) = artifact.is_due().then(at_work).flatten().unwrap_or_else(|| {
            let (word, reason) = artifact.state.words();
            (word, reason.to_owned())
        });
        text += format!("{name:<width$}{state:<10}{more}").trim_end();
        text += "\n";
        match counts.iter_mut().find(|(word, _)| *word == state) {
            Some((_, count)) => *count += 1,
            None => counts.push((state, 1)),
        }
    }
    let counts: Vec<String> = counts.iter().map(|(state, count)| format!("{count} {state}")).collect();
    print(&format!("{text}{}\n", counts.join(", ")));
    Ok(())
}
