//! A safetensors file: as it is, or (after a byte `h`) framed, so that the length before the header is right.
#![no_main]

use cpift_core::safetensors::MappedFile;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let path = match data.strip_prefix(b"h") {
        Some(rest) => {
            let [header, body] = cpift_fuzz::pieces(rest);
            cpift_fuzz::write_framed("a.safetensors", header, body)
        }
        None => cpift_fuzz::write("a.safetensors", data),
    };
    cpift_fuzz::bounded(data.len(), || {
        match MappedFile::open(&path) {
            Ok(file) => file.entries.values().for_each(|entry| {
                let elements: usize = entry.shape.iter().product();
                assert_eq!(file.bytes(entry).len(), elements * entry.dtype.size());
            }),
            Err(error) => assert!(format!("{error:#}").contains("a.safetensors")),
        }
    });
});
