# SPDX-License-Identifier: MIT
"""Fine-tune a small GPT with LoRA and with AIRA, on real text that every machine with torch has.

    python train_toy.py            # LoRA and AIRA, three learning rates each; CPU or GPU, nothing is downloaded
    python train_toy.py --full     # all methods, six learning rates, five seeds (README's tables)
    python train_toy.py --tiny     # seconds, to see that it runs

A byte-level GPT learns Python's standard library (and is cached in .cache/), then moves to the C++ headers inside the
torch package.  All methods get the same data in the same order, steps, schedule (10 % warm-up, cosine to 10 %), AdamW
without weight decay, and clipping at norm 1; LoRA and AIRA train the same number of parameters.

Measured with --full --seeds 3 (torch 2.13.0, two CPU cores, 1708 s): with each method at its own best rate, AIRA reaches
LoRA's final loss after 57 +- 1 of 100 steps.  Above half of LoRA's best rate AIRA does worse, and equal ranks end lower
here than ranks by outlier mass; README has all cells.
"""
import argparse
import copy
import json
import math
import random
import statistics
import sys
import sysconfig
import time
import warnings
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from aira import AiraLinear, apply_aira

HERE = Path(__file__).resolve().parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONTEXT = 64  # bytes
RANK = 16
LAYERS = "qkv", "proj", "up", "down"  # what is adapted: all but the head
STEPS, EVERY, BATCH = 100, 5, 16  # of a fine-tuning; validation loss every so many steps; sequences a step


# ---- A byte-level GPT from plain nn.Linear -------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, width, layers):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, width // 32) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                last = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if last else 0.02)

    def forward(self, x):  # (batch, time) bytes -> (batch, time, 256) logits
        h = self.bytes(x) + self.places.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


# ---- Data and training ---------------------------------------------------------------------------------------------


def read(folder, pattern, limit):
    """The bytes of matching files, in a random order that is always the same, as one tensor (n,)."""
    skip = {"site-packages", "test", "tests", "idlelib", "pybind11"}
    data, paths = bytearray(), sorted(Path(folder).rglob(pattern))
    random.Random(0).shuffle(paths)
    for path in paths:
        if len(data) < limit and not skip & set(path.relative_to(folder).parts):
            data += path.read_bytes()
    if len(data) < 200_000:
        sys.exit(f"train_toy.py needs at least 200 kB of {pattern} files in {folder} and found {len(data)} bytes: "
                 "use a Python with its standard library's sources, and a torch wheel with its include folder")
    return torch.frombuffer(data, dtype=torch.uint8).long().to(DEVICE)


def sample(data, batch, generator):
    start = torch.randint(len(data) - CONTEXT - 1, (batch,), generator=generator).to(DEVICE)
    window = data[start[:, None] + torch.arange(CONTEXT + 1, device=DEVICE)]
    return window[:, :-1], window[:, 1:]


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def fit(model, data, lr, steps, batch, seed, every=0, held_out=None, tick=lambda: None):
    """Train what requires a gradient; the held-out losses, one every `every` steps."""
    generator = torch.Generator().manual_seed(seed)  # seeds the order of the data
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.0)
    curve = []
    for step in range(steps):
        warm, cosine = (step + 1) / (0.1 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = lr * min(1, warm) * (0.1 + 0.9 * cosine)
        loss = loss_of(model, sample(data, batch, generator))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if every and (step + 1) % every == 0:
            with torch.no_grad():
                curve.append(loss_of(model, held_out).item())
        tick()
    return curve


def pretrained(width, layers, steps, tick):
    torch.manual_seed(0)
    model = GPT(width, layers).to(DEVICE)
    path = HERE / ".cache" / f"gpt-{width}-{layers}-{steps}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, map_location=DEVICE, weights_only=True))
        return model
    fit(model, read(sysconfig.get_paths()["stdlib"], "*.py", 8e6), 3e-3, steps, BATCH, seed=0, tick=tick)
    path.parent.mkdir(exist_ok=True)
    torch.save(model.state_dict(), path)
    return model


# ---- Methods -------------------------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """Plain LoRA, the baseline: y = base(x) + scale B A x, A uniform and B zero."""

    def __init__(self, base, rank, scale):
        super().__init__()
        self.base, self.scale = base, scale
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        return self.base(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def lora(scale):
    def apply(model, calibrate, rank):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for block in model.blocks:
            for name in LAYERS:
                setattr(block, name, LoRALinear(getattr(block, name), rank, scale).to(DEVICE))
    return apply


def aira(calibrated=True, random_start=False, **options):
    def apply(model, calibrate, rank):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PiSSA does without calibration, on purpose
            apply_aira(model, calibrate if calibrated else None, rank=rank, targets=LAYERS, **options)
        for adapter in model.modules():
            if random_start and isinstance(adapter, AiraLinear):
                with torch.no_grad():  # as large as the chosen start, in random directions
                    size = adapter.start_A.square().mean().sqrt()
                    adapter.start_A.copy_(size * torch.randn(adapter.start_A.shape).to(DEVICE))
    return apply


METHODS = {
    "LoRA": lora(1),
    "AIRA": aira(),
    "LoRA, alpha = 8 rank": lora(8),
    "full fine-tuning": lambda model, calibrate, rank: None,
    "AIRA, random start": aira(random_start=True),
    "AIRA, equal ranks": aira(importance="uniform"),
    "AIRA, not amplified": aira(amplify=0),
    "AIRA, paper's start": aira(init="svd"),
    "PiSSA": aira(calibrated=False, init="svd", importance="uniform"),
}


# ---- What was measured ---------------------------------------------------------------------------------------------


class Progress:
    """One line on stderr with the time left."""

    def __init__(self, total):
        self.total, self.done, self.start, self.shown = total, 0, time.monotonic(), 0.0

    def __call__(self):
        self.done += 1
        now = time.monotonic()
        if now - self.shown > 0.5 or self.done == self.total:
            left = (now - self.start) / self.done * (self.total - self.done)
            end = "\n" if self.done == self.total else ""
            print(f"\rstep {self.done} of {self.total}, {left:.0f} s left   ", end=end, file=sys.stderr, flush=True)
            self.shown = now


def steps_to(curve, target):
    """Steps until the curve first reaches the target, straight lines between its points; None if it never does."""
    for i, loss in enumerate(curve):
        if loss <= target:
            before = curve[i - 1] if i else loss
            return EVERY * (i + 1 - ((target - loss) / (before - loss) if before > loss else 0))
    return None


def mean_curve(curves):
    return [statistics.fmean(points) for points in zip(*curves)]


def best_rate(runs):
    """The learning rate of the lowest mean final loss, among runs {rate: [curve of each seed]}."""
    return min(runs, key=lambda rate: mean_curve(runs[rate])[-1])


def plot(curves, height=16):
    """Mean loss by step as text, log scale; one letter a method."""
    points = [math.log(loss) for curve in curves.values() for loss in curve]
    low, high = min(points), max(points)
    width = 3 * len(next(iter(curves.values())))
    grid = [[" "] * width for _ in range(height)]
    for letter, curve in zip("LA", curves.values()):
        for i, loss in enumerate(curve):
            grid[round((high - math.log(loss)) / (high - low) * (height - 1))][3 * i + 2] = letter
    for i, row in enumerate(grid):
        print(f"{math.exp(high - (high - low) * i / (height - 1)):6.2f} |{''.join(row)}")
    letters = ", ".join(f"{letter} = {name}" for letter, name in zip("LA", curves))
    print("       +" + "-" * width + f"  step {EVERY} .. {STEPS}, {letters}")


def with_deviation(values, digits):
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def report(results, sizes, rates):
    """The tables: each method at its own best rate, then every rate."""
    goal = results["LoRA"]
    goal = mean_curve(goal[best_rate(goal)])[-1]
    print(f"\neach at its own best rate; steps, of {STEPS}, to LoRA's final loss {goal:.4f}; mean +- deviation over "
          "seeds\n")
    print(f"{'method':24}  {'trained':>9}  {'rate':>6}  {'steps':>12}  {'half way':>8}  {'final loss':>17}")
    for name, runs in results.items():
        rate = best_rate(runs)
        half = mean_curve(runs[rate])[len(runs[rate][0]) // 2 - 1]
        reached = [steps_to(curve, goal) for curve in runs[rate]]
        missed = f" ({reached.count(None)} never)" if None in reached else ""
        print(f"{name:24}  {sizes[name]:>9,}  {rate:>6.2g}  {with_deviation(reached, 0) + missed:>12}  {half:>8.3f}  "
              f"{with_deviation([curve[-1] for curve in runs[rate]], 4):>17}")
    print(f"\nfinal loss at every rate, and steps to LoRA's final loss at the same rate\n\n{'method':24}" +
          "".join(f"  {rate:>12.2g}" for rate in rates))
    for name, runs in results.items():
        cells = []
        for rate in rates:
            curve = mean_curve(runs[rate])
            steps = steps_to(curve, mean_curve(results["LoRA"][rate])[-1])
            cells.append(f"{curve[-1]:.3f} ({'never' if steps is None else f'{steps:.0f}'})")
        print(f"{name:24}" + "".join(f"  {cell:>12}" for cell in cells))


def main():
    global STEPS
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="all methods, six rates, five seeds")
    parser.add_argument("--seeds", type=int, help="how many; 1, with --full 5")
    parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", help="write everything measured to this JSON file")
    options = parser.parse_args()

    width, layers, before = (32, 2, 20) if options.tiny else (128, 4, 500)
    if options.full and DEVICE == "cuda" and not options.tiny:
        width, layers, before = 512, 8, 3000
    STEPS = 10 if options.tiny else STEPS
    methods = METHODS if options.full else {name: METHODS[name] for name in ("LoRA", "AIRA")}
    rates = [0.001 * 30 ** (i / 5) for i in range(6)] if options.full else [0.005, 0.01, 0.02]
    seeds = range(1, 1 + (options.seeds or (5 if options.full else 1)))
    started = time.monotonic()
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__} on {machine}")
    print(f"GPT of width {width}, {layers} layers: Python sources, then C++ headers", flush=True)
    base = pretrained(width, layers, before, Progress(before))
    headers = read(Path(torch.__file__).parent / "include", "*.h", 8e6)
    data, held_out = headers[: -len(headers) // 8], headers[-len(headers) // 8:]
    held_out = sample(held_out, 16 if options.tiny else 32, torch.Generator().manual_seed(0))
    examples = torch.Generator().manual_seed(1)
    batches = [sample(data, BATCH, examples)[0] for _ in range(4)]
    with torch.no_grad():
        print(f"held-out loss before fine-tuning {loss_of(base, held_out):.4f}", flush=True)

    results, sizes, tick = {}, {}, Progress(len(methods) * len(rates) * len(seeds) * STEPS)
    for name, apply in methods.items():
        results[name] = {rate: [] for rate in rates}
        for rate in rates:
            for seed in seeds:
                torch.manual_seed(seed)  # seeds LoRA's random start
                model = copy.deepcopy(base)
                apply(model, lambda: [model(x) for x in batches], RANK)
                sizes[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
                results[name][rate].append(fit(model, data, rate, STEPS, BATCH, seed, EVERY, held_out, tick))
        if options.out:
            Path(options.out).write_text(json.dumps(
                {"torch": torch.__version__, "machine": machine, "curves": results, "parameters": sizes}))
    print()
    if not options.full:
        plot({name: mean_curve(runs[best_rate(runs)]) for name, runs in results.items()})
    report(results, sizes, rates)
    print(f"\n{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
