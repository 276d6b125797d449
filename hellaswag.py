"""HellaSwag (Zellers et al. 2019): which of four endings does the model find likeliest?

    python hellaswag.py --model log/gpt2-rope --limit 1000

The gpt2 protocol: raw `ctx`; " " + ending tokenised apart; `acc` picks the ending of the smallest summed loss,
`acc_norm` the one of the smallest mean loss per token. GPT-2 (124M) has acc 0.2859, acc_norm 0.2955.
"""

import gzip
import json
from pathlib import Path

import torch
import tyro

from config import UserError, command_line, one_line
from distributed import World, all_sum, autocast_dtype, pick_device
from tokenizer import gpt2

DATA = Path(__file__).parent / "data" / "hellaswag_val.jsonl"  # the validation set: 10,042 items


def load(path: Path, limit: int, say=print) -> list[dict] | None:
    """Items as dicts(ctx, endings: 4 lists of token ids; label), `limit` of them spread evenly over the set (0 = all).

    None, and one line that says so, when the file is not there. jsonl or jsonl.gz. Raises UserError for other content.
    """
    path = next((p for p in (Path(path), Path(f"{path}.gz")) if p.exists()), None)
    if path is None:
        say(f"hellaswag | skipped: its data is not there; hint: put the validation set (github.com/rowanz/hellaswag) at "
            f"data/{DATA.name}, or --hellaswag_limit 0")
        return None
    encode = gpt2().encode_ordinary
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f:
            raw = [json.loads(line) for line in f]
        n = min(limit or len(raw), len(raw))
        chosen = [raw[i * len(raw) // n] for i in range(n)]
        return [dict(ctx=encode(item["ctx"]), endings=[encode(" " + e) for e in item["endings"]], label=int(item["label"]))
                for item in chosen]
    except (ValueError, KeyError, TypeError, EOFError, OSError) as e:
        raise UserError(f"{path} is not HellaSwag's jsonl ({one_line(e)}); hint: remove it, or --hellaswag_limit 0")


@torch.no_grad()
def evaluate(model, items: list[dict], world: World, autocast, batch_items: int = 8, poll=lambda: None) -> dict:
    """acc, acc_norm, its standard error and the number of items. Items are split over the processes, counts summed.

    Rows of similar length go together, padded on the right: causal attention never looks there. poll() is called before
    each batch, equally often in all processes.
    """
    right = torch.zeros(2, dtype=torch.float64)
    longest = lambda item: len(item["ctx"]) + max(map(len, item["endings"]))
    mine = sorted(items[world.rank::world.world_size], key=longest)
    for at in range(0, -(-len(items) // world.world_size), batch_items):
        poll()
        if not (batch := mine[at: at + batch_items]):
            continue
        rows = [(item["ctx"], ending) for item in batch for ending in item["endings"]]
        T = min(max(len(c) + len(e) for c, e in rows) - 1, model.config.block_size)
        x, y = torch.zeros(len(rows), T, dtype=torch.int64), torch.full((len(rows), T), -1)
        for i, (ctx, ending) in enumerate(rows):
            ids = torch.tensor((ctx + ending)[-(T + 1):])  # too long for the model: the beginning goes
            x[i, : len(ids) - 1] = ids[:-1]
            first = max(len(ids) - 1 - len(ending), 0)
            y[i, first: len(ids) - 1] = ids[1 + first:]
        with autocast():
            nats = model(x.to(world.device), y.to(world.device), "none").sum(1).cpu()
        for item, total in zip(batch, nats.view(-1, 4)):
            lengths = torch.tensor([len(e) for e in item["endings"]])
            right += torch.tensor([total.argmin() == item["label"], (total / lengths).argmin() == item["label"]])
    acc, acc_norm = (all_sum(right) / len(items)).tolist()
    return dict(protocol="gpt2", acc=acc, acc_norm=acc_norm, se=(acc_norm * (1 - acc_norm) / len(items)) ** 0.5,
                items=len(items))


def main(model: str = "", limit: int = 0, data: str = str(DATA), device: str = "auto", dtype: str = "auto"):
    """HellaSwag accuracy of a model.

    Args:
        model: run directory, checkpoint, or Hugging Face GPT-2 name or folder; the newest run in log/ unless given
        limit: items, spread over the set; 0 = all
        data: jsonl or jsonl.gz
        device: auto, cuda, mps or cpu
        dtype: auto, bfloat16 or float32
    """
    import generate
    items = load(Path(data), limit)
    if items is None:
        raise UserError(f"no such file: {data}; hint: --data FILE")
    world = World(0, 1, pick_device(device))
    gpt = generate.load(model or generate.newest_run()).to(world.device)
    kind = autocast_dtype(world.device, dtype)
    autocast = lambda: torch.autocast(world.device.type, dtype=kind, enabled=kind != torch.float32)
    print(json.dumps(evaluate(gpt, items, world, autocast)))


if __name__ == "__main__":
    command_line(lambda: tyro.cli(main, use_underscores=True, config=(tyro.conf.FlagConversionOff,)))
