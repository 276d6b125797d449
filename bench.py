"""Side-by-side measurements: this project against the usual way of doing the same thing, in one process.

    python bench.py step                                one training step, GPT-2 (124M), B = 4, T = 1024
    python bench.py step --size tiny --steps 20         in seconds
    python bench.py step --B 32 --device cuda
    python bench.py loader                              random windows out of 10B tokens, and their index
    python bench.py save                                a checkpoint of GPT-2 (124M): training held, or waiting for the disk
    python bench.py hellaswag                           packed rows against one item at a time

The two sides take turns (A B A B), so that whatever else the machine does meets both: the ratio travels, the absolute
figures are this machine's at this hour. Each part prints a table, then one line of JSON with `ratio`, above 1 when this
project is the faster one.
"""

import dataclasses
import itertools
import json
import os
import statistics
import tempfile
import time
import tracemalloc
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Callable, Literal

import numpy as np
import torch
import tyro
from torch.nn import functional as F

import checkpoint
import generate
import hellaswag
import optim
import shards
from config import UserError, command_line
from distributed import World, autocast_dtype, compile_error, keep_freed_memory, pick_device
from model import GPT, GPTConfig
from runlog import RunLog, environment

SIZES = {  # n_layer, n_head, n_embd
    "tiny": (2, 2, 64),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


# --------------------------------------------------------------------------------------------------------------------
# step: one training step


@dataclass(frozen=True)
class Step:
    """One training step against transformers.GPT2LMHeadModel: forward, backward, clip, fused AdamW, zero_grad."""

    size: Literal["tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"  # of both models
    B: int = 4  # sequences in the batch
    T: int = 1024  # tokens in a sequence
    vocab_size: int = 50304  # embedding rows of both models
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the matmuls; auto = bfloat16 where the device has it
    steps: int = 10  # timed steps of each side
    warmup: int = 2  # steps of each side before the clock; the first one compiles
    device: str = "auto"  # cuda, mps or cpu; auto takes the first of these that is there
    use_compile: bool = True  # this project's model compiled, as in training; transformers runs as it comes
    use_rope: bool = False  # this project's model with rotary positions; the baseline keeps its table
    use_swiglu: bool = False  # this project's model with the gated MLP; the baseline keeps GELU


def step(args: Step) -> dict:
    """Both models on one random batch, with the same autocast, clipping and optimiser, and without dropout."""
    if wrong := [k for k in ("B", "T", "vocab_size", "steps", "warmup") if getattr(args, k) < 1]:
        raise UserError("; ".join(f"{k} is {getattr(args, k)}, must be at least 1" for k in wrong)
                        + f"; hint: --{wrong[0]} 1")
    device = pick_device(args.device)
    dtype = autocast_dtype(device, args.dtype)
    if device.type == "cpu":
        keep_freed_memory()  # as in training, and to the good of both sides
    if args.use_compile and (why := compile_error(device)):
        raise UserError(f"torch.compile does not work here ({why}); hint: install g++, or --use_compile False")
    shape = dict(zip(("n_layer", "n_head", "n_embd"), SIZES[args.size]), vocab_size=args.vocab_size)
    torch.manual_seed(42)
    ids = torch.randint(args.vocab_size, (args.B, args.T + 1), device=device)
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()  # (B, T) each
    ours = GPT(GPTConfig(args.T, use_rope=args.use_rope, use_swiglu=args.use_swiglu, **shape)).to(device)
    compiled = torch.compile(ours, fullgraph=True, dynamic=False) if args.use_compile else ours
    theirs = transformers_gpt2(args.T, shape).to(device)

    def training_step(model: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> Callable[[], float]:
        optimizer = optim.adamw(model, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)

        def run() -> float:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = forward()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()  # waits for the device, on both sides

        return run

    # transformers shifts the labels itself, which leaves it one target less in each sequence
    ms, losses = take_turns({"ours": training_step(ours, lambda: compiled(x, y)),
                             "transformers": training_step(theirs, lambda: theirs(input_ids=x, labels=x).loss)},
                            args.warmup, args.steps)
    tok_s = {side: 1e3 * args.B * args.T / statistics.median(values) for side, values in ms.items()}
    print(f"\n{'one training step':20}{'tok/s':>10}{'median ms':>12}{'min':>10}{'max':>10}{'last loss':>12}")
    for side, values in ms.items():
        print(f"{side:20}{tok_s[side]:10,.0f}{statistics.median(values):12,.1f}{min(values):10,.1f}{max(values):10,.1f}"
              f"{losses[side]:12.4f}")
    used = dict(device=environment(device, 1)["device"], dtype=str(dtype).removeprefix("torch."))
    return dict(ratio=tok_s["ours"] / tok_s["transformers"], tok_s=tok_s["ours"], baseline_tok_s=tok_s["transformers"],
                ours_ms=ms["ours"], baseline_ms=ms["transformers"], **dataclasses.asdict(args) | used)


def transformers_gpt2(T: int, shape: dict) -> torch.nn.Module:
    """transformers' GPT-2 at its best: no dropout (the default 0.1 makes it several times slower), SDPA, no cache."""
    import transformers

    transformers.logging.set_verbosity_error()  # it warns about its own defaults
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_positions=T, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="sdpa", use_cache=False,
        **shape)).train()


# --------------------------------------------------------------------------------------------------------------------
# loader: windows in random order


@dataclass(frozen=True)
class Loader:
    """Random windows of token shards against the usual way: an index array, memory maps, row by row, torch.stack."""

    B: int = 64  # windows in a batch
    T: int = 1024  # tokens in a window
    windows: int = 9_770_000  # of the index, in 100 shards: 10B tokens; sparse files, which take no room on the disk
    tokens: int = 50_000_000  # read for the speed: random ones in 5 ordinary files, just written, so in the file cache
    batches: int = 50  # of each side in a turn
    rounds: int = 21  # turns of each side


def loader(args: Loader) -> dict:
    """The index: seconds to open, bytes kept. Then batches of x and y, int64 on the CPU, windows in random order."""
    if args.tokens < 10 * args.B * (args.T + 1) or args.windows < 100:
        raise UserError(f"{args.tokens} tokens or {args.windows} windows are too few for B x T = {args.B} x {args.T}; "
                        f"hint: --tokens {20 * args.B * args.T} --windows 1000")
    torch.set_num_threads(1)  # what torchrun sets; for work this small a second thread is only waited for
    with tempfile.TemporaryDirectory() as folder:
        sparse, real = os.path.join(folder, "sparse"), os.path.join(folder, "real")
        sparse_shards(sparse, [args.windows // 100 * args.T + 1] * 100)
        index = index_cost(sparse, args)
        os.mkdir(real)
        for i in range(5):
            tokens = np.random.default_rng(i).integers(0, 50257, args.tokens // 5, dtype=np.uint16)
            np.save(os.path.join(real, f"real_train_{i:06d}.npy"), tokens)
        windows, usual = open_windows(real, args.T), UsualLoader(real, args.B, args.T)
        ahead = shards.Loader(windows, args.B * args.T, args.B, 0, 1, torch.device("cpu"))
        direct = shards.Loader(windows, args.B * args.T, args.B, 0, 1, torch.device("cpu"))
        direct.close()  # without its thread: read() is called here
        rows, turn = np.zeros((args.B, args.T + 1), np.uint16), range(args.batches)
        numbers, blocks = itertools.count(), itertools.count()

        def repeat(get_batch: Callable):
            for _ in turn:  # no list of the results: a batch is dropped before the next one, as in training
                get_batch()

        def prefetched():  # ends when the batch read ahead is there, so that each turn pays for as many as it takes
            repeat(ahead.next)
            ahead.ahead.result()

        def windows_only():  # uint16 windows in a buffer, the order computed for as many at a time as Loader does
            places = windows.locate(next(blocks) * shards.AHEAD + np.arange(shards.AHEAD))
            for at in range(0, args.batches * args.B, args.B):
                at %= shards.AHEAD // args.B * args.B
                windows.fetch(places[:, at: at + args.B], rows)

        sides = {"ours": lambda: repeat(lambda: direct.read(next(numbers))),
                 "usual way": lambda: repeat(usual.get_batch),
                 "ours, by the reading thread": prefetched, "ours, uint16 windows only": windows_only}
        ms, _ = take_turns(sides, 2, args.rounds)
        ahead.close()
    amount = args.batches * args.B * args.T
    tok_s = {side: 1e3 * amount / statistics.median(values) for side, values in ms.items()}
    print(f"\n{f'index of {args.windows:,} windows':30}{'seconds':>12}{'MB':>12}")
    for side, (seconds, size) in index.items():
        print(f"{side:30}{seconds:12.3f}{size / 1e6:12.3f}")
    print(f"\n{f'batches of {args.B} x {args.T} tokens':30}{'M tok/s':>12}{'slowest':>12}{'fastest':>12}")
    for side, values in ms.items():
        speeds = tok_s[side], 1e3 * amount / max(values), 1e3 * amount / min(values)
        print(f"{side:30}" + "".join(f"{speed / 1e6:12,.0f}" for speed in speeds))
    ratios = [theirs / ours for ours, theirs in zip(ms["ours"], ms["usual way"])]
    return dict(ratio=tok_s["ours"] / tok_s["usual way"], ratio_quartiles=statistics.quantiles(ratios, n=4),
                memory_ratio=index["usual way"][1] / index["ours"][1], tok_s=tok_s["ours"],
                baseline_tok_s=tok_s["usual way"], thread_tok_s=tok_s["ours, by the reading thread"],
                windows_tok_s=tok_s["ours, uint16 windows only"], index_s=index["ours"][0],
                baseline_index_s=index["usual way"][0], index_bytes=index["ours"][1],
                baseline_index_bytes=index["usual way"][1], ours_ms=ms["ours"], baseline_ms=ms["usual way"],
                **dataclasses.asdict(args))


def open_windows(folder: str, T: int) -> shards.Windows:
    return shards.Windows(shards.open_shards(folder, "train", T), T, "global", 1337)


def index_cost(folder: str, args: Loader) -> dict[str, tuple[float, int]]:
    """Of each side: seconds until the first batch's windows are known, and bytes kept to know all the others."""
    first, costs = np.arange(args.B), {}
    t0 = time.perf_counter()
    open_windows(folder, args.T).locate(first)
    seconds = time.perf_counter() - t0
    tracemalloc.start()
    kept = open_windows(folder, args.T)
    kept = kept, kept.locate(first)
    costs["ours"] = seconds, tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    t0 = time.perf_counter()
    usual = UsualLoader(folder, args.B, args.T)
    costs["usual way"] = time.perf_counter() - t0, usual.index.nbytes
    return costs


class UsualLoader:
    """The predecessor's loader with global shuffle: an array of all (shard, start), each row through a memory map."""

    def __init__(self, folder: str, B: int, T: int, seed: int = 1337):
        self.maps = [np.load(os.path.join(folder, f), mmap_mode="r") for f in sorted(os.listdir(folder))]
        starts = [np.arange((len(m) - 1) // T) * T for m in self.maps]
        self.index = np.concatenate([np.stack([np.full_like(s, i), s], axis=1) for i, s in enumerate(starts)])
        np.random.default_rng(seed).shuffle(self.index)
        self.B, self.T, self.at = B, T, 0

    def get_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        xs, ys = [], []
        for shard, start in self.index[self.at: self.at + self.B]:
            row = torch.from_numpy(self.maps[shard][start: start + self.T + 1].astype(np.uint16))
            xs.append(row[:-1])
            ys.append(row[1:])
        self.at = (self.at + self.B) % (len(self.index) - self.B)
        return torch.stack(xs).long(), torch.stack(ys).long()


def sparse_shards(folder: str, sizes: list[int]):
    """Training shards of zeros that take no room on the disk: a header, then a hole."""
    os.mkdir(folder)
    for i, n in enumerate(sizes):
        with open(os.path.join(folder, f"sparse_train_{i:06d}.npy"), "wb") as f:
            np.lib.format.write_array_header_1_0(f, dict(descr="<u2", fortran_order=False, shape=(n,)))
            f.truncate(f.tell() + 2 * n)


# --------------------------------------------------------------------------------------------------------------------
# save: a checkpoint


@dataclass(frozen=True)
class Save:
    """A checkpoint: how long checkpoint.Saver holds the training loop, against writing it while the loop waits."""

    size: Literal["tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"
    rounds: int = 5  # saves of each kind
    folder: str = ""  # directory in which the checkpoints are written, on the disk of interest; a temporary one by default
    device: str = "auto"  # cuda, mps or cpu; auto takes the first of these that is there


def save(args: Save) -> dict:
    """Both write and verify the same files; the second save beside training begins when the first one's thread is done."""
    device = pick_device(args.device)
    n_layer, n_head, n_embd = SIZES[args.size]
    model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)).to(device)
    optimizer = optim.adamw(model, 0.0, (0.9, 0.95), 0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # makes the moments
    optimizer.zero_grad(set_to_none=True)
    held, waited = [], []
    with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
        saver = checkpoint.Saver(Path(folder), 1, 0, model, optimizer, RunLog(), lambda message: None)
        saver.reserve()
        for step in range(0, 2 * args.rounds, 2):
            saver.wait()
            t0 = time.perf_counter()
            saver.save(step, {})
            held.append(round(1e3 * (time.perf_counter() - t0), 3))
            if not saver.wait():
                raise UserError(f"cannot write to {folder}; hint: --folder")
            t0 = time.perf_counter()
            path = checkpoint.save(Path(folder), step + 1, model, optimizer, {})
            waited.append(round(1e3 * (time.perf_counter() - t0), 3))
            size = sum(f.stat().st_size for f in path.iterdir())
            checkpoint.prune(Path(folder), step + 1, 1, None)
        saver.close()
    print(f"{'checkpoint of ' + format(size / 1e9, '.2f') + ' GB':30}{'ms':>12}{'fastest':>12}{'slowest':>12}")
    for side, ms in (("training held", held), ("waiting for the disk", waited)):
        print(f"{side:30}{statistics.median(ms):12,.0f}{min(ms):12,.0f}{max(ms):12,.0f}")
    return dict(ratio=statistics.median(waited) / statistics.median(held), save_ms=statistics.median(held),
                synchronous_ms=statistics.median(waited), ours_ms=held, baseline_ms=waited, bytes=size,
                **dataclasses.asdict(args) | dict(device=environment(device, 1)["device"]))


# --------------------------------------------------------------------------------------------------------------------
# hellaswag: an evaluation


@dataclass(frozen=True)
class Evaluation:
    """HellaSwag, gpt2 protocol: packed rows against one item at a time, four padded rows, all logits."""

    size: Literal["tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"  # of the model when none is given
    model: str = ""  # run directory, checkpoint, or Hugging Face name or folder; random weights unless given
    data: str = str(hellaswag.DATA)  # jsonl or jsonl.gz
    items: int = 100  # items in each turn
    rounds: int = 3  # turns of each side, each with items of its own
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the matmuls; auto = bfloat16 where the device has it
    device: str = "auto"  # cuda, mps or cpu; auto takes the first of these that is there


def evaluation(args: Evaluation) -> dict:
    """Both score the same items with the same weights; where they choose differently is counted."""
    device = pick_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()  # for both sides
    if not Path(args.data).exists():
        raise UserError(f"no such file: {args.data}; hint: --data FILE (python hellaswag.py fetches it)")
    torch.manual_seed(1)
    n_layer, n_head, n_embd = SIZES[args.size]
    model = generate.load(args.model) if args.model else GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    model, dtype = model.to(device), autocast_dtype(device, args.dtype)
    autocast = lambda: torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    chosen = hellaswag.load(Path(args.data), "gpt2", args.items * args.rounds)
    texts = [chosen.tokens[e - n: e].tolist() for n, e in zip(chosen.lengths.sum(1), chosen.lengths.sum(1).cumsum())]
    ms, losses = {"ours": [], "usual way": []}, {"ours": [], "usual way": []}
    world = World(0, 1, device)
    for turn in range(-1, args.rounds):  # the first turn is the warm-up
        part = slice(max(turn, 0) * args.items, (max(turn, 0) + 1) * args.items)
        paths = slice(4 * part.start, 4 * part.stop)
        mine = chosen._replace(tokens=np.concatenate(texts[paths]).astype(np.uint16), lengths=chosen.lengths[paths],
                               divisors=chosen.divisors[paths], labels=chosen.labels[part])
        ours = hellaswag.HellaSwag(mine, model, world, autocast, compiled=True)
        usual = lambda: np.array([usual_item(model, texts[4 * i: 4 * i + 4], chosen.lengths[4 * i: 4 * i + 4, 0], autocast)
                                  for i in range(part.start, part.stop)])
        for side, run in (("ours", ours.losses), ("usual way", usual)):
            t0 = time.perf_counter()
            found = run()
            if turn >= 0:
                ms[side].append(round(1e3 * (time.perf_counter() - t0), 3))
                losses[side].append(found)
    a, b = (np.concatenate(losses[side]) for side in losses)
    differ = np.sort(a, 1)[:, 1] - np.sort(a, 1)[:, 0] > 1e-5  # of those that are no draw
    differ &= a.argmin(1) != b.argmin(1)
    speed = {side: 1e3 * args.items / statistics.median(values) for side, values in ms.items()}
    print(f"\n{'HellaSwag':30}{'items/s':>12}{'slowest':>12}{'fastest':>12}")
    for side, values in ms.items():
        rates = speed[side], 1e3 * args.items / max(values), 1e3 * args.items / min(values)
        print(f"{side:30}" + "".join(f"{rate:12,.1f}" for rate in rates))
    print(f"other choices on {differ.sum()} of {len(a)} items; largest difference of an ending's loss {abs(a - b).max():.1e}")
    return dict(ratio=speed["ours"] / speed["usual way"], ratios=[u / o for o, u in zip(ms["ours"], ms["usual way"])],
                items_s=speed["ours"], baseline_items_s=speed["usual way"], other_choices=int(differ.sum()),
                largest_difference=abs(a - b).max().item(), ours_ms=ms["ours"], baseline_ms=ms["usual way"],
                **dataclasses.asdict(args) | dict(device=environment(device, 1)["device"],
                                                  dtype=str(dtype).removeprefix("torch.")))


@torch.no_grad()
def usual_item(model, texts: list[list[int]], contexts: np.ndarray, autocast) -> list[float]:
    """Losses of an item's four endings as build-nanogpt and its followers get them: four padded rows, all logits."""
    T = max(map(len, texts))
    ids, scored = torch.zeros(4, T, dtype=torch.long), torch.zeros(4, T)
    for row, (text, n) in enumerate(zip(texts, contexts)):
        ids[row, : len(text)] = torch.tensor(text)
        scored[row, n: len(text)] = 1
    ids, scored = ids.to(next(model.parameters()).device), scored.to(next(model.parameters()).device)
    with autocast():
        logits = model(ids)
    nats = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(4, -1)
    return (nats * scored[:, 1:]).sum(1).tolist()


# --------------------------------------------------------------------------------------------------------------------
# what all parts share


def take_turns(sides: dict[str, Callable], warmup: int, rounds: int) -> tuple[dict[str, list[float]], dict]:
    """Milliseconds of each side's calls, A B A B, after warm-up, and what each returned last.

    A call must not return before the device has done its work.
    """
    for side, run in sides.items():
        t0 = time.perf_counter()
        for _ in range(warmup):
            run()
        print(f"warm-up | {side} | {time.perf_counter() - t0:.1f} s", flush=True)
    ms, last = {side: [] for side in sides}, {}
    for _ in range(rounds):
        for side, run in sides.items():
            t0 = time.perf_counter()
            last[side] = run()
            ms[side].append(round(1e3 * (time.perf_counter() - t0), 3))
    return ms, last


PARTS = {"step": (Step, step), "loader": (Loader, loader), "save": (Save, save), "hellaswag": (Evaluation, evaluation)}


def main():
    settings = {name: kind for name, (kind, _) in PARTS.items()}
    args = tyro.extras.subcommand_cli_from_dict(settings, description=__doc__.split("\n")[0], use_underscores=True,
                                                config=(tyro.conf.FlagConversionOff,))
    part, run = next((name, run) for name, (kind, run) in PARTS.items() if kind is type(args))
    print(json.dumps(dict(part=part, **run(args), torch=torch.__version__, transformers=version("transformers"),
                          threads=torch.get_num_threads())))


if __name__ == "__main__":
    command_line(main)
