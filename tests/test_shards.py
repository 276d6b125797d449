"""python -m pytest tests/test_shards.py : shards on disk, the order of windows, batches on any number of processes."""

import collections
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import shards
from config import UserError
from conftest import write_shards
from shards import Loader, ShardWriter, Shard, Windows, order

CPU = torch.device("cpu")


def counting_shards(folder, sizes, split="train"):
    """Shards whose tokens are 0, 1, 2, ... over the whole split: every window says where it came from."""
    at = 0
    folder.mkdir(parents=True, exist_ok=True)
    for i, n in enumerate(sizes):
        np.save(folder / f"count_{split}_{i:06d}.npy", np.arange(at, at + n, dtype=np.uint16))
        at += n
    return folder


# ---- order ---------------------------------------------------------------------------------------------------------

@given(n=st.integers(1, 5000), seed=st.integers(0, 2**31), epoch=st.integers(0, 1000))
def test_order_is_a_permutation(n, seed, epoch):
    assert np.array_equal(np.bincount(order(seed, epoch, n, np.arange(n)), minlength=n), np.ones(n))


@given(n=st.integers(100, 10**9), seed=st.integers(0, 2**31), epoch=st.integers(0, 50), data=st.data())
def test_order_is_the_same_asked_one_by_one(n, seed, epoch, data):
    i = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    together = order(seed, epoch, n, i)
    assert together.tolist() == [int(order(seed, epoch, n, np.array([k]))[0]) for k in i]
    assert ((0 <= together) & (together < n)).all()


def test_order_differs_between_epochs_and_seeds():
    i = np.arange(2000)
    base = order(1, 0, 2000, i)
    for other in (order(1, 1, 2000, i), order(2, 0, 2000, i)):
        assert (base == other).mean() < 0.01  # a random pair of permutations agrees in 1 place of n


@pytest.mark.parametrize("n", [500, 4_000, 100_003])
def test_order_mixes(n):
    """Statistics of random permutations, each within 5 standard errors: where items land, neighbours, correlation."""
    epochs = 40
    p = np.stack([order(7, e, n, np.arange(n)) for e in range(epochs)])
    cells = np.zeros((10, 10))
    for row in p:
        np.add.at(cells, (np.arange(n) * 10 // n, row * 10 // n), 1)
    expected = n * epochs / 100
    assert abs(cells - expected).max() < 5 * np.sqrt(expected)
    neighbours = (abs(np.diff(p, axis=1)) == 1).sum()  # expected: 2 in each permutation
    assert neighbours < 2 * epochs + 5 * np.sqrt(2 * epochs)
    correlation = np.mean([np.corrcoef(np.arange(n), row)[0, 1] for row in p])
    assert abs(correlation) < 5 / np.sqrt(n * epochs)


# ---- windows -------------------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(40, 400), min_size=1, max_size=5), T=st.integers(1, 39), kind=st.sampled_from(["sequential", "global"]),
       epochs=st.integers(1, 4), seed=st.integers(0, 1000))
def test_each_epoch_reads_every_window_once(tmp_path_factory, sizes, T, kind, epochs, seed):
    folder = counting_shards(tmp_path_factory.mktemp("count"), sizes)
    w = Windows(shards.open_shards(str(folder), "train", T), T, kind, seed)
    starts = np.cumsum([0] + sizes[:-1])
    at = 0
    for e in range(epochs):
        n = w.per_epoch(e)
        rows = np.zeros((n, T + 1), np.uint16)
        w.read(np.arange(at, at + n), rows)
        at += n
        assert (np.diff(rows.astype(int), axis=1) == 1).all()  # each window is a run of neighbouring tokens
        seen = collections.Counter(rows[:, :-1].ravel().tolist())
        assert set(seen.values()) == {1}
        for start, size in zip(starts, sizes):
            left_out = size - 1 - sum(start <= token < start + size for token in seen)
            assert 0 <= left_out < 2 * T and left_out - w.offset(e) < T  # never a whole window more than the offset


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(60, 500), min_size=1, max_size=4), T=st.integers(2, 30), seed=st.integers(0, 1000))
def test_document_order_reads_every_token_once(tmp_path_factory, sizes, T, seed):
    """Soft fix: the same tokens as on disk, but for less than 2T a shard, documents whole and in another order."""
    rng = np.random.default_rng(seed)
    folder, at = tmp_path_factory.mktemp("docs"), 0
    for i, n in enumerate(sizes):
        tokens = np.arange(at, at + n, dtype=np.uint16)
        tokens[rng.random(n) < 0.1] = shards.EOT
        np.save(folder / f"d_train_{i}.npy", tokens)
        at += n
    w = Windows(shards.open_shards(str(folder), "train", T), T, "documents", seed)
    for e in range(2):
        rows = np.zeros((w.per_epoch(e), T + 1), np.uint16)
        w.read(w.epoch_of(0) + (w.per_epoch(0) if e else 0) + np.arange(len(rows)), rows)
        seen = collections.Counter(t for t in rows[:, :-1].ravel().tolist() if t != shards.EOT)
        assert set(seen.values()) == {1}
        on_disk = sum((np.load(s.path) != shards.EOT).sum() for s in w.shards)
        assert on_disk - sum(seen.values()) <= 2 * T * len(sizes)
        inside = rows.astype(int)
        steps = np.diff(inside, axis=1)[(inside[:, 1:] != shards.EOT) & (inside[:, :-1] != shards.EOT)]
        assert (steps == 1).mean() > 0.95 or len(steps) < 50  # within a document the order is kept (shards may begin inside one)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(50, 300), min_size=1, max_size=4), T=st.integers(1, 20), B=st.integers(1, 4), accumulation=st.integers(1, 3),
       seed=st.integers(0, 100), kind=st.sampled_from(["sequential", "documents", "global"]))
def test_batches_do_not_depend_on_the_number_of_processes(tmp_path_factory, sizes, T, B, accumulation, seed, kind):
    """The union over 4, 2, 1 ranks is the same global batch at each step, over epoch edges, running or seeking."""
    folder = write_shards(tmp_path_factory.mktemp("b"), {"train": sizes}, seed, document=20)
    total = 4 * B * accumulation * T
    epoch_steps = sum(sizes) // total + 1
    steps = min(12, 2 * epoch_steps + 1)

    def batches(world_size, rows, start=0):
        loaders = [Loader(Windows(shards.open_shards(str(folder), "train", T), T, kind, seed), total, rows, r, world_size, CPU, start, True)
                   for r in range(world_size)]
        out = []
        for _ in range(start, steps):
            digest, rows_of_step = 0, []
            for _ in range(loaders[0].micro_steps):
                for loader in loaders:
                    batch, _ = loader.next()
                    assert torch.equal(batch.x[:, 1:], batch.y[:, :-1])
                    digest += batch.digest
                    rows_of_step += batch.x.tolist()
            out.append((digest % 2**64, rows_of_step))
        for loader in loaders:
            loader.close()
        return out

    one = batches(1, B)
    assert [d for d, _ in one] == [d for d, _ in batches(4, B)] == [d for d, _ in batches(2, 2 * B)]
    assert one == batches(4, B)  # also in the same place of the batch
    assert one[steps // 2:] == batches(1, B, start=steps // 2)
    assert len({d for d, _ in one}) == len({str(rows) for _, rows in one})  # a digest stands for its batch


def test_epochs_follow_each_other_in_a_new_order_and_cut(tmp_path):
    w = Windows(shards.open_shards(str(counting_shards(tmp_path, [5000])), "train", 16), 16, "global", 3)
    first, second = (np.zeros((w.per_epoch(e), 17), np.uint16) for e in (0, 1))
    w.read(np.arange(len(first)), first)
    w.read(len(first) + np.arange(len(second)), second)
    assert w.offset(0) == 0 and 0 < w.offset(1) < 16
    assert {int(r[0]) % 16 for r in first} == {0} and {int(r[0]) % 16 for r in second} == {w.offset(1)}


# ---- validation ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("B,world_size", [(1, 1), (3, 1), (4, 2), (5, 3)])
def test_validation_windows_do_not_depend_on_the_layout(tmp_path, B, world_size):
    w = Windows(shards.open_shards(str(counting_shards(tmp_path, [500, 300], "val")), "val", 16), 16)
    got = collections.Counter()
    for rank in range(world_size):
        for x, y in shards.val_batches(w, 16 * 21, B, rank, world_size, CPU):
            assert x.shape == y.shape == (B, 16)
            got.update(y[y >= 0].tolist())
    assert got == collections.Counter(range(1, 16 * 21 + 1))


# ---- files ---------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=12), shard_tokens=st.integers(50, 200))
def test_writer_and_reader_agree(tmp_path_factory, lengths, shard_tokens):
    folder, documents = tmp_path_factory.mktemp("w"), [np.full(n, i, np.uint16) for i, n in enumerate(lengths)]
    writer = ShardWriter(str(folder), "x", "train", shard_tokens)
    for d in documents:
        writer.write(d)
    writer.close()
    files = sorted(folder.iterdir())
    assert np.array_equal(np.concatenate([np.load(f) for f in files]), np.concatenate(documents))
    assert all(len(np.load(f)) == shard_tokens for f in files[:-1])
    assert [r["tokens"] for r in writer.records] == [len(np.load(f)) for f in files]
    assert sum(r["documents"] for r in writer.records) == len(documents)
    assert all(shards.sha256(f) == r["sha256"] for f, r in zip(files, writer.records))


def test_bin_of_llm_c_reads_like_npy(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50257, 1000).astype(np.uint16)
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, 1000
    (tmp_path / "a_train_1.bin").write_bytes(header.tobytes() + tokens.tobytes())
    w = Windows(shards.open_shards(str(tmp_path), "train", 99), 99)
    rows = np.zeros((w.per_epoch(), 100), np.uint16)
    w.read(np.arange(len(rows)), rows)
    assert np.array_equal(rows[:, :-1].ravel(), tokens[: 99 * len(rows)])


def damaged(folder, how):
    """One way for a directory of shards to be wrong; returns what the message must contain."""
    path = folder / "data_train_000001.npy"
    if how == "missing":
        for f in folder.glob("*train*"):
            f.unlink()
        return "no train shards", "prepare.py"
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
        return "data_train_000001.npy", "header says 500 tokens"
    if how == "not a shard":
        path.write_text("hello")
        return "data_train_000001.npy", "hint:"
    if how == "wrong type":
        np.save(path, np.zeros(500, np.int32))
        return "int32", "uint16"
    if how == "both formats":
        (folder / "x_train_1.bin").write_bytes(b"")
        return "mixes .npy and .bin", "hint:"
    if how == "short":
        np.save(path, np.zeros(10, np.uint16))
        return "10 tokens", "T + 1 = 65"
    if how == "manifest":
        (folder / "manifest.json").write_text(json.dumps(dict(tokenizer="gpt2", shards=[dict(file="data_train_000000.npy", split="train", tokens=999)])))
        return "manifest.json says 999, on disk 1000", "no such shard"
    if how == "tokenizer":
        (folder / "manifest.json").write_text(json.dumps(dict(tokenizer="llama", shards=[])))
        return "llama", "gpt2"


@pytest.mark.parametrize("how", ["missing", "cut", "not a shard", "wrong type", "both formats", "short", "manifest", "tokenizer"])
def test_bad_shards_are_named(tmp_path, how):
    folder = write_shards(tmp_path, {"train": [1000, 500]})
    words = damaged(folder, how)
    with pytest.raises(UserError) as e:
        shards.open_shards(str(folder), "train", 64)
    assert all(word in str(e.value) for word in (*words, "hint:")) and "\n" not in str(e.value)


def test_ids_beyond_the_vocabulary_and_shrinking_shards_are_named(tmp_path):
    folder = write_shards(tmp_path, {"train": [2000]})
    loader = Loader(Windows(shards.open_shards(str(folder), "train", 16), 16, vocab_size=512), 64, 4, 0, 1, CPU)
    with pytest.raises(UserError, match="data_train_000000.npy has token id .*beyond vocab_size 512.*hint"):
        loader.next()
    w = Windows([Shard(str(folder / "data_train_000000.npy"), 128, 5000)], 16)
    with pytest.raises(UserError, match="has become shorter"):
        w.read(np.arange(200), np.zeros((200, 17), np.uint16))


# ---- the yardstick -------------------------------------------------------------------------------------------------

def test_bigram_loss_is_that_of_the_formula(tmp_path):
    folder = write_shards(tmp_path, {"train": [3000], "val": [500]}, ids=20)
    train, val = (Windows(shards.open_shards(str(folder), s, 10), 10) for s in ("train", "val"))
    tokens, held_out = np.load(folder / "data_train_000000.npy").astype(int), np.load(folder / "data_val_000000.npy").astype(int)
    pairs, single = collections.Counter(zip(tokens[:-1], tokens[1:])), collections.Counter(tokens)
    n = val.per_epoch() * 10
    losses = [-np.mean([np.log((pairs[a, b] + k * (single[b] + 1) / (3000 + 50257)) / (single[a] + k)) for a, b in zip(held_out[:n], held_out[1: n + 1])])
              for k in (10, 20, 50, 100, 200, 500, 1000)]
    assert shards.bigram_loss(train, val, 10**6) == pytest.approx(min(losses), abs=1e-9)
    assert shards.bigram_loss(train, val, 10**6, largest=100) is None
