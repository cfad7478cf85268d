//! The golden models on a device: `check_parity --device cuda fixtures/golden --json` prints how
//! far logits and losses are from what transformers computed on the CPU in f32, and whether that is
//! within the dtype's tolerance. scripts/gpu.sh runs it.

#[allow(dead_code, reason = "the tests use the rest")]
#[path = "../tests/it/golden/mod.rs"]
mod golden;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use cpift_core::Dtype;
use cpift_torch::device::DeviceChoice;
use cpift_torch::train::{PassConfig, StepConfig, loss_and_gradients};
use cpift_torch::weights::kind_of;
use golden::{Golden, batch, max_abs};
use serde_json::json;
use tch::{Device, Kind, no_grad};

#[derive(Parser)]
struct Args {
    /// fixtures/golden
    golden: PathBuf,
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Dtype of the blocks [default: bf16 on CUDA, f32 on the CPU]
    #[arg(long)]
    compute_dtype: Option<Dtype>,
    /// One JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// Tolerances, relative to the largest expected logit, and in nats.
fn tolerance(compute: Kind) -> (f64, f64) {
    // bf16 is about twice what bf16 on the CPU is off by: 8 bits in each of the dozen roundings on
    // a path through a tiny model.
    if compute == Kind::BFloat16 { (1e-1, 2e-2) } else { (1e-4, 1e-4) }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let device = args.device.open(None)?;
    let default = if device.is_cuda() { Kind::BFloat16 } else { Kind::Float };
    let compute = args.compute_dtype.map_or(default, kind_of);
    let (logits_limit, loss_limit) = tolerance(compute);
    let (mut worst_logits, mut worst_loss, mut cases) = (0.0f64, 0.0f64, Vec::new());
    for golden in Golden::all(&args.golden) {
        let (model, parameters) = golden.open(device, Kind::Float, compute);
        let all = batch(&golden.documents()).to_device(device);
        let logits = no_grad(|| model.logits(&model.hidden(&all.ids_bs, &model.documents(&all.lengths), None)));
        let expected = golden.logits();
        let off = max_abs(&(logits.squeeze_dim(0).to_device(Device::Cpu) - &expected)) / max_abs(&expected);
        let pass = PassConfig { checkpointing: true, ..StepConfig::default().pass };
        let (loss, _) = loss_and_gradients(&model, &parameters, &all, pass)?;
        let loss_off = (loss - golden.get("loss").double_value(&[])).abs();
        if !args.json {
            println!("{:24} logits {off:.2e} of their largest, loss {loss_off:.2e} nats", golden.name);
        }
        (worst_logits, worst_loss) = (worst_logits.max(off), worst_loss.max(loss_off));
        cases.push(json!({"case": golden.name, "logits": off, "loss": loss_off}));
    }
    let passed = worst_logits <= logits_limit && worst_loss <= loss_limit;
    if args.json {
        println!(
            "{}",
            json!({"passed": passed, "device": format!("{device:?}"), "compute": format!("{compute:?}"), "max_logits_difference": worst_logits,
                "max_loss_difference": worst_loss, "logits_limit": logits_limit, "loss_limit": loss_limit, "cases": cases})
        );
    } else {
        println!("{}: at most {worst_logits:.2e} and {worst_loss:.2e}", if passed { "passed" } else { "FAILED" });
    }
    std::process::exit(i32::from(!passed));
}
