# SPDX-License-Identifier: MIT
"""aira.py with the packages around it; a test skips where its package is not installed.

Hugging Face's models, README's export to PEFT, half precision, torch.compile, two processes, and
train_toy.py's LoRA against PEFT's.
"""

import copy
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import train_toy  # noqa: E402
from aira import aira_state_dict, apply_aira, load_aira, merge_aira, remove_aira  # noqa: E402

torch.set_num_threads(1)
every_init = pytest.mark.parametrize("init", ["svd_A", "svd"])


@pytest.fixture(autouse=True)
def start(tmp_path, monkeypatch):
    """Each test has a folder of its own."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# ---- Hugging Face's models ---------------------------------------------------------------------

IDS = torch.arange(96).reshape(8, 12) * 7 % 60
WORDS = {"input_ids": IDS, "labels": IDS}
CLASSES = {"input_ids": IDS, "labels": torch.tensor([0, 1] * 4)}
SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
T5 = dict(vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=2, decoder_start_token_id=0)
BERT_OPTIONS = {"targets": ["query", "value", "dense"], "also_train": "classifier"}
MODELS = {  # arguments of its config, a batch, options of apply_aira
    "LlamaForCausalLM": (dict(SMALL, num_attention_heads=2, num_key_value_heads=1), WORDS, {}),
    "GPT2LMHeadModel": (dict(vocab_size=64, n_embd=32, n_layer=2, n_head=2), WORDS, {}),
    "T5ForConditionalGeneration": (dict(T5, num_heads=2, tie_word_embeddings=True), WORDS, {}),
    "BertForSequenceClassification": (dict(SMALL, num_attention_heads=2), CLASSES, BERT_OPTIONS),
}
every_model = pytest.mark.parametrize("name", MODELS)


def build(name):
    """-> a small random model, without dropout; a batch; options of apply_aira."""
    config, batch, options = MODELS[name]
    Model = getattr(pytest.importorskip("transformers"), name)
    torch.manual_seed(0)
    return Model(Model.config_class(**config)).eval(), batch, options


def train(model, batch, steps=4, rate=0.01):
    """-> the loss at each step."""
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


@torch.no_grad()
def logits_of(model, batch):
    return model(**batch)["logits"]


@every_init
@every_model
def test_models_train_load_merge_and_come_back(name, init):
    """Conv1D, tied heads, grouped queries, a new head, T5's reading of weights: a trap each."""
    model, batch, options = build(name)
    base, loaded = copy.deepcopy(model), copy.deepcopy(model)
    ranks = apply_aira(model, lambda: model(**batch), **options, init=init)
    assert len(set(ranks.values())) > 1 and "lm_head" not in ranks
    assert torch.equal(logits_of(model, batch), logits_of(base, batch))

    losses = train(model, batch)
    assert losses[-1] < losses[0]
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    trained = logits_of(model, batch)
    state = aira_state_dict(model)
    load_aira(loaded, state)
    assert torch.equal(logits_of(loaded, batch), trained)
    merge_aira(loaded)
    close(logits_of(loaded, batch), trained)
    remove_aira(model)
    for key, tensor in model.state_dict().items():
        assert key in state or torch.equal(tensor, base.state_dict()[key])


# ---- README's code -----------------------------------------------------------------------------


def snippet(words):
    """The code in README that contains these words."""
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    return next(block for block in blocks if words in block).split("```")[0]


def test_readme_usage():
    names = {}
    code = snippet("nn.Sequential")
    exec(code.replace("...", "torch.nn.init.normal_(model[0].lora_B)"), names)
    close(names["base"](names["x"]), names["model"](names["x"]))


def test_readme_with_hugging_face():
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    model, batch, _ = build("BertForSequenceClassification")
    model.bert.save_pretrained("base")  # without the head, which is drawn anew each time
    rows = [{"input_ids": ids[: 5 + i].tolist(), "label": i % 2} for i, ids in enumerate(IDS)]
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0}))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    training, loading = snippet("TrainingArguments").split("# In a new process:")
    names = {"BASE": "base", "data": 32 * rows, "tokenizer": tokenizer}
    exec(training, names)
    trained = names["model"].eval().cpu()
    exec(loading, names)
    close(logits_of(names["model"].eval(), batch), logits_of(trained, batch))


@every_init
@every_model
def test_readme_exports_to_peft(name, init):
    peft = pytest.importorskip("peft")
    model, batch, options = build(name)
    base, fresh = copy.deepcopy(model), copy.deepcopy(model)
    apply_aira(model, lambda: model(**batch), targets=options.get("targets"), init=init)
    train(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT sets fan_in_fan_out for Conv1D itself, and says so
        exec(snippet("import LoraConfig"), {"model": model, "base": base})
        there = peft.PeftModel.from_pretrained(fresh, "adapter")
    close(logits_of(there, batch), logits_of(model, batch))
    merge_aira(model)
    close(logits_of(there.merge_and_unload(), batch), logits_of(model, batch))


# ---- Torch -------------------------------------------------------------------------------------


def test_transformer_encoder_with_padding():
    """Its fast path reads weights, calls no layer, and makes nested tensors."""
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(6, 5, 16)
    padding = torch.arange(5).repeat(6, 1) > 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype, says torch
        ranks = apply_aira(model, lambda: model(x, src_key_padding_mask=padding))
        nn.init.normal_(model.layers[0].linear1.lora_B)
        slow = model(x, src_key_padding_mask=padding)
        with torch.no_grad():
            fast = model(x, src_key_padding_mask=padding)
    assert len(ranks) == 4  # not out_proj, whose weight nn.MultiheadAttention reads
    close(fast[:, :3], slow[:, :3])


def tune(model, batch, init, autocast):
    """-> the loss at each step."""
    before = logits_of(model, batch)
    apply_aira(model, lambda: model(**batch), rank=3, init=init)
    assert torch.equal(logits_of(model, batch), before)
    with autocast:
        losses = train(model, batch, 12, 0.0025)
        layer = model.model.layers[0].mlp.up_proj
        W = layer.base_layer.weight
        B, A = layer.factors()
        exact = W.double() + B.double() @ A.double()
        merge_aira(model)
    rounding = (exact.to(W.dtype) - exact).abs().max()
    assert (W - exact).abs().max() < rounding + 1e-7  # rounded only once
    return torch.tensor(losses)


@every_init
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [False, True])
def test_half_precision_and_autocast_follow_float32(dtype, cast, init):
    """Small steps and small differences need the digits of float32."""
    half, batch, _ = build("LlamaForCausalLM")
    half.to(dtype)
    full = copy.deepcopy(half).float()  # the same numbers
    expected = tune(copy.deepcopy(full), batch, init, nullcontext())
    losses = tune(full if cast else half, batch, init, torch.autocast("cpu", dtype, enabled=cast))
    close(losses, expected, 0.003)
    assert losses[-1] < losses[0] - 0.04


def test_compiled_before_and_after():
    """Adapters in a part that is compiled later; a whole that is compiled; both save bare names."""
    model, batch, _ = build("LlamaForCausalLM")
    base = copy.deepcopy(model)
    apply_aira(model, lambda: model(**batch))
    train(model, batch)
    expected = logits_of(model, batch)
    names = aira_state_dict(model).keys()
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="aot_eager")
    compiled = torch.compile(model, backend="aot_eager")
    close(logits_of(compiled, batch), expected)
    assert aira_state_dict(compiled).keys() == names
    load_aira(base, aira_state_dict(compiled))
    close(logits_of(torch.compile(base, backend="aot_eager"), batch), expected)


def work(process, folder):
    """One of two processes: the same calibration, half of the batch each."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=process, world_size=2
    )
    model, batch, _ = build("LlamaForCausalLM")
    apply_aira(model, lambda: model(**batch))
    parallel = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(ValueError, match="before DistributedDataParallel"):
        apply_aira(parallel, lambda: None)
    compiled = torch.compile(parallel, backend="eager")
    train(parallel, {key: tensor.chunk(2)[process] for key, tensor in batch.items()})
    torch.save(aira_state_dict(compiled), f"{folder}/{process}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_one_adapter(tmp_path):
    torch.multiprocessing.spawn(work, [str(tmp_path)], nprocs=2)
    states = [torch.load(tmp_path / f"{process}.pt") for process in range(2)]
    torch.testing.assert_close(*states, atol=0, rtol=0)
    model, batch, _ = build("LlamaForCausalLM")
    alone = copy.deepcopy(model)
    load_aira(model, states[0])
    apply_aira(alone, lambda: alone(**batch))
    train(alone, batch)
    close(logits_of(model, batch), logits_of(alone, batch), 1e-3)


# ---- train_toy.py ------------------------------------------------------------------------------


def test_toy_lora_is_pefts_step_for_step(monkeypatch):
    """The same start, data and optimizer: the same losses."""
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(train_toy, "INTERVAL", 1)
    monkeypatch.setattr(train_toy, "DEVICE", "cpu")
    ours = train_toy.Transformer("gpt")
    theirs = copy.deepcopy(ours).requires_grad_(False)
    train_toy.lora(ours, None)
    rank, names = train_toy.RANK, train_toy.TARGETS
    alpha = train_toy.SCALES["gpt"] * rank
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names)
    peft.inject_adapter_in_model(config, theirs)
    for name, layer in theirs.named_modules():
        if name.endswith(tuple(names)):
            layer.lora_A.default.weight.data.copy_(ours.get_submodule(name).A.weight)
    x = torch.randint(256, (16, 64))
    data = x, x.roll(-1, 1)
    one, _ = train_toy.train(ours, data, 0.01, 8, 0, test=data)
    two, _ = train_toy.train(theirs, data, 0.01, 8, 0, test=data)
    assert one[-1] < one[0]
    assert one == pytest.approx(two, rel=1e-5)
