//! How a finished output gets its final name: in one step, and over another run's only where that was asked for.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::error::{BadInput, usage};

/// How long a run waits for another that is giving names in the same folder; that takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// Name of the record inside an output folder; beside an output file it is the file's name with `.cpift.json` added.
pub const RECORD_NAME: &str = "cpift.json";

/// Refuses `dest` when it exists and `force` is not given.
///
/// # Errors
/// [`BadInput`] with the way out.
pub fn check_output(dest: &Path, force: bool) -> Result<()> {
    if dest.file_name().is_none() {
        return Err(BadInput::new(dest, "cannot be an output").expected("a name of its own").into());
    }
    if !force && dest.symlink_metadata().is_ok() {
        return Err(BadInput::new(dest, "the output exists already").hint("--force replaces it").into());
    }
    Ok(())
}

/// As [`check_output`], for a folder: `force` replaces only what a program of ours made, or an empty folder, because all that is in
/// it goes.
///
/// # Errors
/// [`BadInput`] with the way out.
pub fn check_output_dir(dest: &Path, force: bool) -> Result<()> {
    check_output(dest, force)?;
    if dest.symlink_metadata().is_err() || dest.join(RECORD_NAME).is_file() {
        return Ok(());
    }
    if !dest.is_dir() {
        return Err(BadInput::new(dest, "is not a folder").expected("a folder's name for the output").into());
    }
    let first = fs::read_dir(dest).ok().and_then(|mut entries| entries.next()?.ok());
    first.map_or(Ok(()), |entry| {
        Err(BadInput::new(dest, "is a folder that no program of ours made, so --force does not replace it")
            .found(format!("no {} but {}", RECORD_NAME, entry.file_name().display()))
            .hint("remove it yourself, or choose another name")
            .into())
    })
}

/// Refuses an output that is, or holds, one of the `inputs`: `--force` would destroy it.
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

/// Renames `from` to `dest`. What has that name changes places with it, or, for files, goes; without `force` it stays, and that is an
/// error. A link under that name is replaced, not followed. `aside` is for a file system that cannot swap two folders.
///
/// # Errors
/// [`BadInput`] when another run has written `dest` meanwhile; I/O errors.
pub(super) fn give_name(from: &Path, dest: &Path, force: bool, aside: &Path) -> Result<()> {
    let renamed = if !force {
        match renameat_with(CWD, from, CWD, dest, RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => return Err(written_meanwhile(dest).into()),
            // A network file system that cannot refuse by itself.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                check_output(dest, false).map_err(|_| written_meanwhile(dest))?;
                fs::rename(from, dest)
            }
            other => other.map_err(Into::into),
        }
    } else if from.is_dir() {
        // Where nothing, or an empty folder, has the name. Asking first would leave another run time to take it.
        let swap = |_| renameat_with(CWD, from, CWD, dest, RenameFlags::EXCHANGE);
        fs::rename(from, dest).or_else(swap).or_else(|_| {
            // The older folder steps aside first.
            fs::rename(dest, aside)?;
            fs::rename(from, dest).inspect_err(|_| drop(fs::rename(aside, dest)))
        })
    } else {
        fs::rename(from, dest)
    };
    renamed.with_context(|| format!("renaming to {}", dest.display()))
}

fn written_meanwhile(dest: &Path) -> BadInput {
    BadInput::new(dest, "another run has written this output meanwhile, and it stays")
        .hint("--force replaces it; or choose another --out")
}

/// Locks `folder`, so that no other run gives names in it while it is open and an output and its record are of one run. Where the file
/// system has no locks, or another program holds this one for long, that is left to chance.
pub(super) fn wait_for_turn(folder: &File) {
    let start = Instant::now();
    while matches!(folder.try_lock(), Err(TryLockError::WouldBlock)) && start.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(1));
    }
}
