//! An experiment as Markdown, CSV and JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::{Cell, Column, Experiment, Forgetting, Method, Outcome, Seeds, Spread};
use crate::comparison::Delta;
use crate::text::{Bold, aligned, quoted, visible};
use crate::unit::ANS_FORMULA;

/// Title, question, tables, and what was done.
pub fn markdown(experiment: &Experiment, bold: Bold) -> String {
    let mut out = format!("## {}\n\n{}\n", visible(&experiment.head.title), visible(&experiment.head.question));
    for sheet in experiment.sheets() {
        let cells = |line: &[(String, bool)]| line.iter().map(|(text, best)| (visible(text), *best)).collect();
        let header: Vec<(String, bool)> = sheet.header.iter().map(|name| (visible(name), false)).collect();
        let lines: Vec<Vec<(String, bool)>> =
            [header].into_iter().chain(sheet.lines.iter().map(|line| cells(line))).collect();
        let _ = writeln!(out, "\n{}:\n\n{}", visible(&sheet.caption), aligned(&lines, bold).trim_end());
    }
    out.push('\n');
    for words in experiment.words() {
        let _ = writeln!(out, "{}", visible(&words));
    }
    out
}

/// One line a method and figure, or a method and pair of tasks; values unrounded.
pub fn csv(experiment: &Experiment) -> String {
    match &experiment.outcome {
        Outcome::Scores(seeds) => scores_csv(seeds),
        Outcome::Forgetting(forgetting) => forgetting_csv(forgetting),
    }
}

fn scores_csv(seeds: &Seeds) -> String {
    let mut out =
        "method,series,x,tokens,task,figure,mean,sd,seeds,best,delta,delta_low,delta_high,paired_rows\n".to_owned();
    for column in seeds.all_columns() {
        for (i, row) in seeds.rows.iter().enumerate() {
            let (name, series) = (quoted(&row.name), quoted(row.series.as_deref().unwrap_or("")));
            let (x, tokens) = (number(row.x), row.tokens.map_or(String::new(), |n| n.to_string()));
            let (task, figure) = (quoted(column.task.as_deref().unwrap_or("")), quoted(&column.figure));
            let cell = match &column.cells[i] {
                Cell::Value(spread, best) => {
                    format!("{},{},{},{best}", spread.mean(), number(spread.sd()), spread.values.len())
                }
                Cell::Without(text) => format!("{},,,", if text == "-" { "" } else { text }),
            };
            let delta = match column.deltas.get(i).and_then(Option::as_ref) {
                Some(Delta { value, interval: Some((low, high)), rows, .. }) => {
                    format!("{value},{low},{high},{}", if *rows > 0 { rows.to_string() } else { String::new() })
                }
                Some(Delta { value, .. }) => format!("{value},,,"),
                None => ",,,".to_owned(),
            };
            let _ = writeln!(out, "{name},{series},{x},{tokens},{task},{figure},{cell},{delta}");
        }
    }
    out
}

fn number(value: Option<f64>) -> String {
    value.map_or(String::new(), |value| value.to_string())
}

fn forgetting_csv(forgetting: &Forgetting) -> String {
    let mut out = "method,first,second,runs,delta_a,delta_a_sd,delta_b,delta_b_sd,cut,cut_low,cut_high\n".to_owned();
    let mut line = |method: &Method, pair: [&str; 2], first: &Spread, second: &Spread, cut: &str| {
        let changes = [first, second].map(|spread| format!("{},{}", spread.mean(), number(spread.sd()))).join(",");
        let [a, b] = pair.map(quoted);
        let _ = writeln!(out, "{},{a},{b},{},{changes},{cut}", quoted(&method.name), first.values.len());
    };
    for method in &forgetting.methods {
        let cut = method.cut.as_ref().map_or(",,".to_owned(), |cut| {
            let (low, high) = cut.interval.unzip();
            format!("{},{},{}", cut.value, number(low), number(high))
        });
        line(method, [""; 2], &method.first, &method.second, &cut);
        for pair in forgetting.pairs.iter().filter(|pair| method.of_pair(pair).next().is_some()) {
            let spread =
                |of: fn(&super::forgetting::Change) -> f64| Spread { values: method.of_pair(pair).map(of).collect() };
            line(method, [&pair.0, &pair.1], &spread(|c| c.first), &spread(|c| c.second), ",,");
        }
    }
    out
}

/// All of it, with the values of every seed.
pub fn json(experiment: &Experiment) -> Value {
    let head = &experiment.head;
    let mut out = json!({"name": head.name, "title": head.title, "question": head.question, "baseline": head.baseline,
        "resamples": experiment.question.resamples, "seed": experiment.question.seed, "notes": experiment.words()});
    let (kind, rows) = match &experiment.outcome {
        Outcome::Scores(seeds) => {
            out["seeds"] = json!(seeds.seeds);
            out["axis"] = json!(seeds.axis.as_ref().map(|axis| json!({"label": axis.label, "log": axis.log})));
            out["ans_formula"] = json!(ANS_FORMULA);
            ("scores", (0..seeds.rows.len()).map(|row| score_row(seeds, row)).collect::<Vec<_>>())
        }
        Outcome::Forgetting(forgetting) => {
            out["unit"] = json!(forgetting.unit.symbol());
            ("forgetting", forgetting.methods.iter().map(method).collect())
        }
    };
    (out["kind"], out["rows"]) = (json!(kind), json!(rows));
    out
}

fn spread(spread: &Spread) -> Value {
    json!({"values": spread.values, "mean": spread.mean(), "sd": spread.sd()})
}

fn interval(ends: Option<(f64, f64)>) -> Value {
    json!(ends.map(|(low, high)| [low, high]))
}

fn score_row(seeds: &Seeds, row: usize) -> Value {
    let figure = |column: &Column| {
        let Cell::Value(values, best) = &column.cells[row] else { return None };
        let delta = column.deltas.get(row).and_then(Option::as_ref);
        let delta = delta.map(|d| json!({"value": d.value, "interval": interval(d.interval), "paired_rows": d.rows}));
        let mut out = spread(values);
        (out["task"], out["figure"], out["best"], out["delta"]) =
            (json!(column.task), json!(column.figure), json!(best), json!(delta));
        Some(out)
    };
    let of = &seeds.rows[row];
    let runs: Vec<&str> = of.runs.iter().map(|run| run.0.as_str()).collect();
    json!({"name": of.name, "series": of.series, "x": of.x, "tokens": of.tokens, "note": of.note, "runs": runs,
        "figures": seeds.all_columns().filter_map(figure).collect::<Vec<_>>()})
}

fn method(method: &Method) -> Value {
    let change = |c: &super::forgetting::Change| json!({"first": c.pair.0, "second": c.pair.1, "delta_a": c.first, "delta_b": c.second});
    let cut = method.cut.as_ref().map(|cut| json!({"value": cut.value, "interval": interval(cut.interval)}));
    json!({"name": method.name, "delta_a": spread(&method.first), "delta_b": spread(&method.second),
        "cut": cut, "pairs": method.changes.iter().map(change).collect::<Vec<_>>()})
}
