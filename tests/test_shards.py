"""python -m pytest tests/test_shards.py : shards on disk, the order of windows, batches on any number of processes."""

import collections
import json
import os
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import ROOT, run, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
import shards
from bench import sparse_shards
from config import UserError
from prepare import ShardWriter
from runlog import bigram_loss
from shards import Loader, Shard, Windows, order

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


def test_order_of_ten_billion_tokens_reads_every_window_once():
    n, seen = 9_770_000, np.zeros(9_770_000, np.int64)
    for at in range(0, n, 1 << 16):
        np.add.at(seen, order(1337, 0, n, np.arange(at, min(at + (1 << 16), n))), 1)
    assert (seen == 1).all()


# ---- windows -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(40, 400), min_size=1, max_size=5),
    T=st.integers(1, 39),
    kind=st.sampled_from(["sequential", "global"]),
    epochs=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
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
        assert (
            np.diff(rows.astype(int), axis=1) == 1
        ).all()  # each window is a run of neighbouring tokens
        seen = collections.Counter(rows[:, :-1].ravel().tolist())
        assert set(seen.values()) == {1}
        for start, size in zip(starts, sizes):
            left_out = size - 1 - sum(start <= token < start + size for token in seen)
            assert (
                0 <= left_out < 2 * T and left_out - w.offset(e) < T
            )  # never a whole window more than the offset


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(60, 500), min_size=1, max_size=4),
    T=st.integers(2, 30),
    seed=st.integers(0, 1000),
)
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
        w.read(w.epoch_start(e) + np.arange(len(rows)), rows)
        seen = collections.Counter(t for t in rows[:, :-1].ravel().tolist() if t != shards.EOT)
        assert set(seen.values()) == {1}
        on_disk = sum((np.load(s.path) != shards.EOT).sum() for s in w.shards)
        assert on_disk - sum(seen.values()) <= 2 * T * len(sizes)
        inside = rows.astype(int)
        steps = np.diff(inside, axis=1)[
            (inside[:, 1:] != shards.EOT) & (inside[:, :-1] != shards.EOT)
        ]
        # within a document the order is kept (shards may begin inside one)
        assert (steps == 1).mean() > 0.95 or len(steps) < 50


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(50, 300), min_size=1, max_size=4),
    T=st.integers(1, 20),
    B=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 100),
    kind=st.sampled_from(["sequential", "documents", "global"]),
)
def test_batches_do_not_depend_on_the_number_of_processes(
    tmp_path_factory, sizes, T, B, accumulation, seed, kind
):
    """The union over 4, 2, 1 ranks is the same global batch at each step, over epoch edges, running or seeking."""
    folder = write_shards(tmp_path_factory.mktemp("b"), {"train": sizes}, seed, document=20)
    total = 4 * B * accumulation * T
    epoch_steps = sum(sizes) // total + 1
    steps = min(12, 2 * epoch_steps + 1)

    def batches(world_size, rows, start=0):
        windows = lambda: Windows(shards.open_shards(str(folder), "train", T), T, kind, seed)
        loaders = [
            Loader(windows(), total, rows, r, world_size, CPU, start, True)
            for r in range(world_size)
        ]
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
    assert one[steps // 2 :] == batches(1, B, start=steps // 2)
    assert len({d for d, _ in one}) == len(
        {str(rows) for _, rows in one}
    )  # a digest stands for its batch


def test_epochs_follow_each_other_in_a_new_order_and_cut(tmp_path):
    w = Windows(
        shards.open_shards(str(counting_shards(tmp_path, [5000])), "train", 16), 16, "global", 3
    )
    first, second = (np.zeros((w.per_epoch(e), 17), np.uint16) for e in (0, 1))
    w.read(np.arange(len(first)), first)
    w.read(len(first) + np.arange(len(second)), second)
    assert w.offset(0) == 0 and 0 < w.offset(1) < 16
    assert {int(r[0]) % 16 for r in first} == {0} and {int(r[0]) % 16 for r in second} == {
        w.offset(1)
    }


def test_a_window_is_the_same_without_preadv(tmp_path, monkeypatch):
    """Windows and old versions of macOS lack it: two calls instead."""
    folder = write_shards(tmp_path, {"train": [2000, 900]})
    out = []
    for there in (shards.PREADV, False):
        monkeypatch.setattr(shards, "PREADV", there)
        w = Windows(shards.open_shards(str(folder), "train", 16), 16, "global", 5)
        out.append(np.zeros((200, 17), np.uint16))
        w.read(np.arange(200), out[-1])
    assert np.array_equal(*out)
    with pytest.raises(UserError, match="has become shorter"):
        Windows([Shard(str(folder / "data_train_000000.npy"), 128, 5000)], 16).read(
            np.arange(200), out[0]
        )


def test_the_index_of_ten_billion_tokens_costs_nothing(tmp_path):
    """100 shards, 9.77 million windows: measured 0.01 s and 0.05 MB; the bounds leave room for a busy machine."""
    sparse_shards(str(tmp_path / "s"), [97_700 * 1024 + 1] * 100)
    open_windows = lambda: Windows(
        shards.open_shards(str(tmp_path / "s"), "train", 1024), 1024, "global", 1337
    )
    t0 = time.perf_counter()
    open_windows().locate(np.arange(64))
    assert time.perf_counter() - t0 < 1
    tracemalloc.start()
    w = open_windows()
    places = w.locate(np.arange(64))
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert w.per_epoch() == 9_770_000 and len(set(places[1].tolist())) > 30 and size < 1e6


RSS = """
import resource, sys
import numpy as np, torch
from shards import Loader, Windows, open_shards
rss = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 1e6
w, kind = Windows(open_shards(sys.argv[1], "train", 1024), 1024, "global", 1), sys.argv[2]
maps, rows, loader = {}, np.zeros((64, 1025), np.uint16), Loader(w, 65536, 64, 0, 1, torch.device("cpu"))
for k in range(w.per_epoch() // 64):
    if kind == "loader":
        loader.next()
    else:
        for row, shard, token in zip(rows, *w.locate(k * 64 + np.arange(64))[1:].tolist()):
            maps[shard] = maps[shard] if shard in maps else np.load(w.shards[shard].path, mmap_mode="r")
            row[:] = maps[shard][token: token + 1025]
    if k == 10:
        before = rss()
print(rss() - before)
"""


def test_memory_does_not_grow_over_an_epoch(tmp_path):
    """Of 208 MB of shards, in a process of its own; memory maps, for comparison, do grow."""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("measured with Linux's /proc")
    sparse_shards(str(tmp_path / "s"), [26_000_000] * 4)
    growth = {
        kind: float(
            subprocess.run(
                [sys.executable, "-c", RSS, str(tmp_path / "s"), kind],
                cwd=ROOT,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for kind in ("loader", "maps")
    }
    assert growth["loader"] < 20 < 100 < growth["maps"], growth


# ---- validation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("B,world_size", [(1, 1), (3, 1), (4, 2), (5, 3)])
def test_validation_windows_do_not_depend_on_the_layout(tmp_path, B, world_size):
    w = Windows(
        shards.open_shards(str(counting_shards(tmp_path, [500, 300], "val")), "val", 16), 16
    )
    got = collections.Counter()
    for rank in range(world_size):
        for x, y in shards.val_batches(w, 16 * 21, B, rank, world_size, CPU):
            assert x.shape == y.shape == (B, 16)
            got.update(y[y >= 0].tolist())
    assert got == collections.Counter(range(1, 16 * 21 + 1))


# ---- files ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=12),
    shard_tokens=st.integers(50, 200),
)
def test_writer_and_reader_agree(tmp_path_factory, lengths, shard_tokens):
    folder, documents = (
        tmp_path_factory.mktemp("w"),
        [np.r_[50256, np.full(n - 1, i)].astype(np.uint16) for i, n in enumerate(lengths)],
    )
    writer = ShardWriter(str(folder), "x", "train", shard_tokens)
    for d in documents:
        writer.write(d)
    writer.close()
    files = sorted(folder.iterdir())
    assert np.array_equal(np.concatenate([np.load(f) for f in files]), np.concatenate(documents))
    assert all(len(np.load(f)) == shard_tokens for f in files[:-1])
    assert [r["tokens"] for r in writer.records] == [len(np.load(f)) for f in files]
    assert sum(r["documents"] for r in writer.records) == len(documents)
    assert all(prepare.sha256(f) == r["sha256"] for f, r in zip(files, writer.records))


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
        record = dict(file="data_train_000000.npy", split="train", tokens=999)
        (folder / "manifest.json").write_text(json.dumps(dict(tokenizer="gpt2", shards=[record])))
        return "manifest.json says 999, on disk 1000", "no such shard"
    if how == "no manifest":
        (folder / "manifest.json").write_text('{"tokenizer": "gpt2"}')
        return "manifest.json: KeyError", "shards"
    if how == "tokenizer":
        (folder / "manifest.json").write_text(json.dumps(dict(tokenizer="llama", shards=[])))
        return "llama", "gpt2"


@pytest.mark.parametrize(
    "how",
    [
        "missing",
        "cut",
        "not a shard",
        "wrong type",
        "both formats",
        "short",
        "manifest",
        "tokenizer",
        "no manifest",
    ],
)
def test_bad_shards_are_named(tmp_path, how):
    folder = write_shards(tmp_path, {"train": [1000, 500]})
    words = damaged(folder, how)
    with pytest.raises(UserError) as e:
        shards.open_shards(str(folder), "train", 64)
    assert all(word in str(e.value) for word in (*words, "hint:")) and "\n" not in str(e.value)


def test_ids_beyond_the_vocabulary_and_shrinking_shards_are_named(tmp_path):
    folder = write_shards(tmp_path, {"train": [2000]})
    loader = Loader(
        Windows(shards.open_shards(str(folder), "train", 16), 16, vocab_size=512), 64, 4, 0, 1, CPU
    )
    with pytest.raises(
        UserError, match="data_train_000000.npy has token id .*beyond vocab_size 512.*hint"
    ):
        loader.next()
    w = Windows([Shard(str(folder / "data_train_000000.npy"), 128, 5000)], 16)
    with pytest.raises(UserError, match="has become shorter"):
        w.read(np.arange(200), np.zeros((200, 17), np.uint16))


def with_manifest(folder, **more):
    """The folder with a manifest.json of all its shards."""
    found = [(f, shards.open_shard(str(f))) for f in sorted(folder.glob("*.npy"))]
    prepare.write_manifest(
        str(folder),
        [
            dict(file=f.name, split=f.name.split("_")[1], tokens=s.tokens, sha256=prepare.sha256(f))
            for f, s in found
        ],
        [],
        **more,
    )
    return folder


def flip(path, at=-100):
    """Change one token: the size stays."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def next_until_error(loader, seconds=10.0):
    t0 = time.perf_counter()
    while time.perf_counter() - t0 < seconds:
        loader.next()
        time.sleep(0.01)


def test_a_damaged_shard_is_found_while_training(tmp_path):
    folder = with_manifest(write_shards(tmp_path, {"train": [5000, 5000]}))
    opened = lambda rank: Loader(
        Windows(shards.open_shards(str(folder), "train", 16), 16), 128, 4, rank, 2, CPU
    )
    next_until_error(opened(0), 0.3)  # nothing wrong yet
    flip(folder / "data_train_000001.npy")
    with pytest.raises(UserError, match="data_train_000001.npy is damaged.*manifest.json; hint:"):
        next_until_error(opened(0))
    next_until_error(opened(1), 0.3)  # the first process looks for all


def test_while_a_download_goes_on_only_listed_shards_count(tmp_path):
    folder = with_manifest(write_shards(tmp_path, {"train": [1000, 500]}), complete=False)
    begun = Windows(shards.open_shards(str(folder), "train", 16), 16, "global", 3, 50304)
    np.save(folder / "data_train_000002.npy", np.zeros(700, np.uint16))
    assert len(shards.open_shards(str(folder), "train", 16)) == 2
    with_manifest(folder)
    w = Windows(shards.open_shards(str(folder), "train", 16), 16, "global", 3, 50304)
    assert (
        len(w.shards) == 3
        and shards.fingerprints(w.shards)[-1] != shards.fingerprints(begun.shards)[-1]
    )
    again, i = (
        shards.as_begun(w, shards.fingerprints(begun.shards)[-1]),
        np.arange(300),
    )  # a run begun with two resumes with two
    assert again.shards == begun.shards and again.locate(i).tolist() == begun.locate(i).tolist()
    assert shards.as_begun(w, shards.fingerprints(w.shards)[-1]).shards == w.shards
    flip(folder / "data_train_000000.npy")
    with_manifest(folder)
    changed = Windows(shards.open_shards(str(folder), "train", 16), 16)
    assert shards.as_begun(changed, shards.fingerprints(begun.shards)[-1]) is None


def test_hashes_are_compared_at_leisure(tmp_path, monkeypatch):
    """Asleep four fifths of the time: 20 GB of shards must not be read at full speed while a run starts."""
    np.save(tmp_path / "a_train_0.npy", np.zeros(20_000_000, np.uint16))
    (shard,), slept = shards.open_shards(str(tmp_path), "train", 64), []
    monkeypatch.setattr(shards.time, "sleep", slept.append)
    t0 = time.perf_counter()
    assert shards.scan(shard, idle=4) == (prepare.sha256(shard.path), 0, 0)
    assert len(slept) == 10 and 2 < sum(slept) / (time.perf_counter() - t0) < 4


# ---- audit ---------------------------------------------------------------------------------------------------------

RUN = dict(
    T=16, world_size=4, B=2, total_batch=512, max_steps=15
)  # 480 windows of 186 or less an epoch: 2.6 epochs


def audited(folder, capsys, **changes):
    """Exit status of the audit, its table {row: cells} and what it calls wrong."""
    with pytest.raises(SystemExit) as e:
        shards.audit(str(folder), **(RUN | changes))
    out = capsys.readouterr().out
    cells = {
        line[:24].strip() + (" " + str(i) if line.startswith("  ") else ""): line[24:].split()
        for i, line in enumerate(out.splitlines())
    }
    return (
        int(e.value.code),
        cells,
        [line for line in out.splitlines() if line.startswith("wrong: ")],
    )


@pytest.mark.parametrize("kind", ["sequential", "documents", "global"])
def test_audit_of_good_shards(tmp_path, capsys, kind):
    folder = with_manifest(write_shards(tmp_path, {"train": [1000, 2000], "val": [300]}))
    status, cells, wrong = audited(folder, capsys, data_order=kind)
    assert status == 0 and not wrong
    documents = sum((np.load(f) == 50256).sum() for f in folder.glob("*train*.npy"))
    assert cells["train, shards: 2"] == ["3,000", "186", str(documents)]
    assert cells["val, shards: 1"][:2] == ["300", "18"]
    w = Windows(shards.open_shards(str(folder), "train", 16), 16, kind, 1337)
    for epoch in (0, 1):
        windows, left_out = str(w.per_epoch(epoch)), str(w.left_out(epoch).sum())
        assert cells[f"all, epoch {epoch}"] == [
            windows,
            left_out,
            "0.0000%",
            "100.0000%",
            "0.0000%",
        ]
    part = (480 - w.epoch_start(2)) / w.per_epoch(2)
    assert cells["all, epoch 2"][2:] == [f"{1 - part:.4%}", f"{part:.4%}", "0.0000%"]
    least, most = (
        [v for k, v in cells.items() if k.startswith(f"a process, {word}")][0]
        for word in ("least", "most")
    )
    assert float(least[3][:-1]) <= 25 <= float(most[3][:-1]) < 28 and most[4] == "0.0000%"


def test_audit_does_not_depend_on_the_layout(tmp_path, capsys):
    folder = write_shards(tmp_path, {"train": [1000, 2000], "val": [300]})
    rows = [
        {
            k: v
            for k, v in audited(folder, capsys, world_size=n, B=b)[1].items()
            if k.startswith("all, ")
        }
        for n, b in ((1, 1), (2, 8), (32, 1))
    ]
    assert len(rows[0]) == 3 and rows[0] == rows[1] == rows[2]


BROKEN = {  # what is done to the folder, what the audit says
    "hash": (lambda d: flip(d / "data_train_000001.npy"), "data_train_000001.npy: its SHA-256"),
    "cut": (
        lambda d: os.truncate(d / "data_train_000000.npy", 1000),
        "header says 1000 tokens = 2128 bytes",
    ),
    "missing": (
        lambda d: os.rename(d / "data_val_000000.npy", d / "data_val_000001.npy"),
        "but not there",
    ),
    "unlisted": (
        lambda d: np.save(d / "data_train_000009.npy", np.zeros(99, np.uint16)),
        "no such shard, on disk 99",
    ),
    "all": (
        lambda d: [f.write_bytes(b"") for f in d.glob("*train*.npy")],
        "data_train_000001.npy: ",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_audit_finds_damage(tmp_path, capsys, how):
    folder = with_manifest(write_shards(tmp_path, {"train": [1000, 2000], "val": [300]}))
    BROKEN[how][0](folder)
    status, _, wrong = audited(folder, capsys)
    assert status == 1 and any(BROKEN[how][1] in line for line in wrong), wrong


def test_audit_finds_ids_of_another_tokenizer(tmp_path, capsys):
    folder = write_shards(tmp_path, {"train": [1000, 2000], "val": [300]})
    np.save(folder / "data_train_000001.npy", np.full(2000, 50300, np.uint16))
    status, _, wrong = audited(folder, capsys)
    assert status == 1 and len(wrong) == 1 and "000001.npy: 2,000 ids above 50256" in wrong[0]
    assert audited(folder, capsys, contents=False)[0] == 0


def test_audit_counts(tmp_path, capsys, monkeypatch):
    """With an order that is no permutation: half of the windows are never read, the others twice or more."""
    folder = write_shards(tmp_path, {"train": [1000, 2000], "val": [300]})
    monkeypatch.setattr(shards, "order", lambda seed, epoch, n, i: np.asarray(i) // 2 * 2)
    status, cells, wrong = audited(folder, capsys, data_order="global")
    assert (
        status == 1
        and len(wrong) == 3
        and "epoch 0: 0 windows are read once, 93 more often, 93 never" in wrong[0]
    )
    assert cells["all, epoch 0"][2:] == ["50.0000%", "0.0000%", "50.0000%"]


def test_a_shuffle_of_its_own_for_each_process_loses_windows(tmp_path):
    """Negative control, the predecessor's fault: with 4 processes (3/4)**4 = 31.6% of an epoch is never read."""
    sparse_shards(str(tmp_path / "s"), [1_600_001])
    files = shards.open_shards(str(tmp_path / "s"), "train", 16)
    for seeds, expected in (([7, 7, 7, 7], [0, 1, 0]), ([7, 8, 9, 10], [0.316, 0.422, 0.262])):
        seen = sum(
            shards.times_seen(Windows(files, 16, "global", seed), 0, 100_000, 4, rank, 4)
            for rank, seed in enumerate(seeds)
        )
        assert np.bincount(seen.clip(max=2), minlength=3) / 100_000 == pytest.approx(
            expected, abs=0.005
        )


def test_audit_from_the_command_line(tmp_path):
    folder = write_shards(tmp_path, {"train": [1000, 2000], "val": [300]})
    settings = [word for k, v in RUN.items() for word in (f"--{k}", v)]
    good = run("shards.py", "audit", folder, *settings)
    assert (
        good.returncode == 0 and "nothing wrong" in good.stdout and "2.581 epochs" in good.stdout
    ), good.stderr
    bad = run("shards.py", "audit", folder, "--T", "16", "--total_batch", "100")
    assert (
        bad.returncode == 2
        and bad.stderr.startswith("error: total_batch 100 ")
        and bad.stderr.count("\n") == 1
    )


# ---- the yardstick -------------------------------------------------------------------------------------------------


def test_bigram_loss_is_that_of_the_formula(tmp_path):
    folder = write_shards(tmp_path, {"train": [3000], "val": [500]}, ids=20)
    train, val = (Windows(shards.open_shards(str(folder), s, 10), 10) for s in ("train", "val"))
    tokens, held_out = (
        np.load(folder / f"data_{s}_000000.npy").astype(int) for s in ("train", "val")
    )
    pairs, single = collections.Counter(zip(tokens[:-1], tokens[1:])), collections.Counter(tokens)
    n = val.per_epoch() * 10
    losses = [
        -np.mean(
            [
                np.log((pairs[a, b] + k * (single[b] + 1) / (3000 + 50257)) / (single[a] + k))
                for a, b in zip(held_out[:n], held_out[1 : n + 1])
            ]
        )
        for k in (10, 20, 50, 100, 200, 500, 1000)
    ]
    assert bigram_loss(train, val, 10**6) == pytest.approx(min(losses), abs=1e-9)
    assert bigram_loss(train, val, 10**6, largest=100) is None


def test_validation_rows_are_shared_out_however_they_divide(tmp_path):
    """Every process gets as many batches, also where the last has no row left in one of them."""
    folder = write_shards(tmp_path, {"val": [9 * 8 + 1]})
    windows = shards.Windows(shards.open_shards(str(folder), "val", 8), 8)
    for B, world_size in ((4, 2), (1, 4), (2, 5), (16, 2)):
        got = [
            list(shards.val_batches(windows, 9 * 8, B, rank, world_size, torch.device("cpu")))
            for rank in range(world_size)
        ]
        assert len({len(batches) for batches in got}) == 1
        rows = [
            tuple(row) for batches in got for _, y in batches for row in y.tolist() if row[0] >= 0
        ]
        assert len(rows) == len(set(rows)) == 9
