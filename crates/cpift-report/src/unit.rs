//! What a figure is measured in: how it is shown, which way is better, and what it adds to the Average Normalised Score.

/// The formula under every table. The paper publishes none, so none is claimed to match its column.
pub const ANS_FORMULA: &str = "ANS (Average Normalised Score): the mean over the tasks with a metric, each brought to 0 to 10: \
                               10 x metric for accuracy and CodeBLEU, the judge's rating as given. \
                               No parity with the paper's column is claimed: its formula is not published.";

/// The unit of a figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// A fraction, shown in percent; more is better.
    Percent,
    /// A judge's rating, 1 to 10; more is better.
    Rating,
    /// A negative log-likelihood in nats a token; less is better.
    Nats,
}

impl Unit {
    /// The unit of the figure called `name` in scores.json.
    pub fn of(name: &str) -> Self {
        match name {
            "nll" => Self::Nats,
            name if name.starts_with("judge") => Self::Rating,
            _ => Self::Percent,
        }
    }

    /// What differences are called.
    pub fn symbol(self) -> &'static str {
        match self {
            Self::Percent => "%",
            Self::Rating => "of 10",
            Self::Nats => "nats",
        }
    }

    /// The direction that is better: 1 upwards, -1 downwards.
    pub fn direction(self) -> f64 {
        if self == Self::Nats { -1.0 } else { 1.0 }
    }

    /// A value in the unit that is shown.
    pub fn shown(self, value: f64) -> f64 {
        if self == Self::Percent { 100.0 * value } else { value }
    }

    /// A value as text, without its symbol.
    pub fn text(self, value: f64) -> String {
        // Minus zero is no other value than zero.
        format!("{:.*}", self.digits(), self.shown(value) + 0.0)
    }

    /// A difference as text: with its sign.
    pub fn signed(self, value: f64) -> String {
        let text = format!("{:+.*}", self.digits(), self.shown(value));
        let zero = text.trim_start_matches(['+', '-']).trim_matches(['0', '.']).is_empty();
        if zero { text.replace(['+', '-'], "") } else { text.replace('-', "−") }
    }

    fn digits(self) -> usize {
        match self {
            Self::Percent => 1,
            Self::Rating => 2,
            Self::Nats => 4,
        }
    }

    /// A metric on the scale of the Average Normalised Score, 0 to 10.
    pub fn normalised(self, value: f64) -> f64 {
        if self == Self::Percent { 10.0 * value } else { value }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_shown_in_their_unit_and_differences_with_a_sign() {
        assert_eq!((Unit::of("acc").text(0.755), Unit::of("nll").text(0.755)), ("75.5".into(), "0.7550".into()));
        assert_eq!(Unit::Percent.signed(-0.05), "−5.0");
        assert_eq!(Unit::Percent.signed(0.0001), "0.0");
        assert_eq!(Unit::Percent.signed(1.0), "+100.0");
        assert_eq!(Unit::of("judge").normalised(7.5), 7.5);
        assert_eq!(Unit::of("codebleu").normalised(0.75), 7.5);
    }
}
