//! report.html through an HTML parser: its content, the numbers behind every picture, and no
//! content that can act.

use crate::support;
use std::fs;

use crate::support::{Folder, HOSTILE, common, read};
use clap::Parser;
use cpift_report::{ReportArgs, report};
use scraper::{ElementRef, Html, Selector};
use serde_json::{Value, json};

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: ReportArgs,
}

fn text_of(f: &Folder, more: &[&str]) -> String {
    let run = f.dir.path().to_str().unwrap();
    let line = Line::parse_from(["report", run, "--resamples", "200"].iter().chain(more));
    report(&line.args, &common(true)).unwrap();
    read(&f.path("report.html"))
}

fn select<'a>(html: &'a Html, css: &str) -> Vec<ElementRef<'a>> {
    html.select(&Selector::parse(css).unwrap()).collect()
}

fn text(element: ElementRef<'_>) -> String {
    element.text().collect()
}

/// The section with this id on its heading.
fn section<'a>(html: &'a Html, id: &str) -> ElementRef<'a> {
    select(html, &format!("section[aria-labelledby='{id}']"))[0]
}

#[test]
fn every_picture_has_a_name_and_its_numbers_in_a_table() {
    let f = Folder::whole();
    f.add_experiments();
    let page = text_of(&f, &[]);
    let html = Html::parse_document(&page);
    // All tasks and each of two; a sweep; losses and gains.
    for (id, pictures) in
        [("experiments", 3 + 1 + 1), ("seesaw", 2), ("overlap", 1), ("density", 2), ("training", 2), ("forgetting", 1)]
    {
        let svg = Selector::parse("figure svg[role=img]").unwrap();
        assert_eq!(section(&html, id).select(&svg).count(), pictures, "{id}");
    }
    assert_eq!(select(&html, "svg").len(), select(&html, "figure svg").len());
    for svg in select(&html, "svg") {
        assert!(!svg.value().attr("aria-label").unwrap().is_empty());
    }
    let table = Selector::parse("details table caption").unwrap();
    for figure in select(&html, "figure") {
        assert!(figure.select(&table).next().is_some(), "{}", figure.html());
    }
    assert_eq!(select(&html, "table").len(), select(&html, "table caption").len());
}

#[test]
fn the_sections_are_landmarks_that_the_navigation_leads_to() {
    let page = text_of(&Folder::whole(), &[]);
    let html = Html::parse_document(&page);
    assert!(html.errors.is_empty(), "{:?}", html.errors);
    let links: Vec<&str> = select(&html, "nav[aria-label] a").iter().map(|a| a.value().attr("href").unwrap()).collect();
    let ids: Vec<String> =
        select(&html, "main section h2").iter().map(|h| format!("#{}", h.value().attr("id").unwrap())).collect();
    assert_eq!(links, ids);
    assert_eq!(ids.len(), 9, "no experiments, no section of them");
    assert_eq!((select(&html, "h1").len(), select(&html, "html[lang=en]").len()), (1, 1));
    assert_eq!(select(&html, "a.skip[href='#content']").len(), 1);
    // Boxes that scroll are reached by keyboard and have a name.
    for region in select(&html, ".scroll") {
        assert_eq!(region.value().attr("tabindex"), Some("0"));
        assert!(region.value().attr("aria-label").is_some());
    }
}

#[test]
fn what_a_model_wrote_is_text_and_nothing_else() {
    let f = Folder::whole();
    f.add_experiments();
    let page = text_of(&f, &[]);
    // For scripts/check-report.sh, which opens it in a browser.
    std::fs::write(concat!(env!("CARGO_TARGET_TMPDIR"), "/report.html"), &page).unwrap();
    let html = Html::parse_document(&page);
    assert_eq!(select(&html, "script, img, iframe, link, object, embed, form, base, style ~ style").len(), 0);
    for element in html.tree.nodes().filter_map(|node| node.value().as_element()) {
        for (name, value) in element.attrs() {
            assert!(!name.starts_with("on"), "{name}={value}");
            assert!(!matches!(name, "src" | "style" | "srcset" | "action"), "{name}={value}");
            assert!(name != "href" || value.starts_with('#'), "{name}={value}");
        }
    }
    let policy = select(&html, "meta[http-equiv='Content-Security-Policy']")[0].value().attr("content").unwrap();
    assert!(
        policy.starts_with("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
            && !policy.contains("script")
    );
    // The page's own markup links to no other place; the address in the hostile row is text.
    assert!(!include_str!("../../src/style.css").contains("url(") && !page.contains("@import"));
    let outputs: Vec<String> =
        section(&html, "outputs").select(&Selector::parse("td pre").unwrap()).map(text).collect();
    let shown = HOSTILE.replace('\u{1b}', "␛").replace('\0', "␀").replace('\u{202e}', "⟨U+202E⟩");
    assert!(outputs.len() >= 4 && outputs.iter().all(|o| *o == shown), "{outputs:?}");
    assert!(!page.chars().any(|c| c.is_control() && c != '\n'), "no control character is left");
}

#[test]
fn the_summary_names_the_best_model_what_it_lost_and_its_cost() {
    let f = Folder::whole();
    let record = |name: &str, inputs: &[&str], output: &str, tokens: u64, seconds: f64| {
        let inputs: serde_json::Map<String, Value> =
            inputs.iter().map(|digest| ((*digest).to_owned(), json!({"path": "x", "digest": digest}))).collect();
        let record = json!({"format_version": 1, "stage": "cpift-train", "version": "0.1.0", "arguments": [],
            "inputs": inputs, "facts": {"tokens": tokens}, "output": {"blake3": output, "files": []}, "host": "here",
            "started_unix": 1, "seconds": seconds});
        f.write(&format!("{name}/cpift.json"), &record.to_string());
    };
    let digest = |i: u8| format!("{i:02x}").repeat(32);
    let [probe, first, second, last] = [1, 2, 3, 4].map(digest);
    record("probes/copy", &[], &probe, 1000, 10.0);
    record("first", &[&probe], &first, 0, 1.0);
    record("second", &[&probe], &second, 500, 70.0);
    // Both of its inputs come from one probe, which counts once.
    record("cpi-ft", &[&first, &second], &last, 20_000, 3600.0);
    let page = text_of(&f, &[]);
    let html = Html::parse_document(&page);
    let summary = section(&html, "summary");
    let words = text(summary);
    for part in
        ["cpi-ft has the highest ANS, 6.25; base follows with 5.00: −1.25 [", "contains 0, so these rows do not decide"]
    {
        assert!(words.contains(part), "{part}: {words}");
    }
    let rows: Vec<Vec<String>> = summary
        .select(&Selector::parse("tbody tr").unwrap())
        .map(|row| row.select(&Selector::parse("th, td").unwrap()).map(text).collect())
        .collect();
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[0][..3], ["cpi-ft", "6.25", "–"], "{rows:?}");
    assert!(rows[0][3].starts_with("pick −25.0 ["), "{rows:?}");
    assert_eq!(rows[0][4..], ["21,500", "1 h 1 min"]);
    assert_eq!((rows[1][0].as_str(), &rows[1][3..]), ("base", &["–", "–", "–"].map(str::to_owned)[..]));
    let first_section = select(&html, "main section h2")[0].value().attr("id");
    assert_eq!(first_section, Some("summary"));
}

#[test]
fn figures_stand_where_they_belong() {
    let page = text_of(&Folder::whole(), &[]);
    let html = Html::parse_document(&page);
    let scores = text(section(&html, "scores"));
    for part in ["75.0 ± 25.0", "+50.0 [", "10 x metric", "200 resamples, seed 0"] {
        assert!(scores.contains(part), "{part}: {scores}");
    }
    // The best of copy is cpi-ft's, of pick the base's.
    let best: Vec<String> = section(&html, "scores").select(&Selector::parse("td strong").unwrap()).map(text).collect();
    assert_eq!(best, ["75.0 ± 25.0", "75.0 ± 25.0", "6.25"]);
    let seesaw = section(&html, "seesaw");
    let bars = |class: &str| seesaw.select(&Selector::parse(&format!("rect.{class}")).unwrap()).count();
    assert_eq!((bars("gain"), bars("loss")), (1, 1));
    let overlap = text(section(&html, "overlap"));
    assert!(overlap.contains("2 groups of 2 tasks"), "{overlap}");
    let density = text(section(&html, "density"));
    assert!(density.contains("share of the elements") && density.contains("20.0"), "{density}");
    // pick was at 1.0 after its own stage and at 2.25 after copy's: 1.25 is forgotten.
    let row = section(&html, "forgetting").select(&Selector::parse("tbody tr").unwrap()).map(text).nth(1).unwrap();
    assert_eq!(row, "pick1.00002.25001.2500");
    let commands = Selector::parse("#provenance ~ details pre").unwrap();
    let commands: Vec<String> = html.select(&commands).map(text).collect();
    assert_eq!(commands, [r"cpift-train run --note 'it'\''s <b>'"; 2]);
}

#[test]
fn what_is_missing_is_said() {
    let f = Folder::new();
    f.score("base", &[("copy", &[0.0, 1.0])]);
    let page = text_of(&f, &[]);
    let html = Html::parse_document(&page);
    let said: Vec<String> = select(&html, ".missing").into_iter().map(text).collect();
    for part in
        ["Only base was scored", "No groups.json", "No masks", "No metrics.jsonl", "over two stages", "No cpift.json"]
    {
        assert!(said.iter().any(|s| s.contains(part)), "{part}: {said:?}");
    }
    fs::remove_dir_all(f.path("scores/base")).unwrap();
    assert!(text_of(&f, &[]).contains("No scores"));
    fs::write(f.path("groups.json"), "{}").unwrap();
    let page = text_of(&f, &[]);
    assert!(page.contains("This section cannot be shown") && page.contains("groups.json"), "{page}");
}

#[test]
fn the_same_files_give_the_same_bytes() {
    let f = Folder::whole();
    let first = text_of(&f, &[]);
    assert!(first == text_of(&f, &[]));
    assert!(first != text_of(&f, &["--seed", "1"]));
}

#[test]
fn an_existing_page_and_a_folder_of_something_else_are_refused() {
    let f = Folder::whole();
    text_of(&f, &[]);
    let parse = |path: &str| Line::parse_from(["report", path]).args;
    let error = report(&parse(f.dir.path().to_str().unwrap()), &common(false)).unwrap_err().to_string();
    assert!(error.contains("report.html") && error.contains("--force"), "{error}");
    let other = tempfile::tempdir().unwrap();
    let error = report(&parse(other.path().to_str().unwrap()), &common(false)).unwrap_err().to_string();
    assert!(error.contains("not the directory of a run") && error.contains("RUN="), "{error}");
}

#[test]
fn experiments_are_a_section_of_their_own() {
    let f = Folder::whole();
    f.add_experiments();
    f.write("experiments/4-broken.json", "{}");
    f.write("experiments/notes.txt", "no experiment");
    let page = text_of(&f, &[]);
    let html = Html::parse_document(&page);
    assert!(html.errors.is_empty(), "{:?}", html.errors);
    let links: Vec<&str> = select(&html, "nav[aria-label] a").iter().map(|a| a.value().attr("href").unwrap()).collect();
    assert_eq!((&links[..2], links.len()), (&["#summary", "#experiments"][..], 10));
    let part = section(&html, "experiments");
    let of = |css: &str| part.select(&Selector::parse(css).unwrap()).map(text).collect::<Vec<String>>();
    let titles = ["The 1-methods experiment", "The 2-sweep experiment", "The 3-forgetting experiment", "4-broken.json"];
    assert_eq!(of("h3"), titles);
    assert!(of(".missing")[0].contains("4-broken.json") && of(".missing").len() == 1, "{:?}", of(".missing"));
    // cpi-ft on copy: 24, 22 and 22 rows of 40.
    let best = of("td strong");
    assert!(best.contains(&"56.7 ± 2.9".to_owned()), "{best:?}");
    // Two methods besides the baseline, for all tasks and each; three places on two lines.
    assert_eq!((of("svg circle[class=s0]").len(), of("svg path[class^=s]").len()), (2 * 3, 2));
    assert_eq!((of("svg circle").len(), of("svg rect").len()), (2 * 3 + 2 * 3, 2 * 2));
    let svg = Selector::parse("svg").unwrap();
    let labels: Vec<&str> = part.select(&svg).map(|svg| svg.value().attr("aria-label").unwrap()).collect();
    assert!(labels[0].starts_with("mean of the tasks, mean against full-sft: cpi-ft +"), "{labels:?}");
    assert!(labels[3].contains("by p (%). cpi-ft: ") && labels[3].contains(" at 0.1, "), "{labels:?}");
    assert!(labels[4].contains("full-sft ΔA −"), "{labels:?}");
}

#[test]
fn a_run_of_experiments_alone_is_a_run() {
    let f = Folder::new();
    f.add_experiments();
    let page = text_of(&f, &[]);
    let html = Html::parse_document(&page);
    assert_eq!(select(&html, "main section").len(), 9);
    let said: Vec<String> = select(&html, ".missing").into_iter().map(text).collect();
    for part in ["No scores", "No groups.json", "No masks", "No metrics.jsonl", "over two stages", "No cpift.json"] {
        assert!(said.iter().any(|s| s.contains(part)), "{part}: {said:?}");
    }
}

/// The rows of the first table of scores, and the list of scores that are in no table.
fn scored(f: &Folder, more: &[&str]) -> (Vec<String>, Vec<String>) {
    let page = text_of(f, more);
    let html = Html::parse_document(&page);
    let scores = section(&html, "scores");
    assert_eq!(scores.select(&Selector::parse(".missing").unwrap()).count(), 0, "{}", text(scores));
    let of = |css: &str| scores.select(&Selector::parse(css).unwrap()).map(text).collect::<Vec<_>>();
    let mut rows = of("table tbody th");
    rows.truncate(rows.len() / 2);
    (rows, of("ul.left-out li"))
}

#[test]
fn scores_that_cannot_be_compared_are_listed_and_the_others_shown() {
    let f = Folder::whole();
    for name in ["older", "other", "short"] {
        f.score(name, &[("copy", &[0.0; 4]), ("pick", &[0.0; 4])]);
    }
    f.score("alone", &[("copy", &[0.0; 4])]);
    f.edit("older", |scores| scores["format_version"] = 0.into());
    f.edit("other", |scores| scores["tasks"][1]["eval_digest"] = "ab".repeat(32).into());
    f.edit("short", |scores| scores["tasks"][0]["settings"]["rows"] = 2.into());
    let (rows, others) = scored(&f, &[]);
    assert_eq!(rows, ["base", "cpi-ft"]);
    assert_eq!(others.len(), 4, "{others:?}");
    for (other, part) in others.iter().zip([
        "older: ",
        "alone: differs from base in the tasks: ",
        "other: differs from base in the evaluation file of pick",
        "short: differs from base in the setting rows of copy",
    ]) {
        assert!(other.starts_with(part), "{part}: {other}");
    }
    assert!(others[0].contains("found: 0") && others[1].contains("copy against copy, pick"), "{others:?}");
    // Other scores are comparable with another baseline.
    assert_eq!(scored(&f, &["--baseline", "short"]).0, ["short"]);
    // If none are comparable with base, the largest comparable set is shown.
    f.edit("base", |scores| scores["tasks"][0]["settings"]["rows"] = 3.into());
    f.score("fused", &[("copy", &[0.0; 4]), ("pick", &[0.0; 4])]);
    assert_eq!(scored(&f, &[]).0, ["fused", "cpi-ft"]);
    let page = text_of(&f, &["--baseline", "base"]);
    assert!(
        page.contains("No other scores can be compared with those of base") && !page.contains("Only base"),
        "{page}"
    );
}

#[test]
fn scores_of_another_version_alone_are_said_to_be_unreadable() {
    let f = Folder::new();
    f.score("base", &[("copy", &[0.0, 1.0])]);
    f.edit("base", |scores| scores["format_version"] = 9.into());
    let page = text_of(&f, &[]);
    assert!(page.contains("No scores: none of them can be read.") && page.contains("found: 9"), "{page}");
}

#[test]
fn a_baseline_without_scores_is_a_usage_error() {
    let f = Folder::whole();
    let run = f.dir.path().to_str().unwrap();
    for (more, part) in
        [(["--baseline", "typo"], "not among the scores under"), (["--resamples", "0"], "--resamples must be")]
    {
        let line = Line::parse_from(["report", run].iter().chain(&more));
        let error = report(&line.args, &common(true)).unwrap_err();
        assert!(error.is::<cpift_core::Usage>() && error.to_string().contains(part), "{error}");
        assert!(part.starts_with("--") || error.to_string().contains("base, cpi-ft"), "{error}");
    }
    assert!(!f.path("report.html").exists());
}

#[test]
fn figures_of_other_tasks_are_no_gain() {
    let f = Folder::new();
    let unjudged = || {
        let mut score = support::task_score("chat", None);
        score.settings.insert("judge".into(), serde_json::Value::Null);
        vec![score]
    };
    f.write_scores("base", unjudged());
    f.write_scores("cpi-ft", unjudged());
    let page = text_of(&f, &[]);
    assert!(page.contains("No other model has a figure that base has too") && !page.contains("Only base"), "{page}");
}

#[test]
fn a_held_out_loss_that_is_not_finite_is_said() {
    let f = Folder::whole();
    let line = |stage: &str, copy: &str| {
        format!(
            "{{\"stage\": \"{stage}\", \"step\": 1, \"loss\": null, \"eval_loss\": {{\"copy\": {copy}, \"pick\": 1.0}}}}\n"
        )
    };
    f.write("multi-stage/metrics.jsonl", &(line("one", "2.5") + &line("two", "null")));
    let page = text_of(&f, &[]);
    let html = Html::parse_document(&page);
    assert!(text(section(&html, "training")).contains("copy not finite to not finite"), "{page}");
    let rows: Vec<String> =
        section(&html, "forgetting").select(&Selector::parse("tbody tr").unwrap()).map(text).collect();
    assert_eq!(rows, ["copy2.5000not finite–", "pick1.00001.00000.0000"]);
}

#[test]
fn a_heat_map_of_many_tasks_scrolls_in_its_box() {
    let f = Folder::whole();
    let names: Vec<String> = (0..20).map(|i| format!("task-{i}")).collect();
    let group: Vec<&str> = names.iter().map(String::as_str).collect();
    let mask = f.path("masks/copy.safetensors");
    let masks: Vec<(&str, &std::path::Path)> = names.iter().map(|name| (name.as_str(), mask.as_path())).collect();
    cpift_testkit::masks::write_groups(&f.path("groups.json"), &f.path("base-model"), &[&group], &masks);
    let page = text_of(&f, &[]);
    // For scripts/check-report.sh, which opens it in a browser.
    std::fs::write(concat!(env!("CARGO_TARGET_TMPDIR"), "/many-tasks.html"), &page).unwrap();
    let html = Html::parse_document(&page);
    let map = section(&html, "overlap");
    let svg = map.select(&Selector::parse(".scroll[tabindex='0'] > svg.whole").unwrap()).next().unwrap();
    let width: f64 = svg.value().attr("width").unwrap().parse().unwrap();
    assert!(width >= 20.0 * 44.0, "{width}");
    assert!(include_str!("../../src/style.css").contains("svg.whole { max-width: none }"));
}
