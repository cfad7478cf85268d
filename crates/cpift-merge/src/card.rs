//! The model card, README.md of the output: inputs and method, the hub's YAML front matter, and the
//! recipe or command that reproduces the merge.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

use cpift_core::{Dtype, hub};

use crate::method::Method;
use crate::recipe;
use crate::request::{CpiRequest, Request, Space, TaskWeights};

/// Card of a merge by one of the plain methods with an output of `dtype`.
pub fn of_request(request: &Request, dtype: Dtype) -> String {
    // Models of the Hub appear under their names, pinned to the commit.
    let mut request = request.clone();
    request.relocate(&hub::named);
    let request = &request;
    let method = request.method;
    let models: Vec<&Path> = request.models.iter().map(|model| model.path.as_path()).collect();
    let mut text = front_matter(request.base.as_deref().into_iter().chain(models));
    let _ = writeln!(text, "# Merge by {}\n\n{}\n", method.title(), sentence(request));
    text += "| model | weight |";
    text += if method.has_density() { " density |\n| --- | --- | --- |\n" } else { "\n| --- | --- |\n" };
    for (i, model) in request.models.iter().enumerate() {
        let weight = match (method, i) {
            (Method::Slerp, 0) => "t = 0".to_owned(),
            (Method::Slerp, _) => format!("t = 1, at {}", request.t),
            _ if !method.has("weight") && method != Method::SphericalMean => "-".to_owned(),
            _ => model.weight.to_string(),
        };
        let _ = write!(text, "| {} | {} |", cell(&model.path.to_string_lossy()), cell(&weight));
        if method.has_density() {
            let _ = write!(text, " {} |", cell(&model.density.to_string()));
        }
        text += "\n";
    }
    if let Some(base) = &request.base {
        let _ = writeln!(text, "\nBase: {}", inline(&base.to_string_lossy()));
    }
    text + "\n" + &reproduction("`cpift-merge recipe` makes it again from", "yaml", &recipe::write(request, dtype))
}

/// Card of a merge by `cpi` with an output of `dtype`.
pub(crate) fn of_cpi(request: &CpiRequest, dtype: Dtype) -> String {
    let mut request = request.clone();
    let tasks = request.tasks.iter_mut().map(|task| &mut task.path);
    for path in tasks.chain([&mut request.base]).chain(&mut request.backbone) {
        if let Some(name) = hub::named(path) {
            *path = name;
        }
    }
    let request = &request;
    let tasks = request.tasks.iter().map(|task| task.path.as_path());
    let mut text = front_matter([request.base.as_path()].into_iter().chain(request.backbone.as_deref()).chain(tasks));
    text += "# Merge by core parameter isolation\n\n";
    text += "Each task's core region comes from that task bit for bit; all other weights are the spherical interpolation of \
             backbone and tasks (CPI-FT, arXiv:2508.21741).\n\n| task | model |\n| --- | --- |\n";
    for task in &request.tasks {
        let _ = writeln!(text, "| {} | {} |", cell(&task.name), cell(&task.path.to_string_lossy()));
    }
    let _ = writeln!(text, "\nBase: {}\n", inline(&request.base.to_string_lossy()));
    text + &reproduction("Made by", "sh", &command(request, dtype))
}

/// Keys that the hub reads: models on the hub, library and tags.
fn front_matter<'a>(models: impl Iterator<Item = &'a Path>) -> String {
    // The hub refuses anything that is not the name of a model, such as the path of a directory.
    let model = |path: &'a Path| path.to_str()?.split(['@', '+']).next();
    let ids: BTreeSet<&str> = models.filter_map(model).filter(|name| is_hub_id(name)).collect();
    let mut text = "---\n".to_owned();
    if !ids.is_empty() {
        text += "base_model:\n";
    }
    for id in ids {
        let _ = writeln!(text, "  - {id}");
    }
    text + "library_name: transformers\ntags:\n  - merge\n  - cpift\n---\n\n"
}

/// Returns true if a path has the form of a name on the hub, `organisation/model`, under which
/// downloads are often kept.
fn is_hub_id(name: &str) -> bool {
    let part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    };
    name.split_once('/').is_some_and(|(organisation, model)| part(organisation) && part(model))
}

/// Description of the method, with its paper.
fn sentence(request: &Request) -> String {
    let text = match request.method {
        Method::Linear if request.normalize => {
            "Every weight is the weighted mean of the models' (model soups, arXiv:2203.05482)."
        }
        Method::Linear => "Every weight is the weighted sum of the models'.",
        Method::Slerp => "Tensor by tensor, the models are interpolated on the great circle between them (SLERP).",
        Method::SphericalMean => {
            "Tensor by tensor, the result points to the mean of the models' directions on the sphere and has the mean of \
             their norms (Karcher mean)."
        }
        Method::TaskArithmetic => {
            "The models' weighted differences from the base are added to it (task arithmetic, arXiv:2212.04089)."
        }
        Method::Ties => {
            "Of each model's difference from the base the largest elements are kept, and of those the ones of the elected \
             sign are merged (TIES, arXiv:2306.01708)."
        }
        Method::DareLinear => {
            "Of each model's difference from the base elements are dropped at random, and the rest are scaled up and added \
             (DARE, arXiv:2311.03099)."
        }
        Method::NuSlerp => {
            "The two models, or their differences from the base, are interpolated on the great circle between them \
             (NuSLERP)."
        }
        Method::MultiSlerp => {
            "Tensor by tensor, the models or their differences from the base are averaged on the sphere (Multi-SLERP)."
        }
        Method::Passthrough => "Tensors are taken from the models as they are, or multiplied by a scale.",
        Method::ModelStock => {
            "The mean of the models is drawn towards the base by the angles between their differences from it (Model \
             Stock, arXiv:2403.19522)."
        }
        Method::NearSwap => "The base is moved towards the other model where both are near (NearSwap).",
        Method::ArceeFusion => {
            "The elements of the other model whose change is an outlier in importance are put into the base (Arcee \
             Fusion)."
        }
        Method::Della | Method::DellaLinear => {
            "Of each model's difference from the base elements are dropped at random, small ones more often, and the \
             rest are scaled up and merged (DELLA, arXiv:2406.11617)."
        }
        Method::Breadcrumbs | Method::BreadcrumbsTies => {
            "Each model's difference from the base is added without its smallest and its very largest elements (Model \
             Breadcrumbs, arXiv:2312.06795)."
        }
        Method::Sce => {
            "The elements that differ most between the models are merged with weights by energy (SCE, arXiv:2408.07990)."
        }
        Method::Ram | Method::RamPlus => {
            "Each element gets the mean of the differences of those models that changed it (RAM, arXiv:2601.13572)."
        }
        Method::TsvM => {
            "The largest singular vectors of each model's difference from the base are made orthogonal to the others' and \
             summed (TSV-M, arXiv:2412.00081)."
        }
        Method::IsoC => {
            "The sum of the models' differences from the base is added with all its singular values made equal (Iso-C, \
             arXiv:2502.04959)."
        }
        Method::Wudi => {
            "What is added to the base interferes least with each model's difference from it (WUDI, arXiv:2503.08099)."
        }
        Method::DareTies => {
            "Of each model's difference from the base elements are dropped at random, and of the rest the ones of the \
             elected sign are merged (DARE, arXiv:2311.03099, with TIES, arXiv:2306.01708)."
        }
    };
    let about = match (request.method, request.space) {
        (Method::Slerp | Method::SphericalMean, Space::Delta) => " Angles are between differences from the base.",
        _ => "",
    };
    format!("{text}{about}")
}

/// The `cpi` command of the request, with the defaults spelled out.
fn command(request: &CpiRequest, dtype: Dtype) -> String {
    let path = |path: &Path| shell(&path.to_string_lossy());
    let mut text = format!("cpift-merge cpi --base {} --groups {}", path(&request.base), path(&request.groups));
    for (flag, list) in [("task", &request.tasks), ("mask", &request.masks)] {
        for entry in list {
            let named = format!("{}={}", entry.name, entry.path.display());
            let _ = write!(text, " \\\n    --{flag} {}", shell(&named));
        }
    }
    text += " \\\n   ";
    if let Some(backbone) = &request.backbone {
        let _ = write!(text, " --backbone {}", path(backbone));
    }
    let _ = write!(text, " --conflict {}", request.conflict.name());
    text += &match request.weights {
        TaskWeights::Equal => " --weights equal".to_owned(),
        TaskWeights::SphericalMean => " --weights spherical-mean".to_owned(),
        TaskWeights::Omega(omega) => format!(" --omega {omega}"),
    };
    let _ = write!(text, " --space {}", request.space.name());
    if let Some(epsilon) = request.epsilon {
        let _ = write!(text, " --epsilon {epsilon}");
    }
    let _ = writeln!(text, " --dtype {} --out OUT", dtype.name().to_lowercase());
    text
}

/// A sentence and a fenced block, whose fence is longer than any in `body`.
fn reproduction(intro: &str, language: &str, body: &str) -> String {
    let longest = body.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest.max(2) + 1);
    format!("{intro}\n\n{fence}{language}\n{body}{fence}\n")
}

/// Text for a cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace(['\n', '\r'], " ")
}

/// Text without line breaks.
fn inline(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

/// Quotes a word for the shell.
fn shell(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./=+:,@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}
