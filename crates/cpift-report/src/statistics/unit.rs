//! Units of figures: their format, the direction that is better, their share in the Average
//! Normalised Score; and values spread over seeds.

/// The formula printed under every table. The paper publishes none, so no match with its column is
/// claimed.
pub(crate) const ANS_FORMULA: &str = "ANS (Average Normalised Score): the mean over the tasks with a metric, each brought to 0 to 10: \
                               10 x metric for accuracy and CodeBLEU, the judge's rating as given. \
                               No parity with the paper's column is claimed: its formula is not published.";

/// The unit of a figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// A fraction, shown in percent; more is better.
    Percent,
    /// A judge's rating, 1 to 10; more is better.
    Rating,
    /// A negative log-likelihood in nats per token; less is better.
    Nats,
    /// A perplexity: e to the loss; less is better.
    Perplexity,
    /// A number of rows, neither good nor bad.
    Count,
}

impl Unit {
    /// The unit of the figure called `name` in scores.json.
    pub(crate) fn of(name: &str) -> Self {
        match name {
            "nll" => Self::Nats,
            "perplexity" => Self::Perplexity,
            name if name.starts_with("judge") => Self::Rating,
            _ => Self::Percent,
        }
    }

    /// The unit's symbol after a figure's name.
    pub(crate) fn symbol(self) -> &'static str {
        match self {
            Self::Percent => "%",
            Self::Rating => "of 10",
            Self::Nats => "nats",
            Self::Perplexity | Self::Count => "",
        }
    }

    /// The direction that is better: 1 upwards, -1 downwards.
    pub(crate) fn direction(self) -> f64 {
        if self.is_loss() { -1.0 } else { 1.0 }
    }

    /// Returns true if the figure comes from the loss on the reference answers.
    pub(crate) fn is_loss(self) -> bool {
        matches!(self, Self::Nats | Self::Perplexity)
    }

    /// The function that gives the difference between the baseline's figure and another's, each
    /// computed from rows. The rows of a perplexity give its loss, so the exponential is taken
    /// there.
    pub(crate) fn difference(self) -> fn(f64, f64) -> f64 {
        match self {
            Self::Perplexity => |base, run| run.exp() - base.exp(),
            _ => |base, run| run - base,
        }
    }

    /// A value in the unit that tables show: percent for fractions.
    pub(crate) fn shown(self, value: f64) -> f64 {
        if self == Self::Percent { 100.0 * value } else { value }
    }

    /// A value as text, without its symbol.
    pub(crate) fn text(self, value: f64) -> String {
        let text = self.rounded(value);
        // Rounding may leave a minus sign on zero.
        if is_zero(&text) { text.replace('-', "") } else { text }
    }

    /// A difference as text: with its sign.
    pub(crate) fn signed(self, value: f64) -> String {
        let text = self.rounded(value);
        match text.strip_prefix('-') {
            _ if is_zero(&text) => text.replace('-', ""),
            Some(text) => format!("−{text}"),
            None => format!("+{text}"),
        }
    }

    /// A perplexity may be of any size; large ones are written with an exponent.
    fn rounded(self, value: f64) -> String {
        let shown = self.shown(value);
        if self == Self::Perplexity && shown.abs() >= 1e6 {
            format!("{shown:.3e}")
        } else {
            format!("{shown:.*}", self.digits())
        }
    }

    fn digits(self) -> usize {
        match self {
            Self::Percent => 1,
            Self::Rating | Self::Perplexity => 2,
            Self::Nats => 4,
            Self::Count => 0,
        }
    }

    /// A metric on the scale of the Average Normalised Score, 0 to 10.
    pub(crate) fn normalised(self, value: f64) -> f64 {
        if self == Self::Percent { 10.0 * value } else { value }
    }
}

fn is_zero(text: &str) -> bool {
    text.chars().all(|c| matches!(c, '-' | '0' | '.'))
}

/// One value per seed, or per pair of tasks.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Spread {
    /// The values, in their order.
    pub(crate) values: Vec<f64>,
}

impl Spread {
    /// The mean.
    pub(crate) fn mean(&self) -> f64 {
        self.values.iter().sum::<f64>() / self.values.len() as f64
    }

    /// The sample standard deviation (n − 1); `None` for one value.
    pub(crate) fn sd(&self) -> Option<f64> {
        let (n, mean) = (self.values.len() as f64, self.mean());
        let squares: f64 = self.values.iter().map(|v| (v - mean).powi(2)).sum();
        (self.values.len() > 1).then(|| (squares / (n - 1.0)).sqrt())
    }

    /// `mean ± sd`, or the one value.
    pub(crate) fn text(&self, unit: Unit) -> String {
        unit.text(self.mean()) + &self.sd_text(unit)
    }

    /// As [`Spread::text`], with the sign of a difference.
    pub(crate) fn signed(&self, unit: Unit) -> String {
        unit.signed(self.mean()) + &self.sd_text(unit)
    }

    fn sd_text(&self, unit: Unit) -> String {
        self.sd().map_or(String::new(), |sd| format!(" ± {}", unit.text(sd)))
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
        assert_eq!((Unit::Percent.text(-0.0001), Unit::Percent.text(-0.01)), ("0.0".into(), "-1.0".into()));
        assert_eq!((Unit::Perplexity.text(7.389), Unit::Perplexity.text(2.5e31)), ("7.39".into(), "2.500e31".into()));
        assert_eq!((Unit::Perplexity.signed(-0.5), Unit::Count.text(3.0)), ("−0.50".into(), "3".into()));
        assert_eq!(Unit::of("judge").normalised(7.5), 7.5);
        assert_eq!(Unit::of("codebleu").normalised(0.75), 7.5);
    }
}
