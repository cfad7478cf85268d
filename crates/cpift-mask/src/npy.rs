//! NumPy files of booleans: one array per file, format 1.0.

use std::path::Path;

use cpift_core::BadInput;

const MAGIC: &[u8] = b"\x93NUMPY";

/// The bytes of a boolean array with these packed bits.
pub(crate) fn write(shape: &[usize], bits: &[u8]) -> Vec<u8> {
    let dims: String = shape.iter().map(|n| format!("{n}, ")).collect();
    let dims = if shape.len() == 1 { dims.trim_end() } else { dims.trim_end_matches(", ") };
    let mut header = format!("{{'descr': '|b1', 'fortran_order': False, 'shape': ({dims}), }}");
    // Magic, version and length take ten bytes; the data begin at a multiple of 64.
    let end = (MAGIC.len() + 4 + header.len() + 1).next_multiple_of(64);
    header.push_str(&" ".repeat(end - MAGIC.len() - 4 - header.len() - 1));
    header.push('\n');
    let mut out = [MAGIC, &[1, 0], &(header.len() as u16).to_le_bytes(), header.as_bytes()].concat();
    let numel: usize = shape.iter().product();
    out.extend((0..numel).map(|i| bits[i / 8] >> (i % 8) & 1));
    out
}

/// Shape and elements of a boolean or U8 array in C order.
///
/// # Errors
/// [`BadInput`] naming what was expected.
pub(crate) fn read<'a>(path: &Path, bytes: &'a [u8]) -> anyhow::Result<(Vec<usize>, &'a [u8])> {
    let bad = |expected: &str, found: String| {
        BadInput::new(path, "not a NumPy array of booleans").expected(expected).found(found)
    };
    let rest = bytes.strip_prefix(MAGIC).ok_or_else(|| bad("a .npy file", "another kind of file".to_owned()))?;
    let length = |at: usize, n: usize| {
        let bytes = rest.get(at..at + n)?;
        Some(bytes.iter().rev().fold(0usize, |sum, byte| sum << 8 | usize::from(*byte)))
    };
    let (start, len): (usize, _) = match rest.first() {
        Some(1) => (4, length(2, 2)),
        Some(2 | 3) => (6, length(2, 4)),
        version => return Err(bad("format version 1, 2 or 3", format!("{version:?}")).into()),
    };
    let header = len.and_then(|len| rest.get(start..start.checked_add(len)?));
    let header = header.and_then(|text| std::str::from_utf8(text).ok());
    let header = header.ok_or_else(|| bad("a header", "the file ends within it".to_owned()))?;
    let data = &rest[start + header.len()..];
    let value = |key: &str| {
        let (_, after) = header.split_once(&format!("'{key}':"))?;
        Some(after.trim_start())
    };
    let descr = value("descr").unwrap_or_default();
    if !["'|b1'", "'|u1'", "'b1'", "'u1'"].iter().any(|kind| descr.starts_with(kind)) {
        let found = descr.split([',', '}']).next().unwrap_or_default();
        return Err(bad("dtype bool or uint8", found.to_owned()).into());
    }
    if !value("fortran_order").is_some_and(|text| text.starts_with("False")) {
        return Err(bad("C order", "Fortran order".to_owned()).into());
    }
    let dims = value("shape").and_then(|text| text.strip_prefix('(')?.split_once(')'));
    let dims = dims.map(|(dims, _)| dims.split(',').map(str::trim).filter(|n| !n.is_empty()).map(str::parse));
    let shape: Option<Vec<usize>> = dims.and_then(|dims| dims.collect::<Result<_, _>>().ok());
    let shape = shape.ok_or_else(|| bad("a shape", header.trim().to_owned()))?;
    let numel = shape.iter().try_fold(1usize, |product, n| product.checked_mul(*n));
    if numel != Some(data.len()) {
        return Err(bad(&format!("{numel:?} elements for shape {shape:?}"), format!("{} bytes", data.len())).into());
    }
    Ok((shape, data))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_have_the_layout_of_numpy() {
        // numpy.save of numpy.array([[True, False, True]])
        let file = write(&[1, 3], &[0b101]);
        assert_eq!(&file[..10], b"\x93NUMPY\x01\x00\x76\x00");
        assert!(file[10..].starts_with(b"{'descr': '|b1', 'fortran_order': False, 'shape': (1, 3), } "));
        assert_eq!(file[127..], [b'\n', 1, 0, 1]);
        for shape in [&[][..], &[3], &[1, 3], &[3, 1, 1], &[0]] {
            let file = write(shape, &[0b101]);
            let (found, data) = read(Path::new("w.npy"), &file).unwrap();
            assert_eq!((found.as_slice(), data.len()), (shape, shape.iter().product()));
        }
        assert!(String::from_utf8_lossy(&write(&[3], &[0])).contains("'shape': (3,), }"));
    }

    #[test]
    fn other_arrays_are_refused() {
        let good = write(&[2], &[0b11]);
        let text = |from: &str, to: &str| {
            let text: Vec<char> = good.iter().map(|b| char::from(*b)).collect();
            let text: String = text.into_iter().collect::<String>().replace(from, to);
            text.chars().map(|c| c as u8).collect::<Vec<u8>>()
        };
        for (bytes, what) in [
            (text("|b1", "<f4"), "dtype bool or uint8"),
            (text("False", "True "), "C order"),
            (text("(2,)", "(3,)"), "elements for shape"),
            (text("(2,)", "(x,)"), "a shape"),
            (good[..40].to_vec(), "a header"),
            (b"PK".to_vec(), "a .npy file"),
        ] {
            let error = read(Path::new("w.npy"), &bytes).unwrap_err().to_string();
            assert!(error.contains("w.npy") && error.contains(what), "{error}");
        }
    }
}
