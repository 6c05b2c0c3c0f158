# SPDX-License-Identifier: MIT
"""What aira.py claims, each claim a small worked example checked against something that shares no code with it: brute
force, Eckart-Young, dense matrices and their eigenvectors, plain autograd.  Offline, one CPU core, under a minute.
"""
import contextlib
import copy
import functools
import gc
import io
import json
import math
import pickle
import random
import re
import statistics
import sys
import time
import tracemalloc
import types
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import aira
import train_toy
from aira import (AiraLinear, Statistics, aira_off, aira_state_dict, apply_aira, greedy_ranks, input_gain,
                  knapsack_ranks, load_aira, merge_aira, outlier_score, outlier_weighted_svd, principal_directions,
                  remove_aira, save_peft, significance_variation)

torch.set_num_threads(1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INITS = ["narrow", "subspace", "svd"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    random.seed(0)


class Conv1D(nn.Module):
    """Hugging Face's linear layer of GPT-2: weight (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf) / nx**0.5), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Net(nn.Module):
    """in < out, in > out, bias and none, a Conv1D, a layer shared by two names, a norm and a head."""

    def __init__(self):
        super().__init__()
        self.up, self.mix, self.down = nn.Linear(10, 24), Conv1D(24, 24), nn.Linear(24, 10, bias=False)
        self.shared = self.again = nn.Linear(10, 10)
        self.norm, self.head = nn.LayerNorm(10), nn.Linear(10, 3)

    def forward(self, x):
        x = x + self.down(torch.tanh(self.mix(F.gelu(self.up(x)))))
        return self.head(self.norm(x + self.shared(self.again(x))))


SHAPES = {"up": (24, 10), "mix": (24, 24), "down": (10, 24), "shared": (10, 10), "head": (3, 10)}


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def inputs(n=96, width=10, dtype=torch.float64):
    """Tokens with correlated channels, one of them loud and one quiet."""
    x = randn(n, width) @ randn(width, width)
    x[:, 0] *= 10
    x[:, 1] *= 0.01
    return x.to(dtype)


def adapted(model=None, x=None, train=0, **options):
    """A model with adapters of unequal ranks, calibrated on x, after some steps of training."""
    model, x = Net().double() if model is None else model, inputs() if x is None else x
    apply_aira(model, lambda: model(x), **{"rank": 3, "importance": "outlier", **options})
    fit(model, x, train)
    return model


def fit(model, x, steps):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x).float() - 1).square().mean().backward()
        optimizer.step()


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def fingerprint(model):
    """All that must stay: modules, modes, hooks, attributes; tensors with their identity, flags and bits."""
    modules = [(name, id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__))
               for name, m in model.named_modules(remove_duplicate=False)]
    tensors = [(name, id(t), t.requires_grad, None if nn.parameter.is_lazy(t) or t.is_meta else bits(t))
               for name, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]]
    return modules, tensors


@contextlib.contextmanager
def unchanged(model):
    """The model is as it was, and so are the random states."""
    before, states = fingerprint(model), (bits(torch.get_rng_state()), random.getstate())
    yield
    assert fingerprint(model) == before and states == (bits(torch.get_rng_state()), random.getstate())


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.detach().abs().max() + 1e-12))


def far(a, b, least=0.01):
    return float((a - b).detach().abs().max()) > least


# ---- 1. Statistics and gain ----------------------------------------------------------------------------------------


def test_statistics_of_a_stream_equal_those_of_all_batches_at_once():
    layer, seen = nn.Linear(10, 7), Statistics(10, 4, "cpu")
    batches = [inputs(n, dtype=torch.float32) for n in (5, 1, 0, 64)]
    handle = layer.register_forward_hook(seen.hook, with_kwargs=True)
    for batch in batches[:-1]:
        layer(batch)
    layer(input=batches[-1].view(4, 16, 10))  # by keyword, and with more dimensions
    handle.remove()
    seen.finish("layer")
    x = torch.cat(batches).double()
    assert seen.tokens == len(x) == 70
    close(seen.rms.double(), x.square().mean(0).sqrt(), 1e-5)
    close(seen.sketch.double(), x.T @ x / len(x) @ seen.omega.double(), 1e-5)
    assert seen.output_norm == pytest.approx(layer(x.float()).detach().norm(dim=1).mean().item(), rel=1e-5)
    half, x = Statistics(4, 2, "cpu"), torch.full((8, 4), 3e4, dtype=torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        half.hook(None, (x,), {}, x)  # 3e4 squared is past the largest float16, so the sums must be wider
    half.finish("layer")
    close(half.rms, x[0].float(), 1e-5)
    close(half.sketch, 3e4**2 * torch.ones(4, 4) @ half.omega, 1e-5)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_principal_directions_are_exact_when_the_sketch_is_square(k):
    x, omega = inputs(200, 8), torch.linalg.qr(randn(8, 8))[0]
    C = x.T @ x / len(x)
    Q, lam = principal_directions(C @ omega, omega, k)
    exact, vectors = (t.flip(-1)[..., :k] for t in torch.linalg.eigh(C))
    close(lam, exact, 1e-6)
    close((Q * vectors).sum(0).abs(), torch.ones(k).double(), 1e-4)  # the same vectors up to their signs
    close(Q.T @ Q, torch.eye(k).double())


def test_principal_directions_find_a_low_rank_signal_under_noise():
    true, strength = torch.linalg.qr(randn(200, 6))[0], torch.tensor([300.0, 200, 100, 80, 50, 30]).double()
    omega = torch.linalg.qr(randn(200, 22))[0]
    C = true * strength @ true.T + 0.01 * torch.eye(200)
    Q, lam = principal_directions(C @ omega, omega, 6)
    assert (torch.linalg.svdvals(true.T @ Q) > 0.999).all()  # cosines of the angles between the two spaces
    close(lam / strength, torch.ones(6).double(), 0.01)


def gain_by_definition(x, power, k):
    """(C + 0.1 mean(lambda) I)^-power, C's eigenvalues past the k-th as one average, scaled to E|G x|^2 = in / 12."""
    C = x.T @ x / len(x)
    lam, Q = (t.flip(-1) for t in torch.linalg.eigh(C))
    damping = 0.1 * lam.mean()
    lam[k:] = lam[k:].mean()
    G = Q * (lam + damping) ** -power @ Q.T
    return G * (len(C) / 12 / torch.trace(G @ C @ G)).sqrt()


def dense(gain, directions):
    return gain * torch.eye(len(directions)) - directions @ directions.T


def tunable(module):
    return [p for p in module.parameters() if p.requires_grad]


@pytest.mark.parametrize("size, power, fits",
                         [(1e-12, 0.5, True), (1e15, 0.5, True), (1e-12, 1.0, False), (1e15, 1.0, False)])
def test_inputs_too_quiet_or_loud_for_the_power_are_refused(size, power, fits):
    """A gain of 0, inf or NaN would be an adapter that does nothing, or harm."""
    model, x = nn.Sequential(nn.Linear(20, 40)), torch.randn(200, 20) * size
    if fits:
        apply_aira(model, lambda: model(x), rank=2, amplify=power)
        factors = model[0].gain, model[0].directions
        y = x @ dense(*factors)
        assert float(y.square().sum(1).mean()) == pytest.approx(20 / 12, rel=0.02)
    else:
        with pytest.raises(ValueError, match="RMS 1e.* out of range at amplify=1.0: lower it"):
            apply_aira(model, lambda: model(x), rank=2, amplify=power)
        assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("power", [0.0, 0.35, 0.5, 1.0])
@pytest.mark.parametrize("k", [1, 4, 8])
def test_gain_is_a_power_of_the_inputs_second_moment(k, power):
    x = inputs(200, 8)
    lam, Q = (t.flip(-1)[..., :k] for t in torch.linalg.eigh(x.T @ x / len(x)))
    G = dense(*input_gain(x.square().mean(0).sum(), Q, lam, power))
    close(G, gain_by_definition(x, power, k), 1e-8)
    assert (x @ G).square().sum(1).mean().item() == pytest.approx(8 / 12)  # |G x|^2 is in / 12 on average
    adapter = adapted(nn.Sequential(nn.Linear(8, 9)).double(), x, directions=k, amplify=power)[0]
    # the same from calibration, in float32 and through the sketch
    close(dense(adapter.gain, adapter.directions), gain_by_definition(x, power, k), 1e-3)


# ---- 2. Outlier-weighted SVD ---------------------------------------------------------------------------------------


def weighted_error(W, rms, B, A):
    return float(((W.double() - B.double() @ A.double()) * rms).norm())


def eckart_young(W, rms, rank):
    """The least error that any rank-r matrix can have: the root of the sum of the squared singular values it drops."""
    s = np.linalg.svd((W * rms).double().numpy(), compute_uv=False)
    return float(np.sqrt((s[rank:] ** 2).sum()))


@pytest.mark.parametrize("out, width", [(12, 20), (20, 12), (1, 9), (9, 1)])
def test_svd_reaches_the_eckart_young_optimum_at_every_rank(out, width):
    W, rms = randn(out, width), torch.rand(width).double() * 5 + 0.1
    for rank in range(1, min(out, width) + 1):
        B, A = outlier_weighted_svd(W, rms, rank)
        assert B.shape == (out, rank) and A.shape == (rank, width)
        assert weighted_error(W, rms, B, A) == pytest.approx(eckart_young(W, rms, rank), abs=1e-9)
        close(B.square().sum(0), (A * rms).square().sum(1))  # the singular values are shared out evenly


@pytest.mark.parametrize("out", [20, 300])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_svd_refuses_what_is_not_finite(out, bad):
    W, rms = torch.randn(out, 280), torch.ones(280)
    for broken in (W, rms):
        kept = broken.view(-1)[3].clone()
        broken.view(-1)[3] = bad
        with pytest.raises(ValueError, match="NaN or inf"):
            outlier_weighted_svd(W, rms, 4)
        broken.view(-1)[3] = kept


def test_no_competitor_beats_the_svd():
    W, rms = randn(12, 20), torch.rand(20).double() + 0.1
    rms[3] = 30
    B, A = outlier_weighted_svd(W, rms, 4)
    best = weighted_error(W, rms, B, A)
    for _ in range(300):  # neighbours near and far, and random A with the B that suits it best
        step, other = 10 ** random.uniform(-4, 0), torch.randn_like(A)
        fitted = torch.linalg.lstsq((other * rms).T, (W * rms).T).solution.T
        assert weighted_error(W, rms, B + step * torch.randn_like(B), A + step * other) > best
        assert weighted_error(W, rms, fitted, other) > best
    plain = outlier_weighted_svd(W, torch.ones_like(rms), 4)
    assert weighted_error(W, rms, *plain) > 1.2 * best  # what knowing the loud channel is worth


@pytest.mark.parametrize("spectrum", ["power law", "flat", "noise"])
def test_large_svd_is_within_a_thousandth_of_the_optimum_and_repeatable(spectrum):
    (u, v), rms = (torch.linalg.qr(torch.randn(n, 500))[0] for n in (600, 500)), torch.rand(500) + 0.5
    s = torch.arange(1, 501.0) ** (-1.0 if spectrum == "power law" else 0.0)
    W = torch.randn(600, 500) if spectrum == "noise" else u * s @ v.T / rms
    state = torch.get_rng_state()
    B, A = outlier_weighted_svd(W, rms, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert weighted_error(W, rms, B, A) <= 1.001 * eckart_young(W, rms, 8)
    torch.manual_seed(123)  # the caller's random state does not matter
    assert all(map(torch.equal, (B, A), outlier_weighted_svd(W, rms, 8)))


@pytest.mark.parametrize("size, spectrum, slack", [
    (64, "noise", 0), (64, "power law", 0), (48, "noise", 1e-3), (48, "power law", 0)])  # _build asks for 48
def test_the_fast_svd_errs_no_more_than_the_one_that_peft_calls(size, spectrum, slack):
    """pissa_niter_4 is torch.svd_lowrank with q = rank and niter = 4.  At _build's size ours loses a bit on noise."""
    u, v = (torch.linalg.qr(torch.randn(n, 512))[0] for n in (768, 512))
    W = torch.randn(768, 512) if spectrum == "noise" else u * torch.arange(1, 513.0) ** -1 @ v.T
    V, image, _ = aira._weighted_svd(W, torch.ones(512), 16, size)
    U, s, peft_V = torch.svd_lowrank(W, q=16, niter=4)
    assert (W - image @ V.T).norm() <= (1 + slack) * (W - U * s @ peft_V.T).norm()
    close(image, W @ V, 1e-4)
    close(V.T @ V, torch.eye(16), 1e-5)


@pytest.mark.parametrize("w, c", [(1e9, 1), (1e-15, 1), (1, 1e15), (1e-6, 1e-6), (1e15, 1e-15)])
def test_fast_svd_at_any_scale(w, c):
    """No overflow on the way, though squares of the singular values would not fit float32."""
    W, rms = torch.randn(300, 260), torch.rand(260) + 0.1
    B, A = outlier_weighted_svd(W * w, rms * c, 8)
    assert weighted_error(W, rms, B / w**0.5, A / w**0.5) <= 1.001 * eckart_young(W, rms, 8)


@pytest.mark.parametrize("size", [64, 208])
@pytest.mark.parametrize("true_rank", [0, 3, 40])
def test_fast_svd_where_the_weight_has_less_rank_than_asked_for(true_rank, size):
    """No dead direction then: the rest is random and orthonormal, and the adapter trains."""
    layer, x = nn.Linear(600, 700, bias=False), torch.randn(64, 600)
    layer.weight.data = torch.randn(700, true_rank) @ torch.randn(true_rank, 600)
    s = torch.linalg.svdvals(layer.weight.detach())
    V, image, _ = aira._weighted_svd(layer.weight, torch.ones(600), 48, size=size)
    close(V.T @ V, torch.eye(48), 1e-5)
    close(image.norm(dim=0), s[:48], 1e-2)
    close(image @ V.T, layer.weight, 1e-2)
    model = nn.Sequential(layer)
    apply_aira(model, lambda: model(x), rank=20)
    B0 = model[0].start_B
    close(B0.T @ B0 / B0[:, 0].square().sum(), torch.eye(B0.shape[1]), 1e-5)
    model(x).square().sum().add(model(x).sum()).backward()
    assert (model[0].lora_A.grad.norm(dim=1) > 0).all()


def test_svd_of_a_half_precision_weight_takes_loud_channels():
    """Their RMS, and its sum above all, may not fit float16 though the weight does."""
    W, rms = torch.randn(8, 100).half(), torch.full((100,), 1e5)
    B, A = outlier_weighted_svd(W, rms, 3)
    assert weighted_error(W, rms, B, A) == pytest.approx(eckart_young(W, rms, 3), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_svd_with_dead_channels_and_in_half_precision(dtype):
    """A channel that never fired has no say; if none fired, it is the plain SVD."""
    W, some = torch.randn(8, 10).to(dtype), torch.ones(10).index_fill(0, torch.tensor([2, 5]), 0)
    for rms, weighs in ((some, some), (torch.zeros(10), torch.ones(10))):
        B, A = outlier_weighted_svd(W, rms, 3)
        assert A.isfinite().all() and A.dtype == torch.promote_types(dtype, torch.float32)
        assert weighted_error(W, weighs, B, A) == pytest.approx(eckart_young(W, weighs, 3), rel=1e-5)


@pytest.mark.parametrize("rank, channels, value", [(0, 6, "rank=0"), (5, 6, "rank=5"), (2, 4, "(4,)")])
def test_svd_refuses_what_does_not_fit(rank, channels, value):
    with pytest.raises(ValueError, match=re.escape(value)):
        outlier_weighted_svd(torch.randn(4, 6), torch.ones(channels), rank)


# ---- 3. Ranks ------------------------------------------------------------------------------------------------------


def test_outlier_score_by_hand():
    W, rms = torch.tensor([[1.0, -2, 0], [3, 0.5, -1]]), torch.tensor([1.0, 4, 2])
    # |W| rms = [[1, 8, 0], [3, 2, 2]], mean 16 / 6 = 2.67: only 8 is above twice the mean, 8 and 3 above the mean.
    assert outlier_score(W, rms) == (8, 1 / 6)
    assert outlier_score(W, rms, threshold=1) == (11, 2 / 6)
    assert outlier_score(W, rms, threshold=5) == (0, 0) == outlier_score(torch.zeros(2, 3), rms)
    assert outlier_score(10 * W.bfloat16(), rms) == (80, 1 / 6)  # the mass has a scale, the fraction has none
    W, rms = torch.randn(2001, 1000), torch.rand(1000)  # more than one part
    A = (W.double().abs() * rms.double()).numpy()
    outliers = A[A > 3 * A.mean()]
    assert outlier_score(W, rms, 3) == pytest.approx((outliers.sum(), outliers.size / A.size), rel=1e-4)
    assert significance_variation(W, rms) == pytest.approx(A.var() / A.mean() ** 2, rel=1e-5)


def test_significance_variation_by_hand():
    W, rms = torch.tensor([[1.0, -2, 0], [3, 0.5, -1]]), torch.tensor([1.0, 4, 2])
    # |W| rms = [[1, 8, 0], [3, 2, 2]]: mean 16 / 6, mean square 82 / 6
    assert significance_variation(W, rms) == pytest.approx(82 / 6 / (16 / 6) ** 2 - 1, rel=1e-6)
    assert significance_variation(10 * W.bfloat16(), 3 * rms) == pytest.approx(significance_variation(W, rms), rel=1e-6)
    for equal in (torch.ones(2, 3), *torch.rand(20, 1, 1)):
        assert 0 < significance_variation(equal, torch.full(equal.shape[1:], 0.3)) < 1e-5
    noise = significance_variation(torch.randn(1000, 1000), torch.ones(1000))
    assert noise == pytest.approx(np.pi / 2 - 1, rel=0.01)  # of |z|: mean (2 / pi)^.5, mean square 1
    assert significance_variation(torch.zeros(2, 3), rms) == np.pi / 2 - 1 == significance_variation(W, 0 * rms)
    for scale in (1e15, 1e-15):
        assert significance_variation(scale * W, rms / scale) == pytest.approx(significance_variation(W, rms), rel=1e-6)
    dead = torch.tensor([1.0, 0, 4, 2, 0])  # channels that are never on are nobody's outliers
    wider = W[:, [0, 0, 1, 2, 2]]
    assert significance_variation(wider, dead) == pytest.approx(significance_variation(W, rms), rel=1e-6)


def value_of(ranks, importance):
    """The objective.  Layers of no importance count a little, so that they grow last; if there are no others, alike."""
    theta = np.array(importance, float)
    theta = np.maximum(theta, 1e-9 * theta.max()) if theta.any() else np.ones_like(theta)
    return float(np.log(np.array(ranks, float)) @ theta)


def brute_force(importance, costs, budget, min_rank, most):
    """The best objective among all rank assignments there are."""
    grids = np.meshgrid(*[np.arange(min(min_rank, m), m + 1) for m in most], indexing="ij")
    ranks = np.stack([grid.ravel() for grid in grids], 1)
    return max(value_of(r, importance) for r in ranks[ranks @ np.array(costs) <= budget])


def problems(count, costs_from):
    rng = np.random.default_rng(0)
    for _ in range(count):
        n = int(rng.integers(1, 5))
        costs = [int(c) for c in rng.choice(costs_from, n)]
        importance = [float(t) for t in rng.random(n) ** 3 * (rng.random(n) < 0.8)]  # some are zero
        min_rank, most = int(rng.integers(1, 3)), [int(m) for m in rng.integers(2, 7, n)]
        yield importance, costs, sum(costs) * min_rank + int(rng.integers(0, 4 * sum(costs))), min_rank, most


def check_spent(ranks, importance, costs, budget, min_rank, most):
    """Within all bounds, and what is left is too little for any layer that could still grow."""
    assert all(type(r) is int and min_rank <= r <= m for r, m in zip(ranks, most))
    left = budget - int(np.dot(costs, ranks))
    assert 0 <= left < min((c for c, r, m in zip(costs, ranks, most) if r < m), default=float("inf"))


@pytest.mark.parametrize("costs", [[2, 3, 5, 7], [6, 10], [4], [256 * 32, 256 * 59, 256 * 48], [1, 100, 101]])
def test_knapsack_equals_brute_force(costs):
    for problem in problems(100, costs):
        ranks = knapsack_ranks(*problem)
        check_spent(ranks, *problem)
        assert value_of(ranks, problem[0]) == pytest.approx(brute_force(*problem), rel=1e-9, abs=1e-12)


def test_greedy_takes_the_best_unit_that_fits_and_is_optimal_for_equal_costs():
    for problem in [*problems(200, [2, 3, 5, 7, 11]), *problems(200, [3])]:
        importance, costs, budget, min_rank, most = problem
        ranks, naive = greedy_ranks(*problem), [min_rank] * len(costs)
        check_spent(ranks, *problem)
        if len(set(costs)) == 1:
            assert value_of(ranks, importance) == pytest.approx(brute_force(*problem), rel=1e-9, abs=1e-12)
        if min(importance) > 0:
            while fits := [l for l, m in enumerate(most) if naive[l] < m and costs[l] <= budget - np.dot(costs, naive)]:
                naive[max(fits, key=lambda l: importance[l] * np.log(1 + 1 / naive[l]) / costs[l])] += 1
            assert ranks == naive
    problem = [1.0, 1.4], [2, 3], 8, 1, [9, 9]  # of the 3 units to share out, greedy spends 2 on the first layer
    assert greedy_ranks(*problem) == [2, 1] and knapsack_ranks(*problem) == [1, 2]


def test_ranks_of_a_7b_model_in_milliseconds():
    """224 layers at average rank 16, at most 64: knapsack under 0.5 s and 1 GB, greedy under 50 ms."""
    costs = [8192] * 128 + [15104] * 96
    problem = list(np.random.default_rng(0).random(224) ** 2), costs, 16 * sum(costs), 1, [64] * 224
    for allocate, limit in ((knapsack_ranks, 0.5), (greedy_ranks, 0.05)):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            ranks = allocate(*problem)
            times.append(time.perf_counter() - start)
        assert min(times) < limit
        check_spent(ranks, *problem)
    tracemalloc.start()
    knapsack_ranks(*problem)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**30


@pytest.mark.parametrize("allocate", [greedy_ranks, knapsack_ranks])
@pytest.mark.parametrize("problem, value", [
    (([1, 1], [5, 7], 20, 2, [4, 4]), "24"),  # the least that works
    (([1, float("nan")], [5, 7], 99, 1, [4, 4]), "nan"), (([1, -1], [5, 7], 99, 1, [4, 4]), "-1"),
    (([1, 1], [5, 0], 99, 1, [4, 4]), "[5, 0]"), (([1, 1], [5, 7], 99, 1, [4, 0]), "[4, 0]"),
    (([1, 1], [5, 7], 99, 0, [4, 4]), "min_rank=0"), (([1], [5, 7], 99, 1, [4, 4]), "1 importances")])
def test_ranks_refuse_what_has_no_answer(allocate, problem, value):
    with pytest.raises(ValueError, match=re.escape(value)):
        allocate(*problem)


# ---- 4. AiraLinear -------------------------------------------------------------------------------------------------

LAYERS = {"in < out": lambda: nn.Linear(6, 9), "in > out": lambda: nn.Linear(9, 6), "conv1d": lambda: Conv1D(6, 9),
          "no bias": lambda: nn.Linear(8, 6, bias=False)}


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("rank", [1, 4, 6])
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_computes_base_plus_delta(kind, rank, init):
    """y = base(x) + B A x - B0 A0 x, with A = A0 + lora_A G, B = B0 + lora_B, at every rank from 1 to min(in, out);
    what an init leaves out is zero."""
    base = LAYERS[kind]().double()
    W = (base.weight.T if kind == "conv1d" else base.weight).detach().clone()
    x, bias = inputs(width=W.shape[1]), 0 if base.bias is None else base.bias
    layer = adapted(nn.Sequential(base), x, rank=rank, init=init, max_rank=rank)[0]
    assert isinstance(layer, AiraLinear) and layer.base is base and layer.bias is base.bias
    assert (layer.in_features, layer.out_features) == (W.shape[1], W.shape[0]) and not layer.delta().any()
    wide = W.shape[0] >= W.shape[1]
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == (
        {"lora_A", "lora_B"} if init != "narrow" else {"lora_A"} if wide else {"lora_B"})
    for parameter in tunable(layer):
        nn.init.normal_(parameter)
    zeros = {"A": torch.zeros(rank, W.shape[1]).double(), "B": torch.zeros(len(W), rank).double()}
    A0, B0, lora_A, lora_B = (zeros[name[-1]] if getattr(layer, name) is None else getattr(layer, name)
                              for name in ("start_A", "start_B", "lora_A", "lora_B"))  # or of another shape: fails here
    G = torch.eye(W.shape[1]).double() if layer.lora_A is None else dense(layer.gain, layer.directions)
    dW = (B0 + lora_B) @ (A0 + lora_A @ G) - B0 @ A0
    close(layer(x), x @ (W + dW).T + bias)
    close(layer.delta(), dW)
    close(layer.weight, (W + dW).T if kind == "conv1d" else W + dW)
    B, A = layer.factors()  # plain LoRA, of twice the rank where B0 A0 is not zero
    assert len(A) == B.shape[1] == (2 * rank if init == "svd" else rank)
    close(B @ A, dW)


def same_space(a, b):
    """Whether the columns of a and b span one space: the cosines of the angles between them are all 1."""
    return (torch.linalg.svdvals(torch.linalg.qr(a)[0].T @ torch.linalg.qr(b)[0]) > 1 - 1e-6).all()


@pytest.mark.parametrize("out", [6, 10, 17])
def test_the_starts_are_the_decompositions_they_claim(out):
    """Of W S = U diag(s) V^T.  svd: B0 A0 is the best weighted fit.  subspace: rows 2 V^T.  narrow: U, with
    |B0| = sqrt(r out) / in a column, and where out < in A0 = 2 V^T G instead."""
    base, x, r = nn.Sequential(nn.Linear(10, out)).double(), inputs(), 2
    W, rms = base[0].weight.detach(), x.square().mean(0).sqrt()
    start = {init: adapted(copy.deepcopy(base), x, rank=r, max_rank=r, init=init)[0] for init in INITS}
    layer = start["svd"]
    assert weighted_error(W, rms, layer.start_B, layer.start_A) == pytest.approx(eckart_young(W, rms, r), rel=1e-6)
    U, _, Vt = torch.linalg.svd(W * rms, full_matrices=False)
    rows = start["subspace"].lora_A
    assert same_space(rows.T, Vt[:r].T) and not start["subspace"].lora_B.any()
    close(rows @ rows.T, 4 * torch.eye(r).double())
    G, layer = dense(layer.gain, layer.directions), start["narrow"]
    if out < 10:
        close(layer.start_A, rows @ G)
        assert layer.start_B is layer.lora_A is layer.gain is None and not layer.lora_B.any()
    else:
        assert same_space(layer.start_B, U[:, :r])
        close(layer.start_B.T @ layer.start_B, r * out / 10**2 * torch.eye(r).double())
        assert layer.start_A is layer.lora_B is None and not layer.lora_A.any()


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_start_is_the_base_bit_for_bit_and_training_never_touches_it(dtype, init):
    model, x = Net().to(dtype), inputs(dtype=dtype)
    output, before = model(x), fingerprint(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        automatic = model(x)
    adapted(model, x, init=init)
    assert bits(model(x)) == bits(output) and model.up.lora_A.dtype == torch.promote_types(dtype, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        assert bits(model(x)) == bits(automatic)
    fit(model, x, 5)
    assert far(model(x), output)
    remove_aira(model)
    assert fingerprint(model) == before and bits(model(x)) == bits(output)


@pytest.mark.parametrize("init", INITS)
def test_weight_decay_keeps_the_pretrained_weights(init):
    """AdamW decays differences that start at zero: without any loss, the output stays where it was."""
    model, x = Net().double(), inputs()
    before = model(x)
    adapted(model, x, init=init)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=5.0)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) * 0).sum().backward()
        optimizer.step()
    assert torch.equal(model(x), before)


def test_a_sample_does_not_depend_on_its_batch():
    model, x = adapted(train=5), inputs()
    for others in (x[1:2], 1e6 * x[1:], 0 * x[1:]):
        close(model(torch.cat([x[:1], others]))[:1], model(x[:1]))


def moved(layer, x, target, optimizer, hook=None):
    """One optimizer step on a copy's lora_A: by how much its A = A0 + lora_A G moves."""
    layer = copy.deepcopy(layer)
    if hook:
        layer.lora_A.register_hook(hook)
    (layer(x) - target).square().mean().backward()
    optimizer([layer.lora_A]).step()
    return layer.factors()[1][:len(layer.lora_A)].detach()  # the svd start's A is [lora_A G ; A0]


@pytest.mark.parametrize("k", [1, 3, 10])
def test_sgd_is_amplified_by_the_gain_squared_and_adam_by_the_gain(k):
    x, target = inputs(), randn(96, 6)
    layer = adapted(nn.Sequential(nn.Linear(10, 6)).double(), x, rank=2, init="svd", directions=k)[0]
    G, A = dense(layer.gain, layer.directions), layer.start_A.detach().clone().requires_grad_()
    y = layer.base(x) + x @ (layer.start_B @ (A - layer.start_A)).T
    gradient = torch.autograd.grad((y - target).square().mean(), A)[0]  # of A itself, by plain autograd
    assert far(G, G.diagonal().mean() * torch.eye(10), 0.03)
    close(moved(layer, x, target, lambda p: torch.optim.SGD(p, lr=0.01)), -0.01 * gradient @ G @ G)
    first = moved(layer, x, target, lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-30))
    close(first, -0.01 * (gradient @ G).sign() @ G)  # Adam's first step is the sign of its gradient


def test_a_gradient_hook_is_a_placebo_under_adam():
    x, target, loud = inputs(), randn(96, 6), torch.logspace(-2, 2, 10).double()
    layer = adapted(nn.Sequential(nn.Linear(10, 6)).double(), x, rank=2, init="svd", amplify=0)[0]
    adam = functools.partial(torch.optim.Adam, eps=1e-30)
    for optimizer, undone in ((adam, True), (torch.optim.SGD, False)):
        plain, hooked = (moved(layer, x, target, lambda p: optimizer(p, lr=0.01), hook) for hook in (None, loud.mul))
        assert torch.allclose(plain, hooked, rtol=1e-4) == undone


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("weights", ["random", "zero"])
def test_every_adapter_gets_a_gradient(init, weights):
    """All columns of lora_B from the first step and all rows of lora_A after it; so a zero-initialised layer learns."""
    model, x = Net().double(), inputs()
    if weights == "zero":
        nn.init.zeros_(model.head.weight)
    adapted(model, x, init=init)
    for wanted in ("lora_B", "lora_A"):
        model.zero_grad()
        (model(x) - 1).square().mean().backward()
        for name in ["head"] if weights == "zero" else SHAPES:
            factor = getattr(model.get_submodule(name), wanted)
            alive = factor is None or factor.grad.any(0 if wanted == "lora_B" else 1).all()
            assert alive, f"{name}: some of its rank can never train"
        for parameter in model.parameters():
            parameter.data -= 0 if parameter.grad is None else 0.05 * parameter.grad


def test_each_of_the_three_ideas_changes_the_result():
    def outcome(**options):
        torch.manual_seed(0)
        return adapted(train=5, **options)(inputs())

    assert torch.equal(outcome(), outcome())
    for change in ({"init": "svd"}, {"init": "subspace"}, {"importance": "uniform"}, {"amplify": 0}, {"directions": 2},
                   {"start": "random"}):
        assert far(outcome(**change), outcome(), 1e-3), change


# ---- 5. apply_aira -------------------------------------------------------------------------------------------------


def test_report_prints_a_table_and_keeps_the_budget():
    model, x = Net(), inputs(dtype=torch.float32)
    report = apply_aira(model, lambda: [model(x), model(x[:4])], rank=4)
    assert {row.name: row.shape for row in report.rows} == SHAPES and report.skipped == {}
    for row in report.rows:
        adapter = model.get_submodule(row.name)
        assert row.rank == adapter.factors()[0].shape[1] and row.parameters == sum(p.numel() for p in tunable(adapter))
        assert row.tokens == (200 if row.name == "shared" else 100)  # it is called twice
    spent = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.budget == 4 * sum(map(sum, SHAPES.values())) >= spent == sum(row.parameters for row in report.rows)
    held = sum(p.numel() for m in model.modules() if isinstance(m, AiraLinear) for p in m.parameters(recurse=False))
    assert report.fixed == held - spent
    head, up, *_, total, budget = str(report).splitlines()
    assert head.split() == ["layer", "out", "x", "in", "tokens", "score", "rank", "parameters"]
    row = report.rows[0]
    assert up.split() == ["up", "24", "x", "10", "100", f"{row.score:.4g}", str(row.rank), f"{row.parameters:,}"]
    assert total.split() == ["total", f"{spent:,}"] and f"{report.budget:,}" in budget and f"{report.fixed:,}" in budget
    assert len(head) == len(up) == len(total)


def test_equal_ranks_and_what_small_layers_leave_goes_to_the_others():
    model, x = nn.Sequential(nn.Linear(10, 24), nn.Linear(24, 10), nn.Linear(10, 3)), inputs(dtype=torch.float32)
    for init, rank, ranks in (("subspace", 3, [3, 3, 3]), ("subspace", 9, [10, 10, 3]),  # at most the smaller side
                              ("narrow", 1, [4, 3, 3]), ("narrow", 3, [10, 10, 3])):  # 34 + 34 + 13 buy 23 three times
        report = apply_aira(model, lambda: model(x), rank=rank, init=init, importance="uniform")
        assert [row.rank for row in report.rows] == ranks and report.budget == 81 * rank
        remove_aira(model)


def test_outliers_bring_rank_and_one_layer_cannot_take_it_all():
    """Of four equal layers one has a weight that counts a thousandfold: by default at most twice the equal rank."""
    model, x = nn.Sequential(*(nn.Linear(20, 20, bias=False) for _ in range(4))), torch.randn(200, 20)
    for layer in model:
        nn.init.orthogonal_(layer.weight)
    model[2].weight.data[3, 4] = 1000
    for init, equal in (("narrow", 6), ("subspace", 3)):
        ranks = [row.rank for row in apply_aira(model, lambda: model(x), rank=3, init=init).rows]
        assert ranks[2] == 2 * equal > equal > max(ranks[0], ranks[1]) and sum(ranks) == 4 * equal
        remove_aira(model)
    ranks = [row.rank for row in apply_aira(model, lambda: model(x), rank=3, max_rank=20).rows]
    assert ranks[2] == 20 and sum(ranks) == 24


@pytest.mark.parametrize("init, rank", [("subspace", 8), ("subspace", 32), ("narrow", 8)])
def test_thin_layers_leave_their_share_to_the_thick(init, rank):
    """Ten layers have at most rank 4, so what all could have alike is more than budget / costs."""
    parts = [part for _ in range(10) for part in (nn.Linear(100, 4), nn.Linear(4, 100))]
    model, x = nn.Sequential(*parts, nn.Linear(100, 512), nn.Linear(512, 512)), torch.randn(64, 100)
    report = apply_aira(model, lambda: model(x), rank=rank, init=init)
    spent, grows = sum(row.parameters for row in report.rows), [row for row in report.rows if row.rank < min(row.shape)]
    assert not grows or report.budget - spent < min(row.parameters // row.rank for row in grows)


def test_numpy_integers_do_not_overflow():
    model, x = Net(), inputs(dtype=torch.float32)
    ranks = [row.rank for row in apply_aira(model, lambda: model(x), rank=100, min_rank=2, max_rank=9).rows]
    remove_aira(model)
    small = {"rank": np.int8(100), "min_rank": np.int8(2), "max_rank": np.int8(9)}
    assert [row.rank for row in apply_aira(model, lambda: model(x), **small).rows] == ranks


def test_constant_layers_rank_alike():
    """Their variation is 0 but for rounding, which must not decide."""
    shapes = (6, 33), (33, 70), (70, 33), (33, 6)
    model, x = nn.Sequential(*(nn.Linear(i, o, bias=False) for i, o in shapes)), torch.ones(8, 6)
    for part, value in zip(model, (0.1, 0.7, 0.3, 1.1)):
        nn.init.constant_(part.weight, value)
    ranks = [row.rank for row in apply_aira(model, lambda: model(x), rank=2, init="subspace").rows]
    assert ranks == [2, 2, 2, 2]


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (300, 280), (280, 300)])
def test_a_layer_of_zeros_can_move_in_all_outputs_and_from_the_channels_that_are_heard(init, shape):
    """As adaLN-zero has them.  A zero matrix' own singular vectors are coordinates: the first ones are dead here."""
    model, x = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False)), torch.randn(64, shape[1])
    x[:, : shape[1] // 2] = 0
    nn.init.zeros_(model[0].weight)
    apply_aira(model, lambda: model(x), rank=2, init=init)
    fit(model, x, 3)
    assert (model(x).abs().max(0)[0] > 1e-4).all()


@pytest.mark.parametrize("allocate", [greedy_ranks, knapsack_ranks])
@pytest.mark.parametrize("importance", ["variation", "outlier", "fraction", "activation", "uniform"])
def test_scores_and_ranks_follow_the_chosen_importance_within_bounds(importance, allocate):
    model, x = Net().double(), inputs()
    rms, weight, size = x.square().mean(0).sqrt(), model.up.weight.detach(), model.up(x).detach().norm(dim=1).mean()
    options = {"rank": 4, "min_rank": 2, "max_rank": 6, "importance": importance, "allocate": allocate.__name__[:-6]}
    report = apply_aira(model, lambda: model(x), **options)
    score = {"variation": 10 * significance_variation(weight, rms),
             "outlier": outlier_score(weight, rms)[0], "fraction": outlier_score(weight, rms, 5)[1],
             "activation": size.item(), "uniform": min(weight.shape)}
    assert report.rows[0].score == pytest.approx(score[importance], rel=1e-4)
    costs, most = [min(row.shape) for row in report.rows], [min(*row.shape, 6) for row in report.rows]
    problem = [row.score for row in report.rows], costs, report.budget, 2, most
    assert [row.rank for row in report.rows] == allocate(*problem)


def test_without_calibration_a_warning_says_that_all_channels_weigh_the_same():
    model, ones = Net().double(), torch.ones(10)
    W = model.up.weight.detach()
    with pytest.warns(UserWarning, match="without calibrate"):
        assert all(row.tokens == 0 for row in apply_aira(model, rank=3, init="svd").rows)
    G = dense(model.up.gain, model.up.directions)
    close(G, G[0, 0] * torch.eye(10).double(), 1e-6)  # nothing is amplified
    error, rank = weighted_error(W, ones, model.up.start_B, model.up.start_A), len(model.up.lora_A)
    assert error == pytest.approx(eckart_young(W, ones, rank), rel=1e-6)


def test_targets_are_names_or_their_endings_and_heads_and_tied_weights_are_skipped_by_name():
    def model(tied=False):
        model = nn.Sequential(Net(), nn.Linear(3, 3), nn.Linear(3, 3), nn.Embedding(3, 3))
        model.forward = lambda x: model[2](model[1](model[0](x)))
        model.get_output_embeddings = lambda: model[2]
        if tied:
            model[1].weight = model[3].weight
        return model

    def apply(model, **options):
        report = apply_aira(model, lambda: model(inputs(dtype=torch.float32)), rank=2, **options)
        return [row.name for row in report.rows], report.skipped

    body = [f"0.{name}" for name in SHAPES]
    assert apply(model())[0] == [*body, "1"] and list(apply(model())[1]) == ["2"]
    assert apply(model(), also_train=["head", "1"])[0] == body[:-1]
    assert apply(model(), targets=["up", "0.mix", "2"])[0] == ["0.up", "0.mix", "2"]
    names, skipped = apply(model(tied=True))
    assert names == body and "tied" in skipped["1"] and "head" in skipped["2"]
    for targets in ("1", ["up", "p"]):  # tied; the end of a word is not the end of a name
        tied = model(tied=True)
        with unchanged(tied), pytest.raises(ValueError, match="0.up"):
            apply_aira(tied, lambda: 1 / 0, targets=targets)


def test_encoder_layer_in_eval_uses_the_adapter_on_its_fast_path(monkeypatch):
    """The fused kernel reads linear1.weight and calls nothing: an adapter that only had forward would be ignored."""
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0), torch.randn(3, 5, 8)
    report = apply_aira(model, lambda: model(x), rank=2)
    assert torch.backends.mha.get_fastpath_enabled()  # off in calibration, as that kernel would bypass the hooks too
    assert [row.name for row in report.rows] == ["linear1", "linear2"] and "self_attn.out_proj" in report.skipped
    fit(model, x, 10)
    fused, calls = torch._transformer_encoder_layer_fwd, []
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or fused(*args))
    slow = model.eval()(x)
    with torch.no_grad():
        assert not calls
        close(model(x), slow.detach(), 1e-5)
        assert calls
        with aira_off(model):
            assert far(model(x), slow)


def test_attention_out_proj_works_through_its_weight():
    model, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
    for targets, message in ((None, "MultiheadAttention"), ("out_proj", r"never called \['out_proj'\]")):
        with unchanged(model), pytest.raises(ValueError, match=message):
            apply_aira(model, lambda: model(x, x, x), rank=2, targets=targets)
    before = model(x, x, x)[0]
    with pytest.warns(UserWarning, match="calibrate"):
        apply_aira(model, rank=2, targets="out_proj")
    model(x, x, x)[0].square().sum().backward()
    model.out_proj.lora_A.data -= model.out_proj.lora_A.grad
    after = model(x, x, x)[0].detach()
    assert far(after, before)
    with torch.no_grad():
        close(model.eval()(x, x, x)[0], after, 1e-5)
        merge_aira(model)
        close(model(x, x, x)[0], after, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amplify", [0.5, 1.0])
@pytest.mark.parametrize("case", ["one token", "one token many times", "dead channels", "dead layer"])
def test_thin_calibration_still_starts_at_the_base_and_trains(case, amplify, dtype):
    x, live = torch.randn(64, 40), torch.randn(64, 40).to(dtype)
    x = {"one token": x[:1], "one token many times": x[:1].repeat(20000, 1), "dead layer": 0 * x,
         "dead channels": x * (torch.arange(40) > 9)}[case].to(dtype)
    for init in INITS:
        model = nn.Sequential(nn.Linear(40, 40)).to(dtype)
        before = model(live)
        adapted(model, x, init=init, amplify=amplify)
        assert bits(model(live)) == bits(before)
        fit(model, live, 3)
        after = model(live).detach()
        assert far(after, before) and after.abs().max() < (1e5 if amplify == 1 else 100)  # also no NaN and no inf


def test_calibration_restores_mixed_modes_and_random_state():
    model = nn.Sequential(nn.Linear(10, 10), nn.Dropout(0.5), nn.BatchNorm1d(10), nn.Linear(10, 10))
    model[1].eval()
    modes, seen, before = [m.training for m in model], [], bits(torch.get_rng_state()) + bits(model[2].running_mean)

    def run():
        seen.append((model.training, model[1].training, torch.is_grad_enabled()))
        model(torch.randn(32, 10))
        model.train()

    apply_aira(model, run, rank=2)
    assert seen == [(False, False, False)] and [module.training for module in model] == modes and model[0].base.training
    assert before == bits(torch.get_rng_state()) + bits(model[2].running_mean)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_the_model_is_as_it_was_when_calibrate_raises_or_a_later_step(error, monkeypatch):
    model, x, calls, truncated = Net().double(), inputs(), [], aira._weighted_svd
    model.mix.eval()
    model.up.requires_grad_(False)

    def second_time(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return truncated(*args, **options) if args else model(x + torch.randn(10))

    if error is MemoryError:
        monkeypatch.setattr(aira, "_weighted_svd", second_time)
    with unchanged(model), pytest.raises(error):
        apply_aira(model, (lambda: model(x)) if error is MemoryError else lambda: [second_time(), second_time()])
    assert adapted(model, x)  # and a second try works


def put(weight):
    return lambda model: setattr(model.down, "weight", nn.Parameter(weight, requires_grad=weight.is_floating_point()))


def lazy(model):
    model.down = nn.LazyLinear(10)


def parametrised(model):
    nn.utils.parametrizations.weight_norm(model.down)


X = torch.ones(8, 10)
NAN, INF = X.clone().fill_(float("nan")), X.clone().fill_(float("inf"))
BAD = [  # arguments, what was done to the model before, and the words that the error must have
    ({"targets": "q_prj"}, None, "q_prj up head"),
    ({"targets": ["up", "q_prj"]}, None, "['q_prj'] down"),
    ({"targets": []}, None, "[] down"),
    ({"targets": "head", "also_train": "head"}, None, "head also_train"),
    ({"rank": 0}, None, "rank=0 >= 1"),
    ({"rank": True}, None, "rank=True whole"),
    ({"rank": 1.5}, None, "rank=1.5 whole"),
    ({"rank": None}, None, "rank=None whole"),
    ({"min_rank": 0}, None, "min_rank=0"),
    ({"max_rank": 0}, None, "max_rank=0"),
    ({"rank": 2, "min_rank": 3, "init": "subspace"}, None, "budget=298 min_rank=3 447"),
    ({"rank": 2, "min_rank": 6}, None, "budget=298 min_rank=6 333"),
    ({"rank": 3, "min_rank": 3, "max_rank": 2}, None, "max_rank=2 >= 3"),
    ({"directions": 0}, None, "directions=0"),
    ({"amplify": float("nan")}, None, "amplify=nan"),
    ({"init": "pissa"}, None, "pissa svd"),
    ({"start": "warm"}, None, "warm random"),
    ({"importance": "owl"}, None, "owl outlier"),
    ({"allocate": "dp"}, None, "dp knapsack"),
    ({"also_train": ["head", "nrom"]}, None, "['nrom'] norm"),
    ({"also_train": ""}, lambda model: None, "also_train=('',) names"),
    ({"targets": [0]}, None, "targets=[0] names"),
    ({}, lambda model: setattr(model, "peft_config", {}), "PEFT merge_and_unload"),
    ({"calibrate": [X]}, None, "list callable"),
    ({"calibrate": lambda: None}, None, "never 'up'"),
    ({}, lambda model: setattr(model, "forward", lambda x: model.up(NAN)), "'up' NaN"),
    ({}, lambda model: setattr(model, "forward", lambda x: model.up(INF)), "'up' inf"),
    ({}, put(NAN), "'down' NaN"),
    ({}, put(INF), "'down' inf"),
    ({}, put(torch.ones(10, 24, dtype=torch.int8)), "'down' int8 dequantise"),
    ({}, put(torch.ones(10, 24, device="meta")), "'down' meta"),
    ({}, put(torch.ones(10, 0)), "'down' empty"),
    ({}, lazy, "'down' lazy"),
    ({}, parametrised, "'down' parametrised"),
    ({}, lambda model: adapted(model, X), "already remove_aira"),
]


@pytest.mark.parametrize("options, spoil, words", BAD, ids=[f"{i} {row[2]}" for i, row in enumerate(BAD)])
def test_bad_input_is_named_and_leaves_the_model_as_it_was(options, spoil, words):
    model = Net()
    if spoil:
        spoil(model)
    with unchanged(model), pytest.raises((ValueError, TypeError)) as caught:
        apply_aira(model, **{"calibrate": lambda: model(X), **options})
    assert all(word in str(caught.value) for word in words.split()), caught.value


@pytest.mark.parametrize("spoil", [lazy, parametrised, put(NAN), put(torch.ones(10, 24, dtype=torch.int8))])
def test_a_layer_that_is_left_out_of_targets_may_be_anything(spoil):
    model = Net()
    spoil(model)
    assert len(apply_aira(model, lambda: model.up(X), rank=2, targets="up").rows) == 1


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), Conv1D(4, 4)])
def test_a_bare_layer_cannot_be_replaced_in_place(layer):
    with unchanged(layer), pytest.raises(ValueError, match=r"nn\.Sequential"):
        apply_aira(layer, lambda: layer(torch.ones(2, 4)))


# ---- 6. Merge, remove, save, load, export --------------------------------------------------------------------------


def plain_lora(base, folder):
    """What PEFT makes of the files, in a copy of the base: W + alpha / r B A, with r and alpha from the first pattern
    that a layer's name ends with, and modules_to_save in full."""
    config, model = json.loads((folder / "adapter_config.json").read_text()), copy.deepcopy(base)
    tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in
               torch.load(folder / "adapter_model.bin", weights_only=True).items()}
    assert (config["peft_type"], config["bias"], config["lora_dropout"]) == ("LORA", "none", 0)
    for name, module in model.named_modules(remove_duplicate=False):
        targets = config["target_modules"]
        if re.fullmatch(targets, name) if isinstance(targets, str) else any(
                name == target or name.endswith("." + target) for target in targets):
            A, B = tensors.pop(f"{name}.lora_A.weight"), tensors.pop(f"{name}.lora_B.weight")
            r, alpha = (next(value for key, value in [*config[pattern].items(), (".*", config[default])]
                             if re.match(rf"(.*\.)?({key})$", name))
                        for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")))
            assert A.shape[0] == B.shape[1] == r, f"PEFT would give {name} the rank {r}"
            module.weight.data += (alpha / r * B @ A).T if isinstance(module, Conv1D) else alpha / r * B @ A
    assert all(key.startswith(tuple(f"{name}." for name in config["modules_to_save"] or ())) for key in tensors)
    assert not model.load_state_dict(tensors, strict=False).unexpected_keys
    return model


def check_round_trips(base, model, x, folder=None, tolerance=1e-9):
    """Train, eval, reloaded, exported and merged: one function, in the base's own modules."""
    output = model.train()(x)
    close(model.eval()(x), output, tolerance)
    file, fresh = io.BytesIO(), copy.deepcopy(base)
    torch.save(aira_state_dict(model), file)
    file.seek(0)
    load_aira(fresh, torch.load(file, weights_only=True))  # which refuses any file that could run code
    assert bits(fresh(x)) == bits(model(x))
    assert [(n, p.requires_grad) for n, p in fresh.named_parameters()] == [
        (n, p.requires_grad) for n, p in model.named_parameters()]
    if folder:
        save_peft(model, folder)
        close(plain_lora(base, folder)(x), output, tolerance)
    merged = copy.deepcopy(model)
    merge_aira(merged)
    close(merged(x), output, tolerance)
    assert [*map(type, merged.modules())] == [*map(type, base.modules())]


@pytest.fixture
def no_safetensors(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)


@pytest.mark.parametrize("options", [{}, {"init": "svd"}, {"init": "subspace"}, {"amplify": 0},
                                     {"directions": 1, "init": "svd"}, {"also_train": ["head", "norm"]}])
def test_train_eval_reloaded_exported_and_merged_agree(options, tmp_path, no_safetensors):
    base, x = Net().double(), inputs()
    model = adapted(copy.deepcopy(base), x, train=5, **options)
    assert far(model(x), base(x), 0.1) and model.shared is model.again
    check_round_trips(base, model, x)
    with pytest.raises(ValueError, match="shared.*again.*merge_aira"):  # PEFT adapts it under its first name only
        save_peft(model, tmp_path)
    base.again = nn.Linear(10, 10).double()
    check_round_trips(base, adapted(copy.deepcopy(base), x, train=5, **options), x, tmp_path)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x), model(x))
    merge_aira(twin)
    assert isinstance(model.up, AiraLinear) and type(twin.shared) is nn.Linear and twin.shared is twin.again


def test_merge_rounds_once_from_float32_into_the_same_layer_and_refuses_a_diverged_run():
    model, x = Net().bfloat16(), inputs(dtype=torch.bfloat16)
    up, mix = model.up, model.mix
    adapted(model, x, train=5, init="svd")
    wanted = (up.weight.float() + model.up.delta()).bfloat16(), (mix.weight.float() + model.mix.delta().T).bfloat16()
    broken = copy.deepcopy(model)
    merge_aira(model)
    assert model.up is up and model.mix is mix and all(map(torch.equal, wanted, (up.weight, mix.weight)))
    nn.init.constant_(broken.mix.lora_A, float("inf"))
    with unchanged(broken), pytest.raises(ValueError, match="mix"):
        merge_aira(broken)


@pytest.mark.parametrize("undo", [remove_aira, merge_aira])
def test_also_train_is_trained_saved_and_reloaded_and_flags_come_back(undo):
    base, x = nn.Sequential(Net(), nn.BatchNorm1d(3), nn.Linear(3, 3)).double(), inputs()
    base[0].up.requires_grad_(False)
    base[2].bias.requires_grad_(False)
    model, flags = copy.deepcopy(base), {name: p.requires_grad for name, p in base.named_parameters()}
    adapted(model, x, train=5, also_train=["1", "2"])
    lora = {f"0.{name}.lora_{'A' if out >= width else 'B'}" for name, (out, width) in SHAPES.items()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == lora | {"1.weight", "1.bias", "2.weight", "2.bias"}
    state = aira_state_dict(model)
    assert far(state["2.weight"], base[2].weight) and "1.running_mean" in state and "0.up.weight" not in state
    load_aira(base, state)
    assert bits(base.eval()(x)) == bits(model.eval()(x))
    fit(model.train(), x, 2), fit(base.train(), x, 2)  # training goes on from there as if nothing had happened
    close(base(x), model(x))
    head = model[2].weight.detach().clone()
    undo(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert torch.equal(model[2].weight, head)


def test_aira_off_computes_as_the_base():
    base, x = Net().double(), inputs()
    model = adapted(copy.deepcopy(base), x, train=3)
    trained = model(x)
    with pytest.raises(RuntimeError), aira_off(model):
        assert bits(model(x)) == bits(base(x)) and torch.equal(model.up.weight, base.up.weight)
        raise RuntimeError
    assert torch.equal(model(x), trained)  # also after an error
    with aira_off(model):
        with aira_off(model):
            pass
        assert torch.equal(model(x), base(x))  # also when nested
        with contextlib.suppress(ValueError):
            merge_aira(model)
    close(model(x), trained)  # merged or refused, but not lost


@pytest.mark.parametrize("use", [merge_aira, remove_aira, aira_state_dict, lambda model: save_peft(model, "nowhere"),
                                 lambda model: aira_off(model).__enter__()])
def test_nothing_to_merge_remove_or_save_without_adapters(use):
    for model in (Net(), adapted()):
        if isinstance(model.up, AiraLinear):
            remove_aira(model)
        with unchanged(model), pytest.raises(ValueError, match="no AIRA adapters.*apply_aira"):
            use(model)


def recount(state):
    return {**state, "aira.tensors": torch.tensor(len(state) - 1)}


BROKEN = [  # how a file goes wrong, and the words that the error must have
    (lambda s: {k: t for k, t in s.items() if k != "up.start_B"}, "aira_state_dict"),
    (lambda s: {k: t for k, t in s.items() if not k.startswith("up.")}, "aira_state_dict"),  # a whole layer
    (lambda s: {k: t for k, t in s.items() if k != "aira.tensors"}, "aira_state_dict"),
    (lambda s: {}, "aira_state_dict"),
    (lambda s: recount({"aira.tensors": s["aira.tensors"]}), "aira_state_dict"),
    (lambda s: recount({k: t for k, t in s.items() if k != "up.start_B"}), "up.start_B missing"),
    (lambda s: recount({k: t for k, t in s.items() if k != "up.directions"}), "up.directions missing"),
    (lambda s: recount({**s, "side.lora_A": s["up.lora_A"]}), "side.lora_A unexpected"),
    (lambda s: recount({**s, "up.lora_C": s["up.lora_A"]}), "up.lora_C unexpected"),
    (lambda s: {"wrapped." + k if k.startswith("up.") else k: t for k, t in s.items()}, "wrapped.up.lora_A unexpected"),
    (lambda s: {**s, "up.lora_A": s["up.lora_A"][:, 1:]}, "up.lora_A 9) 10)"),
    (lambda s: {**s, "up.lora_A": s["up.lora_A"][1:]}, "up.start_B (24,"),
    (lambda s: recount({k: t for k, t in s.items() if k != "down.lora_B"}), "down.lora_B missing"),
    (lambda s: recount({**s, "up.lora_B": torch.zeros(24, 3)}), "up.start_A missing"),
    (lambda s: {**s, "head.bias": torch.zeros(7)}, "head.bias (7,) (3,)"),
    (lambda s: {**s, "up.lora_A": s["up.lora_A"] * float("nan")}, "up.lora_A NaN"),
    (lambda s: {**s, "head.bias": s["head.bias"] / 0}, "head.bias inf"),
    (lambda s: "adapter.pt", "str weights_only=True"),
    (lambda s: {**s, "side": print}, "weights_only=True"),
]


@pytest.mark.parametrize("spoil, words", BROKEN, ids=[f"{i} {words}" for i, (_, words) in enumerate(BROKEN)])
def test_a_broken_file_is_named_and_changes_nothing(spoil, words):
    base = Net().double()
    state = aira_state_dict(adapted(copy.deepcopy(base), train=1, also_train="head"))
    with unchanged(base), pytest.raises((ValueError, TypeError)) as caught:
        load_aira(base, spoil(state))
    assert all(word in str(caught.value) for word in words.split()), caught.value
    load_aira(base, state)  # whereas the whole file does
    with unchanged(base), pytest.raises(ValueError, match="already has AIRA"):
        load_aira(base, state)


def test_peft_files_name_each_layer_unmistakably(tmp_path, no_safetensors):
    """PEFT takes the first pattern that a name ends with: "proj" must not speak for "block.proj"."""
    base, x = nn.Sequential(OrderedDict(proj=nn.Linear(10, 10))).double(), inputs()
    base.add_module("block", nn.Sequential(OrderedDict(proj=nn.Linear(10, 30))).double())
    base.block.proj.weight.data *= 20  # so that it gets more rank
    model = adapted(copy.deepcopy(base), x, train=3)
    assert len(model.proj.lora_A) < len(model.block.proj.lora_A)
    check_round_trips(base, model, x, tmp_path)


def test_peft_cannot_have_one_of_two_tied_weights_in_full(tmp_path):
    model = nn.Sequential(nn.Embedding(7, 10), nn.Linear(10, 10), nn.Linear(10, 7, bias=False))
    model[2].weight = model[0].weight
    ids = torch.arange(7)
    apply_aira(model, lambda: model(ids), rank=2, also_train="2")
    with pytest.raises(ValueError, match=r"tied.*\['0.weight'\].*merge_aira"):
        save_peft(model, tmp_path)


def test_names_in_also_train_may_lie_inside_each_other(tmp_path, no_safetensors):
    head, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), inputs()
    base = nn.Sequential(OrderedDict(body=nn.Linear(10, 8), head=head)).double()
    model = adapted(copy.deepcopy(base), x, train=3, also_train=["head", "head.1"])
    check_round_trips(base, model, x, tmp_path)
    load_aira(base, aira_state_dict(model))
    for one in (model, base):
        save_peft(one, tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["head"] or one is base


def test_peft_file_is_safetensors_where_that_is_installed(tmp_path, monkeypatch):
    fake, written = types.ModuleType("safetensors.torch"), {}
    fake.save_file = lambda tensors, path, metadata=None: written.update({path: tensors})
    monkeypatch.setitem(sys.modules, "safetensors", types.ModuleType("safetensors"))
    monkeypatch.setitem(sys.modules, "safetensors.torch", fake)
    model = Net().double()
    model.again = nn.Linear(10, 10).double()
    save_peft(adapted(model, train=1), tmp_path)
    tensors = list(written[str(tmp_path / "adapter_model.safetensors")].values())
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)  # it refuses shared memory
    assert all(t.is_contiguous() for t in tensors) and not (tmp_path / "adapter_model.bin").exists()


# ---- Models by chance ----------------------------------------------------------------------------------------------


def chance(rng):
    """A model of random depth, widths, nesting, biases, shared layers, frozen parts and odd names."""
    parts, width, square = OrderedDict(), 6, None
    for i in range(rng.randint(1, 5)):
        out = width if rng.random() < 0.3 else rng.choice([1, 3, 6, 9, 16])
        layer = Conv1D(out, width) if rng.random() < 0.3 else nn.Linear(width, out, bias=rng.random() < 0.5)
        layer = square if square is not None and out == width else layer  # shared
        square, width = layer if out == width else None, out
        layer.requires_grad_(rng.random() < 0.7)
        nest = rng.choice([lambda m: m, nn.Sequential, lambda m: nn.Sequential(nn.Sequential(m, nn.Tanh()))])
        parts[rng.choice(["lora_A", "base", "weird-name", "0", "gain", "é"]) + "_" * i] = nest(layer)
    return nn.Sequential(parts)


def test_invariants_on_150_random_models(tmp_path, no_safetensors):
    for number in range(150):
        rng = random.Random(number)
        torch.manual_seed(number)
        dtype = rng.choice(DTYPES)
        model, x = chance(rng).to(dtype), inputs(24, 6, dtype)
        base, before, output = copy.deepcopy(model), fingerprint(model), model(x)
        report = apply_aira(
            model, lambda: model(x), rank=rng.randint(1, 9), init=rng.choice(INITS), amplify=rng.choice([0, 0.5]),
            importance=rng.choice(list(aira.IMPORTANCE)), directions=rng.choice([1, 2, 32]),
            allocate=rng.choice(["knapsack", "greedy"]))
        trainable = [p for p in model.parameters() if p.requires_grad]
        assert bits(model(x)) == bits(output) and sum(p.numel() for p in trainable) <= report.budget, number
        for parameter in trainable:
            nn.init.normal_(parameter, 0, 0.02)
        fresh = copy.deepcopy(base)
        load_aira(fresh, aira_state_dict(model))
        assert bits(fresh(x)) == bits(model(x)), number
        precise = copy.deepcopy(model).double()  # without rounding, all forms must agree
        check_round_trips(base.double(), precise, x.double(), tolerance=1e-8)
        remove_aira(model)
        assert fingerprint(model) == before and bits(model(x)) == bits(output), number


def test_activation_checkpointing_wrappers_do_not_hide_adapters_from_a_file():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    base = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 3)).double()
    model = adapted(copy.deepcopy(base), train=3)
    model[0] = checkpoint_wrapper(model[0])
    load_aira(base, aira_state_dict(model))
    x = inputs()
    close(base(x), model(x))


@pytest.mark.parametrize("wrapper", ["checkpoint", "compile"])
def test_parts_wrapped_before_apply_keep_their_plain_names(wrapper):
    """also_train, load_aira and remove_aira see through wrappers; a trained head must not be missing from the file."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    wrap = checkpoint_wrapper if wrapper == "checkpoint" else functools.partial(torch.compile, backend="eager")
    base, x = nn.Sequential(nn.Linear(10, 8), nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 3))), inputs()
    base, wrapped = base.double(), copy.deepcopy(base.double())
    for part in ("1", "2"):
        wrapped._modules[part] = wrap(wrapped._modules[part])
    model, flags = copy.deepcopy(wrapped), [p.requires_grad for p in wrapped.parameters()]
    adapted(model, x, train=3, targets=["0", "1.0"], also_train="2.0")
    state = aira_state_dict(model)
    assert {key.partition(".")[0] for key in state} == {"0", "1", "2", "aira"} and "2.0.weight" in state
    for fresh in (base, wrapped):
        load_aira(fresh, state)
        close(fresh(x), model(x))
        assert all(map(torch.equal, aira_state_dict(fresh).values(), state.values()))
    remove_aira(model)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_compiled_parts_and_wrappers_do_not_change_names(tmp_path, no_safetensors):
    """apply_aira on torch.compile's wrapper, and torch.compile of single blocks afterwards."""
    base, x = nn.Sequential(nn.Sequential(nn.Linear(10, 8)), nn.Linear(8, 8), nn.Linear(8, 3)).double(), inputs()
    base[0][0].weight.requires_grad_(False)
    flags = [p.requires_grad for p in base.parameters()]
    for wrap in (True, False):
        model = copy.deepcopy(base)
        adapted(torch.compile(model, backend="eager") if wrap else model, x, train=3, also_train="2")
        if not wrap:
            model[0] = torch.compile(model[0], backend="eager")
        fresh = copy.deepcopy(base)
        load_aira(torch.compile(fresh, backend="eager") if wrap else fresh, aira_state_dict(model))
        close(fresh(x), model(x))
        save_peft(model, tmp_path)
        close(plain_lora(base, tmp_path)(x), fresh(x))
        remove_aira(model)
        assert [p.requires_grad for p in model.parameters()] == flags


def test_autocast_does_not_reach_the_adapters_own_sums():
    """G is a difference, small in the direction that the inputs are loudest in: not for half precision."""
    x = inputs(dtype=torch.float32) * torch.tensor([100.0] + 9 * [1])
    model = adapted(nn.Sequential(nn.Linear(10, 12)), x, train=3)
    (B, A), weight = model[0].factors(), model[0].weight
    with torch.autocast("cpu", torch.bfloat16):
        for inside, outside in zip((*model[0].factors(), model[0].weight), (B, A, weight)):
            assert torch.equal(inside, outside)


def test_apply_under_another_default_dtype_and_device(monkeypatch):
    ranks = []
    for dtype, device in ((torch.float32, "cpu"), (torch.float64, "cpu"), (torch.bfloat16, "meta")):
        aira._omega.cache_clear()
        model, x = Net(), inputs(dtype=torch.float32)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                ranks.append([row.rank for row in apply_aira(model, lambda: model(x), importance="outlier").rows])
        finally:
            torch.set_default_dtype(torch.float32)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert ranks[0] == ranks[1] == ranks[2]


def test_batch_norms_outside_also_train_are_warned_of():
    model = nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    with pytest.warns(UserWarning, match=r"\['1'\].*also_train"):
        adapted(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        remove_aira(model)
        adapted(model, also_train="1")


def test_layers_called_by_keyword():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(10, 3).double()

        def forward(self, x):
            return self.fc(input=x)

    x = inputs()
    model = adapted(Model(), x, train=2)
    assert far(model(x), model.fc.base(x))


def test_two_adapted_parts_are_not_taken_for_one():
    model = nn.Sequential(nn.Sequential(nn.Linear(10, 8)), nn.Sequential(nn.Linear(8, 3))).double()
    adapted(model[0])
    adapted(model[1], inputs(96, 8))
    with pytest.raises(ValueError, match="2 models with adapters of their own"):
        merge_aira(model)
    merge_aira(model[0])
    merge_aira(model)


# ---- train_toy.py --------------------------------------------------------------------------------------------------

TINY = {kind: (kind, 32, 1, 20) for kind in ("gpt", "vit")}


def test_toy_texts_keep_copies_on_one_side_and_ask_for_enough(tmp_path):
    licence = "// this line stands at the top of every file\n"
    for i in range(64):
        lines = ["".join(random.choices("abcdef", k=40)) + "\n" for _ in range(800)]
        (tmp_path / f"{i}.h").write_text(licence + "".join(lines) + "}\n" * 50)
    parts = [bytes(torch.cat([x, y[:, -1:]], 1).flatten().tolist()) for x, y in train_toy.texts(tmp_path, "*.h")]
    assert sum(part.count(licence.encode()) for part in parts) <= 1 and all(b"}\n}\n}" in part for part in parts)
    assert not {line for line in parts[2].split(b"\n") if len(line) == 40} & set(parts[0].split(b"\n"))
    with pytest.raises(SystemExit, match=r"too little text in 0 files \*.rs"):
        train_toy.texts(tmp_path, "*.rs")


def test_toy_tables_of_counts_by_brute_force():
    train, test = (torch.randint(97, 101, (rows, train_toy.CONTEXT)) for rows in (30, 4))
    def p(context, byte):  # counted over the rows, and smoothed by the next shorter context
        n = len(context)
        seen = [row[i + n] for row in train.tolist() for i in range(train_toy.CONTEXT - n) if row[i:i + n] == context]
        return (seen.count(byte) + 4 * (p(context[1:], byte) if context else 1 / 256)) / (len(seen) + 4)
    want = [-np.mean([math.log(p(row[i - n:i], row[i])) for row in test.tolist() for i in range(n, train_toy.CONTEXT)])
            for n in range(3)]
    assert train_toy.count_tables(train, test) == ", ".join(f"{nats:.3f}" for nats in want)


def test_toy_grid_grows_until_the_best_rate_lies_inside_and_no_diverged_one_wins(monkeypatch):
    def run(task, job):  # the best rate is .064, far from .008; above .1 it diverges
        return {"loss": math.nan if job.rate > 0.1 else abs(math.log2(job.rate / 0.064)) + job.seed - 101}
    monkeypatch.setattr(train_toy, "run", run)
    grid = train_toy.tune(TINY["gpt"], (101, 102), train_toy.Row("AIRA", 4, 10))
    assert min(grid, key=grid.get) == (0, 0.064) and max(grid) == (0, 0.128) and grid[0, 0.064] == 0.5


def test_toy_steps_to_a_loss_and_errors_of_paired_differences():
    assert train_toy.crossing([10, 20, 30], [3.0, 2.0, 1.0], 1.5) == 25
    assert train_toy.crossing([10, 20], [3.0, 2.0], 3.5) == 10 and train_toy.crossing([10], [3.0], 1) == math.inf
    ours, theirs = ([{"windows": w} for w in runs] for runs in ([[1.0, 2.0], [3.0, 5.0]], [[1.5, 2.5], [3.0, 7.0]]))
    seeds, windows = (statistics.stdev(d) / 2 ** 0.5 for d in ([-0.5, -1.0], [-0.25, -1.25]))
    assert train_toy.versus(ours, theirs) == f"-0.750 +-{seeds:.3f}/{windows:.3f}"


@pytest.mark.parametrize("kind", ["gpt", "vit"])
def test_toy_runs_every_method_and_each_is_another(kind):
    methods = train_toy.METHODS if kind == "gpt" else ["LoRA", "AIRA", train_toy.FULL]
    runs = {name: train_toy.run(TINY[kind], train_toy.Job(name, 4, 10, 0, 0.01, 1, 1)) for name in methods}
    assert np.isfinite([run["curve"] for run in runs.values()]).all()
    assert len({run["loss"] for run in runs.values()}) == len(methods)
    for name, run in runs.items():
        assert (run["sizes"][0] == runs["LoRA"]["sizes"][0]) != name.startswith(train_toy.FULL), name


def test_toy_trains_a_new_head_at_a_rate_of_its_own():
    base, _, parts = train_toy.prepare(*TINY["vit"])
    model = copy.deepcopy(base)
    train_toy.train(model, parts[0], 0.0, 3, 1, parts[1])
    moved = {name for (name, a), b in zip(model.named_parameters(), base.parameters()) if not a.equal(b)}
    assert moved == {"head.weight", "head.bias"}


# ==== Real models and tools; each test skips where its package is not installed =====================================

IDS = torch.randint(0, 60, (4, 12), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TEXT = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
VISION = dict(image_size=16, patch_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
              num_attention_heads=2)
MODELS = {  # name: config class, its arguments, model class, a batch, targets, also_train
    "gpt2": ("GPT2Config", dict(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=16), "GPT2LMHeadModel",
             dict(input_ids=IDS, labels=IDS), ["c_attn", "c_proj", "c_fc"], []),
    "bert": ("BertConfig", TEXT, "BertForSequenceClassification",
             dict(input_ids=IDS, labels=torch.tensor([0, 1, 0, 1])), ["query", "value", "dense"], ["classifier"]),
    "llama": ("LlamaConfig", dict(TEXT, num_key_value_heads=1), "LlamaForCausalLM",
              dict(input_ids=IDS, labels=IDS), ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"], []),
    "vit": ("ViTConfig", VISION, "ViTForImageClassification",
            dict(pixel_values=PIXELS, labels=torch.tensor([0, 1, 0, 1])), None, ["classifier"]),
    "clip": ("CLIPConfig", dict(text_config=dict(TEXT, eos_token_id=63), vision_config=VISION, projection_dim=16),
             "CLIPModel",
             dict(input_ids=IDS, pixel_values=PIXELS, return_loss=True), ["q_proj", "v_proj", "fc1", "fc2"], []),
}


def hf(name, **changes):
    """A small random model of a Hugging Face class, without dropout, and a batch for it."""
    transformers = pytest.importorskip("transformers")
    config, arguments, model, batch, _, _ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**arguments)
    for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        for key in [key for key in vars(part or config) if "drop" in key]:
            setattr(part or config, key, 0.0)
    for key, value in changes.items():
        setattr(config, key, value)
    return getattr(transformers, model)(config), batch


def apply(model, batch, name, **changes):
    targets, also_train = MODELS[name][4:]
    options = {"rank": 3, "importance": "outlier", "directions": 6, **changes}
    return apply_aira(model, lambda: model(**batch), targets=targets, also_train=also_train, **options)


def tune(model, batch, steps=4, lr=1e-2):
    """A few steps of AdamW; the loss at each."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def answer(model, batch):
    """What the model answers, as one tensor, in eval mode."""
    model.eval()
    with torch.no_grad():
        out = model(**batch)
    model.train()
    return out.logits_per_image if "logits_per_image" in out else out.logits


# ---- Hugging Face models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", MODELS)
def test_hugging_face_model(name, init):
    model, batch = hf(name)
    base, before = copy.deepcopy(model), answer(model, batch)
    report = apply(model, batch, name, init=init)
    assert len({row.rank for row in report.rows}) > 1
    assert torch.equal(answer(model, batch), before)  # bit-identical start
    losses = tune(model, batch)
    assert losses[-1] < losses[0]
    for adapter in (m for m in model.modules() if isinstance(m, AiraLinear)):
        assert all(factor.grad.abs().sum() > 0 for factor in tunable(adapter))

    trained, state = answer(model, batch), aira_state_dict(model)
    assert not torch.equal(trained, before)
    with aira_off(model):
        if not MODELS[name][5]:
            assert torch.equal(answer(model, batch), before)
    fresh = copy.deepcopy(base)
    load_aira(fresh, state)
    assert torch.equal(answer(fresh, batch), trained)
    merge_aira(model)
    torch.testing.assert_close(answer(model, batch), trained, atol=1e-5, rtol=1e-5)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    remove_aira(fresh)
    for (key, tensor), (was_key, was) in zip(fresh.state_dict().items(), base.state_dict().items()):
        assert key == was_key and (torch.equal(tensor, was) or key.startswith("classifier"))


def test_fused_qkv_as_in_timm():
    """timm's Attention makes q, k and v with one nn.Linear."""
    class Attention(nn.Module):
        def __init__(self, width, heads):
            super().__init__()
            self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

        def forward(self, x):
            b, n, c = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
            return x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))

    torch.manual_seed(0)
    model, x = nn.Sequential(Attention(32, 2), Attention(32, 2)), torch.randn(4, 9, 32)
    before = model(x)
    apply_aira(model, lambda: model(x), targets=["qkv", "proj"], rank=4)
    assert torch.equal(model(x), before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    trained = model(x)
    assert (trained - before).abs().max() > 1e-3
    with aira_off(model):
        assert torch.equal(model(x), before)
    merge_aira(model)
    torch.testing.assert_close(model(x), trained)


def test_trainer_runs_it_unchanged(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model, batch = hf("llama")
    apply(model, batch, "llama")
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=6, save_steps=3, logging_steps=1, learning_rate=1e-2, per_device_train_batch_size=4,
        use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    after, state = answer(model, batch), aira_state_dict(model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))  # the last three steps again
    torch.testing.assert_close(answer(model, batch), after)
    fresh, _ = hf("llama")
    load_aira(fresh, state)
    assert torch.equal(answer(fresh, batch), after)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model, batch = hf("llama")
    apply(model, batch, "llama", init="svd")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model.train()
        model(**batch).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert model.is_gradient_checkpointing and all(g.abs().sum() > 0 for g in gradients[1].values())
    torch.testing.assert_close(*gradients)


# ---- PEFT ----------------------------------------------------------------------------------------------------------


def with_peft(base, directory):
    """PeftModel.from_pretrained on the untouched base; no key missing, unexpected, or ignored."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, directory)
    text = "\n".join(str(warning.message) for warning in caught)
    assert not any(word in text for word in ("missing", "nexpected", "did not match", "fan_in_fan_out")), text
    state = model.state_dict()
    assert set(peft.get_peft_model_state_dict(model)) == set(read(directory)), "PEFT made other adapters than we wrote"
    assert all(p.isfinite().all() for p in state.values() if p.is_floating_point())
    return model.eval()


def read(directory):
    if (directory / "adapter_model.bin").exists():
        return torch.load(directory / "adapter_model.bin", weights_only=True)
    return pytest.importorskip("safetensors.torch").load_file(directory / "adapter_model.safetensors")


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", MODELS)
def test_peft_loads_what_save_peft_writes(name, init, tmp_path):
    pytest.importorskip("peft")
    model, batch = hf(name)
    base = copy.deepcopy(model)
    apply(model, batch, name, init=init)
    tune(model, batch)
    expected = answer(model, batch)
    save_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(set(config["rank_pattern"].values())) > 1
    there = with_peft(base, tmp_path)
    torch.testing.assert_close(answer(there, batch), expected, atol=1e-5, rtol=1e-5)
    merge_aira(model)
    merged = there.merge_and_unload()
    torch.testing.assert_close(answer(merged, batch), answer(model, batch), atol=1e-5, rtol=1e-5)
    own = model.state_dict()
    for key, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, own[key], atol=1e-5, rtol=1e-5)


class Block(nn.Module):
    """Names that are the endings of other names: fc and sub.fc, head and overhead and sub.head."""

    def __init__(self):
        super().__init__()
        self.fc, self.sub, self.overhead, self.head = nn.Linear(6, 6), nn.Module(), nn.Linear(6, 6), nn.Linear(6, 2)
        self.sub.fc, self.sub.head = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.head(self.overhead(self.sub.head(self.sub.fc(self.fc(x).tanh()).tanh()).tanh()).tanh())


def sequence():
    """Names 0, 1.0, 1.1.0 and 2."""
    inner = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    return nn.Sequential(nn.Linear(6, 6), inner, nn.Linear(6, 4))


@pytest.mark.parametrize("build, only, also", [
    (sequence, ["0", "1.0", "1.1.0", "2"], []), (sequence, ["0"], []), (sequence, ["1.0"], []),
    (sequence, ["0", "1.1.0"], []),
    (Block, ["fc", "sub.fc"], []), (Block, ["fc"], []), (Block, ["sub.fc"], []), (Block, ["fc"], ["head"]),
    (Block, ["fc", "sub.head", "overhead"], ["head"])])
def test_peft_with_ambiguous_names(build, only, also, tmp_path):
    """The adapted layers are exactly `only` and those in full exactly `also`, in PEFT too."""
    pytest.importorskip("peft")
    torch.manual_seed(0)
    base, x = build(), torch.randn(32, 6)
    model = copy.deepcopy(base)
    state = {}
    for name in only:  # load_aira takes exact names, of any ranks
        out, size = model.get_submodule(name).weight.shape
        r = 1 + len(state) // 6 % 3
        shapes = {"lora_A": (r, size), "lora_B": (out, r), "gain": (1,), "directions": (size, 2)}
        state.update({f"{name}.{kind}": torch.randn(shape) for kind, shape in shapes.items()})
    for name in also:
        state.update({f"{name}.weight": torch.randn_like(model.get_submodule(name).weight),
                      f"{name}.bias": torch.randn_like(model.get_submodule(name).bias)})
    load_aira(model, {**state, "aira.tensors": torch.tensor(len(state))})
    if also == ["head"]:  # PEFT would take sub.head and overhead for it
        with pytest.raises(ValueError, match="sub.head.*overhead.*merge_aira"):
            save_peft(model, tmp_path)
        return
    save_peft(model, tmp_path)
    there = with_peft(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(there(x), model(x), atol=1e-5, rtol=1e-5)
    merge_aira(model)
    merged = there.merge_and_unload()
    torch.testing.assert_close(merged(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("installed", [True, False])
def test_safetensors_where_installed_else_bin(installed, monkeypatch, tmp_path):
    if installed:
        pytest.importorskip("safetensors.torch")
    base, batch = hf("bert")
    model = copy.deepcopy(base)
    apply(model, batch, "bert")
    tune(model, batch)
    with monkeypatch.context() as patch:
        if not installed:
            patch.setitem(sys.modules, "safetensors.torch", None)
        save_peft(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors" if installed else "adapter_model.bin"}
    torch.testing.assert_close(answer(with_peft(base, tmp_path), batch), answer(model, batch), atol=1e-5, rtol=1e-5)


# ---- Precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32(dtype, init):
    model, batch = hf("llama")
    half = copy.deepcopy(model).to(dtype)
    model = copy.deepcopy(half).float()  # the same numbers
    before = answer(half, batch)
    ranks = [[row.rank for row in apply(m, batch, "llama", init=init).rows] for m in (model, half)]
    assert sum(abs(a - b) for a, b in zip(*ranks)) <= 2 and torch.equal(answer(half, batch), before)
    assert all(p.dtype == torch.float32 for n, p in half.named_parameters() if p.requires_grad)
    losses = [tune(m, batch, steps=12) for m in (model, half)]
    assert losses[0][-1] < losses[0][0] - 0.1
    torch.testing.assert_close(*map(torch.tensor, losses), atol=0.03, rtol=0.03)

    exact = {name: m.base.weight.double() + m.delta().double() for name, m in half.named_modules()
             if isinstance(m, AiraLinear)}
    merge_aira(half)
    for name, weight in exact.items():  # the error is the rounding of the weight, no more
        merged = half.get_submodule(name).weight
        rounding = (weight.to(dtype).double() - weight).abs().max()
        assert merged.dtype == dtype and (merged.double() - weight).abs().max() <= rounding * 1.001


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model, batch = hf("llama")
    with torch.autocast("cpu", dtype):
        before = answer(model, batch)
        report = apply(model, batch, "llama")  # statistics and decompositions are float32 here as well
        assert torch.equal(answer(model, batch), before)
    twin, _ = hf("llama")
    assert sum(abs(a.rank - b.rank) for a, b in zip(report.rows, apply(twin, batch, "llama").rows)) <= 2
    exact = tune(twin, batch, steps=8)
    with torch.autocast("cpu", dtype):
        losses = tune(model, batch, steps=8)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(exact), atol=0.05, rtol=0.05)


# ---- Compile and export --------------------------------------------------------------------------------------------


def compiler_works():
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(3))
        return True
    except Exception:  # no C++ compiler
        return False


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_compile_without_graph_breaks(when, backend):
    if backend == "inductor" and not compiler_works():
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()  # what other tests compiled counts towards its limit
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 4))
    x, results = torch.randn(8, 16), []
    for compiled in (False, True):
        model = copy.deepcopy(plain)
        run = torch.compile(model, fullgraph=True, backend=backend) if compiled else model
        if when == "before":
            run(x)  # compiled before there are adapters
        apply_aira(model, lambda: model(x), rank=2, importance="outlier", directions=4)
        if when == "after" and compiled:
            torch._dynamo.reset()
            run = torch.compile(model, fullgraph=True, backend=backend)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()
        with aira_off(run):
            off = run(x)
        torch.testing.assert_close(off, plain(x))
        results.append((run(x), aira_state_dict(run)))
    torch.testing.assert_close(*results)


def test_compiled_hugging_face_model_has_no_graph_breaks():
    model, batch = hf("llama")
    apply(model, batch, "llama")
    run = torch.compile(model, fullgraph=True, backend="eager")
    run(**batch).loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model(**batch).loss.backward()
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, gradients)


def test_export_of_the_merged_model():
    model, batch = hf("vit")
    apply(model, batch, "vit")
    tune(model, batch)
    merge_aira(model)
    model.eval()
    program = torch.export.export(model, (), {"pixel_values": PIXELS})
    torch.testing.assert_close(program.module()(pixel_values=PIXELS).logits, answer(model, batch))


# ---- Distributed ---------------------------------------------------------------------------------------------------

DATA = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))  # process r works on rows 16 r .. 16 r + 15
LABELS = DATA[:, :4].argmax(1)


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 4))


def learn(model, x, labels):
    """Four steps; the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def worker(rank, folder):
    """One of two processes: everything it finds goes to a file."""
    import torch.distributed as dist
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:  # FSDP2 came to torch 2.6, and to CPUs
        fully_shard = None
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, labels = DATA.chunk(2)[rank], LABELS.chunk(2)[rank]
    found = {}
    for init in INITS:
        for kind in ("ddp", "fsdp") if fully_shard else ("ddp",):
            model = perceptron()
            report = apply_aira(model, lambda: model(x), rank=3, importance="outlier", directions=4, init=init)
            start = copy.deepcopy(aira_state_dict(model))
            if kind == "ddp":
                wrapped = nn.parallel.DistributedDataParallel(model)
            else:
                for layer in model:
                    if isinstance(layer, AiraLinear):
                        fully_shard(layer)
                wrapped = fully_shard(model)
            losses = learn(wrapped, x, labels)
            dist.all_reduce(losses)
            found[init, kind] = dict(rows=[tuple(row) for row in report.rows], start=start, losses=losses / 2,
                                     state={k: t.clone() for k, t in aira_state_dict(wrapped).items()})
    found["sharded"] = errors = []
    sharded = [fully_shard(perceptron())] if fully_shard else []
    for model in (*sharded, perceptron().to("meta")):
        with pytest.raises(ValueError) as error:
            apply_aira(model, lambda: model(x))
        errors.append(str(error.value))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_equal_one(two_processes, kind, init):
    """Each calibrated and trained on its own half of DATA; this process does it all."""
    if (init, kind) not in two_processes[0]:
        pytest.skip("fully_shard needs torch 2.6")
    model = perceptron()
    report = apply_aira(model, lambda: model(DATA), rank=3, importance="outlier", directions=4, init=init)
    start = copy.deepcopy(aira_state_dict(model))
    losses = learn(model, DATA, LABELS)
    first, second = (found[init, kind] for found in two_processes)
    assert first["rows"] == second["rows"] and [row[4] for row in first["rows"]] == [row.rank for row in report.rows]
    for key, tensor in first["start"].items():
        assert torch.equal(tensor, second["start"][key]), key
    for key, tensor in start.items():  # singular vectors are unique up to their signs
        torch.testing.assert_close(first["start"][key].abs(), tensor.abs(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(first["losses"], losses, atol=1e-4, rtol=1e-4)
    assert losses[-1] < losses[0]

    fresh = perceptron()
    load_aira(fresh, first["state"])  # what DDP or FSDP2 trained, gathered, on the untouched base
    assert all(torch.equal(t, second["state"][k]) for k, t in first["state"].items())
    torch.testing.assert_close(fresh(DATA), model(DATA), atol=1e-3, rtol=1e-3)


def test_sharded_or_meta_weights_are_refused(two_processes):
    for message in two_processes[0]["sharded"]:
        assert "before sharding" in message


# ---- Memory --------------------------------------------------------------------------------------------------------


def test_statistics_keep_no_activations():
    """What calibration holds is O(in k) a layer, the same after one batch and after many."""
    torch.manual_seed(0)
    width, k = 64, 4
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(3)))

    def numbers():
        gc.collect()
        return sum(t.numel() for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.is_floating_point())

    before, held = numbers(), []

    def calibrate():
        for _ in range(3):
            model(torch.randn(5000, width))
            held.append(numbers() - before)

    apply_aira(model, calibrate, directions=k)
    assert held[0] == held[-1] <= 3 * (2 * width * (k + 16) + 2 * width + 100)


@pytest.mark.parametrize("options", [{}, {"init": "subspace"}, {"init": "svd"}, {"importance": "outlier"}], ids=str)
def test_apply_makes_no_copy_of_a_large_layer(options):
    """In half precision: a float32 copy would be the dearest thing in the set-up of a 7B model."""
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.data_ptr() != model[0].weight.data_ptr():
                self.numel = max(self.numel, result.numel())
            return result

    model = nn.Sequential(nn.Linear(1000, 8000, dtype=torch.bfloat16))
    x = torch.randn(30, 1000).bfloat16()
    with Largest() as largest:
        apply_aira(model, lambda: model(x), rank=4, **options)
    assert 2**19 < largest.numel <= 2**20 < 8000 * 1000 / 4
