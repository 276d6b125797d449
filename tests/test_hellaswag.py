"""python -m pytest tests/test_hellaswag.py : both protocols against their definition and against lm-eval, item by item."""

import contextlib
import gzip
import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, run, write_shards

import hellaswag
from config import UserError
from distributed import World
from model import GPT, GPTConfig

ONE = World(0, 1, torch.device("cpu"))
OWN = ROOT / "tests" / "hellaswag_items.jsonl"  # written for these tests, in the data set's form
ITEMS = [json.loads(line) for line in OWN.read_text().splitlines()]
PLAIN = contextlib.nullcontext


def make_model(**more) -> GPT:
    """Random weights, large enough that the losses of endings differ by nats."""
    torch.manual_seed(5)
    m = GPT(GPTConfig(**dict(block_size=256, n_layer=2, n_head=2, n_embd=32) | more))
    with torch.no_grad():
        m.wte.weight.mul_(10)
        for p in m.parameters() if m.config.modern else ():  # half of it starts at 0
            p.add_(0.2 * torch.randn_like(p))
    return m


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(hellaswag, "DATA", tmp_path_factory.mktemp("cache") / "hellaswag_val.jsonl")


@torch.no_grad()
def naive(model, paths, block_size=None) -> list[float]:
    """One ending at a time, no padding, all logits: summed losses."""
    losses = []
    for context, ending, _ in paths:
        ids = (context + ending)[-((block_size or 10**6) + 1) :]
        log_p = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        n = min(len(ending), len(ids) - 1)
        losses.append(-sum(log_p[i - 1, ids[i]].item() for i in range(len(ids) - n, len(ids))))
    return losses


@pytest.mark.parametrize(
    "switches",
    [dict(), dict(use_rope=True), dict(use_rope=True, use_swiglu=True), dict(arch="modern")],
    ids=["learned", "rope", "swiglu", "modern"],
)
@pytest.mark.parametrize("protocol", hellaswag.PROTOCOLS)
def test_equals_the_naive_loop(switches, protocol):
    """Losses of all endings to 1e-4, and the same choices, however the rows are filled."""
    model = make_model(**switches)
    paths = [hellaswag.encode_item(item, protocol) for item in ITEMS]
    expected = np.array([naive(model, p) for p in paths])
    by_norm = expected / np.array([[d for _, _, d in p] for p in paths])
    labels = np.array([item["label"] for item in ITEMS])
    assert (expected.argmin(1) != by_norm.argmin(1)).any() and len(
        set(expected.argmin(1))
    ) > 2  # it is about something
    items = hellaswag.load(OWN, protocol)
    for rows in (1, 3, 64):
        h = hellaswag.HellaSwag(items, model, ONE, PLAIN, rows=rows)
        np.testing.assert_allclose(h.losses(), expected, atol=1e-4, rtol=0)
        assert (
            len({tuple(map(tuple, (t.shape for t in b))) for b in h.batches}) == 1
        )  # one shape: compiled once
        r = h()
        assert (r["acc"], r["acc_norm"]) == (
            (expected.argmin(1) == labels).mean(),
            (by_norm.argmin(1) == labels).mean(),
        )
        assert (r["items"], r["cut"], r["protocol"]) == (len(ITEMS), 0, protocol)
        assert r["se"] == pytest.approx((r["acc_norm"] * (1 - r["acc_norm"]) / len(ITEMS)) ** 0.5)


@pytest.mark.parametrize("protocol", hellaswag.PROTOCOLS)
@pytest.mark.parametrize("use_rope", [False, True])
def test_long_contexts_lose_their_beginning(protocol, use_rope):
    """Each ending keeps as much of its context as the model can take; how many items that befell is told."""
    model = make_model(block_size=32, use_rope=use_rope)
    paths = [hellaswag.encode_item(item, protocol) for item in ITEMS]
    h = hellaswag.HellaSwag(hellaswag.load(OWN, protocol), model, ONE, PLAIN, rows=2)
    np.testing.assert_allclose(h.losses(), [naive(model, p, 32) for p in paths], atol=1e-4, rtol=0)
    assert (
        0
        < h()["cut"]
        == sum(max(len(c) + len(e) for c, e, _ in p) > 33 for p in paths)
        < len(ITEMS)
    )


def test_texts_longer_than_a_row_make_longer_rows(model):
    items = hellaswag.load(OWN, "gpt2")
    short, long = (hellaswag.pack(items, 256, 2, torch.device("cpu"), T=T)[0] for T in (32, 512))
    assert short[0].idx.shape[1] == 128 and long[0].idx.shape[1] == 512
    found = []
    for batches in (short, long):
        h = hellaswag.HellaSwag(items, model, ONE, PLAIN)
        h.batches, h.rounds = batches, len(batches)
        found.append(h.losses())
    np.testing.assert_allclose(*found, atol=1e-4, rtol=0)


def test_rows_are_well_filled(shared):
    items = hellaswag.load(shared / "hellaswag_val.jsonl.gz", "gpt2", 2000)
    batches, _ = hellaswag.pack(items, 1024, 4, torch.device("cpu"))
    assert sum((b.part != 7).sum().item() for b in batches) > 0.97 * sum(
        b.part.numel() for b in batches
    )


def test_the_ranks_share_the_rows(model):
    """Each ending is scored by one process, and all processes poll equally often."""
    items = hellaswag.load(OWN, "harness")
    whole, polls = hellaswag.HellaSwag(items, model, ONE, PLAIN, rows=1).losses(), []
    parts = [
        hellaswag.HellaSwag(items, model, World(r, 4, torch.device("cpu")), PLAIN, rows=1).losses(
            lambda: polls.append(r)
        )
        for r in range(4)
    ]
    np.testing.assert_allclose(sum(parts), whole, atol=1e-5)
    assert all((p != 0).any() for p in parts) and len({polls.count(r) for r in range(4)}) == 1


def test_compiled_once(model):
    """All batches, and a second evaluation, use the one compiled graph; the losses are the same."""
    items = hellaswag.load(OWN, "gpt2")
    h = hellaswag.HellaSwag(items, model, ONE, PLAIN, rows=2)
    plain, compiled = h.losses(), []

    def backend(graph, inputs):
        compiled.append(1)
        return graph.forward

    h.nats = torch.compile(hellaswag.nats, fullgraph=True, dynamic=False, backend=backend)
    assert len(h.batches) > 2
    for _ in range(2):
        np.testing.assert_allclose(h.losses(), plain, atol=1e-4)
    assert len(compiled) == 1


# ---- rendering -----------------------------------------------------------------------------------------------------


def test_rendering():
    item = dict(
        activity_label="Home",
        ctx_a="[header] How to sing [title] Breathe. [step] Slowly.",
        ctx_b="then YOU",
        ctx="",
        endings=["open  your mouth [laughs] wide", " [title] Stop. [step] Go", "x", "y"],
        label=1,
    )
    query, endings = hellaswag.render(item)
    assert query == "Home: How to sing. Breathe. Slowly. Then you"
    assert endings[:2] == ["open your mouth wide", " Stop. Go"]
    assert hellaswag.render(dict(activity_label="A", ctx="b c", endings=["d"])) == ("A: b c", ["d"])


def test_context_and_ending_are_encoded_together_and_split():
    item = dict(
        activity_label="A",
        ctx_a="How to [step]",
        ctx_b="",
        endings=["sing", "[x] loud", "a", "b"],
        label=0,
    )
    (context, ending, n), (_, second, m), *_ = hellaswag.encode_item(item, "harness")
    decode = hellaswag.gpt2().decode
    assert (
        decode(context) == "A: How to" and decode(ending) == "  sing" and n == 4
    )  # the blanks go with the ending
    assert decode(second) == "   loud" and m == 5


# ---- lm-eval -------------------------------------------------------------------------------------------------------


def lm_eval_samples(model, folder: Path, task: str) -> list[dict]:
    """What lm-eval makes of a task with this model: its own tokenising and splitting, one ending at a time."""
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager

    class Ours(TemplateLM):
        eot_token_id = hellaswag.EOT
        tok_encode = lambda self, text, add_special_tokens=None, **_: (
            hellaswag.gpt2().encode_ordinary(text)
        )

        def _loglikelihood_tokens(self, requests, **_):
            return [
                (-naive(model, [(c, e, 0)], model.config.block_size)[0], False)
                for _, c, e in requests
            ]

        loglikelihood_rolling = generate_until = None

    (folder / "local.yaml").write_text(task)
    results = lm_eval.simple_evaluate(
        model=Ours(),
        tasks=["local"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    return sorted(results["samples"]["local"], key=lambda s: s["doc_id"])


@pytest.mark.slow
@pytest.mark.parametrize("which", ["own", "rendered"])
def test_equals_lm_eval(model, tmp_path, monkeypatch, request, which):
    """acc and acc_norm item by item: the stock task on our own items, and 250 shared ones whose text is rendered already."""
    lm_eval = pytest.importorskip("lm_eval", reason="pip install lm-eval==0.4.13")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    data = tmp_path / "items.jsonl"
    if which == "own":
        stock = Path(lm_eval.__file__).parent / "tasks" / "hellaswag" / "hellaswag.yaml"
        task = f"include: {stock}\n"
        shutil.copy(OWN, data)
    else:
        raw = gzip.open(
            request.getfixturevalue("shared") / "hellaswag_val.jsonl.gz", "rt", encoding="utf-8"
        ).readlines()
        data.write_text("".join(raw[::40]), encoding="utf-8")
        task = (
            'output_type: multiple_choice\nvalidation_split: validation\ndoc_to_text: "{{activity_label}}: {{ctx}}"\n'
            'doc_to_target: "{{label}}"\ndoc_to_choice: endings\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n'
        )
    task += f"task: local\ntraining_split: null\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    validation: {data}\n"
    samples = lm_eval_samples(model, tmp_path, task)
    result = hellaswag.HellaSwag(hellaswag.load(data, "harness"), model, ONE, PLAIN)()
    assert len(samples) == result["items"] == (44 if which == "own" else 252)
    for sample, (by_sum, by_norm, label, losses) in zip(samples, result["choices"]):
        np.testing.assert_allclose(losses, [-float(r[0][0]) for r in sample["resps"]], atol=1e-3)
        assert (sample["acc"], sample["acc_norm"]) == (by_sum == label, by_norm == label), sample[
            "doc"
        ]


# ---- data ----------------------------------------------------------------------------------------------------------


def test_limit_is_spread_and_files_may_be_gz(tmp_path):
    path = tmp_path / "h.jsonl.gz"
    path.write_bytes(gzip.compress(OWN.read_bytes()))
    items = hellaswag.load(path, "gpt2", 4)
    assert (
        items.labels.tolist() == [ITEMS[i]["label"] for i in (0, 11, 22, 33)]
        and len(hellaswag.load(path).labels) == 44
    )
    first = items.tokens[: items.lengths[0, 0]].tolist()
    assert first == hellaswag.gpt2().encode_ordinary(ITEMS[0]["ctx"])


def test_tokens_are_kept_on_disk(tmp_path, monkeypatch):
    """Tokenised once per file and protocol; a damaged or unwritable cache is made anew or done without."""
    a = hellaswag.load(OWN)
    (cache,) = hellaswag.DATA.parent.glob("*.npz")
    with monkeypatch.context() as m:
        m.setattr(hellaswag, "tokenise", None)
        b = hellaswag.load(OWN)
    raw = bytearray(cache.read_bytes())
    raw[len(raw) // 2] ^= 1
    cache.write_bytes(raw)
    c = hellaswag.load(OWN)
    monkeypatch.setattr(hellaswag, "DATA", tmp_path / "no" / "such" / "place")
    for other in (b, c, hellaswag.load(OWN)):
        assert all(np.array_equal(x, y) for x, y in zip(a[:4], other[:4]))


def test_download(tmp_path, monkeypatch, capsys):
    """Fetched once, under its own name only when its hash is right; without a network one line."""
    raw = OWN.read_bytes()
    monkeypatch.setattr(hellaswag.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(raw))
    assert (
        hellaswag.fetch() is None
        and "SHA-256" in (out := capsys.readouterr().out)
        and "hint: put" in out
        and out.count("\n") == 1
    )
    assert not list(hellaswag.DATA.parent.iterdir())
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(raw).hexdigest())
    assert hellaswag.fetch() == hellaswag.DATA and hellaswag.DATA.read_bytes() == raw
    monkeypatch.setattr(hellaswag.urllib.request, "urlopen", None)
    assert hellaswag.fetch() == hellaswag.DATA


def test_foreign_files_are_refused(tmp_path):
    for text in ('{"a": 1}\n', "", "[1]\n", json.dumps(dict(ITEMS[0], endings=["a"])) + "\n"):
        (tmp_path / "x.jsonl").write_text(text)
        with pytest.raises(UserError, match="x.jsonl is not HellaSwag"):
            hellaswag.load(tmp_path / "x.jsonl")


# ---- beside training, and alone ------------------------------------------------------------------------------------


def test_training_and_the_command_line(tmp_path):
    """A run on two ranks logs it; the command gives the same figures, per item on request, and one line for a mistake."""
    data = write_shards(tmp_path / "data", {"train": [6000], "val": [2000]})
    args = [
        *TINY,
        "--data_root",
        data,
        "--log_dir",
        tmp_path,
        "--max_steps",
        "2",
        "--run_name",
        "r",
    ]
    args[args.index("--vocab_size") + 1], args[args.index("--hellaswag_limit") + 1] = "50304", "20"
    code = (
        "import sys, pathlib; sys.path.insert(0, '.'); import hellaswag, train_gpt2, config\n"
        f"hellaswag.DATA = pathlib.Path({str(tmp_path / 'hellaswag_val.jsonl')!r})\nconfig.command_line(train_gpt2.main)"
    )
    (tmp_path / "train.py").write_text(code)
    shutil.copy(OWN, tmp_path / "hellaswag_val.jsonl")
    done = run(tmp_path / "train.py", "gpt2-rope", *args, nproc=2, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "20 items, gpt2 protocol" in done.stdout, (
        done.stdout + done.stderr
    )
    logged = [
        json.loads(line)
        for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
        if "hella_norm" in line
    ]
    assert [r["step"] for r in logged] == [0, 2] and logged[0]["val/hella_se"] > 0
    done = run(
        "hellaswag.py",
        "--model",
        tmp_path / "r",
        "--data",
        OWN,
        "--limit",
        "20",
        "--out",
        tmp_path / "o.json",
        "--per_item",
        "True",
        "--dtype",
        "float32",
        "--device",
        "cpu",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "o.json").read_text())
    assert (
        result["acc_norm"] == pytest.approx(logged[-1]["val/hella_norm"])
        and len(result["per_item"]) == 20
    )
    assert "items were longer than the model's 32 tokens" in done.stdout
    assert result["protocol"] == "gpt2" and {"acc", "acc_se", "se", "items", "cut"} <= result.keys()
    done = run("hellaswag.py", "--model", tmp_path / "r", "--data", "nowhere.jsonl")
    assert (
        done.returncode == 2
        and "no such file: nowhere.jsonl" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_the_first_process_alone_reads_the_set(model, monkeypatch):
    """The others get it from there: they may be on machines without the file."""
    items = hellaswag.load(OWN, "gpt2", 10)
    monkeypatch.setattr(
        hellaswag, "from_first", lambda make: items
    )  # as in any but the first: make() is not called
    monkeypatch.setattr(hellaswag, "load", None)
    monkeypatch.setattr(hellaswag, "fetch", None)
    assert hellaswag.for_training(10, model, ONE, PLAIN, False, print)()["items"] == 10


@pytest.mark.slow
def test_the_shared_set(shared, model):
    """500 items of the real validation set: the choices of the naive loop, margins below 1e-5 aside, and near chance."""
    items = hellaswag.load(shared / "hellaswag_val.jsonl.gz", "gpt2", 500)
    found = hellaswag.HellaSwag(items, model, ONE, PLAIN)()
    ends = items.lengths.sum(1).cumsum()
    for i, (by_sum, by_norm, label, losses) in enumerate(found["choices"]):
        paths = [
            (
                items.tokens[ends[p] - sum(n) : ends[p] - n[1]].tolist(),
                items.tokens[ends[p] - n[1] : ends[p]].tolist(),
                0,
            )
            for p, n in enumerate(items.lengths[4 * i : 4 * i + 4], 4 * i)
        ]
        expected = np.array(naive(model, paths))
        np.testing.assert_allclose(losses, expected, atol=1e-3)
        best, second = np.sort(expected)[:2]
        assert by_sum == expected.argmin() or second - best < 1e-5
    assert 0.15 < found["acc_norm"] < 0.4
