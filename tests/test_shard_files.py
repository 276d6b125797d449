"""The laws of shard_files.py: formats, what is refused and how it is named, hashes, fingerprints.

python -m pytest tests/test_shard_files.py
"""

import json
import math
import os
import re
import shlex
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import run, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shards import open_windows, read_epoch, world

import shard_files
import shards
from records import data_of_run
from runtime.command_line import UserError
from runtime.files import sha256, write_json
from shard_files import (
    DamagedShard,
    ShardWriter,
    fingerprints,
    open_shard,
    open_shards,
    shard_names,
)
from shards import Loader
from tokenizer import EOT


def with_manifest(folder: Path, **more) -> Path:
    """Give a folder a manifest.json of all its shards."""
    records = []
    for path in sorted(folder.glob("*.npy")):
        record = {"file": path.name, "split": path.name.split("_")[1], "sha256": sha256(path)}
        records.append(record | {"tokens": open_shard(str(path)).tokens})
    manifest = {"tokenizer": "gpt2", "shards": records, "sources": []}
    write_json(folder / "manifest.json", manifest | more)
    return folder


def flip(path: Path, place: int = -100):
    """Change one token: the size stays."""
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    written = path.stat().st_mtime_ns
    path.write_bytes(raw)
    seen = max(path.stat().st_mtime_ns, written + 10**7)  # the file system's clock ticks
    os.utime(path, ns=(seen, seen))


# --------------------------------------------------------------------------------------------------
# formats


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=12),
    shard_tokens=st.integers(50, 200),
)
def test_writer_and_reader_agree(tmp_path_factory, lengths, shard_tokens):
    """Every token is written once, in order; all shards but the last are full; records are true."""
    folder = tmp_path_factory.mktemp("w")
    documents = [np.r_[EOT, np.full(n - 1, i)].astype(np.uint16) for i, n in enumerate(lengths)]
    writer = ShardWriter(folder, shard_names("x", "train"), shard_tokens)
    for document in documents:
        writer.write(document)
    writer.close()
    files = sorted(folder.iterdir())
    shards = [np.load(file) for file in files]
    assert np.array_equal(np.concatenate(shards), np.concatenate(documents))
    assert all(len(shard) == shard_tokens for shard in shards[:-1])
    assert [record["tokens"] for record in writer.records] == [len(shard) for shard in shards]
    assert sum(record["documents"] for record in writer.records) == len(documents)
    assert [record["sha256"] for record in writer.records] == [sha256(file) for file in files]


def test_bin_of_llm_c_reads_like_npy(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50257, 1000).astype(np.uint16)
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, 1000
    (tmp_path / "a_train_1.bin").write_bytes(header.tobytes() + tokens.tobytes())
    rows = read_epoch(open_windows(tmp_path, 99), 0)
    assert np.array_equal(rows[:, :-1].ravel(), tokens[: 99 * len(rows)])


# --------------------------------------------------------------------------------------------------
# what is refused

SECOND = "data_train_000001.npy"  # of 500 tokens; the first has 1,000


def remove_all(folder: Path):
    for path in folder.glob("*train*"):
        path.unlink()


def cut(folder: Path):
    raw = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(raw[:-100])


def list_wrong_count(folder: Path):
    record = {"file": "data_train_000000.npy", "split": "train", "tokens": 999}
    write_json(folder / "manifest.json", {"tokenizer": "gpt2", "shards": [record]})


def list_absent_shard(folder: Path):
    with_manifest(folder)
    (folder / SECOND).unlink()


def list_entry(**changes):
    """A damage: a manifest with an entry that is no shard's."""
    entry = {"file": SECOND, "split": "train", "tokens": 500} | changes
    content = {"tokenizer": "gpt2", "shards": [entry], "sources": []}
    return lambda folder: (folder / "manifest.json").write_text(json.dumps(content))


DAMAGES = {  # what is done to the folder, what the message must say
    "missing": (remove_all, ["no train shards", "prepare.py"]),
    "cut": (cut, [SECOND, "header says 500 tokens"]),
    "not a shard": (lambda folder: (folder / SECOND).write_text("hello"), [SECOND]),
    "a pipe": (
        lambda folder: [(folder / SECOND).unlink(), os.mkfifo(folder / SECOND)],
        [SECOND, "not a regular file"],
    ),
    "a folder": (
        lambda folder: [(folder / SECOND).unlink(), (folder / SECOND).mkdir()],
        [SECOND, "not a regular file"],
    ),
    "objects": (
        lambda folder: np.save(folder / SECOND, np.array([{}, 1], object), allow_pickle=True),
        ["object", "uint16"],
    ),
    "nested header": (
        lambda folder: (folder / SECOND).write_bytes(
            b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000 + bytes(99)
        ),
        [SECOND, "header"],
    ),
    "version 2.0": (  # its header may have 2 GB of memory, and 100 bytes on the disk
        lambda folder: [
            (folder / SECOND).write_bytes(b"\x93NUMPY\x02\x00\x00\x00\x00\x80" + bytes(99)),
            os.truncate(folder / SECOND, 1 << 31),
        ],
        [SECOND, "version is (2, 0), expected (1, 0)"],
    ),
    "a header of something else": (
        lambda folder: (folder / SECOND).write_bytes(
            b"\x93NUMPY\x01\x00\xe8\x03" + b"'" + b"x" * 998 + b"'" + bytes(99)
        ),
        [SECOND, "header"],
    ),
    "a name of two lines": (
        lambda folder: (folder / SECOND).rename(folder / "x_train\nerror: \x1b[2J.npy"),
        ["not plain text", r"'x_train\nerror: \x1b[2J.npy'"],
    ),
    "wrong type": (
        lambda folder: np.save(folder / SECOND, np.zeros(500, np.int32)),
        ["int32", "uint16"],
    ),
    "both formats": (
        lambda folder: (folder / "x_train_1.bin").write_bytes(b""),
        ["mixes .npy and .bin"],
    ),
    "not llm.c's": (
        lambda folder: [
            remove_all(folder),
            (folder / "x_train_1.bin").write_bytes(b"hello..." * 9),
        ],
        ["x_train_1.bin", "magic 20240520"],
    ),
    "short": (
        lambda folder: np.save(folder / SECOND, np.zeros(10, np.uint16)),
        ["10 tokens", "T + 1 = 65", "hint: lower --T, or prepare more text"],
    ),
    "manifest": (list_wrong_count, ["manifest.json says 999, on disk 1000", "no such shard"]),
    "absent": (list_absent_shard, [f"{SECOND}: in manifest.json, but not there"]),
    "no manifest": (
        lambda folder: (folder / "manifest.json").write_text('{"tokenizer": "gpt2"}'),
        ["manifest.json: KeyError", "shards"],
    ),
    "tokenizer": (
        lambda folder: write_json(folder / "manifest.json", {"tokenizer": "llama", "shards": []}),
        ["llama", "gpt2"],
    ),
    "manifest a folder": (
        lambda folder: (folder / "manifest.json").mkdir(),
        ["manifest.json", "not a regular file"],
    ),
    "manifest a pipe": (
        lambda folder: os.mkfifo(folder / "manifest.json"),
        ["manifest.json", "not a regular file"],
    ),
    "manifest nested": (
        lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
        ["manifest.json", "nested too deeply"],
    ),
    "manifest a list": (
        lambda folder: (folder / "manifest.json").write_text("[5]"),
        ["manifest.json", "TypeError"],
    ),
    "manifest of 1 GB": (
        lambda folder: os.truncate(with_manifest(folder) / "manifest.json", 1 << 30),
        ["manifest.json", "1,073,741,824 bytes"],
    ),
    "files to move that are no list": (
        lambda folder: with_manifest(folder, moving=5),
        ["manifest.json", "moving is 5"],
    ),
    "a number for a name": (list_entry(file=5), ["manifest.json", "file is 5"]),
    "a name that leads out": (list_entry(file="../x.npy"), ["file is '../x.npy'"]),
    "an escape for a name": (list_entry(file="\x1b[2J"), ["file is '\\x1b[2J'"]),
    "a text for a count": (list_entry(tokens="many"), ["has 'many' tokens"]),
    "a text for documents": (list_entry(documents="x"), ["has 'x' documents"]),
    "a number for a split": (list_entry(split=5), ["split 5"]),
    "a number for a hash": (list_entry(sha256=5), ["SHA-256 5"]),
    "incomplete entry": (
        lambda folder: write_json(
            folder / "manifest.json", {"tokenizer": "gpt2", "shards": [{"file": SECOND}]}
        ),
        ["manifest.json", "split", "tokens"],
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_bad_shards_are_named(tmp_path, name):
    """In one line with a hint, and within 100 MB."""
    folder = write_shards(tmp_path, {"train": [1000, 500]})
    damage, words = DAMAGES[name]
    damage(folder)
    tracemalloc.start()
    with pytest.raises(UserError) as e:
        open_shards(str(folder), "train", 64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e8
    message = str(e.value)
    assert all(word in message for word in (*words, "hint:")), message
    assert "\n" not in message and len(message) < 900


def test_a_short_validation_names_the_share(tmp_path):
    """As `prepare.py files` leaves it from a text of a few lines."""
    folder = with_manifest(write_shards(tmp_path, {"train": [1000], "val": [29]}))
    with pytest.raises(UserError, match="29 tokens, fewer than.*hint: lower --T.*--val_share"):
        open_shards(str(folder), "val", 64)


def test_the_hint_for_nanogpts_files_makes_them_shards(tmp_path):
    """The command that the error gives is run as it stands."""
    ids = np.random.default_rng(0).integers(0, 50257, 3000).astype(np.uint16)
    for split in ("train", "val"):
        ids.tofile(tmp_path / f"{split}.bin")
        with pytest.raises(UserError) as e:
            open_shards(str(tmp_path), split, 64)
        command = re.search('python -c (".*?")', str(e.value))[1]
        assert run("-c", *shlex.split(command)).returncode == 0
        (tmp_path / f"{split}.bin").unlink()
        (shard,) = open_shards(str(tmp_path), split, 64)
        assert shard.tokens == 3000 and np.array_equal(np.load(shard.path), ids)


def test_all_that_is_wrong_is_listed_and_the_rest_opened(tmp_path):
    """With a list for the problems nothing is raised, and the valid shards are returned."""
    folder = write_shards(tmp_path, {"train": [1000, 500, 700, 800]})
    cut(folder)
    (folder / "data_train_000002.npy").write_text("hello")
    wrong = []
    opened = open_shards(str(folder), "train", 64, wrong)
    assert [shard.tokens for shard in opened] == [1000, 800]
    assert len(wrong) == 2
    with pytest.raises(UserError) as e:
        open_shards(str(folder), "train", 64)
    assert all(problem in str(e.value) for problem in wrong)


def test_a_split_is_a_word_of_the_name(tmp_path):
    """No shard of "retrieval" is one of "val"."""
    np.save(tmp_path / "retrieval_train_000000.npy", np.zeros(200, np.uint16))
    np.save(tmp_path / "retrieval_val_000000.npy", np.zeros(300, np.uint16))
    sizes = {s: [x.tokens for x in open_shards(str(tmp_path), s, 64)] for s in ("train", "val")}
    assert sizes == {"train": [200], "val": [300]}


# --------------------------------------------------------------------------------------------------
# hashes and fingerprints


def take_until_error(loader: Loader, seconds: float = 10.0):
    """Take batches until one raises, or for some seconds."""
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        loader.take()
        time.sleep(0.01)


def test_small_data_are_compared_before_any_of_them_is_used(tmp_path):
    """Rank 0 compares all shards with manifest.json; the error says since when they are wrong."""
    folder = with_manifest(write_shards(tmp_path, {"train": [5000, 5000]}))

    def loader(rank):
        return Loader(open_windows(folder, 16), 128, 4, world(rank, 2))

    loader(0).take()
    flip(folder / SECOND)
    with pytest.raises(DamagedShard, match=f"{SECOND} is damaged.*manifest.json; hint:") as e:
        loader(0).take()
    assert e.value.path == str(folder / SECOND)
    assert e.value.since == (folder / SECOND).stat().st_mtime
    loader(1).take()


def test_a_damaged_shard_of_large_data_is_found_while_training(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_files, "VERIFY_FIRST", 9999)
    folder = with_manifest(write_shards(tmp_path, {"train": [5000, 5000]}))
    flip(folder / SECOND)
    with pytest.raises(DamagedShard, match=f"{SECOND} is damaged"):
        take_until_error(Loader(open_windows(folder, 16), 128, 4, world(0, 1)))


def touch(path: Path):
    later = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))


def replace_by_the_same(path: Path):
    new = path.with_name("new")
    new.write_bytes(path.read_bytes())
    os.replace(new, path)


@pytest.mark.parametrize("change", [touch, replace_by_the_same])
def test_the_same_bytes_are_no_other_shard(tmp_path, monkeypatch, change):
    """A second default run, rsync, touch: with a manifest the content decides, not the file."""
    monkeypatch.setattr(shards, "CHECK_SECONDS", 0.0)
    folder = with_manifest(write_shards(tmp_path, {"train": [1000, 500]}))
    w = open_windows(folder, 16)
    expected = read_epoch(w, 0)
    change(folder / SECOND)
    scans = []
    monkeypatch.setattr(
        shard_files, "scan", lambda shard, scan=shard_files.scan: scans.append(1) or scan(shard)
    )
    assert np.array_equal(read_epoch(w, 0), expected) and len(scans) == 1  # and then it is known
    flip(folder / SECOND)
    with pytest.raises(DamagedShard, match="was replaced or rewritten") as e:
        read_epoch(w, 0)
    assert e.value.since == math.inf  # what was read before is right


def test_hashes_are_compared_at_leisure(tmp_path, monkeypatch):
    """Asleep four fifths of the time: 20 GB must not be read at full speed while a run starts."""
    np.save(tmp_path / "a_train_0.npy", np.zeros(20_000_000, np.uint16))
    (shard,) = open_shards(str(tmp_path), "train", 64)
    naps = []
    monkeypatch.setattr(shard_files.time, "sleep", naps.append)
    expected = (sha256(shard.path), 0, 0)
    started = time.perf_counter()
    assert shard_files.scan(shard, idle=4) == expected
    worked = time.perf_counter() - started
    assert len(naps) == 10
    assert 2 < sum(naps) / worked < 4


def test_while_shards_are_being_added_only_listed_ones_count(tmp_path):
    """A run that began with two shards resumes with these two; with changed ones it does not."""
    folder = with_manifest(write_shards(tmp_path, {"train": [1000, 500]}), complete=False)
    began = open_windows(folder, 16, "global", 3)
    began_with = fingerprints(began.shards)[-1]
    np.save(folder / "data_train_000002.npy", np.zeros(700, np.uint16))
    assert len(open_shards(str(folder), "train", 16)) == 2

    with_manifest(folder)
    grown = open_windows(folder, 16, "global", 3)
    assert len(grown.shards) == 3
    assert fingerprints(grown.shards)[-1] != began_with
    resumed = data_of_run(grown, began_with)
    i = np.arange(300)
    assert resumed.shards == began.shards
    assert resumed.locate(i).tolist() == began.locate(i).tolist()
    assert data_of_run(grown, fingerprints(grown.shards)[-1]).shards == grown.shards

    flip(folder / "data_train_000000.npy")
    with_manifest(folder)
    assert data_of_run(open_windows(folder, 16), began_with) is None


def test_a_fingerprint_stands_for_names_sizes_and_contents(tmp_path):
    """Also without a manifest, where the content is sampled."""
    folder = write_shards(tmp_path / "a", {"train": [1000, 500]})
    base = fingerprints(open_shards(str(folder), "train", 64))
    assert len(set(base)) == 2
    flip(folder / SECOND)
    changed = fingerprints(open_shards(str(folder), "train", 64))
    assert changed[0] == base[0]
    assert changed[1] != base[1]
    flip(folder / SECOND)
    assert fingerprints(open_shards(str(folder), "train", 64)) == base
    (folder / SECOND).rename(folder / "data_train_000002.npy")
    assert fingerprints(open_shards(str(folder), "train", 64))[1] not in (base[1], changed[1])


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    folder = with_manifest(write_shards(tmp_path, {"train": [1000]}), complete=False)
    manifest = shard_files.read_manifest(folder)
    assert manifest == json.loads((folder / "manifest.json").read_text())
    assert manifest["complete"] is False
    assert shard_files.read_manifest(tmp_path / "none") == {}
