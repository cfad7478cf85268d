//! The local cache of the Hugging Face Hub, as the huggingface_hub library lays it out:
//! `models--ORG--NAME` with `refs/REVISION`, files that hold a commit, and `snapshots/COMMIT`,
//! directories of links to the files.

use std::env;
use std::fs;
use std::path::{Component, Path, PathBuf};

use crate::error::BadInput;

/// Directory of the cache: HF_HUB_CACHE, else `hub` in HF_HOME, else in `huggingface` of
/// XDG_CACHE_HOME or of ~/.cache. None without a home directory.
fn cache() -> Option<PathBuf> {
    let home = || env::var_os("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    let named = |name: &str| {
        let path = PathBuf::from(env::var_os(name).filter(|value| !value.is_empty())?);
        match path.strip_prefix("~") {
            Ok(rest) => Some(home()?.join(rest)),
            Err(_) => Some(path),
        }
    };
    let root = || {
        let user = || named("XDG_CACHE_HOME").or_else(|| Some(home()?.join(".cache")));
        named("HF_HOME").or_else(|| Some(user()?.join("huggingface")))
    };
    named("HF_HUB_CACHE").or_else(|| named("HUGGINGFACE_HUB_CACHE")).or_else(|| Some(root()?.join("hub")))
}

/// Splits `org/name[@revision]`; `None` for any other form. A path of two names has this form
/// too.
fn split(text: &str) -> Option<(&str, &str, Option<&str>)> {
    let (repo, revision) = text.split_once('@').map_or((text, None), |(repo, revision)| (repo, Some(revision)));
    let (organisation, name) = repo.split_once('/')?;
    let sound = |part: &str| {
        let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !part.is_empty() && part.len() <= 96 && part.chars().all(known) && !part.starts_with(['-', '.'])
    };
    let inside = |revision: &str| {
        Path::new(revision).components().all(|part| matches!(part, Component::Normal(_))) && !revision.is_empty()
    };
    (sound(organisation) && sound(name) && revision.is_none_or(inside)).then_some((organisation, name, revision))
}

/// A snapshot in the cache.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Snapshot {
    /// Its directory.
    pub path: PathBuf,
    /// `org/name@commit`.
    pub pinned: String,
}

/// The snapshot that `text`, `org/name[@revision]`, names in the cache: of the branch `main` unless
/// it gives a branch, a tag or a commit. None if there is a file or directory of that name, which
/// comes first, or if the cache has no such snapshot.
pub(crate) fn snapshot(text: &str) -> Option<Snapshot> {
    if Path::new(text).exists() {
        return None;
    }
    let (organisation, name, revision) = split(text)?;
    let folder = cache()?.join(format!("models--{organisation}--{name}"));
    let revision = revision.unwrap_or("main");
    let commit = match fs::read_to_string(folder.join("refs").join(revision)) {
        Ok(commit) => commit.trim().to_owned(),
        Err(_) => revision.to_owned(),
    };
    let sound = !commit.is_empty() && commit.bytes().all(|b| b.is_ascii_alphanumeric());
    let path = folder.join("snapshots").join(&commit);
    (sound && path.is_dir()).then(|| Snapshot { path, pinned: format!("{organisation}/{name}@{commit}") })
}

/// `org/name@commit` of a directory, or a file, in a snapshot of the cache.
pub fn repository(path: &Path) -> Option<String> {
    let parts: Vec<&str> = path.components().filter_map(|part| part.as_os_str().to_str()).collect();
    parts.windows(3).find_map(|parts| match parts {
        [folder, "snapshots", commit] => {
            let (organisation, name) = folder.strip_prefix("models--")?.split_once("--")?;
            // In MODEL+ADAPTER another path follows the model's.
            let commit = commit.split('+').next()?;
            Some(format!("{organisation}/{name}@{commit}"))
        }
        _ => None,
    })
}

/// The `error` about a checkpoint that does not exist, with a hint if it may be one of the Hub.
pub fn hinted(error: BadInput, path: &Path) -> BadInput {
    let Some((organisation, name, revision)) = path.to_str().and_then(split) else { return error };
    let cache = cache().map_or_else(|| "the cache".to_owned(), |cache| format!("the cache {}", cache.display()));
    let revision = revision.map_or_else(String::new, |revision| format!(" --revision {revision}"));
    error.hint(format!(
        "a model of the Hugging Face Hub must be in {cache}: hf download {organisation}/{name}{revision}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_hub_are_told_from_other_paths() {
        assert_eq!(split("org/name"), Some(("org", "name", None)));
        assert_eq!(split("Qwen/Qwen2.5-0.5B@refs/pr/1"), Some(("Qwen", "Qwen2.5-0.5B", Some("refs/pr/1"))));
        for other in ["name", "./name", "/org/name", "a/b/c", "../a", "a/b@", "a/b@../../x", "a/b@/etc", "a b/c", "~/x"]
        {
            assert_eq!(split(other), None, "{other}");
        }
    }

    #[test]
    fn a_path_in_a_snapshot_names_its_repository_and_commit() {
        let path = Path::new("/c/hub/models--org--na--me/snapshots/0a1b/model.safetensors");
        assert_eq!(repository(path).as_deref(), Some("org/na--me@0a1b"));
        assert_eq!(repository(Path::new("runs/snapshots/0a1b")), None);
    }
}
