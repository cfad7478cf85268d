//! `stats`: the density of a core region by layer and by role, as tables, JSON and a picture.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use cpift_core::Mask;
use cpift_core::files::StagedFile;
use cpift_core::format::json;
use cpift_core::format::mask::MaskHeader;
use cpift_core::format::names::{OUTSIDE, Row, Stats, stats, tensors};
use cpift_core::format::svg::{Cell, GREY, Picture, Scale, label_height, label_width};

/// A checked request for the density of a mask.
pub(crate) struct Plan {
    pub(crate) mask: Mask,
    /// JSON file to write.
    pub(crate) out: Option<PathBuf>,
    /// Picture to write.
    pub(crate) svg: Option<PathBuf>,
    /// List every tensor.
    pub(crate) tensors: bool,
    pub(crate) force: bool,
}

impl Plan {
    /// Counts the mask's bits and writes the files asked for, all or none.
    ///
    /// # Errors
    /// [`cpift_core::BadInput`] for a mask that is not sound or an output that exists.
    pub(crate) fn run(&self) -> Result<Stats> {
        self.mask.verify()?;
        let mut stats = stats(&self.mask);
        if self.tensors {
            stats.tensors = tensors(&self.mask);
        }
        let staged = stage(&stats, self.out.as_deref(), self.svg.as_deref(), self.force)?;
        staged.into_iter().try_for_each(StagedFile::commit)?;
        Ok(stats)
    }
}

/// Writes JSON and picture under temporary names, so that all outputs of a run appear together.
///
/// # Errors
/// [`cpift_core::BadInput`] if an output exists and `force` is false.
pub(crate) fn stage(stats: &Stats, json: Option<&Path>, svg: Option<&Path>, force: bool) -> Result<Vec<StagedFile>> {
    let texts = [(json, json::to_text(stats)?), (svg, picture(stats))];
    texts.iter().filter_map(|(path, text)| Some(StagedFile::of_text((*path)?, text, force))).collect()
}

/// The tables that are printed.
pub(crate) fn table(stats: &Stats) -> String {
    let MaskHeader { percent, scope, d, selected, ties, excluded, .. } = &stats.mask;
    let scope = format!("{scope:?}").to_lowercase();
    let mut out = format!(
        "p = {percent} % of D = {d} by {scope} scope: {selected} elements, {} of them chosen among equals\n",
        ties.decided_by_hash
    );
    if let Some(rule) = &stats.mask.rule {
        let _ = writeln!(out, "rule: {rule}");
    }
    if !excluded.is_empty() {
        let _ = writeln!(out, "left out of D: {}", excluded.join(", "));
    }
    for (title, rows) in [("layer", &stats.layers), ("role", &stats.roles), ("tensor", &stats.tensors)] {
        if rows.is_empty() {
            continue;
        }
        let width = if title == "tensor" { rows.iter().map(|r| r.name.len()).max().unwrap_or(8) } else { 8 };
        let head = ("elements", "selected", "density", "share");
        let _ = writeln!(out, "\n{title:<width$} {:>14} {:>12} {:>10} {:>9}", head.0, head.1, head.2, head.3);
        for r in rows {
            let (density, share) = (100.0 * r.density, 100.0 * r.share);
            let (name, elements, selected) = (&r.name, r.elements, r.selected);
            let _ = writeln!(out, "{name:<width$} {elements:>14} {selected:>12} {density:>8.3} % {share:>7.2} %");
        }
    }
    out
}

/// Width of a cell, in pixels.
const WIDTH: usize = 54;
/// Height of a cell, in pixels.
const HEIGHT: usize = 20;
/// Gap between the cells and the sums at the right and at the bottom.
const GAP: usize = 10;

/// Layers × roles, with sums at the right and at the bottom. Colours show the logarithm of density
/// over the share of D that is chosen: red above it, blue below it.
fn picture(stats: &Stats) -> String {
    let MaskHeader { d, selected, .. } = stats.mask;
    let even = if d == 0 { 0.0 } else { selected as f64 / d as f64 };
    let densities: Vec<f64> = stats.matrix.density.iter().flatten().copied().flatten().collect();
    let colors = Colors::new(even, &densities);
    let title = format!("Density of the core region by layer and role: {}", facts(&stats.mask));
    let mut picture = Picture::new("Density of the core region by layer and role, in %", &title);
    picture.notes(&[facts(&stats.mask)]);
    let rows: Vec<&str> = stats.matrix.layers.iter().map(String::as_str).chain(["all"]).collect();
    let columns: Vec<&str> = stats.matrix.roles.iter().copied().chain(["all"]).collect();
    let left = 24 + label_width(rows.iter().copied());
    let top = picture.bottom() + 16 + label_height(columns.iter().copied(), WIDTH);
    let x = |column: usize| left + column * WIDTH + if column + 1 == columns.len() { GAP } else { 0 };
    let y = |row: usize| top + row * HEIGHT + if row + 1 == rows.len() { GAP } else { 0 };
    columns.iter().enumerate().for_each(|(i, name)| picture.column_label((x(i) + WIDTH / 2, top - 6), WIDTH, name));
    for (i, layer) in rows.iter().enumerate() {
        picture.row_label((left - 8, y(i) + 14), layer);
        for (j, role) in columns.iter().enumerate() {
            if let Some(sums) = sums(stats, i, j) {
                let title = format!("{}, {role}: {}", place(layer), sums.title());
                colors.cell(&mut picture, (x(j), y(i)), &sums, &title);
            }
        }
    }
    if !densities.is_empty() {
        let at = (left, picture.bottom() + 18);
        picture.legend(at, colors.scale, &colors.marks());
        picture.notes(&[format!("white: {} of D, as everywhere if the region were spread evenly", percent(even))]);
    }
    picture.finish()
}

fn facts(mask: &MaskHeader) -> String {
    let (scope, metric) = (format!("{:?}", mask.scope).to_lowercase(), format!("{:?}", mask.metric).to_lowercase());
    let excluded = match mask.excluded.is_empty() {
        true => String::new(),
        false => format!(", without {}", mask.excluded.join(" and ")),
    };
    format!("p = {} % of D = {}{excluded}: {} elements by {metric}, {scope} scope", mask.percent, mask.d, mask.selected)
}

fn place(layer: &str) -> String {
    match layer {
        "all" => "all layers".to_owned(),
        OUTSIDE => "outside the layers".to_owned(),
        layer => format!("layer {layer}"),
    }
}

/// Figures of a cell.
struct Sums {
    elements: u64,
    selected: u64,
    /// `None` if all elements are excluded from D.
    density: Option<f64>,
}

impl Sums {
    fn title(&self) -> String {
        let share = self.density.map_or("left out of D".to_owned(), percent);
        format!("{} of {}, {share}", self.selected, self.elements)
    }
}

/// Figures of a cell of the matrix, of a row's sum or a column's; `None` if the model has no such
/// elements.
fn sums(stats: &Stats, row: usize, column: usize) -> Option<Sums> {
    let matrix = &stats.matrix;
    let of = |r: &Row, ranked: bool| Sums {
        elements: r.elements,
        selected: r.selected,
        density: ranked.then_some(r.density),
    };
    let sums = match (stats.layers.get(row), stats.roles.get(column)) {
        (Some(_), Some(_)) => Sums {
            elements: matrix.elements[row][column],
            selected: matrix.selected[row][column],
            density: matrix.density[row][column],
        },
        (Some(layer), None) => of(layer, matrix.density[row].iter().any(Option::is_some)),
        (None, Some(role)) => of(role, matrix.density.iter().any(|cells| cells[column].is_some())),
        (None, None) => Sums {
            elements: stats.layers.iter().map(|l| l.elements).sum(),
            selected: stats.mask.selected,
            density: (stats.mask.d > 0).then(|| stats.mask.selected as f64 / stats.mask.d as f64),
        },
    };
    (sums.elements > 0).then_some(sums)
}

/// Colour scale by the logarithm of density over that of an even spread.
struct Colors {
    even: f64,
    scale: Scale,
    /// The scale ends at 2 to this power times an even spread, and at its inverse.
    reach: i32,
}

impl Colors {
    /// A scale that covers `densities`, up to 16 times an even spread.
    fn new(even: f64, densities: &[f64]) -> Self {
        let powers = densities.iter().map(|d| (d / even).log2().abs()).filter(|power| power.is_finite());
        let reach = powers.fold(1.0, f64::max).ceil().min(4.0) as i32;
        Self { even, scale: Scale::Diverging(f64::from(reach)), reach }
    }

    fn cell(&self, picture: &mut Picture, (x, y): (usize, usize), sums: &Sums, title: &str) {
        let color =
            |density: f64| self.scale.color(if density > 0.0 { (density / self.even).log2() } else { f64::MIN });
        let text = sums.density.map_or("–".to_owned(), |density| percent(density).replace(" %", ""));
        picture.cell(&Cell {
            place: (x, y, WIDTH - 1, HEIGHT - 1),
            color: sums.density.map_or(GREY, color),
            text: &text,
            title,
        });
    }

    fn marks(&self) -> Vec<(f64, String)> {
        let step = if self.reach == 4 { 2 } else { self.reach.max(1) };
        let step = if self.reach == 2 { 1 } else { step };
        let marks = (-self.reach..=self.reach).step_by(step as usize);
        marks.map(|power| (f64::from(power), percent(self.even * 2f64.powi(power)))).collect()
    }
}

/// `share` in percent, to three digits.
fn percent(share: f64) -> String {
    let value = 100.0 * share;
    match value {
        0.0 => "0 %".to_owned(),
        v if v < 0.0005 => "<0.001 %".to_owned(),
        v if v < 0.9995 => format!("{v:.3} %"),
        v if v < 9.995 => format!("{v:.2} %"),
        v if v < 99.95 => format!("{v:.1} %"),
        v => format!("{v:.0} %"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_shown_to_three_digits() {
        let shown = [0.0, 1e-9, 0.0001234, 0.012_345, 0.5, 1.0].map(percent);
        assert_eq!(shown, ["0 %", "<0.001 %", "0.012 %", "1.23 %", "50.0 %", "100 %"]);
    }

    #[test]
    fn the_scale_reaches_as_far_as_the_densities() {
        assert_eq!(Colors::new(0.01, &[0.01, 0.012]).reach, 1);
        assert_eq!(Colors::new(0.01, &[0.0, 0.001]).reach, 4);
        assert_eq!(Colors::new(0.01, &[0.05]).reach, 3);
        let marks = |reach: f64| Colors::new(0.01, &[0.01 * reach.exp2()]).marks().len();
        assert_eq!([1.0, 2.0, 3.0, 4.0].map(marks), [3, 5, 3, 5]);
    }
}
