"""Token shards on disk: write, open, check, compare with manifest.json.

A shard is a file of uint16 token ids: `*_train_*.npy` / `*_val_*.npy` (as build-nanogpt and
prepare.py write them) or `.bin` in the format of llm.c (256 int32 of header: magic 20240520,
version 1, count; then the ids). manifest.json lists the shards of a directory and their sources; it
is written after them. While it says `complete: false`, shards that it does not list do not count.
"""

import errno
import hashlib
import io
import itertools
import math
import os
import re
import stat
import threading
import time
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime.command_line import UserError, one_line, printable
from runtime.files import atomic, read_json, remedy, write_json
from tokenizer import EOT

MANIFEST_FORMAT = 1  # of manifest.json
BIN_MAGIC = 20240520  # llm.c's
BIN_HEADER = 1024  # bytes: 256 int32
NO_BIN_HEADER = "its header is not llm.c's (magic 20240520, version 1)"
RESTORE_HINT = "hint: restore the shard, then run the same command to resume"
VERIFY_FIRST = 1 << 28  # tokens, 0.5 GB, that are compared with manifest.json before training
# what numpy raises for an invalid header
HEADER_ERRORS = (ValueError, TypeError, SyntaxError, tokenize.TokenError)
HEADER_ERRORS += (RecursionError, MemoryError)
SCAN_TOKENS = 1 << 21  # read at a time: 4 MB


class DamagedShard(UserError):
    """A shard with other content than the run began with, or than manifest.json says.

    `since`: when the damage may have begun, as time.time(). What was learned from the shard after
    that is wrong, in checkpoints too. Without it, only what no checkpoint contains yet is wrong.
    """

    def __init__(self, message: str, path: str, since: float = math.inf):
        super().__init__(message)
        self.path = path
        self.since = since


class Shard(NamedTuple):
    path: str
    start: int  # byte at which the token ids begin
    tokens: int
    sha256: str | None = None  # of the file, where manifest.json gives one
    stamp: tuple = ()  # size, mtime and inode of the file when it was opened


class Scan(NamedTuple):
    """What reading a whole shard finds."""

    sha256: str
    documents: int  # <|endoftext|> tokens
    beyond: int  # ids above GPT-2's


# --------------------------------------------------------------------------------------------------
# opening


def stamp(path: str) -> tuple:
    """Return size, mtime and inode: they differ once a file is written or replaced."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ino


def open_shard(path: str) -> Shard:
    """Check a shard's header against the file's size. Raises ValueError saying what is wrong."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for a writer
        raise ValueError("it is not a regular file")
    file_stamp = stamp(path)
    size = file_stamp[0]
    with open(path, "rb") as f:
        start, tokens = read_bin_header(f) if path.endswith(".bin") else read_npy_header(f)
    if size != start + 2 * tokens:
        raise ValueError(
            f"its header says {tokens} tokens = {start + 2 * tokens} bytes, the file has {size}"
        )
    return Shard(path, start, tokens, stamp=file_stamp)


def read_bin_header(f) -> tuple[int, int]:
    """Return where the ids of a .bin file begin, and how many there are. Raises ValueError."""
    raw = f.read(BIN_HEADER)
    header = np.frombuffer(raw[: len(raw) // 4 * 4], dtype=np.int32)
    if len(header) < 256 or header[0] != BIN_MAGIC or header[1] != 1:
        raise ValueError(NO_BIN_HEADER)
    return BIN_HEADER, int(header[2])


def read_npy_header(f) -> tuple[int, int]:
    """Return where the ids of a .npy file begin, and how many there are. Raises ValueError."""
    version = np.lib.format.read_magic(f)
    if version != (1, 0):  # which np.save writes for numbers; its header has 64 KB at most
        raise ValueError(f"its .npy version is {version}, expected (1, 0)")
    try:
        shape, _, dtype = np.lib.format.read_array_header_1_0(f)
    except HEADER_ERRORS as e:
        raise ValueError(f"its header is not numpy's ({one_line(e)})") from e
    if dtype != np.uint16 or len(shape) != 1:
        raise ValueError(f"it holds {dtype} of shape {shape}, expected one dimension of uint16")
    return f.tell(), shape[0]


def open_shards(root: str, split: str, T: int, wrong: list[str] | None = None) -> list[Shard]:
    """Return the shards of a split ("train" or "val") in name order.

    Their headers and sizes are checked, and compared with manifest.json, if there is one; while
    prepare.py is still adding files to a directory, only those that the manifest lists so far are
    taken. A shard without a window of T + 1 tokens is wrong, unless the manifest lists it (each
    input file of prepare.py ends in a shard of any length): then it is left out. Raises UserError
    listing all that is wrong; given a list `wrong`, it appends that to the list and returns the
    valid shards.
    """
    manifest = read_manifest(root)
    listed = {s["file"]: s for s in manifest.get("shards", ()) if s["split"] == split}
    shards, problems, short = [], [], []
    for path in shard_paths(root, split):
        if path.name not in listed and not manifest.get("complete", True):
            continue
        entry = listed.pop(path.name, {})
        try:
            shard = open_shard(str(path))._replace(sha256=entry.get("sha256"))
            if manifest and shard.tokens != entry.get("tokens"):
                raise ValueError(
                    f"manifest.json says {entry.get('tokens', 'no such shard')}, "
                    f"on disk {shard.tokens}"
                )
            if shard.tokens > T:
                shards.append(shard)
                continue
            length = f"{shard.tokens} tokens, fewer than a window of T + 1 = {T + 1}"
            if not entry:
                raise ValueError(length)
            short.append(f"{path}: {length}")
        except (ValueError, OSError) as e:
            problems.append(f"{path}: {e}")
    for name in listed:
        problems.append(f"{os.path.join(root, name)}: in manifest.json, but not there")
    if not shards:
        problems += short
    if not shards and not problems:
        raise UserError(
            f"no {split} shards (*{split}*.npy or .bin) in {root}; "
            f"hint: python prepare.py files YOUR.txt --out {root}"
        )
    if wrong is not None:
        wrong += problems
    elif problems:
        raise UserError(f"{'; '.join(problems)}; hint: {open_hint(problems, split)}")
    return shards


def open_hint(problems: list[str], split: str) -> str:
    """Return what to do about the problems of open_shards()."""
    hints = ["prepare these shards again, or move them away"]
    if any("window" in problem for problem in problems):
        share = ", with a larger --val_share" if split == "val" else ""
        hints = [f"lower --T, or prepare more text{share}"]
    for problem in problems:
        path, bin_problem, _ = problem.partition(f": {NO_BIN_HEADER}")
        if bin_problem:
            command = f"import numpy as n; n.save({path[:-4]!r}, n.fromfile({path!r}, n.uint16))"
            hints.append(
                f'if {path} holds bare uint16 ids, as nanoGPT\'s does: python -c "{command}" '
                "makes it a shard; then move it away"
            )
            break
    return ", or ".join(hints)


def shard_paths(root: str, split: str) -> list[Path]:
    """Return the files with the split as a word in their name, in order.

    Raises UserError when there are two kinds, or names that are not plain.
    """
    word = re.compile(rf"(?<![a-z]){split}(?![a-z])")  # not retrie[val]
    files = (p for p in Path(root).glob("*") if p.suffix in (".npy", ".bin"))
    paths = sorted(p for p in files if word.search(p.name))
    for path in paths:
        if not is_plain(path.name):
            raise UserError(
                f"{root} has a shard whose name is not plain text, {path.name!r:.80}; "
                "hint: rename it"
            )
    if len({p.suffix for p in paths}) > 1:
        raise UserError(
            f"{root} mixes .npy and .bin {split} shards, maybe the same text twice; "
            "hint: keep one kind"
        )
    return paths


def read_manifest(root: str | Path) -> dict:
    """Return manifest.json of a directory, {} without one. Raises UserError when it is invalid."""
    path = Path(root) / "manifest.json"
    if not path.exists():
        return {}
    try:
        manifest = read_json(path)
        for shard in manifest["shards"]:
            check_entry(shard)
        moving = manifest.get("moving", [])  # files that prepare.py has not yet all in place
        if not isinstance(moving, list):
            raise ValueError(f"moving is {moving!r:.80}, expected a list")
        if manifest["tokenizer"] != "gpt2":
            raise ValueError(f"tokenizer {manifest['tokenizer']!r}, expected 'gpt2'")
    except (ValueError, KeyError, TypeError, OSError) as e:
        raise UserError(f"{path}: {one_line(e)}; hint: prepare these shards again") from e
    return manifest


def check_entry(shard: dict):
    """Raise ValueError or TypeError for an entry of manifest.json that is not a shard's."""
    missing = {"file", "split", "tokens"} - set(shard)
    if missing:
        raise ValueError(f"a shard without {', '.join(sorted(missing))}")
    name, split, sha256 = shard["file"], shard["split"], shard.get("sha256")
    if not is_plain(name) or "/" in name:
        raise ValueError(f"a shard's file is {name!r:.80}, expected a name")
    for key in ("tokens", "documents"):
        if type(shard.get(key, 0)) is not int:
            raise ValueError(f"{name} has {shard[key]!r:.80} {key}, expected a whole number")
    if not isinstance(split, str) or not isinstance(sha256, str | None):
        raise ValueError(f"{name} has the split {split!r:.80}, SHA-256 {sha256!r:.80}")


def is_plain(name) -> bool:
    """Return whether a name is plain text: control characters could forge lines of output."""
    return isinstance(name, str) and "\n" not in name and printable(name) == name


# --------------------------------------------------------------------------------------------------
# reading all of it


def scan(shard: Shard, idle: float = 0) -> Scan:
    """Read a whole shard. Sleeps `idle` seconds per second of work."""
    digest = hashlib.sha256()
    documents = beyond = 0
    with open(shard.path, "rb") as f:
        digest.update(f.read(shard.start))
        started = time.perf_counter()
        while len(tokens := np.fromfile(f, np.uint16, SCAN_TOKENS)):
            digest.update(tokens)
            documents += int((tokens == EOT).sum())
            beyond += int((tokens > EOT).sum())
            time.sleep(idle * (time.perf_counter() - started))
            started = time.perf_counter()
    return Scan(digest.hexdigest(), documents, beyond)


def start_verifying(shards: list[Shard], wrong: list[UserError]):
    """Start verify() in the background; for small data, where it takes a second, wait for it.

    So small data are verified before any of them is used.
    """
    small = sum(shard.tokens for shard in shards) <= VERIFY_FIRST
    arguments = (list(shards), wrong, 0 if small else 4)
    thread = threading.Thread(target=verify, args=arguments, daemon=True, name="verify")
    thread.start()
    if small:
        thread.join()


def verify(shards: list[Shard], wrong: list[UserError], idle: float):
    """Append to `wrong` an error for every shard that differs from manifest.json.

    Sleeps `idle` seconds per second of work.
    """
    for shard in shards:
        if not shard.sha256:
            continue
        try:
            if scan(shard, idle).sha256 != shard.sha256:
                message = (
                    f"{shard.path} is damaged: its SHA-256 is not that in manifest.json; "
                    f"{RESTORE_HINT}"
                )
                # mtime: before that, the file had other content
                wrong.append(DamagedShard(message, shard.path, os.stat(shard.path).st_mtime))
        except OSError as e:
            wrong.append(unreadable(shard.path, e))


def unreadable(path: str, e: OSError) -> UserError:
    """Return the error for a shard that could be read when the run began and cannot be now."""
    hint = RESTORE_HINT
    if e.errno not in (errno.ENOENT, errno.ENOTDIR):
        hint = f"hint: {remedy(e, path)}, then run the same command to resume"
    return UserError(f"{path} cannot be read any more ({e.strerror}); {hint}")


def same_content(shard: Shard, now: tuple) -> bool:
    """Return whether a file that was rewritten or replaced still has the shard's content.

    `now` is its stamp. False without a SHA-256 in manifest.json to compare with.
    """
    try:
        same_size = now[0] == shard.stamp[0] and shard.sha256
        return bool(same_size) and scan(shard).sha256 == shard.sha256
    except OSError:
        return False


def fingerprints(shards: list[Shard]) -> list[str]:
    """Return fingerprints of the first 1, 2, ... n shards: a hash of names, sizes and contents.

    Resuming compares them, so that shards added later do no harm. Without a manifest the content is
    sampled: 4 KB at 16 places.
    """
    digest, names = hashlib.blake2b(digest_size=8), []
    for shard in shards:
        content = shard.sha256 or sampled_hash(shard)
        digest.update(repr((os.path.basename(shard.path), shard.tokens, content)).encode())
        names.append(digest.hexdigest())
    return names


def sampled_hash(shard: Shard) -> str:
    """Return the SHA-256 of 4 KB at 16 places of a shard."""
    end = shard.start + 2 * shard.tokens
    places = np.linspace(shard.start, end, 16, endpoint=False).astype(int).tolist()
    digest = hashlib.sha256()
    with open(shard.path, "rb") as f:
        for place in places:
            f.seek(place)
            digest.update(f.read(4096))
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# writing


class ShardWriter:
    """Writes tokens as shards of shard_tokens tokens; only the last one may be shorter.

    Holds one shard in memory, 0.2 GB for 100M tokens. `names` yields the files' names; `records`
    has the manifest entry of each file that is completely written.
    """

    def __init__(self, folder: str | Path, names: Iterator[str], shard_tokens: int):
        self.folder = Path(folder)
        self.names = names
        self.shard_tokens = shard_tokens
        self.records: list[dict] = []
        self.parts: list[np.ndarray] = []  # of the next shard
        self.count = 0  # tokens in them

    def write(self, tokens: np.ndarray):
        """Append tokens (uint16, <|endoftext|> before each document) to this shard and the next."""
        while len(tokens):
            part = tokens[: self.shard_tokens - self.count]
            self.parts.append(part)
            if len(self.parts) % 4096 == 0:  # an array of few tokens takes 100 bytes more
                self.parts[-4096:] = [np.concatenate(self.parts[-4096:])]
            self.count += len(part)
            if self.count == self.shard_tokens:
                self.close()
            tokens = tokens[len(part) :]

    def close(self):
        """Write the tokens held in memory as a shard, atomically; nothing when there are none."""
        if not self.parts:
            return
        path = self.folder / next(self.names)
        header = io.BytesIO()
        shape = {"descr": "<u2", "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(header, shape)
        digest = hashlib.sha256()
        with atomic(path) as temporary, open(temporary, "wb") as f:
            for part in [header.getvalue(), *self.parts]:
                f.write(part)
                digest.update(part)
        documents = sum(int((part == EOT).sum()) for part in self.parts)
        self.records.append(shard_entry(path.name, self.count, documents, digest.hexdigest()))
        self.parts = []
        self.count = 0


def shard_entry(name: str, tokens: int, documents: int, sha256: str) -> dict:
    """Return the entry of a shard in manifest.json."""
    split = "val" if "_val_" in name else "train"
    return dict(file=name, split=split, tokens=tokens, documents=documents, sha256=sha256)


def shard_names(name: str, split: str) -> Iterator[str]:
    """Yield NAME_SPLIT_000000.npy, NAME_SPLIT_000001.npy and so on."""
    for number in itertools.count():
        yield f"{name}_{split}_{number:06d}.npy"


def write_manifest(root: str | Path, shards: list[dict], sources: list[dict], **more):
    """Write manifest.json: a directory that has one is complete, unless it says complete: false."""
    content = {"format": MANIFEST_FORMAT, "tokenizer": "gpt2", "shards": shards, "sources": sources}
    write_json(Path(root) / "manifest.json", content | more)


def is_whole(root: str | Path, record: dict) -> bool:
    """Return whether the shard of a manifest entry exists, with as many tokens as it says."""
    try:
        return open_shard(os.path.join(root, record["file"])).tokens == record["tokens"]
    except (OSError, ValueError):
        return False


def refuse_file(root: str | Path):
    """Raise UserError when root exists and is not a directory."""
    if os.path.exists(root) and not os.path.isdir(root):
        raise UserError(f"{root} is a file; hint: --out a new directory")


def refuse_occupied(root: str | Path, replaceable: Iterable[str] = ()):
    """Raise UserError when root is a file, or holds shards or a manifest, not all replaceable."""
    refuse_file(root)
    names = sorted(os.listdir(root)) if os.path.isdir(root) else []
    occupied = [
        name for name in names if name == "manifest.json" or name.endswith((".npy", ".bin"))
    ]
    occupied = [name for name in occupied if name not in replaceable]
    if occupied:
        more = ", ..." if len(occupied) > 3 else ""
        raise UserError(
            f"{root} already holds {', '.join(map(repr, occupied[:3]))}{more}, never overwritten; "
            "hint: --out a new directory, or remove the old shards first"
        )
