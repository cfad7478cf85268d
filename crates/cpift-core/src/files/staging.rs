//! Outputs that appear under their final name whole, or not at all.
//!
//! What is being written lies in a hidden folder beside its final name, `.NAME.XXXXXX.partial`, and is renamed when it is
//! complete. The folder is locked while its program lives, so that a later run of the same output can tell, and remove, what a
//! killed run left behind.

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use tempfile::TempDir;

use super::{check_output, check_output_dir};
use crate::error::BadInput;

const SUFFIX: &str = ".partial";

/// The staging folders of this process. Held while an output gets its name, so that a signal falls before or after that.
static UNFINISHED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

fn unfinished() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes what this process has staged and runs `last` before anything else can be staged or finished.
pub fn discard_unfinished(last: impl FnOnce()) {
    let mut folders = unfinished();
    std::mem::take(&mut *folders).iter().for_each(|folder| remove(folder));
    last();
}

/// Removes a staging folder. Another thread may just be putting a file there, and then it is not empty at once.
fn remove(folder: &Path) {
    for _ in 0..100 {
        if !matches!(fs::remove_dir_all(folder), Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty) {
            return;
        }
    }
}

/// A locked hidden folder beside `dest` with one entry, which will be renamed to `dest`.
struct Staging {
    folder: TempDir,
    dest: PathBuf,
    /// Released when the process ends, however it ends.
    _lock: File,
    /// After the folder, so that they are empty unless the output is there.
    _parents: NewFolders,
}

/// Folders made for an output, the innermost first; those that stay empty go again.
pub struct NewFolders(Vec<PathBuf>);

impl NewFolders {
    /// Makes `folder` and those above it that are missing.
    ///
    /// # Errors
    /// I/O errors.
    pub fn make(folder: &Path) -> Result<Self> {
        let missing = folder.ancestors().take_while(|p| !p.as_os_str().is_empty() && !p.exists());
        let made = Self(missing.map(Path::to_owned).collect());
        fs::create_dir_all(folder).with_context(|| format!("creating the folder {}", folder.display()))?;
        Ok(made)
    }
}

impl Drop for NewFolders {
    fn drop(&mut self) {
        self.0.iter().for_each(|folder| drop(fs::remove_dir(folder)));
    }
}

impl Staging {
    fn create(dest: &Path, force: bool) -> Result<Self> {
        check_output(dest, force)?;
        let parent = parent_of(dest);
        let parents = NewFolders::make(&parent)?;
        let prefix = prefix_of(dest);
        let mut folders = unfinished();
        remove_leftovers(&parent, &prefix);
        for _ in 0..100 {
            let folder = tempfile::Builder::new()
                .prefix(&prefix)
                .suffix(SUFFIX)
                .tempdir_in(&parent)
                .with_context(|| format!("creating a folder in {}", parent.display()))?;
            let Ok(lock) = File::open(folder.path()) else { continue };
            // Another run of the same output may take the folder for a leftover before it is locked: then a new one is made.
            // Some network file systems have no locks: there, leftovers stay.
            if matches!(lock.try_lock(), Err(TryLockError::WouldBlock)) || !folder.path().exists() {
                continue;
            }
            folders.insert(folder.path().to_owned());
            return Ok(Self { folder, dest: dest.to_owned(), _lock: lock, _parents: parents });
        }
        bail!("cannot keep a folder in {}: another run of {} removes it", parent.display(), dest.display())
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("new")
    }

    /// Gives the finished entry its final name. What was there before changes places with it in one step.
    fn rename(&self) -> Result<()> {
        let _no_signal = unfinished();
        let (from, dest) = (self.path(), &self.dest);
        let renamed = if from.is_dir() && dest.symlink_metadata().is_ok() {
            renameat_with(CWD, &from, CWD, dest, RenameFlags::EXCHANGE).or_else(|_| {
                // A file system that cannot swap: the older folder steps aside first.
                let aside = self.folder.path().join("old");
                fs::rename(dest, &aside)?;
                fs::rename(&from, dest).inspect_err(|_| drop(fs::rename(&aside, dest)))
            })
        } else {
            fs::rename(&from, dest)
        };
        renamed.with_context(|| format!("renaming to {}", dest.display()))?;
        sync(&parent_of(dest))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // While it is held: a signal between the two would leave the folder.
        let mut folders = unfinished();
        remove(self.folder.path());
        folders.remove(self.folder.path());
    }
}

/// `path` as it will be called: what lies in a staging folder goes by its final name.
pub fn final_name(path: &Path) -> PathBuf {
    for (staging, inside) in path.ancestors().filter_map(|p| Some((p, path.strip_prefix(p).ok()?))) {
        let name = staging.file_name().unwrap_or_default().to_string_lossy();
        let hidden = name.strip_prefix('.').and_then(|n| n.strip_suffix(SUFFIX)).and_then(|n| n.rsplit_once('.'));
        if let (Some((dest, _)), Ok(rest)) = (hidden, inside.strip_prefix("new")) {
            let dest = staging.with_file_name(dest);
            return if rest.as_os_str().is_empty() { dest } else { dest.join(rest) };
        }
    }
    path.to_owned()
}

/// Removes the staging folders of runs that have ended without tidying up.
fn remove_leftovers(parent: &Path, prefix: &str) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let random = name.strip_prefix(prefix).and_then(|rest| rest.strip_suffix(SUFFIX));
        if random.is_some_and(|r| !r.contains('.'))
            && File::open(entry.path()).is_ok_and(|folder| folder.try_lock().is_ok())
        {
            log::info!("removing {}, left by a run that did not finish", entry.path().display());
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// A file that appears under its final name whole, or not at all.
pub struct StagedFile {
    staging: Staging,
    file: File,
}

impl StagedFile {
    /// Starts a file that will become `dest`, written beside it.
    ///
    /// # Errors
    /// [`BadInput`] when `dest` exists without `force` or is a folder; I/O errors otherwise.
    pub fn create(dest: &Path, force: bool) -> Result<Self> {
        let staging = StagedPath::create(dest, force)?.staging;
        let file = File::create_new(staging.path()).with_context(|| format!("creating {}", dest.display()))?;
        Ok(Self { staging, file })
    }

    /// As [`StagedFile::create`], with `text` in it.
    ///
    /// # Errors
    /// As [`StagedFile::create`].
    pub fn of_text(dest: &Path, text: &str, force: bool) -> Result<Self> {
        let staged = Self::create(dest, force)?;
        staged.file().write_all(text.as_bytes()).with_context(|| format!("writing {}", dest.display()))?;
        Ok(staged)
    }

    /// The file under construction.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes the file durable and gives it its final name.
    ///
    /// # Errors
    /// I/O errors; nothing is left behind.
    pub fn commit(self) -> Result<()> {
        self.file.sync_all().with_context(|| format!("writing {}", self.staging.dest.display()))?;
        self.staging.rename()
    }
}

/// A path for another writer to create a file at, which then appears under its final name whole, or not at all.
pub struct StagedPath {
    staging: Staging,
}

impl StagedPath {
    /// Starts a file that will become `dest`, to be created at [`StagedPath::path`] on the same file system.
    ///
    /// # Errors
    /// [`BadInput`] when `dest` exists without `force` or is a folder; I/O errors otherwise.
    pub fn create(dest: &Path, force: bool) -> Result<Self> {
        check_output(dest, force)?;
        if dest.is_dir() {
            return Err(BadInput::new(dest, "is a folder").expected("a file name for the output").into());
        }
        Ok(Self { staging: Staging::create(dest, force)? })
    }

    /// Where the file is to be created.
    pub fn path(&self) -> PathBuf {
        self.staging.path()
    }

    /// Makes the file durable and gives it its final name.
    ///
    /// # Errors
    /// I/O errors; nothing is left behind.
    pub fn commit(self) -> Result<()> {
        sync(&self.path())?;
        self.staging.rename()
    }
}

/// Writes `text` to `dest`, whole or not at all.
///
/// # Errors
/// As [`StagedFile::create`].
pub fn write_text(dest: &Path, text: &str, force: bool) -> Result<()> {
    StagedFile::of_text(dest, text, force)?.commit()
}

/// A folder that appears under its final name whole, or not at all.
pub struct StagedDir {
    staging: Staging,
    path: PathBuf,
}

impl StagedDir {
    /// Starts a folder that will become `dest`, filled beside it.
    ///
    /// # Errors
    /// [`BadInput`] when `dest` exists without `force`, or is not of our making; I/O errors otherwise.
    pub fn create(dest: &Path, force: bool) -> Result<Self> {
        check_output_dir(dest, force)?;
        let staging = Staging::create(dest, force)?;
        let path = staging.path();
        fs::create_dir(&path).with_context(|| format!("creating {}", dest.display()))?;
        Ok(Self { staging, path })
    }

    /// The folder under construction.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes every file durable and gives the folder its final name; an older output under that name goes.
    ///
    /// # Errors
    /// I/O errors; the older output stays then.
    pub fn commit(self) -> Result<()> {
        sync_all(self.path())?;
        self.staging.rename()
    }
}

fn prefix_of(dest: &Path) -> String {
    format!(".{}.", dest.file_name().unwrap_or_default().to_string_lossy())
}

fn parent_of(dest: &Path) -> PathBuf {
    match dest.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Makes all that is in `folder` durable, and the folder last.
fn sync_all(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() { sync_all(&path)? } else { sync(&path)? }
    }
    sync(folder)
}

fn sync(path: &Path) -> Result<()> {
    let name = || format!("writing {} to the disk", final_name(path).display());
    File::open(path).and_then(|f| f.sync_all()).with_context(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_stage_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let staged = StagedDir::create(&dir.path().join("out"), false).unwrap();
        fs::write(staged.path().join("x"), "y").unwrap();
        drop(staged);
        drop(StagedFile::create(&dir.path().join("f"), false).unwrap());
        let staged = StagedPath::create(&dir.path().join("p"), false).unwrap();
        fs::write(staged.path(), "y").unwrap();
        drop(staged);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_existing_output_is_refused_and_force_replaces_it() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        fs::create_dir(&out).unwrap();
        fs::write(out.join("stale"), "").unwrap();
        assert!(StagedDir::create(&out, false).is_err());
        assert!(StagedDir::create(&out, true).is_err(), "a folder that is not ours");
        assert!(out.join("stale").exists());
        fs::write(out.join("cpift.json"), "").unwrap();
        let staged = StagedDir::create(&out, true).unwrap();
        fs::write(staged.path().join("new"), "").unwrap();
        staged.commit().unwrap();
        assert!(out.join("new").exists() && !out.join("stale").exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_staged_path_becomes_its_destination_alone() {
        let dir = tempfile::tempdir().unwrap();
        let dest = dir.path().join("p");
        let staged = StagedPath::create(&dest, false).unwrap();
        fs::write(staged.path(), "y").unwrap();
        staged.commit().unwrap();
        assert_eq!(fs::read_to_string(&dest).unwrap(), "y");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(StagedPath::create(&dest, false).is_err());
    }

    #[test]
    fn outputs_get_the_modes_of_the_umask() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        write_text(&path, "x", false).unwrap();
        let plain = dir.path().join("plain");
        fs::write(&plain, "x").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions(), fs::metadata(&plain).unwrap().permissions());
    }

    #[test]
    fn folders_made_for_an_output_stay_only_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let dest = dir.path().join("a/b/out");
        drop(StagedDir::create(&dest, false).unwrap());
        assert!(!dir.path().join("a").exists());
        StagedDir::create(&dest, false).unwrap().commit().unwrap();
        assert!(dest.is_dir());
    }

    #[test]
    fn what_is_staged_goes_by_its_final_name_in_messages() {
        let dir = tempfile::tempdir().unwrap();
        let dest = dir.path().join("a.b");
        let folder = StagedDir::create(&dest, false).unwrap();
        assert_eq!(final_name(&folder.path().join("x.safetensors")), dest.join("x.safetensors"));
        let file = StagedPath::create(&dest, false).unwrap();
        assert_eq!(final_name(&file.path()), dest);
        assert_eq!(final_name(Path::new("/m/.a.partial/x")), Path::new("/m/.a.partial/x"));
    }

    #[test]
    fn what_a_dead_run_left_is_removed_and_a_living_one_is_let_be() {
        let dir = tempfile::tempdir().unwrap();
        let dead = dir.path().join(".out.abc123.partial");
        let other = dir.path().join(".out.more.abc123.partial");
        for folder in [&dead, &other] {
            fs::create_dir(folder).unwrap();
            fs::write(folder.join("new"), "half").unwrap();
        }
        let first = StagedDir::create(&dir.path().join("out"), false).unwrap();
        assert!(!dead.exists() && other.exists());
        let second = StagedDir::create(&dir.path().join("out"), false).unwrap();
        assert!(first.path().exists() && second.path().exists());
    }
}
