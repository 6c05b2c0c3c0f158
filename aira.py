# SPDX-License-Identifier: MIT
"""AIRA, Activation-Informed Low-Rank Adaptation (ICCV 2025), in one file.

LoRA fine-tunes a linear layer y = W x without touching W.  It trains two thin matrices beside it,
y = W x + s B A x; A (r, in) starts at random, B (out, r) at zero, and all layers have one rank r.
AIRA first runs the model on a few batches and measures its activations.  They decide

    the start    A starts from an SVD of W in which loud input channels weigh more;
    the ranks    LoRA's parameter budget is shared out: more where large weights meet loud inputs;
    the updates  the adapter reads G x in place of x, where a fixed matrix G rescales directions.

Where this file departs from the abstract, because it measured better:
    activations  each token is first divided by its own loudness, so that no few loud tokens decide.
    start        B is zero: the SVD gives A's directions only.  init="svd" starts both factors.
    updates      the sign is reversed: G turns loud directions down and quiet ones up.  The abstract
                 amplifies the updates of significant weights, those that loud inputs meet; that was
                 worse than doing nothing.  A negative `amplify` follows it.

Use, in any training loop:

    import torch
    from aira import aira_state_dict, apply_aira

    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
    batches = [torch.randn(32, 64) for _ in range(4)]
    print(apply_aira(model, lambda: [model(x) for x in batches], rank=4))  # changes it in place
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=4e-3)  # now train as ever, and then
    torch.save(aira_state_dict(model), "adapter.pt")

Symbols, for one linear layer (a token is any vector that enters it: of text, image or table):

    x (in,)                 a token; its loudness is the root mean square of its numbers
    X (n, in)               a sample of tokens, each divided by its own loudness
    rms (in,), S            the RMS of X's channels, times the geometric mean of the tokens'
                            loudness;  S = diag(rms)
    C (in, in)              X^T X / n: how loud each direction of inputs is; never formed
    G (in, in)              (C + damping I)^-p, kept as a gain for each of the loudest 2 r
                            directions and one for all others;  p = `amplify`
    W (out, in)             the layer's own weight, frozen
    A (r, in), B (out, r)   the adapter of rank r;  A0, B0: where it starts
    s                       the adapter's scale, the same for all layers
    theta                   the layer's importance when ranks are assigned

An independent re-implementation, from the abstract and the released code ("Official" below:
github.com/lliai/LoRA-Zoo, folder aira).  LoRA: arXiv 2106.09685.  Outliers: OWL, 2310.05175.
Weighted SVD: ASVD, 2312.05821.  A start from an SVD: PiSSA, 2404.02948.  G: K-FAC, 1503.05671.
"""

import json
import math
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Names = str | Iterable[str]


# ---- 1. Listening ------------------------------------------------------------------------------
# Abstract: existing methods "fail to account for activation information, such as outliers".
#
# While the user's batches run, each layer keeps a uniform sample of the tokens that enter it; all
# that follows is computed from W and this sample.  The outliers that matter here are channels, loud
# in most tokens.  But a few whole tokens can be hundreds of times louder than the others (a text's
# first token often is) and would drown all else, so each is divided by its own loudness:
#
#     X = the tokens / their loudness ,    loudness = sqrt(mean_j x_j^2)
#     rms_j = sqrt(mean over X's rows of X_j^2) * geometric mean of the loudness
#
# The last factor gives back to rms how loud the layer is as a whole, to compare layers when they
# compete for rank.  (Padding counts as tokens, too: calibrate without it, or with little.)
#
# Official: lora.py listens to one batch, and only to the first token's outputs.

SAMPLE = 1024  # tokens kept of each layer: with 4,096, or with all, the losses were the same


class Listener:
    """A forward hook that keeps a uniform sample of the tokens that enter a layer.

    Every token gets a random key, and the tokens with the largest keys stay.
    """

    def __init__(self, weight):
        self.count = 0  # of all tokens
        self.last_call = 0.0  # a time, for the report's line on what ran last
        self.tokens = weight.new_empty(0, weight.shape[1])
        self.keys = np.empty(0)
        self.random = np.random.default_rng(0)  # whatever the caller's seed or device
        self.X = self.rms = None  # once all is heard, listen sets them

    def __call__(self, layer, args, kwargs, output):
        x = (*args, *kwargs.values())[0].detach()  # passed by position or by name
        x = x.reshape(-1, x.shape[-1])
        tokens = torch.cat([self.tokens, x])
        keys = np.append(self.keys, self.random.random(len(x)))
        largest = keys.argsort()[-SAMPLE:]
        self.tokens, self.keys = tokens[largest], keys[largest]
        self.count += len(x)
        self.last_call = time.perf_counter()

    def share(self):
        """All processes must get the same ranks: they take the first one's tokens."""
        if dist.is_available() and dist.is_initialized():
            box = [self.tokens.cpu()]
            dist.broadcast_object_list(box)
            self.tokens = box[0].to(self.tokens)


def upcast(tensor):
    """Half types as float32: they have too few digits for what follows, and no SVD."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def scale_tokens(tokens):
    """tokens (n, in) -> X, the same at RMS 1 without the silent ones; rms (in,).

    If nothing was heard, X is empty and all channels count as equally loud, rms = 1.
    """
    tokens = upcast(tokens[tokens.any(dim=1)])
    if len(tokens) == 0:
        return tokens, tokens.new_ones(tokens.shape[1])
    loudness = tokens.square().mean(dim=1, keepdim=True).sqrt()
    X = tokens / loudness
    typical = loudness.log().mean().exp()  # the geometric mean
    return X, X.square().mean(dim=0).sqrt() * typical


# ---- 2. Outlier-weighted SVD -------------------------------------------------------------------
# Abstract: "Outlier-weighted SVD decomposition to reduce approximation errors in low-rank weight
# initialization".
#
# A plain SVD finds the best B A for W as if all inputs were equally loud.  Weighted by rms, an
# error counts as it shows in the output (if channels are uncorrelated), and an SVD still gives the
# optimum, by Eckart and Young's theorem:
#
#     minimise ||(W - B A) S||   =>   W S = U diag(sigma) V^T,
#                                     B = U_r diag(sigma_r)^1/2,  A = diag(sigma_r)^1/2 V_r^T S^-1
#
# By default the adapter uses V_r^T alone; section 4 says why.
#
# Official: AwLinear (lora_lib.py) decomposes W without weights, and slices V where it means V^T.

FLOOR = 1e-4  # of the mean loudness: a channel that never fired must not be divided by zero


def lowrank_svd(matrix, rank):
    """matrix (m, n) -> U (m, rank), sigma (rank,), V^T (rank, n) of its largest singular values.

    The randomised SVD, many times faster than the whole one.  16 columns beyond the rank and five
    iterations bring its error within a thousandth of the optimum, on flat spectra too.
    """
    columns = min(rank + 16, *matrix.shape)
    with torch.random.fork_rng(range(torch.cuda.device_count())):  # the caller's seed stays
        torch.manual_seed(0)
        with torch.autocast(matrix.device.type, enabled=False):
            U, sigma, V = torch.svd_lowrank(matrix, columns, niter=5)
    return U[:, :rank], sigma[:rank], V[:, :rank].T.contiguous()


def outlier_weighted_svd(weight: Tensor, channel_rms: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-r factors of a weight, with errors weighted by the loudness of channels.

    Used by init="svd"; the default start needs V_r^T only, and takes it from lowrank_svd.

    weight (out, in), channel_rms (in,), rank from 1 to min(out, in)
    -> B (out, rank), A (rank, in), in float32 or wider.  ValueError if the rank does not fit.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"{rank=}: a weight of {tuple(weight.shape)} has 1 to {min(weight.shape)}")
    S = upcast(channel_rms)
    S = S.clamp_min(FLOOR * S.mean()) if S.any() else torch.ones_like(S)
    U, sigma, Vt = lowrank_svd(upcast(weight.detach()) * S, rank)  # column j times rms_j
    root = sigma.sqrt()
    return U * root, root[:, None] * Vt / S


# ---- 3. Ranks ----------------------------------------------------------------------------------
# Abstract: "Outlier-driven dynamic rank assignment using offline optimization".
#
# An output adds up terms W_ij x_j, of typical size |W_ij| rms_j: the weight's significance, as OWL
# defines it.  An outlier is here a weight of more than twice its layer's mean significance; theta_l
# sums those of layer l.  A unit of rank costs in + out parameters, and each further unit should
# bring less than the one before; like the official code, we take the logarithm to say so:
#
#     maximise  sum_l theta_l log r_l    subject to    sum_l cost_l r_l <= budget ,
#                                                      min_rank <= r_l <= max_rank_l , whole numbers
#
# apply_aira's bounds are 1 and twice LoRA's rank.  Between them, r_l is near constant * theta_l /
# cost_l.
#
# Official: lora.py solves the same in real numbers (SciPy) and cuts these to whole ones, which
# leaves 6 % of the budget unspent.  Its theta is the size of a layer's output.

COINS = 2**18  # the most in knapsack_ranks, which keeps a byte for each coin and unit of rank


def outlier_mass(weight: Tensor, channel_rms: Tensor, threshold: float = 2.0) -> float:
    """The default theta: the sum of significance over outliers, above threshold times the mean.

    OWL takes the share of weights that are outliers, whatever their size; the sum measured better
    on text, and alike on images.
    The sum over all weights, threshold 0, gives similar ranks.
    """
    significance = upcast(weight.detach()).abs() * upcast(channel_rms)
    outliers = significance > threshold * significance.mean()
    return float(significance[outliers].sum())


def least_ranks(importance, costs, budget, min_rank, max_ranks):
    """Check the arguments -> everyone's least rank, and what that leaves of the budget."""
    if min(min_rank, *max_ranks) < 1:
        raise ValueError(f"ranks must be 1 or more: {min_rank=}, {max_ranks=}")
    if not (np.isfinite(importance).all() and min(importance) >= 0):
        raise ValueError(f"{importance=}: NaN, inf or negative; are the batches sound?")
    ranks = [min(min_rank, largest) for largest in max_ranks]
    left = budget - int(np.dot(costs, ranks))
    if left < 0:
        raise ValueError(f"{budget=} is too small: {min_rank=} takes {budget - left}")
    return ranks, left


def greedy_ranks(
    importance: list[float], costs: list[int], budget: int, min_rank: int, max_ranks: list[int]
) -> list[int]:
    """Give out rank unit by unit, each to the layer that gains most for its cost.

    importance (theta), costs (parameters of a unit of rank), max_ranks: a number for each layer;
    budget in parameters -> a rank for each layer.  Optimal where all costs are equal.
    """
    ranks, left = least_ranks(importance, costs, budget, min_rank, max_ranks)

    def gain(layer):
        return importance[layer] * math.log((ranks[layer] + 1) / ranks[layer]) / costs[layer]

    layers = list(range(len(ranks)))
    while layers:
        best = max(layers, key=gain)
        if ranks[best] < max_ranks[best] and costs[best] <= left:
            ranks[best] += 1
            left -= costs[best]
        else:  # now or later, it can have no more
            layers.remove(best)
    return ranks


def knapsack_ranks(
    importance: list[float], costs: list[int], budget: int, min_rank: int, max_ranks: list[int]
) -> list[int]:
    """The optimum, by dynamic programming; arguments and result as of greedy_ranks.

    It is here to show what exact means: in train_toy.py's models it gains less than a thousandth.
    best[b] is the most that b coins can gain with the units of rank offered so far.  A coin is the
    costs' greatest common divisor, which is exact; if that makes more than COINS coins, they are
    made larger and prices are rounded up.
    """
    ranks, left = least_ranks(importance, costs, budget, min_rank, max_ranks)
    coin = max(math.gcd(*costs), math.ceil(left / COINS))
    best = np.zeros(left // coin + 1)
    offers = []
    for layer, least in enumerate(ranks):
        price = math.ceil(costs[layer] / coin)
        for rank in range(least, max_ranks[layer]):
            taken = np.full_like(best, -np.inf)  # what b coins gain if they buy this unit, too
            taken[price:] = best[:-price] + importance[layer] * math.log((rank + 1) / rank)
            offers.append((layer, price, taken >= best))
            best = np.maximum(best, taken)

    # Walk back: which units did the best plan take?  Counting them is enough, because a plan takes
    # no unit of a layer without the earlier ones, which gain more at the same price.
    coins = len(best) - 1
    for layer, price, worth in reversed(offers):
        if worth[coins]:
            ranks[layer] += 1
            coins -= price
    return ranks


# ---- 4. The layer, and its updates, with the sign reversed --------------------------------------
# Abstract: "Activation-informed training to amplify updates on significant weights".
#
# The sign is reversed here: loud directions of x are turned down, quiet ones up, and the updates
# with them.  Turning loud ones up raised the loss, on the images of `train_toy.py --full` from
# 1.05 to 1.39.  A likely reason: the gradient of W sums (error) x^T over tokens; a few loud
# directions fill this sum, and an adapter of low rank can learn only few directions.
#
#     y = W x + s (B A - B0 A0) G x ,    G = (C + damping I)^-p
#
# Where C is large, G is small.  At p = 0, G = I.  At the default p = 1/2, but for the damping, G x
# is equally loud in all directions that G knows (whitened).
#
# Small changes dA and dB move W by s (B dA + dB A) G: both parts end in G.  SGD brings a second G,
# for the gradients of A and B are B^T (gradient of W) G and (gradient of W) G A^T, up to s.  (At
# p = 1/2, G^2 is the factor that K-FAC applies to inputs; K-FAC keeps it up to date.)  Adam brings
# all entries of dA and dB to similar sizes, which undoes much of the second G; the first stays.
#
# The start: B0 = 0 and A0 = V_r^T / s, with V from W S = U diag(sigma) V^T.  W x is (W S) (S^-1 x),
# so V_r^T picks the r directions of S^-1 x that W reads most.  At p = 1/2, for a diagonal C and no
# damping, S^-1 x is G x, up to a factor: just what the adapter reads.  Other p use the same start.
#
# init="svd" follows the abstract: s B0 A0 G is section 2's best approximation of W, for any p.  It
# is subtracted again, because the output must not jump.
#
# Official: AwLinear scales B A x by |W x|, brought to 0 .. 1 over the batch: that only turns down,
# ties a sample to its batch and is lost on merging.  Its SVD start changes the output.

DIRECTIONS = 2  # G knows 2 r directions: a square layer's file is twice LoRA's; more did not help
DAMPING = 0.1  # a tenth of C's average eigenvalue, which is 1; it bounds G by 0.1^-p
SCALE = 0.5  # s; it makes A0's rows longer, so that equal steps of Adam turn them less


def whitening(X, p, k):
    """X (n, in) -> G: directions (k, in), orthonormal, and gains (k + 1,).

    They are C's loudest directions, at most n of them; the last gain is for all others together,
    at the mean of their energies.  For an empty X, C = I.
    """
    _, sigma, directions = lowrank_svd(X, k)
    energies = sigma.square() / len(X)  # eigenvalues of C; all of them add up to in
    width, known = X.shape[1], len(energies)
    others = (width - energies.sum()).clamp_min(0) / max(width - known, 1)
    return directions, (torch.cat([energies, others[None]]) + DAMPING) ** -p


def times_G(A, directions, gains):
    """A (r, in) -> A G.  G = g I + D^T diag(gains - g) D, D the directions, g the last gain."""
    g = gains[-1]
    # The two terms nearly cancel where inputs are loud, so half precision would not do.
    with torch.autocast(A.device.type, enabled=False):
        along = A @ directions.T  # (r, k)
        return g * A + (along * (gains[:-1] - g)) @ directions


def is_conv1d(module):
    """Hugging Face's Conv1D, in GPT-2: a linear layer that stores its weight as (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def weight_of(layer):
    """The weight as (out, in)."""
    return layer.weight.detach().T if is_conv1d(layer) else layer.weight.detach()


class AiraLinear(nn.Module):
    """A frozen linear layer with its adapter: y = base(x) + s (B A - B0 A0) G x.

    base                 nn.Linear or Hugging Face's Conv1D, untouched
    lora_A, lora_B       (r, in), (out, r): trained, in float32 or wider, because steps are small
    directions, gains    (k, in), (k + 1,): G, fixed
    start_A, start_B     A0, B0, fixed, only for init="svd".  Then lora_A and lora_B are what is
                         added, A = A0 + lora_A, B = B0 + lora_B, so weight decay pulls to the start

    The official AwLinear forms B A, as large as W, in each step; here only x A^T B^T.
    """

    def __init__(self, base, lora_A, lora_B, directions, gains, start_A=None, start_B=None):
        super().__init__()
        self.base = base
        self.out_features, self.in_features = weight_of(base).shape
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.register_buffer("directions", directions)
        self.register_buffer("gains", gains)
        self.register_buffer("start_A", start_A)
        self.register_buffer("start_B", start_B)
        self.train(base.training)

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (out, q), A (q, in) with y = base(x) + B A x: a plain LoRA; G and s are folded in.

        q is r, or 2 r with init="svd", because then, with a = lora_A and b = lora_B,
            (B0 + b) (A0 + a) - B0 A0  =  (B0 + b) a + b A0  =  [B0 + b, b] [a ; A0].
        """
        A, B = upcast(self.lora_A), upcast(self.lora_B)
        if self.start_A is not None:
            A, B = torch.cat([A, self.start_A]), torch.cat([self.start_B + B, B], dim=1)
        return SCALE * B, times_G(A, upcast(self.directions), upcast(self.gains))

    def forward(self, input: Tensor) -> Tensor:
        B, A = self.factors()
        hidden = F.linear(input, A.to(input.dtype))  # (..., q)
        return self.base(input) + F.linear(hidden, B.to(input.dtype))

    @property
    def weight(self):
        """W + dW.  nn.TransformerEncoderLayer reads its layers' weights and does not call them."""
        B, A = self.factors()
        with torch.autocast(A.device.type, enabled=False):
            dW = B @ A
        W = self.base.weight
        return (W + (dW.T if is_conv1d(self.base) else dW)).to(W.dtype)  # rounded once

    @property
    def bias(self):
        return self.base.bias


def start_adapter(layer, X, rms, rank, init, p):
    """The adapter of one layer, at its start."""
    W = weight_of(layer)
    if not W.any():
        W = torch.eye(*W.shape).to(W)  # all zero: any directions will do
    directions, gains = whitening(X, p, DIRECTIONS * rank)
    if init == "svd_A":
        _, _, Vt = lowrank_svd(W * rms, rank)
        return AiraLinear(layer, Vt / SCALE, Vt.new_zeros(len(W), rank), directions, gains)
    B, A = outlier_weighted_svd(W, rms, rank)
    B0 = B / SCALE**0.5
    A0 = times_G(A, directions, 1 / gains) / SCALE**0.5  # A G^-1, because G will follow
    return AiraLinear(layer, 0 * A0, 0 * B0, directions, gains, A0, B0)


# ---- 5. apply_aira -----------------------------------------------------------------------------
# Find the layers, listen, assign ranks, start the adapters, put them in, report.  All that can be
# refused is refused before the model is changed.


def select(names, patterns, option):
    """The names that have a pattern's parts: "layers.0" finds "layers.0.fc", not "layers.01"."""
    chosen = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = {name for name in names if f".{pattern}." in f".{name}."}
        if not found:
            raise ValueError(f"{option}: nothing is named {pattern!r} in {sorted(names)[:9]} ...")
        chosen |= found
    return chosen


def keys_in_full(model, also_train):
    """The state_dict's keys of the modules that also_train names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen = {modules[name] for name in select(modules, also_train, "also_train")}
    return [key for key in model.state_dict() if modules.get(key.rpartition(".")[0]) in chosen]


def check_bare(model):
    """No adapters yet: neither ours, which install (section 6) notes as _aira, nor PEFT's."""
    for module in model.modules():
        if "_aira" in vars(module) or hasattr(module, "peft_config"):
            raise ValueError("the model has adapters: remove_aira, merge_aira or PEFT's unload()")


def check_options(calibrate, init, amplify):
    if init not in ("svd_A", "svd"):
        raise ValueError(f"{init=}: there are 'svd_A' and 'svd'")
    if not math.isfinite(amplify):
        raise ValueError(f"{amplify=} must be finite: 0 to 1, or -1 to 0 for the abstract")
    if calibrate is None:
        warnings.warn("no calibrate: all channels count as equally loud", stacklevel=3)
    elif not callable(calibrate):
        raise TypeError(f"calibrate is a {type(calibrate).__name__}: give a function, lambda: ...")


def check_weight(name, weight):
    """It must be one that we can decompose now, and write to when we merge."""
    if weight.is_meta or hasattr(weight, "device_mesh"):
        problem = "is elsewhere: load the model before apply_aira, shard it after"
    elif not weight.is_floating_point():
        problem = f"is quantised, {weight.dtype}: exclude the layer"
    elif not weight.isfinite().all():
        problem = "has NaN or inf: mend it, or exclude the layer"
    else:
        return
    raise ValueError(f"the weight of {name!r} {problem}")


def linear_layers(model, in_full):
    """{name: module} of all that can have an adapter, also_train's keys aside."""
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    linear = {}
    for name, module in model.named_modules():
        # Subclasses may do anything: out_proj of nn.MultiheadAttention is one, and never called.
        plain = type(module) is nn.Linear or is_conv1d(module)
        # A tied weight has another owner, too, which merging would change.
        if name and plain and owners[id(module.weight)] == 1 and f"{name}.weight" not in in_full:
            linear[name] = module
    return linear


def find_layers(model, targets, exclude, in_full):
    """{name: module} of those to adapt; without targets all but the output head."""
    linear = linear_layers(model, in_full)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    chosen = {name for name in linear if linear[name] is not head}
    if targets is not None:
        chosen = select(linear, targets, "targets (without tied weights and also_train)")
    chosen -= select(dict(model.named_modules()), exclude, "exclude")
    if not chosen:
        raise ValueError(f"no plain nn.Linear or Conv1D is left to adapt, {exclude=}")
    layers = {name: linear[name] for name in linear if name in chosen}
    for name, layer in layers.items():
        check_weight(name, layer.weight)
    return layers


def listen(model, layers, calibrate):
    """Run the user's batches, in eval mode and without gradients -> {name: Listener}."""
    heard, hooks = {}, []
    for name, layer in layers.items():
        heard[name] = Listener(weight_of(layer))
        hooks.append(layer.register_forward_hook(heard[name], with_kwargs=True))
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            if calibrate:
                calibrate()
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    for name, listener in heard.items():
        listener.share()
        if calibrate and len(listener.tokens) == 0:
            raise ValueError(f"{name!r} never ran: exclude it; or is calibrate a generator?")
        listener.X, listener.rms = scale_tokens(listener.tokens)
        del listener.tokens  # of a large model they take gigabytes
        if not listener.rms.isfinite().all():
            raise ValueError(f"NaN, inf or huge numbers reach {name!r}: mend weights or batches")
    return heard


def assign_ranks(layers, heard, rank, importance, allocate):
    """-> theta, ranks: a number for each layer.  The budget is what LoRA of this rank trains."""
    theta, costs, max_ranks = [], [], []
    for name, layer in layers.items():
        weight = weight_of(layer)
        theta.append(float(importance(weight, heard[name].rms)))
        costs.append(sum(weight.shape))
        max_ranks.append(min(2 * rank, *weight.shape))  # lest one layer takes it all
    return theta, allocate(theta, costs, rank * sum(costs), 1, max_ranks)


def describe(model, adapters, heard, theta):
    """What apply_aira did, as a table, and what else to know."""
    width = max(len(name) for name in ["layer", *adapters])
    lines = [f"{'layer':{width}}    out x in      tokens  importance  rank  parameters"]
    ours = 0
    for (name, adapter), importance in zip(adapters.items(), theta, strict=True):
        out, into = weight_of(adapter.base).shape
        rank = len(adapter.lora_A)
        parameters = rank * (out + into)
        ours += parameters
        line = f"{name:{width}} {out:>6} x {into:<6} {heard[name].count:>7,} {importance:>11.4g}"
        lines.append(f"{line} {rank:>5} {parameters:>11,}")

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines.append(f"trained: {ours:,} parameters in adapters, {trained - ours:,} in also_train")
    frozen = []
    for name, p in model.named_parameters():
        adapted = name.removesuffix(".base.weight") in adapters
        if p.dim() > 1 and not p.requires_grad and not adapted:
            frozen.append(name)
    lines.append(f"frozen, without adapter ({len(frozen)}): {', '.join(frozen[:9]) or 'none'}")
    last = max(heard, key=lambda name: heard[name].last_call)
    if heard[last].count:
        lines.append(f"ran last of these: {last} (is it a new head? Then name it in also_train)")
    return "\n".join(lines)


def apply_aira(
    model: nn.Module,
    calibrate: Callable[[], object] | None = None,
    *,
    rank: int = 8,
    targets: Names | None = None,
    exclude: Names = (),
    also_train: Names = (),
    init: str = "svd_A",
    importance: Callable = outlier_mass,
    allocate: Callable = greedy_ranks,
    amplify: float = 1 / 2,
) -> str:
    """Put adapters into the model, in place, freeze all else, and return a report to print.

    calibrate   function without arguments that runs the model on a few thousand typical tokens
    rank        the budget is what LoRA of this rank trains: sum_l (in + out)_l rank
    targets     which linear layers, by parts of their names: "q_proj", "layers.0", "encoder";
                None: all, but tied weights and, if get_output_embeddings names it, the head
    exclude     which of them not
    also_train  modules to train in full and to save along, as a new head; names as in targets
    init        "svd_A": A0 from the weighted SVD, B0 = 0;  "svd": both factors (section 4)
    importance  function (W, rms) -> theta;  lambda W, rms: sum(W.shape) gives equal ranks
    allocate    greedy_ranks or knapsack_ranks
    amplify     p, how far quiet directions are amplified over loud ones; below 0 the reverse

    Call it in every process, before making the optimizer, torch.compile and DDP.  For bad input it
    raises ValueError or TypeError and leaves the model as it was.
    """
    check_bare(model)
    check_options(calibrate, init, amplify)
    in_full = keys_in_full(model, also_train)
    layers = find_layers(model, targets, exclude, in_full)
    heard = listen(model, layers, calibrate)
    theta, ranks = assign_ranks(layers, heard, rank, importance, allocate)
    adapters = {}
    for (name, layer), r in zip(layers.items(), ranks, strict=True):
        X, rms = heard[name].X, heard[name].rms
        adapters[name] = start_adapter(layer, X, rms, r, init, amplify)
    install(model, adapters, in_full)
    return describe(model, adapters, heard, theta)


# ---- 6. Remove, merge, save, load, export ------------------------------------------------------
# The adapters hang in the model; what was there before is noted on it, as model._aira.  Other
# programs need no code of ours: W + s (B A - B0 A0) G is one matrix, or W and a plain LoRA.


class Adapted(NamedTuple):
    """What remove_aira needs to give back the model that went in; hangs on it as model._aira."""

    adapters: dict[str, AiraLinear]
    before: dict[str, Tensor]  # the old values of what trains in full
    flags: dict[Tensor, bool]  # requires_grad of all parameters


def find_adapters(model):
    """The module that was adapted, inside of DDP and torch.compile, too."""
    for module in model.modules():
        if "_aira" in vars(module):
            return module
    raise ValueError("the model has no adapters: call apply_aira or load_aira first")


def replace(model, new):
    """Put new[module] in the module's place, wherever it hangs."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = new.get(child, child)


def install(model, adapters, in_full):
    """Freeze the model, put the adapters in, and let the tensors with the keys in_full learn."""
    state = model.state_dict()
    before = {key: state[key].clone() for key in in_full}
    flags = {p: p.requires_grad for p in model.parameters()}
    model._aira = Adapted(adapters, before, flags)
    model.requires_grad_(False)
    for name, p in model.named_parameters(remove_duplicate=False):
        if name in before:
            p.requires_grad_(True)
    replace(model, {adapter.base: adapter for adapter in adapters.values()})


def remove_aira(model: nn.Module) -> None:
    """Give back the model that went in; what also_train names gets its old values, too."""
    model = find_adapters(model)
    adapters, before, flags = vars(model).pop("_aira")
    replace(model, {adapter: adapter.base for adapter in adapters.values()})
    model.load_state_dict(before, strict=False)
    for p, flag in flags.items():
        p.requires_grad_(flag)


@torch.no_grad()
def merge_aira(model: nn.Module) -> None:
    """Fold the adapters into the base's own layers; ValueError, nothing changed, for NaN or inf."""
    model = find_adapters(model)
    for name, adapter in model._aira.adapters.items():
        if not adapter.weight.isfinite().all():
            raise ValueError(f"merging would write NaN or inf to {name!r}: the run has diverged")
    for adapter in model._aira.adapters.values():
        adapter.base.weight.copy_(adapter.weight)
    model._aira.before.clear()  # what was trained in full stays
    remove_aira(model)


def aira_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the adapters' tensors and of what also_train names, for torch.save."""
    model = find_adapters(model)
    adapters, before, _ = model._aira
    state = {}
    for key, tensor in model.state_dict().items():
        if key.rpartition(".")[0] in adapters or key in before:
            state[key] = tensor.clone()
    return state


def split_state(state, own):
    """-> {name: its tensors} of the adapters, {key: tensor} of what was trained in full."""
    parts, values = {}, {}
    for key, tensor in state.items():
        name, _, part = key.rpartition(".")
        if f"{name}.lora_A" in state:
            parts.setdefault(name, {})[part] = tensor.clone()
        elif key in own and own[key].shape == tensor.shape:
            values[key] = tensor
        else:
            raise ValueError(f"{key!r} {tuple(tensor.shape)}: not of aira_state_dict, on this base")
    if not parts:
        raise ValueError("the state holds no adapters: load_aira takes that of aira_state_dict")
    return parts, values


@torch.no_grad()
def load_aira(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put the adapters of an aira_state_dict on the base model, to use it or to train on.

    Ranks are the tensors' shapes; nothing is computed anew.
    """
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise TypeError(f"load_aira takes aira_state_dict's dict of tensors, not {state!r:.99}")
    check_bare(model)
    parts, values = split_state(state, model.state_dict())
    adapters = {}
    for name, tensors in parts.items():
        try:
            layer = model.get_submodule(name)
            check_weight(name, layer.weight)
            adapters[name] = AiraLinear(layer, **tensors).to(layer.weight.device)
            B, A = adapters[name].factors()
            if (B @ A).shape != weight_of(layer).shape:
                raise ValueError(f"lora_B {tuple(B.shape)}, lora_A {tuple(A.shape)}")
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{name!r} does not fit this model: {error}") from error
    install(model, adapters, list(values))
    model.load_state_dict(values, strict=False)


def check_export(model, exported, modules_to_save):
    """PEFT finds modules_to_save by ends of names, "head" in "overhead", and unties weights."""
    state = model.state_dict()
    owners = Counter(tensor.data_ptr() for tensor in state.values())
    confused = [key for key in exported if owners[state[key].data_ptr()] > 1]
    for name, _ in model.named_modules():
        if name.endswith(tuple(modules_to_save)) and name not in modules_to_save:
            confused.append(name)
    if confused:
        raise ValueError(
            f"{confused}: tied, shared or of like names, which PEFT confuses; "
            "use merge_aira and save the model"
        )


def save_peft(model: nn.Module, directory: str | Path) -> None:
    """Write a plain LoRA, to load with PeftModel.from_pretrained(base, directory).

    ValueError, and nothing written, where PEFT would take other modules than we did.
    """
    model = find_adapters(model)
    adapters, before, _ = model._aira
    modules_to_save = sorted({key.rpartition(".")[0] for key in before})
    check_export(model, [*before, *(f"{name}.lora_A" for name in adapters)], modules_to_save)

    state = model.state_dict()
    tensors = {key: state[key] for key in before}
    ranks = {}
    for name, adapter in adapters.items():
        B, A = adapter.factors()
        tensors[f"{name}.lora_A.weight"] = A
        tensors[f"{name}.lora_B.weight"] = B
        ranks[f"^{re.escape(name)}"] = len(A)
    config = {
        "peft_type": "LORA",
        "target_modules": "|".join(re.escape(name) for name in adapters),
        "rank_pattern": ranks,  # with "^": PEFT takes these, and only these, for ends of names
        "alpha_pattern": ranks,  # alpha / rank = 1, because s is in B
        "modules_to_save": modules_to_save or None,
        "fan_in_fan_out": all(is_conv1d(adapter.base) for adapter in adapters.values()),
    }
    tensors = {f"base_model.model.{k}": t.detach().cpu().contiguous() for k, t in tensors.items()}
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    try:
        from safetensors.torch import save_file
    except ImportError:
        # PEFT would prefer an older file of that kind.
        (folder / "adapter_model.safetensors").unlink(missing_ok=True)
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
