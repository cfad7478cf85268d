//! Jobs of several processes on this machine, as torchrun would start them.

use std::net::TcpListener;
use std::process::{Child, Command, Output, Stdio};

/// The processes of a job.
pub struct Job(pub Vec<Child>);

impl Job {
    /// Starts `world` ranks of `program`, each with the arguments that `of_rank` returns for it.
    ///
    /// # Panics
    /// If a process or a free port cannot be had.
    #[must_use]
    pub fn start(program: &str, world: usize, of_rank: impl Fn(usize) -> Vec<String>) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
        let rank = |rank: usize| {
            Command::new(program)
                .args(of_rank(rank))
                .env("RANK", rank.to_string())
                .env("LOCAL_RANK", rank.to_string())
                .env("WORLD_SIZE", world.to_string())
                .env("MASTER_ADDR", "127.0.0.1")
                .env("MASTER_PORT", &port)
                .stderr(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap()
        };
        Self((0..world).map(rank).collect())
    }

    /// Waits for all ranks.
    ///
    /// # Panics
    /// If a process cannot be waited for.
    #[must_use]
    pub fn wait(self) -> Vec<Output> {
        self.0.into_iter().map(|child| child.wait_with_output().unwrap()).collect()
    }

    /// Waits for all ranks and expects success of each.
    ///
    /// # Panics
    /// If a rank fails, with what all ranks said.
    pub fn succeed(self) {
        let outputs = self.wait();
        let all: Vec<String> =
            outputs.iter().enumerate().map(|(rank, output)| format!("rank {rank}: {}", said(output))).collect();
        assert!(outputs.iter().all(|output| output.status.success()), "{}", all.join("\n"));
    }
}

/// Standard error of a process.
#[must_use]
pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
