"""python -m pytest tests/test_bench.py

bench.py as a user calls it, at a size where the figures mean nothing: exit status, table, and the line of JSON.
"""

import json
import statistics

import pytest

import bench
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


def test_mistakes_are_one_line():
    done = run(*TINY, "--B", "0")
    assert done.returncode == 2 and done.stderr.startswith("error: B is 0") and "hint: --B" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
