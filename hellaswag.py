"""HellaSwag (Zellers et al. 2019): which of four endings does the model find likeliest? Two protocols:

    python hellaswag.py --model log/gpt2-rope                                    the whole validation set, 10,042 items
    python hellaswag.py --model gpt2 --protocol harness --limit 1000 --out results.json

gpt2: raw `ctx`; " " + ending tokenised apart. `acc` picks the ending of the smallest summed loss, `acc_norm` the one of
the smallest mean loss per token. GPT-2 (124M) has 0.2859 and 0.2955. What train_gpt2.py logs.
harness: as lm-eval 0.4.13 does it: activity label in front, artifacts of WikiHow cleaned away, context and ending tokenised
together and then split; `acc_norm` divides by the characters of the ending. GPT-2 (124M) has 0.2892 and 0.3114.

How it is fast: a context and its four endings stand in one row, each ending seeing the context and itself alone; several
items fill a row of fixed length, so that there is one shape only; logits are made where an ending is scored.
"""

import gzip
import hashlib
import json
import os
import re
import urllib.request
from pathlib import Path
from typing import Literal, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from runtime.command_line import UserError, one_line, parse, run_script
from runtime.device import Compute, autocast_dtype, pick_device
from runtime.files import sha256
from runtime.world import World, on_rank0, sum_over_ranks
from tokenizer import EOT, gpt2

DATA = Path(__file__).parent / "data" / "hellaswag_val.jsonl"
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
PROTOCOLS = ("gpt2", "harness")

# --------------------------------------------------------------------------------------------------------------------
# the data set


def fetch(say=print) -> Path | None:
    """The validation set in data/, downloaded if it is not there; None, and one line that says so, without a network."""
    for path in (DATA, Path(f"{DATA}.gz")):
        if path.exists():
            return path
    temporary = DATA.with_suffix(f".{os.getpid()}.tmp")
    try:
        with urllib.request.urlopen(URL, timeout=10) as response:
            raw = response.read(100_000_000)
        if (found := hashlib.sha256(raw).hexdigest()) != SHA256:
            raise ValueError(f"SHA-256 {found[:12]}..., expected {SHA256[:12]}...")
        temporary.write_bytes(raw)
        os.replace(temporary, DATA)
    except (OSError, ValueError) as e:
        say(
            f"hellaswag | skipped, its data cannot be had ({one_line(e)}); hint: put {URL} at data/{DATA.name}, or "
            "--hellaswag_limit 0"
        )
        return None
    say(f"hellaswag | {URL}, now in {DATA}")
    return DATA


def clean(text: str) -> str:
    """Without the artifacts of WikiHow, as lm-eval's task does it (brackets are section headings)."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def render(item: dict) -> tuple[str, list[str]]:
    """Query and endings of the harness protocol. An item without ctx_a is taken as cleaned already, its label aside."""
    if "ctx_a" not in item:
        return f"{item['activity_label']}: {item['ctx']}", item["endings"]
    query = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
    return clean(query), [clean(ending) for ending in item["endings"]]


def encode_item(item: dict, protocol: str) -> list[tuple[list[int], list[int], int]]:
    """For each ending: ids of the context, ids of the ending, and what acc_norm divides the loss by."""
    encode = gpt2().encode_ordinary
    if protocol == "gpt2":
        context = encode(item["ctx"])
        endings = [encode(" " + ending) for ending in item["endings"]]
        return [(context, ending, len(ending)) for ending in endings]
    (query, endings), paths = render(item), []
    context = query.rstrip()  # blanks at its end belong to the ending
    n = len(encode(context))
    for ending in endings:
        whole = encode(query + " " + ending)
        paths.append((whole[:n], whole[n:], len(ending)))
    return paths


class Items(NamedTuple):
    """Tokenised items, endings of all one after the other: four to an item."""

    tokens: np.ndarray  # uint16: context, ending, context, ending, ...
    lengths: np.ndarray  # (4 n, 2): ids of each context and each ending
    divisors: np.ndarray  # (4 n,): tokens (gpt2) or characters (harness) of each ending
    labels: np.ndarray  # (n,): the right ending
    protocol: str


def load(path: Path, protocol: str = "gpt2", limit: int = 0) -> Items:
    """Items of a jsonl or jsonl.gz file, `limit` of them spread evenly over it (0 = all).

    The tokens of the whole file are kept in data/, under the hash of the file. Raises UserError for other content.
    """
    cache = DATA.parent / f"hellaswag_{protocol}_{sha256(path)[:16]}.npz"
    try:
        with np.load(cache) as stored:
            items = Items(*(stored[name] for name in Items._fields[:4]), protocol)
    except (OSError, ValueError, KeyError, BadZipFile):
        items = tokenise(path, protocol)
        try:
            with open(temporary := cache.with_suffix(f".{os.getpid()}.tmp"), "wb") as f:
                np.savez(f, **{name: getattr(items, name) for name in Items._fields[:4]})
            os.replace(temporary, cache)
        except OSError:
            pass  # a read-only directory: tokenised again next time
    n = len(items.labels)
    chosen = np.arange(min(limit or n, n)) * n // min(limit or n, n)
    paths = (4 * chosen[:, None] + np.arange(4)).ravel()
    ends = items.lengths.sum(1).cumsum()
    tokens = [items.tokens[ends[p] - items.lengths[p].sum() : ends[p]] for p in paths]
    return Items(
        np.concatenate(tokens),
        items.lengths[paths],
        items.divisors[paths],
        items.labels[chosen],
        protocol,
    )


def tokenise(path: Path, protocol: str) -> Items:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f:
            raw = [json.loads(line) for line in f]
        paths = [path for item in raw for path in encode_item(item, protocol)]
        labels = np.array([int(item["label"]) for item in raw])
        if not raw or len(paths) != 4 * len(raw):
            raise ValueError(f"{len(raw)} items with {len(paths)} endings")
    except (ValueError, KeyError, TypeError, EOFError, OSError, AttributeError) as e:
        raise UserError(
            f"{path} is not HellaSwag's jsonl ({one_line(e)}); hint: remove it, or --hellaswag_limit 0"
        ) from e
    tokens = np.concatenate(
        [np.array(part, np.uint16) for context, ending, _ in paths for part in (context, ending)]
    )
    return Items(
        tokens,
        np.array([[len(c), len(e)] for c, e, _ in paths]),
        np.array([d for _, _, d in paths]),
        labels,
        protocol,
    )


# --------------------------------------------------------------------------------------------------------------------
# rows


class Batch(NamedTuple):
    """Rows of several contexts with their endings. All batches of a set have the same shapes."""

    idx: torch.Tensor  # (R, T) ids
    positions: torch.Tensor  # (R, T): an ending's go on from its context's
    part: (
        torch.Tensor
    )  # (R, T): 8 * text + 0 for a context, + 1 to 4 for its endings; 7 for padding
    where: (
        torch.Tensor
    )  # (S,) places in the flattened rows from which a token of an ending is predicted
    targets: torch.Tensor  # (S,) that token; -1 for padding
    path: torch.Tensor  # (S,) the ending it belongs to, counted over the set


def pack(
    items: Items, block_size: int, rows: int, device: torch.device, T: int = 512
) -> tuple[list[Batch], int]:
    """Batches of `rows` rows of T ids, and the number of items that were too long for the model.

    Of a text longer than block_size + 1 ids the beginning goes, which may leave the endings with different contexts: an
    item is as many texts as it has contexts. T grows when the longest text needs it. Texts go where they fit best.
    """
    texts, cut, end = [], set(), 0
    for p, (n_context, n_ending) in enumerate(items.lengths.tolist()):
        end += n_context + n_ending
        ids = [
            *([EOT] if n_context == 0 else []),
            *items.tokens[end - n_context - n_ending : end].tolist(),
        ]
        if len(ids) > block_size + 1:
            ids, _ = ids[-(block_size + 1) :], cut.add(p // 4)
        at = max(1, len(ids) - n_ending)  # the first ending token
        if p % 4 and texts[-1][0] == ids[:at]:
            texts[-1][1].append((p, ids[at:]))
        else:
            texts.append((ids[:at], [(p, ids[at:])]))
    length = lambda text: (
        len(text[0]) + sum(len(ending) - 1 for _, ending in text[1])
    )  # nothing follows a last token
    T = max(T, -(-max(map(length, texts)) // 128) * 128)
    rooms: list[list[list]] = [[] for _ in range(T + 1)]  # the rows that have so much room left
    filled = []
    for text in sorted(texts, key=length, reverse=True):
        n = length(text)
        room = next((r for r in range(n, T) if rooms[r]), None)
        row = rooms[room].pop() if room else []
        filled += [] if row else [row]
        row.append(text)
        rooms[(room or T) - n].append(row)
    return to_batches(filled, rows, T, device), len(cut)


def to_batches(filled: list[list], rows: int, T: int, device: torch.device) -> list[Batch]:
    n = -(-len(filled) // rows)
    idx, positions = np.zeros((2, n * rows, T), np.int64)
    part, scored = np.full((n * rows, T), 7), [[] for _ in range(n)]
    for r, row in enumerate(filled):
        at = 0
        for t, (context, endings) in enumerate(row):
            last = at + len(context) - 1  # predicts the first token of each ending
            idx[r, at : last + 1], positions[r, at : last + 1], part[r, at : last + 1] = (
                context,
                range(len(context)),
                8 * t,
            )
            at = last + 1
            for k, (path, ending) in enumerate(endings, 1):
                to = at + len(ending) - 1
                idx[r, at:to], part[r, at:to] = ending[:-1], 8 * t + k
                positions[r, at:to] = range(len(context), len(context) + to - at)
                sources = [last, *range(at, to)][: len(ending)]
                scored[r // rows] += [
                    (r % rows * T + s, token, path) for s, token in zip(sources, ending)
                ]
                at = to
    S = max(map(len, scored))
    scored = np.array([s + [(0, -1, 0)] * (S - len(s)) for s in scored])  # (n, S, 3)
    tensors = [
        torch.from_numpy(a).to(device) for a in (idx, positions, part, *np.moveaxis(scored, 2, 0))
    ]
    return [
        Batch(
            *(t[i * rows : (i + 1) * rows] for t in tensors[:3]),
            *(t[i].contiguous() for t in tensors[3:]),
        )
        for i in range(n)
    ]


# --------------------------------------------------------------------------------------------------------------------
# scoring


def nats(model, batch: Batch) -> torch.Tensor:
    """Losses (S,) of the scored tokens: the head sees only the places that predict one."""
    T = batch.part.shape[1]
    row, column = batch.part[:, :, None], batch.part[:, None, :]
    mask = (row // 8 == column // 8) & (
        (column % 8 == 0) | (row == column)
    )  # its own context, or its own part
    mask &= torch.ones(T, T, dtype=torch.bool, device=mask.device).tril()
    hidden = model.trunk(batch.idx, batch.positions, mask[:, None]).flatten(0, 1)[
        batch.where
    ]  # (S, C)
    return F.cross_entropy(
        model.head(hidden).float(), batch.targets, ignore_index=-1, reduction="none"
    )


class HellaSwag:
    """The items, packed once for a model and kept on its device; each call measures it anew.

    Rows are split over the processes, and the losses of the endings added up: the same result on any number of them.
    """

    def __init__(self, items: Items, model, world: World, compute: Compute, rows: int = 0):
        self.items, self.model, self.world, self.compute = items, model, world, compute
        on_gpu = world.device.type == "cuda"
        batches, self.cut = pack(
            items, model.config.block_size, rows or (32 if on_gpu else 4), world.device
        )
        self.rounds = -(-len(batches) // world.world_size)  # the same number in all processes
        self.batches = batches[world.rank :: world.world_size]
        # on a CPU, compiling was not faster
        self.nats = (
            torch.compile(nats, fullgraph=True, dynamic=False)
            if compute.compiled and on_gpu
            else nats
        )

    @torch.no_grad()
    def losses(self, poll=lambda: None, bar: bool = False) -> np.ndarray:
        """Summed loss of each ending, (n, 4), nats. poll() is called before each batch, equally often in all processes."""
        found = []
        with self.compute.autocast():  # around all: it keeps the weights that it has cast
            for i in tqdm(range(self.rounds), "hellaswag", disable=not bar, leave=False):
                poll()
                if i < len(self.batches):
                    found.append(self.nats(self.model, self.batches[i]))
        sums = np.zeros(len(self.items.divisors))
        if found:  # one trip from the device
            paths = torch.cat([b.path for b in self.batches]).cpu().numpy()
            sums = np.bincount(paths, torch.cat(found).cpu().double().numpy(), minlength=len(sums))
        return sum_over_ranks(torch.from_numpy(sums)).numpy().reshape(-1, 4)

    def __call__(self, poll=lambda: None, bar: bool = False) -> dict:
        """acc, acc_norm, their standard errors, the protocol, the number of items and of those cut; and `choices`, by
        item: the two choices, the label, the losses.
        """
        losses = self.losses(poll, bar)
        with np.errstate(
            divide="ignore"
        ):  # an ending of no characters is not chosen, as in lm-eval
            by_sum, by_norm = (
                losses.argmin(1),
                (losses / self.items.divisors.reshape(-1, 4)).argmin(1),
            )
        n, labels = len(losses), self.items.labels
        acc, acc_norm = (by_sum == labels).mean().item(), (by_norm == labels).mean().item()
        se = lambda share: (share * (1 - share) / n) ** 0.5
        return dict(
            protocol=self.items.protocol,
            items=n,
            cut=self.cut,
            acc=acc,
            acc_se=se(acc),
            acc_norm=acc_norm,
            se=se(acc_norm),
            choices=list(zip(by_sum.tolist(), by_norm.tolist(), labels.tolist(), losses.tolist())),
        )


def for_training(limit: int, model, world: World, compute: Compute) -> HellaSwag | None:
    """The set for evaluations beside training; None when limit is 0 or there is no data.

    The first process alone fetches and reads it, for the others may be on machines without it.
    """
    items = on_rank0(lambda: (path := fetch()) and load(path, "gpt2", limit)) if limit else None
    return HellaSwag(items, model, world, compute) if items else None


def main(
    model: str = "",
    protocol: Literal["gpt2", "harness"] = "gpt2",
    limit: int = 0,
    data: str = "",
    out: str = "",
    per_item: bool = False,
    device: str = "auto",
    dtype: str = "auto",
):
    """HellaSwag accuracy of a model.

    Args:
        model: run directory, checkpoint, or Hugging Face GPT-2 name or folder; the newest run in log/ unless given
        protocol: gpt2 (raw context, mean loss per token) or harness (lm-eval 0.4.13)
        limit: items, spread over the set; 0 = all
        data: jsonl or jsonl.gz; the validation set, fetched into data/, unless given
        out: file for the result, as JSON
        per_item: each item's choices and losses, too, in that file
        device: auto, cuda, mps or cpu
        dtype: auto, bfloat16 or float32
    """
    import hf

    if data and not Path(data).exists():
        raise UserError(f"no such file: {data}; hint: --data FILE")
    if (path := Path(data) if data else fetch()) is None:
        raise UserError("no data; hint: --data FILE")
    world = World(0, 1, pick_device(device))
    gpt = hf.load(model or hf.newest_run()).to(world.device)
    kind = autocast_dtype(world.device, dtype)
    compute = Compute(world.device, kind, compiled=True)
    result = HellaSwag(load(path, protocol, limit), gpt, world, compute)(bar=True)
    choices = result.pop("choices")
    if result["cut"]:
        print(
            f"{result['cut']} items were longer than the model's {gpt.config.block_size} tokens: their beginning was cut"
        )
    print(json.dumps(result))
    if out:
        details = [
            dict(zip(("acc_choice", "acc_norm_choice", "label", "losses"), c)) for c in choices
        ]
        Path(out).write_text(
            json.dumps(result | ({"per_item": details} if per_item else {}), indent=1)
        )


if __name__ == "__main__":
    run_script(lambda: parse(main))
