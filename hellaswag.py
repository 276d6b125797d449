"""HellaSwag (Zellers et al. 2019): which of four endings does the model find likeliest?

    python hellaswag.py --model log/gpt2-rope              the whole validation set, 10,042 items
    python hellaswag.py --model gpt2 --protocol harness --limit 1000 --out results.json

Protocols: gpt2 (raw context, mean loss per token; what train_gpt2.py logs) and harness (as lm-eval
0.4.13). notes/hellaswag.md compares them, and says why packed rows are fast.
"""

import gzip
import hashlib
import json
import os
import re
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import hf
from runtime.command_line import PathText, UserError, one_line, parse, run_script, say
from runtime.device import Compute, choose_compute, pick_device
from runtime.files import atomic, write_json
from runtime.world import World, on_rank0, sum_over_ranks
from tokenizer import EOT, N_VOCAB, gpt2

DATA = Path(__file__).parent / "data" / "hellaswag_val.jsonl"
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
Protocol = Literal["gpt2", "harness"]

# --------------------------------------------------------------------------------------------------
# the data set


def writable_data() -> Path:
    """Return data/ beside the code; where that is read-only, data/ in the working directory."""
    return DATA.parent if os.access(DATA.parent, os.W_OK) else Path("data")


def fetch_items() -> Path | None:
    """Return the file of the validation set, downloaded once; None when that is impossible."""
    new = writable_data() / DATA.name
    for path in (DATA, Path(f"{DATA}.gz"), new, Path(f"{new}.gz")):
        if path.exists():
            return path
    try:
        with urllib.request.urlopen(URL, timeout=10) as response:
            raw = response.read(100_000_000)
        digest = hashlib.sha256(raw).hexdigest()
        if digest != SHA256:
            raise ValueError(f"SHA-256 {digest[:12]}..., expected {SHA256[:12]}...")
        new.parent.mkdir(exist_ok=True)
        with atomic(new) as temporary:
            temporary.write_bytes(raw)
    except (OSError, ValueError) as e:
        say(
            f"hellaswag | skipped, its data cannot be downloaded ({one_line(e)}); "
            f"hint: put {URL} at {new}; --hellaswag_limit 0 trains without it"
        )
        return None
    say(f"hellaswag | {URL}, now in {new}")
    return new


def clean_text(text: str) -> str:
    """Remove WikiHow's artifacts as lm-eval's task does (brackets are section headings)."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def render_item(item: dict) -> tuple[str, list[str]]:
    """Return query and endings of the harness protocol; an item without ctx_a is clean already."""
    if "ctx_a" not in item:
        return f"{item['activity_label']}: {item['ctx']}", item["endings"]
    query = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
    return clean_text(query), [clean_text(ending) for ending in item["endings"]]


def encode_endings(item: dict, protocol: Protocol) -> list[tuple[list[int], list[int], int]]:
    """Return, for each ending, ids of the context, its ids, and its divisor in acc_norm."""
    encode = gpt2().encode_ordinary
    if protocol == "gpt2":
        context = encode(item["ctx"])
        encoded = [encode(" " + ending) for ending in item["endings"]]
        return [(context, ids, len(ids)) for ids in encoded]
    query, endings = render_item(item)
    n = len(encode(query.rstrip()))  # blanks at its end belong to the ending
    encoded = [encode(query + " " + ending) for ending in endings]
    return [(ids[:n], ids[n:], len(ending)) for ids, ending in zip(encoded, endings)]


class Items(NamedTuple):
    """Tokenized items; ending 4 i + choice belongs to item i."""

    tokens: np.ndarray  # uint16: context, ending, context, ending, ...
    lengths: np.ndarray  # (4 n, 2): ids of each context and each ending
    divisors: np.ndarray  # (4 n,): tokens (gpt2) or characters (harness) of each ending
    labels: np.ndarray  # (n,): the right choice
    protocol: Protocol


def load_items(path: Path, protocol: Protocol = "gpt2", limit: int = 0) -> Items:
    """Tokenize `limit` items (0 = all) of a jsonl or jsonl.gz file, spread evenly over it.

    All 10,042 take 2 s. Raises UserError for other content.
    """
    raw = read_items(path)
    count = min(limit or len(raw), len(raw))
    raw = [raw[i * len(raw) // count] for i in range(count)]
    try:
        endings = [ending for item in raw for ending in encode_endings(item, protocol)]
    except KeyError as e:
        raise UserError(
            f"{path} has items without {e}; hint: the {protocol} protocol needs it"
        ) from e
    labels = [item["label"] for item in raw]
    parts = []
    for context, ids, _ in endings:
        parts += [np.array(context, np.uint16), np.array(ids, np.uint16)]
    lengths = np.array([len(part) for part in parts]).reshape(-1, 2)
    divisors = np.array([divisor for _, _, divisor in endings])
    return Items(np.concatenate(parts), lengths, divisors, np.array(labels), protocol)


MAX_CHARACTERS = 100_000_000  # of a file; the validation set has 12 million
# of a file that is not HellaSwag's
READ_ERRORS = (ValueError, KeyError, TypeError, EOFError, OSError, zlib.error, RecursionError)


def read_items(path: Path) -> list[dict]:
    """Read a jsonl or jsonl.gz file, skipping blank lines. Raises UserError naming a wrong line."""
    opener = gzip.open if path.suffix == ".gz" else open
    ours = path.parent in (DATA.parent, writable_data())
    fix = "remove it, it is downloaded again; or --hellaswag_limit 0" if ours else "--data FILE"
    items = []
    place = ""
    try:
        with opener(path, "rt", encoding="utf-8-sig") as f:
            lines = f.read(MAX_CHARACTERS).split("\n")
            if f.read(1):
                raise ValueError(f"more than {MAX_CHARACTERS:,} characters")
        for number, line in enumerate(lines, 1):
            place = f", line {number}"
            if line.strip():
                items.append(checked_item(json.loads(line)))
        if not items:
            raise ValueError("no items")
    except READ_ERRORS as e:
        raise UserError(
            f"{path} cannot be read as HellaSwag's jsonl{place} ({one_line(e)}); hint: {fix}"
        ) from e
    return items


def checked_item(item: dict) -> dict:
    """Return an item with its label as a number. Raises ValueError or TypeError for a wrong one."""
    if not isinstance(item, dict):
        raise TypeError(f"{type(item).__name__} instead of an object")
    for name in ("ctx", "activity_label", "ctx_a", "ctx_b"):
        if not isinstance(item.get(name, ""), str):
            raise TypeError(f"{name} is {item[name]!r}, expected text")
    endings = item["endings"]
    if not isinstance(endings, list) or [type(ending) for ending in endings] != [str] * 4:
        raise ValueError(f"endings are {endings!r}, expected 4 texts")
    if str(item["label"]) not in ("0", "1", "2", "3"):
        raise ValueError(f"label is {item['label']!r}, expected 0, 1, 2 or 3")
    return item | {"label": int(item["label"])}


# --------------------------------------------------------------------------------------------------
# rows

PADDING = 7  # segment of unused slots: they see group 0's context, no token sees them


class PackedBatch(NamedTuple):
    """R rows of several contexts with their endings; all batches of a set have the same shapes."""

    idx: torch.Tensor  # (R, T) ids
    positions: torch.Tensor  # (R, T); an ending continues its context
    segment: torch.Tensor  # (R, T): 8 * group + 0 for its context, + 1 to 4 for its endings
    source: torch.Tensor  # (S,) flat indices into the rows, from which scored tokens are predicted
    targets: torch.Tensor  # (S,) these tokens; -1 for padding
    ending: torch.Tensor  # (S,) the ending each belongs to, 0 .. 4 n - 1


class ContextGroup:
    """A context and the endings that share it: their slots in a row."""

    def __init__(self, context: list[int]):
        self.context = context
        self.ids = list(context)
        self.positions = list(range(len(context)))
        self.segment = [0] * len(context)  # 0 for the context, 1 to 4 for the endings
        self.scored = []  # (slot it is predicted from, token, index of its ending)

    def add(self, ending: list[int], index: int):
        """Append an ending, all but its last token, which predicts nothing."""
        first = len(self.ids)
        end = len(self.context)
        self.ids += ending[:-1]
        self.positions += range(end, end + len(ending) - 1)
        self.segment += [1 + index % 4] * (len(ending) - 1)
        sources = [end - 1, *range(first, len(self.ids))]
        self.scored += [(source, token, index) for source, token in zip(sources, ending)]


def pack_items(
    items: Items, block_size: int, R: int, device: torch.device, T: int = 512
) -> tuple[list[PackedBatch], int]:
    """Return batches of R rows of T ids, and the number of items too long for the model.

    T grows when the longest group needs it.
    """
    groups, n_cut = group_by_context(items, block_size)
    longest = max(len(group.ids) for group in groups)
    T = max(T, -(-longest // 128) * 128)
    rows = fill_rows(groups, T)
    chunks = [rows[i : i + R] for i in range(0, len(rows), R)]
    S = max(sum(len(group.scored) for row in chunk for group in row) for chunk in chunks)
    return [build_batch(chunk, (R, T), S, device) for chunk in chunks], n_cut


def group_by_context(items: Items, block_size: int) -> tuple[list[ContextGroup], int]:
    """Return the groups of a set, and the number of items longer than block_size + 1 ids.

    Those are cut at the front, which may leave the endings of an item with different contexts; each
    distinct context makes a group of its own.
    """
    groups = []
    cut = set()
    texts = np.split(items.tokens, items.lengths.sum(1).cumsum()[:-1])
    for index, (text, (n_context, n_ending)) in enumerate(zip(texts, items.lengths)):
        ids = text.tolist()
        if n_context == 0:
            ids = [EOT, *ids]
        if len(ids) > block_size + 1:
            ids = ids[-(block_size + 1) :]
            cut.add(index // 4)
        split = max(1, len(ids) - n_ending)
        if index % 4 == 0 or groups[-1].context != ids[:split]:
            groups.append(ContextGroup(ids[:split]))
        groups[-1].add(ids[split:], index)
    return groups, len(cut)


def fill_rows(groups: list[ContextGroup], T: int) -> list[list[ContextGroup]]:
    """Distribute groups over rows of T slots: longest first, each where it leaves least room."""
    rows = []
    rows_by_room = [[] for _ in range(T + 1)]
    for group in sorted(groups, key=lambda group: len(group.ids), reverse=True):
        n = len(group.ids)
        room = next((room for room in range(n, T) if rows_by_room[room]), T)
        if room == T:
            row = []
            rows.append(row)
        else:
            row = rows_by_room[room].pop()
        row.append(group)
        rows_by_room[room - n].append(row)
    return rows


def build_batch(
    rows: list[list[ContextGroup]], shape: tuple[int, int], S: int, device: torch.device
) -> PackedBatch:
    """Lay out rows of groups in tensors of shape (R, T) and (S,)."""
    idx = np.zeros(shape, np.int64)
    positions = np.zeros(shape, np.int64)
    segment = np.full(shape, PADDING)
    scored = []
    for r, row in enumerate(rows):
        start = 0
        for g, group in enumerate(row):
            stop = start + len(group.ids)
            idx[r, start:stop] = group.ids
            positions[r, start:stop] = group.positions
            segment[r, start:stop] = 8 * g + np.array(group.segment)
            offset = r * shape[1] + start
            scored += [(offset + slot, token, index) for slot, token, index in group.scored]
            start = stop
    scored += [(0, -1, 0)] * (S - len(scored))
    arrays = (idx, positions, segment, *np.array(scored).T)
    return PackedBatch(*(torch.from_numpy(a.copy()).to(device) for a in arrays))


# --------------------------------------------------------------------------------------------------
# scoring


def score_tokens(model, batch: PackedBatch) -> torch.Tensor:
    """Return the losses (S,) of the scored tokens; the head is applied only there."""
    query = batch.segment[:, :, None]
    key = batch.segment[:, None, :]
    # a token sees its own segment and the context of its group
    mask = (query // 8 == key // 8) & ((key % 8 == 0) | (query == key))  # (R, T, T)
    mask &= torch.ones(mask.shape[1:], dtype=torch.bool, device=mask.device).tril()
    hidden = model.trunk(batch.idx, batch.positions, mask[:, None])  # (R, T, C)
    logits = model.head(hidden.flatten(0, 1)[batch.source]).float()  # (S, V)
    return F.cross_entropy(logits, batch.targets, ignore_index=-1, reduction="none")


class ItemResult(NamedTuple):
    """What the model chose, the right choice, and the summed loss of each ending."""

    acc_choice: int
    acc_norm_choice: int
    label: int
    losses: list[float]


class HellaSwag:
    """Items packed once for a model and kept on its device; each call measures it again.

    Rows are split over the ranks and the losses summed: the result is the same on any number of
    them.
    """

    def __init__(self, items: Items, model, world: World, compute: Compute, rows: int = 0):
        on_gpu = world.device.type == "cuda"
        self.items = items
        self.model = model
        self.compute = compute
        R = rows or (32 if on_gpu else 4)
        batches, self.n_cut = pack_items(items, model.config.block_size, R, world.device)
        self.rounds = -(-len(batches) // world.world_size)  # the same number on all ranks
        self.batches = batches[world.rank :: world.world_size]
        self.score = score_tokens
        if compute.compiled and on_gpu:  # on a CPU, compiling was not faster
            self.score = torch.compile(score_tokens, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def losses(self, poll: Callable = lambda: None, bar: bool = False) -> np.ndarray:
        """Return the summed loss of each ending, (n, 4), in nats.

        poll() is called before each batch, equally often on all ranks.
        """
        by_ending = np.zeros(len(self.items.divisors))
        endings = [batch.ending for batch in self.batches]
        # Allocated before the batches: a result kept by each of them would split the block that its
        # logits have freed, and the next logits would take a new one, 0.3 GB per batch on a CPU.
        token_losses = [torch.zeros(ending.shape, device=ending.device) for ending in endings]
        with self.compute.autocast():  # around all batches: it caches the converted weights
            for i in tqdm(range(self.rounds), "hellaswag", disable=not bar, leave=False):
                poll()
                if i < len(self.batches):
                    token_losses[i].copy_(self.score(self.model, self.batches[i]))
        if endings:
            by_token = torch.cat(token_losses).cpu().double().numpy()  # one sync for all batches
            by_ending = np.bincount(torch.cat(endings).cpu(), by_token, minlength=len(by_ending))
        return sum_over_ranks(torch.from_numpy(by_ending)).numpy().reshape(-1, 4)

    def __call__(self, poll: Callable = lambda: None, bar: bool = False) -> dict:
        """Return accuracies, their standard errors, the protocol, and an ItemResult per item.

        `items` counts all items, `cut` those longer than the model's context.
        """
        losses = self.losses(poll, bar)
        labels = self.items.labels
        acc_choices = losses.argmin(1)
        with np.errstate(divide="ignore"):  # as in lm-eval, an empty ending is not chosen
            acc_norm_choices = (losses / self.items.divisors.reshape(-1, 4)).argmin(1)
        acc = (acc_choices == labels).mean().item()
        acc_norm = (acc_norm_choices == labels).mean().item()
        columns = (acc_choices, acc_norm_choices, labels, losses)
        return {
            "protocol": self.items.protocol,
            "items": len(labels),
            "cut": self.n_cut,
            "acc": acc,
            "acc_se": standard_error(acc, len(labels)),
            "acc_norm": acc_norm,
            "se": standard_error(acc_norm, len(labels)),
            "choices": [ItemResult(*row) for row in zip(*(c.tolist() for c in columns))],
        }


def standard_error(share: float, n: int) -> float:
    return (share * (1 - share) / n) ** 0.5


def for_training(limit: int, model, world: World, compute: Compute) -> HellaSwag | None:
    """Return the set for evaluations during training; None when limit is 0 or there is no data.

    Rank 0 alone downloads and reads it: other ranks may run on machines without it.
    """

    def load() -> Items | None:
        path = fetch_items()
        return load_items(path, "gpt2", limit) if path else None

    if limit == 0:
        return None
    if model.config.vocab_size < N_VOCAB:
        say(
            f"hellaswag | skipped: it needs GPT-2's {N_VOCAB:,} tokens, the model has "
            f"{model.config.vocab_size:,}; hint: --hellaswag_limit 0"
        )
        return None
    items = on_rank0(load)
    return HellaSwag(items, model, world, compute) if items else None


# --------------------------------------------------------------------------------------------------
# the command line


@dataclass(frozen=True)
class Scoring:
    """Measure the HellaSwag accuracy of a model."""

    # run directory, checkpoint, Hugging Face GPT-2 name or folder; default: the newest run in log/
    model: PathText = ""
    # gpt2: raw context, mean loss per token; harness: as in lm-eval 0.4.13
    protocol: Protocol = "gpt2"
    limit: int = 0  # items, spread over the set; 0 = all
    data: PathText = ""  # jsonl or jsonl.gz; default: the validation set, downloaded into data/
    out: PathText = ""  # file for the result, as JSON
    per_item: bool = False  # each item's choices and losses, too, in that file
    device: str = "auto"  # cuda, mps or cpu; auto takes the first of these that exists
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the matmuls

    def run(self):
        """Print the result and write it to `out`. Raises UserError."""
        if self.limit < 0:
            raise UserError(f"limit is {self.limit}, must not be negative; hint: --limit 1000")
        if self.data and not Path(self.data).is_file():
            raise UserError(f"no such file: {self.data}; hint: --data FILE")
        path = Path(self.data) if self.data else fetch_items()
        if path is None:
            place = writable_data() / DATA.name
            raise UserError(f"no data to measure on; hint: --data FILE, or {URL} at {place}")
        device = pick_device(self.device)
        model = hf.load_for_text(self.model or hf.newest_run()).to(device)
        compute = choose_compute(device, self.dtype, use_compile=device.type == "cuda")
        items = load_items(path, self.protocol, self.limit)
        result = HellaSwag(items, model, World(0, 1, device), compute)(bar=True)
        choices = result.pop("choices")
        if result["cut"]:
            say(
                f"{result['cut']} items were longer than the model's {model.config.block_size} "
                "tokens: their beginning was cut"
            )
        say(json.dumps(result))
        if self.per_item:
            result["per_item"] = [choice._asdict() for choice in choices]
        if self.out:
            try:
                write_json(Path(self.out), result)
            except OSError as e:
                raise UserError(f"cannot write {self.out} ({one_line(e)}); hint: --out") from e


if __name__ == "__main__":
    run_script(lambda: parse(Scoring).run())
