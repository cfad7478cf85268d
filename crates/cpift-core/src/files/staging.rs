//! Atomic outputs: a file or directory appears under its final name complete, or not at all.
//!
//! An unfinished output lies in a hidden staging directory beside its final name,
//! `.NAME.XXXXXX.partial`, and is renamed in one step when it is complete; an existing output is
//! replaced with `force` only. The staging directory is locked with flock(2) for the lifetime of
//! the process, so a later run of the same output can detect and remove what a killed run left
//! behind, and refuses to start while another run is active. The lock also works across machines on
//! NFS 4, and on Lustre mounted with `-o flock`. On file systems without locks, leftovers stay, and
//! a second run notices the first only when it renames its output: without `--force` it then fails
//! and keeps the output of the first run.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rayon::prelude::*;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use tempfile::TempDir;

use crate::error::{BadInput, usage};

const SUFFIX: &str = ".partial";

/// Staging directories of this process. Locked while an output is renamed, so that a signal is
/// handled before or after the rename.
static UNFINISHED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

fn unfinished() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes the unfinished outputs of this process, then runs `last` before any other output can be
/// started or finished.
pub fn discard_unfinished(last: impl FnOnce()) {
    let mut folders = unfinished();
    std::mem::take(&mut *folders).iter().for_each(|folder| remove(folder));
    last();
}

/// Removes a staging directory, with retries: another thread may be creating a file in it at the
/// same time.
fn remove(folder: &Path) {
    for _ in 0..100 {
        if !matches!(remove_all(folder), Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty) {
            return;
        }
    }
}

/// As `fs::remove_dir_all`, but with one open file handle at a time, because handles may have run
/// out.
fn remove_all(folder: &Path) -> std::io::Result<()> {
    let inside = |entry: std::io::Result<fs::DirEntry>| entry.and_then(|e| Ok((e.path(), e.file_type()?.is_dir())));
    let entries = fs::read_dir(folder)?.map(inside).collect::<std::io::Result<Vec<_>>>()?;
    for (path, is_dir) in entries {
        if is_dir { remove_all(&path)? } else { fs::remove_file(path)? }
    }
    fs::remove_dir(folder)
}

/// A locked, hidden directory beside `dest` with one entry, which will be renamed to `dest`.
struct Staging {
    folder: TempDir,
    dest: PathBuf,
    force: bool,
    /// The kernel releases it when the process ends, even if it is killed.
    lock: Option<File>,
    /// Dropped after `folder`, so that they are empty by then unless the output was committed.
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
                .with_context(|| format!("creating a directory in {}", parent.display()))?;
            let lock = match File::open(folder.path()) {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                // Removing an empty directory takes no file handle.
                other => other.inspect_err(|_| drop(fs::remove_dir(folder.path()))),
            };
            let lock = lock.with_context(|| format!("creating a directory in {}", parent.display()))?;
            // Another run of the same output may remove the directory as a leftover before it is
            // locked; then create a new one. Other lock errors mean a network file system without
            // locks, where leftovers stay.
            if matches!(lock.try_lock(), Err(TryLockError::WouldBlock)) || !folder.path().exists() {
                continue;
            }
            folders.insert(folder.path().to_owned());
            return Ok(Self { folder, dest: dest.to_owned(), force, lock: Some(lock), _parents: parents });
        }
        bail!(
            "cannot create a staging directory in {}: another run of {} keeps removing it",
            parent.display(),
            dest.display()
        )
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("new")
    }

    /// Renames the finished entry to its final name.
    fn rename(&self) -> Result<()> {
        let folder = self.folder_of_output()?;
        let _no_signal = unfinished();
        self.rename_output()?;
        self.sync(&folder)
    }

    /// As [`Staging::rename`], together with the files in `also` and the `record` of this output.
    /// With `force` the record is renamed first, so that a run killed in between leaves the old
    /// output with a record that does not match it, never a new output with the old record.
    fn rename_with(&self, record: &Self, also: &[StagedFile]) -> Result<()> {
        let folder = self.folder_of_output()?;
        lock_for_rename(&folder);
        let _no_signal = unfinished();
        let order = if self.force { [record, self] } else { [self, record] };
        also.iter().map(|file| &file.staging).chain(order).try_for_each(Self::rename_output)?;
        self.sync(&folder)
    }

    /// Opened before the rename, so that running out of file handles cannot fail a run whose output
    /// is already in place.
    fn folder_of_output(&self) -> Result<File> {
        let name = || format!("syncing {} to disk", self.dest.display());
        File::open(parent_of(&self.dest)).with_context(name)
    }

    fn sync(&self, folder: &File) -> Result<()> {
        folder.sync_all().with_context(|| format!("syncing {} to disk", self.dest.display()))
    }

    fn rename_output(&self) -> Result<()> {
        rename_output(&self.path(), &self.dest, self.force, &self.folder.path().join("old"))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Locked until the end: a signal between removal and bookkeeping would leave the directory
        // behind.
        let mut folders = unfinished();
        // Closing it first frees a file handle, which removal may need.
        self.lock = None;
        remove(self.folder.path());
        folders.remove(self.folder.path());
    }
}

/// Returns the final path of a `path` inside a staging directory, for messages; other paths are
/// returned unchanged.
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

/// Removes the staging directories that killed runs of `dest` have left.
///
/// # Errors
/// [`BadInput`] if one of these runs is still active.
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

/// A file that appears under its final name complete, or not at all.
pub struct StagedFile {
    staging: Staging,
    file: File,
}

impl StagedFile {
    /// Creates a file in a staging directory that will be renamed to `dest`.
    ///
    /// # Errors
    /// [`BadInput`] if `dest` exists and `force` is false, or if it is a directory.
    pub fn create(dest: &Path, force: bool) -> Result<Self> {
        let staging = StagedPath::create(dest, force)?.staging;
        let file = File::create_new(staging.path()).with_context(|| format!("creating {}", dest.display()))?;
        Ok(Self { staging, file })
    }

    /// As [`StagedFile::create`], and writes `text` to it.
    ///
    /// # Errors
    /// As [`StagedFile::create`].
    pub fn of_text(dest: &Path, text: &str, force: bool) -> Result<Self> {
        let staged = Self::create(dest, force)?;
        staged.file().write_all(text.as_bytes()).with_context(|| format!("writing {}", dest.display()))?;
        Ok(staged)
    }

    /// Final path.
    pub(crate) fn dest(&self) -> &Path {
        &self.staging.dest
    }

    /// Converts it to a [`StagedPath`] once everything is written.
    pub fn into_path(self) -> StagedPath {
        StagedPath { staging: self.staging }
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Syncs the file to disk and renames it to its final name. On an error nothing is left behind.
    pub fn commit(self) -> Result<()> {
        self.file.sync_all().with_context(|| format!("writing {}", self.staging.dest.display()))?;
        self.staging.rename()
    }
}

/// A path at which the caller creates a file, which then appears under its final name complete, or
/// not at all.
pub struct StagedPath {
    staging: Staging,
}

impl StagedPath {
    /// Reserves a path for a file that will be renamed to `dest`.
    ///
    /// # Errors
    /// [`BadInput`] if `dest` exists and `force` is false, or if it is a directory.
    pub fn create(dest: &Path, force: bool) -> Result<Self> {
        check_output(dest, force)?;
        if dest.is_dir() {
            return Err(BadInput::new(dest, "is a directory").expected("a file name for the output").into());
        }
        Ok(Self { staging: Staging::create(dest, force)? })
    }

    /// Path at which to create the file, on the same file system as `dest`.
    pub fn path(&self) -> PathBuf {
        self.staging.path()
    }

    /// Final path.
    pub(crate) fn dest(&self) -> &Path {
        &self.staging.dest
    }

    /// Syncs the file to disk.
    pub(crate) fn sync(&self) -> Result<()> {
        sync(&self.path())
    }

    /// As [`StagedPath::commit`], but first commits the files in `also`, and commits the `record`
    /// of the output with it. If two runs write the same output, all these files come from the same
    /// run.
    pub(crate) fn commit_with(self, record: StagedFile, also: &[StagedFile]) -> Result<()> {
        sync(&self.path())?;
        for file in also.iter().chain([&record]) {
            file.file.sync_all().with_context(|| format!("writing {}", file.staging.dest.display()))?;
        }
        self.staging.rename_with(&record.staging, also)
    }

    /// Syncs the file to disk and renames it to its final name. On an error nothing is left behind.
    pub fn commit(self) -> Result<()> {
        sync(&self.path())?;
        self.staging.rename()
    }
}

/// Writes `text` to `dest` atomically.
///
/// # Errors
/// As [`StagedFile::create`].
pub fn write_text(dest: &Path, text: &str, force: bool) -> Result<()> {
    StagedFile::of_text(dest, text, force)?.commit()
}

/// A directory that appears under its final name complete, or not at all.
pub struct StagedDir {
    staging: Staging,
    path: PathBuf,
}

impl StagedDir {
    /// Creates a staging directory that will be renamed to `dest`.
    ///
    /// # Errors
    /// [`BadInput`] if `dest` exists and `force` is false, or if it is a non-empty directory
    /// without a cpift.json.
    pub fn create(dest: &Path, force: bool) -> Result<Self> {
        check_output_dir(dest, force)?;
        let staging = Staging::create(dest, force)?;
        let path = staging.path();
        fs::create_dir(&path).with_context(|| format!("creating {}", dest.display()))?;
        Ok(Self { staging, path })
    }

    /// The directory to fill.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Syncs all files to disk and renames the directory to its final name, replacing an older
    /// output. On an error the older output stays.
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

/// Syncs everything in `folder` to disk, side by side because each waits for the disk, and the
/// directory itself last.
fn sync_all(folder: &Path) -> Result<()> {
    let paths: Vec<PathBuf> = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    paths.par_iter().try_for_each(|path| if path.is_dir() { sync_all(path) } else { sync(path) })?;
    sync(folder)
}

fn sync(path: &Path) -> Result<()> {
    let name = || format!("syncing {} to disk", final_name(path).display());
    File::open(path).and_then(|f| f.sync_all()).with_context(name)
}

/// Creates a file of `len` bytes in a staged directory, open for positional reads and writes. The
/// file is sparse, so a full disk is noticed only when data is written.
pub(crate) fn create_sized(path: &Path, len: u64) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .with_context(|| format!("creating {}", final_name(path).display()))?;
    file.set_len(len).with_context(|| format!("setting the size to {len} bytes of {}", final_name(path).display()))?;
    Ok(file)
}

/// Longest wait for another run that is renaming outputs in the same directory, which takes
/// milliseconds.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// Name of the provenance record inside an output directory. The record of an output file is
/// `FILE.cpift.json` beside it.
pub const RECORD_NAME: &str = "cpift.json";

/// Refuses `dest` if it exists and `force` is not given.
///
/// # Errors
/// [`BadInput`] with a hint.
pub fn check_output(dest: &Path, force: bool) -> Result<()> {
    if dest.file_name().is_none() {
        return Err(BadInput::new(dest, "not a usable output path")
            .expected("a path that ends in a file or directory name")
            .into());
    }
    if !force && dest.symlink_metadata().is_ok() {
        return Err(BadInput::new(dest, "the output exists already").hint("--force replaces it").into());
    }
    Ok(())
}

/// As [`check_output`], for a directory. `force` replaces only an empty directory or one with a
/// cpift.json, because its whole content is deleted.
///
/// # Errors
/// [`BadInput`] with a hint.
pub fn check_output_dir(dest: &Path, force: bool) -> Result<()> {
    check_output(dest, force)?;
    if dest.symlink_metadata().is_err() || dest.join(RECORD_NAME).is_file() {
        return Ok(());
    }
    if !dest.is_dir() {
        return Err(BadInput::new(dest, "is not a directory").expected("a directory for the output").into());
    }
    let first = fs::read_dir(dest).ok().and_then(|mut entries| entries.next()?.ok());
    first.map_or(Ok(()), |entry| {
        Err(BadInput::new(dest, "is a directory that CPI-FT did not write, so --force does not replace it")
            .found(format!("{} but no {RECORD_NAME}", entry.file_name().display()))
            .hint("remove it yourself, or choose another name")
            .into())
    })
}

/// Refuses an output that is or contains one of the `inputs`: `--force` would destroy that input.
///
/// # Errors
/// [`crate::error::Usage`] naming the input.
pub fn check_not_input<'a>(flag: &str, out: &Path, inputs: impl IntoIterator<Item = &'a Path>) -> Result<()> {
    let Ok(canonical) = out.canonicalize() else { return Ok(()) };
    for input in inputs {
        if input.canonicalize().is_ok_and(|path| path.starts_with(&canonical)) {
            return Err(usage(format!("{flag} {} would replace the input {}", out.display(), input.display())));
        }
    }
    Ok(())
}

/// Directories created for an output, innermost first. Dropping it removes those that are still
/// empty.
pub struct NewFolders(Vec<PathBuf>);

impl NewFolders {
    /// Creates `folder` and its missing parents.
    pub fn make(folder: &Path) -> Result<Self> {
        let missing = folder.ancestors().take_while(|p| !p.as_os_str().is_empty() && !p.exists());
        let made = Self(missing.map(Path::to_owned).collect());
        fs::create_dir_all(folder).with_context(|| format!("creating the directory {}", folder.display()))?;
        Ok(made)
    }
}

impl Drop for NewFolders {
    fn drop(&mut self) {
        self.0.iter().for_each(|folder| drop(fs::remove_dir(folder)));
    }
}

/// Renames `from` to `dest`. With `force`, an existing file is replaced and an existing directory
/// is exchanged with `from`; without it, an existing `dest` is an error. A symbolic link at `dest`
/// is replaced, not followed. `aside` is a name for the old directory on file systems that cannot
/// exchange two directories.
///
/// # Errors
/// [`BadInput`] if another run has written `dest` in the meantime.
fn rename_output(from: &Path, dest: &Path, force: bool, aside: &Path) -> Result<()> {
    let renamed = if !force {
        match renameat_with(CWD, from, CWD, dest, RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => return Err(written_by_another_run(dest).into()),
            // Some network file systems do not implement RENAME_NOREPLACE.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                check_output(dest, false).map_err(|_| written_by_another_run(dest))?;
                fs::rename(from, dest)
            }
            other => other.map_err(Into::into),
        }
    } else if from.is_dir() {
        // A plain rename succeeds if `dest` is missing or empty. Checking first would let another
        // run take the name in between.
        let swap = |_| renameat_with(CWD, from, CWD, dest, RenameFlags::EXCHANGE);
        fs::rename(from, dest).or_else(swap).or_else(|_| {
            // Without an exchange, move the old directory out of the way first.
            fs::rename(dest, aside)?;
            fs::rename(from, dest).inspect_err(|_| drop(fs::rename(aside, dest)))
        })
    } else {
        fs::rename(from, dest)
    };
    renamed.with_context(|| format!("renaming to {}", dest.display()))
}

fn written_by_another_run(dest: &Path) -> BadInput {
    BadInput::new(dest, "another run has written this output in the meantime; it is kept")
        .hint("--force replaces it; or choose another --out")
}

/// Locks `folder` until it is closed, so that no other run renames outputs in it and an output and
/// its record come from the same run. If the file system has no locks, or the wait times out, the
/// rename goes ahead without the lock.
fn lock_for_rename(folder: &File) {
    let start = Instant::now();
    while matches!(folder.try_lock(), Err(TryLockError::WouldBlock)) && start.elapsed() < LOCK_TIMEOUT {
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropping_an_unfinished_output_removes_it() {
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
    fn existing_outputs_are_refused_and_replaced_with_force() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        fs::create_dir(&out).unwrap();
        fs::write(out.join("stale"), "").unwrap();
        assert!(StagedDir::create(&out, false).is_err());
        assert!(StagedDir::create(&out, true).is_err(), "a directory that is not ours");
        assert!(out.join("stale").exists());
        fs::write(out.join("cpift.json"), "").unwrap();
        let staged = StagedDir::create(&out, true).unwrap();
        fs::write(staged.path().join("new"), "").unwrap();
        staged.commit().unwrap();
        assert!(out.join("new").exists() && !out.join("stale").exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn committing_a_staged_path_leaves_only_its_destination() {
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
    fn outputs_get_the_mode_of_the_umask() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        write_text(&path, "x", false).unwrap();
        let plain = dir.path().join("plain");
        fs::write(&plain, "x").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions(), fs::metadata(&plain).unwrap().permissions());
    }

    #[test]
    fn new_parent_directories_are_removed_without_their_output() {
        let dir = tempfile::tempdir().unwrap();
        let dest = dir.path().join("a/b/out");
        drop(StagedDir::create(&dest, false).unwrap());
        assert!(!dir.path().join("a").exists());
        StagedDir::create(&dest, false).unwrap().commit().unwrap();
        assert!(dest.is_dir());
    }

    #[test]
    fn messages_show_the_final_names_of_staged_paths() {
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
    fn leftovers_of_a_dead_run_are_removed_and_a_live_run_is_left_alone() {
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
            let error =
                StagedDir::create(&dir.path().join("out"), force).err().expect("another run is active").to_string();
            assert!(error.contains("another run is writing this output"), "{error}");
        }
        assert!(first.path().exists());
    }

    #[test]
    fn an_output_that_another_run_wrote_in_the_meantime_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (file, folder) = (dir.path().join("f"), dir.path().join("d"));
        let staged = StagedFile::of_text(&file, "mine", false).unwrap();
        let staged_dir = StagedDir::create(&folder, false).unwrap();
        fs::write(&file, "theirs").unwrap();
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("theirs"), "").unwrap();
        for error in [staged.commit(), staged_dir.commit()].map(|done| done.unwrap_err().to_string()) {
            assert!(error.contains("another run has written this output in the meantime"), "{error}");
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), "theirs");
        assert!(folder.join("theirs").exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn symbolic_links_at_the_final_name_are_replaced_and_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("elsewhere");
        fs::create_dir(&target).unwrap();
        for name in ["precious", RECORD_NAME] {
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
