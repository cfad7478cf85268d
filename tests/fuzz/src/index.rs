//! A checkpoint folder: index, config.json, cpift.json and the headers of two shards, zero bytes between them.
#![no_main]

use cpift_core::Checkpoint;
use cpift_core::checkpoint::{Digest, check_same_parameters};
use libfuzzer_sys::fuzz_target;

const ELEMENTS: usize = 64;

fuzz_target!(|data: &[u8]| {
    let [index, config, record, first, second] = cpift_fuzz::pieces(data);
    cpift_fuzz::write("model.safetensors.index.json", index);
    cpift_fuzz::write("config.json", config);
    cpift_fuzz::write("cpift.json", record);
    cpift_fuzz::write_framed("model-00001-of-00002.safetensors", first, &[]);
    cpift_fuzz::write_framed("model-00002-of-00002.safetensors", second, &[]);
    cpift_fuzz::bounded(data.len(), || {
        let Ok(checkpoint) = Checkpoint::open(cpift_fuzz::folder()) else { return };
        let recorded = checkpoint.recorded_digest();
        assert!(recorded.is_none(), "the times of these files cannot be guessed");
        for view in checkpoint.parameters() {
            let mut values = vec![0f32; view.numel().min(ELEMENTS)];
            view.read(view.numel() - values.len(), &mut values);
            assert_eq!(view.spec().nbytes(), view.bytes.len());
        }
        let others = checkpoint.not_parameters().count();
        assert_eq!(checkpoint.parameters().count() + others, checkpoint.tensors().count());
        check_same_parameters(&checkpoint, &checkpoint).expect("a checkpoint is like itself");
        Digest::of_checkpoint(&checkpoint).expect("what opens can be hashed");
    });
});
