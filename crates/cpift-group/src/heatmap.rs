//! The heat map of groups.json.

use cpift_core::format::groups::{Groups, Parting, TauMode};
use cpift_core::format::svg::{Cell, GREY, Picture, Scale, label_height, label_width};

/// Side of a cell, in pixels.
const CELL: usize = 64;

/// The similarities with rows and columns in training order, each group framed.
pub(crate) fn svg(groups: &Groups) -> String {
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
