//! Grades generated answers from 1 to 10 by any OpenAI-compatible chat endpoint, one answer at a time, in the spirit of MT-Bench's
//! single-answer grading.
//!
//! [`prompt`] words the question, [`endpoint`] asks it once, [`ask`] asks many with retries and a limit on concurrency, [`rating`] reads
//! the grade, [`verdicts`] keeps every answer so that nothing is asked twice, and [`run()`] does all this for an evaluation's folder.

mod args;
pub mod ask;
pub mod endpoint;
mod grades;
mod outputs;
pub mod prompt;
pub mod rating;
pub mod run;
pub mod verdicts;

pub use args::JudgeArgs;
pub use run::run;
