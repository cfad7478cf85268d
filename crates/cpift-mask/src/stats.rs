//! `stats`: how a core region lies in the model, by layer and by role.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use anyhow::Result;
use cpift_core::Mask;
use cpift_core::error::usage;
use cpift_core::files::{StagedFile, check_not_input, check_output};
use cpift_core::format::density::{Stats, stats};
use cpift_core::format::json;
use cpift_core::format::mask::MaskHeader;
use cpift_core::run::cli::Common;

use crate::args::StatsArgs;
use crate::picture;

/// Runs `cpift-mask stats`.
///
/// # Errors
/// [`cpift_core::Usage`] when both outputs have one name; [`cpift_core::BadInput`] for a file that is no sound mask or an output
/// that exists; I/O errors.
pub(crate) fn run(args: &StatsArgs, common: &Common) -> Result<()> {
    if args.out.is_some() && args.out == args.svg {
        return Err(usage("--out and --svg name the same file"));
    }
    args.out.iter().chain(&args.svg).try_for_each(|path| check_output(path, common.force()))?;
    for (flag, path) in [("--out", &args.out), ("--svg", &args.svg)] {
        path.iter().try_for_each(|path| check_not_input(flag, path, [args.file.as_path()]))?;
    }
    let mask = Mask::open(&args.file)?;
    mask.verify()?;
    let stats = stats(&mask);
    stage(&stats, args.out.as_deref(), args.svg.as_deref(), common.force())?
        .into_iter()
        .try_for_each(StagedFile::commit)?;
    if !common.json && args.out.is_none() && args.svg.is_none() {
        std::io::stdout().write_all(table(&stats).as_bytes())?;
    }
    common.print_json(&serde_json::to_value(stats)?);
    Ok(())
}

/// JSON and picture, complete but not under their names yet, so that all outputs of a run can appear together.
///
/// # Errors
/// [`cpift_core::BadInput`] when an output exists without `force`; I/O errors.
pub fn stage(stats: &Stats, json: Option<&Path>, svg: Option<&Path>, force: bool) -> Result<Vec<StagedFile>> {
    let texts = [(json, json::to_text(stats)?), (svg, picture::svg(stats))];
    texts.iter().filter_map(|(path, text)| Some(StagedFile::of_text((*path)?, text, force))).collect()
}

/// The tables as text.
fn table(stats: &Stats) -> String {
    let MaskHeader { percent, scope, d, selected, ties, excluded, .. } = &stats.mask;
    let scope = format!("{scope:?}").to_lowercase();
    let mut out = format!(
        "p = {percent} % of D = {d} by {scope} scope: {selected} elements, {} of them decided by position\n",
        ties.decided_by_position
    );
    if !excluded.is_empty() {
        let _ = writeln!(out, "left out of D: {}", excluded.join(", "));
    }
    for (title, rows) in [("layer", &stats.layers), ("role", &stats.roles)] {
        let _ = writeln!(out, "\n{title:<8} {:>14} {:>12} {:>10} {:>9}", "elements", "selected", "density", "share");
        for r in rows {
            let (density, share) = (100.0 * r.density, 100.0 * r.share);
            let _ =
                writeln!(out, "{:<8} {:>14} {:>12} {density:>8.3} % {share:>7.2} %", r.name, r.elements, r.selected);
        }
    }
    out
}
