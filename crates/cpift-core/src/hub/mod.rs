//! The Hugging Face Hub: names of repositories, the local cache that is shared with the
//! huggingface_hub library, and downloads into it.
//!
//! A name is looked up in the cache first, without the network. Only if the cache does not have it,
//! or has a part of it, files are downloaded, unless HF_HUB_OFFLINE is set.
//!
//! Downloads go through `ureq`, an HTTP client without an asynchronous runtime, instead of the
//! `hf-hub` crate: version 1.0 of that brings tokio, reqwest and hf-xet, and neither it nor 0.5
//! reads HF_HUB_OFFLINE, resumes a broken transfer and checks the result.

mod cache;
mod client;
mod download;
mod select;

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::error::BadInput;
pub(crate) use cache::snapshot;
use cache::{Name, Snapshot};
pub use cache::{named, repository};
use client::{Client, is_offline};
pub use select::Need;

/// The path of `MODEL`, or `MODEL+ADAPTER`, of which a part is a name on the Hub, with that part
/// replaced by its snapshot in the cache, where it is downloaded if need be. None for other paths.
///
/// # Errors
/// [`BadInput`] if it cannot be downloaded.
pub fn model(text: &str, need: Need) -> Result<Option<PathBuf>> {
    Ok(with_adapters(text, Some(need))?.map(|(path, _)| path.into()))
}

/// As [`model`], with the names pinned to their commits. Without `need` nothing is downloaded.
pub(crate) fn with_adapters(text: &str, need: Option<Need>) -> Result<Option<(OsString, String)>> {
    if Path::new(text).exists() {
        return Ok(None);
    }
    let find = |part: &str| need.map_or_else(|| Ok(snapshot(part)), |need| fetched(part, need));
    let parts = text.split('+').map(|part| Ok((part, find(part)?)));
    let parts: Vec<(&str, Option<Snapshot>)> = parts.collect::<Result<_>>()?;
    let path = |(text, found): &(&str, Option<Snapshot>)| {
        found.as_ref().map_or_else(|| OsString::from(text), |found| found.path.clone().into_os_string())
    };
    let pinned = |(text, found): &(&str, Option<Snapshot>)| {
        found.as_ref().map_or_else(|| (*text).to_owned(), |found| found.pinned.clone())
    };
    Ok(parts.iter().any(|(_, found)| found.is_some()).then(|| {
        let paths: Vec<OsString> = parts.iter().map(path).collect();
        (paths.join(OsStr::new("+")), parts.iter().map(pinned).collect::<Vec<_>>().join("+"))
    }))
}

/// The snapshot that `text`, `org/name[@revision]`, names: in the cache, or downloaded into it.
/// None for a path: `text` has another form, or exists, or lies in a directory that exists.
fn fetched(text: &str, need: Need) -> Result<Option<Snapshot>> {
    let Some(found) = snapshot(text) else {
        let Some(name) = Name::of_model(text).filter(|name| !name.is_local_path(text)) else { return Ok(None) };
        if is_offline() {
            return Err(offline(text, "no such checkpoint: ").into());
        }
        let downloaded = download::model(&Client::new()?, &name, None, need);
        return downloaded.map(Some).map_err(|failure| failure.about(text).into());
    };
    let unfinished = || if need == Need::Model { found.unfinished() } else { None };
    let Some(missing) = select::missing(&found.path, need).or_else(unfinished) else {
        return Ok(Some(found));
    };
    let incomplete = format!("{text}: the cache lacks {missing}");
    // A part may be all that the run reads.
    if is_offline() {
        log::warn!("{incomplete}, and HF_HUB_OFFLINE is set");
        return Ok(Some(found));
    }
    log::info!("{incomplete}");
    let name = Name::of_model(text).expect("a name with a snapshot");
    match download::model(&Client::new()?, &name, Some(&found), need) {
        Err(failure) if failure.is_unreachable() => {
            log::warn!("{}", failure.about(text));
            Ok(Some(found))
        }
        other => other.map(Some).map_err(|failure| failure.about(text).into()),
    }
}

/// A data file of the Hub, `hf://datasets/org/name[@revision]/path`.
pub(crate) struct DataFile<'a> {
    text: &'a str,
    name: Name,
    path: &'a str,
}

/// A file in the cache.
pub(crate) struct CachedFile {
    /// Its path.
    pub path: PathBuf,
    /// `datasets/org/name@commit`.
    pub pinned: String,
}

impl<'a> DataFile<'a> {
    /// Parses `text`; none if it does not begin with `hf://`.
    ///
    /// # Errors
    /// [`BadInput`] for another URL of this scheme.
    pub fn parse(text: &'a str) -> Result<Option<Self>> {
        let Some(rest) = text.strip_prefix("hf://") else { return Ok(None) };
        let (name, path) = Name::of_data_file(rest).ok_or_else(|| {
            BadInput::new(text, "is no data file of the Hugging Face Hub")
                .expected("hf://datasets/ORG/NAME/PATH or hf://datasets/ORG/NAME@REVISION/PATH")
        })?;
        Ok(Some(Self { text, name, path }))
    }

    /// The file in the cache, if it is there.
    pub fn cached(&self) -> Option<CachedFile> {
        let snapshot = self.name.snapshot()?;
        let path = snapshot.path.join(self.path);
        path.is_file().then_some(CachedFile { path, pinned: snapshot.pinned })
    }

    /// The file in the cache, downloaded if it is not there.
    ///
    /// # Errors
    /// [`BadInput`] if it cannot be downloaded.
    pub fn fetched(&self) -> Result<CachedFile> {
        if let Some(found) = self.cached() {
            return Ok(found);
        }
        if is_offline() {
            return Err(offline(self.text, "").into());
        }
        let snapshot = download::data_file(&Client::new()?, &self.name, self.path);
        let snapshot = snapshot.map_err(|failure| failure.about(self.text))?;
        Ok(CachedFile { path: snapshot.path.join(self.path), pinned: snapshot.pinned })
    }
}

fn offline(text: &str, before: &str) -> BadInput {
    BadInput::new(text, format!("{before}not in {}, and HF_HUB_OFFLINE is set", cache::shown()))
        .hint("unset HF_HUB_OFFLINE to download it, or fill the cache on a machine with network: hf download")
}

/// The `error` about a checkpoint that does not exist, with a hint if it may be one of the Hub.
pub fn hinted(error: BadInput, path: &Path) -> BadInput {
    let Some((text, name)) = path.to_str().and_then(|text| Some((text, Name::of_model(text)?))) else { return error };
    error.hint(match name.is_local_path(text) {
        true => format!(
            "{} is a directory here, so this is a path; the model of the Hugging Face Hub is {text}@main",
            name.organisation()
        ),
        false => format!("a model of the Hugging Face Hub must be in {}: hf download {text}", cache::shown()),
    })
}
