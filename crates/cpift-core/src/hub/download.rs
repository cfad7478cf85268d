//! Downloads into the cache. A file is written to `blobs/ETAG.incomplete`, continued if an earlier
//! run has begun it, checked against its size and hash, renamed, and only then linked into the
//! snapshot. Locks that huggingface_hub uses too keep two processes from writing the same file.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar};
use sha2::{Digest, Sha256};

use super::cache::{Name, Snapshot, cache, is_inside, unfinished_mark};
use super::client::{Client, Failure, Metadata, TRIES, content_range};
use super::select::{Need, wanted};
use crate::files::available_bytes;
use crate::progress;

/// Files that are downloaded at the same time.
const WORKERS: usize = 4;
/// Bytes that are read at once.
const BUFFER: usize = 1 << 18;
/// Time between two lines about the same file in a log.
const LOG_EVERY: Duration = Duration::from_secs(30);
/// Time between two attempts to get a lock.
const POLL: Duration = Duration::from_millis(100);

/// Downloads the snapshot of a model: the commit of `begun` if the cache has a part of it, else the
/// one that the name's revision stands for now.
///
/// # Errors
/// A refusal, a broken connection, or a cache that cannot be written.
pub(super) fn model(client: &Client, name: &Name, begun: Option<&Snapshot>, need: Need) -> Result<Snapshot, Failure> {
    let revision = begun.map_or(name.revision(), |snapshot| snapshot.commit());
    let listing = client.listing(name, revision)?;
    let paths: Vec<&str> = listing.files.iter().map(|file| file.path.as_str()).filter(|path| is_inside(path)).collect();
    let size = |path: &str| listing.files.iter().find(|file| file.path == path).and_then(|file| file.size);
    let files: Vec<(&str, u64)> =
        wanted(&paths, need)?.into_iter().map(|path| (path, size(path).unwrap_or(0))).collect();
    let target = Target::new(client, name, &listing.commit)?;
    // While the mark exists, no process takes the snapshot for complete.
    let mark = unfinished_mark(&target.cache, &name.folder(), &target.commit);
    let is_begun = mark.exists();
    let _lock = lock(&mark)?;
    target.fetch(&files)?;
    if begun.is_none() {
        target.write_ref()?;
    }
    // A download of weights that another run has begun goes on to be unfinished.
    if need == Need::Model || !is_begun {
        let _ = fs::remove_file(&mark);
    }
    Ok(target.snapshot())
}

/// Downloads one file of a dataset, of the commit that the cache has of the revision, if any.
///
/// # Errors
/// As [`model`].
pub(super) fn data_file(client: &Client, name: &Name, path: &str) -> Result<Snapshot, Failure> {
    let cached = name.snapshot();
    let revision = cached.as_ref().map_or(name.revision(), |snapshot| snapshot.commit());
    let metadata = client.metadata(name, revision, path)?;
    let target = Target::new(client, name, &metadata.commit)?;
    target.fetch(&[(path, metadata.size)])?;
    if cached.is_none() {
        target.write_ref()?;
    }
    Ok(target.snapshot())
}

/// A snapshot that is written.
struct Target<'a> {
    client: &'a Client,
    name: &'a Name,
    commit: String,
    cache: PathBuf,
    /// Directory of the repository in the cache.
    folder: PathBuf,
}

impl<'a> Target<'a> {
    fn new(client: &'a Client, name: &'a Name, commit: &str) -> Result<Self, Failure> {
        let cache = cache().ok_or_else(|| Failure::lasting("no directory for downloads").hint("set HF_HOME"))?;
        let folder = cache.join(name.folder());
        Ok(Self { client, name, commit: commit.to_owned(), cache, folder })
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot { path: self.folder.join("snapshots").join(&self.commit), pinned: self.name.pinned(&self.commit) }
    }

    /// Path of the blob `etag`.
    fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// Downloads those of the files, with their sizes, that the snapshot does not have.
    fn fetch(&self, files: &[(&str, u64)]) -> Result<(), Failure> {
        let snapshot = self.snapshot().path;
        let (mut due, mut bytes) = (Vec::new(), 0);
        for (path, size) in files.iter().filter(|(path, _)| !snapshot.join(path).is_file()) {
            due.push(*path);
            bytes += size;
        }
        if due.is_empty() {
            return Ok(());
        }
        for folder in [&snapshot, &self.folder.join("blobs")] {
            fs::create_dir_all(folder).map_err(|e| unwritable(folder, &e))?;
        }
        self.check_space(bytes)?;
        log::info!(
            "{}: downloading {} files, {}, from {} into {}",
            self.name.pinned(&self.commit),
            due.len(),
            HumanBytes(bytes),
            self.client.endpoint(),
            self.cache.display()
        );
        let bar = progress::bytes("downloading", bytes);
        let (next, stop, failure) = (AtomicUsize::new(0), AtomicBool::new(false), Mutex::new(None));
        thread::scope(|scope| {
            for _ in 0..WORKERS.min(due.len()) {
                scope.spawn(|| {
                    while let Some(path) = due.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                        if let Err(error) = self.file(path, &bar, &stop) {
                            // Before the others stop, which is a failure too.
                            failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                            stop.store(true, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        bar.finish_and_clear();
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// Refuses a download of `bytes` for which the file system has no room.
    fn check_space(&self, bytes: u64) -> Result<(), Failure> {
        let blobs = fs::read_dir(self.folder.join("blobs")).into_iter().flatten().flatten();
        let begun = blobs.filter(|entry| entry.path().extension().is_some_and(|end| end == "incomplete"));
        let begun: u64 = begun.filter_map(|entry| entry.metadata().ok()).map(|meta| meta.len()).sum();
        let needed = bytes.saturating_sub(begun);
        match available_bytes(&self.folder) {
            Ok(free) if free < needed => Err(no_room(&self.cache)
                .expected(format!("{} free", HumanBytes(needed)))
                .found(format!("{} free", HumanBytes(free)))),
            _ => Ok(()),
        }
    }

    /// Downloads a file and links it into the snapshot.
    fn file(&self, path: &str, bar: &ProgressBar, stop: &AtomicBool) -> Result<(), Failure> {
        let metadata = self.client.metadata(self.name, &self.commit, path)?;
        let blob = self.blob(&metadata.etag);
        let is_whole = || fs::metadata(&blob).is_ok_and(|meta| meta.len() == metadata.size);
        if !is_whole() {
            let name = format!("{}.lock", metadata.etag);
            let lock = lock(&self.cache.join(".locks").join(self.name.folder()).join(name))?;
            if !is_whole() {
                Transfer { target: self, path, metadata: &metadata, bar, stop, is_locked: lock.is_some() }
                    .run(&blob)?;
            }
        }
        self.link(path, &metadata.etag)
    }

    /// Links a file of the snapshot to its blob, as huggingface_hub does: by a relative path.
    fn link(&self, path: &str, etag: &str) -> Result<(), Failure> {
        let place = self.snapshot().path.join(path);
        let folder = place.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(folder).map_err(|e| unwritable(folder, &e))?;
        let up = "../".repeat(2 + path.matches('/').count());
        // Renamed, so that an old link without its blob is replaced in one step.
        let new = self.blob(&format!("{}.{}.link.incomplete", hash_of(path), std::process::id()));
        let _ = fs::remove_file(&new);
        let linked = symlink(format!("{up}blobs/{etag}"), &new).and_then(|()| fs::rename(&new, &place));
        linked.map_err(|e| unwritable(&place, &e))
    }

    /// Lets the revision stand for the commit.
    fn write_ref(&self) -> Result<(), Failure> {
        let revision = self.name.revision();
        if revision == self.commit {
            return Ok(());
        }
        let place = self.folder.join("refs").join(revision);
        let folder = place.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(folder).map_err(|e| unwritable(folder, &e))?;
        let new = self.blob(&format!("{}.{}.ref.incomplete", hash_of(revision), std::process::id()));
        let written = fs::write(&new, &self.commit).and_then(|()| fs::rename(&new, &place));
        written.map_err(|e| unwritable(&place, &e))
    }
}

/// Short name of a path, for temporary files.
fn hash_of(path: &str) -> String {
    Sha256::digest(path.as_bytes())[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The transfer of one file.
struct Transfer<'a> {
    target: &'a Target<'a>,
    path: &'a str,
    metadata: &'a Metadata,
    bar: &'a ProgressBar,
    stop: &'a AtomicBool,
    /// False on a file system without locks, on which another process may write the same file.
    is_locked: bool,
}

/// A file while it is written.
struct Part {
    path: PathBuf,
    file: File,
    length: u64,
    /// Hash of the bytes so far, of files whose hash is known.
    hash: Option<Sha256>,
}

impl Transfer<'_> {
    fn run(&self, blob: &Path) -> Result<(), Failure> {
        let start = Instant::now();
        let mut part = self.begin(blob)?;
        self.bar.inc(part.length);
        if part.length > 0 {
            let (have, size) = (HumanBytes(part.length), HumanBytes(self.metadata.size));
            log::info!("{}: continuing at {have} of {size}", self.path);
        }
        let mut tries = 1;
        while part.length < self.metadata.size {
            let before = part.length;
            let Err(failure) = self.receive(&mut part) else { continue };
            if failure.is_lasting() || self.stop.load(Ordering::Relaxed) {
                return Err(failure);
            }
            if part.length > before {
                tries = 1;
            }
            if tries == TRIES {
                let (have, size) = (HumanBytes(part.length), HumanBytes(self.metadata.size));
                return Err(Failure::lasting(format!("the download of {} broke off: {failure}", self.path))
                    .expected(format!("{size} ({} bytes)", self.metadata.size))
                    .found(format!("{have} ({} bytes), which are kept", part.length))
                    .hint("run again: the download continues where it broke off"));
            }
            log::info!("{}: {failure}; continuing at {}", self.path, HumanBytes(part.length));
            thread::sleep(failure.wait(tries));
            tries += 1;
        }
        self.check(&part)?;
        part.file.sync_all().map_err(|e| unwritable(&part.path, &e))?;
        fs::rename(&part.path, blob).map_err(|e| unwritable(blob, &e))?;
        if self.bar.is_hidden() {
            let seconds = start.elapsed().as_secs_f64();
            log::info!("{}: {} in {seconds:.1} s", self.path, HumanBytes(self.metadata.size));
        }
        Ok(())
    }

    /// Opens the file of an earlier run, or a new one.
    fn begin(&self, blob: &Path) -> Result<Part, Failure> {
        let mut name = blob.file_name().unwrap_or_default().to_owned();
        if !self.is_locked {
            name.push(format!(".{}", std::process::id()));
        }
        name.push(".incomplete");
        let path = blob.with_file_name(name);
        let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = opened.map_err(|e| unwritable(&path, &e))?;
        let mut part = Part { path, file, length: 0, hash: self.metadata.is_large.then(Sha256::new) };
        let length = part.file.metadata().map_err(|e| unwritable(&part.path, &e))?.len();
        // A longer file is not of this blob.
        if length > self.metadata.size || part.read_again(length).is_err() {
            part.restart()?;
        }
        Ok(part)
    }

    /// Receives the rest of the file, or a part of it.
    fn receive(&self, part: &mut Part) -> Result<(), Failure> {
        let (target, size) = (self.target, self.metadata.size);
        let response = match target.client.content(target.name, &target.commit, self.path, part.length) {
            // Nothing can be said about a server that was there a moment ago.
            Err(failure) if failure.is_unreachable() => return Err(Failure::passing(failure.to_string())),
            other => other?,
        };
        let range = content_range(response.headers());
        if response.status() == 206 {
            let (from, total) = range.unwrap_or((u64::MAX, None));
            if from != part.length {
                self.bar.set_position(self.bar.position().saturating_sub(part.length));
                part.restart()?;
                return Err(Failure::passing("the server sent another range than it was asked for"));
            }
            if total.is_some_and(|total| total != size) {
                return Err(self.wrong_size(part, total.unwrap_or(0)));
            }
        } else if !response.status().is_success() {
            return Err(Failure::passing(format!("an answer of status {}", response.status())));
        } else if part.length > 0 {
            // The server does not send ranges.
            self.bar.set_position(self.bar.position().saturating_sub(part.length));
            part.restart()?;
        }
        let length =
            response.headers().get("content-length").and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
        if let Some(length) = length.filter(|length| part.length + length != size) {
            return Err(self.wrong_size(part, part.length + length));
        }
        self.copy(&mut response.into_body().into_reader(), part)
    }

    fn copy(&self, body: &mut impl Read, part: &mut Part) -> Result<(), Failure> {
        let mut buffer = vec![0; BUFFER];
        let mut logged = Instant::now();
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Failure::passing("another file failed"));
            }
            let count = match body.read(&mut buffer) {
                Ok(0) if part.length < self.metadata.size => {
                    return Err(Failure::passing("the connection was closed"));
                }
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(Failure::passing(format!("the transfer broke off: {error}"))),
            };
            part.append(&buffer[..count])?;
            self.bar.inc(count as u64);
            if part.length > self.metadata.size {
                return Err(self.wrong_size(part, part.length));
            }
            if self.bar.is_hidden() && logged.elapsed() > LOG_EVERY {
                logged = Instant::now();
                log::info!("{}: {} of {}", self.path, HumanBytes(part.length), HumanBytes(self.metadata.size));
            }
        }
    }

    /// Compares a complete file with the hash that the Hub names.
    fn check(&self, part: &Part) -> Result<(), Failure> {
        let Some(hash) = &part.hash else { return Ok(()) };
        let found: String = hash.clone().finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if found == self.metadata.etag.to_ascii_lowercase() {
            return Ok(());
        }
        let _ = fs::remove_file(&part.path);
        Err(Failure::lasting(format!("{} was changed on its way; it is removed", self.path))
            .expected(format!("SHA-256 {}", self.metadata.etag))
            .found(found)
            .hint("run again; if it comes again, look for a proxy or a mirror (HF_ENDPOINT) that changes files"))
    }

    fn wrong_size(&self, part: &Part, found: u64) -> Failure {
        let _ = fs::remove_file(&part.path);
        Failure::lasting(format!("{} has a wrong size", self.path))
            .expected(format!("{} bytes, as the Hub says", self.metadata.size))
            .found(format!("{found} bytes"))
            .hint("run again; if it comes again, look for a proxy or a mirror (HF_ENDPOINT) that changes files")
    }
}

impl Part {
    fn append(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.file.write_all(bytes).map_err(|e| unwritable(&self.path, &e))?;
        self.length += bytes.len() as u64;
        if let Some(hash) = &mut self.hash {
            hash.update(bytes);
        }
        Ok(())
    }

    /// Takes the first `length` bytes, written by an earlier run, into the hash.
    fn read_again(&mut self, length: u64) -> std::io::Result<()> {
        if let Some(hash) = &mut self.hash {
            let mut buffer = vec![0; BUFFER];
            let mut left = length;
            while left > 0 {
                let count = self.file.read(&mut buffer)?;
                if count == 0 {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                hash.update(&buffer[..count]);
                left = left.saturating_sub(count as u64);
            }
        }
        self.file.seek(SeekFrom::Start(length))?;
        self.length = length;
        Ok(())
    }

    /// Begins again with an empty file.
    fn restart(&mut self) -> Result<(), Failure> {
        let emptied = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        emptied.map_err(|e| unwritable(&self.path, &e))?;
        self.length = 0;
        self.hash = self.hash.as_ref().map(|_| Sha256::new());
        Ok(())
    }
}

/// Creates and locks the file at `path` until it is closed; waits for other processes. None on a
/// file system without locks.
fn lock(path: &Path) -> Result<Option<File>, Failure> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder).map_err(|e| unwritable(folder, &e))?;
    let mut waited = false;
    loop {
        let opened = OpenOptions::new().write(true).create(true).truncate(false).open(path);
        let file = opened.map_err(|e| unwritable(path, &e))?;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) => {
                    if !std::mem::replace(&mut waited, true) {
                        log::info!("waiting for another process that downloads the same files ({})", path.display());
                    }
                    thread::sleep(POLL);
                }
                Err(TryLockError::Error(_)) => return Ok(None),
            }
        }
        // The process before may have removed it.
        if path.exists() && is_same(&file, path) {
            return Ok(Some(file));
        }
    }
}

/// Returns true if `file` is the one at `path`.
fn is_same(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let (Ok(open), Ok(named)) = (file.metadata(), fs::metadata(path)) else { return false };
    (open.dev(), open.ino()) == (named.dev(), named.ino())
}

fn no_room(cache: &Path) -> Failure {
    Failure::lasting(format!("no room for the download in {}", cache.display()))
        .hint("free space (hf cache), or set HF_HUB_CACHE to a directory on another disk")
}

/// Failure to write in the cache.
fn unwritable(path: &Path, error: &std::io::Error) -> Failure {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => no_room(path).found(error.to_string()),
        _ => Failure::lasting(format!("{} cannot be written: {error}", path.display()))
            .hint("set HF_HUB_CACHE to a directory that you can write to"),
    }
}
