//! The computed memory against models that are built.

use std::path::{Path, PathBuf};

use clap::Parser;
use cpift_core::Checkpoint;
use cpift_torch::args::TrainingArgs;
use cpift_torch::memory::{Job, PARTS, Sizes, Traffic, advice, read_model};
use cpift_torch::model::{CausalLM, ModelConfig};
use cpift_torch::train::{LoraConfig, LoraOutput};
use cpift_torch::weights::Parameters;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    training: TrainingArgs,
}

fn args(line: &str) -> TrainingArgs {
    Line::parse_from(std::iter::once("train").chain(line.split_whitespace())).training
}

fn config(value: &Value) -> ModelConfig {
    ModelConfig::from_json(Path::new("m"), value).unwrap()
}

/// The number of parameters of the model that the loader builds, which is given tensors of the
/// requested shapes until it is complete.
fn built(config: &ModelConfig) -> u64 {
    let mut parameters = Parameters::new();
    loop {
        let error = match CausalLM::new(config.clone(), &parameters, Path::new("m"), Kind::Float) {
            Ok(_) => return parameters.values().map(|t| t.numel() as u64).sum(),
            Err(error) => error.to_string(),
        };
        let line = |label: &str| error.lines().find_map(|l| l.trim().strip_prefix(label)).map(str::to_owned);
        let name = line("tensor: ").unwrap_or_else(|| panic!("{error}"));
        let shape: Vec<i64> = line("expected: ").map_or(vec![0], |s| serde_json::from_str(&s).unwrap());
        parameters.insert(name, Tensor::zeros(shape, (Kind::Float, Device::Cpu)));
    }
}

#[test]
fn the_parameters_of_every_family_are_those_of_the_built_model() {
    for (architecture, more) in [
        ("LlamaForCausalLM", json!({})),
        ("LlamaForCausalLM", json!({"attention_bias": true, "mlp_bias": true, "tie_word_embeddings": true})),
        ("MistralForCausalLM", json!({"head_dim": 12})),
        ("MinistralForCausalLM", json!({})),
        ("Qwen2ForCausalLM", json!({"tie_word_embeddings": true})),
        ("Qwen3ForCausalLM", json!({"head_dim": 6})),
        ("Qwen3ForCausalLM", json!({"attention_bias": true})),
        (
            "Qwen3MoeForCausalLM",
            json!({"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 10, "mlp_only_layers": [1]}),
        ),
        ("Gemma2ForCausalLM", json!({"head_dim": 10})),
        ("Gemma3ForCausalLM", json!({"head_dim": 10})),
        ("Phi3ForCausalLM", json!({})),
        (
            "Phi3ForCausalLM",
            json!({"num_attention_heads": 2, "partial_rotary_factor": 0.5, "tie_word_embeddings": true}),
        ),
        ("Olmo2ForCausalLM", json!({})),
        ("GraniteForCausalLM", json!({"attention_bias": true, "mlp_bias": true})),
        ("SmolLM3ForCausalLM", json!({"attention_bias": true})),
    ] {
        let mut value = json!({"architectures": [architecture], "hidden_size": 24, "intermediate_size": 40,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50});
        more.as_object().unwrap().iter().for_each(|(k, v)| value[k] = v.clone());
        let config = config(&value);
        assert_eq!(Sizes::of(&config).total(), built(&config), "{architecture} {more}");
    }
    let fixtures = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
    for case in ["demo/base", "golden/llama/gqa_tied", "golden/llama/gqa_untied", "golden/llama/mha_bias"] {
        let folder = fixtures.join(case);
        let real: usize = Checkpoint::open(&folder).unwrap().parameters().map(|v| v.numel()).sum();
        assert_eq!(Sizes::of(&read_model(&folder).unwrap()).total(), real as u64, "{case}");
    }
}

/// Architecture, e, f, layers, h, k, d, v.
fn published(architecture: &str, numbers: [i64; 7]) -> ModelConfig {
    let [e, f, layers, h, k, d, v] = numbers;
    config(
        &json!({"architectures": [architecture], "hidden_size": e, "intermediate_size": f, "num_hidden_layers": layers,
        "num_attention_heads": h, "num_key_value_heads": k, "head_dim": d, "vocab_size": v,
        "max_position_embeddings": 4096}),
    )
}

fn llama2() -> ModelConfig {
    published("LlamaForCausalLM", [4096, 11008, 32, 32, 32, 128, 32000])
}

#[test]
fn published_models_have_their_published_number_of_parameters() {
    for (config, parameters) in [
        (llama2(), 6_738_415_616),
        (published("MistralForCausalLM", [4096, 14336, 32, 32, 8, 128, 32000]), 7_241_732_096),
        (published("Gemma2ForCausalLM", [3584, 14336, 42, 16, 8, 256, 256_000]), 9_241_705_984),
        (published("Qwen2ForCausalLM", [3584, 18944, 28, 28, 4, 128, 152_064]), 7_615_616_512),
        // Phi-4, OLMo-2-7B, SmolLM3-3B and Gemma-3-1B.
        (published("Phi3ForCausalLM", [5120, 17920, 40, 40, 10, 128, 100_352]), 14_659_507_200),
        (published("Olmo2ForCausalLM", [4096, 11008, 32, 32, 32, 128, 100_352]), 7_298_617_344),
        (published("SmolLM3ForCausalLM", [2048, 11008, 36, 16, 4, 128, 128_256]), 3_075_098_624),
        (published("Gemma3ForCausalLM", [1152, 6912, 26, 4, 1, 256, 262_144]), 999_885_952),
    ] {
        assert_eq!(Sizes::of(&config).total(), parameters, "{:?}", config.family);
    }
}

/// Qwen3-30B-A3B: 30.5 B parameters, of which 3.3 B compute a token.
#[test]
fn parameters_that_compute_a_token_are_counted_apart() {
    let config =
        config(&json!({"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "vocab_size": 151_936, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}));
    let sizes = Sizes::of(&config);
    assert_eq!((sizes.total(), sizes.active), (30_532_122_624, 3_353_032_704));
    assert_eq!(Sizes::of(&llama2()).active, Sizes::of(&llama2()).total());
}

fn job(config: ModelConfig, line: &str) -> Job {
    Job::new(config, &args(line), 4096, true)
}

fn part(job: &Job, moment: &str, part: &str) -> u64 {
    let moment = job.moments().into_iter().find(|m| m.name == moment).unwrap();
    moment.bytes[PARTS.iter().position(|p| *p == part).unwrap()]
}

#[test]
fn each_option_takes_away_what_it_is_for() {
    let d = Sizes::of(&llama2()).total();
    let plain = job(llama2(), "--batch-size 1");
    assert_eq!((part(&plain, "loss", "weights"), part(&plain, "loss", "moments")), (4 * d, 8 * d));
    assert_eq!(part(&plain, "update", "gradients"), 4 * d);
    // Kept activations include the cast weights of all blocks.
    assert_eq!(part(&plain, "first block", "casts"), 2 * 32 * Sizes::of(&llama2()).block);
    let recomputed = job(llama2(), "--batch-size 1 --gradient-checkpointing");
    assert_eq!(part(&recomputed, "loss", "activations"), 33 * 4096 * 4096 * 2);
    assert_eq!(part(&recomputed, "first block", "casts"), 2 * Sizes::of(&llama2()).block);
    let fused = job(llama2(), "--batch-size 1 --optimizer-in-backward --max-grad-norm 0");
    assert_eq!(part(&fused, "last block", "gradients"), 4 * Sizes::of(&llama2()).block);
    let summed = job(llama2(), "--batch-size 1 --grad-accum 2 --master-dtype bf16");
    assert_eq!(part(&summed, "update", "gradients"), 4 * d, "sums are f32 whatever the weights are");
    let bf16 = job(llama2(), "--batch-size 1 --master-dtype bf16 --optim-state-dtype bf16");
    assert_eq!((part(&bf16, "loss", "weights"), part(&bf16, "loss", "moments")), (2 * d, 4 * d));
    assert_eq!(part(&bf16, "loss", "casts"), 0, "there is nothing to cast");
    let frozen = Job { frozen: d / 100, ..job(llama2(), "--batch-size 1") };
    assert_eq!(part(&frozen, "loss", "frozen"), d / 100 * 12);
}

/// One byte per element and moment, and four per block of 256; small tensors as f32.
#[test]
fn moments_of_8_bits_take_a_byte_per_element_and_four_per_block() {
    let line = "--batch-size 1 --optim adamw_8bit";
    let sizes = Sizes::of(&llama2());
    let moments = |line: &str| part(&job(llama2(), line), "loss", "moments");
    // Norms have 4096 elements, which is enough.
    assert_eq!(moments(line), 2 * (sizes.total() + sizes.total() / 64));
    let table = 32000 * 4096;
    assert_eq!(moments(line) - moments(&format!("{line} --freeze-embeddings")), 2 * (table + table / 64));
    let tiny = published("LlamaForCausalLM", [32, 64, 1, 4, 2, 8, 50]);
    assert_eq!(part(&job(tiny.clone(), line), "loss", "moments"), 8 * Sizes::of(&tiny).total());
}

/// Ranks keep equal parts of the state, and whole weights of two blocks at most.
#[test]
fn ranks_share_the_state() {
    let (sizes, line) = (Sizes::of(&llama2()), "--batch-size 4 --gradient-checkpointing");
    let (d, one) = (sizes.total(), job(llama2(), line));
    let four = job(llama2(), line).shared_by(4);
    assert_eq!((part(&four, "loss", "weights"), part(&four, "loss", "moments")), (d, 2 * d));
    assert_eq!(part(&four, "update", "gradients"), d);
    assert_eq!(part(&four, "first block", "lent"), 2 * 2 * sizes.block, "two blocks in bf16");
    assert_eq!(part(&four, "first block", "casts"), 0, "the lent weights are cast already");
    assert_eq!(four.tokens * 4, one.tokens, "a fourth of the batch");
    assert!(four.peak().total() < one.peak().total() / 3);
}

/// The base in bf16 is shared; adapters and their moments are on every rank, and moments in 8 bits
/// are shared like others.
#[test]
fn ranks_share_the_base_of_adapters_and_moments_of_8_bits() {
    let line = "--batch-size 4 --gradient-checkpointing";
    let lora = LoraConfig {
        rank: 8,
        alpha: 16.0,
        rank_stabilized: false,
        targets: Vec::new(),
        output: LoraOutput::Adapter,
        seed: 0,
    };
    let (d, adapters) = (Sizes::of(&llama2()).total(), 19_988_480);
    let adapted = |world| job(llama2(), line).with_adapters(Some(lora.clone())).shared_by(world);
    let (one, four) = (adapted(1), adapted(4));
    assert_eq!((part(&one, "loss", "weights"), part(&one, "loss", "moments")), (2 * d + 4 * adapters, 8 * adapters));
    assert_eq!(part(&four, "loss", "weights"), d / 2 + 4 * adapters);
    assert_eq!(part(&four, "loss", "moments"), 8 * adapters);
    assert!(part(&four, "first block", "lent") > 0 && part(&one, "first block", "lent") == 0);
    // Blocks for both passes and the rest once in bf16, and the adapters' gradients of all ranks.
    let blocks = 32 * Sizes::of(&llama2()).block;
    assert_eq!(Traffic::of(&four, 4).ranks, 3 * ((4 * blocks + 2 * (d - blocks)) / 4 + 4 * adapters));
    let eight_bits = job(llama2(), &format!("{line} --optim adamw_8bit"));
    let moments = |world| part(&eight_bits.clone().shared_by(world), "loss", "moments");
    assert_eq!(moments(4), moments(1) / 4);
}

/// LLaMA-2-7B with f32 masters and moments on a device of 24 GB.
#[test]
fn offloaded_state_takes_host_memory() {
    let d = Sizes::of(&llama2()).total();
    let line = "--batch-size 1 --gradient-checkpointing --optimizer-in-backward --max-grad-norm 0 --offload all";
    let away = Job::new(llama2(), &args(line), 2048, true);
    assert_eq!((part(&away, "loss", "weights"), part(&away, "loss", "moments")), (0, 0));
    assert!(away.peak().total() < 24_000_000_000, "{}", away.table());
    let traffic = Traffic::of(&away, 1);
    assert_eq!((traffic.host_memory, traffic.ranks), (12 * d, 0));
    // Masters for two passes over the blocks and one over the rest; each state is read and written.
    let blocks = 32 * Sizes::of(&llama2()).block;
    assert_eq!(traffic.host_link, 4 * (d + blocks) + 2 * 12 * d);
    // With 8 ranks on 2 nodes, 4 of 7 peers are on the other node.
    let line = "--batch-size 8 --gradient-checkpointing";
    let shared = Traffic::of(&Job::new(llama2(), &args(line), 2048, true).shared_by(8), 4);
    assert_eq!(shared.ranks / 7, shared.nodes / 4);
    assert_eq!(shared.host_memory, 0);
}

#[test]
fn only_capped_attention_has_scores() {
    let gemma = |longest| {
        let config = published("Gemma2ForCausalLM", [3584, 14336, 42, 16, 8, 256, 256_000]);
        let mut job = job(config, "--batch-size 1");
        job.longest = longest;
        part(&job, "loss", "activations")
    };
    // tanh in bf16, softmax in f32 and bf16, the mask: 8 bytes per score and head, one more for all
    // heads.
    assert_eq!(gemma(4096) - gemma(2048), 42 * 4096 * 2048 * (16 * 8 + 1));
    let llama = |longest| part(&Job { longest, ..job(llama2(), "--batch-size 1") }, "loss", "activations");
    assert_eq!(llama(4096), llama(2048));
}

#[test]
fn the_advice_is_the_cheapest_that_fits() {
    const GIB: u64 = 1 << 30;
    let plain = job(llama2(), "--batch-size 8 --max-length 4096");
    let advised = |limit| advice(&plain, limit).fits.map(|(options, _)| options);
    assert_eq!(advised(140 * GIB).unwrap(), "--gradient-checkpointing");
    assert_eq!(advised(100 * GIB).unwrap(), "--gradient-checkpointing --optimizer-in-backward --max-grad-norm 0");
    let offloaded = advised(30 * GIB).unwrap();
    assert!(offloaded.contains("--offload "), "{offloaded}");
    assert_eq!(advised(GIB), None);
    let (options, total) = advice(&plain, 60 * GIB).fits.unwrap();
    assert!(options.contains("--master-dtype bf16") && total <= 60 * GIB, "{options}");
    // The advised total is the one computed for those options.
    let typed = job(llama2(), &format!("--batch-size 8 {}", advised(100 * GIB).unwrap()));
    assert_eq!(advice(&plain, 100 * GIB).fits.unwrap().1, typed.peak().total());
    let small = advice(&job(llama2(), "--batch-size 1 --gradient-checkpointing"), GIB);
    assert!(small.alone.iter().all(|(o, _)| !o.contains("--batch-size") && !o.contains("checkpointing")));
}
