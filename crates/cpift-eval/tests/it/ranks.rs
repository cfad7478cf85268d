//! Ranks share the rows of an evaluation: the output is that of one process, byte for byte.

use std::fs;

use crate::common::{Fixture, read_json};
use cpift_testkit::ranks::{Job, said};

fn arguments(f: &Fixture, out: &str, more: &[&str]) -> Vec<String> {
    let out = f.out(out);
    let fixed = ["run", "--model", f.model.to_str().unwrap(), "--tasks", f.tasks.to_str().unwrap()];
    let fixed = fixed.into_iter().chain(["--out", out.to_str().unwrap(), "--device", "cpu", "--threads", "1"]);
    fixed.chain(more.iter().copied()).map(str::to_owned).collect()
}

#[test]
fn ranks_score_what_one_process_scores() {
    let f = Fixture::new();
    for (batch, more) in [("2", &[][..]), ("1", &["--limit", "3"])] {
        let more = [&["--batch-size", batch][..], more].concat();
        f.eval("alone", &more).ok();
        for world in [2, 3] {
            Job::start(env!("CARGO_BIN_EXE_cpift-eval"), world, |_| arguments(&f, "shared", &more)).succeed();
            let read = |out: &str, name: &str| fs::read_to_string(f.out(out).join(name)).unwrap();
            assert_eq!(read("alone", "outputs.jsonl"), read("shared", "outputs.jsonl"), "{world} ranks");
            assert_eq!(read_json(&f.out("alone").join("scores.json")), read_json(&f.out("shared").join("scores.json")));
            fs::remove_dir_all(f.out("shared")).unwrap();
        }
        fs::remove_dir_all(f.out("alone")).unwrap();
    }
}

#[test]
fn ranks_with_other_arguments_are_refused() {
    let f = Fixture::new();
    let job = Job::start(env!("CARGO_BIN_EXE_cpift-eval"), 2, |rank| {
        arguments(&f, "out", &["--limit", if rank == 0 { "2" } else { "3" }])
    });
    for output in job.wait() {
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        assert!(said(&output).contains("another arguments: "), "{}", said(&output));
    }
    assert!(!f.out("out").exists());
}
