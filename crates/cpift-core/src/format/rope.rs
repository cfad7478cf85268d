//! Rotary position settings of config.json, in all spellings that transformers has used. Reading is
//! strict: an unknown spelling is an error that names the field, never a default.
//!
//! transformers 4 writes a top-level `rope_theta` and `rope_scaling` (with `type` or `rope_type`).
//! transformers 5 writes `rope_parameters`, which contains both, for all layers or by layer type.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use serde_json::{Map, Value};

use crate::error::BadInput;

/// θ if config.json has none, as in transformers.
const DEFAULT_THETA: f64 = 10_000.0;

/// Name of the trained context length, among the settings or beside them.
const ORIGINAL: &str = "original_max_position_embeddings";

/// Settings that at least one `rope_type` reads.
const KNOWN: [&str; 15] = [
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "high_freq_factor",
    "long_factor",
    "low_freq_factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_theta",
    "rope_type",
    "short_factor",
    "truncate",
];

/// Settings in published configs that no `rope_type` reads.
const HARMLESS: [&str; 2] = ["finetuned", "type"];

/// Scaling of the rotary frequencies beyond the trained context: `rope_type` of config.json.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// No scaling.
    Default,
    /// All frequencies are divided by `factor` (position interpolation).
    Linear {
        /// Divisor of the frequencies.
        factor: f64,
    },
    /// The base grows when a sequence is longer than `max_positions` (NTK-aware).
    Dynamic {
        /// Factor by which the context is extended.
        factor: f64,
        /// Trained context length.
        max_positions: f64,
    },
    /// High frequencies are kept, low ones interpolated with a ramp between, and the attention is
    /// scaled (arXiv 2309.00071).
    Yarn {
        /// Factor by which the context is extended.
        factor: f64,
        /// Trained context length.
        original: f64,
        /// Number of rotations above which a dimension is kept.
        beta_fast: f64,
        /// Number of rotations below which a dimension is interpolated.
        beta_slow: f64,
        /// Factor applied to cos and sin.
        attention_factor: f64,
        /// Round the ends of the ramp to whole dimensions.
        truncate: bool,
    },
    /// Every frequency has a divisor of its own, one for contexts up to `original` and one for longer
    /// ones, and the attention is scaled (arXiv 2402.13753).
    LongRope {
        /// Divisors of the frequencies in contexts of up to `original` tokens.
        short: Vec<f64>,
        /// Longest context of these divisors.
        original: f64,
        /// Factor applied to cos and sin.
        attention_factor: f64,
    },
    /// Low frequencies are divided by `factor`, high ones kept, with a smooth transition between
    /// (Llama 3.1).
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Frequencies with wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Frequencies with wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Trained context length.
        original: f64,
    },
}

/// Rotary settings of a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeParameters {
    /// Base θ of the frequencies.
    pub theta: f64,
    /// Scaling of the frequencies.
    pub scaling: RopeScaling,
    /// Share of each head that is rotated, its first elements: `partial_rotary_factor`.
    pub partial: f64,
}

/// Rotary settings of a model.
#[derive(Debug, Clone)]
pub struct RopeSettings {
    layers: Layers,
    /// Warnings about ignored or conflicting settings, each a sentence without the file name.
    pub notes: Vec<String>,
}

#[derive(Debug, Clone)]
enum Layers {
    Alike(RopeParameters),
    ByType(BTreeMap<String, RopeParameters>),
}

impl RopeSettings {
    /// Reads the settings of a config.json. `default_positions` is the architecture's default of
    /// `max_position_embeddings`.
    ///
    /// # Errors
    /// [`BadInput`] with the field, for a spelling or type that is not implemented.
    pub fn read(path: &Path, config: &Value, default_positions: f64) -> Result<Self> {
        let mut reader = Reader { path, config, default_positions, notes: Vec::new() };
        let layers = match (reader.object("rope_scaling")?, reader.object("rope_parameters")?) {
            (None, None) => Layers::Alike(RopeParameters {
                theta: reader.top_theta()?,
                scaling: RopeScaling::Default,
                partial: reader.partial("", None)?,
            }),
            (Some(only), None) => reader.layers("rope_scaling", only)?,
            (None, Some(only)) => reader.layers("rope_parameters", only)?,
            (Some(old), Some(new)) => {
                let (scaling, parameters) =
                    (reader.layers("rope_scaling", old)?, reader.layers("rope_parameters", new)?);
                if scaling.canonical() != parameters.canonical() {
                    return Err(reader
                        .bad("rope_scaling and rope_parameters disagree")
                        .expected("one of the two")
                        .found(format!(
                            "rope_scaling {} and rope_parameters {}",
                            Value::from(old.clone()),
                            Value::from(new.clone())
                        ))
                        .hint("keep rope_parameters, with rope_type and rope_theta in it, and remove rope_scaling")
                        .into());
                }
                parameters
            }
        };
        Ok(Self { layers, notes: reader.notes })
    }

    /// Settings of the layers of type `layer_type`, such as `full_attention`; none if config.json
    /// has settings by layer type but not for this one.
    pub fn of(&self, layer_type: &str) -> Option<&RopeParameters> {
        match &self.layers {
            Layers::Alike(parameters) => Some(parameters),
            Layers::ByType(types) => types.get(layer_type),
        }
    }

    /// Returns true if both settings are equivalent, regardless of the spelling.
    pub fn same_as(&self, other: &Self) -> bool {
        self.layers.canonical() == other.layers.canonical()
    }
}

/// Canonical form for comparison: if the settings of all layer types are equal, they count as one
/// setting for all layers.
#[derive(PartialEq)]
enum Canonical<'a> {
    Alike(&'a RopeParameters),
    ByType(&'a BTreeMap<String, RopeParameters>),
}

impl Layers {
    fn canonical(&self) -> Canonical<'_> {
        match self {
            Self::Alike(parameters) => Canonical::Alike(parameters),
            Self::ByType(types) => {
                let mut values = types.values();
                match values.next() {
                    Some(first) if values.all(|other| other == first) => Canonical::Alike(first),
                    _ => Canonical::ByType(types),
                }
            }
        }
    }
}

struct Reader<'a> {
    path: &'a Path,
    config: &'a Value,
    default_positions: f64,
    notes: Vec<String>,
}

impl<'a> Reader<'a> {
    fn bad(&self, message: impl Into<String>) -> BadInput {
        BadInput::new(self.path, message)
    }

    /// Returns the object `key`; null and an empty object count as absent.
    fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>> {
        match self.config.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map).filter(|map| !map.is_empty())),
            Some(other) => Err(self
                .bad(format!("{key} is not an object"))
                .expected(r#"an object such as {"rope_type": "linear", "factor": 2.0}, or null"#)
                .found(other.to_string())
                .into()),
        }
    }

    /// Returns the top-level `rope_theta`, which must be a number if present.
    fn top_theta(&self) -> Result<f64> {
        self.config.get("rope_theta").map_or(Ok(DEFAULT_THETA), |value| self.theta("rope_theta", value))
    }

    fn theta(&self, name: &str, value: &Value) -> Result<f64> {
        self.positive(name, value)
    }

    fn positive(&self, name: &str, value: &Value) -> Result<f64> {
        value.as_f64().filter(|x| *x > 0.0 && x.is_finite()).ok_or_else(|| {
            self.bad(format!("{name} cannot be used")).expected("a positive number").found(value.to_string()).into()
        })
    }

    /// Context length of the model: `max_position_embeddings`, or the architecture's default.
    fn max_positions(&self) -> f64 {
        let given = self.config.get("max_position_embeddings").and_then(Value::as_f64);
        given.filter(|n| *n > 0.0).unwrap_or(self.default_positions)
    }

    fn layers(&mut self, name: &str, map: &'a Map<String, Value>) -> Result<Layers> {
        let is_layer_type = |key: &str| key.ends_with("_attention");
        if !map.iter().any(|(key, value)| is_layer_type(key) || value.is_object()) {
            return self.parameters(name, map).map(Layers::Alike);
        }
        let mut types = BTreeMap::new();
        for (key, value) in map {
            let inner = format!("{name}.{key}");
            let Value::Object(settings) = value else {
                return Err(if is_layer_type(key) {
                    self.bad(format!("{inner} cannot be used"))
                        .expected("an object with rope_type and rope_theta: layers without rotary embeddings are not implemented")
                        .found(value.to_string())
                } else {
                    self.bad(format!("{name} has both settings by layer type and {key}, which applies to all layers"))
                        .expected("either settings for all layers or one object per layer type")
                        .found(Value::from(map.clone()).to_string())
                }.into());
            };
            if !is_layer_type(key) {
                return Err(self
                    .bad(format!("{inner} is not a layer type"))
                    .expected("full_attention or sliding_attention")
                    .found(value.to_string())
                    .into());
            }
            types.insert(key.clone(), self.parameters(&inner, settings)?);
        }
        Ok(Layers::ByType(types))
    }

    /// Reads the settings of all layers or of one layer type.
    fn parameters(&mut self, name: &str, map: &'a Map<String, Value>) -> Result<RopeParameters> {
        if let Some(key) = map.keys().find(|key| !KNOWN.contains(&key.as_str()) && !HARMLESS.contains(&key.as_str())) {
            return Err(self
                .bad(format!("the rotary setting {name}.{key} is not implemented"))
                .expected(KNOWN.join(", "))
                .found(format!("{key} = {}", map[key]))
                .into());
        }
        let theta = self.theta_of(name, map)?;
        let partial = self.partial(name, Some(map))?;
        let kind = self.kind(name, map)?;
        let fields = ScalingFields { reader: self, name, map, kind };
        let (scaling, read) = fields.scaling()?;
        let always = ["partial_rotary_factor", "rope_theta", "rope_type"];
        let ignored: Vec<&str> = map
            .iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(key, _)| key.as_str())
            .filter(|key| !HARMLESS.contains(key) && !always.contains(key) && !read.contains(key))
            .collect();
        if !ignored.is_empty() {
            self.notes
                .push(format!("{name}: {} has no effect for rope_type {kind} and is ignored", ignored.join(", ")));
        }
        Ok(RopeParameters { theta, scaling, partial })
    }

    /// Returns `partial_rotary_factor` of `map`, or else the top-level one.
    fn partial(&self, name: &str, map: Option<&Map<String, Value>>) -> Result<f64> {
        const KEY: &str = "partial_rotary_factor";
        let inner = map.and_then(|map| map.get(KEY)).map(|value| (format!("{name}.{KEY}"), value));
        let given = inner.or_else(|| Some((KEY.to_owned(), self.config.get(KEY)?)));
        let Some((name, value)) = given.filter(|(_, value)| !value.is_null()) else { return Ok(1.0) };
        value.as_f64().filter(|x| *x > 0.0 && *x <= 1.0).ok_or_else(|| {
            let error = self.bad(format!("{name} cannot be used"));
            error.expected("a number above 0, and at most 1").found(value.to_string()).into()
        })
    }

    /// Returns θ of `map`, or else the top-level one. If there are both, the inner one is used, as
    /// in transformers 5.
    fn theta_of(&mut self, name: &str, map: &Map<String, Value>) -> Result<f64> {
        let top = self.config.get("rope_theta");
        let Some(inner) = map.get("rope_theta") else {
            if top.is_none() && name.starts_with("rope_parameters") {
                self.notes
                    .push(format!("{name} has no rope_theta: {DEFAULT_THETA}, the default of transformers, is used"));
            }
            return self.top_theta();
        };
        let theta = self.theta(&format!("{name}.rope_theta"), inner)?;
        if let Some(top) = top.filter(|top| !top.is_null()) {
            let top = self.theta("rope_theta", top)?;
            if top != theta {
                self.notes.push(format!("{name}.rope_theta = {theta} is used, not the top-level rope_theta = {top}"));
            }
        }
        Ok(theta)
    }

    /// Returns `rope_type`, or its older spelling `type`.
    fn kind(&self, name: &str, map: &'a Map<String, Value>) -> Result<&'a str> {
        let text = |key: &str| match map.get(key) {
            None | Some(Value::Null) => anyhow::Ok(None),
            Some(Value::String(text)) => Ok(Some(text.as_str())),
            Some(other) => {
                Err(self.bad(format!("{name}.{key} cannot be used")).expected("text").found(other.to_string()).into())
            }
        };
        match (text("rope_type")?, text("type")?) {
            (Some(new), Some(old)) if new != old => Err(self
                .bad(format!("{name}.rope_type is {new:?}, and {name}.type is {old:?}"))
                .expected("one of the two")
                .into()),
            (Some(kind), _) | (None, Some(kind)) => Ok(kind),
            (None, None) => {
                let free = ["rope_theta", "partial_rotary_factor"];
                match map.iter().find(|(key, value)| !value.is_null() && !free.contains(&key.as_str())) {
                    None => Ok("default"),
                    Some((key, value)) => Err(self
                        .bad(format!("{name} has {key} but no rope_type"))
                        .expected("rope_type: default, linear, dynamic, yarn, llama3 or longrope")
                        .found(format!("{key} = {value}"))
                        .hint("add the kind of scaling, such as \"rope_type\": \"linear\", or remove the field")
                        .into()),
                }
            }
        }
    }
}

/// Reads the fields of one kind of scaling.
struct ScalingFields<'a, 'b> {
    reader: &'b Reader<'a>,
    name: &'b str,
    map: &'a Map<String, Value>,
    kind: &'a str,
}

impl ScalingFields<'_, '_> {
    /// Returns the scaling and the names of the fields it uses.
    fn scaling(&self) -> Result<(RopeScaling, &'static [&'static str])> {
        let max_positions = self.reader.max_positions();
        Ok(match self.kind {
            "default" => (RopeScaling::Default, &[]),
            "linear" => (RopeScaling::Linear { factor: self.required("factor")? }, &["factor"]),
            "dynamic" => (RopeScaling::Dynamic { factor: self.required("factor")?, max_positions }, &["factor"]),
            "llama3" => (
                RopeScaling::Llama3 {
                    factor: self.required("factor")?,
                    low_freq_factor: self.required("low_freq_factor")?,
                    high_freq_factor: self.required("high_freq_factor")?,
                    original: self.original(max_positions)?,
                },
                &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
            ),
            "yarn" => (
                self.yarn(max_positions)?,
                &[
                    "factor",
                    "original_max_position_embeddings",
                    "attention_factor",
                    "beta_fast",
                    "beta_slow",
                    "mscale",
                    "mscale_all_dim",
                    "truncate",
                ],
            ),
            // Phi-3's first name for it.
            "longrope" | "su" => (
                self.long_rope(max_positions)?,
                &["short_factor", "long_factor", "factor", "attention_factor", "original_max_position_embeddings"],
            ),
            other => {
                return Err(self
                    .reader
                    .bad(format!("the rope scaling {other:?} of {} is not implemented", self.name))
                    .expected("rope_type: default, linear, dynamic, yarn, llama3 or longrope")
                    .found(Value::from(self.map.clone()).to_string())
                    .into());
            }
        })
    }

    fn yarn(&self, max_positions: f64) -> Result<RopeScaling> {
        let original = self.original(max_positions)?;
        // For null, the factor is the ratio of the two context lengths.
        let factor = match self.map.get("factor") {
            Some(Value::Null) => max_positions / original,
            _ => self.required("factor")?,
        };
        let (mscale, all_dim) = (self.number("mscale")?, self.number("mscale_all_dim")?);
        let attention_factor = match (self.optional("attention_factor")?, mscale, all_dim) {
            (Some(given), ..) => given,
            (None, Some(m), Some(all)) if m != 0.0 && all != 0.0 => yarn_mscale(factor, m) / yarn_mscale(factor, all),
            _ => yarn_mscale(factor, 1.0),
        };
        let truncate = match self.map.get("truncate") {
            None => true,
            Some(Value::Bool(truncate)) => *truncate,
            Some(other) => {
                let message = format!("{}.truncate cannot be used", self.name);
                return Err(self.reader.bad(message).expected("true or false").found(other.to_string()).into());
            }
        };
        // 0 means the default, as in transformers.
        let beta = |key, default| anyhow::Ok(self.number(key)?.filter(|b| *b != 0.0).unwrap_or(default));
        Ok(RopeScaling::Yarn {
            factor,
            original,
            beta_fast: beta("beta_fast", 32.0)?,
            beta_slow: beta("beta_slow", 1.0)?,
            attention_factor,
            truncate,
        })
    }

    /// The factor of the attention follows from `factor`, or else the ratio of the two context lengths.
    fn long_rope(&self, max_positions: f64) -> Result<RopeScaling> {
        let original = self.original(max_positions)?;
        let factor = self.optional("factor")?.unwrap_or(max_positions / original);
        let computed = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
        // The context is limited to `original`, but a file without the other list is incomplete.
        self.factors("long_factor")?;
        Ok(RopeScaling::LongRope {
            short: self.factors("short_factor")?,
            original,
            attention_factor: self.optional("attention_factor")?.unwrap_or(computed),
        })
    }

    fn factors(&self, key: &str) -> Result<Vec<f64>> {
        let name = format!("{}.{key}", self.name);
        let list = self.map.get(key).and_then(Value::as_array).ok_or_else(|| {
            let found = self.map.get(key).map_or("no such field".to_owned(), Value::to_string);
            self.reader.bad(format!("{name} cannot be used")).expected("a list of positive numbers").found(found)
        })?;
        list.iter().map(|value| self.reader.positive(&name, value)).collect()
    }

    /// Trained context length: the top-level `original_max_position_embeddings` that some configs
    /// have, or else the one among these settings, or else the context length of the model.
    fn original(&self, max_positions: f64) -> Result<f64> {
        match self.reader.config.get(ORIGINAL).filter(|value| !value.is_null()) {
            Some(top) => self.reader.positive(ORIGINAL, top),
            None => Ok(self.optional(ORIGINAL)?.unwrap_or(max_positions)),
        }
    }

    fn required(&self, key: &str) -> Result<f64> {
        let message = || format!("{}: the rope scaling {} needs {key}", self.name, self.kind);
        self.optional(key)?.ok_or_else(|| {
            self.reader
                .bad(message())
                .expected("a positive number")
                .found(Value::from(self.map.clone()).to_string())
                .into()
        })
    }

    fn optional(&self, key: &str) -> Result<Option<f64>> {
        let value = self.map.get(key).filter(|value| !value.is_null());
        value.map(|value| self.reader.positive(&format!("{}.{key}", self.name), value)).transpose()
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.map.get(key).filter(|value| !value.is_null()) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| {
            let message = format!("{}.{key} cannot be used", self.name);
            self.reader.bad(message).expected("a number").found(value.to_string()).into()
        })
    }
}

fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(config: Value) -> Result<RopeSettings> {
        RopeSettings::read(Path::new("config.json"), &config, 2048.0)
    }

    fn full(config: Value) -> RopeParameters {
        read(config).unwrap().of("full_attention").unwrap().clone()
    }

    const LINEAR: RopeParameters =
        RopeParameters { theta: 5e5, scaling: RopeScaling::Linear { factor: 8.0 }, partial: 1.0 };

    #[test]
    fn all_spellings_of_the_same_settings_are_equivalent() {
        for config in [
            json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 8}}),
            json!({"rope_theta": 500_000, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
            json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 8.0}}),
            json!({"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}}),
            json!({"rope_scaling": null, "rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}}),
            json!({"rope_scaling": {}, "rope_theta": 5e5, "rope_parameters": {"rope_type": "linear", "factor": 8.0}}),
            json!({"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}}),
            json!({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}}}),
            json!({"rope_theta": 5e5, "rope_parameters": {"full_attention": {"type": "linear", "factor": 8.0}}}),
            json!({"rope_theta": null, "rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}}),
            json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 8.0, "partial_rotary_factor": 1.0,
                "finetuned": true, "beta_fast": null}}),
        ] {
            let read = read(config.clone()).unwrap_or_else(|e| panic!("{config}: {e}"));
            assert_eq!(read.of("full_attention"), Some(&LINEAR), "{config}");
            assert_eq!(read.notes, [""; 0], "{config}");
            assert!(read.same_as(&RopeSettings { layers: Layers::Alike(LINEAR), notes: Vec::new() }), "{config}");
        }
    }

    #[test]
    fn absent_settings_are_the_defaults_of_transformers() {
        let plain = RopeParameters { theta: 10_000.0, scaling: RopeScaling::Default, partial: 1.0 };
        for config in [json!({}), json!({"rope_scaling": null}), json!({"rope_scaling": {}, "rope_parameters": {}})] {
            assert_eq!(full(config), plain);
        }
        assert_eq!(full(json!({"rope_theta": 1e6, "rope_parameters": {}})).theta, 1e6);
        assert_eq!(full(json!({"rope_parameters": {"rope_theta": 1e6}})).theta, 1e6);
        let silent = read(json!({"rope_parameters": {"rope_type": "default"}})).unwrap();
        assert!(silent.notes[0].contains("rope_parameters has no rope_theta: 10000"), "{:?}", silent.notes);
    }

    #[test]
    fn layer_types_can_have_different_settings() {
        let config = json!({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}});
        let both = read(config.clone()).unwrap();
        assert_eq!(both.of("full_attention"), Some(&LINEAR));
        assert_eq!(both.of("sliding_attention").unwrap().theta, 1e4);
        assert_eq!(both.of("chunked_attention"), None);
        assert!(both.same_as(&read(config).unwrap()));
        assert!(!both.same_as(&read(json!({"rope_theta": 5e5})).unwrap()));
    }

    #[test]
    fn ignored_and_conflicting_settings_give_warnings() {
        let note = |config| read(config).unwrap().notes.join("; ");
        let said = note(json!({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}));
        assert!(
            said.contains("rope_parameters.rope_theta = 1000000 is used, not the top-level rope_theta = 10000"),
            "{said}"
        );
        let said = note(json!({"rope_scaling": {"rope_type": "default", "factor": 8.0}}));
        assert!(said.contains("rope_scaling: factor has no effect for rope_type default"), "{said}");
    }

    #[test]
    fn unknown_settings_are_refused_by_name() {
        for (config, part) in [
            (json!({"rope_theta": "1e6"}), "rope_theta cannot be used"),
            (json!({"rope_theta": 0}), "rope_theta cannot be used"),
            (json!({"rope_theta": -1.0}), "rope_theta cannot be used"),
            (json!({"rope_theta": null}), "rope_theta cannot be used"),
            (json!({"rope_theta": [1e6]}), "rope_theta cannot be used"),
            (json!({"rope_scaling": "linear"}), "rope_scaling is not an object"),
            (json!({"rope_scaling": false}), "rope_scaling is not an object"),
            (json!({"rope_parameters": [1]}), "rope_parameters is not an object"),
            (json!({"rope_scaling": {"factor": 8.0}}), "rope_scaling has factor but no rope_type"),
            (
                json!({"rope_parameters": {"rope_theta": 1e6, "original_max_position_embeddings": 8}}),
                "but no rope_type",
            ),
            (
                json!({"rope_scaling": {"rope_type": "linear", "facter": 8.0}}),
                "the rotary setting rope_scaling.facter is not",
            ),
            (
                json!({"rope_parameters": {"rope_type": "default", "theta": 1e6}}),
                "the rotary setting rope_parameters.theta is not",
            ),
            (json!({"rope_scaling": {"rope_type": "linear"}}), "linear needs factor"),
            (json!({"rope_scaling": {"rope_type": "linear", "factor": "8"}}), "rope_scaling.factor cannot be used"),
            (json!({"rope_scaling": {"rope_type": "linear", "factor": 0}}), "rope_scaling.factor cannot be used"),
            (json!({"rope_scaling": {"rope_type": 3, "factor": 8.0}}), "rope_scaling.rope_type cannot be used"),
            (
                json!({"rope_scaling": {"rope_type": "mrope", "factor": 8.0}}),
                "\"mrope\" of rope_scaling is not implemented",
            ),
            (json!({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}), "long_factor cannot be used"),
            (
                json!({"rope_scaling": {"rope_type": "longrope", "short_factor": [0], "long_factor": [2]}}),
                "short_factor cannot be used",
            ),
            (
                json!({"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 8.0}}),
                "rope_scaling.type is \"dynamic\"",
            ),
            (json!({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}), "yarn needs factor"),
            (
                json!({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": "no"}}),
                "truncate cannot be used",
            ),
            (
                json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.5}}),
                "rope_parameters.partial_rotary_factor cannot be used",
            ),
            (
                json!({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1]}}),
                "mrope_section is not implemented",
            ),
            (json!({"rope_parameters": {"rope_theta": null}}), "rope_parameters.rope_theta cannot be used"),
            (json!({"rope_parameters": {"full_attention": null}}), "rope_parameters.full_attention cannot be used"),
            (
                json!({"rope_parameters": {"full_attention": {"rope_theta": "1e6"}}}),
                "full_attention.rope_theta cannot be used",
            ),
            (
                json!({"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "factor": 2.0}}),
                "and factor, which applies to all",
            ),
            (json!({"rope_parameters": {"full": {"rope_theta": 1e6}}}), "rope_parameters.full is not a layer type"),
            (
                json!({"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_parameters": {"rope_theta": 1e6}}),
                "rope_scaling and rope_parameters disagree",
            ),
        ] {
            let error = read(config.clone()).err().unwrap_or_else(|| panic!("{config} is read")).to_string();
            assert!(error.starts_with("config.json: ") && error.contains(part), "{config}: {error}");
        }
    }

    #[test]
    fn part_of_a_head_is_rotated_under_either_spelling() {
        for config in [
            json!({"partial_rotary_factor": 0.75}),
            json!({"partial_rotary_factor": 0.75, "rope_scaling": {"type": "linear", "factor": 2.0}}),
            json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}),
        ] {
            assert_eq!(full(config).partial, 0.75);
        }
    }

    #[test]
    fn longrope_scales_the_attention_by_the_ratio_of_the_contexts() {
        let factor = |more: Value| {
            let mut config = json!({"max_position_embeddings": 131_072, "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [1.0, 8.0]}});
            config["rope_scaling"].as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            match full(config).scaling {
                RopeScaling::LongRope { short, original: 4096.0, attention_factor } if short == [1.0, 1.1] => {
                    attention_factor
                }
                other => panic!("{other:?}"),
            }
        };
        // Of Phi-3's model file: sqrt(1 + ln(32) / ln(4096)).
        assert!((factor(json!({})) - 1.190_238_071_4).abs() < 1e-9, "{}", factor(json!({})));
        assert_eq!(factor(json!({"type": "su"})), factor(json!({})));
        assert_eq!(factor(json!({"attention_factor": 2.0})), 2.0);
    }

    #[test]
    fn yarn_defaults_are_those_of_transformers() {
        let yarn = |fields: Value| {
            let mut config =
                json!({"max_position_embeddings": 128, "rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0}});
            for (key, value) in fields.as_object().unwrap() {
                config["rope_parameters"][key] = value.clone();
            }
            match full(config).scaling {
                RopeScaling::Yarn { factor, original, beta_fast, attention_factor, .. } => {
                    (factor, original, beta_fast, attention_factor)
                }
                other => panic!("{other:?}"),
            }
        };
        let plain = 0.1 * 4f64.ln() + 1.0;
        assert_eq!(yarn(json!({"factor": 4.0})), (4.0, 128.0, 32.0, plain));
        let original = json!({"factor": null, "original_max_position_embeddings": 32, "beta_fast": 0});
        assert_eq!(yarn(original), (4.0, 32.0, 32.0, plain));
        assert_eq!(yarn(json!({"factor": 4.0, "beta_fast": 16, "attention_factor": 2.0})), (4.0, 128.0, 16.0, 2.0));
        assert_eq!(yarn(json!({"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0})).3, 1.0);
    }
}
