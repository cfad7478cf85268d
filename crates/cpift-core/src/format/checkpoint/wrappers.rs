//! Prefixes that wrappers leave in tensor names: `torch.compile`, `DistributedDataParallel`, FSDP,
//! PEFT, Lightning.

use std::path::Path;

use anyhow::Result;

use super::diagnose;
use crate::error::BadInput;
use crate::log_once;

/// Prefixes that wrappers of a whole model add to all names.
const PREFIXES: [&str; 5] = ["_orig_mod.", "module.", "base_model.model.", "_fsdp_wrapped_module.", "_forward_module."];

/// Name parts that wrappers of single layers add; no module of a model has such a name.
const INSIDE: [&str; 3] = ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."];

/// Wrapper prefixes of the tensor names of a checkpoint.
pub(super) struct Wrappers {
    /// Prefix that all names share, such as `module._orig_mod.`.
    prefix: String,
}

impl Wrappers {
    /// Finds the prefixes of the tensors `names`, each given with its file, in the checkpoint at
    /// `root`.
    ///
    /// # Errors
    /// [`BadInput`] if only some names have a prefix, or if there are tensors of an adapter.
    pub(super) fn find<'a>(root: &Path, names: impl Iterator<Item = (&'a str, &'a Path)> + Clone) -> Result<Self> {
        if let Some((name, file)) = names.clone().find(|(name, _)| diagnose::is_adapter_tensor(name)) {
            return Err(diagnose::adapter_tensor(root, file, name).into());
        }
        let mut prefix = String::new();
        loop {
            let rest = |name: &'a str| &name[prefix.len()..];
            let Some((first, _)) = names.clone().next() else { break };
            // A LightningModule stores the model in its attribute `model`.
            let lightning = names
                .clone()
                .all(|(name, _)| ["model.model.", "model.lm_head."].iter().any(|start| rest(name).starts_with(start)));
            let found =
                if lightning { Some("model.") } else { PREFIXES.into_iter().find(|p| rest(first).starts_with(p)) };
            let partly = |p: &str| names.clone().find(|(name, _)| !rest(name).starts_with(p));
            match found {
                Some(p) => match partly(p) {
                    None => prefix += p,
                    Some((without, file)) => return Err(mixed(file, p, first, without).into()),
                },
                None => {
                    let with = |(name, _): &(&'a str, _)| PREFIXES.into_iter().find(|p| rest(name).starts_with(p));
                    if let Some(pair) = names.clone().find(|pair| with(pair).is_some()) {
                        return Err(mixed(pair.1, with(&pair).unwrap_or_default(), pair.0, first).into());
                    }
                    break;
                }
            }
        }
        if !prefix.is_empty() {
            log_once::info(format!("{}: all names begin with {prefix}, which is removed", root.display()));
        }
        Ok(Self { prefix })
    }

    /// Returns the name of the tensor `name` in the model.
    pub(super) fn name(&self, name: &str) -> String {
        let name = &name[self.prefix.len()..];
        INSIDE
            .iter()
            .fold(name.to_owned(), |name, part| if name.contains(part) { name.replace(part, "") } else { name })
    }
}

fn mixed(file: &Path, prefix: &str, with: &str, without: &str) -> BadInput {
    BadInput::new(file, format!("some names begin with the prefix {prefix} of a wrapper and others do not"))
        .tensor(with)
        .expected(format!("{prefix} on all names or on none"))
        .found(format!("{without} without it"))
        .hint("save the unwrapped model: call its save_pretrained, not the one of the wrapper")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clean(names: &[&str]) -> Result<Vec<String>> {
        let file = Path::new("m.safetensors");
        let wrappers = Wrappers::find(file, names.iter().map(|name| (*name, file)))?;
        Ok(names.iter().map(|name| wrappers.name(name)).collect())
    }

    #[test]
    fn common_prefixes_are_removed_in_any_nesting() {
        let own = ["lm_head.weight", "model.layers.0.w", "model.norm.weight"];
        for prefix in
            ["", "_orig_mod.", "module.", "base_model.model.", "module._orig_mod.", "_orig_mod.module.", "model."]
        {
            let named: Vec<String> = own.iter().map(|name| format!("{prefix}{name}")).collect();
            let named: Vec<&str> = named.iter().map(String::as_str).collect();
            assert_eq!(clean(&named).unwrap(), own, "{prefix}");
        }
    }

    #[test]
    fn layer_wrappers_are_removed() {
        let names = ["lm_head.weight", "model.layers.0._orig_mod.w", "model.layers.1._checkpoint_wrapped_module.w"];
        assert_eq!(clean(&names).unwrap(), ["lm_head.weight", "model.layers.0.w", "model.layers.1.w"]);
    }

    #[test]
    fn a_prefix_on_only_some_names_is_refused() {
        for names in [["module.a", "b"], ["a", "module.b"]] {
            let error = clean(&names).unwrap_err().to_string();
            assert!(error.contains("the prefix module. of a wrapper"), "{error}");
        }
    }

    #[test]
    fn adapters_are_refused() {
        let error = clean(&["base_model.model.model.layers.0.q_proj.lora_A.weight"]).unwrap_err().to_string();
        assert!(error.contains("adapter"), "{error}");
    }
}
