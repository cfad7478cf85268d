//! Regions of a tensor as packed bits (bit b of byte a is element 8a + b): visiting their elements,
//! the core regions of all tasks, and the value of an element that belongs to several.

use cpift_core::format::mask::bit;

/// Elements of a tensor as packed bits: those that are set, or those that are not.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Region<'a> {
    /// Packed bits.
    pub bits: &'a [u8],
    /// True for the elements whose bit is not set.
    pub inverted: bool,
}

impl Region<'_> {
    /// Number of elements, of `numel` in all.
    pub fn count(self, numel: usize) -> u64 {
        let ones = cpift_core::format::mask::count_ones(self.bits);
        if self.inverted { numel as u64 - ones } else { ones }
    }

    /// Calls `each` with position and value of every element of the region; `values[0]` is element
    /// `start`.
    pub fn inside<T>(self, start: usize, values: &mut [T], each: impl FnMut(usize, &mut T)) {
        by_bit(self.bits, start, values, if self.inverted { 0xFF } else { 0 }, each);
    }
}

/// Calls `each` with position and value of every element whose bit is not set; `values[0]` is
/// element `start`.
pub(crate) fn outside<T>(bits: &[u8], start: usize, values: &mut [T], each: impl FnMut(usize, &mut T)) {
    by_bit(bits, start, values, 0xFF, each);
}

fn by_bit<T>(bits: &[u8], start: usize, values: &mut [T], flip: u8, mut each: impl FnMut(usize, &mut T)) {
    if !start.is_multiple_of(8) {
        let is_set = |(j, _): &(usize, &mut T)| bit(bits, start + j) != (flip != 0);
        values.iter_mut().enumerate().filter(is_set).for_each(|(j, v)| each(j, v));
        return;
    }
    for (a, (byte, eight)) in bits[start / 8..].iter().zip(values.chunks_mut(8)).enumerate() {
        let byte = byte ^ flip;
        if byte != 0 {
            eight.iter_mut().enumerate().filter(|(b, _)| byte >> b & 1 == 1).for_each(|(b, v)| each(8 * a + b, v));
        }
    }
}

/// Value of an element that is core to several tasks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Conflict {
    /// Value of the last task in the order of groups.json.
    Last,
    /// Value of the first task in the order of groups.json.
    First,
    /// Value of the task that moved it most from the base; of equals the first.
    MaxDelta,
    /// Mean of the values of the tasks that claim it.
    Mean,
}

impl Conflict {
    /// All rules, in the order of help texts.
    pub const ALL: [Self; 4] = [Self::Last, Self::First, Self::MaxDelta, Self::Mean];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Last => "last",
            Self::First => "first",
            Self::MaxDelta => "max-delta",
            Self::Mean => "mean",
        }
    }
}

/// Core regions of all tasks in one tensor: packed bits per task, in the order of groups.json.
#[derive(Clone, Default)]
pub(crate) struct Claims<'a> {
    bits: Vec<&'a [u8]>,
}

impl<'a> Claims<'a> {
    /// Core regions with these packed bits, one slice per task.
    pub fn new(bits: Vec<&'a [u8]>) -> Self {
        Self { bits }
    }

    /// Number of elements in `start..start + len` that are core to at least one task, and number of
    /// those that are core to at least two.
    ///
    /// `start` is a multiple of 8.
    pub fn count(&self, start: usize, len: usize) -> (u64, u64) {
        self.bytes(start, len).fold((0, 0), |(core, conflicts), (_, any, several)| {
            (core + u64::from(any.count_ones()), conflicts + u64::from(several.count_ones()))
        })
    }

    /// Calls `each` with the position, counted from `start`, of every core element in `start..start
    /// + len`, in order.
    pub fn for_each(&self, start: usize, len: usize, mut each: impl FnMut(usize)) {
        for (a, any, _) in self.bytes(start, len).filter(|(_, any, _)| *any != 0) {
            (0..8).filter(|b| any >> b & 1 == 1).for_each(|b| each(8 * a + b));
        }
    }

    /// For each byte of the range its index, the elements that some task claims and those that
    /// several claim.
    fn bytes(&self, start: usize, len: usize) -> impl Iterator<Item = (usize, u8, u8)> {
        debug_assert_eq!(start % 8, 0);
        let first = start / 8;
        let count = if self.bits.is_empty() { 0 } else { len.div_ceil(8) };
        (0..count).map(move |a| {
            let (any, several) = self.bits.iter().fold((0, 0), |(any, several), bits| {
                let byte = bits[first + a];
                (any | byte, several | any & byte)
            });
            (a, any, several)
        })
    }

    /// Value of the core element at `index` of the tensor; `values[i]` is the value in task i, and
    /// `moved` gives a task's distance from the base.
    pub fn resolve(&self, rule: Conflict, index: usize, values: &[f64], moved: impl Fn(usize) -> f64) -> f64 {
        let mut claimants = (0..self.bits.len()).filter(|&i| bit(self.bits[i], index));
        let first = claimants.next().expect("a core element is claimed by a task");
        match rule {
            Conflict::First => values[first],
            Conflict::Last => values[claimants.next_back().unwrap_or(first)],
            Conflict::Mean => {
                let (sum, n) = claimants.fold((values[first], 1.0), |(sum, n), i| (sum + values[i], n + 1.0));
                sum / n
            }
            Conflict::MaxDelta => {
                let Some(second) = claimants.next() else { return values[first] };
                let candidates = std::iter::once(second).chain(claimants);
                let (best, _) = candidates.fold((first, moved(first)), |(best, most), i| {
                    let delta = moved(i);
                    if delta > most { (i, delta) } else { (best, most) }
                });
                values[best]
            }
        }
    }
}

/// |θ⁽ⁱ⁾ − θ⁽⁰⁾| of one element as the mask stage ranks it: in f32, or in f64 if an input is F64
/// (`wide`).
pub(crate) fn magnitude(value: f64, base: f64, wide: bool) -> f64 {
    let delta = (value - base).abs();
    // Rounding the f64 difference of two f32 values gives exactly their f32 difference.
    if wide { delta } else { f64::from(delta as f32) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_positions_agree_with_the_bits() {
        let (a, b) = ([0b0000_0101, 0b1000_0001, 0b1], [0b0000_0100, 0b0, 0b1]);
        let claims = Claims::new(vec![&a, &b]);
        assert_eq!(claims.count(0, 17), (5, 2));
        assert_eq!(claims.count(8, 9), (3, 1));
        let mut seen = Vec::new();
        claims.for_each(8, 9, |j| seen.push(j));
        assert_eq!(seen, [0, 7, 8]);
        assert_eq!(Claims::default().count(0, 100), (0, 0));
    }

    #[test]
    fn a_region_and_the_rest_share_the_elements_wherever_they_start() {
        let bits = [0b1010_0110, 0b0000_0011, 0b1000_0000];
        for (start, inverted) in [(0, false), (3, false), (0, true), (5, true)] {
            let region = Region { bits: &bits, inverted };
            let mut seen = vec![0; 24 - start];
            region.inside(start, &mut seen, |_, v| *v += 1);
            let expected: Vec<i32> = (start..24).map(|j| i32::from(bit(&bits, j) != inverted)).collect();
            assert_eq!(seen, expected);
            let rest = Region { inverted: !inverted, ..region };
            rest.inside(start, &mut seen, |_, v| *v += 1);
            assert_eq!(seen, vec![1; 24 - start]);
        }
        assert_eq!(Region { bits: &bits, inverted: false }.count(24), 7);
        assert_eq!(Region { bits: &bits, inverted: true }.count(24), 17);
    }

    #[test]
    fn each_rule_picks_its_value() {
        let bits = [[1u8], [0u8], [1u8], [1u8]];
        let claims = Claims::new(bits.iter().map(|b| b.as_slice()).collect());
        let values = [1.0, 9.0, -5.0, 5.0];
        let pick = |rule| claims.resolve(rule, 0, &values, |i| f64::abs(values[i]));
        assert_eq!(pick(Conflict::First), 1.0);
        assert_eq!(pick(Conflict::Last), 5.0);
        assert_eq!(pick(Conflict::MaxDelta), -5.0, "of two that moved alike the first stays");
        assert_eq!(pick(Conflict::Mean), 1.0 / 3.0);
    }
}
