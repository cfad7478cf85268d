//! The core regions: their overlap, and their density by layer and role.

use std::path::Path;

use anyhow::Result;
use cpift_core::Mask;
use cpift_core::format::groups::{Groups, TauMode};
use cpift_core::format::names::{OUTSIDE, Stats, stats};
use cpift_core::format::svg::Canvas;

use maud::{Markup, html};

use super::folder::{entries, file_name};
use crate::html::{Table, diverging, figure, missing, paragraph, picture, scale_legend, scrolling_picture, sequential};
use crate::sheet::counted;

/// Sides of a cell of the heat map, in pixels: for few tasks, and for so many that the map must
/// scroll on a telephone.
const CELLS: (f64, f64) = (58.0, 46.0);
/// Largest number of tasks that counts as few.
const FEW: usize = 6;

/// The section with the groups and the Jaccard matrix in training order.
pub(crate) fn overlap(folder: &Path) -> Result<Markup> {
    let path = folder.join("groups.json");
    if !path.is_file() {
        return Ok(missing("No groups.json: cpift-group has not run in this directory."));
    }
    let groups = Groups::read(&path)?;
    let score = |i: usize| groups.order.scores.get(i).map_or(String::new(), |s| format!(" ({s:.4})"));
    let tau = if groups.tau_mode == TauMode::Auto { "chosen as the most stable" } else { "given" };
    let words = format!(
        "τ = {:.4} ({tau}) gives {} of {} tasks, trained in this order ({}{}):",
        groups.tau,
        counted(groups.groups.len(), "group"),
        groups.tasks.len(),
        groups.order.method,
        groups.order.seed.map_or(String::new(), |seed| format!(", seed {seed}"))
    );
    Ok(html! {
        (paragraph(&words))
        ol {
            "\n"
            @for (i, group) in groups.groups.iter().enumerate() { li { (group.join(", ")) (score(i)) } "\n" }
        }
        "\n"
        (heat_map(&groups))
    })
}

fn heat_map(groups: &Groups) -> Markup {
    let order: Vec<usize> =
        groups.task_order().iter().filter_map(|t| groups.tasks.iter().position(|x| x == t)).collect();
    let pairs = order.iter().flat_map(|&a| order.iter().map(move |&b| (a, b))).filter(|(a, b)| a != b);
    let max = pairs.clone().map(|(a, b)| groups.jaccard[a][b]).fold(0.0, f64::max);
    let chance = pairs.map(|(a, b)| groups.chance[a][b]).fold(0.0, f64::max);
    let (left, top) = (96.0, 24.0);
    let many = order.len() > FEW;
    let size = if many { CELLS.1 } else { CELLS.0 };
    let side = size * order.len() as f64;
    let mut svg = Canvas::default();
    let header: Vec<String> =
        ["task".to_owned()].into_iter().chain(order.iter().map(|&t| groups.tasks[t].clone())).collect();
    let mut table = Table::new("Jaccard similarity of core regions (in brackets: expected by chance)", &header);
    for (i, &a) in order.iter().enumerate() {
        let (name, at) = (&groups.tasks[a], size * i as f64);
        svg.name(left - 8.0, top + at + size / 2.0 + 4.0, "end", left - 10.0, name);
        svg.name(left + at + size / 2.0, top - 8.0, "middle small", size + 6.0, name);
        let mut cells = vec![name.clone()];
        for (j, &b) in order.iter().enumerate() {
            let (s, by_chance) = (groups.jaccard[a][b], groups.chance[a][b]);
            let (class, text) =
                if a == b { ("none".into(), "1".to_owned()) } else { (sequential(s, max), format!("{s:.3}")) };
            let title = format!("{name} and {}: {s:.6}, chance {by_chance:.6}", groups.tasks[b]);
            let (x, y) = (left + size * j as f64, top + at);
            svg.rect((x, y, size - 1.0, size - 1.0), &class, &title);
            let ink = if a == b { "small middle soft".to_owned() } else { format!("{class} on small middle") };
            svg.text(x + size / 2.0, y + size / 2.0 + 4.0, &ink, &text);
            cells.push(if a == b { "1".to_owned() } else { format!("{s:.4} ({by_chance:.4})") });
        }
        table.row(&cells);
    }
    let mut start = 0.0;
    for group in &groups.groups {
        let side = size * group.len() as f64;
        svg.rect((left + start - 0.5, top + start - 0.5, side, side), "frame", "");
        start += side;
    }
    let label = format!("Heat map: Jaccard similarity of the core regions of {}", groups.task_order().join(", "));
    let chance = format!("chance: up to {chance:.4}");
    let caption = html! {
        (scale_legend('q', ["0", &chance, &format!("{max:.3}")])) br;
        "Jaccard similarity of every pair of core regions, in training order; the groups are framed."
    };
    let size = (left + side + 2.0, top + side + 2.0);
    let picture = if many { scrolling_picture(svg, size, &label) } else { picture(svg, size, &label) };
    figure(&[picture], &caption, &[table])
}

/// The section with the density of every mask by layer and role. It reads each mask file once.
pub(crate) fn density(folder: &Path) -> Result<Markup> {
    let files: Vec<_> = entries(&folder.join("masks"))?
        .into_iter()
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    if files.is_empty() {
        return Ok(missing(
            "No masks: the directory masks/ contains no NAME.safetensors. cpift-mask extract writes them.",
        ));
    }
    let mut all: Vec<(String, Stats)> = Vec::new();
    for path in &files {
        all.push((file_name(path).trim_end_matches(".safetensors").to_owned(), stats(&Mask::open(path)?)));
    }
    let reach = all.iter().map(|(_, stats)| reach(stats)).fold(1.0, f64::max);
    let pictures: Vec<Markup> = all.iter().map(|(task, stats)| tile(task, stats, reach)).collect();
    let mut percents: Vec<String> = Vec::new();
    for (_, stats) in &all {
        let percent = format!("{} %", short(stats.mask.percent));
        percents.extend((!percents.contains(&percent)).then_some(percent));
    }
    let times = |power: f64| format!("{} times", power.exp2());
    let words = format!(
        "Density of each task's core region by layer (down) and role (across), relative to an even spread: orange where the \
         task changed more than its share, blue where less. p = {}.",
        percents.join(", ")
    );
    let ends = [&format!("1/{} or less", reach.exp2()), "middle: as dense as an even spread", &times(reach)];
    let caption = html! { (scale_legend('d', ends)) br; (words) };
    let tables: Vec<Table> = all.iter().map(|(task, stats)| numbers(task, stats)).collect();
    Ok(figure(&pictures, &caption, &tables))
}

fn even(stats: &Stats) -> f64 {
    if stats.mask.d == 0 { 0.0 } else { stats.mask.selected as f64 / stats.mask.d as f64 }
}

/// Largest ratio of a density to an even spread, or its inverse, as a power of two: a whole number,
/// at most four.
fn reach(stats: &Stats) -> f64 {
    let densities = stats.matrix.density.iter().flatten().copied().flatten();
    let powers = densities.map(|d| (d / even(stats)).log2().abs()).filter(|power| power.is_finite());
    powers.fold(1.0, f64::max).ceil().min(4.0)
}

fn tile(task: &str, stats: &Stats, reach: f64) -> Markup {
    let matrix = &stats.matrix;
    let (left, top, width) = (58.0, 44.0, 34.0);
    let height = if matrix.layers.len() > 12 { 11.0 } else { 20.0 };
    let size = (left + width * matrix.roles.len() as f64, top + height * matrix.layers.len() as f64);
    let mut svg = Canvas::default();
    svg.name(0.0, 14.0, "head", 200.0, task);
    for (j, role) in matrix.roles.iter().enumerate() {
        let x = left + width * (j as f64 + 0.5);
        svg.text(x, top - 7.0, "small soft middle", if *role == "embed" { "emb" } else { role });
    }
    for (i, layer) in matrix.layers.iter().enumerate() {
        let y = top + height * i as f64;
        // Thin rows have room for every fourth number.
        if height > 12.0 || i % 4 == 0 || layer == OUTSIDE {
            svg.name(left - 6.0, y + height / 2.0 + 4.0, "small soft end", left - 8.0, layer);
        }
        for (j, role) in matrix.roles.iter().enumerate() {
            if matrix.elements[i][j] == 0 {
                continue;
            }
            let place = if layer == OUTSIDE { "outside the layers".to_owned() } else { format!("layer {layer}") };
            let (class, share) = match matrix.density[i][j] {
                Some(d) => (diverging(if d > 0.0 { (d / even(stats)).log2() } else { f64::MIN }, reach), percent(d)),
                None => ("none".to_owned(), "left out of D".to_owned()),
            };
            let title = format!("{place}, {role}: {share} ({} of {})", matrix.selected[i][j], matrix.elements[i][j]);
            svg.rect((left + width * j as f64, y, width - 1.0, height - 1.0), &class, &title);
        }
    }
    let densest = stats.roles.iter().max_by(|a, b| a.density.total_cmp(&b.density)).map_or("", |r| &r.name);
    let label = format!("Density of the core region of {task} by layer and role; densest role: {densest}");
    picture(svg, (size.0.max(220.0), size.1 + 2.0), &label)
}

fn numbers(task: &str, stats: &Stats) -> Table {
    let matrix = &stats.matrix;
    let header: Vec<String> = ["layer".to_owned()]
        .into_iter()
        .chain(matrix.roles.iter().map(|r| (*r).to_owned()))
        .chain(["all".to_owned()])
        .collect();
    let mut table = Table::new(&format!("{task}: share of the elements that belong to the core region"), &header);
    let cell = |d: &Option<f64>| d.map_or("–".to_owned(), percent);
    for (i, layer) in matrix.layers.iter().enumerate() {
        let cells = matrix.density[i].iter().map(cell);
        let row: Vec<String> =
            [layer.clone()].into_iter().chain(cells).chain([percent(stats.layers[i].density)]).collect();
        table.row(&row);
    }
    let all = stats.roles.iter().map(|role| percent(role.density));
    let row: Vec<String> = ["all".to_owned()].into_iter().chain(all).chain([percent(even(stats))]).collect();
    table.row(&row);
    table
}

/// A number to four decimals, without trailing zeros; numbers below 0.001 with all digits.
fn short(value: f64) -> String {
    let text = format!("{value:.4}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if value < 1e-3 { value.to_string() } else { text.to_owned() }
}

/// A share in percent.
fn percent(share: f64) -> String {
    format!("{:.3} %", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use super::short;

    #[test]
    fn percents_have_no_more_places_than_a_reader_needs() {
        let found = [1.0, 0.1, 10.0, 9.386322463768115, 0.0005].map(short);
        assert_eq!(found, ["1", "0.1", "10", "9.3863", "0.0005"]);
    }
}
