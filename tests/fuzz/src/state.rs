//! A training state: state.json, metrics.jsonl and the headers of weights and moments, separated by
//! zero bytes. A state is valid only if it has the digests of its files, which an input cannot have
//! by chance.

use std::fs;

use cpift_torch::train::verify_states;

use crate::bounds;

pub fn run(data: &[u8]) -> bool {
    let [state, metrics, weights, moments] = bounds::pieces(data);
    let folder = bounds::folder().join("step-1");
    for part in ["weights", "moments"] {
        fs::create_dir_all(folder.join(part)).expect("memory has room for folders");
    }
    bounds::write("step-1/state.json", state);
    bounds::write("step-1/metrics.jsonl", metrics);
    bounds::write_framed("step-1/weights/model.safetensors", weights, &[]);
    bounds::write_framed("step-1/moments/model.safetensors", moments, &[]);
    bounds::bounded(data.len(), || {
        let error = verify_states(&folder).expect_err("digests of other files");
        assert!(format!("{error:#}").contains("step-1"), "{error:#}");
        // A mismatch of digests means that the form was right.
        format!("{error:#}").contains("digest")
    })
}
