# SPDX-License-Identifier: MIT
"""Fine-tune two small transformers with LoRA, with AIRA and in full, and see which learns faster.

    python train_toy.py              # two CPU cores or a GPU, some minutes, no downloads
    python train_toy.py --full       # every number in README: all methods, five seeds, an hour
    python train_toy.py --full --model vit --only LoRA AIRA

GPT: a language model over bytes reads Python's standard library, then moves to C++, the headers
that come with torch.  ViT: a vision transformer tells 64 glyphs of straight strokes apart, then 32
of curved strokes, in negative.  Files (or images) are training, validation or test.

All methods get the same data in the same order, AdamW (one row: Muon), gradients clipped at norm 1,
10 % warm-up, then a cosine to 10 %.  Every method is run at its own best learning rate, and scale
where it has one: chosen on validation, on seeds of their own, from a grid that grows until the best
lies inside.  LoRA's rank sets the budget for all.
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
CONTEXT = 64  # bytes in a window
LAYERS = ["qkv", "proj", "up", "down"]  # adapted: all but the embedding and the head


class Preset(NamedTuple):
    """How large an experiment is."""

    width: int
    layers: int
    pretraining: dict[str, int]  # steps
    rank: int
    steps: int  # of fine-tuning
    tuning_seeds: list[int]
    seeds: list[int]
    tests: int  # points of a curve


PRESETS = {
    "smoke": Preset(32, 1, {"gpt": 20, "vit": 20}, 4, 10, [101], [1, 2], 5),
    "default, cpu": Preset(64, 3, {"gpt": 2000, "vit": 4000}, 8, 80, [101], [1, 2, 3], 8),
    "default, cuda": Preset(128, 4, {"gpt": 2000, "vit": 4000}, 8, 80, [101], [1, 2, 3], 8),
    "full, cpu": Preset(96, 4, {"gpt": 10_000, "vit": 10_000}, 16, 100, [101, 102], [1, 2, 3, 4, 5], 10),
    "full, cuda": Preset(512, 8, {"gpt": 20_000, "vit": 20_000}, 16, 100, [101, 102], [1, 2, 3, 4, 5], 10),
}


# ---- 1. Models ---------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and a feed-forward network, from plain linear layers."""

    def __init__(self, width, causal):
        super().__init__()
        self.heads, self.causal = width // 32, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, t, d = x.shape
        heads = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, 32).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=self.causal)
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """GPT: bytes (b, t) -> logits (b, t, 256).  ViT: patches (b, 16, 64) -> logits (b, 64)."""

    def __init__(self, kind, width, layers):
        super().__init__()
        self.causal = kind == "gpt"
        self.embedding = nn.Embedding(256, width) if self.causal else nn.Linear(64, width)
        self.places = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, self.causal) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256 if self.causal else 64)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if into_residual else 0.02)

    def forward(self, x):
        h = self.embedding(x) + self.places.weight[: x.shape[1]]
        h = self.norm(self.blocks(h))
        return self.head(h if self.causal else h.mean(1))


# ---- 2. Data -----------------------------------------------------------------------------------
# A part (training, validation, test) is (x, y, group), tensors with a row for each example.
# Examples of one group, the windows of a file, are not independent; errors are computed by group.


def texts(folder, pattern):
    """The files as windows of bytes; validation has at most 512 of them, test 1,024.

    Much code is copied or generated, so large files, some folders and repeated longer lines are
    left out.
    """
    skip = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
    skip |= {"pybind11", "ops", "generated"}
    paths = []
    for path in sorted(Path(folder).rglob(pattern)):
        if path.stat().st_size < 200_000 and not skip & set(path.relative_to(folder).parts):
            paths.append(path)
    random.Random(0).shuffle(paths)
    seen, windows, files = set(), ([], [], []), ([], [], [])
    for number, path in enumerate(paths):
        part = {0: 1, 1: 2}.get(number % 8, 0)
        text = b""
        for line in path.read_bytes().splitlines(keepends=True):
            if len(line) < 20 or line not in seen:
                text += line
                seen.add(line)
        for start in range(0, len(text) - CONTEXT, CONTEXT + 1):
            windows[part].append(text[start : start + CONTEXT + 1])
            files[part].append(number)
    if min(len(part) for part in windows) < 1024:
        sys.exit(f"too little text, {pattern} in {folder}: use a Python and a torch with sources")
    parts = []
    for rows, group, most in zip(windows, files, (None, 512, 1024), strict=True):
        x = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(rows), -1)
        some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:most]
        x = x[some].long().to(DEVICE)
        parts.append((x[:, :-1], x[:, 1:], torch.tensor(group)[some]))
    return parts


def glyphs(classes, sizes, curved, seed):
    """Noisy images of glyphs with four strokes, 32 x 32, as patches (n, 16, 64); three parts.

    Every image bends and shifts its glyph a little.  Curved ones are in negative.
    """
    rng, n, grid = np.random.default_rng(seed), sum(sizes), np.linspace(-1, 1, 32, dtype="f")
    ends = rng.uniform(-0.7, 0.7, (2, classes, 4, 1, 2))
    bend = rng.uniform(-0.6, 0.6, (classes, 4, 1, 2)) * curved
    t = np.linspace(0, 1, 24)[:, None]
    strokes = (1 - t) * ends[0] + t * ends[1] + 4 * t * (1 - t) * bend
    label = rng.integers(classes, size=n)
    warp = np.eye(2) + rng.normal(0, 0.1, (n, 2, 2))
    shift = rng.normal(0, 0.12, (n, 1, 2))
    points = (strokes.reshape(classes, 96, 2)[label] @ warp + shift).astype("f")
    x = np.exp(-(((points[:, :, [0]] - grid) / 0.075) ** 2))
    y = np.exp(-(((points[:, :, [1]] - grid) / 0.075) ** 2))
    ink = rng.uniform(0.5, 1.5, (n, 1, 1)) * (1 - 2 * curved)
    images = np.minimum(y.swapaxes(1, 2) @ x, 1) * ink + rng.normal(0, 0.2, (n, 32, 32))
    patches = images.astype("f").reshape(n, 4, 8, 4, 8).swapaxes(2, 3).reshape(n, 16, 64)
    columns = [torch.tensor(patches).to(DEVICE), torch.tensor(label).to(DEVICE), torch.arange(n)]
    return list(zip(*(column.split(sizes) for column in columns), strict=True))


# ---- 3. Training -------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, part):
    """The mean loss of each window or image (n,)."""
    losses = []
    for x, y in zip(part[0].split(256), part[1].split(256), strict=True):
        loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="none")
        losses.append(loss.view(len(x), -1).mean(1))
    return torch.cat(losses).cpu().numpy()


def make_optimizers(model, rate, muon):
    """AdamW; or Muon for the blocks' matrices, its updates scaled to AdamW's size, and AdamW."""
    head = [p for p in model.head.parameters() if model.new_head]  # whose rate is not tuned
    matrices = [p for p in model.blocks.parameters() if muon and p.dim() == 2]
    special = {id(p) for p in head + matrices}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in special]
    groups = [{"params": rest, "lr": rate}, {"params": head, "lr": 0.008}]
    optimizers = [torch.optim.AdamW(groups, weight_decay=0)]
    if muon:
        settings = {"weight_decay": 0, "adjust_lr_fn": "match_rms_adamw"}
        optimizers.append(torch.optim.Muon(matrices, rate, **settings))
    return optimizers


def train(model, part, rate, steps, seed, test, tests=1, muon=False):
    """Train what requires a gradient -> curve, evaluate(model, test) so many times, the last at
    the end; the median seconds of a step."""
    optimizers = make_optimizers(model, rate, muon)
    starts = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    trained = [p for p in model.parameters() if p.requires_grad]
    order = torch.Generator().manual_seed(seed)
    curve, seconds = [], []
    for step in range(1, steps + 1):
        rows = torch.randint(len(part[0]), (16 if model.causal else 32,), generator=order)
        x, y = part[0][rows.to(DEVICE)], part[1][rows.to(DEVICE)]
        start = time.perf_counter()
        factor = min(1, 10 * step / steps) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        model.zero_grad()
        F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        nn.utils.clip_grad_norm_(trained, 1.0).item()  # which waits for a GPU
        for optimizer, rates in zip(optimizers, starts, strict=True):
            for group, full in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = factor * full
            optimizer.step()
        seconds.append(time.perf_counter() - start)
        if step * tests // steps > (step - 1) * tests // steps:
            curve.append(evaluate(model, test))
    return curve, statistics.median(seconds)


@functools.cache
def prepare(kind, preset):
    """The base, pretrained unless cached; what it knows; the new task's three parts."""
    size = PRESETS[preset]
    torch.manual_seed(0)
    model = Transformer(kind, size.width, size.layers).to(DEVICE)
    model.new_head = False
    if model.causal:
        old = texts(sysconfig.get_paths()["stdlib"], "*.py")
        new = texts(Path(torch.__file__).parent / "include", "*.h")
    else:
        old = glyphs(64, [25_600, 512, 2048], False, seed=0)
        new = glyphs(32, [3200, 512, 1024], True, seed=1)
    code = [inspect.getsource(f) for f in (Block, Transformer, make_optimizers, train, prepare)]
    data = hashlib.sha256(old[0][0].cpu().numpy().tobytes() + str((code, size)).encode())
    path = Path(__file__).parent / f".cache/{kind}-{data.hexdigest()[:16]}.pt"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        train(model, old[0], 0.003 * min(1, 96 / size.width), size.pretraining[kind], 0, old[2])
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, map_location=DEVICE))
    loss = f"{evaluate(model, old[2]).mean():.3f}"
    if model.causal:
        return model, f"reads Python at {loss} nats a byte", new
    right = (model(old[2][0]).argmax(1) == old[2][1]).float().mean()
    model.head, model.new_head = nn.Linear(size.width, 32).to(DEVICE), True  # all methods train it
    return model, f"tells {right:.0%} of the old glyphs", new


# ---- 4. Methods --------------------------------------------------------------------------------
# Functions (model, part, rank, **settings) that freeze the model and put adapters into it.


def lora(model, part, rank, scale=1):
    """The baseline, y = W x + scale B A x, scale = alpha / rank; A and B start as in PEFT."""
    model.requires_grad_(False)
    for layer in adapted_layers(model):
        A = layer.weight.new_empty(rank, layer.in_features)
        layer.lora_A = nn.Parameter(nn.init.kaiming_uniform_(A, a=math.sqrt(5)))
        layer.lora_B = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))

        def add(layer, args, y):
            return y + scale * F.linear(F.linear(args[0], layer.lora_A), layer.lora_B)

        layer.register_forward_hook(add)
