"""Which window of tokens comes when, and batches of them.

The order of the data is a pure function. Epoch e cuts each shard into windows of T tokens,
beginning at offset(e), and `order(seed, e, n, i)` says which of the n windows comes i-th. Optimizer
step s takes windows s*G .. (s+1)*G - 1 of the endless sequence of epochs, G = total_batch / T; each
process takes its part of that slice. So the same run sees the same global batches on any number of
GPUs, the loader's whole state is the step, and no window is lost or repeated. `python audit.py`
counts it.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from runtime.command_line import UserError
from runtime.device import worker_thread
from runtime.world import World
from shard_files import (
    RESTORE_HINT,
    DamagedShard,
    Shard,
    same_content,
    stamp,
    start_verifying,
    unreadable,
)
from tokenizer import EOT

# seconds between comparisons of a shard's size and mtime with those at the start: one takes 2 us,
# reading a window 3
CHECK_SECONDS = 1.0
LOCATE_AT_ONCE = 4096  # windows located together: 0.16 us each; 64 at a time 1.4 us (one CPU core)
MAX_OPEN_FILES = 256  # well below the usual limit of 1,024
READ_TOKENS = 1 << 22  # read at a time when documents are indexed: 8 MB

# --------------------------------------------------------------------------------------------------
# order: which window comes when


def splitmix64(x: np.ndarray, key: int) -> np.ndarray:
    """Hash 64-bit integers with a key: the finaliser of splitmix64 (Steele et al. 2014)."""
    x = x + key
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


def derive_keys(n: int, *words: int) -> list[int]:
    """Derive n independent 64-bit keys from any integers (blake2b)."""
    keys = []
    for i in range(n):
        digest = hashlib.blake2b(repr((i, *words)).encode(), digest_size=8).digest()
        keys.append(int.from_bytes(digest, "little"))
    return keys


def order(seed: int, epoch: int, n: int, i: np.ndarray) -> np.ndarray:
    """Return entries i of a random permutation of range(n), seeded by (seed, epoch).

    A Feistel network on pairs (left, right) in Z_a x Z_b with a * b just above n, so it needs O(1)
    memory; a result beyond n goes through again until it is below ("cycle walking", Black and
    Rogaway 2002), which happens with probability under 1 / sqrt(n). Eight rounds, because the
    halves are small: with four, neighbours stay visibly related for n below 1,000.
    """
    a = max(1, int(np.sqrt(n)))
    b = int(-(-n // a))
    out = np.array(i, dtype=np.uint64)
    todo = np.arange(out.size)
    round_keys = derive_keys(8, seed, epoch, n)
    while todo.size:
        left = out[todo] // b  # in Z_a
        right = out[todo] % b  # in Z_b
        for r in range(0, 8, 2):
            left = (left + splitmix64(right, round_keys[r]) % a) % a
            right = (right + splitmix64(left, round_keys[r + 1]) % b) % b
        out[todo] = left * b + right
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)


class Windows:
    """The endless sequence of windows of a split: position p (0, 1, 2, ...) to T + 1 token ids.

    data_order "sequential" reads as on disk, every epoch alike except for its offset; "documents"
    reshuffles shards, and documents within a shard, in each epoch; "global" permutes all windows.
    All three read every window of an epoch once. Epoch e > 0 leaves out the first offset(e) < T
    tokens of each shard, so windows are cut at other places; with the remainder at the end, fewer
    than 2T tokens per shard are unread.
    """

    def __init__(
        self,
        shards: list[Shard],
        T: int,
        data_order: str = "sequential",
        seed: int = 0,
        vocab_size: int = 1 << 16,
    ):
        self.shards = shards
        self.T = T
        self.data_order = data_order
        self.seed = seed
        self.vocab_size = vocab_size
        self.sizes = np.array([s.tokens for s in shards])
        self.epoch_starts = [0]  # position of the first window of each epoch met so far
        self.files = {}  # open files by shard
        self.document_orders = {}  # by (epoch, shard), of the shards last used
        self.checked_at = {}  # when each shard's file was last compared

    def offset(self, epoch: int) -> int:
        """Return the tokens left out at the beginning of each shard: 0 in epoch 0, then random."""
        if epoch == 0:
            return 0
        most = int(min(self.T, self.sizes.min() - self.T))  # leaves one window at least
        return derive_keys(1, self.seed, epoch, -1)[0] % most

    def counts(self, epoch: int) -> np.ndarray:
        """Count the windows of each shard; each needs one token more than T for its last target."""
        return (self.sizes - 1 - self.offset(epoch)) // self.T

    def per_epoch(self, epoch: int = 0) -> int:
        """Count the windows of an epoch."""
        return int(self.counts(epoch).sum())

    def in_epochs(self, epochs: float) -> int:
        """Count the windows of the first `epochs` epochs, which may be fractional."""
        whole = int(epochs)
        windows = sum(self.per_epoch(epoch) for epoch in range(whole))
        return int(windows + epochs % 1 * self.per_epoch(whole))

    def left_out(self, epoch: int) -> np.ndarray:
        """Count the tokens of each shard that are not read in an epoch: fewer than 2T."""
        return self.sizes - 1 - self.counts(epoch) * self.T

    def epoch_start(self, epoch: int) -> int:
        """Return the position of an epoch's first window."""
        for e in range(len(self.epoch_starts) - 1, epoch):
            self.epoch_starts.append(self.epoch_starts[e] + self.per_epoch(e))
        return self.epoch_starts[epoch]

    def locate(self, positions: np.ndarray) -> np.ndarray:
        """Return epoch, shard and first token within it of the windows at n positions, (3, n)."""
        while self.epoch_starts[-1] <= positions.max():
            self.epoch_start(len(self.epoch_starts))
        epochs = np.searchsorted(self.epoch_starts, positions, side="right") - 1
        places = np.empty((3, len(positions)), np.int64)
        places[0] = epochs
        for epoch in range(epochs.min(), epochs.max() + 1):
            inside = epochs == epoch
            i = positions[inside] - self.epoch_starts[epoch]
            counts = self.counts(epoch)
            shards = np.arange(len(self.shards))  # in the order in which they are read
            if self.data_order == "global":
                i = order(self.seed, epoch, int(counts.sum()), i)
            elif self.data_order == "documents":
                shards = order(self.seed, epoch, len(shards), shards)
            ends = np.cumsum(counts[shards])
            place = np.searchsorted(ends, i, side="right")
            first_window = (ends - counts[shards])[place]
            places[1, inside] = shards[place]
            places[2, inside] = self.offset(epoch) + (i - first_window) * self.T
        return places

    def read(self, positions: np.ndarray, out: np.ndarray):
        """Fill out (n, T + 1) uint16 with the windows at n positions."""
        self.read_places(self.locate(positions), out)

    def read_places(self, places: np.ndarray, out: np.ndarray):
        """Fill out (n, T + 1) uint16 with the windows at places (3, n), as locate gives them.

        Raises UserError for a shard that was cut, replaced or removed, and for a token id beyond
        vocab_size (which would be a device-side assertion on a GPU).
        """
        now = time.monotonic()
        for shard in set(places[1].tolist()):
            if now - self.checked_at.get(shard, -CHECK_SECONDS) >= CHECK_SECONDS:
                self.check_file(shard)
                self.checked_at[shard] = now
        for row, epoch, shard, token in zip(out, *places.tolist()):
            if self.data_order == "documents":
                self.read_reordered(row, shard, token, epoch)
            else:
                self.read_tokens(row, shard, token)
        largest = int(out.max())
        if largest >= self.vocab_size:
            path = self.shards[places[1, out.max(axis=1).argmax()]].path
            raise UserError(
                f"{path} has token id {largest}, beyond vocab_size {self.vocab_size}; hint: is it "
                f"GPT-2's tokenizer's? it needs --vocab_size {-(-(largest + 1) // 128) * 128}"
            )

    def check_file(self, shard: int):
        """Raise DamagedShard when a shard's file is not the one that the run began with."""
        path, at_start = self.shards[shard].path, self.shards[shard].stamp
        try:
            now = stamp(path)
        except OSError as e:
            raise unreadable(path, e) from e
        if not at_start or now == at_start:
            return
        if same_content(self.shards[shard], now):  # e.g. touched
            self.shards[shard] = self.shards[shard]._replace(stamp=now)
            return
        change = "was replaced or rewritten"
        if now[0] != at_start[0]:
            change = f"has {now[0]} bytes now, not {at_start[0]}"
        raise DamagedShard(f"{path} {change} since the run began; {RESTORE_HINT}", path)

    def read_tokens(self, row: np.ndarray, shard: int, token: int):
        """Fill a row with the tokens of a shard that begin at number `token`."""
        # Unbuffered reads, no memory map: mapped pages count as this process's memory, and a shard
        # that shrinks is a crash (SIGBUS) instead of an error that names it.
        path = self.shards[shard].path
        first_byte = self.shards[shard].start + 2 * token
        try:
            if shard not in self.files:
                if len(self.files) >= MAX_OPEN_FILES:
                    oldest = next(iter(self.files))
                    self.files.pop(oldest).close()
                self.files[shard] = open(path, "rb", buffering=0)  # noqa: SIM115
            n_bytes = os.preadv(self.files[shard].fileno(), (row,), first_byte)
        except OSError as e:
            raise unreadable(path, e) from e
        if n_bytes != row.nbytes:
            raise UserError(
                f"{path} has become shorter, no {len(row)} tokens at {token}; {RESTORE_HINT}"
            )

    def read_reordered(self, row: np.ndarray, shard: int, token: int, epoch: int):
        """Fill a row as read_tokens would if the shard's documents stood in this epoch's order."""
        starts, ends = self.document_order(epoch, shard)
        document = int(np.searchsorted(ends, token, side="right"))
        filled = 0
        while filled < len(row):
            begins = int(ends[document - 1]) if document else 0  # in this epoch's order
            skip = token + filled - begins  # tokens of the document that lie before the window
            take = min(len(row) - filled, int(ends[document]) - token - filled)
            self.read_tokens(row[filled : filled + take], shard, int(starts[document]) + skip)
            filled += take
            document += 1

    def document_order(self, epoch: int, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a shard's documents in an epoch's order: start on disk, end in that order."""
        if (epoch, shard) not in self.document_orders:
            # a batch lies in one shard or two; 100M tokens: 100k documents, 2 MB
            if len(self.document_orders) >= 2:
                self.document_orders.pop(next(iter(self.document_orders)))
            starts = self.document_starts(shard)
            lengths = np.diff(starts, append=self.shards[shard].tokens)
            key = derive_keys(1, self.seed, shard)[0]
            permuted = order(key, epoch, len(starts), np.arange(len(starts)))
            self.document_orders[epoch, shard] = starts[permuted], np.cumsum(lengths[permuted])
        return self.document_orders[epoch, shard]

    def document_starts(self, shard: int) -> np.ndarray:
        """Return the tokens at which the documents of a shard begin."""
        path, first_byte, tokens, *_ = self.shards[shard]
        starts = [np.zeros(1, np.int64)]  # a shard may begin inside a document
        try:
            with open(path, "rb") as f:
                f.seek(first_byte)
                for token in range(0, tokens, READ_TOKENS):
                    ids = np.fromfile(f, np.uint16, READ_TOKENS)
                    starts.append(token + np.flatnonzero(ids == EOT))
        except OSError as e:
            raise unreadable(path, e) from e
        return np.unique(np.concatenate(starts))


# --------------------------------------------------------------------------------------------------
# batches


class Batch(NamedTuple):
    x: torch.Tensor  # (B, T) int64, on the device
    y: torch.Tensor  # (B, T) int64: x shifted by one
    digest: int  # batch_digest() of this micro-batch; 0 unless hash_batches


def micro_batch_positions(k: np.ndarray | int, B: int, rank: int, world_size: int) -> np.ndarray:
    """Return the positions (..., B) of the windows in a process's micro-batch k.

    k counts from the start of the run. The processes take micro-batches of B in turn; a global
    batch is a whole number of such rounds.
    """
    return ((np.asarray(k) * world_size + rank) * B)[..., None] + np.arange(B)


class Loader:
    """Micro-batches of one process, from optimizer step start_step on.

    One thread reads ahead by one micro-batch: files to a pinned buffer, one copy to the device on a
    stream of its own, so take() never waits while the device is busy. On rank 0 the shards are
    compared with manifest.json, large data in a thread; take() reports a mismatch.
    """

    def __init__(
        self,
        windows: Windows,
        total_batch: int,
        B: int,
        world: World,
        start_step: int = 0,
        hash_batches: bool = False,
        on_error: Callable[[UserError], None] | None = None,
    ):
        self.windows = windows
        self.B = B
        self.world = world
        self.hash_batches = hash_batches
        self.on_error = on_error
        self.wrong: list[UserError] = []  # filled by the thread that compares with manifest.json
        self.waited = 0.0  # seconds in take() since totals() was called
        self.digest = 0  # sum of the batches' digests since then
        self.micro_steps = total_batch // (B * windows.T * world.world_size)
        on_gpu = world.device.type == "cuda"
        self.buffer = torch.empty(B, windows.T + 1, dtype=torch.int16, pin_memory=on_gpu)
        self.stream = torch.cuda.Stream(world.device) if on_gpu else None
        self.located = range(0)  # the micro-batches whose places are known
        self.k = start_step * self.micro_steps  # the next micro-batch: the loader's whole state
        self.thread = worker_thread("loader", world.device)
        self.next_batch = self.thread.submit(self.read, self.k)
        if world.rank == 0:
            start_verifying(windows.shards, self.wrong)

    def take(self) -> Batch | None:
        """Return the next micro-batch.

        Errors of the reading threads go to on_error, and the batch is None then; without on_error
        they are raised.
        """
        started = time.perf_counter()
        try:
            if self.wrong:
                raise self.wrong[0]
            batch = self.next_batch.result()
        except UserError as e:
            if self.on_error is None:
                raise
            self.on_error(e)
            return None
        self.waited += time.perf_counter() - started
        self.digest += batch.digest
        self.k += 1
        self.next_batch = self.thread.submit(self.read, self.k)
        if self.stream is not None:
            # memory of the loader's stream: keep it until the main stream has read it
            for ids in (batch.x, batch.y):
                ids.record_stream(torch.cuda.current_stream(self.world.device))
        return batch

    def totals(self) -> tuple[float, int]:
        """Return the seconds waited and the sum of digests since the last call."""
        totals = self.waited, self.digest
        self.waited, self.digest = 0.0, 0
        return totals

    def read(self, k: int) -> Batch:
        """Read this process's micro-batch k now (in the thread)."""
        rank, world_size, device = self.world
        if k not in self.located:
            n_windows = min(LOCATE_AT_ONCE, self.windows.per_epoch())
            self.located = range(k, k + max(1, n_windows // self.B))
            positions = micro_batch_positions(self.located, self.B, rank, world_size)
            self.places = self.windows.locate(positions.ravel())
        first = (k - self.located.start) * self.B
        rows = as_uint16(self.buffer)
        self.windows.read_places(self.places[:, first : first + self.B], rows)
        digest = 0
        if self.hash_batches:
            row_in_global_batch = (k % self.micro_steps * world_size + rank) * self.B
            digest = batch_digest(rows, row_in_global_batch)
        if self.stream is None:
            return Batch(*to_ids(self.buffer, device), digest)
        with torch.cuda.stream(self.stream):
            x, y = to_ids(self.buffer, device)
        self.stream.synchronize()  # in this thread: the training thread never waits for a copy
        return Batch(x, y, digest)

    def close(self):
        self.thread.shutdown(wait=True, cancel_futures=True)


def as_uint16(rows: torch.Tensor) -> np.ndarray:
    """View int16 rows as the uint16 ids that they hold: torch has few uint16 kernels."""
    return rows.numpy().view(np.uint16)


def to_ids(rows: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn rows (B, T + 1) of ids into x, y (B, T) int64 on the device.

    They are contiguous, because the compiled model expects these strides.
    """
    if device.type == "cuda":  # copy 2 bytes per id, from pinned memory, and widen them there
        ids = rows.to(device, non_blocking=True).long() & 0xFFFF
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    # numpy, because torch would start a second OpenMP pool that competes with the training thread
    ids = as_uint16(rows)
    x, y = ids[:, :-1].astype(np.int64), ids[:, 1:].astype(np.int64)
    return torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)


def batch_digest(rows: np.ndarray, first: int) -> int:
    """Sum the hashes of rows, each salted with its place from `first` on.

    The sum over all processes is equal for any split of the global batch over them.
    """
    total = 0
    for place, row in enumerate(rows, first):
        salt = place.to_bytes(8, "little")
        digest = hashlib.blake2b(row.tobytes(), digest_size=8, salt=salt).digest()
        total += int.from_bytes(digest, "little")
    return total % 2**64


def val_batches(
    windows: Windows, val_tokens: int, B: int, world: World
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield this process's share of the first val_tokens of a split as (x, y), each (B, T).

    They are always the same windows. Every batch has the same shape (a compiled model never
    recompiles), and every process gets as many: rows past the end have targets of -1, which do not
    count. Sum the losses, then divide: the result does not depend on B or on the number of
    processes.
    """
    n = min(val_tokens // windows.T, windows.per_epoch(0))
    positions = np.arange(world.rank, n, world.world_size)
    most = -(-n // world.world_size)  # windows of the process that has most
    rows = torch.zeros(B, windows.T + 1, dtype=torch.int16)
    for first in range(0, most, B):
        batch = positions[first : first + B]
        if len(batch):  # none when the other processes have a row more
            windows.read(batch, as_uint16(rows)[: len(batch)])
        x, y = to_ids(rows, world.device)
        y[len(batch) :] = -1
        yield x, y
