//! A mask: a safetensors file as it is, or framed (after a byte `h`), or, after a byte `m`, the
//! mask metadata and the bits of its only tensor `w`, separated by a zero byte.

use cpift_core::Mask;
use cpift_core::format::mask::{clear_flagged, indices};
use serde_json::json;

use crate::bounds;

pub fn run(data: &[u8]) -> bool {
    let path = match data.split_first() {
        Some((b'h', rest)) => {
            let [header, bits] = bounds::pieces(rest);
            bounds::write_framed("a.mask", header, bits)
        }
        Some((b'm', rest)) => {
            let [own, bits] = bounds::pieces(rest);
            let n = bits.len();
            let header = json!({"__metadata__": {"cpift": String::from_utf8_lossy(own)},
                "w": {"dtype": "U8", "shape": [n], "data_offsets": [0, n]}});
            bounds::write_framed("a.mask", header.to_string().as_bytes(), bits)
        }
        _ => bounds::write("a.mask", data),
    };
    bounds::bounded(data.len(), || {
        let Ok(mask) = Mask::open(&path) else { return false };
        let sound = mask.verify().is_ok();
        if sound {
            let set: usize = mask.tensors().map(|(_, bits)| indices(bits).count()).sum();
            assert_eq!(set as u64, mask.header.selected);
            if let Some(flags) = mask.tie_flags() {
                let clear = |at, bits: &[u8]| clear_flagged(&mut bits.to_vec(), flags, at);
                assert_eq!(mask.tensors().fold(0, |at, (_, bits)| clear(at, bits)), mask.header.selected);
            }
            let stats = cpift_core::format::names::stats(&mask);
            assert_eq!(stats.roles.iter().map(|row| row.selected).sum::<u64>(), mask.header.selected);
        }
        sound
    })
}
