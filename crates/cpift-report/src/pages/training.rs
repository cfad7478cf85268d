//! Training: loss curves of every probe and model, and held-out losses over the stages, which show
//! forgetting.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use cpift_core::format::svg::Canvas;
use cpift_core::{BadInput, files};
use maud::{Markup, html};
use serde::Deserialize;

use super::folder::models;
use crate::html::{Axis, Table, WIDTH, figure, missing, picture, series, series_legend};

/// One line of metrics.jsonl: the metrics of a step, or held-out losses after a step.
#[derive(Deserialize)]
struct Line {
    #[serde(default)]
    stage: String,
    step: u64,
    #[serde(default)]
    loss: Option<f64>,
    #[serde(default)]
    tokens: Option<u64>,
    #[serde(default)]
    eval_loss: Option<HeldOut>,
}

/// Held-out losses by task; `None` for a loss that was not finite, for which JSON has no number.
type HeldOut = BTreeMap<String, Option<f64>>;

/// The metrics of one model.
struct Course {
    /// Path under the run's directory.
    name: String,
    stages: Vec<Stage>,
}

/// One stage of training. Its steps are counted from 1; `before` is the number of steps of earlier
/// stages.
struct Stage {
    label: String,
    before: u64,
    steps: u64,
    tokens: u64,
    losses: Vec<(u64, f64)>,
    held_out: Vec<(u64, HeldOut)>,
}

impl Course {
    fn read(folder: &Path, name: String) -> Result<Option<Self>> {
        let path = folder.join(&name).join("metrics.jsonl");
        if !path.is_file() {
            return Ok(None);
        }
        let mut stages: Vec<Stage> = Vec::new();
        for (i, line) in files::read_text(&path)?.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let line: Line = serde_json::from_str(line)
                .map_err(|e| BadInput::new(&path, format!("line {} holds no metrics of a step: {e}", i + 1)))?;
            if stages.last().is_none_or(|stage| stage.label != line.stage) {
                let before = stages.last().map_or(0, |s| s.before + s.steps);
                let label = line.stage.clone();
                stages.push(Stage { label, before, steps: 0, tokens: 0, losses: Vec::new(), held_out: Vec::new() });
            }
            if let Some(stage) = stages.last_mut() {
                stage.take(line);
            }
        }
        Ok((!stages.is_empty()).then_some(Self { name, stages }))
    }

    fn steps(&self) -> u64 {
        self.stages.last().map_or(0, |s| s.before + s.steps)
    }

    /// The held-out losses of one task, by step of the model.
    fn held_out(&self, task: &str) -> Vec<(u64, f64)> {
        let of = |s: &Stage| -> Vec<(u64, f64)> {
            s.held_out.iter().filter_map(|(step, map)| Some((s.before + step, (*map.get(task)?)?))).collect()
        };
        self.stages.iter().flat_map(of).collect()
    }

    fn tasks(&self) -> impl Iterator<Item = &String> {
        self.stages.iter().flat_map(|s| &s.held_out).flat_map(|(_, map)| map.keys())
    }
}

impl Stage {
    fn take(&mut self, line: Line) {
        self.steps = self.steps.max(line.step);
        self.tokens = self.tokens.max(line.tokens.unwrap_or(0));
        self.losses.extend(line.loss.map(|loss| (line.step, loss)));
        self.held_out.extend(line.eval_loss.map(|map| (line.step, map)));
    }
}

fn courses(folder: &Path) -> Result<Vec<Course>> {
    models(folder)?.into_iter().filter_map(|name| Course::read(folder, name).transpose()).collect()
}

/// Colour of each task with held-out losses, by name.
fn colors(courses: &[Course]) -> BTreeMap<String, usize> {
    let mut tasks: Vec<&String> = courses.iter().flat_map(Course::tasks).collect();
    tasks.sort();
    tasks.dedup();
    tasks.into_iter().enumerate().map(|(i, task)| (task.clone(), i)).collect()
}

/// The section with the loss curves.
pub(crate) fn curves(folder: &Path) -> Result<Markup> {
    let courses = courses(folder)?;
    if courses.is_empty() {
        return Ok(missing("No metrics.jsonl in the directories of the probes and models."));
    }
    let colors = colors(&courses);
    let pictures: Vec<Markup> = courses.iter().map(|course| curve_tile(course, &colors)).collect();
    let header = ["model, stage", "steps", "tokens", "first loss", "last loss", "held-out loss, first to last"];
    let mut table = Table::new("Losses of every probe and model", &header.map(str::to_owned)).text_column(5);
    for (course, stage) in courses.iter().flat_map(|c| c.stages.iter().map(move |s| (c, s))) {
        let loss = |entry: Option<&(u64, f64)>| entry.map_or("–".to_owned(), |(_, loss)| format!("{loss:.4}"));
        let held_out: Vec<String> = colors.keys().filter_map(|task| held_out_text(stage, task)).collect();
        let held_out = if held_out.is_empty() { "–".to_owned() } else { held_out.join(", ") };
        let name = format!("{}, {}", course.name, stage.label);
        let (first, last) = (loss(stage.losses.first()), loss(stage.losses.last()));
        table.row(&[name, stage.steps.to_string(), stage.tokens.to_string(), first, last, held_out]);
    }
    let words = if colors.is_empty() {
        "Training loss by step (grey). No held-out losses: --eval-every N of cpift-probe and cpift-train writes them."
    } else {
        "Training loss by step (grey) and held-out loss by task (in colour, starting at the first evaluation)."
    };
    let caption = html! {
        @if !colors.is_empty() { (color_legend(&colors)) }
        (words) " Dotted lines: ends of stages."
    };
    Ok(figure(&pictures, &caption, &[table]))
}

fn color_legend(colors: &BTreeMap<String, usize>) -> Markup {
    series_legend(colors.iter().map(|(task, i)| (*i, task.as_str())))
}

fn held_out_text(stage: &Stage, task: &str) -> Option<String> {
    let values: Vec<Option<f64>> = stage.held_out.iter().filter_map(|(_, map)| map.get(task).copied()).collect();
    let (first, last) = (values.first()?, values.last()?);
    Some(format!("{task} {} to {}", loss_text(*first), loss_text(*last)))
}

fn loss_text(loss: Option<f64>) -> String {
    loss.map_or("not finite".to_owned(), |loss| format!("{loss:.4}"))
}

/// Width and height of a plot.
const SIZE: (f64, f64) = (WIDTH, 196.0);
/// Left, top, right and bottom of the area for lines.
const PLOT: (f64, f64, f64, f64) = (36.0, 28.0, 332.0, 160.0);
/// Largest number of points of a line; more could not be distinguished.
const POINTS: usize = 240;

/// An empty plot with its axes.
fn plot(head: &str, across: (u64, &str), top: f64) -> (Canvas, Axis, Axis) {
    let mut svg = Canvas::default();
    svg.name(0.0, 14.0, "head", SIZE.0, head);
    let y = Axis::new(0.0, top, (PLOT.3, PLOT.1), 4);
    for (value, text) in y.marks() {
        svg.line((PLOT.0, y.at(value)), (PLOT.2, y.at(value)), "grid");
        svg.text(PLOT.0 - 6.0, y.at(value) + 4.0, "small soft end", &text);
    }
    let x = Axis::exact(0.0, across.0 as f64, (PLOT.0, PLOT.2));
    svg.text(PLOT.2, PLOT.3 + 17.0, "small soft end", &format!("{} {}", across.0, across.1));
    (svg, x, y)
}

fn curve_tile(course: &Course, colors: &BTreeMap<String, usize>) -> Markup {
    let losses: Vec<(f64, f64)> =
        course.stages.iter().flat_map(|s| s.losses.iter().map(|(step, l)| ((s.before + step) as f64, *l))).collect();
    let losses = thinned(&losses);
    let held_out: Vec<(&String, Vec<(f64, f64)>)> = colors
        .keys()
        .map(|task| (task, course.held_out(task).into_iter().map(|(s, l)| (s as f64, l)).collect()))
        .collect();
    let all = losses.iter().chain(held_out.iter().flat_map(|(_, points)| points)).map(|(_, l)| *l);
    let top = all.filter(|l| l.is_finite()).fold(0.0, f64::max);
    let (mut svg, x, y) = plot(&course.name, (course.steps(), "steps"), top);
    for stage in &course.stages[1..] {
        let at = x.at(stage.before as f64);
        svg.line((at, PLOT.1), (at, PLOT.3), "mark");
    }
    let place =
        |points: &[(f64, f64)]| -> Vec<(f64, f64)> { points.iter().map(|(s, l)| (x.at(*s), y.at(*l))).collect() };
    svg.curve(&place(&losses), "train", &format!("{}: training loss", course.name));
    for (task, points) in held_out.iter().filter(|(_, points)| !points.is_empty()) {
        svg.curve(&place(points), &series(colors[*task]), &format!("held-out loss of {task}"));
    }
    let ends = |p: &[(f64, f64)]| {
        p.first().zip(p.last()).map_or(String::new(), |(a, b)| format!(", {:.3} to {:.3}", a.1, b.1))
    };
    picture(svg, SIZE, &format!("Loss of {} over {} steps{}", course.name, course.steps(), ends(&losses)))
}

/// At most [`POINTS`] points, each the mean of the same number of steps.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let size = points.len().div_ceil(POINTS).max(1);
    let mean =
        |chunk: &[(f64, f64)], of: fn(&(f64, f64)) -> f64| chunk.iter().map(of).sum::<f64>() / chunk.len() as f64;
    points.chunks(size).map(|chunk| (mean(chunk, |p| p.0), mean(chunk, |p| p.1))).collect()
}

/// The section with held-out losses at the end of every stage.
pub(crate) fn forgetting(folder: &Path) -> Result<Markup> {
    let courses: Vec<Course> = courses(folder)?
        .into_iter()
        .filter(|course| course.stages.iter().filter(|s| !s.held_out.is_empty()).count() > 1)
        .collect();
    if courses.is_empty() {
        return Ok(missing(
            "No model has held-out losses over two stages or more: cpift-train run --eval-every N with groups.json writes them.",
        ));
    }
    let colors = colors(&courses);
    let pictures: Vec<Markup> = courses.iter().map(|course| stage_tile(course, &colors)).collect();
    let tables: Vec<Table> = courses.iter().map(|course| stage_table(course, &colors)).collect();
    let caption = html! {
        (color_legend(&colors))
        "Held-out loss of every task at the end of each stage. A rising line is a task being forgotten."
    };
    Ok(figure(&pictures, &caption, &tables))
}

/// A task's last loss in every stage that has one, with the stage's number from 1.
fn ends(course: &Course, task: &str) -> Vec<(usize, Option<f64>)> {
    let last = |s: &Stage| s.held_out.iter().rev().find_map(|(_, map)| map.get(task).copied());
    course.stages.iter().enumerate().filter_map(|(k, s)| Some((k + 1, last(s)?))).collect()
}

fn stage_tile(course: &Course, colors: &BTreeMap<String, usize>) -> Markup {
    let finite = |task: &String| -> Vec<(usize, f64)> {
        ends(course, task).into_iter().filter_map(|(k, loss)| Some((k, loss?))).collect()
    };
    let all = colors.keys().flat_map(finite).map(|(_, loss)| loss);
    let (mut svg, _, y) = plot(&course.name, (course.stages.len() as u64, "stages"), all.fold(0.0, f64::max));
    let x = Axis::exact(1.0, course.stages.len() as f64, (PLOT.0 + 8.0, PLOT.2 - 8.0));
    for (task, color) in colors {
        let points: Vec<(f64, f64)> = finite(task).into_iter().map(|(k, l)| (x.at(k as f64), y.at(l))).collect();
        if points.is_empty() {
            continue;
        }
        svg.curve(&points, &series(*color), task);
        for ((k, loss), point) in finite(task).into_iter().zip(&points) {
            svg.dot(*point, &series(*color), &format!("{task} after stage {k}: {loss:.4}"));
        }
    }
    let stages = course.stages.len();
    picture(svg, SIZE, &format!("Held-out loss of every task at the end of {stages} stages of {}", course.name))
}

fn stage_table(course: &Course, colors: &BTreeMap<String, usize>) -> Table {
    let stages = course.stages.iter().map(|s| s.label.clone());
    let header: Vec<String> = ["task".to_owned()].into_iter().chain(stages).chain(["forgotten".to_owned()]).collect();
    let caption =
        format!("{}: held-out loss at the end of each stage; forgotten: the last less the lowest", course.name);
    let mut table = Table::new(&caption, &header);
    for task in colors.keys() {
        let ends = ends(course, task);
        let Some((_, last)) = ends.last() else { continue };
        let lowest = ends.iter().filter_map(|(_, loss)| *loss).fold(f64::INFINITY, f64::min);
        let of = |k: usize| ends.iter().find(|(stage, _)| *stage == k).map_or("–".to_owned(), |(_, l)| loss_text(*l));
        let forgotten = last.map_or("–".to_owned(), |last| format!("{:.4}", last - lowest));
        let cells = (1..=course.stages.len()).map(of);
        let row: Vec<String> = [task.clone()].into_iter().chain(cells).chain([forgotten]).collect();
        table.row(&row);
    }
    table
}
