//! A checkpoint directory: index, config.json, cpift.json and the headers of two shards, separated
//! by zero bytes.

use cpift_core::Checkpoint;
use cpift_core::format::checkpoint::check_same_parameters;
use cpift_core::format::digest::Digest;

use crate::bounds;

const ELEMENTS: usize = 64;

pub fn run(data: &[u8]) -> bool {
    let [index, config, record, first, second] = bounds::pieces(data);
    bounds::write("model.safetensors.index.json", index);
    bounds::write("config.json", config);
    bounds::write("cpift.json", record);
    bounds::write_framed("model-00001-of-00002.safetensors", first, &[]);
    bounds::write_framed("model-00002-of-00002.safetensors", second, &[]);
    bounds::bounded(data.len(), || {
        let Ok(checkpoint) = Checkpoint::open(bounds::folder()) else { return false };
        let recorded = checkpoint.recorded_digest();
        assert!(recorded.is_none(), "an input cannot contain the mtimes of these files");
        for view in checkpoint.parameters() {
            let mut values = vec![0f32; view.numel().min(ELEMENTS)];
            view.read(view.numel() - values.len(), &mut values);
            assert_eq!(view.numel() * view.dtype.size(), view.bytes.len());
        }
        let others = checkpoint.not_parameters().count();
        // Scales of 8-bit weights are no tensors of the model.
        assert!(checkpoint.parameters().count() + others <= checkpoint.tensors().count());
        check_same_parameters(&checkpoint, &checkpoint).expect("a checkpoint has its own parameters");
        Digest::of_checkpoint(&checkpoint).expect("an open checkpoint can be hashed");
        true
    })
}
