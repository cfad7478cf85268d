//! Element types of tensors, and reading and writing floating-point elements of any of them.

use half::{bf16, f16};

/// An element type of the safetensors format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the names are the format's own")]
pub enum Dtype {
    F64,
    F32,
    F16,
    BF16,
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
    /// The dtypes that can be read, for messages.
    pub const KNOWN: &str = "F64, F32, F16, BF16, I64, U64, I32, U32, I16, U16, I8, U8 or BOOL";

    const ALL: [(Self, &'static str, usize); 13] = [
        (Self::F64, "F64", 8),
        (Self::F32, "F32", 4),
        (Self::F16, "F16", 2),
        (Self::BF16, "BF16", 2),
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

    /// The dtype as the format spells it, such as `BF16`.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        self.row().2
    }

    /// Whether elements are floating-point numbers.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F64 | Self::F32 | Self::F16 | Self::BF16)
    }

    /// The name in `torch_dtype` of config.json, such as `bfloat16`; `None` for other than floats.
    pub fn torch_name(self) -> Option<&'static str> {
        match self {
            Self::F64 => Some("float64"),
            Self::F32 => Some("float32"),
            Self::F16 => Some("float16"),
            Self::BF16 => Some("bfloat16"),
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

/// The floating-point dtypes by the names people type: `f32` or `float32`, and so on.
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

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The arithmetic type of a stage: `f32`, or `f64` where an input is F64.
pub trait Float: Copy + PartialOrd + Send + Sync + 'static {
    /// Converts elements stored as `dtype` (little endian, any alignment) to this type, exactly where it is wide enough.
    ///
    /// # Panics
    /// When `dtype` is not floating-point or the lengths disagree.
    fn read(dtype: Dtype, bytes: &[u8], out: &mut [Self]);

    /// Appends `values` to `out` as `dtype`, rounding to nearest, ties to even.
    ///
    /// # Panics
    /// When `dtype` is not floating-point.
    fn write(dtype: Dtype, values: &[Self], out: &mut Vec<u8>);

    /// From `f64`, rounded.
    fn from_f64(value: f64) -> Self;

    /// To `f64`, exactly.
    fn to_f64(self) -> f64;

    /// Neither infinite nor NaN.
    fn is_finite(self) -> bool;
}

macro_rules! float_impl {
    ($t:ty) => {
        impl Float for $t {
            fn read(dtype: Dtype, bytes: &[u8], out: &mut [Self]) {
                assert_eq!(bytes.len(), out.len() * dtype.size());
                match dtype {
                    Dtype::F64 => decode(bytes, out, |b| f64::from_le_bytes(b) as $t),
                    Dtype::F32 => decode(bytes, out, |b| f32::from_le_bytes(b) as $t),
                    Dtype::F16 => decode(bytes, out, |b| f16::from_le_bytes(b).to_f32() as $t),
                    Dtype::BF16 => {
                        decode(bytes, out, |b: [u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16) as $t)
                    }
                    other => panic!("{other} is not a floating-point dtype"),
                }
            }

            fn write(dtype: Dtype, values: &[Self], out: &mut Vec<u8>) {
                let start = out.len();
                out.resize(start + values.len() * dtype.size(), 0);
                let bytes = &mut out[start..];
                // By way of f32, as PyTorch casts: `from_f64` drops the low bits before it rounds.
                match dtype {
                    Dtype::F64 => encode(values, bytes, |v| (v as f64).to_le_bytes()),
                    Dtype::F32 => encode(values, bytes, |v| (v as f32).to_le_bytes()),
                    Dtype::F16 => encode(values, bytes, |v| f16::from_f32(v as f32).to_le_bytes()),
                    Dtype::BF16 => encode(values, bytes, |v| bf16::from_f32(v as f32).to_le_bytes()),
                    other => panic!("{other} is not a floating-point dtype"),
                }
            }

            fn from_f64(value: f64) -> Self {
                value as $t
            }

            fn to_f64(self) -> f64 {
                self as f64
            }

            fn is_finite(self) -> bool {
                <$t>::is_finite(self)
            }
        }
    };
}

float_impl!(f32);
float_impl!(f64);

fn decode<const N: usize, T>(bytes: &[u8], out: &mut [T], convert: impl Fn([u8; N]) -> T) {
    for (slot, chunk) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *slot = convert(*chunk);
    }
}

fn encode<const N: usize, T: Copy>(values: &[T], bytes: &mut [u8], convert: impl Fn(T) -> [u8; N]) {
    for (value, chunk) in values.iter().zip(bytes.as_chunks_mut::<N>().0) {
        *chunk = convert(*value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn casts_round_to_nearest_even() {
        let mut out = Vec::new();
        // 1 + 2^-8 lies half-way between two bf16 values; the even one is 1.
        f32::write(Dtype::BF16, &[1.0 + 2f32.powi(-8), 1.0 + 3.0 * 2f32.powi(-8)], &mut out);
        let mut back = [0f32; 2];
        f32::read(Dtype::BF16, &out, &mut back);
        assert_eq!(back, [1.0, 1.0 + 4.0 * 2f32.powi(-8)]);
    }

    #[test]
    fn casts_see_the_last_bit_of_an_f32() {
        // One f32 step above the half-way point is no tie: it goes up, in both half precisions.
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
