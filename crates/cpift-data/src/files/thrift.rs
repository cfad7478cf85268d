//! A walk over a structure in Thrift's compact protocol, which holds the metadata and the page headers of a Parquet file.
//!
//! The library goes through as many elements as a list claims to have, and those that it does not know and that are booleans take no bytes:
//! six bytes can claim two thousand million. Here every element takes a byte at least, so that a walk ends with its bytes, and the fields of
//! a structure come in order and once, as every writer puts them.

/// Deepest nesting; Parquet's own is 6.
const DEEPEST: usize = 32;

/// A structure that was walked over.
#[derive(Debug, PartialEq, Eq)]
pub struct Walked {
    /// Bytes it takes.
    pub length: usize,
    /// Its own integers by the ids of their fields.
    pub integers: Vec<(i64, i64)>,
}

impl Walked {
    /// The integer of the field `id`.
    pub fn integer(&self, id: i64) -> Option<i64> {
        self.integers.iter().find(|(known, _)| *known == id).map(|(_, value)| *value)
    }
}

/// Walks over the structure that `bytes` begin with. None where it does not end in them, or has what Parquet's structures have not: maps,
/// lists of booleans, deep nesting.
pub fn walk(bytes: &[u8]) -> Option<Walked> {
    let mut walk = Walk { rest: bytes };
    let mut integers = Vec::new();
    walk.fields(DEEPEST, |id, value| integers.push((id, value)))?;
    Some(Walked { length: bytes.len() - walk.rest.len(), integers })
}

struct Walk<'a> {
    rest: &'a [u8],
}

impl Walk<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.rest.split_first()?;
        self.rest = rest;
        Some(*first)
    }

    fn bytes(&mut self, count: u64) -> Option<()> {
        self.rest = self.rest.get(usize::try_from(count).ok()?..)?;
        Some(())
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn integer(&mut self) -> Option<i64> {
        let bits = self.varint()?;
        Some((bits >> 1) as i64 ^ -((bits & 1) as i64))
    }

    fn fields(&mut self, depth: usize, mut integer: impl FnMut(i64, i64)) -> Option<()> {
        let mut id = 0;
        loop {
            let head = self.byte()?;
            let next = match (head & 0xf, head >> 4) {
                (0, _) => return Some(()),
                (_, 0) => self.integer()?,
                (_, step) => id + i64::from(step),
            };
            if next <= id || next > i64::from(i16::MAX) {
                return None;
            }
            id = next;
            match head & 0xf {
                // The head is the value.
                1 | 2 => {}
                4..=6 => integer(id, self.integer()?),
                kind => self.value(kind, depth)?,
            }
        }
    }

    fn value(&mut self, kind: u8, depth: usize) -> Option<()> {
        match kind {
            3 => self.bytes(1),
            4..=6 => self.varint().map(drop),
            7 => self.bytes(8),
            8 => {
                let length = self.varint()?;
                self.bytes(length)
            }
            9 | 10 => self.elements(depth.checked_sub(1)?),
            12 => self.fields(depth.checked_sub(1)?, |_, _| ()),
            13 => self.bytes(16),
            _ => None,
        }
    }

    fn elements(&mut self, depth: usize) -> Option<()> {
        let head = self.byte()?;
        let count = if head >> 4 == 15 { self.varint()? } else { u64::from(head >> 4) };
        (0..count).try_for_each(|_| self.value(head & 0xf, depth))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lists_and_structures_are_walked_over() {
        // 1: i32 -3; 2: binary "ab"; 3: list of two i32; 4: struct {1: true}; 20: i64 300; stop; one byte more.
        let bytes = [0x15, 5, 0x18, 2, b'a', b'b', 0x19, 0x25, 2, 4, 0x1c, 0x11, 0, 0x06, 40, 0xd8, 4, 0, 9];
        assert_eq!(walk(&bytes), Some(Walked { length: 18, integers: vec![(1, -3), (20, 300)] }));
        (0..18).for_each(|end| assert_eq!(walk(&bytes[..end]), None, "{end}"));
        assert_eq!(walk(&bytes).unwrap().integer(20), Some(300));
        assert_eq!(walk(&bytes).unwrap().integer(2), None);
    }

    #[test]
    fn what_takes_no_bytes_or_comes_twice_is_refused() {
        // Field 2 again, by its whole id; field 65538, which is 2 in sixteen bits.
        assert_eq!(walk(&[0x25, 2, 0x05, 4, 8, 0]), None);
        assert_eq!(walk(&[0x25, 2, 0x05, 0x84, 0x80, 8, 8, 0]), None);
        let booleans = [0x19, 0xf1, 0xff, 0xff, 0xff, 0xff, 7, 0];
        assert_eq!(walk(&booleans), None);
        let deep = [&[0x19; 1][..], &[0x19; 40], &[0x15, 2, 0]].concat();
        assert_eq!(walk(&deep), None);
        let strings = [0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0];
        assert_eq!(walk(&strings), None);
    }
}
