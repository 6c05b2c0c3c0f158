# SPDX-License-Identifier: MIT
"""What aira.py claims, in its order: an example by hand, an independent oracle, then the edges.

The oracles share no code with it: numpy's SVD, dense matrices, brute force, plain autograd.
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, randn, tensor

import aira
import train_toy
from aira import (
    DAMPING,
    SAMPLE,
    Recorder,
    aira_state_dict,
    apply_aira,
    greedy_ranks,
    knapsack_ranks,
    load_aira,
    merge_aira,
    normalise,
    outlier_mass,
    outlier_share,
    outlier_weighted_svd,
    remove_aira,
    shrink_directions,
)

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("error")
every_init = pytest.mark.parametrize("init", ["svd_A", "svd"])
every_allocate = pytest.mark.parametrize("allocate", [greedy_ranks, knapsack_ranks])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(a, b, tolerance=1e-5):
    """Equal up to rounding, relative to b's largest entry."""
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.detach().abs().max()))


# ---- 1. Activations ----------------------------------------------------------------------------


def test_three_inputs_by_hand():
    """(3, 4, 0) and (0, 0, 50) weigh the same, though one is ten times larger; zeros, nothing."""
    X, rms = normalise(tensor([[3.0, 4, 0], [0, 0, 50], [0, 0, 0]]))
    close(X, 3**0.5 * tensor([[0.6, 0.8, 0], [0, 0, 1]]))
    typical = (5 * 50 / 3) ** 0.5  # the geometric mean of 5 and 50, each over the root of 3
    close(rms, typical * 1.5**0.5 * tensor([0.6, 0.8, 1]))
    assert normalise(torch.full((8, 4), 3e4).half())[1].isfinite().all()  # its square is not


def test_a_long_stream_is_sampled_evenly_passed_by_position_or_by_name():
    """Three quarters of the inputs are on channel 0, the last quarter on channel 1."""
    x = torch.eye(2).repeat_interleave(tensor([3 * SAMPLE, SAMPLE]), 0)
    recorder = Recorder(randn(9, 2))
    for batch in x.split(300):
        recorder(None, [batch[None, :99]], {}, None)
        recorder(None, [], {"input": batch[99:]}, None)
    assert len(recorder.inputs) == SAMPLE
    close(recorder.inputs.mean(0), tensor([0.75, 0.25]), 0.08)


# ---- 2. Outlier-weighted SVD -------------------------------------------------------------------


@pytest.mark.parametrize("third, kept", [(1.0, [3.0, 0, 0]), (10.0, [0.0, 0, 10])])
def test_svd_by_hand_follows_the_large_channel(third, kept):
    """W = diag(3, 2, 1): a plain SVD keeps the 3; with the third channel ten times larger, 1."""
    W = torch.diag(tensor([3.0, 2, 1]))
    U, sigma, Vt = outlier_weighted_svd(W, tensor([1.0, 1, third]), rank=1)
    close(U * sigma @ Vt, torch.diag(tensor(kept)))


def weighted_error(W, S, rank):
    """The error ||(W - L R) diag(S)||, and the least there is: numpy's sigmas beyond rank."""
    U, sigma, Vt = outlier_weighted_svd(W, S, rank)
    every_sigma = np.linalg.svd((W * S).numpy(), compute_uv=False)
    return float(((W - U * sigma @ (Vt / S)) * S).norm()), np.linalg.norm(every_sigma[rank:])


@pytest.mark.parametrize("out, width, rank", [(12, 20, 1), (20, 12, 5), (9, 9, 9)])
def test_svd_reaches_the_eckart_young_optimum(out, width, rank):
    error, least = weighted_error(randn(out, width), torch.rand(width) + 0.1, rank)
    assert error == pytest.approx(least, rel=1e-3, abs=1e-4)


def test_large_svd_is_within_a_hundredth_of_the_optimum_and_repeatable():
    W, S = randn(500, 400), torch.rand(400) + 0.5  # noise is hardest: its sigmas are alike
    error, least = weighted_error(W, S, 8)
    assert error < 1.01 * least
    before = torch.get_rng_state()
    assert torch.equal(outlier_weighted_svd(W, S, 8)[2], outlier_weighted_svd(W, S, 8)[2])
    assert torch.equal(torch.get_rng_state(), before)


# ---- 3. Ranks ----------------------------------------------------------------------------------


def test_outliers_by_hand():
    W = tensor([[1.0, -2, 0], [3, 0.5, -1]])
    rms = tensor([1.0, 4, 2])
    # |W| rms = [[1, 8, 0], [3, 2, 2]], mean 2.67: only 8 is above twice that
    assert outlier_mass(W.bfloat16(), rms) == 8
    assert outlier_share(W, rms) == pytest.approx(1 / 6)


@every_allocate
def test_ranks_by_hand(allocate):
    """The 2nd unit is worth log 2 = .69 theta, the 3rd .41, the 4th .29; theta is 3 and 1."""
    assert allocate([3, 1], [1, 1], 4, 1, [9, 9]) == [3, 1]  # 2.08 and 1.22 against .69
    assert allocate([3, 1], [1, 1], 7, 1, [3, 9]) == [3, 4]  # the first may not have more
    assert allocate([0, 1], [1, 1], 9, 2, [9, 3]) == [6, 3]  # no importance: last, but not never
    # at prices 2 and 3 three are left: greedy spends two, the best spends three
    best = [2, 1] if allocate is greedy_ranks else [1, 2]
    assert allocate([1.0, 1.4], [2, 3], 8, 1, [9, 9]) == best


@every_allocate
@pytest.mark.parametrize("costs", [[2, 3, 5, 7], [4], [8192, 15104]])
def test_knapsack_equals_brute_force_and_so_does_greedy_for_equal_costs(allocate, costs):
    rng = np.random.default_rng(0)
    for layers in 15 * [1, 2, 3, 4]:
        prices = rng.choice(costs, layers)
        most = rng.integers(2, 7, layers)
        theta = rng.random(layers) ** 3
        budget = sum(prices) + rng.integers(4 * sum(prices))
        ranks = np.array(allocate(theta, prices, budget, 1, most))
        left = budget - ranks @ prices
        assert 0 <= left < min(prices[ranks < most], default=np.inf)  # nothing more fits
        if allocate is knapsack_ranks or len(costs) == 1:
            every = np.indices(most).reshape(layers, -1).T + 1  # all ranks that there are
            affordable = every[every @ prices <= budget]
            best = max(np.log(affordable) @ theta)
            assert np.log(ranks) @ theta == pytest.approx(best, rel=1e-9)


@every_allocate
@pytest.mark.parametrize("theta, budget", [([1, 3], 3), ([1, np.nan], 99), ([1, -1], 99)])
def test_ranks_are_refused_without_a_budget_or_with_an_importance_of_nan(allocate, theta, budget):
    with pytest.raises(ValueError, match="budget=3|nan|-1"):
        allocate(theta, [2, 2], budget, 1, [9, 9])


# ---- 4. The layer: its start and its gains -----------------------------------------------------


def one_layer(base, x, **options):
    """The adapter of a layer that stands alone."""
    model = nn.Sequential(base)
    apply_aira(model, lambda: model(x), **options)
    return model[0]


@pytest.mark.parametrize("amplify, gains", [(0.5, [1.5, 0.5]), (0, [1, 1])])
def test_gains_by_hand(amplify, gains):
    """sigma = 9 and 1: their roots are 3 and 1, 2 in the mean; so 3/2 and 1/2, times SCALE."""
    base = nn.Linear(2, 2)
    base.weight.data = torch.diag(tensor([9.0, 1]))
    layer = one_layer(base, torch.eye(2), allocate=lambda *_: [2], amplify=amplify)
    close(layer.gains, aira.SCALE * tensor(gains))
    close(layer.lora_A.abs(), torch.eye(2))


def test_shrink_directions_by_hand():
    """The first of four channels is ten times larger: energies 4 * 100 / 103 and 4 / 103."""
    signs = tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    X, _ = normalise(signs * tensor([10.0, 1, 1, 1]))
    P = shrink_directions(X, 1)
    d = ((400 / 103 + DAMPING) / (4 / 103 + DAMPING)) ** 0.5
    close(torch.eye(4) - P.T @ P, torch.diag(tensor([1 / d, 1, 1, 1])))


def correlated(n=96, width=10):
    """Inputs with a large channel, a small one, and a large mean."""
    x = randn(n, width) @ randn(width, width) + 3 * randn(width)
    x[:, 0] *= 10
    x[:, 1] *= 0.01
    return x


def dense(x, k):
    """(C + DAMPING)^-1/2 by its definition, at 1 where C has not its k largest eigenvalues."""
    X = F.normalize(x) * x.shape[1] ** 0.5
    energy, Q = torch.linalg.eigh(X.T @ X / len(X))
    energy[:-k] = energy[:-k].mean()
    return Q * ((energy[0] + DAMPING) / (energy + DAMPING)).sqrt() @ Q.T


@pytest.mark.parametrize("k", [1, 4])
def test_shrink_directions_whiten(k):
    x = correlated()
    P = shrink_directions(normalise(x)[0], k)
    close(torch.eye(10) - P.T @ P, dense(x, k), 1e-3)


class Conv1D(nn.Module):
    """Hugging Face's linear layer of GPT-2: weight (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


@every_init
@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("Layer", [Conv1D, nn.Linear])
def test_layer_is_what_its_formula_says(Layer, rank, init):
    """y = W x + (B diag(g) A - B0 diag(g) A0) (I - P^T P) x, all dense; dense SVDs, too."""
    base = Layer(6, 8) if Layer is Conv1D else Layer(8, 6)
    x = correlated(width=8)
    W = (base(torch.eye(8)) - base.bias).T.detach()
    layer = one_layer(base, x, rank=2, init=init, allocate=lambda *_: [rank])
    assert torch.equal(layer(x), base(x))
    _, S = normalise(x)
    U, sigma, Vt = torch.linalg.svd(W * S)
    U, sigma, Vt = U[:, :rank], sigma[:rank], Vt[:rank]
    A0, B0, g = layer.lora_A.detach().clone(), layer.lora_B.detach().clone(), layer.gains
    close(g, aira.SCALE * sigma**0.5 / (sigma**0.5).mean(), 1e-3)
    if init == "svd":
        even = torch.eye(8)
        close((B0 * g @ A0) * S, U * sigma @ Vt, 1e-3)
    else:
        even = dense(x, 4)
        close(A0.T @ A0, Vt.T @ Vt, 1e-3)  # singular vectors have no sign
        assert not B0.any()

    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    change = (layer.lora_B * g @ layer.lora_A - B0 * g @ A0) @ even
    close(layer(x), F.linear(x, W + change, base.bias), 1e-3)
    close(layer.weight.T if Layer is Conv1D else layer.weight, W + change, 1e-3)
    B, A = layer.factors()
    close(B @ A, change, 1e-3)


def gradients(layer, x, y):
    layer.zero_grad()
    F.mse_loss(layer(x), y).backward()
    return layer.lora_A.grad, layer.lora_B.grad


def test_gradients_of_a_component_are_its_gain_times_those_of_plain_lora():
    """The plain LoRA has the same A and B diag(g), on inputs (I - P^T P) x; by plain autograd."""
    x, y = correlated(width=8), randn(96, 6)
    layer = one_layer(nn.Linear(8, 6), x, rank=2, allocate=lambda *_: [4])
    nn.init.normal_(layer.lora_B)
    A = layer.lora_A.detach().clone().requires_grad_()
    B = (layer.lora_B.detach() * layer.gains).requires_grad_()
    F.mse_loss(layer.base_layer(x) + x @ dense(x, 4) @ A.T @ B.T, y).backward()
    of_A, of_B = gradients(layer, x, y)
    close(of_A, A.grad, 1e-3)  # g is in B already
    close(of_B, B.grad * layer.gains, 1e-3)


@pytest.mark.parametrize("amplify", [0, 0.5, 1])
def test_adam_keeps_the_gain(amplify):
    """Adam's first step changes all entries of B alike, and W by g_i along component i."""
    x, y = correlated(width=8), randn(96, 6)
    layer = one_layer(nn.Linear(8, 6), x, rank=2, allocate=lambda *_: [4], amplify=amplify)
    gradients(layer, x, y)
    before = layer.weight.detach()
    torch.optim.Adam([layer.lora_B], 0.01).step()
    moved = (layer.weight - before) @ torch.linalg.inv(dense(x, 4)) @ layer.lora_A.T  # (out, r)
    close(moved.abs().mean(0), 0.01 * layer.gains, 1e-2)


@every_init
@pytest.mark.parametrize("rank", [0, 1])
def test_every_component_trains_in_a_layer_of_lower_rank_too(init, rank):
    x = correlated()
    base = nn.Linear(10, 10)
    base.weight.data = randn(10, rank) @ randn(rank, 10)
    layer = one_layer(base, x, rank=3, init=init)
    assert layer.gains.min() > 0.05 * layer.gains.max()
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], 0.05)
    for _ in range(2):
        of_A, of_B = gradients(layer, x, randn(96, 10))
        optimizer.step()
    assert of_B.any(0).all() and of_A.any(1).all()


# ---- 5. apply_aira -----------------------------------------------------------------------------


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


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def x():
    return correlated()


def adapt(model, x, rank=3, **options):
    return apply_aira(model, lambda: model(x), rank=rank, **options)


def learn(model, x, y, steps=5, rate=0.05):
    """Some steps of training -> the loss after them."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return F.mse_loss(model(x), y).item()


def everything(model):
    """All that a failed call could change: modules, modes, hooks, flags, tensors."""
    found = []
    for name, module in model.named_modules(remove_duplicate=False):
        found.append((name, id(module), module.training, len(module._forward_hooks)))
    for name, t in model.state_dict(keep_vars=True).items():
        found.append((name, id(t), t.requires_grad, t.tolist()))
    return found


LETTERS = {"init": "svd", "importance": outlier_share}


@pytest.mark.parametrize("options", [{}, {"init": "svd"}, LETTERS, {"amplify": 0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_it_starts_as_the_base_bit_for_bit_and_trains(net, x, dtype, options):
    net, x = net.to(dtype), x.to(dtype)
    before = net(x)
    ranks = adapt(net, x, **options)
    assert list(ranks) == [*BODY, "head"]
    assert torch.equal(net(x), before)
    assert net.up.lora_A.dtype == net.up.gains.dtype == torch.float32
    learn(net, x, 0 * before.detach(), rate=0.002)
    assert 0.01 < (net(x) - before).abs().max() < 100


@every_allocate
def test_the_budget_is_what_lora_trains_and_outliers_bring_rank(allocate):
    """Of four equal layers one has a weight that counts a thousandfold; its bound is twice 3."""
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(4)))
    model[2].weight.data[3, 4] = 1000
    model.forward = lambda x: [layer(x) for layer in model]
    ranks = list(adapt(model, randn(200, 20), allocate=allocate).values())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(ranks) * 40 <= 4 * 3 * 40
    assert max(ranks) == ranks[2] == 6 > ranks[3]


CHOICES = [
    ({}, [*BODY, "head", "1"]),
    ({"targets": "0"}, [*BODY, "head"]),
    ({"targets": ["up", "0.mix", "2"]}, ["up", "mix", "2"]),
    ({"exclude": ("down", "0.head", "1"), "also_train": None}, ["up", "mix", "shared"]),
    ({"also_train": (name for name in ["0.head", "1"])}, BODY),
]


@pytest.mark.parametrize("options, names", CHOICES)
def test_names_are_chosen_by_parts_and_heads_and_tied_weights_left_alone(net, x, options, names):
    model = nn.Sequential(net, *(nn.Linear(3, 3) for _ in range(3)), nn.Embedding(3, 3))
    model.get_output_embeddings = lambda: model[2]
    model[3].weight = model[4].weight
    ranks = apply_aira(model, lambda: model[:4](x), **options)
    assert [name.removeprefix("0.") for name in ranks] == names
    if options.get("also_train"):
        assert model[0].head.weight.requires_grad


def test_layers_that_calibration_did_not_reach_get_rank_1_and_one_warning(net, x):
    """Experts without an input, or with zeros only, as inputs that were padded."""
    model = nn.ModuleDict({"net": net, "expert": nn.Linear(10, 10), "silent": nn.Linear(10, 10)})
    with pytest.warns(UserWarning, match="'expert', 'silent'.*rank 1"):
        ranks = apply_aira(model, lambda: (net(x), model["silent"](0 * x)))
    assert ranks["expert"] == ranks["silent"] == 1
    assert len(model["expert"].shrink) == 0
    learn(model["expert"], x, x)


def test_what_reads_a_weight_and_calls_no_layer_finds_the_adapted_one():
    """nn.TransformerEncoderLayer in eval mode; its attention's out_proj is a subclass."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0)
    x = randn(9, 5, 8)
    assert list(adapt(model.eval(), x)) == ["linear1", "linear2"]
    assert not model.linear1.training
    nn.init.normal_(model.linear1.lora_B)
    slow = model(x)
    with torch.no_grad():
        close(model(x), slow)
    with pytest.raises(ValueError, match="targets.*'out_proj'"):
        adapt(nn.TransformerEncoderLayer(8, 2, 16), x, targets="out_proj")


def test_an_interrupted_calibration_leaves_modes_hooks_and_random_state(x):
    model = nn.Sequential(nn.Linear(10, 10), nn.Dropout(0.5), nn.BatchNorm1d(10))
    model[1].eval()

    def calibrate():
        assert not any(module.training for module in model.modules())
        assert not model(x).requires_grad
        model.train()
        raise KeyboardInterrupt

    before = everything(model), torch.get_rng_state().tolist()
    with pytest.raises(KeyboardInterrupt):
        apply_aira(model, calibrate)
    assert (everything(model), torch.get_rng_state().tolist()) == before


NAN = Net()
NAN.down.weight.data[3, 4] = np.nan
REFUSED = [  # what the error must name; the options, or the model
    ("targets.*'q_prj'.*'up'", {"targets": ["up", "q_prj"]}),
    ("targets.*'p'.*'up'", {"targets": "p"}),  # the end of a word is not the end of a name
    ("exclude.*'nrom'.*'up'", {"exclude": "nrom"}),
    ("also_train.*'haed'.*'head'", {"also_train": "haed"}),
    ("no Linear", {"exclude": [*BODY, "head"]}),
    ("no Linear.*Bilinear", {"model": nn.Sequential(nn.Bilinear(10, 10, 9))}),
    ("no Linear", {"model": nn.Linear(10, 10)}),  # it is no part of a model
    ("'pissa'.*'svd_A'", {"init": "pissa"}),
    ("1 or more", {"rank": 0}),
    ("none of the layers", {"calibrate": lambda: (yield)}),
    ("nan", {"importance": lambda W, rms: np.nan}),
    ("NaN.*'down'", {"model": NAN}),
]


@pytest.mark.parametrize("words, options", REFUSED)
def test_bad_input_is_named_and_changes_nothing(x, words, options):
    model = options.get("model", Net())
    before = everything(model)
    options = {"calibrate": lambda: model(x), "model": model, **options}
    with pytest.raises((ValueError, TypeError), match=words):
        apply_aira(**options)
    assert str(everything(model)) == str(before)  # as text, because NaN is not NaN


@pytest.mark.parametrize("factor", [np.nan, np.inf, 1e30])
def test_inputs_without_a_size_are_named(net, x, factor):
    with pytest.raises(ValueError, match="NaN.*'up'"):
        adapt(net, x * factor)


# ---- 6. Remove, merge, save, load --------------------------------------------------------------


@every_init
@pytest.mark.parametrize("rank", [1, 9])
@pytest.mark.parametrize("batch", [1, 96])
def test_trained_reloaded_merged_it_is_one_function_and_removed_the_base(net, x, init, rank, batch):
    base, x = copy.deepcopy(net), x[:batch]
    before = {key: t.clone() for key, t in net.state_dict().items()}
    adapt(net, x, rank, init=init, allocate=knapsack_ranks)
    learn(net, x, 1 + net(x).detach())
    output = net(x)
    merged = copy.deepcopy(net)
    merge_aira(merged)
    close(merged(x), output)
    assert list(map(type, merged.modules())) == list(map(type, base.modules()))
    state = aira_state_dict(net)
    load_aira(base, state)
    assert torch.equal(base(x), output)
    kept = copy.deepcopy(state)
    for model in (base, net):
        learn(model, x, 2 + output.detach())
    torch.testing.assert_close(state, kept, rtol=0, atol=0)  # training on leaves the file
    remove_aira(net)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_all_that_trains_is_saved_and_loads_on_the_bare_model(net, x):
    """also_train, a bias that the user lets train, and BatchNorm's statistics, which move."""
    model = nn.Sequential(nn.BatchNorm1d(10), net, nn.BatchNorm1d(3), nn.Linear(3, 3))
    bare = copy.deepcopy(model)
    adapt(model, x, targets="up", also_train=["2", "3"])
    model[1].up.base_layer.bias.requires_grad_(True)
    frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
    learn(model, x, x[:, :3])
    state = aira_state_dict(model)
    assert {"1.up.bias", "0.running_mean", "2.weight", "2.running_var", "3.bias"} < set(state)
    assert not frozen & set(state) and all(t.device.type == "cpu" for t in state.values())
    model[2:].requires_grad_(False)  # what also_train named is known
    assert aira_state_dict(copy.deepcopy(model)).keys() == state.keys()
    model[2:].requires_grad_(True)
    load_aira(bare, state)
    with pytest.raises(ValueError, match="frozen.*before"):
        aira_state_dict(copy.deepcopy(model).requires_grad_(False))
    trained = {key for key, p in bare.named_parameters() if p.requires_grad}
    assert trained == {key for key, p in model.named_parameters() if p.requires_grad}
    assert torch.equal(bare.eval()(x), model.eval()(x))


def test_compiled_afterwards_or_adapted_in_parts_all_is_saved_under_bare_names(x):
    model = nn.ModuleDict({"text": Net(), "image": Net()})
    bare = copy.deepcopy(model)
    expected = []
    for name, part in model.items():
        expected += [f"{name}.{layer}" for layer in adapt(part, x)]
        learn(part, x, x[:, :3])
    model["text"].mix = torch.compile(model["text"].mix, backend="eager")
    model["image"] = torch.compile(model["image"], backend="eager")
    state = aira_state_dict(torch.compile(model, backend="eager"))
    assert aira_state_dict(nn.DataParallel(model)).keys() == state.keys()
    saved = {key.removesuffix(".lora_A") for key in state if key.endswith(".lora_A")}
    assert saved - {"text.again", "image.again"} == set(expected)
    load_aira(bare, state)
    with torch.no_grad():
        for name in bare:
            close(bare[name](x), model[name](x))
        merge_aira(model)
        for name in bare:
            close(bare[name](x), model[name](x))


def test_merge_rounds_once_and_refuses_a_diverged_run(net, x):
    layer = net.bfloat16().mix
    adapt(net, x.bfloat16())
    nn.init.normal_(net.mix.lora_B)
    B, A = net.mix.factors()
    wanted = (layer.weight + (B @ A).T).bfloat16()
    net.up.lora_B.data += np.inf
    before = str(everything(net))
    with pytest.raises(ValueError, match="'up'.*diverged"):
        merge_aira(net)
    assert str(everything(net)) == before
    net.up.lora_B.data.zero_()
    merge_aira(net)
    assert net.mix is layer
    assert torch.equal(layer.weight, wanted)
    with pytest.raises(ValueError, match="no adapters.*apply_aira"):
        merge_aira(net)


BROKEN = [  # what the error must name; a tensor of the file, and its new shape or None
    ("lora_B", "up.lora_B", None),
    ("'up.lora_B' .24,", "up.lora_A", None),
    ("'up' does not fit", "up.lora_B", (1, 4)),
    ("'head.bias' .7,", "head.bias", (7,)),
    ("'side.bias' .7,", "side.bias", (7,)),
]


@pytest.mark.parametrize("words, key, shape", BROKEN)
def test_a_file_that_does_not_fit_is_named_and_changes_nothing(net, x, words, key, shape):
    base = copy.deepcopy(net)
    before = everything(base)
    adapt(net, x, also_train="head")
    state = aira_state_dict(net)
    state.pop(key, None)
    if shape:
        state[key] = torch.zeros(shape)
    with pytest.raises((ValueError, TypeError), match=words):
        load_aira(base, state)
    assert everything(base) == before


def test_another_base_of_the_same_shapes_is_named_but_rounding_is_not(net, x):
    """As a new head that is drawn again; the same base in half precision is the same."""
    base, half = copy.deepcopy(net), copy.deepcopy(net).bfloat16()
    adapt(net, x)
    state = aira_state_dict(net)
    with pytest.raises(ValueError, match="'up' has other weights.*also_train"):
        load_aira(Net(), state)
    load_aira(half, state)
    load_aira(base, aira_state_dict(net.bfloat16()))


def test_what_is_no_adapter_is_named_and_a_second_one_refused(net, x):
    with pytest.raises(TypeError, match="'a.pt'.*torch.load"):
        load_aira(net, "a.pt")
    with pytest.raises(ValueError, match="no adapters"):
        load_aira(net, {})
    adapt(net, x)
    with pytest.raises(ValueError, match="has adapters"):
        load_aira(net, aira_state_dict(net))
    with pytest.raises(ValueError, match="has adapters"):
        adapt(net, x)


# ---- The claim, in seconds; the real one: train_toy.py -----------------------------------------


def add_lora(model, rank, scale):
    """y + scale B A x beside each linear layer."""
    for layer in model.requires_grad_(False)[::2]:
        layer.A = nn.Linear(layer.in_features, rank, bias=False)
        layer.B = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(layer.B.weight)
        layer.register_forward_hook(lambda m, x, y: y + scale * m.B(m.A(*x)))


def mlp():
    return nn.Sequential(
        nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)
    )


GRIDS = {  # method, LoRA's scale: rates
    ("AIRA", None): [0.008, 0.016, 0.032],
    ("LoRA", 1): [0.016, 0.032, 0.064],
    ("LoRA", 4): [0.008, 0.016, 0.032],
    ("LoRA", 16): [0.002, 0.004, 0.008],
}


def test_aira_ends_below_lora_each_at_its_best_rate_and_lora_at_its_best_scale():
    """Small nets that know a task learn another; inputs have a mean and a decaying spectrum."""
    losses = {(*key, rate): 0 for key, rates in GRIDS.items() for rate in rates}
    for seed in range(3):
        torch.manual_seed(seed)
        x = randn(512, 32) * torch.logspace(1, -1, 32) + 3 * randn(32)
        x = F.layer_norm(x, (32,))
        base, old, new = mlp(), mlp(), mlp()
        learn(base, x, old(x).detach(), 200, 0.003)
        target = (old(x) + new(x)).detach()
        for method, scale, rate in losses:
            model = copy.deepcopy(base)
            if method == "AIRA":
                adapt(model, x, rank=4)
            else:
                add_lora(model, 4, scale)
            losses[method, scale, rate] += learn(model, x, target, 40, rate)
    best = min(losses, key=losses.get)
    assert best[0] == "AIRA"


# ---- train_toy.py ------------------------------------------------------------------------------


def test_toy_steps_to_a_loss_are_linear_between_tests(monkeypatch):
    monkeypatch.setattr(train_toy, "POINTS", range(10, 31, 10))
    assert train_toy.steps_to(1.5, [3.0, 2.0, 1.0]) == 25
    assert train_toy.steps_to(0.5, [3.0, 2.0, 1.0]) == np.inf


@pytest.mark.parametrize("task, shape", [("vit", (16, 64)), ("gpt", (64,))])
def test_toy_data_are_disjoint(task, shape):
    parts = train_toy.data(task, new=True)
    rows = [{x.numpy().tobytes() for x in part[0]} for part in parts]
    assert all(part[0].shape[1:] == shape and len(part[0]) == len(part[1]) for part in parts)
    assert task == "gpt" or not (rows[0] & rows[1] or rows[0] & rows[2] or rows[1] & rows[2])


def test_toy_cache_knows_code_from_docstrings():
    def one():
        """Says this."""
        return 1

    first = train_toy.source(train_toy.evaluate)
    assert "mean loss" not in first
    assert first != train_toy.source(train_toy.loss_of)
