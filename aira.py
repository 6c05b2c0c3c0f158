# SPDX-License-Identifier: MIT
"""AIRA: Activation-Informed Low-Rank Adaptation, in one file.

An independent re-implementation of AIRA (Li et al., ICCV 2025) from its abstract, the authors' code
(github.com/lliai/LoRA-Zoo, folder aira) and a third-party port (github.com/ArkNightmaster/AIRA).
We have not read the paper itself.

    apply_aira(model, lambda: model(batch), rank=8)            # in place
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ...                                                        # train as usual
    torch.save(aira_state_dict(model), "adapter.pt")
    load_aira(base_model, torch.load("adapter.pt"))            # on an unchanged copy of the model
    merge_aira(base_model)                                     # adds the adapters to the weights

LoRA (Hu et al., 2021) fine-tunes a linear layer y = W x without changing its weight W (out, in).
It trains two thin matrices beside it, A (r, in) and B (out, r):

    y = W x + (alpha / r) B A x       A starts at random, B at zero

AIRA first runs the model on some data and looks at the inputs x of each layer.  Then it trains

    y = W x + B diag(g) A S^-1 x      S (in, in) is a square root of E[x x^T] in the k directions in
                                      which x is largest, and the identity in all others
                                      g (r,) are gains, in place of alpha / r

The abstract names three ideas.  The authors' code and this file differ in what they make of them.

1.  "Outlier-weighted SVD decomposition to reduce approximation errors in low-rank weight
    initialization".  Authors: A and B start from the SVD of W.  Here: A starts from the SVD of W S,
    in which the directions of large inputs weigh more.  B starts at zero, so nothing is
    approximated; with init="svd" both start from the SVD.
2.  "Outlier-driven dynamic rank assignment using offline optimization".  Both: once, before
    training, the sum of importance * log(rank) is maximised within a budget of parameters.
    Authors: the importance is the size of a layer's output, or the share of outliers among its
    weights.  Here: it is the sum of the outliers.  The budget is that of LoRA, not less.
3.  "Activation-informed training to amplify updates on significant weights".  Authors: outputs of
    the adapter are multiplied by |W x|, scaled to 0 .. 1 over the batch, which cannot be merged
    into W.  Here: g_i grows with the singular value sigma_i of W S.

That S^-1 stays in the layer is our own.  Without it, the few directions in which x is largest would
dominate the gradient of A.  With it, W changes less along these directions than in LoRA.

Test losses of the two models of train_toy.py, by .ci/bench.py; +- are standard errors, over three
base models, of the difference from AIRA.  The constants below were chosen on these two tasks.

                                      text              images
    LoRA, best scale and rate         2.098 +-.004      1.853 +-.03
    AIRA                              2.078             1.689
      with a random A                 2.088             1.837
      with the SVD of W               2.082             1.714
      with equal ranks                2.089             1.715
      with equal gains                2.081             1.684
      without S^-1                    2.114             1.874
      with init="svd"                 2.114             1.794
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

# ---- 1. Inputs, and S --------------------------------------------------------------------------
# In trained models x is many times larger in a few directions than in the others.  With k of these
# directions as the rows of D (k, in), and with s_j for how many times larger x is along D_j,
#
#     S    = I + D^T diag(s - 1) D        multiplies the part of x along D_j by s_j
#     S^-1 = I + D^T diag(1/s - 1) D      divides it by s_j
#
# S S is then close to a multiple of E[x x^T], and S^-1 x is white, or equally large everywhere.
#
# D and s are found on a sample of the layer's inputs, with a row for each token or image patch.  A
# few tokens, such as the first of a text, have huge inputs, and would decide alone which directions
# are large.  So all rows of the sample are rescaled to the same root mean square (RMS).

SAMPLE = 1024  # rows; half as many do as well
DIRECTIONS = 4  # k is 4 r; 2 r loses .005 on text, 8 r gains nothing
DAMPING = 0.3  # in units of the mean of E[x_i^2]; twice as much loses .02 on images


def times_S(M, D, s):
    """M S for M (m, in); with 1/s for s it is M S^-1."""
    return M + ((M @ D.T) * (s - 1)) @ D


def rescale_rows(inputs):
    """inputs (n, in), with the median of the rows' RMS as the RMS of all rows."""
    rms = inputs.float().square().mean(dim=1, keepdim=True).sqrt()
    return (inputs * (rms.median() / rms)).to(inputs.dtype)


def top_svd(matrix, k):
    """The k largest singular values of matrix (m, n), and their vectors: U (m, k), sigma (k,) and
    V^T (k, n).  They are approximate, because an exact SVD of a large layer takes too long.
    """
    oversampled = min(k + 8, *matrix.shape)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)  # svd_lowrank takes no generator
        U, sigma, V = torch.svd_lowrank(matrix, oversampled, niter=1)
    return U[:, :k], sigma[:k], V[:, :k].T.contiguous()


def find_S(inputs, k):
    """S as D (k, in) and s (k,), from rescaled inputs (n, in).

    D_j are the principal directions of the inputs and c_j their mean squares along D_j, in units in
    which those along all directions have a mean of 1.  c_rest is their mean over the others.

        s_j = max(1, sqrt((c_j + DAMPING) / (c_rest + DAMPING)))
    """
    X = inputs.float()
    X = X / X.square().mean().sqrt()
    n, width = X.shape
    _, _, D = top_svd(X[: n - n // 2], k)
    c = (X[n // 2 :] @ D.T).square().mean(dim=0)  # on other rows, as D is fitted to the first
    c_rest = (width - c.sum()) / (width - len(D))
    return D, ((c + DAMPING) / (c_rest + DAMPING)).sqrt().clamp_min(1)


# ---- 2. Outlier-weighted SVD -------------------------------------------------------------------
# With z = S^-1 x, the output of the layer is W x = W S z.  If z is white, the mean square of
# (W S - M) z is the square of the Frobenius norm of W S - M.  By the Eckart-Young theorem, the best
# M of rank r has the r largest singular values of W S = U diag(sigma) V^T, and their vectors.  So
# W x can best be computed from the r functions V^T z of the input, and A starts at this V^T.
#
# Like PiSSA (2404.02948), which takes the SVD of W, we assume that a change of W x can be computed
# from them, too.  ASVD (2312.05821) and CorDA (2406.05223) weight the SVD as well.


def outlier_weighted_svd(
    W: Tensor, D: Tensor, s: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), sigma (r,) and V^T (r, in) of W S, for W (out, in) and S as D (k, in), s (k,)."""
    return top_svd(times_S(W.float(), D, s), rank)


# ---- 3. The layer ------------------------------------------------------------------------------
# sigma_i is the RMS of what row i of V^T contributes to W x: the larger, the more significant.  In
# PiSSA, row i of A and column i of B start with a factor of sqrt(sigma_i), which multiplies the
# gradient of the other.  Here g_i, in proportion to sqrt(sigma_i), multiplies both.  Adam divides
# gradients by their size, but g_i also multiplies the output: with twice the gain, a step of Adam
# changes it twice as much.

SCALE = 4.0  # the mean of the gains; 8 loses .010 on text and .04 on images, 2 loses nothing


def is_linear(module):
    """Whether it is nn.Linear, or Conv1D of Hugging Face's GPT-2, and not a subclass of them, which
    may be quantised, or lend its weight to another module.
    """
    is_Conv1D = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return type(module) is nn.Linear or is_Conv1D


def weight_of(layer):
    """The layer's weight as (out, in); Conv1D stores it as (in, out)."""
    return layer.weight.detach() if type(layer) is nn.Linear else layer.weight.detach().T


class AiraLinear(nn.Module):
    """y = base_layer(x) + B diag(g) A S^-1 x

    base_layer          the model's own layer, which is not changed
    lora_A (r, in)      A
    lora_B (out, r)     B
    gains (r,)          g
    directions (k, in)  D
    shrink (k,)         1/s
    start_A, start_B    with init="svd": A and B diag(g) before training
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
        """The adapter as a plain LoRA: B' (out, r') and A' (r', in) of y = base_layer(x) + B' A' x.

        r' is r.  With init="svd" it is 2 r, because the product of the first A and B is subtracted.
        """
        A, B = self.lora_A, self.lora_B * self.gains
        if self.start_A is not None:
            # B A - B0 A0 = B (A - A0) + (B - B0) A0
            A = torch.cat([A - self.start_A, self.start_A])
            B = torch.cat([B, B - self.start_B], dim=1)
        with torch.autocast(A.device.type, enabled=False):  # S^-1 needs more digits than bfloat16's
            return B, times_S(A, self.directions, self.shrink)

    def forward(self, x: Tensor) -> Tensor:
        B, A = self.factors()
        return self.base_layer(x) + x @ A.T.to(x.dtype) @ B.T.to(x.dtype)

    @property
    def weight(self) -> Tensor:
        """The merged weight: for merge_aira, and for models that read the weight of a layer."""
        B, A = self.factors()
        W = self.base_layer.weight
        with torch.autocast(A.device.type, enabled=False):
            change = B @ A if type(self.base_layer) is nn.Linear else (B @ A).T
        return (W + change).to(W.dtype)

    @property
    def bias(self):
        return self.base_layer.bias


def make_adapter(layer, inputs, rank, init):
    """The AiraLinear of a layer before training, from rescaled inputs (n, in)."""
    D, s = find_S(inputs, k=min(DIRECTIONS * rank, inputs.shape[1] // 2))
    U, sigma, Vt = outlier_weighted_svd(weight_of(layer), D, s, rank)
    gains = sigma.clamp_min(0.01 * sigma[0] + 1e-30).sqrt()  # with a gain of 0 nothing is learned
    gains = SCALE * gains / gains.mean()
    if init == "svd_A":
        return AiraLinear(layer, Vt, torch.zeros_like(U), gains, D, 1 / s)
    B = U * sigma / gains
    return AiraLinear(layer, Vt, B, gains, D, 1 / s, start_A=Vt.clone(), start_B=B * gains)


# ---- 4. Ranks ----------------------------------------------------------------------------------
# W_ij adds W_ij x_j to output i, with an RMS of |W_ij| rms_j.  As in OWL (2310.05175), W_ij is an
# outlier if this is above a multiple of its mean over the layer.  The importance of a layer is the
# sum of |W_ij| rms_j over its outliers, divided by the number of outputs: without the division,
# wide layers would take rank from the others.
#
# Raising a rank by one costs in + out parameters, and helps less the higher the rank is.  As in the
# authors' code, log(rank) stands for how much it helps.  The best ranks
#
#     maximise    sum of importance * log(rank)
#     subject to  sum of (in + out) * rank <= budget ,    1 <= rank <= max_rank
#
# knapsack_ranks finds them.  greedy_ranks comes close, and takes no time.

OUTLIER = 2.0  # times the mean; 4 loses .020 on text and .05 on images (OWL takes 5)
MAX_RANK = 2  # times the rank that LoRA would have, as in the authors' code; 4 changes nothing


def importance(W: Tensor, magnitude: Tensor) -> float:
    """The importance of a layer, from W (out, in) and the RMS (in,) of each input x_j."""
    products = W.float().abs() * magnitude
    outliers = products > OUTLIER * products.mean()
    return float((products * outliers).sum()) / len(W)


def greedy_ranks(
    importances: list[float], costs: list[int], budget: int, max_ranks: list[int]
) -> list[int]:
    """Starts at rank 1 and repeatedly raises the rank that gains most for its parameters.

    importances, costs (parameters of one unit of rank) and max_ranks have an entry for each layer;
    the budget must pay for rank 1 in all.
    """
    ranks = [1] * len(costs)
    left = budget - sum(costs)
    growing = list(range(len(costs)))

    def benefit(layer):
        return importances[layer] * math.log(1 + 1 / ranks[layer]) / costs[layer]

    while growing:
        best = max(growing, key=benefit)
        if ranks[best] < max_ranks[best] and costs[best] <= left:
            ranks[best] += 1
            left -= costs[best]
        else:  # at its maximum, or too expensive for what is left
            growing.remove(best)
    return ranks


def knapsack_ranks(
    importances: list[float], costs: list[int], budget: int, max_ranks: list[int]
) -> list[int]:
    """The exact optimum, by dynamic programming; arguments and result as for greedy_ranks.

    It takes 8 bytes per layer and unit of the budget, which is the costs' greatest common divisor.
    """
    unit = math.gcd(*costs)
    size = budget // unit + 1
    best = np.zeros(size)  # best[b]: the optimum for a budget of b units and the layers so far
    choices = []  # choices[layer][b]: the rank of the layer in that optimum
    for value, cost, max_rank in zip(importances, costs, max_ranks, strict=True):
        options = np.full((max_rank + 1, size), -np.inf)  # rank 0 is never chosen
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


def find_layers(model, targets, exclude):
    """{name: layer} of the linear layers to adapt."""
    uses = Counter(p.data_ptr() for m in model.modules() for p in m.parameters(recurse=False))
    layers = {}
    for name, module in model.named_modules():
        if not is_linear(module) or module in exclude or module is model:
            continue
        # Merging into a weight that is used twice would change another module, too.
        if uses[module.weight.data_ptr()] == 1:
            layers[name] = module
    if targets is None:
        head = getattr(model, "get_output_embeddings", lambda: None)()  # of a language model
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
    """Runs calibrate.  Returns {name: sample (n, in)} of the layers that it reached, rescaled."""
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
    """{name: rank}, within the budget of a LoRA that has this rank in all layers."""
    importances, costs, max_ranks = [], [], []
    for name in inputs:
        W = weight_of(layers[name])
        rms = inputs[name].float().square().mean(dim=0).sqrt()
        importances.append(importance(W, rms))
        if not math.isfinite(importances[-1]):
            raise ValueError(f"NaN or inf in the weight or the inputs of {name}")
        costs.append(sum(W.shape))
        max_ranks.append(min(MAX_RANK * rank, *W.shape))
    ranks = allocate(importances, costs, rank * sum(costs), max_ranks)
    return dict(zip(inputs, ranks, strict=True))


def replace(model, new):
    """Replaces each module that is a key of new, wherever the model has it."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                setattr(parent, name, new[child])


def check_model(model):
    """Refuses models to which adapters cannot be added."""
    for module in model.modules():
        if isinstance(module, AiraLinear):
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
    """Adds adapters to the model, in place, and freezes everything else.  Returns {name: rank}.

    calibrate    a function that runs the model on a few thousand rows (tokens, image patches) of
                 the training data, with little padding
    rank         at most as many parameters are trained as in LoRA with this rank in all layers
    targets      the layers to adapt, by the ends of their names: ["q_proj", "v_proj"].  By default
                 all linear layers except the head of a language model
    also_train   modules to train in full, such as a new head: ["classifier"]
    init         "svd_A": A starts from the SVD and B at zero.  "svd": both start from it; set
                 weight_decay=0 then, which would shrink A and B, but not what is subtracted
    allocate     greedy_ranks or knapsack_ranks

    Call it before you make the optimizer and before torch.compile and DDP, and not inside autocast.
    With DDP, call it in each process with the same data.  If it fails, the model is as before.
    """
    if rank < 1:
        raise ValueError(f"{rank=} must be at least 1")
    if init not in ("svd_A", "svd"):
        raise ValueError(f"{init=} must be 'svd_A' or 'svd'")
    check_model(model)
    in_full = [also_train] if isinstance(also_train, str) else also_train
    full = nn.ModuleList(model.get_submodule(name) for name in in_full)

    layers = find_layers(model, targets, set(full.modules()))
    inputs = record(model, layers, calibrate)
    ranks = assign_ranks(layers, inputs, rank, allocate)
    adapters = {}
    for name in ranks:
        adapters[layers[name]] = make_adapter(layers[name], inputs[name], ranks[name], init)
    model.requires_grad_(False)
    replace(model, adapters)
    full.requires_grad_(True)
    return ranks


# ---- 6. Remove, merge, save, load --------------------------------------------------------------


def find_adapters(model):
    adapters = [module for module in model.modules() if isinstance(module, AiraLinear)]
    if not adapters:
        raise ValueError("the model has no adapters")
    return adapters


def remove_aira(model: nn.Module) -> None:
    """Puts the model's own layers back, whose weights have not changed.  They stay frozen."""
    replace(model, {adapter: adapter.base_layer for adapter in find_adapters(model)})


@torch.no_grad()
def merge_aira(model: nn.Module) -> None:
    """Adds the adapters to the weights of the model's own layers, and removes them."""
    for adapter in find_adapters(model):
        adapter.base_layer.weight.copy_(adapter.weight)
    remove_aira(model)


def aira_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copies, on the CPU, of the adapters, of other parameters that require gradients, and of all
    buffers, as training may change them, too (BatchNorm's).
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    if not all(adapter.lora_A.requires_grad for adapter in find_adapters(model)):
        raise ValueError("save before you freeze: what is frozen would be left out")
    state = {}
    # nn.Module's own method: model.state_dict may have been replaced, for example by this function.
    for name, tensor in nn.Module.state_dict(model, keep_vars=True).items():
        frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if isinstance(tensor, Tensor) and not frozen:
            name = name.replace("_orig_mod.", "")
            state[name] = tensor.detach().cpu().clone()
    return state


def load_aira(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Adds the adapters of an aira_state_dict to the base model, to use them or to train on.

    ValueError, and the model is as before, if names or shapes do not fit.  A base model with other
    weights of the same shapes is not noticed.
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
        original = own.get(key.replace(".base_layer", ""))  # of a bias next to an adapter
        if original is None or original.shape != tensor.shape:
            raise ValueError(f"{key} {tuple(tensor.shape)} does not fit the model")

    adapters = {}
    for name, tensors in parts.items():
        layer = modules.get(name)
        if not is_linear(layer):
            raise ValueError(f"the model has no linear layer {name}")
        try:
            adapter = AiraLinear(layer, **tensors).to(layer.weight.device)
            B, A = adapter.factors()
            change = B @ A
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"the adapter of {name} is incomplete") from error
        if change.shape != weight_of(layer).shape:
            raise ValueError(f"the adapter of {name} does not fit the model")
        adapters[layer] = adapter
    replace(model, adapters)
    nn.Module.load_state_dict(model, state, strict=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in state)
