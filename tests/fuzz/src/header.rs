//! A safetensors file: as it is, or, after a byte `h`, framed with the correct header length.

use cpift_core::format::safetensors::MappedFile;

use crate::bounds;

pub fn run(data: &[u8]) -> bool {
    let path = match data.strip_prefix(b"h") {
        Some(rest) => {
            let [header, body] = bounds::pieces(rest);
            bounds::write_framed("a.safetensors", header, body)
        }
        None => bounds::write("a.safetensors", data),
    };
    bounds::bounded(data.len(), || {
        match MappedFile::open(&path) {
            Ok(file) => file.entries.values().for_each(|entry| {
                let elements: usize = entry.shape.iter().product();
                assert_eq!(file.bytes(entry).len(), elements * entry.dtype.size());
            }),
            Err(error) => {
                assert!(format!("{error:#}").contains("a.safetensors"));
                return false;
            }
        }
        true
    })
}
