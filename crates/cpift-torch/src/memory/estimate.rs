//! Memory of a training step, by part and moment. Derived from the code of `model/`, `train/`,
//! `optim` and `freeze`: it counts their tensors, not what an allocator loses to rounding and
//! fragmentation.
//!
//! Suffixes of shapes: e embedding, f MLP width, h query heads, k key heads, d head width, v
//! vocabulary, n tokens. Autograd saves the input of a linear layer, both factors of a product, and
//! the f32 copy that a norm squares, but not the terms of a sum.

use cpift_core::Dtype;
use serde_json::{Value, json};

use super::job::{F32, Job, PROGRAM, Sizes, dimensions, gib};
use crate::args::{Offload, Optimizer};
use crate::model::{ModelConfig, NormWeight};

/// Parts of the memory, in the order of [`Moment::bytes`].
pub const PARTS: [&str; 10] =
    ["weights", "lent", "moments", "gradients", "activations", "loss", "casts", "update", "frozen", "context"];

/// A moment of a step that can be its peak.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moment {
    /// Name of the moment.
    pub name: &'static str,
    /// Bytes of each of [`PARTS`].
    pub bytes: [u64; PARTS.len()],
}

impl Moment {
    /// Bytes of all parts.
    pub fn total(&self) -> u64 {
        self.bytes.iter().sum()
    }
}

/// Memory that CUDA takes per process (context, kernels, cuBLAS workspaces), as nvidia-smi shows
/// it: 0.5 to 1 GiB, depending on the GPU.
const CUDA_CONTEXT: u64 = 1 << 30;
/// Elements that an update with mixed dtypes widens at a time (see `optim`).
const WIDENED: u64 = 1 << 24;
/// Bytes of an index.
const INDEX: u64 = 8;
/// The same with moments in 8 bits, and the bytes of their temporaries per element.
const WIDENED_BLOCKS: (u64, u64) = (1 << 22, 24);

impl Job {
    /// Memory at each moment of a step.
    pub fn moments(&self) -> Vec<Moment> {
        let s = Sizes::of(&self.config);
        let (blocks, head, g) = (Blocks::of(self), Head::of(self), self.gradients(&s));
        let block = &blocks.largest;
        let (weight, layers, (adapted, all_adapted)) =
            (self.weight_bytes(), self.config.num_hidden_layers as u64, self.adapted());
        let recompute = self.args.gradient_checkpointing;
        // Weights are cast in the forward pass of a block, and the cast is kept with its
        // activations.
        let cast = if weight == self.compute_bytes() { 0 } else { self.compute_bytes() };
        // Weights are lent to a block in the dtype in which it computes.
        let casts = |weights: u64, adapters: u64| {
            let weights = if self.lends() { 0 } else { cast * weights };
            weights + self.adapter_cast() * adapters
        };
        let block_cast = casts(s.block, adapted);
        // Saved tensors and casts in memory at the loss, and in the first block's backward pass:
        // those of all blocks, or of the one block that is recomputed.
        let (kept_saved, kept_casts) =
            if recompute { (0, 0) } else { (blocks.saved, casts(s.all_blocks, all_adapted)) };
        let (first_saved, first_casts) = if recompute { (block.saved, block_cast) } else { (kept_saved, kept_casts) };
        let lent = Lent::of(self, &s);
        let kept = if recompute { 0 } else { layers };
        let inputs = (layers + 1) * block.input;
        let windowed = self.config.windows.iter().flatten().count() as u64;
        // For the blocks whose activations are kept: all, or the recomputed one, which may have a
        // window.
        let masks =
            |kept: u64| windows(self) + block.window * if kept == layers { windowed } else { kept.min(windowed) };
        let kept_here = |offloaded: bool, bytes: u64| if offloaded { 0 } else { bytes.div_ceil(self.world) };
        // Every rank has all adapters.
        let moments = match &self.lora {
            Some(_) => self.moment_bytes(),
            None => kept_here(self.args.offload != Offload::None, self.moment_bytes()),
        };
        let moment = |name, lent, gradients, activations, loss, casts, update| Moment {
            name,
            bytes: [
                kept_here(self.args.offload == Offload::All, s.total() * weight) + F32 * all_adapted,
                lent,
                moments,
                gradients,
                activations,
                loss,
                casts,
                update,
                self.frozen.div_ceil(self.world) * (8 + weight),
                if self.cuda { CUDA_CONTEXT } else { PROGRAM },
            ],
        };
        let update = self.update(&s);
        let mut all = vec![
            moment(
                "loss",
                lent.at_loss,
                g.at_loss,
                inputs + kept_saved + masks(kept),
                head.hidden + head.chunk,
                kept_casts + cast * s.embedding,
                0,
            ),
            moment(
                "first block",
                lent.first_block,
                g.first_block,
                inputs + first_saved + block.transient + masks(kept.max(1)),
                0,
                first_casts,
                0,
            ),
            moment(
                "last block",
                lent.block,
                g.last_block,
                block.input + block.saved + block.transient + masks(1),
                0,
                block_cast,
                0,
            ),
            moment("embedding", 0, g.embedding, 2 * block.input + masks(0), 0, 0, 0),
        ];
        // With updates in the backward pass, the head is updated first, while all activations are
        // kept.
        all.push(if self.args.optimizer_in_backward {
            let activations = inputs + kept_saved + masks(kept);
            moment("update", lent.at_update, g.update, activations, 0, kept_casts, update)
        } else {
            moment("update", 0, g.update, 0, 0, 0, update)
        });
        all
    }

    /// Bytes of gradients at each moment. They have the weights' dtype; the output matrix's
    /// gradient and sums over batches are f32.
    fn gradients(&self, s: &Sizes) -> Gradients {
        let weight = self.args.master_dtype.size() as u64;
        let tied = self.config.tie_word_embeddings;
        let embedding = if self.args.freeze_embeddings { 0 } else { s.embedding };
        let matrix = F32 * if tied { embedding } else { s.head };
        // The gradient of a tied matrix is kept until the embedding's gradient is computed.
        let waiting = if tied { matrix } else { 0 };
        let block = s.block * weight;
        // The table's own gradient; if tied also the sum of both, and its f32 copy.
        let copies = if tied && weight != F32 { 2 } else { u64::from(tied) };
        let last = embedding * weight + copies * F32 * embedding;
        let sums = F32 * self.trained(s);
        if self.lora.is_some() {
            return self.adapter_gradients(s);
        }
        if self.lends() {
            return self.shared_gradients(s, matrix, waiting, last);
        }
        if self.args.grad_accum > 1 {
            let unit = sums + waiting + block;
            Gradients {
                at_loss: sums + matrix,
                first_block: unit,
                last_block: unit,
                embedding: sums + waiting + last,
                update: sums,
            }
        } else if self.args.optimizer_in_backward {
            let unit = waiting + block;
            Gradients {
                at_loss: matrix,
                first_block: unit,
                last_block: unit,
                embedding: waiting + last,
                update: matrix.max(unit),
            }
        } else {
            let head = matrix + s.norm * weight;
            let all = head + s.all_blocks * weight;
            Gradients {
                at_loss: matrix,
                first_block: head + block,
                last_block: all,
                embedding: all + last,
                update: all + if tied { 0 } else { embedding * weight },
            }
        }
    }

    /// Gradients of adapters, which are f32.
    fn adapter_gradients(&self, s: &Sizes) -> Gradients {
        let (block, all) = (F32 * self.adapted().0, F32 * self.trained(s));
        let sums = if self.args.grad_accum > 1 { all } else { 0 };
        let last = match self.args.optimizer_in_backward {
            true => block,
            false => all,
        };
        // A rank's gradients once more as one vector, those of all ranks, and the sums.
        let gathered = if self.world > 1 { (self.world + 2) * last } else { last };
        Gradients {
            at_loss: sums,
            first_block: sums + block,
            last_block: last + block,
            embedding: last.max(gathered),
            update: last,
        }
    }

    /// Bytes per element of the copies of adapters in the dtype of the computation.
    fn adapter_cast(&self) -> u64 {
        if self.compute_bytes() == F32 { 0 } else { self.compute_bytes() }
    }

    /// Gradients where weights are lent: those of a unit, in the dtype in which it is lent; the
    /// flat vectors in which the unit before is summed over the ranks; this rank's sums in f32, of
    /// all units or of the one that is updated.
    fn shared_gradients(&self, s: &Sizes, matrix: u64, waiting: u64, last: u64) -> Gradients {
        let block = s.block * self.wire_bytes();
        // A vector to send and one to receive.
        let vectors = if self.world > 1 { 2 } else { 1 };
        let sums = if self.args.optimizer_in_backward { 0 } else { (F32 * self.trained(s)).div_ceil(self.world) };
        let earlier = if self.args.grad_accum > 1 { sums } else { 0 };
        // The sum of the unit that is updated.
        let sum_of = |elements: u64| {
            let bytes = if self.args.optimizer_in_backward { F32 * elements } else { 0 };
            bytes.div_ceil(self.world)
        };
        let block_sum = sum_of(s.block);
        let head = if self.config.tie_word_embeddings { s.norm } else { s.norm + s.head };
        Gradients {
            at_loss: earlier + matrix,
            first_block: earlier + waiting + vectors * F32 * head + block,
            last_block: sums + waiting + (vectors + 1) * block,
            embedding: sums + waiting + last + (block + block_sum).max(vectors * F32 * s.embedding),
            update: if self.args.optimizer_in_backward {
                // The block's gradients are freed before its update allocates temporaries.
                block + block_sum.max(sum_of(matrix / F32)) + block.saturating_sub(self.update(s))
            } else {
                sums
            },
        }
    }

    /// Temporaries of an update with mixed dtypes: f32 copies of a part of a tensor, and random
    /// bits for rounding.
    fn update(&self, s: &Sizes) -> u64 {
        let (weights, moments) = (self.args.master_dtype == Dtype::BF16, self.args.optim_state_dtype == Dtype::BF16);
        // State in host memory is copied to the device, a part at a time.
        let copied = self.cuda && self.args.offload != Offload::None;
        let eight_bits = self.args.optim == Optimizer::Adamw8bit;
        if !weights && !moments && !copied && !eight_bits {
            return 0;
        }
        let copies = 2 * u64::from(weights) + 2 * u64::from(moments);
        let largest = match &self.lora {
            Some(_) => (0..self.config.num_hidden_layers).flat_map(|layer| self.adapters(layer)).max().unwrap_or(0),
            None => s.largest,
        };
        if eight_bits {
            let (elements, bytes) = WIDENED_BLOCKS;
            return elements.min(largest) * (bytes + copies * F32 + 2);
        }
        WIDENED.min(largest) * (copies * F32 + 3 * F32 + 2)
    }

    /// The moment with the highest total.
    pub fn peak(&self) -> Moment {
        self.moments().into_iter().max_by_key(Moment::total).expect("there are five moments")
    }

    /// Table of the memory by part and moment, in GiB.
    pub fn table(&self) -> String {
        let (moments, peak) = (self.moments(), self.peak());
        let eight_bits = self.args.optim == Optimizer::Adamw8bit;
        let names = |part: &str| match part {
            "weights" => format!("weights, {}", if self.weight_bytes() == F32 { "f32" } else { "bf16" }),
            "moments" if eight_bits => "moments, 2 x 8 bits".to_owned(),
            "moments" => format!("moments, 2 x {}", self.args.optim_state_dtype.name().to_lowercase()),
            "casts" => "casts to bf16".to_owned(),
            "context" if self.cuda => "CUDA context".to_owned(),
            "context" => "program".to_owned(),
            other => other.to_owned(),
        };
        let dtype = if self.compute_bytes() == F32 { "f32" } else { "bf16" };
        let trained = grouped(self.trained(&Sizes::of(&self.config)));
        let adapters = if self.lora.is_some() { format!(", {trained} of adapters") } else { String::new() };
        let mut text = format!(
            "GiB, computed: {:?}, {} parameters{adapters}; {} tokens a batch, computing in {dtype} on {}\n{:18}",
            self.config.family,
            grouped(Sizes::of(&self.config).total()),
            grouped(self.tokens),
            if self.cuda { "CUDA" } else { "the CPU" },
            ""
        );
        moments.iter().for_each(|m| text.push_str(&format!("{:>13}", m.name)));
        for (i, part) in PARTS.iter().enumerate().filter(|(i, _)| moments.iter().any(|m| m.bytes[*i] > 0)) {
            text.push_str(&format!("\n{:18}", names(part)));
            moments.iter().for_each(|m| text.push_str(&format!("{:13.2}", gib(m.bytes[i]))));
        }
        text.push_str(&format!("\n{:18}", "total"));
        for m in &moments {
            let mark = if m.name == peak.name { '*' } else { ' ' };
            text.push_str(&format!("{:>13}", format!("{mark}{:.2}", gib(m.total()))));
        }
        text + "\n"
    }

    /// The table in bytes, as JSON.
    pub fn to_json(&self) -> Value {
        let moment = |m: &Moment| {
            let parts: serde_json::Map<String, Value> =
                PARTS.iter().zip(m.bytes).map(|(p, b)| ((*p).to_owned(), b.into())).collect();
            json!({"moment": m.name, "total": m.total(), "parts": parts})
        };
        json!({"parameters": Sizes::of(&self.config).total(), "tokens": self.tokens, "peak": self.peak().total(),
            "moments": self.moments().iter().map(moment).collect::<Vec<_>>()})
    }
}

/// Whole weights of units on the device.
struct Lent {
    /// One block.
    block: u64,
    /// The head, the embedding if the output matrix is tied to it, and blocks that stay lent.
    at_loss: u64,
    /// The first block of the backward pass and the next one, or all that stay lent.
    first_block: u64,
    /// Blocks at an update in the backward pass.
    at_update: u64,
}

impl Lent {
    fn of(job: &Job, s: &Sizes) -> Self {
        if !job.lends() {
            return Self { block: 0, at_loss: 0, first_block: 0, at_update: 0 };
        }
        let weight = job.weight_bytes();
        let table = if job.config.tie_word_embeddings { s.embedding } else { 0 };
        let (block, all) = (s.block * job.wire_bytes(), s.all_blocks * job.wire_bytes());
        let (kept, first_block, at_update) =
            if job.args.reshard_after_forward { (0, 2 * block, block) } else { (all, all, all) };
        Self { block, at_loss: (s.norm + s.head + table) * weight + kept, first_block, at_update }
    }
}

struct Gradients {
    at_loss: u64,
    first_block: u64,
    last_block: u64,
    embedding: u64,
    update: u64,
}

/// 1234567 as 1,234,567.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).rev().map(|g| std::str::from_utf8(g).unwrap_or("")).collect();
    groups.join(",")
}

/// Activations of the decoder blocks.
struct Blocks {
    /// Those of the block with most.
    largest: Block,
    /// Tensors saved for the backward pass of all.
    saved: u64,
}

impl Blocks {
    fn of(job: &Job) -> Self {
        let all = (0..job.config.num_hidden_layers as usize).map(|layer| Block::of(job, layer));
        let all: Vec<Block> = all.collect();
        let saved = all.iter().map(|block| block.saved).sum();
        let largest = all.into_iter().max_by_key(|block| block.saved + block.transient);
        Self { largest: largest.expect("a model has blocks"), saved }
    }
}

/// Activations of one decoder block.
struct Block {
    /// Its input; with recomputation nothing else is kept.
    input: u64,
    /// Other tensors saved for its backward pass.
    saved: u64,
    /// Gradients of activations at the peak of its backward pass.
    transient: u64,
    /// Sliding-window mask in the dtype of the scores, saved by a block with a window.
    window: u64,
}

impl Block {
    fn of(job: &Job, layer: usize) -> Self {
        let c = &job.config;
        let [e, d, h, k, _] = dimensions(c);
        let (n, b) = (job.tokens, job.compute_bytes());
        let frozen = job.lora.is_some();
        let norm = |width: u64, own: bool| norm(c, b, width, own, frozen);
        let head_norms = if c.qk_norm.is_some() { norm((h + k) * d, true) } else { 0 };
        let [before_attention, others @ ..] = c.block_norms.names();
        let others = others.iter().flatten().count() as u64;
        let norms = if before_attention.is_some() { norm(e, false) } else { 0 } + others * norm(e, true);
        // Inputs of linear layers without a gradient of their own are not saved; without a norm
        // before it, attention has the block's own.
        let input = |names: &[&str]| u64::from(names.iter().any(|name| job.weight_has_gradient(name)));
        let attention_input = match before_attention {
            Some(_) => input(&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj"]),
            None => 0,
        };
        let mlp = MlpBytes::of(job, layer);
        let inputs = e * (attention_input + mlp.input);
        // Values are a view of the product with q and k, which keeps it.
        let fused = if c.fused { (h + k) * d * b } else { 0 };
        let fixed = norms + head_norms + inputs * b + fused + mlp.saved;
        let attended = attention(job, input(&["self_attn.o_proj"]));
        let scores = scores(job);
        // A·x of each adapter.
        let narrow =
            job.lora.as_ref().map_or(0, |lora| job.adapters(layer as i64).count() as u64 * lora.rank as u64 * b);
        Self {
            input: n * e * b,
            saved: n * (fixed + attended + narrow) + scores.saved,
            // In the backward of attention the MLP is already freed.
            transient: 2 * n * e * b + (n * mlp.transient).max(scores.transient.saturating_sub(n * mlp.saved)),
            window: if c.attention_softcap.is_some() { 0 } else { windows(job) * b },
        }
    }
}

/// Bytes of an MLP or of experts per token.
struct MlpBytes {
    /// 1 if a layer saves the input.
    input: u64,
    saved: u64,
    transient: u64,
}

impl MlpBytes {
    fn of(job: &Job, layer: usize) -> Self {
        let (c, b) = (&job.config, job.compute_bytes());
        let input = |names: &[&str]| u64::from(names.iter().any(|name| job.weight_has_gradient(name)));
        let Some(own) = c.experts_of(layer) else {
            let f = c.intermediate_size as u64;
            let product = input(&["mlp.down_proj"]);
            // The backward pass needs three times the width, of which the saved product is freed.
            return Self {
                input: input(&["mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj"]),
                saved: (3 + product) * f * b,
                transient: (3 - product) * f * b,
            };
        };
        let [e, f, k, x] = [c.hidden_size, own.width, own.per_token, own.count].map(|n| n as u64);
        // Experts and routers take no adapters.
        let trained = u64::from(job.lora.is_none());
        // Rows by expert and rows by token, both k times; two permutations and the chosen experts;
        // probabilities and weights.
        let saved = k * ((1 + trained) * e * b + (3 + trained) * f * b + 3 * INDEX + 2 * F32 + b) + x * F32;
        // The products with the weights and their gradient, of the rows by token.
        Self { input: trained, saved, transient: 2 * k * e * b }
    }
}

/// Bytes a norm over `width` elements saves per token: its f32 input (if that is no copy, only if
/// `own`: not saved by another operation), and, unless the weight is frozen, the normed values
/// before it.
fn norm(c: &ModelConfig, bytes: u64, width: u64, own: bool, frozen: bool) -> u64 {
    let input = if bytes != F32 || own { F32 } else { 0 };
    let normed = match frozen {
        true => 0,
        false if c.norm_weight == NormWeight::Plain => bytes,
        false => F32,
    };
    width * (input + normed)
}

/// Bytes of queries, keys, values and output of attention per token, without scores; `input` is 1
/// if the output projection saves its input.
fn attention(job: &Job, input: u64) -> u64 {
    let c = &job.config;
    let [_, d, h, k, _] = dimensions(c);
    let b = job.compute_bytes();
    if c.attention_softcap.is_some() {
        // Keys and values are repeated for every query head.
        return 4 * h * d * b;
    }
    // Attention document by document concatenates the outputs in a copy.
    let results = if job.flash_varlen() || job.longest >= job.tokens { 1 } else { 1 + input };
    (h + 2 * k + results * h) * d * b + h * F32
}

/// Elements of the sliding-window masks of a batch: s × s for each document longer than the window,
/// unless a flash kernel implements windows. The boolean masks take one byte per element.
fn windows(job: &Job) -> u64 {
    let longest = job.longest.min(job.tokens);
    let window = job.config.windows.iter().copied().flatten().next();
    let masked = window.is_some_and(|window| longest > window as u64) && !job.flash_varlen();
    if masked { longest * job.tokens } else { 0 }
}

struct Scores {
    saved: u64,
    transient: u64,
}

/// Scores of each document, h × s × s: only soft-capped attention materialises them, as no fused
/// kernel has the cap.
fn scores(job: &Job) -> Scores {
    if job.config.attention_softcap.is_none() {
        return Scores { saved: 0, transient: 0 };
    }
    let heads = job.config.num_attention_heads as u64;
    let longest = job.longest.min(job.tokens).max(1);
    let one = heads * longest * longest;
    let all = heads * longest * job.tokens;
    // Saved: tanh, softmax in f32, its cast if hidden states are not f32, and the mask, one byte
    // per head.
    let b = job.compute_bytes();
    let cast = if b == F32 { 0 } else { b };
    Scores { saved: all * (b + F32 + cast) + all / heads, transient: one * (2 * F32 + b) }
}

/// Final norm and loss, with the backward pass of the loss.
struct Head {
    /// Hidden states of the targets and their gradient.
    hidden: u64,
    /// Logits and log-probabilities of a chunk.
    chunk: u64,
}

impl Head {
    fn of(job: &Job) -> Self {
        let c = &job.config;
        let [e, _, _, _, v] = dimensions(c);
        let b = job.compute_bytes();
        let chunk = job.tokens.min(job.args.loss_chunk as u64) * v;
        let cast = if b == F32 { 0 } else { F32 };
        // Logits, their cast in log_softmax, log-probabilities; with a soft cap also tanh, slope
        // and capped logits.
        let capped = if c.logit_softcap.is_some() { 2 * b + F32 } else { 0 };
        let divided = if c.logit_divisor.is_some() { b } else { 0 };
        let forward = chunk * (b + cast + F32 + capped + divided);
        // The gradient in f32 and its cast; the product for the matrix, and its f32 copy before it
        // is added.
        let slope = if c.logit_softcap.is_some() { F32 } else { 0 };
        let cast_gradient = if b == F32 { 0 } else { b };
        let product = if job.lora.is_some() { 0 } else { v * e * (b + cast) };
        let backward = chunk * (F32 + slope + cast_gradient) + product;
        Self {
            hidden: job.tokens * (norm(c, b, e, true, job.lora.is_some()) + 2 * e * b),
            chunk: forward.max(backward),
        }
    }
}
