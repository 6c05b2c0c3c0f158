# SPDX-License-Identifier: MIT
"""Fine-tune a small pretrained transformer with LoRA, with AIRA and in full, and print who wins:

    python train_toy.py                 # four methods, one seed; no downloads
    python train_toy.py --full          # all baselines, AIRA without each idea, sizes, five seeds
    python train_toy.py --model vit     # images instead of text; goes with every other option

gpt: a byte-level GPT learns Python's standard library, then moves to C++, the headers in torch.
vit: a ViT learns to tell 64 glyphs of straight strokes apart, then 32 of curved ones, in negative.
Files (or images) are training, validation or test.  All methods get the same data in one order,
AdamW (one row: Muon), clipping at norm 1, 10 % warm-up and a cosine to 10 %; rates are chosen on
validation, on seeds of their own, from a grid that grows until its best lies inside.
"""
import argparse, copy, functools, importlib.util, json, math, random, sys, sysconfig, time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean, median
import numpy as np, torch, torch.nn as nn, torch.nn.functional as F
from aira import aira_state_dict, apply_aira, outlier_weighted_svd
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONTEXT, POINTS = 64, 10  # bytes a window, points of a curve
LAYERS = "qkv", "proj", "up", "down"  # what is adapted: all but the embedding and the head

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
        self.blocks = nn.Sequential(*(Block(width, self.causal) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256 if self.causal else 64)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                last = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if last else 0.02)

    def forward(self, x):
        h = self.norm(self.blocks(self.embedding(x) + self.places.weight[:x.shape[1]]))
        return self.head(h if self.causal else h.mean(1))

# ---- 2. Data: a part is a pair of tensors (x, y), a row an example -------------------------------
def texts(folder, pattern):
    """The files as windows of bytes: training, validation (512) and test (1,024) parts.  Much code
    is copied or generated: large files, some folders and repeated longer lines are left out."""
    skip = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data",
            "pybind11", "ops", "generated"}
    paths = [path for path in sorted(Path(folder).rglob(pattern)) if path.stat().st_size < 200_000
             and not skip & set(path.relative_to(folder).parts)]
    random.Random(0).shuffle(paths)
    seen, parts, n = set(), [bytearray(), bytearray(), bytearray()], CONTEXT + 1
    for i, path in enumerate(paths):
        for line in path.read_bytes().splitlines(keepends=True):
            if len(line) < 20 or line not in seen:
                parts[{0: 1, 1: 2}.get(i % 8, 0)] += line
                seen.add(line)
    if min(map(len, parts)) < 200_000:
        sys.exit(f"too little text in {len(paths)} files {pattern} of {folder}: use a Python with "
                 "its library's sources and a torch wheel with its headers")
    for i, most in enumerate((None, 512, 1024)):
        rows = torch.frombuffer(parts[i], dtype=torch.uint8).long().unfold(0, n, n)
        if most:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
            rows = rows[order[:most]]
        parts[i] = rows[:, :-1].to(DEVICE), rows[:, 1:].to(DEVICE)
    return parts

def glyphs(classes, sizes, curved, seed):
    """Noisy 32 x 32 images of glyphs with four strokes, as patches (n, 16, 64), each a little bent
    and shifted; curved ones in negative.  Parts of these sizes, [(patches, labels)]."""
    rng, n, grid = np.random.default_rng(seed), sum(sizes), np.linspace(-1, 1, 32, dtype="f")
    ends = rng.uniform(-0.7, 0.7, (2, classes, 4, 1, 2))
    bend = rng.uniform(-0.6, 0.6, (classes, 4, 1, 2)) * curved
    t, label = np.linspace(0, 1, 24)[:, None], rng.integers(classes, size=n)
    strokes = ((1 - t) * ends[0] + t * ends[1] + 4 * t * (1 - t) * bend).reshape(classes, 96, 2)
    warp, shift = np.eye(2) + rng.normal(0, 0.1, (n, 2, 2)), rng.normal(0, 0.12, (n, 1, 2))
    points = (strokes[label] @ warp + shift).astype(np.float32)
    x, y = (np.exp(-((points[:, :, [i]] - grid) / 0.075) ** 2) for i in (0, 1))
    ink = rng.uniform(0.5, 1.5, (n, 1, 1)) * (1 - 2 * curved)
    images = np.minimum(y.swapaxes(1, 2) @ x, 1) * ink + rng.normal(0, 0.2, (n, 32, 32))
    patches = images.astype(np.float32).reshape(n, 4, 8, 4, 8).swapaxes(2, 3).reshape(n, 16, 64)
    return list(zip(*(torch.tensor(t).to(DEVICE).split(sizes) for t in (patches, label))))

# ---- 3. Training ---------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model, part):
    """Mean loss of each window or image (n,)."""
    answers = ((model(x).flatten(0, -2), y) for x, y in zip(*(t.split(32) for t in part)))
    each = [F.cross_entropy(z, y.flatten(), reduction="none").view(len(y), -1) for z, y in answers]
    return torch.cat(each).mean(1).nan_to_num(99, 99).cpu()  # diverged: 99 nats

def train(model, part, rate, steps, seed, watch, points=1, muon=False, pretraining=False):
    """Train what requires a gradient -> [evaluate(model, watch)] at so many points, the last one at
    the end (before that, the first quarter of `watch` must do), and the seconds of a step."""
    groups = {"matrices": [], "head": [], "rest": []}  # Muon's, the ViT's new head, all else
    for name, p in model.named_parameters():
        kind = ("matrices" if muon and name.startswith("blocks") and p.dim() == 2 else "head"
                if name.startswith("head") and not model.causal and not pretraining else "rest")
        groups[kind] += [p] * p.requires_grad
    tools = [torch.optim.AdamW([{"params": groups["rest"], "lr": rate},  # the head's is not tuned
                                {"params": groups["head"], "lr": 0.008}], weight_decay=0)]
    if muon:  # its updates are scaled to AdamW's size, so one rate serves both
        tools.append(torch.optim.Muon(groups["matrices"], rate, weight_decay=0,
                                      adjust_lr_fn="match_rms_adamw"))
    decay = (lambda u: (1 - u) ** 2) if pretraining else lambda u: .55 + .45 * math.cos(math.pi * u)
    tools += [torch.optim.lr_scheduler.LambdaLR(
        one, lambda i: min(1, (i + 1) / (0.1 * steps)) * decay(i / steps)) for one in tools]
    generator, curve, clock = torch.Generator().manual_seed(seed), [], []  # seeds the data's order
    for step in range(1, steps + 1):
        rows = torch.randint(len(part[0]), (16 if model.causal else 32,), generator=generator)
        (x, y), start = (t[rows.to(DEVICE)] for t in part), time.perf_counter()
        model.zero_grad()
        F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        nn.utils.clip_grad_norm_(sum(groups.values(), []), 1.0).item()  # waits for a GPU
        for one in tools:  # the optimizers, then their schedules
            one.step()
        clock.append(time.perf_counter() - start)
        if step * points // steps > (step - 1) * points // steps:
            n = len(watch[0]) // (1 if step == steps else 4)
            curve.append(evaluate(model, [t[:n] for t in watch]))
    return curve, median(clock)

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
    start, rate = time.monotonic(), 0.003 * min(1, 96 / model.head.in_features)
    old, _, test = (texts(sysconfig.get_paths()["stdlib"], "*.py") if model.causal else
                    glyphs(64, (25_600, 512, 2048), curved=False, seed=0))
    curve, _ = train(model, old, rate, steps, 0, test, points=3, pretraining=True)
    known = (f"pretrained in {time.monotonic() - start:.0f} s: test loss {curve[2].mean():.3f}, "
             f"{1 - curve[2][:len(curve[1])].mean() / curve[1].mean():.1%} from the last third;\n")
    if model.causal:
        text = torch.cat([new[0][0], new[0][1][:, -1:]], 1).byte().cpu().numpy().tobytes()
        copied = fmean(bytes(row) in text for row in new[2][0].byte().cpu().numpy())
        return known + (f"tables of bytes, pairs, triples {count_tables(old[0], test[0])}; "
                        f"{copied:.1%} of the new test windows stand in the new training text")
    x, z = (F.pad(part[0].flatten(1), (0, 1), value=1.0) for part in (old, test))
    linear = z @ torch.linalg.lstsq(x.T @ x, x.T @ F.one_hot(old[1]).float()).solution
    right = [(answer.argmax(1) == test[1]).float().mean() for answer in (model(test[0]), linear)]
    return known + "accuracy {:.1%}, linear in pixels {:.1%}, chance {:.1%}".format(*right, 1 / 64)

@functools.lru_cache(1)
def prepare(kind, width, layers, steps):
    """The base (pretrained unless cached), what it knows, and the new task's three parts."""
    torch.manual_seed(0)
    model, new_head = Transformer(kind, width, layers).to(DEVICE), nn.Linear(width, 32).to(DEVICE)
    parts = (texts(Path(torch.__file__).parent / "include", "*.h") if model.causal else
             glyphs(32, (3200, 512, 1024), curved=True, seed=1))
    path = Path(__file__).parent / f".cache/{kind}-{width}-{layers}-{steps}-{torch.__version__}.pt"
    if not path.exists():
        print(f"pretraining, {steps:,} steps, once ...", file=sys.stderr, flush=True)
        path.parent.mkdir(exist_ok=True)
        torch.save({"known": pretrain(model, steps, parts), "model": model.state_dict()}, path)
    saved = torch.load(path, map_location=DEVICE, weights_only=True)
    model.load_state_dict(saved["model"])
    if not model.causal:
        model.head = new_head  # for the new classes; every method trains it
    return model, saved["known"], parts

# ---- 5. Methods: functions that put adapters into a model ----------------------------------------
def lora(model, part, rank, head, scale=1, pissa=False):
    """The baseline, y = W x + scale B A x, scale = alpha / rank; or PiSSA, arXiv 2404.02948."""
    model.requires_grad_(False).head.requires_grad_(bool(head))
    for layer in [getattr(block, name) for block in model.blocks for name in LAYERS]:
        W, B = layer.weight, layer.weight.new_zeros(layer.out_features, rank)
        A = nn.init.kaiming_uniform_(W.new_empty(rank, layer.in_features), a=math.sqrt(5))
        if pissa:  # the plain SVD of the weight, which keeps the rest
            B, A = outlier_weighted_svd(W, torch.ones_like(W[0]), rank)
            W.data -= B @ A
        layer.lora_A, layer.lora_B = nn.Parameter(A.contiguous()), nn.Parameter(B.contiguous())
        layer.register_forward_hook(lambda layer, inputs, y: y + scale * F.linear(
            F.linear(inputs[0], layer.lora_A), layer.lora_B))

def aira(model, part, rank, head, **options):
    some = part[0][torch.randperm(len(part[0]))[:256]].split(16)
    apply_aira(model, lambda: [model(x) for x in some], rank=rank, targets=LAYERS, also_train=head,
               **options)

TUNED, FULL = "LoRA, scale tuned", "full fine-tuning"
METHODS = {  # name: function, its options (of several the best is taken), middle of the first grid
    "LoRA": (lora, [{}], 0.008), TUNED: (lora, [{"scale": s} for s in (2, 8, 16, 32)], 0.004),
    "PiSSA": (lora, [{"pissa": True}], 0.002), "AIRA": (aira, [{}], 0.016),
    "AIRA, random start": (aira, [{"init": "random"}], 0.016),
    "AIRA, equal ranks": (aira, [{"importance": lambda W, rms: sum(W.shape)}], 0.016),
    "AIRA, not amplified": (aira, [{"amplify": 0}], 0.016),
    "AIRA, both from SVD": (aira, [{"init": "svd"}], 0.004),  # these three: the abstract's letter
    "AIRA, OWL's share": (aira, [{"importance": lambda W, rms: (
        (W.abs() * rms) > 5 * (W.abs() * rms).mean()).double().mean()}], 0.016),
    "AIRA, loud amplified": (aira, [{"amplify": -0.25}], 0.016), FULL: (lambda *_: 0, [{}], 0.002)}
METHODS.update({f"{FULL}, Muon": METHODS[FULL]} if hasattr(torch.optim, "Muon") else {})  # 2.9 on

# ---- 6. Runs -------------------------------------------------------------------------------------
Row = namedtuple("Row", "name rank steps")
Job = namedtuple("Job", "name rank steps option rate seed part")  # part: 1 validation, 2 test

def run(task, job):
    """One fine-tuning -> its last loss (by window, too), curve, and sizes less a new head."""
    base, _, parts = prepare(*task)
    model, (apply, options, _) = copy.deepcopy(base), METHODS[job.name]
    torch.manual_seed(job.seed)  # seeds LoRA's random start
    head = () if model.causal else ("head",)
    apply(model, parts[0], job.rank, head, **options[job.option])
    curve, seconds = train(model, parts[0], job.rate, job.steps, job.seed, parts[job.part],
                           POINTS if job.part == 2 else 1, job.name.endswith("Muon"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    stored = aira_state_dict(model) if job.name.startswith("AIRA") else trained
    return {"loss": curve[-1].mean().item(), "windows": curve[-1].tolist(), "seconds": seconds,
            "curve": [losses[:len(curve[0])].mean().item() for losses in curve],
            "sizes": [sum(t.numel() for name, t in some.items() if not name.startswith(
                ("aira.", *head))) for some in (trained, stored)]}

def tune(task, seeds, row):
    """{(option, rate): mean validation loss}, for every option its best rate inside the grid."""
    losses, (_, options, middle) = {}, METHODS[row.name]
    for option in range(len(options)):
        grid, rates = {}, [middle / 2, middle, middle * 2]
        while rates:
            for rate in rates:
                runs = (run(task, Job(*row, option, rate, seed, 1))
                        for seed in seeds[:1 if row.steps > 100 else 2])  # long runs: one
                grid[option, rate] = fmean(one["loss"] for one in runs)
            best = min(grid, key=grid.get)
            rates = [best[1] / 2] * (best == min(grid)) + [best[1] * 2] * (best == max(grid))
        losses.update(sorted(grid.items()))
    return losses

def everywhere(pool, function, items):
    """{item: function(item)}, in as many processes as there are cores; time left on a terminal."""
    results, start = {}, time.monotonic()
    for item, results[item] in zip(items, pool.map(function, items)):
        left = (time.monotonic() - start) * (len(items) / len(results) - 1)
        if sys.stderr.isatty():
            print(f"\r{len(results)} done, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
    return results

# ---- 7. Report -----------------------------------------------------------------------------------
def crossing(places, losses, goal):
    """Where the lowest loss so far comes to the goal, linear between places, or inf."""
    reached = -np.minimum.accumulate(losses)  # interp wants rising values
    return float(np.interp(-goal, reached, places)) if reached[-1] >= -goal else math.inf

def versus(runs, others):
    """Mean difference of the final losses +- its standard error over seeds / over windows."""
    difference = np.array([a["windows"] for a in runs]) - np.array([b["windows"] for b in others])
    errors = (x.std() / math.sqrt(len(x) - 1) if len(x) > 1 else math.nan
              for x in (difference.mean(1), difference.mean(0)))
    return "{:+.3f} +-{:5.3f}/{:5.3f}".format(difference.mean(), *errors)

def report(results, jobs, times, grids):
    """The table, a line for a Row, LoRA first; short schedules are held against whole ones."""
    _, rank, steps = next(iter(results))
    every = [loss for runs in results.values() for run in runs for loss in run["curve"]]
    print(f"""\nto: median step to the final loss of LoRA | tuned LoRA, rank {rank}; +- errors over
seeds / windows; curve; time of a step / LoRA's; numbers trained, stored; rates tried

{"":22} rank steps   rate   loss        to  - LoRA              - {TUNED:17} curve      time""")
    for row, runs in results.items():
        goals = [results[name, rank, max(steps, row.steps)] for name in ("LoRA", TUNED)]
        places = np.linspace(0, row.steps, len(runs[0]["curve"]) + 1)[1:]
        to = [median(crossing(places, a["curve"], b["curve"][-1]) for a, b in zip(runs, goal))
              for goal in goals]
        curve = (np.mean([run["curve"] for run in runs], 0) - min(every)) / np.ptp(every)
        job = jobs[row][0]
        print(f"{row.name:22} {row.rank:>4} {row.steps:>5} {job.rate:>6.2g} "
              f"{fmean(run['loss'] for run in runs):.4f} {to[0]:>4.0f}|{to[1]:>4.0f}  "
              f"{versus(runs, goals[0])} {versus(runs, goals[1])} "
              f"{''.join('_.-=+*#@'[int(7.9 * x)] for x in curve)} {times.get(row, math.nan):.2f}",
              *(f"{n:,}" for n in runs[0]["sizes"]), METHODS[row.name][1][job.option] or "",
              *(f"{k[1]:.2g}:{loss:.3f}" for k, loss in grids[row].items() if k[0] == job.option))

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("gpt", "vit"), default="gpt", help="text or images")
    parser.add_argument("--full", action="store_true", help="all methods, ranks, steps; five seeds")
    parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", metavar="FILE", help="write all that was measured as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves, .png or .pdf (matplotlib)")
    options, started = parser.parse_args(), time.monotonic()
    if options.plot and not importlib.util.find_spec("matplotlib"):
        sys.exit("--plot needs matplotlib: pip install matplotlib (--out FILE needs nothing)")
    size, ranks, steps = ((32, 1, 20), (4, 2), 10) if options.tiny else (
        (64, 3, {"gpt": 2000, "vit": 6000}[options.model]), (8,), 80) if not options.full else (
        (96, 4, 10_000) if DEVICE == "cpu" else (512, 8, 20_000), (16, 8, 4), 100)
    names = list(METHODS) if options.full else ["LoRA", TUNED, "AIRA", FULL]
    task, seeds, shares = (options.model, *size), range(1, 6 if options.full else 2), (0.5, 0.7, 1)
    print(f"torch {torch.__version__}, {DEVICE}: {task},", prepare(*task)[1], flush=True)
    rows, main_rows = ([Row(name, ranks[0], steps) for name in names] for _ in range(2))
    if options.full:
        rows += [Row(name, r, steps) for r in ranks[1:] for name in ("LoRA", TUNED, "AIRA")]
        rows += [Row(name, ranks[0], 4 * steps) for name in ("LoRA", TUNED, "PiSSA", "AIRA")]
        rows += [Row("AIRA", ranks[0], round(share * steps)) for share in shares[:2]]
    long_first = sorted(rows, key=lambda row: -row.steps * len(METHODS[row.name][1]))
    workers, spawn = 4 if DEVICE == "cuda" else None, torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
        grids = everywhere(pool, functools.partial(tune, task, (101, 102)[:len(seeds)]), long_first)
        jobs = {row: [Job(*row, *min(grids[row], key=grids[row].get), seed, 2) for seed in seeds]
                for row in rows}
        runs = everywhere(pool, functools.partial(run, task), sum(jobs.values(), []))
    if options.out:
        tried = [(row, list(grid.items())) for row, grid in grids.items()]
        Path(options.out).write_text(json.dumps({"tried": tried, "runs": list(runs.items())}))
    results = {row: [runs[job] for job in some] for row, some in jobs.items()}
    times = np.median([[run(task, jobs[row][0]._replace(steps=5, part=1))["seconds"]
                        for row in main_rows] for _ in range(9 if options.full else 3)], 0)
    report(results, jobs, dict(zip(main_rows, times / times[0])), grids)
    for goal in main_rows[:2] if options.full else ():
        ends = zip(results[goal], *(results["AIRA", ranks[0], round(s * steps)] for s in shares))
        share = median(crossing(shares, [run["loss"] for run in ours], theirs["loss"])
                       for theirs, *ours in ends)
        print(f"\nAIRA on a schedule of {share:.2f} of the steps ends where {goal.name} ends with "
              "all (median of seeds; from .5, .7 and all; .50 may be less)", end="")
    if options.plot:
        from matplotlib import pyplot
        curves = np.array([np.mean([one["curve"] for one in results[row]], 0) for row in main_rows])
        pyplot.plot(np.linspace(0, steps, curves.shape[1] + 1)[1:], curves.T, label=names)
        pyplot.legend(), pyplot.xlabel("step"), pyplot.ylabel("test loss")
        pyplot.savefig(options.plot)
    print(f"\n{time.monotonic() - started:.0f} s in all")

if __name__ == "__main__":
    main()
