"""Text into shards and back: every byte, every document, in order; nothing of the user's is lost.

python -m pytest tests/test_prepare.py
"""

import contextlib
import dataclasses
import gzip
import hashlib
import http.server
import io
import itertools
import json
import os
import resource
import shutil
import signal
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from conftest import FORKSERVER, run

import prepare
import shard_files
import tokenizer
from prepare import Dataset
from runtime.command_line import UserError, run_script
from runtime.files import sha256

PROSE = "".join(f"SPEAKER {i}:\nSome words.\nAnd more.\n\n" for i in range(200))
DOCUMENTS = [
    f"Document {i}.\nIt has <|endoftext|> in it, naïve {'👩‍👩‍👧 ' * (i % 4)}and {i * 37} words.\n"
    + "more " * (i % 23)
    for i in range(101)
]


def write(path: Path, documents: list[str], text_field: str = "text") -> str:
    """A file of documents in the format that its ending says."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"id": list(range(len(documents))), text_field: documents})
        pyarrow.parquet.write_table(table, path, row_group_size=10)
        return str(path)
    raw = documents[0]
    if ".jsonl" in path.name:
        raw = "".join(json.dumps({"id": i, text_field: d}) + "\n" for i, d in enumerate(documents))
    path.write_bytes(gzip.compress(raw.encode()) if path.suffix == ".gz" else raw.encode())
    return str(path)


def read_manifest(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text())


def read(out: Path, split: str) -> list[str]:
    """The documents of a split, decoded; its shards laid end to end."""
    shards = [np.load(out / s["file"]) for s in read_manifest(out)["shards"] if s["split"] == split]
    tokens = np.concatenate(shards)
    assert tokens.dtype == np.uint16 and tokens[0] == tokenizer.EOT
    documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.EOT)[1:])
    return [tokenizer.gpt2().decode(d[1:].tolist()) for d in documents]


def read_all(out: Path) -> list[str]:
    return read(out, "val") + read(out, "train")


def tokens_of(documents: list[str]) -> list[int]:
    return [i for d in documents for i in (tokenizer.EOT, *tokenizer.gpt2().encode_ordinary(d))]


def listing(folder: Path) -> dict[str, bytes]:
    """The files below a folder and their content."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def error_of(function, *arguments, **options) -> str:
    """The UserError of a call: one line, with a hint."""
    with pytest.raises(UserError) as e:
        function(*arguments, **options)
    assert "\n" not in str(e.value) and "hint:" in str(e.value)
    return str(e.value)


def error(*arguments, **options) -> str:
    return error_of(prepare.files, *arguments, **options)


def test_prepare_is_light():
    """No torch; help takes 0.5 s on an idle machine."""
    code = "import prepare, sys; print(*sys.modules)"
    modules = run("-c", code).stdout.split()
    assert not {"torch", "pyarrow", "huggingface_hub", "modal"} & set(modules)
    assert "fineweb-edu" in run("prepare.py", "--help", timeout=10).stdout


# --------------------------------------------------------------------------------------------------
# files


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_documents_come_back_byte_for_byte_each_in_one_split(tmp_path, ending, capsys):
    path = write(tmp_path / f"some{ending}", DOCUMENTS)
    prepare.files((path,), str(tmp_path / "out"), val_share=0.1)
    val, train = read(tmp_path / "out", "val"), read(tmp_path / "out", "train")
    assert [d for d in DOCUMENTS if d in val] == val
    assert [d for d in DOCUMENTS if d not in val] == train
    assert f"(documents: {len(train)})" in capsys.readouterr().out


def test_text_files_are_one_document_each_in_the_order_given(tmp_path):
    texts = {f"{i:x}.txt"[::-1] + ".txt": f"text {i}\r\n\t." for i in range(9)}
    texts["a.txt.gz"] = "the last one"
    paths = tuple(write(tmp_path / name, [text]) for name, text in texts.items())
    prepare.files(paths, str(tmp_path / "out"), val_share=0.3)
    val, train = read(tmp_path / "out", "val"), read(tmp_path / "out", "train")
    assert val == [text for text in texts.values() if text in val]
    assert train == [text for text in texts.values() if text not in val]


LINES = "".join(f"line {i}\n" for i in range(5000))
COLLECTIONS = {  # documents, lengths as different as people's
    "a book and a note": [LINES, "a short note\n" * 30],
    "no line ends": ["words " * 9000, "no-blank" * 3000],
    "ten chapters": [LINES[i * 4000 : (i + 1) * 4000] for i in range(10)],
    "49 alike": [LINES[i * 900 : (i + 1) * 900] for i in range(49)],
    "one is most of it": [LINES, *DOCUMENTS],
    "many": DOCUMENTS * 3,
    "other alphabets": ["日本語の文章です。" * 500, LINES, "Привет, мир! " * 900],
}


@pytest.mark.parametrize("val_share", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("name", COLLECTIONS)
def test_validation_is_a_share_of_the_tokens_in_any_order(tmp_path, name, val_share):
    documents = COLLECTIONS[name]
    orders = {
        "as it is": documents,
        "reversed": documents[::-1],
        "turned": documents[1:] + documents[:1],
    }
    for order, texts in orders.items():
        out = tmp_path / order
        prepare.files((write(tmp_path / f"{order}.jsonl", texts),), str(out), val_share=val_share)
        tokens = {"train": 0, "val": 0}
        for shard in read_manifest(out)["shards"]:
            tokens[shard["split"]] += shard["tokens"]
        share = tokens["val"] / sum(tokens.values())
        assert 0.5 * val_share <= share <= 2 * val_share and share <= 0.6
        assert len("".join(read_all(out))) == len("".join(texts))


def test_long_documents_are_validation_as_often_as_short_ones():
    lengths = [1000 if i % 3 else 20_000 for i in range(3000)]
    texts = ((dict(name=""), "x" * length) for length in lengths)
    val = [
        len(text) for (_, split), text in prepare.split_documents(texts, 0.02, "") if split == "val"
    ]
    assert 0.2 < sum(length == 20_000 for length in val) / len(val) < 0.45


def test_a_single_document_is_cut_at_a_line(tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    prepare.files((write(tmp_path / "a.txt", [text]),), str(tmp_path / "out"), val_share=0.1)
    (train,), (val,) = read(tmp_path / "out", "train"), read(tmp_path / "out", "val")
    assert train + val == text and train.endswith("\n") and 0.1 <= len(val) / len(text) < 0.11


@pytest.mark.parametrize(
    "text", ["word " * 5000, "no-blank-anywhere" * 900, "".join(DOCUMENTS).replace("\n", "\r")]
)
def test_a_text_without_line_ends_is_cut_at_a_blank_or_anywhere(tmp_path, text):
    prepare.files((write(tmp_path / "a.txt", [text]),), str(tmp_path / "out"), val_share=0.1)
    (train,), (val,) = read(tmp_path / "out", "train"), read(tmp_path / "out", "val")
    assert train + val == text and 0.05 <= len(val) / len(text) <= 0.15
    assert train.endswith(" ") or " " not in text


def test_the_manifest_counts_a_document_that_was_cut_once(tmp_path):
    prepare.files((write(tmp_path / "a.txt", [LINES]),), str(tmp_path / "out"))
    assert read_manifest(tmp_path / "out")["sources"][0]["documents"] == 1


def test_shards_are_full_and_documents_run_across_them(tmp_path):
    path, out = write(tmp_path / "a.jsonl", DOCUMENTS), tmp_path / "out"
    prepare.files((path,), str(out), shard_tokens=100, val_share=0.1, name="mine")
    for split in ("train", "val"):
        shards = [s for s in read_manifest(out)["shards"] if s["split"] == split]
        names = [f"mine_{split}_{i:06d}.npy" for i in range(len(shards))]
        assert [s["file"] for s in shards] == names and len(names) >= 5
        assert {s["tokens"] for s in shards[:-1]} == {100} and 0 < shards[-1]["tokens"] <= 100
        assert any(np.load(out / name)[0] != tokenizer.EOT for name in names)
    assert sorted(read_all(out)) == sorted(DOCUMENTS)


def test_the_manifest_is_true(tmp_path):
    paths = [
        write(tmp_path / "a.jsonl.gz", [*DOCUMENTS[:60], "", " \n"]),
        write(tmp_path / "b.parquet", [*DOCUMENTS[60:], None]),
    ]
    out = tmp_path / "out"
    prepare.files(tuple(paths), str(out), shard_tokens=500)
    manifest = read_manifest(out)
    files = ["manifest.json", *(s["file"] for s in manifest["shards"])]
    assert sorted(listing(out)) == sorted(files)
    for shard in manifest["shards"]:
        tokens = np.load(out / shard["file"])
        assert shard["sha256"] == hashlib.sha256((out / shard["file"]).read_bytes()).hexdigest()
        assert shard["tokens"] == len(tokens)
        assert shard["documents"] == (tokens == tokenizer.EOT).sum()
    parts = [(DOCUMENTS[:60], 2), (DOCUMENTS[60:], 1)]
    for source, path, (documents, empty) in zip(manifest["sources"], paths, parts, strict=True):
        raw = Path(path).read_bytes()
        assert source == dict(
            name=os.path.basename(path),
            bytes=len(raw),
            sha256=hashlib.sha256(raw).hexdigest(),
            documents=len(documents),
            empty=empty,
            tokens=len(tokens_of(documents)),
        )
    assert str(tmp_path) not in (out / "manifest.json").read_text()


def test_empty_documents_are_skipped_and_reported(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", ["", "one", "\n", "two" * 100, "   "])
    Path(path).write_text(Path(path).read_text() + '\n{"text": null}\n\n')
    prepare.files((path,), str(tmp_path / "out"))
    assert sorted("".join(read_all(tmp_path / "out"))) == sorted("one" + "two" * 100)
    assert "empty documents skipped: 4" in capsys.readouterr().out


def test_long_documents_have_the_tokens_of_the_whole(tmp_path):
    """Blanks in the millions, which overflow tiktoken's regex in one piece, and long prose."""
    documents = [
        "a" + " \n" * 600_000 + "b",
        "\n\n".join(DOCUMENTS * 30),
        "\u3000" * 1_200_000 + ".",
    ]
    prepare.files((write(tmp_path / "a.jsonl", documents),), str(tmp_path / "out"), val_share=0.5)
    shards = [np.load(path) for path in sorted((tmp_path / "out").glob("*.npy"))]
    prose = tokens_of(documents[1:2])
    assert any(
        prose == tokens[at : at + len(prose)].tolist()
        for tokens in shards
        for at in np.flatnonzero(tokens == tokenizer.EOT)
    )
    assert sorted("".join(read_all(tmp_path / "out"))) == sorted("".join(documents))


def test_real_text(shared, tmp_path):
    """English prose: the tokens are those of tiktoken, one document at a time."""
    path = shared / "edu_docs.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as f:
        documents = [json.loads(line)["text"] for line in f][:500]
    prepare.files((write(tmp_path / "a.jsonl", documents),), str(tmp_path / "out"), val_share=0.5)
    val = set(read(tmp_path / "out", "val"))
    assert 240 < len(val) <= 250
    for split in ("val", "train"):
        tokens = np.load(tmp_path / "out" / f"docs_{split}_000000.npy")
        assert tokens.tolist() == tokens_of(
            [d for d in documents if (d in val) == (split == "val")]
        )


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_memory_holds_a_part_of_the_input(monkeypatch, workers):
    """Documents are read only as they are needed, and come in order."""
    monkeypatch.setattr(prepare, "IN_FLIGHT", 1000)
    unread = []

    def stream():
        for i, document in enumerate(DOCUMENTS):
            unread[:] = DOCUMENTS[i + 1 :]
            yield i, document

    lengths = []
    for n, (i, tokens) in enumerate(prepare.tokenize(stream(), workers)):
        assert i == n and tokens.tolist() == tokens_of([DOCUMENTS[i]])
        lengths.append(len(unread))
    assert 75 < lengths[0] < 100 and lengths[-1] == 0 and n == 100


BAD = {  # file name: its bytes, what the error says
    "no_ending": (b"text", "unknown ending"),
    "table.csv": (b"text", "unknown ending"),
    "latin.txt": (b"caf\xe9\n", "latin.txt: not UTF-8"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "latin.jsonl, line 2: not UTF-8"),
    "cut.jsonl": (b'{"text": "a"}\n\n{"text": "b\n', "cut.jsonl, line 3: not JSON"),
    "other.jsonl": (
        b'{"text": "a"}\n{"body": "b"}\n',
        "other.jsonl, line 2: no field 'text'; hint: --text_field",
    ),
    "list.jsonl": (b'{"text": "a"}\n["text"]\n', "list.jsonl, line 2: no field 'text'"),
    "number.jsonl": (b'{"text": 3}\n', "field 'text' is int"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl, line 1: "),
    "plain.txt.gz": (b"text", "Not a gzipped file"),
    "short.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 9)[:-9], "short.jsonl.gz"),
    "damaged.txt.gz": (gzip.compress(os.urandom(99))[:40] + b"\xff" * 60, "damaged.txt.gz"),
    "noise.parquet": (b"PAR1" + b"\0" * 99, "noise.parquet: "),
    "empty.parquet": (b"", "empty.parquet: "),
    "empty.txt": (b"", "empty.txt: no documents"),
    "blank.jsonl": (b"\n\n", "blank.jsonl: no documents"),
    "line.txt": (b"a", "line.txt: 1 characters are too few"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_leaves_nothing(tmp_path, name):
    content, expected = BAD[name]
    (tmp_path / name).write_bytes(content)
    message = error((str(tmp_path / name),), str(tmp_path / "out"))
    assert name in message and expected in message
    assert listing(tmp_path) == {name: content}


def test_an_error_half_way_leaves_no_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "IN_FLIGHT", 100)
    path = write(tmp_path / "a.jsonl", DOCUMENTS)
    Path(path).write_text(Path(path).read_text() + "{")
    assert "a.jsonl, line 102: not JSON" in error((path,), str(tmp_path / "out"), shard_tokens=50)
    assert not (tmp_path / "out").exists()


def test_parquet_without_the_column_or_cut_short(tmp_path):
    path, out = write(tmp_path / "a.parquet", DOCUMENTS, text_field="body"), str(tmp_path / "out")
    assert "a.parquet: no field 'text'; hint: --text_field" in error((path,), out)
    Path(path).write_bytes(Path(path).read_bytes()[:-100])
    assert "a.parquet" in error((path,), out, text_field="body")


def test_all_wrong_settings_are_reported_at_once(tmp_path):
    path, out = write(tmp_path / "a.txt", ["text"]), str(tmp_path / "out")
    files = (path, path, "none.txt")
    message = error(files, out, val_share=0.7, shard_tokens=0, name="validation")
    for part in (
        "a.txt: given twice",
        "none.txt: no such",
        "val_share is 0.7",
        "shard_tokens is 0",
        "'validation'",
    ):
        assert part in message
    assert "no input files" in error((), out)


@pytest.mark.parametrize("name", ["manifest.json", "docs_train_000000.npy", "other_val_000000.bin"])
def test_nothing_is_overwritten(tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"precious")
    message = error((write(tmp_path / "a.jsonl", DOCUMENTS),), str(tmp_path / "out"))
    assert name in message and listing(tmp_path / "out") == {name: b"precious"}


def test_shards_that_appear_meanwhile_are_not_overwritten(tmp_path, monkeypatch):
    tokenize = prepare.tokenize

    def appear(texts):
        yield from tokenize(texts)
        (tmp_path / "out" / "manifest.json").write_bytes(b"precious")

    monkeypatch.setattr(prepare, "tokenize", appear)
    error((write(tmp_path / "a.jsonl", DOCUMENTS),), str(tmp_path / "out"))
    assert listing(tmp_path / "out") == {"manifest.json": b"precious"}


def test_out_that_cannot_be_written(tmp_path, monkeypatch):
    def disk_is_full(descriptor):
        raise OSError(28, "No space left on device")

    path = write(tmp_path / "a.jsonl", DOCUMENTS)
    assert "a.jsonl is a file" in error((path,), path)
    assert f"cannot write to {path}/out" in error((path,), path + "/out")
    monkeypatch.setattr(os, "fsync", disk_is_full)
    assert "out: No space left on device" in error((path,), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_remains_of_a_killed_run_do_not_hinder(tmp_path):
    (tmp_path / "out" / "writing-abc.tmp").mkdir(parents=True)
    (tmp_path / "out" / "writing-abc.tmp" / "docs_train_000000.npy").write_bytes(b"half")
    (tmp_path / "out" / ".docs_val_000000.npy.tmp").write_bytes(b"half")
    prepare.files((write(tmp_path / "a.jsonl", DOCUMENTS),), str(tmp_path / "out"))
    assert sorted(read_all(tmp_path / "out")) == sorted(DOCUMENTS)


def test_a_killed_run_leaves_no_shards_in_place(tmp_path):
    """Killed while writing, by a signal that cannot be caught: out is not taken for a data set."""
    path, out = write(tmp_path / "a.jsonl", DOCUMENTS), tmp_path / "out"
    code = (
        "import os, signal, prepare\n"
        "prepare.write_manifest = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"prepare.files(({path!r},), {str(out)!r}, shard_tokens=100)"
    )
    assert run("-c", code).returncode == -signal.SIGKILL
    assert [f for f in os.listdir(out) if not f.endswith(".tmp")] == []
    assert list(out.glob("writing-*.tmp/*.npy"))  # it had come that far
    prepare.files((path,), str(out), shard_tokens=100)
    assert sorted(read_all(out)) == sorted(DOCUMENTS)
    assert not list(out.glob("*.tmp"))


@pytest.mark.parametrize("command", ["files", "shakespeare", "fineweb-edu"])
def test_what_has_its_name_survives_a_power_cut(tmp_path, monkeypatch, command, text, source):
    """A file is flushed before it gets its last name, and its directory before the next step.

    Without that XFS and btrfs leave it with 0 bytes.
    """
    calls, out = [], tmp_path / "out"
    replace, flush = os.replace, os.fsync

    def note_flush(descriptor):
        status = os.fstat(descriptor)
        calls.append(("flush", status.st_ino))
        flush(descriptor)

    def note_rename(a, b):
        calls.append(("rename", os.stat(a).st_ino, str(b), os.stat(os.path.dirname(b)).st_ino))
        replace(a, b)

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(os, "replace", note_rename)
    text.write_text(PROSE)
    if command == "files":
        path = write(tmp_path / "a.jsonl", DOCUMENTS)
        prepare.files((path,), str(out), shard_tokens=2000)
    elif command == "shakespeare":
        prepare.shakespeare(str(out))
    else:
        prepare.fineweb_edu(str(out), SMALL, source)
    renames = [i for i, call in enumerate(calls) if call[0] == "rename"]
    final = {i for i in renames if os.path.dirname(calls[i][2]) == str(out)}
    assert {os.path.basename(calls[i][2]) for i in final} == set(os.listdir(out))
    manifests = [i for i in final if calls[i][2].endswith("manifest.json")]
    for i in final:
        _, file, _, folder = calls[i]
        assert ("flush", file) in calls[:i]
        # the manifest that lists a shard comes after the flush of the directory with the shard
        next_manifest = min((m for m in manifests if m > i), default=len(calls))
        assert ("flush", folder) in calls[i:next_manifest]


class Crash(BaseException):
    """The power fails: nothing catches it."""


@contextlib.contextmanager
def ended_at(call: int):
    """Inside the block, that call of os.replace or os.fsync and all later ones raise Crash."""
    calls = itertools.count()

    def fragile(function):
        def counted(*arguments):
            if next(calls) >= call:
                raise Crash
            return function(*arguments)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "fsync"):
            patch.setattr(os, name, fragile(getattr(os, name)))
        yield


@pytest.mark.parametrize("command", ["files", "shakespeare"])
def test_ended_at_any_call_the_same_command_makes_the_same_files(
    tmp_path, monkeypatch, command, text
):
    """At each rename and flush; what is there until then is no data set, unless it is whole."""
    text.write_text(PROSE)
    path, out, whole = write(tmp_path / "a.jsonl", DOCUMENTS), tmp_path / "out", tmp_path / "whole"

    def make(folder):
        if command == "files":
            prepare.files((path,), str(folder), shard_tokens=2000)
        else:
            prepare.shakespeare(str(folder))
        return listing(folder)

    expected = make(whole)
    for call in range(99):
        shutil.rmtree(out, ignore_errors=True)
        try:
            with ended_at(call):
                make(out)
            break
        except Crash:
            pass
        if out.exists() and listing(out) == expected:
            continue
        with pytest.raises(UserError, match="no train shards"):
            shard_files.open_shards(str(out), "train", 8)
        assert make(out) == expected, call
    assert call > 10 and listing(out) == expected


def test_the_manifest_comes_last(tmp_path, monkeypatch):
    moved, replace = [], os.replace

    def record(a, b):
        moved.append(str(b))
        replace(a, b)

    monkeypatch.setattr(os, "replace", record)
    prepare.files((write(tmp_path / "a.jsonl", DOCUMENTS),), str(tmp_path / "out"), name="z")
    names = ["z_train_000000.npy", "z_val_000000.npy", "manifest.json"]
    assert moved[-3:] == [str(tmp_path / "out" / name) for name in names]


def test_the_command_line(tmp_path):
    path, out = write(tmp_path / "a.jsonl", DOCUMENTS, text_field="body"), tmp_path / "out"
    bad = run("prepare.py", "files", path, "--out", out)
    assert bad.returncode == 2 and bad.stdout == "" and bad.stderr.count("\n") == 1
    assert bad.stderr.startswith(f"error: {path}, line 1: ") and "hint:" in bad.stderr
    options = ("--text_field", "body", "--val_share", "0.1", "--out", out)
    good = run("prepare.py", "files", path, *options)
    assert good.returncode == 0, good.stderr
    assert sorted(read_all(out)) == sorted(DOCUMENTS)


# --------------------------------------------------------------------------------------------------
# the hub


class Hub(http.server.ThreadingHTTPServer):
    """The files of a folder as huggingface.co serves a data set, on this machine, with faults."""

    def __init__(self, folder: Path, repository: str):
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.folder = folder
        self.repository = repository
        self.names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        self.hashes = {name: sha256(folder / name) for name in self.names}
        self.faults = []  # "drop" or (status, error code), for the next requests, in turn
        self.fail_at = None  # name of a file whose content always breaks off
        self.damage = lambda info: None  # what is wrong with the list of files
        self.xet = 0  # times that the next files are offered by Xet, from a store that is away
        self.listed = []  # revisions that were asked for
        self.downloaded = []  # (name, revision)
        self.requests = 0

    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubRequest(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        hub = self.server
        if self.path.startswith("/api/agent"):  # the library asks once per process who is calling
            return self.answer(404, {})
        hub.requests += 1
        fault = hub.faults.pop(0) if hub.faults else None
        path = urllib.parse.unquote(self.path.partition("?")[0])
        listing = path.startswith(f"/api/datasets/{hub.repository}/revision/")
        start = f"/datasets/{hub.repository}/resolve/"
        if fault == "drop":
            self.connection.close()
        elif path == "/xet-token":
            token = {
                "Cas-Url": "http://127.0.0.1:9",
                "Access-Token": "x",
                "Token-Expiration": 9**10,
            }
            self.answer(200, {f"X-Xet-{name}": value for name, value in token.items()})
        elif fault or not (listing or path.startswith(start)):
            status, code = fault or (404, "RepoNotFound")
            self.answer(status, {"X-Error-Code": code, "X-Error-Message": "so it is"})
        elif listing:
            self.list_files(path.rsplit("/", 1)[1])
        else:
            self.send_file(*path.removeprefix(start).split("/", 1))

    do_GET = do_HEAD

    def answer(self, status: int, headers: dict, content: bytes = b""):
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def list_files(self, revision: str):
        hub = self.server
        hub.listed.append(revision)
        siblings = [dict(rfilename=".gitattributes", size=1)]
        for name in hub.names:
            size = (hub.folder / name).stat().st_size
            lfs = dict(size=size, sha256=hub.hashes[name], pointerSize=1)
            siblings.append(dict(rfilename=name, size=size, lfs=lfs))
        commit = "c0ffee" if revision == "main" else revision
        info = dict(id=hub.repository, sha=commit, siblings=siblings, tags=[])
        hub.damage(info)
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def send_file(self, revision: str, name: str):
        content = (self.server.folder / name).read_bytes()
        headers = {"ETag": f'"{self.server.hashes[name]}"', "X-Repo-Commit": revision}
        if self.command == "HEAD" and self.server.xet:
            self.server.xet -= 1
            headers["X-Xet-Hash"] = self.server.hashes[name]
            headers["X-Xet-Refresh-Route"] = f"{self.server.url()}/xet-token"
        if self.command == "GET":
            self.server.downloaded.append((name, revision))
            if name == self.server.fail_at:
                headers["Content-Length"] = len(content)
                content = content[:9]
        self.answer(200, headers, content)


@contextlib.contextmanager
def hub_of(folder: Path, repository: str, monkeypatch):
    """A hub that huggingface_hub takes for huggingface.co; waits are noted and not waited for."""
    from huggingface_hub import constants

    hub = Hub(folder, repository)
    hub.waits = []
    threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url())
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", hub.waits.append)
    yield hub
    hub.shutdown()
    hub.server_close()


def waits(hub: Hub) -> list[float]:
    """The waits of prepare.py among all, which has longer ones than huggingface_hub."""
    return [seconds for seconds in hub.waits if seconds in prepare.WAITS]


def training_tokens(out) -> list[int]:
    return [shard.tokens for shard in shard_files.open_shards(str(out), "train", 64)]


# --------------------------------------------------------------------------------------------------
# fineweb-edu

INPUTS = {
    f"sample/10BT/{i:03d}_00000.parquet": DOCUMENTS[a:b]
    for i, (a, b) in enumerate([(0, 40), (40, 41), (41, 80), (80, 101)])
}
SHARD = 400  # tokens
SMALL = Dataset(shard_tokens=SHARD)


@pytest.fixture
def source(tmp_path):
    """A folder with the parquet files of a small FineWeb-Edu, one of them with blank rows."""
    for name, documents in INPUTS.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "in" / name, [*documents, "", None] if "002" in name else documents)
    return str(tmp_path / "in")


def fineweb(out: Path, source: str = "", data: Dataset = SMALL, workers: int = 2) -> dict:
    """What `prepare.py fineweb-edu` leaves in out."""
    prepare.fineweb_edu(str(out), data, source, workers)
    return listing(out)


def fineweb_error(*arguments, **options) -> str:
    return error_of(fineweb, *arguments, **options)


def shards_of(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.endswith(".npy")}


def expected_shards() -> dict[str, list[int]]:
    """Tokens by name: each input file in shards of its own, the very first is validation."""
    shards = {}
    for i, documents in enumerate(INPUTS.values()):
        tokens = tokens_of(documents)
        for n, start in enumerate(range(0, len(tokens), SHARD)):
            split = "train" if i or n else "val"
            shards[f"edufineweb_{split}_{i:03d}{n:03d}.npy"] = tokens[start : start + SHARD]
    return shards


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_each_file_becomes_shards_for_any_number_of_workers(
    source, tmp_path, workers, capsys, monkeypatch
):
    """The same bytes, those of np.save; in name order all tokens of all documents, in order."""
    monkeypatch.setattr(prepare, "IN_FLIGHT", 500 * workers)
    out = tmp_path / "out"
    files = fineweb(out, source, workers=workers)
    expected = expected_shards()
    assert len(expected) > 10 and sorted(files) == sorted([*expected, "manifest.json"])
    for name, tokens in expected.items():
        content = io.BytesIO()
        np.save(content, np.array(tokens, np.uint16))
        assert files[name] == content.getvalue()
    assert f"val {SHARD:,} tokens" in capsys.readouterr().out
    names = [shard["file"] for shard in read_manifest(out)["shards"]]
    assert names == list(expected) and names[1:] == sorted(names[1:])
    assert [i for name in names for i in np.load(out / name).tolist()] == tokens_of(DOCUMENTS)


def test_the_manifest_names_every_input_file(source, tmp_path):
    out = tmp_path / "out"
    fineweb(out, source)
    manifest = read_manifest(out)
    assert manifest["complete"] is True and manifest["tokenizer"] == "gpt2"
    assert source not in json.dumps(manifest)
    inputs = enumerate(INPUTS.items())
    for entry, (i, (name, documents)) in zip(manifest["sources"], inputs, strict=True):
        raw = (Path(source) / name).read_bytes()
        assert entry == dict(
            name=name,
            revision="",
            bytes=len(raw),
            sha256=hashlib.sha256(raw).hexdigest(),
            documents=len(documents),
            empty=2 if "002" in name else 0,
            tokens=len(tokens_of(documents)),
            shards=[shard for shard in expected_shards() if f"_{i:03d}" in shard],
        )
    for shard in manifest["shards"]:
        assert shard["sha256"] == sha256(out / shard["file"])
        assert shard["documents"] == (np.load(out / shard["file"]) == tokenizer.EOT).sum()
    assert len(shard_files.open_shards(str(out), "val", 64)) == 1


@pytest.mark.parametrize("seed", range(3))
def test_an_interruption_anywhere_changes_no_byte(source, tmp_path, seed):
    """Ended at a random flush or rename, each run resuming from what the one before left."""
    expected, rng = fineweb(tmp_path / "whole", source), np.random.default_rng(seed)
    crashes = 0
    while True:
        try:
            with ended_at(int(rng.integers(0, 24))):
                fineweb(tmp_path / "out", source)
            break
        except Crash:
            crashes += 1
    assert crashes > 8 and listing(tmp_path / "out") == expected


def prepare_process(out: str, source: str, limit: int = 0):
    """What a user starts, in a process of its own; with `limit` no file may have more bytes."""
    with open(out + ".stderr", "w") as f:
        os.dup2(f.fileno(), 2)
        os.dup2(f.fileno(), 1)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run_script(lambda: prepare.fineweb_edu(out, LARGER, source, workers=2))


LARGER = Dataset(shard_tokens=10_000)


@pytest.fixture
def larger(tmp_path):
    """A small input file and eleven of 300 documents: long enough to be killed at."""
    rng = np.random.default_rng(1)
    words = [word for document in DOCUMENTS for word in document.split(" ")]
    (tmp_path / "in").mkdir()
    for i in range(12):
        documents = []
        for _ in range(300 if i else 30):
            chosen = rng.integers(0, len(words), rng.integers(5, 80))
            documents.append(" ".join(words[j] for j in chosen))
        write(tmp_path / "in" / f"{i:03d}.parquet", documents)
    return str(tmp_path / "in")


def test_thirty_kills_change_no_byte(larger, tmp_path):
    """SIGKILL at random moments; a preparation that ends is compared, and another one begun.

    Within 0.3 s, or more where this machine at this hour has nothing done by then.
    """
    rng, kills, whole, halves, longest = np.random.default_rng(0), 0, 0, 0, 0.3
    expected = fineweb(tmp_path / "whole", larger, LARGER)
    while kills < 30 or not whole:
        out = tmp_path / f"out-{whole}"
        process = FORKSERVER.Process(target=prepare_process, args=(str(out), larger))
        process.start()
        process.join(rng.uniform(0.02, longest) if kills < 30 else 60)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            halves += bool(list(out.glob("*.npy")))
            longest *= 1 if halves else 1.2
        else:
            assert process.exitcode == 0 and listing(out) == expected
            whole += 1
    assert halves  # some were killed with work behind them and before them


def test_two_at_once_do_no_harm(larger, tmp_path):
    """The later one is refused, unless the earlier one is done by then."""
    expected, out = fineweb(tmp_path / "whole", larger, LARGER), tmp_path / "out"
    both = [FORKSERVER.Process(target=prepare_process, args=(str(out), larger)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert listing(out) == expected and sorted(p.exitcode for p in both)[0] == 0


def test_a_directory_in_use_is_refused_and_untouched(source, tmp_path, text, monkeypatch):
    """Whatever it is used for; the default text waits for its turn instead."""
    out, text_files = tmp_path / "out", write(tmp_path / "a.jsonl", DOCUMENTS)
    with prepare.writing(str(out)):
        (out / "writing-abc.tmp").mkdir()
        for message in (error((text_files,), str(out)), fineweb_error(out, source)):
            assert f"another prepare.py is writing to {out}; hint: wait for it" in message
        assert os.listdir(out) == ["writing-abc.tmp"]
        text.write_text(PROSE)
        there, lock = threading.Event(), prepare.lock
        monkeypatch.setattr(prepare, "lock", lambda *args: there.set() or lock(*args))
        waiting = threading.Thread(target=prepare.shakespeare, args=(str(out),))
        waiting.start()
        assert there.wait(60)
        time.sleep(0.2)
        assert os.listdir(out) == ["writing-abc.tmp"]
    waiting.join()
    assert "".join(read(out, "train") + read(out, "val")) == PROSE


def test_the_default_text_made_meanwhile_is_not_made_again(tmp_path, text, monkeypatch):
    """A second default run must not replace the shards that the first one trains on."""
    text.write_text(PROSE)
    prepare.shakespeare(str(tmp_path / "out"))
    before = {path: path.stat() for path in (tmp_path / "out").iterdir()}
    is_made_of, answers = prepare.is_made_of, [False]
    monkeypatch.setattr(
        prepare, "is_made_of", lambda *a: answers.pop() if answers else is_made_of(*a)
    )
    prepare.shakespeare(str(tmp_path / "out"))
    assert {path: path.stat() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("damage", ["missing", "", '{"shards": ['])
@pytest.mark.parametrize("done", [False, True])
def test_a_lost_manifest_is_rebuilt_from_the_shards(source, tmp_path, damage, done, capsys):
    """Nothing of what is whole is made again."""
    out, manifest = tmp_path / "out", tmp_path / "out" / "manifest.json"
    expected = fineweb(out, source)
    if not done:  # the last file had only its first shard
        names = [name for name in sorted(expected) if "_003" in name]
        for name in names[1:]:
            (out / name).unlink()
    kept = {name: (out / name).stat().st_mtime_ns for name in shards_of(listing(out))}
    manifest.unlink() if damage == "missing" else manifest.write_text(damage)
    capsys.readouterr()
    assert shards_of(fineweb(out, source)) == shards_of(expected)
    said = capsys.readouterr().out
    assert f"rebuilt, {4 if done else 3} of 4 files are done" in said
    assert ("is missing" in said) == (damage == "missing")
    assert len(training_tokens(out)) == len(training_tokens(fineweb_copy(expected, tmp_path)))
    for name, written in kept.items():
        assert ((out / name).stat().st_mtime_ns == written) == (done or "_003" not in name)
    again = json.loads(manifest.read_text())
    for entry in again["sources"]:
        entry.setdefault("empty", 2 if "002" in entry["name"] else 0)
    assert again == json.loads(expected["manifest.json"])


def fineweb_copy(files: dict[str, bytes], tmp_path: Path) -> Path:
    (tmp_path / "copy").mkdir()
    for name, content in files.items():
        (tmp_path / "copy" / name).write_bytes(content)
    return tmp_path / "copy"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("sources"),
        lambda m: m.pop("commit"),
        lambda m: m.update(sources=[5]),
        lambda m: m.update(sources=[{"shards": ["gone.npy"]}]),
        lambda m: m["sources"][0].pop("bytes"),
        lambda m: m["sources"][0].pop("name"),
        lambda m: m["sources"][0].pop("sha256"),
        lambda m: m["sources"][0].update(bytes=None),
        lambda m: m["sources"][0].update(name=5),
        lambda m: m["sources"][0].update(name="data\nerror: x.parquet"),
        lambda m: m["dataset"].update(of="another version"),
        lambda m: m.update(dataset=5),
    ],
)
def test_a_manifest_of_another_kind_is_named_and_can_be_rebuilt(source, tmp_path, change):
    """As its hint says."""
    out, manifest = tmp_path / "out", tmp_path / "out" / "manifest.json"
    expected = fineweb(out, source)
    content = json.loads(manifest.read_text())
    change(content)
    manifest.write_text(json.dumps(content))
    assert "manifest.json: " in (message := fineweb_error(out, source))
    assert "hint: remove it, and run this again: it is rebuilt from the shards" in message
    manifest.unlink()
    assert shards_of(fineweb(out, source)) == shards_of(expected)


@pytest.mark.parametrize("command", ["files", "fineweb-edu", "shakespeare"])
def test_a_manifest_that_is_a_folder_is_named(source, tmp_path, command, text):
    text.write_text(PROSE)
    out = tmp_path / "out"
    (out / "manifest.json").mkdir(parents=True)
    if command == "files":
        message = error((str(text),), str(out))
    elif command == "fineweb-edu":
        message = fineweb_error(out, source)
    else:
        message = error_of(prepare.shakespeare, str(out))
    assert "manifest.json" in message or "Is a directory" in message


@pytest.mark.parametrize("other", ["text", "count", "nothing whole"])
def test_shards_of_something_else_are_not_taken_for_a_lost_data_set(source, tmp_path, other):
    """Other people's shards have the same names: build-nanogpt's, of one long numbering."""
    whole, out = fineweb(tmp_path / "whole", source), tmp_path / "out"
    names = sorted((name for name in whole if "_000" in name[:-7]), key=lambda name: name[-10:])
    fineweb_copy({name: whole[name] for name in names}, tmp_path).rename(out)
    first, last = np.load(out / names[0]), np.load(out / names[-1])
    if other == "text":
        first[1:5] = 0
        np.save(out / names[0], first)
    elif other == "count":
        np.save(out / names[-1], np.append(last[1:], np.uint16(tokenizer.EOT)))
    else:
        (out / names[-1]).unlink()
    before = listing(out)
    message = fineweb_error(out, source)
    expected = "already holds" if other == "nothing whole" else "not those of sample/10BT/000"
    assert expected in message and listing(out) == before


def test_a_full_disk_is_reported_and_what_is_done_stays_done(larger, tmp_path):
    """As far as a limit on the size of files goes: the first file's shard fits, a full one not."""
    out, expected = tmp_path / "out", fineweb(tmp_path / "whole", larger, LARGER)
    process = FORKSERVER.Process(target=prepare_process, args=(str(out), larger, 15_000))
    process.start()
    process.join(60)
    (message,) = (tmp_path / "out.stderr").read_text().splitlines()
    assert (
        process.exitcode == 2
        and "out: File too large; hint: --out elsewhere, or make room" in message
    )
    (name,) = shards_of(listing(out))
    assert [shard["file"] for shard in read_manifest(out)["shards"]] == [name]
    written = (out / name).stat().st_mtime_ns
    assert fineweb(out, larger, LARGER) == expected
    assert (out / name).stat().st_mtime_ns == written


def cut_file(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_column(path: Path):
    write(path, ["text"], "body")


def not_utf8(path: Path):
    binary_column(path, [b"fine", b"caf\xe9"])


def no_text(path: Path):
    binary_column(path, [b"bytes"], as_text=False)


def empty_file(path: Path):
    path.write_bytes(b"")


def binary_column(path: Path, values: list[bytes], as_text: bool = True):
    """A column of these bytes, which as text need not be UTF-8: pyarrow does not check them."""
    import pyarrow
    import pyarrow.parquet

    array = pyarrow.array(values, pyarrow.binary())
    if as_text:
        array = pyarrow.Array.from_buffers(pyarrow.string(), len(array), array.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": array}), path)


@pytest.mark.parametrize(
    "damage, expected",
    [
        (cut_file, ": ArrowInvalid"),
        (without_column, ": no field 'text'; hint: --text_field"),
        (not_utf8, ", row 2: not UTF-8"),
        (no_text, "'text' is bytes"),
        (empty_file, ": ArrowInvalid"),
    ],
)
def test_a_bad_input_file_is_named_and_what_is_done_stays_done(source, tmp_path, damage, expected):
    whole, out = fineweb(tmp_path / "whole", source), tmp_path / "out"
    path = Path(source) / list(INPUTS)[2]
    good = path.read_bytes()
    damage(path)
    message = fineweb_error(out, source)
    assert f"{path}" in message and expected in message
    names = [f"_{i:03d}" for i in range(2)]
    done = {k: v for k, v in shards_of(whole).items() if any(name in k for name in names)}
    assert shards_of(listing(out)) == done
    assert len(training_tokens(out)) > 2  # training could start
    written = {name: (out / name).stat().st_mtime_ns for name in done}
    path.write_bytes(good)
    assert fineweb(out, source) == whole
    assert written == {name: (out / name).stat().st_mtime_ns for name in done}


def test_settings_that_made_no_shard_may_be_corrected(source, tmp_path):
    """A wrong field leaves a manifest without shards, which must not bind the next try."""
    out = tmp_path / "out"
    wrong = dataclasses.replace(SMALL, text_field="txet")
    message = fineweb_error(out, source, wrong)
    assert "no field 'txet'" in message
    assert shards_of(listing(out)) == {}
    assert fineweb(out, source) == fineweb(tmp_path / "whole", source)


def test_again_after_the_end_does_nothing_and_mends_what_was_damaged(source, tmp_path):
    """Only the input files whose shards are not whole are read again."""
    out = tmp_path / "out"
    expected = fineweb(out, source)
    written = {name: (out / name).stat().st_mtime_ns for name in expected}
    assert fineweb(out, source) == expected
    assert written == {name: (out / name).stat().st_mtime_ns for name in expected}
    (out / "edufineweb_train_002001.npy").write_bytes(b"half")
    manifest = json.loads(expected["manifest.json"])
    del manifest["shards"][-1]["documents"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert fineweb(out, source) == expected
    for name in shards_of(expected):
        redone = "_002" in name or "_003" in name
        assert ((out / name).stat().st_mtime_ns != written[name]) == redone


def test_other_settings_or_files_are_refused(source, tmp_path):
    out = tmp_path / "out"
    expected = fineweb(out, source)
    for options, message in (
        (dict(shard_tokens=500), "shard_tokens 400, now 500"),
        (dict(sample="100BT"), "sample '10BT', now '100BT'"),
        (dict(text_field="id"), "text_field 'text', now 'id'"),
        (dict(name="x"), "name 'edufineweb', now 'x'"),
    ):
        options = dict(shard_tokens=SHARD) | options
        assert message in fineweb_error(out, source, Dataset(**options))
    more = Path(write(Path(source) / "sample" / "10BT" / "009_00000.parquet", ["more"]))
    assert "files [" in fineweb_error(out, source)
    more.unlink()
    name = list(INPUTS)[1]
    before = (Path(source) / name).stat().st_size
    path = Path(source) / name
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"x")
    assert f"{name}, SHA-256 '" in fineweb_error(out, source)
    path.write_bytes(good)
    assert fineweb(out, source) == expected
    path = Path(write(Path(source) / name, ["another text"]))
    assert f"{name} {before}, now {path.stat().st_size}" in fineweb_error(out, source)
    path.unlink()
    assert f"{name} {before}, now None" in fineweb_error(out, source)
    assert listing(out) == expected
    assert "no .parquet files" in fineweb_error(tmp_path / "new", str(out))
    assert "name 'train' must" in fineweb_error(tmp_path / "new", source, Dataset(name="train"))
    assert not (tmp_path / "new").exists()


def test_the_last_shard_of_a_file_may_be_shorter_than_a_window(source, tmp_path):
    """It is left out; an error only where the manifest does not list it, or no other is there."""
    fineweb(tmp_path / "out", source)
    sizes = [len(tokens) for name, tokens in expected_shards().items() if "train" in name]
    assert min(sizes) < 64
    assert training_tokens(tmp_path / "out") == [size for size in sizes if size > 64]
    with pytest.raises(UserError, match="400 tokens, fewer than a window of T \\+ 1 = 401"):
        shard_files.open_shards(str(tmp_path / "out"), "val", 400)


def test_too_few_tokens_to_train_on(tmp_path):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.parquet", DOCUMENTS)
    file = str(tmp_path / "in" / "a.parquet")
    assert "a.parquet is a file" in error_of(prepare.fineweb_edu, file, SMALL, str(tmp_path / "in"))
    message = fineweb_error(tmp_path / "out", str(tmp_path / "in"), Dataset(shard_tokens=10**6))
    assert "are for validation, so none to train on" in message


def test_a_file_with_too_many_shards(tmp_path, monkeypatch):
    """More than 1,000 would have names that are not in order."""
    monkeypatch.setattr(os, "fsync", id)
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.parquet", DOCUMENTS)
    message = fineweb_error(tmp_path / "out", str(tmp_path / "in"), Dataset(shard_tokens=2))
    assert "a.parquet makes more than 1,000 shards of 2 tokens" in message


def test_other_shards_are_never_overwritten(source, tmp_path):
    out = tmp_path / "out"
    prepare.files((write(tmp_path / "a.jsonl", DOCUMENTS),), str(out))
    before = listing(out)
    assert "already holds" in fineweb_error(out, source) and listing(out) == before


@pytest.fixture
def edu_hub(source, monkeypatch):
    with hub_of(Path(source), prepare.FINEWEB_EDU, monkeypatch) as hub:
        yield hub


def test_the_hub_gives_the_same_shards_as_the_files(edu_hub, source, tmp_path, monkeypatch):
    expected, commit = fineweb(tmp_path / "whole", source), prepare.FINEWEB_COMMIT
    files = fineweb(tmp_path / "out")
    assert files.keys() == expected.keys() and shards_of(files) == shards_of(expected)
    assert edu_hub.listed == [commit]
    assert edu_hub.downloaded == [(name, commit) for name in INPUTS]
    manifest = read_manifest(tmp_path / "out")
    assert {s["revision"] for s in manifest["sources"]} == {manifest["commit"]} == {commit}
    assert fineweb(tmp_path / "out") == files and len(edu_hub.listed) == 1  # without the network
    assert "revision ''" in fineweb_error(tmp_path / "out", data=Dataset("10BT", revision="abc"))
    monkeypatch.setattr(edu_hub, "repository", "a/b")
    data = Dataset(dataset="a/b", config="sample-10BT", shard_tokens=SHARD)
    fineweb(tmp_path / "today", data=data)
    assert read_manifest(tmp_path / "today")["commit"] == "c0ffee"  # today's, named
    message = fineweb_error(tmp_path / "none", data=Dataset(dataset="a/b", config="none"))
    assert "no .parquet files in a/b, folder 'none'" in message


def test_a_download_that_fails_half_way_resumes_there(edu_hub, source, tmp_path):
    """A damaged file is fetched again; those before it are not."""
    expected, name = fineweb(tmp_path / "whole", source), list(INPUTS)[1]
    good = (Path(source) / name).read_bytes()
    (Path(source) / name).write_bytes(good[:-1] + b"x")
    message = fineweb_error(tmp_path / "out")
    assert name in message and "its SHA-256 is" in message
    (Path(source) / name).write_bytes(good)
    del edu_hub.downloaded[:]
    edu_hub.fail_at = list(INPUTS)[2]
    assert "RemoteProtocolError" in (message := fineweb_error(tmp_path / "out"))
    assert "hint: check the network, then run this again" in message
    assert waits(edu_hub) == list(prepare.WAITS)
    edu_hub.fail_at = None
    assert shards_of(fineweb(tmp_path / "out")) == shards_of(expected)
    names = list(INPUTS)
    assert sorted({n for n, _ in edu_hub.downloaded}) == names[1:]
    assert [n for n, _ in edu_hub.downloaded[-2:]] == names[2:]


@pytest.mark.parametrize("fault", ["drop", (503, ""), (429, ""), (504, "")])
def test_a_temporary_error_is_waited_out(edu_hub, source, tmp_path, fault, capsys):
    """Also beyond the seconds for which huggingface_hub retries by itself."""
    edu_hub.faults = [fault] * 3 + [None] + [fault] * 5  # at the list, and at the first file
    assert fineweb(tmp_path / "out").keys() == fineweb(tmp_path / "whole", source).keys()
    assert edu_hub.faults == [] and waits(edu_hub)[0] == prepare.WAITS[0]
    lines = [line for line in capsys.readouterr().out.splitlines() if "waiting for" in line]
    assert len(lines) == len(waits(edu_hub)) and f"for 5 s (1 of {len(prepare.WAITS)})" in lines[0]


def test_a_hub_that_stays_away_is_given_up(edu_hub, tmp_path):
    """After a quarter of an hour; nothing listens there."""
    edu_hub.shutdown()
    edu_hub.server_close()
    message = fineweb_error(tmp_path / "out")
    assert "ConnectError" in message and "hint: check the network" in message
    assert waits(edu_hub) == list(prepare.WAITS) and 800 < sum(prepare.WAITS) < 1000


@pytest.mark.parametrize(
    "fault, expected",
    [
        ((401, "RepoNotFound"), "check the name (--dataset OWNER/NAME); a private data set needs"),
        ((401, ""), "`hf auth login`"),
        ((403, "GatedRepo"), "accept its terms at https://huggingface.co/datasets/Hugg"),
        ((403, ""), "`hf auth login`"),
        ((404, "RepoNotFound"), "check the name"),
        ((404, "RevisionNotFound"), "--revision"),
    ],
)
def test_a_refusal_is_not_waited_for_and_its_hint_helps(edu_hub, tmp_path, fault, expected):
    for earlier in ([], [None]):  # at the list of files, and at the first of them
        edu_hub.faults = [*earlier, fault]
        message = fineweb_error(tmp_path / "out")
        assert expected in message.partition("hint: ")[2] and waits(edu_hub) == []


@pytest.mark.parametrize(
    "changes",
    [
        dict(rfilename=5),
        dict(rfilename=None),
        dict(rfilename="data/a\nerror: x.parquet"),
        dict(size="x"),
        dict(size=float("inf")),
        dict(lfs=dict(sha256=5, size=1, pointerSize=1)),
    ],
)
def test_a_list_that_no_hub_gives_is_refused(edu_hub, tmp_path, changes):
    edu_hub.damage = lambda info: info["siblings"][-1].update(changes)
    message = fineweb_error(tmp_path / "out")
    assert "lists a file that cannot be used" in message and "hint:" in message
    assert "\n" not in message
    other = dict(rfilename="notes/read\nme.txt", size=3)  # no input, whatever its name
    edu_hub.damage = lambda info: info["siblings"].append(other)
    fineweb(tmp_path / "whole")
    edu_hub.damage = lambda info: info.update(siblings=None)
    assert "no .parquet files" in fineweb_error(tmp_path / "out")


def test_the_offline_switch_of_the_hub_is_named(edu_hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hint = fineweb_error(tmp_path / "out").partition("hint: ")[2]
    assert "unset HF_HUB_OFFLINE" in hint and edu_hub.requests == 0 and waits(edu_hub) == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hint = fineweb_error(tmp_path / "out", data=Dataset(dataset="a/b/c")).partition("hint: ")[2]
    assert "--dataset OWNER/NAME" in hint and edu_hub.requests == 0


def test_a_store_of_xet_that_is_away_is_waited_for(edu_hub, source, tmp_path, monkeypatch):
    """The hub answers, the store of the content does not: hf_xet raises RuntimeError."""
    pytest.importorskip("hf_xet")
    for name, value in dict(MAX_ATTEMPTS="1", BASE_DELAY="10ms", MAX_DURATION="1s").items():
        monkeypatch.setenv(f"HF_XET_CLIENT_RETRY_{name}", value)
    edu_hub.xet = 2
    assert fineweb(tmp_path / "out").keys() == fineweb(tmp_path / "whole", source).keys()
    assert waits(edu_hub) == list(prepare.WAITS[:2]) and edu_hub.xet == 0


def test_full_disks_are_not_waited_for():
    """As Python and as hf_xet say it."""
    assert not prepare.is_temporary(OSError(28, "No space left on device"))
    assert not prepare.is_temporary(
        RuntimeError("Task error: No space left on device (os error 28)")
    )


def test_nothing_waits_for_a_download_that_nobody_needs_any_more():
    """After an error in the file before, or Ctrl-C: it may be waiting for the hub."""
    code = "import prepare, threading; prepare.in_background(threading.Event().wait); exit(3)"
    assert run("-c", code, timeout=30).returncode == 3


def test_which_files_are_taken():
    def names(folder, *listed):
        listed = [dict(name=name, bytes=1, sha256=None) for name in listed]
        return [f["name"] for f in prepare.pick(listed, folder, "a/b")]

    def refusal(folder, *listed):
        return error_of(names, folder, *listed)

    a, b, c = "sample/10BT/a.parquet", "sample/10BT/b.parquet", "sample/100BT/c.parquet"
    listed = (b, a, c, "sample/10BT/x.json")
    assert names("sample/10BT", *listed) == names("sample-10BT", *listed) == [a, b]
    assert "no .parquet files in a/b, folder 'data'" in refusal("data", *listed)
    assert names("", "x.PARQUET", "constraints-0.parquet") == ["constraints-0.parquet", "x.PARQUET"]
    for train, *others in (
        ("data/train-0.parquet", "data/validation-0.parquet", "data/test-0.parquet"),
        ("default/train/0.parquet", "default/test/0.parquet", "default/validation/0.parquet"),
        ("train_sft.parquet", "other.parquet", "constraints.parquet"),
        ("0000.parquet", "test.parquet", "dev.parquet"),
        ("test/train-0.parquet", "train/test-0.parquet"),
    ):
        assert names("", *others, train) == [train]
    assert "has the splits test, validation, but no train" in refusal(
        "", "x/test-0.parquet", "x/val-0.parquet"
    )
    two = ("wikitext-103/train-0.parquet", "wikitext-2/train/0.parquet")
    message = refusal("", *two)
    assert "in several folders, wikitext-103, wikitext-2, which may hold the same text" in message
    assert names("wikitext-2", *two) == [two[1]] and names(".", *two) == list(two)


def test_a_folder_is_read_as_a_repository_is(tmp_path, monkeypatch):
    """The same splits, hence the same shards; and its manifest claims no data set of the hub."""
    for split in ("train", "test", "validation"):
        (tmp_path / "in" / "default" / split).mkdir(parents=True)
        documents = [f"{split} {i} " + "lorem ipsum " * 20 for i in range(20)]
        write(tmp_path / "in" / "default" / split / "0000.parquet", documents)
    data = Dataset(shard_tokens=SHARD)
    files = fineweb(tmp_path / "out", str(tmp_path / "in"), data)
    manifest = read_manifest(tmp_path / "out")
    tokens = np.concatenate([np.load(tmp_path / "out" / s["file"]) for s in manifest["shards"]])
    text = tokenizer.gpt2().decode(tokens.tolist())
    assert text.count("train") == 20 and "test" not in text and "validation" not in text
    assert manifest["dataset"]["dataset"] == "" and "HuggingFaceFW" not in json.dumps(manifest)
    assert fineweb(tmp_path / "out", str(tmp_path / "in"), data) == files
    with hub_of(tmp_path / "in", "a/b", monkeypatch):
        data = Dataset(dataset="a/b", shard_tokens=SHARD)
        assert shards_of(fineweb(tmp_path / "hub", data=data)) == shards_of(files)
    assert read_manifest(tmp_path / "hub")["dataset"]["dataset"] == "a/b"


# --------------------------------------------------------------------------------------------------
# shakespeare


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A path in place of data/input.txt."""
    monkeypatch.setattr(prepare, "INPUT", tmp_path / "input.txt")
    return tmp_path / "input.txt"


def test_the_committed_text():
    """Its hash, on which the figures of the default run rest."""
    digest = "c2f7679dc7817ffaf3226392ac81f843440fd6432c6aea0dd2f820413933cd91"
    assert sha256(prepare.INPUT) == digest
    assert prepare.INPUT.read_text().startswith("First Citizen:\n")


def test_shards_of_the_text_are_made_once(text, tmp_path, capsys):
    """Nothing is written, read or said when they are those of the text already."""
    text.write_text("".join(f"SPEAKER {i}:\nSome words.\nAnd more.\n\n" for i in range(500)))
    out = tmp_path / "out"
    prepare.shakespeare(str(out))
    (train,), (val,) = read(out, "train"), read(out, "val")
    assert train + val == text.read_text() and val.startswith("SPEAKER ") and train.endswith("\n\n")
    assert 0.1 <= len(val) / len(train + val) < 0.11
    assert capsys.readouterr().out.count("\n") == 1
    names = ["manifest.json", "shakespeare_train_000000.npy", "shakespeare_val_000000.npy"]
    assert sorted(listing(out)) == names
    (source,) = read_manifest(out)["sources"]
    assert source["sha256"] == sha256(text)
    before = [(out / name).stat() for name in names]
    prepare.shakespeare(str(out))
    assert [(out / name).stat().st_mtime_ns for name in names] == [s.st_mtime_ns for s in before]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("change", ["another text", "killed", "damaged", "no manifest"])
def test_shards_of_another_text_or_damaged_ones_are_replaced(text, tmp_path, change, capsys):
    out = tmp_path / "out"
    text.write_text("a\nb\nc\n" * 100)
    prepare.shakespeare(str(out))
    if change == "another text":
        text.write_text("x\ny\nz\n" * 90)
    elif change == "killed":  # just before the last move
        (out / "manifest.json").unlink()
    elif change == "no manifest":
        (out / "manifest.json").write_text("{")
    else:
        (out / "shakespeare_val_000000.npy").write_bytes(b"half")
    capsys.readouterr()
    prepare.shakespeare(str(out))
    assert "".join(read(out, "train") + read(out, "val")) == text.read_text()
    said = capsys.readouterr().out
    assert f"made again, of {text} as it is now: train " in said or change == "killed"


def test_shards_of_something_else_are_kept(text, tmp_path):
    out = tmp_path / "out"
    text.write_text("a\nb\nc\n" * 100)
    prepare.files((str(text),), str(out))
    before = listing(out)
    assert "docs_train_000000.npy" in error_of(prepare.shakespeare, str(out))
    assert listing(out) == before


@pytest.mark.parametrize("raw", [b"", b"1", b"caf\xe9\n" * 100])
def test_a_text_that_cannot_be_used(text, tmp_path, raw):
    text.write_bytes(raw)
    assert "input.txt: " in error_of(prepare.shakespeare, str(tmp_path / "out"))
    assert listing(tmp_path) == {"input.txt": raw}


def test_a_missing_text(text, tmp_path):
    message = error_of(prepare.shakespeare, str(tmp_path / "out"))
    assert "input.txt is missing; hint: git checkout data/input.txt" in message
