//! Times training steps on synthetic tokens: `bench_train --model DIR --shape 1x512 --steps 5
//! --threads 1 --json`.
//!
//! scripts/bench/train.sh and scripts/gpu.sh run it beside transformers; both sides make the same
//! token ids.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use clap::Parser;
use cpift_core::format::checkpoint::read_config;
use cpift_core::{Checkpoint, Dtype};
use cpift_data::Example;
use cpift_torch::data::Batch;
use cpift_torch::device::{DeviceChoice, cuda_memory_peak};
use cpift_torch::freeze::Freeze;
use cpift_torch::model::{CausalLM, ModelConfig};
use cpift_torch::optim::{AdamWConfig, StateKind};
use cpift_torch::pieces::whole_pieces;
use cpift_torch::train::{PassConfig, StepConfig, StepInput, Trainer};
use cpift_torch::weights::{self, Parameters, kind_of};
use serde_json::json;
use tch::Device;

#[derive(Parser)]
struct Args {
    /// Hugging Face directory.
    #[arg(long, required_unless_present = "config")]
    model: Option<PathBuf>,
    /// A config.json; needs --random.
    #[arg(long, conflicts_with = "model", requires = "random")]
    config: Option<PathBuf>,
    /// Random weights.
    #[arg(long, requires = "config")]
    random: bool,
    /// Sequences × tokens of a step.
    #[arg(long, default_value = "1x512")]
    shape: String,
    #[arg(long, default_value_t = 5)]
    steps: usize,
    #[arg(long)]
    threads: Option<usize>,
    #[arg(long, default_value = "cpu")]
    device: DeviceChoice,
    #[arg(long, default_value = "f32")]
    compute_dtype: Dtype,
    #[arg(long, default_value = "f32")]
    master: Dtype,
    #[arg(long, default_value = "f32")]
    optim_state: Dtype,
    #[arg(long)]
    gradient_checkpointing: bool,
    /// Implies no clipping.
    #[arg(long)]
    optimizer_in_backward: bool,
    #[arg(long, default_value_t = 1024)]
    loss_chunk: usize,
    /// Freeze every n-th element, this percentage of all.
    #[arg(long, default_value_t = 0.0)]
    frozen_percent: f64,
    #[arg(long, default_value_t = 1e-5)]
    lr: f64,
    /// One JSON object instead of a line.
    #[arg(long)]
    json: bool,
}

/// Token ids by a linear congruential generator that Python can follow.
struct Ids {
    state: u64,
    vocab: u64,
}

impl Ids {
    fn batch(&mut self, sequences: usize, tokens: usize) -> Batch {
        let example = |_| {
            let ids: Vec<i64> = (0..tokens).map(|_| self.next()).collect();
            Example { target: (0..tokens).map(|i| i > 0).collect(), ids, ..Example::default() }
        };
        let examples: Vec<Example> = (0..sequences).map(example).collect();
        Batch::new(&examples.iter().collect::<Vec<_>>())
    }

    fn next(&mut self) -> i64 {
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.state >> 33) % self.vocab) as i64
    }
}

fn open(args: &Args, device: Device) -> Result<(CausalLM, Parameters)> {
    let master = kind_of(args.master);
    let folder = match (&args.model, &args.config) {
        (Some(folder), _) => folder.clone(),
        (None, config) => config.as_deref().and_then(Path::parent).unwrap_or(Path::new(".")).to_owned(),
    };
    let (config, parameters) = match &args.config {
        Some(file) => {
            let config = ModelConfig::from_json(&folder, &serde_json::from_slice(&std::fs::read(file)?)?)?;
            let parameters = config.random_parameters(master, device);
            (config, parameters)
        }
        None => {
            let config = ModelConfig::from_json(&folder, &read_config(&folder)?)?;
            (config, weights::load(&Checkpoint::open(&folder)?, master, device)?)
        }
    };
    let model = CausalLM::new(config, &parameters, &folder, kind_of(args.compute_dtype))?;
    Ok((model, parameters))
}

fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after = stat.rsplit(')').next().unwrap_or_default();
    let ticks: f64 = after.split_whitespace().skip(11).take(2).filter_map(|t| t.parse::<f64>().ok()).sum();
    ticks / 100.0
}

fn peak_memory_mib(device: Device) -> u64 {
    if let Device::Cuda(index) = device {
        return cuda_memory_peak(index) >> 20;
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse::<u64>().ok());
    peak.unwrap_or(0) >> 10
}

fn main() -> Result<()> {
    let args = Args::parse();
    let device = args.device.open(args.threads)?;
    let (sequences, tokens) = args.shape.split_once('x').ok_or_else(|| anyhow!("--shape is like 4x256"))?;
    let (sequences, tokens): (usize, usize) = (sequences.parse()?, tokens.parse()?);
    let (model, parameters) = open(&args, device)?;
    let freeze = (args.frozen_percent > 0.0).then(|| Freeze::every(&whole_pieces(&parameters), args.frozen_percent));
    let config = StepConfig {
        optimizer: AdamWConfig { state: StateKind::plain(args.optim_state), ..AdamWConfig::default() },
        max_grad_norm: if args.optimizer_in_backward { 0.0 } else { 1.0 },
        pass: PassConfig {
            checkpointing: args.gradient_checkpointing,
            loss_chunk: args.loss_chunk,
            ..StepConfig::default().pass
        },
        optimizer_in_backward: args.optimizer_in_backward,
        train_embeddings: true,
    };
    let mut trainer = Trainer::new(&model, &parameters, freeze, config)?;
    let mut ids = Ids { state: 1, vocab: model.config.vocab_size as u64 };
    let (mut cpu, mut wall, mut losses) = (Vec::new(), Vec::new(), Vec::new());
    for step in 0..args.steps {
        let batch = ids.batch(sequences, tokens).to_device(device);
        let (cpu_start, clock) = (cpu_seconds(), Instant::now());
        let outcome = trainer.step(&StepInput::alone(&[batch]), args.lr, step as u64).context("a step")?;
        // Reading waits for the device, so that the time covers the whole step.
        losses.push(outcome.read().0);
        cpu.push(cpu_seconds() - cpu_start);
        wall.push(clock.elapsed().as_secs_f64());
    }
    let peak = peak_memory_mib(device);
    let count: usize = parameters.values().map(tch::Tensor::numel).sum();
    if args.json {
        println!(
            "{}",
            json!({"tokens_per_step": sequences * tokens, "steps": args.steps, "parameters": count, "cpu_seconds": cpu,
                "wall_seconds": wall, "losses": losses, "peak_memory_mib": peak})
        );
    } else {
        let rate = (sequences * tokens) as f64 / cpu.iter().copied().fold(f64::INFINITY, f64::min);
        println!("{rate:.1} tokens per CPU-second at best, peak {peak} MiB, losses {losses:.4?}");
    }
    Ok(())
}
