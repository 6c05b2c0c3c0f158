# SPDX-License-Identifier: MIT
"""AIRA: Activation-Informed Low-Rank Adaptation, in one file.

An independent re-implementation of AIRA (Li et al., ICCV 2025), without the paper's text: from its
abstract, the authors' code (github.com/lliai/LoRA-Zoo, folder aira) and a third-party port
(github.com/ArkNightmaster/AIRA).

    apply_aira(model, calibrate=lambda: model(batch), rank=8)  # in place
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ...                                                        # train as usual
    torch.save(aira_state_dict(model), "adapter.pt")
    load_aira(base_model, torch.load("adapter.pt"))            # on an unchanged copy of the model
    merge_aira(base_model)                                     # adds the adapters to the weights

LoRA (Hu et al., 2021) fine-tunes a linear layer y = W x without changing its weight W (out, in).
It trains two thin matrices beside it, A (r, in) and B (out, r):

    y = W x + (alpha / r) B A x       A starts at random, B at zero; alpha is a constant

This file first runs the model on some data, to see the inputs x of each layer.  Then it trains

    y = W x + B diag(g) A S^-1 x      S (in, in), fixed: S^-1 makes x smaller along the directions
                                      where the layer's inputs are largest
                                      g (r,), fixed: gains, in place of alpha / r

Neither the authors' code nor this file follows the three ideas of the abstract exactly:
"Outlier-weighted SVD decomposition to reduce approximation errors in low-rank weight
initialization"
    their code  A and B start from the plain SVD of W.
    here        A starts from the SVD of W S, and B at zero: W itself is not approximated.
"Outlier-driven dynamic rank assignment using offline optimization"
    their code  Before training, maximise the sum of importance * log(rank) within a budget of
                parameters.  The importance of a layer is the mean size of its outputs.
    here        The importance is measured on the layer's outliers (section 4).  The budget is the
                number of parameters that LoRA trains; the abstract promises fewer.
"Activation-informed training to amplify updates on significant weights"
    their code  Multiply the adapter's output by |W x|, scaled to 0 .. 1; merging drops this.
    here        Multiply entry i of A S^-1 x by g_i, which grows with singular value i of W S.

S^-1 in the layer is our addition.  Without it, the few directions in which x is largest dominate
the gradient of A.  With it, W changes less along them than in LoRA.

The test loss of LoRA, at its best alpha and learning rate, minus that of this file, +- the standard
error over three base models (.ci/bench.py).  The constants below were chosen on these two tasks of
train_toy.py; README has results on others.

                          text             images
    AIRA                  .010 +-.003      .216 +-.005
    random A              .010 +-.002      .088 +-.022
    SVD of W, not W S     .010 +-.003      .190 +-.006
    equal ranks           .006 +-.003      .175 +-.008
    equal gains           .011 +-.003      .218 +-.009
    no S^-1 in the layer -.005 +-.002      .139 +-.018
    no S, no S^-1        -.013 +-.004      .118 +-.028
    init="svd"           -.029 +-.001      .105 +-.021
So S^-1 helps on both tasks and the SVD on images; the rest helps less, or not at all.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

# ---- 1. S, and the directions of large inputs --------------------------------------------------
# The inputs x of a trained layer are often many times larger along a few directions than along the
# others; we take these for the outliers of the abstract's first idea.  Let the rows of D (k, in) be
# k such directions, orthonormal.  Let s_j be about the root mean square (RMS) of x along D_j,
# relative to that along the other directions; find_S has the exact formula.
#
#     S    = I + D^T diag(s - 1) D        multiplies the part of a vector along D_j by s_j
#     S^-1 = I + D^T diag(1/s - 1) D      divides it by s_j
#
# Then z = S^-1 x has more nearly the same RMS along all directions: it is closer to white.

DIRECTIONS_PER_RANK = 4  # k / r
DAMPING = 0.3  # bounds s where other directions have almost no inputs
SAMPLE = 1024  # inputs of a layer (tokens, image patches) that are kept


def scale_directions(matrix, D, s):
    """The product matrix @ S, for a matrix (m, in); with 1/s in place of s, matrix @ S^-1."""
    return matrix + ((matrix @ D.T) * (s - 1)) @ D


def rescale_rows(inputs):
    """Scales the rows of inputs (n, in) to one RMS, the median of theirs.  Otherwise a few tokens
    with huge inputs, such as the first of a text, would dominate S.
    """
    rms = inputs.float().square().mean(dim=1, keepdim=True).sqrt()
    return (inputs * (rms.median() / rms)).to(inputs.dtype)


def top_svd(matrix, count):
    """U, sigma and V^T of a matrix for its count largest singular values (or for all, if it has
    fewer), by randomised SVD (Halko et al., 2011): approximate, but fast.
    """
    oversampled = min(count + 8, *matrix.shape)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)  # for the same result each time; svd_lowrank takes no generator
        U, sigma, V = torch.svd_lowrank(matrix, oversampled, niter=1)
    return U[:, :count], sigma[:count], V[:, :count].T.contiguous()


def find_S(inputs, k):
    """S as D (k, in) and s (k,), from rescaled inputs (n, in) in random order.

    D are the principal directions of one half of the inputs, without centring.  c_j is the mean
    square of the other half along D_j, and c_rest the average over all other directions:

        s_j = max(1, sqrt((c_j + DAMPING) / (c_rest + DAMPING)))
    """
    X = inputs.float()
    X = X / X.square().mean().sqrt()  # now |x|^2 = width for every row x
    width = X.shape[1]
    half = (len(X) + 1) // 2
    _, _, D = top_svd(X[:half], k)
    c = (X[-half:] @ D.T).square().mean(dim=0)  # D fits noise of its own half
    c_rest = (width - c.sum()) / (width - len(D))
    return D, ((c + DAMPING) / (c_rest + DAMPING)).sqrt().clamp_min(1)


# ---- 2. Outlier-weighted SVD -------------------------------------------------------------------
# In terms of z = S^-1 x, the layer computes W x = (W S) z.  The entries of A z are r features of z.
# From which r features can the output be computed best?  For white z and any matrix L,
# E|(W S - L) z|^2 is proportional to ||W S - L||^2.  By the Eckart-Young theorem, the best L of
# rank r keeps the r largest singular values of W S = U diag(sigma) V^T.  It uses z only through
# the first r rows of V^T, and A starts at these.
#
# Like PiSSA (arXiv 2404.02948), which takes the SVD of W, we assume that features which are good
# for W x are also good for changing it.  By "random A" above, this holds on images only.


def outlier_weighted_svd(
    W: Tensor, D: Tensor, s: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), sigma (r,) and V^T (r, in) of W S, for W (out, in) and S as D (k, in), s (k,)."""
    return top_svd(scale_directions(W.float(), D, s), rank)


# ---- 3. The layer, and its gains ---------------------------------------------------------------
# For white z, feature i adds to E|W x|^2 in proportion to sigma_i^2: we take this for significance.
# The layer multiplies feature i by a gain g_i in proportion to sqrt(sigma_i).  A step of Adam is
# about equally large for all entries of B, so it changes the output through feature i in proportion
# to g_i.  The square root is by analogy with PiSSA: its A and B each start with sqrt(sigma_i).

MEAN_GAIN = 4.0  # scales the adapter, as LoRA's alpha / r does


class AiraLinear(nn.Module):
    """y = base_layer(x) + B diag(g) A S^-1 x

    base_layer          the model's own layer, frozen
    lora_A (r, in)      A
    lora_B (out, r)     B
    gains (r,)          g
    directions (k, in)  D; with k = 4 r often the largest part of an adapter's file
    shrink (k,)         1/s
    start_A, start_B    for init="svd": A and B diag(g) before training, which are subtracted
    """

    def __init__(
        self, base_layer, lora_A, lora_B, gains, directions, shrink, start_A=None, start_B=None
    ):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.register_buffer("gains", gains)
        self.register_buffer("directions", directions)
        self.register_buffer("shrink", shrink)
        self.register_buffer("start_A", start_A)
        self.register_buffer("start_B", start_B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """B' (out, r') and A' (r', in) of the plain LoRA y = base_layer(x) + B' A' x.  r' is r, or
        2 r with init="svd".
        """
        A, B = self.lora_A, self.lora_B * self.gains
        if self.start_A is not None:
            # B A - start_B start_A, in a form that is exactly zero before training
            A = torch.cat([A - self.start_A, self.start_A])
            B = torch.cat([B, B - self.start_B], dim=1)
        with torch.autocast(A.device.type, enabled=False):  # in half precision S^-1 is too coarse
            return B, scale_directions(A, self.directions, self.shrink)

    def forward(self, x: Tensor) -> Tensor:
        B, A = self.factors()
        return self.base_layer(x) + x @ A.T.to(x.dtype) @ B.T.to(x.dtype)

    @property
    def weight(self) -> Tensor:
        """The merged weight: for merge_aira, and for models that read weights, such as T5."""
        B, A = self.factors()
        W = self.base_layer.weight
        with torch.autocast(A.device.type, enabled=False):
            change = B @ A if type(self.base_layer) is nn.Linear else (B @ A).T
        return (W + change).to(W.dtype)

    @property
    def bias(self):
        return self.base_layer.bias


def make_adapter(layer, inputs, rank, init):
    """A new AiraLinear for a layer, from its rescaled inputs (n, in)."""
    D, s = find_S(inputs, k=min(DIRECTIONS_PER_RANK * rank, inputs.shape[1] // 2))
    U, sigma, Vt = outlier_weighted_svd(weight_of(layer), D, s, rank)
    gains = sigma.clamp_min(0.01 * sigma[0] + 1e-30).sqrt()  # above 0: all features can learn
    gains = MEAN_GAIN * gains / gains.mean()
    if init == "svd_A":
        return AiraLinear(layer, Vt, torch.zeros_like(U), gains, D, 1 / s)
    B = U * sigma / gains
    return AiraLinear(layer, Vt, B, gains, D, 1 / s, start_A=Vt.clone(), start_B=B * gains)


# ---- 4. Ranks ----------------------------------------------------------------------------------
# W_ij adds W_ij x_j to output i of a layer.  The score of W_ij is |W_ij| rms(x_j).  As in OWL
# (arXiv 2310.05175), W_ij is an outlier if its score is above a multiple of the layer's mean score.
# The importance of the layer is the sum of its outliers' scores, divided by the number of outputs
# (or layers with many outputs would get most of the budget).
#
# Raising a layer's rank by one costs in + out parameters, and helps less the higher the rank is.
# As in the authors' code, log(rank) stands for how much the rank helps.  We want the ranks that
#
#     maximise    sum of importance * log(rank)
#     subject to  sum of (in + out) * rank <= budget ,    1 <= rank <= max_rank

OUTLIER_RATIO = 2.0  # by trial; OWL takes 5
MAX_RANK_RATIO = 2  # no layer gets more than this multiple of `rank`; from the authors' code


def importance(W: Tensor, magnitude: Tensor) -> float:
    """The importance of a layer, from W (out, in) and rms(x) (in,)."""
    scores = W.float().abs() * magnitude
    outliers = scores > OUTLIER_RATIO * scores.mean()
    return float((scores * outliers).sum()) / len(W)


def greedy_ranks(
    importances: list[float], costs: list[int], budget: int, max_ranks: list[int]
) -> list[int]:
    """Starts at rank 1 and repeatedly raises the rank with the largest benefit per parameter.

    importances, costs (parameters per rank) and max_ranks have an entry for each layer.  The budget
    (parameters) must be at least sum(costs).
    """
    ranks = [1] * len(costs)
    left = budget - sum(costs)
    growing = list(range(len(costs)))

    def benefit(i):
        return importances[i] * math.log((ranks[i] + 1) / ranks[i]) / costs[i]

    while growing:
        i = max(growing, key=benefit)
        if ranks[i] < max_ranks[i] and costs[i] <= left:
            ranks[i] += 1
            left -= costs[i]
        else:
            growing.remove(i)
    return ranks


def knapsack_ranks(
    importances: list[float], costs: list[int], budget: int, max_ranks: list[int]
) -> list[int]:
    """The exact optimum, by dynamic programming, for the arguments of greedy_ranks."""
    unit = math.gcd(*costs)  # divides all costs; if it is small, the tables take gigabytes
    size = budget // unit + 1
    best = np.zeros(size)  # best[b]: the optimum for a budget of b units and the layers so far
    choices = []  # choices[layer][b]: the rank of the layer in that optimum
    for value, cost, max_rank in zip(importances, costs, max_ranks, strict=True):
        options = np.full((max_rank + 1, size), -np.inf)  # row 0 stays: each layer has a rank
        for rank in range(1, max_rank + 1):
            price = rank * cost // unit
            options[rank, price:] = best[: max(0, size - price)] + value * math.log(rank)
        choices.append(options.argmax(axis=0))
        best = options.max(axis=0)

    ranks = []
    for choice, cost in zip(reversed(choices), reversed(costs), strict=True):
        rank = int(choice[size - 1])
        size -= rank * cost // unit
        ranks.append(rank)
    return ranks[::-1]


# ---- 5. apply_aira -----------------------------------------------------------------------------


def is_linear(module):
    """Whether a module is nn.Linear, or the Conv1D of Hugging Face's GPT-2.  Subclasses are left
    alone: they may be quantised, or used in another way (by nn.MultiheadAttention).
    """
    is_Conv1D = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return type(module) is nn.Linear or is_Conv1D


def weight_of(layer):
    """The layer's weight as (out, in); Conv1D stores it as (in, out)."""
    return layer.weight.detach() if type(layer) is nn.Linear else layer.weight.detach().T


def find_layers(model, targets, exclude):
    """{name: layer} of the linear layers to adapt."""
    # Merging must not change a weight that another module uses, too.
    uses = Counter(p.data_ptr() for m in model.modules() for p in m.parameters(recurse=False))
    layers = {}
    for name, module in model.named_modules():
        replaceable = is_linear(module) and module is not model and module not in exclude
        if replaceable and uses[module.weight.data_ptr()] == 1:
            layers[name] = module
    if targets is None:
        head = getattr(model, "get_output_embeddings", lambda: None)()  # Hugging Face's LM head
        return {name: layer for name, layer in layers.items() if layer is not head}

    chosen = {}
    for target in [targets] if isinstance(targets, str) else targets:
        # As in PEFT, "fc" stands for "fc" and for all names that end with ".fc".
        found = {name: layers[name] for name in layers if f".{name}".endswith(f".{target}")}
        if not found:
            raise ValueError(f"the target {target!r} matches no linear layer of {list(layers)}")
        chosen |= found
    return chosen


class Recorder:
    """A forward hook that keeps a uniform sample of the rows that enter a layer."""

    def __init__(self, layer):
        self.rows = weight_of(layer).new_empty(0, weight_of(layer).shape[1])
        self.keys = torch.empty(0, device="cpu")
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, layer, args, output):
        x = args[0].detach()
        # nn.TransformerEncoder makes nested tensors of batches with padding.
        x = torch.cat(x.unbind()) if x.is_nested else x.reshape(-1, x.shape[-1])
        x = x[x.any(dim=1)]  # rows of zeros cannot be rescaled
        # Reservoir sampling: every row has a random key, and those with the largest keys are kept.
        rows = torch.cat([self.rows, x])
        new = torch.rand(len(x), generator=self.generator, device="cpu")
        keys = torch.cat([self.keys, new])
        kept = keys.topk(min(SAMPLE, len(keys))).indices
        self.rows, self.keys = rows[kept], keys[kept]


def record(model, layers, calibrate):
    """Runs calibrate.  Returns {name: rescaled inputs (n, in)} for the layers that ran."""
    recorders = {name: Recorder(layer) for name, layer in layers.items()}
    modes = {module: module.training for module in model.modules()}
    hooks = []
    try:
        for name, layer in layers.items():
            hooks.append(layer.register_forward_hook(recorders[name]))
        model.eval()
        with torch.no_grad():
            calibrate()
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training

    inputs = {}
    for name, recorder in recorders.items():
        if len(recorder.rows) > 0:
            inputs[name] = rescale_rows(recorder.rows)
    missed = [name for name in layers if name not in inputs]
    if not inputs:
        raise ValueError(f"calibrate ran none of the linear layers {missed}")
    if missed:
        warnings.warn(f"calibrate did not run {missed}, which stay frozen", stacklevel=3)
    return inputs


def assign_ranks(layers, inputs, rank, allocate):
    """{name: its rank}, within the budget of LoRA with the given rank in every layer."""
    importances, costs, max_ranks = [], [], []
    for name in inputs:
        W = weight_of(layers[name])
        rms = inputs[name].float().square().mean(dim=0).sqrt()
        importances.append(importance(W, rms))
        if not math.isfinite(importances[-1]):
            raise ValueError(f"NaN or inf in the weight or the inputs of {name}")
        costs.append(sum(W.shape))
        max_ranks.append(min(MAX_RANK_RATIO * rank, *W.shape))
    ranks = allocate(importances, costs, rank * sum(costs), max_ranks)
    return dict(zip(inputs, ranks, strict=True))


def replace(model, replacements):
    """Replaces modules everywhere in the model; replacements is {old: new}."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])


def check_model(model):
    """Refuses models to which adapters cannot be added."""
    for module in model.modules():
        if hasattr(module, "lora_A"):  # of this file or of PEFT
            raise ValueError("the model has adapters already: merge or remove them first")
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError("add adapters before DistributedDataParallel")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("weights are on the meta device: offloaded, or not loaded yet")


def apply_aira(
    model: nn.Module,
    calibrate: Callable[[], object],
    *,
    rank: int = 8,
    targets: Iterable[str] | None = None,
    also_train: Iterable[str] = (),
    init: str = "svd_A",
    allocate: Callable = greedy_ranks,
) -> dict[str, int]:
    """Adds adapters to the model, in place, and freezes the rest.  Returns {name: rank}.

    calibrate    a function that runs the model on a few thousand rows (tokens, image patches) of
                 the training data, with little padding
    rank         sets the budget: LoRA's number of parameters with this rank in all these layers
    targets      the layers to adapt, by the ends of their names: ["q_proj", "v_proj"].  By default
                 all linear layers except the head of a language model
    also_train   modules to train in full, such as a new head: ["classifier"]
    init         "svd_A": A starts from the SVD and B at zero.  "svd": both start from it, and need
                 an optimizer with weight_decay=0, as decay would change the model
    allocate     greedy_ranks or knapsack_ranks

    The order is: cast the model, apply_aira (outside of autocast), optimizer, torch.compile or DDP.
    With DDP, all processes need the same calibration data.  If it fails, the model is as before.
    """
    if rank < 1:
        raise ValueError(f"{rank=} must be at least 1")
    if init not in ("svd_A", "svd"):
        raise ValueError(f"{init=} must be 'svd_A' or 'svd'")
    check_model(model)
    names = [also_train] if isinstance(also_train, str) else also_train
    unfrozen = nn.ModuleList(model.get_submodule(name) for name in names)
    layers = find_layers(model, targets, set(unfrozen.modules()))
    inputs = record(model, layers, calibrate)
    ranks = assign_ranks(layers, inputs, rank, allocate)
    adapters = {}
    for name in ranks:
        adapters[layers[name]] = make_adapter(layers[name], inputs[name], ranks[name], init)
    model.requires_grad_(False)
    replace(model, adapters)
    unfrozen.requires_grad_(True)
    return ranks


# ---- 6. Remove, merge, save, load --------------------------------------------------------------


def find_adapters(model):
    adapters = [module for module in model.modules() if isinstance(module, AiraLinear)]
    if not adapters:
        raise ValueError("the model has no adapters")
    return adapters


def remove_aira(model: nn.Module) -> None:
    """Puts the model's own layers back, frozen.  Modules of also_train stay trained."""
    replace(model, {adapter: adapter.base_layer for adapter in find_adapters(model)})


@torch.no_grad()
def merge_aira(model: nn.Module) -> None:
    """Adds the adapters to the weights of the model's own layers, then removes the adapters."""
    for adapter in find_adapters(model):
        adapter.base_layer.weight.copy_(adapter.weight)
    remove_aira(model)


def aira_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters, what else requires gradients, and all buffers (such as BatchNorm's statistics),
    copied to the CPU.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    find_adapters(model)  # or an error
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("save before you freeze: heads that are frozen would be left out")
    state = {}
    # Not model.state_dict(), which users may have overridden with this function.
    for name, tensor in nn.Module.state_dict(model, keep_vars=True).items():
        frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if isinstance(tensor, Tensor) and (".lora_" in name or not frozen):
            name = name.replace("_orig_mod.", "")
            state[name] = tensor.detach().cpu().clone()
    return state


def load_aira(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Adds the adapters of an aira_state_dict to the base model, for use or for more training.

    If names or shapes do not fit, it raises ValueError and leaves the model as before.  It does not
    notice a base model with the same shapes but other weights.
    """
    check_model(model)
    own = nn.Module.state_dict(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    parts = {key.removesuffix(".lora_A"): {} for key in state if key.endswith(".lora_A")}
    if not parts:
        raise ValueError("the state has no adapters: is it an aira_state_dict?")
    for key, tensor in state.items():
        name, _, part = key.rpartition(".")
        if name in parts:
            parts[name][part] = tensor.clone()
            continue
        original = own.get(key.replace(".base_layer.bias", ".bias"))  # an unfrozen bias
        if original is None or original.shape != tensor.shape:
            raise ValueError(f"{key} {tuple(tensor.shape)} is in no aira_state_dict of this model")
    adapters = {}
    for name, tensors in parts.items():
        layer = modules.get(name)
        if not is_linear(layer):
            raise ValueError(f"the model has no linear layer {name}, or it is compiled")
        try:
            adapter = AiraLinear(layer, **tensors).to(layer.weight.device)
            B, A = adapter.factors()
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"the adapter of {name} is incomplete") from error
        if (len(B), A.shape[1]) != weight_of(layer).shape or len(A) != B.shape[1]:
            raise ValueError(f"the adapter of {name} does not fit the model")
        adapters[layer] = adapter
    replace(model, adapters)
    nn.Module.load_state_dict(model, state, strict=False)  # what is not in adapters
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in state)
