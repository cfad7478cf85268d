//! Checks a converted SmolLM2-135M-Instruct against transformers: loss on a paragraph, a greedy
//! answer, and the token ids of 200 rows of real text. `check_smollm2 MODEL DATA`
//!
//! The results of transformers come from scripts/oracle/check_smollm2.py and
//! fixtures/golden/smollm2_tokens.json.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use cpift_core::format::tasks::Format;
use cpift_data::{Example, Layout, Message, Row, TemplateArgs, read_rows};
use cpift_torch::generate::{GenerationOptions, generate};
use cpift_torch::score;
use cpift_torch::session::{Precision, Session};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tch::Device;

const PARAGRAPH: &str = include_str!("../../../scripts/smollm2/paragraph.txt");
const LOSS: f64 = 3.3588;
const TOLERANCE: f64 = 0.002;
const QUESTION: &str = "What is the capital of France?";
const ANSWER: &str = "The capital of France is Paris.";

/// Digests of one row's token ids.
#[derive(Deserialize)]
struct Golden {
    task: String,
    source: String,
    text: String,
    chat: String,
    prompt: String,
}

fn main() -> Result<()> {
    let args: Vec<PathBuf> = std::env::args().skip(1).map(PathBuf::from).collect();
    ensure!(args.len() == 2, "usage: check_smollm2 MODEL DATA");
    let session = Session::open(&args[0], None, Device::Cpu, Precision::F32)?;
    check_loss(&session)?;
    check_answer(&session)?;
    check_tokens(&session, &args[1])
}

fn check_loss(session: &Session) -> Result<()> {
    let ids = session.text.encode(PARAGRAPH)?;
    let target = (0..ids.len()).map(|i| i > 0).collect();
    let losses = score::losses(&session.model, &[Example { ids, target, ..Example::default() }], 1, || ())?;
    let loss = losses[0].nll / losses[0].targets as f64;
    println!("paragraph: {} tokens predicted, loss {loss:.4} (transformers: {LOSS} ± {TOLERANCE})", losses[0].targets);
    ensure!((loss - LOSS).abs() <= TOLERANCE, "the loss is off");
    Ok(())
}

fn check_answer(session: &Session) -> Result<()> {
    let message = Message::new("user", QUESTION);
    let prompt = session.text.encode(&session.text.with(&TemplateArgs::new()).prompt(&[message])?)?;
    let options = GenerationOptions {
        eos_ids: &session.text.eos_ids,
        stop: &[],
        max_new_tokens: 20,
        batch_size: 1,
        sampling: None,
    };
    let answer = &generate(&session.model, &session.text, &[prompt], &options, || ())?[0].text;
    println!("{QUESTION} -> {answer}");
    ensure!(answer == ANSWER, "the answer is not {ANSWER:?}");
    Ok(())
}

fn check_tokens(session: &Session, data: &Path) -> Result<()> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden/smollm2_tokens.json");
    let golden: Vec<Golden> = serde_json::from_str(&std::fs::read_to_string(golden)?)?;
    let mut compared = 0;
    // The golden rows are those of one draw of the public data; another draw may hold few of them.
    for task in ["gsm8k", "codealpaca", "logiqa", "alpaca", "ultrachat"] {
        let rows = read_rows(&data.join(task).join("train.jsonl"), &Layout::Format(Format::Messages))?;
        let by_source: BTreeMap<String, &Row> = rows.iter().map(|row| (source(row), row)).collect();
        for expected in golden.iter().filter(|g| g.task == task) {
            if let Some(row) = by_source.get(&expected.source) {
                check_row(session, row, expected)?;
                compared += 1;
            }
        }
    }
    println!(
        "token ids of {compared} of {} golden rows found here (text, chat, prompt) equal transformers'",
        golden.len()
    );
    Ok(())
}

fn check_row(session: &Session, row: &Row, expected: &Golden) -> Result<()> {
    let text = &session.text;
    let found = [
        text.encode(&row.messages[0].content)?,
        text.encode(&text.with(&TemplateArgs::new()).render(&row.messages, false)?)?,
        text.encode(&text.with(&TemplateArgs::new()).prompt(row.prompt())?)?,
    ];
    for (ids, digest) in found.iter().zip([&expected.text, &expected.chat, &expected.prompt]) {
        ensure!(sha256(ids) == *digest, "{}: token ids differ from transformers'", row.place);
    }
    Ok(())
}

/// Identity of a row, independent of file and line.
fn source(row: &Row) -> String {
    hex(&row.messages.iter().map(|m| format!("{}\0{}\0", m.role, m.content)).collect::<String>())
}

fn sha256(ids: &[i64]) -> String {
    let text: Vec<String> = ids.iter().map(i64::to_string).collect();
    hex(&text.join(","))
}

fn hex(text: &str) -> String {
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}
