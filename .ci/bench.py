# SPDX-License-Identifier: MIT
"""README's table, with more rows: python .ci/bench.py, one to two hours on two cores.

A cell says how far the test loss ends below that of LoRA, which is tuned over four scales as well.
Learning rates are a factor of root two apart, and more are tried until the best lies inside.  Each
point has three bases, pretrained with seeds of their own, and three seeds on each; the rate with
the lowest mean validation loss is taken.  +- is the standard error over the bases.

The constants of aira.py were chosen on the first two tasks.  On the others nothing was chosen.
"""

import functools
import os
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # README's numbers are a CPU's

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import aira  # noqa: E402
import train_toy  # noqa: E402
from train_toy import RANK, fine_tune, full, lora  # noqa: E402

BASES, SEEDS, STEPS = 3, 3, 80
SCALES = 2, 4, 8, 16  # of LoRA: alpha / r


# ---- Tasks -------------------------------------------------------------------------------------


def chunks(content):
    """A text in one piece, cut into pieces of 8 kB; of six, one is for validation, one for test."""
    pieces = [content[i : i + 8192] for i in range(0, len(content), 8192)]
    pieces = np.random.default_rng(0).permutation(np.array(pieces, dtype=object))
    n = len(pieces) // 6
    parts = pieces[2 * n :], pieces[:n], pieces[n : 2 * n]
    return train_toy.sequences([b"".join(part) for part in parts])


def english():
    """The texts of Python's help()."""
    from pydoc_data.topics import topics

    return chunks("\n".join(topics[key] for key in sorted(topics)).encode())


def yaml():
    """The signatures of torch's functions."""
    path = Path(torch.__file__).parent.parent / "torchgen/packaged/ATen/native"
    return chunks((path / "native_functions.yaml").read_bytes())


def positive():
    """Other curved glyphs, drawn in positive."""
    return [(-x, y) for x, y in train_toy.glyphs(train_toy.IMAGES // 8, curved=True, seed=77)]


TASKS = {  # name: base, data
    "text, Python -> C++": ("gpt", functools.partial(train_toy.target_data, "gpt")),
    "images, straight -> curved": ("vit", functools.partial(train_toy.target_data, "vit")),
    "Python -> English": ("gpt", english),
    "Python -> YAML": ("gpt", yaml),
    "straight -> curved in positive": ("vit", positive),
}


# ---- Methods -----------------------------------------------------------------------------------


def changed(change=None, **functions):
    """AIRA with other functions in aira.py, and with change(layer) applied to adapted layers."""

    assert functions.keys() <= vars(aira).keys()

    def prepare(model, examples):
        with mock.patch.dict(vars(aira), functions):
            train_toy.aira(model, examples)
        for layer in model.modules():
            if change and isinstance(layer, aira.AiraLinear):
                change(layer)

    return prepare


def identity(inputs, k, find_S=aira.find_S):
    D, s = find_S(inputs, k)
    return D, torch.ones_like(s)


def diagonal(inputs, k):
    """S with one value for each channel."""
    c = inputs.float().square().mean(dim=0)
    s = (c / c.mean() + aira.DAMPING) / (1 + aira.DAMPING)
    return torch.eye(len(s)), s.sqrt()


def without_S_inverse(layer):
    """y = W x + B diag(g) A x, with A at V^T S^-1: its features are the same before training."""
    layer.lora_A.data = layer.factors()[1].detach()
    layer.shrink.fill_(1)


def plain_svd(W, D, s, rank):
    return aira.top_svd(W.float(), rank)


def equal(W, magnitude):
    """The importance with which all ranks are equal: what a unit of rank costs."""
    return sum(W.shape)


def random_start(layer):
    layer.lora_A.data = F.normalize(torch.randn_like(layer.lora_A))


def equal_gains(layer):
    layer.gains.fill_(aira.MEAN_GAIN)


def loras(**options):
    return [functools.partial(lora, scale=scale, **options) for scale in SCALES]


knapsack = functools.partial(train_toy.aira, allocate=aira.knapsack_ranks)
whitened = changed(equal_gains, outlier_weighted_svd=plain_svd, importance=equal)
ROWS = {  # name: (the best of these methods, a multiple of the steps)
    "LoRA": (loras(), 1),
    "AIRA": ([train_toy.aira], 1),
    "no S, no S⁻¹": ([changed(find_S=identity)], 1),
    "no S⁻¹ in the layer": ([changed(without_S_inverse)], 1),
    "SVD of W, not of W S": ([changed(outlier_weighted_svd=plain_svd)], 1),
    "S diagonal": ([changed(find_S=diagonal)], 1),
    "A at random": ([changed(random_start)], 1),
    "equal ranks": ([changed(importance=equal)], 1),
    "equal gains": ([changed(equal_gains)], 1),
    "S⁻¹ and the SVD of W only": ([whitened], 1),
    'A and B from the SVD (`init="svd"`)': ([functools.partial(train_toy.aira, init="svd")], 1),
    "`knapsack_ranks`": ([knapsack], 1),
    "half the rank": ([functools.partial(train_toy.aira, rank=RANK // 2)], 1),
    "LoRA, half the rank": (loras(rank=RANK // 2), 1),
    "LoRA, four times the steps": (loras(), 4),
    "four times the steps, also for LoRA": ([train_toy.aira], 4),
    "full fine-tuning": ([full], 1),
}
UNTOUCHED = ["LoRA", "AIRA", "S⁻¹ and the SVD of W only", "full fine-tuning"]


# ---- Comparison --------------------------------------------------------------------------------


def run(task, path, row, variant, rate, seed):
    """-> validation and test loss of one fine-tuning."""
    base_task, data = TASKS[task]
    base = train_toy.Transformer(base_task)
    base.load_state_dict(torch.load(path))
    methods, times = ROWS[row]
    train_toy.STEPS = train_toy.INTERVAL = times * STEPS  # only the end of the curve
    result = fine_tune(base, cached(data), methods[variant], rate, seed)
    return result.validation, result.curve[-1]


@functools.cache
def cached(data):
    return data()


def search(losses_at, middle):
    """losses_at(rate): (..., 2), for validation and test.  Returns the best rate, and its losses.

    Tries the middle and its neighbours, and more until the best is not at an end.
    """
    tried = {}
    rates = [middle / 2**0.5, middle, middle * 2**0.5]
    while rates:
        for rate in rates:
            tried[rate] = losses_at(rate)
        best = min(tried, key=lambda rate: validation_of(tried[rate]))
        rates = [best / 2**0.5] if best == min(tried) else []
        rates += [best * 2**0.5] if best == max(tried) else []
    return best, tried[best]


def validation_of(losses):
    loss = losses[..., 0].mean()
    return float(loss) if np.isfinite(loss) else np.inf  # the worst, if a run diverged


def error(values):
    return np.std(values, ddof=1) / len(values) ** 0.5


def compare(pool, task, paths):
    """-> {row: cell}.  Prints each row as it comes."""
    print(f"\n{task}\n{'':36} scale    rate  validation   test   below LoRA", flush=True)
    cells, tests = {}, {}
    for row in UNTOUCHED if list(TASKS).index(task) > 1 else ROWS:
        found = []
        for variant in range(len(ROWS[row][0])):

            def losses_at(rate, row=row, variant=variant):
                seeds = range(100, 100 + SEEDS)
                jobs = [(task, path, row, variant, rate, seed) for path in paths for seed in seeds]
                return np.reshape(pool.starmap(run, jobs, chunksize=1), (BASES, SEEDS, 2))

            found.append((*search(losses_at, 0.008), variant))
        rate, losses, variant = min(found, key=lambda best: validation_of(best[1]))
        tests[row] = losses[..., 1].mean(axis=1)  # of each base
        reference = "LoRA, four times the steps" if row.startswith("four times") else "LoRA"
        less = tests[reference] - tests[row]
        cells[row] = f"{less.mean():.3f} ±{error(less):.3f}"
        scale = SCALES[variant] if len(found) > 1 else ""
        print(f"{row:36} {scale:5} {rate:7.4f} {validation_of(losses):11.4f}", end="")
        print(f"{tests[row].mean():7.3f}   {cells[row]}", flush=True)
    cells["LoRA"] = f"loss {tests['LoRA'].mean():.3f}"
    return cells


def pretrained(task, seed, folder):
    model, _ = train_toy.pretrain(task, seed)
    path = f"{folder}/{task}{seed}.pt"
    torch.save(model.state_dict(), path)
    return path


def main():
    start = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        get_context("spawn").Pool(2, torch.set_num_threads, (1,)) as pool,
    ):
        jobs = [(task, seed, folder) for task in ("vit", "gpt") for seed in range(BASES)]
        paths = pool.starmap(pretrained, jobs, chunksize=1)
        bases = {"vit": paths[:BASES], "gpt": paths[BASES:]}
        table = {task: compare(pool, task, bases[base]) for task, (base, _) in TASKS.items()}
    print("\n| | " + " | ".join(table) + " |\n|---" + "|---" * len(table) + "|")
    for row in ROWS:
        print(f"| {row} | " + " | ".join(cells.get(row, "") for cells in table.values()) + " |")
    print(f"\n{time.monotonic() - start:.0f} seconds, torch {torch.__version__}")


if __name__ == "__main__":
    main()
