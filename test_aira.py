# SPDX-License-Identifier: MIT
"""What aira.py claims, in its order: an example by hand, an independent oracle, then the edges.

The oracles share no code with it: brute force, Eckart-Young by numpy, dense matrices, autograd.
"""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, randn, tensor
from torch.optim import SGD, Adam, AdamW

import train_toy
from aira import (
    DAMPING,
    SAMPLE,
    SCALE,
    AiraLinear,
    Listener,
    aira_state_dict,
    apply_aira,
    greedy_ranks,
    knapsack_ranks,
    load_aira,
    merge_aira,
    outlier_mass,
    outlier_weighted_svd,
    remove_aira,
    save_peft,
    scale_tokens,
)

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("error")
every_init = pytest.mark.parametrize("init", ["svd_A", "svd"])
every_allocate = pytest.mark.parametrize("allocate", [greedy_ranks, knapsack_ranks])


class Conv1D(nn.Module):
    """Hugging Face's linear layer of GPT-2: weight (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Net(nn.Module):
    """in < out, in > out, no bias, a Conv1D, a layer with two names, and a head."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(10, 24)
        self.mix = Conv1D(24, 24)
        self.down = nn.Linear(24, 10, bias=False)
        self.shared = self.again = nn.Linear(10, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        x = x + self.down(torch.tanh(self.mix(F.gelu(self.up(x)))))
        return self.head(x + self.shared(self.again(x)))


BODY = ["up", "mix", "down", "shared"]


@pytest.fixture(autouse=True)
def seeded_and_in_float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def x():
    return inputs()


def inputs(n=96, width=10):
    """Tokens with correlated channels, one of them loud and one quiet."""
    x = randn(n, width) @ randn(width, width)
    x[:, 0] *= 10
    x[:, 1] *= 0.01
    return x


def adapt(model, x, rank=3, **options):
    return apply_aira(model, lambda: model(x), rank=rank, **options)


def adapters(model):
    """{name: adapter}"""
    return {name: m for name, m in model.named_modules() if isinstance(m, AiraLinear)}


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def size(model):
    """How many parameters train."""
    return sum(p.numel() for p in trainable(model))


def learn(model, x, y, steps=5, rate=0.05):
    """Some steps of training -> the loss after them."""
    optimizer = Adam(trainable(model), rate)
    order = torch.Generator()
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=order)
        optimizer.zero_grad()
        F.mse_loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return F.mse_loss(model(x), y).item()


def close(a, b, tolerance=1e-9):
    largest = float(b.detach().abs().max())
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * largest)


def bits(tensor):
    if tensor.is_meta:
        return None
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def fingerprint(model):
    """All of a model: modules, modes, hooks; tensors, flags, bits.  And the random state."""
    found = [bits(torch.get_rng_state())]
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = len(module._forward_hooks)
        found.append((name, id(module), module.training, hooks, sorted(vars(module))))
    for name, t in model.state_dict(keep_vars=True).items():
        found.append((name, id(t), t.requires_grad, bits(t)))
    return found


def refuses(model, words, call):
    """An error that has all the words, and leaves all as it was."""
    before = fingerprint(model)
    with pytest.raises((ValueError, TypeError, KeyboardInterrupt)) as caught:
        call()
    for word in words.split():
        assert word in str(caught.value)
    assert fingerprint(model) == before


# ---- 1. Listening ------------------------------------------------------------------------------


def test_three_tokens_by_hand():
    """(3, 4, 0) and (0, 0, 50) weigh the same, however loud the second; a silent one, nothing."""
    tokens = [
        [3.0, 4, 0],
        [0, 0, 50],
        [0, 0, 0],
    ]
    X, rms = scale_tokens(tensor(tokens))
    close(X, 3**0.5 * tensor([[0.6, 0.8, 0], [0, 0, 1]]))
    typical = (5 * 50 / 3) ** 0.5  # the geometric mean of 5 and 50, each over the root of 3
    close(rms, typical * 1.5**0.5 * tensor([0.6, 0.8, 1]))


def moments(x):
    """C of the tokens x (n, in), each at RMS 1."""
    x = F.normalize(x) * x.shape[1] ** 0.5
    return x.T @ x / len(x)


def test_a_long_stream_is_sampled_evenly_passed_by_position_or_by_name():
    """Three quarters of the tokens speak on channel 0, the last quarter on channel 1."""
    x = torch.eye(2).repeat_interleave(tensor([3 * SAMPLE, SAMPLE]), 0)
    listener = Listener(randn(9, 2))
    for batch in x.split(300):
        listener(None, [batch[None, :99]], {}, None)
        listener(None, [], {"input": batch[99:]}, None)
    assert listener.count == 4 * SAMPLE
    close(listener.tokens.sum(0) / SAMPLE, tensor([0.75, 0.25]), 0.08)


def test_in_half_precision_the_squares_of_loud_tokens_fit():
    loud = torch.full((8, 4), 3e4).half()
    assert scale_tokens(loud)[1].isfinite().all()


# ---- 2. Outlier-weighted SVD -------------------------------------------------------------------


@pytest.mark.parametrize("third, kept", [(1, [3.0, 0, 0]), (10, [0.0, 0, 1])])
def test_svd_by_hand_follows_the_loud_channel(third, kept):
    """W = diag(3, 2, 1): a plain SVD keeps the 3; with the third channel ten times louder, 1."""
    W = torch.diag(tensor([3.0, 2, 1]))
    B, A = outlier_weighted_svd(W, tensor([1.0, 1, third]), 1)
    close(B @ A, torch.diag(tensor(kept)))


def excess(W, rms, BA, rank):
    """The error over Eckart and Young's least, the singular values that rank r drops; the least."""
    sigma = np.linalg.svd((W * rms).numpy(), compute_uv=False)
    least = np.linalg.norm(sigma[rank:])
    return float(((W - BA) * rms).norm()) - least, least


@pytest.mark.parametrize("out, width, rank", [(12, 20, 1), (20, 12, 5), (9, 9, 9)])
def test_svd_reaches_the_eckart_young_optimum(out, width, rank):
    W = randn(out, width)
    rms = torch.rand(width) + 0.1
    B, A = outlier_weighted_svd(W, rms, rank)
    assert abs(excess(W, rms, B @ A, rank)[0]) < 1e-9
    close(B.square().sum(0), (A * rms).square().sum(1))  # both take the root of sigma


def test_large_svd_is_within_a_thousandth_of_the_optimum_and_repeatable():
    W = randn(500, 400)  # noise is hardest: its singular values are nearly equal
    rms = torch.rand(400) + 0.5
    B, A = outlier_weighted_svd(W, rms, 8)
    more, least = excess(W, rms, B @ A, 8)
    assert more < 1e-3 * least
    torch.manual_seed(123)  # the caller's random state does not matter
    assert torch.equal(outlier_weighted_svd(W, rms, 8)[1], A)


@pytest.mark.parametrize("loud", [1.0, 0.0])
def test_svd_edges(loud):
    """Channels that never fired have no say; if none fired, it is the plain SVD; half; ranks."""
    W = randn(8, 10).bfloat16()
    rms = loud * torch.ones(10)
    rms[2:5] = 0
    B, A = outlier_weighted_svd(W, rms, 3)
    more, least = excess(W.double(), rms if loud else 1 + rms, B @ A, 3)
    assert abs(more) < 1e-5 * least
    with pytest.raises(ValueError, match="rank=9.* 1 to 8"):
        outlier_weighted_svd(W, rms, 9)


# ---- 3. Ranks ----------------------------------------------------------------------------------


def test_outlier_mass_by_hand():
    W = tensor([[1.0, -2, 0], [3, 0.5, -1]])
    rms = tensor([1.0, 4, 2])
    # |W| rms = [[1, 8, 0], [3, 2, 2]], mean 2.67: only 8 is above twice that, 8 and 3 above once
    assert outlier_mass(W, rms) == 8
    assert outlier_mass(W.bfloat16(), rms, threshold=1) == 11


@every_allocate
def test_ranks_by_hand(allocate):
    """The 2nd unit is worth log 2 = .69 theta, the 3rd .41, the 4th .29; theta is 3 and 1."""
    assert allocate([3, 1], [1, 1], 4, 1, [9, 9]) == [3, 1]  # 2.08 and 1.22 against .69
    assert allocate([3, 1], [1, 1], 7, 1, [3, 9]) == [3, 4]  # the first may not have more
    assert allocate([0, 1], [1, 1], 9, 2, [9, 3]) == [6, 3]  # no importance: last, but not never
    assert allocate([0, 1], [1, 1], 5, 2, [9, 9]) == [2, 3]  # the least for all, whatever theta
    # at prices 2 and 3 three are left: greedy spends two, the best spends three
    best = [2, 1] if allocate is greedy_ranks else [1, 2]
    assert allocate([1.0, 1.4], [2, 3], 8, 1, [9, 9]) == best


@pytest.mark.parametrize("costs", [[2, 3, 5, 7], [4], [8192, 15104]])
@every_allocate
def test_knapsack_equals_brute_force_and_so_does_greedy_for_equal_costs(allocate, costs):
    rng = np.random.default_rng(0)
    for layers in 25 * [1, 2, 3, 4]:
        prices = rng.choice(costs, layers)
        largest = rng.integers(2, 7, layers)
        importance = rng.random(layers) ** 3
        budget = sum(prices) + rng.integers(4 * sum(prices))
        ranks = np.array(allocate(importance, prices, budget, 1, largest))
        left = budget - ranks @ prices
        assert 0 <= left < min(prices[ranks < largest], default=np.inf)  # nothing more fits
        if allocate is knapsack_ranks or len(costs) == 1:
            every = np.indices(largest).reshape(layers, -1).T + 1  # all that there are
            worth = np.log(every[every @ prices <= budget]) @ importance
            assert np.log(ranks) @ importance == pytest.approx(max(worth), rel=1e-9)


@every_allocate
def test_ranks_edges(allocate):
    """Prices without a common divisor would make too many coins: they are rounded up to larger."""
    costs = [99991, 100003]
    budget = 20 * sum(costs)
    ranks = allocate([1, 3], costs, budget, 1, [99, 99])
    assert 0.97 * budget < np.dot(ranks, costs) <= budget
    with pytest.raises(ValueError, match="budget=199993 .* 199994"):
        allocate([1, 3], costs, 199993, 1, [99, 99])


# ---- 4. The layer, and its amplified updates ---------------------------------------------------


def one_layer(base, x, **options):
    """The adapter of a layer that stands alone."""
    model = nn.Sequential(base)
    adapt(model, x, **options)
    return model[0]


def gain(layer):
    """G, by what becomes of A = 1."""
    layer = copy.deepcopy(layer)
    layer.lora_A.data = torch.eye(layer.lora_A.shape[1])
    return layer.factors()[1].detach()


@pytest.mark.parametrize("power", [0.5, 0, -0.25])
def test_gain_by_hand_turns_the_loud_channel_down(power):
    """The first of three channels is ten times louder; C is diagonal."""
    tokens = [
        [10.0, 1, 1],
        [10, -1, 1],
        [10, 1, -1],
        [10, -1, -1],
    ]
    layer = one_layer(nn.Linear(3, 3), tensor(tokens), rank=1, amplify=power)
    C = tensor([100, 1, 1]) / 34
    close(gain(layer), torch.diag((C + DAMPING) ** -power))


def dense_gain(x, power, k):
    """G by its definition: C's k largest eigenvalues, and for all the others their mean."""
    energies, Q = torch.linalg.eigh(moments(x))
    energies[:-k] = energies[:-k].mean()
    return Q * (energies + DAMPING) ** -power @ Q.T


@every_init
@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("Layer, width", [(Conv1D, 6), (nn.Linear, 8)])
def test_layer_is_the_base_plus_s_times_BA_less_its_start_times_G(Layer, width, rank, init):
    base = Layer(8, 6)
    x = inputs(width=width)
    W = (base(torch.eye(width)) - base.bias).T.detach()
    layer = one_layer(base, x, init=init, allocate=lambda *_: [rank])
    rms = moments(x).diagonal().sqrt()
    G = dense_gain(x, 1 / 2, min(2 * rank, width))
    A, B = layer.lora_A, layer.lora_B
    A0, B0 = layer.start_A, layer.start_B
    if init == "svd":  # both factors start at the best fit
        assert abs(excess(W, rms, SCALE * B0 @ A0 @ G, rank)[0]) < 1e-9
    else:  # A starts at V_r^T / s, of the SVD of W S; singular vectors have no sign
        V = torch.linalg.svd(W * rms)[2][:rank]
        close(A.T @ A, V.T @ V / SCALE**2)
        A0, B0 = 0 * A, 1 * B
    nn.init.normal_(A)
    nn.init.normal_(B)
    dW = SCALE * ((B0 + B) @ (A0 + A) - B0 @ A0) @ G
    close(layer(x), F.linear(x, W + dW, base.bias))
    close(layer.weight.T if Layer is Conv1D else layer.weight, W + dW)


def test_sgd_is_amplified_by_G_squared(x):
    """A step of A alone, and one of B alone, against the gradient of W by plain autograd."""
    target = x[:, :6]
    layer = one_layer(nn.Linear(10, 6), x)
    nn.init.normal_(layer.lora_B)
    W = layer.weight.detach().requires_grad_()
    F.mse_loss(F.linear(x, W, layer.bias), target).backward()

    def moved(name):
        one = copy.deepcopy(layer)
        F.mse_loss(one(x), target).backward()
        SGD([getattr(one, name)], 0.01).step()
        return one.weight - layer.weight

    B, A = layer.factors()
    G = gain(layer)
    close(moved("lora_A"), -0.01 * B @ B.T @ W.grad @ G @ G)  # s is in B
    close(moved("lora_B"), -0.01 * SCALE**2 * W.grad @ A.T @ A)


@every_init
def test_weight_decay_alone_leaves_the_pretrained_function(net, x, init):
    before = net(x)
    adapt(net, x, init=init)
    (net(x) * 0).sum().backward()
    AdamW(trainable(net), 0.1, weight_decay=5.0).step()
    assert torch.equal(net(x), before)


@every_init
def test_every_unit_of_rank_can_train(net, x, init):
    """lora_B from the first step and lora_A after it, in a zero-initialised layer, too."""
    net.shared.weight.data.zero_()
    adapt(net, x, init=init)
    for wanted, dim in (("lora_B", 0), ("lora_A", 1)):
        net.zero_grad()
        net(x).square().mean().backward()
        for name in (*BODY, "head"):
            assert getattr(net.get_submodule(name), wanted).grad.any(dim).all()
        for p in trainable(net):
            p.data -= 0.05 * p.grad


def add_lora(model, rank):
    """LoRA by hand, at alpha = rank; nn.Linear starts as LoRA's A does."""
    for layer in model.requires_grad_(False)[::2]:
        layer.A = nn.Linear(layer.in_features, rank, bias=False)
        layer.B = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(layer.B.weight)
        layer.register_forward_hook(lambda m, x, y: y + m.B(m.A(*x)))


@pytest.mark.parametrize("rate", [0.01, 0.02])
def test_aira_learns_faster_than_lora_at_the_same_rate(rate):
    """The claim, in seconds: five small nets that know a task learn another, on normalised inputs
    with a loud mean and a decaying spectrum, as transformers have.  The real one: train_toy.py."""
    ratios = []
    for number in range(5):
        torch.manual_seed(number)
        x = randn(1024, 32) * torch.logspace(1, -1, 32) + 3 * randn(32)
        x = F.layer_norm(x, (32,))
        ours, old, new = (
            nn.Sequential(
                nn.Linear(32, 64),
                nn.GELU(),
                nn.Linear(64, 64),
                nn.GELU(),
                nn.Linear(64, 8),
            )
            for _ in range(3)
        )
        learn(ours, x, old(x).detach(), 300, 0.003)
        target = (old(x) + new(x)).detach()
        theirs = copy.deepcopy(ours)
        adapt(ours, x, rank=4)
        add_lora(theirs, 4)
        ratios.append(learn(ours, x, target, 40, rate) / learn(theirs, x, target, 40, rate))
    assert np.mean(ratios) < 0.95
    assert sorted(ratios)[3] < 1  # of four at least


# ---- 5. apply_aira -----------------------------------------------------------------------------


@every_init
@pytest.mark.parametrize("tokens, channels", [(96, 10), (1, 10), (96, 2), (96, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_it_starts_as_the_base_bit_for_bit_and_trains(net, x, dtype, tokens, channels, init):
    """Also if it heard one token, few channels, or only silence."""
    net, x = net.to(dtype), x.to(dtype)
    before = net(x)
    heard = x[:tokens] * (torch.arange(10) < channels)
    adapt(net, heard, init=init)
    assert bits(net(x)) == bits(before)
    assert net.up.lora_A.dtype == torch.promote_types(dtype, torch.float32)
    learn(net, x, 0 * before.detach())
    assert 0.01 < (net(x) - before).abs().max() < 100


def test_no_calibration_is_warned_of(net):
    with pytest.warns(UserWarning, match="no calibrate"):
        apply_aira(net)


def test_report_is_a_table_of_what_was_done(net, x):
    report = adapt(net, x, rank=4, also_train="head")
    spent = size(net) - 33
    budget = 4 * (34 + 48 + 34 + 20)
    assert 0.9 * budget < spent <= budget
    _, up, *_, shared, trained, _, last = report.splitlines()
    assert up.split()[:5] == ["up", "24", "x", "10", "96"]
    assert "192" in shared  # it is called twice
    assert {f"{spent:,}", "33"} < set(trained.split())
    assert "shared" in last


def test_outliers_bring_rank_and_one_layer_cannot_take_it_all():
    """Of four equal layers one has a weight that counts a thousandfold."""
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(4)))
    model[2].weight.data[3, 4] = 1000
    model.forward = lambda x: [layer(x) for layer in model]
    adapt(model, randn(200, 20))
    ranks = [len(layer.lora_A) for layer in model]
    assert max(ranks) == ranks[2] == 6 > ranks[3]


CHOICES = [
    ({}, [*BODY, "head", "1"]),
    ({"targets": "0"}, [*BODY, "head"]),
    ({"targets": ["up", "0.mix", "2"]}, ["up", "mix", "2"]),
    ({"exclude": ("down", "0.head", "1")}, ["up", "mix", "shared"]),
    ({"also_train": ["0.head", "1"]}, BODY),
    ({"also_train": ["0.head", "1", "again"]}, ["up", "mix", "down"]),  # "shared" by another name
]


@pytest.mark.parametrize("options, names", CHOICES)
def test_names_are_chosen_by_parts_and_heads_and_tied_weights_left_alone(net, x, options, names):
    model = nn.Sequential(net, *(nn.Linear(3, 3) for _ in range(3)), nn.Embedding(3, 3))
    model.get_output_embeddings = lambda: model[2]
    model[3].weight = model[4].weight
    apply_aira(model, lambda: model[:4](x), **options)
    assert [name.removeprefix("0.") for name in adapters(model)] == names


def test_what_reads_a_weight_and_calls_no_layer_finds_the_adapted_one():
    """nn.TransformerEncoderLayer in eval mode; what its attention reads is reported as frozen."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0)
    x = randn(9, 5, 8)
    report = adapt(model.eval(), x)
    assert not model.linear1.training
    assert "(2): self_attn.in_proj_weight, self_attn.out_proj.weight\n" in report
    nn.init.normal_(model.linear1.lora_B)
    slow = model(x)
    with torch.no_grad():
        close(model(x), slow)


def test_an_interrupted_calibration_leaves_modes_hooks_and_random_state(x):
    model = nn.Sequential(nn.Linear(10, 10), nn.Dropout(0.5), nn.BatchNorm1d(10))
    model[1].eval()

    def calibrate():
        assert not any(module.training for module in model.modules())
        assert not model(x).requires_grad
        model.train()
        raise KeyboardInterrupt

    refuses(model, "", lambda: apply_aira(model, calibrate))


REFUSED = {  # the words that the error must have; options, or the weight of "down"
    "targets 'q_prj' 'up'": {"targets": ["up", "q_prj"]},
    "targets 'p' 'up'": {"targets": "p"},  # the end of a word is not the end of a name
    "exclude 'nrom' 'up'": {"exclude": "nrom"},
    "also_train 'haed' 'head'": {"also_train": "haed"},
    "no left exclude": {"exclude": [*BODY, "head"]},
    "'pissa' 'svd_A'": {"init": "pissa"},
    "ranks 1 max_ranks": {"rank": 0},
    "amplify=nan": {"amplify": np.nan},
    "calibrate list lambda": {"calibrate": []},
    "'up' never calibrate generator": {"calibrate": lambda: (yield)},
    "importance nan batches": {"importance": lambda W, rms: np.nan},
    "importance -1 negative": {"importance": lambda W, rms: -1},
    "zip": {"allocate": lambda *_: [1]},
    "'down' NaN exclude": {"weight": torch.full((10, 24), np.nan)},
    "'down' int8 exclude": {"weight": torch.ones(10, 24, dtype=torch.int8)},
    "'down' elsewhere load": {"weight": torch.ones(10, 24, device="meta")},
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_input_is_named_and_changes_nothing(net, x, words):
    options = {"calibrate": lambda: net(x), **REFUSED[words]}
    weight = options.pop("weight", net.down.weight)
    net.down.weight = nn.Parameter(weight, requires_grad=False)
    refuses(net, words, lambda: apply_aira(net, **options))


@pytest.mark.parametrize("factor", [np.nan, np.inf, 1e200])
def test_inputs_without_a_loudness_are_named(net, x, factor):
    refuses(net, "NaN 'up' batches", lambda: adapt(net, x * factor))


def test_models_with_other_additions_are_refused(net, x):
    adapt(net, x)
    refuses(net, "adapters remove_aira", lambda: adapt(net, x))
    remove_aira(net)
    net.head.peft_config = {}
    refuses(net, "PEFT unload()", lambda: adapt(net, x))


# ---- 6. Save, load, remove, merge, export ------------------------------------------------------


def random_model(rng):
    """Random depth, widths, nesting, and names that adapters have, too."""
    model = nn.Sequential()
    width = 10
    for name in rng.sample(["lora_A", "base", "weird-name", "0", "é"], rng.randint(1, 5)):
        out = rng.choice([1, 3, 6, 9, 16])
        layer = rng.choice([Conv1D(out, width), nn.Linear(width, out, bias=False)])
        model.add_module(name, rng.choice([layer, nn.Sequential(layer)]))
        width = out
    return model


@pytest.mark.parametrize("number", range(40))
def test_trained_in_eval_reloaded_merged_it_is_one_function_and_removed_the_base(x, number):
    rng = random.Random(number)
    model = random_model(rng) if number > 1 else Net()
    base = copy.deepcopy(model)
    before = fingerprint(model)
    rank = rng.randint(1, 9)
    adapt(
        model,
        x,
        rank,
        init=["svd_A", "svd"][number % 2],
        allocate=rng.choice([knapsack_ranks, greedy_ranks]),
        amplify=rng.random() - 0.5,
    )
    assert size(model) <= rank * sum(sum(a.weight.shape) for a in adapters(model).values())
    learn(model, x, 1 + 0 * model(x).detach())
    output = model(x)
    close(model.eval()(x), output)
    merged = copy.deepcopy(model)
    merge_aira(merged)
    close(merged(x), output)
    assert list(map(type, merged.modules())) == list(map(type, base.modules()))
    load_aira(base, aira_state_dict(model))
    assert bits(base(x)) == bits(output)
    remove_aira(model.train())
    assert fingerprint(model) == before


def test_also_train_is_saved_reloaded_and_taken_back(net, x):
    base = nn.Sequential(net, nn.BatchNorm1d(3), nn.Linear(3, 3))
    base[2].bias.requires_grad_(False)
    model = copy.deepcopy(base)
    before = fingerprint(model)
    adapt(model, x, also_train=["1", "2"])
    learn(model, x, x[:, :3])
    state = aira_state_dict(model)
    kept = copy.deepcopy(state)
    load_aira(base, state)
    close(base(x), model(x))
    learn(base, x, x[:, :3])
    torch.testing.assert_close(state, kept, rtol=0, atol=0)  # training on leaves the file
    head = base[2].weight.clone()
    merge_aira(base)
    assert torch.equal(base[2].weight, head)
    remove_aira(model)
    assert fingerprint(model) == before


def test_merge_rounds_once_and_refuses_a_diverged_run(net, x):
    layer = net.bfloat16().mix
    adapt(net, x.bfloat16())
    nn.init.normal_(net.mix.lora_B)
    B, A = net.mix.factors()
    wanted = (layer.weight + (B @ A).T).bfloat16()
    net.up.lora_B.data += np.inf
    refuses(net, "'up' diverged", lambda: merge_aira(net))
    net.up.lora_B.data.zero_()
    merge_aira(net)
    assert net.mix is layer
    assert torch.equal(layer.weight, wanted)
    refuses(net, "adapters apply_aira", lambda: merge_aira(net))


BROKEN = {  # a tensor of the file, and what becomes of its shape; None: it is missing
    "'up' lora_B": ("up.lora_B", None),
    "'up.lora_B' (24,": ("up.lora_A", None),
    "'up' fit": ("up.lora_B", (1, 4)),
    "'up' not": ("up.directions", (4, 9)),
    "'head.bias' (7,)": ("head.bias", (7,)),
    "'side.bias' (7,)": ("side.bias", (7,)),
}


@pytest.mark.parametrize("words", BROKEN)
def test_a_broken_file_is_named_and_changes_nothing(net, x, words):
    base = Net()
    adapt(net, x, also_train="head")
    state = aira_state_dict(net)
    key, shape = BROKEN[words]
    broken = {**state, key: torch.zeros(shape or 1)}
    if shape is None:
        del broken[key]
    refuses(base, words, lambda: load_aira(base, broken))
    refuses(base, "dict 'a.pt'", lambda: load_aira(base, "a.pt"))
    refuses(base, "tensors 'state'", lambda: load_aira(base, {"state": state}))
    refuses(base, "no adapters", lambda: load_aira(base, {"head.bias": state["head.bias"]}))
    load_aira(base, state)  # whereas the whole file does
    refuses(base, "adapters", lambda: load_aira(base, state))


@pytest.mark.parametrize("targets, also_train", [("shared", ()), ("up", "head")])
def test_export_refuses_what_peft_would_confuse(net, x, targets, also_train, tmp_path):
    """It knows modules by the ends of their names, and would adapt a shared one in one place."""
    net.overhead = nn.Identity()
    adapt(net, x, targets=targets, also_train=also_train)
    refuses(net, "PEFT merge_aira", lambda: save_peft(net, tmp_path))
    assert not list(tmp_path.iterdir())


# ---- train_toy.py ------------------------------------------------------------------------------


def toy_run(*curve):
    return train_toy.Run(None, curve, curve[-1], 0, 0.0, 0.0)


def test_toy_steps_to_a_loss_are_linear_between_tests():
    run = toy_run(3.0, 2.0, 1.0)
    assert train_toy.steps_to(1.5, run, steps=30) == 25
    assert train_toy.steps_to(0.5, run, steps=30) == np.inf


def test_toy_repeating_the_windows_of_a_file_makes_no_smaller_error():
    values = np.array([1.0, 2, 4, 9])
    files = np.arange(4)
    alone = train_toy.clustered_error(values, files)
    assert alone == pytest.approx(values.std() / 2)
    assert train_toy.clustered_error(values.repeat(3), files.repeat(3)) == alone


@pytest.mark.parametrize("diverges, best", [(0.6, 0.256), (0.01, 0.008)])
def test_toy_search_ends_with_the_best_rate_inside_and_never_with_a_diverged_one(
    monkeypatch, diverges, best
):
    tried = []

    def run(job):  # without the divergence .256 would be best
        tried.append(job.rate)
        return toy_run(np.nan if job.rate > diverges else abs(np.log2(job.rate / 0.256)))

    monkeypatch.setattr(train_toy, "run", run)
    _, job = train_toy.search(train_toy.Job("gpt", "smoke", None, "AIRA", {}, 0.016))
    assert job.rate == best
    assert {best / 2, best * 2} < set(tried)
