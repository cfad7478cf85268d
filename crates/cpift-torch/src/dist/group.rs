//! The processes of a job as one group: joining, collectives, batches of an evaluation shared by
//! the ranks, texts passed through the store, leaving.

use std::cell::Cell;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::rc::Rc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tch::{Device, Kind, Tensor};

use super::c10d::{ProcessGroup, RawWork, Store, StoreAddress, exit_at_once};
use super::liveness::Liveness;
use super::place::Place;

/// Longest wait for all ranks to join.
const JOIN: Duration = Duration::from_secs(120);
/// Longest wait for a name to resolve, for rank 0 to reach its own store, and for a program that
/// has accepted a connection to answer as a store.
const ANSWER: Duration = Duration::from_secs(10);

/// The library that carries tensors between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Gloo, for tensors on the CPU.
    Gloo,
    /// NCCL, for tensors on CUDA devices. libtorch's CUDA library must be loaded.
    Nccl,
}

/// This process and the others of its job.
///
/// All ranks must call the same methods in the same order. While a group exists, a rank that dies,
/// hangs or fails ends the processes of all others within 30 s, with one `error:` line that names
/// the rank and its error, and the exit code of that error. End with [`leave`](Self::leave), or
/// with [`fail`](Self::fail) after an error; a group that is dropped without either counts as
/// failed.
pub struct Group {
    place: Place,
    timeout: Duration,
    processes: ProcessGroup,
    liveness: Liveness,
    /// Number of texts passed so far: keeps the keys of repeated calls apart.
    passed: Cell<u64>,
}

/// A collective under way. Holds its tensors, which must not be touched before
/// [`wait`](Self::wait).
#[must_use = "the output is complete after wait()"]
pub struct Work {
    raw: RawWork,
    group: Rc<Group>,
    what: &'static str,
    _tensors: [Tensor; 2],
}

impl Work {
    /// Waits until the output is complete. With NCCL, the current CUDA stream waits, not the host.
    ///
    /// # Errors
    /// If another rank has failed, or after the timeout of the group; the error names the rank.
    pub fn wait(self) -> Result<()> {
        self.raw.wait().map_err(|e| self.group.explain(self.what, &e))
    }
}

impl Group {
    /// Joins the other ranks. Waits for them at most two minutes (or `timeout`, if shorter).
    /// `timeout` bounds the wait in a collective or an exchange; ranks that die or hang are noticed
    /// sooner. From then on the process ends without running the destructors of libraries.
    ///
    /// # Errors
    /// Ranks that do not come, by number; an address that does not lead to rank 0; a port in use;
    /// two processes with one rank; for NCCL, a libtorch other than 2.11.0.
    pub fn join(backend: Backend, place: Place, timeout: Duration) -> Result<Rc<Self>> {
        let wait = timeout.min(JOIN);
        let joining = Joining { place: &place, deadline: Instant::now() + wait, wait, timeout };
        let own = || format!("rank {} of {}", place.rank, place.world);
        let device = match backend {
            Backend::Gloo => None,
            Backend::Nccl => Some(place.cuda_index(tch::Cuda::device_count().max(0) as usize)?),
        };
        exit_at_once();
        let main = joining.main_store().with_context(own)?;
        let address = joining.reach().with_context(own)?;
        let arrival = Arrival {
            host: hostname(),
            process: std::process::id(),
            world: place.world,
            own: Place::own_address(address).with_context(own)?,
            store: address.ip(),
        };
        joining.check_in(&main, &arrival).with_context(own)?;
        let liveness = Liveness::start(&place, main, joining.store("").with_context(own)?)?;
        let tell = |error: anyhow::Error| {
            liveness.own_failure(&error);
            error.context(own())
        };
        let all = match joining.wait_for_all(liveness.store()) {
            Ok(Some(all)) => all,
            Ok(None) => return Err(liveness.peer_failed("joining", &anyhow!("a rank has failed"))),
            Err(e) => return Err(tell(e)),
        };
        let names = all.iter().enumerate().map(|(r, a)| format!("rank {r} ({}, process {})", a.host, a.process));
        liveness.set_names(names.collect());
        let store = joining.store(if device.is_some() { "/nccl" } else { "/gloo" }).map_err(tell)?;
        let own_address = reachable(place.rank, &all).to_string();
        let processes = ProcessGroup::new(&store, device, &own_address, (place.rank, place.world), timeout)
            .map_err(|e| if device.is_some() { tell(e) } else { liveness.peer_failed("connecting", &e) })?;
        Ok(Rc::new(Self { place, timeout, processes, liveness, passed: Cell::new(0) }))
    }

    /// Number of this process, from 0.
    pub fn rank(&self) -> usize {
        self.place.rank
    }

    /// Number of processes.
    pub fn world(&self) -> usize {
        self.place.world
    }

    /// Number of this process on its node, from 0.
    pub fn local_rank(&self) -> usize {
        self.place.local_rank
    }

    /// Gathers the `input` of all ranks into `out`, one after another by rank.
    ///
    /// Gloo writes `out` through autograd's version counter: pass `out.data()` if a graph has saved
    /// views of it.
    ///
    /// # Errors
    /// `out` is not world times the size of `input` or has another dtype; a tensor is not
    /// contiguous; another rank has failed.
    pub fn all_gather(self: &Rc<Self>, out: &Tensor, input: &Tensor) -> Result<Work> {
        self.check(out, input, input.numel() * self.world(), out.numel())?;
        self.start("all-gather", |g| g.all_gather(out, input), [out, input])
    }

    /// Sends part r of `input` to rank r, and receives the parts for this rank into `out`, by rank.
    ///
    /// # Errors
    /// The tensors differ in size or dtype, or are not divisible by the number of ranks; a tensor
    /// is not contiguous; another rank has failed.
    pub fn all_to_all(self: &Rc<Self>, out: &Tensor, input: &Tensor) -> Result<Work> {
        self.check(out, input, input.numel(), out.numel())?;
        ensure!(
            input.size().first().is_some_and(|n| n % self.world() as i64 == 0),
            "all-to-all: the first dimension of {:?} is not divisible by {} ranks",
            input.size(),
            self.world()
        );
        self.start("all-to-all", |g| g.all_to_all(out, input), [out, input])
    }

    /// Sums the `input` of all ranks and writes part r of the sum into the `out` of rank r. The
    /// order of the sum is the backend's: a ring for Gloo.
    ///
    /// # Errors
    /// `input` is not world times the size of `out` or has another dtype; a tensor is not
    /// contiguous; another rank has failed.
    pub fn reduce_scatter(self: &Rc<Self>, out: &Tensor, input: &Tensor) -> Result<Work> {
        self.check(out, input, input.numel(), out.numel() * self.world())?;
        self.start("reduce-scatter", |g| g.reduce_scatter(out, input), [out, input])
    }

    /// Replaces `tensor` on all ranks by the sum over the ranks. The order of the sum is the
    /// backend's, and the result is the same on all ranks.
    ///
    /// # Errors
    /// The tensor is not contiguous; another rank has failed.
    pub fn all_reduce(self: &Rc<Self>, tensor: &Tensor) -> Result<()> {
        self.check(tensor, tensor, 0, 0)?;
        self.start("all-reduce", |g| g.all_reduce(tensor), [tensor, tensor])?.wait()
    }

    /// Replaces `tensor` on all ranks by that of rank `root`.
    ///
    /// # Errors
    /// The tensor is not contiguous; there is no such rank; another rank has failed.
    pub fn broadcast(self: &Rc<Self>, tensor: &Tensor, root: usize) -> Result<()> {
        ensure!(root < self.world(), "broadcast: no rank {root} among {}", self.world());
        self.check(tensor, tensor, 0, 0)?;
        self.start("broadcast", |g| g.broadcast(tensor, root), [tensor, tensor])?.wait()
    }

    /// Waits until all ranks have come here.
    ///
    /// # Errors
    /// If another rank has failed.
    pub fn barrier(&self) -> Result<()> {
        self.liveness.starts("barrier");
        let work = self.processes.barrier().map_err(|e| self.not_started("barrier", e))?;
        work.wait().map_err(|e| self.explain("barrier", &e))
    }

    /// Passes a short text of every rank to all ranks: returns the texts by rank. `what` names them
    /// in errors.
    ///
    /// # Errors
    /// If a rank does not come within the timeout of the group, or has failed.
    pub fn exchange(&self, what: &str, own: &str) -> Result<Vec<String>> {
        let key = self.key(what);
        self.set(what, &format!("{key}/{}", self.rank()), own)?;
        self.collect(what, &key, 0..self.world())
    }

    /// Passes a text of rank 0 to all ranks. `own` is `None` on the others. `what` names the text
    /// in errors.
    ///
    /// # Errors
    /// If rank 0 has no text, does not come within the timeout of the group, or has failed.
    pub fn share(&self, what: &str, own: Option<&str>) -> Result<String> {
        let key = self.key(what);
        if self.rank() == 0 {
            let own = own.ok_or_else(|| anyhow!("{what}: rank 0 has no text to share"))?;
            self.set(what, &format!("{key}/0"), own)?;
            return Ok(own.to_owned());
        }
        Ok(self.collect(what, &key, 0..1)?.swap_remove(0))
    }

    /// Checks that all ranks have the same text.
    ///
    /// # Errors
    /// On all ranks if the texts differ, with the ranks whose text is not that of rank 0; and as
    /// [`exchange`](Self::exchange).
    pub fn same(&self, what: &str, own: &str) -> Result<()> {
        let texts = self.exchange(what, own)?;
        let others: Vec<usize> = (1..texts.len()).filter(|r| texts[*r] != texts[0]).collect();
        let Some(first) = others.first() else {
            return Ok(());
        };
        bail!(
            "{what} of {} and of rank 0 are not the same\n  rank 0: {}\n  rank {first}: {}",
            ranks(&others),
            brief(&texts[0]),
            brief(&texts[*first])
        );
    }

    /// Tells the other ranks of an error of this process, so that they end with it. Does nothing if
    /// they know already, as after an error of a collective.
    pub fn fail(&self, error: &anyhow::Error) {
        if self.liveness.is_running() {
            self.liveness.own_failure(error);
            // Kernels of NCCL that wait for other ranks would block the end of this process.
            let _ = self.processes.abort();
        }
    }

    /// Waits for all ranks and leaves the group. Afterwards only the rank's numbers may be used.
    ///
    /// # Errors
    /// If another rank has failed.
    pub fn leave(&self) -> Result<()> {
        self.barrier()?;
        self.processes.shutdown().map_err(|e| self.explain("leaving", &e))?;
        self.liveness.leave();
        Ok(())
    }

    /// Checks two tensors of a collective, whose sizes must fit: `sent` elements of `input` and
    /// `received` elements of `out`.
    fn check(&self, out: &Tensor, input: &Tensor, sent: usize, received: usize) -> Result<()> {
        ensure!(out.kind() == input.kind(), "a collective from {:?} into {:?}", input.kind(), out.kind());
        ensure!(
            sent == received,
            "a collective of {} ranks from a tensor of shape {:?} into one of {:?}",
            self.world(),
            input.size(),
            out.size()
        );
        ensure!(out.is_contiguous() && input.is_contiguous(), "a collective needs contiguous tensors");
        Ok(())
    }

    fn start(
        self: &Rc<Self>,
        what: &'static str,
        start: impl FnOnce(&ProcessGroup) -> Result<RawWork>,
        tensors: [&Tensor; 2],
    ) -> Result<Work> {
        self.liveness.starts(what);
        let raw = start(&self.processes).map_err(|e| self.not_started(what, e))?;
        Ok(Work { raw, group: self.clone(), what, _tensors: tensors.map(Tensor::shallow_clone) })
    }

    /// The error for a collective that could not be started: a rank's own, unless the job has
    /// failed.
    fn not_started(&self, what: &str, error: anyhow::Error) -> anyhow::Error {
        if self.liveness.job_failed() { self.explain(what, &error) } else { error.context(what.to_owned()) }
    }

    fn explain(&self, what: &str, error: &anyhow::Error) -> anyhow::Error {
        let explained = self.liveness.peer_failed(what, error);
        let _ = self.processes.abort();
        explained
    }

    /// A key for the next text.
    fn key(&self, what: &str) -> String {
        let number = self.passed.replace(self.passed.get() + 1);
        format!("text/{number}/{what}")
    }

    fn set(&self, what: &str, key: &str, text: &str) -> Result<()> {
        self.liveness.store().set(key, text).map_err(|e| self.explain(what, &e))
    }

    /// The texts `key/R` of `of`, as soon as all are there.
    fn collect(&self, what: &str, key: &str, of: std::ops::Range<usize>) -> Result<Vec<String>> {
        let deadline = Instant::now() + self.timeout;
        let mut pause = Duration::from_millis(1);
        let mut texts = Vec::with_capacity(of.len());
        let missing = |from| ranks(&(from..of.end).collect::<Vec<_>>());
        while texts.len() < of.len() {
            let rank = of.start + texts.len();
            match self.liveness.store().get(&format!("{key}/{rank}")).map_err(|e| self.explain(what, &e))? {
                Some(text) => texts.push(text),
                None if Instant::now() >= deadline => bail!(
                    "{what}: no text from {} within {:?}\n  hint: all ranks must run the same command",
                    missing(rank),
                    self.timeout
                ),
                None => {
                    thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(20));
                }
            }
        }
        Ok(texts)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if self.liveness.is_running() {
            let how = if thread::panicking() { "panicked; its own output says why" } else { "ended before the others" };
            self.liveness.own_failure(&anyhow!(how));
        }
    }
}

/// The way of a process into its group.
struct Joining<'a> {
    place: &'a Place,
    deadline: Instant,
    /// Time from the start to the deadline.
    wait: Duration,
    timeout: Duration,
}

/// Data of a rank that joins, for the others.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Arrival {
    host: String,
    process: u32,
    world: usize,
    /// Its address on the way to the store.
    own: IpAddr,
    /// The store's address as it sees it.
    store: IpAddr,
}

impl Arrival {
    fn to_text(&self) -> String {
        let Self { host, process, world, own, store } = self;
        format!("{process}\t{world}\t{own}\t{store}\t{host}")
    }

    fn from_text(text: &str) -> Option<Self> {
        let mut parts = text.splitn(5, '\t');
        let mut next = || parts.next();
        Some(Self {
            process: next()?.parse().ok()?,
            world: next()?.parse().ok()?,
            own: next()?.parse().ok()?,
            store: next()?.parse().ok()?,
            host: next()?.to_owned(),
        })
    }
}

impl Joining<'_> {
    fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// The first connection to the store, which rank 0 also serves.
    fn main_store(&self) -> Result<Store> {
        if !self.place.serves {
            self.reach()?;
            return self.store("");
        }
        let port = self.place.port;
        self.open("127.0.0.1", "", true).map_err(|e| {
            let text = format!("{e:#}");
            if ["EADDRINUSE", "already in use"].iter().any(|sign| text.contains(sign)) {
                anyhow!(
                    "port {port} of this machine is in use, so the ranks cannot meet there\n  hint: set MASTER_PORT to a \
                     free port, the same for all ranks"
                )
            } else {
                e.context(format!("serving the store on port {port}"))
            }
        })
    }

    /// Waits until the store accepts connections. Returns the address at which it does.
    fn reach(&self) -> Result<SocketAddr> {
        let (start, serves, store) = (Instant::now(), self.place.serves, self.place.store());
        loop {
            let error = match self.place.addresses() {
                Ok(addresses) => match first_open(&addresses, self.left()) {
                    Ok(address) => return Ok(address),
                    Err(e) => anyhow!(e),
                },
                Err(e) if start.elapsed() >= ANSWER || self.left().is_zero() => {
                    bail!("{e:#}\n  hint: MASTER_ADDR must be the name or address of rank 0's machine");
                }
                Err(e) => e,
            };
            if serves && (start.elapsed() >= ANSWER || self.left().is_zero()) {
                bail!(
                    "the store that this process serves is not reached at {store}: {error:#}\n  hint: MASTER_ADDR must be \
                     the name or address of rank 0's machine"
                );
            }
            if self.left().is_zero() {
                bail!(
                    "nothing answers at {store}, where rank 0 should, within {:?}: {error:#}\n  hint: MASTER_ADDR and \
                     MASTER_PORT must name rank 0's machine and a port that is open between the nodes; does rank 0 run?",
                    self.wait
                );
            }
            thread::sleep(Duration::from_millis(200).min(self.left()));
        }
    }

    /// A connection to the store that accepts connections.
    fn store(&self, suffix: &str) -> Result<Store> {
        self.open(&self.place.host, suffix, false)
    }

    /// Opens a store in a thread of its own: a program other than a store may never answer.
    fn open(&self, host: &str, suffix: &str, serve: bool) -> Result<Store> {
        let Place { port, prefix, world, .. } = self.place;
        let at =
            StoreAddress { host: host.to_owned(), port: *port, prefix: format!("{prefix}{suffix}"), world: *world };
        let (send, receive) = mpsc::channel();
        let timeout = self.timeout;
        thread::Builder::new()
            .spawn(move || send.send(Store::open(&at, serve, ANSWER, timeout)))
            .context("starting a thread")?;
        let other = || {
            format!(
                "{} accepts connections but does not answer as rank 0's store\n  hint: another program listens there; set \
                 MASTER_PORT to a free port, the same for all ranks",
                self.place.store()
            )
        };
        match receive.recv_timeout(ANSWER + Duration::from_secs(1)) {
            Ok(Ok(store)) => Ok(store),
            Ok(Err(e)) if serve => Err(e),
            Ok(Err(e)) => Err(e.context(other())),
            Err(_) => Err(anyhow!(other())),
        }
    }

    /// Enters this process in the store.
    fn check_in(&self, store: &Store, arrival: &Arrival) -> Result<()> {
        let rank = self.place.rank;
        ensure!(
            store.count(&format!("processes/{rank}"))? == 1,
            "another process has joined at {} as rank {rank} already\n  hint: every process needs a RANK, every job a \
             MASTER_PORT of its own",
            self.place.store()
        );
        store.set(&format!("arrival/{rank}"), &arrival.to_text())
    }

    /// The data of all ranks, once all have entered; `None` if one has failed.
    fn wait_for_all(&self, store: &Store) -> Result<Option<Vec<Arrival>>> {
        let world = self.place.world;
        let mut found: Vec<Option<Arrival>> = vec![None; world];
        loop {
            for (rank, slot) in found.iter_mut().enumerate() {
                if slot.is_none()
                    && let Some(text) = store.get(&format!("arrival/{rank}"))?
                {
                    let arrival =
                        Arrival::from_text(&text).ok_or_else(|| anyhow!("rank {rank} joins with {}", brief(&text)))?;
                    ensure!(
                        arrival.world == world,
                        "rank {rank} belongs to a job of {} processes, this one to a job of {world}\n  hint: WORLD_SIZE \
                         must be the same for all ranks, and MASTER_PORT another one for every job",
                        arrival.world
                    );
                    *slot = Some(arrival);
                }
            }
            let missing: Vec<usize> = (0..world).filter(|r| found[*r].is_none()).collect();
            if missing.is_empty() {
                return Ok(Some(found.into_iter().flatten().collect()));
            }
            if store.get("failed")?.is_some() {
                return Ok(None);
            }
            if self.left().is_zero() {
                bail!(
                    "{} of {world} did not join within {:?}\n  hint: look for the end of that process in its log",
                    ranks(&missing),
                    self.wait
                );
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Connects to the first of `addresses` that accepts. Returns it, or the last error.
fn first_open(addresses: &[SocketAddr], left: Duration) -> io::Result<SocketAddr> {
    let limit = left.clamp(Duration::from_millis(100), Duration::from_secs(3));
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in addresses {
        match TcpStream::connect_timeout(address, limit) {
            Ok(_) => return Ok(*address),
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// The address at which the others reach `rank`. A rank on the store's machine may know itself by a
/// loopback address only; then the others' address of the store is its own.
fn reachable(rank: usize, all: &[Arrival]) -> IpAddr {
    let own = &all[rank];
    let seen = || all.iter().find(|a| a.host != own.host && !a.store.is_loopback()).map(|a| a.store);
    if own.own.is_loopback() { seen().unwrap_or(own.own) } else { own.own }
}

fn hostname() -> String {
    let read = || std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let name = std::env::var("SLURMD_NODENAME").ok().or_else(read).unwrap_or_default();
    name.trim().to_owned()
}

/// `rank 1` or `ranks 1, 3`.
fn ranks(list: &[usize]) -> String {
    let numbers: Vec<String> = list.iter().map(usize::to_string).collect();
    format!("rank{} {}", if list.len() == 1 { "" } else { "s" }, numbers.join(", "))
}

/// The beginning of a text for a message.
fn brief(text: &str) -> String {
    const LONGEST: usize = 200;
    let mut short: String = text.chars().take(LONGEST).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

/// Runs `each` on batches of up to `batch_size` of the indices `order` and returns its results with
/// their indices. Ranks take the batches in turn, and all return all results, which do not depend
/// on their number. `tick` is called for each index done.
///
/// # Errors
/// An error of `each`; a failed rank.
pub(crate) fn in_batches<T: Serialize + DeserializeOwned>(
    group: Option<&Rc<Group>>,
    device: Device,
    order: &[usize],
    batch_size: usize,
    mut each: impl FnMut(&[usize]) -> Result<Vec<T>>,
    mut tick: impl FnMut(),
) -> Result<Vec<(usize, T)>> {
    let (rank, world) = group.map_or((0, 1), |group| (group.rank(), group.world()));
    let chunks: Vec<&[usize]> = order.chunks(batch_size.max(1)).collect();
    let mut own = Vec::new();
    for round in chunks.chunks(world) {
        // A rank without a batch of its own runs the last one too: where the weights are shared,
        // all ranks lend the same units.
        let chunk = round[rank.min(round.len() - 1)];
        let results = each(chunk)?;
        if rank < round.len() {
            own.extend(chunk.iter().copied().zip(results));
        }
        round.iter().flat_map(|chunk| *chunk).for_each(|_| tick());
    }
    from_all(group, device, own)
}

/// Deals the indices `order` to the ranks in turn, runs `each` once on every rank's own and returns
/// the results of all ranks. `tick` is called for each index: this rank counts its own and takes
/// the others to be as fast.
///
/// # Errors
/// An error of `each`; a failed rank.
pub(crate) fn in_shares<T: Serialize + DeserializeOwned>(
    group: Option<&Rc<Group>>,
    device: Device,
    order: &[usize],
    each: impl FnOnce(&[usize], &mut dyn FnMut()) -> Result<Vec<(usize, T)>>,
    mut tick: impl FnMut(),
) -> Result<Vec<(usize, T)>> {
    let (rank, world) = group.map_or((0, 1), |group| (group.rank(), group.world()));
    let own: Vec<usize> = order.iter().skip(rank).step_by(world).copied().collect();
    let (mut done, mut ticked) = (0, 0);
    let mut one_done = || {
        done += 1;
        let all = order.len() * done / own.len();
        (ticked..all).for_each(|_| tick());
        ticked = all;
    };
    let results = each(&own, &mut one_done)?;
    from_all(group, device, results)
}

/// The results of all ranks.
fn from_all<T: Serialize + DeserializeOwned>(
    group: Option<&Rc<Group>>,
    device: Device,
    own: Vec<(usize, T)>,
) -> Result<Vec<(usize, T)>> {
    let Some(group) = group else { return Ok(own) };
    let mut all = Vec::new();
    for bytes in gather(group, device, &serde_json::to_vec(&own)?)? {
        all.extend(serde_json::from_slice::<Vec<(usize, T)>>(&bytes).context("results of another rank")?);
    }
    Ok(all)
}

/// The bytes of every rank, by rank.
fn gather(group: &Rc<Group>, device: Device, own: &[u8]) -> Result<Vec<Vec<u8>>> {
    let world = group.world() as i64;
    let sizes = Tensor::zeros([world], (Kind::Int64, device));
    group.all_gather(&sizes, &Tensor::from_slice(&[own.len() as i64]).to_device(device))?.wait()?;
    let sizes = Vec::<i64>::try_from(sizes.to_device(Device::Cpu)).context("sizes of results")?;
    let most = sizes.iter().copied().max().unwrap_or(0).max(1);
    let mut padded = own.to_vec();
    padded.resize(most as usize, 0);
    let all = Tensor::zeros([world * most], (Kind::Uint8, device));
    group.all_gather(&all, &Tensor::from_slice(&padded).to_device(device))?.wait()?;
    let all = Vec::<u8>::try_from(all.to_device(Device::Cpu)).context("results")?;
    let of = |(bytes, size): (&[u8], &i64)| bytes[..*size as usize].to_vec();
    Ok(all.chunks(most as usize).zip(&sizes).map(of).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrival(host: &str, own: &str, store: &str) -> Arrival {
        Arrival { host: host.into(), process: 7, world: 3, own: own.parse().unwrap(), store: store.parse().unwrap() }
    }

    #[test]
    fn arrivals_survive_the_store() {
        let arrival = arrival("gpu 1\t", "10.0.0.2", "fe80::1");
        assert_eq!(Arrival::from_text(&arrival.to_text()), Some(arrival));
        assert_eq!(Arrival::from_text("7\t3\tx\t10.0.0.1\tgpu"), None);
    }

    #[test]
    fn the_stores_machine_is_reached_as_the_others_see_it() {
        let near = [("a", "127.0.0.1", "127.0.1.1"), ("a", "127.0.0.1", "127.0.1.1"), ("b", "10.0.0.2", "10.0.0.1")];
        let all = near.map(|(host, own, store)| arrival(host, own, store));
        let addresses: Vec<String> = (0..3).map(|r| reachable(r, &all).to_string()).collect();
        assert_eq!(addresses, ["10.0.0.1", "10.0.0.1", "10.0.0.2"]);
        assert_eq!(reachable(0, &all[..2]).to_string(), "127.0.0.1");
    }

    #[test]
    fn lists_of_ranks_read_well() {
        assert_eq!(ranks(&[2]), "rank 2");
        assert_eq!(ranks(&[1, 3]), "ranks 1, 3");
    }
}
