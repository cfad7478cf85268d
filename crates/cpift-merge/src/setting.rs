//! Settings: numbers that may depend on tensor name and layer, such as `t` of slerp, by mergekit's
//! filters and gradients.

use std::fmt;
use std::str::FromStr;

/// A number per tensor, as rules in order of precedence: the first whose filter fits the tensor's
/// name gives the value.
///
/// On the command line a rule is `0.5`, `0,0.3,1` (a gradient over the layers) or
/// `self_attn=0,0.5,1` (the same for tensors whose name contains `self_attn`; `*` fits every name).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Setting {
    rules: Vec<Rule>,
}

/// Values for the tensors whose names fit a filter.
#[derive(Debug, Clone, PartialEq)]
pub struct Rule {
    /// Part of the tensor's name; `None` fits every name.
    pub filter: Option<String>,
    /// One value, or several spread evenly from the first layer to the last; never empty.
    pub values: Vec<f64>,
}

impl Rule {
    /// The rule that gives `values` to tensors whose name contains `filter`; `*` fits every name.
    pub fn new(filter: Option<String>, values: Vec<f64>) -> Self {
        Self { filter: filter.filter(|f| f != "*"), values }
    }

    /// Returns true if the rule applies to the tensor `name`.
    fn fits(&self, name: &str) -> bool {
        self.filter.as_ref().is_none_or(|filter| name.contains(filter.as_str()))
    }

    /// Value at a layer; outside the layers (embeddings, final norm, output embedding) the first
    /// value.
    fn at(&self, layer: Option<(usize, usize)>) -> Option<f64> {
        let last = self.values.len().checked_sub(1)?;
        let position = match layer {
            None => 0.0,
            Some((layer, layers)) if layers > 1 => layer as f64 / (layers - 1) as f64,
            // The only layer is the last one.
            Some(_) => 1.0,
        };
        let scaled = position * last as f64;
        let left = (scaled as usize).min(last);
        let right = (left + 1).min(last);
        let share = scaled - left as f64;
        Some((1.0 - share) * self.values[left] + share * self.values[right])
    }
}

impl Setting {
    /// The same value for every tensor.
    pub fn constant(value: f64) -> Self {
        Self { rules: vec![Rule::new(None, vec![value])] }
    }

    /// Rules in order of precedence.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// Appends a rule, which comes after all others.
    pub fn push(&mut self, rule: Rule) {
        self.rules.push(rule);
    }

    /// Appends the rules of another setting, up to the first rule that fits every name.
    pub fn append(&mut self, other: Setting) {
        for rule in other.rules {
            if self.rules.iter().any(|earlier| earlier.filter.is_none()) {
                return;
            }
            self.rules.push(rule);
        }
    }

    /// Returns true if there are no rules.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Value for the tensor `name`, which belongs to `layer` = (index, number of layers) or to
    /// none.
    ///
    /// Values are interpolated between the two nearest of a gradient. A tensor outside the layers
    /// gets the first value of a gradient, and one of a model with a single layer the last. `None`
    /// if no rule fits the name.
    pub fn at(&self, name: &str, layer: Option<(usize, usize)>) -> Option<f64> {
        self.rules.iter().find(|rule| rule.fits(name)).and_then(|rule| rule.at(layer))
    }

    /// All values of all rules, for range checks.
    pub fn values(&self) -> impl Iterator<Item = f64> {
        self.rules.iter().flat_map(|rule| rule.values.iter().copied())
    }

    /// Filters that fit none of `names`.
    pub fn unused_filters<'a>(&self, names: impl Iterator<Item = &'a str> + Clone) -> Vec<&str> {
        let unused = |filter: &&str| !names.clone().any(|name| name.contains(filter));
        self.rules.iter().filter_map(|rule| rule.filter.as_deref()).filter(unused).collect()
    }

    /// The value, if it is the same for all tensors.
    pub fn single(&self) -> Option<f64> {
        match self.rules.first() {
            Some(Rule { filter: None, values }) if values.len() == 1 => Some(values[0]),
            _ => None,
        }
    }
}

impl FromIterator<Setting> for Setting {
    /// Concatenates the rules of all settings.
    fn from_iter<I: IntoIterator<Item = Setting>>(settings: I) -> Self {
        Self { rules: settings.into_iter().flat_map(|s| s.rules).collect() }
    }
}

impl FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (filter, values) = match text.rsplit_once('=') {
            Some(("", _)) => return Err("a filter is missing before =; * fits every tensor".to_owned()),
            Some((filter, values)) => (Some(filter.to_owned()), values),
            None => (None, text),
        };
        let values = values.split(',').map(number).collect::<Result<_, String>>()?;
        Ok(Self { rules: vec![Rule::new(filter, values)] })
    }
}

fn number(text: &str) -> Result<f64, String> {
    let parsed = text.trim().parse().ok().filter(|value: &f64| value.is_finite());
    parsed.ok_or_else(|| format!("expected a number, 0,0.3,1 or FILTER=0,0.3,1; found {text:?}"))
}

impl fmt::Display for Setting {
    /// The form taken by the command line, rules separated by spaces.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, rule) in self.rules.iter().enumerate() {
            let separator = if i == 0 { "" } else { " " };
            write!(f, "{separator}{rule}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(filter) = &self.filter {
            write!(f, "{filter}=")?;
        }
        let values: Vec<String> = self.values.iter().map(f64::to_string).collect();
        f.write_str(&values.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(texts: &[&str]) -> Setting {
        texts.iter().map(|text| text.parse::<Setting>().unwrap()).collect()
    }

    #[test]
    fn the_first_rule_that_fits_gives_the_value() {
        let t = settings(&["self_attn=0.25", "attn=0.5", "1"]);
        assert_eq!(t.at("model.layers.0.self_attn.q_proj.weight", Some((0, 2))), Some(0.25));
        assert_eq!(t.at("model.layers.0.attn.weight", Some((0, 2))), Some(0.5));
        assert_eq!(t.at("model.embed_tokens.weight", None), Some(1.0));
        assert_eq!(settings(&["mlp=1"]).at("model.norm.weight", None), None);
        assert_eq!(settings(&["*=1", "norm=0"]).at("model.norm.weight", None), Some(1.0));
    }

    #[test]
    fn a_gradient_runs_from_the_first_layer_to_the_last() {
        let t = settings(&["0,1,0.5"]);
        let along: Vec<_> = (0..5).map(|layer| t.at("w", Some((layer, 5))).unwrap()).collect();
        assert_eq!(along, [0.0, 0.5, 1.0, 0.75, 0.5]);
        assert_eq!(t.at("lm_head.weight", None), Some(0.0), "outside the layers the first value");
        assert_eq!(t.at("w", Some((0, 1))), Some(0.5), "a single layer is the last one");
        assert_eq!(t.at("w", Some((7, 5))), Some(0.5), "a layer too many does not panic");
    }

    #[test]
    fn several_settings_become_one_and_print_as_typed() {
        let t = settings(&["mlp=0,0.3,1", "-0.5"]);
        assert_eq!(t.to_string(), "mlp=0,0.3,1 -0.5");
        assert_eq!(t.values().collect::<Vec<_>>(), [0.0, 0.3, 1.0, -0.5]);
        assert_eq!((t.single(), settings(&["0.5"]).single()), (None, Some(0.5)));
        assert!(settings(&[]).is_empty() && !t.is_empty());
    }

    #[test]
    fn rules_that_no_tensor_reaches_are_not_appended() {
        let mut t = settings(&["mlp=0"]);
        t.append(settings(&["norm=1", "0.5", "attn=3"]));
        t.append(Setting::constant(1.0));
        assert_eq!(t.to_string(), "mlp=0 norm=1 0.5");
    }

    #[test]
    fn filters_that_fit_nothing_are_found() {
        let t = settings(&["mlp=0", "self_atn=1", "0.5"]);
        assert_eq!(t.unused_filters(["a.mlp.b", "a.self_attn.b"].into_iter()), ["self_atn"]);
    }

    #[test]
    fn text_that_is_not_a_number_is_refused() {
        for text in ["", "a", "0.5,", "=0.5", "mlp=", "nan", "0,inf", "mlp=0;1"] {
            assert!(text.parse::<Setting>().is_err(), "{text}");
        }
    }
}
