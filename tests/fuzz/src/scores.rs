//! scores.json, read, written and read again.

use cpift_core::format::scores::Scores;

use crate::bounds;

pub fn run(data: &[u8]) -> bool {
    let path = bounds::write("scores.json", data);
    bounds::bounded(data.len(), || {
        let _ = Scores::read_any_version(&path);
        let Ok(scores) = Scores::read(&path) else { return false };
        scores.write(&path, true).expect("JSON has no number that is not finite");
        assert_eq!(Scores::read(&path).expect("it can be read again"), scores);
        true
    })
}
