"""The laws of shards.py: the order of windows, what a window is, batches on any number of ranks.

python -m pytest tests/test_shards.py
"""

import collections
import errno
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st

import shards
from runtime.command_line import UserError
from runtime.world import World
from shard_files import Shard, open_shards
from shards import Loader, Windows, order
from tokenizer import EOT

DATA_ORDERS = ["sequential", "documents", "global"]


def world(rank: int = 0, world_size: int = 1) -> World:
    """Return one of world_size processes on the CPU."""
    return World(rank, world_size, torch.device("cpu"))


def open_windows(folder: Path, T: int, data_order="sequential", seed=0, split="train", **more):
    """Open the windows of a split of a directory."""
    return Windows(open_shards(str(folder), split, T), T, data_order, seed, **more)


def counting_shards(folder: Path, sizes: list[int], split: str = "train") -> Path:
    """Write shards whose tokens are 0, 1, 2, ...: a window tells where it is from."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for i, n in enumerate(sizes):
        tokens = np.arange(first, first + n, dtype=np.uint16)
        np.save(folder / f"count_{split}_{i:06d}.npy", tokens)
        first += n
    return folder


def sparse_shards(folder: Path, sizes: list[int]) -> Path:
    """Write training shards of zeros that take no room on the disk: a header, then a hole."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, n in enumerate(sizes):
        path = folder / f"sparse_train_{i:06d}.npy"
        np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=(n,))
    return folder


def read_epoch(windows: Windows, epoch: int) -> np.ndarray:
    """Return all windows of an epoch in the order in which they are read, (n, T + 1)."""
    rows = np.zeros((windows.per_epoch(epoch), windows.T + 1), np.uint16)
    windows.read(windows.epoch_start(epoch) + np.arange(len(rows)), rows)
    return rows


# --------------------------------------------------------------------------------------------------
# order


@given(n=st.integers(1, 5000), seed=st.integers(0, 2**31), epoch=st.integers(0, 1000))
def test_order_is_a_permutation(n, seed, epoch):
    assert np.array_equal(np.bincount(order(seed, epoch, n, np.arange(n)), minlength=n), np.ones(n))


@given(
    n=st.integers(100, 10**9), seed=st.integers(0, 2**31), epoch=st.integers(0, 50), data=st.data()
)
def test_order_is_the_same_asked_one_by_one(n, seed, epoch, data):
    i = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    together = order(seed, epoch, n, i)
    assert together.tolist() == [int(order(seed, epoch, n, np.array([k]))[0]) for k in i]
    assert ((together >= 0) & (together < n)).all()


def test_order_differs_between_epochs_and_seeds():
    i = np.arange(2000)
    base = order(1, 0, 2000, i)
    for other in (order(1, 1, 2000, i), order(2, 0, 2000, i)):
        assert (base == other).mean() < 0.01  # a random pair of permutations agrees in 1 place of n


@pytest.mark.parametrize("n", [500, 4_000, 100_003])
def test_order_mixes(n):
    """Statistics are those of random permutations, within 5 standard errors.

    They are: in which tenth the items of each tenth land, how many neighbours stay neighbours, and
    the correlation of place and item.
    """
    epochs = 40
    places = np.arange(n)
    permutations = np.stack([order(7, epoch, n, places) for epoch in range(epochs)])
    cells = 10 * (places * 10 // n) + permutations * 10 // n  # (epochs, n): 100 cells
    expected = n * epochs / 100
    counts = np.bincount(cells.ravel(), minlength=100)
    assert abs(counts - expected).max() < 5 * np.sqrt(expected)
    neighbours = (abs(np.diff(permutations, axis=1)) == 1).sum()  # expected: 2 in each permutation
    assert neighbours < 2 * epochs + 5 * np.sqrt(2 * epochs)
    correlation = np.mean([np.corrcoef(places, row)[0, 1] for row in permutations])
    assert abs(correlation) < 5 / np.sqrt(n * epochs)


def test_order_of_ten_billion_tokens_reads_every_window_once():
    n = 9_770_000
    blocks = np.split(np.arange(n), range(1 << 16, n, 1 << 16))
    items = np.concatenate([order(1337, 0, n, block) for block in blocks])
    assert len(items) == n
    assert (np.bincount(items, minlength=n) == 1).all()


# --------------------------------------------------------------------------------------------------
# windows


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(40, 400), min_size=1, max_size=5),
    T=st.integers(1, 39),
    data_order=st.sampled_from(["sequential", "global"]),
    epochs=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_each_epoch_reads_every_window_once(tmp_path_factory, sizes, T, data_order, epochs, seed):
    """A window is a run of neighbouring tokens; no token is a target twice; the rest is left out.

    What is left out of a shard is the offset and less than a whole window, so less than 2T tokens.
    """
    folder = counting_shards(tmp_path_factory.mktemp("count"), sizes)
    w = open_windows(folder, T, data_order, seed)
    starts = np.cumsum([0] + sizes[:-1])
    first = 0
    for epoch in range(epochs):
        assert w.epoch_start(epoch) == first
        rows = read_epoch(w, epoch)
        first += len(rows)
        assert (np.diff(rows.astype(int), axis=1) == 1).all()
        seen = collections.Counter(rows[:, :-1].ravel().tolist())
        assert set(seen.values()) == {1}
        for start, size in zip(starts, sizes):
            left_out = size - 1 - sum(start <= token < start + size for token in seen)
            assert 0 <= left_out < 2 * T
            assert left_out - w.offset(epoch) < T


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(60, 500), min_size=1, max_size=4),
    T=st.integers(2, 30),
    seed=st.integers(0, 1000),
)
def test_document_order_reads_every_token_once(tmp_path_factory, sizes, T, seed):
    """The same tokens as on disk, less than 2T per shard aside; documents stay whole."""
    rng = np.random.default_rng(seed)
    folder = counting_shards(tmp_path_factory.mktemp("docs"), sizes)
    on_disk = 0
    for path in sorted(folder.iterdir()):
        tokens = np.load(path)
        tokens[rng.random(len(tokens)) < 0.1] = EOT
        np.save(path, tokens)
        on_disk += (tokens != EOT).sum()
    w = open_windows(folder, T, "documents", seed)
    for epoch in range(2):
        rows = read_epoch(w, epoch).astype(int)
        seen = collections.Counter(t for t in rows[:, :-1].ravel().tolist() if t != EOT)
        assert set(seen.values()) == {1}
        assert on_disk - sum(seen.values()) <= 2 * T * len(sizes)
        inside = (rows[:, 1:] != EOT) & (rows[:, :-1] != EOT)
        steps = np.diff(rows, axis=1)[inside]
        # within a document the order is kept (shards may begin inside one)
        assert len(steps) < 50 or (steps == 1).mean() > 0.95


def test_epochs_follow_each_other_in_a_new_order_and_cut(tmp_path):
    w = open_windows(counting_shards(tmp_path, [5000]), 16, "global", 3)
    first, second = read_epoch(w, 0), read_epoch(w, 1)
    assert w.offset(0) == 0
    assert 0 < w.offset(1) < 16
    assert {int(row[0]) % 16 for row in first} == {0}
    assert {int(row[0]) % 16 for row in second} == {w.offset(1)}
    assert (first[:300, 0] // 16 == second[:300, 0] // 16).mean() < 0.05


def test_epochs_that_are_not_whole_are_counted_in_windows(tmp_path):
    """in_epochs(e) is where epoch e begins; between them it grows in proportion."""
    w = open_windows(counting_shards(tmp_path, [5000, 300]), 16, "global", 3)
    for epoch in range(4):
        assert w.in_epochs(epoch) == w.epoch_start(epoch)
        half = w.epoch_start(epoch) + w.per_epoch(epoch) / 2
        assert w.in_epochs(epoch + 0.5) == int(half)


def test_the_index_of_ten_billion_tokens_costs_nothing(tmp_path):
    """100 shards, 9.77 million windows: measured 0.01 s and 0.05 MB; a busy machine has room."""
    folder = sparse_shards(tmp_path / "s", [97_700 * 1024 + 1] * 100)
    started = time.process_time()
    open_windows(folder, 1024, "global", 1337).locate(np.arange(64))
    assert time.process_time() - started < 1
    tracemalloc.start()
    w = open_windows(folder, 1024, "global", 1337)
    places = w.locate(np.arange(64))
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert w.per_epoch() == 9_770_000
    assert len(set(places[1].tolist())) > 30
    assert size < 1e6


# An epoch through a loader, then through memory maps: by how much the resident memory grows, in MB.
MEMORY_OF_AN_EPOCH = """
import resource, sys
import numpy as np, torch
from runtime.world import World
from shard_files import open_shards
from shards import Loader, Windows

def resident():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * resource.getpagesize() / 1e6

def growth(read_batch):
    for k in range(w.per_epoch() // 64):
        read_batch(k)
        if k == 10:
            before = resident()
    return resident() - before

def read_from_maps(k):
    for row, shard, token in zip(rows, *w.locate(k * 64 + np.arange(64))[1:].tolist()):
        row[:] = maps[shard][token : token + 1025]

w = Windows(open_shards(sys.argv[1], "train", 1024), 1024, "global", 1)
loader = Loader(w, 65536, 64, World(0, 1, torch.device("cpu")))
print(growth(lambda k: loader.take()))
maps = [np.load(shard.path, mmap_mode="r") for shard in w.shards]
rows = np.zeros((64, 1025), np.uint16)
print(growth(read_from_maps))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measured with Linux's /proc")
def test_memory_does_not_grow_over_an_epoch(tmp_path):
    """Of 208 MB of shards, in a process of its own; memory maps, for comparison, do grow."""
    folder = sparse_shards(tmp_path / "s", [26_000_000] * 4)
    command = [sys.executable, "-c", MEMORY_OF_AN_EPOCH, str(folder)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    loader, maps = map(float, done.stdout.split())
    assert loader < 20 < 100 < maps


# --------------------------------------------------------------------------------------------------
# batches


def global_batches(loaders: list[Loader], steps: int) -> list[tuple[int, list]]:
    """Take the global batches of some steps: the digest of each and its rows, rank by rank."""
    batches = []
    for _ in range(steps):
        digest, rows = 0, []
        for _ in range(loaders[0].micro_steps):
            for loader in loaders:
                batch = loader.take()
                assert torch.equal(batch.x[:, 1:], batch.y[:, :-1])
                digest += batch.digest
                rows += batch.x.tolist()
        batches.append((digest % 2**64, rows))
    for loader in loaders:
        loader.close()
    return batches


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(50, 300), min_size=1, max_size=4),
    T=st.integers(1, 20),
    B=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 100),
    data_order=st.sampled_from(DATA_ORDERS),
)
def test_batches_do_not_depend_on_the_number_of_processes(
    tmp_path_factory, sizes, T, B, accumulation, seed, data_order
):
    """The union over 4, 2 or 1 ranks is the same global batch at each step.

    Over the edges of epochs, from the start or resumed in the middle, and in the same place of the
    batch where B is the same. A digest stands for its batch.
    """
    folder = write_shards(tmp_path_factory.mktemp("b"), {"train": sizes}, seed, document=20)
    total_batch = 4 * B * accumulation * T
    steps = min(12, 2 * (sum(sizes) // total_batch + 1) + 1)

    def batches(world_size, B, start=0):
        loaders = []
        for rank in range(world_size):
            w = open_windows(folder, T, data_order, seed)
            loaders.append(
                Loader(w, total_batch, B, world(rank, world_size), start, hash_batches=True)
            )
        return global_batches(loaders, steps - start)

    one, two, four = batches(1, B), batches(2, 2 * B), batches(4, B)
    digests = [digest for digest, _ in one]
    assert digests == [digest for digest, _ in two]
    assert one == four
    assert one[steps // 2 :] == batches(1, B, start=steps // 2)
    assert len(set(digests)) == len({str(rows) for _, rows in one})


def test_totals_are_those_since_the_last_call(tmp_path):
    folder = write_shards(tmp_path, {"train": [2000]})
    loader = Loader(open_windows(folder, 16), 64, 4, world(), hash_batches=True)
    digests = [loader.take().digest for _ in range(3)]
    waited, digest = loader.totals()
    assert waited > 0
    assert digest == sum(digests)
    assert loader.totals() == (0, 0)
    loader.close()


@pytest.mark.parametrize("B,world_size", [(1, 1), (3, 1), (4, 2), (5, 3)])
def test_validation_windows_do_not_depend_on_the_layout(tmp_path, B, world_size):
    w = open_windows(counting_shards(tmp_path, [500, 300], "val"), 16, split="val")
    targets = collections.Counter()
    for rank in range(world_size):
        for x, y in shards.val_batches(w, 16 * 21, B, world(rank, world_size)):
            assert x.shape == y.shape == (B, 16)
            targets.update(y[y >= 0].tolist())
    assert targets == collections.Counter(range(1, 16 * 21 + 1))


@pytest.mark.parametrize("B,world_size", [(4, 2), (1, 4), (2, 5), (16, 2)])
def test_validation_rows_are_shared_out_however_they_divide(tmp_path, B, world_size):
    """Every process gets as many batches, also where the last has no row left in one of them."""
    w = open_windows(write_shards(tmp_path, {"val": [9 * 8 + 1]}), 8, split="val")
    by_rank = [
        list(shards.val_batches(w, 9 * 8, B, world(rank, world_size))) for rank in range(world_size)
    ]
    assert len({len(batches) for batches in by_rank}) == 1
    targets = [row for batches in by_rank for _, y in batches for row in y.tolist()]
    rows = [tuple(row) for row in targets if row[0] >= 0]
    assert len(rows) == len(set(rows)) == 9


# --------------------------------------------------------------------------------------------------
# damage


def test_ids_beyond_the_vocabulary_are_named(tmp_path):
    """take() raises without on_error; with it, it hands the error over and returns None."""
    w = open_windows(write_shards(tmp_path, {"train": [2000]}), 16, vocab_size=512)
    message = "data_train_000000.npy has token id .*beyond vocab_size 512.*hint"
    with pytest.raises(UserError, match=message):
        Loader(w, 64, 4, world()).take()
    errors = []
    assert Loader(w, 64, 4, world(), on_error=errors.append).take() is None
    with pytest.raises(UserError, match=message):
        raise errors[0]


def test_a_shard_that_is_too_short_is_named(tmp_path):
    path = write_shards(tmp_path, {"train": [2000]}) / "data_train_000000.npy"
    w = Windows([Shard(str(path), 128, 5000)], 16)
    with pytest.raises(UserError, match="has become shorter"):
        w.read(np.arange(200), np.zeros((200, 17), np.uint16))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "has 4028 bytes now, not 4128"),
        (lambda path: path.write_bytes(path.read_bytes()), "was replaced or rewritten"),
        (Path.unlink, "cannot be read any more"),
    ],
    ids=["cut", "rewritten", "removed"],
)
def test_a_shard_that_changes_during_a_run_is_named(tmp_path, monkeypatch, change, words):
    """Its size and times are compared with those at the start, at most once per second."""
    path = write_shards(tmp_path, {"train": [2000]}) / "data_train_000000.npy"
    os.utime(path, ns=(0, 0))  # a new file's time may not have passed yet when it changes
    w = open_windows(tmp_path, 16)
    rows = np.zeros((4, 17), np.uint16)
    w.read(np.arange(4), rows)
    change(path)
    monkeypatch.setattr(shards, "CHECK_SECONDS", 0.0)
    with pytest.raises(UserError, match=f"data_train_000000.npy {words}.*hint: restore the shard"):
        w.read(np.arange(4), rows)


@pytest.mark.parametrize(
    "number, hint",
    [
        (errno.EMFILE, "raise `ulimit -n`"),
        (errno.EACCES, "change the permissions of"),
        (errno.EIO, "look after the disk of"),
        (errno.ENOENT, "restore the shard"),
    ],
)
def test_an_error_of_reading_says_what_helps_against_it(tmp_path, monkeypatch, number, hint):
    write_shards(tmp_path, {"train": [2000]})
    w = open_windows(tmp_path, 16)

    def fail(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(UserError, match=f"cannot be read any more .*; hint: {hint}.*to resume"):
        w.read(np.arange(4), np.zeros((4, 17), np.uint16))
