//! Grades generated answers from 1 to 10 with any OpenAI-compatible chat endpoint, one answer at a
//! time, in the style of MT-Bench's single-answer grading.
//!
//! | module | content |
//! | --- | --- |
//! | `run` | arguments; reads an evaluation's directory, asks, writes the scores |
//! | `outputs` | answers to grade; grades of a task |
//! | `verdicts` | verdicts.jsonl, so that no question is asked twice |
//! | `ask` | many questions with retries and limited concurrency |
//! | `endpoint`, `key` | one request; the API key |
//! | `question` | wording of the question; rating in the reply |

mod ask;
mod endpoint;
mod key;
mod outputs;
mod question;
mod run;
pub mod verdicts;

pub use run::{JudgeArgs, run};
