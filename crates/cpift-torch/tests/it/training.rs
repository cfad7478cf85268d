//! Options that save memory and time leave results identical, or equal within a tolerance: every
//! family, on the golden models.

use crate::golden::{Golden, batch, max_abs};
use cpift_torch::freeze::Freeze;
use cpift_torch::loss::target_losses;
use cpift_torch::model::CausalLM;
use cpift_torch::optim::{AdamWConfig, StateKind};
use cpift_torch::pieces::whole_pieces;
use cpift_torch::train::{PassConfig, StepConfig, StepInput, Trainer, loss_and_gradients};
use cpift_torch::weights::Parameters;
use tch::{Device, Kind, Tensor, no_grad};

const KEEP: PassConfig = PassConfig { checkpointing: false, loss_chunk: 1024, reshard_after_forward: true };

fn same_bits(a: &Tensor, b: &Tensor) -> bool {
    let bytes = |t: &Tensor| {
        let t = t.detach().contiguous();
        let mut out = vec![0u8; t.numel() * t.kind().elt_size_in_bytes()];
        t.copy_data_u8(&mut out, t.numel());
        out
    };
    a.kind() == b.kind() && bytes(a) == bytes(b)
}

/// The model in f32, which trains without a load-balancing loss.
fn open_without_balance(golden: &Golden) -> (CausalLM, Parameters) {
    let (mut model, parameters) = golden.open_f32();
    if model.config.experts.is_some() {
        model.config.set_router_aux_loss(Some(0.0)).unwrap();
    }
    (model, parameters)
}

/// The parameters after three steps, and the losses.
fn train(golden: &Golden, master: Kind, config: StepConfig, split: bool) -> (Parameters, Vec<f64>) {
    train_model(golden, golden.open(Device::Cpu, master, Kind::Float), config, split)
}

fn train_model(
    golden: &Golden,
    (model, parameters): (CausalLM, Parameters),
    config: StepConfig,
    split: bool,
) -> (Parameters, Vec<f64>) {
    let mut trainer = Trainer::new(&model, &parameters, None, config).unwrap();
    let documents = golden.documents();
    let losses = (0..3).map(|step| {
        let batches = if split { documents.chunks(1).map(batch).collect() } else { vec![batch(&documents)] };
        trainer.step(&StepInput::alone(&batches), 1e-2, step).unwrap().read().0
    });
    let losses = losses.collect();
    (parameters, losses)
}

#[test]
fn recomputed_activations_give_the_same_bits() {
    for (golden, compute) in Golden::here().iter().flat_map(|g| [(g, Kind::Float), (g, Kind::BFloat16)]) {
        let (model, parameters) = golden.open(Device::Cpu, Kind::Float, compute);
        let all = batch(&golden.documents());
        let (kept, grads) = loss_and_gradients(&model, &parameters, &all, KEEP).unwrap();
        let pass = PassConfig { checkpointing: true, ..KEEP };
        let (recomputed, again) = loss_and_gradients(&model, &parameters, &all, pass).unwrap();
        assert_eq!(kept.to_bits(), recomputed.to_bits());
        for (name, grad) in &grads {
            assert!(same_bits(grad, &again[name]), "{}: the gradient of {name} in {compute:?}", golden.name);
        }
    }
}

/// The unit-by-unit pass against libtorch's own backward pass through the whole graph and its own
/// cross entropy.
#[test]
fn the_whole_graph_gives_the_same_gradients() {
    for golden in Golden::here() {
        let (model, parameters) = open_without_balance(&golden);
        let all = batch(&golden.documents());
        let x = model.hidden(&all.ids_bs, &model.documents(&all.lengths), None);
        let logits = model.logits(&x).squeeze_dim(0).index_select(0, &all.places_n);
        let loss = logits.cross_entropy_for_logits(&all.labels_n);
        let inputs: Vec<&Tensor> = parameters.values().collect();
        let whole = Tensor::run_backward(&[&loss], &inputs, false, false);
        let (value, grads) = loss_and_gradients(&model, &parameters, &all, KEEP).unwrap();
        assert!((value - loss.double_value(&[])).abs() < 1e-6, "{}", golden.name);
        for ((name, grad), expected) in grads.iter().zip(&whole) {
            let relative = max_abs(&(grad - expected)) / max_abs(expected);
            assert!(relative < 1e-5, "{}: the gradient of {name} differs by {relative}", golden.name);
        }
    }
}

#[test]
fn updates_in_the_backward_pass_give_the_same_bits() {
    for golden in Golden::here() {
        for (master, state) in
            [(Kind::Float, StateKind::Float), (Kind::BFloat16, StateKind::BFloat16), (Kind::Float, StateKind::BFloat16)]
        {
            let optimizer = AdamWConfig { weight_decay: 0.1, state, ..AdamWConfig::default() };
            let after = StepConfig { optimizer, max_grad_norm: 0.0, ..StepConfig::default() };
            let pass = PassConfig { checkpointing: true, ..KEEP };
            let during = StepConfig { optimizer_in_backward: true, pass, ..after };
            let (a, losses) = train(&golden, master, after, false);
            let (b, others) = train(&golden, master, during, false);
            assert_eq!(losses, others, "{}", golden.name);
            for (name, tensor) in &a {
                assert!(same_bits(tensor, &b[name]), "{}: {name} with {master:?} weights", golden.name);
            }
        }
    }
}

#[test]
fn a_loss_in_parts_is_the_whole_loss() {
    for golden in Golden::here() {
        let (model, parameters) = golden.open_f32();
        let all = batch(&golden.documents());
        let (whole, grads) = loss_and_gradients(&model, &parameters, &all, KEEP).unwrap();
        for loss_chunk in [1, 7] {
            let pass = PassConfig { loss_chunk, ..KEEP };
            let (loss, parts) = loss_and_gradients(&model, &parameters, &all, pass).unwrap();
            assert!((loss - whole).abs() < 1e-6, "{}: {loss} and {whole}", golden.name);
            for (name, grad) in &grads {
                let relative = max_abs(&(grad - &parts[name])) / max_abs(grad);
                assert!(relative < 1e-5, "{}: the gradient of {name} differs by {relative}", golden.name);
            }
        }
    }
}

#[test]
fn documents_of_a_row_do_not_see_one_another() {
    for golden in Golden::here() {
        let (model, _) = golden.open_f32();
        let losses = |documents: &[(Tensor, Tensor)]| {
            let all = batch(documents);
            let x = no_grad(|| model.hidden(&all.ids_bs, &model.documents(&all.lengths), None));
            let normed = model.final_norm(&x.squeeze_dim(0).index_select(0, &all.places_n));
            target_losses(&model, &normed, &all.labels_n, 1024)
        };
        let documents = golden.documents();
        let packed = losses(&documents);
        let alone: Vec<Tensor> = documents.chunks(1).map(losses).collect();
        let alone = Tensor::cat(&alone, 0);
        // Each target's loss is about 5 nats, where f32 has a resolution of 5e-7.
        let difference = max_abs(&(&packed - &alone));
        assert!(difference < 5e-6, "{}: losses differ by {difference}", golden.name);
        let mean = |t: &Tensor| t.mean(Kind::Double).double_value(&[]);
        assert!((mean(&packed) - mean(&alone)).abs() < 1e-6, "{}: the mean loss", golden.name);
    }
}

#[test]
fn micro_batches_make_the_step_of_one_big_batch() {
    for golden in Golden::here() {
        // A large epsilon, so that the update follows the gradient's size and not its sign alone.
        let optimizer = AdamWConfig { eps: 1.0, ..AdamWConfig::default() };
        let config = StepConfig { optimizer, ..StepConfig::default() };
        // The load-balancing loss is one of a micro-batch.
        let [(a, whole), (b, split)] =
            [false, true].map(|split| train_model(&golden, open_without_balance(&golden), config, split));
        for (x, y) in whole.iter().zip(&split) {
            assert!((x - y).abs() < 1e-6, "{}: {whole:?} and {split:?}", golden.name);
        }
        for (name, tensor) in &a {
            let difference = max_abs(&(tensor - &b[name]));
            assert!(difference < 1e-6, "{}: {name} differs by {difference}", golden.name);
        }
    }
}

#[test]
fn the_load_balancing_loss_of_a_step_is_the_mean_of_its_micro_batches() {
    let golden = Golden::named("models/qwen3_moe_aux");
    let documents = golden.documents();
    let all: Vec<_> = documents.chunks(1).map(batch).collect();
    let loss = |open: (CausalLM, Parameters), batch| loss_and_gradients(&open.0, &open.1, batch, KEEP).unwrap();
    let mut balances = Vec::new();
    for one in &all {
        let ((with, grads), (without, plain)) =
            (loss(golden.open_f32(), one), loss(open_without_balance(&golden), one));
        balances.push(with - without);
        for (name, grad) in &grads {
            // The loss reaches the routers and what is before them.
            let felt = !same_bits(grad, &plain[name]);
            let behind =
                ["model.layers.5.mlp.experts", "model.norm", "lm_head"].iter().any(|part| name.starts_with(part));
            assert!(felt != behind, "{name}");
        }
    }
    assert!((balances[0] - balances[1]).abs() > 1e-3 && balances[0] > 0.1, "{balances:?}");
    let expected = balances.iter().sum::<f64>() / 2.0;
    let config = StepConfig::default();
    let split = train(&golden, Kind::Float, config, true).1[0];
    let plain = train_model(&golden, open_without_balance(&golden), config, true).1[0];
    assert!((split - plain - expected).abs() < 1e-6, "{split}, without {plain}, expected {expected} more");
}

/// Two equal tokens have equal hidden states, so that half of the experts compute nothing.
#[test]
fn experts_without_tokens_have_a_gradient_of_zero() {
    let ids = Tensor::from_slice(&[7i64, 7]);
    let all = batch(&[(ids.shallow_clone(), ids)]);
    for (name, layers) in [("models/qwen3_moe", vec![0, 1]), ("models/qwen3_moe_aux", vec![1, 5])] {
        for (compute, checkpointing) in [(Kind::Float, false), (Kind::Float, true), (Kind::BFloat16, true)] {
            let (model, parameters) = Golden::named(name).open(Device::Cpu, Kind::Float, compute);
            let pass = PassConfig { checkpointing, ..KEEP };
            let (_, grads) = loss_and_gradients(&model, &parameters, &all, pass).unwrap();
            assert!(grads.keys().eq(parameters.keys()), "a gradient for every parameter");
            for layer in &layers {
                for part in ["gate_proj", "up_proj", "down_proj"] {
                    let sizes = (0..4)
                        .map(|x| grads[&format!("model.layers.{layer}.mlp.experts.{x}.{part}.weight")].abs().max());
                    let idle = sizes.filter(|most| most.double_value(&[]) == 0.0).count();
                    assert_eq!(idle, 2, "{name}: layer {layer}, {part}");
                }
            }
        }
    }
}

/// Updates of a hundredth of a bf16 step: rounding to nearest would lose all of them.
#[test]
fn bf16_weights_move_on_average_as_f32_weights_do() {
    let golden = Golden::named("llama/gqa_untied");
    let moved = |master: Kind| {
        let (model, parameters) = golden.open(Device::Cpu, master, Kind::Float);
        let before = parameters["lm_head.weight"].detach().to_kind(Kind::Float).copy();
        let mut trainer = Trainer::new(&model, &parameters, None, StepConfig::default()).unwrap();
        for step in 0..20 {
            trainer.step(&StepInput::alone(&[batch(&golden.documents())]), 2e-5, step).unwrap();
        }
        let difference = parameters["lm_head.weight"].detach().to_kind(Kind::Float) - before;
        // Along the direction that f32 weights take.
        difference.to_kind(Kind::Double)
    };
    let (wide, narrow) = (moved(Kind::Float), moved(Kind::BFloat16));
    let along =
        (&wide * &narrow).sum(Kind::Double).double_value(&[]) / wide.square().sum(Kind::Double).double_value(&[]);
    assert!((along - 1.0).abs() < 0.15, "bf16 weights went {along} of the way");
}

/// The norm counts only trainable elements, and clipping scales only those.
#[test]
fn clipping_leaves_frozen_elements_out() {
    const MAX_NORM: f64 = 0.01;
    let golden = Golden::named("models/qwen2");
    let all = batch(&golden.documents());
    // A large epsilon, so that the update follows the gradient's size and not its sign alone.
    let optimizer = AdamWConfig { eps: 1.0, weight_decay: 0.1, ..AdamWConfig::default() };
    let (model, parameters) = golden.open_f32();
    let before: Vec<Tensor> = parameters.values().map(|t| t.detach().copy()).collect();
    let freeze = Freeze::every(&whole_pieces(&parameters), 50.0);
    let config = StepConfig { optimizer, max_grad_norm: MAX_NORM, ..StepConfig::default() };
    let (_, mut grads) = loss_and_gradients(&model, &parameters, &all, config.pass).unwrap();
    let mut trainer = Trainer::new(&model, &parameters, Some(freeze), config).unwrap();
    let outcome = trainer.step(&StepInput::alone(&[all]), 1e-2, 0).unwrap();

    let whole = grads.values().map(|g| g.square().sum(Kind::Double).double_value(&[])).sum::<f64>().sqrt();
    let freeze = trainer.freeze.as_ref().unwrap();
    grads.iter_mut().for_each(|(name, grad)| freeze.zero_frozen_grads(name, grad));
    let free = grads.values().map(|g| g.square().sum(Kind::Double).double_value(&[])).sum::<f64>().sqrt();
    let norm = outcome.read().1;
    assert!((norm - free).abs() < 1e-5 * free && norm < 0.9 * whole, "norm {norm}; of all {whole}, of the free {free}");
    assert!(norm > 2.0 * MAX_NORM, "nothing is clipped at {norm}");
    for ((name, tensor), old) in parameters.iter().zip(&before) {
        let moved = (tensor.detach() - old).view([-1]);
        let frozen = moved.slice(0, None, None, 2);
        assert_eq!(max_abs(&frozen), 0.0, "{name}: a frozen element moved");
        // AdamW's first step: −lr (g / (|g| + ε) + decay · w), g clipped; every second element is
        // free.
        let grad = grads[name].to_kind(Kind::Double).view([-1]) * (MAX_NORM / norm);
        let decay = if tensor.dim() > 1 { 0.1 } else { 0.0 };
        let expected = (&grad / (grad.abs() + 1.0) + old.to_kind(Kind::Double).view([-1]) * decay) * -1e-2;
        let free = |t: &Tensor| t.slice(0, 1, None, 2).to_kind(Kind::Double);
        let off = max_abs(&(free(&moved) - free(&expected)));
        assert!(off < 1e-7, "{name}: the free elements are off by {off}");
    }
}

#[test]
fn nothing_moves_from_the_first_bad_value_on() {
    let golden = Golden::named("models/qwen2");
    for optimizer_in_backward in [false, true] {
        let (model, parameters) = golden.open_f32();
        let config = StepConfig { optimizer_in_backward, max_grad_norm: 0.0, ..StepConfig::default() };
        let mut trainer = Trainer::new(&model, &parameters, None, config).unwrap();
        let all = batch(&golden.documents());
        trainer.step(&StepInput::alone(&[batch(&golden.documents())]), 1e-3, 0).unwrap();
        // One weight of the head makes the loss of every target not finite.
        let norm = &parameters["model.norm.weight"];
        let good = norm.detach().copy();
        no_grad(|| drop(norm.get(0).fill_(f64::NAN)));
        let before: Vec<Tensor> = parameters.values().map(|t| t.detach().copy()).collect();
        assert!(trainer.step(&StepInput::alone(&[all]), 1e-3, 1).unwrap().read().0.is_nan());
        no_grad(|| norm.shallow_clone().copy_(&good));
        // A good batch later does not resume updates: the host may not have read the loss yet.
        assert!(trainer.step(&StepInput::alone(&[batch(&golden.documents())]), 1e-3, 2).unwrap().read().0.is_finite());
        for ((name, tensor), old) in parameters.iter().zip(&before) {
            assert!(name == "model.norm.weight" || same_bits(tensor, old), "{name} moved");
        }
        assert!(same_bits(norm, &good));
    }
}

#[test]
fn a_frozen_embedding_does_not_move() {
    for (case, tied) in [("models/llama3_rope", true), ("models/mistral_full", false)] {
        let golden = Golden::named(case);
        let before = golden.open_f32().1;
        let config = StepConfig { train_embeddings: false, ..StepConfig::default() };
        let (after, _) = train(&golden, Kind::Float, config, false);
        for (name, tensor) in &after {
            let same = same_bits(tensor, &before[name]);
            assert_eq!(same, name == "model.embed_tokens.weight", "{case}: {name}");
        }
        assert_eq!(after.contains_key("lm_head.weight"), !tied);
    }
}
