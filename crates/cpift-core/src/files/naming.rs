//! Final names of outputs: renamed into place in one step, replacing an existing output only with
//! `force`.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::error::{BadInput, usage};

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
pub(super) fn rename_output(from: &Path, dest: &Path, force: bool, aside: &Path) -> Result<()> {
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
pub(super) fn lock_for_rename(folder: &File) {
    let start = Instant::now();
    while matches!(folder.try_lock(), Err(TryLockError::WouldBlock)) && start.elapsed() < LOCK_TIMEOUT {
        std::thread::sleep(Duration::from_millis(1));
    }
}
