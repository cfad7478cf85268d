//! Tests of programs that end early: killed, stopped by a signal, or out of disk space. Afterwards
//! the output must be complete or absent.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::{Numbers, Run, expect_entries, run};

/// A command that a test interrupts.
pub struct Interrupted<'a> {
    /// Program name.
    pub program: &'a str,
    /// Arguments without `--out`.
    pub args: Vec<OsString>,
    /// Directory of the output, with no other content.
    pub folder: PathBuf,
    /// Entries of that directory after a complete run; the first is the output.
    pub names: &'a [&'a str],
    /// Additional arguments that change the output.
    pub other: &'a [&'a str],
    /// Returns true if two outputs are complete and equal.
    pub same: fn(&Path, &Path) -> bool,
}

/// Number of interrupted runs by their result.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Runs without an output.
    pub nothing: usize,
    /// Those of them that left an unfinished output.
    pub leftovers: usize,
    /// Runs with a complete output.
    pub complete: usize,
}

impl Interrupted<'_> {
    fn out(&self) -> PathBuf {
        self.folder.join(self.names[0])
    }

    fn command(&self, out: &Path) -> Command {
        let mut command = Command::new(self.program);
        command.args(&self.args).arg("--out").arg(out).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Makes a reference output in a separate directory. Returns its path and the duration of a
    /// run.
    fn reference(&self) -> (PathBuf, Duration) {
        let out = self.folder.with_extension("reference").join(self.names[0]);
        let words = self.args.iter().map(OsString::as_os_str);
        run(self.program, words.chain(["--force", "--out"].map(OsStr::new)).chain([out.as_os_str()])).ok();
        // Time the second run, for which the inputs are in the page cache.
        let start = Instant::now();
        assert!(self.command(&out).arg("--force").status().unwrap().success());
        (out, start.elapsed())
    }

    /// Kills `moments` runs by SIGKILL, at moments spread over slightly more than the duration of a
    /// run; then lets one run finish.
    ///
    /// # Panics
    /// If a killed run leaves a partial output, or the last run leaves anything but its output.
    pub fn kill(&self, moments: usize) -> Tally {
        fs::create_dir_all(&self.folder).unwrap();
        let ((reference, whole), mut tally) = (self.reference(), Tally::default());
        for moment in spread(moments, whole) {
            let mut child = self.command(&self.out()).spawn().unwrap();
            std::thread::sleep(moment);
            child.kill().unwrap();
            child.wait().unwrap();
            self.judge(&reference, &mut tally);
        }
        assert!(self.command(&self.out()).status().unwrap().success(), "a rerun after killed runs");
        assert!((self.same)(&reference, &self.out()), "the output of the rerun differs");
        expect_entries(&self.folder, self.names);
        tally
    }

    /// Kills runs that replace an older output: afterwards either the older or the new output must
    /// be there.
    ///
    /// # Panics
    /// If there is anything else, or if all runs had the same result.
    pub fn kill_replacing(&self, moments: usize) {
        fs::create_dir_all(&self.folder).unwrap();
        let ((reference, whole), mut newer) = (self.reference(), 0);
        let older = self.folder.with_extension("older").join(self.names[0]);
        assert!(self.command(&older).args(self.other).status().unwrap().success());
        let mut runs = 0;
        // On a machine whose load has grown since the reference run, later moments follow.
        let later = (1..=12).map(|n| whole * 2 * n);
        for moment in spread(moments, whole).chain(later) {
            if runs >= moments && newer > 0 {
                break;
            }
            // Put the older output in place first, and then kill the run that replaces it.
            assert!(self.command(&self.out()).args(self.other).arg("--force").status().unwrap().success());
            let mut child = self.command(&self.out()).arg("--force").spawn().unwrap();
            std::thread::sleep(moment);
            child.kill().unwrap();
            child.wait().unwrap();
            let replaced = (self.same)(&reference, &self.out());
            assert!(replaced || (self.same)(&older, &self.out()), "neither the older output nor the new one");
            newer += usize::from(replaced);
            runs += 1;
        }
        assert!((1..runs).contains(&newer), "{newer} of {runs} replaced the older output");
    }

    /// Stops `moments` runs by `signal`, such as `TERM`: nothing may be left except a complete
    /// output.
    ///
    /// # Panics
    /// If anything is left, or a run ends with an exit code other than `code`.
    pub fn stop(&self, signal: &str, code: i32, moments: usize) -> Tally {
        fs::create_dir_all(&self.folder).unwrap();
        let ((reference, whole), mut tally) = (self.reference(), Tally::default());
        let mut handled = 0;
        for moment in spread(moments, whole) {
            let mut child = self.command(&self.out()).spawn().unwrap();
            std::thread::sleep(moment);
            let status = send(&mut child, signal);
            // A program that has just started has no signal handler yet and nothing to clean up; it
            // may also have finished.
            let early = status.signal().is_some();
            assert!(early || [Some(0), Some(code)].contains(&status.code()), "{signal}: {status}");
            handled += usize::from(status.code() == Some(code));
            self.judge(&reference, &mut tally);
            expect_entries(&self.folder, &[]);
        }
        assert!(handled > 0, "no run was stopped while it was working");
        assert_eq!(tally.leftovers, 0, "{signal}");
        tally
    }

    /// Counts the result of a run and removes its output, but not an unfinished one.
    fn judge(&self, reference: &Path, tally: &mut Tally) {
        let out = self.out();
        let unfinished = fs::read_dir(&self.folder)
            .unwrap()
            .filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().ends_with(".partial"))
            .count();
        if !out.exists() {
            tally.nothing += 1;
            tally.leftovers += usize::from(unfinished > 0);
            return;
        }
        assert!((self.same)(reference, &out), "the output is partial or differs");
        tally.complete += 1;
        for name in self.names {
            let path = self.folder.join(name);
            let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        }
    }

    /// Runs with a file size limit of `kib` KiB, which simulates a full disk. Asserts exit code 1,
    /// a message with the path of the output, and that nothing is left.
    ///
    /// # Panics
    /// If any of these does not hold.
    pub fn out_of_room(&self, kib: u32) -> Run {
        fs::create_dir_all(&self.folder).unwrap();
        let script = format!("trap '' XFSZ; ulimit -f {kib}; exec \"$@\"");
        let before: [&OsStr; 4] = ["-c".as_ref(), script.as_ref(), "bash".as_ref(), self.program.as_ref()];
        let out = self.out();
        let after = [OsStr::new("--out"), out.as_os_str()];
        let words = before.into_iter().chain(self.args.iter().map(OsString::as_os_str)).chain(after);
        let ended = run("bash", words).expect_code(1).says(&["error: ", "too large"]);
        let named = ended.stderr.contains(self.folder.to_str().unwrap());
        assert!(named, "the message does not name the output: {}", ended.stderr);
        expect_entries(&self.folder, &[]);
        ended
    }
}

/// Increasing moments, one at random in each of `n` equal intervals of slightly more than `whole`.
fn spread(n: usize, whole: Duration) -> impl Iterator<Item = Duration> {
    let mut numbers = Numbers(7);
    (0..n).map(move |i| whole.mul_f64(1.1 * (i as f64 + f64::from(numbers.unit().abs())) / n as f64))
}

fn send(child: &mut Child, signal: &str) -> ExitStatus {
    if child.try_wait().unwrap().is_none() {
        let _ = Command::new("kill").args([format!("-{signal}"), child.id().to_string()]).status();
    }
    child.wait().unwrap()
}
