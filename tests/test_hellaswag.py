"""python -m pytest tests/test_hellaswag.py : the gpt2 protocol against its definition, item by item."""

import contextlib
import gzip
import json
import random

import pytest
import torch

import hellaswag
from config import UserError
from distributed import World
from model import GPT, GPTConfig
from tokenizer import gpt2

ONE = World(0, 1, torch.device("cpu"))
RNG = random.Random(0)
WORDS = "puts it on the old wooden table roof of a car cat under falls and laughs slowly into red water".split()
ITEMS = [dict(ctx=f"{who} takes the {what} and", label=i % 4, endings=[" ".join(RNG.choices(WORDS, k=RNG.randint(3, 6))) for _ in range(4)])
         for i, (who, what) in enumerate((w, x) for w in ("A man", "The woman in red", "She", "A very young child")
                                         for x in ("ladder", "ball", "paint brush"))]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    m = GPT(GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        m.wte.weight.mul_(10)
    return m


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "h.jsonl"
    path.write_text("".join(json.dumps(i) + "\n" for i in ITEMS))
    return path


@torch.no_grad()
def naive(model, item) -> tuple[int, int]:
    """One ending at a time, no padding: the choices by sum and by mean."""
    sums, means = [], []
    for ending in item["endings"]:
        ctx, end = gpt2().encode_ordinary(item["ctx"]), gpt2().encode_ordinary(" " + ending)
        log_p = model(torch.tensor([ctx + end]))[0].log_softmax(-1)
        nats = -sum(log_p[len(ctx) - 1 + i, t].item() for i, t in enumerate(end))
        sums.append(nats)
        means.append(nats / len(end))
    return sums.index(min(sums)), means.index(min(means))


def test_equals_the_naive_loop(model, file):
    choices = [naive(model, item) for item in ITEMS]
    acc, acc_norm = (sum(c[k] == i["label"] for c, i in zip(choices, ITEMS)) / len(ITEMS) for k in (0, 1))
    assert len({c[0] for c in choices}) > 1 and any(a != b for a, b in choices)  # the comparison is about something
    for batch_items in (1, 5, 12):
        r = hellaswag.evaluate(model, hellaswag.load(file, 0), ONE, contextlib.nullcontext, batch_items)
        assert (r["acc"], r["acc_norm"], r["items"]) == (pytest.approx(acc), pytest.approx(acc_norm), 12)
        assert r["se"] == pytest.approx((acc_norm * (1 - acc_norm) / 12) ** 0.5)


def test_counts_of_the_ranks_add_up(model, file):
    items = hellaswag.load(file, 0)
    whole = hellaswag.evaluate(model, items, ONE, contextlib.nullcontext)
    parts = [hellaswag.evaluate(model, items, World(r, 5, torch.device("cpu")), contextlib.nullcontext) for r in range(5)]
    assert sum(p["acc_norm"] for p in parts) == pytest.approx(whole["acc_norm"])


def test_long_contexts_lose_their_beginning(model):
    long = [dict(i, ctx="word " * 100 + i["ctx"]) for i in ITEMS]
    items = [dict(ctx=gpt2().encode_ordinary(i["ctx"]), endings=[gpt2().encode_ordinary(" " + e) for e in i["endings"]], label=i["label"])
             for i in long]
    longest = [max(map(len, i["endings"])) for i in items]
    cut = [dict(i, ctx=i["ctx"][-(65 - n):]) for i, n in zip(items, longest)]
    a, b = (hellaswag.evaluate(model, x, ONE, contextlib.nullcontext, 1) for x in (items, cut))
    assert a["items"] == 12 and abs(a["acc_norm"] - b["acc_norm"]) <= 3 / 12  # shorter endings keep a few tokens more


def test_limit_is_spread_and_files_may_be_gz(tmp_path, file):
    path = tmp_path / "h.jsonl.gz"
    path.write_bytes(gzip.compress(file.read_bytes()))
    assert [i["label"] for i in hellaswag.load(path, 3)] == [0, 0, 0] and len(hellaswag.load(path, 0)) == 12
    assert hellaswag.load(path, 3)[1]["ctx"] == gpt2().encode_ordinary(ITEMS[4]["ctx"])


def test_missing_and_foreign_files(tmp_path, capsys):
    assert hellaswag.load(tmp_path / "none.jsonl", 10) is None
    assert "skipped" in (out := capsys.readouterr().out) and "hint:" in out and out.count("\n") == 1
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="x.jsonl is not HellaSwag"):
        hellaswag.load(tmp_path / "x.jsonl", 0)


def test_the_shared_set(shared, model):
    """50 items of the real validation set: a random model is near chance."""
    items = hellaswag.load(shared / "hellaswag_val.jsonl.gz", 50)
    r = hellaswag.evaluate(model, items, ONE, contextlib.nullcontext)
    assert r["items"] == 50 and 0.05 < r["acc_norm"] < 0.5
