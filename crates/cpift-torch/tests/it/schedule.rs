//! Schedules against transformers, through the arguments that name them:
//! fixtures/golden/schedules.json, made by scripts/oracle/golden_schedules.py.

use std::path::Path;

use clap::Parser;
use cpift_torch::schedule::ScheduleArgs;
use serde_json::Value;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    schedule: ScheduleArgs,
}

fn parse(text: &str) -> ScheduleArgs {
    Line::try_parse_from(std::iter::once("test").chain(text.split_whitespace())).unwrap().schedule
}

fn refused(text: &str) -> String {
    let args = parse(text);
    args.check().and_then(|()| args.of("stage", 1.0, 10).map(drop)).unwrap_err().to_string()
}

#[test]
fn every_step_has_the_rate_of_transformers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden/schedules.json");
    let cases: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let mut names = std::collections::BTreeSet::new();
    for case in &cases {
        let name = case["name"].as_str().unwrap();
        names.insert(name);
        let mut text = format!("--lr_scheduler_type {name} --warmup_steps {}", case["warmup_steps"]);
        for (key, value) in case["parameters"].as_object().unwrap() {
            text += &format!(" --{key} {}", value.as_str().map_or_else(|| value.to_string(), str::to_owned));
        }
        let args = parse(&text);
        args.check().unwrap_or_else(|e| panic!("{text}: {e}"));
        let (peak, lrs) = (case["peak"].as_f64().unwrap(), case["lrs"].as_array().unwrap());
        let schedule = args.of("stage", peak, lrs.len()).unwrap();
        for (step, expected) in lrs.iter().map(|lr| lr.as_f64().unwrap()).enumerate() {
            let found = schedule.rate(step);
            // The cosine of another libm may differ in its last bit.
            assert!((found - expected).abs() <= 1e-15 * peak, "{text}, step {step}: {found}, expected {expected}");
        }
    }
    assert_eq!(names.len(), 6, "{names:?}");
    assert!(cases.len() > 35, "{} cases", cases.len());
}

#[test]
fn a_warm_up_by_ratio_is_shorter_than_the_stage() {
    let warmup = |text: &str, total: usize| parse(text).of("stage", 1.0, total).unwrap().warmup_steps;
    assert_eq!([1, 2, 33, 34, 100].map(|total| warmup("", total)), [0, 1, 1, 2, 3]);
    assert_eq!(warmup("--warmup-ratio 1", 10), 9);
    assert_eq!(warmup("--warmup-steps 0", 10), 0);
    assert_eq!(warmup("--lr-scheduler constant --warmup-ratio 0.5", 10), 0);
    let stable = "--lr-scheduler warmup_stable_decay --num-decay-steps 8 --warmup-ratio 0.5";
    assert_eq!(warmup(stable, 10), 2, "the decay has its steps");
}

#[test]
fn a_schedule_that_fits_no_stage_is_refused() {
    assert!(refused("--warmup-steps 10").contains("--warmup-steps 10 with the 10 steps of stage"));
    let stable = "--lr-scheduler warmup_stable_decay";
    assert!(refused(&format!("{stable} --num-decay-steps 11")).contains("--num-decay-steps 11"));
    assert!(refused(&format!("{stable} --num-decay-steps 8 --warmup-steps 3")).contains("after 3 of warm-up"));
    assert!(refused(stable).contains("needs --num-decay-steps"));
    assert!(refused("--lr-scheduler cosine_with_min_lr").contains("needs --min-lr-ratio"));
    assert!(refused("--num-decay-steps 3").contains("warmup_stable_decay"));
    assert!(refused("--decay-type linear").contains("warmup_stable_decay"));
    assert!(refused("--lr-scheduler linear --min-lr-ratio 0.1").contains("cosine_with_min_lr"));
    assert!(refused("--lr-scheduler constant --warmup-steps 2").contains("constant_with_warmup"));
    assert!(refused("--lr-scheduler cosine_with_min_lr --min-lr-ratio 1.5").contains("0 to 1"));
}
