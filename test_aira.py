# SPDX-License-Identifier: MIT
"""What aira.py claims, in its order: examples by hand and independent oracles (numpy's SVD, dense
matrices, brute force, a step of Adam), then what must not fail in silence.
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, randn, tensor

import aira
import train_toy
from aira import DAMPING, MEAN_GAIN, SAMPLE, apply_aira, greedy_ranks, knapsack_ranks

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("error")
every_init = pytest.mark.parametrize("init", ["svd_A", "svd"])
every_allocate = pytest.mark.parametrize("allocate", [greedy_ranks, knapsack_ranks])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(a, b, tolerance=1e-5):
    """Equal up to rounding, relative to b's largest entry."""
    largest = float(b.detach().abs().max())
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * largest)


# ---- S and the SVD of W S ----------------------------------------------------------------------


def test_S_by_hand():
    """The first of four inputs is ten times larger: mean squares of 25, .25, .25 and .25."""
    D, s = aira.find_S(torch.diag(tensor([10.0, 1, 1, 1])).repeat(2, 1), k=1)
    damping = DAMPING * 25.75 / 4
    close(D.abs(), tensor([[1.0, 0, 0, 0]]))
    close(s**2, tensor([(25 + damping) / (0.25 + damping)]))


def test_white_inputs_have_no_large_directions():
    _, s = aira.find_S(randn(1024, 512), k=64)
    assert 1 <= s.min() <= s.max() < 1.2


def dense(D, s):
    """S, one direction after the other."""
    S = torch.eye(D.shape[1])
    for direction, factor in zip(D, s, strict=True):
        S += (factor - 1) * torch.outer(direction, direction)
    return S


def test_svd_by_hand():
    """W = diag(3, 2, 1), but the third input is ten times larger: W S = diag(3, 2, 10)."""
    W = torch.diag(tensor([3.0, 2, 1]))
    third = tensor([[0.0, 0, 1]])
    U, sigma, Vt = aira.outlier_weighted_svd(W, third, tensor([10.0]), rank=1)
    close(U * sigma @ Vt, torch.diag(tensor([0.0, 0, 10])))


def test_svd_is_the_best_of_its_rank():
    """By Eckart and Young, its squared error is the sum of sigma^2 beyond the rank."""
    W = randn(12, 20)
    D, s = torch.eye(20)[:2], tensor([5.0, 3])
    U, sigma, Vt = aira.outlier_weighted_svd(W, D, s, rank=3)
    WS = W @ dense(D, s)
    every_sigma = np.linalg.svd(WS, compute_uv=False)
    error = (WS - U * sigma @ Vt).square().sum()
    assert float(error) == pytest.approx(sum(every_sigma[3:] ** 2), rel=1e-3)


# ---- The layer ---------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """Hugging Face's linear layer of GPT-2: weight (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def correlated(width=10):
    """Inputs with a large channel, a small one, and a large mean."""
    x = randn(96, width) @ randn(width, width) + 3 * randn(width)
    x[:, 0] *= 10
    x[:, 1] /= 100
    return x


def one_layer(base, x, rank, init="svd_A"):
    """The adapter, of this rank, of a layer that stands alone."""
    model = nn.Sequential(base)
    apply_aira(model, lambda: model(x), rank=2, init=init, allocate=lambda *_: [rank])
    return model[0]


@every_init
@pytest.mark.parametrize("rank", [1, 6])
@pytest.mark.parametrize("base", [nn.Linear(16, 12), Conv1D(12, 12)])
def test_layer_is_what_its_formula_says(base, rank, init):
    """y = W x + (B diag(g) A - B0 diag(g) A0) S^-1 x, with dense matrices."""
    width = base.weight.shape[1]
    x = correlated(width)
    W = (base(torch.eye(width)) - base.bias).T.detach()
    layer = one_layer(base, x, rank, init)
    assert layer.directions.shape == (min(4 * rank, width // 2), width)

    A0 = layer.lora_A.detach().clone()
    B0 = layer.lora_B.detach() * layer.gains
    S_inverse = dense(layer.directions, layer.shrink)
    U, sigma, Vt = torch.linalg.svd(W @ torch.linalg.inv(S_inverse))
    best = U[:, :rank] * sigma[:rank] @ Vt[:rank]
    close(A0.T @ A0, Vt[:rank].T @ Vt[:rank], 0.01)  # singular vectors have no sign
    close(B0 @ A0, best if init == "svd" else 0 * best, 0.01)

    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    change = (layer.lora_B * layer.gains @ layer.lora_A - B0 @ A0) @ S_inverse
    close(layer(x), F.linear(x, W + change, base.bias), 1e-3)
    close(layer.weight if type(base) is nn.Linear else layer.weight.T, W + change)


@pytest.mark.parametrize("sigma, gains", [([9, 1, 0], [3, 1, 0.3]), ([0, 0, 0], [1, 1, 1])])
def test_gains_by_hand(sigma, gains):
    """The square roots of sigma, of at least 1 % of the largest, with MEAN_GAIN as their mean."""
    base = nn.Linear(3, 3)
    base.weight.data = torch.diag(tensor(sigma).float())
    layer = one_layer(base, torch.eye(3).repeat(2, 1), rank=3)
    close(layer.gains, MEAN_GAIN * tensor(gains) / np.mean(gains))


def test_adam_keeps_the_gain():
    """Its first step changes all entries of B alike, and the output by g_i along row i of A."""
    layer = one_layer(nn.Linear(10, 6), correlated(), rank=3)
    layer(randn(96, 10)).square().mean().backward()
    before = layer.weight.detach()
    torch.optim.Adam([layer.lora_B], 0.01).step()
    S = dense(layer.directions, 1 / layer.shrink)
    moved = (layer.weight - before) @ S @ layer.lora_A.T  # (out, r)
    close(moved.abs().mean(0), 0.01 * layer.gains, 0.01)


# ---- Ranks -------------------------------------------------------------------------------------


def test_importance_by_hand():
    W = tensor([[1.0, -2, 0], [3, 0.5, -1]])
    magnitude = tensor([1.0, 4, 2])
    # |W| magnitude = [[1, 8, 0], [3, 2, 2]], mean 2.67: only 8 is above twice that; two outputs
    assert aira.importance(W.bfloat16(), magnitude) == 8 / 2


@every_allocate
def test_ranks_by_hand(allocate):
    """The 2nd unit is worth log 2 = .69, the 3rd .41, the 4th .29, times the importance."""
    assert allocate([3, 1], [1, 1], 4, [9, 9]) == [3, 1]  # 2.08 and 1.22 against .69
    assert allocate([3, 1], [1, 1], 7, [3, 9]) == [3, 4]  # the first may not have more
    # at prices 2 and 3 three are left: greedy spends two, the best spends three
    best = [2, 1] if allocate is greedy_ranks else [1, 2]
    assert allocate([1.0, 1.4], [2, 3], 8, [9, 9]) == best


@every_allocate
def test_ranks_against_brute_force(allocate):
    """The knapsack finds the optimum; greedy does if all costs are equal."""
    rng = np.random.default_rng(0)
    costs = [4] if allocate is greedy_ranks else [2, 3, 5, 7]
    for layers in 20 * [1, 2, 3, 4]:
        prices = rng.choice(costs, layers)
        most = rng.integers(2, 7, layers)
        importances = rng.random(layers) ** 3
        budget = sum(prices) + rng.integers(4 * sum(prices))
        ranks = np.array(allocate(importances, prices, budget, most))
        assert sum(ranks * prices) <= budget
        every = np.indices(most).reshape(layers, -1).T + 1  # all ranks that there are
        affordable = every[every @ prices <= budget]
        best = max(np.log(affordable) @ importances)
        assert np.log(ranks) @ importances == pytest.approx(best, rel=1e-9)


# ---- apply_aira --------------------------------------------------------------------------------


def test_sample_is_uniform():
    """Three quarters of the rows are on channel 0 and the last on channel 1; zeros are no rows."""
    x = torch.eye(2).repeat_interleave(tensor([3 * SAMPLE, SAMPLE]), 0)
    recorder = aira.Recorder(nn.Linear(2, 9))
    for batch in x.split(256):
        recorder(None, [torch.stack([batch, 0 * batch])], None)
    assert len(recorder.rows) == SAMPLE
    close(recorder.rows.mean(0), tensor([0.75, 0.25]), 0.08)


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


def count_trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def train(model, x):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@every_init
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_output_is_the_same_bit_for_bit_before_training(net, x, dtype, init):
    net, x = net.to(dtype), x.to(dtype)
    before = net(x)
    random_state = torch.get_rng_state()
    adapt(net, x, init=init)
    assert torch.equal(net(x), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert net.up.lora_A.dtype == net.up.gains.dtype == torch.float32


@every_allocate
def test_budget_is_that_of_lora_and_outliers_bring_rank(allocate):
    """Of four equal layers one has a weight that counts a thousandfold."""
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(4)))
    model[2].weight.data[3, 4] = 1000
    model.forward = lambda x: [layer(x) for layer in model]
    ranks = adapt(model, randn(200, 20), allocate=allocate)
    assert count_trained(model) == sum(ranks.values()) * 40 <= 4 * 3 * 40
    assert max(ranks.values()) == ranks["2"] == 6 > ranks["3"]


CHOICES = [
    ({}, [*BODY, "head", "1"]),
    ({"targets": ["up", "0.mix"]}, ["up", "mix"]),
    ({"targets": "down"}, ["down"]),
    ({"also_train": ["0.head", "1"]}, BODY),
]


@pytest.mark.parametrize("options, names", CHOICES)
def test_layers_are_chosen_by_name(net, x, options, names):
    """The head of a language model and weights that share memory are left alone."""
    model = nn.Sequential(net, *(nn.Linear(3, 3) for _ in range(4)))
    model.get_output_embeddings = lambda: model[2]
    model[3].weight.data = model[4].weight.data
    assert [name.removeprefix("0.") for name in adapt(model, x, **options)] == names


def test_layers_that_calibration_did_not_reach_stay_as_they_are(net, x):
    model = nn.ModuleDict({"net": net, "expert": nn.Linear(10, 10)})
    with pytest.warns(UserWarning, match="'expert'"):
        ranks = apply_aira(model, lambda: net(x))
    assert "expert" not in ranks
    assert not model["expert"].weight.requires_grad


def everything(model):
    """All that a failed call could change: modules, modes, hooks, flags, tensors, as text."""
    found = [(id(m), m.training, len(m._forward_hooks)) for m in model.modules()]
    for name, t in model.state_dict(keep_vars=True).items():
        found.append((name, t.requires_grad, t.tolist()))
    return str(found)


REFUSED = [  # what the error must name; options, or a wrong number in a weight or an input
    ("'q_prj'.*'up'", {"targets": ["up", "q_prj"]}),
    ("'p'.*'up'", {"targets": "p"}),  # the end of a word is not the end of a name
    ("haed", {"also_train": "haed"}),
    ("none of the linear layers", {"calibrate": lambda: None}),
    ("'pissa'.*'svd_A'", {"init": "pissa"}),
    ("rank=0", {"rank": 0}),
    ("NaN.*down", {"weight": np.nan}),
    ("NaN.*up", {"input": np.inf}),
]


@pytest.mark.parametrize("words, options", REFUSED)
def test_bad_input_is_named_and_changes_nothing(net, x, words, options):
    options = {"calibrate": lambda: net.train()(x), **options}
    net.down.weight.data[3, 4] = options.pop("weight", 0)
    x[5, 6] = options.pop("input", 0)
    net.up.eval()
    before = everything(net)
    with pytest.raises((ValueError, AttributeError), match=words):
        apply_aira(net, **options)
    assert everything(net) == before


def test_calibration_runs_without_gradients_and_may_fail(net, x):
    def calibrate():
        assert not (net.training or net(x).requires_grad)
        raise KeyboardInterrupt

    before = everything(net)
    with pytest.raises(KeyboardInterrupt):
        apply_aira(net, calibrate)
    assert everything(net) == before


# ---- Remove, merge, save, load -----------------------------------------------------------------


@every_init
@pytest.mark.parametrize("rank", [1, 9])
def test_saved_loaded_merged_and_removed(net, x, init, rank):
    base, loaded = copy.deepcopy(net), copy.deepcopy(net)
    adapt(net, x, rank, init=init, allocate=knapsack_ranks)
    train(net, x)
    output = net(x)
    assert (output - base(x)).abs().max() > 0.1
    state = aira.aira_state_dict(net)
    saved = str(state)
    assert all(t.is_contiguous() for t in state.values())  # for safetensors
    aira.load_aira(loaded, state)
    assert torch.equal(loaded(x), output)
    train(loaded, x)
    merged = copy.deepcopy(net)
    aira.merge_aira(merged)
    close(merged(x), output)
    train(net, x)
    assert str(state) == saved
    aira.remove_aira(net)
    assert str(net.state_dict()) == str(base.state_dict())


def test_all_that_trains_is_saved_and_loads(net, x):
    """also_train, a bias that the user lets train, and BatchNorm's statistics, which move."""
    Norm = type("Norm", (nn.BatchNorm1d,), {"get_extra_state": lambda self: "no tensor"})
    model = nn.Sequential(Norm(10), net, nn.Linear(3, 3))
    base = copy.deepcopy(model)
    adapt(model, x, targets="up", also_train="2")
    model[1].up.base_layer.bias.requires_grad_(True)
    model[1].up.lora_A.requires_grad_(False)
    train(model, x)
    model.state_dict = lambda: aira.aira_state_dict(model)  # so that others save no more
    state = model.state_dict()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained | {"0.running_mean", "1.up.gains", "1.up.lora_A"} < set(state)
    assert "1.down.weight" not in state
    aira.load_aira(base, state)
    loaded = {name for name, p in base.named_parameters() if p.requires_grad}
    assert loaded == trained | {"1.up.lora_A"} and "2.weight" in trained
    assert torch.equal(base.eval()(x), model.eval()(x))
    with pytest.raises(ValueError, match="before you freeze"):
        aira.aira_state_dict(model.requires_grad_(False))


BROKEN = [  # what the error must name; a tensor of the file, and its new shape or None
    ("up is incomplete", "up.lora_B", None),
    ("up does not fit", "up.lora_B", (1, 1)),
    ("up does not fit", "up.lora_A", (9, 10)),
    ("head.bias .7,", "head.bias", (7,)),
    ("side.bias .7,", "side.bias", (7,)),
    ("no linear layer side", "side.lora_A", (7,)),
    ("up.base_layer.weight", "up.base_layer.weight", (24, 10)),  # of a whole model
]


@pytest.mark.parametrize("words, key, shape", BROKEN)
def test_a_file_that_does_not_fit_is_named_and_changes_nothing(net, x, words, key, shape):
    base = copy.deepcopy(net)
    before = everything(base)
    adapt(net, x, also_train="head")
    state = aira.aira_state_dict(net)
    state.pop(key, None)
    if shape:
        state[key] = torch.zeros(shape)
    with pytest.raises(ValueError, match=words):
        aira.load_aira(base, state)
    assert everything(base) == before


def test_no_second_adapters_and_none_without_weights(net, x):
    net.other = nn.Linear(3, 3, device="meta")
    with pytest.raises(ValueError, match="meta"):
        adapt(net, x)
    net.other = nn.ModuleDict({"lora_A": nn.Linear(3, 3)})  # as in PEFT
    with pytest.raises(ValueError, match="has adapters"):
        adapt(net, x)
    del net.other
    with pytest.raises(ValueError, match="no adapters"):
        aira.load_aira(net, net.state_dict())
    adapt(net, x)
    with pytest.raises(ValueError, match="has adapters"):
        adapt(net, x)
    with pytest.raises(ValueError, match="has adapters"):
        aira.load_aira(net, aira.aira_state_dict(net))


# ---- train_toy.py ------------------------------------------------------------------------------


def test_toy_compares_fairly():
    """Splits have no image in common; LoRA and AIRA train as many parameters."""
    splits = train_toy.target_data("vit")
    images = [x.tobytes() for split in splits for x in split[0].cpu().numpy()]
    assert len(images) == len(set(images))
    trained = []
    for prepare in (train_toy.lora, train_toy.aira):
        model = train_toy.Transformer("vit").to(train_toy.DEVICE)
        prepare(model, splits[0][0][:64])
        trained.append(count_trained(model))
    assert 0.99 * trained[0] <= trained[1] <= trained[0]
