//! Packed corpus: the inputs of a target in one file, each preceded by its length as a
//! little-endian u32.

/// Splits a packed corpus into its inputs.
///
/// # Panics
/// If the file is truncated.
pub fn unpack(mut packed: &[u8]) -> Vec<&[u8]> {
    let mut inputs = Vec::new();
    while let Some((length, rest)) = packed.split_first_chunk() {
        let (input, rest) = rest.split_at(u32::from_le_bytes(*length) as usize);
        inputs.push(input);
        packed = rest;
    }
    assert!(packed.is_empty(), "a truncated corpus");
    inputs
}
