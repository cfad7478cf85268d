//! Jobs of several processes over Gloo on loopback: the values of all collectives, texts passed
//! through the store, and the end of all ranks when one fails, dies, hangs or never comes.
//!
//! The test binary starts itself: each rank is a process that runs [`rank`] alone.

use std::env;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use cpift_torch::dist::{Backend, Group, Place};
use tch::{Device, Kind, Tensor};

/// Variable with the part that a rank plays.
const PART: &str = "CPIFT_TEST_PART";
/// Variable with the timeout of the group in seconds.
const TIMEOUT: &str = "CPIFT_TEST_TIMEOUT";
/// All other ranks end within this time after one has failed.
const BOUND: Duration = Duration::from_secs(30);

// The side of the ranks.

/// Not a test by itself: a rank of a job that another test starts.
#[test]
fn rank() {
    let Ok(part) = env::var(PART) else { return };
    let code = match run(&part) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("error: {error:#}");
            3
        }
    };
    std::process::exit(code);
}

fn run(part: &str) -> Result<()> {
    let place = Place::from_env()?.context("no place in a job")?;
    let timeout = env::var(TIMEOUT).map_or(Ok(600), |t| t.parse())?;
    let group = Group::join(Backend::Gloo, place, Duration::from_secs(timeout))?;
    println!("ready");
    let done = play(part, &group);
    if let Err(error) = &done {
        group.fail(error);
    }
    done
}

fn play(part: &str, group: &Rc<Group>) -> Result<()> {
    let rank = group.rank();
    match part {
        "collectives" => {
            for kind in [Kind::Float, Kind::BFloat16, Kind::Double] {
                collectives(group, kind).with_context(|| format!("{kind:?}"))?;
            }
            group.leave()
        }
        "texts" => {
            texts(group)?;
            group.leave()
        }
        "misuse" => {
            misuse(group)?;
            group.leave()
        }
        "differ" => group.same("arguments", if rank == 1 { "--lr 2" } else { "--lr 1" }),
        // Collectives until something happens.
        "work" => loop {
            group.all_reduce(&Tensor::ones([1000], (Kind::Float, Device::Cpu)))?;
            thread::sleep(Duration::from_millis(5));
        },
        // One collective that rank 1 never joins.
        "absent" => {
            if rank == 1 {
                thread::sleep(Duration::from_secs(100));
            }
            group.all_reduce(&Tensor::ones([10], (Kind::Float, Device::Cpu)))
        }
        // Work without the others.
        "alone" => {
            thread::sleep(Duration::from_secs(100));
            Ok(())
        }
        "wait for a text" => {
            if rank == 1 {
                thread::sleep(Duration::from_secs(100));
            }
            group.exchange("digests", "x").map(drop)
        }
        "some work" => {
            for _ in 0..60 {
                group.all_reduce(&Tensor::ones([1000], (Kind::Float, Device::Cpu)))?;
                thread::sleep(Duration::from_millis(100));
            }
            group.leave()
        }
        "drop" if rank == 1 => Ok(()),
        "panic" if rank == 1 => panic!("tensors do not match"),
        "drop" | "panic" => group.barrier(),
        other => {
            // `fail R`: rank R fails while the others work.
            if other == format!("fail {rank}") {
                thread::sleep(Duration::from_millis(700));
                return Err(anyhow!("no space left on device").context("writing step-3"));
            }
            play("work", group)
        }
    }
}

/// The elements of a tensor.
fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_kind(Kind::Double).flatten(0, -1).try_into().unwrap()
}

/// Checks all collectives against values computed from the ranks.
fn collectives(group: &Rc<Group>, kind: Kind) -> Result<()> {
    const N: usize = 65;
    let (rank, world) = (group.rank(), group.world());
    // Small integers, which bf16 and all sums represent exactly.
    let value = |rank: usize, part: usize, i: usize| (7 * rank + 3 * part + i % 11) as f64;
    let tensor = |data: Vec<f64>| Tensor::from_slice(&data).to_kind(kind);
    let own = |part: usize| (0..N).map(move |i| value(rank, part, i));
    let empty = |n: usize| Tensor::full([n as i64], -1, (kind, Device::Cpu));
    let all_parts = || tensor((0..world).flat_map(own).collect());

    let (first, second) = (empty(world * N), empty(world * N));
    let works =
        [group.all_gather(&first, &tensor(own(0).collect()))?, group.all_gather(&second, &tensor(own(1).collect()))?];
    for work in works {
        work.wait()?;
    }
    for (part, gathered) in [first, second].iter().enumerate() {
        let expected: Vec<f64> = (0..world).flat_map(|r| (0..N).map(move |i| value(r, part, i))).collect();
        ensure!(values(gathered) == expected, "all-gather");
    }

    let received = empty(world * N);
    group.all_to_all(&received, &all_parts())?.wait()?;
    let expected: Vec<f64> = (0..world).flat_map(|r| (0..N).map(move |i| value(r, rank, i))).collect();
    ensure!(values(&received) == expected, "all-to-all");

    let reduced = empty(N);
    group.reduce_scatter(&reduced, &all_parts())?.wait()?;
    let sum = |part: usize, i: usize| (0..world).map(|r| value(r, part, i)).sum::<f64>();
    ensure!(values(&reduced) == (0..N).map(|i| sum(rank, i)).collect::<Vec<_>>(), "reduce-scatter");

    let total = tensor(own(2).collect());
    group.all_reduce(&total)?;
    ensure!(values(&total) == (0..N).map(|i| sum(2, i)).collect::<Vec<_>>(), "all-reduce");

    let root = world - 1;
    let sent = tensor(own(0).collect());
    group.broadcast(&sent, root)?;
    ensure!(values(&sent) == (0..N).map(|i| value(root, 0, i)).collect::<Vec<_>>(), "broadcast");
    group.barrier()
}

fn texts(group: &Rc<Group>) -> Result<()> {
    let (rank, world) = (group.rank(), group.world());
    // Repeated calls of one name, with ranks that come late.
    for round in 0..5 {
        thread::sleep(Duration::from_millis(20 * rank as u64));
        let text = |r: usize| format!("{round}: größer\n{r}\0");
        let expected: Vec<String> = (0..world).map(text).collect();
        ensure!(group.exchange("names", &text(rank))? == expected);
    }
    let long = "x".repeat(100_000);
    ensure!(group.exchange("long", &long)?.iter().all(|t| *t == long));
    ensure!(group.exchange("empty", "")?.iter().all(String::is_empty));
    for round in 0..3 {
        let own = (rank == 0).then(|| format!("step-{round}"));
        ensure!(group.share("step", own.as_deref())? == format!("step-{round}"));
    }
    group.same("digest", "abc")?;
    let differ = group.same("digest", if rank % 2 == 1 { "other" } else { "abc" }).unwrap_err().to_string();
    let odd = if world > 3 { "ranks 1, 3" } else { "rank 1" };
    ensure!(differ.contains(&format!("digest of {odd} and of rank 0 are not the same")), "{differ}");
    ensure!(differ.contains("rank 0: abc") && differ.contains("rank 1: other"), "{differ}");
    Ok(())
}

/// Errors of the caller are returned before anything is sent, so the group goes on.
fn misuse(group: &Rc<Group>) -> Result<()> {
    let tensor = |n: i64, kind: Kind| Tensor::zeros([n], (kind, Device::Cpu));
    let (two, three) = (tensor(2, Kind::Float), tensor(3, Kind::Float));
    for (what, found) in [
        ("shape", group.all_gather(&three, &two).map(drop)),
        ("shape", group.reduce_scatter(&three, &two).map(drop)),
        ("shape", group.all_to_all(&three, &two).map(drop)),
        ("divisible", group.all_to_all(&tensor(3, Kind::Float), &three).map(drop)),
        ("from Float into Double", group.all_gather(&tensor(4, Kind::Double), &two).map(drop)),
        ("contiguous", group.all_reduce(&Tensor::zeros([2, 3], (Kind::Float, Device::Cpu)).transpose(0, 1))),
        ("no rank 2 among 2", group.broadcast(&two, 2)),
    ] {
        let error = format!("{:#}", found.err().with_context(|| format!("{what}: no error"))?);
        ensure!(error.contains(what), "{what}: {error}");
    }
    group.all_reduce(&two)
}

// The side of the tests.

/// A job on loopback.
struct Job {
    ranks: Vec<Process>,
    start: Instant,
}

struct Process {
    child: Child,
    stdout: Option<BufReader<std::process::ChildStdout>>,
    stderr: Option<JoinHandle<String>>,
}

/// The end of a rank.
#[derive(Debug)]
struct End {
    /// Exit code, if no signal has killed it.
    code: Option<i32>,
    stderr: String,
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Job {
    /// Starts a process for each of `ranks`, with torchrun's variables and `vars` on top.
    fn start(part: &str, world: usize, ranks: impl IntoIterator<Item = usize>, vars: &[(&str, &str)]) -> Self {
        let port = free_port().to_string();
        let one = |rank: usize| {
            let mut command = Command::new(env::current_exe().unwrap());
            command.args(["dist::rank", "--exact", "--nocapture", "--test-threads=1"]);
            for (name, _) in env::vars().filter(|(n, _)| n.starts_with("SLURM") || n.starts_with("TORCHELASTIC")) {
                command.env_remove(name);
            }
            command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
            command.env("WORLD_SIZE", world.to_string()).env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", &port);
            command.env("OMP_NUM_THREADS", "1").env(PART, part).envs(vars.iter().copied());
            Process::spawn(command)
        };
        Self { start: Instant::now(), ranks: ranks.into_iter().map(one).collect() }
    }

    /// Waits until all have joined, and starts the clock then.
    fn ready(mut self) -> Self {
        for process in &mut self.ranks {
            process.ready();
        }
        self.start = Instant::now();
        self
    }

    fn signal(&self, rank: usize, name: &str) {
        let pid = self.ranks[rank].child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    /// Waits for the ends of all ranks but `except`, which is then killed.
    fn ends(mut self, except: Option<usize>) -> Vec<End> {
        let deadline = self.start + BOUND;
        let mut codes = vec![None; self.ranks.len()];
        for (rank, process) in self.ranks.iter_mut().enumerate().filter(|(r, _)| Some(*r) != except) {
            codes[rank] = process.wait(deadline);
        }
        let late: Vec<usize> = (0..codes.len()).filter(|r| codes[*r].is_none() && Some(*r) != except).collect();
        let ends: Vec<End> = self
            .ranks
            .iter_mut()
            .zip(&codes)
            .map(|(process, code)| End { code: code.flatten(), stderr: process.end() })
            .collect();
        assert!(late.is_empty(), "ranks {late:?} have not ended within {BOUND:?}: {ends:#?}");
        ends
    }
}

impl Process {
    fn spawn(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = child.stderr.take().unwrap();
        let read = thread::spawn(move || {
            let mut text = String::new();
            stderr.read_to_string(&mut text).unwrap();
            text
        });
        Self { stdout: child.stdout.take().map(BufReader::new), child, stderr: Some(read) }
    }

    fn ready(&mut self) {
        let stdout = self.stdout.as_mut().unwrap();
        let mut line = String::new();
        while !line.contains("ready") {
            line.clear();
            assert!(stdout.read_line(&mut line).unwrap() > 0, "ended before it joined: {}", self.end());
        }
    }

    /// The exit code (`None` inside if killed by a signal), or `None` at the deadline.
    fn wait(&mut self, deadline: Instant) -> Option<Option<i32>> {
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Some(status.code());
            }
            if Instant::now() > deadline {
                return None;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills the process if it still runs, and returns what it has printed on stderr.
    fn end(&mut self) -> String {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.stderr.take().unwrap().join().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl End {
    /// Asserts an exit code and parts of the one error line.
    fn failed(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:#?}");
        assert_eq!(self.stderr.matches("error: ").count(), 1, "{self:#?}");
        for word in words {
            assert!(self.stderr.contains(word), "no {word:?} in {self:#?}");
        }
    }
}

/// Runs a part to its end in order.
fn completes(part: &str, world: usize) {
    for (rank, end) in Job::start(part, world, 0..world, &[]).ends(None).iter().enumerate() {
        assert_eq!((end.code, end.stderr.as_str()), (Some(0), ""), "rank {rank} of {world}");
    }
}

#[test]
fn collectives_give_the_values_of_their_ranks() {
    for world in [2, 3, 4] {
        completes("collectives", world);
    }
}

#[test]
fn texts_reach_all_ranks() {
    for world in [2, 3, 4] {
        completes("texts", world);
    }
}

#[test]
fn misuse_is_an_error_of_the_caller() {
    completes("misuse", 2);
}

#[test]
fn different_arguments_end_all_with_one_error_each() {
    for end in Job::start("differ", 3, 0..3, &[]).ends(None) {
        end.failed(3, &["arguments of rank 1 and of rank 0 are not the same", "--lr 1", "--lr 2"]);
    }
}

#[test]
fn an_error_of_one_rank_ends_all_and_is_named() {
    for failing in [0, 2] {
        let ends = Job::start(&format!("fail {failing}"), 4, 0..4, &[]).ready().ends(None);
        for (rank, end) in ends.iter().enumerate() {
            if rank == failing {
                end.failed(3, &["writing step-3: no space left on device"]);
            } else {
                let code = end.code.unwrap();
                assert!(code == 1 || code == 3, "{end:#?}");
                let own = format!("rank {rank} of 4: the job failed: rank {failing} (");
                end.failed(code, &[&own, "writing step-3: no space left on device"]);
            }
        }
    }
}

/// Sends a signal to a rank of a job in `part` and asserts the ends of all others.
fn signalled(part: &str, signal: &str, victim: usize, words: &[&str]) {
    let job = Job::start(part, 3, 0..3, &[]).ready();
    thread::sleep(Duration::from_millis(700));
    job.signal(victim, signal);
    for (rank, end) in job.ends(Some(victim)).iter().enumerate().filter(|(r, _)| *r != victim) {
        let code = end.code.unwrap_or_else(|| panic!("{end:#?}"));
        assert!(code == 1 || code == 3, "{end:#?}");
        end.failed(code, &[&format!("rank {rank} of 3: the job failed: "), &format!("rank {victim} (")]);
        end.failed(code, words);
    }
}

#[test]
fn a_killed_rank_is_named_in_and_out_of_collectives() {
    for part in ["work", "alone", "wait for a text"] {
        for victim in [0, 1] {
            let words =
                if victim == 0 || part == "work" { "ended without reporting an error" } else { "no sign of life" };
            signalled(part, "KILL", victim, &[words]);
        }
    }
}

#[test]
fn a_stopped_rank_is_named() {
    signalled("work", "STOP", 1, &["no sign of life for 15s"]);
}

#[test]
fn a_stopped_rank_with_the_store_is_named() {
    signalled("work", "STOP", 0, &["has not answered for 15s"]);
}

#[test]
fn a_job_that_is_suspended_as_a_whole_goes_on() {
    let job = Job::start("some work", 3, 0..3, &[]).ready();
    thread::sleep(Duration::from_millis(700));
    (0..3).for_each(|rank| job.signal(rank, "STOP"));
    thread::sleep(Duration::from_secs(18));
    (0..3).for_each(|rank| job.signal(rank, "CONT"));
    let job = Job { start: Instant::now(), ..job };
    for end in job.ends(None) {
        assert_eq!((end.code, end.stderr.as_str()), (Some(0), ""));
    }
}

#[test]
fn a_rank_that_leaves_early_or_panics_ends_all() {
    let ends = Job::start("drop", 3, 0..3, &[]).ends(None);
    assert_eq!(ends[1].code, Some(0), "{ends:#?}");
    let others = |ends: &[End], words: &str| {
        for end in [&ends[0], &ends[2]] {
            let code = end.code.unwrap();
            assert!(code == 1 || code == 3, "{end:#?}");
            end.failed(code, &["the job failed: rank 1 (", words]);
        }
    };
    others(&ends, "ended before the others");
    let ends = Job::start("panic", 3, 0..3, &[]).ends(None);
    assert!(ends[1].stderr.contains("tensors do not match"), "{ends:#?}");
    others(&ends, "panicked");
}

#[test]
fn a_collective_that_a_rank_never_joins_ends_at_the_timeout() {
    let ends = Job::start("absent", 3, 0..3, &[(TIMEOUT, "8")]).ends(None);
    for end in [&ends[0], &ends[2]] {
        let code = end.code.unwrap();
        assert!(end.stderr.contains("imed out"), "{end:#?}");
        assert!(end.stderr.contains("): collective 0: none yet"), "{end:#?}");
        assert!(code == 1 || code == 3, "{end:#?}");
    }
    ends[1].failed(1, &["rank 1 of 3: the job failed: rank "]);
    let ends = Job::start("wait for a text", 3, 0..3, &[(TIMEOUT, "8")]).ends(None);
    assert!(ends[0].stderr.contains("digests: no text from ranks 1, 2 within 8s"), "{ends:#?}");
}

#[test]
fn a_rank_that_never_comes_is_named() {
    for (ranks, missing) in
        [(vec![0, 1], "rank 2 of 3 did not join within 5s"), (vec![0], "ranks 1, 2 of 3 did not join")]
    {
        for end in Job::start("work", 3, ranks.clone(), &[(TIMEOUT, "5")]).ends(None) {
            let code = end.code.unwrap();
            end.failed(code, &[missing, "hint: "]);
        }
    }
    for end in Job::start("work", 3, [1, 2], &[(TIMEOUT, "5")]).ends(None) {
        end.failed(3, &["nothing answers at 127.0.0.1:", "within 5s", "does rank 0 run?"]);
    }
}

#[test]
fn a_port_in_use_is_named() {
    let taken = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let ends = Job::start("work", 2, 0..2, &[("MASTER_PORT", &port), (TIMEOUT, "15")]).ends(None);
    ends[0].failed(3, &[&format!("port {port} of this machine is in use"), "hint: set MASTER_PORT"]);
    ends[1].failed(3, &["does not answer as rank 0's store", "hint: another program listens there"]);
}

#[test]
fn a_wrong_address_is_named() {
    for (host, words) in [
        ("no-such-host.invalid", ["MASTER_ADDR=no-such-host.invalid does not resolve"; 2]),
        ("192.0.2.1", ["this process serves is not reached at 192.0.2.1:", "nothing answers at 192.0.2.1:"]),
    ] {
        let ends = Job::start("work", 2, 0..2, &[("MASTER_ADDR", host), (TIMEOUT, "5")]).ends(None);
        for (end, words) in ends.iter().zip(words) {
            end.failed(3, &[words, "hint: MASTER_ADDR"]);
        }
    }
}

#[test]
fn a_rank_that_is_there_twice_is_refused() {
    let port = free_port().to_string();
    let vars: [(&str, &str); 1] = [("MASTER_PORT", &port)];
    let first = Job::start("work", 2, 0..2, &vars).ready();
    for end in Job::start("work", 2, [1], &vars).ends(None) {
        end.failed(
            3,
            &["another process has joined at 127.0.0.1:", "as rank 1 already", "hint: every process needs a RANK"],
        );
    }
    // The job is not disturbed.
    thread::sleep(Duration::from_secs(1));
    for mut process in first.ranks {
        assert_eq!(process.wait(Instant::now()), None);
    }
}

#[test]
fn ranks_of_jobs_of_different_sizes_do_not_join() {
    let port = free_port().to_string();
    let small = Job::start("work", 2, [0], &[("MASTER_PORT", &port), (TIMEOUT, "10")]);
    let large = Job::start("work", 3, [1], &[("MASTER_PORT", &port), (TIMEOUT, "10")]);
    for end in small.ends(None).iter().chain(&large.ends(None)) {
        end.failed(end.code.unwrap(), &["belongs to a job of", "hint: WORLD_SIZE must be the same"]);
    }
}
