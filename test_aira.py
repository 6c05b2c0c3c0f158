# SPDX-License-Identifier: MIT
"""What aira.py claims, in its order: a worked example, then an oracle that shares no code with it
(brute force, Eckart-Young, dense matrices, plain autograd, PEFT), then the edges.  Offline."""
import copy, io, math, pickle, random, re, statistics, time, warnings
import numpy as np, pytest, torch, torch.nn as nn, torch.nn.functional as F
import train_toy
from aira import (SCALE, Listener, aira_state_dict, amplified, apply_aira, greedy_ranks,
                  knapsack_ranks, load_aira, merge_aira, outlier_mass, outlier_weighted_svd,
                  remove_aira, save_peft, whitening)
torch.set_num_threads(1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INITS, POWER = ["svd_A", "svd", "random"], 1 / 3

@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

class Conv1D(nn.Module):
    """Hugging Face's linear layer of GPT-2: weight (in, out)."""
    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.weight = nf, nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias

class Net(nn.Module):
    """in < out, in > out, no bias, a Conv1D, a layer with two names, a norm and a head."""
    def __init__(self):
        super().__init__()
        self.up, self.mix, self.down = nn.Linear(10, 24), Conv1D(24, 24), nn.Linear(24, 10, False)
        self.shared = self.again = nn.Linear(10, 10)
        self.norm, self.head = nn.LayerNorm(10), nn.Linear(10, 3)

    def forward(self, x):
        x = x + self.down(torch.tanh(self.mix(F.gelu(self.up(x)))))
        return self.head(self.norm(x + self.shared(self.again(x))))

SHAPES = {"up": (24, 10), "mix": (24, 24), "down": (10, 24), "shared": (10, 10), "head": (3, 10)}

def randn(*shape): return torch.randn(*shape, dtype=torch.float64)
def trainable(model): return [p for p in model.parameters() if p.requires_grad]
def far(a, b, least=0.01): return float((a - b).detach().abs().max()) > least
def bits(t): return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
def close(a, b, tolerance=1e-9):
    size = float(b.detach().abs().max() + 1e-12)
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * size)

def inputs(n=96, width=10, dtype=torch.float64):
    """Tokens with correlated channels, one of them loud and one quiet."""
    x = randn(n, width) @ randn(width, width)
    x[:, 0] *= 10
    x[:, 1] *= 0.01
    return x.to(dtype)

def adapted(model=None, x=None, train=0, **options):
    """A model with the default's adapters, calibrated on x, after some steps of training."""
    model, x = Net().double() if model is None else model, inputs() if x is None else x
    apply_aira(model, lambda: model(x), **{"rank": 3, **options})
    return fit(model, x, train)

def fit(model, x, steps):
    optimizer = torch.optim.Adam(trainable(model), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x).float() - 1).square().mean().backward()
        optimizer.step()
    return model

def fingerprint(model):
    """All that must stay: modules, modes, hooks; tensors with their identity, flags and bits."""
    modules = [(name, id(m), m.training, len(m._forward_hooks), sorted(vars(m)))
               for name, m in model.named_modules(remove_duplicate=False)]
    return modules, [(name, id(t), t.requires_grad, None if t.is_meta else bits(t)) for name, t in [
        *model.named_parameters(remove_duplicate=False), *model.named_buffers()]]

def refuses(model, words, call, errors=(ValueError, TypeError)):
    """An error that has all the words, and leaves the model and the random state as they were."""
    before = fingerprint(model), bits(torch.get_rng_state())
    with pytest.raises(errors) as caught: call()
    assert all(word in str(caught.value) for word in words.split()), caught.value
    assert before == (fingerprint(model), bits(torch.get_rng_state()))

# ---- 1. Activations ------------------------------------------------------------------------------
def listened(*batches):
    layer = Listener(torch.zeros(1, batches[0].shape[-1]))
    for x in batches: layer.hook(None, (), {"input": x}, None)
    return layer.finish("layer")

def moments(x):  # C of the tokens x (n, in), dense
    x = F.normalize(x.double()) * x.shape[1] ** 0.5
    return x.T @ x / len(x)

def test_two_tokens_by_hand():
    """(3, 4, 0) and (0, 0, 50): scaled to RMS 1 both weigh the same, however loud the second."""
    heard = listened(torch.tensor([[3.0, 4, 0], [0, 0, 50]]))
    C = 3 / 2 * torch.tensor([[0.36, 0.48, 0], [0.48, 0.64, 0], [0, 0, 1]])
    close(heard.CP @ heard.P.T, C, 1e-6)
    typical = (5 * 50 / 3) ** 0.5  # the geometric mean of the tokens' loudness
    close(heard.rms, typical * torch.tensor([0.6, 0.8, 1]) * 1.5**0.5, 1e-6)

def test_a_stream_gives_what_all_batches_at_once_give_and_silent_tokens_do_not_count():
    batches = [*(inputs(n).float() for n in (5, 1, 0)), inputs(64).float().view(4, 16, 10)]
    heard, x = listened(*batches, torch.zeros(7, 10)), torch.cat([b.view(-1, 10) for b in batches])
    typical = x.double().square().mean(1).sqrt().log().mean().exp()
    assert heard.tokens == 77
    close(heard.rms.double(), moments(x).diagonal().sqrt() * typical, 1e-5)
    half = listened(torch.full((8, 4), 3e4, dtype=torch.float16))  # its square does not fit float16
    close(half.rms, torch.full((4,), 3e4), 1e-5)

# ---- 2. Outlier-weighted SVD ---------------------------------------------------------------------
def weighted_error(W, rms, B, A):
    return float(((W.double() - B.double() @ A.double()) * rms).norm())

def eckart_young(W, rms, rank):
    """The least error of any rank-r matrix: the root of the squared singular values it drops."""
    s = np.linalg.svd((W * rms).double().numpy(), compute_uv=False)
    return float(np.sqrt((s[rank:] ** 2).sum()))

def test_svd_by_hand_follows_the_loud_channel():
    """W = diag(3, 2, 1): a plain SVD keeps the 3; with the third channel ten times louder, 1."""
    W = torch.diag(torch.tensor([3.0, 2, 1]))
    for rms, kept in (([1, 1, 1], [3.0, 0, 0]), ([1, 1, 10], [0.0, 0, 1])):
        B, A = outlier_weighted_svd(W, torch.tensor(rms), 1)
        close(B @ A, torch.diag(torch.tensor(kept)), 1e-6)

@pytest.mark.parametrize("out, width", [(12, 20), (20, 12), (1, 9), (9, 1)])
def test_svd_reaches_the_eckart_young_optimum_at_every_rank(out, width):
    W, rms = randn(out, width), torch.rand(width).double() * 5 + 0.1
    for rank in range(1, min(out, width) + 1):
        B, A = outlier_weighted_svd(W, rms, rank)
        assert B.shape == (out, rank) and A.shape == (rank, width)
        optimum = eckart_young(W, rms, rank)
        assert weighted_error(W, rms, B, A) == pytest.approx(optimum, abs=1e-8)
        close(B.square().sum(0), (A * rms).square().sum(1), 1e-8)  # both share the singular values

@pytest.mark.parametrize("spectrum", ["power law", "flat", "noise"])
def test_large_svd_is_within_a_thousandth_of_the_optimum_and_repeatable(spectrum):
    (u, v), rms = (torch.linalg.qr(randn(n, 500))[0] for n in (600, 500)), torch.rand(500) + 0.5
    s = torch.arange(1, 501.0) ** (-1.0 if spectrum == "power law" else 0.0)
    W = randn(600, 500) if spectrum == "noise" else u * s @ v.T / rms
    state = torch.get_rng_state()
    B, A = outlier_weighted_svd(W, rms, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert weighted_error(W, rms, B, A) <= 1.001 * eckart_young(W, rms, 8)
    U, s, V = torch.svd_lowrank(W * rms, 8, niter=4)  # what PEFT's pissa_niter_4 calls
    assert weighted_error(W, rms, B, A) <= (1 + 1e-9) * (W * rms - U * s @ V.T).norm()
    torch.manual_seed(123)  # the caller's random state does not matter
    assert all(map(torch.equal, (B, A), outlier_weighted_svd(W, rms, 8)))

@pytest.mark.parametrize("dtype", DTYPES)
def test_svd_with_dead_channels_in_half_precision_and_of_what_does_not_fit(dtype):
    """A channel that never fired has no say; if none fired, it is the plain SVD."""
    W, some = torch.randn(8, 10).to(dtype), torch.ones(10).index_fill(0, torch.tensor([2, 5]), 0)
    for rms, weigh in ((some, some), (torch.zeros(10), torch.ones(10)), (1e5 * some, 1e5 * some)):
        B, A = outlier_weighted_svd(W, rms, 3)
        assert A.isfinite().all() and A.dtype == torch.promote_types(dtype, torch.float32)
        assert weighted_error(W, weigh, B, A) == pytest.approx(eckart_young(W, weigh, 3), rel=1e-5)
    for rank, n in ((0, 10), (9, 10), (2, 4)):
        with pytest.raises(ValueError, match=rf"rank={rank} or channel_rms \({n},\).* 1 .. 8"):
            outlier_weighted_svd(W, torch.ones(n), rank)

# ---- 3. Ranks ------------------------------------------------------------------------------------
def test_outlier_mass_by_hand():
    W, rms = torch.tensor([[1.0, -2, 0], [3, 0.5, -1]]), torch.tensor([1.0, 4, 2])
    # |W| rms = [[1, 8, 0], [3, 2, 2]], mean 2.67: only 8 is above twice that, 8 and 3 above once
    assert outlier_mass(W, rms) == 8 and outlier_mass(W, rms, threshold=1) == 11
    assert outlier_mass(W, rms, threshold=5) == 0 == outlier_mass(torch.zeros(2, 3), rms)
    assert outlier_mass(10 * W.bfloat16(), rms) == 80

def test_ranks_by_hand():
    """The 2nd unit is worth log 2 = .69 theta, the 3rd .41, the 4th .29; theta is 3 and 1."""
    for allocate in (greedy_ranks, knapsack_ranks):
        assert allocate([3, 1], [1, 1], 4, 1, [9, 9]) == [3, 1]  # 2.08 and 1.22 against .69
        assert allocate([3, 1], [1, 1], 7, 1, [9, 9]) == [5, 2]
        assert allocate([3, 1], [1, 1], 7, 1, [3, 9]) == [3, 4]  # the first may not have more
    problem = [1.0, 1.4], [2, 3], 8, 1, [9, 9]  # 3 units to share: greedy spends 2, the best is 3
    assert greedy_ranks(*problem) == [2, 1] and knapsack_ranks(*problem) == [1, 2]

def value_of(ranks, importance):
    return float(np.log(ranks) @ np.maximum(np.array(importance) / (max(importance) or 1), 1e-9))

@pytest.mark.parametrize("costs", [[2, 3, 5, 7], [6, 10], [4], [8192, 15104, 12288], [1, 101]])
def test_knapsack_equals_brute_force_and_so_does_greedy_for_equal_costs(costs):
    rng = np.random.default_rng(0)
    for _ in range(100):
        n, least = (int(rng.integers(*ends)) for ends in ((1, 5), (1, 3)))
        prices, most = rng.choice(costs, n).tolist(), rng.integers(2, 7, n).tolist()
        importance = (rng.random(n) ** 3 * (rng.random(n) < 0.8)).tolist()  # some are zero
        budget = sum(prices) * least + int(rng.integers(0, 4 * sum(prices)))
        grid = np.meshgrid(*[np.arange(least, m + 1) for m in most], indexing="ij")
        every = np.stack([g.ravel() for g in grid], 1)  # all assignments there are
        best = max(value_of(r, importance) for r in every[every @ prices <= budget])
        for allocate in (knapsack_ranks, greedy_ranks):
            ranks = allocate(importance, prices, budget, least, most)
            assert all(type(r) is int and least <= r <= m for r, m in zip(ranks, most))
            growing = [c for c, r, m in zip(prices, ranks, most) if r < m]
            assert 0 <= budget - np.dot(prices, ranks) < min(growing, default=math.inf)
            if allocate is knapsack_ranks or len(set(prices)) == 1:
                assert value_of(ranks, importance) == pytest.approx(best, rel=1e-9, abs=1e-12)

@pytest.mark.parametrize("costs", [[8192] * 128 + [15104] * 96,
                                   [8192] * 64 + [5120] * 64 + [18432] * 96])
def test_ranks_of_a_7b_model_within_a_second(costs):
    """224 layers at average rank 16, at most 64; without and with grouped queries."""
    problem = np.random.default_rng(0).random(224) ** 2, costs, 16 * sum(costs), 1, [64] * 224
    start = time.process_time()
    exact = knapsack_ranks(*problem)
    assert time.process_time() - start < 1
    assert 0 <= value_of(exact, problem[0]) - value_of(greedy_ranks(*problem), problem[0]) < 0.1
    assert 0.999 * problem[2] < np.dot(costs, exact) <= problem[2]

@pytest.mark.parametrize("allocate", [greedy_ranks, knapsack_ranks])
def test_ranks_refuse_what_has_no_answer(allocate):
    good = {"importance": [1, 1], "costs": [5, 7], "budget": 99, "min_rank": 1, "max_ranks": [4, 4]}
    for key, bad in {"importance": ([1, math.nan], [1, -1], [1]), "costs": ([5, 0],),
                     "max_ranks": ([4, 0],), "min_rank": (0,), "budget": (11,)}.items():
        for value in bad:
            with pytest.raises(ValueError, match=re.escape(f"{key}={value}")):
                allocate(**{**good, key: value})

# ---- 4. Amplified updates ------------------------------------------------------------------------
def gain(rows, x, power, **options):
    """rows G, for tokens x of which C is made as they are."""
    P = torch.linalg.qr(torch.randn(x.shape[1], min(80, x.shape[1])).double())[0]
    return amplified(rows, *whitening(x.T @ (x @ P) / len(x), P, power, **options))

def dense_gain(C, power, k=64):
    """G by its definition: C's k largest eigenvalues, and for all the others their mean."""
    lam, Q = (t.flip(-1) for t in torch.linalg.eigh(C))
    lam[k:] = lam[k:].mean()
    return Q * (lam + 0.1) ** -power @ Q.T

def test_whitening_by_hand():
    """Two channels, the first ten times louder: C = diag(200, 2) / 101.  G turns the second up."""
    x, eye = torch.tensor([[10.0, 1], [10, -1]]).double() * (2 / 101) ** 0.5, torch.eye(2).double()
    G = gain(eye, x, 0.5, damping=1e-9)
    close(G, torch.diag(torch.tensor([200 / 101, 2 / 101]).double() ** -0.5), 1e-5)
    close((x @ G).square().mean(0), torch.ones(2).double(), 1e-5)  # now both are equally loud
    loud = gain(eye, x, -0.5).diagonal()
    assert loud[0] > 3 * loud[1]  # a negative power turns up what is loud
    close(gain(eye, x, 0), eye)

@pytest.mark.parametrize("power", [0.35, 0.5, -0.5])
@pytest.mark.parametrize("width, k", [(8, 1), (8, 4), (8, 64), (300, 64)])
def test_gain_is_a_power_of_the_second_moments(width, k, power):
    x, rows = inputs(200, min(width, 60)), randn(3, width)
    x = F.normalize(x @ randn(x.shape[1], width)) * width**0.5  # trace C = width
    close(gain(rows, x, power, k=k), rows @ dense_gain(x.T @ x / len(x), power, k),
          1e-6 if width == 8 else 1e-3)  # the wide one has 60 directions, some nearly silent

def test_of_a_wide_layer_few_columns_tell_the_loudest_directions_nearly():
    x = randn(5000, 300) * torch.arange(1, 301).double() ** -0.5
    lam, heard = torch.linalg.eigvalsh(moments(x)).flip(0), listened(x)
    close(heard.P.T @ heard.P, torch.eye(80), 1e-5)
    close(heard.CP.double(), moments(x) @ heard.P.double(), 1e-4)
    loud, gains = whitening(heard.CP, heard.P, 0.5)
    close(loud @ loud.T, torch.eye(64).double(), 1e-5)
    assert 0.9 < (loud @ moments(x) @ loud.T).trace() / lam[:64].sum() <= 1
    told = gains[:-1].sort()[0][:8]  # those of the loudest
    assert (told / (lam[:8] + 0.1) ** -0.5).sub(1).abs().max() < 0.1

def test_the_default_is_the_abstract():
    """A = V_r^T from the SVD of W S, G from C; B = 0; ranks by outliers, greedily."""
    model, x = nn.Sequential(nn.Linear(10, 17), nn.Linear(17, 10)).double(), inputs(300)
    W = model[0].weight.detach().clone()
    report = apply_aira(model, lambda: model(x), rank=2)
    typical = x.square().mean(1).sqrt().log().mean().exp()
    rms, theta = moments(x).diagonal().sqrt(), [row.importance for row in report.rows]
    Vt = torch.linalg.svd(W * rms)[2][:report.rows[0].rank]
    signs = (Vt * model[0].lora_A).sum(1, keepdim=True).sign()  # singular vectors have none
    close(model[0].lora_A * signs, Vt / SCALE, 1e-4)
    close(model[0].factors()[1] * signs, Vt / SCALE @ dense_gain(moments(x), POWER), 1e-4)
    assert not model[0].lora_B.any() and model[0].start_A is None
    assert theta[0] == pytest.approx(outlier_mass(W, rms * typical), rel=1e-5)
    assert [row.rank for row in report.rows] == greedy_ranks(theta, [27, 27], 108, 1, [4, 4])

def test_sgd_is_amplified_by_G_squared_and_a_hook_is_a_placebo_under_adam():
    x, target, loud = inputs(), randn(96, 6), torch.logspace(-2, 2, 3).double()
    layer = adapted(nn.Sequential(nn.Linear(10, 6).double()), x, max_rank=3)[0]
    nn.init.normal_(layer.lora_B)
    W = layer.weight.detach().requires_grad_()
    loss = (x @ W.T + layer.bias.detach() - target).square().mean()
    gradient = torch.autograd.grad(loss, W)[0]  # of W itself, by plain autograd

    def moved(name, optimizer, hook=torch.ones(()).mul, **options):
        one = copy.deepcopy(layer)
        getattr(one, name).register_hook(hook)
        (one(x) - target).square().mean().backward()
        optimizer([getattr(one, name)], lr=0.01, **options).step()
        return (one.weight - layer.weight).detach()

    (B, AG), SGD, Adam = layer.factors(), torch.optim.SGD, torch.optim.Adam
    G = dense_gain(moments(x), POWER)
    close(moved("lora_A", SGD), -0.01 * B @ B.T @ gradient @ G @ G, 1e-4)
    close(moved("lora_B", SGD), -0.01 * SCALE**2 * gradient @ AG.T @ AG)
    assert torch.allclose(moved("lora_B", Adam, eps=1e-30),
                          moved("lora_B", Adam, loud.mul, eps=1e-30), rtol=1e-4)
    assert far(moved("lora_B", SGD), moved("lora_B", SGD, loud.mul))

LAYERS = {"in < out": lambda: nn.Linear(6, 9), "in > out": lambda: nn.Linear(9, 6),
          "conv1d": lambda: Conv1D(6, 9), "no bias": lambda: nn.Linear(8, 6, bias=False)}

@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_computes_base_plus_delta_at_every_rank(kind, init):
    for rank in (1, 4, 6):
        base = LAYERS[kind]().double()
        W = (base.weight.T if kind == "conv1d" else base.weight).detach().clone()
        x, bias = inputs(width=W.shape[1]), 0 if base.bias is None else base.bias
        layer = adapted(nn.Sequential(base), x, rank=rank, init=init, max_rank=rank)[0]
        assert layer.base is base and layer.bias is base.bias
        assert (layer.out_features, layer.in_features) == W.shape
        s, A0, B0, loud, gains = SCALE, randn(1, 1) * 0, randn(1, 1) * 0, layer.loud, layer.gains
        eye = torch.eye(W.shape[1]).double()
        G = gains[-1] * eye + loud.T * (gains[:-1] - gains[-1]) @ loud
        if init == "svd":  # both factors start at the best fit, and G = I
            A0, B0, rms = layer.start_A, layer.start_B, listened(x).rms
            optimum = eckart_young(W, rms, rank)
            assert weighted_error(W, rms, s * B0, A0) == pytest.approx(optimum, rel=1e-5, abs=1e-5)
        close(G, eye if init == "svd" else dense_gain(moments(x), POWER), 1e-4)
        for parameter in trainable(layer): nn.init.normal_(parameter)
        dW = s * ((B0 + layer.lora_B) @ (A0 + layer.lora_A) - B0 @ A0) @ G
        close(layer(x), x @ (W + dW).T + bias)
        close(layer.weight, (W + dW).T if kind == "conv1d" else W + dW)
        B, A = layer.factors()
        assert len(A) == B.shape[1] == (2 * rank if init == "svd" else rank)
        close(B @ A, dW)

@pytest.mark.parametrize("init", INITS)
def test_weight_decay_alone_leaves_the_pretrained_weights(init):
    model, x = Net().double(), inputs()
    before = model(x)
    optimizer = torch.optim.AdamW(trainable(adapted(model, x, init=init)), 0.1, weight_decay=5.0)
    for _ in range(5):
        (model(x) * 0).sum().backward()
        optimizer.step()
    assert torch.equal(model(x), before)

def test_a_sample_does_not_depend_on_its_batch():
    model, x = adapted(train=5), inputs()
    for others in (x[1:2], 1e6 * x[1:], 0 * x[1:]):
        close(model(torch.cat([x[:1], others]))[:1], model(x[:1]))

@pytest.mark.parametrize("init", ["svd_A", "random"])
@pytest.mark.parametrize("zero", [False, True])
def test_every_unit_of_rank_can_train(zero, init):
    """lora_B from the first step and lora_A after it, in a zero-initialised layer, too."""
    model, x = Net().double(), inputs()
    model.head.weight.data *= not zero
    adapted(model, x, init=init)
    for wanted, dim in (("lora_B", 0), ("lora_A", 1)):
        model.zero_grad()
        (model(x) - 1).square().mean().backward()
        for name in ["head"] if zero else SHAPES:
            assert getattr(model.get_submodule(name), wanted).grad.any(dim).all(), name
        for parameter in trainable(model): parameter.data -= 0.05 * parameter.grad

def test_quiet_norms_and_massive_tokens_do_not_change_the_adapters():
    """Both are common in pretrained models: norms of .1 with readers of 10 in return, the same
    function; and a few tokens hundreds of times louder than all others."""
    x, model = inputs(300), nn.Sequential(nn.LayerNorm(10), nn.Linear(10, 30), nn.Linear(30, 10))
    quiet, few = copy.deepcopy(model.double()), copy.deepcopy(model.double())
    quiet[0].weight.data /= 10
    quiet[1].weight.data *= 10
    close(quiet(x), model(x))
    few[0], h = nn.Identity(), model[0](x).detach()
    few_massive = torch.cat([500 * h[:3], h[3:]])
    ranks = [[row.rank for row in apply_aira(m, lambda: m(batch), rank=3).rows]
             for m, batch in ((model, x), (quiet, x), (few, few_massive))]
    assert ranks[0] == ranks[1] == ranks[2]
    close(quiet[1].lora_A, model[1].lora_A, 1e-4)
    close(few[1].lora_A, model[1].lora_A, 1e-4)

def test_aira_learns_faster_than_lora_at_the_same_rate():
    """The claim, in seconds: five small nets that know a task learn another, on normalised inputs
    with a loud mean and a decaying spectrum, as transformers have.  The real one: train_toy.py."""
    def lora(model, rank):
        for layer in model.requires_grad_(False)[::2]:
            A = nn.init.kaiming_uniform_(torch.empty(rank, layer.in_features), a=5**0.5)
            B = torch.zeros(layer.out_features, rank)
            layer.lora_A, layer.lora_B = nn.Parameter(A), nn.Parameter(B)
            layer.register_forward_hook(lambda m, x, y: y + x[0] @ m.lora_A.T @ m.lora_B.T)

    def learn(model, y, rate, steps):
        optimizer, order = torch.optim.Adam(trainable(model), rate), torch.Generator()
        for _ in range(steps):
            rows = torch.randint(len(x), (64,), generator=order)
            optimizer.zero_grad()
            F.mse_loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
        return F.mse_loss(model(x), y).item()

    ratios = {0.01: [], 0.02: []}
    for number in range(5):
        torch.manual_seed(number)
        x = torch.randn(1024, 32) * torch.logspace(1, -1, 32) + 3 * torch.randn(32)
        x = F.layer_norm(x, (32,))
        base, old, new = (nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(),
                                        nn.Linear(64, 8)) for _ in range(3))
        learn(base, old(x).detach(), 0.003, 300)
        for rate, ratio in ratios.items():
            ours, theirs, target = *(copy.deepcopy(base) for _ in "12"), (old(x) + new(x)).detach()
            apply_aira(ours, lambda: ours(x), rank=4), lora(theirs, 4)
            ratio.append(learn(ours, target, rate, 40) / learn(theirs, target, rate, 40))
    for ratio in ratios.values():
        assert statistics.mean(ratio) < 0.95 and sum(r < 1 for r in ratio) >= 4, ratios

# ---- 5. apply_aira -------------------------------------------------------------------------------
def test_report_prints_a_table_and_keeps_the_budget():
    model, x = Net(), inputs(dtype=torch.float32)
    report = apply_aira(model, lambda: [model(x), model(x[:4])], rank=4, exclude="head")
    assert {row.name: row.shape for row in report.rows} == {n: SHAPES[n] for n in [*SHAPES][:-1]}
    for row in report.rows:
        adapter = model.get_submodule(row.name)
        assert row.rank == len(adapter.lora_A) <= min(8, *row.shape)
        assert row.parameters == sum(p.numel() for p in trainable(adapter))
        assert row.tokens == (200 if row.name == "shared" else 100)  # it is called twice
    spent, own = sum(p.numel() for p in trainable(model)), 240 + 24 + 576 + 24 + 240 + 100 + 10
    assert report.budget == 4 * (34 + 48 + 34 + 20) >= spent > 0.9 * report.budget
    assert report.unreached == pytest.approx(53 / (own + 53))  # the norm and the head
    title, up, *_, last = str(report).splitlines()
    row = report.rows[0]
    assert title.split() == "layer out x in tokens importance rank parameters".split()
    assert up.split() == ["up", "24", "x", "10", "100", f"{row.importance:.4g}", str(row.rank),
                          f"{row.parameters:,}"] and len(up) == len(title)
    assert f"{spent:,} trained" in last and f"{report.unreached:.1%}" in last

def test_outliers_bring_rank_and_one_layer_cannot_take_it_all():
    """Of four equal layers one has a weight that counts a thousandfold."""
    model, x = nn.Sequential(*(nn.Linear(20, 20, False) for _ in range(4))), torch.randn(200, 20)
    model.forward = lambda x: sum(layer(x) for layer in model)
    model[2].weight.data[3, 4] = 1000
    for most, options in ((6, {}), (9, {"max_rank": 9, "allocate": knapsack_ranks}),
                          (3, {"importance": lambda W, rms: sum(W.shape)})):
        ranks = [row.rank for row in apply_aira(model, lambda: model(x), rank=3, **options).rows]
        assert ranks[2] == most >= 3 >= ranks[0] and sum(ranks) == 12
        remove_aira(model)

def test_targets_exclude_heads_and_tied_weights():
    def apply(tied=False, **options):
        model, x = nn.Sequential(Net(), nn.Linear(3, 3), nn.Linear(3, 3), nn.Embedding(3, 3)), X
        model.forward = lambda x: model[2](model[1](model[0](x)))
        model.get_output_embeddings = lambda: model[2]
        if tied: model[1].weight = model[3].weight
        report = apply_aira(model, lambda: model(x), rank=2, **options)
        return [row.name for row in report.rows], report.skipped

    body = [f"0.{name}" for name in SHAPES]
    assert apply() == ([*body, "1"], {"2": "output head"})
    assert apply(also_train=["0.head", "1"])[0] == body[:-1]
    assert apply(targets=["up", "0.mix", "2"])[0] == ["0.up", "0.mix", "2"]
    assert apply(exclude=("down", "0.head", "1"))[0] == ["0.up", "0.mix", "0.shared"]
    assert apply(tied=True) == (body, {"1": "tied", "2": "output head"})
    for targets in ("1", ["up", "p"]):  # tied; the end of a word is not the end of a name
        with pytest.raises(ValueError, match="0.up"): apply(tied=True, targets=targets)

def test_what_reads_a_weight_and_calls_no_layer_finds_the_adapted_one():
    """nn.TransformerEncoderLayer in eval mode: an adapter with forward alone would be ignored."""
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0), randn(3, 5, 8)
    before = model.double().eval()(x)
    report = apply_aira(model, lambda: model(x), rank=2)
    assert [row.name for row in report.rows] == ["linear1", "linear2"] and report.unreached > 0.4
    slow = fit(model.train(), x, 10).eval()(x).detach()
    with torch.no_grad():
        close(model(x), slow)
        assert far(before, slow)

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["one token", "it again", "dead channels", "dead layer", "none"])
def test_thin_calibration_is_warned_of_starts_at_the_base_and_trains(case, dtype):
    x, live = torch.randn(64, 40), torch.randn(64, 40).to(dtype)
    x = {"one token": x[:1], "it again": x[:1].repeat(20000, 1), "dead layer": 0 * x,
         "dead channels": x * (torch.arange(40) > 37), "none": x}[case].to(dtype)
    for init in INITS:
        model = nn.Sequential(nn.Linear(40, 40)).to(dtype)
        before, run = model(live), None if case == "none" else lambda: model(x)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            apply_aira(model, run, rank=3, init=init)
        assert bits(model(live)) == bits(before)
        warned = any("fewer calibration tokens" in str(w.message) for w in caught)
        assert warned == (case in ("one token", "none"))
        assert init == "svd" or torch.linalg.svdvals(model[0].lora_A)[-1] > 0.5  # none is idle
        after = fit(model, live, 3)(live).detach()
        assert far(after, before) and after.abs().max() < 100  # also no NaN and no inf
    with pytest.warns(UserWarning, match="rank=50: no layer holds more than 40,"):
        assert len(adapted(nn.Sequential(nn.Linear(40, 40)), live.float(), rank=50)[0].lora_A) == 40

def test_calibration_restores_modes_hooks_and_random_state_also_when_it_raises():
    model = nn.Sequential(nn.Linear(10, 10), nn.Dropout(0.5), nn.BatchNorm1d(10), nn.Linear(10, 10))
    model[1].eval()
    modes, seen, state = [m.training for m in model], [], torch.get_rng_state()

    def run(error=None):
        seen.append((model.training, model[1].training, torch.is_grad_enabled()))
        model(torch.randn(32, 10))
        model.train()
        if error: raise error

    for error in (RuntimeError, KeyboardInterrupt, MemoryError):
        refuses(model, "", lambda: apply_aira(model, lambda: run(error), rank=2), error)
    apply_aira(model, run, rank=2)
    assert seen == 4 * [(False, False, False)] and [m.training for m in model] == modes
    assert torch.equal(torch.get_rng_state(), state) and not model[2].running_mean.any()
    assert model[0].base.training and not any(m._forward_hooks for m in model.modules())

def put(w): return lambda m: setattr(m.down, "weight", nn.Parameter(w, w.is_floating_point()))
X, NET = torch.randn(8, 10), Net().state_dict()
NAN, INF = X * math.nan, X * math.inf
BAD = [  # arguments, what was done to the model before, and the words that the error must have
    ({"targets": "q_prj"}, 0, "q_prj up mix"), ({"targets": ["up", "q_prj"]}, 0, "['q_prj'] up"),
    ({"targets": []}, 0, "targets=[] up"), ({"targets": "head", "also_train": "head"}, 0, "head"),
    ({"exclude": list(SHAPES)}, 0, "layer"), ({"also_train": ["head", "nrom"]}, 0, "['nrom']"),
    ({"also_train": ""}, 0, "['']"), ({"rank": 0}, 0, "rank=0 >= 1"), ({"rank": 1.5}, 0, "whole"),
    ({"rank": None}, 0, "None"), ({"max_rank": 0}, 0, "max_rank=0"), ({"amplify": 2}, 0, "=2 -1"),
    ({"amplify": math.nan}, 0, "nan"), ({"calibrate": [X]}, 0, "lambda"),
    ({"init": "pissa"}, 0, "pissa svd_A"), ({"calibrate": lambda: 0}, 0, "never 'up' generator"),
    ({"importance": lambda W, r: math.nan}, 0, "nan"), ({"importance": lambda W, r: -1}, 0, "-1"),
    ({}, lambda m: setattr(m, "peft_config", {}), "PEFT unload()"), ({}, put(INF), "'down' inf"),
    ({}, lambda m: setattr(m, "forward", lambda x: m.up(NAN)), "'up' NaN"),
    ({}, lambda m: setattr(m, "forward", lambda x: m.up(INF)), "'up' inf"),
    ({}, lambda m: setattr(m, "forward", lambda x: m.up(1e30 * x)), "'up' inf"),
    ({}, put(NAN), "'down' NaN"), ({}, put(torch.ones(1, 2, dtype=torch.int8)), "int8 quantised"),
    ({}, put(torch.ones(10, 24, device="meta")), "'down' meta"),
    ({}, lambda m: nn.utils.weight_norm(m.down), "'down' parametrised"),
    ({}, lambda m: adapted(m, X), "adapters remove_aira")]

@pytest.mark.parametrize("options, spoil, words", BAD, ids=[row[2] for row in BAD])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_bad_input_is_named_and_leaves_the_model_as_it_was(options, spoil, words):
    model = Net()
    if spoil: spoil(model)
    refuses(model, words, lambda: apply_aira(model, **{"calibrate": lambda: model(X), **options}))

def test_a_subclass_is_left_out_and_a_bare_layer_refused():
    weight_norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(nn.Linear(10, 10), weight_norm(nn.Linear(10, 9)))
    report = apply_aira(model, lambda: model(X), rank=2)
    assert [row.name for row in report.rows] == ["0"] and 0.4 < report.unreached < 0.6
    for layer in (nn.Linear(4, 4), Conv1D(4, 4)):
        refuses(layer, "no layer", lambda: apply_aira(layer, lambda: layer(torch.ones(2, 4))))

# ---- 6. Load, save, remove, merge, export --------------------------------------------------------
def check_round_trips(base, model, run, tolerance=1e-9):
    """Train, eval, reloaded and merged: one function, in the base's own modules."""
    output, file, fresh = run(model.train()), io.BytesIO(), copy.deepcopy(base)
    close(run(model.eval()), output, tolerance)
    torch.save(aira_state_dict(model), file)
    file.seek(0)
    load_aira(fresh, torch.load(file, weights_only=True))  # which refuses what could run code
    assert bits(run(fresh.eval())) == bits(run(model))
    flags = [[(n, p.requires_grad) for n, p in m.named_parameters()] for m in (fresh, model)]
    assert flags[0] == flags[1]
    merged = pickle.loads(pickle.dumps(model))
    merge_aira(merged)
    close(run(merged), output, tolerance)
    assert [*map(type, merged.modules())] == [*map(type, base.modules())]

def test_merge_rounds_once_and_refuses_a_diverged_run():
    model, x = Net().bfloat16(), inputs(dtype=torch.bfloat16)
    own = {"up": model.up, "mix": model.mix}
    broken = copy.deepcopy(adapted(model, x, train=5))
    deltas = [B @ A for B, A in (model.get_submodule(name).factors() for name in own)]
    wanted = own["up"].weight.float() + deltas[0], own["mix"].weight.float() + deltas[1].T
    merge_aira(model)
    for name, weight in zip(own, wanted):
        assert model.get_submodule(name) is own[name]
        assert torch.equal(own[name].weight, weight.bfloat16())
    nn.init.constant_(broken.mix.lora_B, math.inf)
    refuses(broken, "mix diverged", lambda: merge_aira(broken))

def test_also_train_is_saved_reloaded_merged_and_taken_back_and_start_is_never_trained():
    base, x = nn.Sequential(Net(), nn.BatchNorm1d(3), nn.Linear(3, 3)).double(), inputs()
    base[0].up.requires_grad_(False)
    base[2].bias.requires_grad_(False)
    model, before = copy.deepcopy(base), copy.deepcopy(base.state_dict())
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    adapted(model, x, train=5, also_train=["1", "2"], init="svd")
    lora = {f"0.{name}.lora_{part}" for name in SHAPES for part in "AB"}
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == lora | {"1.weight", "1.bias", "2.weight", "2.bias"}
    check_round_trips(base, model.eval(), lambda m: m.eval()(x))
    state = aira_state_dict(model)
    kept, fresh = copy.deepcopy(state), copy.deepcopy(base)
    load_aira(fresh, state)
    fit(model.train(), x, 2), fit(fresh.train(), x, 2)  # training goes on as if nothing happened
    close(fresh(x), model(x))
    assert all(torch.equal(state[key], kept[key]) for key in kept)  # it was a copy
    fit(fresh.requires_grad_(True), x, 2)
    assert all(torch.equal(getattr(fresh[0].up, t), kept[f"0.up.{t}"]) for t in ("start_A", "loud"))
    head = model[2].weight.detach().clone()
    merge_aira(model), load_aira(base, state), remove_aira(base)
    for one in (model, base):
        assert {name: p.requires_grad for name, p in one.named_parameters()} == flags
    assert torch.equal(model[2].weight, head) and far(head, before["2.weight"])
    assert all(torch.equal(t, before[key]) for key, t in base.state_dict().items())

def test_nothing_to_merge_remove_or_save_without_adapters(tmp_path):
    removed = adapted()
    remove_aira(removed)
    for use in (merge_aira, remove_aira, aira_state_dict, lambda model: save_peft(model, tmp_path)):
        for model in (Net(), removed, nn.Sequential(adapted(), adapted())):
            refuses(model, "adapters apply_aira", lambda: use(model))

def recount(state): return {**state, "aira.tensors": torch.tensor(len(state) - 1)}
BROKEN = [  # how a file goes wrong, and the words that the error must have
    (lambda s: {k: t for k, t in s.items() if k != "up.lora_B"}, "up.lora_B missing"),
    (lambda s: {k: t for k, t in s.items() if k[:3] != "up."}, "18 aira_state_dict 14"),
    (lambda s: {k: t for k, t in s.items() if k != "aira.tensors"}, "aira_state_dict"),
    (lambda s: {}, "aira_state_dict"), (lambda s: NET, "aira_state_dict"),
    (lambda s: recount({k: t for k, t in s.items() if k != "up.lora_B"}), "up.lora_B missing"),
    (lambda s: recount({**s, "side.lora_A": s["up.lora_A"]}), "side.lora_A unexpected"),
    (lambda s: {"x." + k if "up." in k else k: t for k, t in s.items()}, "x.up.lora_A unexpected"),
    (lambda s: {**s, "up.lora_A": s["up.lora_A"][:, 1:]}, "up.lora_A misshapen"),
    (lambda s: {**s, "up.lora_A": s["up.lora_A"][1:]}, "up.lora_B misshapen"),
    (lambda s: recount({**s, "up.start_A": s["up.lora_A"]}), "up.start_B missing"),
    (lambda s: recount({k: t for k, t in s.items() if k != "up.loud"}), "up.loud missing"),
    (lambda s: {**s, "up.gains": s["up.gains"][1:]}, "up.gains misshapen"),
    (lambda s: {**s, "head.bias": torch.zeros(7)}, "head.bias misshapen"),
    (lambda s: {**s, "up.lora_A": s["up.lora_A"] * math.nan}, "up.lora_A NaN"),
    (lambda s: {**s, "head.bias": s["head.bias"] / 0}, "head.bias inf"), (lambda s: "a.pt", "")]

@pytest.mark.parametrize("spoil, words", BROKEN, ids=[row[1] for row in BROKEN])
def test_a_broken_file_is_named_and_changes_nothing(spoil, words):
    base = Net().double()
    state = aira_state_dict(adapted(copy.deepcopy(base), train=1, also_train="head"))
    refuses(base, words, lambda: load_aira(base, spoil(state)))
    load_aira(base, state)  # whereas the whole file does
    refuses(base, "adapters", lambda: load_aira(base, state))

def chance(rng):
    """A model of random depth, widths, nesting, biases, shared layers, frozen parts, odd names."""
    model, width, square = nn.Sequential(), 6, None
    for i in range(rng.randint(1, 5)):
        out = width if rng.random() < 0.3 else rng.choice([1, 3, 6, 9, 16])
        layer = Conv1D(out, width) if rng.random() < 0.3 else nn.Linear(width, out, i % 2 == 0)
        layer = square if square is not None and out == width else layer  # shared
        square, width = layer if out == width else None, out
        layer.requires_grad_(rng.random() < 0.7)
        nest = rng.choice([lambda m: m, nn.Sequential, lambda m: nn.Sequential(nn.Sequential(m))])
        name = rng.choice(["lora_A", "base", "weird-name", "0", "é"]) + "_" * i
        model.add_module(name, nest(layer))
    return model

@pytest.mark.filterwarnings("ignore:rank=")
def test_invariants_on_100_random_models():
    """Bit-identical start in every dtype, budget, round trips; removed, exactly what went in."""
    for number in range(100):
        rng = random.Random(number)
        torch.manual_seed(number)
        dtype = rng.choice(DTYPES)
        model, x = chance(rng).to(dtype), inputs(24, 6, dtype)
        base, before, output = copy.deepcopy(model), fingerprint(model), model(x)
        report = apply_aira(
            model, lambda: model(x), rank=rng.randint(1, 9), init=rng.choice(INITS),
            amplify=rng.choice([-0.5, 0, 0.5]), allocate=rng.choice([knapsack_ranks, greedy_ranks]))
        tensors = trainable(model)
        assert bits(model(x)) == bits(output) and {t.dtype for t in tensors} == {
            torch.promote_types(dtype, torch.float32)}, number
        assert sum(p.numel() for p in tensors) <= report.budget, number
        for tensor in tensors: nn.init.normal_(tensor, 0, 0.02)
        exact, twin = x.double(), copy.deepcopy(model).double()
        check_round_trips(base.double(), twin, lambda m: m(exact), 1e-8)
        remove_aira(model)
        assert fingerprint(model) == before and bits(model(x)) == bits(output), number

# ---- train_toy.py --------------------------------------------------------------------------------
TINY = {kind: (kind, 32, 1, 20) for kind in ("gpt", "vit")}

def test_toy_grid_grows_until_the_best_rate_lies_inside_and_no_diverged_one_wins(monkeypatch):
    def run(task, job):  # the best rate is .256, far from .016; above .6 it diverges
        loss = abs(math.log2(job.rate / 0.256)) + job.seed - 101
        return {"loss": math.nan if job.rate > 0.6 else loss}

    monkeypatch.setattr(train_toy, "run", run)
    grid = train_toy.tune(TINY["gpt"], (101, 102), train_toy.Row("AIRA", 4, 10))
    assert min(grid, key=grid.get) == (0, 0.256) and max(grid) == (0, 0.512)
    assert grid[0, 0.256] == 0.5

def test_toy_steps_to_a_loss_and_errors_of_paired_differences():
    assert train_toy.crossing([10, 20, 30], [3.0, 2.0, 1.0], 1.5) == 25
    assert train_toy.crossing([10, 20], [3.0, 2.0], 3.5) == 10
    assert train_toy.crossing([10], [3.0], 1) == math.inf
    ours, theirs = ([{"windows": w} for w in runs] for runs in (
        [[1.0, 2.0], [3.0, 5.0]], [[1.5, 2.5], [3.0, 7.0]]))
    seeds, windows = (statistics.stdev(d) / 2 ** 0.5 for d in ([-0.5, -1.0], [-0.25, -1.25]))
    assert train_toy.versus(ours, theirs) == f"-0.750 +-{seeds:.3f}/{windows:.3f}"

@pytest.mark.parametrize("kind", ["gpt", "vit"])
def test_toy_runs_every_method_and_each_is_another(kind):
    methods = train_toy.METHODS if kind == "gpt" else ["LoRA", "AIRA", train_toy.FULL]
    runs = {name: train_toy.run(TINY[kind], train_toy.Job(name, 4, 10, 0, 0.01, 1, 1))
            for name in methods}
    assert np.isfinite([run["curve"] for run in runs.values()]).all()
    assert len({run["loss"] for run in runs.values()}) == len(methods)
    for name, run in runs.items():
        trained, lora = run["sizes"][0], runs["LoRA"]["sizes"][0]
        assert trained > lora if name.startswith(train_toy.FULL) else 0.9 * lora < trained <= lora
