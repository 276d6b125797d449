"""Token shards: on disk, in order, in batches, and audited:

    python shards.py audit data/my --T 1024 --world_size 4 --B 64 --total_batch 524288 --max_steps 19073

A shard is a file of uint16 token ids: `*_train_*.npy` / `*_val_*.npy` (as build-nanogpt and prepare.py write them) or
`.bin` in the format of llm.c (256 int32 of header: magic 20240520, version 1, count; then the ids).

The order of the data is a pure function. Epoch e cuts each shard into windows of T tokens, beginning at offset(e), and
`order(seed, e, n, i)` says which of the n windows comes i-th. Optimiser step s takes windows s*G .. (s+1)*G - 1 of the
endless sequence of epochs, G = total_batch / T; each process takes its part of that slice. So the same run sees the
same global batches on any number of GPUs, the loader's whole state is the step, and no window is lost or repeated.
"""

import hashlib
import json
import os
import re
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro
from tqdm import tqdm

from config import UserError, command_line, one_line
from tokenizer import EOT

BIN_MAGIC, BIN_HEADER = 20240520, 1024  # llm.c: magic number, bytes of header (256 int32)
PREADV = hasattr(os, "preadv")  # one system call for a window instead of two; not on Windows
RESTORE = "hint: restore the shard, then run the same command to resume"
LOOK = 1.0  # seconds between looks at whether a shard's file is still the same: one costs 2 us, reading a window 3 us
AHEAD = 4096  # windows located at a time: numpy takes as long for 64 as for 1,000

# --------------------------------------------------------------------------------------------------------------------
# shards on disk


class Shard(NamedTuple):
    path: str
    start: int  # byte at which the token ids begin
    tokens: int
    sha256: str | None = None  # of the file, where manifest.json gives one
    stamp: tuple = ()  # size, time of change and number of the file when it was opened


def stamp(path: str) -> tuple:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ino


def open_shard(path: str) -> Shard:
    """Check a shard's header against the file's size. Raises ValueError saying what is wrong."""
    found = stamp(path)
    size = found[0]
    with open(path, "rb") as f:
        if path.endswith(".bin"):
            header = np.frombuffer(f.read(BIN_HEADER), dtype=np.int32)
            if len(header) < 256 or header[0] != BIN_MAGIC or header[1] != 1:
                raise ValueError("its header is not llm.c's (magic 20240520, version 1)")
            start, tokens = BIN_HEADER, int(header[2])
        else:
            version = np.lib.format.read_magic(f)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = read(f)
            if dtype != np.uint16 or len(shape) != 1:
                raise ValueError(
                    f"it holds {dtype} of shape {shape}, expected one dimension of uint16"
                )
            start, tokens = f.tell(), shape[0]
    if size != start + 2 * tokens:
        raise ValueError(
            f"its header says {tokens} tokens = {start + 2 * tokens} bytes, the file has {size}"
        )
    return Shard(path, start, tokens, stamp=found)


def open_shards(root: str, split: str, T: int, wrong: list[str] | None = None) -> list[Shard]:
    """The shards of a split ("train" or "val") in name order: header, size, and manifest.json if there is one, checked.

    Raises UserError listing all that is wrong; given a list `wrong`, adds that to it and returns the sound shards.
    While prepare.py download goes on, only what the manifest lists so far is taken: files that are whole.
    """
    word = re.compile(
        rf"(?<![a-z]){split}(?![a-z])"
    )  # "val" as a word: not that of retrieval_train_000000.npy
    paths = sorted(
        p for p in Path(root).glob("*") if p.suffix in (".npy", ".bin") and word.search(p.name)
    )
    shards, problems, manifest = [], [], read_manifest(root)
    listed = {s["file"]: s for s in manifest.get("shards", ()) if s["split"] == split}
    paths = [p for p in paths if manifest.get("complete", True) or p.name in listed]
    if not paths:
        raise UserError(
            f"no {split} shards (*{split}*.npy or .bin) in {root}; hint: python prepare.py files YOUR.txt "
            f"--out {root}"
        )
    if len({p.suffix for p in paths}) > 1:
        raise UserError(
            f"{root} mixes .npy and .bin {split} shards, maybe the same text twice; hint: keep one kind"
        )
    for path in paths:
        entry = listed.pop(path.name, {})
        try:
            shard = open_shard(str(path))._replace(sha256=entry.get("sha256"))
            if manifest and shard.tokens != entry.get("tokens"):
                raise ValueError(
                    f"manifest.json says {entry.get('tokens', 'no such shard')}, on disk {shard.tokens}"
                )
            if shard.tokens <= T:
                raise ValueError(f"{shard.tokens} tokens, fewer than a window of T + 1 = {T + 1}")
            shards.append(shard)
        except (ValueError, OSError, KeyError, EOFError) as e:
            problems.append(f"{path}: {e}")
    problems += [f"{os.path.join(root, name)}: in manifest.json, but not there" for name in listed]
    if wrong is not None:
        wrong += problems
    elif problems:
        raise UserError(
            "; ".join(problems)
            + "; hint: prepare these shards again, or move them away"
            + (", or lower --T" if any("window" in p for p in problems) else "")
        )
    return shards


def read_manifest(root: str | Path) -> dict:
    """manifest.json of a directory, {} without one. Raises UserError when it is not one of ours."""
    path = Path(root) / "manifest.json"
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_text())
        [
            (s["file"], s["split"], s["tokens"]) for s in manifest["shards"]
        ]  # a KeyError when one is missing
        if manifest["tokenizer"] != "gpt2":
            raise ValueError(f"tokenizer {manifest['tokenizer']!r}, expected 'gpt2'")
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: {one_line(e)}; hint: prepare these shards again") from e
    return manifest


def sha256(path: str | Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def scan(shard: Shard, idle: float = 0) -> tuple[str, int, int]:
    """SHA-256 of the file, documents (<|endoftext|>), ids beyond GPT-2's. Sleeps idle seconds per second of work."""
    digest, documents, beyond = hashlib.sha256(), 0, 0
    with open(shard.path, "rb") as f:
        digest.update(f.read(shard.start))
        t0 = time.perf_counter()
        while len(tokens := np.fromfile(f, np.uint16, 1 << 21)):
            digest.update(tokens)
            documents, beyond = documents + (tokens == EOT).sum(), beyond + (tokens > EOT).sum()
            time.sleep(idle * (time.perf_counter() - t0))
            t0 = time.perf_counter()
    return digest.hexdigest(), int(documents), int(beyond)


def verify(shards: list[Shard], wrong: list[str]):
    """Add to wrong the shards that differ from manifest.json: a background thread, asleep four fifths of the time."""
    for shard in shards:
        try:
            if shard.sha256 and scan(shard, idle=4)[0] != shard.sha256:
                wrong.append(
                    f"{shard.path} is damaged: its SHA-256 is not that in manifest.json; {RESTORE}"
                )
        except OSError as e:
            wrong.append(f"{shard.path} cannot be read ({e.strerror}); {RESTORE}")


def fingerprints(shards: list[Shard]) -> list[str]:
    """Names of the data of a run, one for each number of shards: over their file names, tokens and hashes (where there is
    no manifest, of 4 KB at 16 places). Resuming compares them.
    """
    digest, names = hashlib.blake2b(digest_size=8), []
    for s in shards:
        if (content := s.sha256) is None:
            places = (
                np.linspace(s.start, s.start + 2 * s.tokens, 16, endpoint=False)
                .astype(int)
                .tolist()
            )
            with open(s.path, "rb") as f:
                content = hashlib.sha256(
                    b"".join(f.read(4096) for at in places if f.seek(at))
                ).hexdigest()
        digest.update(repr((os.path.basename(s.path), s.tokens, content)).encode())
        names.append(digest.hexdigest())
    return names


def as_begun(windows: "Windows", data: str) -> "Windows | None":
    """The windows of the run of this fingerprint, without shards downloaded since it began; None: it had other data."""
    if data in (names := fingerprints(windows.shards)):
        n = names.index(data) + 1
        return Windows(
            windows.shards[:n], windows.T, windows.data_order, windows.seed, windows.vocab_size
        )


# --------------------------------------------------------------------------------------------------------------------
# order: which window comes when


def mix(x: np.ndarray, key: int) -> np.ndarray:
    """A keyed hash of 64-bit integers: the finaliser of splitmix64 (Steele et al. 2014)."""
    x = x + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keys(n: int, *words: int) -> list[int]:
    """n independent 64-bit keys from any integers (blake2b)."""
    digest = lambda i: hashlib.blake2b(repr((i, *words)).encode(), digest_size=8).digest()
    return [int.from_bytes(digest(i), "little") for i in range(n)]


def order(seed: int, epoch: int, n: int, i: np.ndarray) -> np.ndarray:
    """The items at places i of a permutation of range(n): a bijection for each (seed, epoch), in O(1) memory.

    A Feistel network on pairs (left, right) in Z_a x Z_b with a * b just above n; a result beyond n goes through again
    until it is below ("cycle walking", Black and Rogaway 2002), which happens with probability under 2 / sqrt(n).
    Eight rounds, because the halves are small: with four, neighbours stay visibly related for n below 1,000.
    """
    a = max(1, int(np.sqrt(n)))
    b = -(-n // a)
    a_, b_ = np.uint64(a), np.uint64(b)
    out = np.array(i, dtype=np.uint64)
    todo = np.arange(out.size)
    round_keys = keys(8, seed, epoch, n)
    while todo.size:
        left, right = out[todo] // b_, out[todo] % b_  # left in Z_a, right in Z_b
        for r in range(0, 8, 2):
            left = (left + mix(right, round_keys[r]) % a_) % a_
            right = (right + mix(left, round_keys[r + 1]) % b_) % b_
        out[todo] = left * b_ + right
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)


class Windows:
    """The endless sequence of windows of a split: position p (0, 1, 2, ...) to T + 1 token ids.

    data_order "sequential" reads as on disk, every epoch alike except for its offset; "documents" shuffles shards, and
    documents within a shard, anew in each epoch; "global" permutes all windows. All three read every window of an epoch
    once. In epoch e > 0 the first offset(e) < T tokens of each shard are left out, so that windows are cut elsewhere;
    with the remainder that is less than 2T tokens of a shard.
    """

    def __init__(
        self,
        shards: list[Shard],
        T: int,
        data_order: str = "sequential",
        seed: int = 0,
        vocab_size: int = 1 << 16,
    ):
        self.shards, self.T, self.data_order, self.seed, self.vocab_size = (
            shards,
            T,
            data_order,
            seed,
            vocab_size,
        )
        self.sizes = np.array([s.tokens for s in shards])
        self.epoch_starts = [0]  # position of the first window of each epoch met so far
        self.files, self.documents = (
            {},
            {},
        )  # caches: open files, document index of the shards last used
        self.looked = {}  # when each shard's file was last compared with what it was

    def offset(self, epoch: int) -> int:
        """Tokens left out at the beginning of each shard: 0 in epoch 0, then random, leaving one window at least."""
        return (
            0
            if epoch == 0
            else keys(1, self.seed, epoch, -1)[0] % int(min(self.T, self.sizes.min() - self.T))
        )

    def counts(self, epoch: int) -> np.ndarray:
        """Windows of each shard in this epoch; each needs one token more than T for its last target."""
        return (self.sizes - 1 - self.offset(epoch)) // self.T

    def per_epoch(self, epoch: int = 0) -> int:
        return int(self.counts(epoch).sum())

    def left_out(self, epoch: int) -> np.ndarray:
        """Tokens of each shard that are not read in this epoch: fewer than 2T."""
        return self.sizes - 1 - self.counts(epoch) * self.T

    def epoch_start(self, epoch: int) -> int:
        """The position of an epoch's first window."""
        for e in range(len(self.epoch_starts) - 1, epoch):
            self.epoch_starts.append(self.epoch_starts[e] + self.per_epoch(e))
        return self.epoch_starts[epoch]

    def locate(self, positions: np.ndarray) -> np.ndarray:
        """(3, n): the epoch, the shard and the first token within it of the windows at n positions."""
        while self.epoch_starts[-1] <= positions.max():
            self.epoch_start(len(self.epoch_starts))
        epochs = np.searchsorted(self.epoch_starts, positions, side="right") - 1
        places = np.stack([epochs, epochs, epochs])
        for epoch in range(epochs.min(), epochs.max() + 1):
            here, counts, which = epochs == epoch, self.counts(epoch), np.arange(len(self.shards))
            i = positions[here] - self.epoch_starts[epoch]
            if self.data_order == "global":
                i = order(self.seed, epoch, int(counts.sum()), i)
            elif self.data_order == "documents":
                which = order(self.seed, epoch, len(which), which)  # the order of the shards
            ends = np.cumsum(counts[which])
            place = np.searchsorted(ends, i, side="right")
            places[1, here] = which[place]
            places[2, here] = self.offset(epoch) + (i - (ends - counts[which])[place]) * self.T
        return places

    def read(self, positions: np.ndarray, out: np.ndarray):
        """Fill out (n, T + 1) uint16 with the windows at n positions."""
        self.fetch(self.locate(positions), out)

    def fetch(self, places: np.ndarray, out: np.ndarray):
        """Fill out (n, T + 1) uint16 with the windows at places (3, n), as locate gives them.

        Raises UserError for a shard that was cut, replaced or removed, or a token id beyond vocab_size (a device-side
        assertion on a GPU).
        """
        read = self._read_documents if self.data_order == "documents" else self._read_tokens
        now = time.monotonic()
        for shard in set(places[1].tolist()):
            if now - self.looked.get(shard, -LOOK) >= LOOK:
                self._look(shard)
                self.looked[shard] = now
        for row, epoch, shard, token in zip(out, *places.tolist()):
            read(row, shard, token, epoch)
        if (largest := int(out.max())) >= self.vocab_size:
            path = self.shards[places[1, out.max(axis=1).argmax()]].path
            raise UserError(
                f"{path} has token id {largest}, beyond vocab_size {self.vocab_size}; hint: is it GPT-2's "
                f"tokenizer's? --vocab_size {-(-(largest + 1) // 128) * 128} accepts it"
            )

    def _look(self, shard: int):
        """Raise UserError when a shard's file is not the one that was opened when the run began."""
        path, at_start = self.shards[shard].path, self.shards[shard].stamp
        try:
            found = stamp(path)
        except OSError as e:
            raise UserError(f"{path} cannot be read any more ({e.strerror}); {RESTORE}")
        if at_start and found != at_start:
            what = (
                f"has {found[0]} bytes now, not {at_start[0]}"
                if found[0] != at_start[0]
                else "was replaced or rewritten"
            )
            raise UserError(f"{path} {what} since the run began; {RESTORE}")

    def _read_tokens(self, row: np.ndarray, shard: int, token: int, epoch: int = 0):
        # Unbuffered reads rather than a memory map: the pages of a map count as this process's memory, and a shard that
        # shrinks under it is a crash (SIGBUS) instead of an error that names the file.
        path, at = self.shards[shard].path, self.shards[shard].start + 2 * token
        try:
            if (file := self.files.get(shard)) is None:
                if len(self.files) >= 256:  # stay clear of the usual limit of 1,024 open files
                    self.files.pop(next(iter(self.files))).close()
                file = self.files[shard] = open(path, "rb", buffering=0)
            read = (
                os.preadv(file.fileno(), (row,), at)
                if PREADV
                else (file.seek(at), file.readinto(row))[1]
            )
        except OSError as e:
            raise UserError(f"{path} cannot be read ({e.strerror}); {RESTORE}")
        if read != row.nbytes:
            raise UserError(
                f"{path} has become shorter, no {len(row)} tokens at {token}; {RESTORE}"
            )

    def _read_documents(self, row: np.ndarray, shard: int, token: int, epoch: int):
        """A window of the shard as if its documents stood in this epoch's order."""
        starts, ends = self._document_order(epoch, shard)
        d, filled = int(np.searchsorted(ends, token, side="right")), 0
        while filled < len(row):
            skip = (
                token + filled - int(ends[d - 1] if d else 0)
            )  # tokens of document d that lie before the window
            take = min(len(row) - filled, int(ends[d]) - token - filled)
            self._read_tokens(row[filled : filled + take], shard, int(starts[d]) + skip)
            filled, d = filled + take, d + 1

    def _document_order(self, epoch: int, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """The shard's documents in this epoch's order: where each starts on disk, and where it ends in that order."""
        if (epoch, shard) not in self.documents:
            if (
                len(self.documents) >= 2
            ):  # a batch lies in one shard or two; 100M tokens: 100k documents, 2 MB
                self.documents.pop(next(iter(self.documents)))
            starts, start, tokens = [], self.shards[shard].start, self.shards[shard].tokens
            try:
                with open(self.shards[shard].path, "rb") as f:
                    f.seek(start)
                    for at in range(0, tokens, 1 << 22):  # 8 MB at a time
                        starts.append(
                            at + np.flatnonzero(np.fromfile(f, np.uint16, 1 << 22) == EOT)
                        )
            except OSError as e:
                raise UserError(
                    f"{self.shards[shard].path} cannot be read ({e.strerror}); {RESTORE}"
                )
            starts = np.union1d([0], np.concatenate(starts)).astype(
                np.int64
            )  # a shard may begin inside a document
            lengths = np.diff(starts, append=tokens)
            permuted = order(
                keys(1, self.seed, shard)[0], epoch, len(starts), np.arange(len(starts))
            )
            self.documents[epoch, shard] = starts[permuted], np.cumsum(lengths[permuted])
        return self.documents[epoch, shard]


# --------------------------------------------------------------------------------------------------------------------
# batches


class Batch(NamedTuple):
    x: torch.Tensor  # (B, T) int64, on the device
    y: torch.Tensor  # (B, T) int64: x shifted by one
    digest: int  # hash of the windows and their places in the global batch, summed modulo 2**64; 0 unless asked for


def positions(k: np.ndarray | int, B: int, rank: int, world_size: int) -> np.ndarray:
    """Positions (..., B) of the windows in micro-batch number k, counted from the beginning of the run, of a process.

    The processes take micro-batches of B in turn; a global batch is a whole number of such rounds.
    """
    return ((np.asarray(k) * world_size + rank) * B)[..., None] + np.arange(B)


class Loader:
    """Micro-batches of one process, from optimiser step start_step on; next() never waits while the device is busy.

    One thread reads ahead by one micro-batch: files to a pinned buffer, one copy to the device on a stream of its own.
    In the first process another one compares the shards with manifest.json; next() raises what it finds.
    """

    def __init__(
        self,
        windows: Windows,
        total_batch: int,
        B: int,
        rank: int,
        world_size: int,
        device: torch.device,
        start_step: int = 0,
        digests: bool = False,
    ):
        self.windows, self.B, self.rank, self.world_size, self.device = (
            windows,
            B,
            rank,
            world_size,
            device,
        )
        self.digests, self.wrong = digests, []
        self.micro_steps = total_batch // (B * windows.T * world_size)
        self.buffer = torch.empty(
            B, windows.T + 1, dtype=torch.int16, pin_memory=device.type == "cuda"
        )
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.located = range(0)  # the micro-batches whose places are known
        self.k = (
            start_step * self.micro_steps
        )  # number of the next micro-batch: the loader's whole state
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self.ahead = self.thread.submit(self.read, self.k)
        if rank == 0:
            threading.Thread(
                target=verify, args=(windows.shards, self.wrong), daemon=True, name="verify"
            ).start()

    def next(self) -> tuple[Batch, float]:
        """The next micro-batch, and the seconds spent waiting for it. Raises what the reading threads met."""
        if self.wrong:
            raise UserError("; ".join(self.wrong))
        t0 = time.perf_counter()
        batch = self.ahead.result()
        waited = time.perf_counter() - t0
        self.k += 1
        self.ahead = self.thread.submit(self.read, self.k)
        if (
            self.stream is not None
        ):  # memory of the loader's stream: to be kept until the main stream has read it
            for ids in batch[:2]:
                ids.record_stream(torch.cuda.current_stream(self.device))
        return batch, waited

    def read(self, k: int) -> Batch:
        """This process's micro-batch number k, read now: what the thread does."""
        if k not in self.located:
            self.located = range(k, k + max(1, min(AHEAD, self.windows.per_epoch()) // self.B))
            self.places = self.windows.locate(
                positions(self.located, self.B, self.rank, self.world_size).ravel()
            )
        at = (k - self.located.start) * self.B
        rows = self.buffer.numpy().view(np.uint16)
        self.windows.fetch(self.places[:, at : at + self.B], rows)
        first = (
            k % self.micro_steps * self.world_size + self.rank
        ) * self.B  # row within the global batch
        digest = batch_digest(rows, first) if self.digests else 0
        if self.stream is None:
            return Batch(*to_ids(self.buffer, self.device), digest)
        with torch.cuda.stream(self.stream):
            x, y = to_ids(self.buffer, self.device)
        self.stream.synchronize()  # in this thread: the training thread never waits for a copy
        return Batch(x, y, digest)

    def close(self):
        self.thread.shutdown(wait=True, cancel_futures=True)


def to_ids(rows: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (B, T + 1) of uint16 ids, held as int16, to x, y (B, T) int64 on the device, contiguous: as compiled for."""
    if device.type == "cuda":  # a copy of 2 bytes an id, from pinned memory, widened there
        ids = (
            rows.to(device, non_blocking=True).long() & 0xFFFF
        )  # int16, because uint16 has few kernels
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    ids = rows.numpy().view(
        np.uint16
    )  # numpy: torch would start a second team of threads beside the one that computes
    return tuple(
        torch.from_numpy(part.astype(np.int64)).to(device) for part in (ids[:, :-1], ids[:, 1:])
    )


def batch_digest(rows: np.ndarray, first: int) -> int:
    """A sum of row hashes, each salted with its place: equal for any split of the global batch over processes."""
    digest = lambda k, row: hashlib.blake2b(
        row.tobytes(), digest_size=8, salt=k.to_bytes(8, "little")
    ).digest()
    return (
        sum(int.from_bytes(digest(k, row), "little") for k, row in enumerate(rows, first)) % 2**64
    )


def val_batches(
    windows: Windows, val_tokens: int, B: int, rank: int, world_size: int, device: torch.device
):
    """Yield (x, y) over the first val_tokens of a split, each (B, T), always the same windows, shared by the processes.

    Every batch has the same shape (a compiled model never recompiles), and every process gets as many: rows past the
    end have targets of -1, which do not count. Sum the losses, then divide: the result does not depend on B or on the
    number of processes.
    """
    n = min(val_tokens // windows.T, windows.per_epoch(0))
    mine = np.arange(rank, n, world_size)
    rows = torch.zeros(B, windows.T + 1, dtype=torch.int16)
    for at in range(0, -(-n // world_size), B):
        wanted = mine[at : at + B]
        if len(wanted):  # none when the other processes have a row more
            windows.read(wanted, rows.numpy().view(np.uint16)[: len(wanted)])
        x, y = to_ids(rows, device)
        y[len(wanted) :] = -1
        yield x, y


# --------------------------------------------------------------------------------------------------------------------
# audit


def times_seen(
    windows: Windows, epoch: int, end: int, B: int, rank: int, world_size: int
) -> np.ndarray:
    """How often a process of a run of `end` windows reads each window of an epoch: its micro-batches, walked."""
    first, end, counts = (
        windows.epoch_start(epoch),
        min(end, windows.epoch_start(epoch + 1)),
        windows.counts(epoch),
    )
    seen, before = np.zeros(counts.sum(), np.uint16), np.cumsum(counts) - counts
    step, many = (
        B * world_size,
        1 + 65536 // B,
    )  # windows of one round of the processes, rounds at a time
    for k in range(first // step, -(-end // step), many):
        p = positions(range(k, k + many), B, rank, world_size).ravel()
        if len(p := p[(first <= p) & (p < end)]):
            _, shard, token = windows.locate(p)
            np.add.at(seen, before[shard] + (token - windows.offset(epoch)) // windows.T, 1)
    return seen


def audit(
    root: tyro.conf.Positional[str],
    T: int = 1024,
    world_size: int = 1,
    B: int = 64,
    total_batch: int = 524288,
    max_steps: int = 19073,
    data_order: Literal["sequential", "documents", "global"] = "global",
    data_seed: int = 1337,
    contents: bool = True,
):
    """What is in a directory of shards, and what a run would read of it. Exit status 1 when anything is wrong.

    Args:
        root: directory of shards
        T: tokens in a sequence; this and the rest are the settings of the run
        world_size: processes
        contents: read the files, too: documents, ids, hashes; False: headers and order alone
    """
    if min(T, B, world_size, total_batch, max_steps) < 1 or total_batch % (B * T * world_size):
        raise UserError(
            f"total_batch {total_batch} is no multiple of B x T x world_size, {B} x {T} x {world_size}, "
            "or one of these or max_steps is below 1; hint: --B, or --total_batch"
        )
    wrong, end = [], max_steps * (total_batch // T)
    if not read_manifest(root).get("complete", True):
        wrong.append(
            f"{root} is not complete; the command that began it goes on with it (sources in manifest.json)"
        )
    print(f"{'split':24}{'tokens':>16}{'windows':>14}{'documents':>14}")
    for split in ("val", "train"):
        shards = open_shards(root, split, T, wrong)
        scans = (
            [scan(s) for s in tqdm(shards, f"reading {split}", delay=2, leave=False)]
            if contents
            else []
        )
        wrong += [
            f"{s.path}: its SHA-256 {digest[:16]}... is not that in manifest.json, {s.sha256[:16]}..."
            for s, (digest, _, _) in zip(shards, scans)
            if s.sha256 not in (None, digest)
        ]
        wrong += [
            f"{s.path}: {n:,} ids above {EOT}, the last of GPT-2's"
            for s, (_, _, n) in zip(shards, scans)
            if n
        ]
        print(
            f"{f'{split}, shards: {len(shards)}':24}{sum(s.tokens for s in shards):16,}"
            f"{sum((s.tokens - 1) // T for s in shards):14,}{sum(n for _, n, _ in scans) if scans else '-':>14}"
        )
    if shards:
        tracemalloc.start()
        t0 = time.perf_counter()
        windows = Windows(open_shards(root, "train", T, []), T, data_order, data_seed)
        last = int(windows.locate(np.array([end - 1]))[0, 0])
        print(
            f"index: {time.perf_counter() - t0:.3f} s, {tracemalloc.get_traced_memory()[0] / 1e6:.3f} MB"
        )
        tracemalloc.stop()
        epochs = last + (end - windows.epoch_start(last)) / windows.per_epoch(last)
        print(
            f"run: {max_steps:,} steps, {end:,} windows, {epochs:.3f} epochs, {data_order} order, seed {data_seed}\n"
        )
        print(
            f"{'read by':24}{'windows':>16}{'tokens left out':>18}{'never':>12}{'once':>12}{'more often':>12}"
        )
        for epoch in sorted({*range(min(3, last)), last}):
            total, shares = np.zeros(n := windows.per_epoch(epoch), np.uint16), []
            for rank in range(world_size):
                total += (seen := times_seen(windows, epoch, end, B, rank, world_size))
                shares.append(np.bincount(seen.clip(max=2), minlength=3) / n)
            never, once, more = np.bincount(total.clip(max=2), minlength=3).tolist()
            if more or once != min(n, end - windows.epoch_start(epoch)):
                wrong.append(
                    f"epoch {epoch}: {once:,} windows are read once, {more:,} more often, {never:,} never"
                )
            rows = [
                ("  a process, least", np.min(shares, 0)),
                ("  a process, most", np.max(shares, 0)),
            ]
            for name, share in [
                (f"all, epoch {epoch}", np.array([never, once, more]) / n)
            ] + rows * (world_size > 1):
                print(
                    f"{name:24}{n:16,}{windows.left_out(epoch).sum():18,}{''.join(f'{x:12.4%}' for x in share)}"
                )
    print("\n".join(f"wrong: {w}" for w in wrong) or "nothing wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    command_line(
        lambda: tyro.extras.subcommand_cli_from_dict(
            dict(audit=audit),
            description=__doc__,
            use_underscores=True,
            config=(tyro.conf.FlagConversionOff,),
        )
    )
