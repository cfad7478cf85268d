//! The place of this process in a job of several, as torchrun or Slurm states it in the
//! environment.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};

use anyhow::{Context, Result, anyhow, bail, ensure};

/// Rank of this process, number of processes, and the store in which they find each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Number of this process in the job, from 0.
    pub rank: usize,
    /// Number of processes of the job, at least 2.
    pub world: usize,
    /// Number of this process on its node, from 0.
    pub local_rank: usize,
    /// Name or address of the machine with the store.
    pub(super) host: String,
    pub(super) port: u16,
    /// True if this process serves the store: rank 0, unless torchrun's agent does.
    pub(super) serves: bool,
    /// True if torchrun's agent serves the store.
    pub(super) agent: bool,
    /// Beginning of all keys: keeps jobs, and restarts of a job, apart.
    pub(super) prefix: String,
}

/// Looks up an environment variable.
type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

impl Place {
    /// Reads the variables of torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT and
    /// those of its agent's store), or else those of a Slurm step. Returns `None` for a job of one
    /// process. A Slurm batch script is one process, whatever its `--ntasks`: only `srun` starts
    /// several. MASTER_ADDR and MASTER_PORT are optional under Slurm.
    ///
    /// # Errors
    /// A variable that is missing, no number, or out of range.
    pub fn from_env() -> Result<Option<Self>> {
        Self::from_lookup(&|name| std::env::var(name).ok())
    }

    /// Index of this process's CUDA device among the `visible` ones: the local rank, or 0 if Slurm
    /// shows each process a device of its own.
    ///
    /// # Errors
    /// If fewer devices are visible than processes run on the node.
    pub fn cuda_index(&self, visible: usize) -> Result<usize> {
        match (self.local_rank, visible) {
            (_, 1) => Ok(0),
            (local, visible) if local < visible => Ok(local),
            (local, visible) => bail!(
                "rank {} has local rank {local}, but {visible} CUDA devices are visible\n  hint: start one process per \
                 device of a node",
                self.rank
            ),
        }
    }

    fn from_lookup(lookup: Lookup<'_>) -> Result<Option<Self>> {
        let vars = Vars(lookup);
        let given = |name| vars.text(name).is_some();
        if given("RANK") || given("WORLD_SIZE") { Self::from_torchrun(&vars) } else { Self::from_slurm(&vars) }
    }

    fn from_torchrun(vars: &Vars<'_>) -> Result<Option<Self>> {
        let (rank, world) = (vars.number("RANK", "WORLD_SIZE")?, vars.number("WORLD_SIZE", "RANK")?);
        check_rank(("RANK", rank), ("WORLD_SIZE", world))?;
        if world == 1 {
            return Ok(None);
        }
        let agent = vars.text("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|v| v.eq_ignore_ascii_case("true"));
        let run = vars.text("TORCHELASTIC_RUN_ID").unwrap_or_default();
        let restart = vars.text("TORCHELASTIC_RESTART_COUNT").unwrap_or("0".into());
        Ok(Some(Self {
            rank,
            world,
            local_rank: vars.number("LOCAL_RANK", "RANK")?,
            host: vars.required("MASTER_ADDR", "RANK")?,
            port: vars.port()?.ok_or_else(|| missing("MASTER_PORT", "RANK"))?,
            serves: rank == 0 && !agent,
            agent,
            prefix: format!("cpift/{run}/{restart}"),
        }))
    }

    /// Of a Slurm step. Batch scripts have SLURM_PROCID and, with `--ntasks`, SLURM_NTASKS, but no
    /// SLURM_STEP_ID; the shell of an interactive `salloc` has both, and one task.
    fn from_slurm(vars: &Vars<'_>) -> Result<Option<Self>> {
        const STEP: &str = "SLURM_STEP_ID";
        let Some((_, nodes)) = vars.text(STEP).zip(vars.text("SLURM_STEP_NODELIST")) else {
            return Ok(None);
        };
        // SLURM_NTASKS of an interactive step is that of its job.
        let tasks = if vars.text("SLURM_STEP_NUM_TASKS").is_some() { "SLURM_STEP_NUM_TASKS" } else { "SLURM_NTASKS" };
        if vars.text(tasks).is_none() {
            return Ok(None);
        }
        let world = vars.number(tasks, STEP)?;
        if world == 1 {
            return Ok(None);
        }
        let rank = vars.number("SLURM_PROCID", STEP)?;
        check_rank(("SLURM_PROCID", rank), (tasks, world))?;
        let (job, step) = (vars.number("SLURM_JOB_ID", STEP)?, vars.number(STEP, "SLURM_JOB_ID")?);
        let one_node = vars.text("SLURM_STEP_NUM_NODES").is_some_and(|n| n == "1");
        let host = match vars.text("MASTER_ADDR") {
            Some(host) => host,
            // A node's name may not resolve on the node itself.
            None if one_node => "127.0.0.1".into(),
            None => first_node(&nodes).ok_or_else(|| anyhow!("SLURM_STEP_NODELIST={nodes} is not a list of nodes"))?,
        };
        let restart = vars.text("SLURM_RESTART_COUNT").unwrap_or("0".into());
        Ok(Some(Self {
            rank,
            world,
            local_rank: vars.number("SLURM_LOCALID", STEP)?,
            host,
            port: vars.port()?.unwrap_or_else(|| port_of(job as u64, step as u64)),
            serves: rank == 0,
            agent: false,
            prefix: format!("cpift/{job}.{step}/{restart}"),
        }))
    }

    /// Addresses of the store.
    ///
    /// # Errors
    /// If the name does not resolve.
    pub(super) fn addresses(&self) -> Result<Vec<SocketAddr>> {
        let found = (self.host.as_str(), self.port)
            .to_socket_addrs()
            .with_context(|| format!("MASTER_ADDR={} does not resolve", self.host))?;
        Ok(found.collect())
    }

    /// Address of this machine on the way to `store`. The machine's own name may mean 127.0.1.1.
    pub(super) fn own_address(store: SocketAddr) -> Result<IpAddr> {
        let any: IpAddr = if store.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() };
        let socket = UdpSocket::bind((any, 0)).context("no UDP socket")?;
        socket.connect(store).with_context(|| format!("no route to {store}"))?;
        Ok(socket.local_addr().context("no own address")?.ip())
    }

    /// The store in words: `host:port`.
    pub(super) fn store(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }
}

/// Environment variables; an empty one counts as not set.
struct Vars<'a>(Lookup<'a>);

impl Vars<'_> {
    fn text(&self, name: &str) -> Option<String> {
        (self.0)(name).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty())
    }

    /// A variable that is needed because `because` is set.
    fn required(&self, name: &str, because: &str) -> Result<String> {
        self.text(name).ok_or_else(|| missing(name, because))
    }

    fn number(&self, name: &str, because: &str) -> Result<usize> {
        let text = self.required(name, because)?;
        text.parse().map_err(|_| anyhow!("{name}={text} is not a number"))
    }

    fn port(&self) -> Result<Option<u16>> {
        let Some(text) = self.text("MASTER_PORT") else {
            return Ok(None);
        };
        match text.parse() {
            Ok(port) if port > 0 => Ok(Some(port)),
            _ => bail!("MASTER_PORT={text} is not a port, 1 to 65535"),
        }
    }
}

fn missing(name: &str, because: &str) -> anyhow::Error {
    anyhow!(
        "{because} is set, but {name} is not\n  hint: torchrun and srun set all variables; unset RANK and WORLD_SIZE \
         to run one process"
    )
}

fn check_rank((rank_name, rank): (&str, usize), (world_name, world): (&str, usize)) -> Result<()> {
    ensure!(rank < world, "{rank_name}={rank} is not below {world_name}={world}");
    ensure!(i32::try_from(world).is_ok(), "{world_name}={world} is too large");
    Ok(())
}

/// A port that all tasks of a step compute, below the range from which Linux takes ports of
/// outgoing connections (32768).
fn port_of(job: u64, step: u64) -> u16 {
    const RANGE: u64 = 20_000;
    // Both multipliers are coprime to the range: neighbouring jobs and steps get different ports.
    (12_000 + (job.wrapping_mul(37) + step.wrapping_mul(7_919)) % RANGE) as u16
}

/// First node of a list of Slurm, such as `gpu[03-04,7],login`.
fn first_node(list: &str) -> Option<String> {
    let (mut name, mut rest) = (String::new(), list);
    while let Some(at) = rest.find([',', '[']) {
        name.push_str(&rest[..at]);
        if rest[at..].starts_with(',') {
            return Some(name).filter(|n| !n.is_empty());
        }
        let (inside, after) = rest[at + 1..].split_once(']')?;
        let first = inside.split([',', '-']).next().filter(|f| !f.is_empty())?;
        name.push_str(first);
        rest = after;
    }
    name.push_str(rest);
    Some(name).filter(|n| !n.is_empty() && !n.contains(']'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TORCHRUN: &str = "RANK=1 WORLD_SIZE=4 LOCAL_RANK=1 MASTER_ADDR=gpu1 MASTER_PORT=29500";
    const STEP: &str = "SLURM_JOB_ID=77 SLURM_STEP_ID=3 SLURM_STEP_NODELIST=gpu[01-02] SLURM_STEP_NUM_NODES=2 \
                        SLURM_NTASKS=8 SLURM_STEP_NUM_TASKS=8 SLURM_PROCID=5 SLURM_LOCALID=1";

    /// The place by variables `NAME=VALUE …`, of which later ones replace earlier ones.
    fn read(vars: &[&str]) -> Result<Option<Place>> {
        let list = vars.join(" ");
        Place::from_lookup(&|name| {
            let mut found = list.split_whitespace().filter_map(|v| v.split_once('='));
            found.rfind(|(n, _)| *n == name).map(|(_, v)| v.to_owned())
        })
    }

    fn place(vars: &[&str]) -> Place {
        read(vars).unwrap().expect("several processes")
    }

    fn error(vars: &[&str]) -> String {
        format!("{:#}", read(vars).unwrap_err())
    }

    #[test]
    fn torchrun_states_all() {
        let place = place(&[TORCHRUN]);
        assert_eq!((place.rank, place.world, place.local_rank), (1, 4, 1));
        assert_eq!((place.store().as_str(), place.serves, place.agent), ("gpu1:29500", false, false));
    }

    #[test]
    fn rank_0_serves_the_store_unless_the_agent_does() {
        assert!(place(&[TORCHRUN, "RANK=0"]).serves);
        let under_agent = place(&[TORCHRUN, "RANK=0 TORCHELASTIC_USE_AGENT_STORE=True"]);
        assert!(!under_agent.serves && under_agent.agent);
        assert!(place(&[TORCHRUN, "RANK=0 TORCHELASTIC_USE_AGENT_STORE=False"]).serves);
    }

    #[test]
    fn restarts_and_runs_have_keys_of_their_own() {
        let prefixes =
            ["", "TORCHELASTIC_RESTART_COUNT=1", "TORCHELASTIC_RUN_ID=x"].map(|v| place(&[TORCHRUN, v]).prefix);
        assert!(prefixes[0] != prefixes[1] && prefixes[0] != prefixes[2] && prefixes[1] != prefixes[2]);
        let prefixes = ["", "SLURM_RESTART_COUNT=1", "SLURM_STEP_ID=4"].map(|v| place(&[STEP, v]).prefix);
        assert!(prefixes[0] != prefixes[1] && prefixes[0] != prefixes[2] && prefixes[1] != prefixes[2]);
    }

    #[test]
    fn one_process_has_no_place() {
        assert_eq!(read(&[]).unwrap(), None);
        assert_eq!(read(&["RANK=0 WORLD_SIZE=1"]).unwrap(), None);
        assert_eq!(read(&[TORCHRUN, "RANK= WORLD_SIZE="]).unwrap(), None);
        assert_eq!(read(&["MASTER_ADDR=gpu1 MASTER_PORT=29500 LOCAL_RANK=0"]).unwrap(), None);
    }

    #[test]
    fn a_step_of_slurm_states_all() {
        let place = place(&[STEP]);
        assert_eq!((place.rank, place.world, place.local_rank), (5, 8, 1));
        assert_eq!((place.host.as_str(), place.serves), ("gpu01", false));
    }

    #[test]
    fn only_a_step_of_several_tasks_counts() {
        // As sbatch --ntasks=4 sets them, in a job array too.
        let batch = "SLURM_JOB_ID=77 SLURM_NTASKS=4 SLURM_NPROCS=4 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODELIST=gpu1 \
                     SLURM_ARRAY_TASK_ID=2";
        assert_eq!(read(&[batch]).unwrap(), None);
        // The shell that salloc starts on a node.
        let interactive = "SLURM_STEP_ID=4294967290 SLURM_STEP_NODELIST=gpu1 SLURM_STEP_NUM_TASKS=1";
        assert_eq!(read(&[batch, interactive]).unwrap(), None);
        assert_eq!(read(&[STEP, "SLURM_NTASKS=1 SLURM_STEP_NUM_TASKS=1 SLURM_PROCID=0"]).unwrap(), None);
        assert_eq!(read(&[STEP, "SLURM_STEP_NODELIST="]).unwrap(), None);
        assert_eq!(place(&[STEP, "SLURM_STEP_NUM_TASKS="]).world, 8);
    }

    #[test]
    fn torchrun_within_a_step_wins() {
        assert_eq!(place(&[STEP, TORCHRUN]).rank, 1);
    }

    #[test]
    fn given_address_and_port_win_under_slurm() {
        assert_eq!(place(&[STEP, "MASTER_ADDR=10.0.0.7 MASTER_PORT=5000"]).store(), "10.0.0.7:5000");
        assert_eq!(place(&[STEP, "SLURM_STEP_NUM_NODES=1"]).host, "127.0.0.1");
    }

    #[test]
    fn ports_depend_on_job_and_step() {
        let port = |job: u64, step: u64| place(&[STEP, &format!("SLURM_JOB_ID={job} SLURM_STEP_ID={step}")]).port;
        assert_eq!(port(77, 3), port(77, 3));
        let mut ports: Vec<u16> = (0..200).map(|i| port(1_000_000 + i / 10, i % 10)).collect();
        assert!(ports.iter().all(|p| (12_000..32_000).contains(p)));
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 200);
    }

    #[test]
    fn errors_name_the_variable() {
        for (vars, words) in [
            ("WORLD_SIZE=", "RANK is set, but WORLD_SIZE is not"),
            ("RANK=", "WORLD_SIZE is set, but RANK is not"),
            ("LOCAL_RANK=", "RANK is set, but LOCAL_RANK is not"),
            ("MASTER_ADDR=", "RANK is set, but MASTER_ADDR is not"),
            ("MASTER_PORT=", "RANK is set, but MASTER_PORT is not"),
            ("RANK=4", "RANK=4 is not below WORLD_SIZE=4"),
            ("WORLD_SIZE=0", "RANK=1 is not below WORLD_SIZE=0"),
            ("RANK=first", "RANK=first is not a number"),
            ("RANK=-1", "RANK=-1 is not a number"),
            ("LOCAL_RANK=1.5", "LOCAL_RANK=1.5 is not a number"),
            ("MASTER_PORT=70000", "MASTER_PORT=70000 is not a port"),
            ("MASTER_PORT=0", "MASTER_PORT=0 is not a port"),
        ] {
            let found = error(&[TORCHRUN, vars]);
            assert!(found.contains(words), "{vars}: {found}");
        }
        for (vars, words) in [
            ("SLURM_PROCID=", "SLURM_STEP_ID is set, but SLURM_PROCID is not"),
            ("SLURM_LOCALID=", "SLURM_STEP_ID is set, but SLURM_LOCALID is not"),
            ("SLURM_JOB_ID=", "SLURM_STEP_ID is set, but SLURM_JOB_ID is not"),
            ("SLURM_PROCID=8", "SLURM_PROCID=8 is not below SLURM_STEP_NUM_TASKS=8"),
            ("SLURM_STEP_NUM_TASKS=many", "SLURM_STEP_NUM_TASKS=many is not a number"),
            ("SLURM_STEP_NODELIST=gpu[", "SLURM_STEP_NODELIST=gpu[ is not a list of nodes"),
        ] {
            let found = error(&[STEP, vars]);
            assert!(found.contains(words), "{vars}: {found}");
        }
    }

    #[test]
    fn first_node_of_a_list() {
        for (list, first) in [
            ("gpu[03-04,7],login", "gpu03"),
            ("gpu[7,03-04]", "gpu7"),
            ("n1,n2", "n1"),
            ("n7", "n7"),
            ("a-b[2]", "a-b2"),
            ("r[1-2]n[05-06]-ib,x", "r1n05-ib"),
            ("gpu[03-04].cluster.org", "gpu03.cluster.org"),
        ] {
            assert_eq!(first_node(list).as_deref(), Some(first), "{list}");
        }
        for broken in ["", ",n1", "gpu[", "gpu[1", "gpu[]", "gpu1]"] {
            assert_eq!(first_node(broken), None, "{broken}");
        }
    }

    #[test]
    fn device_of_a_rank() {
        let place = place(&[TORCHRUN]);
        assert_eq!(place.cuda_index(4).unwrap(), 1);
        assert_eq!(place.cuda_index(1).unwrap(), 0);
        let error = Place { local_rank: 2, ..place }.cuda_index(2).unwrap_err().to_string();
        assert!(error.contains("local rank 2, but 2 CUDA devices"), "{error}");
    }
}
