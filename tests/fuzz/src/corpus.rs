//! The inputs of a target in one file: each with its length before it, four bytes, the lowest
//! first.

/// The inputs of a packed corpus.
///
/// # Panics
/// When the file is cut short.
pub fn unpack(mut packed: &[u8]) -> Vec<&[u8]> {
    let mut inputs = Vec::new();
    while let Some((length, rest)) = packed.split_first_chunk() {
        let (input, rest) = rest.split_at(u32::from_le_bytes(*length) as usize);
        inputs.push(input);
        packed = rest;
    }
    assert!(packed.is_empty(), "a corpus that is cut short");
    inputs
}
