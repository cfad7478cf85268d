//! The methods of merges of models: one row each in a table of names, inputs and parameters, from
//! which recipes, flags, cards and checks are derived.

use std::ops::RangeInclusive;

use crate::methods::sphere::COLLINEAR_COSINE;

/// Method of a merge of models. `cpi` is not one of them: its inputs are of another kind
/// (`CpiRequest`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Method {
    /// Weighted mean or sum of the models.
    Linear,
    /// Spherical interpolation of two models.
    Slerp,
    /// Karcher mean of the models' directions, times the mean of their norms.
    SphericalMean,
    /// Spherical interpolation of two models or task vectors, as a whole or by rows or columns.
    NuSlerp,
    /// Barycentre of the models or task vectors on the sphere, taken in one tangent space.
    MultiSlerp,
    /// Each tensor of one model, multiplied by a scale; layers of several models if there are
    /// slices.
    Passthrough,
    /// Mean of the models, drawn towards the base by the angles between their task vectors.
    ModelStock,
    /// The base moved towards a second model by at most t per element.
    NearSwap,
    /// The elements of a second model whose change matters most, put into the base.
    ArceeFusion,
    /// Weighted sum of the task vectors (differences from the base), added to the base.
    TaskArithmetic,
    /// Task vectors trimmed to their largest elements, of which those with the elected sign are
    /// merged.
    Ties,
    /// Task vectors with elements dropped at random, then added as in task arithmetic.
    DareLinear,
    /// Task vectors with elements dropped at random, of which those with the elected sign are
    /// merged.
    DareTies,
    /// As [`Method::DareTies`], with small elements dropped more often than large ones.
    Della,
    /// As [`Method::DareLinear`], with small elements dropped more often than large ones.
    DellaLinear,
    /// Task vectors without their smallest and their very largest elements, then added.
    Breadcrumbs,
    /// Task vectors without their smallest and their very largest elements, of which those with the
    /// elected sign are merged.
    BreadcrumbsTies,
    /// Elements that differ most between the task vectors, weighted by the energy of each.
    Sce,
    /// Mean of the task vectors that change an element.
    Ram,
    /// As [`Method::Ram`], with what only one model changed scaled up.
    RamPlus,
    /// Singular vectors of the task vectors, made orthogonal to one another.
    TsvM,
    /// Sum of the task vectors with all its singular values equal.
    IsoC,
    /// Matrix with the least interference between the task vectors.
    Wudi,
}

/// Relation of a method to `base_model`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// A model like the others.
    Model,
    /// Origin of task vectors, if there is one.
    Optional,
    /// Origin of task vectors.
    Required,
}

/// A parameter of a method with a name of its own in recipes; `t`, `lambda`, `normalize`,
/// `rescale`, `weight` and `density` have fields of the request.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    /// Name in recipes.
    pub name: &'static str,
    /// True if each model has one, false if it applies to the merge.
    pub of_models: bool,
    /// True if the value is true or false, which count as 1 and 0.
    pub flag: bool,
    /// Value where the recipe has none.
    pub default: f64,
    /// Values that are accepted.
    pub range: RangeInclusive<f64>,
}

const fn shared(name: &'static str, default: f64, range: RangeInclusive<f64>) -> Parameter {
    Parameter { name, of_models: false, flag: false, default, range }
}

const fn switch(name: &'static str, default: bool) -> Parameter {
    Parameter { name, of_models: false, flag: true, default: default as u8 as f64, range: 0.0..=1.0 }
}

const fn of_each(name: &'static str, default: f64, range: RangeInclusive<f64>) -> Parameter {
    Parameter { name, of_models: true, flag: false, default, range }
}

/// Row of the table.
struct Spec {
    method: Method,
    /// Name on the command line and in records.
    name: &'static str,
    /// Name in recipes: mergekit's, where it has the method.
    recipe: &'static str,
    /// Heading of the model card.
    title: &'static str,
    base: Base,
    /// Number of models besides a base that is an origin.
    models: RangeInclusive<usize>,
    /// Names of the parameters that have fields of the request.
    fields: &'static [&'static str],
    parameters: &'static [Parameter],
}

const ANY: RangeInclusive<f64> = f64::MIN..=f64::MAX;
const NOT_NEGATIVE: RangeInclusive<f64> = 0.0..=f64::MAX;
const UNIT: RangeInclusive<f64> = 0.0..=1.0;
const MANY: usize = usize::MAX;

const SUM: &[&str] = &["weight", "lambda", "normalize"];
const SPARSE: &[&str] = &["weight", "density", "lambda", "normalize", "rescale"];

/// All methods, in the order of help texts.
const TABLE: [Spec; 23] = [
    Spec {
        method: Method::Linear,
        name: "linear",
        recipe: "linear",
        title: "weighted mean",
        base: Base::Model,
        models: 2..=MANY,
        fields: &["weight", "normalize"],
        parameters: &[],
    },
    Spec {
        method: Method::Slerp,
        name: "slerp",
        recipe: "slerp",
        title: "spherical interpolation",
        base: Base::Model,
        models: 2..=2,
        fields: &["t"],
        parameters: &[],
    },
    Spec {
        method: Method::SphericalMean,
        name: "spherical-mean",
        recipe: "karcher",
        title: "spherical mean",
        base: Base::Model,
        models: 2..=MANY,
        fields: &[],
        parameters: &[shared("max_iter", 10.0, 0.0..=1e9), shared("tol", 1e-5, UNIT)],
    },
    Spec {
        method: Method::NuSlerp,
        name: "nuslerp",
        recipe: "nuslerp",
        title: "NuSLERP",
        base: Base::Optional,
        models: 2..=2,
        fields: &["weight"],
        parameters: &[switch("nuslerp_row_wise", false), switch("nuslerp_flatten", true)],
    },
    Spec {
        method: Method::MultiSlerp,
        name: "multislerp",
        recipe: "multislerp",
        title: "Multi-SLERP",
        base: Base::Optional,
        models: 1..=MANY,
        fields: &["weight"],
        parameters: &[switch("normalize_weights", true), shared("eps", 1e-8, UNIT)],
    },
    Spec {
        method: Method::Passthrough,
        name: "passthrough",
        recipe: "passthrough",
        title: "passthrough",
        base: Base::Model,
        models: 1..=1,
        fields: &[],
        parameters: &[of_each("scale", 1.0, ANY)],
    },
    Spec {
        method: Method::ModelStock,
        name: "model-stock",
        recipe: "model_stock",
        title: "Model Stock",
        base: Base::Required,
        models: 2..=MANY,
        fields: &[],
        parameters: &[switch("filter_wise", false)],
    },
    Spec {
        method: Method::NearSwap,
        name: "nearswap",
        recipe: "nearswap",
        title: "NearSwap",
        base: Base::Required,
        models: 1..=1,
        fields: &["t"],
        parameters: &[],
    },
    Spec {
        method: Method::ArceeFusion,
        name: "arcee-fusion",
        recipe: "arcee_fusion",
        title: "Arcee Fusion",
        base: Base::Required,
        models: 1..=1,
        fields: &[],
        parameters: &[],
    },
    Spec {
        method: Method::TaskArithmetic,
        name: "task-arithmetic",
        recipe: "task_arithmetic",
        title: "task arithmetic",
        base: Base::Required,
        models: 1..=MANY,
        fields: SUM,
        parameters: &[],
    },
    Spec {
        method: Method::Ties,
        name: "ties",
        recipe: "ties",
        title: "TIES",
        base: Base::Required,
        models: 1..=MANY,
        fields: SPARSE,
        parameters: &[],
    },
    Spec {
        method: Method::DareLinear,
        name: "dare-linear",
        recipe: "dare_linear",
        title: "DARE",
        base: Base::Required,
        models: 1..=MANY,
        fields: SPARSE,
        parameters: &[],
    },
    Spec {
        method: Method::DareTies,
        name: "dare-ties",
        recipe: "dare_ties",
        title: "DARE with TIES",
        base: Base::Required,
        models: 1..=MANY,
        fields: SPARSE,
        parameters: &[],
    },
    Spec {
        method: Method::Della,
        name: "della",
        recipe: "della",
        title: "DELLA",
        base: Base::Required,
        models: 1..=MANY,
        fields: SPARSE,
        parameters: &[of_each("epsilon", 0.15, UNIT)],
    },
    Spec {
        method: Method::DellaLinear,
        name: "della-linear",
        recipe: "della_linear",
        title: "DELLA without election",
        base: Base::Required,
        models: 1..=MANY,
        fields: SPARSE,
        parameters: &[of_each("epsilon", 0.15, UNIT)],
    },
    Spec {
        method: Method::Breadcrumbs,
        name: "breadcrumbs",
        recipe: "breadcrumbs",
        title: "Model Breadcrumbs",
        base: Base::Required,
        models: 1..=MANY,
        fields: SPARSE,
        parameters: &[of_each("gamma", 0.01, UNIT)],
    },
    Spec {
        method: Method::BreadcrumbsTies,
        name: "breadcrumbs-ties",
        recipe: "breadcrumbs_ties",
        title: "Model Breadcrumbs with TIES",
        base: Base::Required,
        models: 1..=MANY,
        fields: SPARSE,
        parameters: &[of_each("gamma", 0.01, UNIT)],
    },
    Spec {
        method: Method::Sce,
        name: "sce",
        recipe: "sce",
        title: "SCE",
        base: Base::Required,
        models: 1..=MANY,
        fields: &[],
        parameters: &[shared("select_topk", 1.0, UNIT)],
    },
    Spec {
        method: Method::Ram,
        name: "ram",
        recipe: "ram",
        title: "RAM",
        base: Base::Required,
        models: 1..=MANY,
        fields: &[],
        parameters: &[shared("epsilon", 1e-5, NOT_NEGATIVE)],
    },
    Spec {
        method: Method::RamPlus,
        name: "ram-plus",
        recipe: "ramplus_tl",
        title: "RAM+ by tensor",
        base: Base::Required,
        models: 1..=MANY,
        fields: &[],
        parameters: &[shared("r", 0.1, ANY), shared("alpha", 0.2, NOT_NEGATIVE), shared("epsilon", 1e-5, NOT_NEGATIVE)],
    },
    Spec {
        method: Method::TsvM,
        name: "tsv-m",
        recipe: "tsv_m",
        title: "TSV-M",
        base: Base::Required,
        models: 1..=MANY,
        fields: &["lambda"],
        parameters: &[],
    },
    Spec {
        method: Method::IsoC,
        name: "iso-c",
        recipe: "iso_c",
        title: "Iso-C",
        base: Base::Required,
        models: 1..=MANY,
        fields: &["lambda"],
        parameters: &[],
    },
    Spec {
        method: Method::Wudi,
        name: "wudi",
        recipe: "wudi",
        title: "WUDI",
        base: Base::Required,
        models: 1..=MANY,
        fields: &["lambda"],
        parameters: &[],
    },
];

impl Method {
    /// All methods, in the order of help texts.
    pub const ALL: [Self; TABLE.len()] = {
        let mut all = [Self::Linear; TABLE.len()];
        let mut i = 0;
        while i < TABLE.len() {
            all[i] = TABLE[i].method;
            i += 1;
        }
        all
    };

    fn spec(self) -> &'static Spec {
        const ROWS: &[Spec] = &TABLE;
        ROWS.iter().find(|row| row.method == self).expect("every method has a row")
    }

    /// Name on the command line and in records.
    pub fn name(self) -> &'static str {
        self.spec().name
    }

    /// Name in mergekit's YAML.
    pub fn recipe_name(self) -> &'static str {
        self.spec().recipe
    }

    /// Name in the heading of a model card.
    pub fn title(self) -> &'static str {
        self.spec().title
    }

    /// Relation to the base.
    pub fn base(self) -> Base {
        self.spec().base
    }

    /// Number of models besides a base that is an origin.
    pub fn models(self) -> RangeInclusive<usize> {
        self.spec().models.clone()
    }

    /// Returns true if the method merges task vectors.
    pub fn needs_base(self) -> bool {
        self.base() == Base::Required
    }

    /// Returns true if `name` is a parameter with a field of the request.
    pub fn has(self, name: &str) -> bool {
        self.spec().fields.contains(&name)
    }

    /// Parameters that have no field of the request.
    pub fn parameters(self) -> &'static [Parameter] {
        self.spec().parameters
    }

    /// The parameter `name` without a field of the request.
    pub fn parameter(self, name: &str) -> Option<&'static Parameter> {
        self.parameters().iter().find(|parameter| parameter.name == name)
    }

    /// Returns true if the method keeps a share of each task vector and drops the rest.
    pub fn has_density(self) -> bool {
        self.has("density")
    }

    /// Default of `normalize`: divide by the sum of the weights.
    pub fn normalizes(self) -> bool {
        matches!(self, Self::Linear | Self::Ties | Self::Della)
    }

    /// Default of `rescale`: scale up the elements that are kept.
    pub fn rescales(self) -> bool {
        self.draws()
    }

    /// Returns true if elements are dropped at random.
    pub fn draws(self) -> bool {
        matches!(self, Self::DareLinear | Self::DareTies | Self::Della | Self::DellaLinear)
    }

    /// Returns true if signs are elected.
    pub fn elects(self) -> bool {
        matches!(self, Self::Ties | Self::DareTies | Self::Della | Self::BreadcrumbsTies)
    }

    /// Returns true if the method interpolates at angles with the threshold `epsilon` and the space
    /// of the request.
    pub fn is_spherical(self) -> bool {
        matches!(self, Self::Slerp | Self::SphericalMean)
    }

    /// Default of `epsilon` in radians.
    pub fn epsilon(self) -> f64 {
        // A spherical mean is taken at any angle, as mergekit does.
        if self == Self::SphericalMean { 0.0 } else { COLLINEAR_COSINE.acos() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_has_a_row_and_a_name_of_its_own_in_both_spellings() {
        let names: std::collections::BTreeSet<_> = Method::ALL.iter().map(|m| m.name()).collect();
        let recipe_names: std::collections::BTreeSet<_> = Method::ALL.iter().map(|m| m.recipe_name()).collect();
        assert_eq!((names.len(), recipe_names.len()), (Method::ALL.len(), Method::ALL.len()));
    }

    #[test]
    fn defaults_of_parameters_are_in_their_ranges() {
        for parameter in Method::ALL.iter().flat_map(|m| m.parameters()) {
            assert!(parameter.range.contains(&parameter.default), "{parameter:?}");
        }
    }
}
