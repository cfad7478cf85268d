#!/usr/bin/env python3
"""Writes fixtures/golden/adamw_8bit.safetensors: AdamW with 8-bit block-wise moments, from its
definition in a few lines of PyTorch: weights, codes and largest values of the blocks after the
first and the tenth step. Fails unless bitsandbytes (pip install --no-deps bitsandbytes==0.50.2) on
the CPU gives the same maps, and weights within 1e-6 with at most one code in a thousand beside ours.
For that its search of the nearest value, which its CPU library approximates by a table and its CUDA
kernel does not, is replaced by comparison with all values.

Weights and gradients are sines, the same in f64 everywhere: weight i is sin(0.37 i + n), gradient i
of step t is sin(0.11 i + 1.7 t + n) · 10^(−(i mod 5)), for the tensor n; both rounded to f32."""
from pathlib import Path

import bitsandbytes.backends.cpu.ops as bnb_cpu
import bitsandbytes.functional as F
import torch
from bitsandbytes.optim import AdamW8bit
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parents[2] / "fixtures/golden"
# Whole blocks; a last block of one element; too small for 8 bits.
SHAPES = [(18, 256), (17, 241), (40, 100)]
LR, BETAS, EPS, DECAY, STEPS, BLOCK = 2e-3, (0.9, 0.995), 1e-8, 0.1, 10, 256


def dynamic_map(signed):
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1)
        means = (10 ** (exponent - 6) * ((bounds[:-1] + bounds[1:]) / 2)).tolist()
        values += means + ([-mean for mean in means] if signed else [])
    return torch.tensor(sorted(values))


class Stored:
    def __init__(self, count, signed):
        self.map = dynamic_map(signed)
        self.codes, self.absmax = torch.zeros(count, dtype=torch.uint8), torch.zeros(-(-count // BLOCK))

    def read(self):
        return self.map[self.codes.int()] * self.absmax.repeat_interleave(BLOCK)[: len(self.codes)]

    def write(self, values):
        self.absmax = torch.stack([block.abs().max() for block in values.split(BLOCK)])
        quotients = values / self.absmax.clamp(min=1e-38).repeat_interleave(BLOCK)[: len(values)]
        self.codes = torch.bucketize(quotients, (self.map[:-1] + self.map[1:]) / 2).to(torch.uint8)


def sines(shape, slope, start):
    count = shape[0] * shape[1]
    return torch.sin(torch.arange(count, dtype=torch.float64) * slope + start)


def weights():
    return [sines(shape, 0.37, n).float() for n, shape in enumerate(SHAPES)]


def gradients(step):
    size = lambda count: 10.0 ** -(torch.arange(count, dtype=torch.float64) % 5)
    return [(sines(shape, 0.11, 1.7 * step + n) * size(shape[0] * shape[1])).float() for n, shape in enumerate(SHAPES)]


def update(weight, m, v, grad, step):
    m = m * BETAS[0] + (1 - BETAS[0]) * grad
    v = v * BETAS[1] + (1 - BETAS[1]) * grad * grad
    root = v.sqrt() / (1 - BETAS[1] ** step) ** 0.5 + EPS
    return weight * (1 - LR * DECAY) - LR / (1 - BETAS[0] ** step) * m / root, m, v


def ours():
    found, params = {}, weights()
    stored = [(Stored(len(p), True), Stored(len(p), False)) for p in params[:2]]
    plain = [torch.zeros(len(params[2])), torch.zeros(len(params[2]))]
    for step in range(1, STEPS + 1):
        grads = gradients(step)
        for i, (m, v) in enumerate(stored):
            params[i], new_m, new_v = update(params[i], m.read(), v.read(), grads[i], step)
            m.write(new_m)
            v.write(new_v)
        params[2], *plain = update(params[2], *plain, grads[2], step)
        if step in (1, STEPS):
            for i, param in enumerate(params):
                found[f"{step}.{i}"] = param.clone()
            for i, moments in enumerate(stored):
                for name, moment in zip(("exp_avg", "exp_avg_sq"), moments):
                    found |= {f"{step}.{i}.{name}": moment.codes.clone(), f"{step}.{i}.{name}_absmax": moment.absmax.clone()}
    return found


def nearest(values, code, absmax, out, blocksize):
    flat = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % blocksize)).view(-1, blocksize)
    absmax.copy_(flat.abs().amax(1))
    quotients = flat / absmax.clamp(min=1e-38)[:, None]
    codes = (quotients.flatten()[:, None] - code).abs().argmin(1)
    out.copy_(codes[: values.numel()].view(out.shape))


def check(found):
    bnb_cpu._quant_blockwise_fp32_direct = nearest
    for signed in (True, False):
        assert torch.equal(dynamic_map(signed), F.create_dynamic_map(signed)), "the map"
    params = [torch.nn.Parameter(w.view(shape)) for w, shape in zip(weights(), SHAPES)]
    optimizer = AdamW8bit(params, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for step in range(1, STEPS + 1):
        for param, grad in zip(params, gradients(step)):
            param.grad = grad.view(param.shape)
        optimizer.step()
        if step not in (1, STEPS):
            continue
        for i, param in enumerate(params):
            off = (param.detach().flatten() - found[f"{step}.{i}"]).abs().max().item()
            line = f"step {step}, tensor {i}: weights within {off:.1e}"
            assert off < 1e-6, line
            for name, key in (("exp_avg", "state1"), ("exp_avg_sq", "state2")):
                if i == 2:
                    assert optimizer.state[param][key].dtype == torch.float32
                    continue
                codes = optimizer.state[param][key].flatten().int() - found[f"{step}.{i}.{name}"].int()
                line += f"; {name}: {int((codes != 0).sum())} of {len(codes)} codes differ"
                assert codes.abs().max() <= 1 and (codes != 0).float().mean() < 1e-3, line
            print(line)


def main():
    torch.set_num_threads(1)
    found = ours()
    check(found)
    path = GOLDEN / "adamw_8bit.safetensors"
    save_file(found, path)
    path.chmod(0o644)


if __name__ == "__main__":
    main()
