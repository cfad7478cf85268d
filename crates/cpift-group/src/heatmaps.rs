//! The similarity of core regions drawn: the heat map of groups.json over all layers, and layer by
//! layer groups.layers.json and its heat map.

use std::collections::BTreeMap;

use cpift_core::format::digest::Digest;
use cpift_core::format::groups::{Groups, Parting, TauMode};
use cpift_core::format::names::OUTSIDE;
use cpift_core::format::svg::{Cell, GREY, Picture, Scale, label_height, label_width, shortened};
use serde::{Deserialize, Serialize};

use crate::overlap::{Counts, Overlap};

/// Side of a cell of the heat map of groups.json, in pixels.
const CELL: usize = 64;

/// Heat map of groups.json: the similarities with rows and columns in training order, each group
/// framed.
pub(crate) fn whole(groups: &Groups) -> String {
    let order: Vec<usize> =
        groups.task_order().iter().filter_map(|t| groups.tasks.iter().position(|x| x == t)).collect();
    let names = || groups.tasks.iter().map(String::as_str);
    let title = format!("Jaccard similarity of core regions: {}", groups.tasks.join(", "));
    let mut picture = Picture::new("Jaccard similarity of core regions", &title);
    // Either all names are upright over their columns, or all lean.
    let column = if label_width(names()) <= CELL { CELL } else { 0 };
    let corner = (24 + label_width(names()), 48 + label_height(names(), column));
    let scale = Scale::Sequential(largest_pair(groups));
    for (i, &task) in order.iter().enumerate() {
        let (name, middle) = (&groups.tasks[task], i * CELL + CELL / 2);
        picture.row_label((corner.0 - 8, corner.1 + middle + 5), name);
        picture.column_label((corner.0 + middle, corner.1 - 8), column, name);
    }
    for (i, &a) in order.iter().enumerate() {
        for (j, &b) in order.iter().enumerate() {
            let (s, chance) = (groups.jaccard[a][b], groups.chance[a][b]);
            picture.cell(&Cell {
                place: (corner.0 + j * CELL, corner.1 + i * CELL, CELL, CELL),
                color: if a == b { GREY } else { scale.color(s) },
                text: &if a == b { "1".to_owned() } else { format!("{s:.3}") },
                title: &format!("{} and {}: {s:.6}, chance {chance:.6}", groups.tasks[a], groups.tasks[b]),
            });
        }
    }
    let mut start = 0;
    for group in &groups.groups {
        let side = group.len() * CELL;
        picture.frame((corner.0 + start * CELL, corner.1 + start * CELL, side, side));
        start += group.len();
    }
    legend(&mut picture, groups, corner.0);
    picture.notes(&notes(groups));
    picture.finish()
}

fn legend(picture: &mut Picture, groups: &Groups, left: usize) {
    let max = largest_pair(groups);
    if max > 0.0 {
        let y = picture.bottom() + 20;
        let marks = [0.0, max / 2.0, max].map(|value| (value, format!("{value:.3}")));
        picture.legend((left, y), Scale::Sequential(max), &marks);
    }
}

fn notes(groups: &Groups) -> Vec<String> {
    let (n, mut low, mut high) = (groups.tasks.len(), f64::INFINITY, 0f64);
    for (a, b) in (0..n).flat_map(|a| (0..a).map(move |b| (a, b))) {
        (low, high) = (low.min(groups.chance[a][b]), high.max(groups.chance[a][b]));
    }
    let chance = match (n, format!("{low:.4}"), format!("{high:.4}")) {
        (1, _, _) => "one task: nothing to compare".to_owned(),
        (_, low, high) if low == high => format!("chance: {low} for every pair"),
        (_, low, high) => format!("chance: {low} to {high}"),
    };
    let how = match (&groups.partition, groups.tau_mode) {
        (Some(Parting::Kind {}), _) => "by kind".to_owned(),
        (Some(Parting::Like {}), _) => "as given".to_owned(),
        (Some(Parting::Random { seed, .. }), _) => format!("at random, seed {seed}"),
        (None, TauMode::Auto) => format!("τ = {:.4}, chosen as the most stable", groups.tau),
        (None, TauMode::Fixed) => format!("τ = {:.4}", groups.tau),
    };
    vec![
        chance,
        format!(
            "{how}: {} group{} (framed), {} order, first to last",
            groups.groups.len(),
            if groups.groups.len() == 1 { "" } else { "s" },
            groups.order.method
        ),
    ]
}

fn largest_pair(groups: &Groups) -> f64 {
    let n = groups.tasks.len();
    (0..n).flat_map(|a| (0..a).map(move |b| (a, b))).map(|(a, b)| groups.jaccard[a][b]).fold(0.0, f64::max)
}

/// Format version of groups.layers.json.
pub(crate) const FORMAT_VERSION: u32 = 1;

/// The content of groups.layers.json.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layers {
    /// Format version.
    pub format_version: u32,
    /// Task names; rows and columns of the matrices.
    pub tasks: Vec<String>,
    /// Kinds of tensors left out of the comparison.
    pub excluded: Vec<String>,
    /// Layers by number, then the tensors outside them.
    pub layers: Vec<Layer>,
    /// Digest of the base all masks were made for.
    pub base: Digest,
    /// Digest of each task's mask file.
    pub masks: BTreeMap<String, Digest>,
}

/// The core regions inside one layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// The layer's number, or `outside`; the prefix of its tensors if the model has several
    /// stacks of layers.
    pub name: String,
    /// Elements of the compared tensors.
    pub elements: u64,
    /// Elements that two regions share; the size of a region on the diagonal. [tasks × tasks]
    pub shared: Vec<Vec<u64>>,
    /// Jaccard similarity, [tasks × tasks]; 0 if both regions are empty in this layer.
    pub jaccard: Vec<Vec<f64>>,
    /// The similarity two independent random regions of the same sizes would have, [tasks × tasks].
    pub chance: Vec<Vec<f64>>,
}

impl Layers {
    /// The layers of `overlap`; `groups` has the tasks and digests.
    pub(crate) fn new(overlap: &Overlap, groups: &Groups) -> Self {
        let layer = |(name, counts): &(String, Counts)| Layer {
            name: name.clone(),
            elements: counts.elements,
            shared: counts.shared.clone(),
            jaccard: counts.matrix(Counts::jaccard),
            chance: counts.matrix(Counts::chance),
        };
        Self {
            format_version: FORMAT_VERSION,
            tasks: groups.tasks.clone(),
            excluded: groups.excluded.clone(),
            layers: overlap.layers.iter().map(layer).collect(),
            base: groups.base.clone(),
            masks: groups.masks.clone(),
        }
    }
}

/// Width of a layer's column and of the column for all layers in the heat map by layer.
const WIDTH: usize = 22;
const ALL_WIDTH: usize = 62;
/// Heights of a cell, of the strip for chance below it, and of a row.
const HEIGHT: usize = 22;
const STRIP: usize = 6;
const ROW: usize = 34;

/// A column of the heat map by layer: a layer, or all of them.
struct Column<'a> {
    label: &'a str,
    jaccard: &'a [Vec<f64>],
    chance: &'a [Vec<f64>],
    x: usize,
    width: usize,
    /// `None` for the column of all layers, which shows its values as text.
    layer: Option<&'a Layer>,
}

/// Heat map of pairs of tasks by layer, with the similarities over all layers (from `groups`) in
/// the last column.
pub(crate) fn by_layer(layers: &Layers, groups: &Groups) -> String {
    let tasks = &layers.tasks;
    let pairs: Vec<(usize, usize)> = (0..tasks.len()).flat_map(|b| (0..b).map(move |a| (a, b))).collect();
    let pair = |(a, b): &(usize, usize)| [*a, *b].map(|task| shortened(&tasks[task], 20)).join(" · ");
    let names: Vec<String> = pairs.iter().map(pair).collect();
    let left = 24 + label_width(names.iter().map(String::as_str));
    let columns = columns(layers, groups, left);
    let top = 48 + label_height(columns.iter().map(|c| c.label), WIDTH);
    let value = |c: &Column<'_>, &(a, b): &(usize, usize)| c.jaccard[a][b].max(c.chance[a][b]);
    let largest = columns.iter().flat_map(|c| pairs.iter().map(|p| value(c, p))).fold(0.0, f64::max);
    let title = format!("Jaccard similarity of core regions by layer: {}", tasks.join(", "));
    let mut picture = Picture::new("Jaccard similarity of core regions by layer", &title);
    for column in &columns {
        picture.column_label((column.x + column.width / 2, top - 8), column.width, column.label);
    }
    for (row, (&(a, b), name)) in pairs.iter().zip(&names).enumerate() {
        let (y, whole) = (top + row * ROW, format!("{} and {}", tasks[a], tasks[b]));
        picture.row_label((left - 8, y + 16), name);
        columns.iter().for_each(|column| cell(&mut picture, Scale::Sequential(largest), column, (a, b), (&whole, y)));
    }
    if largest > 0.0 {
        let marks = [0.0, largest / 2.0, largest].map(|value| (value, format!("{value:.4}")));
        let y = picture.bottom() + 20;
        picture.legend((left, y), Scale::Sequential(largest), &marks);
    }
    let note = match pairs.len() {
        0 => "one task: nothing to compare",
        _ => {
            "The strip below a cell has the colour of what chance gives regions of these sizes; grey: both are empty there."
        }
    };
    picture.notes(&[note.to_owned()]);
    picture.finish()
}

fn columns<'a>(layers: &'a Layers, groups: &'a Groups, left: usize) -> Vec<Column<'a>> {
    let column = |(i, layer): (usize, &'a Layer)| Column {
        label: &layer.name,
        jaccard: &layer.jaccard,
        chance: &layer.chance,
        x: left + i * WIDTH,
        width: WIDTH,
        layer: Some(layer),
    };
    let mut columns: Vec<Column<'a>> = layers.layers.iter().enumerate().map(column).collect();
    columns.push(Column {
        label: "all",
        jaccard: &groups.jaccard,
        chance: &groups.chance,
        x: left + columns.len() * WIDTH + 12,
        width: ALL_WIDTH,
        layer: None,
    });
    columns
}

fn cell(picture: &mut Picture, scale: Scale, column: &Column<'_>, (a, b): (usize, usize), (names, y): (&str, usize)) {
    let (s, chance) = (column.jaccard[a][b], column.chance[a][b]);
    let place = column.layer.map_or("all layers".to_owned(), |layer| match layer.name.as_str() {
        OUTSIDE => "outside the layers".to_owned(),
        name => format!("layer {name}"),
    });
    let title = format!("{names}, {place}: {s:.6}, chance {chance:.6}");
    let text = if column.layer.is_none() { format!("{s:.4}") } else { String::new() };
    let empty = column.layer.is_some_and(|l| l.shared[a][a] + l.shared[b][b] == 0);
    let color = |value| if empty { GREY } else { scale.color(value) };
    let (x, width) = (column.x, column.width - 1);
    picture.cell(&Cell { place: (x, y, width, HEIGHT), color: color(s), text: &text, title: &title });
    picture.cell(&Cell { place: (x, y + HEIGHT + 1, width, STRIP), color: color(chance), text: "", title: &title });
}
