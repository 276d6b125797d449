"""Test both HellaSwag protocols against their definition and against lm-eval, item by item."""

import dataclasses
import gzip
import hashlib
import io
import json
import shutil
import tracemalloc
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, run, write_shards

import hellaswag
from model import GPT, GPTConfig
from runtime import checkpoint
from runtime.command_line import UserError, parse
from runtime.device import Compute
from runtime.world import World
from tokenizer import EOT, gpt2

CPU = torch.device("cpu")
ONE = World(0, 1, CPU)
FLOAT32 = Compute(CPU, torch.float32, compiled=False)
PROTOCOLS = ("gpt2", "harness")
OWN = ROOT / "tests" / "hellaswag_items.jsonl"  # written for these tests, in the data set's form
ITEMS = [json.loads(line) for line in OWN.read_text().splitlines()]


def make_model(**more) -> GPT:
    """Build a model of random weights, so large that the losses of endings differ by nats."""
    torch.manual_seed(5)
    model = GPT(GPTConfig(**{"block_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 32} | more))
    with torch.no_grad():
        model.wte.weight.mul_(10)
        if model.config.modern:
            for p in model.parameters():  # half of them start at 0
                p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(hellaswag, "DATA", tmp_path_factory.mktemp("cache") / "hellaswag_val.jsonl")


@torch.no_grad()
def naive(model, endings, block_size: int = 10**6) -> list[float]:
    """Sum the losses of one ending at a time: no padding, all logits."""
    losses = []
    for context, ending, _ in endings:
        ids = (context + ending)[-(block_size + 1) :]
        log_p = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        n = min(len(ending), len(ids) - 1)
        losses.append(-sum(log_p[i - 1, ids[i]].item() for i in range(len(ids) - n, len(ids))))
    return losses


@pytest.mark.parametrize(
    "protocol, switches",
    [
        ("gpt2", {}),
        ("gpt2", {"use_rope": True}),
        ("gpt2", {"arch": "modern"}),
        ("harness", {}),
        # the protocols differ in ids alone, and the MLP sees one token: a second look
        pytest.param("gpt2", {"use_rope": True, "use_swiglu": True}, marks=pytest.mark.slow),
        pytest.param("harness", {"use_rope": True}, marks=pytest.mark.slow),
        pytest.param("harness", {"use_rope": True, "use_swiglu": True}, marks=pytest.mark.slow),
        pytest.param("harness", {"arch": "modern"}, marks=pytest.mark.slow),
    ],
)
def test_equals_the_naive_loop(protocol, switches):
    """Losses of all endings to 1e-4, and the same choices, however the rows are filled."""
    model = make_model(**switches)
    endings = [hellaswag.encode_endings(item, protocol) for item in ITEMS]
    expected = np.array([naive(model, of_item) for of_item in endings])
    by_norm = expected / np.array([[divisor for _, _, divisor in of_item] for of_item in endings])
    labels = np.array([item["label"] for item in ITEMS])
    # the two accuracies and the four choices differ, so that a mistake shows
    assert (expected.argmin(1) != by_norm.argmin(1)).any()
    assert len(set(expected.argmin(1))) > 2
    items = hellaswag.load_items(OWN, protocol)
    for rows in (1, 3, 64):
        h = hellaswag.HellaSwag(items, model, ONE, FLOAT32, rows=rows)
        np.testing.assert_allclose(h.losses(), expected, atol=1e-4, rtol=0)
        shapes = {tuple(t.shape for t in batch) for batch in h.batches}
        assert len(shapes) == 1  # compiled once
        result = h()
        assert result["acc"] == (expected.argmin(1) == labels).mean()
        assert result["acc_norm"] == (by_norm.argmin(1) == labels).mean()
        assert (result["items"], result["cut"], result["protocol"]) == (len(ITEMS), 0, protocol)
        variance = result["acc_norm"] * (1 - result["acc_norm"])
        assert result["se"] == pytest.approx((variance / len(ITEMS)) ** 0.5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("use_rope", [False, True])
def test_long_contexts_lose_their_beginning(protocol, use_rope):
    """Each ending keeps as much context as the model can take; the items cut are counted."""
    model = make_model(block_size=32, use_rope=use_rope)
    endings = [hellaswag.encode_endings(item, protocol) for item in ITEMS]
    items = hellaswag.load_items(OWN, protocol)
    h = hellaswag.HellaSwag(items, model, ONE, FLOAT32, rows=2)
    expected = [naive(model, of_item, 32) for of_item in endings]
    np.testing.assert_allclose(h.losses(), expected, atol=1e-4, rtol=0)
    too_long = [max(len(c) + len(e) for c, e, _ in of_item) > 33 for of_item in endings]
    assert 0 < h()["cut"] == sum(too_long) < len(ITEMS)


def test_texts_longer_than_a_row_make_longer_rows(model):
    """T grows to a multiple of 128 that holds the longest text; the losses stay the same."""
    items = hellaswag.load_items(OWN, "gpt2")
    short, _ = hellaswag.pack_items(items, 256, 2, CPU, T=32)
    long, _ = hellaswag.pack_items(items, 256, 2, CPU, T=512)
    assert short[0].idx.shape[1] == 128
    assert long[0].idx.shape[1] == 512
    losses = []
    for batches in (short, long):
        h = hellaswag.HellaSwag(items, model, ONE, FLOAT32)
        h.batches, h.rounds = batches, len(batches)
        losses.append(h.losses())
    np.testing.assert_allclose(*losses, atol=1e-4, rtol=0)


def test_rows_are_well_filled(shared):
    """Less than 3% of the slots are padding."""
    items = hellaswag.load_items(shared / "hellaswag_val.jsonl.gz", "gpt2", 2000)
    batches, _ = hellaswag.pack_items(items, 1024, 4, CPU)
    used = sum((batch.segment != hellaswag.PADDING).sum().item() for batch in batches)
    assert used > 0.97 * sum(batch.segment.numel() for batch in batches)


def test_the_ranks_share_the_rows(model):
    """Each ending is scored by one rank, and all ranks poll equally often."""
    items = hellaswag.load_items(OWN, "harness")
    whole = hellaswag.HellaSwag(items, model, ONE, FLOAT32, rows=1).losses()
    parts = []
    polls = [[], [], [], []]
    for rank in range(4):
        h = hellaswag.HellaSwag(items, model, World(rank, 4, CPU), FLOAT32, rows=1)
        parts.append(h.losses(partial(polls[rank].append, 1)))
    np.testing.assert_allclose(sum(parts), whole, atol=1e-5)
    assert all((part != 0).any() for part in parts)
    assert len({len(calls) for calls in polls}) == 1


def test_compiled_once(model):
    """All batches, and a second evaluation, use the one compiled graph; the losses are the same."""
    items = hellaswag.load_items(OWN, "gpt2")
    h = hellaswag.HellaSwag(items, model, ONE, FLOAT32, rows=2)
    plain = h.losses()
    compiled = []

    def backend(graph, inputs):
        compiled.append(1)
        return graph.forward

    h.score = torch.compile(hellaswag.score_tokens, fullgraph=True, dynamic=False, backend=backend)
    assert len(h.batches) > 2
    for _ in range(2):
        np.testing.assert_allclose(h.losses(), plain, atol=1e-4)
    assert len(compiled) == 1


# --------------------------------------------------------------------------------------------------
# rendering


def test_rendering():
    """Headings in brackets go, [title] becomes a full stop, ctx_b is capitalised."""
    item = {
        "activity_label": "Home",
        "ctx_a": "[header] How to sing [title] Breathe. [step] Slowly.",
        "ctx_b": "then YOU",
        "ctx": "",
        "endings": ["open  your mouth [laughs] wide", " [title] Stop. [step] Go", "x", "y"],
        "label": 1,
    }
    query, endings = hellaswag.render_item(item)
    assert query == "Home: How to sing. Breathe. Slowly. Then you"
    assert endings[:2] == ["open your mouth wide", " Stop. Go"]
    rendered = {"activity_label": "A", "ctx": "b c", "endings": ["d"]}
    assert hellaswag.render_item(rendered) == ("A: b c", ["d"])


def test_context_and_ending_are_encoded_together_and_split():
    """Blanks at the end of the context go with the ending; acc_norm counts characters."""
    item = {
        "activity_label": "A",
        "ctx_a": "How to [step]",
        "ctx_b": "",
        "endings": ["sing", "[x] loud", "a", "b"],
        "label": 0,
    }
    first, second, *_ = hellaswag.encode_endings(item, "harness")
    decode = gpt2().decode
    assert (decode(first[0]), decode(first[1]), first[2]) == ("A: How to", "  sing", 4)
    assert (decode(second[1]), second[2]) == ("   loud", 5)


# --------------------------------------------------------------------------------------------------
# lm-eval


def lm_eval_samples(model, folder: Path, task: str) -> list[dict]:
    """Run a task of lm-eval: its own tokenizing and splitting, one ending at a time."""
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager

    class Ours(TemplateLM):
        eot_token_id = EOT

        def tok_encode(self, text, add_special_tokens=None, **_):
            return gpt2().encode_ordinary(text)

        def _loglikelihood_tokens(self, requests, **_):
            losses = naive(model, [(c, e, 0) for _, c, e in requests], model.config.block_size)
            return [(-loss, False) for loss in losses]

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


# HellaSwag as lm-eval has it, for items whose text is rendered already
RENDERED_TASK = """\
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{activity_label}}: {{ctx}}"
doc_to_target: "{{label}}"
doc_to_choice: endings
metric_list:
  - metric: acc
  - metric: acc_norm
"""
LOCAL_DATA = """\
task: local
training_split: null
dataset_path: json
dataset_kwargs:
  data_files:
    validation: """


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["own", "rendered"])
def test_equals_lm_eval(model, tmp_path, monkeypatch, request, kind):
    """acc and acc_norm item by item: the stock task on our items, and 252 of the shared ones."""
    lm_eval = pytest.importorskip("lm_eval", reason="pip install lm-eval==0.4.13")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    data = tmp_path / "items.jsonl"
    if kind == "own":
        stock = Path(lm_eval.__file__).parent / "tasks" / "hellaswag" / "hellaswag.yaml"
        task = f"include: {stock}\n"
        shutil.copy(OWN, data)
    else:
        archive = request.getfixturevalue("shared") / "hellaswag_val.jsonl.gz"
        with gzip.open(archive, "rt", encoding="utf-8") as f:
            data.write_text("".join(f.readlines()[::40]), encoding="utf-8")
        task = RENDERED_TASK
    samples = lm_eval_samples(model, tmp_path, f"{task}{LOCAL_DATA}{data}\n")
    items = hellaswag.load_items(data, "harness")
    result = hellaswag.HellaSwag(items, model, ONE, FLOAT32)()
    assert len(samples) == result["items"] == (44 if kind == "own" else 252)
    for sample, (by_sum, by_norm, label, losses) in zip(samples, result["choices"]):
        np.testing.assert_allclose(losses, [-float(r[0][0]) for r in sample["resps"]], atol=1e-3)
        assert sample["acc"] == (by_sum == label), sample["doc"]
        assert sample["acc_norm"] == (by_norm == label), sample["doc"]


# --------------------------------------------------------------------------------------------------
# data


def test_limit_is_spread_and_files_may_be_gz(tmp_path):
    path = tmp_path / "h.jsonl.gz"
    path.write_bytes(gzip.compress(OWN.read_bytes()))
    items = hellaswag.load_items(path, "gpt2", 4)
    assert items.labels.tolist() == [ITEMS[i]["label"] for i in (0, 11, 22, 33)]
    texts = np.split(items.tokens, items.lengths.ravel().cumsum()[:-1])
    endings = [e for i in (0, 11, 22, 33) for e in hellaswag.encode_endings(ITEMS[i], "gpt2")]
    assert [text.tolist() for text in texts] == [ids for e in endings for ids in e[:2]]
    assert items.divisors.tolist() == [divisor for _, _, divisor in endings]
    assert len(hellaswag.load_items(path).labels) == 44


def test_download(tmp_path, monkeypatch, capsys):
    """Downloaded once, named only when its hash is right; without a network one line."""
    raw = OWN.read_bytes()
    monkeypatch.setattr(hellaswag.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(raw))
    assert hellaswag.fetch_items() is None
    out = capsys.readouterr().out
    assert "SHA-256" in out and "hint: put" in out and out.count("\n") == 1
    assert not list(hellaswag.DATA.parent.iterdir())
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(raw).hexdigest())
    assert hellaswag.fetch_items() == hellaswag.DATA
    assert hellaswag.DATA.read_bytes() == raw
    monkeypatch.setattr(hellaswag.urllib.request, "urlopen", None)
    assert hellaswag.fetch_items() == hellaswag.DATA


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"label": -1}, "label is -1"),
        ({"label": 4}, "label is 4"),
        ({"label": "x"}, "label is 'x'"),
        ({"label": True}, "label is True"),
        ({"endings": ["a", "b", "c"]}, "expected 4 texts"),
        ({"endings": ["a", "b", "c", "d", "e"]}, "expected 4 texts"),
        ({"endings": ["a", "b", "c", 4]}, "expected 4 texts"),
        ({"endings": "abcd"}, "expected 4 texts"),
        ({"ctx": 3}, "ctx is 3"),
    ],
)
def test_each_item_is_checked(tmp_path, changes, words):
    """The line is named, blank ones counted.

    An item of three endings and one of five would make a file whose total is right.
    """
    path = tmp_path / "x.jsonl"
    lines = [json.dumps(item) for item in [*ITEMS[:2], ITEMS[0] | changes, *ITEMS[2:4]]]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"cannot be read as HellaSwag's jsonl, line 5 .*{words}"):
        hellaswag.load_items(path)


def test_blank_lines_and_a_byte_order_mark_are_no_items(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n" + OWN.read_bytes().replace(b"\n", b"\r\n\n") + b" \n")
    for x, y in zip(hellaswag.load_items(path)[:4], hellaswag.load_items(OWN)[:4]):
        assert np.array_equal(x, y)


def test_read_only_code_means_data_in_the_working_directory(tmp_path, monkeypatch):
    """Where data/ beside the code cannot be written, the file goes to data/ here."""
    raw = OWN.read_bytes()
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(raw).hexdigest())
    monkeypatch.setattr(hellaswag.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(raw))
    monkeypatch.setattr(hellaswag.os, "access", lambda path, mode: False)  # root may write anywhere
    monkeypatch.chdir(tmp_path)
    path = hellaswag.fetch_items()
    assert path == Path("data/hellaswag_val.jsonl")
    assert list(Path("data").iterdir()) == [path]
    assert not list(hellaswag.DATA.parent.iterdir())
    monkeypatch.setattr(hellaswag.urllib.request, "urlopen", None)
    assert hellaswag.fetch_items() == path


def test_a_model_without_gpt2s_ids_is_not_measured(tmp_path, capsys):
    """Skipped in training with one line, refused by the command."""
    small = make_model(vocab_size=1536)
    assert hellaswag.for_training(8, small, ONE, FLOAT32) is None
    assert capsys.readouterr().out.count("\n") == 1
    state = {"gpt_config": dataclasses.asdict(small.config)}
    checkpoint.write(tmp_path, 1, {"model.safetensors": small.state_dict()}, state)
    for scoring, words in (
        (hellaswag.Scoring(model=str(tmp_path), data=str(OWN)), "knows 1536 tokens"),
        (hellaswag.Scoring(model=str(tmp_path), data=str(OWN), limit=-1), "limit is -1"),
    ):
        with pytest.raises(UserError, match=words):
            scoring.run()


def test_foreign_files_are_refused(tmp_path):
    three_endings_missing = json.dumps(ITEMS[0] | {"endings": ["a"]}) + "\n"
    for text in ('{"a": 1}\n', "", "[1]\n", three_endings_missing, "[" * 100_000):
        (tmp_path / "x.jsonl").write_text(text)
        with pytest.raises(UserError, match="x.jsonl cannot be read as HellaSwag"):
            hellaswag.load_items(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match="cannot be read as HellaSwag"):
        hellaswag.load_items(tmp_path)


def test_a_small_file_of_a_huge_line_is_refused(tmp_path):
    """Far below its 600 MB."""
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b"a" * (20 << 20), 1) * 30)
    tracemalloc.start()
    with pytest.raises(UserError, match="more than 100,000,000 characters"):
        hellaswag.load_items(tmp_path / "x.jsonl.gz")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e8


# --------------------------------------------------------------------------------------------------
# during training, and alone


def options(**values) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_training_and_the_command_line(tmp_path, capsys):
    """A run on two ranks logs what the command finds; a mistake is one line."""
    data = write_shards(tmp_path / "data", {"train": [6000], "val": [2000]})
    changed = options(data_root=data, log_dir=tmp_path, max_steps=2, run_name="r")
    args = [*TINY, *changed]
    args[args.index("--vocab_size") + 1] = "50304"
    args[args.index("--hellaswag_limit") + 1] = "20"
    (tmp_path / "train.py").write_text(
        "import pathlib, hellaswag, train_gpt2\n"
        "from runtime.command_line import run_script\n"
        f"hellaswag.DATA = pathlib.Path({str(tmp_path / 'hellaswag_val.jsonl')!r})\n"
        "run_script(train_gpt2.main)\n"
    )
    shutil.copy(OWN, tmp_path / "hellaswag_val.jsonl")
    done = run(tmp_path / "train.py", "gpt2-rope", *args, nproc=2, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 items, gpt2 protocol" in done.stdout
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines if "hella_norm" in line]
    assert [record["step"] for record in logged] == [0, 2]
    assert logged[0]["val/hella_se"] > 0

    source = options(model=tmp_path / "r", data=OWN, limit=20)
    result_file = options(out=tmp_path / "o.json", per_item=True)
    more = options(dtype="float32", device="cpu")
    parse(hellaswag.Scoring, [*source, *result_file, *more]).run()
    printed = capsys.readouterr().out
    assert "items were longer than the model's 32 tokens" in printed
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["acc_norm"] == pytest.approx(logged[-1]["val/hella_norm"])
    assert len(result["per_item"]) == 20
    item_fields = ["acc_choice", "acc_norm_choice", "label", "losses"]
    assert list(result.pop("per_item")[0]) == item_fields
    assert result == json.loads(printed.splitlines()[-1])
    fields = ["protocol", "items", "cut", "acc", "acc_se", "acc_norm", "se"]
    assert list(result) == fields
    assert result["protocol"] == "gpt2"

    with pytest.raises(UserError, match="no such file: nowhere.jsonl"):
        hellaswag.Scoring(model=str(tmp_path / "r"), data="nowhere.jsonl").run()


def test_rank_0_alone_reads_the_set(model, monkeypatch):
    """The others get it from there: they may be on machines without the file."""
    items = hellaswag.load_items(OWN, "gpt2", 10)
    # as on any rank but 0: make() is not called
    monkeypatch.setattr(hellaswag, "on_rank0", lambda make: items)
    monkeypatch.setattr(hellaswag, "load_items", None)
    monkeypatch.setattr(hellaswag, "fetch_items", None)
    assert hellaswag.for_training(10, model, ONE, FLOAT32)()["items"] == 10


def test_no_data_or_limit_0_turns_it_off_during_training(model, monkeypatch):
    monkeypatch.setattr(hellaswag, "fetch_items", lambda: None)
    assert hellaswag.for_training(10, model, ONE, FLOAT32) is None
    monkeypatch.setattr(hellaswag, "fetch_items", None)
    assert hellaswag.for_training(0, model, ONE, FLOAT32) is None


@pytest.mark.slow
def test_the_shared_set(shared, model):
    """500 real items: the naive loop's choices, margins below 1e-5 aside, and near chance."""
    items = hellaswag.load_items(shared / "hellaswag_val.jsonl.gz", "gpt2", 500)
    result = hellaswag.HellaSwag(items, model, ONE, FLOAT32)()
    texts = np.split(items.tokens, items.lengths.ravel().cumsum()[:-1])
    for i, item in enumerate(result["choices"]):
        parts = [text.tolist() for text in texts[8 * i : 8 * i + 8]]
        expected = np.array(naive(model, zip(parts[::2], parts[1::2], [0] * 4)))
        np.testing.assert_allclose(item.losses, expected, atol=1e-3)
        best, second = np.sort(expected)[:2]
        assert item.acc_choice == expected.argmin() or second - best < 1e-5
    assert 0.15 < result["acc_norm"] < 0.4


def test_no_result_outlives_its_batch(model):
    """Else each would split the memory that its logits have freed (keep_freed_memory, on a CPU)."""
    items = hellaswag.load_items(OWN, "gpt2", 0)
    evaluate = hellaswag.HellaSwag(items, model, ONE, FLOAT32, rows=1)
    results = []

    def score(*args):
        assert all(result() is None for result in results)
        losses = hellaswag.score_tokens(*args)
        results.append(weakref.ref(losses))
        return losses

    evaluate.score = score
    evaluate.losses()
    assert len(results) > 2
