//! A training state: state.json, metrics.jsonl and the headers of two ranks' files, separated by
//! zero bytes. A state is valid only if it has the digests of its files, which an input cannot have
//! by chance.

use std::fs;

use cpift_torch::train::verify_states;

use crate::bounds;

pub fn run(data: &[u8]) -> bool {
    let [state, metrics, first, second] = bounds::pieces(data);
    let folder = bounds::folder().join("step-1");
    fs::create_dir_all(&folder).expect("memory has room for a folder");
    bounds::write("step-1/state.json", state);
    bounds::write("step-1/metrics.jsonl", metrics);
    bounds::write_framed("step-1/rank-0-of-2.safetensors", first, &[]);
    bounds::write_framed("step-1/rank-1-of-2.safetensors", second, &[]);
    bounds::bounded(data.len(), || {
        let error = verify_states(&folder).expect_err("digests of other files");
        assert!(format!("{error:#}").contains("step-1"), "{error:#}");
        // A mismatch of digests means that the form was right.
        format!("{error:#}").contains("digest")
    })
}
