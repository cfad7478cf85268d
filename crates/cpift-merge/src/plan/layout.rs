//! Layers rearranged by slices: the tensors of the output, and the tensor that each is made from in
//! every input.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::format::checkpoint::Excluded;
use cpift_core::format::names;
use cpift_core::{BadInput, Dtype, TensorSpec, TensorView};
use serde_json::Value;

use super::inputs::{Source, common_dtype};
use super::rules::{self, Place};
use crate::methods::Rule;
use crate::request::{Request, Slice};

/// Tensors of an output that is made of slices.
pub(crate) struct Layout {
    /// Parameters, in bytewise name order.
    pub targets: Vec<Target>,
    /// Other tensors, which are copied: name in the output, index of the source, name there.
    copies: Vec<(String, usize, String)>,
    /// Source and layer of every layer of the output; of several sources the first.
    origins: Vec<(usize, usize)>,
}

/// A parameter of the output.
pub(crate) struct Target {
    pub name: String,
    pub shape: Vec<usize>,
    /// Index of each operand among the models of the plan, and the name of the tensor in it.
    pub operands: Vec<(usize, String)>,
    /// Name of the tensor in the base.
    pub base: Option<String>,
    slice: usize,
    /// Position in the slice and number of its layers; `None` outside the layers.
    layer: Option<(usize, usize)>,
}

/// A tensor by its stack of layers and its name in the layer.
struct InLayer<'a> {
    stack: &'a str,
    number: usize,
    rest: &'a str,
}

impl<'a> InLayer<'a> {
    fn of(name: &'a str) -> Option<Self> {
        let (prefix, number) = names::layer(name)?;
        let stack = prefix.trim_end_matches(|c: char| c.is_ascii_digit());
        Some(Self { stack, number: number as usize, rest: &name[prefix.len()..] })
    }

    fn at(&self, number: usize) -> String {
        format!("{}{number}{}", self.stack, self.rest)
    }
}

/// Returns true if a tensor outside the layers is used before them, so that it comes from the first
/// slice; others come from the last, as in mergekit.
fn is_before_layers(name: &str) -> bool {
    let before = ["embed", "wte", "wpe", "shared.", "conv1.", "conv2."].iter().any(|part| name.contains(part));
    before && !name.starts_with("lm_head") && !name.starts_with("embed_out")
}

impl Layout {
    /// Arranges the slices of `request`; `sources` are its models in order.
    ///
    /// # Errors
    /// [`BadInput`] if a layer is missing in a model, or two inputs of a tensor differ in shape.
    pub fn of(request: &Request, sources: &[Arc<Source>], base: Option<&Source>) -> Result<Self> {
        let mut layout = Self { targets: Vec::new(), copies: Vec::new(), origins: Vec::new() };
        let last = request.slices.len() - 1;
        for (s, slice) in request.slices.iter().enumerate() {
            let of_models = slice.request.models.iter().map(|model| {
                request.models.iter().position(|m| m.path == model.path).expect("the models are those of the slices")
            });
            let block = Block { slice, index: s, models: of_models.collect(), sources, base };
            block.check()?;
            let first = &sources[block.models[0]];
            let outside =
                |name: &str| InLayer::of(name).is_none() && (if is_before_layers(name) { 0 } else { last }) == s;
            for view in first.checkpoint.parameters().filter(|view| outside(view.name)) {
                layout.targets.push(block.target(&view, view.name.to_owned(), None, |_| view.name.to_owned())?);
            }
            let copied = || first.checkpoint.not_parameters().filter(|(_, why)| *why != Excluded::Tied).map(|(v, _)| v);
            layout.copies.extend(
                copied().filter(|v| outside(v.name)).map(|v| (v.name.to_owned(), block.models[0], v.name.to_owned())),
            );
            let layers = slice.layers[0].clone();
            for (i, number) in layers.clone().enumerate() {
                let out = layout.origins.len();
                for view in first.checkpoint.parameters() {
                    let Some(place) = InLayer::of(view.name).filter(|place| place.number == number) else { continue };
                    let name = |range: &Range<usize>| place.at(range.start + i);
                    layout.targets.push(block.target(&view, place.at(out), Some((i, layers.len())), name)?);
                }
                for view in copied() {
                    if let Some(place) = InLayer::of(view.name).filter(|place| place.number == number) {
                        layout.copies.push((place.at(out), block.models[0], view.name.to_owned()));
                    }
                }
                layout.origins.push((block.models[0], number));
            }
        }
        layout.targets.sort_by(|a, b| a.name.cmp(&b.name));
        layout.copies.sort();
        Ok(layout)
    }

    /// Dtype of every parameter, `dtype` or the one that all tensors have that it is made of, and
    /// its number of elements.
    ///
    /// # Errors
    /// [`BadInput`] that names the first tensor of another dtype.
    pub fn dtypes(
        &self,
        sources: &[Arc<Source>],
        base: Option<&Source>,
        dtype: Option<Dtype>,
    ) -> Result<Vec<(Dtype, u64)>> {
        let of = |target: &Target| {
            let numel = target.shape.iter().product::<usize>() as u64;
            if let Some(dtype) = dtype {
                return Ok((dtype, numel));
            }
            let operands = target.operands.iter().filter_map(|(i, name)| sources[*i].checkpoint.get(name));
            let of_base = target.base.as_deref().and_then(|name| base?.checkpoint.get(name));
            Ok((common_dtype(operands.chain(of_base))?.expect("a tensor has operands"), numel))
        };
        self.targets.iter().map(of).collect()
    }

    /// The rule of every parameter, by the settings of its slice.
    ///
    /// # Errors
    /// As [`rules::of_models`].
    pub fn rules(&self, request: &Request) -> Result<Vec<Rule>> {
        let all = || self.targets.iter();
        let names: BTreeSet<&str> = all()
            .flat_map(|t| [t.name.as_str()].into_iter().chain(t.operands.iter().map(|(_, n)| n.as_str())))
            .collect();
        request.slices.iter().try_for_each(|slice| rules::check_filters(&slice.request, &names, "the models"))?;
        let rule = |target: &Target| {
            let of_models = target.operands.iter().map(|(_, name)| name.as_str()).collect();
            let place = Place { name: &target.name, of_models, layer: target.layer };
            rules::rule(&request.slices[target.slice].request, &place)
        };
        all().map(rule).collect()
    }

    /// Tensors that are copied unchanged.
    pub fn copies<'a>(&'a self, sources: &[&'a Source]) -> Vec<TensorView<'a>> {
        let view = |(name, source, from): &'a (String, usize, String)| {
            sources[*source].checkpoint.get(from).expect("found when the layout was made").named(name)
        };
        self.copies.iter().map(view).collect()
    }

    /// config.json for the output: the number of layers, and every list with one entry per layer.
    pub fn config(&self, mut config: Value, sources: &[Arc<Source>]) -> Value {
        let inner = if config.get("text_config").is_some() { Some("text_config") } else { None };
        let configs: Vec<&Value> = sources.iter().map(|s| inner.map_or(&s.config, |key| &s.config[key])).collect();
        let target = match inner {
            Some(key) => &mut config[key],
            None => &mut config,
        };
        let Some(fields) = target.as_object_mut() else { return config };
        let Some(key) = NUMBER_OF_LAYERS.iter().find(|key| fields.get(**key).is_some_and(Value::is_u64)) else {
            log::warn!("config.json has no number of layers ({}): set it in the output", NUMBER_OF_LAYERS.join(", "));
            return config;
        };
        let before = fields[*key].as_u64().unwrap_or(0) as usize;
        fields.insert((*key).to_owned(), self.origins.len().into());
        for (name, list) in fields.iter_mut() {
            if list.as_array().is_some_and(|list| list.len() == before && before > 0) {
                let entry = |(source, layer): &(usize, usize)| configs[*source][name].get(*layer).cloned();
                match self.origins.iter().map(entry).collect::<Option<Vec<Value>>>() {
                    Some(entries) => *list = entries.into(),
                    None => log::warn!("config.json: {name} has no entry for every layer of the output: check it"),
                }
            }
        }
        config
    }
}

/// Keys of config.json that hold the number of layers.
const NUMBER_OF_LAYERS: [&str; 4] = ["num_hidden_layers", "n_layer", "n_layers", "num_layers"];

/// One slice with the sources of its models.
struct Block<'a> {
    slice: &'a Slice,
    index: usize,
    /// Index of each model of the slice among the sources.
    models: Vec<usize>,
    sources: &'a [Arc<Source>],
    base: Option<&'a Source>,
}

impl Block<'_> {
    /// Refuses a layer that a model does not have, and models with several stacks of layers.
    fn check(&self) -> Result<()> {
        let of_models = self.models.iter().map(|m| self.sources[*m].as_ref()).zip(&self.slice.layers);
        for (source, range) in of_models.chain(self.base.into_iter().zip(&self.slice.base_layers)) {
            let places = || source.checkpoint.parameters().filter_map(|view| InLayer::of(view.name));
            let stacks: BTreeSet<&str> = places().map(|place| place.stack).collect();
            if stacks.len() > 1 {
                let stacks = stacks.into_iter().collect::<Vec<_>>().join(", ");
                return Err(BadInput::new(source.path(), "slices of a model with several stacks of layers")
                    .expected("one stack of layers")
                    .found(stacks)
                    .into());
            }
            let layers = places().map(|place| place.number + 1).max().unwrap_or(0);
            if range.end > layers {
                return Err(BadInput::new(source.path(), "a layer range goes beyond the model")
                    .expected(format!("at most [0, {layers}]"))
                    .found(format!("[{}, {}] in slice {}", range.start, range.end, self.index))
                    .into());
            }
        }
        Ok(())
    }

    /// The parameter `name` of the output, whose tensor in an input with a range of layers has the
    /// name that `of` returns; `first` is the one in the first model.
    fn target(
        &self,
        first: &TensorView<'_>,
        name: String,
        layer: Option<(usize, usize)>,
        of: impl Fn(&Range<usize>) -> String,
    ) -> Result<Target> {
        let found = |source: &Source, range: &Range<usize>| -> Result<String> {
            let name = of(range);
            let shape = source.checkpoint.get(&name).map(|view| view.shape.to_vec());
            if shape.as_deref() == Some(first.shape) {
                return Ok(name);
            }
            let error = BadInput::new(source.path(), format!("cannot be merged with {}", first.file.display()));
            let found = shape.map_or("no such tensor".to_owned(), |shape| format!("{shape:?}"));
            Err(error.tensor(&name).expected(format!("{:?}, as {}", first.shape, first.name)).found(found).into())
        };
        let operands = self.models.iter().zip(&self.slice.layers);
        let operands = operands.map(|(m, range)| Ok((*m, found(&self.sources[*m], range)?))).collect::<Result<_>>()?;
        let base = match (self.base, &self.slice.base_layers) {
            (Some(base), Some(range)) => Some(found(base, range)?),
            (Some(_), None) => return Err(usage(format!("slice {} does not name the layers of the base", self.index))),
            (None, _) => None,
        };
        Ok(Target { name, shape: first.shape.to_vec(), operands, base, slice: self.index, layer })
    }
}

impl Target {
    /// Its entry in a file of `dtype`.
    pub fn spec(&self, dtype: Dtype) -> TensorSpec {
        TensorSpec { name: self.name.clone(), dtype, shape: self.shape.clone() }
    }
}
