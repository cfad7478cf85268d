//! Programs that end before their work does: killed, asked to stop, or out of room. What may lie there afterwards is nothing, or all.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::{Numbers, Run, expect_entries, run};

/// A command whose output a test interrupts.
pub struct Interrupted<'a> {
    /// The program.
    pub program: &'a str,
    /// Its arguments without `--out`.
    pub args: Vec<OsString>,
    /// The folder the output goes to; nothing else may be in it.
    pub folder: PathBuf,
    /// Names in that folder after a complete run; the first is the output.
    pub names: &'a [&'a str],
    /// Arguments that give another output.
    pub other: &'a [&'a str],
    /// Whether two outputs are complete and the same.
    pub same: fn(&Path, &Path) -> bool,
}

/// How many of the runs ended in which state.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Nothing under the final name.
    pub nothing: usize,
    /// Of those, the ones that left something unfinished beside it.
    pub leftovers: usize,
    /// The complete output.
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

    /// Makes the output to compare with, in a folder of its own, and returns its path and how long a run takes.
    fn reference(&self) -> (PathBuf, Duration) {
        let out = self.folder.with_extension("reference").join(self.names[0]);
        let words = self.args.iter().map(OsString::as_os_str);
        run(self.program, words.chain(["--force", "--out"].map(OsStr::new)).chain([out.as_os_str()])).ok();
        // The first run read the inputs into memory; the second is timed.
        let start = Instant::now();
        assert!(self.command(&out).arg("--force").status().unwrap().success());
        (out, start.elapsed())
    }

    /// Ends runs by SIGKILL at `moments` moments spread over a run and a little more; then lets one run finish.
    ///
    /// # Panics
    /// When a killed run leaves half an output, or the last one leaves anything but its output.
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
        assert!((self.same)(&reference, &self.out()), "the rerun's output is another");
        expect_entries(&self.folder, self.names);
        tally
    }

    /// Ends runs that replace an older output by SIGKILL: the older one is there, or the new one.
    ///
    /// # Panics
    /// When anything else is, or only one of the two ever.
    pub fn kill_replacing(&self, moments: usize) {
        fs::create_dir_all(&self.folder).unwrap();
        let ((reference, whole), mut newer) = (self.reference(), 0);
        let older = self.folder.with_extension("older").join(self.names[0]);
        assert!(self.command(&older).args(self.other).status().unwrap().success());
        for moment in spread(moments, whole) {
            // With the older output in place, what is killed is the run that would replace it.
            assert!(self.command(&self.out()).args(self.other).arg("--force").status().unwrap().success());
            let mut child = self.command(&self.out()).arg("--force").spawn().unwrap();
            std::thread::sleep(moment);
            child.kill().unwrap();
            child.wait().unwrap();
            let replaced = (self.same)(&reference, &self.out());
            assert!(replaced || (self.same)(&older, &self.out()), "neither the older output nor the new one");
            newer += usize::from(replaced);
        }
        assert!((1..moments).contains(&newer), "{newer} of {moments} replaced the older output");
    }

    /// Ends runs by `signal` (`TERM`, say) at `moments` moments: nothing may be left beside a complete output.
    ///
    /// # Panics
    /// When something is left, or a run ends with a code other than `code`.
    pub fn stop(&self, signal: &str, code: i32, moments: usize) -> Tally {
        fs::create_dir_all(&self.folder).unwrap();
        let ((reference, whole), mut tally) = (self.reference(), Tally::default());
        let mut handled = 0;
        for moment in spread(moments, whole) {
            let mut child = self.command(&self.out()).spawn().unwrap();
            std::thread::sleep(moment);
            let status = send(&mut child, signal);
            // A program that has just started has no handler yet, and nothing to tidy up; one may also have finished.
            let early = status.signal().is_some();
            assert!(early || [Some(0), Some(code)].contains(&status.code()), "{signal}: {status}");
            handled += usize::from(status.code() == Some(code));
            self.judge(&reference, &mut tally);
            expect_entries(&self.folder, &[]);
        }
        assert!(handled > 0, "no run was stopped while it worked");
        assert_eq!(tally.leftovers, 0, "{signal}");
        tally
    }

    /// Counts what lies in the folder and removes it, except what is unfinished.
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
        assert!((self.same)(reference, &out), "half an output, or another");
        tally.complete += 1;
        for name in self.names {
            let path = self.folder.join(name);
            let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        }
    }

    /// Runs with a limit of `kib` KiB for every file, as a disk that is full: asserts exit code 1, a message that names the
    /// output, and that nothing is left.
    ///
    /// # Panics
    /// When the run does otherwise.
    pub fn out_of_room(&self, kib: u32) -> Run {
        fs::create_dir_all(&self.folder).unwrap();
        let script = format!("trap '' XFSZ; ulimit -f {kib}; exec \"$@\"");
        let before: [&OsStr; 4] = ["-c".as_ref(), script.as_ref(), "bash".as_ref(), self.program.as_ref()];
        let out = self.out();
        let after = [OsStr::new("--out"), out.as_os_str()];
        let words = before.into_iter().chain(self.args.iter().map(OsString::as_os_str)).chain(after);
        let ended = run("bash", words).expect_code(1).says(&["error: ", "too large"]);
        let named = ended.stderr.contains(self.folder.to_str().unwrap());
        assert!(named, "the message names no file: {}", ended.stderr);
        expect_entries(&self.folder, &[]);
        ended
    }
}

/// Moments in order, one in each of `n` equal stretches of `whole` and a little more.
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
