# SPDX-License-Identifier: MIT
"""AIRA (Activation-Informed Low-Rank Adaptation, ICCV 2025) for PyTorch, all of it in one file.
The three ideas are the abstract's; how updates are amplified, and the guards, are ours.

LoRA fine-tunes a frozen layer y = W x as y = W x + s B A x: A (r, in) starts random, B (out, r) at
zero, all layers have rank r.  AIRA first runs the model on a few batches and listens:
    1  activations  how loud each layer's input channels are, and in which directions
    2  start        A comes from an SVD of W, weighted by how loud its input channels are
    3  ranks        layers with more outliers get more of LoRA's parameter budget
    4  updates      loud directions would drown the others: B A hears x with them turned down
For nn.Linear and Hugging Face's Conv1D, not quantised; before torch.compile, DDP, fully_shard.

An independent re-implementation, from the abstract, the released code (github.com/lliai/LoRA-Zoo;
a "Departure" says where and why we differ) and: LoRA, arXiv 2106.09685; outliers, OWL, 2310.05175;
activation-weighted SVD, ASVD, 2312.05821; moments from a sketch, Nystrom, 1706.05736.
"""
import collections, json, math, pathlib, re, warnings
import numpy as np, torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F
def need(ok, message):
    if not ok: raise ValueError(message)

# ---- 1. Activations ------------------------------------------------------------------------------
# Every vector x (in,) that enters a linear layer is a token.  Each is scaled to RMS 1 and counts
# alike, lest a few, hundreds of times louder, be all that we hear.  Over the scaled tokens:
#     rms_j = sqrt(mean x_j^2) * geometric mean of the tokens' RMS: channel j's loudness    (in,)
#     C = mean x x^T, second moments, trace C = in: too large to keep                      (in, in)
# So we keep C P, for few random orthonormal columns P (in, 80).  Up to rank 80 that is all of C,
# C = (C P) (P^T C P)^+ (C P)^T  (Nystrom); beyond, a lower bound, good for what stands out.
class Listener:
    """Sums over all tokens that one layer sees; silent ones add nothing."""
    def __init__(self, weight):
        width, seeded = weight.shape[1], torch.Generator().manual_seed(0)
        P = torch.randn(width, min(width, 80), generator=seeded, device="cpu", dtype=torch.float32)
        self.P = torch.linalg.qr(P)[0].to(weight.device)
        self.sums = 0, self.P.new_zeros(()), self.P.new_zeros(width), 0 * self.P
    def hook(self, layer, args, kwargs, y):
        x = (args or [*kwargs.values()])[0].detach().reshape(-1, len(self.P)).to(self.P)
        loud = x.square().mean(1, keepdim=True).sqrt()
        x = x / (loud + (loud == 0))
        with torch.autocast(x.device.type, enabled=False): CP = x.T @ (x @ self.P)
        new = len(x), loud[loud != 0].log().sum(), x.square().sum(0), CP
        self.sums = [a + b for a, b in zip(self.sums, new)]
    def finish(self, name):
        """Sums to means; over all processes, lest they choose different ranks."""
        if dist.is_available() and dist.is_initialized():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, [torch.as_tensor(t).cpu() for t in self.sums])
            self.sums = [sum(part) for part in zip(*parts)]
        self.tokens, (log, square, CP) = int(self.sums[0]), (t.to(self.P) for t in self.sums[1:])
        need((CP.sum() + log).isfinite(), f"layer {name!r} saw NaN or inf: check batches, weights")
        n = square.sum() / len(square)  # tokens that are not silent: the squares of each sum to in
        self.CP, self.rms = CP / n, (square / n).sqrt() * (log / n).exp()
        if not n: self.CP, self.rms = self.P, torch.ones_like(square)  # silence: C = I, all alike
        return self

# ---- 2. Outlier-weighted SVD ---------------------------------------------------------------------
# Abstract: an outlier-weighted decomposition starts the factors.  A plain SVD keeps the most of W
# as if all channels counted alike.  With S = diag(rms) each counts as loud as it is:
#     minimise ||(W - B A) S||_F   =>   W S = U diag(sigma) V^T  (SVD),
#                                       B = U_r diag(sigma_r)^.5 ,  A = diag(sigma_r)^.5 V_r^T S^-1
# init="svd" starts from both.  By default A starts from V_r alone, and B is zero, as in LoRA.
def outlier_weighted_svd(weight, channel_rms, rank):
    """The best rank-r factors in the norm of the inputs (Eckart-Young): weight W (out, in),
    channel_rms (in,), raised to 1e-4 of its mean -> B (out, rank), A (rank, in), >= float32.
    Departure: the released code decomposes W itself, and takes V for V^T."""
    need(1 <= rank <= min(weight.shape) and channel_rms.shape == weight.shape[1:], f"{rank=} or "
         f"channel_rms {(*channel_rms.shape,)} for {(*weight.shape,)}: 1 .. {min(weight.shape)}")
    rms = channel_rms.to(torch.promote_types(weight.dtype, torch.float32))  # half has no SVD
    rms = rms.clamp_min(1e-4 * rms.mean()) if rms.any() else rms + 1
    WS = weight.detach().to(rms) * rms
    with torch.random.fork_rng(range(torch.cuda.device_count())):  # the caller's state stays
        torch.manual_seed(0)
        U, s, V = torch.svd_lowrank(WS, min(rank + 16, *WS.shape), niter=5)  # nearly exact
    root = s[:rank].sqrt().clamp_min(1e-4 * s[0].sqrt() + 1e-30)  # no row of A is zero
    return U[:, :rank] * (s[:rank] / root), root[:, None] * V.T[:rank] / rms

# ---- 3. Ranks ------------------------------------------------------------------------------------
# Abstract: an offline optimisation assigns the ranks.  A unit of rank trains cost_l = in + out
# numbers in layer l, and each further one adds less.  With theta_l the importance of the layer,
#     maximise sum_l theta_l log r_l   subject to   sum_l cost_l r_l <= budget ,  1 <= r_l <= max_l
# in integers: r_l ~ theta_l / cost_l.  A weight brings |W_ij| rms_j to an output: OWL's outliers.
def outlier_mass(weight, channel_rms, threshold=2.0):
    """The default theta: the sum of |W_ij| rms_j over outliers, those above threshold * mean."""
    significance = weight.detach().float().abs() * channel_rms.float()
    return float(significance[significance > threshold * significance.mean()].sum())

def least_ranks(importance, costs, budget, min_rank, max_ranks):
    """Check the problem -> everyone's least rank, theta > 0, what is left of the budget then."""
    theta, ranks = np.asarray(importance, float), [min(min_rank, most) for most in max_ranks]
    need(len(theta) == len(costs) == len(ranks) > 0 and np.isfinite(theta).all() and min(theta) >= 0
         and min(*costs, *ranks) >= 1, "layers need a finite importance >= 0, cost, rank >= 1: "
         f"{importance=}, {costs=}, {min_rank=}, {max_ranks=}")
    left = budget - int(np.dot(costs, ranks))
    need(left >= 0, f"{budget=} is too small: {min_rank=} takes {budget - left}")
    # relative to the largest; layers of no importance grow last, or alike if none has any
    return ranks, np.maximum(theta / (theta.max() or 1), 1e-9).tolist(), left

def greedy_ranks(importance, costs, budget, min_rank, max_ranks):
    """Buy units of rank one by one, by theta log((r + 1) / r) / cost, each if it fits -> [int].
    importance, costs, max_ranks: a number for each layer.  Optimal where all costs are equal."""
    ranks, theta, left = least_ranks(importance, costs, budget, min_rank, max_ranks)
    for _, l in sorted((-theta[l] * math.log1p(1 / r) / costs[l], l)
                       for l in range(len(ranks)) for r in range(ranks[l], max_ranks[l])):
        if costs[l] <= left: ranks[l], left = ranks[l] + 1, left - costs[l]
    return ranks

def knapsack_ranks(importance, costs, budget, min_rank, max_ranks):
    """The optimum, by dynamic programming; exact if the costs' gcd >= 2^-18 of what is left.
    Layers of one cost form a class: its best n units have the largest gains, together value[n].
    Class by class, best[b], the most that b coins buy, is max_n value[n] + before[b - n price]."""
    ranks, theta, left = least_ranks(importance, costs, budget, min_rank, max_ranks)
    coin, classes = max(math.gcd(*costs), left >> 18), []
    best = np.zeros(left // coin + 1)
    for cost in sorted(set(costs)):
        units = sorted((-theta[l] * math.log1p(1 / r), l) for l in range(len(ranks))
                       if costs[l] == cost for r in range(ranks[l], max_ranks[l]))
        price, before = -(-cost // coin), best.copy()
        value = -np.cumsum([0] + [loss for loss, _ in units])[:1 + (len(best) - 1) // price]
        classes.append((price, value, units, before))
        for n in range(1, len(value)):
            best[n * price:] = np.maximum(best[n * price:], value[n] + before[:-n * price])
    b = len(best) - 1
    for price, value, units, before in reversed(classes):  # walk back: how many of each class
        value = value[:b // price + 1]
        n = int(np.argmax(value + before[b - price * np.arange(len(value))]))
        b -= n * price
        for _, l in units[:n]: ranks[l] += 1
    return ranks

# ---- 4. Amplified updates ------------------------------------------------------------------------
# Abstract: amplify the updates of significant weights.  Multiplying a gradient by a constant would
# be a placebo: Adam divides it out again.  So we change what the adapter hears, G x for x:
#     y = W x + s B A G x ,   G = (C + damping I)^-p ,   A = V_r^T / s ,   B = 0 ,   s = 1/2
# Where C is loud G is small, so quiet directions are turned up (departure: not the loud ones; it
# measured better), and by SGD twice: a step of A moves W by  -rate s^2 B B^T grad G^2, one of B by
# -rate s^2 grad G A^T A G.  `amplify` is p: at 1/2, G x is nearly white, at 0 it is x, p < 0 turns
# up what is loud.  1/3 is a compromise: our small models learn a little more with 1/2, a pretrained
# Llama with 1/4.  s makes A's rows long: Adam's steps have one length, and turn long rows less.
SCALE = 1 / 2
def whitening(CP, P, power, damping=0.1, k=64):
    """Part 1's C P (in, q) -> loud (k, in), orthonormal, about C's k loudest directions, and gains
    (k + 1,): of each, and of all the others, which count as their mean."""
    CP, P = (t.cpu().double() for t in (CP, P))  # the inverse needs the digits
    Q, R = torch.linalg.qr(CP)  # C = Q core Q^T
    core = R @ torch.linalg.pinv(P.T @ CP, rtol=1e-6, hermitian=True) @ R.T
    values, U = (t[..., -k:] for t in torch.linalg.eigh(core))
    rest = (len(P) - values.sum()).clamp_min(0) / max(len(P) - len(values), 1)
    return (Q @ U).T, (torch.cat([values, rest[None]]).clamp_min(0) + damping) ** -power

def amplified(A, loud, gains):
    """A (r, in) times G = g I + loud^T diag(gains[:-1] - g) loud,  g = gains[-1]."""
    R, loud, gains = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (A, loud, gains))
    with torch.autocast(A.device.type, enabled=False):  # what is left of loud needs the digits
        return (gains[-1] * R + R @ loud.T * (gains[:-1] - gains[-1]) @ loud).to(A.dtype)

TENSORS = "lora_A", "lora_B", "loud", "gains", "start_A", "start_B"
INITS = "svd_A", "svd", "random"
class AiraLinear(nn.Module):
    """A frozen linear layer and its low-rank difference, y = base(x) + s B A G x.
    lora_A, lora_B    A (r, in), B (out, r): trained, in float32 or wider, for steps are small
    loud, gains       G's parts, fixed
    start_A, start_B  only for init="svd", where G = I: A0, B0, part 2's / sqrt(s), fixed; A and B
                      start at zero, and y = base(x) + s (B0 + B) (A0 + A) x - s B0 A0 x
    The output starts as the base's, bit for bit.  (Departure: the released code jumps.)"""
    def __init__(self, base, tensors):
        super().__init__()
        self.base, (self.out_features, self.in_features) = base, out_in(base).shape
        like = base.weight.new_empty(0, dtype=torch.promote_types(base.weight.dtype, torch.float32))
        for name in TENSORS:
            t = tensors.get(name)
            if t is not None: t = t.detach().to(like).clone(memory_format=torch.contiguous_format)
            if name.startswith("lora"): self.register_parameter(name, nn.Parameter(t))
            else: self.register_buffer(name, t)  # which model.requires_grad_(True) leaves fixed
        self.train(base.training)
    def factors(self):
        """LoRA's s B (out, r), A G (r, in); init="svd": s [B0 + B | B], [A ; A0], of rank 2 r."""
        B, A = self.lora_B, amplified(self.lora_A, self.loud, self.gains)
        if self.start_A is not None:
            B, A = torch.cat([self.start_B + B, B], 1), torch.cat([A, self.start_A])
        return SCALE * B, A
    def forward(self, input):
        B, A = (t.to(input.dtype) for t in self.factors())  # B A, (out, in), is never formed here
        return self.base(input) + F.linear(F.linear(input, A), B)
    @property
    def weight(self):
        """W + dW, summed in float32 or wider; nn.TransformerEncoderLayer in eval mode reads it."""
        B, A = self.factors()
        with torch.autocast(B.device.type, enabled=False): delta = B @ A
        delta = delta.T if is_conv1d(self.base) else delta
        return (self.base.weight.to(delta.dtype) + delta).to(self.base.weight.dtype)
    bias = property(lambda self: self.base.bias)
def inside(name, modules):
    return any(f"{name}.".startswith(f"{module}.") for module in modules)
def is_conv1d(m):  # Hugging Face's, in GPT-2: a linear layer that stores its weight as (in, out)
    return type(m).__name__ == "Conv1D" and hasattr(m, "nf")
def is_linear(m):  # but no subclass, which may do anything
    return type(m) is nn.Linear or is_conv1d(m)
def plain(w):
    return isinstance(w, nn.Parameter) and not (w.is_meta or hasattr(w, "device_mesh"))  # sharded
def out_in(layer):
    return layer.weight.detach().T if is_conv1d(layer) else layer.weight.detach()

def start(W, heard, rank, init, power):
    """The tensors of a new AiraLinear, {name: tensor}."""
    with torch.autocast(W.device.type, enabled=False):
        loud, gains = whitening(heard.CP, heard.P, 0 if init == "svd" else power)
        B, A = outlier_weighted_svd(W, heard.rms, rank)
    V = A * heard.rms.clamp_min(1e-4 * heard.rms.mean())  # V_r^T, but for its rows' lengths
    if init == "random" or not W.any(): V = torch.randn_like(A)  # W = 0 has none
    new = {"lora_A": F.normalize(V) / SCALE, "lora_B": 0 * B, "loud": loud, "gains": gains}
    if init == "svd": new.update(lora_A=0 * A, start_A=A / SCALE**0.5, start_B=B / SCALE**0.5)
    return new

# ---- 5. apply_aira -------------------------------------------------------------------------------
Row = collections.namedtuple("Row", "name shape tokens importance rank parameters")  # (out, in)
class Report(collections.namedtuple("Report", "rows budget skipped unreached")):
    """What apply_aira did, as a table; skipped: {layer: why}, unreached: share of the model."""
    def __str__(self):
        w, spent = max(len(r.name) for r in self.rows), sum(r.parameters for r in self.rows)
        title = f"{'layer':{w}}    out x in      tokens  importance  rank  parameters"
        return "\n".join([title] + [
            f"{r.name:{w}} {r.shape[0]:>6} x {r.shape[1]:<6} {r.tokens:>7,} {r.importance:>11.4g} "
            f"{r.rank:>5} {r.parameters:>11,}" for r in self.rows] + [
            f"skipped {name}: {why}" for name, why in self.skipped.items()] + [
            f"{spent:,} trained, {spent / self.budget:.1%} of the budget; no adapter reaches "
            f"{self.unreached:.1%} of the model's parameters"])

def find(model, targets, exclude, also_train):
    """-> {name: layer} to adapt, {name: why not} of other linear layers."""
    def named(name, ends): return any(f".{name}".endswith(f".{end}") for end in ends)
    modules, layers, skipped = dict(list(model.named_modules())[1:]), {}, {}  # without the root
    owners = collections.Counter(id(p) for m in model.modules() for p in m.parameters(False))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = {name: m for name, m in modules.items() if is_linear(m)}
    full = {id(m) for name in also_train if name in modules for m in modules[name].modules()}
    for name, m in linear.items():
        if not named(name, exclude) and (targets is None or named(name, targets)):
            w, why = m.weight, ("in also_train" if id(m) in full else
                                "tied" if owners[id(m.weight)] > 1 else
                                "output head" if m is head and targets is None else "")
            need(why or plain(w) and w.is_floating_point() and w.isfinite().all(), "mend or "
                 f"exclude {name!r}: meta, sharded, parametrised, quantised {w.dtype}, NaN, inf?")
            (skipped if why else layers)[name] = why or m
    missed = [t for t in targets or () if not any(named(name, [t]) for name in layers)]
    missed += [t for t in exclude if not any(named(name, [t]) for name in linear)]
    missed += [name for name in also_train if name not in modules]
    need(layers and not missed, f"no {missed or 'layer'} inside, {targets=}, {exclude=}, "
         f"{also_train=}; linear layers are {list(linear)[:5]} .., skipped {list(skipped)[:5]}")
    return layers, skipped

def listen(model, layers, run):
    """Run the user's batches, in eval mode and without gradients -> {name: Listener}."""
    heard = {name: Listener(out_in(m)) for name, m in layers.items()}
    modes = [(m, m.training) for m in model.modules()]
    hooks = [m.register_forward_hook(heard[n].hook, with_kwargs=True) for n, m in layers.items()]
    try:
        with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
            model.eval()
            run()
    finally:
        for hook in hooks: hook.remove()
        for m, mode in modes: m.training = mode
    return {name: one.finish(name) for name, one in heard.items()}

def apply_aira(model, calibrate=None, *, rank=8, targets=None, exclude=(), also_train=(),
               init="svd_A", importance=outlier_mass, allocate=greedy_ranks, max_rank=None,
               amplify=1 / 3):
    """Put adapters into `model` in place, freeze all else -> a Report, which prints.
    calibrate   callable without arguments that runs the model on a few thousand typical tokens;
                None: all channels and directions count as equally loud, and a warning says so
    rank        the budget is what LoRA of this rank trains, sum_l (in + out)_l rank
    targets     names of layers or their endings, as "q_proj"; None: all linear layers but the
                output head and tied ones.  exclude: names or endings to leave out
    also_train  names of modules to train in full and save along, as a new head
    init        "svd_A": A from the weighted SVD, B zero; "svd": both, no G; "random": A random
    importance  function (weight, rms) -> theta >= 0; lambda W, rms: sum(W.shape) for equal ranks
    allocate    greedy_ranks or knapsack_ranks;  max_rank: of a layer, None: 2 rank;  amplify: p
    Before the optimizer; in every process.  For bad input ValueError, and the model as it was."""
    targets, exclude, also_train = ([x] if isinstance(x, str) else x and list(x)
                                    for x in (targets, exclude, also_train))
    most = 2 * rank if max_rank is None else max_rank
    need(all(isinstance(r, (int, np.integer)) and r >= 1 for r in (rank, most)),
         f"{rank=}, {max_rank=}: whole numbers >= 1")
    need(init in INITS and abs(amplify) <= 1 and (calibrate is None or callable(calibrate)),
         f"{init=}: one of {INITS}; {amplify=}: -1 .. 1; calibrate={type(calibrate)}: a lambda")
    need(not any("_aira" in vars(m) or hasattr(m, "peft_config") for m in model.modules()),
         "the model has adapters: remove_aira, merge_aira or PEFT's unload() first")
    layers, skipped = find(model, targets, exclude, also_train)
    heard = listen(model, layers, calibrate or (lambda: None))
    few = [name for name, one in heard.items() if one.tokens < rank]
    unused = [name for name in few if calibrate and not heard[name].tokens]
    need(not unused, f"calibrate never called {unused[:5]}: run (a generator does not) or exclude")
    weights = {name: out_in(m) for name, m in layers.items()}
    costs, sides = ([f(w.shape) for w in weights.values()] for f in (sum, min))
    if few or rank > max(sides):
        warnings.warn(f"{rank=}: no layer holds more than {max(sides)}, and {few[:5]} saw fewer "
                      "calibration tokens; without any, all channels count alike", stacklevel=2)
    theta = [float(importance(w, heard[name].rms)) for name, w in weights.items()]
    ranks = allocate(theta, costs, rank * sum(costs), 1, [min(side, most) for side in sides])
    rows, state = [], {k: t for k, t in model.state_dict().items() if inside(k, also_train)}
    for (name, w), t, r in zip(weights.items(), theta, ranks, strict=True):
        rows.append(Row(name, tuple(w.shape), heard[name].tokens, t, r, r * sum(w.shape)))
        new = start(w, heard[name], r, init, amplify)
        state.update((f"{name}.{key}", tensor) for key, tensor in new.items())
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    missed = sum(n for name, n in sizes.items() if not inside(name, [*layers, *also_train]))
    load_aira(model, {**state, "aira.tensors": torch.tensor(len(state))})  # the first change
    return Report(rows, rank * sum(costs), skipped, missed / sum(sizes.values()))

# ---- 6. Load, save, remove, merge, export --------------------------------------------------------
@torch.no_grad()
def load_aira(model, state):
    """Put an aira_state_dict on the base model, to use it or to train on.  Ranks are the tensors'
    shapes; nothing is decomposed.  ValueError, and nothing changed, for what does not fit."""
    own, state = model.state_dict(), dict(state)
    modules = dict(model.named_modules(remove_duplicate=False))
    count, want = int(state.pop("aira.tensors", -1)), {k: own[k].shape for k in state if k in own}
    names = [k[:-7] for k in state if k.endswith(".lora_A") and is_linear(modules.get(k[:-7]))]
    for name in (name for name in names if plain(modules[name].weight)):
        (out, width), r = out_in(modules[name]).shape, len(state[f"{name}.lora_A"])
        k = len(state.get(f"{name}.loud", ()))
        shapes = (r, width), (out, r), (k, width), (k + 1,), (r, width), (out, r)
        for t, shape in zip(TENSORS[:6 if f"{name}.start_A" in state else 4], shapes):
            want[f"{name}.{t}"] = torch.Size(shape)
    odd = [k for k in {**want, **state} if k not in state or state[k].shape != want.get(k)
           or not state[k].isfinite().all()]
    need(names and not odd and count == len(state) and not hasattr(model, "_aira"),
         f"{odd[:5]} are missing, unexpected, misshapen, NaN or inf; or not all {count} tensors of "
         f"aira_state_dict are here ({len(state)}); or the model has adapters")
    also = sorted({k.rpartition(".")[0] for k in state if k in own})
    model._aira = {"trained": {name: p.requires_grad for name, p in model.named_parameters()},
                   "also_train": also, "before": {k: own[k].clone() for k in state if k in own}}
    model.requires_grad_(False)
    for name in also: modules[name].requires_grad_(True)
    for k in own.keys() & state.keys(): own[k].copy_(state[k])
    swap(model, {id(modules[name]): AiraLinear(
        modules[name], {t: state.get(f"{name}.{t}") for t in TENSORS}) for name in names})
def swap(model, new):  # put new[id(module)] in the module's place, wherever it hangs
    for parent in list(model.modules()):
        parent._modules.update({k: new.get(id(m), m) for k, m in parent._modules.items()})

def adapted(model):
    """The module that was adapted (DDP and compile wrap it), and its {name: AiraLinear}."""
    roots = [m for m in model.modules() if "_aira" in vars(m)]
    need(len(roots) == 1, f"{len(roots)} models with AIRA adapters, not one: call apply_aira")
    return roots[0], {n: m for n, m in roots[0].named_modules() if isinstance(m, AiraLinear)}

def aira_state_dict(model):
    """Copies of the adapters' and also_train's tensors, {name: tensor}, and their number."""
    model, adapters = adapted(model)
    state = {k: t.full_tensor() if hasattr(t, "full_tensor") else t.clone()  # sharded: gather
             for k, t in model.state_dict().items()
             if k.rpartition(".")[0] in adapters or inside(k, model._aira["also_train"])}
    return {**state, "aira.tensors": torch.tensor(len(state))}  # lest half a file pass for all

def remove_aira(model, restore=True):
    """Take the adapters off; what also_train trained goes back, too, if restore."""
    model, adapters = adapted(model)
    model.load_state_dict(model._aira["before"] if restore else {}, strict=False)
    swap(model, {id(m): m.base for m in adapters.values()})
    trained = vars(model).pop("_aira")["trained"]
    for name, p in model.named_parameters(): p.requires_grad_(trained.get(name, p.requires_grad))

@torch.no_grad()
def merge_aira(model):
    """Fold the adapters into the base's own layers; ValueError, nothing changed, for NaN or inf."""
    adapters = adapted(model)[1]
    broken = [name for name, m in adapters.items() if not m.weight.isfinite().all()]
    need(not broken, f"merging would write NaN or inf into {broken[:5]}: the run has diverged")
    for m in adapters.values(): m.base.weight.copy_(m.weight)
    remove_aira(model, restore=False)

def save_peft(model, directory):
    """Write a plain LoRA for Hugging Face PEFT and servers; ValueError for what it cannot hold."""
    model, adapters = adapted(model)
    also, kind = model._aira["also_train"], type(model).__name__
    also = [n for n in also if not inside(n.rpartition(".")[0], also)]  # the outermost
    odd = [n for n, m in model.named_modules(remove_duplicate=False)  # shared, or like also_train
           if isinstance(m, AiraLinear) and n not in adapters
           or n.endswith(tuple(also)) and not inside(n, also)]
    odd += [n for n in also if any(x.endswith(n) for x in ("lora_dropout", "base_layer", "A", "B"))]
    kept = {id(p) for name in also for p in model.get_submodule(name).parameters()}
    odd += [n for n, p in model.named_parameters(remove_duplicate=False)  # tied
            if id(p) in kept and not inside(n, also)]
    need(not odd, f"PEFT would confuse {odd[:5]} with others: use merge_aira and save the model")
    tensors, ranks = {k: t for k, t in model.state_dict().items() if inside(k, also)}, {}
    for name, m in adapters.items():
        tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"] = m.factors()
        ranks["^" + re.escape(name)] = len(tensors[f"{name}.lora_A.weight"])  # a regular expression
    settings = {
        "peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": ranks, "alpha_pattern": ranks,
        "target_modules": "|".join(map(re.escape, adapters)), "modules_to_save": also or None,
        "fan_in_fan_out": all(is_conv1d(m.base) for m in adapters.values()),
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None),
        "task_type": "CAUSAL_LM" if kind.endswith(("ForCausalLM", "LMHeadModel")) else
        "SEQ_CLS" if "SequenceClass" in kind and {"classifier", "score"} & {*also} else None}
    pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    pathlib.Path(directory, "adapter_config.json").write_text(json.dumps(settings, indent=2))
    torch.save({f"base_model.model.{k}": t.detach().cpu().contiguous() for k, t in tensors.items()},
               pathlib.Path(directory, "adapter_model.bin"))
