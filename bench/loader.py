"""Random windows of token shards: this repository's loader against the usual loop."""

import dataclasses
import itertools
import os
import tempfile
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import shards
from bench.common import REPO, Side, alternate, report, speedup, table
from runtime.command_line import UserError
from runtime.world import World
from shard_files import open_shards

BASELINE = "baseline loop"


@dataclass(frozen=True)
class LoaderPart:
    """Time batches of windows in random order, and what it takes to know the order.

    The baseline loop has an index array and memory maps, and reads row by row. Both return x and y
    as int64, on one CPU thread.
    """

    B: int = 64  # windows in a batch
    T: int = 1024  # tokens in a window
    # in the index: 10B tokens in 100 sparse files, which take no room on the disk
    windows: int = 9_770_000
    # read for the speed: random ones in 5 files just written, so they are in the page cache
    tokens: int = 50_000_000
    batches: int = 50  # per call
    rounds: int = 21  # calls of each side

    def measure(self) -> dict:
        """Return the cost of the index and the speed of batches."""
        if self.tokens < 10 * self.B * (self.T + 1) or self.windows < 100:
            raise UserError(
                f"{self.tokens} tokens or {self.windows} windows are too few for B x T = {self.B} "
                f"x {self.T}; hint: --tokens {20 * self.B * self.T} --windows 1000"
            )
        torch.set_num_threads(1)  # as torchrun does; for this little work a second one only waits
        with tempfile.TemporaryDirectory() as folder:
            seconds, sizes = self.measure_index(os.path.join(folder, "sparse"))
            sides = self.measure_batches(os.path.join(folder, "random"))
        rows = [[name, f"{seconds[name]:.3f}", f"{sizes[name] / 1e6:.3f}"] for name in sides]
        table([f"index of {self.windows:,} windows", "seconds", "MB"], rows)
        speeds = report(f"batches of {self.B} x {self.T} tokens", "tok/s", sides)
        return {
            "ratio": speedup(sides[REPO], sides[BASELINE]),
            "memory_ratio": sizes[BASELINE] / sizes[REPO],
            "index_s": seconds,
            "index_bytes": sizes,
        } | (speeds | dataclasses.asdict(self))

    def measure_index(self, folder: str) -> tuple[dict[str, float], dict[str, int]]:
        """Return the seconds until each side can read, and the bytes that its order takes."""
        sparse_shards(folder, [self.windows // 100 * self.T + 1] * 100)
        first = np.arange(self.B)
        started = time.perf_counter()
        open_windows(folder, self.T).locate(first)
        seconds = {REPO: time.perf_counter() - started}
        tracemalloc.start()
        windows = open_windows(folder, self.T)
        places = windows.locate(first)
        sizes = {REPO: tracemalloc.get_traced_memory()[0]}
        tracemalloc.stop()
        del windows, places  # they had to live until here
        started = time.perf_counter()
        baseline = BaselineLoader(folder, self.B, self.T)
        seconds[BASELINE] = time.perf_counter() - started
        sizes[BASELINE] = baseline.index.nbytes
        return seconds, sizes

    def measure_batches(self, folder: str) -> dict[str, Side]:
        """Time `batches` batches per call, read from shards of random tokens."""
        os.mkdir(folder)
        for i in range(5):
            tokens = np.random.default_rng(i).integers(0, 50257, self.tokens // 5, dtype=np.uint16)
            np.save(os.path.join(folder, f"random_train_{i:06d}.npy"), tokens)
        world = World(0, 1, torch.device("cpu"))
        loader = shards.Loader(open_windows(folder, self.T), self.B * self.T, self.B, world)
        loader.close()  # no thread reads ahead: read() is called here
        baseline = BaselineLoader(folder, self.B, self.T)
        numbers = itertools.count()

        def read_batches():
            for _ in range(self.batches):
                loader.read(next(numbers))  # dropped before the next one, as in training

        def read_baseline():
            for _ in range(self.batches):
                baseline.get_batch()

        amount = self.batches * self.B * self.T
        sides = {REPO: Side(read_batches, amount), BASELINE: Side(read_baseline, amount)}
        alternate(sides, 2, self.rounds)
        return sides


def open_windows(folder: str, T: int) -> shards.Windows:
    return shards.Windows(open_shards(folder, "train", T), T, "global", 1337)


class BaselineLoader:
    """The predecessor's global shuffle: an array of all (shard, start), rows by memory map."""

    def __init__(self, folder: str, B: int, T: int, seed: int = 1337):
        self.B = B
        self.T = T
        self.maps = [np.load(path, mmap_mode="r") for path in sorted(Path(folder).iterdir())]
        places = []
        for shard, tokens in enumerate(self.maps):
            starts = np.arange((len(tokens) - 1) // T) * T
            places.append(np.stack([np.full_like(starts, shard), starts], axis=1))
        self.index = np.concatenate(places)
        np.random.default_rng(seed).shuffle(self.index)
        self.next = 0

    def get_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x, y (B, T), int64."""
        xs, ys = [], []
        for shard, start in self.index[self.next : self.next + self.B]:
            row = torch.from_numpy(self.maps[shard][start : start + self.T + 1].astype(np.uint16))
            xs.append(row[:-1])
            ys.append(row[1:])
        self.next = (self.next + self.B) % (len(self.index) - self.B)
        return torch.stack(xs).long(), torch.stack(ys).long()


def sparse_shards(folder: str, sizes: list[int]):
    """Write training shards of zeros that take no room on the disk: a header, then a hole."""
    os.mkdir(folder)
    for i, n in enumerate(sizes):
        header = {"descr": "<u2", "fortran_order": False, "shape": (n,)}
        with open(os.path.join(folder, f"sparse_train_{i:06d}.npy"), "wb") as f:
            np.lib.format.write_array_header_1_0(f, header)
            f.truncate(f.tell() + 2 * n)
