//! The local cache of the Hugging Face Hub, as the huggingface_hub library lays it out:
//! `models--ORG--NAME` or `datasets--ORG--NAME` with `refs/REVISION`, files that hold a commit,
//! `blobs/ETAG`, and `snapshots/COMMIT`, directories of links to the blobs. Locks are in `.locks`.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Component, Path, PathBuf};

/// The value of a variable that is set and not empty.
pub(super) fn variable(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|value| !value.is_empty())
}

/// A path in a variable, with `~` resolved.
pub(super) fn path_in(name: &str) -> Option<PathBuf> {
    let path = PathBuf::from(variable(name)?);
    match path.strip_prefix("~") {
        Ok(rest) => Some(PathBuf::from(variable("HOME")?).join(rest)),
        Err(_) => Some(path),
    }
}

/// HF_HOME, else `huggingface` in XDG_CACHE_HOME or in ~/.cache. None without a home directory.
pub(super) fn home() -> Option<PathBuf> {
    let user = || path_in("XDG_CACHE_HOME").or_else(|| Some(PathBuf::from(variable("HOME")?).join(".cache")));
    path_in("HF_HOME").or_else(|| Some(user()?.join("huggingface")))
}

/// Directory of the cache: HF_HUB_CACHE, else `hub` in [`home`].
pub(super) fn cache() -> Option<PathBuf> {
    path_in("HF_HUB_CACHE").or_else(|| path_in("HUGGINGFACE_HUB_CACHE")).or_else(|| Some(home()?.join("hub")))
}

/// The cache in messages.
pub(super) fn shown() -> String {
    cache().map_or_else(|| "the cache".to_owned(), |cache| format!("the cache {}", cache.display()))
}

/// Kind of a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Model,
    Dataset,
}

impl Kind {
    /// First part of the names of its directories and addresses.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }
}

/// Name of a repository and a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Name {
    pub kind: Kind,
    /// `org/name`.
    pub id: String,
    /// Branch, tag or commit, if one is given.
    pub revision: Option<String>,
}

impl Name {
    /// Splits `org/name[@revision]`; `None` for any other form. A path of two names has this form
    /// too.
    pub fn of_model(text: &str) -> Option<Self> {
        let (id, revision) = text.split_once('@').map_or((text, None), |(id, revision)| (id, Some(revision)));
        Self::new(Kind::Model, id, revision)
    }

    /// Splits `datasets/org/name[@revision]/path`. A revision that begins with `refs/` has three
    /// parts, such as `refs/convert/parquet`; in others `/` is written as `%2F`.
    pub fn of_data_file(text: &str) -> Option<(Self, &str)> {
        let rest = text.strip_prefix("datasets/")?;
        let slash = rest.find('/')?;
        let end = |from: usize, parts: usize| rest[from..].match_indices('/').nth(parts - 1).map(|(at, _)| from + at);
        let after_name = end(slash + 1, 1)?;
        let (id, revision, path) = match rest[..after_name].find('@') {
            None => (&rest[..after_name], None, &rest[after_name + 1..]),
            Some(at) => {
                let parts = if rest[at + 1..].starts_with("refs/") { 3 } else { 1 };
                let after = end(at + 1, parts)?;
                (&rest[..at], Some(rest[at + 1..after].replace("%2F", "/")), &rest[after + 1..])
            }
        };
        let name = Self::new(Kind::Dataset, id, revision.as_deref())?;
        is_inside(path).then_some((name, path))
    }

    fn new(kind: Kind, id: &str, revision: Option<&str>) -> Option<Self> {
        let (organisation, name) = id.split_once('/')?;
        let sound = |part: &str| {
            let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            !part.is_empty() && part.len() <= 96 && part.chars().all(known) && !part.starts_with(['-', '.'])
        };
        (sound(organisation) && sound(name) && revision.is_none_or(is_inside)).then(|| Self {
            kind,
            id: id.to_owned(),
            revision: revision.map(str::to_owned),
        })
    }

    /// The organisation or user.
    pub fn organisation(&self) -> &str {
        self.id.split('/').next().unwrap_or_default()
    }

    /// Returns true if `text` without a revision is taken as a path: it lies in a directory that
    /// exists.
    pub fn is_local_path(&self, text: &str) -> bool {
        Path::new(text).exists() || self.revision.is_none() && Path::new(self.organisation()).is_dir()
    }

    /// Branch, tag or commit: `main` unless one is given.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }

    /// Name of its directory in the cache.
    pub fn folder(&self) -> String {
        format!("{}--{}", self.kind.prefix(), self.id.replace('/', "--"))
    }

    /// The name pinned to a commit.
    pub fn pinned(&self, commit: &str) -> String {
        match self.kind {
            Kind::Model => format!("{}@{commit}", self.id),
            Kind::Dataset => format!("datasets/{}@{commit}", self.id),
        }
    }

    /// Its snapshot in the cache, if there is one.
    pub fn snapshot(&self) -> Option<Snapshot> {
        let folder = cache()?.join(self.folder());
        let commit = match fs::read_to_string(folder.join("refs").join(self.revision())) {
            Ok(commit) => commit.trim().to_owned(),
            Err(_) => self.revision().to_owned(),
        };
        let path = folder.join("snapshots").join(&commit);
        (is_commit(&commit) && path.is_dir()).then(|| Snapshot { path, pinned: self.pinned(&commit) })
    }
}

/// Returns true for the form of a commit.
pub(super) fn is_commit(text: &str) -> bool {
    !text.is_empty() && text.len() <= 64 && text.bytes().all(|b| b.is_ascii_alphanumeric())
}

/// Returns true for a relative path without `.` and `..`.
pub(super) fn is_inside(path: &str) -> bool {
    !path.is_empty() && Path::new(path).components().all(|part| matches!(part, Component::Normal(_)))
}

/// A snapshot in the cache.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Snapshot {
    /// Its directory.
    pub path: PathBuf,
    /// `org/name@commit`.
    pub pinned: String,
}

impl Snapshot {
    /// Its commit.
    pub(super) fn commit(&self) -> &str {
        self.pinned.rsplit('@').next().unwrap_or_default()
    }

    /// A description of what is missing, if an earlier download has not ended.
    pub(super) fn unfinished(&self) -> Option<String> {
        let folder = self.path.parent()?.parent()?;
        let mark = unfinished_mark(folder.parent()?, folder.file_name()?.to_str()?, self.commit());
        mark.exists().then(|| "files that an earlier run did not finish".to_owned())
    }
}

/// File that exists, and is locked, while a snapshot is downloaded.
pub(super) fn unfinished_mark(cache: &Path, folder: &str, commit: &str) -> PathBuf {
    cache.join(".locks").join(folder).join(format!("{commit}.cpift.lock"))
}

/// The snapshot that `text`, `org/name[@revision]`, names in the cache: of the branch `main` unless
/// it gives a branch, a tag or a commit. None if there is a file or directory of that name, which
/// comes first, or if the cache has no such snapshot.
pub(crate) fn snapshot(text: &str) -> Option<Snapshot> {
    if Path::new(text).exists() { None } else { Name::of_model(text)?.snapshot() }
}

/// `org/name@commit`, or `datasets/org/name@commit`, of a directory, or a file, in a snapshot of
/// the cache.
pub fn repository(path: &Path) -> Option<String> {
    let parts: Vec<&str> = path.components().filter_map(|part| part.as_os_str().to_str()).collect();
    parts.windows(3).find_map(|parts| match parts {
        [folder, "snapshots", commit] => {
            let (kind, id) = folder.split_once("--")?;
            let (organisation, name) = id.split_once("--")?;
            let below = match kind {
                "models" => "",
                "datasets" => "datasets/",
                _ => return None,
            };
            // In MODEL+ADAPTER another path follows the model's.
            let commit = commit.split('+').next()?;
            Some(format!("{below}{organisation}/{name}@{commit}"))
        }
        _ => None,
    })
}

/// The path with snapshots of models replaced by their names, `org/name@commit`, also in
/// MODEL+ADAPTER; none for a path without one.
pub fn named(path: &Path) -> Option<PathBuf> {
    let text = path.to_str()?;
    let mut found = false;
    let parts: Vec<String> = text
        .split('+')
        .map(|part| {
            let is_root = Path::new(part).parent().is_some_and(|folder| folder.ends_with("snapshots"));
            let name = is_root.then(|| repository(Path::new(part))).flatten();
            found |= name.is_some();
            name.unwrap_or_else(|| part.to_owned())
        })
        .collect();
    found.then(|| PathBuf::from(parts.join("+")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_hub_are_told_from_other_paths() {
        let name = |id: &str, revision: Option<&str>| {
            Some(Name { kind: Kind::Model, id: id.to_owned(), revision: revision.map(str::to_owned) })
        };
        assert_eq!(Name::of_model("org/name"), name("org/name", None));
        assert_eq!(Name::of_model("Qwen/Qwen2.5-0.5B@refs/pr/1"), name("Qwen/Qwen2.5-0.5B", Some("refs/pr/1")));
        for other in ["name", "./name", "/org/name", "a/b/c", "../a", "a/b@", "a/b@../../x", "a/b@/etc", "a b/c", "~/x"]
        {
            assert_eq!(Name::of_model(other), None, "{other}");
        }
    }

    #[test]
    fn data_files_are_taken_apart() {
        for (text, id, revision, path) in [
            ("datasets/org/name/a.parquet", "org/name", None, "a.parquet"),
            ("datasets/org/name@v1/main/a.parquet", "org/name", Some("v1"), "main/a.parquet"),
            ("datasets/o/n@refs/convert/parquet/d/0.parquet", "o/n", Some("refs/convert/parquet"), "d/0.parquet"),
            ("datasets/o/n@a%2Fb/0.parquet", "o/n", Some("a/b"), "0.parquet"),
            ("datasets/o/n/a@b/0.parquet", "o/n", None, "a@b/0.parquet"),
        ] {
            let (name, found) = Name::of_data_file(text).unwrap_or_else(|| panic!("{text}"));
            assert_eq!((name.id.as_str(), name.revision.as_deref(), found), (id, revision, path), "{text}");
            assert_eq!(name.kind, Kind::Dataset);
        }
        for other in ["datasets/org/name", "datasets/org/name/", "datasets/o/n/../x", "o/n/x", "datasets/o/n@/x"] {
            assert!(Name::of_data_file(other).is_none(), "{other}");
        }
    }

    #[test]
    fn a_path_in_a_snapshot_names_its_repository_and_commit() {
        let path = Path::new("/c/hub/models--org--na--me/snapshots/0a1b/model.safetensors");
        assert_eq!(repository(path).as_deref(), Some("org/na--me@0a1b"));
        assert_eq!(repository(Path::new("runs/snapshots/0a1b")), None);
        let path = Path::new("/c/hub/datasets--o--n/snapshots/0a1b/data/a.parquet");
        assert_eq!(repository(path).as_deref(), Some("datasets/o/n@0a1b"));
        let both = Path::new("/c/models--o--n/snapshots/0a1b+/c/models--o--l/snapshots/2c3d+x");
        assert_eq!(named(both).unwrap(), Path::new("o/n@0a1b+o/l@2c3d+x"));
        assert_eq!(named(Path::new("/c/models--o--n/snapshots/0a1b/config.json")), None);
        assert_eq!(named(Path::new("a+b")), None);
    }
}
