//! Outputs that appear under their final name whole, or not at all.
//!
//! What is being written lies in a hidden folder beside its final name, `.NAME.XXXXXX.partial`, and is renamed when it is
//! complete. The folder is locked while its program lives, so that a later run of the same output can tell, and remove, what a
//! killed run left behind, and refuses to start beside one that is at work. Locks are flock(2)'s: they die with their process, on one
//! machine and, with NFS 4 or Lustre's -o flock, across machines. Where a file system has none, leftovers stay, and two runs of one
//! output are told apart only when the second is finished: without --force it says so and leaves the first one's.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use super::naming::{NewFolders, check_output, check_output_dir, give_name, wait_for_turn};
use crate::error::BadInput;

const SUFFIX: &str = ".partial";

/// The staging folders of this process. Held while an output gets its name, so that a signal falls before or after that.
static UNFINISHED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

fn unfinished() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes what this process has staged and runs `last` before anything else can be staged or finished.
pub(crate) fn discard_unfinished(last: impl FnOnce()) {
    let mut folders = unfinished();
    std::mem::take(&mut *folders).iter().for_each(|folder| remove(folder));
    last();
}

/// Removes a staging folder. Another thread may just be putting a file there, and then it is not empty at once.
fn remove(folder: &Path) {
    for _ in 0..100 {
        if !matches!(remove_all(folder), Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty) {
            return;
        }
    }
}

/// As `fs::remove_dir_all`, with one file handle at a time: they may have run out.
fn remove_all(folder: &Path) -> std::io::Result<()> {
    let inside = |entry: std::io::Result<fs::DirEntry>| entry.and_then(|e| Ok((e.path(), e.file_type()?.is_dir())));
    let entries = fs::read_dir(folder)?.map(inside).collect::<std::io::Result<Vec<_>>>()?;
    for (path, is_dir) in entries {
        if is_dir { remove_all(&path)? } else { fs::remove_file(path)? }
    }
    fs::remove_dir(folder)
}

/// A locked hidden folder beside `dest` with one entry, which will be renamed to `dest`.
struct Staging {
    folder: TempDir,
    dest: PathBuf,
    force: bool,
    /// Released when the process ends, however it ends.
    lock: Option<File>,
    /// After the folder, so that they are empty unless the output is there.
    _parents: NewFolders,
}

impl Staging {
    fn create(dest: &Path, force: bool) -> Result<Self> {
        check_output(dest, force)?;
        let parent = parent_of(dest);
        let parents = NewFolders::make(&parent)?;
        let prefix = prefix_of(dest);
        let mut folders = unfinished();
        remove_leftovers(dest, &parent, &prefix)?;
        for _ in 0..100 {
            let folder = tempfile::Builder::new()
                .prefix(&prefix)
                .suffix(SUFFIX)
                .tempdir_in(&parent)
                .with_context(|| format!("creating a folder in {}", parent.display()))?;
            let lock = match File::open(folder.path()) {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                // An empty folder goes without a handle.
                other => other.inspect_err(|_| drop(fs::remove_dir(folder.path()))),
            };
            let lock = lock.with_context(|| format!("creating a folder in {}", parent.display()))?;
            // Another run of the same output may take the folder for a leftover before it is locked: then a new one is made.
            // Some network file systems have no locks: there, leftovers stay.
            if matches!(lock.try_lock(), Err(TryLockError::WouldBlock)) || !folder.path().exists() {
                continue;
            }
            folders.insert(folder.path().to_owned());
            return Ok(Self { folder, dest: dest.to_owned(), force, lock: Some(lock), _parents: parents });
        }
        bail!("cannot keep a folder in {}: another run of {} removes it", parent.display(), dest.display())
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("new")
    }

    /// Gives the finished entry its final name.
    fn rename(&self) -> Result<()> {
        let folder = self.folder_of_output()?;
        let _no_signal = unfinished();
        self.give_name()?;
        self.sync(&folder)
    }

    /// As [`Staging::rename`], together with what is made `also` and the `record` of this output, which replaces that of an older one. A run that is killed
    /// between the two leaves no output without its record where one was replaced.
    fn rename_with(&self, record: &Self, also: &[StagedFile]) -> Result<()> {
        let folder = self.folder_of_output()?;
        wait_for_turn(&folder);
        let _no_signal = unfinished();
        let order = if self.force { [record, self] } else { [self, record] };
        also.iter().map(|file| &file.staging).chain(order).try_for_each(Self::give_name)?;
        self.sync(&folder)
    }

    /// Opened before the output gets its name: afterwards nothing should be lacking.
    fn folder_of_output(&self) -> Result<File> {
        let name = || format!("writing {} to the disk", self.dest.display());
        File::open(parent_of(&self.dest)).with_context(name)
    }

    fn sync(&self, folder: &File) -> Result<()> {
        folder.sync_all().with_context(|| format!("writing {} to the disk", self.dest.display()))
    }

    fn give_name(&self) -> Result<()> {
        give_name(&self.path(), &self.dest, self.force, &self.folder.path().join("old"))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // While it is held: a signal between the two would leave the folder.
        let mut folders = unfinished();
        // Its handle may be the only one to be had.
        self.lock = None;
        remove(self.folder.path());
        folders.remove(self.folder.path());
    }
}

/// `path` as it will be called: what lies in a staging folder goes by its final name.
pub(crate) fn final_name(path: &Path) -> PathBuf {
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

/// Removes the staging folders of runs of `dest` that have ended without tidying up.
///
/// # Errors
/// [`BadInput`] when one of them is still at work.
fn remove_leftovers(dest: &Path, parent: &Path, prefix: &str) -> Result<()> {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let random = name.strip_prefix(prefix).and_then(|rest| rest.strip_suffix(SUFFIX));
        if random.is_none_or(|r| r.contains('.')) {
            continue;
        }
        let Ok(folder) = File::open(entry.path()) else { continue };
        match folder.try_lock() {
            Ok(()) => {
                log::info!("removing {}, left by a run that did not finish", entry.path().display());
                let _ = fs::remove_dir_all(entry.path());
            }
            Err(TryLockError::WouldBlock) => {
                return Err(BadInput::new(dest, "another run is writing this output")
                    .found(format!("{}, in use", entry.path().display()))
                    .hint("wait until it has ended, or choose another --out")
                    .into());
            }
            Err(TryLockError::Error(_)) => {}
        }
    }
    Ok(())
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

    /// Its final path.
    pub(crate) fn dest(&self) -> &Path {
        &self.staging.dest
    }

    /// The same as a path, when all is written.
    pub fn into_path(self) -> StagedPath {
        StagedPath { staging: self.staging }
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

    /// What it will be called.
    pub(crate) fn dest(&self) -> &Path {
        &self.staging.dest
    }

    /// As [`StagedPath::commit`], together with the `record` beside it, and before it what is made `also`: of two runs that write one
    /// output, all of it is the same run's.
    ///
    /// # Errors
    /// As [`StagedPath::commit`].
    pub(crate) fn commit_with(self, record: StagedFile, also: &[StagedFile]) -> Result<()> {
        sync(&self.path())?;
        for file in also.iter().chain([&record]) {
            file.file.sync_all().with_context(|| format!("writing {}", file.staging.dest.display()))?;
        }
        self.staging.rename_with(&record.staging, also)
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

/// Creates a file of `len` bytes inside a staged folder, open for positional reads and writes. The file is sparse: a full disk shows when
/// it is written.
///
/// # Errors
/// I/O errors.
pub(crate) fn create_sized(path: &Path, len: u64) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .with_context(|| format!("creating {}", final_name(path).display()))?;
    file.set_len(len).with_context(|| format!("making room for {len} bytes in {}", final_name(path).display()))?;
    Ok(file)
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
        drop(folder);
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
        for force in [false, true] {
            let error = StagedDir::create(&dir.path().join("out"), force).err().expect("one is at work").to_string();
            assert!(error.contains("another run is writing this output"), "{error}");
        }
        assert!(first.path().exists());
    }

    #[test]
    fn what_another_run_has_written_meanwhile_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (file, folder) = (dir.path().join("f"), dir.path().join("d"));
        let staged = StagedFile::of_text(&file, "mine", false).unwrap();
        let staged_dir = StagedDir::create(&folder, false).unwrap();
        fs::write(&file, "theirs").unwrap();
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("theirs"), "").unwrap();
        for error in [staged.commit(), staged_dir.commit()].map(|done| done.unwrap_err().to_string()) {
            assert!(error.contains("another run has written this output meanwhile"), "{error}");
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), "theirs");
        assert!(folder.join("theirs").exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn links_under_the_final_name_are_replaced_and_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("elsewhere");
        fs::create_dir(&target).unwrap();
        for name in ["precious", crate::files::naming::RECORD_NAME] {
            fs::write(target.join(name), "old").unwrap();
        }
        let (file, folder) = (dir.path().join("f"), dir.path().join("d"));
        std::os::unix::fs::symlink(target.join("precious"), &file).unwrap();
        std::os::unix::fs::symlink(&target, &folder).unwrap();
        assert!(write_text(&file, "new", false).is_err() && StagedDir::create(&folder, false).is_err());
        write_text(&file, "new", true).unwrap();
        StagedDir::create(&folder, true).unwrap().commit().unwrap();
        assert!(!file.is_symlink() && !folder.is_symlink());
        assert_eq!(fs::read_dir(&target).unwrap().count(), 2);
        assert_eq!(fs::read_to_string(target.join("precious")).unwrap(), "old");
    }
}
