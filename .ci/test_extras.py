# SPDX-License-Identifier: MIT
"""aira.py with the packages around it: Hugging Face models (text, images, few-shot CLIP, a vision-
language Llava, a denoising transformer), PEFT, Trainer, gradient checkpointing, half precision,
torch.compile and export, DDP and FSDP2.  A test skips where its package is not installed."""
import copy, json, sys, warnings
from pathlib import Path
import pytest, torch, torch.nn as nn, torch.nn.functional as F
sys.path.insert(0, str(Path(__file__).parent.parent))
from aira import (SCALE, TENSORS, AiraLinear, aira_state_dict, apply_aira, load_aira, merge_aira,
                  remove_aira, save_peft)
torch.set_num_threads(1)

@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

class Denoiser(nn.Module):
    """Image generation: a transformer, with one layer for q, k and v, predicts the noise."""
    def __init__(self):
        super().__init__()
        self.patch, self.time, self.qkv = nn.Linear(192, 32), nn.Linear(1, 32), nn.Linear(32, 96)
        self.mix, self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 48), nn.Linear(48, 32)
        self.final = nn.Linear(32, 192)
    def forward(self, noisy, level, noise):
        noisy, noise = (F.pixel_unshuffle(t, 8).flatten(2).mT for t in (noisy, noise))  # patches
        x = self.patch(noisy) + self.time(level)[:, None]  # (image, patch, channel)
        heads = self.qkv(F.layer_norm(x, [32])).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        x = x + self.mix(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        x = self.final(x + self.down(F.gelu(self.up(F.layer_norm(x, [32])))))
        return {"logits": x, "loss": F.mse_loss(x, noise)}

RANDOM = torch.Generator().manual_seed(0)
PIXELS, NOISE = torch.randn(2, 8, 3, 16, 16, generator=RANDOM)
LEVEL, CLASSES = torch.arange(1, 9.)[:, None] / 9, torch.tensor([0, 1] * 4)
IDS = torch.randint(0, 60, (8, 12), generator=RANDOM)
WORDS, IMAGES = dict(input_ids=IDS, labels=IDS), dict(pixel_values=PIXELS, labels=CLASSES)
SEEN = torch.cat([torch.full((8, 4), 63), IDS], 1)  # for Llava: 4 places for an image's patches
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
TEXT, VISION = dict(SMALL, vocab_size=64), dict(SMALL, image_size=16, patch_size=8)
GROUPED = dict(TEXT, num_key_value_heads=1)  # two heads of queries share one of keys and values
MODELS = {  # class: arguments of its config, a batch, what to adapt
    "GPT2LMHeadModel": (dict(vocab_size=64, n_embd=32, n_layer=2, n_head=2), WORDS, {}),
    "BertForSequenceClassification": (TEXT, dict(input_ids=IDS, labels=CLASSES), dict(
        targets=["query", "value", "dense"], also_train=["classifier"])),
    "LlamaForCausalLM": (GROUPED, WORDS, {}),
    "T5ForConditionalGeneration": (dict(TEXT, d_ff=48, decoder_start_token_id=0), WORDS, {}),
    "ViTForImageClassification": (VISION, IMAGES, dict(also_train=["classifier"])),
    "CLIPModel": (dict(text_config=dict(TEXT, eos_token_id=2), vision_config=VISION,  # few-shot
        projection_dim=16), dict(input_ids=IDS, pixel_values=PIXELS, return_loss=True), {}),
    "LlavaForConditionalGeneration": (  # vision and language
        dict(text_config=dict(GROUPED, model_type="llama"), image_token_index=63,
             vision_config=dict(VISION, model_type="clip_vision_model"), vision_feature_layer=-1),
        dict(input_ids=SEEN, labels=SEEN, pixel_values=PIXELS), {}),
    "Denoiser": ({}, dict(noisy=torch.lerp(PIXELS, NOISE, LEVEL[:, :, None, None]), level=LEVEL,
                          noise=NOISE), dict(also_train=["final"]))}
every_model = pytest.mark.parametrize("name, init", [(name, "svd_A") for name in MODELS] + [
    ("GPT2LMHeadModel", "svd"), ("ViTForImageClassification", "svd"), ("Denoiser", "svd")])

def build(name):  # a small random model, without dropout; a batch; what to adapt
    arguments, batch, what = MODELS[name]
    torch.manual_seed(0)
    if name == "Denoiser": return Denoiser(), batch, what
    Model = getattr(pytest.importorskip("transformers"), name)
    return Model(Model.config_class(**arguments, name_or_path="some/base")).eval(), batch, what

def tune(model, batch, steps=4):  # AdamW -> the loss at each step
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(model(**batch)["loss"])
        losses[-1].backward()
        optimizer.step()
    return [loss.item() for loss in losses]

def adapted(name, steps=0, **options):  # a model with adapters, after some steps; a batch
    model, batch, what = build(name)
    apply_aira(model, lambda: model(**batch), **what, **options)
    tune(model, batch, steps)
    return model, batch

def answer(model, batch):
    with torch.no_grad(): out = model(**batch)
    return out["logits_per_image" if "logits_per_image" in out else "logits"]
def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)

@every_model
def test_model_starts_as_the_base_trains_loads_merges_and_comes_back(name, init):
    model, batch, what = build(name)
    base, fresh, before = copy.deepcopy(model), copy.deepcopy(model), answer(model, batch)
    report = apply_aira(model, lambda: model(**batch), **what, init=init)
    assert len({row.rank for row in report.rows}) > 1
    assert torch.equal(answer(model, batch), before)
    losses = tune(model, batch)
    assert losses[-1] < losses[0]
    trains = ["lora_A", "lora_B", *what.get("also_train", [])]
    for key, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == any(part in key for part in trains)
    trained = answer(model, batch)
    load_aira(fresh, aira_state_dict(model))
    assert torch.equal(answer(fresh, batch), trained) and not torch.equal(trained, before)
    merge_aira(fresh)
    close(answer(fresh, batch), trained)
    assert [type(m) for m in fresh.modules()] == [type(m) for m in base.modules()]
    remove_aira(model)
    close(dict(model.state_dict()), dict(base.state_dict()), 0)

def load_peft(base, directory):
    """The adapters on the untouched base; PEFT must find all that it wants there, and no more."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*(missing|unexpected|match|fan_in_fan_out)")
        model = peft.PeftModel.from_pretrained(base, directory)
    keys = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    assert keys == set(torch.load(directory / "adapter_model.bin", weights_only=True))
    return model

@every_model
def test_peft_loads_what_save_peft_writes(name, init, tmp_path):
    base, (model, batch) = build(name)[0], adapted(name, steps=4, init=init)
    save_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == ("some/base" if name != "Denoiser" else None)
    tasks = {"GPT2LMHeadModel": "CAUSAL_LM", "LlamaForCausalLM": "CAUSAL_LM"}
    assert config["task_type"] == {**tasks, "BertForSequenceClassification": "SEQ_CLS"}.get(name)
    there = load_peft(base, tmp_path)
    close(answer(there, batch), answer(model, batch))
    merge_aira(model)
    close(dict(there.merge_and_unload().state_dict()), dict(model.state_dict()))

def alike():  # layers 0, 1.0, 1.1.0, 1.fc, 1.head, fc, overhead, head: some end as others do
    new = lambda: nn.Linear(6, 6)
    model = nn.Sequential(new(), nn.Sequential(new(), nn.Sequential(new())))
    for name in ("fc", "head"): model[1].add_module(name, new())
    for name in ("fc", "overhead", "head"): model.add_module(name, new())
    return model, torch.randn(32, 6)

@pytest.mark.parametrize("names", [["0"], ["1.0"], ["0", "1.1.0"], ["0", "1.0", "1.1.0", "head"],
                                   ["fc"], ["1.fc"], ["fc", "1.fc"]])
def test_peft_adapts_these_layers_and_none_of_like_names(names, tmp_path):
    model, x = alike()
    base, state = copy.deepcopy(model), {"1.head.weight": torch.ones(6, 6), "1.head.bias": x[0]}
    for rank, name in enumerate(names, 1):  # load_aira takes exact names and any ranks
        tensors = torch.rand(rank, 6) / 9, torch.rand(6, rank), torch.eye(6)[:2], torch.rand(3)
        state |= {f"{name}.{t}": tensor for t, tensor in zip(TENSORS, tensors)}
    load_aira(model, {**state, "aira.tensors": torch.tensor(len(state))})
    save_peft(model, tmp_path)
    there, expected = load_peft(base, tmp_path), model(x)
    close(there(x), expected)
    close(there.merge_and_unload()(x), expected)

@pytest.mark.parametrize("targets", [["fc"], None])
def test_what_peft_would_confuse_is_refused(targets, tmp_path):
    (model, x), layer = alike(), nn.Linear(6, 6)
    apply_aira(model, lambda: model(x), rank=2, targets=targets, also_train="head")
    with pytest.raises(ValueError, match="'1.head', 'overhead'.*merge_aira"):  # they end in "head"
        save_peft(model, tmp_path)
    shared = nn.Sequential(layer, nn.Tanh(), layer)
    apply_aira(shared, lambda: shared(x), rank=2)
    with pytest.raises(ValueError, match="'2'.*merge_aira"):  # PEFT would adapt only one of them
        save_peft(shared, tmp_path)
    assert not list(tmp_path.iterdir())

def test_trainer_trains_and_resumes_in_a_new_process(tmp_path):
    """Load there what apply_aira made here: made anew, ranks might not be the checkpoint's."""
    hf, _ = pytest.importorskip("transformers"), pytest.importorskip("accelerate")
    arguments = hf.TrainingArguments(tmp_path, max_steps=6, save_steps=3, logging_steps=1,
        learning_rate=0.01, per_device_train_batch_size=4, use_cpu=True, report_to="none")
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    model, resumed = adapted("LlamaForCausalLM")[0], build("LlamaForCausalLM")[0]
    load_aira(resumed, aira_state_dict(model))
    trainer = hf.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    assert trainer.state.log_history[5]["loss"] < trainer.state.log_history[0]["loss"]
    trainer = hf.Trainer(resumed, arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    close(aira_state_dict(resumed), aira_state_dict(model))

@pytest.mark.parametrize("init", ["svd_A", "svd"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, init):
    model, batch = adapted("LlamaForCausalLM", steps=1, init=init)  # while B is zero, A has none
    def gradients():
        model.train().zero_grad()
        model(**batch).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]
    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert model.is_gradient_checkpointing and all(gradient.any() for gradient in plain)
    torch.testing.assert_close(gradients(), plain)

@pytest.mark.parametrize("init", ["svd_A", "svd"])
@pytest.mark.parametrize("dtype, cast", [(torch.bfloat16, None), (torch.float16, None)] + [
    (torch.float32, torch.bfloat16), (torch.float32, torch.float16)])
def test_half_precision_and_autocast_follow_float32(dtype, cast, init):
    half, batch, what = build("LlamaForCausalLM")
    full, ranks, losses = copy.deepcopy(half.to(dtype)).float(), [], []  # the same numbers
    half.forward = torch.autocast("cpu", cast, enabled=cast is not None)(half.forward)
    for model in (half, full):
        before = answer(model, batch)
        with torch.autocast("cpu", cast, enabled=cast is not None and model is half):
            rows = apply_aira(model, lambda: model(**batch), **what, rank=3, init=init).rows
        assert torch.equal(answer(model, batch), before)
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        ranks.append(torch.tensor([row.rank for row in rows]))
        losses.append(tune(model, batch, steps=12))
    assert (ranks[0] - ranks[1]).abs().sum() <= 2
    close(*losses, 0.003)
    assert losses[0][-1] < losses[0][0] - 0.1
    adapters, exact = [m for m in half.modules() if isinstance(m, AiraLinear)], []
    for m in adapters:
        W, A, B = (t.detach().double() for t in (m.base.weight, m.lora_A, m.lora_B))
        A0, B0, G = 0 * A, 0 * B, torch.eye(m.in_features).double()
        if init == "svd_A":
            loud, gains = m.loud.double(), m.gains.double()
            G = gains[-1] * G + loud.T * (gains[:-1] - gains[-1]) @ loud
        else: A0, B0 = m.start_A.double(), m.start_B.double()
        exact.append(W + SCALE * ((B0 + B) @ (A0 + A) - B0 @ A0) @ G)
    with torch.autocast("cpu", cast, enabled=cast is not None): merge_aira(half)
    for merged, weight in zip((m.base.weight for m in adapters), exact):  # only rounded, once
        rounding = (weight.to(dtype) - weight).abs().max()
        assert merged.dtype == dtype and (merged - weight).abs().max() <= rounding + 1e-7

@pytest.mark.parametrize("backend, init", [("eager", "svd_A"), ("inductor", "svd")])
def test_compiled_without_graph_breaks_it_learns_the_same(backend, init):
    torch._dynamo.reset()
    try: torch.compile(torch.sin, backend=backend)(torch.ones(3))
    except Exception: pytest.skip("inductor needs a C++ compiler")
    model, twin = (adapted("LlamaForCausalLM", init=init)[0] for _ in range(2))
    part = twin if backend == "eager" else twin.model.layers[0].mlp.down_proj  # compiling is slow
    part.compile(fullgraph=True, backend=backend)
    close(tune(twin, WORDS), tune(model, WORDS))
    close(aira_state_dict(torch.compile(twin)), aira_state_dict(model), 1e-4)

def test_merged_model_exports():
    model, batch = adapted("ViTForImageClassification", steps=4)
    merge_aira(model)
    close(answer(torch.export.export(model, (), batch).module(), batch), answer(model, batch))

CASES = [("DDP", "svd_A"), ("DDP", "svd"), ("FSDP2", "svd_A"), ("FSDP2", "svd")]

def work(process, folder):  # one of two processes, on its half of the batch; results to a file
    import torch.distributed.fsdp as fsdp
    dist, found = torch.distributed, []
    dist.init_process_group("gloo", f"file://{folder}/store", rank=process, world_size=2)
    for kind, init in CASES:
        model, batch, what = build("Denoiser")
        batch = {key: t.chunk(2)[process] for key, t in batch.items()}
        rows = apply_aira(model, lambda: model(**batch), rank=3, init=init, **what).rows
        start = aira_state_dict(model)
        layers = [m for m in model.children() if isinstance(m, AiraLinear)]
        for m in [*layers, model] if kind == "FSDP2" else []: fsdp.fully_shard(m)
        if kind == "DDP": model = nn.parallel.DistributedDataParallel(model)
        losses = torch.tensor(tune(model, batch))
        found.append(([tuple(row) for row in rows], start, losses, aira_state_dict(model)))
    for model in (Denoiser().to("meta"), fsdp.fully_shard(Denoiser())):
        with pytest.raises(ValueError, match="'patch': meta, sharded"):
            apply_aira(model, lambda: model(**batch))
    torch.save(found, f"{folder}/{process}.pt")
    dist.destroy_process_group()

def comparable(state, key):  # singular vectors have no sign, and of equal values turn freely
    t, gains = state[key], state.get(key.replace(".loud", ".gains"))
    return t.T * (gains[:-1] - gains[-1]) @ t if key.endswith(".loud") else t.abs()

def test_two_processes_equal_one_and_refuse_sharded_weights(tmp_path):
    pytest.importorskip("torch", "2.6")  # which brought fully_shard
    torch.multiprocessing.spawn(work, [str(tmp_path)], nprocs=2)
    for (_, init), one, two in zip(CASES, *(torch.load(tmp_path / f"{n}.pt") for n in (0, 1))):
        (model, batch), fresh = adapted("Denoiser", rank=3, init=init), build("Denoiser")[0]
        assert one[0] == two[0] and one[0][0][2] == 8 * 4  # tokens of "patch", of both processes
        start = aira_state_dict(model)
        for key in start:  # of equal shapes, so of equal ranks
            assert torch.equal(one[1][key], two[1][key]) and torch.equal(one[3][key], two[3][key])
            close(comparable(one[1], key), comparable(start, key), 1e-4)
        close(((one[2] + two[2]) / 2).tolist(), tune(model, batch), 1e-4)
        assert one[2][-1] < one[2][0] and two[2][-1] < two[2][0]
        load_aira(fresh, one[3])
        close(answer(fresh, batch), answer(model, batch), 1e-3)

def test_parameters_alone_in_half_as_in_fsdp_mixed_precision():
    x, model = torch.randn(64, 32), nn.Sequential(nn.Linear(32, 32))
    x[:, 5] += 50  # what is left of it in G x is a small difference of large numbers
    apply_aira(model, lambda: model(x), rank=2)
    nn.init.normal_(model[0].lora_B)
    exact, half = model(x) - model[0].base(x), copy.deepcopy(model)
    for p in half.parameters(): p.data = p.data.bfloat16()
    B, A = half[0].factors()
    error = (x @ A.float().T @ B.float().T - exact).abs().max()
    assert error < 0.01 * exact.abs().max()
    assert half(x.bfloat16()).dtype == torch.bfloat16

def test_a_module_that_is_shared_with_also_train_and_a_head_that_came_later():
    model = nn.ModuleDict({"y": nn.Linear(4, 4), "fc": nn.Linear(4, 4), "block": nn.ModuleList()})
    model["block"].append(model["y"])
    model.forward, x = lambda x: model["y"](model["fc"](x)), torch.randn(9, 4)
    base = copy.deepcopy(model.state_dict())
    report = apply_aira(model, lambda: model(x), rank=1, also_train="block")
    assert [row.name for row in report.rows] == ["fc"] and report.skipped == {"y": "in also_train"}
    model["head"] = nn.Linear(4, 2)
    nn.init.zeros_(model["y"].weight)
    remove_aira(model)
    assert all(torch.equal(model.state_dict()[key], t) for key, t in base.items())

def test_ranks_of_wrong_number_and_a_default_dtype_of_half():
    x, base = torch.randn(64, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for ranks in ([1], [1, 1, 1]):
        with pytest.raises(ValueError, match="zip"):
            apply_aira(base, lambda: base(x), rank=2, allocate=lambda *problem: ranks)
    torch.set_default_dtype(torch.bfloat16)
    try: rows = apply_aira(base, lambda: base(x), rank=2).rows
    finally: torch.set_default_dtype(torch.float32)
    assert len(rows) == 2 and base[0].lora_A.dtype == torch.float32

def test_a_weight_tied_to_one_in_also_train_is_not_exported_as_if_it_were_not(tmp_path):
    model, x = nn.ModuleDict({n: nn.Linear(6, 6) for n in ("fc", "head", "wte")}), torch.randn(9, 6)
    model["wte"].weight = model["head"].weight
    model.forward = lambda x: model["head"](model["fc"](model["wte"](x)))
    apply_aira(model, lambda: model(x), rank=2, also_train="head")
    with pytest.raises(ValueError, match="'wte.weight'.*merge_aira"): save_peft(model, tmp_path)
    remove_aira(model)
    apply_aira(model, lambda: model(x), rank=2, also_train=["head", "wte"])
    save_peft(model, tmp_path)
