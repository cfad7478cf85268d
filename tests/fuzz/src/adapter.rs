//! A LoRA adapter and the model it is merged into: adapter_config.json and the headers of both
//! files, separated by zero bytes. An input without a config is a single file.

use cpift_core::Checkpoint;
use cpift_core::format::checkpoint::read_lora;

use crate::bounds;

/// Bytes that a reader may allocate: factors are held in f32, and once more while they are
/// transposed.
const BOUND: usize = 64 << 20;

pub fn run(data: &[u8]) -> bool {
    let [config, adapter, model] = bounds::pieces(data);
    let folder = bounds::folder().join("lora");
    std::fs::create_dir_all(&folder).expect("memory has room for the input");
    let file = bounds::write_framed("lora/adapter_model.safetensors", adapter, &[]);
    let model = bounds::write_framed("lora-model.safetensors", model, &[]);
    if !config.is_empty() {
        bounds::write("lora/adapter_config.json", config);
    }
    let path = if config.is_empty() { file } else { folder };
    let read = bounds::bounded_by(BOUND, || {
        if let Ok(lora) = read_lora(&path) {
            for pair in lora.pairs.values() {
                assert!(pair.rank > 0 && pair.left.len().is_multiple_of(pair.rank));
            }
        }
        let both = std::path::PathBuf::from(format!("{}+{}", model.display(), path.display()));
        let Ok(checkpoint) = Checkpoint::open(&both) else { return false };
        for view in checkpoint.parameters() {
            let mut values = vec![0f32; view.numel().min(64)];
            view.read(view.numel() - values.len(), &mut values);
        }
        checkpoint.digest().expect("an open checkpoint can be hashed");
        true
    });
    let _ = std::fs::remove_dir_all(bounds::folder().join("lora"));
    read
}
