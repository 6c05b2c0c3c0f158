# SPDX-License-Identifier: MIT
"""Fine-tune a small transformer with LoRA and with AIRA, on data that every machine with torch and numpy has.

    python train_toy.py                 # LoRA and AIRA, three learning rates each; CPU or GPU, no downloads
    python train_toy.py --full          # all methods and ablations, six learning rates, five seeds: README's tables
    python train_toy.py --model vit     # images instead of text; goes with all other options
    python train_toy.py --tiny          # seconds, to see that it runs
    python train_toy.py --bench         # speed and memory against Hugging Face PEFT
    torchrun --nproc-per-node=2 train_toy.py        # data-parallel, with the same results

gpt: a byte-level GPT learns Python's standard library, then moves to the C++ headers inside the torch package.
vit: a ViT learns to tell 64 glyphs of straight strokes apart, then 32 glyphs of curved strokes from 32 images each.
The pretrained model is kept in .cache/.  All methods get the same data in the same order, steps, schedule (10 %
warm-up, cosine to 10 %), AdamW without weight decay, and clipping at norm 1; LoRA and AIRA train equally many
parameters.

Measured with --full, five seeds (torch 2.13.0, two CPU cores): with each method at its own best rate, AIRA reaches
LoRA's final loss on the GPT after 36 +- 4 of 100 steps, and that of LoRA with its scale tuned as well after 44 +- 4;
it ends at 2.650, full fine-tuning at 2.683, LoRA at 2.871.  On the ViT, where runs differ more, it takes 50 +- 12 and
51 +- 12.  README has all cells, the lost ones included.
"""
import argparse
import contextlib
import copy
import functools
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from aira import apply_aira, merge_aira, outlier_weighted_svd

HERE = Path(__file__).resolve().parent
WORLD, PLACE = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))  # of torchrun's processes
GPUS_ENOUGH = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
DEVICE = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if GPUS_ENOUGH else "cpu"
CONTEXT = 64  # bytes a text
RANK = 16
LAYERS = "qkv", "proj", "up", "down"  # what is adapted: all but the embedding and the head
EVERY = 10  # steps between two points of a curve
HEAD_RATE = 0.008  # of a new head, in all methods, best for LoRA: so that a method's own rate is about what it adapts


# ---- Two transformers from plain nn.Linear -------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, embedding, places, outputs, width, layers, causal):
        super().__init__()
        self.embedding, self.places, self.causal = embedding, nn.Embedding(places, width), causal
        self.blocks = nn.ModuleList(Block(width, width // 32, causal) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                last = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if last else 0.02)

    def forward(self, x):
        """GPT: bytes (b, t) -> logits (b, t, 256).  ViT: patches (b, 16, 64) -> logits (b, classes)."""
        h = self.embedding(x) + self.places.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h if self.causal else h.mean(1)))


# ---- Data: functions that draw a batch (x, y) from a generator -------------------------------------------------------


def texts(folder, pattern, limit=8_000_000):
    """Matching files, joined in a random order that is always the same; the last eighth is held out."""
    skip = {"site-packages", "test", "tests", "idlelib", "pybind11"}
    data, paths = bytearray(), sorted(Path(folder).rglob(pattern))
    random.Random(0).shuffle(paths)
    for path in paths:
        if len(data) < limit and not skip & set(path.relative_to(folder).parts):
            data += path.read_bytes()
    if len(data) < 200_000:
        sys.exit(f"train_toy.py needs at least 200 kB of {pattern} files in {folder} and found {len(data)} bytes: "
                 "use a Python with its standard library's sources, and a torch wheel with its include folder")
    data = torch.frombuffer(data, dtype=torch.uint8).long().to(DEVICE)

    def draw(part, batch, generator):
        start = torch.randint(len(part) - CONTEXT - 1, (batch,), generator=generator).to(DEVICE)
        window = part[start[:, None] + torch.arange(CONTEXT + 1, device=DEVICE)]
        return window[:, :-1], window[:, 1:]

    return functools.partial(draw, data[: -len(data) // 8]), functools.partial(draw, data[-len(data) // 8:])


def glyphs(classes, shots, curved, seed):
    """Noisy 32 x 32 images of `classes` glyphs, four strokes each, as patches (n, 16, 64); every image bends its glyph
    a little otherwise.  `shots` images a class to train on, and sixteen a class held out."""
    rng, total = np.random.default_rng(seed), shots + 16
    ends, bend = rng.uniform(-0.7, 0.7, (2, classes, 4, 1, 2)), rng.uniform(-0.6, 0.6, (classes, 4, 1, 2)) * curved
    t = np.linspace(0, 1, 24)[:, None]
    strokes = ((1 - t) * ends[0] + t * ends[1] + 4 * t * (1 - t) * bend).reshape(classes, 1, 96, 2)
    warp = np.eye(2) + rng.normal(0, 0.1, (classes, total, 2, 2))
    points = (strokes @ warp + rng.normal(0, 0.12, (classes, total, 1, 2))).reshape(-1, 96, 2)
    n = len(points)
    grid, thickness = np.linspace(-1, 1, 32), rng.uniform(0.05, 0.1, (n, 1, 1))
    x, y = (np.exp(-(((points[:, :, [i]] - grid) / thickness) ** 2)) for i in (0, 1))
    images = np.minimum(y.swapaxes(1, 2) @ x, 1) * rng.uniform(0.5, 1.5, (n, 1, 1)) + rng.normal(0, 0.2, (n, 32, 32))
    patches = images.reshape(classes, total, 4, 8, 4, 8).swapaxes(3, 4).reshape(classes, total, 16, 64)
    patches = torch.tensor(patches, dtype=torch.float32, device=DEVICE)
    labels = torch.arange(classes, device=DEVICE)[:, None].expand(classes, total)

    def draw(x, y, batch, generator):
        chosen = torch.randint(len(x), (batch,), generator=generator).to(DEVICE)
        return x[chosen], y[chosen]

    return tuple(functools.partial(draw, patches[:, part].flatten(0, 1), labels[:, part].flatten())
                 for part in (slice(shots), slice(shots, None)))


# ---- Training ------------------------------------------------------------------------------------------------------


def loss_of(logits, y):
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


def fit(model, draw, rate, steps, batch, seed, held_out=None):
    """Train what requires a gradient -> [(held-out loss, accuracy)] every EVERY steps, and the seconds of a step."""
    generator = torch.Generator().manual_seed(seed)  # seeds the order of the data
    parameters = [p for p in model.parameters() if p.requires_grad]
    head = [] if model.causal or not held_out else list(model.head.parameters())  # new: the ViT's, in fine-tuning
    rest = [p for p in parameters if not any(p is q for q in head)]
    groups = [{"params": rest, "peak": rate}, {"params": head, "peak": HEAD_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    curve, seconds = [], []
    for step in range(steps):
        start = time.perf_counter()
        warm, cosine = (step + 1) / (0.1 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1, warm) * (0.1 + 0.9 * cosine)
        x, y = (part[PLACE::WORLD] for part in draw(batch, generator))  # this process's share of the batch
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        if WORLD > 1:
            for p in parameters:
                dist.all_reduce(p.grad)
                p.grad /= WORLD
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if DEVICE != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if held_out and (step + 1) % EVERY == 0:
            with torch.no_grad():
                logits, y = model(held_out[0]), held_out[1]
                curve.append((loss_of(logits, y).item(), (logits.argmax(-1) == y).float().mean().item()))
    return curve, statistics.median(seconds)


@functools.lru_cache(1)
def prepare(kind, width, layers, before, batch):
    """The pretrained model, draw for the new task, its held-out batch, and four batches to calibrate on."""
    torch.manual_seed(0)
    path = HERE / ".cache" / f"{kind}-{width}-{layers}-{before}.pt"
    if kind == "gpt":
        model = Transformer(nn.Embedding(256, width), CONTEXT, 256, width, layers, causal=True)
        old = functools.partial(texts, sysconfig.get_paths()["stdlib"], "*.py")
        draw, held_out = texts(Path(torch.__file__).parent / "include", "*.h")
    else:
        model = Transformer(nn.Linear(64, width), 16, 64, width, layers, causal=False)
        old = functools.partial(glyphs, 64, 200, curved=False, seed=0)
        draw, held_out = glyphs(32, 32, curved=True, seed=1)
    model.to(DEVICE)
    if path.exists():
        model.load_state_dict(torch.load(path, map_location=DEVICE, weights_only=True))
    else:
        print(f"pretraining, {before} steps, once ...", file=sys.stderr, flush=True)
        fit(model, old()[0], (3e-3 if kind == "gpt" else 1e-3) * min(1, 128 / width), before, batch, seed=0)
        if PLACE == 0:
            path.parent.mkdir(exist_ok=True)
            torch.save(model.state_dict(), path)
    if kind == "vit":
        model.head = nn.Linear(width, 32, device=DEVICE)  # new classes; every method trains it
        nn.init.zeros_(model.head.weight)
    examples = torch.Generator().manual_seed(1)
    batches = [draw(batch, examples)[0][PLACE::WORLD] for _ in range(4)]
    return model, draw, held_out(32 if kind == "gpt" else 256, torch.Generator().manual_seed(0)), batches


# ---- Methods: functions that put adapters into a model -------------------------------------------------------------


class LoRALinear(nn.Module):
    """Plain LoRA, the baseline: y = base(x) + scale B A x, A uniform and B zero; scale is alpha / rank.

    As PiSSA (arXiv 2404.02948): A and B from the plain SVD of the weight, which keeps the rest.
    """

    def __init__(self, base, rank, scale, pissa):
        super().__init__()
        self.base, self.scale = base, scale
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if pissa:
            B, A = outlier_weighted_svd(base.weight, torch.ones_like(base.weight[0]), rank)
            self.lora_A.data, self.lora_B.data = A.contiguous(), B.contiguous()
            base.weight.data -= B @ A

    def forward(self, x):
        return self.base(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def lora(scale, pissa=False):
    def apply(model, calibrate, rank, head):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(head))
        for block in model.blocks:
            for name in LAYERS:
                setattr(block, name, LoRALinear(getattr(block, name), rank, scale, pissa).to(DEVICE))
    return apply


def aira(random_start=False, **options):
    def apply(model, calibrate, rank, head):
        with mock.patch("aira._weighted_svd", no_svd) if random_start else contextlib.nullcontext():
            apply_aira(model, calibrate, rank=rank, targets=LAYERS, also_train=head, **options)
    return apply


def no_svd(weight, rms, rank, size):
    """Random orthonormal factors in the place of the SVD's."""
    U, V = (torch.linalg.qr(torch.randn(n, rank))[0].to(weight) for n in weight.shape)
    return V, U, rms


METHODS = {
    "LoRA": lora(1),
    "AIRA": aira(),
    "full fine-tuning": lambda model, calibrate, rank, head: None,
    "LoRA, alpha = 2 rank": lora(2),
    "LoRA, alpha = 32 rank": lora(32),
    "PiSSA": lora(1, pissa=True),
    "AIRA, random start": aira(random_start=True),
    "AIRA, not amplified": aira(amplify=0),
    "AIRA, equal ranks": aira(importance="uniform"),
    "AIRA, ranks by fraction": aira(importance="fraction"),
    "AIRA, init='subspace'": aira(init="subspace"),
    "AIRA, init='svd'": aira(init="svd"),
}


# ---- Runs ----------------------------------------------------------------------------------------------------------


def run(task, method, rate, seed, rank, steps):
    """One fine-tuning -> its curve, seconds a step and for putting the adapters in, and the parameters it trained."""
    if DEVICE == "cpu":
        torch.set_num_threads(1)  # as many runs at a time as there are cores is faster than one run on all cores
    base, draw, held_out, batches = prepare(*task)
    torch.manual_seed(seed)  # seeds LoRA's random start
    model = copy.deepcopy(base)
    start = time.perf_counter()
    METHODS[method](model, lambda: [model(x) for x in batches], rank, ("head",) if task[0] == "vit" else ())
    apply_seconds = time.perf_counter() - start
    curve, step_seconds = fit(model, draw, rate, steps, task[-1], seed, held_out)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"method": method, "rate": rate, "seed": seed, "rank": rank, "curve": curve, "trained": trained,
            "step_seconds": step_seconds, "apply_seconds": apply_seconds}


def run_all(jobs):
    """run(*job) of every job, in processes of their own, one a core, or four on a GPU, which one run would leave idle
    between its small kernels; with the time left on stderr."""
    results, start = [], time.monotonic()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = 1 if WORLD > 1 else min(cores, len(jobs), 61 if DEVICE == "cpu" else 4)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) if workers > 1 else None
    for result in (pool.map if pool else map)(run, *zip(*jobs)):
        results.append(result)
        left = (time.monotonic() - start) / len(results) * (len(jobs) - len(results))
        if PLACE == 0:
            print(f"\rrun {len(results)} of {len(jobs)}, {left:.0f} s left   ", end="", file=sys.stderr, flush=True)
    if pool:
        pool.shutdown()
    if PLACE == 0:
        print(file=sys.stderr)
    return results


# ---- What was measured ---------------------------------------------------------------------------------------------


def losses(runs):
    """The mean over seeds of the held-out loss, at each point of the curve."""
    return [statistics.fmean(loss for loss, _ in points) for points in zip(*(run["curve"] for run in runs))]


def steps_to(curve, target):
    """Steps until the curve first reaches the target, straight lines between its points; None if it never does."""
    for i, loss in enumerate(curve):
        if loss <= target:
            before = curve[i - 1] if i else loss
            return EVERY * (i + 1 - ((target - loss) / (before - loss) if before > loss else 0))
    return None


def spread(values, digits):
    """Mean and deviation of the numbers that are there, and how many are not."""
    there = [value for value in values if value is not None]
    if not there:
        return "never"
    text = f"{statistics.fmean(there):.{digits}f}"
    text += f" +-{statistics.stdev(there):.{digits}f}" if len(there) > 1 else ""
    return text + (f" ({len(values) - len(there)} never)" if len(there) < len(values) else "")


def best(method):
    """The runs of a method, {rate: runs}, at the rate of the lowest mean final loss; NaN is never the lowest."""
    return min(method.values(), key=lambda runs: (math.isnan(losses(runs)[-1]), losses(runs)[-1]))


def best_lora(results):
    """The name of the scale that ends lowest at its best rate: LoRA of the same size with scale and rate tuned."""
    names = [name for name in results if name == "LoRA" or name.startswith("LoRA, alpha")]
    return min(names, key=lambda name: losses(best(results[name]))[-1])


def chart(title, lines, labels, height=14):
    """A text figure: {letter: [y of each column]}, columns under their labels."""
    points = [y for line in lines.values() for y in line if math.isfinite(y)]
    low, high = min(points), sorted(points)[int(0.9 * len(points))]
    wide = max(map(len, labels)) + 2
    grid = [[" "] * wide * len(labels) for _ in range(height)]
    for letter, line in lines.items():
        for i, y in enumerate(line):
            y = y if math.isfinite(y) else high
            row = round((high - min(y, high)) / ((high - low) or 1) * (height - 1))
            cell = next((c for c in range(wide * i + wide - 2, wide * i, -1) if grid[row][c] == " "), wide * i)
            grid[row][cell] = letter
    print(f"\n{title}\n")
    for i, row in enumerate(grid):
        print(f"{high - (high - low) * i / (height - 1):7.3f} |{''.join(row).rstrip()}")
    print(" " * 9 + "".join(label.rjust(wide - 1) + " " for label in labels))


def report(results, steps):
    """The tables of README, from {method: {rate: [a run of each seed]}} at full size."""
    rates = list(results["LoRA"])
    goal = losses(best(results["LoRA"]))[-1]
    scaled = best_lora(results)
    tuned = losses(best(results[scaled]))[-1]
    unit = statistics.median(run["step_seconds"] for run in best(results["LoRA"]))
    seeds = len(best(results["LoRA"]))
    print(f"\nEach method at its own best rate, mean +- deviation over {seeds} seed(s).  Steps, of {steps}, to LoRA's "
          f"final loss {goal:.4f}\n(and to that of the best LoRA here, {scaled}, {tuned:.4f}); a step's time, LoRA's "
          f"{1000 * unit:.0f} ms = 1; seconds of set-up.\n")
    print(f"{'method':24} {'trained':>8} {'rate':>6}  {'steps':>18}  {'(best LoRA)':>18}  {'final loss':>15}  "
          "accuracy  time  set-up")
    for name, method in results.items():
        runs = best(method)
        curves = [[loss for loss, _ in run["curve"]] for run in runs]
        print(f"{name:24} {runs[0]['trained']:>8,} {runs[0]['rate']:>6.2g}  "
              f"{spread([steps_to(curve, goal) for curve in curves], 0):>18}  "
              f"{spread([steps_to(curve, tuned) for curve in curves], 0):>18}  "
              f"{spread([curve[-1] for curve in curves], 4):>15}  "
              f"{statistics.fmean(run['curve'][-1][1] for run in runs):8.1%}  "
              f"{statistics.median(run['step_seconds'] for run in runs) / unit:4.2f}  "
              f"{statistics.median(run['apply_seconds'] for run in runs):6.2f}")
    if "full fine-tuning" in results:
        full, ours = (losses(best(results[name]))[-1] for name in ("full fine-tuning", "AIRA"))
        noise = statistics.pstdev(run["curve"][-1][0] for run in best(results[scaled]))
        gap = (f"AIRA closes {(tuned - ours) / (tuned - full):.0%} of the gap from {scaled} to full fine-tuning."
               if tuned - full > noise else f"There is no gap to close: full fine-tuning ends {tuned - full:.4f} below "
               f"{scaled}, whose deviation is {noise:.4f}.")
        print(f"\n{gap}")
    print(f"\nFinal loss at every rate, and steps to LoRA's final loss at the same rate\n\n{'method':24}" +
          "".join(f"{rate:>14.2g}" for rate in rates))
    for name, method in results.items():
        cells = []
        for rate in rates:
            curve = losses(method[rate])
            reached = steps_to(curve, losses(results["LoRA"][rate])[-1])
            cells.append(f"{curve[-1]:.3f} ({'never' if reached is None else f'{reached:.0f}'})")
        print(f"{name:24}" + "".join(f"{cell:>14}" for cell in cells))
    shown = {"L": "LoRA", "A": "AIRA", "F": "full fine-tuning"}
    lines = {letter: name for letter, name in shown.items() if name in results}
    key = ", ".join(f"{letter} = {name}" for letter, name in lines.items())
    chart(f"Loss by step, each at its best rate: {key}",
          {letter: losses(best(results[n])) for letter, n in lines.items()},
          [str(EVERY * (i + 1)) for i in range(steps // EVERY)])
    chart(f"Final loss by learning rate: {key}",
          {letter: [losses(results[n][rate])[-1] for rate in rates] for letter, n in lines.items()},
          [f"{rate:.2g}".center(8) for rate in rates])


def report_sizes(results, smaller):
    """Final losses with fewer parameters, at the rate that was best with all of them."""
    print(f"\nFinal loss with fewer parameters, each method at its best rate above\n\n{'method':24}" +
          "".join(f"  {f'rank {rank}':>15}" for rank in (RANK, RANK // 2, RANK // 4)))
    for name, sizes in smaller.items():
        cells = [best(results[name])] + list(sizes.values())
        print(f"{name:24}" + "".join(f"  {spread([run['curve'][-1][0] for run in runs], 4):>15}" for runs in cells))


def pyplot():
    try:
        import matplotlib
    except ImportError:
        sys.exit("--plot needs matplotlib: pip install matplotlib (or use --out FILE and draw from its JSON)")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def picture(path, results):
    """The curves and the rate sweep."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(12, 5))
    for name, method in results.items():
        curve = losses(best(method))
        left.plot(range(EVERY, EVERY * len(curve) + 1, EVERY), curve, label=name)
        right.plot(list(method), [losses(runs)[-1] for runs in method.values()], marker="o", label=name)
    left.set(xlabel="step", ylabel="held-out loss", yscale="log", title="each at its own best rate")
    right.set(xlabel="learning rate", ylabel="final held-out loss", xscale="log", yscale="log", title="rate sweep")
    right.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)


# ---- Against Hugging Face PEFT -------------------------------------------------------------------------------------


def timed(function):
    """Seconds that a call takes."""
    if DEVICE != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if DEVICE != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(clocks, repeats):
    """Of functions that return seconds, called in turn, the median of each, after one round to warm up."""
    seconds = {name: [] for name in clocks}
    for _ in range(repeats + 1):
        for name, clock in clocks.items():
            seconds[name].append(clock())
    return {name: statistics.median(rounds[1:]) for name, rounds in seconds.items()}


def memory(step, model):
    """Bytes that a step holds: parameters, their gradients, Adam's two moments, and what comes on top at its peak (on a
    CPU, what the forward pass keeps for the backward pass)."""
    if DEVICE != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak = torch.cuda.max_memory_allocated() - before + sum(p.nbytes for p in model.parameters())
        return peak + 3 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    kept.update({p.untyped_storage().data_ptr(): p.nbytes for p in model.parameters()})
    return sum(kept.values()) + 3 * sum(p.nbytes for p in model.parameters() if p.requires_grad)


def bench(width, layers, tokens, repeats):
    """Speed and memory as ratios to Hugging Face PEFT's, on the same model, shapes and dtype, in one process."""
    try:
        import peft
    except ImportError:
        sys.exit("--bench needs peft: pip install peft")
    torch.manual_seed(0)
    base = Transformer(nn.Linear(64, width), tokens, 64, width, layers, causal=False).to(DEVICE)
    x, y = torch.randn(4, tokens, 64, device=DEVICE), torch.randint(64, (4,), device=DEVICE)
    print(f"4 x {tokens} tokens; AIRA / PEFT, medians of {repeats} interleaved rounds")

    def with_peft(model, init, rank=RANK):
        options = {"r": rank, "lora_alpha": rank, "target_modules": list(LAYERS), "init_lora_weights": init}
        return peft.get_peft_model(model, peft.LoraConfig(**options))

    def with_aira(model, **options):
        apply_aira(model, lambda: model(x), rank=RANK, targets=LAYERS, **options)
        return model

    def forward(model):
        with torch.no_grad():
            model(x)

    def step(model, optimizer):
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()

    models = {"PEFT": with_peft(copy.deepcopy(base), True), "default": with_aira(copy.deepcopy(base)),
              "init='subspace'": with_aira(copy.deepcopy(base), init="subspace"),
              "init='subspace', equal ranks": with_aira(copy.deepcopy(base), init="subspace", importance="uniform")}
    steps = {name: functools.partial(step, model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
             for name, model in models.items()}
    seconds = medians({name: functools.partial(timed, one) for name, one in steps.items()}, repeats)
    held = {name: memory(one, models[name]) for name, one in steps.items()}
    for name in list(models)[1:]:
        print(f"training step, {name}: time {seconds[name] / seconds['PEFT']:.3f}, "
              f"memory {held[name] / held['PEFT']:.3f}")

    calibration = []

    def set_up(**options):
        model = copy.deepcopy(base)
        total = timed(lambda: apply_aira(model, lambda: calibration.append(timed(lambda: model(x))), rank=RANK,
                                         targets=LAYERS, **options))
        return total - calibration[-1]

    def pissa(init, rank):
        model = copy.deepcopy(base)
        return timed(lambda: with_peft(model, init, rank))

    # 4 x the rank is what the default has on average here, for as many trained parameters
    starts = {f"{init}, rank {rank}": functools.partial(pissa, init, rank)
              for init, rank in (("pissa", RANK), ("pissa_niter_4", RANK), ("pissa_niter_4", 4 * RANK))}
    ours = {"default": set_up,
            "init='subspace', equal ranks": functools.partial(set_up, init="subspace", importance="uniform")}
    seconds = medians({**ours, "forward": lambda: timed(lambda: forward(base)), **starts}, repeats)
    for name in ours:
        for start in list(starts) if name == "default" else list(starts)[:2]:
            print(f"apply_aira without calibration, {name} / {start}: {seconds[name] / seconds[start]:.3f}")
    print(f"calibration / forward pass: {statistics.median(calibration[1:]) / seconds['forward']:.3f}")
    merged = models["default"]
    merge_aira(merged)
    seconds = medians({"base": lambda: timed(lambda: forward(base)), "merged": lambda: timed(lambda: forward(merged))},
                      3 * repeats)
    print(f"forward pass, merged / base: {seconds['merged'] / seconds['base']:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("gpt", "vit"), default="gpt", help="text or images")
    parser.add_argument("--full", action="store_true", help="all methods, six rates, five seeds")
    parser.add_argument("--seeds", type=int, help="how many; 1, with --full 5")
    parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--width", type=int, help="of the model, a multiple of 32; 128, with --full on a GPU 512")
    parser.add_argument("--out", metavar="FILE", help="write everything measured as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw curves and rate sweep, as .png or .pdf (needs matplotlib)")
    parser.add_argument("--bench", action="store_true", help="only time against Hugging Face PEFT (needs peft)")
    options = parser.parse_args()
    if options.plot:
        pyplot()  # rather fail now than after the runs

    started = time.monotonic()
    if WORLD > 1:
        if DEVICE != "cpu":
            torch.cuda.set_device(DEVICE)
        dist.init_process_group("gloo" if DEVICE == "cpu" else "nccl")
    if PLACE > 0:
        sys.stdout = open(os.devnull, "w")  # one process reports
    width, layers, before, steps = 128, 4, 500 if options.model == "gpt" else 1500, 100
    if options.tiny:
        width, layers, before, steps = 32, 2, 20, 10
    if options.full and DEVICE != "cpu" and not options.tiny:
        width, layers, before = 512, 8, 3000
    if options.bench and not options.tiny:
        width, layers = (768, 12) if DEVICE == "cpu" else (4096, 4)
    width = options.width or width
    batch = 16 if options.model == "gpt" else 32
    if batch % WORLD or width % 32:
        sys.exit(f"{WORLD} processes must divide a batch of {batch}, and width={width} must be a multiple of 32")
    machine = torch.cuda.get_device_name() if DEVICE != "cpu" else f"{os.cpu_count()} CPU cores"
    print(f"torch {torch.__version__} on {machine}; width {width}, {layers} layers, rank {RANK}")
    if options.bench:
        return bench(width, layers, tokens=16 if options.tiny else 128, repeats=3 if options.tiny else 9)
    print("GPT: Python sources, then C++ headers" if options.model == "gpt" else
          "ViT: glyphs of straight strokes, then of curved ones")
    task = options.model, width, layers, before, batch
    base, _, held_out, _ = prepare(*task)
    with torch.no_grad():
        print(f"held-out loss before fine-tuning {loss_of(base(held_out[0]), held_out[1]):.4f}", flush=True)

    names = list(METHODS) if options.full else ["LoRA", "AIRA"]
    low = 0.001 if options.model == "gpt" else 0.0005
    rates = [round(low * 30 ** (i / 5), 5) for i in range(6)] if options.full else [5 * low, 10 * low, 20 * low]
    seeds = range(1, 1 + (options.seeds or (5 if options.full else 1)))
    results = {name: {rate: [] for rate in rates} for name in names}
    runs = run_all([(task, name, rate, seed, RANK, steps) for name in names for rate in rates for seed in seeds])
    for one in runs:
        results[one["method"]][one["rate"]].append(one)
    smaller = {}
    if options.full:
        rate = {name: best(results[name])[0]["rate"] for name in ("LoRA", best_lora(results), "AIRA")}
        smaller = {name: {RANK // 2: [], RANK // 4: []} for name in rate}
        few = run_all([(task, name, rate[name], seed, rank, steps) for name in rate for rank in smaller[name]
                       for seed in seeds])
        for one in few:
            smaller[one["method"]][one["rank"]].append(one)
        runs += few
    if options.out and PLACE == 0:
        Path(options.out).write_text(json.dumps({"torch": torch.__version__, "machine": machine, "task": task,
                                                 "runs": runs}))
    report(results, steps)
    if smaller:
        report_sizes(results, smaller)
    if options.plot and PLACE == 0:
        picture(options.plot, results)
    print(f"\n{time.monotonic() - started:.0f} s in all")
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
