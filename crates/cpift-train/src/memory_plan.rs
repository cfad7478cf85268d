//! `cpift-train plan`: the memory and disk space that training takes, computed before anything is
//! loaded.

use std::path::Path;

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::files::available_bytes;
use cpift_core::format::mask::Mask;
use cpift_core::format::tasks::Tasks;
use cpift_core::run::cli::{Common, print};
use cpift_core::{BadInput, Checkpoint};
use cpift_torch::args::{Budget, TrainingArgs};
use cpift_torch::memory::{self, Disk, Job, Sizes, Traffic};
use cpift_torch::placement::DeviceChoice;
use serde_json::json;

use crate::args::{PlanArgs, RunArgs};

/// Prints memory, verdict and disk space.
///
/// # Errors
/// [`cpift_core::Usage`] for an argument, [`BadInput`] for a file that cannot be used.
pub fn estimate(args: &PlanArgs, common: &Common) -> Result<()> {
    args.training.check()?;
    args.lora.check(&args.training)?;
    check(args)?;
    let tasks = args.tasks.as_deref().map(Tasks::read).transpose()?;
    let (job, limit) = job(args, tasks.as_ref())?;
    let probes = args.probes.unwrap_or(tasks.map_or(DEFAULT_PROBES, |t| t.list.len() as u64));
    let (disk, free) = (Disk::of(&job, probes), available_bytes(&args.out)?);
    let time = args.tflops.map(|rate| Time::of(&job, &args.training, rate * 1e12));
    let traffic = Traffic::of(&job, args.per_node.unwrap_or(args.world));
    let link = args.link.map(|rate| rate * 1e9);
    if common.json {
        let advice = limit.filter(|l| job.peak().total() > *l).map(|l| memory::advice(&job, l));
        let rows: serde_json::Map<String, serde_json::Value> =
            disk.rows().into_iter().map(|(name, bytes)| (name, bytes.into())).collect();
        common.print_json(&json!({"memory": job.to_json(), "device_memory": limit,
            "fits": limit.map(|l| job.peak().total() <= l),
            "options": advice.as_ref().map(|a| &a.alone), "advice": advice.as_ref().map(|a| &a.fits),
            "traffic": traffic.to_json(link),
            "time": time.as_ref().map(|t| json!({"tokens": t.tokens, "flops": t.flops, "hours": t.hours})),
            "disk": {"total": disk.total(), "free": free, "parts": rows}}));
    } else {
        let verdict = memory::verdict(&job, limit);
        let time = time.map_or(String::new(), |t| t.line());
        let free = free_line(&args.out, disk.total(), free);
        let traffic = traffic.text(link);
        print(&format!("{}{verdict}{traffic}\n{time}{}{free}", job.table(), disk.table()));
    }
    Ok(())
}

/// Estimated time of a run.
struct Time {
    tokens: u64,
    flops: f64,
    hours: f64,
}

impl Time {
    /// 6 FLOPs per parameter and token, forward and backward (Kaplan et al., [arXiv
    /// 2001.08361](https://arxiv.org/abs/2001.08361)); recomputation adds 2, and a frozen base
    /// needs 2 fewer. Of the experts those that compute a token count, and the scores of attention
    /// do not.
    fn of(job: &Job, training: &TrainingArgs, flops_per_second: f64) -> Self {
        let tokens = match training.budget() {
            Budget::Tokens(tokens) => tokens as u64,
            // Only the rows tell, which are not read; `check` has refused it.
            Budget::Epochs(_) => 0,
            Budget::Steps(steps) => steps as u64 * training.grad_accum as u64 * job.tokens * job.world,
        };
        let frozen = if job.lora.is_some() { 2.0 } else { 0.0 };
        let each = if training.gradient_checkpointing { 8.0 } else { 6.0 } - frozen;
        let flops = each * Sizes::of(&job.config).active as f64 * tokens as f64;
        Self { tokens, flops, hours: flops / (flops_per_second * job.world as f64) / 3600.0 }
    }

    fn line(&self) -> String {
        format!("time: {:.2} hours for {} tokens, {:.3e} FLOPs\n", self.hours, self.tokens, self.flops)
    }
}

/// Number of tasks in the paper.
const DEFAULT_PROBES: u64 = 5;

fn check(args: &PlanArgs) -> Result<()> {
    let rules = [
        ((0.0..=100.0).contains(&args.frozen_percent), "--frozen-percent must be 0 to 100"),
        (args.batch_tokens != Some(0), "--batch-tokens must be at least 1"),
        (args.tflops.is_none_or(|f| f.is_finite() && f > 0.0), "--tflops must be positive"),
        (
            args.tflops.is_none() || !matches!(args.training.budget(), Budget::Epochs(_)),
            "--tflops needs --steps or --tokens: the tokens of an epoch are unknown until its rows are read",
        ),
        ((1..=1 << 20).contains(&args.world), "--world must be 1 to 1048576"),
        (args.per_node.is_none_or(|n| n > 0), "--per-node must be at least 1"),
        (args.link.is_none_or(|r| r.is_finite() && r > 0.0), "--link must be positive"),
        (args.training.batch_size as u64 >= args.world, "--batch-size is that of all ranks: at least --world"),
        (args.device_memory.is_none_or(|g| g.is_finite() && g > 0.0), "--device-memory must be positive"),
    ];
    match rules.iter().find(|(holds, _)| !holds) {
        Some((_, message)) => Err(usage(*message)),
        None => Ok(()),
    }
}

/// The job, and the memory of its device if known.
fn job(args: &PlanArgs, tasks: Option<&Tasks>) -> Result<(Job, Option<u64>)> {
    let path = args.model.as_deref().or(args.model_config.as_deref()).expect("clap requires one of them");
    let mut config = memory::read_model(path)?;
    config.set_router_aux_loss(args.training.router_aux_loss_coef)?;
    check_weights(path, Sizes::of(&config).total())?;
    let named = args.device_memory.map(|g| (g * f64::from(1 << 30)) as u64);
    // A device whose memory is given need not exist here.
    let (cuda, limit) = match (args.training.device, named) {
        (DeviceChoice::Cuda(_), Some(limit)) => (true, Some(limit)),
        (choice, named) => {
            let device = choice.open(None)?;
            (device.is_cuda(), named.or_else(|| memory::available(device)))
        }
    };
    let mut job = Job::new(config, &args.training, memory::longest_of(tasks, &args.training), cuda);
    if let Some(tokens) = args.batch_tokens {
        job.tokens = tokens;
        job.longest = job.longest.min(tokens);
    }
    let lora = args.lora.config(0);
    if let Some(lora) = &lora {
        let names: Vec<String> = job.config.adaptable().map(|(name, _)| name).collect();
        lora.check(names.iter())?;
    }
    let mut job = job.with_adapters(lora).shared_by(args.world);
    job.frozen = (Sizes::of(&job.config).total() as f64 * args.frozen_percent / 100.0) as u64;
    Ok((job, limit))
}

/// Refuses weights beside the config that it does not describe.
fn check_weights(path: &Path, parameters: u64) -> Result<()> {
    let there = |name: &str| path.join(name).exists();
    if !there("model.safetensors") && !there("model.safetensors.index.json") {
        return Ok(());
    }
    let found: u64 = Checkpoint::open(path)?.parameters().map(|view| view.numel() as u64).sum();
    if found == parameters {
        return Ok(());
    }
    Err(BadInput::new(path, "the weights are not those that config.json describes")
        .expected(format!("{parameters} parameters"))
        .found(format!("{found} parameters"))
        .into())
}

/// Maximum number of elements that a run freezes: those of all its masks.
pub(crate) fn frozen(args: &RunArgs) -> u64 {
    args.masks.iter().filter_map(|mask| Mask::open(&mask.path).ok()).map(|mask| mask.header.selected).sum()
}

fn free_line(out: &Path, needed: u64, free: u64) -> String {
    let gb = |bytes: u64| bytes as f64 / 1e9;
    let verdict = if needed <= free { "fits" } else { "does not fit" };
    format!("{verdict}: {:.1} of {:.1} GB free at {}\n", gb(needed), gb(free), out.display())
}
