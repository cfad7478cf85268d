//! Flags of the bits set in a packed bit array: one bit per bit set, in order. A mask of 1 % of the
//! elements is flagged in a hundredth of its own size.

/// Bits appended one by one, packed from the lowest bit of each byte.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BitList {
    bytes: Vec<u8>,
    len: u64,
}

impl BitList {
    /// Appends a bit.
    #[inline(always)]
    pub fn push(&mut self, bit: bool) {
        if self.len.is_multiple_of(8) {
            self.bytes.push(0);
        }
        if bit && let Some(last) = self.bytes.last_mut() {
            *last |= 1 << (self.len % 8);
        }
        self.len += 1;
    }

    /// Appends the first `n` bits of `bits`; bits past its end are zero.
    pub fn extend(&mut self, bits: &[u8], n: u64) {
        let (start, shift) = ((self.len / 8) as usize, self.len % 8);
        self.len += n;
        self.bytes.resize(self.len.div_ceil(8) as usize, 0);
        let whole = (n / 8) as usize;
        let last = bits.get(whole).map(|byte| byte & ((1 << (n % 8)) - 1)).filter(|byte| *byte != 0);
        let bytes = bits.iter().take(whole).copied().chain(last);
        for (i, byte) in bytes.enumerate().filter(|(_, byte)| *byte != 0) {
            self.bytes[start + i] |= byte << shift;
            if shift > 0
                && let Some(next) = self.bytes.get_mut(start + i + 1)
            {
                *next |= byte >> (8 - shift);
            }
        }
    }

    /// Number of bits.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Returns true if there are no bits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes the whole bytes out of the list and leaves the bits after them.
    pub fn take_whole_bytes(&mut self) -> Vec<u8> {
        let rest = self.bytes.split_off((self.len / 8) as usize);
        self.len %= 8;
        std::mem::replace(&mut self.bytes, rest)
    }

    /// The packed bits; those past the end are zero.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

/// Bits of a word that are handled without a branch: in a mask of a few percent most words have no
/// more, and a loop that ends after a varying number of steps costs more than these.
const FEW: u32 = 3;

/// Puts the first bits of `flags`, one after another, where the bits of `word` are set.
#[inline(always)]
fn spread(word: u64, flags: u64) -> u64 {
    let (mut left, mut found) = (word, 0);
    let mut next = |left: &mut u64, i: u32| {
        let lowest = *left & left.wrapping_neg();
        found |= lowest & 0u64.wrapping_sub(flags >> i & 1);
        *left ^= lowest;
    };
    (0..FEW).for_each(|i| next(&mut left, i));
    let mut i = FEW;
    while left != 0 {
        next(&mut left, i);
        i += 1;
    }
    found
}

/// Inverse of [`spread`]: the bits of `marks` at which `word` is set, one after another.
#[inline(always)]
fn gather(word: u64, marks: u64) -> u64 {
    let (mut left, mut found) = (word, 0);
    let mut next = |left: &mut u64, i: u32| {
        let lowest = *left & left.wrapping_neg();
        found |= u64::from(marks & lowest != 0) << i;
        *left ^= lowest;
    };
    (0..FEW).for_each(|i| next(&mut left, i));
    let mut i = FEW;
    while left != 0 {
        next(&mut left, i);
        i += 1;
    }
    found
}

/// The 64 flags from number `at` on; those past the end are not set.
#[inline(always)]
fn flags_from(flags: &[u8], at: u64) -> u64 {
    let rest = flags.get((at / 8) as usize..).unwrap_or(&[]);
    let bytes = rest.first_chunk::<16>().copied().unwrap_or_else(|| {
        let mut padded = [0; 16];
        padded[..rest.len()].copy_from_slice(rest);
        padded
    });
    (u128::from_le_bytes(bytes) >> (at % 8)) as u64
}

/// A word of at most eight bytes.
#[inline(always)]
fn word_of(bytes: &[u8]) -> u64 {
    let mut padded = [0; 8];
    padded[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(padded)
}

/// Flags of the bits set in `bits`: those that are set in `marked` too. Fastest inside
/// [`crate::dispatch!`].
#[inline(always)]
pub fn flags_of(bits: &[u8], marked: &[u8]) -> Vec<u8> {
    let (mut flags, mut wait, mut n) = (Vec::new(), 0u64, 0);
    // Appends the flags of a word: `n` flags wait in `wait`, less than 64.
    let mut append = |word: u64, marks: u64| {
        let (found, count) = (gather(word, marks), word.count_ones());
        wait |= found << n;
        n += count;
        if n >= 64 {
            flags.extend_from_slice(&wait.to_le_bytes());
            n -= 64;
            // Shifted in two steps, because all 64 may be used up.
            wait = found >> 1 >> (count - n - 1);
        }
    };
    let ((words, rest), (marks, rest_marks)) = (bits.as_chunks::<8>(), marked.as_chunks::<8>());
    for (word, marks) in words.iter().zip(marks) {
        append(u64::from_le_bytes(*word), u64::from_le_bytes(*marks));
    }
    append(word_of(rest), word_of(rest_marks));
    flags.extend_from_slice(&wait.to_le_bytes()[..n.div_ceil(8) as usize]);
    flags
}

/// Clears the flagged bits of `bits`; flag number `at` belongs to its first bit set, and flags past
/// the end are not set. Returns the number of the next flag. Fastest inside [`crate::dispatch!`].
#[inline(always)]
pub fn clear_flagged(bits: &mut [u8], flags: &[u8], mut at: u64) -> u64 {
    let mut cleared = |word: u64| {
        let flagged = spread(word, flags_from(flags, at));
        at += u64::from(word.count_ones());
        word & !flagged
    };
    let (words, rest) = bits.as_chunks_mut::<8>();
    words.iter_mut().for_each(|word| *word = cleared(u64::from_le_bytes(*word)).to_le_bytes());
    let last = cleared(word_of(rest)).to_le_bytes();
    rest.copy_from_slice(&last[..rest.len()]);
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_follow_the_bits_set() {
        let (bits, marked) = ([0b1010_0001, 0, 0b11], [0b1000_0000, 0, 0b01]);
        let flags = flags_of(&bits, &marked);
        assert_eq!(flags, [0b0000_1100]);
        let mut left = bits;
        assert_eq!(clear_flagged(&mut left, &flags, 0), 5);
        assert_eq!(left, [0b0010_0001, 0, 0b10]);
        let mut tail = [bits[2]];
        assert_eq!(clear_flagged(&mut tail, &flags, 3), 5);
        assert_eq!(tail, [0b10]);
    }

    #[test]
    fn flags_of_many_bits_are_those_of_one_after_another() {
        let draw = |key: u64| (0..500u64).map(|i| (((i * i + 7) * key) >> (i % 23)) as u8).collect::<Vec<u8>>();
        let (bits, marked) = (draw(0x9E37_79B9), draw(0x85EB_CA6B));
        let mut list = BitList::default();
        for at in (0..8 * bits.len()).filter(|at| bits[at / 8] >> (at % 8) & 1 == 1) {
            list.push(marked[at / 8] >> (at % 8) & 1 == 1);
        }
        assert_eq!(flags_of(&bits, &marked), list.into_bytes());
    }

    #[test]
    fn flagged_bits_are_cleared_wherever_their_flags_begin() {
        let draw = |key: u64| (0..99u64).map(|i| (((i * i + 7) * key) >> (i % 23)) as u8).collect::<Vec<u8>>();
        let (bits, marked) = (draw(0x9E37_79B9), draw(0x85EB_CA6B));
        let n = bits.iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>();
        for skipped in [0, 1, 7, 8, 63, 64, 100] {
            let mut flags = BitList::default();
            (0..skipped).for_each(|_| flags.push(true));
            flags.extend(&flags_of(&bits, &marked), n);
            let mut left = bits.clone();
            assert_eq!(clear_flagged(&mut left, &flags.into_bytes(), skipped), skipped + n);
            assert!(left.iter().zip(bits.iter().zip(&marked)).all(|(left, (bit, mark))| *left == bit & !mark));
        }
        let mut left = bits.clone();
        clear_flagged(&mut left, &[], 0);
        assert_eq!(left, bits, "flags past the end are not set");
    }

    #[test]
    fn lists_are_joined_bit_by_bit() {
        let mut list = BitList::default();
        list.extend(&[0b101], 3);
        list.extend(&[0b1111_1111], 8);
        list.extend(&[], 2);
        list.extend(&[0b1111_1110], 1);
        list.extend(&[], 0);
        assert_eq!((list.len(), list.take_whole_bytes()), (14, vec![0b1111_1101]));
        list.push(true);
        list.push(true);
        list.extend(&[0b11, 0b1], 9);
        assert_eq!(list.into_bytes(), [0b1100_0111, 0b0000_0011, 0b1]);
    }
}
