//! The one module that opens, maps, stages and renames files.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use memmap2::Mmap;

use crate::error::BadInput;

/// Opens `path` for reading.
///
/// # Errors
/// [`BadInput`] when it is missing or is not a file.
pub fn open(path: &Path) -> Result<File> {
    if path.is_dir() {
        return Err(BadInput::new(path, "is a folder").expected("a file").into());
    }
    File::open(path).map_err(|e| BadInput::new(path, format!("cannot be opened: {e}")).into())
}

/// Reads a whole UTF-8 file.
///
/// # Errors
/// [`BadInput`] when it is missing or not UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    open(path)?;
    fs::read_to_string(path).map_err(|e| BadInput::new(path, format!("cannot be read as UTF-8 text: {e}")).into())
}

/// Maps `path` read-only; an empty file gives an empty map.
///
/// # Errors
/// [`BadInput`] when it cannot be opened.
#[allow(unsafe_code)]
pub fn map(path: &Path) -> Result<Mmap> {
    let file = open(path)?;
    // SAFETY: the mapping is read-only and we never write to inputs; a file that another process truncates while we
    // read it raises SIGBUS, which is documented as an unsupported use.
    let map = unsafe { Mmap::map(&file) }.with_context(|| format!("mapping {}", path.display()))?;
    Ok(map)
}

/// Refuses `dest` when it exists and `force` is not given.
///
/// # Errors
/// [`BadInput`] with the way out.
pub fn check_output(dest: &Path, force: bool) -> Result<()> {
    if !force && dest.symlink_metadata().is_ok() {
        return Err(BadInput::new(dest, "the output exists already").hint("--force replaces it").into());
    }
    Ok(())
}

/// A file that appears under its final name whole, or not at all.
pub struct StagedFile {
    temp: tempfile::NamedTempFile,
    dest: PathBuf,
}

impl StagedFile {
    /// Starts a file that will become `dest`, written beside it.
    ///
    /// # Errors
    /// [`BadInput`] when `dest` exists without `force`; I/O errors otherwise.
    pub fn create(dest: &Path, force: bool) -> Result<Self> {
        check_output(dest, force)?;
        if dest.is_dir() {
            return Err(BadInput::new(dest, "is a folder").expected("a file name for the output").into());
        }
        let parent = parent_of(dest)?;
        let temp = staging_name(dest)
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(&parent)
            .with_context(|| format!("creating a file in {}", parent.display()))?;
        Ok(Self { temp, dest: dest.to_owned() })
    }

    /// The file under construction.
    pub fn file(&self) -> &File {
        self.temp.as_file()
    }

    /// Makes the file durable and gives it its final name.
    ///
    /// # Errors
    /// I/O errors; nothing is left behind.
    pub fn commit(self) -> Result<()> {
        let dest = self.dest;
        self.temp.as_file().sync_all().with_context(|| format!("writing {}", dest.display()))?;
        self.temp.persist(&dest).with_context(|| format!("renaming to {}", dest.display()))?;
        sync_dir(&parent_of(&dest)?)
    }
}

/// A path for another writer to create a file at, which then appears under its final name whole, or not at all.
pub struct StagedPath {
    dir: tempfile::TempDir,
    dest: PathBuf,
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
        let parent = parent_of(dest)?;
        let dir = staging_name(dest)
            .tempdir_in(&parent)
            .with_context(|| format!("creating a folder in {}", parent.display()))?;
        Ok(Self { dir, dest: dest.to_owned() })
    }

    /// Where the file is to be created.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("file")
    }

    /// Makes the file durable and gives it its final name.
    ///
    /// # Errors
    /// I/O errors; nothing is left behind.
    pub fn commit(self) -> Result<()> {
        let (from, dest) = (self.path(), &self.dest);
        File::open(&from)?.sync_all().with_context(|| format!("writing {}", dest.display()))?;
        fs::rename(&from, dest).with_context(|| format!("renaming to {}", dest.display()))?;
        self.dir.close().with_context(|| format!("tidying up beside {}", dest.display()))?;
        sync_dir(&parent_of(dest)?)
    }
}

/// Writes `text` to `dest`, whole or not at all.
///
/// # Errors
/// As [`StagedFile::create`].
pub fn write_text(dest: &Path, text: &str, force: bool) -> Result<()> {
    let staged = StagedFile::create(dest, force)?;
    staged.file().write_all(text.as_bytes()).with_context(|| format!("writing {}", dest.display()))?;
    staged.commit()
}

/// A folder that appears under its final name whole, or not at all.
pub struct StagedDir {
    temp: tempfile::TempDir,
    dest: PathBuf,
}

impl StagedDir {
    /// Starts a folder that will become `dest`, filled beside it.
    ///
    /// # Errors
    /// [`BadInput`] when `dest` exists without `force`; I/O errors otherwise.
    pub fn create(dest: &Path, force: bool) -> Result<Self> {
        check_output(dest, force)?;
        let parent = parent_of(dest)?;
        let temp = staging_name(dest)
            .permissions(Permissions::from_mode(0o777))
            .tempdir_in(&parent)
            .with_context(|| format!("creating a folder in {}", parent.display()))?;
        Ok(Self { temp, dest: dest.to_owned() })
    }

    /// The folder under construction.
    pub fn path(&self) -> &Path {
        self.temp.path()
    }

    /// Makes every file durable and gives the folder its final name; an older output under that name goes.
    ///
    /// # Errors
    /// I/O errors; the older output stays then.
    pub fn commit(self) -> Result<()> {
        for entry in fs::read_dir(self.path())? {
            let path = entry?.path();
            if path.is_file() {
                File::open(&path)?.sync_all().with_context(|| format!("writing {}", path.display()))?;
            }
        }
        sync_dir(self.path())?;
        let dest = self.dest;
        let parent = parent_of(&dest)?;
        // The older output steps aside first, because a folder cannot be renamed over a filled one.
        let old = if dest.symlink_metadata().is_ok() {
            let aside = staging_name(&dest).tempdir_in(&parent)?;
            fs::rename(&dest, aside.path().join("old")).with_context(|| format!("replacing {}", dest.display()))?;
            Some(aside)
        } else {
            None
        };
        let staged = self.temp.keep();
        if let Err(error) = fs::rename(&staged, &dest) {
            if let Some(aside) = &old {
                let _ = fs::rename(aside.path().join("old"), &dest);
            }
            let _ = fs::remove_dir_all(&staged);
            return Err(error).with_context(|| format!("renaming to {}", dest.display()));
        }
        sync_dir(&parent)
    }
}

/// Creates a file of `len` bytes inside a staged folder, open for positional writes. The file is sparse: a full disk shows when
/// it is written.
///
/// # Errors
/// I/O errors.
pub fn create_sized(path: &Path, len: u64) -> Result<File> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .with_context(|| format!("creating {}", path.display()))?;
    file.set_len(len).with_context(|| format!("making room for {len} bytes in {}", path.display()))?;
    Ok(file)
}

fn staging_name(dest: &Path) -> tempfile::Builder<'static, 'static> {
    let name = dest.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let mut builder = tempfile::Builder::new();
    // The prefix must outlive the builder; one small string for each output of a short-lived program.
    builder.prefix(Box::leak(format!(".{name}.").into_boxed_str())).suffix(".partial");
    builder
}

fn parent_of(dest: &Path) -> Result<PathBuf> {
    let parent = match dest.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.to_owned(),
        _ => PathBuf::from("."),
    };
    fs::create_dir_all(&parent).with_context(|| format!("creating the folder {}", parent.display()))?;
    Ok(parent)
}

fn sync_dir(path: &Path) -> Result<()> {
    File::open(path)?.sync_all().with_context(|| format!("syncing {}", path.display()))
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
}
