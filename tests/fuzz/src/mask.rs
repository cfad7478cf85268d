//! A mask: a safetensors file as it is, framed (after `h`), or (after `m`) the mask's own metadata and the bits of its one
//! tensor `w`, a zero byte between them.
#![no_main]

use cpift_core::Mask;
use cpift_core::mask::indices;
use libfuzzer_sys::fuzz_target;
use serde_json::json;

fuzz_target!(|data: &[u8]| {
    let path = match data.split_first() {
        Some((b'h', rest)) => {
            let [header, bits] = cpift_fuzz::pieces(rest);
            cpift_fuzz::write_framed("a.mask", header, bits)
        }
        Some((b'm', rest)) => {
            let [own, bits] = cpift_fuzz::pieces(rest);
            let n = bits.len();
            let header = json!({"__metadata__": {"cpift": String::from_utf8_lossy(own)},
                "w": {"dtype": "U8", "shape": [n], "data_offsets": [0, n]}});
            cpift_fuzz::write_framed("a.mask", header.to_string().as_bytes(), bits)
        }
        _ => cpift_fuzz::write("a.mask", data),
    };
    cpift_fuzz::bounded(data.len(), || {
        let Ok(mask) = Mask::open(&path) else { return };
        if mask.verify().is_ok() {
            let set: usize = mask.tensors().map(|(_, bits)| indices(bits).count()).sum();
            assert_eq!(set as u64, mask.header.selected);
            let stats = cpift_mask::stats::stats(&mask);
            assert_eq!(stats.roles.iter().map(|row| row.selected).sum::<u64>(), mask.header.selected);
            let _ = stats.table();
        }
    });
});
