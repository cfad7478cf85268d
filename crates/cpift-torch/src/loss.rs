//! Cross entropy at the target positions, computed in chunks, so that the logits of a whole batch
//! never exist.
//!
//! The backward pass of the output head is written out: softmax − one-hot overwrites the
//! log-probabilities. Shape suffixes: n targets, c targets of a chunk, e embedding, v vocabulary.

use tch::{Kind, Tensor, no_grad};

use crate::ffi::linear;
use crate::model::CausalLM;

/// The loss of a batch and its gradients by the inputs of the output head.
pub(crate) struct HeadLoss {
    /// Negative log-likelihood summed over the targets, in nats: one f64 element.
    pub sum: Tensor,
    /// Gradient of the scaled loss by the normed hidden states [n, e].
    pub grad_hidden: Tensor,
    /// Gradient of the scaled loss by the output matrix [v, e], f32.
    pub grad_matrix: Option<Tensor>,
}

/// Negative log-likelihood of each of `labels_n` given the normed hidden states: f32 `[n]`, without
/// a graph.
pub fn target_losses(model: &CausalLM, normed_ne: &Tensor, labels_n: &Tensor, chunk: usize) -> Tensor {
    no_grad(|| {
        let matrix_ve = model.matrix(normed_ne.kind());
        let parts: Vec<Tensor> = chunks(labels_n, chunk)
            .map(|(start, n)| {
                let (log_probs, _) = log_probs(model, &normed_ne.narrow(0, start, n), &matrix_ve);
                -log_probs.gather(1, &labels_n.narrow(0, start, n).unsqueeze(1), false).squeeze_dim(1)
            })
            .collect();
        if parts.is_empty() { Tensor::zeros([0], (Kind::Float, normed_ne.device())) } else { Tensor::cat(&parts, 0) }
    })
}

/// Kullback-Leibler divergence KL(from || to) at each target, f32 `[n]`, given a model and its
/// normed hidden states [n, e] of both.
pub(crate) fn target_divergences(
    (from, from_ne): (&CausalLM, &Tensor),
    (to, to_ne): (&CausalLM, &Tensor),
    chunk: usize,
) -> Tensor {
    no_grad(|| {
        let (_from_head, _to_head) = (from.lend_head(), to.lend_head());
        let [from_ve, to_ve] = [(from, from_ne), (to, to_ne)].map(|(model, x)| model.matrix(x.kind()));
        let parts: Vec<Tensor> = chunks(from_ne, chunk)
            .map(|(start, n)| {
                let (p_cv, _) = log_probs(from, &from_ne.narrow(0, start, n), &from_ve);
                let (q_cv, _) = log_probs(to, &to_ne.narrow(0, start, n), &to_ve);
                (p_cv.exp() * (p_cv - q_cv)).sum_dim_intlist(-1, false, Kind::Float)
            })
            .collect();
        Tensor::cat(&parts, 0)
    })
}

/// Loss and gradients of `scale` · Σ −log p(label), in chunks of `chunk` targets.
pub(crate) fn backward(
    model: &CausalLM,
    normed_ne: &Tensor,
    labels_n: &Tensor,
    scale: f64,
    chunk: usize,
    train_matrix: bool,
) -> HeadLoss {
    no_grad(|| {
        let (kind, device) = (normed_ne.kind(), normed_ne.device());
        let matrix_ve = model.matrix(kind);
        let mut sum = Tensor::zeros([], (Kind::Double, device));
        let grad_hidden = Tensor::zeros_like(normed_ne);
        let mut grad_matrix: Option<Tensor> = None;
        let scale = scale / model.config.logit_divisor.unwrap_or(1.0);
        for (start, n) in chunks(labels_n, chunk) {
            let hidden_ce = normed_ne.narrow(0, start, n);
            let labels_c1 = labels_n.narrow(0, start, n).unsqueeze(1);
            let (mut log_probs_cv, slope_cv) = log_probs(model, &hidden_ce, &matrix_ve);
            sum -= log_probs_cv.gather(1, &labels_c1, false).sum(Kind::Double);
            // d loss / d logits = softmax − one-hot, times the slope of the cap.
            let mut grad_cv = log_probs_cv.exp_();
            let _ = grad_cv.scatter_add_(1, &labels_c1, &Tensor::full([n, 1], -1.0, (Kind::Float, device)));
            if let Some(slope) = slope_cv {
                let _ = grad_cv.g_mul_(&slope);
            }
            let grad_cv = grad_cv.to_kind(kind);
            grad_hidden.narrow(0, start, n).copy_(&(linear(&grad_cv, &matrix_ve.tr(), None) * scale));
            if train_matrix {
                let part = linear(&grad_cv.tr(), &(hidden_ce * scale).tr(), None).to_kind(Kind::Float);
                grad_matrix = Some(match grad_matrix {
                    None => part,
                    Some(mut total) => total.g_add_(&part),
                });
            }
        }
        HeadLoss { sum, grad_hidden, grad_matrix }
    })
}

/// Log-probabilities [c, v] in f32 and, if logits are soft-capped, the derivative of the cap at
/// each logit.
fn log_probs(model: &CausalLM, hidden_ce: &Tensor, matrix_ve: &Tensor) -> (Tensor, Option<Tensor>) {
    let logits_cv = model.divided(linear(hidden_ce, matrix_ve, None));
    let Some(cap) = model.config.logit_softcap else {
        return (logits_cv.log_softmax(-1, Kind::Float), None);
    };
    let bent = (logits_cv / cap).tanh();
    let slope = 1.0 - bent.to_kind(Kind::Float).square();
    ((bent * cap).log_softmax(-1, Kind::Float), Some(slope))
}

/// Start and length of each chunk of the targets.
fn chunks(labels_n: &Tensor, chunk: usize) -> impl Iterator<Item = (i64, i64)> {
    let (n, chunk) = (labels_n.size()[0], chunk as i64);
    (0..n).step_by(chunk as usize).map(move |start| (start, chunk.min(n - start)))
}
