# SPDX-License-Identifier: MIT
"""AIRA: Activation-Informed Low-Rank Adaptation (ICCV 2025), in one file.

LoRA fine-tunes a linear layer y = W x without changing W.  It trains two thin matrices beside it,

    y = W x + B A x ,        A (r, in) starts at random, B (out, r) at zero,

and gives every layer the same rank r.  AIRA first runs the model on a few batches and measures the
activations that enter each layer.  They decide three things:

    1. the start     A comes from an SVD of W in which an error counts more where the input is large
    2. the ranks     layers where large weights meet large activations get more of LoRA's budget
    3. the updates   component i, a row of A and a column of B, is multiplied by a fixed gain g_i.
                     It is larger for components that carry more of the layer's output, so these
                     are moved further

A fourth thing is ours, not the paper's: the adapter reads x with its largest directions shrunk.

    y = W x + B diag(g) A (I - P^T P) x         g (r,): the gains,  P (k, in): what is shrunk

Use, in any training loop:

    import torch
    from torch import nn
    from aira import aira_state_dict, apply_aira

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))  # your model here
    x, y = torch.randn(256, 64), torch.randn(256, 8)

    print(apply_aira(model, lambda: model(x), rank=4))  # changes model in place -> {layer: rank}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=8e-3)
    for step in range(100):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    torch.save(aira_state_dict(model), "adapter.pt")

Learning rate: start from 1e-3 for a pretrained model, 8e-3 for a toy, and try half and twice.  We
tune with warm-up and a cosine.  In train_toy.py half the best rate cost .02 in the GPT's loss and
.16 in the ViT's, twice .08 and .07; four times broke the ViT.

Symbols, for one linear layer:

    x (in,)                 an input of the layer, as of one token or patch
    X (n, in)               a sample of inputs, each divided by its own root mean square (RMS)
    rms (in,)               the typical size of each input channel
    S (in,)                 rms, bounded below: how much each channel counts in the SVD
    W (out, in)             the layer's weight, frozen
    U, sigma, V^T           (out, r), (r,), (r, in): the SVD of W diag(S), cut to rank r
    L, R                    U diag(sigma), V^T diag(S)^-1: L R is W at rank r, weighted by S
    A (r, in), B (out, r)   the adapter, trained;  A starts at V^T, B at zero
    g (r,)                  the gains of the r components, fixed
    P (k, in)               the k directions in which X is largest, scaled; fixed (section 4)
    theta                   the layer's importance when ranks are assigned (section 3)

Departures.  We know the abstract, the released code, and a port that others wrote with the paper at
hand; what the abstract leaves open, "the letter" takes from the port.

    start      B starts at zero and not at L, A at V^T and not at R
    P          is ours; in the letter, diag(S)^-1 stands there, inside R
    X          each input is divided by its size, so that one huge token does not decide the means
    theta      adds up the outliers' significance; the letter takes the outliers' share
    g          is constant, and per component; the released code gates output channels by the batch

apply_aira(model, calibrate, init="svd", importance=outlier_share) reverts start, P and theta, but
not X and g: it is the closest that this file comes to the letter.  What each is worth, measured by
.ci/bench.py as the test loss below LoRA's at its best rate and scale (GPT +-.003, ViT +-.02):

                       GPT    ViT                            GPT    ViT
    AIRA              .011   .096          random start     .004  -.001
    without gains     .012   .096          equal ranks      .006   .117
    without P        -.007   .013          outlier_share   -.004   .146
    the letter       -.084   .019

So the start and P pay, ranks do on text, and the gains neither help nor hurt.

An independent re-implementation, from the abstract, the released code ("Official" below:
github.com/lliai/LoRA-Zoo, folder aira) and a port by others (github.com/ArkNightmaster/AIRA).
LoRA: arXiv 2106.09685.  Outliers: OWL, 2310.05175.  Weighted SVD: ASVD, 2312.05821.  A start from
an SVD: PiSSA, 2404.02948.  Whitened inputs: K-FAC, 1503.05671.
"""

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Names = str | Iterable[str] | None


# ---- 1. Activations ----------------------------------------------------------------------------
# Abstract: LoRA techniques "fail to account for activation information, such as outliers".
#
# While the user's batches run, a hook keeps a uniform sample of each layer's inputs; all that
# follows is computed from W and this sample.  Some inputs are hundreds of times larger than others
# (a text's first token often is).  To keep one of them from deciding every mean, each input is
# divided by its own size:
#
#     X = inputs / size ,     size = sqrt(mean over channels of input_j^2)
#     rms_j = sqrt(mean over X's rows of X_j^2) * geometric mean of the sizes
#
# So outlier channels count, and outlier tokens do not.  The last factor restores the scale of the
# layer's inputs, which section 3 needs to compare layers.
#
# Official: lora.py runs one batch, and keeps the first index of each output's first dimension.

SAMPLE = 1024  # inputs kept per layer; 16 MB in float32 for a width of 4,096


class Recorder:
    """A forward hook that keeps a uniform sample of a layer's inputs: it draws a random key for
    each input, and the inputs with the SAMPLE largest keys stay.
    """

    def __init__(self, weight):
        self.inputs = weight.new_empty(0, weight.shape[1])
        self.keys = np.empty(0)
        self.random = np.random.default_rng(0)  # its own: the caller's random state is untouched

    def __call__(self, layer, args, kwargs, output):
        x = (*args, *kwargs.values())[0].detach()  # passed by position or by name
        x = x.reshape(-1, x.shape[-1])
        keys = self.random.random(len(x))
        new = keys.argsort()[-SAMPLE:]  # no more of x can stay
        keys = np.append(self.keys, keys[new])
        kept = keys.argsort()[-SAMPLE:]
        self.inputs = torch.cat([self.inputs, x[new]])[kept]
        self.keys = keys[kept]


def normalise(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """inputs (n, in) -> X, its rows but those of zeros at RMS 1; rms (in,), zero without rows."""
    inputs = inputs[inputs.any(dim=1)].float()
    if len(inputs) == 0:
        return inputs, inputs.new_zeros(inputs.shape[1])
    size = inputs.square().mean(dim=1, keepdim=True).sqrt()
    X = inputs / size
    return X, X.square().mean(dim=0).sqrt() * size.log().mean().exp()


# ---- 2. Outlier-weighted SVD -------------------------------------------------------------------
# Abstract: "Outlier-weighted SVD decomposition to reduce approximation errors in low-rank weight
# initialization".
#
# A plain SVD finds the best L R for W as if all input channels were equally large.  Weighted with
# S = rms, an error of L R counts by its effect on the layer's output (if channels are
# uncorrelated).  There is no threshold: an outlier channel has a large rms.  An SVD is still the
# optimum, by Eckart and Young's theorem:
#
#     minimise ||(W - L R) diag(S)||  =>  W diag(S) = U diag(sigma) V^T ,
#                                         L = U diag(sigma) ,  R = V^T diag(S)^-1
#
# init="svd" starts the adapter at L and R.  The default takes only the directions V^T, because a
# start at L and R trains worse (on top: the letter); then nothing is approximated.
#
# Official: AwLinear (lora_lib.py) decomposes W without weights, and slices V where it means V^T.


def no_autocast(tensor):
    """A context in which the user's autocast does not round matrix products."""
    return torch.autocast(tensor.device.type, enabled=False)


def top_svd(matrix, k):
    """matrix (m, n) -> U (m, k), sigma (k,), V^T (k, n) of its k largest singular values.

    A randomised SVD, many times faster than the whole one.  Eight columns more than k and two
    iterations bring it close to the optimum; one iteration gave the same losses.
    """
    columns = min(k + 8, *matrix.shape)
    with torch.random.fork_rng(range(torch.cuda.device_count())), no_autocast(matrix):
        torch.manual_seed(0)  # the same in every run and process
        U, sigma, V = torch.svd_lowrank(matrix, columns, niter=2)
    return U[:, :k], sigma[:k], V[:, :k].T.contiguous()


def is_conv1d(module):
    """Hugging Face's Conv1D, in GPT-2: a linear layer that stores its weight as (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module):
    """No subclass: out_proj of nn.MultiheadAttention is one, and its forward is never called."""
    return type(module) is nn.Linear or is_conv1d(module)


def weight_of(layer):
    """The layer's weight as (out, in)."""
    return layer.weight.detach().T if is_conv1d(layer) else layer.weight.detach()


def outlier_weighted_svd(weight: Tensor, S: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of W diag(S), cut to rank.

    weight (out, in), S (in,), rank from 1 to min(out, in)
    -> U (out, rank), sigma (rank,), V^T (rank, in), in float32
    """
    return top_svd(weight.float() * S, rank)  # column j times S_j


# ---- 3. Ranks ----------------------------------------------------------------------------------
# Abstract: "Outlier-driven dynamic rank assignment using offline optimization".
#
# An output is a sum of terms W_ij x_j, of typical size |W_ij| rms_j: the significance of a weight,
# as OWL defines it.  An outlier is a weight of more than twice its layer's mean significance (one
# in nine, if weights are normal and channels alike), and the layer's importance theta is the sum of
# its outliers' significance.
#
# One more rank costs the layer in + out parameters.  We assume that it brings less than the one
# before, as log r does, which the official code takes, too:
#
#     maximise  sum over layers of theta log r     subject to    sum of (in + out) r <= budget ,
#                                                                min_rank <= r <= max_rank
#
# apply_aira's budget is what LoRA trains at one rank for all layers; r is 1 to twice that rank, so
# that no layer takes all.
#
# Official: lora.py solves the same in real numbers (SciPy) and rounds them down, which leaves
# a part of the budget unspent.  Its theta is the mean size of a layer's output.


def outliers(weight, rms):
    """-> the significance (out, in) of each weight, and whether it is an outlier."""
    significance = weight.float().abs() * rms
    return significance, significance > 2 * significance.mean()


def outlier_mass(weight: Tensor, rms: Tensor) -> float:
    """The default theta, the sum of the outliers' significance.  weight (out, in), rms (in,)."""
    significance, outlier = outliers(weight, rms)
    return float(significance[outlier].sum())


def outlier_share(weight: Tensor, rms: Tensor) -> float:
    """OWL's and the letter's theta: the share of outliers among the weights, 0 to 1."""
    _, outlier = outliers(weight, rms)
    return float(outlier.float().mean())


def first_ranks(importance, costs, budget, min_rank, max_ranks):
    """Check the arguments -> each layer's rank to begin with, and the budget that is left."""
    if not (np.isfinite(importance).all() and min(importance) >= 0):
        raise ValueError(f"{importance=} must be numbers of 0 or more")
    ranks = [min(min_rank, most) for most in max_ranks]
    left = budget - int(np.dot(costs, ranks))
    if min(ranks) < 1 or left < 0:
        raise ValueError(f"{budget=} must pay for {ranks=} at least, each of 1 or more")
    return ranks, left


def greedy_ranks(
    importance: list[float], costs: list[int], budget: int, min_rank: int, max_ranks: list[int]
) -> list[int]:
    """Give out rank unit by unit, each to the layer that gains most for its cost.

    importance (theta), costs (parameters of a unit of rank) and max_ranks have a number for each
    layer, and so has the result; budget is in parameters.  Optimal where all costs are equal.
    ValueError if the budget does not pay for min_rank, or an importance is negative or NaN.
    """
    ranks, left = first_ranks(importance, costs, budget, min_rank, max_ranks)

    def benefit(layer):
        return importance[layer] * math.log((ranks[layer] + 1) / ranks[layer]) / costs[layer]

    layers = list(range(len(ranks)))
    while layers:
        best = max(layers, key=benefit)
        if ranks[best] < max_ranks[best] and costs[best] <= left:
            ranks[best] += 1
            left -= costs[best]
        else:  # it is full, or costs more than what is left
            layers.remove(best)
    return ranks


def knapsack_ranks(
    importance: list[float], costs: list[int], budget: int, min_rank: int, max_ranks: list[int]
) -> list[int]:
    """The exact optimum, by dynamic programming; arguments and result as in greedy_ranks.

    It counts the budget in coins of the costs' greatest common divisor.  best[b] is the most that
    b coins can gain from the units of rank offered so far; it takes coins x units bytes.
    """
    ranks, left = first_ranks(importance, costs, budget, min_rank, max_ranks)
    coin = math.gcd(*costs)
    best = np.zeros(left // coin + 1)
    offers = []
    for layer, least in enumerate(ranks):
        price = costs[layer] // coin
        for rank in range(least, max_ranks[layer]):
            bought = np.full_like(best, -np.inf)  # the best with this unit
            bought[price:] = best[:-price] + importance[layer] * math.log((rank + 1) / rank)
            offers.append((layer, price, bought >= best))
            best = np.maximum(best, bought)

    # Walk back: which units did the best plan buy?  Counting them is enough, because a plan buys
    # no unit of a layer without the earlier ones, which gain as much or more at the same price.
    coins = len(best) - 1
    for layer, price, worth in reversed(offers):
        if worth[coins]:
            ranks[layer] += 1
            coins -= price
    return ranks


# ---- 4. The layer: its start and its gains -----------------------------------------------------
# Abstract: "Activation-informed training to amplify updates on significant weights".
#
#     y = W x + B diag(g) A (I - P^T P) x ,    g_i = SCALE s_i^amplify / mean of s_j^amplify ,
#                                              s_i = max(sigma_i, FLOOR sigma_1)
#
# The start.  B = 0, so the output is the base's.  R = V^T diag(S)^-1 does two things: it evens out
# the input's channels, and then reads the directions that W's output is made of.  We keep the two
# apart.  A = V^T, and is trained; I - P^T P, in the place of diag(S)^-1, is fixed and evens out
# directions.
#
# The gains.  sigma_i is the size of component i in the output L R x.  The gradients of B's column i
# and A's row i are multiplied by g_i, so plain gradient descent moves the merged weight g_i^2 times
# as far along component i.  Adam divides gradients by their size, and would undo a gain that was in
# the gradient only; but g_i is in the forward pass, too, and still moves the merged weight g_i
# times as far.
#
# P.  In some directions x is much larger than in others, often in many channels together, and a
# step of the optimizer would change the adapter's answer mostly to these.  So we divide them by d:
#
#     D_j    the k orthonormal directions in which X is largest (its right singular vectors)
#     d_j    sqrt((energy_j + DAMPING) / (rest + DAMPING)), with energy_j the mean of (D_j . x)^2
#            over X's rows x, and rest the mean energy of all directions that D leaves out
#     P_j    sqrt(1 - 1 / d_j) D_j, so that I - P^T P divides D_j by d_j and leaves the rest alone
#
# (This is whitening, as K-FAC does it to the inputs, but fixed.)
#
# init="svd" is the letter: A = R, B diag(g) = L and no P.  The output L R x of the start is
# subtracted, so that training begins at the base's.
#
# Official: AwLinear multiplies B A x by |W x|, brought to 0 .. 1 over the batch.  This only turns
# down, makes an output depend on the other inputs of its batch, and is lost on merging.

SCALE = 4.0  # in the place of LoRA's alpha / r; the rates on top belong to it
FLOOR = 0.01  # a component without a gain would never train
DIRECTIONS = 4  # k / rank; with 2 text was learnt less well, 0 is without P.  The file holds P, too
DAMPING = 0.3  # the mean energy is 1; it bounds d where rest is nearly 0


def shrink_directions(X, k):
    """X (n, in) -> P (k, in), with k at most half of the layer's width."""
    n, width = X.shape
    _, sigma, D = top_svd(X, min(k, width // 2))
    energy = sigma.square() / max(n, 1)  # all energies add up to width
    rest = (width - energy.sum()).clamp_min(0) / (width - len(D))
    d = ((energy + DAMPING) / (rest + DAMPING)).sqrt().clamp_min(1)  # it is, but for rounding
    return (1 - 1 / d).sqrt()[:, None] * D


class AiraLinear(nn.Module):
    """A frozen linear layer with its adapter: y = base_layer(x) + B diag(g) A (I - P^T P) x.

    base_layer           nn.Linear or Hugging Face's Conv1D, the layer itself
    lora_A, lora_B       A (r, in) and B (out, r), trained; in float32, because steps are small
    gains, shrink        g (r,) and P (k, in), fixed
    start_A, start_B     A0 = A and B0 = B diag(g) at the start, fixed; only for init="svd"
    base_norm            the norm of W, saved along, by which load_aira knows another base

    forward does not form B A, as large as W; the official AwLinear does so in each step.
    """

    def __init__(self, base_layer, lora_A, lora_B, gains, shrink, start_A=None, start_B=None):
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        self.out_features, self.in_features = weight_of(base_layer).shape
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.register_buffer("gains", gains)
        self.register_buffer("shrink", shrink)
        self.register_buffer("start_A", start_A)
        self.register_buffer("start_B", start_B)
        self.register_buffer("base_norm", base_layer.weight.detach().float().norm())

    def factors(self) -> tuple[Tensor, Tensor]:
        """B' (out, r), A' (r, in) with y = base_layer(x) + B' A' x: the adapter as a plain LoRA.

        With init="svd" the rank is 2 r.  Writing B for B diag(g), it is the product
        B A - B0 A0 = [B, B - B0] [A - A0; A0], exactly zero at the start.
        """
        A, B, P = self.lora_A, self.lora_B * self.gains, self.shrink
        if self.start_A is not None:
            A = torch.cat([A - self.start_A, self.start_A])
            B = torch.cat([B, B - self.start_B], dim=1)
        # A and A P^T P nearly cancel along large directions: half precision would not do.
        with no_autocast(A):
            return B, torch.addmm(A, A @ P.T, P, alpha=-1)  # A (I - P^T P)

    def forward(self, input: Tensor) -> Tensor:
        B, A = self.factors()
        hidden = F.linear(input, A.to(input.dtype))
        return self.base_layer(input) + F.linear(hidden, B.to(input.dtype))

    @property
    def weight(self):
        """The merged weight, for modules that read a layer's weight and do not call the layer."""
        B, A = self.factors()
        with no_autocast(A):
            change = B @ A
        W = self.base_layer.weight
        return (W + (change.T if is_conv1d(self.base_layer) else change)).to(W.dtype)

    @property
    def bias(self):
        return self.base_layer.bias


def start_adapter(layer, rms, P, rank, init, amplify):
    """The AiraLinear of one layer, at its start."""
    S = rms.clamp_min(1e-4 * rms.mean())  # S^-1 must exist for channels of zeros, too
    if not rms.any():  # calibration did not reach it
        S = torch.ones_like(rms)
    U, sigma, Vt = outlier_weighted_svd(weight_of(layer), S, rank)
    s = sigma.clamp_min(FLOOR * sigma[0]).clamp_min(1e-30)  # in a layer of zeros all are 0
    gains = SCALE * s**amplify / (s**amplify).mean()
    if init == "svd_A":
        return AiraLinear(layer, Vt, torch.zeros_like(U), gains, P)
    A, B = Vt / S, U * sigma / gains
    return AiraLinear(layer, A, B, gains, P[:0], start_A=A.clone(), start_B=B * gains)


# ---- 5. apply_aira -----------------------------------------------------------------------------
# Find the layers, measure their activations, assign ranks, start the adapters, insert them.  What
# can be refused is refused before the model is changed.


def select(names, patterns, option):
    """The names that contain a pattern as whole parts: "layers.0" is in "layers.0.fc", but not in
    "layers.01".
    """
    chosen = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        found = {name for name in names if name and f".{pattern}." in f".{name}."}
        if not found:
            raise ValueError(f"{option}: {pattern!r} is no part of a name in {sorted(names)[:99]}")
        chosen |= found
    return chosen


def check_bare(model):
    """Adapters on adapters, ours or PEFT's, would train, but not save and merge correctly."""
    if any(isinstance(m, AiraLinear) or hasattr(m, "peft_config") for m in model.modules()):
        raise ValueError("the model has adapters: merge or remove them first")


def linear_layers(model):
    """{name: layer} of the linear layers inside the model, but those whose weight is tied."""
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    layers = {}
    for name, module in model.named_modules():
        # A tied weight has another owner, too, which merging would change.
        if name and is_linear(module) and owners[id(module.weight)] == 1:
            layers[name] = module
    return layers


def find_layers(model, targets, left_out):
    """{name: layer} of the layers to adapt; without targets all but a language model's head."""
    layers = linear_layers(model)
    classes = {type(module).__name__ for module in model.modules()}
    if targets is None:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        chosen = {name for name in layers if layers[name] is not head}
    else:
        chosen = select(layers, targets, f"targets (only Linear and Conv1D, untied, of {classes})")
    chosen -= left_out
    if not chosen:
        raise ValueError(f"the model has no Linear or Conv1D inside to adapt, but {classes}")
    return {name: layers[name] for name in layers if name in chosen}


def record(model, layers, calibrate):
    """Run the user's batches, in eval mode and without gradients -> {name: Recorder}."""
    recorders, hooks = {}, []
    for name, layer in layers.items():
        recorders[name] = Recorder(weight_of(layer))
        hooks.append(layer.register_forward_hook(recorders[name], with_kwargs=True))
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            calibrate()
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return recorders


def measure(layers, recorders, k):
    """-> {name: rms}, {name: P}; every process uses the first one's sample, so that all agree."""
    rms, P = {}, {}
    for name, layer in layers.items():
        inputs = recorders.pop(name).inputs  # frees it when it is measured
        if dist.is_available() and dist.is_initialized():
            box = [inputs.cpu()]
            dist.broadcast_object_list(box)
            inputs = box[0].to(inputs.device)
        if not (inputs.float().square().isfinite().all() and layer.weight.isfinite().all()):
            raise ValueError(
                f"NaN, inf or numbers too large to square in the weight or inputs of {name!r}"
            )
        X, rms[name] = normalise(inputs)
        P[name] = shrink_directions(X, k)
    unreached = [name for name in layers if not rms[name].any()]
    if len(unreached) == len(layers):
        raise ValueError("calibrate ran none of the layers: does it call this very model?")
    if unreached:
        warnings.warn(f"calibrate did not reach {unreached}: they get rank 1", stacklevel=3)
    return rms, P


def assign_ranks(layers, rms, rank, importance, allocate):
    """{name: rank}; the budget is what LoRA of this rank trains."""
    theta, costs, max_ranks = [], [], []
    for name, layer in layers.items():
        W = weight_of(layer)
        theta.append(float(importance(W, rms[name])))
        costs.append(sum(W.shape))
        max_ranks.append(min(2 * rank, *W.shape) if rms[name].any() else 1)
    ranks = allocate(theta, costs, rank * sum(costs), 1, max_ranks)
    return dict(zip(layers, ranks, strict=True))


def replace(model, new):
    """Replace each module that is a key of new, wherever it is registered."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            inner = getattr(child, "_orig_mod", child)  # replaced with its torch.compile wrapper
            parent._modules[name] = new.get(inner, child)


def apply_aira(
    model: nn.Module,
    calibrate: Callable,
    *,
    rank: int = 8,
    targets: Names = None,
    exclude: Names = (),
    also_train: Names = (),
    init: str = "svd_A",
    importance: Callable = outlier_mass,
    allocate: Callable = greedy_ranks,
    amplify: float = 0.5,
) -> dict[str, int]:
    """Put adapters into the model, in place, and freeze all else -> {layer: rank}.

    calibrate   function that runs the model on a few thousand typical tokens, with little padding
    rank        the budget is what LoRA of this rank trains: the sum of (in + out) rank
    targets     which linear layers, by parts of their names: "q_proj", "layers.0", "encoder".
                None: all nn.Linear and Conv1D, but not their subclasses, tied weights, or the head
                that get_output_embeddings names
    exclude     layers to leave out
    also_train  modules to train in full, such as a new head; names as in targets
    init        "svd_A": A starts from the weighted SVD, B at zero.  "svd": both do, without P;
                weight decay would then pull A and B, and so the output, away from the base's
    importance  function (weight, rms) -> theta: outlier_mass or outlier_share
    allocate    function from importances to ranks: greedy_ranks or knapsack_ranks
    amplify     the power of sigma in the gains, 0 or more; at 0 all components are alike

    Call it in every process, after casting the model, and before making the optimizer,
    torch.compile and DDP.  For bad input it raises an error and leaves the model as it was.
    """
    if init not in ("svd_A", "svd"):
        raise ValueError(f"{init=}: there are 'svd_A' and 'svd'")
    check_bare(model)
    modules = dict(model.named_modules())
    in_full = select(modules, also_train, "also_train")
    layers = find_layers(model, targets, in_full | select(modules, exclude, "exclude"))
    rms, P = measure(layers, record(model, layers, calibrate), DIRECTIONS * rank)
    ranks = assign_ranks(layers, rms, rank, importance, allocate)
    adapters = {}
    for name, layer in layers.items():
        adapters[layer] = start_adapter(layer, rms[name], P[name], ranks[name], init, amplify)
    model.requires_grad_(False)  # the adapters, which come after, train
    for name in in_full:
        modules[name].requires_grad_(True)
        modules[name].trained_in_full = True  # to be saved even if it is frozen by then
    replace(model, adapters)
    return ranks


# ---- 6. Remove, merge, save, load, export ------------------------------------------------------
# The adapters are found in the model, wherever they are; modules of also_train have a flag.


def find_adapters(model):
    """{name: AiraLinear}"""
    adapters = {n: m for n, m in model.named_modules() if isinstance(m, AiraLinear)}
    if not adapters:
        raise ValueError("the model has no adapters: call apply_aira or load_aira first")
    return adapters


def remove_aira(model: nn.Module) -> None:
    """Put the model's own layers back, whose weights never changed.  They stay frozen; what
    also_train names keeps its new values, and so do buffers such as BatchNorm's statistics.
    """
    adapters = find_adapters(model).values()
    replace(model, {adapter: adapter.base_layer for adapter in adapters})


@torch.no_grad()
def merge_aira(model: nn.Module) -> None:
    """Fold the adapters into the model's own layers.  ValueError, nothing changed, for NaN or inf.

    The new weights are computed in float32 and rounded once.
    """
    adapters = find_adapters(model)
    for name, adapter in adapters.items():
        if not adapter.weight.isfinite().all():
            raise ValueError(f"merging would write NaN or inf to {name!r}: has the run diverged?")
    for adapter in adapters.values():
        adapter.base_layer.weight.copy_(adapter.weight)
    remove_aira(model)


def unwrap(model):
    """The model inside of torch.compile and (Distributed)DataParallel."""
    model = getattr(model, "_orig_mod", model)
    parallel = nn.DataParallel, nn.parallel.DistributedDataParallel
    return model.module if isinstance(model, parallel) else model


def base_name(name):
    """The name in the base model, before torch.compile and apply_aira."""
    return name.replace("_orig_mod.", "").replace(".base_layer.", ".")


def aira_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copies, on the CPU, of the adapters, all else that trains, and buffers such as BatchNorm's
    statistics, under the base model's names: for torch.save and load_aira.

    Save before freezing; only what apply_aira's also_train named is saved in any case.
    """
    for adapter in find_adapters(model).values():
        if adapter.lora_A.dim() < 2 or hasattr(adapter.lora_A, "device_mesh"):
            raise ValueError("the adapters are sharded (FSDP, ZeRO): gather the model first")
        if not adapter.lora_A.requires_grad:
            raise ValueError("adapters are frozen: what else was trained?  Save before freezing")
    state, in_full = {}, ()
    for name, module in unwrap(model).named_modules():
        if hasattr(module, "trained_in_full"):
            in_full += (f"{name}.",)
    for name, tensor in unwrap(model).state_dict(keep_vars=True).items():
        frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if not frozen or name.startswith(in_full):
            state[base_name(name)] = tensor.detach().cpu().clone()
    return state


@torch.no_grad()
def load_aira(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put the adapters of an aira_state_dict on the base model, to use it or to train on.

    Other entries replace the base's, and parameters among them train; all else is frozen.  Call it
    before torch.compile and DDP.  An error, and nothing changed, if the state does not fit.
    """
    if not isinstance(state, dict):
        raise TypeError(f"load_aira takes aira_state_dict's dict, not {state!r}: use torch.load")
    check_bare(model)
    modules, own = dict(model.named_modules(remove_duplicate=False)), model.state_dict()
    parts, values, adapters = {}, {}, {}
    for key, tensor in state.items():
        name, _, part = key.rpartition(".")
        if key in own and own[key].shape == tensor.shape:
            values[key] = tensor
        elif f"{name}.lora_A" in state and is_linear(modules.get(name)):
            device = modules[name].weight.device
            parts.setdefault(name, {})[part] = tensor.to(device, torch.float32, copy=True)
        else:
            raise ValueError(
                f"{key!r} {tuple(tensor.shape)} does not fit: is it another base, or "
                "one in torch.compile or DDP?"
            )
    for name, tensors in parts.items():
        norm = tensors.pop("base_norm", None)
        adapters[modules[name]] = adapter = AiraLinear(modules[name], **tensors)
        B, A = adapter.factors()
        if (len(B), A.shape[1]) != (adapter.out_features, adapter.in_features):
            raise ValueError(f"the adapter of {name!r} does not fit: is it another base?")
        # The base, or the norm itself, may be rounded to bfloat16: at most by 2^-8.
        if norm is not None and not torch.isclose(adapter.base_norm, norm, rtol=4e-3):
            raise ValueError(
                f"{name!r} has other weights than when it was trained: a new head is "
                "to be named in also_train; or is it another base?"
            )
    if not adapters:
        raise ValueError("the state holds no adapters: is it aira_state_dict's?")
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(name in values)
    model.load_state_dict(values, strict=False)
    replace(model, adapters)


def save_peft(model: nn.Module, directory: str | Path) -> None:
    """Write the adapters as a plain LoRA, for PeftModel.from_pretrained(base, directory).

    ValueError, nothing written, if PEFT would lose something: what else trains, and all other
    buffers of floats, such as BatchNorm's.  Needs safetensors.
    """
    from safetensors.torch import save_file

    model = unwrap(model)
    tensors, ranks = {}, {}
    for name, adapter in find_adapters(model).items():
        name, (B, A) = base_name(name), adapter.factors()
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.detach().cpu().contiguous()
        ranks[f"^{re.escape(name)}"] = len(A)  # PEFT looks for names' ends; "^": the whole
    for key, tensor in aira_state_dict(model).items():
        name, _, part = key.rpartition(".")
        plain = (
            part in ("weight", "bias") or f"base_model.model.{name}.lora_A.weight" not in tensors
        )
        if plain and tensor.is_floating_point():
            raise ValueError(f"PEFT would lose {key!r}, trained, a buffer or shared: merge instead")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(model, "name_or_path", None),
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "target_modules": "|".join(name[1:] for name in ranks),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,  # alpha / rank = 1, because the gains are in B
        "fan_in_fan_out": any(is_conv1d(module) for module in model.modules()),
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
