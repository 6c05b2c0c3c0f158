# SPDX-License-Identifier: MIT
"""Fine-tune two small transformers with LoRA, with AIRA and in full: which learns faster?

    python train_toy.py           # some minutes on two CPU cores or on a GPU; no downloads
    python train_toy.py --full    # README's tables: all methods, five seeds, some two hours
    python train_toy.py --full --model vit --only LoRA AIRA

GPT: a language model over bytes has read modules of Python's standard library and moves to C++,
the headers of torch's core library.  ViT: a vision transformer tells 64 glyphs of straight strokes
apart and moves to 32 of curved strokes, in negative.  Each is pretrained once, and kept in .cache.

All methods see the same data in the same order: AdamW (one row: Muon), gradients clipped at norm 1,
10 % warm-up, a cosine to 10 %.  Each runs at its own best learning rate (and scale), chosen on
validation data and on seeds of their own, from a grid that grows until the best lies inside.
"""

import argparse
import copy
import functools
import hashlib
import importlib.util
import inspect
import math
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from aira import AiraLinear, apply_aira

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOCK = time.perf_counter if DEVICE == "cuda" else time.process_time  # other work must not count
CONTEXT = 64  # bytes in a window
TASKS = {
    "gpt": "GPT, from Python to C++ (nats a byte)",
    "vit": "ViT, from glyphs of straight strokes to curved ones, in negative (nats)",
}
LAYERS = ["qkv", "proj", "up", "down"]  # those adapted: all but the embedding and the head


class Preset(NamedTuple):
    """How large an experiment is."""

    width: int
    layers: int
    pretraining: int  # steps
    rank: int
    steps: int
    tuning: int  # seeds on which rates and scales are chosen: 101, 102, ...
    seeds: int  # seeds whose test losses are shown: 0, 1, ...
    tests: int  # points of a curve
    thin: int = 1  # of several scales, try one in so many


PRESETS = {
    "smoke": Preset(32, 1, 20, 4, 10, 1, 2, 5, thin=2),
    "default, cpu": Preset(64, 3, 3000, 8, 80, 1, 3, 8, thin=2),
    "default, cuda": Preset(128, 4, 3000, 8, 80, 1, 3, 8, thin=2),
    "full, cpu": Preset(96, 4, 10_000, 16, 100, 2, 5, 10),
    "full, cuda": Preset(512, 8, 20_000, 16, 100, 2, 5, 10),
}


# ---- 1. Models ---------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and a feed-forward network, from plain linear layers."""

    def __init__(self, width, causal):
        super().__init__()
        self.heads = width // 32
        self.causal = causal
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, 32))
        heads = qkv.permute(2, 0, 3, 1, 4)  # each of the three is (batch, head, place, 32)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=self.causal)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """GPT: bytes (b, t) -> logits (b, t, 256).  ViT: patches (b, 16, 64) -> logits (b, 64)."""

    def __init__(self, kind, width, layers):
        super().__init__()
        self.causal = kind == "gpt"
        self.new_head = False  # set when the head is to be learnt anew
        self.embedding = nn.Embedding(256, width) if self.causal else nn.Linear(64, width)
        self.places = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, self.causal) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256 if self.causal else 64)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, x):
        h = self.embedding(x) + self.places.weight[: x.shape[1]]
        h = self.norm(self.blocks(h))
        return self.head(h if self.causal else h.mean(1))


# ---- 2. Data -----------------------------------------------------------------------------------
# Each task has three parts, for training, validation and test.


class Part(NamedTuple):
    """A row for each example, a window of text or an image."""

    x: torch.Tensor
    y: torch.Tensor
    group: np.ndarray  # examples of one group, the windows of a file, are not independent


def texts(paths):
    """Files as windows of bytes; at most 512 of them in validation, 1,024 in test."""
    paths = sorted(paths)
    random.Random(0).shuffle(paths)
    windows = [], [], []
    files = [], [], []
    for number, path in enumerate(paths):
        part = {0: 1, 1: 2}.get(number % 8, 0)
        content = path.read_bytes()
        for start in range(0, len(content) - CONTEXT, CONTEXT + 1):
            windows[part].append(np.frombuffer(content, np.uint8, CONTEXT + 1, start))
            files[part].append(number)
    if len(windows[2]) < 1024:
        sys.exit("too little text: use a Python with its library's sources, torch with its headers")
    parts = []
    for rows, group, most in zip(windows, files, (None, 512, 1024), strict=True):
        some = np.random.default_rng(0).permutation(len(rows))[:most]
        text = torch.tensor(np.stack(rows)[some]).long().to(DEVICE)
        parts.append(Part(text[:, :-1], text[:, 1:], np.array(group)[some]))
    return parts


def glyphs(classes, sizes, curved, seed):
    """Noisy images (32, 32) of glyphs with four strokes, as patches (n, 16, 64), labels (n,).

    Each image warps and shifts its glyph a little; curved ones are in negative.
    """
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    grid = np.linspace(-1, 1, 32, dtype="f")
    t = np.linspace(0, 1, 24)[:, None]  # 24 points along each stroke
    begin, end = rng.uniform(-0.7, 0.7, (2, classes, 4, 1, 2))
    bend = rng.uniform(-0.6, 0.6, (classes, 4, 1, 2)) * curved
    strokes = (1 - t) * begin + t * end + 4 * t * (1 - t) * bend
    label = rng.integers(classes, size=n)
    warp = np.eye(2) + rng.normal(0, 0.1, (n, 2, 2))
    shift = rng.normal(0, 0.12, (n, 1, 2))
    points = (strokes.reshape(classes, 96, 2)[label] @ warp + shift).astype("f")
    x = np.exp(-(((points[:, :, :1] - grid) / 0.075) ** 2))
    y = np.exp(-(((points[:, :, 1:] - grid) / 0.075) ** 2))
    strength = rng.uniform(0.5, 1.5, (n, 1, 1)) * (1 - 2 * curved)
    ink = np.minimum(y.swapaxes(1, 2) @ x, 1)
    images = ink * strength + rng.normal(0, 0.2, (n, 32, 32))
    patches = images.reshape(n, 4, 8, 4, 8).swapaxes(2, 3).reshape(n, 16, 64)
    every_x = torch.tensor(patches, device=DEVICE).float().split(sizes)
    every_y = torch.tensor(label, device=DEVICE).split(sizes)
    return [Part(x, y, np.arange(len(y))) for x, y in zip(every_x, every_y, strict=True)]


# ---- 3. Training -------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, part):
    """The mean loss of each window or image (n,)."""
    losses = []
    for x, y in zip(part.x.split(64), part.y.split(64), strict=True):
        loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="none")
        losses.append(loss.view(len(x), -1).mean(1))
    return torch.cat(losses).cpu().numpy()


def make_optimizers(model, rate, muon):
    """AdamW; with muon, Muon for the blocks' matrices, its updates scaled to AdamW's size."""
    matrices = [p for p in model.blocks.parameters() if muon and p.dim() == 2]
    head = list(model.head.parameters()) if model.new_head else []  # its rate is not tuned
    others = {id(p) for p in matrices + head}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in others]
    groups = [{"params": rest}, {"params": head, "lr": 0.008}]
    optimizers = [torch.optim.AdamW(groups, rate, weight_decay=0)]
    if muon:
        adjust = {"weight_decay": 0, "adjust_lr_fn": "match_rms_adamw"}
        optimizers.append(torch.optim.Muon(matrices, rate, **adjust))
    return optimizers


def train(model, part, rate, steps, seed, test, tests=1, muon=False):
    """Train what requires a gradient -> [evaluate(model, test)] at so many steps, the last one at
    the end; the seconds of a step, a median."""

    def factor(step):
        warm_up = min(1, 10 * (step + 1) / steps)
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        return warm_up * cosine

    tools = make_optimizers(model, rate, muon)
    tools += [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in tools]
    order = torch.Generator().manual_seed(seed)
    batch = 16 if model.causal else 32
    curve, seconds = [], []
    for step in range(1, steps + 1):
        rows = torch.randint(len(part.x), (batch,), generator=order).to(DEVICE)
        x, y = part.x[rows], part.y[rows]
        start = CLOCK()
        model.zero_grad()
        F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()  # which waits for a GPU
        for tool in tools:  # the optimizers, then their schedules
            tool.step()
        seconds.append(CLOCK() - start)
        if step * tests // steps > (step - 1) * tests // steps:
            curve.append(evaluate(model, test))
    return curve, statistics.median(seconds)


def new_model(kind, preset):
    torch.manual_seed(0)
    return Transformer(kind, PRESETS[preset].width, PRESETS[preset].layers).to(DEVICE)


def pretrain(task):
    """Pretrain a base, unless it is in .cache already -> its path and test loss."""
    kind, preset = task
    if kind == "gpt":
        part, _, test = texts(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    else:
        part, _, test = glyphs(64, [25_600, 512, 2048], curved=False, seed=0)
    key = hashlib.sha256(part.x.cpu().numpy().tobytes())  # other data or code: another base
    for code in (Block, Transformer, make_optimizers, train, pretrain):
        key.update(inspect.getsource(code).encode())
    path = Path(__file__).parent / f".cache/{kind}-{preset}-{key.hexdigest()[:12]}.pt"
    model = new_model(kind, preset)
    if path.exists():
        model.load_state_dict(torch.load(path, map_location=DEVICE))
    else:
        rate = 0.003 * min(1, 96 / PRESETS[preset].width)
        train(model, part, rate, PRESETS[preset].pretraining, 0, test)
        path.parent.mkdir(exist_ok=True)
        torch.save(model.state_dict(), path)
    return path, evaluate(model, test).mean()


@functools.cache
def load(kind, preset, path):
    """The base, and the three parts of the new task."""
    model = new_model(kind, preset)
    model.load_state_dict(torch.load(path, map_location=DEVICE))
    if kind == "gpt":
        return model, texts((Path(torch.__file__).parent / "include/c10").rglob("*.h"))
    model.head = nn.Linear(model.head.in_features, 32).to(DEVICE)
    model.new_head = True
    return model, glyphs(32, [3200, 512, 1024], curved=True, seed=1)


# ---- 4. Methods --------------------------------------------------------------------------------
# Functions (model, part, rank, **settings) that freeze a model and put adapters into it.


def lora(model, part, rank, scale=1):
    """The baseline, y = W x + scale B A x, scale = alpha / rank; A and B start as PEFT's."""
    model.requires_grad_(False)
    for block in model.blocks:
        for layer in (block.qkv, block.proj, block.up, block.down):
            A = layer.weight.new_empty(rank, layer.in_features)
            layer.lora_A = nn.Parameter(nn.init.kaiming_uniform_(A, a=math.sqrt(5)))
            layer.lora_B = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))

            def add(layer, args, y):
                return y + scale * F.linear(F.linear(args[0], layer.lora_A), layer.lora_B)

            layer.register_forward_hook(add)


def some_batches(part):
    """What methods that listen to the model may listen to: 4,096 tokens, in batches of 16."""
    examples = torch.randperm(len(part.x))[: 4096 // part.x.shape[1]]
    return part.x[examples].split(16)


def aira(model, part, rank, random_start=False, **options):
    """AIRA, with apply_aira's options; random_start: A0's rows keep their lengths only."""
    batches = some_batches(part)
    apply_aira(model, lambda: [model(x) for x in batches], rank=rank, targets=LAYERS, **options)
    for layer in model.modules():
        if random_start and isinstance(layer, AiraLinear):
            lengths = layer.lora_A.data.norm(dim=1, keepdim=True)
            layer.lora_A.data = F.normalize(torch.randn_like(layer.lora_A)) * lengths


class Named(nn.Module):
    """PEFT wants models that are called with names."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


def peft(model, part, rank, scale=1, start=True, **options):
    """A variant of LoRA from Hugging Face's PEFT; start: init_lora_weights."""
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    named, batches = Named(model), some_batches(part)
    config = LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=LAYERS, **options)
    config.init_lora_weights = start
    if start == "corda":
        config.corda_config = CordaConfig(corda_method="ipm")
        with torch.no_grad():
            preprocess_corda(named, config, lambda: [model(x[None]) for x in torch.cat(batches)])
    if start == "eva":
        config.eva_config = EvaConfig()
    adapted = get_peft_model(named, config, low_cpu_mem_usage=False)
    if start == "eva":
        initialize_lora_eva_weights(
            adapted,
            [{"x": x} for x in batches],
            forward_fn=lambda model, inputs: model(**inputs),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=lambda x, *_: (x[0] if isinstance(x, tuple) else x).flatten(
                0, 1
            ),
            show_progress_bar=False,
        )


def full(model, part, rank):
    """Full fine-tuning: every weight."""


def equal(W, rms):
    """As importance, it gives every layer the same rank."""
    return sum(W.shape)


def owl_share(W, rms):
    """OWL's: the share of weights of more than five times the mean significance."""
    significance = W.abs() * rms
    return (significance > 5 * significance.mean()).double().mean()


class Method(NamedTuple):
    """A row of the table: what it does, and where the search for its rate begins."""

    put: Callable
    rate: float
    settings: list[dict] = [{}]  # of several the best on validation
    letter: str = ""  # in the chart of the default run
    rank: float = 1  # times the preset's
    steps: int = 1  # times the preset's
    muon: bool = False
    goal: str = "LoRA"  # the method whose final loss is to be reached


def scales(*values, **settings):
    return [{"scale": value, **settings} for value in values]


NO_START = {"random_start": True}
NO_RANKS = {"importance": equal}
NO_G = {"amplify": 0}
LONG = "LoRA, 4 x steps"
METHODS = {
    "LoRA": Method(lora, 0.008, letter="L"),
    "LoRA, best scale": Method(lora, 0.004, scales(1, 2, 4, 8, 16, 32), letter="S"),
    "AIRA": Method(aira, 0.016, letter="A"),
    "full fine-tuning": Method(full, 0.002, letter="f"),
    "full, Muon": Method(full, 0.002, muon=True),
    "AIRA less start": Method(aira, 0.016, [NO_START]),
    "AIRA less ranks": Method(aira, 0.016, [NO_RANKS]),
    "AIRA less G": Method(aira, 0.016, [NO_G]),
    "LoRA + start": Method(aira, 0.016, [NO_RANKS | NO_G]),
    "LoRA + ranks": Method(aira, 0.016, [NO_START | NO_G]),
    "LoRA + G": Method(aira, 0.016, [NO_START | NO_RANKS]),
    "letter: both factors": Method(aira, 0.008, [{"init": "svd"}]),
    "letter: OWL's share": Method(aira, 0.016, [{"importance": owl_share}]),
    "letter: loud amplified": Method(aira, 0.008, [{"amplify": -0.25}]),
    "LoRA, half rank": Method(lora, 0.008, rank=0.5),
    "AIRA, half rank": Method(aira, 0.016, rank=0.5),
    LONG: Method(lora, 0.008, steps=4, goal=LONG),
    "best scale, 4 x steps": Method(lora, 0.004, scales(2, 4, 8, 16), steps=4, goal=LONG),
    "AIRA, 4 x steps": Method(aira, 0.016, steps=4, goal=LONG),
    "DoRA": Method(peft, 0.008, scales(1, 4, 16, use_dora=True)),
    "EVA": Method(peft, 0.008, scales(1, 4, 16, start="eva")),
    "CorDA": Method(peft, 0.002, scales(1, 2, 4, start="corda")),
    "PiSSA": Method(peft, 0.002, scales(1, 2, 4, start="pissa")),
}


# ---- 5. Experiment -----------------------------------------------------------------------------


class Job(NamedTuple):
    """One fine-tuning."""

    kind: str
    preset: str
    base: Path
    name: str
    settings: dict
    rate: float
    seed: int = 0
    part: int = 1  # watched: 1 validation, 2 test


class Run(NamedTuple):
    """What came of it."""

    job: Job
    curve: list[float]  # mean losses
    losses: np.ndarray  # at the end, of every window or image
    trained: int  # parameters
    setup: float  # seconds
    step: float  # seconds


def run(job):
    """Fine-tune the base once -> Run."""
    base, parts = load(job.kind, job.preset, job.base)
    size, method = PRESETS[job.preset], METHODS[job.name]
    torch.manual_seed(job.seed)
    model = copy.deepcopy(base)
    start = CLOCK()
    method.put(model, parts[0], round(method.rank * size.rank), **job.settings)
    setup = CLOCK() - start
    if model.new_head:
        model.head.requires_grad_(True)  # by all methods
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    steps = method.steps * size.steps
    tests = size.tests if job.part == 2 else 1
    watched = parts[job.part]
    losses, step = train(model, parts[0], job.rate, steps, job.seed, watched, tests, method.muon)
    curve = [float(one.mean()) for one in losses]
    return Run(job, curve, losses[-1], trained, setup, step)


def search(job):
    """Try rates until the best lies inside -> its validation loss, the job with that rate."""
    seeds = PRESETS[job.preset].tuning if METHODS[job.name].steps == 1 else 1
    rates = [job.rate / 2, job.rate, job.rate * 2]
    losses = {}
    while rates:
        for rate in rates:
            jobs = [job._replace(rate=rate, seed=101 + i) for i in range(seeds)]
            loss = np.mean([run(one).curve[-1] for one in jobs])
            losses[rate] = np.nan_to_num(loss, nan=np.inf)
        best = min(losses, key=losses.get)
        rates = []
        if best == min(losses):
            rates.append(best / 2)
        if best == max(losses):
            rates.append(best * 2)
    return losses[best], job._replace(rate=best)


def everywhere(pool, function, items):
    """[function(item)], on all cores, with the time left on a terminal."""
    start, futures = time.monotonic(), [pool.submit(function, item) for item in items]
    for done, _ in enumerate(as_completed(futures), 1):
        left = (time.monotonic() - start) * (len(items) / done - 1)
        if sys.stderr.isatty():
            print(f"\r{function.__name__}: {left:.0f} s left  \r", end="", file=sys.stderr)
    return [future.result() for future in futures]


def tune(pool, kind, preset, base, names):
    """{name: job} with the setting and rate that are best on validation."""
    jobs = []
    for name in sorted(names, key=lambda name: -METHODS[name].steps):  # the longest first
        for settings in METHODS[name].settings[:: -PRESETS[preset].thin]:
            jobs.append(Job(kind, preset, base, name, settings, METHODS[name].rate))
    best = {}
    for loss, job in everywhere(pool, search, jobs):
        if job.name not in best or loss < best[job.name][0]:
            best[job.name] = loss, job
    return {name: best[name][1] for name in names}


def test(pool, best, seeds):
    """{name: a Run on test data for each seed}"""
    jobs = []
    for job in best.values():
        jobs += [job._replace(part=2, seed=seed) for seed in range(seeds)]
    runs = iter(everywhere(pool, run, jobs))
    return {name: [next(runs) for _ in range(seeds)] for name in best}


# ---- 6. Report ---------------------------------------------------------------------------------


def steps_to(goal, run, steps):
    """Where the test loss first comes to the goal, linear between tests; inf if it never does."""
    lowest = np.minimum.accumulate(run.curve)
    if lowest[-1] > goal:
        return math.inf
    places = np.linspace(0, steps, len(lowest) + 1)[1:]
    return float(np.interp(-goal, -lowest, places))  # interp wants rising values


def error(values):
    """The standard error of a mean of independent values."""
    return np.std(values, ddof=1) / math.sqrt(len(values))


def clustered_error(values, groups):
    """The same where the values of a group are not independent."""
    rest = values - values.mean()
    sums = [rest[groups == group].sum() for group in np.unique(groups)]
    return math.sqrt(np.square(sums).sum()) / len(values)


def chart(curves, goal, steps, width=66, height=15):
    """Curves {letter: losses} over the steps, as text; dots mark the goal."""
    places = np.linspace(0, steps, len(curves["L"]) + 1)[1:]
    x = np.linspace(places[0], steps, width)
    lines = {letter: np.interp(x, places, curve) for letter, curve in curves.items()}
    top = lines["L"][width // 4]
    bottom = min(line.min() for line in lines.values())
    canvas = np.full((height, width), " ")
    for letter, line in [(".", np.full(width, goal)), *reversed(lines.items())]:
        rows = np.rint((top - line) / (top - bottom) * (height - 1)).astype(int)
        seen = (rows >= 0) & (rows < height)
        canvas[rows[seen], np.arange(width)[seen]] = letter
    for level, row in zip(np.linspace(top, bottom, height), canvas, strict=True):
        print(f"{level:8.3f} |{''.join(row)}")
    print(f"{'step':>8} {places[0]:<8.0f}{steps:>{width - 7}}\n")


def plot(curves, steps, file):
    """The chart as a picture."""
    from matplotlib import pyplot

    for letter, curve in curves.items():
        pyplot.plot(np.linspace(0, steps, len(curve) + 1)[1:], curve, label=letter)
    pyplot.legend()
    pyplot.xlabel("step")
    pyplot.ylabel("test loss")
    pyplot.savefig(file)
    pyplot.close()


def speed(runs, others, steps):
    """To the others' final loss: the steps, +- over seeds, and their time's share, as text."""
    to, share = [], []
    for run, other in zip(runs, others, strict=True):
        to.append(steps_to(other.curve[-1], run, steps))
        ours = run.setup + to[-1] * run.step
        theirs = other.setup + steps * other.step
        share.append(ours / theirs)
    if not np.isfinite(to).all():
        return "never", ""
    return f"{np.mean(to):.0f} +-{error(to):.0f}", f"{np.mean(share):.0%}"


def table(results, steps):
    """A row for each method."""
    print(f"{'to LoRA`s final loss':>80}".replace("`", "'"))
    print("method                 scale    rate  trained   test loss        steps   time")
    for name, runs in results.items():
        job = runs[0].job
        final = [run.curve[-1] for run in runs]
        to, share = speed(runs, results[METHODS[name].goal], METHODS[name].steps * steps)
        print(
            f"{name:22} {job.settings.get('scale', ''):5} {job.rate:7.3g} {runs[0].trained:8,}  "
            f"{np.mean(final):.4f} +-{error(final):.4f} {to:>9} {share:>6}"
        )


def differences(results, groups, goal):
    """Final losses minus those of one method, with errors over seeds and over files or images."""
    print(f"\nfinal test loss minus that of: {goal:22}   +-seeds  +-files")
    theirs = np.array([run.losses for run in results[goal]])
    for name, runs in results.items():
        less = np.array([run.losses for run in runs]) - theirs
        seeds = error(less.mean(axis=1))
        files = clustered_error(less.mean(axis=0), groups)
        print(f"{name:44} {less.mean():+8.4f} {seeds:9.4f} {files:8.4f}")


def report(results, options):
    """All that is printed of one model."""
    job = results["LoRA"][0].job
    steps = PRESETS[job.preset].steps
    curves = {}
    for name, runs in results.items():
        if METHODS[name].letter:
            curves[METHODS[name].letter] = np.mean([run.curve for run in runs], axis=0)
            print(f"{METHODS[name].letter}  {name}")
    print(".  LoRA's final test loss\n")
    chart(curves, curves["L"][-1], steps)
    table(results, steps)
    if "AIRA" in results:
        to, share = speed(results["AIRA"], results["LoRA"], steps)
        when = f"after {to} of {steps} steps, in {share} of its time" if share else "at no step"
        print(f"\nAIRA reached LoRA's final loss {when}.")
    if options.full:
        _, parts = load(job.kind, job.preset, job.base)
        for goal in ("LoRA", "LoRA, best scale", "AIRA"):
            if goal in results:
                differences(results, parts[2].group, goal)
    if options.plot:
        plot(curves, steps, f"{job.kind}-{options.plot}")


def installed(name):
    """Is there what the method needs?"""
    needs = ""
    if METHODS[name].muon and not hasattr(torch.optim, "Muon"):
        needs = "torch 2.9"
    if METHODS[name].put is peft and not importlib.util.find_spec("peft"):
        needs = "pip install peft attrs"
    if needs:
        print(f"{name} is left out: it needs {needs}")
    return not needs


def wanted(options):
    """The methods to run: with --only, those named and what they are compared with."""
    names = [name for name, method in METHODS.items() if options.full or method.letter]
    if options.only:
        goals = [METHODS[name].goal for name in options.only]
        names = list(dict.fromkeys(["LoRA", *goals, *options.only]))
    return [name for name in names if installed(name)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="all methods, larger, five seeds")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--model", choices=["vit", "gpt"], help="one of the two")
    parser.add_argument("--only", nargs="+", choices=METHODS, metavar="NAME", help="with LoRA")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves (needs matplotlib)")
    options = parser.parse_args()
    if options.plot and not importlib.util.find_spec("matplotlib"):
        sys.exit("--plot needs matplotlib: pip install matplotlib")
    preset = f"{'full' if options.full else 'default'}, {DEVICE}"
    if options.smoke:
        preset = "smoke"
    kinds = [options.model] if options.model else ["vit", "gpt"]
    names = wanted(options)

    start = time.monotonic()
    spawn = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(None, spawn, torch.set_num_threads, (1,)) as pool:
        bases = everywhere(pool, pretrain, [(kind, preset) for kind in kinds])
        for kind, (base, loss) in zip(kinds, bases, strict=True):
            print(f"\n{TASKS[kind]}.\nOn its old task the base has a test loss of {loss:.3f}.\n")
            best = tune(pool, kind, preset, base, names)
            report(test(pool, best, PRESETS[preset].seeds), options)
    print(f"\n{time.monotonic() - start:.0f} seconds in all")


if __name__ == "__main__":
    main()
