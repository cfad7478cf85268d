//! The end of all ranks when one dies, hangs or fails.
//!
//! A thread per rank leaves a sign of life in the store twice a second, reads that of the next
//! rank, and looks for notes of failure. If there is one, it finds the cause, prints it and ends
//! the process, whatever collective the main thread waits in: NCCL does not notice that a rank has
//! died, Gloo notices in the neighbours only, and neither knows the reason. A second thread ends
//! the process if the store does not answer the first.
//!
//! Keys of the store: `alive/R` is a rank's sign of life, `failed` exists once any rank has failed,
//! `failed/R` is the exit code and the error of rank R, `left/R` exists once R has left in order.
//! All ranks end with the exit code of the rank that failed.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use cpift_core::error::{EXIT_FAILED, PeerFailed, exit_code};
use cpift_core::files::discard_unfinished;

use super::c10d::{Store, end_process};
use super::place::Place;

/// Time between two signs of life.
const BEAT: Duration = Duration::from_millis(500);
/// Number of beats without a sign of life after which a rank counts as gone. Beats are counted
/// rather than time measured, so that a job that is suspended as a whole survives.
const GONE: u32 = 30;
/// Number of beats that the main thread may take to report a failure it has seen.
const REPORT: u32 = 20;
/// Longest search for the cause of a failure.
const SEARCH: Duration = Duration::from_millis(1500);
/// Time that the rank with the store stays after a failure, for the others to find the cause:
/// longer than a beat and [`SEARCH`].
const LINGER: Duration = Duration::from_secs(3);
/// Longest wait of the rank with the store for the others to leave in order.
const LEAVE: Duration = Duration::from_secs(5);
/// Beginning of the note of a rank that failed because another one did.
const PEER: &str = "peer: ";
/// Words between this rank and the cause in another one.
pub(crate) const JOB_FAILED: &str = ": the job failed: ";
/// Rest of the note of such a rank if it has seen no error itself.
const TOLD: &str = "told by the store";

/// A failure that ends the processes: its text and exit code.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Failure {
    text: String,
    code: u8,
}

impl Failure {
    fn new(text: String) -> Self {
        Self { text, code: EXIT_FAILED }
    }

    fn of(error: &anyhow::Error) -> Self {
        Self { text: format!("{error:#}"), code: exit_code(error) }
    }

    /// The note in the store.
    fn to_note(&self) -> String {
        format!("{}\t{}", self.code, self.text)
    }

    fn from_note(note: &str) -> Self {
        let parts = note.split_once('\t').and_then(|(code, text)| Some((code.parse().ok()?, text.to_owned())));
        parts.map_or_else(|| Self::new(note.to_owned()), |(code, text)| Self { text, code })
    }
}

/// State of this rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum State {
    /// At work.
    Running,
    /// The main thread has told the others of a failure, and reports it.
    Failing,
    /// Left in order: what happens to the others does not matter.
    Left,
}

/// Signs of life of this rank, and what it knows of the others.
pub(super) struct Liveness {
    shared: Arc<Shared>,
    /// Connection of the main thread.
    store: Store,
}

struct Shared {
    place: Place,
    state: AtomicU8,
    /// Number of rounds in which the store has answered.
    rounds: AtomicU64,
    /// The ranks in words, once all have joined.
    names: OnceLock<Vec<String>>,
    /// Number and name of the collective started last.
    collective: Mutex<(u64, &'static str)>,
    /// The failure that the main thread reports.
    failure: Mutex<Failure>,
}

impl Liveness {
    /// Starts the threads. `store` is for the main thread, `watched` for the signs of life: an
    /// answer that does not come blocks a connection.
    pub(super) fn start(place: &Place, store: Store, watched: Store) -> Result<Self> {
        let shared = Arc::new(Shared {
            place: place.clone(),
            state: AtomicU8::new(State::Running as u8),
            rounds: AtomicU64::new(0),
            names: OnceLock::new(),
            collective: Mutex::new((0, "none yet")),
            failure: Mutex::new(Failure::new(String::new())),
        });
        let (watch, guard) = (shared.clone(), shared.clone());
        let spawn = |name: &str| thread::Builder::new().name(name.into());
        spawn("signs of life").spawn(move || watch.watch(&watched)).context("starting a thread")?;
        spawn("store guard").spawn(move || guard.guard()).context("starting a thread")?;
        Ok(Self { shared, store })
    }

    /// Store connection of the main thread.
    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    /// Sets the words for the ranks, such as `rank 2 (gpu03, process 4711)`.
    pub(super) fn set_names(&self, names: Vec<String>) {
        let _ = self.shared.names.set(names);
    }

    /// Records that a collective starts, for messages about ranks that are elsewhere.
    pub(super) fn starts(&self, what: &'static str) {
        let mut collective = lock(&self.shared.collective);
        *collective = (collective.0 + 1, what);
    }

    /// Returns true if this rank has neither failed nor left.
    pub(super) fn is_running(&self) -> bool {
        self.shared.state() == State::Running
    }

    /// Returns true if a rank is known to have failed, or the store is gone.
    pub(super) fn job_failed(&self) -> bool {
        !matches!(self.store.get("failed"), Ok(None))
    }

    /// The error to return for `error` of a collective or the store: names the rank that caused it.
    pub(super) fn peer_failed(&self, what: &str, error: &anyhow::Error) -> anyhow::Error {
        let shared = &self.shared;
        let detail = error.to_string().lines().next().unwrap_or_default().to_owned();
        if detail.contains("imed out") {
            let error = anyhow!("{what}: {detail}\n  last seen:{}", self.positions());
            self.own_failure(&error);
            return error.context(shared.own_name());
        }
        self.shared.fails(&Failure::new(format!("{what}: {detail}")));
        let cause = match self.tell(&format!("{PEER}{what}: {detail}")) {
            Ok(()) => shared.cause(&self.store),
            Err(_) => shared.store_is_gone(),
        };
        let Failure { text, code } = shared.job_failed(cause);
        let failure = Failure { text: format!("{text}\n  seen in {what}: {detail}"), code };
        shared.fails(&failure);
        self.linger();
        PeerFailed { text: failure.text, code }.into()
    }

    /// Tells the others of an error of this rank, unless it has told them of one already.
    pub(super) fn own_failure(&self, error: &anyhow::Error) {
        if self.is_running() {
            let failure = Failure::of(error);
            self.shared.fails(&failure);
            let _ = self.tell(&failure.to_note());
            self.linger();
        }
    }

    /// Leaves in order. All ranks must have come here, and need no store any more.
    pub(super) fn leave(&self) {
        let Place { rank, world, .. } = self.shared.place;
        if self.shared.place.serves {
            // The store ends with this process, so the others leave first.
            let deadline = Instant::now() + LEAVE;
            let gone = |r: usize| matches!(self.store.get(&format!("left/{r}")), Ok(Some(_)) | Err(_));
            while !(0..world).filter(|r| *r != rank).all(gone) && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(10));
            }
            self.shared.set_state(State::Left);
        } else {
            self.shared.set_state(State::Left);
            let _ = self.store.set(&format!("left/{rank}"), "yes");
        }
    }

    fn tell(&self, note: &str) -> Result<()> {
        self.store.set(&format!("failed/{}", self.shared.place.rank), note)?;
        self.store.set("failed", "yes")
    }

    fn linger(&self) {
        if self.shared.place.serves {
            thread::sleep(LINGER);
        }
    }

    /// The collective that each rank started last, and the ranks without a sign of life.
    fn positions(&self) -> String {
        let alive = || -> Vec<Option<String>> {
            let one = |r| self.store.get(&format!("alive/{r}")).ok().flatten();
            (0..self.shared.place.world).map(one).collect()
        };
        let before = alive();
        thread::sleep(3 * BEAT);
        let mut text = String::new();
        for (rank, (before, now)) in before.iter().zip(alive()).enumerate() {
            let position = match (before, now) {
                (_, None) => "never seen".to_owned(),
                (before, now) if *before == now => "no sign of life".to_owned(),
                (_, Some(now)) => now.split_once(' ').map_or(String::new(), |(_, collective)| collective.to_owned()),
            };
            text.push_str(&format!("\n  {}: {position}", self.shared.name(rank)));
        }
        text
    }
}

impl Shared {
    fn state(&self) -> State {
        match self.state.load(SeqCst) {
            s if s == State::Running as u8 => State::Running,
            s if s == State::Failing as u8 => State::Failing,
            _ => State::Left,
        }
    }

    fn set_state(&self, state: State) {
        self.state.store(state as u8, SeqCst);
    }

    /// Records the failure that the main thread is about to report.
    fn fails(&self, failure: &Failure) {
        failure.clone_into(&mut lock(&self.failure));
        self.set_state(State::Failing);
    }

    fn name(&self, rank: usize) -> String {
        self.names.get().map_or_else(|| format!("rank {rank}"), |names| names[rank].clone())
    }

    fn own_name(&self) -> String {
        format!("rank {} of {}", self.place.rank, self.place.world)
    }

    fn job_failed(&self, cause: Failure) -> Failure {
        Failure { text: format!("{}{JOB_FAILED}{}", self.own_name(), cause.text), code: cause.code }
    }

    fn store_is_gone(&self) -> Failure {
        let store = self.place.store();
        Failure::new(if self.place.agent {
            format!("torchrun's agent with the store at {store} has ended")
        } else {
            let rank = self.name(0);
            format!("{rank} ended without reporting an error, and with it the store at {store}; was it killed?")
        })
    }

    /// The thread that shows signs of life and looks for those of the others.
    fn watch(&self, store: &Store) {
        let next = (self.place.rank + 1) % self.place.world;
        let (mut last, mut unchanged) = (None, 0);
        for beat in 0u64.. {
            if self.state() == State::Left {
                return;
            }
            match self.round(store, beat, next) {
                Ok((failed, _)) if failed && self.state() == State::Running => self.end_after_failure(store),
                Ok((_, sign)) => {
                    unchanged = if sign.is_some() && sign == last { unchanged + 1 } else { 0 };
                    last = sign;
                    if unchanged >= GONE {
                        unchanged = 0;
                        let _ = report_gone(store, next);
                    }
                }
                Err(_) => {
                    // The main thread may be about to say it.
                    thread::sleep(2 * BEAT);
                    if self.state() == State::Running {
                        self.end(&self.job_failed(self.store_is_gone()));
                    }
                    return;
                }
            }
            self.rounds.fetch_add(1, SeqCst);
            thread::sleep(BEAT);
        }
    }

    /// Shows a sign of life. Returns true if a rank has failed, and the sign of life of `next`.
    fn round(&self, store: &Store, beat: u64, next: usize) -> Result<(bool, Option<String>)> {
        let (number, what) = *lock(&self.collective);
        store.set(&format!("alive/{}", self.place.rank), &format!("{beat} collective {number}: {what}"))?;
        Ok((store.get("failed")?.is_some(), store.get(&format!("alive/{next}"))?))
    }

    /// Ends the process after a note of failure, unless the main thread does.
    fn end_after_failure(&self, store: &Store) {
        let _ = store.set(&format!("failed/{}", self.place.rank), &format!("{PEER}{TOLD}"));
        let cause = self.cause(store);
        thread::sleep(BEAT);
        if self.state() == State::Running {
            self.end(&self.job_failed(cause));
        }
    }

    /// The thread that ends the process if the store or the main thread hangs.
    fn guard(&self) {
        let (mut seen, mut silent, mut failing) = (0, 0, 0);
        loop {
            thread::sleep(BEAT);
            match self.state() {
                State::Left => return,
                State::Failing => {
                    failing += 1;
                    if failing >= REPORT {
                        self.end(&lock(&self.failure).clone());
                    }
                }
                State::Running => {}
            }
            let rounds = self.rounds.load(SeqCst);
            silent = if rounds == seen { silent + 1 } else { 0 };
            seen = rounds;
            if silent >= GONE {
                let holder = if self.place.agent { "torchrun's agent".to_owned() } else { self.name(0) };
                let (store, time) = (self.place.store(), BEAT * GONE);
                self.end(&self.job_failed(Failure::new(format!(
                    "the store at {store} has not answered for {time:?}: {holder} hangs or is stopped, or its node is \
                     unreachable"
                ))));
            }
        }
    }

    /// The cause of a failure: the errors of ranks that have reported one, else the ranks that do
    /// not answer.
    fn cause(&self, store: &Store) -> Failure {
        let Place { rank, world, .. } = self.place;
        let start = Instant::now();
        let mut silent: Vec<usize> = (0..world).filter(|r| *r != rank).collect();
        let mut errors: Vec<(usize, Failure)> = Vec::new();
        let mut seen_by: Vec<(usize, String)> = Vec::new();
        let mut gone = false;
        while !gone && !silent.is_empty() {
            silent.retain(|r| match store.get(&format!("failed/{r}")) {
                Ok(Some(note)) => {
                    match note.strip_prefix(PEER) {
                        None => errors.push((*r, Failure::from_note(&note))),
                        Some(seen) if seen != TOLD => seen_by.push((*r, seen.to_owned())),
                        Some(_) => {}
                    }
                    false
                }
                Ok(None) => true,
                Err(_) => {
                    gone = true;
                    true
                }
            });
            // One error explains the job's end; others that come at once are shown too.
            if start.elapsed() > if errors.is_empty() { SEARCH } else { BEAT } {
                break;
            }
            thread::sleep(Duration::from_millis(50));
        }
        errors.sort_by_key(|(rank, _)| *rank);
        // The first error in full, of the others one line each.
        let text = |(i, (rank, Failure { text, .. })): (usize, &(usize, Failure))| {
            let text = if i == 0 { text } else { text.lines().next().unwrap_or_default() };
            format!("{}: {text}", self.name(*rank))
        };
        let texts: Vec<String> = errors.iter().enumerate().map(text).collect();
        let names: Vec<String> = silent.iter().map(|r| self.name(*r)).collect();
        match (texts.is_empty(), gone, names.is_empty()) {
            (false, ..) => Failure { text: texts.join("\n  "), code: errors[0].1.code },
            (true, true, _) => self.store_is_gone(),
            (true, false, false) => {
                let names = names.join(" and ");
                Failure::new(format!(
                    "{names} ended without reporting an error; killed, out of memory, or node unreachable?"
                ))
            }
            (true, false, true) => {
                let seen = seen_by.iter().map(|(r, seen)| format!("\n  {} has seen: {seen}", self.name(*r)));
                let seen: String = seen.collect();
                Failure::new(format!("a collective failed in ranks that are all alive{seen}"))
            }
        }
    }

    /// Prints a failure as the programs print an error, removes unfinished outputs and ends the
    /// process.
    fn end(&self, failure: &Failure) -> ! {
        static ENDING: AtomicBool = AtomicBool::new(false);
        if ENDING.swap(true, SeqCst) {
            loop {
                thread::park();
            }
        }
        eprintln!("error: {}", failure.text);
        if self.place.serves {
            thread::sleep(LINGER);
        }
        let code = i32::from(failure.code);
        discard_unfinished(|| end_process(code));
        end_process(code)
    }
}

/// Reports that `rank` shows no sign of life, unless it has left or has failed by itself.
fn report_gone(store: &Store, rank: usize) -> Result<()> {
    let note = format!("failed/{rank}");
    if store.get(&format!("left/{rank}"))?.is_none() && store.get(&note)?.is_none() {
        let time = BEAT * GONE;
        let failure = Failure::new(format!(
            "no sign of life for {time:?}: the process hangs or is stopped, or its node is unreachable"
        ));
        store.set(&note, &failure.to_note())?;
        store.set("failed", "yes")?;
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_has_the_exit_code_and_the_error() {
        let bad: anyhow::Error = cpift_core::BadInput::new("rows.jsonl", "broken\tline 3").into();
        let failure = Failure::from_note(&Failure::of(&bad.context("rank 1")).to_note());
        assert_eq!((failure.text.as_str(), failure.code), ("rank 1: rows.jsonl: broken\tline 3", 3));
        assert_eq!(Failure::from_note("no code\tat all"), Failure::new("no code\tat all".into()));
    }
}
