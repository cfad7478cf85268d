//! The arguments of judging.

use std::path::PathBuf;

/// Arguments of `cpift-eval judge` and `cpift-judge`.
#[derive(clap::Args, Debug)]
pub struct JudgeArgs {
    /// The folder that `cpift-eval run` wrote; its tasks with metric = "judge" are graded
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// The endpoint up to and with /v1: POST goes to URL/chat/completions [default: $OPENAI_BASE_URL]
    #[arg(long, value_name = "URL")]
    pub base_url: Option<String>,
    /// The judge: a model's name as the endpoint knows it
    #[arg(long, value_name = "NAME")]
    pub judge_model: String,
    /// The environment variable that holds the key. Without it $OPENAI_API_KEY is used where it is set, else no key is sent. The key
    /// itself goes into no file and no message
    #[arg(long, value_name = "NAME")]
    pub key_env: Option<String>,
    /// Requests under way at a time
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub concurrency: usize,
    /// Longest wait for one reply, in seconds
    #[arg(long, value_name = "S", default_value_t = 120)]
    pub timeout: u64,
    /// Longest reply in tokens. One that is cut off before its rating is no verdict and is asked again by the next run
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub max_tokens: u32,
    /// How often a request is repeated after a time-out, a lost connection, 429 or 5xx: after half a second at first, then twice as long
    /// each time, or when Retry-After says
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub retries: u32,
    /// Ask about the first N answers of each task only; earlier verdicts on others still count [default: all]
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
}

impl JudgeArgs {
    /// The end of `--help`.
    pub const EXAMPLES: &str = "\
Examples:
  A local judge (llama.cpp's llama-server, vLLM, Ollama and others speak this protocol; no key is needed):
    llama-server -m judge.gguf --port 8080 &
    cpift-eval judge scores/final --base-url http://127.0.0.1:8080/v1 --judge-model judge
  A hosted one:
    export OPENAI_API_KEY=...
    cpift-eval judge scores/final --base-url https://api.openai.com/v1 --judge-model gpt-4o
  Every verdict is kept in RUN/verdicts.jsonl: run it again after a failure, and only what is missing is asked.";
}
