# SPDX-License-Identifier: MIT
"""Fine-tune a small pretrained transformer with LoRA, with AIRA and in full, and print who wins.

    python train_toy.py                 # four methods, one seed; no downloads
    python train_toy.py --full          # all baselines, AIRA without each idea, sizes, five seeds
    python train_toy.py --model vit     # images instead of text; goes with every other option
    python train_toy.py --tiny          # seconds, only to see that it runs

gpt: a byte-level GPT learns Python's standard library, then moves to C++, the headers in torch.
vit: a ViT learns to tell 64 glyphs of straight strokes apart, then 32 of curved ones, in negative.
The base is pretrained once, kept in .cache/, and compared with yardsticks counted on its own data.

Protocol: whole files, or images, are training, validation or test.  All methods get the same data
in the same order, AdamW without decay (one row Muon), clipping at norm 1, 10 % warm-up, a cosine to
10 %.  Rates (and LoRA's scale, in one row) are chosen on validation, on seeds of their own, from a
grid that grows by 2 until its best lies inside; then the reported seeds run, and test is read.
"""
import argparse, copy, functools, json, math, multiprocessing, os, random, sys, sysconfig, time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from aira import AiraLinear, aira_state_dict, apply_aira, outlier_weighted_svd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONTEXT = 64  # bytes a window
LAYERS = "qkv", "proj", "up", "down"  # what is adapted: all but the embedding and the head
HEAD_RATE = 0.008  # of the ViT's new head: a method's own rate is about what it adapts
POINTS = 10  # of a curve

# ---- 1. Two transformers from plain nn.Linear ----------------------------------------------------

class Block(nn.Module):
    def __init__(self, width, causal):
        super().__init__()
        self.heads, self.causal = width // 32, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, 32).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

class Transformer(nn.Module):
    """GPT: bytes (b, t) -> logits (b, t, 256).  ViT: patches (b, 16, 64) -> logits (b, classes)."""

    def __init__(self, kind, width, layers):
        super().__init__()
        self.causal = kind == "gpt"
        self.embedding = nn.Embedding(256, width) if self.causal else nn.Linear(64, width)
        self.places = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, self.causal) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256 if self.causal else 64)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                last = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if last else 0.02)

    def forward(self, x):
        h = self.embedding(x) + self.places.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h if self.causal else h.mean(1)))

# ---- 2. Data: a part is a pair of tensors (x, y), a row an example -------------------------------

def texts(folder, pattern):
    """The files as windows of bytes: training, validation (512) and test (1,024) parts.  Much code is
    copied or generated, so large files, some folders and repetitions of longer lines are left out."""
    skip = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data",
            "pybind11", "ops", "generated"}
    paths = [path for path in sorted(Path(folder).rglob(pattern)) if path.stat().st_size < 200_000
             and not skip & set(path.relative_to(folder).parts)]
    random.Random(0).shuffle(paths)
    seen, parts = set(), [bytearray(), bytearray(), bytearray()]
    for i, path in enumerate(paths):
        for line in path.read_bytes().splitlines(keepends=True):
            if len(line) < 20 or line not in seen:
                parts[{0: 1, 1: 2}.get(i % 8, 0)] += line
                seen.add(line)
    if min(map(len, parts)) < 200_000:
        sys.exit(f"train_toy.py needs megabytes of {pattern} in {folder}, found {len(paths)} files:"
                 " use a Python with its sources and a torch wheel with its headers")
    for i, most in enumerate((None, 512, 1024)):
        rows = torch.frombuffer(parts[i], dtype=torch.uint8).long().unfold(0, CONTEXT + 1, CONTEXT + 1)
        if most:
            rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:most]]
        parts[i] = rows[:, :-1].to(DEVICE), rows[:, 1:].to(DEVICE)
    return parts

def glyphs(classes, sizes, curved, seed):
    """Noisy 32 x 32 images of glyphs with four strokes, as patches (n, 16, 64), each a little bent
    and shifted; curved ones in negative.  Parts of these sizes, [(patches, labels)]."""
    rng, n, grid = np.random.default_rng(seed), sum(sizes), np.linspace(-1, 1, 32)
    ends = rng.uniform(-0.7, 0.7, (2, classes, 4, 1, 2))
    bend = rng.uniform(-0.6, 0.6, (classes, 4, 1, 2)) * curved
    t, label = np.linspace(0, 1, 24)[:, None], rng.integers(classes, size=n)
    strokes = ((1 - t) * ends[0] + t * ends[1] + 4 * t * (1 - t) * bend).reshape(classes, 96, 2)
    points = strokes[label] @ (np.eye(2) + rng.normal(0, 0.1, (n, 2, 2)))
    points += rng.normal(0, 0.12, (n, 1, 2))
    x, y = (np.exp(-((points[:, :, [i]] - grid) / 0.075) ** 2) for i in (0, 1))
    images = np.minimum(y.swapaxes(1, 2) @ x, 1) * rng.uniform(0.5, 1.5, (n, 1, 1)) * (1 - 2 * curved)
    images = torch.tensor(images + rng.normal(0, 0.2, images.shape), dtype=torch.float32)
    patches = images.view(n, 4, 8, 4, 8).transpose(2, 3).reshape(n, 16, 64)
    return list(zip(*(t.to(DEVICE).split(sizes) for t in (patches, torch.tensor(label)))))

# ---- 3. Training ---------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, part):
    """Mean loss of each window or image (n,), and the share of right answers."""
    losses, right = [], []
    for x, y in zip(part[0].split(32), part[1].split(32)):
        logits = model(x).flatten(0, -2)
        loss = F.cross_entropy(logits, y.flatten(), reduction="none")
        losses.append(loss.view(len(y), -1).mean(1))
        right.append((logits.argmax(-1) == y.flatten()).float())
    return torch.cat(losses).cpu(), torch.cat(right).mean().item()

def train(model, part, rate, steps, seed, watch=None, points=1, muon=False, pretraining=False):
    """Train what requires a gradient -> [evaluate(model, watch)] at so many points, the last one at
    the end; before the end, the first quarter of `watch` must do."""
    groups = {"matrices": [], "head": [], "rest": []}  # Muon's, the ViT's new head, all else
    for name, p in model.named_parameters():
        kind = ("matrices" if muon and name.startswith("blocks") and p.dim() == 2 else "head"
                if name.startswith("head") and not model.causal and not pretraining else "rest")
        groups[kind] += [p] * p.requires_grad
    tools = [torch.optim.AdamW([{"params": groups["rest"], "lr": rate},
                                {"params": groups["head"], "lr": HEAD_RATE}], weight_decay=0)]
    if muon:  # its updates are scaled to AdamW's size, so one rate serves both
        tools.append(torch.optim.Muon(groups["matrices"], rate, weight_decay=0,
                                      adjust_lr_fn="match_rms_adamw"))
    decay = (lambda u: (1 - u) ** 2) if pretraining else lambda u: .55 + .45 * math.cos(math.pi * u)
    tools += [torch.optim.lr_scheduler.LambdaLR(
        one, lambda i: min(1, (i + 1) / (0.1 * steps)) * decay(i / steps)) for one in tools]
    generator, curve = torch.Generator().manual_seed(seed), []  # seeds the order of the data
    for step in range(1, steps + 1):
        rows = torch.randint(len(part[0]), (16 if model.causal else 32,), generator=generator)
        x, y = (t[rows.to(DEVICE)] for t in part)
        model.zero_grad()
        F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        nn.utils.clip_grad_norm_(sum(groups.values(), []), 1.0)
        for one in tools:  # the optimizers, then their schedules
            one.step()
        if watch and step * points // steps > (step - 1) * points // steps:
            quarter = [t[:len(t) // 4] for t in watch]
            curve.append(evaluate(model, watch if step == steps else quarter))
    return curve

# ---- 4. The base, and yardsticks for what it knows -----------------------------------------------

def count_tables(train, test):
    """Nats a byte on `test` of counted bytes, pairs, triples, each smoothed by the one before."""
    p, results = 1 / 256, []
    for n in (1, 2, 3):
        code, asked = (sum(x[:, i:CONTEXT - n + 1 + i] << 8 * (n - 1 - i) for i in range(n)).ravel()
                       for x in (train.cpu().numpy(), test.cpu().numpy()))
        count = np.bincount(code, minlength=256 ** n).reshape(-1, 256)
        p = (count[asked >> 8, asked & 255] + 4 * p) / (count.sum(1)[asked >> 8] + 4)
        results.append(f"{-np.log(p).mean():.3f}")
        p = p.reshape(len(test), -1)[:, 1:].ravel()  # the next table starts a byte later
    return ", ".join(results)

def pretrain(model, steps, new):
    """Train a new base in place -> in words, what it knows beside simple yardsticks."""
    start, old = time.monotonic(), (texts(sysconfig.get_paths()["stdlib"], "*.py") if model.causal else
                                    glyphs(64, (25_600, 512, 2048), curved=False, seed=0))
    rate = 0.003 * min(1, 96 / model.head.in_features)
    curve = train(model, old[0], rate, steps, 0, old[2], points=3, pretraining=True)
    late = [loss[:len(old[2][0]) // 4].mean() for loss, _ in curve]
    known = (f"pretrained in {time.monotonic() - start:.0f} s; its own test loss {curve[2][0].mean():.3f}"
             f", {1 - late[2] / late[1]:.1%} lower than after two thirds;\n")
    if model.causal:
        text = torch.cat([new[0][0], new[0][1][:, -1:]], 1).byte().cpu().numpy().tobytes()
        copied = fmean(bytes(row) in text for row in new[2][0].byte().cpu().numpy())
        return known + (f"tables of bytes, pairs, triples {count_tables(old[0][0], old[2][0])}; "
                        f"{copied:.1%} of the new test windows stand in the new training text")
    x, z = (F.pad(part[0].flatten(1), (0, 1), value=1.0) for part in (old[0], old[2]))
    linear = torch.linalg.lstsq(x, F.one_hot(old[0][1]).float()).solution  # pixels -> labels
    right = ((z @ linear).argmax(1) == old[2][1]).float().mean()
    return known + f"accuracy {curve[2][1]:.1%}, linear in pixels {right:.1%}, chance {1 / 64:.1%}"

@functools.lru_cache(1)
def prepare(kind, width, layers, steps):
    """The base (pretrained unless cached), what it knows, and the new task's three parts."""
    torch.manual_seed(0)
    model = Transformer(kind, width, layers).to(DEVICE)
    parts = (texts(Path(torch.__file__).parent / "include", "*.h") if model.causal else
             glyphs(32, (3200, 512, 1024), curved=True, seed=1))
    path = Path(__file__).resolve().parent / ".cache" / f"{kind}-{width}-{layers}-{steps}.pt"
    if not path.exists():
        print(f"pretraining, {steps:,} steps, once ...", file=sys.stderr, flush=True)
        path.parent.mkdir(exist_ok=True)
        torch.save({"known": pretrain(model, steps, parts), "model": model.state_dict()}, path)
    saved = torch.load(path, map_location=DEVICE, weights_only=True)
    model.load_state_dict(saved["model"])
    if not model.causal:
        model.head = nn.Linear(width, 32, device=DEVICE)  # new classes; every method trains it
        nn.init.zeros_(model.head.weight)
    return model, saved["known"], parts

# ---- 5. Methods: functions that put adapters into a model ----------------------------------------

class LoRALinear(nn.Module):
    """The baseline: y = base(x) + scale B A x, scale = alpha / rank; or PiSSA, arXiv 2404.02948."""

    def __init__(self, base, rank, scale, pissa):
        super().__init__()
        self.base, self.scale = base, scale
        B = base.weight.new_zeros(base.out_features, rank)
        A = nn.init.kaiming_uniform_(base.weight.new_empty(rank, base.in_features), a=math.sqrt(5))
        if pissa:  # the plain SVD of the weight, which keeps the rest
            B, A = outlier_weighted_svd(base.weight, torch.ones_like(base.weight[0]), rank)
            base.weight.data -= B @ A
        self.lora_A, self.lora_B = nn.Parameter(A.contiguous()), nn.Parameter(B.contiguous())

    def forward(self, x):
        return self.base(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)

def lora(model, part, rank, head, scale=1, pissa=False):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(head))
    for block in model.blocks:
        for name in LAYERS:
            setattr(block, name, LoRALinear(getattr(block, name), rank, scale, pissa))

def aira(model, part, rank, head, **options):
    batches = part[0][:256].split(16)
    apply_aira(model, lambda: [model(x) for x in batches], rank=rank, targets=LAYERS,
               also_train=head, **options)

METHODS = {  # name: function, its options, and the rate in the middle of the first grid
    "LoRA": (lora, {}, 0.008), "PiSSA": (lora, {"pissa": True}, 0.002),
    **{f"LoRA, scale {s}": (lora, {"scale": s}, 0.004) for s in (2, 8, 16, 32)},
    "AIRA": (aira, {}, 0.008), "AIRA, random start": (aira, {"start": "random"}, 0.008),
    "AIRA, equal ranks": (aira, {"importance": "uniform"}, 0.008),
    "AIRA, not amplified": (aira, {"amplify": 0}, 0.008),
    "full fine-tuning": (lambda *_: None, {}, 0.002), "full, by Muon": (lambda *_: None, {}, 0.002)}
TUNED = "LoRA, scale tuned"  # a row of the report: whichever LoRA is best on validation

# ---- 6. Runs -------------------------------------------------------------------------------------

Row = namedtuple("Row", "name rank steps")
Job = namedtuple("Job", "method rank steps rate seed part")  # part: 1 validation, 2 test

def adapted(task, method, rank, seed):
    """A copy of the base, ready to be trained by the method, and the task's parts."""
    base, _, parts = prepare(*task)
    torch.manual_seed(seed)  # seeds LoRA's random start
    model, (apply, options, _) = copy.deepcopy(base), METHODS[method]
    apply(model, parts[0], rank, () if model.causal else ("head",), **options)
    return model, parts

def run(task, job):
    """One fine-tuning -> its last loss (also by window), accuracy, curve, and sizes less the head."""
    if DEVICE == "cpu":
        torch.set_num_threads(1)  # as many runs at a time as cores: faster than one run on all
    model, parts = adapted(task, job.method, job.rank, job.seed)
    curve = train(model, parts[0], job.rate, job.steps, job.seed, parts[job.part],
                  POINTS if job.part == 2 else 1, job.method.endswith("Muon"))
    head = 0 if model.causal else sum(p.numel() for p in model.head.parameters())
    sizes = [sum(p.numel() for p in model.parameters() if p.requires_grad) - head] * 3
    adapters = [module for module in model.modules() if isinstance(module, AiraLinear)]
    if adapters:
        sizes[1:] = (sum(t.numel() for adapter in adapters for t in adapter.factors()),
                     sum(t.numel() for t in aira_state_dict(model).values()) - head)
    windows, accuracy = curve[-1]
    return {"loss": windows.mean().item(), "windows": windows.tolist(), "accuracy": accuracy,
            "sizes": sizes, "curve": [loss[:len(windows) // 4].mean().item() for loss, _ in curve]}

def run_all(task, jobs, pool):
    """{job: run(task, job)}, in as many processes as there are cores; time left on a terminal."""
    results, start = {}, time.monotonic()
    for job, result in zip(jobs, pool.map(functools.partial(run, task), jobs)):
        results[job] = result
        if sys.stderr.isatty():
            left = (time.monotonic() - start) * (len(jobs) / len(results) - 1) / 60
            print(f"\r{len(results)} of {len(jobs)} runs, {left:.1f} minutes left in this round ",
                  end="", file=sys.stderr, flush=True)
    return results

def tune(task, rows, seeds, pool):
    """{row: (method, rate)}, best on validation, and {Row of a method: {rate: mean loss}}."""
    meant = {row: [row._replace(name=method) for method in METHODS if method == row.name
                   or row.name == TUNED and method.startswith("LoRA")] for row in rows}
    missing = {one: [METHODS[one.name][2] * f for f in (0.5, 1, 2)]
               for some in meant.values() for one in some}
    losses, grids = {}, {one: {} for one in missing}
    while missing:
        jobs = [Job(*one, rate, seed, 1) for one, rates in missing.items() for rate in rates
                for seed in (seeds if one.steps <= 100 else seeds[:1])]
        for job, result in run_all(task, jobs, pool).items():
            losses.setdefault(job[:4], []).append(min(99, result["loss"]))  # NaN if it diverged
        for (*one, rate), some in losses.items():
            grids[Row(*one)][rate] = fmean(some)
        best = {one: min(grid, key=grid.get) for one, grid in grids.items()}
        missing = {one: [rate / 2 if rate == min(grids[one]) else rate * 2]
                   for one, rate in best.items() if rate in (min(grids[one]), max(grids[one]))}
    picked = {row: min(some, key=lambda one: grids[one][best[one]]) for row, some in meant.items()}
    return {row: (one.name, best[one]) for row, one in picked.items()}, grids

def step_times(task, picked, rounds=20):
    """{row: time of a training step over that of the first row}: medians of rounds in turn."""
    models = {row: adapted(task, method, row.rank, 0) for row, (method, _) in picked.items()}
    seconds = {row: [] for row in models}
    for row in list(models) * rounds:
        start, (model, parts) = time.perf_counter(), models[row]
        train(model, parts[0], 1e-4, 2, 0, [t[:4] for t in parts[1]], muon=row.name.endswith("Muon"))
        seconds[row].append(time.perf_counter() - start)
    unit = median(seconds[next(iter(models))])
    return {row: median(some) / unit for row, some in seconds.items()}

# ---- 7. Report -----------------------------------------------------------------------------------

def crossing(places, losses, goal):
    """Where falling losses first come to the goal, on straight lines between places; inf if never."""
    i = next((i for i, loss in enumerate(losses) if loss <= goal), None)
    if not i:
        return math.inf if i is None else places[0]
    return float(np.interp(-goal, np.negative(losses[i - 1:i + 1]), places[i - 1:i + 1]))

def versus(runs, others):
    """Mean difference of the final losses +- its standard error over seeds / over windows."""
    difference = np.array([a["windows"] for a in runs]) - np.array([b["windows"] for b in others])
    errors = [x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
              for x in (difference.mean(1), difference.mean(0))]
    return "{:+.3f} +-{:.3f}/{:.3f}".format(difference.mean(), *errors)

def report(results, picked, times, grids):
    """The table and the rates tried; the first row is LoRA."""
    _, rank, steps = first = next(iter(results))
    every = [loss for runs in results.values() for run in runs for loss in run["curve"]]
    print(f"""
Test set, {len(results[first])} seed(s), each at its best rate.  "to": the step (median) that comes to
the final loss of LoRA | of {TUNED}; the differences to these, at rank {rank} and as many
steps, +- errors over seeds / over windows; sizes: numbers trained, exported to PEFT, stored in a
file; the curve; the time of a step, LoRA's = 1.

{'':21}rank steps   rate   loss        to  {'- LoRA':19} {'- LoRA, scale tuned':19} right curve      time sizes""")
    for row, runs in results.items():
        goals = [results[Row(name, rank, row.steps)] for name in ("LoRA", TUNED)]
        places = np.arange(1, POINTS + 1) * row.steps / POINTS
        to = [median(crossing(places, run["curve"], goal["curve"][-1]) for run, goal in zip(runs, other))
              for other in goals]
        curve = (np.mean([run["curve"] for run in runs], 0) - min(every)) / np.ptp(every)
        print(f"{row.name:21}{row.rank:>4} {row.steps:>5} {picked[row][1]:>6.2g} "
              f"{fmean(run['loss'] for run in runs):.4f} {to[0]:>4.0f}|{to[1]:>4.0f}  "
              f"{versus(runs, goals[0])} {versus(runs, goals[1])} "
              f"{fmean(run['accuracy'] for run in runs):.1%} "
              f"{''.join('_.-=+*#@'[int(7.9 * x)] for x in curve)} {times.get(row, math.nan):.2f} "
              + " ".join(f"{n:,}" for n in runs[0]["sizes"]) + f" {picked[row][0]}" * (row.name == TUNED))
    print("\nValidation loss by rate\n")
    for (name, *size), grid in grids.items():
        print(f"{name:21}{size[0]:>4} {size[1]:>5}   " + "  ".join(
            f"{rate:.2g}: {loss:.3f}" for rate, loss in sorted(grid.items())))

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("gpt", "vit"), default="gpt", help="text or images")
    parser.add_argument("--full", action="store_true", help="all methods, ranks, steps; five seeds")
    parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", metavar="FILE", help="write all that was measured as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves, .png or .pdf (matplotlib)")
    options, started = parser.parse_args(), time.monotonic()
    if options.plot:
        try:
            from matplotlib import pyplot
        except ImportError:
            sys.exit("--plot needs matplotlib: pip install matplotlib (--out FILE needs nothing)")
    size, ranks, steps, seeds, tuning_seeds = (64, 4, 2000), (8, 4, 2), 100, (1,), (101,)
    names = ["LoRA", TUNED, "AIRA", "full fine-tuning"]
    if options.full:
        seeds, tuning_seeds, ranks = (1, 2, 3, 4, 5), (101, 102), (16, 8, 4)
        size = (96, 4, 10_000) if DEVICE == "cpu" else (512, 8, 20_000)
        names = names[:2] + [name for name in METHODS if not name.startswith("LoRA")
                             and (hasattr(torch.optim, "Muon") or not name.endswith("Muon"))]
    if options.tiny:
        size, ranks, steps = (32, 1, 20), (4, 2), 10
    task = options.model, *size
    print("torch {}, {}: {} of width {}, {} layers, {:,} steps".format(torch.__version__, DEVICE, *task),
          prepare(*task)[1], flush=True)
    rows = main_rows = [Row(name, ranks[0], steps) for name in names]
    if options.full:
        rows = rows + [Row(name, r, steps) for r in ranks[1:] for name in ("LoRA", TUNED, "AIRA")]
        rows += [Row(name, ranks[0], 4 * steps) for name in ("LoRA", TUNED, "PiSSA", "AIRA")]
    shares = {share: Row("AIRA", ranks[0], round(share * steps)) for share in (0.5, 0.7, 1)}
    workers = os.cpu_count() if DEVICE == "cpu" else 4
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        picked, grids = tune(task, rows, tuning_seeds, pool)
        if options.full:
            picked.update({row: picked[shares[1]] for row in shares.values()})
        jobs = {row: [Job(method, *row[1:], rate, seed, 2) for seed in seeds]
                for row, (method, rate) in picked.items()}
        runs = run_all(task, list(dict.fromkeys(sum(jobs.values(), []))), pool)
    results = {row: [runs[job] for job in some] for row, some in jobs.items()}
    times = step_times(task, {row: picked[row] for row in main_rows})
    report({row: results[row] for row in rows}, picked, times, grids)
    if options.full:
        for goal in main_rows[:2]:
            ends = zip(results[goal], *(results[row] for row in shares.values()))
            share = median(crossing(list(shares), [run["loss"] for run in end], lora["loss"])
                           for lora, *end in ends)
            print(f"\nAIRA with {share:.2f} of the steps, its schedule as short, ends where {goal.name} "
                  "ends with all (median; runs at .5, .7, 1)", end="")
    if options.out:
        runs = [{**job._asdict(), **result} for job, result in runs.items()]
        Path(options.out).write_text(json.dumps({"known": prepare(*task)[1], "runs": runs}))
    if options.plot:
        for row in main_rows:
            pyplot.plot(np.mean([run["curve"] for run in results[row]], 0), label=row.name)
        pyplot.xlabel(f"step / {steps // POINTS}"), pyplot.ylabel("test loss"), pyplot.legend()
        pyplot.savefig(options.plot)
    print(f"\n{time.monotonic() - started:.0f} s in all")

if __name__ == "__main__":
    main()
