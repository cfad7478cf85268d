//! p as an exact decimal fraction, so that ⌊p·D/100⌋ does not suffer from binary rounding.

use std::str::FromStr;

/// p in percent, above 0 and at most 100, as a fraction of integers.
///
/// In `f64`, 0.57 % of 10,000 is 56.99999999999999, which rounds down to 56 instead of 57.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Percent {
    numerator: u128,
    denominator: u128,
    value: f64,
}

impl Percent {
    /// ⌊p·d/100⌋, exactly.
    pub fn of(self, d: u64) -> u64 {
        // At most 10^22 · 2^64 and below 10^22 · 100: both fit in 128 bits.
        (self.numerator * u128::from(d) / (self.denominator * 100)) as u64
    }

    /// ⌈p·n/100⌉, exactly.
    pub fn up_of(self, n: u64) -> u64 {
        (self.numerator * u128::from(n)).div_ceil(self.denominator * 100) as u64
    }

    /// p as `f64`, for records.
    pub fn value(self) -> f64 {
        self.value
    }
}

/// Largest number of decimals and of significant digits.
const MAX_DIGITS: usize = 18;

impl FromStr for Percent {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let value: f64 = text.parse().map_err(|_| format!("expected a number, found {text:?}"))?;
        let range = || "p must be above 0 and at most 100 (percent)".to_owned();
        if !(value > 0.0 && value <= 100.0) {
            return Err(range());
        }
        // Rust parsed the text as a float, so it has the form [+]digits[.digits][e[±]digits].
        let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
        let exponent: i64 = exponent.parse().map_err(|_| range())?;
        let (whole, fraction) = mantissa.trim_start_matches('+').split_once('.').unwrap_or((mantissa, ""));
        let digits = format!("{}{fraction}", whole.trim_start_matches('+'));
        let kept = digits.trim_end_matches('0');
        let scale = fraction.len() as i64 - (digits.len() - kept.len()) as i64 - exponent;
        let kept = kept.trim_start_matches('0');
        if kept.len() > MAX_DIGITS || scale > MAX_DIGITS as i64 {
            return Err(format!("expected at most {MAX_DIGITS} decimals, found {text:?}"));
        }
        let digits: u128 = kept.parse().map_err(|_| range())?;
        let power = 10u128.pow(scale.unsigned_abs() as u32);
        let (numerator, denominator) = if scale < 0 { (digits * power, 1) } else { (digits, power) };
        if numerator > 100 * denominator {
            return Err(range());
        }
        Ok(Self { numerator, denominator, value })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str, d: u64) -> u64 {
        text.parse::<Percent>().unwrap().of(d)
    }

    #[test]
    fn the_count_is_that_of_the_decimal_text() {
        assert_eq!(of("0.1", 1000), 1);
        assert_eq!(of("0.57", 10_000), 57);
        assert_eq!((0.57f64 * 10_000.0 / 100.0) as u64, 56, "which is why p is not a float");
        assert_eq!(of("0.29", 100_000), 290);
        assert_eq!(of("0.07", 10_000), 7);
        assert_eq!(of("1", 99), 0);
        assert_eq!(of("1", 100), 1);
        assert_eq!(of("100", 12_345), 12_345);
        assert_eq!(of("33.333333333333333", 3), 0);
        assert_eq!(of("1", u64::MAX), u64::MAX / 100);
    }

    #[test]
    fn every_way_to_write_a_number_means_the_same() {
        for text in ["1", "1.0", "+1", "01.00", "1e0", "10e-1", "0.1e1", "1.", "+.1E+1"] {
            assert_eq!(of(text, 12_345), 123, "{text}");
        }
        assert_eq!(of(".5", 1000), 5);
        assert_eq!(of("1e2", 7), 7);
        assert_eq!(of("2.5e-3", 1_000_000), 25);
    }

    #[test]
    fn rounded_up_it_is_one_more_where_something_is_left() {
        let up = |text: &str, n: u64| text.parse::<Percent>().unwrap().up_of(n);
        assert_eq!((up("10", 290), up("10", 291), up("0.001", 3), up("100", 7), up("10", 0)), (29, 30, 1, 7, 0));
        assert_eq!((0.07f64 * 100.0).ceil(), 8.0, "which is why p is not a float");
        assert_eq!(up("7", 100), 7);
    }

    #[test]
    fn what_is_out_of_range_is_refused() {
        for text in ["0", "-1", "100.5", "nan", "inf", "1e3", "", "one", "-0", "1e-30", "100.00000000000000001"] {
            assert!(text.parse::<Percent>().is_err(), "{text}");
        }
    }
}
