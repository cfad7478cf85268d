//! The heat map of groups.json as an SVG: readable on its own, in light and in dark.

use std::fmt::Write;

use cpift_core::groups::{Groups, TauMode};

/// Side of a cell, in pixels.
const CELL: usize = 64;

const STYLE: &str = "
  text { font: 13px system-ui, sans-serif; fill: #1b1f24 }
  .paper { fill: #ffffff } .cell { fill: #1f5fbf } .own { fill: #dfe3e8 } .hot { fill: #ffffff }
  .frame { fill: none; stroke: #b4451f; stroke-width: 3 }
  .value { text-anchor: middle } .row { text-anchor: end } .column { text-anchor: start }
  .head { font-size: 16px; font-weight: 600 } .small { font-size: 12px }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6e9ed } .paper { fill: #14181d } .cell { fill: #6fa8ff } .own { fill: #313841 } .hot { fill: #0b1016 }
    .frame { stroke: #ff9a6b }
  }
";

/// The similarities with rows and columns in training order, each group framed.
pub fn svg(groups: &Groups) -> String {
    let order: Vec<usize> =
        groups.task_order().iter().filter_map(|t| groups.tasks.iter().position(|x| x == t)).collect();
    let n = order.len();
    let longest = groups.tasks.iter().map(|t| t.chars().count()).max().unwrap_or(0);
    // Room for labels, at 8 pixels a character; column labels lean, so they need less height and some room on the right.
    let (left, top) = (24 + 8 * longest, 76 + 6 * longest);
    let side = n * CELL;
    let lines = notes(groups);
    let width = (left + side + 24 + 6 * longest).max(560);
    let height = top + side + 32 + 20 * lines.len();
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         role=\"img\" aria-labelledby=\"title\">\n<title id=\"title\">Jaccard similarity of core regions: {}</title>\n\
         <style>{STYLE}</style>\n<rect class=\"paper\" width=\"100%\" height=\"100%\"/>\n\
         <text class=\"head\" x=\"16\" y=\"30\">Jaccard similarity of core regions</text>\n",
        escape(&groups.tasks.join(", "))
    );
    labels(&mut out, groups, &order, (left, top));
    cells(&mut out, groups, &order, (left, top));
    frames(&mut out, groups, (left, top));
    for (i, line) in lines.iter().enumerate() {
        let y = top + side + 30 + 20 * i;
        let _ = writeln!(out, "<text class=\"small\" x=\"16\" y=\"{y}\">{}</text>", escape(line));
    }
    out + "</svg>\n"
}

fn labels(out: &mut String, groups: &Groups, order: &[usize], (left, top): (usize, usize)) {
    for (i, &task) in order.iter().enumerate() {
        let (name, middle) = (escape(&groups.tasks[task]), i * CELL + CELL / 2);
        let (x, y) = (left + middle, top + middle + 5);
        let _ = writeln!(out, "<text class=\"row\" x=\"{}\" y=\"{y}\">{name}</text>", left - 8);
        let _ =
            writeln!(out, "<text class=\"column\" transform=\"translate({x} {}) rotate(-45)\">{name}</text>", top - 8);
    }
}

fn cells(out: &mut String, groups: &Groups, order: &[usize], (left, top): (usize, usize)) {
    let largest = largest_pair(groups);
    for (i, &a) in order.iter().enumerate() {
        for (j, &b) in order.iter().enumerate() {
            let (x, y) = (left + j * CELL, top + i * CELL);
            let (s, chance) = (groups.jaccard[a][b], groups.chance[a][b]);
            let heat = if largest > 0.0 { s / largest } else { 0.0 };
            let (class, opacity) = if a == b { ("own", 1.0) } else { ("cell", heat) };
            let hot = if a != b && heat > 0.55 { " hot" } else { "" };
            let names = escape(&format!("{} and {}: {s:.6}, chance {chance:.6}", groups.tasks[a], groups.tasks[b]));
            let _ = writeln!(
                out,
                "<g><title>{names}</title><rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{CELL}\" \
                 height=\"{CELL}\" fill-opacity=\"{opacity:.3}\"/><text class=\"value{hot}\" x=\"{}\" y=\"{}\">{}</text></g>",
                x + CELL / 2,
                y + CELL / 2 + 5,
                if a == b { "1".to_owned() } else { format!("{s:.3}") }
            );
        }
    }
}

fn frames(out: &mut String, groups: &Groups, (left, top): (usize, usize)) {
    let mut start = 0;
    for group in &groups.groups {
        let (offset, side) = (start * CELL, group.len() * CELL);
        let _ = writeln!(
            out,
            "<rect class=\"frame\" x=\"{}\" y=\"{}\" width=\"{side}\" height=\"{side}\"/>",
            left + offset,
            top + offset
        );
        start += group.len();
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
    let mode = if groups.tau_mode == TauMode::Auto { ", chosen as the most stable" } else { "" };
    vec![
        format!("{chance}; the strongest colour is {:.4}", largest_pair(groups)),
        format!(
            "τ = {:.4}{mode}: {} group{} (framed), {} order, first to last",
            groups.tau,
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

/// Text as it may stand in XML; characters XML cannot hold are replaced.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped() {
        assert_eq!(escape("a<b>&\"c\"\u{1}"), "a&lt;b&gt;&amp;&quot;c&quot;\u{fffd}");
    }
}
