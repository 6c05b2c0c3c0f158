# SPDX-License-Identifier: MIT
"""Which way of fine-tuning learns faster: LoRA, AIRA or full?  Two small transformers try it.

    python train_toy.py                     # minutes on two CPU cores or a GPU; no downloads
    python train_toy.py --plot curves.png   # and draw it (needs matplotlib)
    python train_toy.py --smoke             # does it run?

GPT: a language model over bytes has learnt Python's standard library and moves to C++, the headers
of torch's core library.  ViT: a vision transformer tells 32 glyphs of straight strokes apart and
moves to 32 others, of curved strokes and in negative, with a new head.  Each is pretrained once and
kept in .cache.  Other versions of Python and torch have other files, so numbers differ a little.

All methods see the same data in the same order: Adam, gradients clipped at norm 1, 10 % warm-up,
then a cosine down to 10 % of the rate; a ViT's new head has a rate of its own.  Each method runs at
every rate of its grid, with three seeds.  The rate (and LoRA's scale) with the best mean loss on
validation data is taken, and the test losses of those same runs are shown; +- is their standard
error over seeds, on one base (.ci/bench.py has three).  Time counts set-up and steps; both are
measured before, while nothing else runs, and the fastest of several is taken.
"""

import argparse
import ast
import copy
import functools
import hashlib
import importlib.util
import inspect
import math
import random
import sys
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from aira import apply_aira

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, LAYERS = (256, 4) if DEVICE == "cuda" else (64, 3)
SMOKE = "--smoke" in sys.argv  # read here, because the pool's processes import this file, too
PRETRAINING, STEPS, SEEDS, HELD_OUT = (10, 8, 2, 32) if SMOKE else (3000, 80, 3, 512)
POINTS = range(2 * STEPS // 5, STEPS + 1, STEPS // 5)  # the steps at which a curve is measured
RANK = 8
CONTEXT = 64  # bytes in a window
CLASSES = 32  # of glyphs
WINDOWS, IMAGES = 16, 32  # in a batch; for validation and for the test there are HELD_OUT each
TASKS = {
    "vit": "ViT, from straight glyphs to curved ones in negative",
    "gpt": "GPT, from Python to C++ (nats per byte)",
}


# ---- 1. Methods --------------------------------------------------------------------------------
# Each makes a model ready to train; examples is some of the training data.  .ci/bench.py sets the
# other arguments.

TARGETS = ("qkv", "proj", "up", "down")  # all linear layers but the embedding and the head


def lora(model, examples, scale, rank=RANK):
    """The baseline, y = W x + scale B A x, scale = alpha / rank; A and B start as in PEFT."""

    def add(layer, args, y):
        return y + F.linear(F.linear(args[0], layer.lora_A), scale * layer.lora_B)

    model.requires_grad_(False)
    for name, layer in model.named_modules():
        if not name.endswith(TARGETS):
            continue
        A = layer.weight.new_empty(rank, layer.in_features)
        layer.lora_A = nn.Parameter(nn.init.kaiming_uniform_(A, a=math.sqrt(5)))
        layer.lora_B = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        layer.register_forward_hook(add)


def aira(model, examples, rank=RANK, **options):
    """AIRA in the same layers; it trains at most as many parameters as LoRA."""
    apply_aira(model, lambda: model(examples), rank=rank, targets=TARGETS, **options)


def full(model, examples):
    """Full fine-tuning trains every weight."""


# name: what makes a model ready, its grid of learning rates.  Of LoRA's scales from 1 to 16 these
# two were the best in .ci/bench.py, on one task each.
METHODS = {
    "LoRA, scale 4": (functools.partial(lora, scale=4), [0.004, 0.008, 0.016]),
    "LoRA, scale 8": (functools.partial(lora, scale=8), [0.004, 0.008, 0.016]),
    "AIRA": (aira, [0.004, 0.008, 0.016, 0.032]),
    "full fine-tuning": (full, [0.002, 0.004, 0.008]),
}


# ---- 2. Models ---------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and a feed-forward network, from plain linear layers."""

    def __init__(self, causal):
        super().__init__()
        self.causal = causal
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, WIDTH // 32, 32))
        heads = qkv.permute(2, 0, 3, 1, 4)  # each of the three is (batch, head, position, 32)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=self.causal)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """GPT: bytes (b, t) -> logits (b, t, 256).  ViT: patches (b, 16, 64) -> logits (b, classes)."""

    def __init__(self, task):
        super().__init__()
        self.causal = task == "gpt"
        self.embedding = nn.Embedding(256, WIDTH) if self.causal else nn.Linear(64, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block(self.causal) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256 if self.causal else CLASSES)
        for p in self.parameters():
            if p is self.positions.weight or (self.causal and p.dim() == 2):
                nn.init.normal_(p, std=0.02)  # as GPT-2's; a ViT learns sooner from torch's own

    def forward(self, x):
        h = self.embedding(x) + self.positions.weight[: x.shape[1]]
        h = self.norm(self.blocks(h))
        return self.head(h if self.causal else h.mean(1))


# ---- 3. Data -----------------------------------------------------------------------------------
# A task's data are three parts, for training, validation and test; a part is x and y.


def texts(paths):
    """Files as windows of bytes; all windows of a file are in one part."""
    paths = sorted(paths)
    random.Random(0).shuffle(paths)
    windows = [], [], []
    for number, path in enumerate(paths):
        part = {0: 1, 1: 2}.get(number % 8, 0)  # of eight files six are for training
        content = path.read_bytes()
        for start in range(0, len(content) - CONTEXT, CONTEXT + 1):
            windows[part].append(np.frombuffer(content, np.uint8, CONTEXT + 1, start))
    if min(len(part) for part in windows) < HELD_OUT:
        raise FileNotFoundError(
            "too little text: it needs the standard library's .py files and torch's headers"
        )
    parts = []
    for rows, limit in zip(windows, (None, HELD_OUT, HELD_OUT), strict=True):
        chosen = np.random.default_rng(0).permutation(len(rows))[:limit]
        text = torch.tensor(np.stack(rows)[chosen]).long().to(DEVICE)
        parts.append((text[:, :-1], text[:, 1:]))
    return parts


def glyphs(size, curved, seed):
    """Noisy images (32, 32) of glyphs with four strokes, as patches (16, 64), and their labels.

    Each image warps and shifts its glyph a little; curved ones are in negative.
    """
    rng = np.random.default_rng(seed)
    sizes = [size, HELD_OUT, HELD_OUT]
    n = sum(sizes)
    grid = np.linspace(-1, 1, 32, dtype="f")
    t = np.linspace(0, 1, 24)[:, None]  # 24 points along each stroke
    begin, end = rng.uniform(-0.7, 0.7, (2, CLASSES, 4, 1, 2))
    bend = rng.uniform(-0.6, 0.6, (CLASSES, 4, 1, 2)) * curved
    strokes = (1 - t) * begin + t * end + 4 * t * (1 - t) * bend  # a parabola
    label = rng.integers(CLASSES, size=n)
    warp = np.eye(2) + rng.normal(0, 0.1, (n, 2, 2))
    shift = rng.normal(0, 0.12, (n, 1, 2))
    points = (strokes.reshape(CLASSES, 96, 2)[label] @ warp + shift).astype("f")
    across = np.exp(-(((points[:, :, :1] - grid) / 0.075) ** 2))  # a blot around each point
    down = np.exp(-(((points[:, :, 1:] - grid) / 0.075) ** 2))
    ink = np.minimum(down.swapaxes(1, 2) @ across, 1)
    strength = rng.uniform(0.5, 1.5, (n, 1, 1)) * (1 - 2 * curved)
    images = ink * strength + rng.normal(0, 0.5, (n, 32, 32))
    patches = images.reshape(n, 4, 8, 4, 8).swapaxes(2, 3).reshape(n, 16, 64)
    x = torch.tensor(patches, device=DEVICE).float().split(sizes)
    y = torch.tensor(label, device=DEVICE).split(sizes)
    return list(zip(x, y, strict=True))


def data(task, new):
    """The three parts of the old task, on which the base is pretrained, or of the new one."""
    if task == "vit":
        return glyphs(3200, True, 1) if new else glyphs(25_600, False, 0)
    if new:
        return texts((Path(torch.__file__).parent / "include/c10").rglob("*.h"))
    return texts(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


# ---- 4. Training -------------------------------------------------------------------------------


def loss_of(model, x, y):
    """Of a GPT's logits (b, t, 256) or a ViT's (b, classes)."""
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


@torch.no_grad()
def evaluate(model, part):
    """The mean loss; batches are small, to stay in a CPU's cache."""
    x, y = part
    losses = [loss_of(model, *batch) for batch in zip(x.split(64), y.split(64), strict=True)]
    return float(torch.stack(losses).mean())


def train(model, part, rate, steps, seed, test=None):
    """Train what requires a gradient -> losses on test at POINTS; the fastest step's seconds."""
    trained = [p for p in model.parameters() if p.requires_grad]
    last = {"params": trained[-2:]}
    if not model.causal:
        last["lr"] = 0.008  # the new head of a ViT; it should not decide which rate is best
    optimizer = torch.optim.Adam([{"params": trained[:-2]}, last], rate)

    def factor(step):
        warm_up = min(1, 10 * (step + 1) / steps)
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        return warm_up * cosine

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    batch = WINDOWS if model.causal else IMAGES
    order = torch.Generator().manual_seed(seed)
    curve, seconds = [], []
    for step in range(1, steps + 1):
        start = time.perf_counter()
        rows = torch.randint(len(part[0]), (batch,), generator=order).to(DEVICE)
        x, y = part[0][rows], part[1][rows]
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        nn.utils.clip_grad_norm_(trained, 1.0).item()  # waits until a GPU has finished
        optimizer.step()
        schedule.step()
        seconds.append(time.perf_counter() - start)
        if test and step in POINTS:
            curve.append(evaluate(model, test))
    return curve, min(seconds)


def source(function):
    """Its code without comments and docstrings."""
    tree = ast.parse(inspect.getsource(function))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            del node.body[0]
    return ast.dump(tree)


def pretrain(task, seed=0):
    """Make the base, unless it is in .cache -> its file, its test loss on the old task."""
    torch.set_num_threads(1)  # the fastest for models so small
    part, _, test = data(task, new=False)
    key = hashlib.sha256(part[0].cpu().numpy().tobytes())  # all that makes the base
    numbers = seed, WIDTH, LAYERS, PRETRAINING, WINDOWS, IMAGES, DEVICE, torch.__version__
    key.update(repr(numbers).encode())
    for code in (texts, glyphs, Block, Transformer, loss_of, train, pretrain):
        key.update(source(code).encode())
    path = Path(__file__).parent / f".cache/{task}-{key.hexdigest()[:12]}.pt"
    if not path.exists():
        torch.manual_seed(seed)
        model = Transformer(task).to(DEVICE)
        train(model, part, 0.003 * min(1, 96 / WIDTH), PRETRAINING, seed)
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(".part")
        torch.save(model.state_dict(), unfinished)
        unfinished.replace(path)
    base, _ = load(task, path)
    return path, evaluate(base, test)


# ---- 5. Experiment -----------------------------------------------------------------------------


@functools.cache
def load(task, path):
    """-> the base, the three parts of its new task."""
    torch.set_num_threads(1)
    base = Transformer(task).to(DEVICE)
    base.load_state_dict(torch.load(path, map_location=DEVICE))
    return base, data(task, new=True)


def prepare(base, adapt, examples, seed):
    """-> a copy of the base, made ready to train by adapt; adapt's seconds."""
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    if not model.causal:
        model.head.reset_parameters()  # new, and the same for all methods
    start = time.perf_counter()
    adapt(model, examples)
    next(model.parameters()).sum().item()  # waits until a GPU has finished
    seconds = time.perf_counter() - start
    if not model.causal:
        model.head.requires_grad_(True)
    return model, seconds


def run(job):
    """Fine-tune once -> the loss on validation data, then the curve on test data."""
    task, path, name, rate, seed = job
    base, (training, validation, test) = load(task, path)
    adapt, _ = METHODS[name]
    model, _ = prepare(base, adapt, training[0][:64], seed)
    curve, _ = train(model, training, rate, STEPS, seed, test)
    return [evaluate(model, validation), *curve]


def parallel(pool, function, jobs, title):
    """[function(job)] by the pool's processes; it prints how long that will take."""
    start, results = time.monotonic(), []
    for result in pool.map(function, jobs):
        results.append(result)
        left = (time.monotonic() - start) * (len(jobs) / len(results) - 1)
        print(f"{title}: {left:.0f} s left{' ':20}", end="\r", file=sys.stderr)
    return results


def timing(task, path):
    """{method: (seconds to set it up, seconds of a step)}, in turn while nothing else runs."""
    base, (training, _, _) = load(task, path)
    times = {name: [] for name in METHODS}
    for _ in range(2 if SMOKE else 10):
        for name, (adapt, _) in METHODS.items():
            model, setup = prepare(base, adapt, training[0][:64], 0)
            _, step = train(model, training, 0.001, 5, 0)
            times[name].append([setup, step])
    return {name: np.min(times[name], axis=0) for name in METHODS}


class Result(NamedTuple):
    """What the runs of one method gave."""

    grid: dict[float, float]  # {rate: validation loss, the mean of all seeds}
    rate: float  # the best
    curves: np.ndarray  # (seeds, points), test losses at that rate
    setup: float  # seconds
    step: float  # seconds


def experiment(pool, task, path):
    """{method: Result}"""
    seconds = timing(task, path)  # before the pool's processes are busy
    jobs = []
    for name, (_, rates) in METHODS.items():
        jobs += [(task, path, name, rate, seed) for rate in rates for seed in range(SEEDS)]
    losses = dict(zip(jobs, parallel(pool, run, jobs, task), strict=True))
    results = {}
    for name, (_, rates) in METHODS.items():
        runs = [[losses[task, path, name, rate, seed] for seed in range(SEEDS)] for rate in rates]
        runs = np.nan_to_num(runs, nan=np.inf, posinf=np.inf)  # (rates, seeds, 1 + points)
        means = runs[:, :, 0].mean(axis=1)
        best = means.argmin()
        grid = dict(zip(rates, means, strict=True))
        results[name] = Result(grid, rates[best], runs[best, :, 1:], *seconds[name])
    return results


# ---- 6. Report ---------------------------------------------------------------------------------


def steps_to(goal, curve):
    """Where a curve first comes down to the goal, linear between its points; inf if never."""
    lowest = np.minimum.accumulate(curve)
    if lowest[-1] > goal:
        return math.inf
    return float(np.interp(-goal, -lowest, POINTS))  # interp wants rising values


def race(method, reference):
    """-> each seed's steps to the reference's final loss; their time over the reference's."""
    goals = reference.curves[:, -1]
    steps = [steps_to(goal, curve) for goal, curve in zip(goals, method.curves, strict=True)]
    seconds = method.setup + np.mean(steps) * method.step
    return steps, seconds / (reference.setup + STEPS * reference.step)


def error(values):
    """The standard error of the mean."""
    return np.std(values, ddof=1) / math.sqrt(len(values))


def mean_error(values, digits):
    """The mean and its error, as text."""
    return f"{np.mean(values):.{digits}f} +-{error(values):.{digits}f}"


def print_grids(results):
    """Validation losses at all rates."""
    print("validation loss at each rate; * the best; ! the best, but at the end of the grid")
    for name, method in results.items():
        mark = "!" if method.rate in (min(method.grid), max(method.grid)) else "*"
        print(f"  {name:18}", end="")
        for rate, loss in method.grid.items():
            print(f"{rate:6.3f}: {loss:.3f}{mark if rate == method.rate else ' '}", end="")
        print()


def print_chart(methods, width=70):
    """{letter: Result} -> a row for each point; the lower a loss, the further left its letter."""
    losses = np.array([method.curves.mean(axis=0) for method in methods.values()])
    low, high = losses.min(), losses.max()
    print(f"\n  step  loss {low:<8.3f}{high:>{width - 13}.3f}")
    for step, at_step in zip(POINTS, losses.T, strict=True):
        row = [" "] * width
        for letter, loss in zip(methods, at_step, strict=True):
            row[round((loss - low) / (high - low) * (width - 1))] = letter
        print(f"{step:6}  {''.join(row)}")


def print_table(results, reference):
    """A row for each method; set-up and a step are counted in the reference's steps."""
    print("\n                              to the best LoRA's final loss")
    print("method              rate       test loss   steps   time    a step  set-up")
    for name, method in results.items():
        steps, share = race(method, reference)
        reached = "not all seeds"
        if max(steps) < math.inf:
            reached = f"{mean_error(steps, 0)} {share:6.0%}"
        final = mean_error(method.curves[:, -1], 3)
        step, setup = method.step / reference.step, method.setup / reference.step
        print(f"{name:16} {method.rate:7.3f} {final:>15} {reached:>14} {step:9.2f} {setup:7.1f}")


def report(results):
    """All that is printed of one model."""
    loras = [name for name in results if name.startswith("LoRA")]
    best = min(loras, key=lambda name: min(results[name].grid.values()))  # on validation data
    lora, aira = results[best], results["AIRA"]
    print_grids(results)
    print(f"\nf: full fine-tuning; L: {best}; A: AIRA")
    print_chart({"f": results["full fine-tuning"], "L": lora, "A": aira})
    print_table(results, lora)

    less = lora.curves[:, -1] - aira.curves[:, -1]
    steps, share = race(aira, lora)
    print(f"\nThe final loss of the best LoRA less that of AIRA: {mean_error(less, 3)}")
    if SMOKE:
        print("This was a smoke run: it compares nothing.")
    elif abs(np.mean(less)) < 2 * error(less):
        print("This is no clear difference (less than two errors).")
    elif max(steps) < math.inf:
        print(f"AIRA reached it after {mean_error(steps, 0)} of {STEPS} steps,", end=" ")
        print(f"in {share:.0%} of its time.")
    else:
        print("AIRA did not reach it with all seeds.")


def plot(file, found):
    """For each model: test losses over the steps, and validation losses over rates."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(found), 2, figsize=(10, 4 * len(found)))
    for (left, right), (task, results) in zip(axes, found.items(), strict=True):
        for name, method in results.items():
            curves = method.curves
            left.plot(POINTS, curves.mean(axis=0), label=name)
            left.fill_between(POINTS, curves.min(axis=0), curves.max(axis=0), alpha=0.25)
            right.semilogx(method.grid.keys(), method.grid.values(), "o-", base=2)
        left.set(title=TASKS[task], xlabel="step", ylabel="test loss (bands: all seeds)")
        right.set(xlabel="learning rate", ylabel="final validation loss")
        right.xaxis.set_major_formatter("{x:.3f}")
        left.legend()
    figure.tight_layout()
    figure.savefig(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--plot", metavar="FILE", help="draw the curves (needs matplotlib)")
    parser.add_argument("--smoke", action="store_true", help="does it run? It compares nothing")
    options = parser.parse_args()
    if options.plot and not importlib.util.find_spec("matplotlib"):
        sys.exit("--plot needs matplotlib: pip install matplotlib")

    print(f"torch {torch.__version__}, {DEVICE}, width {WIDTH}")
    start = time.monotonic()
    found = {}
    with ProcessPoolExecutor(1 if DEVICE == "cuda" else 2, get_context("spawn")) as pool:
        bases = parallel(pool, pretrain, TASKS, "pretraining")
        for task, (path, loss) in zip(TASKS, bases, strict=True):
            found[task] = experiment(pool, task, path)
            print(f"\n{TASKS[task]}.\nOn its old task the base has a test loss of {loss:.3f}.\n")
            report(found[task])
            print(f"{time.monotonic() - start:.0f} seconds so far")
    if options.plot:
        plot(options.plot, found)


if __name__ == "__main__":
    main()
