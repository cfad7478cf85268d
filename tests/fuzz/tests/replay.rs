//! Replays the inputs in `corpora/`, which libFuzzer kept for their coverage, through every target.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use cpift_fuzz::{TARGETS, clean, unpack};

#[test]
fn every_input_is_accepted_or_refused() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpora");
    for (name, target) in TARGETS {
        let packed = std::fs::read(corpora.join(name)).unwrap_or_else(|e| panic!("corpora/{name}: {e}"));
        let inputs = unpack(&packed);
        assert!(inputs.len() >= 20, "corpora/{name} has {} inputs", inputs.len());
        let read = inputs.iter().filter(|input| {
            let ended = catch_unwind(AssertUnwindSafe(|| target(input)));
            ended.unwrap_or_else(|_| panic!("{name} on {:?}", String::from_utf8_lossy(input)))
        });
        assert!(read.count() > 0, "{name} accepts no input: the seeds are outdated");
    }
    clean();
}
