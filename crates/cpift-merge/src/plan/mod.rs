//! A merge checked and resolved, complete before any work or output starts, from a request for one
//! of the plain methods or for `cpi`.

mod inputs;
mod layout;
mod output;
mod rules;
mod vocabulary;

pub(crate) use inputs::{Source, check_compatible, share_head};
pub(crate) use layout::Target;
pub(crate) use output::{Destination, check_space};

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::format::checkpoint::Excluded;
use cpift_core::format::digest::Digest;
use cpift_core::format::groups::Groups;
use cpift_core::format::mask;
use cpift_core::record::provenance::check_made_from;
use cpift_core::run::cli::{self, Named};
use cpift_core::{BadInput, Mask, TensorSpec, TensorView, files};

use crate::method::Base;
use crate::methods::sphere::COLLINEAR_COSINE;
use crate::methods::{Conflict, Rule};
use crate::request::{
    ChatTemplate, CpiRequest, LayoutPolicy, ModelRequest, OutputRequest, Request, Space, TaskWeights, TokenizerSource,
};
use inputs::{check_alike, reconcile};
use layout::Layout;

/// A merge ready to run.
pub(crate) struct Plan {
    /// Name of the method, such as `cpi` or `slerp`.
    pub method: &'static str,
    /// θ⁽⁰⁾, for methods that have one.
    pub base: Option<Arc<Source>>,
    /// Checkpoints that are combined.
    pub inputs: Inputs,
    /// Rule of each parameter, in bytewise name order.
    pub rules: Vec<Rule>,
    /// Tensors of the output and their origins, if layers are rearranged; otherwise every parameter
    /// is made from those of its name.
    pub layout: Option<Layout>,
    /// Vectors that are combined.
    pub space: Space,
    /// Angle in radians below which, or within which of π, interpolation is linear.
    pub epsilon: f64,
    /// Mask of the elements at which the output is the backbone.
    pub protect: Option<Mask>,
    /// Mask of the elements outside which the output is the backbone.
    pub within: Option<Mask>,
    /// Seed of the random drop, for methods that have one.
    pub seed: Option<u64>,
    /// Destination of the output.
    pub output: Destination,
    /// Path and digest of the input files that are not checkpoints, by role.
    pub files: BTreeMap<String, (PathBuf, Digest)>,
}

/// Checkpoints that are combined.
pub(crate) enum Inputs {
    /// Models of a plain method, in the order of the request.
    Models(Vec<Model>),
    /// Backbone and tasks of `cpi`.
    Tasks {
        /// Checkpoint the tasks are folded into.
        backbone: Arc<Source>,
        /// Tasks in the order of groups.json.
        tasks: Vec<Task>,
        /// Value of an element in several core regions.
        conflict: Conflict,
    },
}

/// A model of a plain method.
pub(crate) struct Model {
    pub source: Arc<Source>,
    /// Outside its mask the model is replaced by the backbone.
    pub mask: Option<Mask>,
}

/// A task of `cpi`.
pub(crate) struct Task {
    pub name: String,
    pub source: Arc<Source>,
    /// Core region, which is transplanted.
    pub core: Mask,
}

impl Plan {
    /// Resolves a merge by one of the plain methods.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] for settings out of range, [`BadInput`] for inputs that cannot be
    /// merged.
    pub fn of_models(request: &Request, output: &OutputRequest) -> Result<Self> {
        rules::check(request)?;
        let open = |(i, model): (usize, &ModelRequest)| Source::open(format!("model:{}", i + 1), &model.path);
        let mut sources: Vec<Source> = request.models.iter().enumerate().map(open).collect::<Result<_>>()?;
        let mut base = request.base.as_deref().map(|path| Source::open("base", path)).transpose()?;
        share_head(&mut sources.iter_mut().chain(&mut base).collect::<Vec<_>>());
        let (first, mut others): (&mut Source, Vec<&mut Source>) = match &mut base {
            Some(base) => (base, sources.iter_mut().collect()),
            None => {
                let (first, others) = sources.split_first_mut().expect("the number is checked");
                (first, others.iter_mut().collect())
            }
        };
        let mut vocabulary = None;
        if let Some(tokenizer) = &request.tokenizer {
            let mut all: Vec<&mut Source> = vec![&mut *first];
            all.extend(others.iter_mut().map(|other| &mut **other));
            vocabulary = vocabulary::unify(&mut all, tokenizer)?;
        }
        if request.slices.is_empty() {
            reconcile(first, &mut others, request.layouts)?;
        } else if request.layouts != LayoutPolicy::default() {
            return Err(usage("--missing and --integers are for models that are merged as a whole, not for slices"));
        } else {
            others.iter().try_for_each(|other| check_alike(first, other))?;
        }
        let sources: Vec<Arc<Source>> = sources.into_iter().map(Arc::new).collect();
        let base = base.map(Arc::new);
        let backbone = base.as_ref().unwrap_or(&sources[0]);
        let everything: Vec<&Source> = base.iter().chain(&sources).map(Arc::as_ref).collect();
        check_output(output, backbone)?;
        files::check_not_input("--out", &output.dir, everything.iter().flat_map(|source| source.checkpoint.inputs()))?;
        let mut output = output.clone();
        if let Some(vocabulary) = &vocabulary {
            output.side_files.get_or_insert_with(|| vocabulary.folder.clone());
        } else if let Some(TokenizerSource::Path(folder)) = request.tokenizer.as_ref().map(|t| &t.source) {
            output.side_files.get_or_insert_with(|| folder.clone());
        }
        let layout = match &request.slices[..] {
            [] => None,
            _ => Some(Layout::of(request, &sources, base.as_deref())?),
        };
        let of_slices =
            layout.as_ref().map(|layout| layout.dtypes(&sources, base.as_deref(), output.dtype)).transpose()?;
        let mut destination = Destination::resolve(&output, of_slices, &everything, backbone, backbone, &everything)?;
        if let Some(vocabulary) = vocabulary {
            destination.set_vocabulary(vocabulary);
        }
        destination.chat_template = match &request.chat_template {
            None => None,
            Some(ChatTemplate::Text(text)) => Some(text.clone()),
            Some(ChatTemplate::Auto) => {
                output::most_common_template(everything.iter().filter_map(|source| source.folder()))
            }
        };
        if let Some(layout) = &layout {
            destination.config = layout.config(destination.config, &sources);
        }
        let rules = match &layout {
            Some(layout) => layout.rules(request)?,
            None => rules::of_models(request, backbone)?,
        };
        let mut files = BTreeMap::new();
        let mut open_mask = |role: String, path: &Path| open_mask(role, path, backbone, &mut files);
        let mut models = Vec::new();
        for (i, (source, model)) in sources.iter().zip(&request.models).enumerate() {
            let mask = model.mask.as_deref().map(|path| open_mask(format!("mask:{}", i + 1), path)).transpose()?;
            models.push(Model { source: Arc::clone(source), mask });
        }
        let protect = request.protect.as_deref().map(|path| open_mask("protect".into(), path)).transpose()?;
        let within = request.within.as_deref().map(|path| open_mask("within".into(), path)).transpose()?;
        files::check_not_input("--out", &output.dir, files.values().map(|(path, _)| path.as_path()))?;
        let about_base = base.is_some() && request.method.base() != Base::Model;
        Ok(Self {
            method: request.method.name(),
            base,
            inputs: Inputs::Models(models),
            rules,
            layout,
            space: if about_base { Space::Delta } else { request.space },
            epsilon: request.epsilon,
            protect,
            within,
            seed: request.method.draws().then_some(request.seed),
            output: destination,
            files,
        })
    }

    /// Resolves a merge by `cpi`.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] for settings out of range, [`BadInput`] for inputs that do not belong
    /// together.
    pub fn of_tasks(request: &CpiRequest, output: &OutputRequest) -> Result<Self> {
        let epsilon = request.epsilon.unwrap_or_else(|| COLLINEAR_COSINE.acos());
        rules::check_epsilon(epsilon)?;
        if let TaskWeights::Omega(omega) = request.weights {
            rules::require_unit("--omega", omega)?;
        }
        cli::require_unique(&request.tasks, "--task")?;
        cli::require_unique(&request.masks, "--mask")?;
        let groups = Groups::read(&request.groups)?;
        groups.check_names(&request.groups, "--task", request.tasks.iter().map(|t| &t.name))?;
        groups.check_names(&request.groups, "--mask", request.masks.iter().map(|m| &m.name))?;
        let Opened { base, backbone, tasks } = Opened::open(request, &groups)?;
        let of_tasks: Vec<&Source> = tasks.iter().map(|(_, task)| task.as_ref()).collect();
        let everything: Vec<&Source> =
            [backbone.as_ref()].into_iter().chain(of_tasks.iter().copied()).chain([base.as_ref()]).collect();
        check_output(output, &backbone)?;
        let destination = Destination::resolve(output, None, &of_tasks, &backbone, &base, &everything)?;
        check_groups_base(&request.groups, &groups, &base)?;
        for source in everything.iter().filter(|source| !std::ptr::eq(**source, base.as_ref())) {
            check_made_from(source.path(), "base", (base.path(), base.digest()?))?;
        }
        let mut files = BTreeMap::new();
        let inputs: Vec<PathBuf> =
            everything.iter().flat_map(|source| source.checkpoint.inputs().map(Path::to_owned)).collect();
        let tasks = with_cores(tasks, request, &groups, &base, &mut files)?;
        files.insert("groups".into(), (request.groups.clone(), Digest::of_file(&request.groups)?));
        let paths = inputs.iter().map(PathBuf::as_path).chain(files.values().map(|(path, _)| path.as_path()));
        files::check_not_input("--out", &destination.dir, paths)?;
        let rule = rules::of_tasks(request.weights, tasks.len());
        Ok(Self {
            method: "cpi",
            rules: vec![rule; backbone.checkpoint.parameters().count()],
            base: Some(base),
            layout: None,
            inputs: Inputs::Tasks { backbone, tasks, conflict: request.conflict },
            space: request.space,
            epsilon,
            protect: None,
            within: None,
            seed: None,
            output: destination,
            files,
        })
    }

    /// Checkpoint that gives config.json and buffers, and replaces a masked model outside its mask:
    /// the backbone of `cpi`, else the base, or the first model if there is no base.
    pub fn backbone(&self) -> &Arc<Source> {
        match (&self.inputs, &self.base) {
            (Inputs::Tasks { backbone, .. }, _) => backbone,
            (Inputs::Models(_), Some(base)) => base,
            (Inputs::Models(models), None) => &models[0].source,
        }
    }

    /// Operands of the combination in order; for `cpi` the backbone comes first.
    pub fn operands(&self) -> Vec<&Source> {
        match &self.inputs {
            Inputs::Models(models) => models.iter().map(|model| model.source.as_ref()).collect(),
            Inputs::Tasks { backbone, tasks, .. } => {
                let tasks = tasks.iter().map(|task| task.source.as_ref());
                [backbone.as_ref()].into_iter().chain(tasks).collect()
            }
        }
    }

    /// Every checkpoint that is read: the operands, then a base that is not one of them.
    pub fn sources(&self) -> impl Iterator<Item = &Source> {
        let base = self.base.as_deref().filter(|_| self.base_is_separate());
        self.operands().into_iter().chain(base)
    }

    /// Returns true if there is a base that is not one of the operands.
    pub fn base_is_separate(&self) -> bool {
        let Some(base) = &self.base else { return false };
        !matches!(&self.inputs, Inputs::Tasks { backbone, .. } if Arc::ptr_eq(backbone, base))
    }

    /// Parameters of the output, in bytewise name order.
    pub fn specs(&self) -> Vec<TensorSpec> {
        let dtypes = || self.output.dtypes.iter().copied();
        match &self.layout {
            Some(layout) => layout.targets.iter().zip(dtypes()).map(|(target, dtype)| target.spec(dtype)).collect(),
            None => {
                let parameters = self.backbone().checkpoint.parameters().zip(dtypes());
                parameters.map(|(view, dtype)| TensorSpec { dtype, ..view.spec() }).collect()
            }
        }
    }

    /// The parameters of the output whose origins are spelled out, if layers are rearranged.
    pub fn targets(&self) -> Option<&[Target]> {
        self.layout.as_ref().map(|layout| &layout.targets[..])
    }

    /// Tensors of the backbone that are copied unchanged. A tied lm_head is not: transformers
    /// restores it from the input embedding.
    pub fn copies(&self) -> Vec<TensorView<'_>> {
        if let Some(layout) = &self.layout {
            return layout.copies(&self.operands());
        }
        let others = self.backbone().checkpoint.not_parameters();
        others.filter(|(_, why)| *why != Excluded::Tied).map(|(view, _)| view).collect()
    }

    /// Number of bytes of all tensors of the output.
    pub fn bytes_to_write(&self) -> u64 {
        let parameters: u64 = self.specs().iter().map(|s| s.nbytes() as u64).sum();
        parameters + self.copies().iter().map(|v| v.bytes.len() as u64).sum::<u64>()
    }

    /// Number of bytes of all tensors that are read.
    pub fn bytes_to_read(&self) -> u64 {
        self.sources().flat_map(|s| s.checkpoint.tensors()).map(|v| v.bytes.len() as u64).sum()
    }

    /// Refuses masks that were extracted from another checkpoint than their task's. Tasks whose
    /// digest is not known yet are passed over, so the check is repeated after the tasks have been
    /// read.
    ///
    /// # Errors
    /// [`BadInput`] naming both.
    pub fn check_masks_of_tasks(&self) -> Result<()> {
        let Inputs::Tasks { tasks, .. } = &self.inputs else { return Ok(()) };
        for Task { name, source, core } in tasks {
            let Some(digest) = source.known_digest().filter(|digest| **digest != core.header.tuned) else { continue };
            return Err(BadInput::new(
                core.path(),
                format!("extracted from another checkpoint than {}", source.path().display()),
            )
            .expected(format!("digest {digest}"))
            .found(format!("digest {} of the tuned checkpoint", core.header.tuned))
            .hint(format!("check that --task {name} and --mask {name} belong together, or extract the mask again"))
            .into());
        }
        Ok(())
    }
}

/// Refuses an output that exists; that of a bare file is a file, any other a directory.
fn check_output(output: &OutputRequest, backbone: &Source) -> Result<()> {
    match (output.dry_run, backbone.checkpoint.layout().is_file) {
        (true, _) => Ok(()),
        (false, true) => files::check_output(&output.dir, output.force),
        (false, false) => files::check_output_dir(&output.dir, output.force),
    }
}

/// Opens a mask for the parameters of `backbone` and adds it to `files`.
fn open_mask(
    role: String,
    path: &Path,
    backbone: &Source,
    files: &mut BTreeMap<String, (PathBuf, Digest)>,
) -> Result<Mask> {
    let mask = Mask::open(path)?;
    // Any mask of this layout is accepted, whatever base it was made for.
    mask.check_base(&backbone.checkpoint, &mask.header.base)?;
    mask.verify()?;
    if backbone.known_digest().is_some_and(|digest| *digest != mask.header.base) {
        log::warn!("{}: made for another base than {}", path.display(), backbone.path().display());
    }
    files.insert(role, (path.to_owned(), Digest::of_file(path)?));
    Ok(mask)
}

/// Checkpoints of `cpi`.
struct Opened {
    base: Arc<Source>,
    backbone: Arc<Source>,
    /// Name and checkpoint of each task, in the order of groups.json.
    tasks: Vec<(String, Arc<Source>)>,
}

impl Opened {
    /// Opens base, backbone and tasks, and checks that all are checkpoints of the base's model.
    fn open(request: &CpiRequest, groups: &Groups) -> Result<Self> {
        let mut base = Source::open("base", &request.base)?;
        let mut backbone = request.backbone.as_deref().map(|path| Source::open("backbone", path)).transpose()?;
        let mut tasks = Vec::new();
        for name in groups.task_order() {
            let task = request.tasks.iter().find(|t| t.name == name).expect("names are checked");
            tasks.push((name.to_owned(), Source::open(format!("task:{name}"), &task.path)?));
        }
        let sources_of_tasks = tasks.iter_mut().map(|(_, source)| source);
        share_head(&mut [&mut base].into_iter().chain(&mut backbone).chain(sources_of_tasks).collect::<Vec<_>>());
        for source in backbone.iter().chain(tasks.iter().map(|(_, source)| source)) {
            check_compatible(&base, source, LayoutPolicy::default())?;
        }
        let base = Arc::new(base);
        let backbone = backbone.map_or_else(|| Arc::clone(&base), Arc::new);
        let tasks = tasks.into_iter().map(|(name, source)| (name, Arc::new(source))).collect();
        Ok(Self { base, backbone, tasks })
    }
}

fn check_groups_base(path: &Path, groups: &Groups, base: &Source) -> Result<()> {
    let digest = base.digest()?;
    if groups.base == *digest {
        return Ok(());
    }
    Err(BadInput::new(path, format!("made for another base than {}", base.path().display()))
        .expected(format!("base digest {digest}"))
        .found(format!("base digest {}", groups.base))
        .hint("extract the masks and group them again from this base")
        .into())
}

/// Opens the core region of each task, checks it against base and groups, and adds it to `files`.
fn with_cores(
    tasks: Vec<(String, Arc<Source>)>,
    request: &CpiRequest,
    groups: &Groups,
    base: &Source,
    files: &mut BTreeMap<String, (PathBuf, Digest)>,
) -> Result<Vec<Task>> {
    let mut by_name = mask::open_all(request.masks.iter().map(Named::pair), &base.checkpoint, base.digest()?)?;
    let task = |(name, source): (String, Arc<Source>)| -> Result<Task> {
        let core = by_name.remove(name.as_str()).expect("names are checked");
        let digest = groups.check_mask(&request.groups, &name, core.path())?;
        files.insert(format!("mask:{name}"), (core.path().to_owned(), digest));
        Ok(Task { name, source, core })
    };
    tasks.into_iter().map(task).collect()
}
