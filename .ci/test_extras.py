# SPDX-License-Identifier: MIT
"""aira.py with the packages around it; a test skips where its package is not installed.

Hugging Face's models, PEFT, Trainer (trainer.py), gradient checkpointing, half precision,
torch.compile, two processes, and train_toy.py's LoRA against PEFT's.
"""

import copy
import functools
import itertools
import re
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / ".ci")]
import train_toy  # noqa: E402
from aira import (  # noqa: E402
    AiraLinear,
    aira_state_dict,
    apply_aira,
    load_aira,
    merge_aira,
    remove_aira,
    save_peft,
)

torch.set_num_threads(1)
every_init = pytest.mark.parametrize("init", ["svd_A", "svd"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- Models ------------------------------------------------------------------------------------


RANDOM = torch.Generator().manual_seed(0)
PIXELS = torch.randn(8, 3, 16, 16, generator=RANDOM)
CLASSES = torch.tensor([0, 1] * 4)
IDS = torch.randint(0, 60, (8, 12), generator=RANDOM)
SEEN = torch.cat([torch.full((8, 4), 63), IDS], 1)  # for Llava: 4 places for an image's patches
WORDS = dict(input_ids=IDS, labels=IDS)
IMAGES = dict(pixel_values=PIXELS, labels=CLASSES)

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
TEXT = dict(SMALL, vocab_size=64)
GROUPED = dict(TEXT, num_key_value_heads=1)  # two heads of queries share one of keys and values
VISION = dict(SMALL, image_size=16, patch_size=8)
LLAVA = dict(
    text_config=dict(GROUPED, model_type="llama"),
    vision_config=dict(VISION, model_type="clip_vision_model"),
    image_token_index=63,
    vision_feature_layer=-1,
)
CLIP = dict(text_config=dict(TEXT, eos_token_id=2), vision_config=VISION, projection_dim=16)

BERT, LLAMA = "BertForSequenceClassification", "LlamaForCausalLM"
GPT, VIT = "GPT2LMHeadModel", "ViTForImageClassification"
MODELS = {  # class: arguments of its config, a batch, what to adapt
    GPT: (dict(vocab_size=64, n_embd=32, n_layer=2, n_head=2), WORDS, {}),
    BERT: (
        TEXT,
        dict(input_ids=IDS, labels=CLASSES),
        dict(targets=["query", "value", "dense"], also_train="classifier"),
    ),
    LLAMA: (GROUPED, WORDS, {}),
    "T5ForConditionalGeneration": (dict(TEXT, d_ff=48, decoder_start_token_id=0), WORDS, {}),
    VIT: (VISION, IMAGES, dict(also_train="classifier")),
    "CLIPModel": (CLIP, dict(input_ids=IDS, pixel_values=PIXELS, return_loss=True), {}),
    "LlavaForConditionalGeneration": (
        LLAVA,
        dict(input_ids=SEEN, labels=SEEN, pixel_values=PIXELS),
        {},
    ),
}
CASES = [*itertools.product(MODELS, ["svd_A"]), (GPT, "svd"), (VIT, "svd")]
every_model = pytest.mark.parametrize("name, init", CASES)


def build(name):
    """-> a small random model, without dropout; a batch; what to adapt and to train besides."""
    arguments, batch, what = MODELS[name]
    torch.manual_seed(0)
    Model = getattr(pytest.importorskip("transformers"), name)
    return Model(Model.config_class(**arguments)).eval(), batch, what


def tune(model, batch, steps=4, rate=0.01):
    """Train with AdamW -> the loss at each step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adapted(name, steps=0, **options):
    """-> a model with adapters, after some steps; a batch."""
    model, batch, what = build(name)
    apply_aira(model, lambda: model(**batch), **{**what, **options})
    tune(model, batch, steps)
    return model, batch


def answer(model, batch):
    with torch.no_grad():
        out = model(**batch)
    return out["logits_per_image" if "logits_per_image" in out else "logits"]


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def same(a, b):
    close(a, b, 0)


def ranks(model):
    """{name: rank} of all adapters."""
    return {n: len(m.lora_A) for n, m in model.named_modules() if isinstance(m, AiraLinear)}


@every_model
def test_model_starts_as_the_base_trains_loads_merges_and_comes_back(name, init):
    """Conv1D, tied heads, grouped queries, two encoders: each model class has its own trap."""
    model, batch, what = build(name)
    base, fresh = copy.deepcopy(model), copy.deepcopy(model)
    before = answer(model, batch)
    apply_aira(model, lambda: model(**batch), **what, init=init)
    assert len(set(ranks(model).values())) > 1
    same(answer(model, batch), before)

    losses = tune(model, batch)
    assert losses[-1] < losses[0]
    trains = re.compile("lora_A|lora_B|" + what.get("also_train", "lora_A"))
    for key, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == bool(trains.search(key))

    trained = answer(model, batch)
    state = aira_state_dict(model)
    load_aira(fresh, state)
    same(answer(fresh, batch), trained)
    merge_aira(fresh)
    close(answer(fresh, batch), trained)
    remove_aira(model)
    frozen = {key: tensor for key, tensor in model.state_dict().items() if key not in state}
    same(frozen, {key: base.state_dict()[key] for key in frozen})


# ---- PEFT --------------------------------------------------------------------------------------


def load_peft(base, directory):
    """The adapters on the untouched base; PEFT must find all that it wants there, and no more."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*(missing|unexpected|match|fan_in_fan_out)")
        model = peft.PeftModel.from_pretrained(base, directory)
    wanted = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    packed = pytest.importorskip("safetensors.torch")
    assert set(wanted) == set(packed.load_file(directory / "adapter_model.safetensors"))
    return model


@every_model
def test_peft_loads_what_save_peft_writes(name, init, tmp_path):
    """Who has PEFT needs no aira.py."""
    base, _, _ = build(name)
    model, batch = adapted(name, steps=4, init=init, also_train=())
    save_peft(model, tmp_path)
    there = load_peft(base, tmp_path)
    close(answer(there, batch), answer(model, batch))
    merge_aira(model)
    close(dict(there.merge_and_unload().state_dict()), dict(model.state_dict()))


def alike():
    """Layers 0, 1.0, 1.1.0, 1.fc, 1.head, fc, overhead, head: some end as others do."""
    inner = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6)))
    model = nn.Sequential(nn.Linear(6, 6), inner)
    for name in ("fc", "head"):
        inner.add_module(name, nn.Linear(6, 6))
    for name in ("fc", "overhead", "head"):
        model.add_module(name, nn.Linear(6, 6))
    return model, torch.randn(32, 6)


LIKE = ["0", "1.0", "0 1.1.0", "0 1.0 1.1.0 head", "fc", "1.fc", "fc 1.fc"]


@pytest.mark.parametrize("names", LIKE)
def test_peft_adapts_these_layers_and_none_of_like_names(names, tmp_path):
    """PEFT takes a name for the end of names; ours are whole, and each has its own rank."""
    model, x = alike()
    base = copy.deepcopy(model)
    state = {}
    for rank, name in enumerate(names.split(), 1):
        state[f"{name}.lora_A"] = torch.rand(rank, 6) / 9
        state[f"{name}.lora_B"] = torch.rand(6, rank)
        state[f"{name}.shrink"] = torch.eye(6)[:2] / 2
        state[f"{name}.gains"] = torch.rand(rank)
    load_aira(model, state)
    save_peft(model, tmp_path)
    there, expected = load_peft(base, tmp_path), model(x)
    close(there(x), expected)
    close(there.merge_and_unload()(x), expected)


@pytest.mark.parametrize("trained", ["1.head", "fc.base_layer.bias", "norm"])
def test_what_peft_would_lose_is_not_exported(trained, tmp_path):
    """A module of also_train, a bias that the user lets train, BatchNorm's statistics."""
    model, x = alike()
    if trained == "norm":
        model.add_module("norm", nn.BatchNorm1d(6))
    apply_aira(model, lambda: model(x), exclude="1.head")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.startswith(trained))
    with pytest.raises(ValueError, match=trained.replace(".base_layer", "") + ".*merge"):
        save_peft(model, tmp_path)
    assert not list(tmp_path.iterdir())


# ---- Trainer: .ci/trainer.py -------------------------------------------------------------------


@pytest.fixture
def given(tmp_path, monkeypatch):
    """-> trainer.py; what its train needs, in a folder of its own: a BERT without a head."""
    hf = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    import trainer

    options = dict(use_cpu=True, report_to="none", per_device_train_batch_size=4)
    small = functools.partial(hf.TrainingArguments, **options)
    monkeypatch.setattr(trainer, "TrainingArguments", small)
    model, batch, _ = build(BERT)
    model.bert.save_pretrained("base")
    data = [{"input_ids": ids, "labels": label} for ids, label in zip(IDS, CLASSES, strict=True)]
    Path("run").mkdir()
    torch.manual_seed(0)
    return trainer, dict(base="base", data=3 * data, batches=[batch], steps=6, save_steps=2)


def stop_at(step, patch):
    """Let the Trainer fail in that step."""
    Trainer = pytest.importorskip("transformers").Trainer
    plain, steps = Trainer.training_step, itertools.count(1)

    def training_step(*args, **kwargs):
        if next(steps) == step:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    patch.setattr(Trainer, "training_step", training_step)


@pytest.mark.parametrize("step, seed", [(2, 0), (5, 1)])
def test_an_interrupted_trainer_ends_as_an_uninterrupted_one(given, monkeypatch, step, seed):
    """Before the first checkpoint it starts anew; after, even a head of another seed is undone."""
    trainer, arguments = given
    trainer.train(**arguments)
    Path("run").rename("whole")
    Path("run").mkdir()
    torch.manual_seed(0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(step, patch)
        trainer.train(**arguments)
    assert Path("run/checkpoint-4").exists() == (step == 5)
    torch.manual_seed(seed)
    trainer.train(**arguments)
    ended, whole = torch.load("run/adapter.pt"), torch.load("whole/adapter.pt")
    close(ended, whole)
    assert any(tensor.any() for key, tensor in whole.items() if "lora_B" in key)


def test_an_adapter_can_be_made_of_a_checkpoint(given):
    """The base has a new head, of other random numbers; both are in the files."""
    trainer, arguments = given
    trainer.train(**arguments)
    model = pytest.importorskip("transformers").AutoModelForSequenceClassification
    fresh = model.from_pretrained("base", num_labels=2)
    same(trainer.adapter_of("run/checkpoint-6", fresh), torch.load("run/adapter.pt"))


# ---- Torch -------------------------------------------------------------------------------------


@every_init
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, init):
    """It runs the forward pass twice, with or without autograd."""
    model, batch = adapted(LLAMA, steps=1, init=init)  # while B is zero, A has no gradient

    def gradients():
        model.train().zero_grad()
        model(**batch).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    assert all(gradient.any() for gradient in plain)
    torch.testing.assert_close(gradients(), plain)


def exact_weight(m):
    """W + (B diag(g) A - B0 diag(g) A0) (I - P^T P), dense and in double precision."""
    W, A, B = m.base_layer.weight.double(), m.lora_A.double(), m.lora_B.double()
    change = B * m.gains.double() @ A
    if m.start_A is not None:
        change -= m.start_B.double() @ m.start_A.double()
    P = m.shrink.double()
    return (W + change @ (torch.eye(m.in_features) - P.T @ P)).detach()


HALF = [
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]


def start_and_tune(name, model, context, init):
    """Adapt it under an autocast and train it -> ranks, losses."""
    _, batch, what = build(name)
    before = answer(model, batch)
    with context:
        apply_aira(model, lambda: model(**batch), **what, rank=3, init=init)
    same(answer(model, batch), before)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    rate = 0.0025 if init == "svd" else 0.01  # the best rates differ as much in .ci/bench.py
    return torch.tensor([*ranks(model).values()]), tune(model, batch, 12, rate)


@every_init
@pytest.mark.parametrize("dtype, cast", HALF)
def test_half_precision_and_autocast_follow_float32(dtype, cast, init):
    """G x is a small difference of large numbers, and a step of Adam is small: both need digits."""
    half = build(LLAMA)[0].to(dtype)
    full = copy.deepcopy(half).float()  # the same numbers
    autocast = functools.partial(torch.autocast, "cpu", cast, enabled=cast is not None)
    half.forward = autocast()(half.forward)
    found, losses = start_and_tune(LLAMA, half, autocast(), init)
    exact, exact_losses = start_and_tune(LLAMA, full, nullcontext(), init)
    assert (found - exact).abs().sum() <= 2
    close(losses, exact_losses, 0.003)
    assert losses[-1] < losses[0] - (0.05 if init == "svd" else 0.1)

    adapters = [m for m in half.modules() if isinstance(m, AiraLinear)]
    exact = [exact_weight(m) for m in adapters]
    with autocast():
        merge_aira(half)
    for m, weight in zip(adapters, exact, strict=True):
        merged, rounding = m.base_layer.weight, (weight.to(dtype) - weight).abs().max()
        assert merged.dtype == dtype
        # float32's own digits; with init="svd" factors, and so weights, are larger
        digits = 4e-7 * weight.abs().max() if init == "svd" else 1e-7
        assert (merged - weight).abs().max() <= rounding + digits  # only rounded, once


def test_under_a_default_dtype_of_half_the_adapters_are_float32():
    """Some load models under it; small steps would be rounded away."""
    model = build(VIT)[0]
    torch.set_default_dtype(torch.bfloat16)
    try:
        losses = start_and_tune(VIT, model, nullcontext(), "svd_A")[1]
    finally:
        torch.set_default_dtype(torch.float32)
    assert losses[-1] < losses[0]
    assert {tensor.dtype for tensor in aira_state_dict(model).values()} == {torch.float32}


@every_init
def test_compiled_without_graph_breaks_it_learns_the_same(init):
    """A graph break in each layer would cost more than compiling brings."""
    torch._dynamo.reset()
    model, batch = adapted(LLAMA, init=init)
    twin, _ = adapted(LLAMA, init=init)
    twin.compile(fullgraph=True, backend="eager")
    close(tune(twin, batch), tune(model, batch))
    close(aira_state_dict(torch.compile(twin)), aira_state_dict(model), 1e-4)


def work(process, folder):
    """One of two processes, each with its own half of the data and seed; results to a file."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", store, rank=process, world_size=2)
    found = []
    for init in ("svd_A", "svd"):
        model, whole, what = build(VIT)
        batch = {key: tensor.chunk(2)[process] for key, tensor in whole.items()}
        torch.manual_seed(process)
        report = apply_aira(model, lambda: model(**batch), rank=3, init=init, **what)  # noqa: B023
        start = aira_state_dict(model)
        parallel = nn.parallel.DistributedDataParallel(model)
        losses = tune(parallel, batch)
        ends = aira_state_dict(parallel), answer(model, whole)
        found.append((report, start, losses, *ends))
    torch.save(found, f"{folder}/{process}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_with_different_data_have_one_adapter(tmp_path):
    """DDP averages gradients by position: with other ranks or factors it would mix up layers."""
    torch.multiprocessing.spawn(work, [str(tmp_path)], nprocs=2)
    one, two = (torch.load(tmp_path / f"{process}.pt") for process in range(2))
    for (report, start, losses, end, logits), other in zip(one, two, strict=True):
        assert report == other[0]
        same(start, other[1])
        same(end, other[3])
        assert losses != other[2]  # the data were different
        assert losses[-1] < losses[0] and other[2][-1] < other[2][0]
        fresh, batch, _ = build(VIT)
        load_aira(fresh, end)
        assert len(set(ranks(fresh).values())) > 1
        same(answer(fresh, batch), logits)


# ---- train_toy.py ------------------------------------------------------------------------------


def with_loss(forward, x):
    logits = forward(x)
    return {"loss": F.cross_entropy(logits.flatten(0, 1), x.roll(-1, 1).flatten())}


@pytest.mark.parametrize("scale", [1, 16])
def test_the_baseline_is_pefts_lora_step_for_step(scale):
    """The same start, data and optimizer: the same losses."""
    peft = pytest.importorskip("peft")
    ours = train_toy.Transformer("gpt")
    theirs = copy.deepcopy(ours).requires_grad_(False)
    train_toy.lora(ours, None, scale)
    rank = train_toy.RANK
    names = list(train_toy.TARGETS)
    config = peft.LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=names)
    peft.inject_adapter_in_model(config, theirs)
    for name, layer in theirs.named_modules():
        if name.endswith(train_toy.TARGETS):
            layer.lora_A.default.weight.data.copy_(ours.get_submodule(name).lora_A)

    x = torch.randint(256, (16, 64))
    losses = []
    for model in (ours, theirs):
        model.forward = functools.partial(with_loss, model.forward, x)
        losses.append(tune(model, {}, steps=8))
    assert losses[0][-1] < losses[0][0]
    close(*losses)
