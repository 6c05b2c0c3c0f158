# SPDX-License-Identifier: MIT
"""AIRA (Activation-Informed Low-Rank Adaptation, ICCV 2025) for PyTorch, all of it in this one file.

LoRA fine-tunes a frozen weight W (out, in) through a low-rank difference, y = (W + B A) x; it starts from random A
and zero B, with one rank for every layer.  AIRA first runs the model on a few batches and lets the activations
decide.  The parts of this file, the first four in the paper's order:

    1  statistics     how loud each input channel is, and in which directions the inputs lie
    2  start          an SVD of W, weighted by its inputs, gives the first factors
    3  ranks          which layer gets how much of plain LoRA's parameter budget
    4  AiraLinear     training amplifies updates, in directions that the activations choose
    5  apply_aira     puts it together, in place; by default it trains one factor of each layer and fixes the other
    6  merge, remove, save, load, export

Usage, around an existing training loop:

    report = apply_aira(model, lambda: [model(x) for x in few_batches])     # then the optimizer, then torch.compile
    ...                                                                     # train as before
    torch.save(aira_state_dict(model), "adapter.pt")

An independent re-implementation from the paper's abstract, the released code and the works below; "Departure" marks
every place where it does something else, and why.  Limits: nn.Linear and Hugging Face's Conv1D, no quantised weights,
one adapter a model, apply before sharding.

AIRA: ICCV 2025, github.com/lliai/LoRA-Zoo.  LoRA: arXiv 2106.09685.  Outlier score, OWL: arXiv 2310.05175.
Activation-weighted SVD, ASVD: arXiv 2312.05821.  SVD start, PiSSA: arXiv 2404.02948.  One factor frozen, LoRA-FA:
arXiv 2308.03303.
"""
import contextlib
import functools
import json
import math
import os
import re
import sys
import warnings
from collections import Counter, namedtuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

# ---- 1. Statistics -------------------------------------------------------------------------------------------------
# One pass over the calibration batches.  Of a layer's inputs x_1 .. x_N (its "tokens") we keep running sums only:
#
#     rms_j = sqrt(mean_n x_nj^2)          loudness of input channel j                                   (in,)
#     C Omega,  C = mean_n x_n x_n^T       their second moment times a fixed random Omega (in, k + 16, at most in):
#                                          enough to find the k directions where the inputs are loudest  (in, k + 16)
#     mean_n ||y_n||_2                     the output's size, which may serve as importance in part 3    a number

@functools.lru_cache(16)
def _omega(rows, columns):
    """Random orthonormal columns, the same in all processes; the caller's random state stays as it is."""
    seeded = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(rows, columns, generator=seeded, dtype=torch.float32, device="cpu"))[0]

class Statistics:
    """Sums over one layer's tokens: O(k in) numbers, in float32, however many tokens pass."""

    def __init__(self, in_features, k, device):
        self.k = min(k, in_features)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.output_norm = torch.zeros((), dtype=torch.float32, device=device)
        self.squares = torch.zeros(in_features, dtype=torch.float32, device=device)
        self.omega = _omega(in_features, min(in_features, k + 16)).to(device)  # 16 to spare, for accuracy
        self.sketch = torch.zeros_like(self.omega)

    def hook(self, layer, args, kwargs, y):
        """Forward hook: take in the layer's inputs x (..., in) and outputs y (..., out)."""
        x = args[0] if args else next(iter(kwargs.values()))
        with torch.autocast(x.device.type, enabled=False):
            x, y = (t.detach().reshape(-1, t.shape[-1]).float() for t in (x, y))
            self.tokens += len(x)
            self.output_norm += y.norm(dim=1).sum()
            self.squares += x.square().sum(0)
            self.sketch += x.T @ (x @ self.omega)

    def finish(self, name):
        """From sums over all processes to the number of tokens and means: output_norm, rms (in,), sketch = C Omega."""
        sums = (self.tokens, self.output_norm, self.squares, self.sketch)
        if dist.is_available() and dist.is_initialized():  # all processes must come out with the same ranks
            for total in sums:
                dist.all_reduce(total)
        self.tokens = int(self.tokens)
        if not all(total.isfinite().all() for total in sums):
            raise ValueError(f"layer {name!r} saw NaN or inf in calibration: check the batches and the model's weights")
        tokens = max(self.tokens, 1)
        self.output_norm = float(self.output_norm) / tokens
        self.rms = (self.squares / tokens).sqrt()
        self.sketch /= tokens

def principal_directions(sketch, omega, k):
    """The k largest eigenpairs of C from Y = C Omega alone (Nystrom approximation; Tropp et al., 2017):

        C ~ Y (Omega^T Y)^-1 Y^T = E E^T ,     Omega^T Y = V diag(v) V^T ,  E = Y V diag(v)^-.5
        E^T E = R diag(s) R^T  =>  C ~ U diag(s) U^T ,  U = E R diag(s)^-.5

    sketch = Y, omega (in, q), q >= k -> directions (in, k), orthonormal, eigenvalues (k,), falling.  Exact if q = in.
    """
    omega, sketch = omega.double(), sketch.double()
    shift = 1e-7 * sketch.norm() + 1e-30
    Y = sketch + shift * omega  # = (C + shift I) Omega: positive definite in spite of float32's rounding
    gram = omega.T @ Y
    v, V = torch.linalg.eigh((gram + gram.T) / 2)
    E = Y @ (V * v.clamp_min(shift).rsqrt())
    s, R = (t[..., -k:].flip(-1) for t in torch.linalg.eigh(E.T @ E))  # eigh's values rise
    return E @ (R * s.rsqrt()), (s - shift).clamp_min(0)

# ---- 2. Outlier-weighted SVD ---------------------------------------------------------------------------------------

def outlier_weighted_svd(weight, channel_rms, rank):
    """The paper's start: the rank-r factors that lose least where the inputs are loud.

    Plain SVD minimises ||W - B A||_F, as if every input channel mattered equally.  With S = diag(channel_rms),

        minimise ||(W - B A) S||_F   =>   W S = U diag(s) V^T ,   B = U_r diag(s_r)^.5 ,   A = diag(s_r)^.5 V_r^T S^-1

    is the optimum among all rank-r pairs (Eckart-Young).  weight (out, in), channel_rms (in,) -> B (out, rank),
    A (rank, in), in at least float32.  Channels below 1e-4 of the mean count as that, so that S^-1 is finite.  Exact
    for a smaller side up to 256 or 4 rank, above it randomised but seeded and within 1e-3 of the optimal error.
    ValueError for a rank or channel_rms that do not fit, and for NaN or inf.

    Departure: the released code decomposes the unweighted W, and slices torch.svd's V as if it were V^T.
    """
    if not 1 <= rank <= min(weight.shape) or channel_rms.shape != weight.shape[1:]:
        raise ValueError(f"rank={rank} and channel_rms {tuple(channel_rms.shape)} do not fit weight "
                         f"{tuple(weight.shape)}: use rank 1 .. {min(weight.shape)} and {weight.shape[1]} channels")
    if not (torch.stack(weight.detach().aminmax()).isfinite().all() and channel_rms.isfinite().all()):
        raise ValueError("weight or channel_rms has NaN or inf: mend the checkpoint or the calibration batches")
    V, image, rms = _weighted_svd(weight, channel_rms, rank, size=4 * rank + 64)
    s = image.norm(dim=0)
    # A zero row of A could never train where B is zero too: so A's share of s has a floor, and B takes the rest of it.
    root = s.sqrt().clamp_min(1e-4 * s[0].sqrt()) if s[0] > 0 else torch.ones_like(s)
    return image / root, (V * root).T / rms

def _weighted_svd(weight, rms, rank, size):
    """The `rank` largest parts of W S = U diag(s) V^T, S = diag(rms):  V (in, rank),  W S V = U diag(s) (out, rank),
    and rms with its floor.

    Where an SVD is not cheap, it is found inside a subspace with orthonormal basis Q (in, size, rounded down to 16s):
    the SVD W S Q = U diag(s) R^T gives V = Q R.  Q = [X_1 X_2 ..], 16 columns each: X_i is the part of S W^T Y_i-1 that
    is new to X_1 .. X_i-1, with Y_i = W S X_i and Y_0 random (randomised block Krylov; Musco and Musco, 2015).
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)  # half precision has no SVD
    rms = rms.to(dtype)
    rms = rms.clamp_min(1e-4 * rms.mean()) if rms.any() else torch.ones_like(rms)
    smaller = min(weight.shape)
    if smaller <= max(256, 4 * rank):
        U, s, Vt = torch.linalg.svd(weight.detach().to(dtype) * rms, full_matrices=False)
        # where W is zero all directions are as good, but not coordinates, which may be dead
        V = Vt[:rank].T if s[0] > 0 else _omega(len(rms), rank).to(Vt)
        return V, U[:, :rank] * s[:rank], rms
    size = min(size, smaller) // 16 * 16
    Q = _omega(len(rms), size).to(weight.device, dtype, copy=True)  # random, until X_i takes its columns' place
    WSQ = weight.new_empty(len(weight), size, dtype=dtype)
    parts, Y = _parts(weight), _omega(len(weight), 16).to(weight.device, dtype)
    for i in range(0, size, 16):
        # (y^T W)^T, for W^T y is slower on a CPU
        new = rms[:, None] * sum(y.T @ part.to(dtype) for part, y in zip(parts, Y.split(len(parts[0])))).T
        X = new / new.norm(dtype=torch.float64).clamp_min(1e-30)
        X = X + 1e-6 * Q[:, i:i + 16]  # where W S holds no more, go on at random
        for _ in range(2):  # a second time, for the first one's rounding
            X = torch.linalg.qr(X - Q[:, :i] @ (Q[:, :i].T @ X))[0]
        Y = torch.cat([part.to(dtype) @ (rms[:, None] * X) for part in parts])
        Q[:, i:i + 16], WSQ[:, i:i + 16] = X, Y
    double = WSQ.double()  # R from (W S Q)^T W S Q, whose eigenvalues are s^2 and rise: float32 would blur the small
    R = torch.linalg.eigh(double.T @ double)[1][:, -rank:].flip(-1).to(dtype)
    return Q @ R, WSQ @ R, rms

def _parts(weight):
    """Its rows, about a million numbers at a time, to convert and multiply: a copy of a whole layer may be large."""
    return weight.detach().split(max(1, 2**20 // weight.shape[1]))

# ---- 3. Ranks ------------------------------------------------------------------------------------------------------
# A rank-r adapter trains cost_l * r parameters, cost_l = in + out, or min(in, out) where only one of its factors is
# trained (see _build).  Each further unit of rank is worth less:
#
#     maximise  sum_l theta_l log r_l    subject to    sum_l cost_l r_l <= budget , min_rank <= r_l <= max_l , integers
#
# where theta_l is the importance of layer l.  Departure: the released code solves this for real numbers with SciPy and
# truncates, which leaves part of the budget unspent.
#
# At the optimum theta_l / (cost_l r_l) is the same in all layers, but for bounds and rounding.  So r_l follows
# theta_l / cost_l, and theta_l = cost_l means equal ranks.  |W_ij| rms_j is the significance of a weight (OWL): what it
# brings to an output.  Layers where a few outliers bring most of it get more:  theta_l = cost_l * variation_l.

def significance_variation(weight, channel_rms):
    """How unevenly a layer's significance is spread: the variance of |W_ij| rms_j over its squared mean.

    weight (out, in), channel_rms (in,) -> a number without unit: 0 if all weights count alike, pi / 2 - 1 = .57 for a
    Gaussian W and equally loud channels (also where W or the input is zero, for want of better), and more the heavier
    the tail of outliers.  Dead channels do not count.  Departure: OWL counts the entries above a threshold, and so does
    not tell a weight of 6 times the mean from one of 600.
    """
    rms, total, squares = channel_rms.double(), 0.0, 0.0
    for part in _parts(weight):
        part = part.float()
        total += float(part.abs().sum(0).double() @ rms)
        squares += float(part.square().sum(0).double() @ rms.square())
    live = len(weight) * int((rms > 0).sum())
    # not quite 0, or rounding would rank the layers where all weights count alike
    return max(squares * live / total ** 2 - 1, 1e-6) if total else math.pi / 2 - 1

def outlier_score(weight, channel_rms, threshold=2.0):
    """How much outlier a layer holds: weights whose significance is more than `threshold` times the mean.

    weight (out, in), channel_rms (in,) -> (mass, fraction): the sum of the outliers' significance, in units of
    activation, and their share of the entries, 0 .. 1.

    Departure: OWL uses the fraction, at threshold 5.  The mass also grows with a layer's size and scale.
    """
    def significance():
        return (part.float().abs() * channel_rms.float() for part in _parts(weight))

    mean = sum(float(part.double().sum()) for part in significance()) / weight.numel()
    mass = count = 0
    for part in significance():
        outliers = part[part > threshold * mean]
        mass, count = mass + float(outliers.double().sum()), count + outliers.numel()
    return mass, count / weight.numel()

def _least_ranks(importance, costs, budget, min_rank, max_ranks):
    """Check the problem; return every layer's least rank, theta > 0, and what is left of the budget then."""
    theta = np.asarray(importance, dtype=float)
    if not len(theta) == len(costs) == len(max_ranks) > 0:
        raise ValueError(f"{len(theta)} importances, {len(costs)} costs, {len(max_ranks)} max_ranks: one a layer")
    if not (np.isfinite(theta).all() and min([min_rank, *costs, *max_ranks]) >= 1 and theta.min() >= 0):
        raise ValueError(f"importance={importance} must be finite and >= 0; min_rank={min_rank}, costs={costs} and "
                         f"max_ranks={max_ranks} must be >= 1")
    # A layer of no importance grows last; if none has any, all count the same (and cheap ones get more).
    theta = np.maximum(theta / theta.max(), 1e-9) if theta.any() else np.ones_like(theta)
    ranks = [min(min_rank, most) for most in max_ranks]
    least = sum(cost * r for cost, r in zip(costs, ranks))
    if least > budget:
        raise ValueError(f"budget={budget} is too small, for min_rank={min_rank} takes {least}: raise the budget "
                         "(apply_aira's rank) or lower min_rank")
    return ranks, theta, budget - least

def _units(ranks, theta, max_ranks):
    """Every unit of rank that could be bought: its layer, and its gain, theta log((r + 1) / r)."""
    layer = np.repeat(np.arange(len(ranks)), np.subtract(max_ranks, ranks))
    r = np.concatenate([np.arange(*bounds) for bounds in zip(ranks, max_ranks)])
    return layer, theta[layer] * np.log1p(1 / r)

def greedy_ranks(importance, costs, budget, min_rank, max_ranks):
    """Spend the budget one unit of rank at a time, where theta log((r + 1) / r) / cost is largest.

    importance, costs (int parameters a unit of rank) and max_ranks: one number a layer; budget in parameters -> list
    of ints.  Optimal if all costs are equal.  ValueError for a budget below min_rank everywhere.
    """
    ranks, theta, left = _least_ranks(importance, costs, budget, min_rank, max_ranks)
    layer, gain = _units(ranks, theta, max_ranks)
    for l in layer[np.argsort(-gain / np.asarray(costs)[layer], kind="stable")].tolist():
        if costs[l] <= left:  # else the layer is done, for `left` only shrinks
            ranks[l] += 1
            left -= costs[l]
    return ranks

def knapsack_ranks(importance, costs, budget, min_rank, max_ranks):
    """The exact optimum, for any costs.  Arguments, result and errors as for greedy_ranks.

    Layers of one cost compete by gain alone, and a layer's gains fall with its rank.  So the best n units for such a
    class are its n largest gains, and their sum, value[n], is all we need to know of it.  It remains to choose one n a
    class.  Classes are joined one by one; of all the choices so far we keep those that no cheaper one matches in value.

    To keep those few, most n are ruled out first.  Charge a price for every parameter.  The value of any choice within
    the budget is then at most  price * budget + sum_classes max_n (value[n] - price cost n) , and each class' n takes
    off this bound what it falls short of its max.  Greedy falls short of the bound by some gap, usually a small one; so
    neither an n, nor a choice so far, that falls short by more than the gap can be part of the optimum.
    """
    ranks, theta, left = _least_ranks(importance, costs, budget, min_rank, max_ranks)
    greedy = greedy_ranks(importance, costs, budget, min_rank, max_ranks)
    # the best gain per parameter that greedy had to leave: a good price
    price = max((theta[l] * math.log1p(1 / r) / costs[l] for l, r in enumerate(greedy) if r < max_ranks[l]), default=0)
    classes, gap = [], price * left - theta @ np.log(np.divide(greedy, ranks))  # the classes' maxima come on top
    layer, gain = _units(ranks, theta, max_ranks)
    for cost in sorted(set(costs)):
        units = np.flatnonzero(np.equal(costs, cost)[layer])
        units = units[np.argsort(-gain[units], kind="stable")][: left // cost]
        value = np.concatenate([[0.0], np.cumsum(gain[units])])
        net = value - price * cost * np.arange(len(value))
        classes.append((cost, layer[units], value, net.max() - net))
        gap += net.max()
    if gap <= 1e-13 * theta.sum():  # greedy has reached the bound, as it does for equal ranks
        return greedy
    gap += 1e-9 * theta.sum()  # rounding

    spent, worth, short, trail = np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1), []
    for cost, _, value, loss in classes:
        n = np.flatnonzero(loss <= gap)
        spent, worth, short = (np.add.outer(a, b).ravel()  # every choice so far with every n
                               for a, b in ((spent, cost * n), (worth, value[n]), (short, loss[n])))
        keep = np.flatnonzero((spent <= left) & (short <= gap))
        keep = keep[np.lexsort((-worth[keep], spent[keep]))]  # by cost, ...
        best_cheaper = np.concatenate([[-1], np.maximum.accumulate(worth[keep])[:-1]])
        keep = keep[worth[keep] > best_cheaper]  # ... and worth more than all that cost less
        trail.append((keep // len(n), n[keep % len(n)]))
        spent, worth, short = spent[keep], worth[keep], short[keep]
    i = -1  # the dearest that was kept is worth most; walk back from it
    for (_, layers, _, _), (previous, n) in zip(reversed(classes), reversed(trail)):
        for l in layers[: n[i]]:
            ranks[l] += 1
        i = previous[i]
    return ranks

IMPORTANCE = {  # theta of a layer, from its (out, in) weight, its Statistics and its cost
    "variation": lambda weight, seen, cost: cost * significance_variation(weight, seen.rms),
    # the next three as they are, without the cost: so where costs differ, cheap layers get more
    "outlier": lambda weight, seen, cost: outlier_score(weight, seen.rms)[0],
    "fraction": lambda weight, seen, cost: outlier_score(weight, seen.rms, threshold=5.0)[1],
    "activation": lambda weight, seen, cost: seen.output_norm,
    "uniform": lambda weight, seen, cost: cost}
ALLOCATE = {"knapsack": knapsack_ranks, "greedy": greedy_ranks}

# ---- 4. AiraLinear -------------------------------------------------------------------------------------------------
# The paper amplifies the updates of significant weights.  Multiplying a gradient by a constant would be a placebo, for
# Adam divides it out again.  So we change coordinates: training moves lora_A, and the layer computes with
#
#     A = lora_A G          G (in, in) symmetric, fixed at calibration
#
# By the chain rule grad(lora_A) = grad(A) G.  One step of SGD moves A by -lr grad(A) G^2, one of Adam about by
# -lr sign(grad(lora_A)) G: where G stretches a direction, its updates are amplified, under Adam too.
#
# Which G?  A few directions carry nearly all the energy of the inputs; they drown the others in A x, and in grad(A).
# With C = mean x x^T = Q diag(lambda) Q^T, G = C^-.5 whitens: all directions of G x are equally loud.  (A little is
# added to lambda first, or the quietest directions would take over.)  The k loudest directions Q_k are kept and the
# rest count as one average with one gain.  The loud ones' own gains are smaller, so that G = gain I - P P^T with
# P = Q_k diag(gain - own)^.5, (in, k): k * in numbers, and never a matrix.
#
# How large?  LoRA draws A's entries with variance 1 / (3 in), so that (A_i x)^2, A_i a row, is about 1 / 3 for inputs
# of unit RMS.  We scale G so that |G x|^2 = in / 12 on average, whatever the inputs' RMS; then rows of length 2, as
# A = 2 V^T G with part 2's V, have about the same 1 / 3 (more where V follows channels that are loud beyond the k
# directions).  Rows of length 1 and twice the G would start alike and step twice as far: that diverged at high rates.
#
# Departure: this amplifies quiet directions, where the abstract speaks of significant weights: amplifying loud inputs
# with a diagonal G slowed convergence in a prototype.  And the released code multiplies the adapter's output by a gate
# in [0, 1] made from the batch at hand: that only attenuates, ties a sample to its batch, and is lost on merging;
# a fixed G is part of dW.

def input_gain(total, directions, eigenvalues, power, damping=0.1):
    """G ~ (C + damping * mean(lambda) I)^-power, scaled so that |G x|^2 is about in / 12 on average; I for silence.

    total = trace C, directions (in, k), eigenvalues (k,) -> gain (1,), P (in, k):  G = gain I - P P^T, with eigenvalues
    `own` in the directions and `gain` elsewhere.  ValueError for inputs so quiet or loud that G is out of range.
    """
    n, k = directions.shape
    if total < 1e-30:  # nothing to go by
        return torch.ones_like(eigenvalues[:1]), torch.zeros_like(directions)
    rest, floor = (total - eigenvalues.sum()).clamp_min(0), damping * total / n
    gain = (rest / max(n - k, 1) + floor) ** -power
    own = torch.minimum((eigenvalues + floor) ** -power, gain)  # the sketch makes eigenvalues a little too small
    scale = (n / 12 / ((own.square() * eigenvalues).sum() + gain.square() * rest)).sqrt()
    if not 0 < scale < math.inf:
        raise ValueError(f"inputs of RMS {float(total / n) ** 0.5:.0e} are out of range at amplify={power}: lower it")
    return (scale * gain).reshape(1), directions * (scale * (gain - own)).sqrt()

def times_gain(rows, gain, directions):
    """rows (r, in) times G = gain I - P P^T, P = directions, without forming G."""
    with torch.autocast(rows.device.type, enabled=False):  # a difference, small where inputs are loud
        return torch.addmm(rows * gain, rows @ directions, directions.T, alpha=-1)

# The tensors of an AiraLinear, and which of them go together, in the order of its docstring's table
TENSORS = ("lora_A", "lora_B", "start_A", "start_B", "gain", "directions")
FORMS = ({"start_B", "lora_A", "gain", "directions"}, {"start_A", "lora_B"}, {"lora_A", "lora_B", "gain", "directions"},
         set(TENSORS))

class AiraLinear(nn.Module):
    """A frozen linear layer and its low-rank difference,  y = base(x) + B A x - B0 A0 x.  (Departure: the released code
    does not take B0 A0 off, so its output jumps at the start.)

    base                nn.Linear or Conv1D, frozen; its weight is never touched
    lora_A, lora_B      (r, in), (out, r), what is trained
    start_A, start_B    (r, in), (out, r), A0 and B0, frozen
    gain, directions    G, frozen, as input_gain returns it; there if lora_A is

    Which of them there are depends on init, and what is missing counts as zero:

    "narrow"      out >= in:  start_B and lora_A,  dW = B0 lora_A G        lora_A is zero at the start
                  out < in:   start_A and lora_B,  dW = lora_B A0          lora_B is zero at the start, A0 = 2 V^T G
    "subspace"    lora_A and lora_B,               dW = lora_B lora_A G    lora_B is zero at the start, as in LoRA
    "svd"         all four,  dW = (B0 + lora_B) (A0 + lora_A G) - B0 A0    both are zero at the start

    So the output at the start is the base model's bit for bit, in any dtype.  The frozen tensors are parameters because
    DDP would broadcast buffers at every step.
    """

    def __init__(self, base, **tensors):
        super().__init__()
        self.base, self.enabled = base, True
        self.out_features, self.in_features = _out_in(base).shape
        dtype = torch.promote_types(base.weight.dtype, torch.float32)  # half precision would lose small updates
        for name in TENSORS:
            tensor = tensors.get(name)
            if tensor is not None:
                tensor = tensor.detach().to(base.weight.device, dtype, copy=True, memory_format=torch.contiguous_format)
                tensor = nn.Parameter(tensor, requires_grad=name.startswith("lora_"))
            self.register_parameter(name, tensor)
        self.train(base.training)

    def factors(self):
        """B (out, r) and A (r, in) of the difference, dW = B A, as plain LoRA; of rank 2r where init is "svd":

            dW  =  (B0 + lora_B) (A0 + lora_A G) - B0 A0  =  [B0 + lora_B | lora_B] [lora_A G ; A0]
        """
        A = self.start_A if self.lora_A is None else times_gain(self.lora_A, self.gain, self.directions)
        B = self.start_B if self.lora_B is None else self.lora_B
        if self.start_A is None or self.start_B is None:
            return B, A
        return torch.cat([self.start_B + B, B], 1), torch.cat([A, self.start_A])

    def forward(self, input):  # the name that nn.Linear gives it
        y = self.base(input)
        if not self.enabled:
            return y
        B, A = self.factors()  # the product B A would be (out, in), and is never formed here
        return y + F.linear(F.linear(input, A.to(input.dtype)), B.to(input.dtype))

    def delta(self):
        """dW (out, in)."""
        B, A = self.factors()
        with torch.autocast(B.device.type, enabled=False):
            return B @ A

    def merged_weight(self):
        """W + dW, in the base's layout and dtype."""
        delta = self.delta()
        if is_conv1d(self.base):
            delta = delta.T
        return (self.base.weight.to(delta.dtype) + delta).to(self.base.weight.dtype)

    @property
    def weight(self):
        """For stock modules that read a layer's weight instead of calling the layer: nn.MultiheadAttention, and
        nn.TransformerEncoderLayer's fused path.  Every read forms W + dW."""
        return self.merged_weight() if self.enabled else self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def extra_repr(self):
        return f"rank={len(self.start_A if self.lora_A is None else self.lora_A)}"

def _out_in(layer):
    """The layer's weight as (out, in)."""
    return layer.weight.detach().T if is_conv1d(layer) else layer.weight.detach()

def is_conv1d(module):
    """Hugging Face's Conv1D (GPT-2) is a linear layer that stores its weight as (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")

def is_linear(module):
    return isinstance(module, nn.Linear) or is_conv1d(module)

# ---- 5. apply_aira -------------------------------------------------------------------------------------------------

# of a layer; shape (out, in), score its theta
Row = namedtuple("Row", "name shape tokens score rank parameters")

class Report(namedtuple("Report", "rows budget fixed skipped")):
    """What apply_aira did, printed as a table: [Row], the budget in trained parameters, how many numbers the adapters
    hold beside these (start_A, start_B and G), {name: reason} of skipped layers."""

    def __str__(self):
        spent = sum(row.parameters for row in self.rows)
        table = [("layer", "out x in", "tokens", "score", "rank", "parameters")]
        table += [(row.name, "%d x %d" % row.shape, f"{row.tokens:,}", f"{row.score:.4g}", f"{row.rank}",
                   f"{row.parameters:,}") for row in self.rows] + [("total", "", "", "", "", f"{spent:,}")]
        first, *others = [max(map(len, column)) for column in zip(*table)]
        lines = ["  ".join([name.ljust(first)] + [c.rjust(w) for c, w in zip(cells, others)]) for name, *cells in table]
        lines.append(f"budget {self.budget:,} trained parameters, {spent / self.budget:.1%} spent; "
                     f"{self.fixed:,} numbers are fixed")
        return "\n".join(lines + [f"skipped {name}: {reason}" for name, reason in self.skipped.items()])

    __repr__ = __str__

def _inside(name, module):
    return name == module or name.startswith(module + ".")

def _matches(name, wanted):
    """Whether `wanted` is the module's name or its end after a dot, as in PEFT's target_modules."""
    name = _plain(name)
    return name == wanted or name.endswith("." + wanted)

def _plain(name):
    """A name without what torch.compile and activation checkpointing put into it when they wrap a part of the model."""
    return name.replace("._orig_mod", "").replace("._checkpoint_wrapped_module", "")

def _outermost(names):
    return [name for name in names if not any(name != other and _inside(name, other) for other in names)]

def _check_weight(name, layer):
    weight = layer._parameters.get("weight")
    if (weight is None or nn.parameter.is_lazy(weight) or weight.is_meta or hasattr(weight, "device_mesh")
            or weight.dim() != 2 or weight.numel() == 0):
        raise ValueError(f"layer {name!r} has no plain weight matrix (lazy, meta, empty, sharded, parametrised): "
                         "load the model first, call apply_aira before sharding, or leave the layer out of targets")
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"layer {name!r} has a {weight.dtype} weight, and AIRA takes float16, bfloat16, float32 and "
                        "float64: dequantise the model, or leave the layer out of targets")
    if not torch.stack(weight.detach().aminmax()).isfinite().all():  # NaN comes through as both
        raise ValueError(f"layer {name!r} has NaN or inf in its weight: mend the checkpoint or leave it out of targets")

def _find_layers(model, targets, also_train):
    """{name: layer} to adapt, and {name: reason} for those that could not or should not be."""
    if any(isinstance(module, AiraLinear) for module in model.modules()):
        raise ValueError("the model already has AIRA adapters: call merge_aira or remove_aira first")
    if hasattr(model, "peft_config"):
        raise ValueError("the model has PEFT adapters, which would be adapted too: call merge_and_unload() first")
    if is_linear(model):
        raise ValueError(f"a bare {type(model).__name__} cannot be replaced in place: wrap it in nn.Sequential(layer)")
    # a weight with two owners is tied: merging would change the other one too
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers, skipped = {}, {}
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    for name, module in linear.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        if targets is not None and not any(_matches(name, target) for target in targets):
            continue
        if any(_inside(_plain(name), trained) for trained in also_train):
            skipped[name] = "it is in also_train"
        elif owners[id(module._parameters.get("weight"))] > 1:
            skipped[name] = "its weight is tied"
        elif targets is None and module is head:
            skipped[name] = "it is the output head"
        elif targets is None and isinstance(parent, nn.MultiheadAttention):
            skipped[name] = "nn.MultiheadAttention never calls it"
        else:
            _check_weight(name, module)
            layers[name] = module
    missed = [target for target in targets or () if not any(_matches(name, target) for name in layers)]
    if missed or not layers:
        raise ValueError(f"targets={missed or targets} match no layer to adapt; this model's are {list(linear)}, and "
                         f"{skipped or 'none'} skipped")
    return layers, skipped

def _calibrate(model, layers, run, k):
    """Run the user's batches, in eval mode and without gradients, and gather {name: Statistics}; without batches
    (None) as if the inputs were white, C = I."""
    statistics = {name: Statistics(_out_in(layer).shape[1], k, layer.weight.device) for name, layer in layers.items()}
    if run is None:
        for name, seen in statistics.items():
            seen.tokens, seen.rms, seen.sketch = 0, seen.squares + 1, seen.omega
            seen.output_norm = float(layers[name].weight.detach().float().norm())
        return statistics
    hooks, modes = [], [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()  # nn.TransformerEncoderLayer's kernel, which calls no layer
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for name, layer in layers.items():
            hooks.append(layer.register_forward_hook(statistics[name].hook, with_kwargs=True))
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    for name in layers:
        statistics[name].finish(name)
    unused = [name for name in layers if statistics[name].tokens == 0]
    if unused:
        raise ValueError(f"calibrate never called {unused}, so adapters there might do nothing: run them, or leave "
                         "them out of targets (a generator runs nothing; nn.MultiheadAttention never calls out_proj)")
    return statistics

# A difference B A of rank r costs (in + out) r trained parameters.  Departure: "narrow" trains only the factor on the
# layer's smaller side, min(in, out) r parameters, so that the same budget buys two to five times the rank; the SVD
# fixes the other, wide factor (a fixed random A is LoRA-FA's idea).  dW is then linear in what is trained.
#
# How long should B0 = start_B be?  A step of lr on lora_B moves an output by about lr sum_i |A0_i x| ~ lr r / 2.  One
# on lora_A moves each of r coordinates by about lr in / 4, and so the outputs by |B0| sqrt(r / out) lr in / 4 (RMS), if
# B0's columns have length |B0|.  |B0| = sqrt(r out) / in makes that lr r / 4: half of the other, whatever the widths.
# Twice as much, equal steps, wanted half the learning rate and ended alike; this one suits LoRA's best rate.

def _build(layer, seen, rank, init, amplify, start):
    """The adapter of one layer, from its Statistics."""
    weight = _out_in(layer)
    out_features, in_features = weight.shape
    dtype = torch.promote_types(weight.dtype, torch.float32)
    directions, eigenvalues = (t.to(dtype) for t in principal_directions(seen.sketch, seen.omega, seen.k))
    gain, directions = input_gain(seen.rms.to(dtype).square().sum(), directions, eigenvalues, amplify)
    lora_A, lora_B = gain.new_zeros(rank, in_features), gain.new_zeros(out_features, rank)
    G = {"gain": gain, "directions": directions}
    if init == "svd":
        B, A = outlier_weighted_svd(weight, seen.rms, rank)
        return AiraLinear(layer, lora_A=lora_A, lora_B=lora_B, start_A=A, start_B=B, **G)
    # coarser than in outlier_weighted_svd: these are only the directions in which training starts, or moves
    if start == "svd":
        V, image, _ = _weighted_svd(weight, seen.rms, rank, size=rank + 32)
    else:
        image, V = (torch.linalg.qr(torch.randn(n, rank))[0].to(gain) for n in weight.shape)
    if init == "subspace":
        return AiraLinear(layer, lora_A=2 * V.T, lora_B=lora_B, **G)
    if out_features >= in_features:
        # image's orthogonal columns, at length 1 (where W is zero: any)
        U = torch.linalg.qr(image if image.any() else _omega(out_features, rank).to(image))[0]
        return AiraLinear(layer, lora_A=lora_A, start_B=U * math.sqrt(rank * out_features) / in_features, **G)
    return AiraLinear(layer, lora_B=lora_B, start_A=times_gain(2 * V.T, gain, directions))

def _replace(model, swap):
    """Put swap[id(module)] in the module's place, everywhere it hangs (a shared module hangs in several places)."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if id(child) in swap:
                setattr(parent, key, swap[id(child)])

def apply_aira(model, calibrate=None, *, rank=8, targets=None, init="narrow", importance="variation",
               allocate="knapsack", min_rank=1, max_rank=None, also_train=(), amplify=0.5, directions=32,
               start="svd"):
    """Put AIRA adapters into `model` in place, freeze everything else, and return a Report that prints as a table.

    calibrate    callable without arguments that runs the model on representative batches; a few thousand tokens do, and
                 padding counts as tokens.  None: all channels weigh the same, no amplification, and a warning says so.
    rank         the budget of trained parameters is what LoRA of this rank would spend, sum_l (in + out)_l * rank
    targets      names of layers or their endings, as "q_proj".  None: every nn.Linear and Conv1D except Hugging Face's
                 output head, those in also_train, tied weights, and out_proj of nn.MultiheadAttention
    init         "narrow": a layer's wide factor comes from the SVD and stays, its narrow one is trained; the budget
                 buys two to five times LoRA's rank, and convergence was fastest (README).  A layer with few outputs or
                 inputs, as a small head, then has few directions to move in: put it in also_train.
                 "subspace": A comes from the SVD, B is zero, both are trained; a LoRA of rank about `rank`.
                 "svd": the paper's start, both come from the weighted SVD and are trained; exports at twice its rank
    importance   "variation" (see part 3), "outlier" (mass), "fraction" (OWL's, threshold 5), "activation" (mean ||y||),
                 "uniform" (equal ranks)
    allocate     "knapsack" (exact) or "greedy"
    min_rank, max_rank      bounds on every layer's rank, beside min(in, out); max_rank=None is twice the rank that
                 all layers could have alike, lest one with extreme outliers take it all
    also_train   names of modules or their endings that are trained in full and saved along: a new head, norms
    amplify      power p of the gain G ~ C^-p; 0 turns amplification off, and G just scales inputs to one size
    start        "random": orthonormal random factors in place of the SVD's, for comparison
    directions   k, the number of principal directions that G tells apart

    Call it before the optimizer is built and before torch.compile, DDP or fully_shard; under torch.distributed on all
    processes, each with its own batches.  Bad input raises ValueError or TypeError and leaves the model as it was.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    targets = (targets,) if isinstance(targets, str) else targets
    also_train = (also_train,) if isinstance(also_train, str) else also_train or ()
    for name in (*(targets or ()), *also_train):
        if not (isinstance(name, str) and name):
            raise ValueError(f"targets={targets}, also_train={also_train} must be names of modules, or their endings")
    for name, value, least in (("rank", rank, 1), ("min_rank", min_rank, 1), ("directions", directions, 1),
                               ("max_rank", min_rank if max_rank is None else max_rank, min_rank)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number >= {least}")
    rank, min_rank = int(rank), int(min_rank)  # NumPy's would overflow
    for name, value, known in (("init", init, ("narrow", "subspace", "svd")), ("allocate", allocate, tuple(ALLOCATE)),
                               ("importance", importance, tuple(IMPORTANCE)), ("start", start, ("svd", "random"))):
        if value not in known:
            raise ValueError(f"{name}={value!r} must be one of {known}")
    if not (isinstance(amplify, (int, float)) and 0 <= amplify <= 1):
        raise ValueError(f"amplify={amplify!r} must be a number in 0 .. 1")
    if not (calibrate is None or callable(calibrate)):
        raise ValueError(f"calibrate is a {type(calibrate)} and must be callable, as lambda: [model(x) for x in data]")
    trained = _outermost(dict.fromkeys(_plain(name) for name, _ in model.named_modules()  # a wrapper repeats a name
                                       if any(_matches(name, wanted) for wanted in also_train)))
    missed = [wanted for wanted in also_train if not any(_matches(name, wanted) for name, _ in model.named_modules())]
    if missed:
        raise ValueError(f"also_train={missed} match no module; the model has {list(dict(model.named_children()))}")

    layers, skipped = _find_layers(model, targets, trained)
    moving = [name for name, module in model.named_modules() if getattr(module, "running_mean", None) is not None
              and not any(_inside(_plain(name), also) for also in trained)]
    if moving:
        warnings.warn(f"the running statistics of {moving} move in training, and neither aira_state_dict nor "
                      "remove_aira knows of them: name them in also_train, or keep them in eval mode", stacklevel=2)
    if calibrate is None:
        warnings.warn("apply_aira without calibrate: all channels weigh the same, nothing is amplified", stacklevel=2)
    statistics = _calibrate(model, layers, calibrate, directions)

    weights = {name: _out_in(layer) for name, layer in layers.items()}
    costs = [(min if init == "narrow" else sum)(weight.shape) for weight in weights.values()]
    scores = [IMPORTANCE[importance](weights[name], statistics[name], cost) for name, cost in zip(layers, costs)]
    budget = rank * sum(sum(weight.shape) for weight in weights.values())
    sides = [min(weight.shape) for weight in weights.values()]
    # theta = cost: equal ranks
    most = 2 * max(greedy_ranks(costs, costs, budget, min_rank, sides)) if max_rank is None else int(max_rank)
    ranks = ALLOCATE[allocate](scores, costs, budget, min_rank, [min(side, most) for side in sides])

    swap, rows, fixed = {}, [], 0
    for (name, layer), score, cost, r in zip(layers.items(), scores, costs, ranks):
        swap[id(layer)] = adapter = _build(layer, statistics[name], r, init, amplify, start)
        fixed += sum(p.numel() for p in adapter.parameters(recurse=False) if not p.requires_grad)
        rows.append(Row(name, tuple(weights[name].shape), statistics[name].tokens, score, r, cost * r))
        if len(layers) > 50:
            end = "\n" if len(rows) == len(layers) else ""
            print(f"\raira: layer {len(rows)} of {len(layers)}", end=end, file=sys.stderr, flush=True)
    _attach(model, swap, trained)  # nothing was changed before this line
    return Report(rows, budget, fixed, skipped)

# ---- 6. Merge, remove, save, load, export --------------------------------------------------------------------------

def _attach(model, swap, also_train):
    trainable = [_plain(name) for name, parameter in model.named_parameters() if parameter.requires_grad]
    trained = {id(parameter) for name, module in model.named_modules() if _plain(name) in also_train
               for parameter in module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad = id(parameter) in trained and parameter.dtype.is_floating_point
    _replace(model, swap)
    model._aira = {"trainable": trainable, "also_train": also_train}

def _adapted(model):
    """The module that apply_aira was called on (DDP and torch.compile wrap it), and its {name: AiraLinear}."""
    roots = [module for module in model.modules() if "_aira" in module.__dict__]
    if len(roots) > 1:
        raise ValueError(f"this {type(model).__name__} holds {len(roots)} models with adapters of their own: call this "
                         f"on each, or apply_aira once on the whole")
    if not roots:
        raise ValueError(f"this {type(model).__name__} has no AIRA adapters: call apply_aira or load_aira first "
                         "(merged or removed already? save before merging)")
    return roots[0], {_plain(name): m for name, m in roots[0].named_modules() if isinstance(m, AiraLinear)}

def remove_aira(model):
    """Take the adapters off and give back exactly the model that went in (also_train keeps what it learned)."""
    model, adapters = _adapted(model)
    _replace(model, {id(adapter): adapter.base for adapter in adapters.values()})
    for name, parameter in model.named_parameters():
        parameter.requires_grad = _plain(name) in model._aira["trainable"]
    del model._aira

@torch.no_grad()
def merge_aira(model):
    """Fold the adapters into the base weights, in float32 or wider, and put the base layers, of their own class, back:
    the base model's speed.  ValueError, and nothing changed, without adapters or where a weight becomes NaN or inf."""
    _, adapters = _adapted(model)
    broken = [name for name, adapter in adapters.items() if not adapter.merged_weight().isfinite().all()]
    if broken:
        raise ValueError(f"merging would write NaN or inf into {broken}: the training run has diverged")
    for adapter in adapters.values():  # computed again, rather than holding all merged weights at once
        adapter.base.weight.copy_(adapter.merged_weight())
    remove_aira(model)

@contextlib.contextmanager
def aira_off(model):
    """with aira_off(model): the model computes as its base; the reference model of preference tuning, for free."""
    _, adapters = _adapted(model)
    before = [(adapter, adapter.enabled) for adapter in adapters.values()]
    try:
        for adapter in adapters.values():
            adapter.enabled = False
        yield model
    finally:
        for adapter, enabled in before:
            adapter.enabled = enabled

def aira_state_dict(model):
    """{name: tensor} of the adapters, gains included so that training can go on, and of also_train; live tensors, as
    state_dict's.  "aira.tensors" counts them, so that half a file cannot pass for a small one."""
    model, adapters = _adapted(model)
    own = {f"{name}.{tensor}" for name in adapters for tensor in TENSORS}
    also = model._aira["also_train"]
    state = {_plain(key): t.detach() for key, t in model.state_dict().items()}
    state = {key: t for key, t in state.items() if key in own or any(_inside(key, name) for name in also)}
    state = {key: t.full_tensor() if hasattr(t, "full_tensor") else t for key, t in state.items()}  # FSDP2: gather
    return {**state, "aira.tensors": torch.tensor(len(state))}

@torch.no_grad()
def load_aira(model, state):
    """Put the adapters of an aira_state_dict on an untouched base: no calibration, no decomposition; ranks come from
    the tensors' shapes.  What is missing, unexpected, misshapen or not finite raises ValueError and changes nothing."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    if any("_aira" in module.__dict__ for module in model.modules()):
        raise ValueError("the model already has AIRA adapters: call remove_aira first")
    if not (isinstance(state, dict) and all(isinstance(tensor, torch.Tensor) for tensor in state.values())):
        raise TypeError(f"state is a {type(state).__name__}, or holds something else than tensors: it must be what "
                        "aira_state_dict returned, read with torch.load(path, weights_only=True)")
    if "aira.tensors" not in state or len(state) == 1:
        raise ValueError(f"state ({len(state)} tensors) did not come from aira_state_dict: a whole model's, or PEFT's?")
    state = dict(state)
    count = int(state.pop("aira.tensors"))
    modules = {_plain(name): module for name, module in model.named_modules()}
    own, parts = {_plain(key): tensor for key, tensor in model.state_dict().items()}, {}
    full = state.keys() & own.keys()  # of also_train
    for key in state.keys() - full:
        name, _, tensor = key.rpartition(".")
        if tensor in TENSORS and is_linear(modules.get(name)):
            parts.setdefault(name, {})[tensor] = state[key]
    want = {key: tuple(own[key].shape) for key in full}
    for name, part in parts.items():
        _check_weight(name, modules[name])
        out_features, in_features = _out_in(modules[name]).shape
        r, k = (next((part[t].shape[i] for t in names if t in part and part[t].dim() == 2), 0)
                for i, names in ((0, ("lora_A", "start_A")), (1, ("directions",))))
        shapes = {"lora_A": (r, in_features), "lora_B": (out_features, r), "start_A": (r, in_features),
                  "start_B": (out_features, r), "gain": (1,), "directions": (in_features, k)}
        form = next((form for form in FORMS if form >= part.keys()), FORMS[-1])
        want.update({f"{name}.{t}": shapes[t] for t in form})
    got = {key: tuple(tensor.shape) for key, tensor in state.items()}
    problems = [f"{key} is {got.get(key, 'missing')} and should be {want.get(key, 'absent, it is unexpected here')}"
                for key in sorted({**got, **want}) if got.get(key) != want.get(key)]
    problems += [f"{key} has NaN or inf" for key, tensor in state.items() if not tensor.isfinite().all()]
    if count != len(state):
        problems.append(f"it has {len(state)} of the {count} tensors of that aira_state_dict")
    if problems:
        raise ValueError(f"the state does not fit this model ({len(problems)} faults): {'; '.join(problems[:5])}")
    swap = {id(modules[name]): AiraLinear(modules[name], **part) for name, part in parts.items()}
    also_train = _outermost(sorted({key.rpartition(".")[0] for key in full}))
    for key in full:
        own[key].copy_(state[key])
    _attach(model, swap, also_train)

def save_peft(model, directory):
    """Write a plain LoRA adapter that Hugging Face PEFT, and servers that read its format, load on the untouched base:
    adapter_config.json and adapter_model.safetensors (.bin where safetensors is not installed).  Gains are folded in,
    every scale is 1, init="svd" exports twice its rank.  ValueError without adapters or for what PEFT can't express."""
    model, adapters = _adapted(model)
    also = model._aira["also_train"]
    modules = {_plain(name): module for name, module in model.named_modules(remove_duplicate=False)}
    full = {id(p) for name in also for p in modules[name].parameters()}
    faults = {
        "layers shared under a second name": [
            name for name, module in modules.items() if isinstance(module, AiraLinear) and name not in adapters],
        # PEFT takes modules_to_save by bare str.endswith: "classifier" would also be "pre_classifier"
        f"modules whose name ends like one of also_train={also}": [
            name for name in modules if name.endswith(tuple(also)) and not any(_inside(name, a) for a in also)],
        "weights tied to one in also_train": [
            name for name, p in model.named_parameters(remove_duplicate=False)
            if id(p) in full and not any(_inside(_plain(name), a) for a in also)]}
    for fault, found in faults.items():
        if found:
            raise ValueError(f"PEFT cannot express {fault}, {found}: use merge_aira and save the whole model")
    tensors = {_plain(key): tensor for key, tensor in model.state_dict().items()
               if any(_inside(_plain(key), name) for name in also)}
    ranks = {}
    for name, adapter in adapters.items():
        B, A = adapter.factors()
        ranks["^" + re.escape(name)] = len(A)  # a regular expression: a plain "0" would also be "1.0"
        tensors.update({f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B})
    tensors = {f"base_model.model.{key}": tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    targets = sorted(adapters)
    if any(_matches(name, target) for name in modules if name not in adapters for target in targets):
        targets = "|".join(map(re.escape, targets))  # a string is one regular expression, to be matched in full
    config = {"peft_type": "LORA", "r": max(ranks.values()), "lora_alpha": max(ranks.values()), "rank_pattern": ranks,
              "alpha_pattern": ranks, "target_modules": targets, "modules_to_save": also or None, "lora_dropout": 0.0,
              "bias": "none", "fan_in_fan_out": all(is_conv1d(a.base) for a in adapters.values()),
              "inference_mode": True}
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, "adapter_config.json"), "w") as file:
        json.dump(config, file, indent=2)
    try:
        from safetensors.torch import save_file
        save_file(tensors, os.path.join(directory, "adapter_model.safetensors"), metadata={"format": "pt"})
    except ImportError:
        torch.save(tensors, os.path.join(directory, "adapter_model.bin"))
