"""python -m pytest tests/test_bench.py

bench.py as a user calls it, at a size where the figures mean nothing: exit status, table, and the line of JSON.
"""

import json
import statistics

import numpy as np
import pytest

import bench
import shards
from conftest import run

TINY = ("bench.py", "step", "--size", "tiny", "--B", "2", "--T", "32", "--vocab_size", "256", "--steps", "3",
        "--device", "cpu", "--dtype", "float32", "--use_compile", "False")


def test_step_prints_a_table_and_one_line_of_json():
    done = run(*TINY, "--use_rope", "True")
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.strip().splitlines()
    result = json.loads(last)
    assert result["part"] == "step" and result["ratio"] > 0
    assert result["ratio"] == pytest.approx(result["tok_s"] / result["baseline_tok_s"])
    for tok_s, ms in (("tok_s", "ours_ms"), ("baseline_tok_s", "baseline_ms")):
        assert len(result[ms]) == 3
        assert result[tok_s] == pytest.approx(1e3 * 2 * 32 / statistics.median(result[ms]))
        assert any(f"{result[tok_s]:,.0f}" in line for line in table)  # absolute figures for people, too
    assert result.items() >= dict(B=2, T=32, use_rope=True, use_compile=False, dtype="float32").items()
    assert {"torch", "transformers", "threads", "device"} <= result.keys()


def test_sides_take_turns():
    calls = []
    sides = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b") or 7}
    ms, last = bench.take_turns(sides, warmup=2, rounds=3)
    assert "".join(calls) == "aabb" + "ab" * 3
    assert last == {"a": None, "b": 7} and [len(values) for values in ms.values()] == [3, 3]


def test_the_baseline_is_transformers_at_its_best():
    baseline = bench.transformers_gpt2(32, dict(n_layer=2, n_head=2, n_embd=64, vocab_size=256))
    c = baseline.config
    assert c._attn_implementation == "sdpa" and c.use_cache is False and baseline.training
    assert c.resid_pdrop == c.embd_pdrop == c.attn_pdrop == 0.0
    assert baseline.get_input_embeddings().weight is baseline.get_output_embeddings().weight  # tied


LOADER = ("bench.py", "loader", "--B", "4", "--T", "64", "--windows", "1000", "--tokens", "50000", "--batches", "5",
          "--rounds", "3")


def test_loader_prints_a_table_and_one_line_of_json():
    done = run(*LOADER)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.strip().splitlines()
    result = json.loads(last)
    assert result["part"] == "loader" and result["memory_ratio"] > 0 and result["index_bytes"] < 1e6
    assert result["ratio"] == pytest.approx(result["tok_s"] / result["baseline_tok_s"])
    assert result["tok_s"] == pytest.approx(1e3 * 5 * 4 * 64 / statistics.median(result["ours_ms"]))
    assert len(result["ours_ms"]) == len(result["baseline_ms"]) == 3 and len(result["ratio_quartiles"]) == 3
    assert {"windows_tok_s", "thread_tok_s", "index_s", "baseline_index_s", "baseline_index_bytes"} <= result.keys()
    assert any("index of 1,000 windows" in line for line in table)
    done = run(*LOADER, "--tokens", "100")
    assert done.returncode == 2 and done.stderr.startswith("error: 100 tokens ") and done.stderr.count("\n") == 1


def test_both_loaders_yield_the_same_windows_in_another_order(tmp_path):
    """Like for like: x, y int64, contiguous, every window of an epoch."""
    (tmp_path / "s").mkdir()
    for i in range(2):
        np.save(tmp_path / "s" / f"a_train_{i}.npy", np.arange(i * 2000, i * 2000 + 1601, dtype=np.uint16))
    usual = bench.UsualLoader(str(tmp_path / "s"), 4, 16)
    ours = shards.Loader(bench.open_windows(str(tmp_path / "s"), 16), 64, 4, 0, 1, bench.torch.device("cpu"))
    rows = {}
    for name, get in (("usual", usual.get_batch), ("ours", lambda: ours.next()[0][:2])):
        rows[name] = []
        for _ in range(50):
            x, y = get()
            assert x.dtype == y.dtype == bench.torch.int64 and x.is_contiguous() and y.is_contiguous()
            rows[name] += [(*a, b) for a, b in zip(x.tolist(), y[:, -1].tolist())]
    ours.close()
    assert rows["usual"] != rows["ours"] and set(rows["usual"]) <= set(rows["ours"]) and len(set(rows["ours"])) == 200


def test_sparse_shards_are_shards(tmp_path):
    bench.sparse_shards(str(tmp_path / "s"), [10_000_000, 500])
    assert [s.tokens for s in shards.open_shards(str(tmp_path / "s"), "train", 64)] == [10_000_000, 500]
    assert not np.load(tmp_path / "s" / "sparse_train_000000.npy", mmap_mode="r")[::10_000].any()


def test_mistakes_are_one_line():
    done = run(*TINY, "--B", "0")
    assert done.returncode == 2 and done.stderr.startswith("error: B is 0") and "hint: --B" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_save_prints_a_table_and_one_line_of_json(tmp_path):
    done = run("bench.py", "save", "--size", "tiny", "--rounds", "2", "--device", "cpu", "--folder", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["ratio"] == pytest.approx(result["synchronous_ms"] / result["save_ms"]) and len(result["ours_ms"]) == 2
    assert result["bytes"] > 3 * 4 * 50304 * 64 and not list(tmp_path.iterdir())
