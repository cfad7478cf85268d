//! Stages that are killed by SIGKILL at random moments and rerun give the same bytes as an
//! undisturbed run.
//!
//! KILLS sets the number of kills (default 10); `make storm` uses more.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use cpift_testkit::Numbers;
use cpift_testkit::chain::{Chain, Link};

/// Chain whose stages are killed.
struct Storm {
    chain: Chain,
    numbers: Numbers,
}

impl Storm {
    /// Starts a stage and kills it at a random moment within `whole`, its usual duration. Returns
    /// true if it was still running.
    fn killed(&mut self, link: &Link, whole: Duration) -> bool {
        let mut child = self.chain.command(link).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(whole.mul_f64(f64::from(self.numbers.unit().abs())));
        child.kill().unwrap();
        let status = child.wait().unwrap();
        assert!(status.success() || status.code().is_none(), "{}: {status}", link.name);
        status.code().is_none()
    }

    /// Kills a stage `kills` times, starting again if it finished first, and then lets it finish.
    fn through(&mut self, link: &Link, kills: usize, whole: Duration) {
        let mut done = 0;
        while done < kills {
            done += usize::from(self.killed(link, whole));
            let out = self.chain.path(&link.out);
            let _ = if out.is_dir() { fs::remove_dir_all(&out) } else { fs::remove_file(&out) };
        }
        self.chain.run(link, [""; 0]).ok();
    }
}

#[test]
fn killed_at_random_moments_of_all_stages() {
    let kills: usize = std::env::var("KILLS").map_or(10, |text| text.parse().expect("KILLS must be a number"));
    let quiet = Chain::default();
    let timed = |link: &Link| {
        let start = Instant::now();
        quiet.run(link, [""; 0]).ok();
        start.elapsed()
    };
    let links = Chain::links("");
    let took: Vec<Duration> = links.iter().map(timed).collect();
    let mut storm = Storm { chain: Chain::default(), numbers: Numbers(kills as u64) };
    // Distribute the kills over the stages; with fewer kills than stages, another number of kills
    // selects other stages.
    let shares = |i: usize| kills / links.len() + usize::from((i * 7 + kills) % links.len() < kills % links.len());
    for (i, (link, whole)) in links.iter().zip(&took).enumerate() {
        storm.through(link, shares(i), *whole);
    }
    assert_eq!((0..links.len()).map(shares).sum::<usize>(), kills);
    quiet.same_run("run", &storm.chain, "run");
    for link in &links {
        storm.chain.run(link, [""; 0]).ok().says(&["up to date"]);
    }
}
