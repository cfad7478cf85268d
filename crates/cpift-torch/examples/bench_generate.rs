//! Times greedy generation: `bench_generate --model DIR --prompts FILE --batch-size 16 --new-tokens
//! 128 --threads 1`.
//!
//! FILE is a JSON list of lists of token ids. Prints one JSON object: the ids, and the CPU seconds
//! of each repetition. No token ends an answer unless `--eos`. scripts/bench/generate.sh and
//! scripts/oracle/check_generate.py run it beside transformers.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use cpift_core::Dtype;
use cpift_torch::generate::{GenerationOptions, generate};
use cpift_torch::placement::DeviceChoice;
use cpift_torch::session::Session;
use cpift_torch::weights::kind_of;
use serde_json::json;

#[derive(Parser)]
struct Args {
    /// Hugging Face directory.
    #[arg(long)]
    model: PathBuf,
    /// Prompts as token ids.
    #[arg(long)]
    prompts: PathBuf,
    #[arg(long, default_value_t = 16)]
    batch_size: usize,
    #[arg(long, default_value_t = 128)]
    new_tokens: usize,
    #[arg(long, default_value_t = 1)]
    repeat: usize,
    /// End answers at the model's EOS ids.
    #[arg(long)]
    eos: bool,
    #[arg(long)]
    threads: Option<usize>,
    #[arg(long, default_value = "cpu")]
    device: DeviceChoice,
    #[arg(long, default_value = "f32")]
    compute_dtype: Dtype,
}

fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after = stat.rsplit(')').next().unwrap_or_default();
    let ticks: f64 = after.split_whitespace().skip(11).take(2).filter_map(|t| t.parse::<f64>().ok()).sum();
    ticks / 100.0
}

fn main() -> Result<()> {
    let args = Args::parse();
    let device = args.device.open(args.threads)?;
    let session = Session::for_inference(&args.model, Some("chatml"), device, kind_of(args.compute_dtype))?;
    let prompts: Vec<Vec<i64>> = serde_json::from_slice(&std::fs::read(&args.prompts)?)?;
    let options = GenerationOptions {
        eos_ids: if args.eos { &session.text.eos_ids } else { &[] },
        stop: &[],
        max_new_tokens: args.new_tokens,
        batch_size: args.batch_size,
        sampling: None,
    };
    let (mut cpu, mut wall, mut ids) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..args.repeat {
        let (cpu_start, clock) = (cpu_seconds(), Instant::now());
        let answers = generate(&session.model, &session.text, &prompts, &options, || ())?;
        cpu.push(cpu_seconds() - cpu_start);
        wall.push(clock.elapsed().as_secs_f64());
        ids = answers.into_iter().map(|answer| answer.ids).collect();
    }
    println!("{}", json!({"ids": ids, "cpu_seconds": cpu, "wall_seconds": wall}));
    Ok(())
}
