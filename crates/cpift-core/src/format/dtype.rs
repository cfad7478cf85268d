//! Element types of tensors, and conversion of floating-point elements.

/// Element type of the safetensors format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the names are the format's own")]
pub enum Dtype {
    F64,
    F32,
    F16,
    BF16,
    /// Four bits of exponent, three of mantissa, no infinity: torch's `float8_e4m3fn`.
    F8E4M3,
    /// Five bits of exponent, two of mantissa: torch's `float8_e5m2`.
    F8E5M2,
    I64,
    U64,
    I32,
    U32,
    I16,
    U16,
    I8,
    U8,
    Bool,
}

impl Dtype {
    /// Supported dtypes, for messages.
    pub(crate) const KNOWN: &str =
        "F64, F32, F16, BF16, F8_E4M3, F8_E5M2, I64, U64, I32, U32, I16, U16, I8, U8 or BOOL";

    const ALL: [(Self, &'static str, usize); 15] = [
        (Self::F64, "F64", 8),
        (Self::F32, "F32", 4),
        (Self::F16, "F16", 2),
        (Self::BF16, "BF16", 2),
        (Self::F8E4M3, "F8_E4M3", 1),
        (Self::F8E5M2, "F8_E5M2", 1),
        (Self::I64, "I64", 8),
        (Self::U64, "U64", 8),
        (Self::I32, "I32", 4),
        (Self::U32, "U32", 4),
        (Self::I16, "I16", 2),
        (Self::U16, "U16", 2),
        (Self::I8, "I8", 1),
        (Self::U8, "U8", 1),
        (Self::Bool, "BOOL", 1),
    ];

    /// Name in the safetensors format, such as `BF16`.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// Bytes per element.
    pub fn size(self) -> usize {
        self.row().2
    }

    /// Returns true if elements are floating-point numbers.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F64 | Self::F32 | Self::F16 | Self::BF16) || self.is_f8()
    }

    /// Returns true if elements are floating-point numbers of 8 bits.
    pub fn is_f8(self) -> bool {
        matches!(self, Self::F8E4M3 | Self::F8E5M2)
    }

    /// Returns true if this dtype can represent every value of the floating-point dtype `other`.
    pub fn holds(self, other: Self) -> bool {
        self == other
            || matches!(
                (self, other),
                (Self::F64, Self::F32 | Self::F16 | Self::BF16 | Self::F8E4M3 | Self::F8E5M2)
                    | (Self::F32, Self::F16 | Self::BF16 | Self::F8E4M3 | Self::F8E5M2)
                    | (Self::F16 | Self::BF16, Self::F8E4M3 | Self::F8E5M2)
            )
    }

    /// Name in `torch_dtype` of config.json, such as `bfloat16`; `None` for integers and booleans.
    pub fn torch_name(self) -> Option<&'static str> {
        match self {
            Self::F64 => Some("float64"),
            Self::F32 => Some("float32"),
            Self::F16 => Some("float16"),
            Self::BF16 => Some("bfloat16"),
            Self::F8E4M3 => Some("float8_e4m3fn"),
            Self::F8E5M2 => Some("float8_e5m2"),
            _ => None,
        }
    }

    pub(crate) fn from_safetensors(dtype: safetensors::Dtype) -> Option<Self> {
        use safetensors::Dtype as S;
        Some(match dtype {
            S::F64 => Self::F64,
            S::F32 => Self::F32,
            S::F16 => Self::F16,
            S::BF16 => Self::BF16,
            S::F8_E4M3 => Self::F8E4M3,
            S::F8_E5M2 => Self::F8E5M2,
            S::I64 => Self::I64,
            S::U64 => Self::U64,
            S::I32 => Self::I32,
            S::U32 => Self::U32,
            S::I16 => Self::I16,
            S::U16 => Self::U16,
            S::I8 => Self::I8,
            S::U8 => Self::U8,
            S::BOOL => Self::Bool,
            _ => return None,
        })
    }

    fn row(self) -> &'static (Self, &'static str, usize) {
        Self::ALL.iter().find(|row| row.0 == self).expect("ALL lists every variant")
    }
}

/// Parses a floating-point dtype, such as `f32` or `float32`.
impl std::str::FromStr for Dtype {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            "f64" | "float64" => Ok(Self::F64),
            "f32" | "float32" => Ok(Self::F32),
            "f16" | "float16" => Ok(Self::F16),
            "bf16" | "bfloat16" => Ok(Self::BF16),
            other => Err(format!("expected f32, bf16, f16 or f64, found {other:?}")),
        }
    }
}

impl Dtype {
    /// Parses any floating-point dtype, including those of 8 bits: `f8_e4m3`, `f8_e5m2`.
    ///
    /// # Errors
    /// The names that are known.
    pub fn parse_any_float(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            "f8_e4m3" | "f8_e4m3fn" | "float8_e4m3fn" => Ok(Self::F8E4M3),
            "f8_e5m2" | "float8_e5m2" => Ok(Self::F8E5M2),
            other => {
                other.parse().map_err(|_| format!("expected f32, bf16, f16, f64, f8_e4m3 or f8_e5m2, found {other:?}"))
            }
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Arithmetic type of a stage: `f32`, or `f64` if an input is F64.
pub trait Float: Copy + PartialOrd + Send + Sync + 'static {
    /// Converts elements stored as `dtype` (little-endian, any alignment) to this type. The
    /// conversion is exact if this type is wide enough.
    ///
    /// # Panics
    /// If `dtype` is not floating-point or the lengths disagree.
    fn read(dtype: Dtype, bytes: &[u8], out: &mut [Self]);

    /// Stores `values` in `bytes` as `dtype`, rounding to nearest, ties to even.
    ///
    /// # Panics
    /// If `dtype` is not floating-point or the lengths disagree.
    fn store(dtype: Dtype, values: &[Self], bytes: &mut [u8]);

    /// Appends `values` to `out` as `dtype`, with the rounding of [`Float::store`].
    ///
    /// # Panics
    /// If `dtype` is not floating-point.
    fn write(dtype: Dtype, values: &[Self], out: &mut Vec<u8>) {
        let start = out.len();
        out.resize(start + values.len() * dtype.size(), 0);
        Self::store(dtype, values, &mut out[start..]);
    }

    /// Converts from `f64`, rounding to nearest.
    fn from_f64(value: f64) -> Self;

    /// Converts to `f64`, exactly.
    fn to_f64(self) -> f64;

    /// Returns true if the value is neither infinite nor NaN.
    fn is_finite(self) -> bool;
}

macro_rules! float_impl {
    ($t:ty) => {
        impl Float for $t {
            #[inline(always)]
            fn read(dtype: Dtype, bytes: &[u8], out: &mut [Self]) {
                assert_eq!(bytes.len(), out.len() * dtype.size());
                match dtype {
                    Dtype::F64 => decode(bytes, out, |b| f64::from_le_bytes(b) as $t),
                    Dtype::F32 => decode(bytes, out, |b| f32::from_le_bytes(b) as $t),
                    Dtype::F16 => decode(bytes, out, |b| f16_to_f32(u16::from_le_bytes(b)) as $t),
                    Dtype::BF16 => decode(bytes, out, |b| bf16_to_f32(u16::from_le_bytes(b)) as $t),
                    Dtype::F8E4M3 => decode(bytes, out, |[b]: [u8; 1]| e4m3_to_f32(b) as $t),
                    // The upper half of an f16.
                    Dtype::F8E5M2 => decode(bytes, out, |[b]: [u8; 1]| f16_to_f32(u16::from(b) << 8) as $t),
                    other => panic!("{other} is not a floating-point dtype"),
                }
            }

            #[inline(always)]
            fn store(dtype: Dtype, values: &[Self], bytes: &mut [u8]) {
                assert_eq!(bytes.len(), values.len() * dtype.size());
                match dtype {
                    Dtype::F64 => encode(values, bytes, |v| (v as f64).to_le_bytes()),
                    Dtype::F32 => encode(values, bytes, |v| (v as f32).to_le_bytes()),
                    // Through f32, as PyTorch does.
                    Dtype::F16 => encode(values, bytes, |v| f32_to_f16(v as f32).to_le_bytes()),
                    Dtype::BF16 => encode(values, bytes, |v| f32_to_bf16(v as f32).to_le_bytes()),
                    Dtype::F8E4M3 => encode(values, bytes, |v| [f32_to_e4m3(v as f32)]),
                    Dtype::F8E5M2 => encode(values, bytes, |v| [f32_to_e5m2(v as f32)]),
                    other => panic!("{other} is not a floating-point dtype"),
                }
            }

            fn from_f64(value: f64) -> Self {
                value as $t
            }

            fn to_f64(self) -> f64 {
                self as f64
            }

            #[inline(always)]
            fn is_finite(self) -> bool {
                <$t>::is_finite(self)
            }
        }
    };
}

float_impl!(f32);
float_impl!(f64);

#[inline(always)]
fn decode<const N: usize, T>(bytes: &[u8], out: &mut [T], convert: impl Fn([u8; N]) -> T) {
    for (slot, chunk) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *slot = convert(*chunk);
    }
}

#[inline(always)]
fn encode<const N: usize, T: Copy>(values: &[T], bytes: &mut [u8], convert: impl Fn(T) -> [u8; N]) {
    for (value, chunk) in values.iter().zip(bytes.as_chunks_mut::<N>().0) {
        *chunk = convert(*value);
    }
}

// The conversions below have no branches, so that the compiler vectorizes loops over them.

/// Converts exactly.
#[inline(always)]
fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Converts exactly: exponent and mantissa are shifted into place, and a multiplication by 2^112
/// corrects the bias, also for subnormal numbers.
#[inline(always)]
fn f16_to_f32(bits: u16) -> f32 {
    const BIAS: f32 = f32::from_bits((112 + 127) << 23);
    const SPECIAL: u32 = 0x7c00 << 13;
    let (sign, rest) = (u32::from(bits & 0x8000) << 16, u32::from(bits & 0x7fff) << 13);
    let exponent = if rest >= SPECIAL { f32::INFINITY.to_bits() } else { 0 };
    f32::from_bits((f32::from_bits(rest) * BIAS).to_bits() | exponent | sign)
}

/// Rounds to nearest, ties to even.
#[inline(always)]
fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let nan = bits >> 16 | 0x40;
    (if value.is_nan() { nan } else { rounded }) as u16
}

/// Rounds to nearest, ties to even.
#[inline(always)]
fn f32_to_f16(value: f32) -> u16 {
    /// Power of two whose unit in the last place, as an f32, is the smallest subnormal f16. Adding
    /// it rounds subnormal numbers.
    const MAGIC: u32 = (127 - 15 + 23 - 10 + 1) << 23;
    const SMALLEST_NORMAL: u32 = 113 << 23;
    const OVERFLOW: u32 = 143 << 23;
    let bits = value.to_bits() & 0x7fff_ffff;
    let normal = bits.wrapping_sub(112 << 23).wrapping_add(0xfff + (bits >> 13 & 1)) >> 13;
    let subnormal = (f32::from_bits(bits) + f32::from_bits(MAGIC)).to_bits().wrapping_sub(MAGIC);
    let special = if bits > f32::INFINITY.to_bits() { 0x7e00 } else { 0x7c00 };
    let finite = if bits < SMALLEST_NORMAL { subnormal } else { normal };
    let magnitude = if bits >= OVERFLOW { special } else { finite };
    (magnitude | value.to_bits() >> 16 & 0x8000) as u16
}

/// Converts exactly, as [`f16_to_f32`] does: a multiplication by 2^120 corrects the bias.
#[inline(always)]
fn e4m3_to_f32(bits: u8) -> f32 {
    const BIAS: f32 = f32::from_bits((120 + 127) << 23);
    let (sign, rest) = (u32::from(bits & 0x80) << 24, u32::from(bits & 0x7f));
    let value = (f32::from_bits(rest << 20) * BIAS).to_bits();
    f32::from_bits((if rest == 0x7f { f32::NAN.to_bits() } else { value }) | sign)
}

/// Rounds to nearest, ties to even; NaN from the midpoint above the largest number on, as torch.
#[inline(always)]
fn f32_to_e4m3(value: f32) -> u8 {
    /// The unit in the last place of this power of two, as an f32, is the smallest subnormal
    /// number.
    const MAGIC: u32 = (127 - 7 + 23 - 3 + 1) << 23;
    const SMALLEST_NORMAL: u32 = (127 - 6) << 23;
    const NAN_FROM: u32 = 0x43f0_0000;
    let bits = value.to_bits() & 0x7fff_ffff;
    let normal = bits.wrapping_sub(120 << 23).wrapping_add(0x7_ffff + (bits >> 20 & 1)) >> 20;
    let subnormal = (f32::from_bits(bits) + f32::from_bits(MAGIC)).to_bits().wrapping_sub(MAGIC);
    let finite = if bits < SMALLEST_NORMAL { subnormal } else { normal };
    let magnitude = if bits >= NAN_FROM { 0x7f } else { finite };
    (magnitude | value.to_bits() >> 24 & 0x80) as u8
}

/// Rounds to nearest, ties to even; infinity from the midpoint above the largest number on.
#[inline(always)]
fn f32_to_e5m2(value: f32) -> u8 {
    const MAGIC: u32 = (127 - 15 + 23 - 2 + 1) << 23;
    const SMALLEST_NORMAL: u32 = (127 - 14) << 23;
    const OVERFLOW: u32 = 143 << 23;
    let bits = value.to_bits() & 0x7fff_ffff;
    let normal = bits.wrapping_sub(112 << 23).wrapping_add(0xf_ffff + (bits >> 21 & 1)) >> 21;
    let subnormal = (f32::from_bits(bits) + f32::from_bits(MAGIC)).to_bits().wrapping_sub(MAGIC);
    let special = if bits > f32::INFINITY.to_bits() { 0x7f } else { 0x7c };
    let finite = if bits < SMALLEST_NORMAL { subnormal } else { normal };
    let magnitude = if bits >= OVERFLOW { special } else { finite };
    (magnitude | value.to_bits() >> 24 & 0x80) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of the two dtypes of 8 bits by their definition.
    fn f8(dtype: Dtype, bits: u8) -> f64 {
        let (exponent, mantissa, bias) = match dtype {
            Dtype::F8E4M3 => (i32::from(bits >> 3 & 15), f64::from(bits & 7) / 8.0, 7),
            _ => (i32::from(bits >> 2 & 31), f64::from(bits & 3) / 4.0, 15),
        };
        let special = match dtype {
            Dtype::F8E4M3 => (bits & 0x7f == 0x7f).then_some(f64::NAN),
            _ => (exponent == 31).then_some(if mantissa == 0.0 { f64::INFINITY } else { f64::NAN }),
        };
        let number = match exponent {
            0 => mantissa * 2f64.powi(1 - bias),
            e => (1.0 + mantissa) * 2f64.powi(e - bias),
        };
        special.unwrap_or(number) * if bits & 0x80 == 0 { 1.0 } else { -1.0 }
    }

    #[test]
    fn numbers_of_eight_bits_are_those_of_their_definition_and_casts_go_to_the_nearest() {
        for dtype in [Dtype::F8E4M3, Dtype::F8E5M2] {
            let mut finite: Vec<(f64, u8)> = Vec::new();
            for bits in 0..=u8::MAX {
                let mut value = [0f32];
                f32::read(dtype, &[bits], &mut value);
                let expected = f8(dtype, bits);
                assert!(f64::from(value[0]) == expected || value[0].is_nan() && expected.is_nan(), "{dtype} {bits:#x}");
                if expected.is_finite() && bits < 0x80 {
                    finite.push((expected, bits));
                }
            }
            // Every number, the midpoints between neighbors, and one f32 step around each of them.
            for pair in finite.windows(2) {
                let middle = (pair[0].0 + pair[1].0) / 2.0;
                let even = if pair[0].1 % 2 == 0 { pair[0].1 } else { pair[1].1 };
                let next = |value: f64, by: i64| f32::from_bits(((value as f32).to_bits() as i64 + by) as u32);
                for (value, expected) in [
                    (pair[0].0 as f32, pair[0].1),
                    (next(middle, -1), pair[0].1),
                    (middle as f32, even),
                    (next(middle, 1), pair[1].1),
                    (pair[1].0 as f32, pair[1].1),
                ] {
                    let mut bytes = Vec::new();
                    f32::write(dtype, &[value, -value], &mut bytes);
                    assert_eq!(bytes, [expected, expected | 0x80], "{dtype} {value:e}");
                }
            }
        }
        // Beyond the largest number, as torch casts.
        for (dtype, value, expected) in [
            (Dtype::F8E4M3, 464.0, 0x7e),
            (Dtype::F8E4M3, 464.1, 0x7f),
            (Dtype::F8E4M3, f32::INFINITY, 0x7f),
            (Dtype::F8E5M2, 61439.0, 0x7b),
            (Dtype::F8E5M2, 61440.0, 0x7c),
            (Dtype::F8E5M2, f32::NAN, 0x7f),
        ] {
            let mut bytes = Vec::new();
            f32::write(dtype, &[value], &mut bytes);
            assert_eq!(bytes, [expected], "{dtype} {value:e}");
        }
    }

    #[test]
    fn every_half_precision_value_survives_a_round_trip() {
        for dtype in [Dtype::BF16, Dtype::F16] {
            for bits in 0..=u16::MAX {
                let bytes = bits.to_le_bytes();
                let mut value = [0f32];
                f32::read(dtype, &bytes, &mut value);
                if value[0].is_nan() {
                    continue;
                }
                let mut back = Vec::new();
                f32::write(dtype, &value, &mut back);
                assert_eq!(back, bytes, "{dtype} {bits:#06x}");
            }
        }
    }

    #[test]
    fn conversions_agree_with_the_half_crate() {
        for bits in 0..=u16::MAX {
            assert_eq!(
                f16_to_f32(bits).to_bits() & !0x40_0000,
                half::f16::from_bits(bits).to_f32().to_bits() & !0x40_0000
            );
            assert_eq!(
                bf16_to_f32(bits).to_bits() & !0x40_0000,
                half::bf16::from_bits(bits).to_f32().to_bits() & !0x40_0000
            );
        }
        // One f32 step on either side of every f16 and bf16 value and of every midpoint between
        // neighbors.
        for high in 0..=u16::MAX {
            for centre in [
                u32::from(high) << 16,
                u32::from(high) << 16 | 0x8000,
                f16_to_f32(high).to_bits(),
                f16_to_f32(high).to_bits() | 0x1000,
            ] {
                for value in [centre.wrapping_sub(1), centre, centre.wrapping_add(1)].map(f32::from_bits) {
                    if value.is_nan() {
                        assert!(half::f16::from_bits(f32_to_f16(value)).is_nan());
                        assert!(half::bf16::from_bits(f32_to_bf16(value)).is_nan());
                        continue;
                    }
                    assert_eq!(f32_to_f16(value), half::f16::from_f32(value).to_bits(), "{value:e}");
                    assert_eq!(f32_to_bf16(value), half::bf16::from_f32(value).to_bits(), "{value:e}");
                }
            }
        }
    }

    #[test]
    fn casts_round_to_nearest_even() {
        let mut out = Vec::new();
        // 1 + 2^-8 is the midpoint of two bf16 values, of which 1 is even.
        f32::write(Dtype::BF16, &[1.0 + 2f32.powi(-8), 1.0 + 3.0 * 2f32.powi(-8)], &mut out);
        let mut back = [0f32; 2];
        f32::read(Dtype::BF16, &out, &mut back);
        assert_eq!(back, [1.0, 1.0 + 4.0 * 2f32.powi(-8)]);
    }

    #[test]
    fn casts_consider_the_last_bit_of_an_f32() {
        // One f32 step above the midpoint is not a tie and rounds up, in both half precisions.
        for (dtype, half_way, up) in [(Dtype::BF16, 8, 7), (Dtype::F16, 11, 10)] {
            let value = 1.0 + 2f32.powi(-half_way) + f32::EPSILON;
            for cast in [f32::write as fn(Dtype, &[f32], &mut Vec<u8>), |d, v, out| f64::write(d, &[v[0].into()], out)]
            {
                let (mut out, mut back) = (Vec::new(), [0f32]);
                cast(dtype, &[value], &mut out);
                f32::read(dtype, &out, &mut back);
                assert_eq!(back, [1.0 + 2f32.powi(-up)], "{dtype}");
            }
        }
    }

    #[test]
    fn names_and_sizes_agree_with_the_format() {
        assert_eq!("bfloat16".parse::<Dtype>(), Ok(Dtype::BF16));
        assert!("int8".parse::<Dtype>().is_err());
        assert_eq!((Dtype::Bool.name(), Dtype::Bool.size()), ("BOOL", 1));
    }
}
