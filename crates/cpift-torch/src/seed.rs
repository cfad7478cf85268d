//! Seeds made of seeds, so that no two uses of one share their random numbers.

/// A seed made of two numbers (SplitMix64).
pub fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.wrapping_add(b.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A seed made of a number and a name.
pub fn mix_name(seed: u64, name: &str) -> u64 {
    // Lengths counted from above: the numbers that seeds are mixed with are small.
    name.bytes().fold(mix(seed, u64::MAX - 1 - name.len() as u64), |mixed, byte| mix(mixed, byte.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn seeds_of_neighbouring_numbers_and_names_differ() {
        let names = ["", "a", "b", "ab", "ba", "task 1", "task 2"];
        let mut seen = BTreeSet::new();
        for seed in 0..100 {
            assert!((0..10).all(|k| seen.insert(mix(seed, k))));
            assert!(names.iter().all(|name| seen.insert(mix_name(seed, name))));
        }
    }
}
