"""Documents of any size from files: .txt, .jsonl (both also .gz), .parquet; train and validation.

A .txt file is one document; so is each line of a .jsonl and each row of a .parquet. They are read
as a stream: memory holds a block of documents. A .txt longer than a block becomes a LongText.
"""

import codecs
import collections
import glob
import gzip
import itertools
import json
import os
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

import tokenizer
from runtime.command_line import UserError, one_line
from runtime.files import sha256

ENDINGS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
BLOCK = 1 << 24  # characters of documents that are split into train and validation together
CHUNK = 1 << 20  # bytes of a .txt that are read together, characters that are cut together
LONGEST_LINE = 1 << 25  # bytes in a line of a .jsonl
LONGEST_WORD = 1 << 20  # characters; a longer word is cut anywhere
END_OF_TEXT = "<|endoftext|>"  # ordinary text in a document
LFS_POINTER = b"version https://git-lfs"
READ_ERRORS = (OSError, EOFError, ValueError, zlib.error)
READ_ERRORS += (RecursionError, NotImplementedError, MemoryError)

# --------------------------------------------------------------------------------------------------
# which files


def find_files(paths: tuple[str, ...]) -> list[str]:
    """Replace folders and patterns by their files, in name order; what matches nothing stays.

    A folder is searched recursively for files with one of ENDINGS. Patterns like '*.txt' arrive
    here when they are quoted, and from the shells of Windows.
    """
    files = []
    for path in paths:
        matches = [] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        for match in matches or [path]:
            below = files_below(match) if os.path.isdir(match) else []
            if below:
                files += below
            else:  # a file, or for wrong_files() to report
                files.append(match)
    return files


def files_below(folder: str) -> list[str]:
    """Return the files in and below a folder that hold documents, in name order; none hidden."""
    files = []
    for path in sorted(Path(folder).rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.name.lower().endswith(ENDINGS) and path.is_file() and not hidden:
            files.append(str(path))
    return files


def wrong_files(files: list[str]) -> list[str]:
    """List what is wrong with the names of input files."""
    if not files:
        return ["no input files; hint: python prepare.py files FILE... --out DIR"]
    times = collections.Counter(map(os.path.realpath, files))
    endings = " ".join(ENDINGS)
    problems = []
    for path in dict.fromkeys(files):
        if os.path.isdir(path):
            problems.append(f"{path}: no file with an ending of {endings}; hint: another folder")
        elif not os.path.exists(path):
            nothing = "no file matches" if glob.has_magic(path) else "no such file"
            problems.append(f"{path}: {nothing}; hint: check the path")
        elif not os.path.isfile(path):
            problems.append(f"{path}: a pipe or a device; hint: a file with this content")
        elif not path.lower().endswith(ENDINGS):
            problems.append(f"{path}: unknown ending; hint: one of {endings}")
        if times[os.path.realpath(path)] > 1:
            problems.append(
                f"{path}: given twice, so its documents would be in both splits; hint: give it once"
            )
    return problems


# --------------------------------------------------------------------------------------------------
# reading


@dataclass(frozen=True)
class LongText:
    """A text too long for memory, or a part of one: read from its file in pieces when needed."""

    path: str
    start: int  # in characters of the file
    end: int
    size: int  # UTF-8 bytes; estimated for a part
    bar: tqdm
    bar_start: int  # what the bar showed before this file

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, part: slice) -> "LongText":
        start, end, _ = part.indices(len(self))
        size = round(self.size * (end - start) / len(self))
        return replace(self, start=self.start + start, end=self.start + end, size=size)

    def chunks(self, progress: bool = False) -> Iterator[str]:
        """Yield the text in pieces of about CHUNK. Raises UserError when the file is gone."""
        place = 0
        try:
            with open(self.path, "rb") as raw:
                for chunk in decode(decompressed(raw, self.path)):
                    first = max(self.start - place, 0)
                    inside = chunk[first : max(self.end - place, 0)]
                    place += len(chunk)
                    if inside:
                        yield inside
                    if progress:
                        self.bar.update(max(0, self.bar_start + raw.tell() - self.bar.n))
                    if place >= self.end:
                        return
        except READ_ERRORS as e:
            raise input_error(self.path, e) from e


class WrongField(ValueError):
    """A document without a text in its field."""

    def __init__(self, problem: str, names: list[str]):
        super().__init__(problem)
        self.names = names  # of the fields that it has


def input_error(place: str, e: BaseException) -> UserError:
    """Return the UserError for what reading a file, line or row raised."""
    problem = one_line(e)
    hint = "repair this file, or leave it out"
    if isinstance(e, UnicodeError):
        problem = f"not UTF-8: {e.reason} at byte {e.start}"
        if e.start == 0 and e.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            hint = "it begins like UTF-16: iconv -f UTF-16 -t UTF-8"
    elif isinstance(e, json.JSONDecodeError):
        problem = f"not JSON: {e.msg} at column {e.colno}"
    elif isinstance(e, WrongField):
        problem = str(e)
        names = ", ".join(f"{name!r:.80}" for name in e.names[:10])
        names += ", ..." if len(e.names) > 10 else ""
        hint = f"--text_field, {'one of ' + names if names else 'the field that holds the text'}"
    return UserError(f"{place}: {problem}; hint: {hint}")


def read_documents(path: str, text_field: str, source: dict, bar: tqdm) -> Iterator[str | LongText]:
    """Yield the documents of a file that are not blank, and count them in its manifest entry.

    At the end the entry gets the file's SHA-256. Raises UserError naming file and line or row.
    """
    kind = path.lower().removesuffix(".gz").rsplit(".", 1)[1]
    place = path
    start = bar.n
    try:
        with open(path, "rb") as raw:
            if raw.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(f"{path}: a pointer of git-lfs, not the file; hint: git lfs pull")
            raw.seek(0)
            for n, item in enumerate(read_items(raw, path, kind, text_field, source), 1):
                if kind != "txt":
                    place = f"{path}, {'line' if kind == 'jsonl' else 'row'} {n}"
                if kind == "jsonl" and item.isspace():
                    continue
                text = to_text(item, kind, text_field, source)
                if isinstance(text, LongText):
                    text = replace(text, bar=bar, bar_start=start)
                else:
                    bar.update(start + raw.tell() - bar.n)
                blank = not text or (isinstance(text, str) and text.isspace())  # null is blank, too
                source["empty" if blank else "documents"] += 1
                if not blank:
                    yield text
        source["sha256"] = sha256(path)
    except ImportError as e:
        raise UserError(f"{place}: {one_line(e)}; hint: pip install pyarrow") from e
    except READ_ERRORS as e:
        raise input_error(place, e) from e


def decompressed(raw, path: str):
    """Return a stream of a file's content, decompressed."""
    return gzip.GzipFile(fileobj=raw) if path.lower().endswith(".gz") else raw


def read_items(raw, path: str, kind: str, text_field: str, source: dict) -> Iterator:
    """Yield the text of a .txt, the lines of a .jsonl, the rows of a parquet column."""
    stream = decompressed(raw, path)
    if kind == "txt":
        yield read_text(stream, path, source)
    elif kind == "jsonl":
        for n in itertools.count(1):
            line = stream.readline(LONGEST_LINE + 1)
            if not line:
                return
            if len(line) > LONGEST_LINE:
                raise ValueError(f"line {n} has more than {LONGEST_LINE >> 20} MB")
            yield line.removeprefix(codecs.BOM_UTF8)
    else:
        import pyarrow.parquet  # here, because only this needs it

        file = pyarrow.parquet.ParquetFile(raw)
        names = file.schema_arrow.names
        column = text_field if text_field in names else text_field.partition(".")[0]
        if column not in names:
            raise WrongField(f"no field {text_field!r}", names)
        # few rows: a repeated value takes no room in the file; threads help with many columns only
        for batch in file.iter_batches(8, columns=[column], use_threads=False):
            for value in batch.column(0):
                yield column, value


def decode(stream) -> Iterator[str]:
    """Yield the text of a UTF-8 stream in pieces, without its byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    at_start = True
    offset = 0  # bytes read before this block
    while True:
        block = stream.read(CHUNK)
        pending = len(decoder.getstate()[0])  # bytes of half a character
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as e:
            e.start += offset - pending
            raise
        offset += len(block)
        if text and at_start:
            text = text.removeprefix("\ufeff")
            at_start = False
        if text:
            yield text
        if not block:
            return


def read_text(stream, path: str, source: dict) -> str | LongText:
    """Return the text of a stream: as a LongText where it is longer than BLOCK and not blank.

    Counts <|endoftext|> in the manifest entry of its file.
    """
    beginning = []  # its chunks, while they may be the whole text
    length = marks = 0
    blank = True
    tail = ""  # of the previous chunk: a mark may begin in it and end in this one
    for chunk in decode(stream):
        length += len(chunk)
        blank = blank and chunk.isspace()
        tail += chunk
        marks += tail.count(END_OF_TEXT)
        tail = tail[1 - len(END_OF_TEXT) :]
        if length <= BLOCK:
            beginning.append(chunk)
        else:
            beginning.clear()
    if marks:
        source["end_of_text"] = marks
    if length <= BLOCK or blank:
        return "".join(beginning)
    return LongText(path, 0, length, stream.tell(), tqdm(disable=True), 0)


def field(document, name: str):
    """Return a field of a document; meta.text may also mean the field text inside meta."""
    if not isinstance(document, dict):
        raise WrongField(f"no field {name!r}", [])
    if name in document:
        return document[name]
    outer, dot, inner = name.partition(".")
    if not dot or outer not in document:
        raise WrongField(f"no field {name!r}", list(document))
    return None if document[outer] is None else field(document[outer], inner)


def to_text(item, kind: str, text_field: str, source: dict) -> str | LongText | None:
    """Return the text of an item of read_items(), None for null. ValueError if it is not text.

    Half a surrogate pair, which JSON can spell, becomes U+FFFD, as in tiktoken.
    """
    if kind == "txt":
        return item
    if kind == "jsonl":
        document = json.loads(item.decode("utf-8").strip())
    else:
        column, value = item
        document = {column: value.as_py()}
    text = field(document, text_field)
    if not isinstance(text, str | None):
        parts = text if isinstance(text, dict) else ()
        names = [f"{text_field}.{name}" for name in parts] or list(document)
        raise WrongField(f"field {text_field!r} is {type(text).__name__}, not text", names)
    if text and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            source["replaced"] = source.get("replaced", 0) + 1
            return whole
    return text


# --------------------------------------------------------------------------------------------------
# cutting and splitting


def chunks(text: str | LongText, progress: bool = False) -> Iterator[str]:
    """Yield a text in pieces of about CHUNK characters."""
    if isinstance(text, LongText):
        yield from text.chunks(progress)
    else:
        for start in range(0, len(text), CHUNK):
            yield text[start : start + CHUNK]


def pieces(text: str | LongText) -> Iterator[str]:
    """Cut a text into pieces whose tokens are those of the whole, as tokenizer.pieces() does.

    A word of more than LONGEST_WORD characters is cut anywhere: tiktoken needs a hundred times its
    size, and seconds.
    """
    rest = ""
    for chunk in chunks(text, progress=True):
        *whole, rest = tokenizer.pieces(rest + chunk)
        yield from whole
        if len(rest) > LONGEST_WORD:
            yield rest
            rest = ""
    if rest:
        yield rest


def n_bytes(text: str | LongText) -> int:
    """Return the bytes of a text in UTF-8."""
    return text.size if isinstance(text, LongText) else len(text.encode())


def split_documents(
    documents: Iterator[tuple[dict, str | LongText]], val_share: float, names: str
) -> Iterator[tuple[tuple[dict, str], str | LongText]]:
    """Yield ((source, split), text) so that about val_share of the text is validation.

    Of each 1 / val_share documents one at random becomes validation, the same one in every run.
    Where that gives too few or too many bytes (few documents, or very long ones), the end of the
    longest one is cut off instead: the share lies between half and 1.5 times val_share for any
    documents. Raises UserError when it cannot be cut, and when there is no text.
    """
    k = round(1 / val_share)
    random_number = random.Random(k)
    count = total = val = 0  # documents so far, and their bytes
    for block in blocks(documents):
        sizes = [n_bytes(text) for _, text in block]
        total += sum(sizes)
        splits = []
        for size in sizes:
            if count % k == 0:
                chosen = count + random_number.randrange(k)
            fits = val + size <= min(1.5 * val_share, 0.5) * total
            splits.append("val" if count == chosen and fits else "train")
            if splits[-1] == "val":
                val += size
            count += 1
        train_sizes = [size if split == "train" else 0 for size, split in zip(sizes, splits)]
        longest = train_sizes.index(max(train_sizes))
        missing = val_share * total - val
        for i, ((source, text), split) in enumerate(zip(block, splits)):
            if i == longest and split == "train" and missing > 0.5 * val_share * total:
                # the next block's longest one gives the rest where this one is too short
                share = min(missing / sizes[i], 0.9)
                train, tail = cut_text(text, share, source["name"])
                val += n_bytes(tail)
                yield (source, "train"), train
                yield (source, "val"), tail
            else:
                yield (source, split), text
    if not total:
        raise UserError(
            f"{names}: no documents but empty ones; hint: put text there; for a jsonl or parquet "
            "file --text_field names its field"
        )


def blocks(documents: Iterator[tuple[dict, str | LongText]]) -> Iterator[list]:
    """Yield documents in lists of about BLOCK characters; each counts 100 more, for its memory."""
    block = []
    characters = 0
    for source, text in documents:
        block.append((source, text))
        characters += 100 + len(text)
        if characters >= BLOCK:
            yield block
            block, characters = [], 0
    if block:
        yield block


def cut_text(text: str | LongText, val_share: float, name: str) -> tuple:
    """Cut off about the last val_share of a text: between half and 1.5 times that.

    At the end of a paragraph, otherwise of a line, otherwise of a word, if there is one in this
    range. Raises UserError naming the text when one of the parts would be empty.
    """
    target = int(len(text) * (1 - val_share))
    earliest = int(len(text) * (1 - min(1.5 * val_share, max(0.5, val_share))))
    earliest = max(earliest, target - CHUNK)
    latest = min(int(len(text) * (1 - 0.5 * val_share)), target + CHUNK)
    around = "".join(chunks(text[earliest:latest]))
    cut = target
    for separator in ("\n\n", "\n", " "):
        place = around.rfind(separator, 0, target - earliest)
        if place < 0:
            place = around.find(separator, target - earliest)
        if place >= 0:
            cut = earliest + place + len(separator)
            break
    if not 0 < cut < len(text):
        raise UserError(
            f"{name}: {len(text)} characters are too few to cut off {val_share:.0%} for "
            "validation; hint: more text"
        )
    return text[:cut], text[cut:]
