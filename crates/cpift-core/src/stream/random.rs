//! SplitMix64: a counter-based random generator that any thread can read at any index, and derived
//! seeds.

/// Returns number `index` of the SplitMix64 sequence that starts at `key`.
///
/// Also derives a seed from another, so that two uses of one seed do not share random numbers.
#[inline(always)]
pub fn splitmix64(key: u64, index: u64) -> u64 {
    let mut z = key.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Derives a seed from a seed and a name.
pub fn seed_for(seed: u64, name: &str) -> u64 {
    // Name lengths count down from u64::MAX, because other callers mix seeds with small indices.
    let start = splitmix64(seed, u64::MAX - 1 - name.len() as u64);
    name.bytes().fold(start, |mixed, byte| splitmix64(mixed, byte.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_sequence_equals_the_reference_implementation() {
        // First outputs of splitmix64.c (Vigna) for the state 1234567.
        let expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431];
        assert_eq!([0, 1, 2, 3].map(|index| splitmix64(1234567, index)), expected);
    }

    #[test]
    fn neighboring_indices_and_names_give_different_seeds() {
        let names = ["", "a", "b", "ab", "ba", "task 1", "task 2"];
        let mut seen = BTreeSet::new();
        for seed in 0..100 {
            assert!((0..10).all(|k| seen.insert(splitmix64(seed, k))));
            assert!(names.iter().all(|name| seen.insert(seed_for(seed, name))));
        }
    }
}
