//! A recipe in mergekit's YAML. A parsed recipe, written again, parses to the same request.

use std::path::Path;

use cpift_core::Dtype;
use cpift_merge::Request;
use cpift_merge::recipe::{parse, write};

use crate::bounds;

/// Memory bound that follows from the reader's limits on nodes and repeated aliases.
const BOUND: usize = 32 << 20;

pub fn run(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    let path = Path::new("recipe.yml");
    bounds::bounded_by(BOUND, || {
        let request = match parse(text, path) {
            Ok(request) => request,
            Err(error) => {
                assert!(format!("{error:#}").starts_with("recipe.yml: "));
                return false;
            }
        };
        let dtype = request.dtype.unwrap_or(Dtype::BF16);
        let again = write(&request, dtype);
        let read = parse(&again, path).unwrap_or_else(|e| panic!("{e:#}\n{again}"));
        assert_eq!(read, Request { dtype: Some(dtype), ..request }, "\n{again}");
        true
    })
}
