"""Documents from files: any size, any source; each byte comes back, memory is bounded.

python -m pytest tests/test_documents.py
"""

import gzip
import json
import os
import sys
from pathlib import Path

import pytest
from conftest import run
from test_prepare import error, listing, read, read_all, read_manifest, text, write

import documents
import prepare
import tokenizer

__all__ = ["text"]  # a fixture
MARK = "\ufeff"  # byte order mark
PARAGRAPHS = "\n\n".join(
    f"Paragraph {i}, naïve {'👩‍👩‍👧 ' * (i % 4)}日本語\r\n and" + " more" * (i % 37)
    for i in range(900)
)


def shards(out: Path) -> dict[str, bytes]:
    return {name: raw for name, raw in listing(out).items() if name.endswith(".npy")}


# --------------------------------------------------------------------------------------------------
# which files


def test_folders_and_patterns_mean_their_files_in_name_order(tmp_path):
    folder = tmp_path / "in"
    for name in ("b.txt", "a/z.TXT", "a/c.txt", ".hidden/d.txt", "a/.e.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, [f"{name} " * 50])
    (folder / "notes.md").write_text("not a document")
    inside = [str(folder / name) for name in ("a/c.txt", "a/z.TXT", "b.txt")]
    assert documents.find_files((str(folder),)) == inside
    assert documents.find_files((f"{folder}/*.txt", f"{folder}/a")) == [inside[2], *inside[:2]]
    assert documents.find_files((f"{folder}/**/*.txt",)) == inside[:1] + inside[2:]
    prepare.files((str(folder),), str(tmp_path / "out"), val_share=0.3)
    names = [source["name"] for source in read_manifest(tmp_path / "out")["sources"]]
    assert names == ["c.txt", "z.TXT", "b.txt"]
    assert f"{inside[2]}: given twice" in error((str(folder), inside[2]), str(tmp_path / "two"))


def test_a_pattern_that_is_a_file_is_that_file(tmp_path):
    path = write(tmp_path / "a[b].txt", ["text"])
    assert documents.find_files((path,)) == [path]


def test_what_is_no_input_file_is_named_as_what_it_is(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    for name, problem in {
        "folder": "no file with an ending of .txt",
        "pipe.txt": "a pipe or a device",
        "gone.txt": "no such file",
        "*.jsonl": "no file matches",
    }.items():
        message = error((str(tmp_path / name),), str(tmp_path / "out"))
        assert f"{name}: {problem}" in message
        assert ("no such file" in message) == (name == "gone.txt")


# --------------------------------------------------------------------------------------------------
# reading


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.txt.gz", "a.jsonl", "a.jsonl.gz"])
def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path, name):
    """Nor is one that stands elsewhere taken out."""
    texts = [PARAGRAPHS[:900] + MARK + "end"]
    raw = f"{MARK}{texts[0]}"
    if ".jsonl" in name:
        raw = "".join(f"{MARK}{json.dumps({'text': t})}\n" for t in (*texts, "more " * 99))
    path = tmp_path / name
    path.write_bytes(gzip.compress(raw.encode()) if name.endswith(".gz") else raw.encode())
    prepare.files((str(path),), str(tmp_path / "out"), val_share=0.1)
    assert "".join(read_all(tmp_path / "out")).count(MARK) == 1
    assert sorted("".join(read_all(tmp_path / "out"))) == sorted(
        texts[0] + "more " * 99 * (".jsonl" in name)
    )


def test_the_default_text_may_have_a_mark(text, tmp_path):
    text.write_bytes((MARK + PARAGRAPHS).encode())
    prepare.shakespeare(str(tmp_path / "out"))
    assert "".join(read(tmp_path / "out", "train") + read(tmp_path / "out", "val")) == PARAGRAPHS


@pytest.mark.parametrize("chunk", [3, 4, 1000])
def test_a_byte_that_is_not_utf8_is_named_wherever_it_stands(tmp_path, chunk, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK", chunk)
    for start in (MARK, ""):
        raw = (start + "naïve 👩 ").encode()
        (tmp_path / "a.txt").write_bytes(raw + b"caf\xe9 x")
        message = error((str(tmp_path / "a.txt"),), str(tmp_path / "out"))
        assert f"a.txt: not UTF-8: invalid continuation byte at byte {len(raw) + 3};" in message
    (tmp_path / "a.txt").write_text("text", encoding="utf-16")
    assert "UTF-16: iconv" in error((str(tmp_path / "a.txt"),), str(tmp_path / "out"))


def test_end_of_text_marks_are_ordinary_text_and_reported(tmp_path, capsys, monkeypatch, text):
    """Of .txt files, where people separate documents with them; also across two chunks."""
    monkeypatch.setattr(documents, "CHUNK", 7)
    texts = "\n<|endoftext|>\n".join(f"text {i}" for i in range(20))
    path = write(tmp_path / "a.txt", [texts])
    prepare.files((path,), str(tmp_path / "out"), val_share=0.1)
    assert "".join(read(tmp_path / "out", "train") + read(tmp_path / "out", "val")) == texts
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("<|endoftext|> stands 19 times") and "hint:" in line
    assert read_manifest(tmp_path / "out")["sources"][0]["end_of_text"] == 19
    text.write_text(texts)
    prepare.shakespeare(str(tmp_path / "default"))
    assert "<|endoftext|> stands 19 times" in capsys.readouterr().out
    prepare.files((write(tmp_path / "b.jsonl", [texts, texts]),), str(tmp_path / "jsonl"))
    assert "endoftext" not in capsys.readouterr().out


def test_half_a_surrogate_pair_is_replaced_and_reported(tmp_path, capsys):
    """A single broken emoji in the last line must not cost the hours before it."""
    lines = [json.dumps({"text": PARAGRAPHS}), '{"text": "half \\ud83d, whole \\ud83d\\ude00"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prepare.files((str(tmp_path / "a.jsonl"),), str(tmp_path / "out"))
    assert "half \ufffd, whole \U0001f600" in read_all(tmp_path / "out")
    assert "documents with half a surrogate pair, now U+FFFD: 1" in capsys.readouterr().out


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_a_wrong_field_is_answered_with_those_there_are(tmp_path, ending):
    path = write(tmp_path / f"a{ending}", ["one", "two"], "body")
    message = error((path,), str(tmp_path / "out"))
    assert "no field 'text'; hint: --text_field, one of 'id', 'body'" in message
    message = error((path,), str(tmp_path / "out"), text_field="id")
    assert " 1: field 'id' is int, not text; hint: --text_field, one of 'id'" in message


def test_field_names_cannot_forge_output(tmp_path):
    path = write(tmp_path / "a.jsonl", ["one", "two"], "x\nerror: \x1b[2J" + "y" * 999)
    message = error((path,), str(tmp_path / "out"))
    assert "one of 'id', 'x\\nerror: \\x1b[2Jyy" in message and len(message) < 500


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_the_text_may_be_a_field_of_a_field(tmp_path, ending):
    path, rows = (
        tmp_path / f"a{ending}",
        [{"meta": {"n": i, "text": d}} for i, d in enumerate("ab")],
    )
    rows.append({"meta": None})
    if ending == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    message = error((str(path),), str(tmp_path / "out"), text_field="meta")
    assert "is dict, not text; hint: --text_field, one of 'meta.n', 'meta.text'" in message
    assert "no field 'x'; hint: --text_field, one of 'n', 'text'" in error(
        (str(path),), str(tmp_path / "out"), text_field="meta.x"
    )
    prepare.files((str(path),), str(tmp_path / "out"), text_field="meta.text", val_share=0.5)
    assert sorted(read_all(tmp_path / "out")) == ["a", "b"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.parquet"])
def test_a_pointer_of_git_lfs_is_no_text(tmp_path, name):
    """Above all no .txt to train on."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    (tmp_path / name).write_text(pointer)
    message = error((str(tmp_path / name),), str(tmp_path / "out"))
    assert f"{name}: a pointer of git-lfs" in message and "hint: git lfs pull" in message


# --------------------------------------------------------------------------------------------------
# any size


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("val_share", [0.02, 0.1, 0.5])
def test_a_text_too_long_for_memory_has_the_shards_of_the_whole(
    tmp_path, monkeypatch, name, val_share
):
    path = write(tmp_path / name, [PARAGRAPHS])
    other = write(tmp_path / "b.txt", ["A note before it.\n" * 9])
    prepare.files((other, path), str(tmp_path / "whole"), val_share)
    monkeypatch.setattr(documents, "BLOCK", 5000)
    monkeypatch.setattr(documents, "CHUNK", 1500)
    prepare.files((other, path), str(tmp_path / "pieces"), val_share)
    assert shards(tmp_path / "pieces") == shards(tmp_path / "whole")
    assert read_manifest(tmp_path / "pieces") == read_manifest(tmp_path / "whole")
    (train,) = [t for t in read(tmp_path / "pieces", "train") if t.startswith("Paragraph 0,")]
    val = read(tmp_path / "pieces", "val")[-1]
    assert train + val == PARAGRAPHS


def test_a_long_default_text_has_the_shards_of_the_whole(tmp_path, monkeypatch, text):
    text.write_text(PARAGRAPHS, newline="")
    prepare.shakespeare(str(tmp_path / "whole"))
    monkeypatch.setattr(documents, "BLOCK", 5000)
    prepare.shakespeare(str(tmp_path / "pieces"))
    assert shards(tmp_path / "pieces") == shards(tmp_path / "whole")


def test_words_without_end_come_back_whole(tmp_path, monkeypatch):
    """They are cut somewhere, because tiktoken needs a hundred times their size."""
    monkeypatch.setattr(documents, "CHUNK", 1000)
    monkeypatch.setattr(documents, "LONGEST_WORD", 1000)
    texts = ["acgt" * 5000, "日本" * 4000, "x" * 999 + " y"]
    pieces = [list(documents.pieces(text)) for text in texts]
    assert ["".join(p) for p in pieces] == texts
    assert max(len(piece) for p in pieces for piece in p) <= 2000
    prepare.files((write(tmp_path / "a.jsonl", texts),), str(tmp_path / "out"), val_share=0.5)
    assert sorted("".join(read_all(tmp_path / "out"))) == sorted("".join(texts))


def test_pieces_have_the_tokens_of_the_whole(monkeypatch):
    monkeypatch.setattr(documents, "CHUNK", 1500)
    tokens = [i for p in documents.pieces(PARAGRAPHS) for i in tokenizer.encode(p, False).tolist()]
    assert tokens == tokenizer.gpt2().encode_ordinary(PARAGRAPHS)


PEAK = r"""
import re, sys, documents
from pathlib import Path
from tqdm import tqdm

def peak():  # ru_maxrss would begin with the parent's
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) // 1024

before = peak()
source = dict(name="", empty=0, documents=0)
texts = documents.read_documents(sys.argv[1], "text", source, tqdm(disable=True))
try:
    labelled = documents.split_documents(((source, text) for text in texts), 0.02, "")
    print(sum(len(piece) for _, text in labelled for piece in documents.pieces(text)))
except documents.UserError as e:
    print(e)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """48 MB of text, 48 MB in one line of .jsonl, 512 rows of the same 2 MB: all small files."""
    import pyarrow
    import pyarrow.parquet

    block = "".join(f"{i} some words and more\n" for i in range(40_000)) + "\U0001f600\n"
    (tmp_path / "big.txt.gz").write_bytes(gzip.compress(block.encode(), 1) * 48)
    line = gzip.compress(b"x" * (1 << 20))
    (tmp_path / "line.jsonl.gz").write_bytes(gzip.compress(b'{"text": "') + line * 48)
    rows = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 512), [" " * (1 << 21)])
    table = pyarrow.table({"text": rows})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", store_schema=False)
    for name, expected in {
        "big.txt.gz": str(48 * len(block)),
        "line.jsonl.gz": "line.jsonl.gz: ValueError: line 1 has more than 32 MB; hint:",
        "rows.parquet": ": no documents but empty ones; hint:",
    }.items():
        found, growth = run("-c", PEAK, tmp_path / name).stdout.splitlines()
        assert expected in found and int(growth) < 120, growth


def test_a_file_too_large_for_memory_is_named(tmp_path, monkeypatch):
    """pyarrow's error, which is a MemoryError."""
    import pyarrow

    def out_of_memory(*_):
        raise pyarrow.ArrowMemoryError("malloc of size 4294967296 failed")

    monkeypatch.setattr(documents, "read_items", out_of_memory)
    message = error((write(tmp_path / "a.parquet", ["text"]),), str(tmp_path / "out"))
    assert "a.parquet: ArrowMemoryError: malloc of size 4294967296 failed; hint:" in message


def test_long_documents_that_are_always_missed_are_cut(monkeypatch):
    """One in fifty has nearly all of the text, and is never the one that becomes validation."""
    monkeypatch.setattr(documents, "BLOCK", 8000)

    def split(texts):
        labelled = ((dict(name="a"), document) for document in texts)
        return [(label[1], part) for label, part in documents.split_documents(labelled, 0.02, "")]

    alike = [i for i, (side, _) in enumerate(split(["word"] * 30_000)) if side == "val"]
    assert len(alike) == 600
    texts = ["word"] * 30_000
    for i in alike:
        texts[i + 1 if i % 50 < 49 else i - 1] = "word " * 400
    parts = split(texts)
    assert "".join(part for _, part in parts) == "".join(texts)
    val = sum(len(part) for side, part in parts if side == "val")
    assert 0.01 <= val / len("".join(texts)) < 0.03


def test_a_text_that_is_gone_when_it_is_needed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK", 100)
    path = write(tmp_path / "a.txt", [PARAGRAPHS])
    source = prepare.new_source("a", path)
    (long,) = documents.read_documents(path, "", source, prepare.progress(0))
    os.remove(path)
    with pytest.raises(documents.UserError, match="a.txt: FileNotFoundError.*hint:"):
        list(documents.pieces(long))
