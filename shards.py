"""Token shards: on disk, in order, and in batches.

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
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from config import UserError
from tokenizer import EOT, N_VOCAB

BIN_MAGIC, BIN_HEADER = 20240520, 1024  # llm.c: magic number, bytes of header (256 int32)
FORMAT = 1  # of manifest.json

# --------------------------------------------------------------------------------------------------------------------
# shards on disk


class Shard(NamedTuple):
    path: str
    start: int  # byte at which the token ids begin
    tokens: int


def open_shard(path: str) -> Shard:
    """Check a shard's header against the file's size. Raises ValueError saying what is wrong."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        if path.endswith(".bin"):
            header = np.frombuffer(f.read(BIN_HEADER), dtype=np.int32)
            if len(header) < 256 or header[0] != BIN_MAGIC or header[1] != 1:
                raise ValueError("its header is not llm.c's (magic 20240520, version 1)")
            start, tokens = BIN_HEADER, int(header[2])
        else:
            version = np.lib.format.read_magic(f)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, _, dtype = read(f)
            if dtype != np.uint16 or len(shape) != 1:
                raise ValueError(f"it holds {dtype} of shape {shape}, expected one dimension of uint16")
            start, tokens = f.tell(), shape[0]
    if size != start + 2 * tokens:
        raise ValueError(f"its header says {tokens} tokens = {start + 2 * tokens} bytes, the file has {size}")
    return Shard(path, start, tokens)


def open_shards(root: str, split: str, T: int) -> list[Shard]:
    """The shards of a split ("train" or "val") in name order, every header checked, against manifest.json if there is one.

    Raises UserError listing all that is wrong: no shards, unreadable ones, both formats, a shard too short for a window.
    """
    word = re.compile(rf"(?<![a-z]){split}(?![a-z])")  # "val" as a word: not that of retrieval_train_000000.npy
    paths = sorted(str(p) for p in Path(root).glob("*") if p.suffix in (".npy", ".bin") and word.search(p.name))
    if not paths:
        raise UserError(f"no {split} shards (*{split}*.npy or .bin) in {root}; hint: python prepare.py files YOUR.txt --out {root}")
    if len({os.path.splitext(p)[1] for p in paths}) > 1:
        raise UserError(f"{root} mixes .npy and .bin {split} shards, the same text may be there twice; hint: keep one kind")
    shards, wrong = [], []
    for path in paths:
        try:
            shards.append(open_shard(path))
            if shards[-1].tokens <= T:
                wrong.append(f"{path}: {shards[-1].tokens} tokens, fewer than a window of T + 1 = {T + 1}")
        except (ValueError, OSError, KeyError, EOFError) as e:
            wrong.append(f"{path}: {e}")
    wrong += manifest_problems(root, split, shards) if not wrong else []
    if wrong:
        raise UserError("; ".join(wrong) + "; hint: prepare these shards again, or move them away"
                        + (", or lower --T" if any("window" in w for w in wrong) else ""))
    return shards


def manifest_problems(root: str, split: str, shards: list[Shard]) -> list[str]:
    """Where the shards found differ from what manifest.json says was written; empty without a manifest."""
    path = os.path.join(root, "manifest.json")
    if not os.path.exists(path):
        return []
    try:
        with open(path) as f:
            manifest = json.load(f)
        listed = {s["file"]: s["tokens"] for s in manifest["shards"] if s["split"] == split}
        if manifest["tokenizer"] != "gpt2":
            return [f"{path}: tokenizer {manifest['tokenizer']!r}, expected 'gpt2'"]
    except (ValueError, KeyError, TypeError) as e:
        return [f"{path}: not a manifest ({type(e).__name__}: {e})"]
    found = {os.path.basename(s.path): s.tokens for s in shards}
    return [f"{name}: manifest.json says {listed.get(name, 'no such shard')}, on disk {found.get(name, 'missing')} (tokens)"
            for name in sorted(listed.keys() | found.keys()) if listed.get(name) != found.get(name)]


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


def write_manifest(out: str, shards: list[dict], sources: list[dict]):
    """manifest.json, written last: a directory that has one is complete."""
    path = Path(out) / "manifest.json"
    text = json.dumps(dict(format=FORMAT, tokenizer="gpt2", shards=shards, sources=sources), indent=1)
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)


def fingerprint(windows: "Windows") -> str:
    """Names the data of a run: file names, sizes and the hashes of the manifest, when there is one. A resumed run compares it."""
    names = [(os.path.basename(s.path), s.tokens) for s in windows.shards]
    manifest = Path(windows.shards[0].path).with_name("manifest.json")
    hashes = [s["sha256"] for s in json.loads(manifest.read_text())["shards"]] if manifest.exists() else []
    return hashlib.blake2b(repr((names, hashes)).encode(), digest_size=8).hexdigest()


def sha256(path: str | Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


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

    A Feistel network on pairs (left, right) in Z_a x Z_b with a * b just above n; a result beyond n is put through again
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
            left = (left + mix(right, round_keys[r])% a_) % a_
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

    def __init__(self, shards: list[Shard], T: int, data_order: str = "sequential", seed: int = 0, vocab_size: int = 1 << 16):
        self.shards, self.T, self.data_order, self.seed, self.vocab_size = shards, T, data_order, seed, vocab_size
        self.sizes = np.array([s.tokens for s in shards])
        self.epoch_starts = [0]  # position of the first window of each epoch met so far
        self.files, self.documents = {}, {}  # caches: open files, document index of the shards last used

    def offset(self, epoch: int) -> int:
        """Tokens left out at the beginning of each shard: 0 in epoch 0, then random, leaving one window at least."""
        return 0 if epoch == 0 else keys(1, self.seed, epoch, -1)[0] % int(min(self.T, self.sizes.min() - self.T))

    def counts(self, epoch: int) -> np.ndarray:
        """Windows of each shard in this epoch; each needs one token more than T for its last target."""
        return (self.sizes - 1 - self.offset(epoch)) // self.T

    def per_epoch(self, epoch: int = 0) -> int:
        return int(self.counts(epoch).sum())

    def epoch_of(self, position: int) -> int:
        """The epoch that a position lies in."""
        while self.epoch_starts[-1] <= position:
            self.epoch_starts.append(self.epoch_starts[-1] + self.per_epoch(len(self.epoch_starts) - 1))
        return int(np.searchsorted(self.epoch_starts, position, side="right")) - 1

    def read(self, positions: np.ndarray, out: np.ndarray):
        """Fill out (len(positions), T + 1) uint16 with the windows at these ascending positions.

        Raises UserError for a token id beyond vocab_size (on a GPU it would end in a device-side assertion), or a shard
        that has become shorter.
        """
        row = 0
        while row < len(positions):
            epoch = self.epoch_of(int(positions[row]))
            start = self.epoch_starts[epoch]
            end = row + int(np.searchsorted(positions[row:], start + self.per_epoch(epoch)))  # positions are ascending
            self._read_epoch(epoch, positions[row:end] - start, out[row:end])
            row = end

    def _read_epoch(self, epoch: int, i: np.ndarray, out: np.ndarray):
        counts, offset = self.counts(epoch), self.offset(epoch)
        which = np.arange(len(self.shards))  # the order of the shards
        if self.data_order == "global":
            i = order(self.seed, epoch, int(counts.sum()), i)
        elif self.data_order == "documents":
            which = order(self.seed, epoch, len(which), which)
        ends = np.cumsum(counts[which])
        place = np.searchsorted(ends, i, side="right")
        first = offset + (i - (ends - counts[which])[place]) * self.T  # first token within the shard
        for row, shard, token in zip(out, which[place].tolist(), first.tolist()):
            if self.data_order == "documents":
                self._read_documents(epoch, shard, token, row)
            else:
                self._read_tokens(shard, token, row)
        if (largest := int(out.max())) >= self.vocab_size:
            path = self.shards[which[place[out.max(axis=1).argmax()]]].path
            raise UserError(f"{path} has token id {largest}, beyond vocab_size {self.vocab_size}; hint: were these shards made with "
                            f"GPT-2's tokenizer? --vocab_size {-(-(largest + 1) // 128) * 128} accepts them")

    def _read_tokens(self, shard: int, token: int, row: np.ndarray):
        # Unbuffered reads rather than a memory map: the pages of a map count as this process's memory, and a shard that
        # shrinks under it is a crash (SIGBUS) instead of an error that names the file.
        if (file := self.files.get(shard)) is None:
            if len(self.files) >= 256:  # stay clear of the usual limit of 1,024 open files
                self.files.pop(next(iter(self.files))).close()
            file = self.files[shard] = open(self.shards[shard].path, "rb", buffering=0)
        file.seek(self.shards[shard].start + 2 * token)
        if file.readinto(row) != row.nbytes:
            raise UserError(f"{self.shards[shard].path} has become shorter: {len(row)} tokens at {token} cannot be read; "
                            "hint: restore the shard, then run the same command to resume")

    def _read_documents(self, epoch: int, shard: int, token: int, row: np.ndarray):
        """A window of the shard as if its documents stood in this epoch's order."""
        starts, ends = self._document_order(epoch, shard)
        d, filled = int(np.searchsorted(ends, token, side="right")), 0
        while filled < len(row):
            skip = token + filled - int(ends[d - 1] if d else 0)  # tokens of document d that lie before the window
            take = min(len(row) - filled, int(ends[d]) - token - filled)
            self._read_tokens(shard, int(starts[d]) + skip, row[filled: filled + take])
            filled, d = filled + take, d + 1

    def _document_order(self, epoch: int, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """For the shard's documents in this epoch's order: where each starts on disk, and where it ends in that order."""
        if (epoch, shard) not in self.documents:
            if len(self.documents) >= 2:  # a batch lies in one shard or two; 100M tokens have about 100k documents, 2 MB
                self.documents.pop(next(iter(self.documents)))
            starts, (_, start, tokens) = [], self.shards[shard]
            with open(self.shards[shard].path, "rb") as f:
                f.seek(start)
                for at in range(0, tokens, 1 << 22):  # 8 MB at a time
                    starts.append(at + np.flatnonzero(np.fromfile(f, np.uint16, 1 << 22) == EOT))
            starts = np.union1d([0], np.concatenate(starts)).astype(np.int64)  # a shard may begin inside a document
            lengths = np.diff(starts, append=tokens)
            permuted = order(keys(1, self.seed, shard)[0], epoch, len(starts), np.arange(len(starts)))
            self.documents[epoch, shard] = starts[permuted], np.cumsum(lengths[permuted])
        return self.documents[epoch, shard]


# --------------------------------------------------------------------------------------------------------------------
# batches


class Batch(NamedTuple):
    x: torch.Tensor  # (B, T) int64, on the device
    y: torch.Tensor  # (B, T) int64: x shifted by one
    digest: int  # hash of the windows and their places in the global batch, summed modulo 2**64; 0 unless asked for


class Loader:
    """Micro-batches of one process, from optimiser step start_step on; next() never waits while the device is busy.

    The global batch of a step is split into micro-batches of B rows; micro-batch k goes to process k mod world_size.
    One thread reads ahead by one micro-batch: files to a pinned buffer, one copy to the device on a stream of its own.
    """

    def __init__(self, windows: Windows, total_batch: int, B: int, rank: int, world_size: int, device: torch.device,
                 start_step: int = 0, digests: bool = False):
        self.windows, self.B, self.rank, self.world_size, self.device = windows, B, rank, world_size, device
        self.digests = digests
        self.step_rows = total_batch // windows.T
        self.micro_steps = self.step_rows // (B * world_size)
        self.buffer = torch.empty(B, windows.T + 1, dtype=torch.int16, pin_memory=device.type == "cuda")
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self.ahead = self.thread.submit(self._fill, start_step, 0)

    def next(self) -> tuple[Batch, float]:
        """The next micro-batch, and the seconds spent waiting for it. Raises what the reading thread met."""
        t0 = time.perf_counter()
        step, micro_step, batch = self.ahead.result()
        waited = time.perf_counter() - t0
        step, micro_step = (step, micro_step + 1) if micro_step + 1 < self.micro_steps else (step + 1, 0)
        self.ahead = self.thread.submit(self._fill, step, micro_step)
        if self.stream is not None:  # the memory came from the loader's stream: keep it until the main stream has read it
            batch.x.record_stream(torch.cuda.current_stream(self.device))
        return batch, waited

    def _fill(self, step: int, micro_step: int) -> tuple[int, int, Batch]:
        first = (micro_step * self.world_size + self.rank) * self.B  # row within the global batch
        rows = self.buffer.numpy().view(np.uint16)
        self.windows.read(step * self.step_rows + first + np.arange(self.B), rows)
        digest = batch_digest(rows, first) if self.digests else 0
        if self.stream is None:
            ids = to_ids(self.buffer.to(self.device))
        else:
            with torch.cuda.stream(self.stream):
                ids = to_ids(self.buffer.to(self.device, non_blocking=True))
            self.stream.synchronize()  # in this thread: the training thread never waits for a copy
        return step, micro_step, Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), digest)  # strides as compiled for

    def close(self):
        self.thread.shutdown(wait=True, cancel_futures=True)


def to_ids(tokens: torch.Tensor) -> torch.Tensor:
    """uint16 ids held as int16 (the unsigned type has few kernels) to int64."""
    return tokens.long() & 0xFFFF


def batch_digest(rows: np.ndarray, first: int) -> int:
    """A sum of row hashes, each salted with its place: equal for any split of the global batch over processes."""
    digest = lambda k, row: hashlib.blake2b(row.tobytes(), digest_size=8, salt=(first + k).to_bytes(8, "little")).digest()
    return sum(int.from_bytes(digest(k, row), "little") for k, row in enumerate(rows)) % 2**64


def val_batches(windows: Windows, val_tokens: int, B: int, rank: int, world_size: int, device: torch.device):
    """Yield (x, y) over the first val_tokens of a split, each (B, T), always the same windows, shared by the processes.

    Every batch has the same shape (a compiled model never recompiles): rows past the end have targets of -1, which do
    not count. Sum the losses, then divide: the result does not depend on B or on the number of processes.
    """
    n = min(val_tokens // windows.T, windows.per_epoch(0))
    mine = np.arange(rank, n, world_size)
    rows = np.zeros((B, windows.T + 1), np.uint16)
    for at in range(0, len(mine), B):
        positions = mine[at: at + B]
        windows.read(positions, rows[: len(positions)])
        ids = to_ids(torch.from_numpy(rows.view(np.int16)).to(device))
        y = ids[:, 1:].clone(memory_format=torch.contiguous_format)
        y[len(positions):] = -1
        yield ids[:, :-1].contiguous(), y


# --------------------------------------------------------------------------------------------------------------------
# a yardstick


def bigram_loss(train: Windows, val: Windows, val_tokens: int, largest: int = 5_000_000) -> float | None:
    """Validation loss, nats per token, of counting which token follows which: what a network has to beat.

    p(b | a) = (n(ab) + k p(b)) / (n(a) + k) with p(b) = (n(b) + 1) / (N + V) (MacKay and Peto 1995); k is the best of
    a few for this very split, so the yardstick is as good as its kind can be. None for splits beyond `largest` tokens.
    """
    if train.sizes.sum() > largest:
        return None
    tokens = np.concatenate([np.fromfile(s.path, np.uint16, offset=s.start) for s in train.shards]).astype(np.int64)
    rows = np.zeros((min(val_tokens // val.T, val.per_epoch()), val.T + 1), np.uint16)
    val.read(np.arange(len(rows)), rows)
    before, after = rows[:, :-1].ravel().astype(np.int64), rows[:, 1:].ravel().astype(np.int64)
    V = 1 << 16
    single = np.bincount(tokens, minlength=V)
    p_after = (single[after] + 1) / (len(tokens) + N_VOCAB)
    pairs, counts = np.unique(tokens[:-1] * V + tokens[1:], return_counts=True)
    wanted = before * V + after
    at = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    n_pair = np.where(pairs[at] == wanted, counts[at], 0)
    return min(float(-np.log((n_pair + k * p_after) / (single[before] + k)).mean()) for k in (10, 20, 50, 100, 200, 500, 1000))
