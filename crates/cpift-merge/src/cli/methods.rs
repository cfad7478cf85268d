//! Flags of the methods beyond means, SLERP, task arithmetic, TIES and DARE.

use std::path::PathBuf;

use anyhow::Result;

use super::shared::{DensityArgs, ElectArgs, ModelArgs, OutputArgs, TaskVectorArgs, one};
use crate::method::Method;
use crate::request::Request;
use crate::setting::Setting;

fn flag(value: bool) -> Setting {
    Setting::constant(f64::from(u8::from(value)))
}

#[derive(clap::Args, Debug)]
pub(crate) struct PassthroughArgs {
    #[command(flatten)]
    models: ModelArgs,
    /// Factor of the weights; repeated as --t of slerp [default: 1]
    #[arg(long = "scale", value_name = "V", allow_negative_numbers = true, help_heading = "Method")]
    scale: Vec<Setting>,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

impl PassthroughArgs {
    pub(crate) fn request(&self) -> Result<Request> {
        let mut request = self.models.request(Method::Passthrough, &[])?;
        if let (Some(scale), [model]) = (one(&self.scale), &mut request.models[..]) {
            model.values.set("scale", scale);
        }
        Ok(request)
    }
}

/// Base of task vectors without further settings.
#[derive(clap::Args, Debug)]
pub(crate) struct BaseArgs {
    /// Checkpoint the models were fine-tuned from; gives config.json, tokenizer and buffers
    #[arg(long, value_name = "MODEL", help_heading = "Input and output")]
    base: PathBuf,
}

/// Defines the arguments of a method that takes models and a base, with further flags.
macro_rules! with_base {
    ($name:ident, $method:expr, { $($(#[$attribute:meta])* $field:ident: $type:ty,)* }, |$args:ident, $request:ident| $fill:block) => {
        #[derive(clap::Args, Debug)]
        pub(crate) struct $name {
            #[command(flatten)]
            models: ModelArgs,
            #[command(flatten)]
            base: BaseArgs,
            $($(#[$attribute])* $field: $type,)*
            #[command(flatten)]
            pub(crate) output: OutputArgs,
        }

        impl $name {
            pub(crate) fn request(&self) -> Result<Request> {
                let $args = self;
                let mut $request = self.models.request($method($args), &[])?;
                $request.base = Some(self.base.base.clone());
                $fill
                Ok($request)
            }
        }
    };
}

with_base!(ModelStockArgs, |_: &ModelStockArgs| Method::ModelStock, {
    /// Take the angles of each row (filter) by itself
    #[arg(long, help_heading = "Method")]
    filter_wise: bool,
}, |args, request| {
    request.values.set("filter_wise", flag(args.filter_wise));
});

with_base!(NearSwapArgs, |_: &NearSwapArgs| Method::NearSwap, {
    /// Distance between two elements up to which the model's is taken; beyond, the base moves by
    /// this distance. Repeated as --t of slerp
    #[arg(long = "t", value_name = "V", required = true, allow_negative_numbers = true, help_heading = "Method")]
    t: Vec<Setting>,
}, |args, request| {
    request.t = one(&args.t).unwrap_or(request.t);
});

with_base!(ArceeFusionArgs, |_: &ArceeFusionArgs| Method::ArceeFusion, {}, |_args, request| {});

with_base!(SceArgs, |_: &SceArgs| Method::Sce, {
    /// Share of the elements that differ between the models that is merged, those of the largest
    /// variance; 0 to 1
    #[arg(long, value_name = "V", default_value = "1", allow_negative_numbers = true, help_heading = "Method")]
    select_topk: Setting,
}, |args, request| {
    request.values.set("select_topk", args.select_topk.clone());
});

with_base!(RamArgs, |args: &RamArgs| if args.plus { Method::RamPlus } else { Method::Ram }, {
    /// Largest difference from the base that counts as no change
    #[arg(long, value_name = "V", default_value = "1e-5", allow_negative_numbers = true, help_heading = "Method")]
    epsilon: Setting,
    /// Scale up what only one model changed, by its share in each tensor (RAM+)
    #[arg(long, help_heading = "Method")]
    plus: bool,
    /// Strength of --plus
    #[arg(long, value_name = "V", default_value = "0.1", requires = "plus", allow_negative_numbers = true, help_heading = "Method")]
    r: Setting,
    /// Largest ratio of shared to unique changes that counts for --plus
    #[arg(long, value_name = "V", default_value = "0.2", requires = "plus", allow_negative_numbers = true, help_heading = "Method")]
    alpha: Setting,
}, |args, request| {
    request.values.set("epsilon", args.epsilon.clone());
    if args.plus {
        request.values.set("r", args.r.clone());
        request.values.set("alpha", args.alpha.clone());
    }
});

with_base!(TsvMArgs, |_: &TsvMArgs| Method::TsvM, {
    /// Factor of the merged task vector; repeated as --t of slerp [default: 1]
    #[arg(long = "lambda", value_name = "V", allow_negative_numbers = true, help_heading = "Method")]
    lambda: Vec<Setting>,
}, |args, request| {
    request.lambda = one(&args.lambda).unwrap_or(request.lambda);
});

with_base!(IsoCArgs, |_: &IsoCArgs| Method::IsoC, {
    /// Factor of the merged task vector; repeated as --t of slerp [default: 1]
    #[arg(long = "lambda", value_name = "V", allow_negative_numbers = true, help_heading = "Method")]
    lambda: Vec<Setting>,
}, |args, request| {
    request.lambda = one(&args.lambda).unwrap_or(request.lambda);
});

with_base!(WudiArgs, |_: &WudiArgs| Method::Wudi, {
    /// Factor of the merged task vector; repeated as --t of slerp [default: 1]
    #[arg(long = "lambda", value_name = "V", allow_negative_numbers = true, help_heading = "Method")]
    lambda: Vec<Setting>,
}, |args, request| {
    request.lambda = one(&args.lambda).unwrap_or(request.lambda);
});

/// Weights, and a base that need not be given.
#[derive(clap::Args, Debug)]
pub(crate) struct OriginArgs {
    /// Origin of the differences that are merged in place of the weights; then gives config.json,
    /// tokenizer and buffers
    #[arg(long, value_name = "MODEL", help_heading = "Input and output")]
    base: Option<PathBuf>,
    /// Weight of a model, once per --model in the same order; V,V,... is a gradient over the
    /// layers, FILTER=V applies to tensors whose name contains FILTER [default: all equal]
    #[arg(long = "weight", value_name = "V", allow_negative_numbers = true, help_heading = "Method")]
    weights: Vec<Setting>,
}

#[derive(clap::Args, Debug)]
pub(crate) struct NuSlerpArgs {
    #[command(flatten)]
    models: ModelArgs,
    #[command(flatten)]
    origin: OriginArgs,
    /// Interpolate whole tensors, or their rows or columns one by one
    #[arg(long, value_enum, default_value = "tensor", help_heading = "Method")]
    along: AlongArg,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Values of `--along`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum AlongArg {
    /// Whole tensors
    Tensor,
    /// Vectors along the last dimension
    Rows,
    /// Vectors along the first dimension
    Columns,
}

impl NuSlerpArgs {
    pub(crate) fn request(&self) -> Result<Request> {
        let mut request = self.models.request(Method::NuSlerp, &self.origin.weights)?;
        request.base.clone_from(&self.origin.base);
        request.values.set("nuslerp_flatten", flag(self.along == AlongArg::Tensor));
        request.values.set("nuslerp_row_wise", flag(self.along == AlongArg::Columns));
        Ok(request)
    }
}

#[derive(clap::Args, Debug)]
pub(crate) struct MultiSlerpArgs {
    #[command(flatten)]
    models: ModelArgs,
    #[command(flatten)]
    origin: OriginArgs,
    /// Divide the weights by their sum
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set, help_heading = "Method")]
    normalize_weights: bool,
    /// Number added to norms before a division
    #[arg(long, value_name = "V", default_value = "1e-8", allow_negative_numbers = true, help_heading = "Method")]
    eps: Setting,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

impl MultiSlerpArgs {
    pub(crate) fn request(&self) -> Result<Request> {
        let mut request = self.models.request(Method::MultiSlerp, &self.origin.weights)?;
        request.base.clone_from(&self.origin.base);
        request.values.set("normalize_weights", flag(self.normalize_weights));
        request.values.set("eps", self.eps.clone());
        Ok(request)
    }
}

#[derive(clap::Args, Debug)]
pub(crate) struct DellaArgs {
    #[command(flatten)]
    vectors: TaskVectorArgs,
    #[command(flatten)]
    density: DensityArgs,
    /// Half the range of the probabilities to keep an element: from density - epsilon for the
    /// smallest of its row to density + epsilon for the largest
    #[arg(long, value_name = "V", default_value = "0.15", allow_negative_numbers = true, help_heading = "Method")]
    epsilon: Setting,
    #[command(flatten)]
    elect: ElectArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// Seed of the random drop
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Run")]
    seed: u64,
}

impl DellaArgs {
    pub(crate) fn request(&self) -> Result<Request> {
        let method = if self.elect.elect_sign { Method::Della } else { Method::DellaLinear };
        let mut request = self.vectors.request(method)?;
        self.density.put_into(&mut request)?;
        request.models.iter_mut().for_each(|model| model.values.set("epsilon", self.epsilon.clone()));
        self.elect.put_into(&mut request);
        request.seed = self.seed;
        Ok(request)
    }
}

#[derive(clap::Args, Debug)]
pub(crate) struct BreadcrumbsArgs {
    #[command(flatten)]
    vectors: TaskVectorArgs,
    #[command(flatten)]
    density: DensityArgs,
    /// Share of the largest elements of a task vector that is dropped
    #[arg(long, value_name = "V", default_value = "0.01", allow_negative_numbers = true, help_heading = "Method")]
    gamma: Setting,
    #[command(flatten)]
    elect: ElectArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

impl BreadcrumbsArgs {
    pub(crate) fn request(&self) -> Result<Request> {
        let method = if self.elect.elect_sign { Method::BreadcrumbsTies } else { Method::Breadcrumbs };
        let mut request = self.vectors.request(method)?;
        self.density.put_into(&mut request)?;
        request.models.iter_mut().for_each(|model| model.values.set("gamma", self.gamma.clone()));
        self.elect.put_into(&mut request);
        Ok(request)
    }
}
