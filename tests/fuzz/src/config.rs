//! config.json, as read by the stages with and without libtorch.

use cpift_core::format::checkpoint::read_config;
use cpift_torch::model::ModelConfig;

use crate::bounds;

pub fn run(data: &[u8]) -> bool {
    let path = bounds::write("config.json", data);
    bounds::bounded(data.len(), || {
        let Ok(config) = read_config(bounds::folder()) else { return false };
        match ModelConfig::from_json(bounds::folder(), &config) {
            Ok(model) => assert!(model.hidden_size > 0 && model.vocab_size > 0, "{model:?}"),
            Err(error) => {
                assert!(format!("{error:#}").contains(&path.display().to_string()), "{error:#}");
                return false;
            }
        }
        true
    })
}
